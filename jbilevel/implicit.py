"""Implicit differentiation: hypergradients and differentiable minimisers through the implicit function theorem.

For x_hat(params) = argmin energy, H = Hessian in x, J = d_params grad_x energy:
d loss(x_hat) = d_params loss - J' q with H q = grad_x loss (papers 0 and 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm, guard, raise_if_known
from jbilevel._core.validate import trace_scalar
from jbilevel._oracle import base, bounds, correction
from jbilevel._oracle.base import Points, Sample
from jbilevel.solvers import cg, minres, require_tolerance
from jbilevel.solvers.loop import full_float32, run, start_jitted
from jbilevel.solvers.mixed import refine

if TYPE_CHECKING:
    from jbilevel.problems.base import Problem

ADJOINT_SOLVERS = {"cg": cg, "minres": minres}


@dataclass(frozen=True)
class Oracle(base.Oracle):
    """Hypergradient oracle by implicit differentiation of a smooth lower level.

    Args:
      problem: `SmoothProblem`. loss: ``loss(params, x, data) -> scalar`` for one sample.
      solver: lower-level solver; the problem's default when None.
      correct: return the hypergradient (and values) after one inexact Newton step on (x, q), whose error is of second
        order in the tolerances; ``error`` then estimates what remains.
      estimate: compute ``error`` (by the same Newton step) when correct is False; otherwise it is inf.
      error_steps: CG steps in each of the two systems of that Newton step.
      adjoint_solver: "cg" (strongly convex), or "minres" for energies whose Hessian may be indefinite.
      loss_smoothness: Lipschitz constant of x -> grad_x loss, for proven bounds.
      in_axes, on_failure, chunk: see `jb.Oracle`; max_steps, max_products: limits of the two solves.

    With strong_convexity, hessian_lipschitz, mixed_lipschitz, mixed_norm in the problem, loss_smoothness here, and a
    loss that does not read params, the result is certified: ``bound`` is proven (in exact arithmetic).
    """

    problem: Problem
    loss: Callable
    solver: Any = None
    correct: bool = False
    estimate: bool = True
    error_steps: int = 20
    adjoint_solver: str = "cg"
    loss_smoothness: float | None = None
    in_axes: Any = 0
    on_failure: str = "nan"
    chunk: int | str | None = "auto"
    max_steps: int = 5000
    max_products: int = 2000

    def __post_init__(self):
        super().__post_init__()
        if self.adjoint_solver not in ADJOINT_SOLVERS:
            raise ValueError(f"`adjoint_solver` must be 'cg' or 'minres', got {self.adjoint_solver!r}.")
        if self.error_steps < 1:
            raise ValueError(f"`error_steps` must be at least 1, got {self.error_steps}.")
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

    def _lower(self, params, data, warm: Warm, tol):
        self.problem.validate(params, data, warm.x)
        trace_scalar(self.loss, "loss", params, warm.x, data)
        solver = self.problem.default_solver() if self.solver is None else self.solver
        view = self.problem.view(params, data)
        return view, run(solver, view, warm.x, tol, self.max_steps)

    def _value(self, params, data, warm: Warm, tol) -> Sample:
        view, solution = self._lower(params, data, warm, tol)
        value, slope = jax.value_and_grad(self.loss, 1)(params, solution.x, data)
        energy, gradient, product = view.linearize(solution.x)
        defect = trees.norm(trees.sub(product(warm.adjoint), slope))
        likely, spent = correction.distance(view.constants, product, gradient, solution.info.error, self.correct)
        lower = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1, products=1 + spent))
        pair = correction.Pair(solution.x, warm.adjoint, energy, gradient, solution.info.residual, defect)
        return self._report(view, value, slope, pair, likely, lower, lower, jnp.inf, jnp.zeros_like(defect))

    def _sample(self, params, data, warm: Warm, tol, adjoint_tol):
        view, solution = self._lower(params, data, warm, tol)
        loss = lambda x: self.loss(params, x, data)  # noqa: E731
        slope = jax.grad(loss)(solution.x)
        energy, gradient, product = view.linearize(solution.x)
        q, adjoint = self._adjoint(view, solution.x, product, slope, warm.adjoint, adjoint_tol)
        pair = correction.Pair(solution.x, q, energy, gradient, solution.info.residual, adjoint.residual)
        points, left = Points((pair.x, pair.q)), jnp.zeros_like(adjoint.residual)
        lower = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1))
        if self.corrects:
            newton = correction.newton_step(view, jax.grad(loss), pair, product, self.error_steps)
            left = newton.left
            halfway = newton.halfway if self.correct else None
            points = Points(points.plain, halfway, (newton.pair.x, newton.pair.q))
            adjoint = adjoint._replace(evaluations=adjoint.evaluations.join(newton.evaluations))
        if self.correct:
            pair = newton.pair
            lower = after_correction(lower, pair.residual, tol * view.tolerance_scale)
            lower = lower._replace(error=view.error_bound(pair.residual))
            adjoint = after_correction(adjoint, pair.defect, adjoint_tol)
        likely, spent = correction.distance(view.constants, product, pair.gradient, lower.error, self.correct)
        lower = lower._replace(evaluations=lower.evaluations.plus(products=spent))
        adjoint = adjoint._replace(error=view.error_bound(adjoint.residual))
        value, slope = jax.value_and_grad(loss)(pair.x)
        direct = bounds.depends_on_params(self.loss, params, pair.x, data)
        bound = bounds.certificate(view.constants, self.loss_smoothness, pair, lower.error, direct)
        return self._report(view, value, slope, pair, likely, lower, adjoint, bound, left), points

    def _adjoint(self, view, x, product, slope, q, adjoint_tol):
        """Solve H q = slope from a warm q."""
        solve = ADJOINT_SOLVERS[self.adjoint_solver]
        if self.adjoint_solver != "cg" or view.single(x) is None:
            return solve(product, slope, q, tol=adjoint_tol, max_steps=self.max_products)
        refined = refine(view, x, product, slope, q, adjoint_tol, self.max_products)
        more, info = solve(product, slope, refined.q, tol=adjoint_tol, max_steps=self.max_products)
        spent = info.evaluations.plus(products=refined.products)
        return more, info._replace(steps=info.steps + refined.products, evaluations=spent)

    def _report(
        self, view, value, slope, pair: correction.Pair, likely, lower, adjoint, gradient_bound, left
    ) -> Sample:
        rest = bounds.value_errors(view.constants, self.loss_smoothness, slope, pair, lower.error, likely)
        bound = rest.bound_corrected if self.correct else rest.bound
        gradient_bound = jnp.asarray(gradient_bound, bound.dtype)
        warm = Warm(pair.x, pair.q)
        return Sample(value, rest.shift, rest.estimate, bound, gradient_bound, left, warm, lower, adjoint)

    def _surrogate(self, params, data, point):
        x, q = jax.lax.stop_gradient(point)
        return self.loss(params, x, data) - self.problem.view(params, data).slope(x, q)


def after_correction(info: SolveInfo, residual, target) -> SolveInfo:
    """A correction may meet a tolerance that the solve before it missed."""
    met = (residual <= target) & (info.status < Status.INDEFINITE)
    return info._replace(status=jnp.where(met, Status.CONVERGED, info.status).astype(jnp.int32), residual=residual)


_ADJOINT = "the adjoint solve"


@dataclass(frozen=True)
class _Spec:
    """Static part of a differentiable minimiser."""

    problem: Problem
    solver: Any
    adjoint_solver: str
    on_failure: str
    max_steps: int
    max_products: int


def argmin(
    problem: Problem,
    *,
    solver=None,
    on_failure: str = "raise",
    with_info: bool = False,
    adjoint_solver: str = "cg",
    max_steps: int = 5000,
    max_products: int = 2000,
) -> Callable:
    """The minimiser as a differentiable function ``(params, data, x0=None, *, tol, adjoint_tol) -> x_hat``.

    x_hat(params, data) = argmin_x energy(params, x, data). Reverse mode, its vmap, and second derivatives
    (grad of grad, jvp of grad) solve systems with the Hessian at x_hat; gradients flow to params and to the inexact
    leaves of data, not to x0 or the tolerances. Forward mode alone (``jax.jvp`` of the result) is impossible, because
    the function carries a ``custom_vjp``: take ``jax.jvp`` of a gradient, or ``jax.vjp``.

    Args:
      problem: `SmoothProblem`. solver: lower-level solver (the default when None).
      on_failure: what a failed solve does, forward or backward: "raise" (`ConvergenceError` outside jit; under jit,
        where nothing can be raised, NaN), "nan", or "ignore".
      with_info: return ``(x, info)`` with the `SolveInfo` of the forward solve, so that a caller under jit sees its
        status (`jbilevel.check` it outside).
      adjoint_solver: "cg" or "minres". max_steps, max_products: limits of the two solves.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     energy=lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.5 * p * jnp.sum(x**2),
    ...     init=lambda p, d: jnp.zeros_like(d), strong_convexity=1.0)
    >>> x_hat = jb.implicit.argmin(ridge)
    >>> gradient = jax.grad(lambda p: jnp.sum(x_hat(p, jnp.array([3.0]), tol=1e-9)))(1.0)  # of 3/(1 + p)
    >>> bool(jnp.isclose(gradient, -0.75))
    True
    """
    if adjoint_solver not in ADJOINT_SOLVERS:
        raise ValueError(f"`adjoint_solver` must be 'cg' or 'minres', got {adjoint_solver!r}.")
    solver = problem.default_solver() if solver is None else solver
    return solution_map(_argmin, _Spec(problem, solver, adjoint_solver, on_failure, max_steps, max_products), with_info)


def solution_map(solve: Callable, spec, with_info: bool) -> Callable:
    """``solve(spec, params, data, x0, tol, adjoint_tol) -> (x, info)`` behind the checks and the cold start."""
    problem = spec.problem
    if spec.on_failure not in ("raise", "nan", "ignore"):
        raise ValueError(f"`on_failure` must be 'raise', 'nan' or 'ignore', got {spec.on_failure!r}.")

    def solution(params, data, x0=None, *, tol=1e-6, adjoint_tol=None):
        problem.check(params)
        problem.validate(params, data, x0)
        start = start_jitted(problem, params, data)
        x0 = start if x0 is None else trees.cast_like(x0, start)
        adjoint_tol = tol if adjoint_tol is None else adjoint_tol
        tol, adjoint_tol = require_tolerance(tol, "tol", x0), require_tolerance(adjoint_tol, "adjoint_tol", x0)
        x, info = solve(spec, params, data, jax.lax.stop_gradient(x0), tol, adjoint_tol)
        return (x, jax.lax.stop_gradient(info)) if with_info else x

    return solution


@partial(jax.jit, static_argnums=0)
@full_float32
def _forward_solve(spec: _Spec, params, data, x0, tol):
    solution = run(spec.solver, spec.problem.view(params, data), x0, tol, spec.max_steps)
    return solution.x, solution.info


def _hessian_solve(spec: _Spec, params, data, x, rhs, adjoint_tol):
    """H^{-1} rhs, itself differentiable in everything H depends on."""
    q, info = _hessian_solve_jitted(spec, params, data, x, rhs, adjoint_tol)
    if spec.on_failure == "raise":
        raise_if_known(info, _ADJOINT)
    return q


@partial(jax.jit, static_argnums=0)  # without jit, an eager gradient would compile the loop at every call
@full_float32
def _hessian_solve_jitted(spec: _Spec, params, data, x, rhs, adjoint_tol):
    product = spec.problem.view(params, data).linearize(x)[2]

    def solve(product, b):
        q, info = ADJOINT_SOLVERS[spec.adjoint_solver](product, b, tol=adjoint_tol, max_steps=spec.max_products)
        # NaN belongs to the solve itself: outside, it would be part of a map to be transposed
        return guard(q, info, spec.on_failure, _ADJOINT), info

    return jax.lax.custom_linear_solve(product, rhs, solve, symmetric=True, has_aux=True)


# The root carries the forward derivative, so that whatever differentiates `_argmin`'s forward pass again (grad of grad)
# finds one; `_argmin` carries the reverse rule. Neither alone passes grad, vmap of grad, jvp of grad and grad of grad.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root(spec: _Spec, params, data, x0, tol, adjoint_tol):
    x, info = _forward_solve(spec, params, data, x0, tol)
    return guard(x, info, spec.on_failure, "the lower-level solve"), info


@_root.defjvp
@full_float32
def _root_jvp(spec: _Spec, primals, tangents):
    params, data, x0, tol, adjoint_tol = primals
    x, info = _root(spec, params, data, x0, tol, adjoint_tol)
    gradient = lambda params, data: spec.problem.view(params, data).gradient(x)  # noqa: E731
    change = jax.jvp(gradient, (params, data), (tangents[0], tangents[1]))[1]
    moved = trees.neg(_hessian_solve(spec, params, data, x, change, adjoint_tol))
    return (x, info), (moved, jax.tree.map(_constant, info))


def _constant(leaf):
    """The tangent of what is not differentiated."""
    return jnp.zeros_like(leaf) if trees.is_inexact(leaf) else np.zeros(jnp.shape(leaf), jax.dtypes.float0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _argmin(spec: _Spec, params, data, x0, tol, adjoint_tol):
    return _root(spec, params, data, x0, tol, adjoint_tol)


def _argmin_forward(spec: _Spec, params, data, x0, tol, adjoint_tol):
    x, info = _root(spec, params, data, x0, tol, adjoint_tol)
    return (x, info), (params, data, x, adjoint_tol)


def _argmin_backward(spec: _Spec, kept, cotangents):
    params, data, x, adjoint_tol = kept
    q = _hessian_solve(spec, params, data, x, cotangents[0], adjoint_tol)
    return *as_cotangents(_pull_back(spec, params, data, x, q), params, data), None, None, None


@partial(jax.jit, static_argnums=0)
@full_float32
def _pull_back(spec: _Spec, params, data, x, q):
    """-<d grad_x energy, q> for each leaf of (params, data), None for integer leaves."""
    return leaf_gradients(lambda *at: -spec.problem.view(*at).slope(x, q), params, data)


def leaf_gradients(function: Callable, params, data) -> list:
    """Gradient of ``function(params, data)`` in each leaf of both, None for integer leaves."""
    leaves, treedef = jax.tree.flatten((params, data))

    def of(inexact):
        mixed = [leaf if i is None else i for i, leaf in zip(inexact, leaves, strict=True)]
        return function(*jax.tree.unflatten(treedef, mixed))

    return jax.grad(of)([leaf if trees.is_inexact(leaf) else None for leaf in leaves])


def as_cotangents(gradients: list, params, data):
    """(params, data) with what `leaf_gradients` returned, and JAX's empty cotangents for integer leaves."""
    leaves, treedef = jax.tree.flatten((params, data))
    filled = [_constant(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return jax.tree.unflatten(treedef, filled)


_argmin.defvjp(_argmin_forward, _argmin_backward)
