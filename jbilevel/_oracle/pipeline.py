"""The one pipeline of all oracles with an adjoint: solve, differentiate the loss, adjoint, correct, bound, report."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Warm
from jbilevel._core.validate import require_function, trace_scalar
from jbilevel._oracle.base import PullBackPoints, Sample
from jbilevel._oracle.bounds import depends_on, gradient_bound, value_errors
from jbilevel._oracle.kinds import PullBackOracle
from jbilevel._oracle.systems import Adjoint, Lower, System
from jbilevel._views.base import UNITS, Problem


@dataclass(frozen=True)
class AdjointOracle(PullBackOracle, abstract="jb.AdjointOracle"):
    """Oracle of a lower level that is solved, and differentiated by an adjoint system at the solution.

    A kind of lower level is a `Lower` with its `System`; everything else is here.

    >>> import jbilevel as jb
    >>> problem = jb.variational(None, jb.regularizers.SmoothedTV(eps=0.01))
    >>> oracle = problem.oracle(jb.losses.squared_error(), correct=True, max_steps=100)
    >>> isinstance(oracle, jb.AdjointOracle), oracle.correct, oracle.missing(certified=True)
    (True, True, '`loss_smoothness` to the oracle')
    """

    problem: Problem
    loss: Callable
    _: KW_ONLY
    solver: Any = None
    correct: bool = False
    estimate: bool = True
    error_steps: int = 20
    loss_smoothness: float | None = None
    max_steps: int = 5000

    least_error_steps: ClassVar[int] = 1

    @property
    @abstractmethod
    def lower(self) -> Lower:
        """The lower level, as it is solved and differentiated."""

    def __post_init__(self):
        super().__post_init__()
        require_function(self.loss, "loss")
        if self.error_steps < self.least_error_steps:
            raise ValueError(f"`error_steps` must be at least {self.least_error_steps}, got {self.error_steps}.")
        if self.loss_smoothness is not None and not self.loss_smoothness >= 0:
            raise ValueError(f"`loss_smoothness` must be nonnegative, got {self.loss_smoothness}.")

    @property
    def corrects(self) -> bool:
        return self.correct or self.estimate

    def without_estimate(self) -> AdjointOracle:
        return replace(self, estimate=False)

    def check(self, params) -> None:
        self.problem.check(params)

    def missing(self, certified: bool) -> str | None:
        if not certified:
            return None
        if (lacking := self.problem.lacks()) is not None:
            return lacking
        return "`loss_smoothness` to the oracle" if self.loss_smoothness is None else None

    def start(self, params, data) -> Warm:
        x0 = self.problem.start(params, data)
        return Warm(x0, trees.zeros_like(x0))

    def _view(self, params, data, x0):
        self.problem.validate(params, data, x0)
        trace_scalar(self.loss, "loss", params, x0, data)
        return self.problem.view(params, data)

    def sample_value(self, params, data, warm: Warm, tol) -> Sample:
        view = self._view(params, data, warm.x)
        system, info = self.lower.solve(view, warm.x, tol)
        # of a warm adjoint as it is: the value is then of second order for free
        adjoint = system.guess(jax.grad(self.loss, 1)(params, system.x, data), warm.adjoint)
        info = info._replace(evaluations=info.evaluations.join(adjoint.info.evaluations))
        sample = self._report(params, data, view, system, adjoint, info)
        return sample._replace(adjoint=sample.lower, warm=Warm(system.x, warm.adjoint))

    def sample(self, params, data, warm: Warm, tol, adjoint_tol):
        view = self._view(params, data, warm.x)
        gradient = jax.grad(lambda x: self.loss(params, x, data))
        system, info, adjoint = self.lower.solve_both(view, gradient, warm, tol, adjoint_tol)
        points, residual_ratio = PullBackPoints(system.point(adjoint)), None
        if self.corrects:
            newton = system.correct(gradient, adjoint, self.error_steps)
            residual_ratio = newton.residual_ratio
            points = PullBackPoints(points.plain, newton.halfway if self.correct else None, newton.point)
            work = adjoint.info.evaluations.join(newton.evaluations)
            adjoint = adjoint._replace(info=adjoint.info._replace(evaluations=work))
            if self.correct:
                system = newton.system
                info = _corrected(info, system.residual, tol * view.tolerance_scale)
                info = info._replace(error=view.error_bound(system.unrounded()))
                after = _corrected(adjoint.info, newton.adjoint.residual, adjoint_tol)
                adjoint = newton.adjoint._replace(info=after)
        sample = self._report(params, data, view, system, adjoint, info)
        return sample._replace(residual_ratio=residual_ratio), points

    def _report(self, params, data, view, system: System, adjoint: Adjoint, info: SolveInfo) -> Sample:
        distances, products = system.distance(info.error, self.correct)
        info = info._replace(evaluations=info.evaluations.plus(products=products))
        value, loss_gradient = jax.value_and_grad(self.loss, 1)(params, system.x, data)
        norms, shift = system.norms(adjoint, info.error), system.shift(adjoint)
        blocks = system.blocks(self.loss, params, data)
        parts = loss_gradient if len(blocks.seen) > 1 else (loss_gradient,)
        sizes = [trees.norm(part) for part in parts]
        unit = UNITS * trees.eps((params, system.x))
        errors = value_errors(blocks, self.loss_smoothness, value, sizes, shift, norms, distances, unit)
        proven = gradient_bound(blocks, self.loss_smoothness, norms, unit)
        if depends_on(self.loss, params, system.x, data):  # the Lipschitz constant in params is not known
            proven = jnp.full_like(proven, jnp.inf)
        bound = errors.bound_corrected if self.correct else errors.bound
        return Sample(
            value=value,
            shift=shift,
            estimate=errors.estimate,
            bound=bound,
            gradient_bound=jnp.asarray(proven, bound.dtype),
            warm=Warm(system.x, adjoint.q),
            lower=info,
            adjoint=adjoint.info._replace(error=view.error_bound(system.unrounded_adjoint(adjoint))),
        )

    def surrogate(self, params, data, point):
        x, rest = jax.lax.stop_gradient(point)
        return self.loss(params, x, data) - self.lower.pairing(self.problem.view(params, data), x, rest)


def _corrected(info: SolveInfo, residual, target) -> SolveInfo:
    """A correction may meet a tolerance that the solve before it missed."""
    met = (residual <= target) & (info.status < Status.INDEFINITE)
    return info._replace(status=jnp.where(met, Status.CONVERGED, info.status).astype(jnp.int32), residual=residual)
