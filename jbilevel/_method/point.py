"""What a hypergradient tells of the params where it was taken, as descent along a flat vector reads it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core.results import Hypergradient
from jbilevel._oracle.batches import finite_mean

UNKNOWN = -10.0  # ratio of slopes where the step did not go downhill


class Point(NamedTuple):
    """What is known at one point."""

    at: Any  # flat params
    value: Any  # without its first-order error
    slope: Any  # flat: what of the hypergradient can move params
    raw: Any  # value as the oracle gives it
    grad_norm: Any  # of the flat slope, before any projection
    error: Any  # of the hypergradient
    spread: Any  # standard error of the hypergradient as a mean over samples
    bound: Any  # proven, of the raw value
    lower: Any  # errors that were attained, mean over samples
    adjoint: Any
    steps: Any  # of the lower-level solve, mean over samples
    status: Any
    work: Any

    @classmethod
    def of(cls, hg: Hypergradient, at, slope, grad_norm) -> Point:
        attained = jnp.where(jnp.isfinite(hg.lower.error), hg.lower.error, hg.lower.residual)
        steps = jnp.where(jnp.isfinite(hg.lower.residual), hg.lower.steps, jnp.nan)  # not of samples without weight
        numbers = {
            "value": hg.value - hg.shift, "raw": hg.value, "grad_norm": grad_norm, "error": hg.error,
            "spread": hg.spread, "bound": hg.value_bound, "lower": finite_mean(attained),
            "adjoint": finite_mean(hg.adjoint.residual), "steps": finite_mean(steps), "work": hg.work,
        }  # fmt: skip
        numbers = {name: jnp.asarray(number, at.dtype) for name, number in numbers.items()}
        return cls(at=at, slope=slope, status=hg.status.astype(jnp.int32), **numbers)

    @classmethod
    def unknown(cls, at) -> Point:
        zero = jnp.zeros((), at.dtype)
        infinite = jnp.full_like(zero, jnp.inf)
        return cls(
            at=at, value=infinite, slope=jnp.zeros_like(at), raw=infinite, grad_norm=infinite, error=infinite,
            spread=infinite, bound=infinite, lower=zero, adjoint=zero, steps=zero, status=jnp.zeros((), jnp.int32),
            work=zero,
        )  # fmt: skip

    @property
    def finite(self):
        return jnp.isfinite(self.value) & jnp.all(jnp.isfinite(self.slope))

    @property
    def size(self):
        return jnp.linalg.norm(self.slope)


def agreement(before: Point, after: Point) -> tuple[Any, Any]:
    """Of a step between two points: (the slope at its end over that at its begin, by how much the change of the value
    is not their mean, both in units of the slope at its begin)."""
    step = after.at - before.at
    slope = before.slope @ step
    downhill = slope < 0
    unit = jnp.where(downhill, slope, -1.0)
    ratio = jnp.where(downhill, after.slope @ step / unit, UNKNOWN)
    mismatch = jnp.abs((after.value - before.value) / unit - 0.5 * (1 + ratio))
    return ratio, jnp.where(downhill, mismatch, 0.0)
