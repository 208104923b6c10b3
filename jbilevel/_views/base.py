"""What solvers see of any problem."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from jbilevel._core.contracts import Contract


class View(Contract, abstract="jb.View"):
    """A problem at fixed params and data, as solvers use it.

    What else a view offers belongs to its kind: `SmoothView` an energy with its gradient, Hessian products and
    constants, `SaddleView` a linear operator and two proximal maps, `WeightedL1View` a smooth part and a penalty.
    """

    @property
    def tolerance_scale(self) -> Any:
        """Residual per unit of ``||x - x_hat||``: solves stop at tol times it. 1 where no bound is known."""
        return 1.0

    @abstractmethod
    def error_bound(self, residual) -> Any:
        """Proven bound on ``||x - x_hat||_2`` from the residual that the solver reports, inf where there is none."""

    def single(self, x) -> View | None:
        """The same problem in float32, for solves that start in it; None where there is none for this x."""
        return None
