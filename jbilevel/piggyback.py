"""Piggyback: hypergradients and differentiable saddle points by a second primal-dual iteration for the adjoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jbilevel._oracle.base import require_view
from jbilevel._oracle.pipeline import AdjointOracle
from jbilevel._oracle.saddle_system import SaddleLower
from jbilevel._oracle.simultaneous import SimultaneousLower
from jbilevel._oracle.solution import SolutionMap, Spec
from jbilevel._views.base import Problem
from jbilevel._views.saddle import SaddleView
from jbilevel.solvers.pdhg import PDHG

__all__ = ["MODES", "Oracle", "saddle_point"]

MODES = {"sequential": SaddleLower, "simultaneous": SimultaneousLower}


def _require(problem, solver, name: str, instead: str) -> None:
    require_view(problem, SaddleView, name, "jb.SaddleProblem", instead)
    if not isinstance(solver, PDHG):
        raise TypeError(f"`solver` of {name} must be a PDHG, got {type(solver).__name__}.")


@dataclass(frozen=True)
class Oracle(AdjointOracle):
    """Hypergradient oracle of a saddle-point lower level by piggyback (Bogensperger et al. 2024, Algorithm 2).

    Args:
      problem: `SaddleProblem`. loss: ``loss(params, (x, y), data) -> scalar`` for one sample.
      mode: "sequential": the saddle point to ``tol``, then its adjoint to ``adjoint_tol``; "simultaneous": iterations
        for both in turn, until both tolerances are met.
      solver: `PDHG`, for both.
      correct: return the hypergradient (and values) after a correction of all four unknowns, some accelerated
        iterations for (x, y) and as many for the adjoint; ``error`` then estimates what remains.
      estimate: compute ``error`` (by the same correction) when correct is False; otherwise it is inf.
      error_steps: iterations in each half of that correction; one costs one K and one K*. error_rtol: share of the
        first step at which they stop.
      loss_smoothness: Lipschitz constant of the gradient of the loss in (x, y), for proven bounds.
      in_axes, on_failure, chunk: see `jb.Oracle`; max_steps, max_adjoint_steps: limits of the two solves.

    ``tol`` bounds ``||x - x_hat||_2`` per sample where both moduli are known, else the residual (see `PDHG`);
    ``adjoint_tol`` bounds the residual of the adjoint system. ``error`` is inf where the correction seems to leave more
    than half of the distance to the exact unknowns, for which more ``error_steps`` or smaller tolerances are the cure.
    With both moduli, a norm and either ridges or `SaddleConstants` in the problem, loss_smoothness here and a loss that
    does not read params, ``bound`` is proven, rounding included, and sharper with ``estimate``.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SaddleProblem(  # x_hat = d/(1 + p), as 1/2 |x - d|^2 + max_y <x, y> - |y|^2/(2 p)
    ...     lambda p, x, d: x, lambda p, v, step, d: jb.prox.squared_distance(v, step, d),
    ...     lambda p, v, step, d: jb.prox.squared_distance(v, step, 0.0, 1 / p),
    ...     lambda p, d: (jnp.zeros_like(d), jnp.zeros_like(d)), mu_primal=1.0, mu_dual=lambda p, d: 1 / p, norm=1.0)
    >>> oracle = jb.piggyback.Oracle(ridge, lambda p, pair, d: 0.5 * (pair[0] - 3.0) ** 2, estimate=False)
    >>> hg = oracle(jnp.array(1.0), jnp.array([4.0]), tol=1e-5)  # the loss takes the pair (x, y)
    >>> round(float(hg.value), 3), round(float(hg.grad), 3)  # of (4/(1 + p) - 3)^2/2
    (0.5, 1.0)
    """

    mode: str = "sequential"
    solver: PDHG = PDHG()
    error_steps: int = field(default=32, kw_only=True)
    max_adjoint_steps: int = 5000

    least_error_steps = 2  # each half of a correction needs one

    def __post_init__(self):
        super().__post_init__()
        _require(self.problem, self.solver, "jb.piggyback.Oracle", "smooth problems go to jb.implicit")
        if self.mode not in MODES:
            raise ValueError(f"`mode` must be one of {tuple(MODES)}, got {self.mode!r}.")

    @property
    def lower(self) -> SaddleLower:
        return MODES[self.mode](self.problem, self.solver, self.max_steps, self.max_adjoint_steps)


def saddle_point(
    problem: Problem,
    *,
    solver: PDHG | None = None,
    on_failure: str = "raise",
    with_info: bool = False,
    max_steps: int = 5000,
    max_adjoint_steps: int = 5000,
) -> Callable:
    """The saddle point as a differentiable function ``(params, data, x0=None, *, rtol, tol, adjoint_tol) -> (x, y)``.

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
    solver = PDHG() if solver is None else solver
    _require(problem, solver, "jb.piggyback.saddle_point", "see jb.implicit.argmin")
    return SolutionMap(Spec(SaddleLower(problem, solver, max_steps, max_adjoint_steps), on_failure), with_info)


def __dir__():
    return __all__
