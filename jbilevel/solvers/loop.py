"""The one driver loop of all lower-level solvers: stopping, statuses, error bound.

What a solver is stands in `jbilevel.solvers.base`.
"""

from __future__ import annotations

from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.recompilation import note_compilation
from jbilevel._core.results import RUNNING, SolveInfo, Status, Work
from jbilevel.solvers.base import Solver

# Rounding keeps ||gradient|| from falling below about eps * L * ||x|| =: unit. Up to FLOOR_FACTOR units a residual is
# taken for rounding once it has not improved for a while: PATIENCE_AT_FLOOR steps up to one unit, in proportion above,
# because a residual that only pauses there would otherwise pass as the best that the dtype can do.
FLOOR_FACTOR = 256.0
PATIENCE_AT_FLOOR = 10
# relative decrease of the energy that is more than rounding
DECREASE = 64.0
# accuracy asked for where none is given, of the size at the cold start
RELATIVE = 1e-6


def full_float32(function):
    """``function`` traced so that float32 products are computed in full.

    Accelerators shorten them by default (TF32 on recent NVIDIA GPUs keeps 10 bits), which puts a floor near 1e-3 under
    residuals and can make a Hessian indefinite.
    """

    @wraps(function)
    def traced(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


def secant(x, gradient, next_x, next_gradient):
    """||change of gradient||/||change of x||, at most L; 0 where the change of x is not far above rounding.

    So a jump of the gradient (a kink of the energy) cannot raise `run`'s unit of rounding to the size of the gradient.
    """
    length = trees.norm(trees.sub(next_x, x))
    rise = trees.norm(trees.sub(next_gradient, gradient))
    informative = (length > 4 * FLOOR_FACTOR * trees.eps(x) * trees.norm(next_x)) & jnp.isfinite(rise)
    return jnp.where(informative, rise / jnp.where(informative, length, 1.0), 0.0)


class Iterate(NamedTuple):
    """What the driver reads from any solver state: a point, its gradient, and what they cost."""

    x: Any
    gradient: Any
    residual: Any  # 2-norm of the gradient
    curvature: Any  # largest curvature met, for the rounding floor
    evaluations: Work
    value: Any  # energy at x; solvers that do not know it have no such field


class Solution(NamedTuple):
    x: Any
    gradient: Any
    info: SolveInfo
    state: Any = None  # the solver's last


class _Progress(NamedTuple):
    state: Any
    steps: Any
    best: Any  # residual when it last improved by 1 per cent
    lowest: Any  # energy when it last fell by more than rounding
    since: Any  # steps since one of the two happened
    status: Any


def run(solver: Solver, view, x0, tol, max_steps) -> Solution:
    """Iterate from ``x0`` until ``||gradient||/mu <= tol``, or ``||gradient|| <= tol`` where mu is unknown.

    Solvers whose next step depends on x alone first go as far in float32 as that helps, where the problem allows it.
    """
    single = view.single(x0) if solver.memoryless else None
    if single is None:
        return _run(solver, view, x0, tol, max_steps)
    first = _run(solver, single, trees.to_single(x0), tol, max_steps, linger=False)
    # a start from NaN would end at once
    start = trees.where(first.info.status < Status.NONFINITE, trees.cast_like(first.x, x0), x0)
    last = _run(solver, view, start, tol, max_steps - first.info.steps)
    info = last.info
    work = info.evaluations.join(first.info.evaluations)
    return last._replace(info=info._replace(steps=info.steps + first.info.steps, evaluations=work))


def _run(solver: Solver, view, x0, tol, max_steps, linger: bool = True) -> Solution:
    """``linger=False`` stops at the first residual of the size of rounding."""
    eps = trees.eps(x0)
    target = jnp.asarray(tol * view.tolerance_scale, trees.dtype(x0))

    def judge(progress: _Progress) -> _Progress:
        residual = progress.state.residual
        value = solver.value(progress.state)
        value = residual if value is None else value
        better = residual < 0.99 * progress.best
        lower = value < progress.lowest - DECREASE * eps * jnp.abs(value)
        since = jnp.where(better | lower, 0, progress.since + 1)
        unit = eps * progress.state.curvature * trees.norm(progress.state.x)
        waited = (since >= PATIENCE_AT_FLOOR) & (since * unit >= PATIENCE_AT_FLOOR * residual)
        rounding = (residual <= FLOOR_FACTOR * unit) & (waited | (since >= solver.patience))
        rounding = rounding if linger else (residual <= unit)
        status = jnp.where(progress.steps >= max_steps, Status.MAX_STEPS, RUNNING)
        status = jnp.where(since >= solver.patience, Status.STAGNATED, status)
        status = jnp.where(rounding, Status.PRECISION, status)
        status = jnp.where(residual <= target, Status.CONVERGED, status)
        # before the first evaluation a solver may report inf; NaN is never a start
        bad = jnp.isnan(residual) | (jnp.isinf(residual) & (progress.steps > 0))
        bad = bad | ~jnp.isfinite(trees.norm(progress.state.x))  # an energy without a minimum
        status = jnp.where(bad, Status.NONFINITE, status)
        failure = solver.failure(progress.state)
        status = jnp.where(failure != RUNNING, failure, status).astype(jnp.int32)
        best, lowest = jnp.where(better, residual, progress.best), jnp.where(lower, value, progress.lowest)
        return progress._replace(best=best, lowest=lowest, since=since, status=status)

    def advance(progress: _Progress) -> _Progress:
        state = solver.step(view, progress.state, target)
        return judge(progress._replace(state=state, steps=progress.steps + solver.stride))

    state = solver.init(view, x0, target, max_steps) if solver.one_shot else solver.init(view, x0, target)
    zero = jnp.zeros((), jnp.int32)
    worst = jnp.full_like(state.residual, jnp.inf)
    taken = zero + 1 if solver.one_shot else zero
    first = judge(_Progress(state=state, steps=taken, best=worst, lowest=worst, since=zero, status=zero))
    last = jax.lax.while_loop(lambda progress: progress.status == RUNNING, advance, first)
    state = last.state
    info = SolveInfo(
        status=_contradicted(solver, view, first, last, target),
        steps=last.steps,
        residual=state.residual,
        error=view.error_bound(solver.unrounded(view, state)),
        evaluations=state.evaluations,
    )
    return Solution(state.x, state.gradient, info, state)


def _contradicted(solver: Solver, view, first: _Progress, last: _Progress, target):
    """The status, unless what was seen on the way contradicts what the problem says, or that this is a minimum."""
    wrong = view.contradiction(first.state, last.state, solver.least_curvature(last.state))
    # steps that were too long end at infinity
    explained = (last.status <= Status.MAX_STEPS) | (last.status == Status.NONFINITE)
    status = jnp.where(explained & (wrong != RUNNING), wrong, last.status)
    if (concave_at := view.concave_at()) is None:
        return status.astype(jnp.int32)
    # a descent ends at a maximum only where it began there
    still = (last.steps == first.steps) & (status == Status.CONVERGED) & jnp.isfinite(target)
    where_needed = lambda x: jax.lax.cond(still, concave_at, lambda _: jnp.asarray(False), x)  # noqa: E731
    # on a GPU a branch would ask the host
    concave = still & jax.lax.platform_dependent(last.state.x, cpu=where_needed, default=concave_at)
    return jnp.where(concave, Status.INDEFINITE, status).astype(jnp.int32)


@partial(jax.jit, static_argnums=0)
@full_float32
def start_jitted(problem, params, data):
    """The cold start; apart from the solve, so that one with a warm start runs the same code."""
    return problem.start(params, data)


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def default_tolerance(problem, solver, params, data):
    """`RELATIVE` times the tolerance that the cold start would meet, 0 where that is not finite."""
    params, data = jax.lax.stop_gradient((params, data))
    problem.validate(params, data)
    view, x0 = problem.view(params, data), problem.start(params, data)
    size = solver.first_residual(view, x0) / view.tolerance_scale
    return jnp.where(jnp.isfinite(size), RELATIVE * size, 0.0).astype(trees.dtype(x0))


@partial(jax.jit, static_argnums=(0, 1))
@full_float32
def solve_jitted(problem, solver, params, data, x0, tol, max_steps) -> Solution:
    note_compilation(problem, solver)
    problem.validate(params, data, x0)
    start = problem.start(params, data)
    x0 = trees.cast_like(x0, start)
    # from NaN every solve would end at once
    x0 = jax.lax.cond(trees.all_finite(x0), lambda _: x0, lambda _: start, None)
    return run(solver, problem.view(params, data), x0, tol, max_steps)._replace(state=None)
