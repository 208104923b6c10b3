"""A saddle point and its adjoint at once: the adjoint follows a saddle point that still moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Work
from jbilevel._oracle.saddle_system import SaddleLower, SaddleSystem
from jbilevel._views.base import View
from jbilevel._views.saddle import SaddleView
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import Solution, run
from jbilevel.solvers.pdhg import PDHG


@dataclass(frozen=True)
class _JointView(View):
    """A saddle problem together with its moving adjoint; residuals count in units of their tolerances."""

    view: SaddleView
    system: Callable  # state of the lower solve -> SaddleSystem there
    loss_gradient_at: Callable
    targets: tuple

    def error_bound(self, residual):
        return jnp.full_like(residual, jnp.inf)


class _JointState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    failure: Any
    lower: Any
    adjoint: Any


@dataclass(frozen=True)
class _Joint(Solver):
    """``stride`` iterations for the saddle point and as many for the adjoint at it, in turn (Bogensperger
    et al. 2022)."""

    solver: PDHG

    patience = PDHG.patience

    @property
    def stride(self):
        return self.solver.stride

    def init(self, view: _JointView, x0, target) -> _JointState:
        lower = self.solver.init(view.view, x0[0], target)
        return self._together(view, lower, self.solver.init(self._adjoint(view, lower), x0[1], target))

    def step(self, view: _JointView, state: _JointState, target) -> _JointState:
        lower = self.solver.step(view.view, state.lower, target)
        return self._together(view, lower, self.solver.step(self._adjoint(view, lower), state.adjoint, target))

    def failure(self, state):
        return state.failure

    def _adjoint(self, view: _JointView, lower) -> SaddleView:
        return view.system(lower).adjoint_view(view.loss_gradient_at(lower.x))

    def _together(self, view: _JointView, lower, adjoint) -> _JointState:
        both, pair = (lower, adjoint), (lower.x, adjoint.x)
        units = [s.curvature * trees.norm(s.x) / t for s, t in zip(both, view.targets, strict=True)]
        size = trees.norm(pair)
        return _JointState(
            x=pair,
            gradient=(lower.gradient, adjoint.gradient),
            residual=jnp.maximum(*(s.residual / t for s, t in zip(both, view.targets, strict=True))),
            curvature=jnp.maximum(*units) / jnp.where(size > 0, size, 1.0),
            evaluations=lower.evaluations.join(adjoint.evaluations),
            failure=lower.failure,
            lower=lower,
            adjoint=adjoint,
        )


@dataclass(frozen=True)
class SimultaneousLower(SaddleLower):
    """As `SaddleLower`, but for hypergradients both solves run in turn."""

    def solve_both(self, view, loss_gradient_at, warm, tol, adjoint_tol):
        dtype = trees.dtype(warm.x)
        least = jnp.finfo(dtype).tiny ** 0.5  # tol = 0 asks for the precision of the dtype
        targets = tuple(jnp.maximum(jnp.asarray(t, dtype), least) for t in (tol * view.tolerance_scale, adjoint_tol))
        joint = _JointView(view, lambda s: self._at(view, s), loss_gradient_at, targets)
        # an infinite tolerance asks for nothing
        limit = max(self.max_steps, self.max_adjoint_steps)
        last = run(_Joint(self.solver), joint, (warm.x, warm.adjoint), jnp.ones((), dtype), limit)
        lower, adjoint = last.state.lower, last.state.adjoint

        def info(state, target) -> SolveInfo:
            met = (state.residual <= target) & (last.info.status != Status.NORM_BOUND)
            status = jnp.where(met, Status.CONVERGED, last.info.status).astype(jnp.int32)
            return SolveInfo(
                status=status,
                steps=last.info.steps,
                residual=state.residual,
                error=view.error_bound(self.solver.unrounded(view, state)),
                evaluations=state.evaluations,
            )

        found = Solution(adjoint.x, adjoint.gradient, info(adjoint, targets[1]))
        system = self._at(view, lower)
        return system, info(lower, targets[0]), system.found(found, loss_gradient_at(lower.x))

    def _at(self, view, state) -> SaddleSystem:
        return self.system(view, state.x, state.gradient, state.norm)
