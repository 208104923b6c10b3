"""The way out of a jam at kinks: long steps along averaged gradients, whatever the values are.

Where the objective has kinks on every scale, descent ends in the first narrow valley: every step overshoots, radii
shrink, and the gradient stays as it is. Adam's direction (Kingma & Ba 2015) with a length that follows the cosines of
gradients and steps crosses such valleys. The best point stays what is returned.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

MEMORY = 0.8  # of the share of overshooting trials
OFTEN = 0.15  # such a share
SHORT = 0.25  # radius against the longest step, in units of how far the gradient fell, that is a jam
MOMENTUM, SQUARES = 0.9, 0.999
COSINE = 0.1  # change of the logarithm of the radius by a cosine of 1; by -1 twice as much
IDLE = 15  # steps without a better point, or lower values in the mean, that end an excursion
AVERAGE = 0.8  # memory of that mean
BEGIN = 5  # steps until its lowest counts: long steps out of a kink first lead up
LOST = 0.5  # rise of the value above the best, against all descent, that ends it
DEAR = 4.0  # work of one of its steps, against the usual work before it, that ends it
RETREAT = 0.3  # of the radius then
AGAIN = 3.0  # radius at first, against that at the end of the last excursion, at most the longest step


class Jam(NamedTuple):
    overshoots: Any  # running share of trials that went too far
    longest: Any  # accepted step
    steepest: Any  # gradient

    @classmethod
    def none(cls, zero) -> Jam:
        return cls(zero, zero, zero)

    def tried(self, overshot, step, slope) -> Jam:
        """After a trial; step: length of the accepted one, 0 where there was none."""
        overshoots = MEMORY * self.overshoots + (1 - MEMORY) * overshot
        return Jam(overshoots, jnp.maximum(self.longest, step), jnp.maximum(self.steepest, slope))

    def is_one(self, radius, slope):
        """On smooth ground steps and gradients shrink together."""
        return (self.overshoots > OFTEN) & (radius * self.steepest < SHORT * self.longest * slope)


class Excursion(NamedTuple):
    on: Any
    radius: Any  # at the end of the last one; 0: there was none
    eps: Any  # accuracies that were good enough on the last one
    delta: Any
    momentum: Any
    squares: Any
    beats: Any  # steps
    mean: Any  # of the values
    lowest: Any  # such mean
    idle: Any  # steps since the last better point, or lowest mean
    usual: Any  # running mean of the work of a hypergradient outside of excursions

    @classmethod
    def none(cls, like) -> Excursion:
        zero, none = jnp.zeros((), like.dtype), jnp.zeros((), jnp.int32)
        nothing = jnp.zeros_like(like)
        return cls(
            on=jnp.asarray(False), radius=zero, eps=zero, delta=zero, momentum=nothing, squares=nothing, beats=none,
            mean=zero, lowest=zero, idle=none, usual=zero,
        )  # fmt: skip

    def begun(self) -> Excursion:
        nothing, none = jnp.zeros_like(self.momentum), jnp.zeros_like(self.beats)
        return self._replace(on=jnp.asarray(True), momentum=nothing, squares=nothing, beats=none, idle=none)

    def longer(self, longest):
        """The radius at first: also what crossed one valley has to get out of the next."""
        return jnp.where(self.radius > 0, jnp.minimum(AGAIN * self.radius, longest), longest)

    def used(self, work) -> Excursion:
        """After a hypergradient of this work."""
        usual = jnp.where(self.usual > 0, MEMORY * self.usual + (1 - MEMORY) * work, work)
        return self._replace(usual=jnp.where(self.on, self.usual, usual))

    def saw(self, value, better) -> Excursion:
        """After a step to this value. better: than any before the excursion."""
        mean = jnp.where(self.beats <= 1, value, AVERAGE * self.mean + (1 - AVERAGE) * value)
        lower = better | (mean < self.lowest) | (self.beats <= BEGIN)
        return self._replace(
            mean=mean,
            lowest=jnp.where(lower, mean, self.lowest),
            idle=jnp.where(lower, 0, self.idle + 1).astype(jnp.int32),
        )

    def next(self, gradient) -> tuple[Excursion, Any]:
        """(with one more gradient, a direction of length 1)."""
        beats = self.beats + 1
        k = beats.astype(gradient.dtype)
        m = MOMENTUM * self.momentum + (1 - MOMENTUM) * gradient
        v = SQUARES * self.squares + (1 - SQUARES) * gradient**2
        size = jnp.sqrt(v / (1 - SQUARES**k))
        d = -jnp.where(size > 0, m / jnp.where(size > 0, size, 1.0), 0.0)
        d = jnp.where(gradient @ d < 0, d, -gradient)
        norm = jnp.linalg.norm(d)
        return self._replace(momentum=m, squares=v, beats=beats), d / jnp.where(norm > 0, norm, 1.0)


def grown(radius, cosine, finite):
    """The radius after a step whose gradient there has this cosine with the step back."""
    factor = jnp.exp(COSINE * cosine * jnp.where(cosine > 0, 1.0, 2.0))
    return radius * jnp.where(finite, factor, 0.25)
