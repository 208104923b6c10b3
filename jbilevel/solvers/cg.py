"""Conjugate gradients for H q = b with warm start, true residual and negative-curvature detection."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import RUNNING, SolveInfo, Status, Work

PATIENCE = 50


class CGState(NamedTuple):
    x: Any
    residual: Any  # b - H x, by recurrence
    direction: Any
    squared: Any  # ||residual||^2
    # by recurrences (Steihaug 1983), because a reduction costs as much as the rest of a step
    length: Any  # ||direction||^2
    along: Any  # <x - x0, direction>
    travelled: Any  # ||x - x0||^2
    origin: Any  # ||x0||
    curvature: Any  # largest p'Hp/p'p met
    steps: Any
    best: Any  # squared when it last fell by 2 per cent
    since: Any  # steps since then
    status: Any


def iterate(product, b, x0, tol, max_steps, *, zero_start: bool = False) -> CGState:
    """Hestenes-Stiefel conjugate gradients until ``||b - H x|| <= tol``.

    Stops with INDEFINITE at a direction of nonpositive curvature (Steihaug 1983): x is then the last iterate before
    it, or x0. ``zero_start`` saves the product H x0 when x0 is known to be zero.
    """
    r = b if zero_start else trees.cast_like(trees.sub(b, product(x0)), b)
    squared = trees.squared_norm(r)
    zero = jnp.zeros((), jnp.int32)
    none, never = jnp.zeros_like(squared), jnp.full_like(squared, jnp.inf)
    origin = none if zero_start else trees.norm(x0)
    start = CGState(
        x=x0,
        residual=r,
        direction=r,
        squared=squared,
        length=squared,
        along=none,
        travelled=none,
        origin=origin,
        curvature=none,
        steps=zero,
        best=never,
        since=zero,
        status=zero,
    )
    return resume(product, start, tol, max_steps)


def resume(product, state: CGState, tol, max_steps) -> CGState:
    """Go on from a state of `iterate`, with another tolerance or step limit (counted from the first step)."""
    eps = trees.eps(state.x)

    def judge(s: CGState) -> CGState:
        better = s.squared < 0.98 * s.best
        since = jnp.where(better, 0, s.since + 1)
        floor = 16 * eps * s.curvature * (s.origin + jnp.sqrt(jnp.maximum(s.travelled, 0.0)))
        status = jnp.where(s.steps >= max_steps, Status.MAX_STEPS, s.status)
        stuck = (since >= PATIENCE) & (jnp.sqrt(s.squared) <= 1e3 * floor)
        status = jnp.where(stuck | ((s.steps > 0) & (jnp.sqrt(s.squared) <= floor)), Status.PRECISION, status)
        status = jnp.where(s.status == Status.INDEFINITE, Status.INDEFINITE, status)
        status = jnp.where(jnp.sqrt(s.squared) <= tol, Status.CONVERGED, status)
        status = jnp.where(jnp.isfinite(s.squared), status, Status.NONFINITE)
        best = jnp.where(better, s.squared, s.best)
        return s._replace(best=best, since=since, status=status.astype(jnp.int32))

    def step(s: CGState) -> CGState:
        mapped = trees.cast_like(product(s.direction), s.direction)
        curved = trees.dot(s.direction, mapped)
        positive = curved > 0
        alpha = jnp.where(positive, s.squared / jnp.where(positive, curved, 1.0), 0.0)
        x = trees.add_scaled(s.x, alpha, s.direction)
        r = trees.add_scaled(s.residual, -alpha, mapped)
        squared = trees.squared_norm(r)
        ratio = squared / s.squared
        direction = trees.add_scaled(r, ratio, s.direction)
        length = squared + ratio**2 * s.length
        along = ratio * (s.along + alpha * s.length)
        travelled = s.travelled + 2 * alpha * s.along + alpha**2 * s.length
        # a NaN product is NONFINITE, not a direction of negative curvature
        status = jnp.where(positive, RUNNING, Status.INDEFINITE).astype(jnp.int32)
        squared = jnp.where(jnp.isnan(curved), jnp.nan, squared)
        curvature = jnp.maximum(s.curvature, curved / s.length)
        following = s._replace(
            x=x,
            residual=r,
            direction=direction,
            squared=squared,
            length=length,
            along=along,
            travelled=travelled,
            curvature=curvature,
            steps=s.steps + 1,
            status=status,
        )
        return judge(following)

    start = judge(state._replace(status=jnp.full((), RUNNING, jnp.int32), best=jnp.full_like(state.best, jnp.inf)))
    return jax.lax.while_loop(lambda s: s.status == RUNNING, step, start)


def cg(product, b, x0=None, *, tol, max_steps=1000) -> tuple[Any, SolveInfo]:
    """Solve ``H x = b`` for a symmetric positive definite H given by its product, to ``||b - H x||_2 <= tol``.

    Args:
      product: ``v -> H v`` on pytrees like b.
      b: right-hand side. x0: warm start (zero when None).
      tol: absolute, may be traced. max_steps: may be traced.

    Returns:
      (x, info): info.residual is recomputed as ``||b - H x||``, not taken from the recurrence; info.error is inf
      (divide the residual by mu where it is known). INDEFINITE when a direction of nonpositive curvature was met.

    >>> import jax.numpy as jnp
    >>> x, info = cg(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> bool(jnp.allclose(x, 1.0)), int(info.status)
    (True, 0)
    """
    start = trees.zeros_like(b) if x0 is None else trees.cast_like(x0, b)
    last = iterate(product, b, start, tol, max_steps, zero_start=x0 is None)
    return last.x, finish(product, b, last.x, last.status, last.steps, tol, products=last.steps + (x0 is not None))


def finish(product, b, x, status, steps, tol, *, products) -> SolveInfo:
    """Report the true residual; a recurrence that drifted away from it has reached the dtype's precision."""
    residual = trees.norm(trees.sub(b, product(x)))
    drifted = (status == Status.CONVERGED) & (residual > 1.01 * tol + 1e-30)
    status = jnp.where(drifted, Status.PRECISION, status)
    # where eps cond(H) is about 1 even rounding leaves a residual like that of x = 0: no solution to accept
    status = jnp.where((status == Status.PRECISION) & (residual > 0.1 * trees.norm(b)), Status.STAGNATED, status)
    return SolveInfo(
        status=status.astype(jnp.int32),
        steps=steps,
        residual=residual,
        error=jnp.full_like(residual, jnp.inf),
        evaluations=Work.zero().plus(products=products + 1),
    )
