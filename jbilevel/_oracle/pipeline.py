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
from jbilevel._oracle.base import Scales
from jbilevel._oracle.bounds import depends_on, gradient_bound, removed_and_left, value_errors
from jbilevel._oracle.kinds import PullBackOracle
from jbilevel._oracle.samples import PullBackPoints, Sample
from jbilevel._oracle.systems import Adjoint, Approach, Lower, System
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
    error_rtol: float = 1e-3
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
        if not 0 < self.error_rtol < 1:
            raise ValueError(f"`error_rtol` must lie between 0 and 1, got {self.error_rtol}.")
        if self.loss_smoothness is not None and not self.loss_smoothness >= 0:
            raise ValueError(f"`loss_smoothness` must be nonnegative, got {self.loss_smoothness}.")

    @property
    def corrects(self) -> bool:
        return self.correct or self.estimate

    def without_estimate(self) -> AdjointOracle:
        return replace(self, estimate=False)

    def scales(self, params, batch, sample_weight=None) -> Scales:
        if not self.corrects:
            return super().scales(params, batch, sample_weight)
        # a correction would make the cold start better than it is
        return replace(self, correct=False, estimate=False).scales(params, batch, sample_weight)

    def corrected(self) -> AdjointOracle:
        return replace(self, correct=True)

    def check(self, params) -> None:
        self.problem.check(params)

    def missing(self, certified: bool) -> str | None:
        if not certified:
            return None
        if (lacking := self.problem.lacks()) is not None:
            return lacking
        return "`loss_smoothness` to the oracle" if self.loss_smoothness is None else None

    def sizes(self, params, data) -> Scales:
        x0 = self.problem.start(params, data)
        view = self._view(params, data, x0)
        size = self.lower.solver.first_residual(view, x0) / view.tolerance_scale
        return Scales(size, self.lower.adjoint_size(view, jax.grad(self.loss, 1)(params, x0, data)))

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
        points, left, approach = PullBackPoints(system.point(adjoint)), None, None
        corrected_bound = None
        if self.corrects:
            newton = system.correct(gradient, adjoint, self.error_steps, self.error_rtol)
            left, approach = newton.left + newton.rounding * self.correct, newton.approach
            points = PullBackPoints(points.plain, newton.halfway, newton.point)
            work = adjoint.info.evaluations.join(newton.evaluations)
            adjoint = adjoint._replace(info=adjoint.info._replace(evaluations=work))
            if self.correct:
                system, approach = newton.system, None
                info = _corrected(info, system.residual, tol * view.tolerance_scale)
                info = info._replace(error=view.error_bound(system.unrounded()))
                after = _corrected(adjoint.info, newton.adjoint.residual, adjoint_tol)
                adjoint = newton.adjoint._replace(info=after)
            else:
                error = view.error_bound(newton.system.unrounded())
                corrected_bound = self._proven(params, data, newton.system, newton.adjoint, error)[2]
        sample = self._report(params, data, view, system, adjoint, info)
        sample = sample if approach is None else self._seen(params, data, sample, approach)
        return sample._replace(left=left, corrected_bound=corrected_bound), points

    def _proven(self, params, data, system: System, adjoint: Adjoint, error):
        """(norms of a system and its adjoint, what is known of its blocks, proven bound on the error of z)."""
        norms = system.norms(adjoint, error)
        blocks = system.blocks(self.loss, params, data)._replace(near=system.near(adjoint, norms))
        bound = gradient_bound(blocks, self.loss_smoothness, norms, _unit(params, system))
        if depends_on(self.loss, params, system.x, data):  # the Lipschitz constant in params is not known
            bound = jnp.full_like(bound, jnp.inf)
        return norms, blocks, bound

    def _report(self, params, data, view, system: System, adjoint: Adjoint, info: SolveInfo) -> Sample:
        distances, products = system.distance(info.error, self.correct)
        info = info._replace(evaluations=info.evaluations.plus(products=products))
        value, loss_gradient = jax.value_and_grad(self.loss, 1)(params, system.x, data)
        norms, blocks, proven = self._proven(params, data, system, adjoint, info.error)
        shift = system.shift(adjoint)
        parts = loss_gradient if len(blocks.seen) > 1 else (loss_gradient,)
        sizes = [trees.norm(part) for part in parts]
        errors = value_errors(
            blocks, self.loss_smoothness, value, sizes, shift, norms, distances, _unit(params, system)
        )
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

    def _seen(self, params, data, sample: Sample, approach: Approach) -> Sample:
        """With the error of the value that the loss shows on the way to the exact x, where that is the larger one."""
        halfway, end = (self.loss(params, x, data) for x in (approach.halfway, approach.end))
        shift, known = sample.value - end, jnp.isfinite(approach.left)
        seen = removed_and_left(0.0, jnp.abs(halfway - sample.value), jnp.abs(end - halfway), approach.left)
        estimate = jnp.maximum(seen, jnp.abs(sample.shift) + sample.estimate - jnp.abs(shift))
        estimate = jnp.where(known, estimate, sample.estimate)
        return sample._replace(shift=jnp.where(known, shift, sample.shift), estimate=estimate)

    def surrogate(self, params, data, point):
        x, rest = jax.lax.stop_gradient(point)
        return self.loss(params, x, data) - self.lower.pairing(self.problem.view(params, data), x, rest)


def _unit(params, system: System):
    return UNITS * trees.eps((params, system.x))


def _corrected(info: SolveInfo, residual, target) -> SolveInfo:
    """A correction may meet a tolerance that the solve before it missed."""
    met = (residual <= target) & (info.status < Status.INDEFINITE)
    return info._replace(status=jnp.where(met, Status.CONVERGED, info.status).astype(jnp.int32), residual=residual)
