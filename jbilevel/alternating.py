"""Two groups of parameters in turn: those of the reconstruction, and those of the network that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core.results import StepInfo


class AlternatingState(NamedTuple):
    params: Any
    warm: Any
    reconstruction: Any  # state of the method that moves params["regularizer"]
    task: Any  # state of the one that moves params["task"]


@dataclass(frozen=True)
class Alternating:
    """Steps of a network on the reconstructions at hand, then one step of a method in the regulariser.

    With params = (theta, t): t+ from ``task_steps`` steps on mean l(t, x_hat(theta)), with x_hat held fixed, and
    theta+ from one step on mean l(t+, x_hat(theta)) (block Gauss-Seidel). Both lower-level solves of a step are at the
    same theta, so that the second finds its solution ready.

    Args:
      oracle: of both groups, for warm starts and reconstructions.
      reconstruction: a method on ``{"regularizer": theta, "task": no leaf}``.
      task: a method on the task's leaves, over batches ``pictures.seen(x, batch)``.
      pictures: how a batch reaches the one, ``seen(x, batch)``, and the other, ``rest(task_params, batch)``.
      task_steps: at least 1; on a CPU each is compiled for itself, so that many take long to compile.

    ``info`` is that of the regulariser's step, its value that at (theta, t+); its work counts the network's too. It is
    ``done`` where that step is.
    """

    oracle: Any
    reconstruction: Any
    task: Any
    pictures: Any
    task_steps: int = 1

    def __post_init__(self):
        if self.task_steps < 1:
            raise ValueError(f"`task_steps` must be at least 1, got {self.task_steps}.")

    def init(self, params, batch) -> AlternatingState:
        still = jax.tree.map(lambda _: None, params["task"])
        reconstruction = self.reconstruction.init(
            params | {"task": still}, self.pictures.rest(params["task"], batch)
        )  # fmt: skip
        params = params | {"regularizer": reconstruction.params["regularizer"]}
        warm = self.oracle.init(params, batch)
        task = self.task.init(params["task"], self.pictures.seen(warm.x, batch))
        return AlternatingState(params | {"task": task.params}, warm, reconstruction, task)

    @partial(jax.jit, static_argnums=0)
    def step(self, state: AlternatingState, batch) -> tuple[AlternatingState, StepInfo]:
        now = self.oracle.value(state.params, batch, state.warm, tol=state.reconstruction.tol)
        pictures = self.pictures.seen(now.warm.x, batch)
        # unrolled on a CPU, where XLA's derivatives of convolutions are some eight times slower inside a loop
        task, infos = jax.lax.scan(
            lambda task, _: self.task.step(task, pictures), state.task, length=self.task_steps,
            unroll=jax.default_backend() == "cpu",
        )  # fmt: skip
        reconstruction, info = self.reconstruction.step(
            state.reconstruction._replace(warm=now.warm), self.pictures.rest(task.params, batch)
        )
        params = {"regularizer": reconstruction.params["regularizer"], "task": task.params}
        work = info.work + now.work + jnp.sum(infos.work)
        return AlternatingState(params, reconstruction.warm, reconstruction, task), info._replace(work=work)
