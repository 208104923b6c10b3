"""Implicit differentiation: hypergradients and differentiable minimisers through the implicit function theorem.

For x_hat(params) = argmin energy, H = Hessian in x, J = d_params grad_x energy:
d loss(x_hat) = d_params loss - J' q with H q = grad_x loss (Pedregosa 2016).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax

from jbilevel._core import trees
from jbilevel._core.recompilation import note_compilation
from jbilevel._core.results import guard, raise_if_known, say_if_unsolved
from jbilevel._core.settings import own_settings
from jbilevel._oracle.base import Scales, require_view
from jbilevel._oracle.pipeline import AdjointOracle
from jbilevel._oracle.share import Share, solved
from jbilevel._oracle.smooth_system import SmoothLower
from jbilevel._oracle.solution import ADJOINT, LOWER, SolutionMap, Spec, as_cotangents, constant, leaf_gradients
from jbilevel._views.base import Problem
from jbilevel._views.smooth import SmoothView
from jbilevel.solvers.linear import CG, LinearSolver
from jbilevel.solvers.loop import full_float32

__all__ = ["Oracle", "argmin"]

_CG = CG()

SHORT, MANY = 0.01, 100  # relative residual and steps of corrections where a relative error is asked for


def _lower(problem: Problem, solver, max_steps: int, linear_solver: LinearSolver, max_products: int) -> SmoothLower:
    solver = problem.default_solver() if solver is None else solver
    return SmoothLower(problem, solver, max_steps, linear_solver, max_products)


def _require(problem, linear_solver, name: str) -> None:
    require_view(problem, SmoothView, name, "smooth problem", "use its own oracle, problem.oracle(loss)")
    if not isinstance(linear_solver, LinearSolver):
        kind = type(linear_solver).__name__
        raise TypeError(f"`linear_solver` must be one such as jb.solvers.CG() or jb.solvers.MINRES(), got {kind}.")


@dataclass(frozen=True)
class Oracle(AdjointOracle):
    """Hypergradient oracle by implicit differentiation of a smooth lower level.

    Args:
      problem: `SmoothProblem`. loss: ``loss(params, x, data) -> scalar`` for one sample.
      solver: lower-level solver; the problem's default when None.
      correct: return the hypergradient (and values) after one inexact Newton step on (x, q), whose error is of second
        order in the tolerances; ``error`` then estimates what remains.
      estimate: compute ``error`` (by the same Newton step) when correct is False; otherwise it is inf.
      error_steps: CG steps in each of the two systems of that Newton step at most; more of them make better estimates.
      error_rtol: relative residual at which they stop.
      linear_solver: of the adjoint system: `solvers.CG` (strongly convex; with a ``preconditioner`` if there is a good
        one), or `solvers.MINRES` for energies whose Hessian may be indefinite.
      loss_smoothness: Lipschitz constant of x -> grad_x loss, for proven bounds.
      in_axes, on_failure, chunk: see `jb.Oracle`; max_steps, max_products: limits of the two solves.

    ``error`` is how far the Newton step moves the hypergradient, and what it leaves: CG's own error, by Gauss-Radau
    quadrature (Golub & Meurant 1994) with the modulus of convexity, the one that is known or what the solves saw of the
    smallest eigenvalue, and what the linearisation missed. It is inf where that cannot be told: the step raises energy
    and gradient (a kink, or a tolerance far too loose), the Hessian is seen to be indefinite or singular, or CG leaves
    more than eight times what it removed.

    With strong_convexity and either ridges or hessian_lipschitz, mixed_lipschitz, mixed_norm in the problem,
    loss_smoothness here, and a loss that does not read params, the result is certified: ``bound`` is proven, rounding
    included. It is sharper with ``estimate``: the bound after a Newton correction, and how far that moved ``grad``.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     energy=lambda p, x, d: 0.5 * (x - d["y"]) ** 2 + 0.5 * p * x**2,
    ...     init=lambda p, d: jnp.zeros_like(d["y"]), strong_convexity=1.0)
    >>> oracle = jb.implicit.Oracle(ridge, jb.losses.squared_error(), solver=jb.solvers.AGD())
    >>> hg = oracle(jnp.array(1.0), {"y": jnp.array([4.0]), "x": jnp.array([3.0])}, tol=1e-4)
    >>> round(float(hg.value), 3), round(float(hg.grad), 3), bool(hg.error < 1e-3)  # of (4/(1 + p) - 3)^2/2
    (0.5, 1.0, True)
    """

    linear_solver: LinearSolver = _CG
    max_products: int = 2000

    def __post_init__(self):
        super().__post_init__()
        _require(self.problem, self.linear_solver, "jb.implicit.Oracle")

    def scales(self, params, batch, sample_weight=None) -> Scales:
        return self.cold_scales(params, batch, sample_weight)

    def corrected(self) -> Oracle:
        # a shorter correction tells no error of an ill-conditioned problem, a longer one costs more than a round
        rtol = max(self.error_rtol, SHORT)
        return replace(self, correct=True, error_rtol=rtol, error_steps=max(self.error_steps, MANY))

    @property
    def lower(self) -> SmoothLower:
        return _lower(self.problem, self.solver, self.max_steps, self.linear_solver, self.max_products)


def argmin(
    problem: Problem,
    *,
    solver=None,
    on_failure: str = "raise",
    with_info: bool = False,
    linear_solver: LinearSolver = _CG,
    max_steps: int = 5000,
    max_products: int = 2000,
) -> Callable:
    """The minimiser as a differentiable function ``(params, data, x0=None, *, rtol, tol, adjoint_tol) -> x_hat``.

    With ``rtol`` the distance ``||x - x_hat||`` is at most rtol ``||x||``, proven where strong_convexity is known and
    by an estimate elsewhere, and derivatives solve their systems to the same relative residual.

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
      linear_solver: of the adjoint system, as in `Oracle`. max_steps, max_products: limits of the two solves.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     energy=lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.5 * p * jnp.sum(x**2),
    ...     init=lambda p, d: jnp.zeros_like(d), strong_convexity=1.0)
    >>> x_hat = jb.implicit.argmin(ridge)
    >>> gradient = jax.grad(lambda p: jnp.sum(x_hat(p, jnp.array([3.0]), tol=1e-6)))(1.0)  # of 3/(1 + p)
    >>> bool(jnp.isclose(gradient, -0.75))
    True
    """
    _require(problem, linear_solver, "jb.implicit.argmin")
    spec = Spec(_lower(problem, solver, max_steps, linear_solver, max_products), on_failure)
    return Argmin(spec, with_info)


@dataclass(frozen=True)
class Argmin(SolutionMap):
    """What `argmin` returns."""

    def solve(self, params, data, x0, tol, adjoint_tol):
        return _argmin(self.spec, params, data, x0, tol, adjoint_tol)


@partial(jax.jit, static_argnums=0)
@full_float32
def _solve(spec: Spec, params, data, x0, tol):
    note_compilation(spec)
    if isinstance(tol, Share):
        found = solved(spec.lower, spec.view(params, data), x0, tol)
        return found.x, found.info
    solution = spec.lower.run(spec.view(params, data), x0, tol)
    return solution.x, solution.info


def _hessian_solve(spec: Spec, params, data, x, rhs, bound):
    """H^{-1} rhs, itself differentiable in everything H depends on."""
    q, info = _hessian_solve_jitted(spec, params, data, x, rhs, bound)
    say_if_unsolved("adjoint_tol", bound.absolute, info)
    if spec.on_failure == "raise":
        raise_if_known(info, ADJOINT)
    return q


@partial(jax.jit, static_argnums=0)  # without jit, an eager gradient would compile the loop at every call
@full_float32
def _hessian_solve_jitted(spec: Spec, params, data, x, rhs, bound):
    view, lower = spec.view(params, data), spec.lower
    product, solver = view.linearize(x)[2], lower.linear_solver.at(view, x)

    def solve(product, b):
        q, info = solver.solve(product, b, None, tol=bound.of(b), max_steps=lower.max_products)
        # NaN belongs to the solve itself: outside, it would be part of a map to be transposed
        return guard(q, info, spec.on_failure, ADJOINT), info

    return jax.lax.custom_linear_solve(product, rhs, solve, symmetric=True, has_aux=True)


# The root carries the forward derivative, so that whatever differentiates `_argmin`'s forward pass again (grad of grad)
# finds one; `_argmin` carries the reverse rule. Neither alone passes grad, vmap of grad, jvp of grad and grad of grad.
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _root(spec: Spec, params, data, x0, tol, bound):
    x, info = _solve(spec, params, data, x0, tol)
    return guard(x, info, spec.on_failure, LOWER), info


@_root.defjvp
@own_settings
@full_float32
def _root_jvp(spec: Spec, primals, tangents):
    params, data, x0, tol, bound = primals
    x, info = _root(spec, params, data, x0, tol, bound)
    gradient = lambda params, data: spec.view(params, data).gradient(x)  # noqa: E731
    change = jax.jvp(gradient, (params, data), (tangents[0], tangents[1]))[1]
    moved = trees.neg(_hessian_solve(spec, params, data, x, change, bound))
    return (x, info), (moved, jax.tree.map(constant, info))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _argmin(spec: Spec, params, data, x0, tol, bound):
    return _root(spec, params, data, x0, tol, bound)


def _argmin_forward(spec: Spec, params, data, x0, tol, bound):
    x, info = _root(spec, params, data, x0, tol, bound)
    return (x, info), (params, data, x, bound)


@own_settings
def _argmin_backward(spec: Spec, kept, cotangents):
    params, data, x, bound = kept
    q = _hessian_solve(spec, params, data, x, cotangents[0], bound)
    return *as_cotangents(_pull_back(spec, params, data, x, q), params, data), None, None, None


@partial(jax.jit, static_argnums=0)
@full_float32
def _pull_back(spec: Spec, params, data, x, q):
    """-<d grad_x energy, q> for each leaf of (params, data), None for integer leaves."""
    return leaf_gradients(lambda *at: -spec.view(*at).directional(x, q), params, data)


_argmin.defvjp(_argmin_forward, _argmin_backward)


def __dir__():
    return __all__
