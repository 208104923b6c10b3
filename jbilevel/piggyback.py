"""Piggyback: hypergradients and differentiable saddle points by a second primal-dual iteration for the adjoint.

For (x, y) = argmin_x max_y <K x, y> + g(x) - f*(y) the adjoint (X, Y) solves the saddle point problem of the quadratic
model there (papers 3 (AS) and its Algorithms 1-2): G X + K*Y = -grad_x l, F Y - K X = grad_y l, with G, F the Hessians
of g, f*. No Hessian is formed: with x = prox_g(p) and y = prox_f*(r), one step of the method applies the VJPs of these
proxes at the same arguments p, r, and multiplying by them also gives the gradient through the parameters of a prox.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm, Work, guard
from jbilevel._core.validate import trace_scalar
from jbilevel._oracle import base, bounds, correction
from jbilevel._oracle.base import Points, Sample, require_view
from jbilevel._oracle.saddle_system import Arguments, Frozen, arguments, measure, newton_step, pairing
from jbilevel._views.saddle import SaddleView
from jbilevel.implicit import after_correction, as_cotangents, leaf_gradients, solution_map
from jbilevel.solvers import PDHG
from jbilevel.solvers.loop import Solution, full_float32, run

if TYPE_CHECKING:
    from jbilevel.problems.saddle import SaddleProblem

MODES = ("sequential", "simultaneous")


# ------------------------------------------------------------------------------------------------------------- solves


class Solved(NamedTuple):
    """A lower-level solution with its adjoint."""

    pair: Any
    element: Any
    frozen: Frozen
    tau: Any
    sigma: Any
    lower: SolveInfo
    adjoint: Any  # (X, Y)
    defect: Any
    slopes: Any
    info: SolveInfo  # of the adjoint


def _freeze(view: SaddleView, solver: PDHG, solution: Solution):
    """The derivative at a solution, with the steps of the adjoint (of the first iteration: they do not shrink)."""
    tau, sigma = replace(solver, accelerate=False).steps(view, solution.state.norm)
    p, r = arguments(view, solution.x, solution.gradient, tau, sigma)
    return Frozen.at(view, p, r, tau, sigma), tau, sigma


def _sequential(view: SaddleView, solver: PDHG, loss_gradient, warm: Warm, tol, adjoint_tol, limits) -> Solved:
    """Paper 3, Algorithm 2: the saddle point to tol, then its adjoint to adjoint_tol."""
    solution = run(solver, view, warm.x, tol, limits[0])
    frozen, tau, sigma = _freeze(view, solver, solution)
    slopes = loss_gradient(solution.x)
    adjoint = run(solver, frozen.adjoint_view(slopes, tau, sigma), warm.adjoint, adjoint_tol, limits[1])
    return Solved(
        solution.x, solution.gradient, frozen, tau, sigma, solution.info, adjoint.x, adjoint.gradient, slopes,
        adjoint.info,
    )  # fmt: skip


class _JointView(NamedTuple):
    """A saddle problem together with its moving adjoint; residuals count in units of their tolerances."""

    view: SaddleView
    loss_gradient: Callable
    targets: tuple

    tolerance_scale = 1.0

    def single(self, x):
        return None

    def error_bound(self, residual):
        return jnp.full_like(residual, jnp.inf)


class _JointState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    failure: Any
    lower: Any
    adjoint: Any


@dataclass(frozen=True)
class _Joint:
    """``stride`` iterations for the saddle point and as many for the adjoint at it, in turn (Bogensperger
    et al. 2022)."""

    solver: PDHG

    patience = PDHG.patience

    @property
    def stride(self):
        return self.solver.stride

    def init(self, joint: _JointView, x0, target) -> _JointState:
        lower = self.solver.init(joint.view, x0[0], target)
        adjoint = self.solver.init(self._adjoint_view(joint, lower), x0[1], target)
        return self._together(joint, lower, adjoint)

    def step(self, joint: _JointView, state: _JointState, target) -> _JointState:
        lower = self.solver.step(joint.view, state.lower, target)
        adjoint = self.solver.step(self._adjoint_view(joint, lower), state.adjoint, target)
        return self._together(joint, lower, adjoint)

    def _adjoint_view(self, joint: _JointView, lower) -> SaddleView:
        frozen, tau, sigma = _freeze(joint.view, self.solver, Solution(lower.x, lower.gradient, None, lower))
        return frozen.adjoint_view(joint.loss_gradient(lower.x), tau, sigma)

    def _together(self, joint: _JointView, lower, adjoint) -> _JointState:
        pair = (lower.x, adjoint.x)
        residual = jnp.maximum(lower.residual / joint.targets[0], adjoint.residual / joint.targets[1])
        units = [s.curvature * trees.norm(s.x) / t for s, t in zip((lower, adjoint), joint.targets, strict=True)]
        size = trees.norm(pair)
        curvature = jnp.maximum(*units) / jnp.where(size > 0, size, 1.0)
        work = lower.evaluations.join(adjoint.evaluations)
        gradient = (lower.gradient, adjoint.gradient)
        return _JointState(pair, gradient, residual, curvature, work, lower.failure, lower, adjoint)


def _simultaneous(view: SaddleView, solver: PDHG, loss_gradient, warm: Warm, tol, adjoint_tol, limits) -> Solved:
    """Both at once: the adjoint follows a saddle point that still moves."""
    dtype = trees.dtype(warm.x)
    least = jnp.finfo(dtype).tiny ** 0.5  # tol = 0 asks for the precision of the dtype
    targets = tuple(jnp.maximum(jnp.asarray(t, dtype), least) for t in (tol * view.tolerance_scale, adjoint_tol))
    joint = _JointView(view, loss_gradient, targets)
    # an infinite tolerance asks for nothing
    last = run(_Joint(solver), joint, (warm.x, warm.adjoint), jnp.ones((), dtype), max(limits))
    lower, adjoint = last.state.lower, last.state.adjoint

    def info(state, target) -> SolveInfo:
        met = (state.residual <= target) & (last.info.status != Status.NORM_BOUND)
        status = jnp.where(met, Status.CONVERGED, last.info.status).astype(jnp.int32)
        return SolveInfo(status, last.info.steps, state.residual, view.error_bound(state.residual), state.evaluations)

    frozen, tau, sigma = _freeze(view, solver, Solution(lower.x, lower.gradient, None, lower))
    return Solved(
        lower.x, lower.gradient, frozen, tau, sigma, info(lower, targets[0]), adjoint.x, adjoint.gradient,
        loss_gradient(lower.x), info(adjoint, targets[1]),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- oracle


@dataclass(frozen=True)
class Oracle(base.Oracle):
    """Hypergradient oracle of a saddle-point lower level by piggyback (paper 3, Algorithm 2).

    Args:
      problem: `SaddleProblem`. loss: ``loss(params, (x, y), data) -> scalar`` for one sample.
      mode: "sequential": the saddle point to ``tol``, then its adjoint to ``adjoint_tol``; "simultaneous": iterations
        for both in turn, until both tolerances are met.
      solver: `PDHG`, for both.
      correct: return the hypergradient (and values) after one inexact semismooth Newton step on all four unknowns;
        ``error`` then estimates what remains.
      estimate: compute ``error`` (by the same step) when correct is False; otherwise it is inf.
      error_steps: MINRES steps in each of the two systems of that Newton step; one costs one K and one K*.
      loss_smoothness: Lipschitz constant of the gradient of the loss in (x, y), for proven bounds.
      in_axes, on_failure, chunk: see `jb.Oracle`; max_steps, max_adjoint_steps: limits of the two solves.

    ``tol`` bounds ``||x - x_hat||_2`` per sample where both moduli are known, else the residual (see `PDHG`);
    ``adjoint_tol`` bounds the residual of the adjoint system. With both moduli, a norm and `SaddleConstants` in the
    problem, loss_smoothness here and a loss that does not read params, ``bound`` is proven (in exact arithmetic).
    """

    problem: SaddleProblem
    loss: Callable
    mode: str = "sequential"
    solver: PDHG = PDHG()
    correct: bool = False
    estimate: bool = True
    error_steps: int = 20
    loss_smoothness: float | None = None
    in_axes: Any = 0
    on_failure: str = "nan"
    chunk: int | str | None = "auto"
    max_steps: int = 5000
    max_adjoint_steps: int = 5000

    def __post_init__(self):
        super().__post_init__()
        require_view(self.problem, SaddleView, "piggyback", "jb.SaddleProblem", "smooth problems go to jb.implicit")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {MODES}, got {self.mode!r}.")
        if not isinstance(self.solver, PDHG):
            raise TypeError(f"`solver` of a piggyback oracle must be a PDHG, got {type(self.solver).__name__}.")
        if self.error_steps < 2:
            raise ValueError(f"`error_steps` must be at least 2, got {self.error_steps}.")
        if self.loss_smoothness is not None and not self.loss_smoothness >= 0:
            raise ValueError(f"`loss_smoothness` must be nonnegative, got {self.loss_smoothness}.")

    @property
    def corrects(self) -> bool:
        return self.correct or self.estimate

    def without_estimate(self) -> Oracle:
        return replace(self, estimate=False) if self.estimate and not self.correct else self

    def missing(self, certified: bool) -> str | None:
        if not certified:
            return None
        if (lacking := self.problem.lacks()) is not None:
            return lacking
        return "`loss_smoothness` to the oracle" if self.loss_smoothness is None else None

    def _start(self, params, data) -> Warm:
        x0 = self.problem.start(params, data)
        return Warm(x0, trees.zeros_like(x0))

    def _view(self, params, data, warm: Warm) -> SaddleView:
        self.problem.validate(params, data, warm.x)
        trace_scalar(self.loss, "loss", params, warm.x, data)
        return self.problem.view(params, data)

    def _value(self, params, data, warm: Warm, tol) -> Sample:
        view = self._view(params, data, warm)
        solution = run(self.solver, view, warm.x, tol, self.max_steps)
        value, slopes = jax.value_and_grad(self.loss, 1)(params, solution.x, data)
        # of a given (X, Y), not of cotangents: G X by the difference of two VJPs is not at hand, so one step is taken
        frozen, tau, sigma = _freeze(view, self.solver, solution)
        one = run(self.solver, frozen.adjoint_view(slopes, tau, sigma), warm.adjoint, jnp.inf, 0)
        lower = solution.info._replace(evaluations=solution.info.evaluations.join(one.info.evaluations))
        likely, spent = self._distance(frozen, solution.gradient, lower.error)
        lower = lower._replace(evaluations=lower.evaluations.plus(products=spent))
        unknown = jnp.full_like(lower.error, jnp.inf)
        zero = jnp.zeros_like(lower.error)
        return self._report(
            params, data, view, value, slopes, solution.x, solution.gradient, one.x, one.gradient, likely, lower, lower,
            unknown, zero, Warm(solution.x, warm.adjoint),
        )  # fmt: skip

    def _sample(self, params, data, warm: Warm, tol, adjoint_tol):
        view = self._view(params, data, warm)
        loss = lambda pair: self.loss(params, pair, data)  # noqa: E731
        solve = _sequential if self.mode == "sequential" else _simultaneous
        limits = (self.max_steps, self.max_adjoint_steps)
        solved = solve(view, self.solver, jax.grad(loss), warm, tol, adjoint_tol, limits)
        pair, element, frozen, tau, sigma, lower, adjoint, defect, slopes, info = solved
        c = frozen.cotangents(adjoint, defect, slopes)
        plain = Arguments(frozen.p, frozen.r, c, tau, sigma)
        points, left = Points(plain), jnp.zeros_like(lower.residual)
        if self.corrects:
            step = newton_step(frozen, jax.grad(loss), c, self.error_steps, tau, sigma)
            left, info = step.left, info._replace(evaluations=info.evaluations.plus(products=step.products))
            points = Points(plain, step.halfway if self.correct else None, step.arguments)
        if self.correct:
            frozen, element, defect = step.frozen, step.element, step.defect
            pair, adjoint = (frozen.x, frozen.y), frozen.lift(step.arguments.cotangents)
            lower = after_correction(lower, measure(view, element), tol * view.tolerance_scale)
            lower = lower._replace(error=view.error_bound(lower.residual))
            info = after_correction(info, measure(view, defect), adjoint_tol)
            info = info._replace(error=view.error_bound(info.residual))
        likely, spent = self._distance(frozen, element, lower.error)
        lower = lower._replace(evaluations=lower.evaluations.plus(products=spent))
        value, slopes = jax.value_and_grad(loss)(pair)
        norms = self._norms(view, pair, element, adjoint, defect)
        constants = view.constants
        direct = bounds.depends_on_params(self.loss, params, pair, data)
        sees_dual = _sees_dual(self.loss, params, pair, data)
        bound = bounds.saddle_certificate(view, constants, self.loss_smoothness, sees_dual, norms, direct)
        sample = self._report(
            params, data, view, value, slopes, pair, element, adjoint, defect, likely, lower, info, bound, left,
            Warm(pair, adjoint),
        )  # fmt: skip
        return sample, points

    def _distance(self, frozen: Frozen, element, proven):
        """Estimated distances of (x, y) from exact, and what they cost: twice the length of a short Newton step."""
        steps = correction.DISTANCE_STEPS
        c, _, spent = frozen.improve(trees.zeros_like(element), element, steps, frozen.enough(element))
        first, second = (2 * trees.norm(part) for part in frozen.lift(c))
        return (jnp.minimum(first, proven), second), spent

    def _norms(self, view, pair, element, adjoint, defect) -> bounds.SaddlePair:
        sizes = [tuple(trees.norm(part) for part in parts) for parts in (pair, adjoint, defect, element)]
        return bounds.SaddlePair(*sizes[:3], view.bounds(*sizes[3]))

    def _report(
        self, params, data, view, value, slopes, pair, element, adjoint, defect, likely, lower, info, gradient_bound,
        left, warm,
    ) -> Sample:  # fmt: skip
        shift = trees.dot(adjoint[1], element[1]) - trees.dot(adjoint[0], element[0])
        norms = self._norms(view, pair, element, adjoint, defect)
        sees_dual = _sees_dual(self.loss, params, pair, data)
        rest = bounds.saddle_value_errors(
            view.constants, self.loss_smoothness,
            tuple(trees.norm(part) for part in slopes), sees_dual, shift, norms, likely,
        )  # fmt: skip
        bound = rest.bound_corrected if self.correct else rest.bound
        gradient_bound = jnp.asarray(gradient_bound, bound.dtype)
        return Sample(value, rest.shift, rest.estimate, bound, gradient_bound, left, warm, lower, info)

    def _surrogate(self, params, data, point: Arguments):
        view = self.problem.view(params, data)
        frozen = Frozen.at(view, *(jax.lax.stop_gradient(part) for part in (point.p, point.r, point.tau, point.sigma)))
        pair = jax.lax.stop_gradient((frozen.x, frozen.y))
        return self.loss(params, pair, data) + pairing(view, point)


def _sees_dual(loss, params, pair, data) -> bool:
    """Whether ``loss`` uses y (conservatively: reading a leaf of it counts)."""
    return bounds.depends_on_params(lambda y, x, data: loss(params, (x, y), data), pair[1], pair[0], data)


# --------------------------------------------------------------------------------------------- differentiable solution


@dataclass(frozen=True)
class _Spec:
    problem: SaddleProblem
    solver: PDHG
    on_failure: str
    max_steps: int
    max_adjoint_steps: int


def saddle_point(
    problem: SaddleProblem,
    *,
    solver: PDHG | None = None,
    on_failure: str = "raise",
    with_info: bool = False,
    max_steps: int = 5000,
    max_adjoint_steps: int = 5000,
) -> Callable:
    """The saddle point as a differentiable function ``(params, data, x0=None, *, tol, adjoint_tol) -> (x, y)``.

    Reverse mode (once: no second derivatives, no forward mode) runs the adjoint iteration at the solution; gradients
    flow to params and to the inexact leaves of data, not to x0 or the tolerances.

    Args:
      problem: `SaddleProblem`. solver: `PDHG`, for both solves.
      on_failure: what a failed solve does, forward or backward: "raise" (`ConvergenceError` outside jit; under jit,
        where nothing can be raised, NaN), "nan", or "ignore".
      with_info: return ``(x, info)`` with the `SolveInfo` of the forward solve, so that a caller under jit sees its
        status (`jbilevel.check` it outside).
      max_steps, max_adjoint_steps: limits of the two solves.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SaddleProblem(
    ...     lambda p, x, d: x, lambda p, v, step, d: jb.prox.squared_distance(v, step, d),
    ...     lambda p, v, step, d: jb.prox.squared_distance(v, step, 0.0, 1 / p),
    ...     lambda p, d: (jnp.zeros_like(d), jnp.zeros_like(d)), mu_primal=1.0, mu_dual=lambda p, d: 1 / p, norm=1.0)
    >>> point = jb.piggyback.saddle_point(ridge)
    >>> gradient = jax.grad(lambda p: jnp.sum(point(p, jnp.array([3.0]), tol=1e-5)[0]))(1.0)  # of 3/(1 + p)
    >>> bool(jnp.isclose(gradient, -0.75, atol=1e-4))
    True
    """
    require_view(problem, SaddleView, "saddle_point", "jb.SaddleProblem", "see jb.implicit.argmin")
    solver = PDHG() if solver is None else solver
    return solution_map(_saddle_point, _Spec(problem, solver, on_failure, max_steps, max_adjoint_steps), with_info)


@partial(jax.jit, static_argnums=0)
@full_float32
def _forward_solve(spec: _Spec, params, data, x0, tol):
    view = spec.problem.view(params, data)
    solution = run(spec.solver, view, x0, tol, spec.max_steps)
    return solution.x, (solution.gradient, solution.state.norm), solution.info


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _saddle_point(spec: _Spec, params, data, x0, tol, adjoint_tol):
    return _saddle_point_forward(spec, params, data, x0, tol, adjoint_tol)[0]


def _saddle_point_forward(spec: _Spec, params, data, x0, tol, adjoint_tol):
    pair, kept, info = _forward_solve(spec, params, data, x0, tol)
    pair = guard(pair, info, spec.on_failure, "the lower-level solve")
    return (pair, info), (params, data, pair, kept, adjoint_tol)


def _saddle_point_backward(spec: _Spec, kept, cotangents):
    params, data, pair, (element, norm), adjoint_tol = kept
    gradients, info = _pull_back(spec, params, data, pair, element, norm, cotangents[0], adjoint_tol)
    gradients = guard(gradients, info, spec.on_failure, "the adjoint solve")
    return *as_cotangents(gradients, params, data), None, None, None


@partial(jax.jit, static_argnums=0)
@full_float32
def _pull_back(spec: _Spec, params, data, pair, element, norm, cotangent, adjoint_tol):
    """Gradient of <cotangent, (x, y)> in each leaf of (params, data), None for integer leaves."""
    view = spec.problem.view(params, data)
    tau, sigma = replace(spec.solver, accelerate=False).steps(view, norm)
    frozen = Frozen.at(view, *arguments(view, pair, element, tau, sigma), tau, sigma)
    start = trees.zeros_like(pair)
    adjoint_view = frozen.adjoint_view(cotangent, tau, sigma)
    adjoint = run(spec.solver, adjoint_view, start, adjoint_tol, spec.max_adjoint_steps)
    c = frozen.cotangents(adjoint.x, adjoint.gradient, cotangent)
    arguments_at = Arguments(frozen.p, frozen.r, c, tau, sigma)
    gradients = leaf_gradients(lambda *at: pairing(spec.problem.view(*at), arguments_at), params, data)
    return gradients, adjoint.info


_saddle_point.defvjp(_saddle_point_forward, _saddle_point_backward)
