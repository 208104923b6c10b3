"""HOAG: gradient descent with hypergradients whose accuracy follows a schedule fixed in advance (Pedregosa 2016)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import StepInfo
from jbilevel._method import steps as linesearch

# accuracy at step k = 1, 2, ... relative to the first
SCHEDULES = {
    "exponential": lambda k: 0.9 ** (k - 1),
    "quadratic": lambda k: 1.0 / k**2,
    "cubic": lambda k: 1.0 / k**3,
    "exact": lambda k: jnp.zeros_like(k),
}
FLOOR = 1e-12  # of the first tolerance's scale: nothing below it is asked for


class HOAGState(NamedTuple):
    params: Any
    warm: Any
    tol: Any  # first accuracies
    adjoint_tol: Any
    shrink: Any  # extra factor on the accuracies, halved at each rejection
    k: Any
    step: Any  # step length, 1/L; 0 before the first
    value: Any  # of the last accepted params
    previous: Any  # last accepted params, to go back to
    previous_grad: Any
    previous_tol: Any


@dataclass(frozen=True)
class HOAG:
    """Hyperparameter optimisation with approximate gradient (Pedregosa 2016; paper 0, Algorithm 1).

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
    """

    oracle: Any
    schedule: str = "quadratic"
    tol: float | None = None
    adjoint_tol: float | None = None
    step_size: float | None = None
    projection: Callable | None = None

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"`schedule` must be one of {sorted(SCHEDULES)}, got {self.schedule!r}.")

    def init(self, params, batch) -> HOAGState:
        params = linesearch.project(self.projection, params)
        tol, adjoint_tol = linesearch.first_tolerances(
            self.oracle, params, batch, 1e-2, self.tol, self.adjoint_tol
        )  # fmt: skip
        one, zero = jnp.ones_like(tol), jnp.zeros_like(tol)
        warm = self.oracle.init(params, batch)
        return HOAGState(
            params, warm, tol, adjoint_tol, one, one, zero, jnp.full_like(tol, jnp.inf), params,
            trees.zeros_like(params), tol,
        )  # fmt: skip

    @partial(jax.jit, static_argnums=0)
    def step(self, state: HOAGState, batch) -> tuple[HOAGState, StepInfo]:
        factor = jnp.maximum(state.shrink * SCHEDULES[self.schedule](state.k), FLOOR)
        tol, adjoint_tol = factor * state.tol, factor * state.adjoint_tol
        hg = self.oracle(state.params, batch, state.warm, tol=tol, adjoint_tol=adjoint_tol)

        first = state.k == 1
        move = trees.norm(trees.sub(state.params, state.previous))
        length = jnp.where(first, self._first_length(state.params, hg.grad), state.step)
        slack = 0.25 * tol + 1.25 * state.previous_tol * move - move**2 / length
        decreased = hg.value <= state.value + slack
        rejected = ~first & ((hg.value >= state.value + 0.2 * jnp.abs(state.value)) | ~jnp.isfinite(hg.value))
        length = jnp.where(rejected, 0.5 * length, jnp.where(~first & decreased, length / 0.95, length))

        # a move to where the energy overflows is taken back like any other, and its NaN forgotten
        lost = ~first & ~jnp.isfinite(hg.value)
        base = trees.where(rejected, state.previous, state.params)
        grad = trees.where(rejected, state.previous_grad, hg.grad)
        warm = trees.where(lost, state.warm, hg.warm)
        params, _ = linesearch.projected_step(self.projection, base, grad, length)
        following = HOAGState(
            params, warm, state.tol, state.adjoint_tol, jnp.where(rejected, 0.5, 1.0) * state.shrink, state.k + 1,
            length, jnp.where(rejected, state.value, hg.value), base, grad, tol,
        )  # fmt: skip
        info = linesearch.step_info(
            hg, step=jnp.where(rejected, 0.0, length), tol=tol, adjoint_tol=adjoint_tol, work=hg.work
        )
        return following, info._replace(value=jnp.where(lost, state.value, hg.value))

    def _first_length(self, params, grad):
        if self.step_size is not None:
            return jnp.asarray(self.step_size)
        slope = trees.norm(grad)
        return trees.size(params) ** 0.5 / jnp.where(slope > 0, slope, 1.0)
