"""Linear solvers as objects, for the adjoint systems of oracles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core.contracts import Contract
from jbilevel._core.results import SolveInfo
from jbilevel._core.validate import require_hashable
from jbilevel.solvers.cg import observed_cg
from jbilevel.solvers.minres import minres
from jbilevel.solvers.preconditioners import Preconditioner


class LinearSolver(Contract, abstract="jb.solvers.LinearSolver"):
    """Solves H q = b for a symmetric H that is given by its product with a vector.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> class Division(jb.solvers.LinearSolver):  # for a diagonal H only: one product tells all of it
    ...     def solve(self, product, b, q, *, tol, max_steps):
    ...         q = b / product(jnp.ones_like(b))
    ...         return q, jb.SolveInfo.exact(jnp.linalg.norm(b - product(q)))
    >>> diagonal, b = jnp.array([2.0, 4.0]), jnp.array([2.0, 8.0])
    >>> q, info = Division().solve(lambda v: diagonal * v, b, None, tol=1e-5, max_steps=1)
    >>> q.tolist()
    [1.0, 2.0]
    """

    @property
    def refinable(self) -> bool:
        """Whether most of its steps may be taken in float32, with residuals in float64 (iterative refinement)."""
        return False

    def at(self, view, x) -> LinearSolver:
        """What solves systems with the Hessian of a `SmoothView` at x; itself where nothing depends on these."""
        return self

    @abstractmethod
    def solve(self, product, b, q, *, tol, max_steps) -> tuple[Any, SolveInfo]:
        """(q, info) with ``||b - H q||_2 <= tol`` where info says CONVERGED, from a start q (zero where None)."""

    def observed(self, product, b, q, *, tol, max_steps) -> tuple[Any, SolveInfo, Any]:
        """As `solve`, and an upper bound on the smallest eigenvalue of H, inf where nobody looked: for estimates."""
        return *self.solve(product, b, q, tol=tol, max_steps=max_steps), jnp.inf


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients, see `cg`: H is positive definite, and INDEFINITE says where it is not.

    Args:
      preconditioner: a `Preconditioner`, such as `Diagonal`; None: none, which is the faster for smoothed total
        variation. Tolerances and residuals are those of H q = b itself. All steps are then taken in the dtype of x.

    Raises:
      TypeError: ``preconditioner`` is no `Preconditioner`, or does not hash.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> diagonal, b = jnp.array([2.0, 4.0]), jnp.array([2.0, 8.0])
    >>> q, info = jb.solvers.CG().solve(lambda v: diagonal * v, b, None, tol=1e-5, max_steps=10)
    >>> bool(jnp.allclose(q, b / diagonal, atol=1e-4)), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    preconditioner: Preconditioner | None = None

    def __post_init__(self):
        if self.preconditioner is not None and not isinstance(self.preconditioner, Preconditioner):
            kind = type(self.preconditioner).__name__
            raise TypeError(f"`preconditioner` of CG must be a jb.solvers.Preconditioner, got {kind}.")
        require_hashable(self)

    @property
    def refinable(self):
        return self.preconditioner is None

    def at(self, view, x):
        modulus = view.constants.strong_convexity
        if self.preconditioner is None:
            return _PreparedCG(None, modulus)
        if view.inputs is None:
            raise TypeError("a preconditioner needs jb.SmoothView(..., inputs=(params, data)) from `Problem.view`.")
        (params, data), x = jax.lax.stop_gradient((view.inputs, x))
        return _PreparedCG(self.preconditioner.inverse(params, x, data), modulus)

    def solve(self, product, b, q, *, tol, max_steps):
        if self.preconditioner is not None:
            raise TypeError("CG with a preconditioner solves at a point: linear_solver.at(view, x).solve(...).")
        return _PreparedCG(None, None).solve(product, b, q, tol=tol, max_steps=max_steps)


@dataclass(frozen=True)
class _PreparedCG(LinearSolver):
    inverse: Callable | None
    modulus: Any

    def solve(self, product, b, q, *, tol, max_steps):
        return self.observed(product, b, q, tol=tol, max_steps=max_steps)[:2]

    def observed(self, product, b, q, *, tol, max_steps):
        return observed_cg(product, b, q, tol=tol, max_steps=max_steps, inverse=self.inverse, modulus=self.modulus)


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residuals, see `minres`: H may be indefinite.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> diagonal, b = jnp.array([2.0, -4.0]), jnp.array([2.0, 8.0])
    >>> q, info = jb.solvers.MINRES().solve(lambda v: diagonal * v, b, None, tol=1e-5, max_steps=10)
    >>> bool(jnp.allclose(q, b / diagonal, atol=1e-4)), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    def solve(self, product, b, q, *, tol, max_steps):
        return minres(product, b, q, tol=tol, max_steps=max_steps)
