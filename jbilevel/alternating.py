"""Two groups of parameters in turn: those of the reconstruction, and those of the network that reads it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core.contracts import Contract
from jbilevel._core.results import StepInfo
from jbilevel._method.base import Method, MethodState, compiled

__all__ = ["Alternating", "AlternatingState", "Batches"]


class Batches(Contract, abstract="Batches"):
    """How a batch reaches the two methods of `Alternating`: a frozen dataclass with the two functions below.

    >>> @dataclass(frozen=True)
    ... class Scaling(Batches):  # the network sees reconstructions, the reconstruction the network's parameters
    ...     def of_task(self, x, batch):
    ...         return batch | {"x": x}
    ...     def of_reconstruction(self, task_params, batch):
    ...         return batch | {"t": jnp.full_like(batch["y"], task_params)}
    >>> Scaling().of_reconstruction(2.0, {"y": jnp.ones(3)})["t"].tolist()
    [2.0, 2.0, 2.0]
    """

    @abstractmethod
    def of_task(self, x: Any, batch: Any) -> Any:
        """The batch of the network: what it sees of x, the lower-level solutions with a leading sample axis."""

    @abstractmethod
    def of_reconstruction(self, task_params: Any, batch: Any) -> Any:
        """The batch of the reconstruction, with the network at rest at ``task_params``."""


class AlternatingState(MethodState):
    """params, warm, tol and adjoint_tol are those of the reconstruction, with ``params["task"]`` beside it."""

    reconstruction: Any  # state of the method that moves params["regularizer"], without its warm start
    task: Any  # state of the one that moves params["task"]


@dataclass(frozen=True)
class Alternating(Method):
    """Steps of a network on the reconstructions at hand, then one step of a method in the regulariser.

    With params = (theta, t): t+ from ``task_steps`` steps on mean l(t, x_hat(theta)), with x_hat held fixed, and
    theta+ from one step on mean l(t+, x_hat(theta)) (block Gauss-Seidel). Both lower-level solves of a step are at the
    same theta and to the accuracy that the second method asks for, so that the second finds its solution ready.

    Args:
      oracle: of both groups, for warm starts and reconstructions.
      reconstruction: a method on ``{"regularizer": theta, "task": no leaf}``.
      task: a method on the task's leaves.
      batches: how a batch reaches the one and the other, see `Batches`.
      task_steps: at least 1; on a CPU each is compiled for itself, so that many take long to compile.

    ``info`` is that of the regulariser's step, its value that at (theta, t+); its work counts the network's too. It is
    ``done`` where that step is.

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`, a method is no `jb.Method`. ValueError: ``task_steps`` is not positive.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> @dataclass(frozen=True)
    ... class Scaling(Batches):  # x_hat = theta y is to be the label after multiplication by t
    ...     def of_task(self, x, batch):
    ...         return batch | {"x": x}
    ...     def of_reconstruction(self, task_params, batch):
    ...         return batch | {"t": jnp.full_like(batch["y"], task_params)}
    >>> def loss(p, x, d):
    ...     return 0.5 * ((d["t"] if p["task"] is None else p["task"]) * x - d["label"]) ** 2
    >>> problem = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - p["regularizer"] * d["y"]) ** 2, lambda p, d: 0.0 * d["y"], strong_convexity=1.0)
    >>> oracle = problem.oracle(loss, solver=jb.solvers.AGD())
    >>> network = jb.explicit.Oracle(lambda t, d: 0.5 * (t * d["x"] - d["label"]) ** 2)
    >>> method = Alternating(
    ...     oracle, jb.FirstOrder(oracle, optax.sgd(0.1)), jb.FirstOrder(network, optax.sgd(0.1)), batches=Scaling())
    >>> start = {"regularizer": jnp.array(1.0), "task": jnp.array(1.0)}
    >>> found = jb.fit(method, start, {"y": jnp.array([1.0]), "label": jnp.array([2.0])}, steps=30).params
    >>> round(float(found["regularizer"] * found["task"]), 2)
    2.0
    """

    reconstruction: Method
    task: Method
    _: KW_ONLY
    batches: Batches
    task_steps: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name, method in (("reconstruction", self.reconstruction), ("task", self.task)):
            if not isinstance(method, Method):
                raise TypeError(f"`{name}` of Alternating must be a method such as jb.MAID(oracle), got {method!r}.")
        if self.task_steps < 1:
            raise ValueError(f"`task_steps` must be at least 1, got {self.task_steps}.")
        if self.log_error:  # the error that is reported is that of the reconstruction's step
            object.__setattr__(self, "reconstruction", replace(self.reconstruction, log_error=True))

    @property
    def compares_values(self) -> bool:
        return self.reconstruction.compares_values or self.task.compares_values

    @property
    def grows_batch(self) -> bool:
        return self.reconstruction.grows_batch

    def init(self, params, batch) -> AlternatingState:
        still = params | {"task": jax.tree.map(lambda _: None, params["task"])}
        reconstruction = self.reconstruction.init(still, self.batches.of_reconstruction(params["task"], batch))
        params = params | {"regularizer": reconstruction.params["regularizer"]}
        warm = self.oracle.init(params, batch)
        task = self.task.init(params["task"], self.batches.of_task(warm.x, batch))
        return _joined(warm, reconstruction, task)

    @compiled
    def step(self, state: AlternatingState, batch) -> tuple[AlternatingState, StepInfo]:
        now = self.oracle.value(state.params, batch, state.warm, tol=state.tol)
        seen = self.batches.of_task(now.warm.x, batch)
        # unrolled on a CPU, where XLA's derivatives of convolutions are some eight times slower inside a loop
        on_cpu = jax.default_backend() == "cpu"
        task, infos = jax.lax.scan(
            lambda task, _: self.task.step(task, seen), state.task, length=self.task_steps, unroll=on_cpu
        )
        start = replace(state.reconstruction, warm=now.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        reconstruction, info = self.reconstruction.step(start, self.batches.of_reconstruction(task.params, batch))
        work = info.work + now.work + jnp.sum(infos.work)
        return _joined(reconstruction.warm, reconstruction, task), info._replace(work=work)


def _joined(warm, reconstruction: MethodState, task: MethodState) -> AlternatingState:
    return AlternatingState(
        params={"regularizer": reconstruction.params["regularizer"], "task": task.params},
        warm=warm,
        tol=reconstruction.tol,
        adjoint_tol=reconstruction.adjoint_tol,
        reconstruction=replace(reconstruction, warm=None),
        task=task,
    )


def __dir__():
    return __all__
