"""What a kind of lower level supplies to the oracles: how it is solved, and its optimality system at a solution."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

from jbilevel._core import trees
from jbilevel._core.contracts import Contract
from jbilevel._core.results import SolveInfo, Work
from jbilevel._oracle.bounds import Blocks, Near, Norms
from jbilevel._views.base import Problem
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import Solution, run


class Adjoint(NamedTuple):
    """An inexact solution q of the adjoint system."""

    q: Any
    residual: Any  # norm of what is left of the system
    info: SolveInfo
    parts: Any = None  # what else a kind of system knows about it
    least_curvature: Any = math.inf  # an upper bound on the smallest eigenvalue of the system, where it is symmetric


class Approach(NamedTuple):
    """Steps from a computed x towards the exact one, which tell how far the loss moves on the way."""

    halfway: Any
    end: Any
    left: Any  # distance from the end to the exact x, against that from x to the end; inf: unknown


class Correction(NamedTuple):
    """What one inexact Newton step on the pair (x, q) gave."""

    system: System
    adjoint: Adjoint
    halfway: Any  # where to pull back after half of the steps: how far the last half moved z tells what is left
    point: Any  # after all of them
    left: Any  # estimate of how large the error that is left is, against the one that was removed; inf: unknown
    evaluations: Work
    rounding: Any = 0.0  # of the unknowns after the step, in units of how far it moved them
    approach: Approach | None = None  # where these steps of x tell more than `System.distance`


class System(Contract, abstract="System"):
    """The optimality system of a lower level, linearised at a computed solution ``x``."""

    x: Any
    residual: Any  # as solvers report it

    @abstractmethod
    def adjoint(self, loss_gradient, start, tol) -> Adjoint:
        """Solve the adjoint system for this gradient of the loss in x, from ``start``."""

    def at_adjoint(self, adjoint: Adjoint) -> System:
        """The system that the adjoint was solved in, where that was chosen with it."""
        return self

    @abstractmethod
    def guess(self, loss_gradient, q) -> Adjoint:
        """A given q, with its residual."""

    @abstractmethod
    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int, rtol: float) -> Correction:
        """One inexact Newton step on (x, q): at most ``steps`` linear iterations on each, until residuals have fallen
        by rtol. loss_gradient_at: of x."""

    @abstractmethod
    def point(self, adjoint: Adjoint) -> tuple:
        """(x, what `Lower.pairing` needs): where the pull-back to the parameters takes place."""

    @abstractmethod
    def distance(self, proven, corrected: bool) -> tuple[tuple, Any]:
        """(estimated distances of the blocks of x from exact, Hessian products spent)."""

    @abstractmethod
    def unrounded(self):
        """Bound on what ``residual`` would be without rounding."""

    @abstractmethod
    def unrounded_adjoint(self, adjoint: Adjoint):
        """Bound on what the residual of q would be without rounding."""

    @abstractmethod
    def norms(self, adjoint: Adjoint, error) -> Norms:
        """Sizes of the blocks of x and q, of residuals, and proven distances of x; error: that of its image."""

    @abstractmethod
    def shift(self, adjoint: Adjoint) -> Any:
        """The signed first-order error of the loss at x."""

    @abstractmethod
    def blocks(self, loss, params, data) -> Blocks:
        """What is known of the blocks of x, and which of them the loss reads."""

    def near(self, adjoint: Adjoint, norms: Norms) -> Near | None:
        """What is known of the surroundings of x, sharper than the constants of `blocks`."""
        return None

    @abstractmethod
    def kept(self) -> Any:
        """Arrays from which `Lower.restore` makes the system again, besides x."""


@dataclass(frozen=True)
class Lower(Contract, abstract="Lower"):
    """A lower-level problem with the solver and the settings by which it is solved and differentiated."""

    problem: Problem
    solver: Solver
    max_steps: int

    def run(self, view, x0, tol) -> Solution:
        return run(self.solver, view, x0, tol, self.max_steps)

    @abstractmethod
    def solve(self, view, x0, tol) -> tuple[System, SolveInfo]:
        """Solve the problem to tol, and linearise it there."""

    @abstractmethod
    def restore(self, view, x, kept) -> System:
        """The system at an x that `solve` found before."""

    @abstractmethod
    def pairing(self, view, x, rest) -> Any:
        """A function of the parameters behind ``view`` whose gradient is minus the indirect part of the hypergradient;
        all but the parameters is held fixed. x, rest: a `System.point`."""

    def adjoint_size(self, view, loss_gradient) -> Any:
        """The residual of the adjoint system at q = 0."""
        return trees.norm(loss_gradient)

    def solve_both(self, view, loss_gradient_at, warm, tol, adjoint_tol) -> tuple[System, SolveInfo, Adjoint]:
        """The system and its adjoint: one after the other."""
        system, info = self.solve(view, warm.x, tol)
        return system, info, system.adjoint(loss_gradient_at(system.x), warm.adjoint, adjoint_tol)
