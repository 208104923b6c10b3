"""Any optax optimiser on any oracle, at fixed accuracy: the non-adaptive baseline, and the trainer of networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, NamedTuple

import optax

from jbilevel._core import brief
from jbilevel._core.optimizers import Optimizer, WithOptimizer
from jbilevel._core.results import StepInfo
from jbilevel._method import steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["Average", "FirstOrder", "FirstOrderState"]


class FirstOrderState(MethodState):
    optimizer: Any  # optax state
    average: Average | None = None


class Average(NamedTuple):
    """Exponential moving average of the parameters after each step.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> state = FirstOrder(oracle, optax.sgd(0.5), average=0.9).init(jnp.array(1.0), jnp.array([2.0]))
    >>> float(state.average.params)
    1.0
    """

    params: Any
    memory: Any  # optax.EmaState

    __repr__ = brief.record


@dataclass(frozen=True)
class FirstOrder(WithOptimizer, Method):
    """params+ = P(params + optax update(hypergradient)) with fixed tolerances.

    Args:
      oracle: any hypergradient oracle.
      optimizer: an optax ``GradientTransformation``; or a function without arguments that makes one, which a method
        needs to be pickled: ``functools.partial(optax.adam, 1e-3)``.
      tol, adjoint_tol: fixed accuracies; None takes 1e-3 of the sizes at the cold start, measured by ``init``.
      projection: ``params -> params``, applied after each update.
      average: decay of an exponential moving average of the parameters, corrected for its start (Kingma & Ba 2015,
        section 7.2), which is left in ``state.average.params``; None: no average.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`, or ``optimizer`` is none of optax. ValueError: ``average`` is no decay.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> method = FirstOrder(oracle, optax.sgd(0.5), average=0.5)
    >>> result = jb.fit(method, jnp.array(0.0), lambda step: jnp.array([1.0, 3.0]), steps=20)
    >>> round(float(result.params), 3), round(float(result.state.average.params), 3)
    (2.0, 2.0)
    """

    optimizer: Optimizer
    _: KW_ONLY
    tol: float | None = None
    adjoint_tol: float | None = None
    projection: Callable | None = None
    average: float | None = None

    def __post_init__(self):
        Method.__post_init__(self)
        WithOptimizer.__post_init__(self)
        if self.average is not None and not 0 <= self.average < 1:
            raise ValueError(f"`average` must lie in [0, 1) or be None, got {self.average}.")

    def init(self, params, batch) -> FirstOrderState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, 1e-3, self.tol, self.adjoint_tol)
        return FirstOrderState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=first.tol,
            adjoint_tol=first.adjoint_tol,
            optimizer=self.transformation().init(params),
            average=None if self.average is None else Average(params, optax.ema(self.average).init(params)),
        )

    @compiled
    def step(self, state: FirstOrderState, batch) -> tuple[FirstOrderState, StepInfo]:
        hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        moved = steps.optax_step(self.transformation(), self.projection, state.params, state.optimizer, hg)
        average, decay = state.average, self.average
        if average is not None and decay is not None:
            average = Average(*optax.ema(decay).update(moved.params, average.memory))
        following = replace(state, params=moved.params, warm=hg.warm, optimizer=moved.optimizer, average=average)
        return following, self.report(hg, state, step=moved.step)


def __dir__():
    return __all__
