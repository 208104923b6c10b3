"""Any optax optimiser on any oracle, at fixed accuracy: the non-adaptive baseline, and the trainer of networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from jbilevel._core.results import StepInfo
from jbilevel._method import steps as linesearch


class FirstOrderState(NamedTuple):
    params: Any
    warm: Any
    optimizer: Any  # optax state
    tol: Any
    adjoint_tol: Any
    average: Average | None = None


class Average(NamedTuple):
    """Exponential moving average of the parameters after each step."""

    params: Any
    memory: Any  # optax.EmaState


@dataclass(frozen=True)
class FirstOrder:
    """params+ = P(params + optax update(hypergradient)) with fixed tolerances.

    Args:
      oracle: any hypergradient oracle.
      optimizer: an optax ``GradientTransformation``.
      tol, adjoint_tol: fixed accuracies; None takes 1e-3 of the sizes at the cold start, measured by ``init``.
      projection: ``params -> params``, applied after each update.
      average: decay of an exponential moving average of the parameters, corrected for its start (Kingma & Ba 2015,
        section 7.2), which is left in ``state.average.params``; None: no average.
    """

    oracle: Any
    optimizer: optax.GradientTransformation
    tol: float | None = None
    adjoint_tol: float | None = None
    projection: Callable | None = None
    average: float | None = None

    def __post_init__(self):
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"`average` must lie in [0, 1) or be None, got {self.average}.")

    def init(self, params, batch) -> FirstOrderState:
        params = linesearch.project(self.projection, params)
        tol, adjoint_tol = linesearch.first_tolerances(
            self.oracle, params, batch, 1e-3, self.tol, self.adjoint_tol
        )  # fmt: skip
        average = None if self.average is None else Average(params, optax.ema(self.average).init(params))
        warm, optimizer = self.oracle.init(params, batch), self.optimizer.init(params)
        return FirstOrderState(params, warm, optimizer, tol, adjoint_tol, average)

    @partial(jax.jit, static_argnums=0)
    def step(self, state: FirstOrderState, batch) -> tuple[FirstOrderState, StepInfo]:
        hg = self.oracle(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        updates, optimizer = self.optimizer.update(hg.grad, state.optimizer, state.params)
        params = linesearch.project(self.projection, optax.apply_updates(state.params, updates))
        info = linesearch.step_info(
            hg, step=optax.tree.norm(updates), tol=state.tol, adjoint_tol=state.adjoint_tol, work=hg.work
        )
        average = state.average
        if average is not None:
            average = Average(*optax.ema(self.average).update(params, average.memory))
        return state._replace(params=params, warm=hg.warm, optimizer=optimizer, average=average), info
