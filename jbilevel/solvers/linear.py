"""Linear solvers as objects, for the adjoint systems of oracles."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from jbilevel._core.contracts import Contract
from jbilevel._core.results import SolveInfo
from jbilevel.solvers.cg import cg
from jbilevel.solvers.minres import minres


class LinearSolver(Contract, abstract="jb.solvers.LinearSolver"):
    """Solves H q = b for a symmetric H that is given by its product with a vector.

    Attributes:
      refinable: whether most of its steps may be taken in float32, with residuals in float64 (iterative refinement).
    """

    refinable: ClassVar[bool] = False

    @abstractmethod
    def solve(self, product, b, q, *, tol, max_steps) -> tuple[Any, SolveInfo]:
        """(q, info) with ``||b - H q||_2 <= tol`` where info says CONVERGED, from a start q (zero where None)."""


@dataclass(frozen=True)
class CG(LinearSolver):
    """Conjugate gradients, see `cg`: H is positive definite, and INDEFINITE says where it is not."""

    refinable = True

    def solve(self, product, b, q, *, tol, max_steps):
        return cg(product, b, q, tol=tol, max_steps=max_steps)


@dataclass(frozen=True)
class MINRES(LinearSolver):
    """Minimal residuals, see `minres`: H may be indefinite."""

    def solve(self, product, b, q, *, tol, max_steps):
        return minres(product, b, q, tol=tol, max_steps=max_steps)
