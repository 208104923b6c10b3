"""A few iterations of a fixed-point map, accelerated by what they tell of it: a solve, and how far from exact it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees

# a residual so many times the smallest one is no progress: go on from there
GUARD = 2.0
# a vector is noise below so many units of rounding of what it is the difference of
NOISE = 64.0


class Accelerated(NamedTuple):
    """Iterates of v -> step(v), with directions p_i and the changes q_i, orthonormal, of the residual along them."""

    point: Any
    residual: Any  # step(point) - point
    best: Any  # the point with the smallest residual,
    best_residual: Any
    size: Any  # the norm of that
    directions: Any  # (memory, n)
    images: Any
    steps: Any

    @property
    def inverse(self):
        """About the norm of the inverse of 1 - step', on what was seen: residuals times this are distances."""
        return trees.norm(self.directions)

    @property
    def distance(self):
        """An estimate of how far the best point is from the fixed point."""
        return self.size * self.inverse


def begin(step: Callable, start, memory: int) -> Accelerated:
    """From a vector ``start``, which costs one step; memory: how many pairs are kept."""
    residual = step(start) - start
    none = jnp.zeros((memory, start.size), start.dtype)
    return Accelerated(
        point=start,
        residual=residual,
        best=start,
        best_residual=residual,
        size=trees.norm(residual),
        directions=none,
        images=none,
        steps=jnp.zeros((), jnp.int32),
    )


def resume(step: Callable, state: Accelerated, tol, max_steps) -> Accelerated:
    """Go on until the residual is at most tol, or there were max_steps, counted from the beginning.

    Nonlinear truncated GCR (He, Tang, Zhao, Saad & Xi 2024, he_nltgcr_2024), which for a linear map is GCR on 1 - step
    (Eisenstat, Elman & Schultz 1983) and else Anderson's (1965) acceleration with orthonormal differences.
    """

    def advance(s: Accelerated) -> Accelerated:
        lost = ~(trees.norm(s.residual) <= GUARD * s.size)
        point, residual = trees.where(lost, (s.best, s.best_residual), (s.point, s.residual))
        along = s.images @ residual
        following = point - along @ s.directions + residual - along @ s.images
        residual = step(following) - following
        direction, image = following - s.point, residual - s.residual
        noise = NOISE * trees.eps(image) * trees.norm(image)
        for _ in range(2):  # the second time for rounding
            along = s.images @ image
            direction, image = direction - along @ s.directions, image - along @ s.images
        length = trees.norm(image)
        factor = jnp.where(length > noise, 1 / jnp.where(length > noise, length, 1.0), 0.0)
        slot = s.steps % len(s.directions)
        size = trees.norm(residual)
        better = size < s.size
        return Accelerated(
            point=following,
            residual=residual,
            best=jnp.where(better, following, s.best),
            best_residual=jnp.where(better, residual, s.best_residual),
            size=jnp.where(better, size, s.size),
            directions=s.directions.at[slot].set(factor * direction),
            images=s.images.at[slot].set(factor * image),
            steps=s.steps + 1,
        )

    return jax.lax.while_loop(lambda s: (s.steps < max_steps) & (s.size > tol), advance, state)
