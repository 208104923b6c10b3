"""Reconstruction and task together: the losses of sequential and of joint training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import brief


class Terms(NamedTuple):
    """The two parts of a `JointLoss` for one sample, not weighted."""

    mse: Any
    task: Any


@dataclass(frozen=True)
class JointLoss:
    """C mse(R(y), x)/a + (1 - C) task(T(R(y)), s)/b of one sample, for `explicit.Oracle`.

    R is a reconstruction and T a task network, with ``params = {"reconstruction": ..., "task": ...}`` and
    ``data = {"y": measurement, "x": clean image, "labels": s}``. With C = 1 the loss is mse/a + task/b and no gradient
    of the task reaches R: both networks train at once, each as if alone, which is the *sequential* pipeline. With
    C = 0 only the task counts. To keep T as it is, split it off with ``jb.partition(params, {"reconstruction": True,
    "task": False})``. The ceiling is T trained on clean images: ``reconstruct=lambda params, y: y``, clean images as y.

    The mean squared error of good images is about a thousand times smaller than a Dice loss, so that with a = b = 1
    weights near 1 are needed to see it: ``scales`` may hold what both are after sequential training.

    Args:
      reconstruct: R, ``f(params, y) -> x``. task: T, ``f(params, x) -> logits``, e.g. from `from_flax`.
      task_loss: ``(logits, labels) -> scalar``, such as `losses.dice`.
      weight: C, between 0 and 1.
      scales: (a, b), positive.

    Raises:
      ValueError: ``weight`` or ``scales`` out of range. KeyError: params or data lack an entry.

    Reference: Adler, Lunz, Verdier, Schönlieb & Öktem, Task adapted reconstruction, 2022, adler_task_2022.

    >>> import jax, jax.numpy as jnp, jbilevel as jb
    >>> def miss(logits, labels):
    ...     return jnp.mean((logits - labels) ** 2)
    >>> loss = JointLoss(lambda p, y: p * y, lambda p, x: p * x, miss, weight=1.0)
    >>> data = {"y": jnp.ones(3), "x": jnp.ones(3), "labels": jnp.array([0.0, 1.0, 1.0])}
    >>> params = {"reconstruction": 1.0, "task": 1.0}
    >>> float(jax.grad(loss)(params, data)["reconstruction"])  # the image is right, and the task has no say
    0.0
    """

    reconstruct: Callable
    task: Callable
    task_loss: Callable
    weight: float
    scales: tuple[float, float] = (1.0, 1.0)

    __repr__ = brief.settings

    def __post_init__(self):
        if not 0 <= self.weight <= 1:
            raise ValueError(f"`weight` must lie between 0 and 1, got {self.weight}.")
        if len(self.scales) != 2 or not all(scale > 0 for scale in self.scales):
            raise ValueError(f"`scales` must be two positive numbers, got {self.scales}.")

    def __call__(self, params, data):
        mse, task = self.terms(params, data)
        mse, task = mse / self.scales[0], task / self.scales[1]
        return mse + task if self.weight == 1 else self.weight * mse + (1 - self.weight) * task

    def terms(self, params, data) -> Terms:
        """The two parts; with C = 1 no gradient of the second reaches R."""
        x = self.reconstruct(params["reconstruction"], data["y"])
        seen = jax.lax.stop_gradient(x) if self.weight == 1 else x
        return Terms(jnp.mean((x - data["x"]) ** 2), self.task_loss(self.task(params["task"], seen), data["labels"]))
