"""HOAG: gradient descent with hypergradients whose accuracy follows a schedule fixed in advance (Pedregosa 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import StepInfo
from jbilevel._method import steps
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["HOAG", "HOAGState", "SCHEDULES"]

# accuracy at step k = 1, 2, ... relative to the first
SCHEDULES = {
    "exponential": lambda k: 0.9 ** (k - 1),
    "quadratic": lambda k: 1.0 / k**2,
    "cubic": lambda k: 1.0 / k**3,
    "exact": lambda k: jnp.zeros_like(k),
}
FLOOR = 1e-12  # of the first tolerance's scale: nothing below it is asked for


class HOAGState(MethodState):
    first_tol: Any  # accuracies of the first step, which the schedule scales
    first_adjoint_tol: Any
    shrink: Any  # extra factor on the accuracies, halved at each rejection
    k: Any
    step: Any  # step length, 1/L; 0 before the first
    value: Any  # of the last accepted params
    previous: Any  # last accepted params, to go back to
    previous_grad: Any
    previous_tol: Any


@dataclass(frozen=True)
class HOAG(Method):
    """Hyperparameter optimisation with approximate gradient (Pedregosa 2016, Algorithm 1).

    At step k the lower level and the adjoint are solved to eps_k = tol * schedule(k), warm, and params move by -z/L.
    L adapts (Pedregosa 2016, section 5): with d = ||last move||, C = 1/4, a value
    f_k <= f_{k-1} + C eps_k + (C + 1) eps_{k-1} d - L d^2 shortens L by 0.95; f_k >= 1.2 f_{k-1} rejects the move (back
    to the last accepted params, L doubled, accuracies halved), and so does a value that is not finite, in place of
    which the last accepted one is reported; else L stays. Each move is made once.

    Args:
      oracle: any hypergradient oracle.
      schedule: "exponential" (0.9^k), "quadratic" (1/k^2), "cubic" (1/k^3), "exact".
      tol, adjoint_tol: accuracies at the first step; None takes 1e-2 of the sizes at the cold start.
      step_size: first step length; None moves params by the root of their number, as the author's code does.
      projection: ``params -> params`` onto the feasible set.
      log_error: see `jb.Method`.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`. ValueError: there is no such schedule.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> oracle = problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, solver=jb.solvers.AGD())
    >>> result = jb.fit(HOAG(oracle, "cubic", step_size=0.2), jnp.array(1.0), jnp.array([2.0]), steps=8)  # x_hat = 2 p
    >>> round(float(result.params), 2), round(float(result.history["tol"][0] / result.history["tol"][3]))
    (1.5, 64)
    """

    schedule: str = "quadratic"
    _: KW_ONLY
    tol: float | None = None
    adjoint_tol: float | None = None
    step_size: float | None = None
    projection: Callable | None = None

    compares_values = True

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {sorted(SCHEDULES)}, got {self.schedule!r}.")

    def _factor(self, shrink, k):
        """Accuracy of step k, relative to the first."""
        return jnp.maximum(shrink * SCHEDULES[self.schedule](k), FLOOR)

    def init(self, params, batch) -> HOAGState:
        params = steps.project(self.projection, params)
        first = steps.first_tolerances(self.asked, params, batch, 1e-2, self.tol, self.adjoint_tol)
        one = jnp.ones_like(first.tol)
        factor = self._factor(one, one)
        return HOAGState(
            params=params,
            warm=self.oracle.init(params, batch),
            tol=factor * first.tol,
            adjoint_tol=factor * first.adjoint_tol,
            first_tol=first.tol,
            first_adjoint_tol=first.adjoint_tol,
            shrink=one,
            k=one,
            step=jnp.zeros_like(one),
            value=jnp.full_like(one, jnp.inf),
            previous=params,
            previous_grad=trees.zeros_like(params),
            previous_tol=first.tol,
        )

    @compiled
    def step(self, state: HOAGState, batch) -> tuple[HOAGState, StepInfo]:
        hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)

        first = state.k == 1
        move = trees.norm(trees.sub(state.params, state.previous))
        length = jnp.where(first, self._first_length(state.params, hg.grad), state.step)
        slack = 0.25 * state.tol + 1.25 * state.previous_tol * move - move**2 / length
        decreased = hg.value <= state.value + slack
        rejected = ~first & ((hg.value >= state.value + 0.2 * jnp.abs(state.value)) | ~jnp.isfinite(hg.value))
        length = jnp.where(rejected, 0.5 * length, jnp.where(~first & decreased, length / 0.95, length))

        # a move to where the energy overflows is taken back like any other, and its NaN forgotten
        nonfinite = ~first & ~jnp.isfinite(hg.value)
        base = trees.where(rejected, state.previous, state.params)
        grad = trees.where(rejected, state.previous_grad, hg.grad)
        params, _ = steps.projected_step(self.projection, base, grad, length)
        shrink, k = jnp.where(rejected, 0.5, 1.0) * state.shrink, state.k + 1
        factor = self._factor(shrink, k)
        following = HOAGState(
            params=params,
            warm=trees.where(nonfinite, state.warm, hg.warm),
            tol=factor * state.first_tol,
            adjoint_tol=factor * state.first_adjoint_tol,
            first_tol=state.first_tol,
            first_adjoint_tol=state.first_adjoint_tol,
            shrink=shrink,
            k=k,
            step=length,
            value=jnp.where(rejected, state.value, hg.value),
            previous=base,
            previous_grad=grad,
            previous_tol=state.tol,
        )
        grad_norm = trees.norm(trees.where(nonfinite, state.previous_grad, hg.grad))
        info = self.report(hg, state, step=jnp.where(rejected, 0.0, length), grad_norm=grad_norm)
        return following, info._replace(value=jnp.where(nonfinite, state.value, hg.value))

    def _first_length(self, params, grad):
        if self.step_size is not None:
            return jnp.asarray(self.step_size)
        grad_norm = trees.norm(grad)
        return trees.size(params) ** 0.5 / jnp.where(grad_norm > 0, grad_norm, 1.0)


def __dir__():
    return __all__
