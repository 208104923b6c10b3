"""How far a mean over samples may be from that over their population, from the sums that its chunks add to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core import trees


class Scatter(NamedTuple):
    """Of the means of some chunks around their common mean, updated chunk by chunk (Chan, Golub & LeVeque 1983).

    Where samples have the variance s^2, the mean over a chunk of weight W_k = sum w has s^2 Q_k/W_k^2, Q_k = sum w^2.
    So ``scatter`` has the expectation s^2 (sum Q_k/W_k - sum Q_k/W), and the variance of the common mean,
    s^2 sum Q_k/W^2, is estimated without bias for any weights that do not depend on the samples, and any chunks.
    """

    weight: Any  # W, of the chunks so far
    scatter: Any  # sum_k W_k |mean of chunk k - common mean|^2
    spare: Any  # sum_k Q_k/W_k
    squares: Any  # sum_k Q_k
    chunks: Any  # how many have weight

    @classmethod
    def zero(cls, dtype) -> Scatter:
        return cls(*(jnp.zeros((), dtype) for _ in cls._fields))

    def add(self, total, chunk, weight) -> Scatter:
        """With one more chunk: its weighted sum ``chunk``, the sum ``total`` of those before, the weights inside."""
        mass, squares = jnp.sum(weight), jnp.sum(weight**2)
        weighs = mass > 0
        share = jnp.where(weighs, mass, 1.0)
        before = jnp.where(self.weight > 0, self.weight, 1.0)
        apart = trees.squared_norm(trees.sub(trees.scale(1 / share, chunk), trees.scale(1 / before, total)))
        moved = jnp.where(self.weight > 0, self.weight * mass / (before + mass) * apart, 0.0)
        following = Scatter(
            weight=self.weight + mass,
            scatter=self.scatter + moved.astype(self.scatter.dtype),
            spare=self.spare + squares / share,
            squares=self.squares + squares,
            chunks=self.chunks + 1,
        )
        return trees.where(weighs, following, self)

    def standard_error(self):
        """Estimate of that of the common mean; inf where fewer than two chunks have weight."""
        several = self.chunks > 1
        weight = jnp.where(several, self.weight, 1.0)
        freedom = jnp.where(several, self.spare - self.squares / weight, 1.0)
        return jnp.where(several, jnp.sqrt(self.squares * self.scatter / freedom) / weight, jnp.inf)
