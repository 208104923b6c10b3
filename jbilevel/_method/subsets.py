"""Nested subsets of a batch that grow once the noise of their mean gradient hides it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FIRST = 16  # samples, if there are as many
GROW = 2
NOISY = 3.0  # standard error of the mean gradient, over its norm, above which more samples join
MEMORY = 0.9  # of the running mean of that


class Subset(NamedTuple):
    """The first samples in a random order, in which those that are solved together stand together."""

    place: Any  # (n,) of each sample: how many may come before
    size: Any  # samples with a place below it belong to the subset
    count: Any  # such a size with all that have weight
    noise: Any  # running mean of the relative standard error of the gradient; of the subset, for that of the batch

    @classmethod
    def first(cls, key, weight, chunk: int) -> Subset:
        """weight: (n,) of the samples. chunk: how many of them, side by side in the batch, are solved together."""
        of_chunk = jnp.arange(weight.shape[0]) // chunk
        weighs = jnp.zeros((-(-weight.shape[0] // chunk),), jnp.int32).at[of_chunk].add(weight != 0) > 0
        # integers, which are the same in every precision; those without weight come last
        drawn = jax.random.permutation(key, weighs.size) + weighs.size * ~weighs
        place = chunk * jnp.argsort(jnp.argsort(drawn))[of_chunk].astype(jnp.int32)
        count = chunk * jnp.sum(weighs, dtype=jnp.int32)
        # a single chunk has no spread
        return cls(place, jnp.minimum(max(FIRST, 2 * chunk), count), count, jnp.zeros((), weight.dtype))

    @property
    def whole(self):
        return self.size >= self.count

    @property
    def noisy(self):
        return self.noise > NOISY

    def weigh(self, weight):
        """The weights of the samples in it, 0 for all others."""
        return jnp.where(self.place < self.size, weight, 0)

    def saw(self, spread, size) -> Subset:
        """With one more gradient of norm ``size``, whose standard error is ``spread`` if the population is infinite."""
        left = jnp.sqrt(1 - self.size / self.count)  # nothing, once all of a finite population are there
        noise = jnp.where(size > 0, left * spread / jnp.where(size > 0, size, 1.0), 0.0)
        return self._replace(noise=(MEMORY * self.noise + (1 - MEMORY) * noise).astype(self.noise.dtype))

    def grown(self) -> Subset:
        size = jnp.minimum(GROW * self.size, self.count)
        return self._replace(size=size, noise=jnp.zeros_like(self.noise))
