"""Lower-level solvers and linear solvers, one algorithm per file, all on the driver of `jbilevel.solvers.loop`."""

from __future__ import annotations

import math
import warnings

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, say_if_unsolved
from jbilevel._core.settings import own_settings
from jbilevel._core.validate import arrays, refuse_derivatives
from jbilevel.solvers.agd import AGD as AGD
from jbilevel.solvers.agd import GradientDescent as GradientDescent
from jbilevel.solvers.apg import NonmonotoneAPG as NonmonotoneAPG
from jbilevel.solvers.external import External as External
from jbilevel.solvers.forward_backward import ForwardBackward as ForwardBackward
from jbilevel.solvers.lbfgs import LBFGS as LBFGS
from jbilevel.solvers.linear import CG as CG
from jbilevel.solvers.linear import MINRES as MINRES
from jbilevel.solvers.linear import LinearSolver as LinearSolver
from jbilevel.solvers.loop import default_tolerance, solve_jitted, start_jitted
from jbilevel.solvers.newton import NewtonCG as NewtonCG
from jbilevel.solvers.optax_steps import Optax as Optax
from jbilevel.solvers.pdhg import PDHG as PDHG
from jbilevel.solvers.preconditioners import Diagonal as Diagonal
from jbilevel.solvers.preconditioners import Preconditioner as Preconditioner

__all__ = [
    "AGD",
    "CG",
    "Diagonal",
    "External",
    "ForwardBackward",
    "GradientDescent",
    "LBFGS",
    "LinearSolver",
    "MINRES",
    "NewtonCG",
    "NonmonotoneAPG",
    "Optax",
    "PDHG",
    "Preconditioner",
    "solve",
]


@own_settings
def solve(problem, params, data, x0=None, *, tol=None, max_steps=5000, solver=None) -> tuple[object, SolveInfo]:
    """Solve one sample's lower-level problem, x_hat = argmin_x energy(params, x, data), or a saddle point (x, y).

    Args:
      problem: `SmoothProblem`, `SaddleProblem`, `WeightedL1Problem` (or any with a default solver).
      params, data: pytrees of arrays.
      x0: warm start, shaped like ``problem.init(params, data)``; the cold start when None, or where it is not finite.
      tol: absolute tolerance (traced: changing it does not recompile); None: 1e-6 of what the cold start meets. With
        ``strong_convexity`` known it bounds ``||x - x_hat||_2`` through ``||grad||/mu <= tol``, else it bounds
        ``||grad||_2`` (of weighted l1 problems the forward-backward residual).
      max_steps: step limit (traced).
      solver: see `jbilevel.solvers`; None takes the problem's default (`NewtonCG` for smooth problems,
        `ForwardBackward` for weighted l1, `PDHG` for saddle points, where ``tol`` bounds ``||x - x_hat||_2`` of the
        primal part if both moduli are known).

    Returns:
      ``(x, info)`` with info.status, .steps, .residual, .error (proven bound on ``||x - x_hat||``, inf where none is
      known) and .work; `jbilevel.check` turns a bad status into an error.

    Raises:
      ValueError: tol is negative, or x0 does not have the shape that init gives.
      TypeError: a leaf of params or data is not an array, or energy closes over a traced value.

    Warns where ``tol`` is larger than what there is to solve.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.5 * p * jnp.sum(x**2), lambda p, d: jnp.zeros_like(d),
    ...     strong_convexity=1.0)
    >>> x, info = jb.solve(ridge, 1.0, jnp.array([2.0, 4.0]), tol=1e-4)
    >>> bool(jnp.allclose(x, jnp.array([1.0, 2.0]), atol=1e-4)), bool(info.error <= 1e-4), info.status.tolist()
    (True, True, 0)
    """
    solver = problem.default_solver() if solver is None else solver
    problem.check(params)
    params, data, x0 = arrays(params, "params"), arrays(data, "data"), arrays(x0, "x0")
    params, data = refuse_derivatives((params, data), "of jb.solve", "use jb.implicit.argmin")
    start = start_jitted(problem, params, data) if x0 is None else x0
    asked = default_tolerance(problem, solver, params, data) if tol is None else require_tolerance(tol, "tol", start)
    solution = solve_jitted(problem, solver, params, data, start, asked, max_steps)
    if x0 is None:
        say_if_unsolved("tol", tol, solution.info)
    return solution.x, solution.info


def require_tolerance(tol, name: str, x=(), *, stacklevel: int = 4):
    """The tolerance as an array of the dtype of x, so that numbers and arrays share one compilation.

    A concrete tolerance is checked (a traced one cannot be), with a warning where it lies below the dtype's precision.

    Args:
      x: the unknown. stacklevel: of the warning, so that it names the user's line.

    Raises:
      ValueError: not a nonnegative number.
    """
    if not isinstance(tol, jax.core.Tracer):
        number = _number(tol)
        if not number >= 0:
            raise ValueError(f"`{name}` must be a nonnegative number, got {tol!r}.")
        # tol = 0 asks for what the dtype can do, and small unknowns can be found more accurately than eps
        if 0 < number < trees.eps(x):
            warnings.warn(
                f"`{name}`={number:.1e} is below the precision of {trees.dtype(x)} ({trees.eps(x):.1e} for an unknown "
                "of norm 1): solves will end as PRECISION. Loosen it, or use float64: "
                "jax.config.update('jax_enable_x64', True) before any array is made.",
                UserWarning,
                stacklevel=stacklevel,
            )
    return jnp.asarray(tol, trees.dtype(x))


def require_rtol(rtol, x=()):
    """The relative error that is asked for, as an array of the dtype of x; a concrete one is checked.

    Raises:
      ValueError: not a positive number.
    """
    if not isinstance(rtol, jax.core.Tracer) and not 0 < _number(rtol) < math.inf:
        raise ValueError(f"`rtol` must be a positive number, got {rtol!r}.")
    return jnp.asarray(rtol, trees.dtype(x))


def _number(value) -> float:
    """NaN of what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def __dir__():
    return __all__
