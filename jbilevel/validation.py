"""The best parameters on data that were not trained on, and stopping when nothing improves any more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jbilevel import io

KIND = "best parameters of jbilevel.Validation"


class Validation:
    """A callback of `fit` that keeps the parameters with the least value on a validation batch.

    Args:
      oracle: any; its ``value`` is measured, with its ``chunk`` for batches that do not fit at once.
      batch: the validation data.
      every: steps between two measurements.
      patience: stop after this many measurements in a row without a new best one; None: never.
      path: file for the best parameters (see `jb.save`), written at each measurement. Where `fit` resumes from a
        checkpoint, the best value is taken up again from it; a file of a later step than the first one seen is of
        another run.
      params: what is judged, e.g. ``lambda state: state.average.params``.
      tol: of the lower-level solves.

    Attributes:
      params, value, step: of the best measurement; None, inf and None before there is one. A value that is NaN is never
        the best. history: list of (step, value).

    Raises:
      ValueError: ``every`` or ``patience`` is not positive, or ``path`` holds parameters of another form.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> best = Validation(oracle, jnp.array([1.0]))  # training goes to 2, past it
    >>> _ = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.25)), jnp.array(0.0), jnp.array([2.0]), steps=20, callback=best)
    >>> best.step, round(float(best.params), 3), round(best.value, 4)
    (1, 0.875, 0.0078)
    """

    def __init__(
        self,
        oracle,
        batch,
        *,
        every: int = 1,
        patience: int | None = None,
        path=None,
        params: Callable[[Any], Any] = lambda state: state.params,
        tol: float = 1e-6,
    ):
        for name, number in (("every", every), ("patience", patience)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.oracle, self.batch, self.every, self.patience, self.tol = oracle, batch, every, patience, tol
        self.path, self._choose = None if path is None else Path(path), params
        self.params, self.value, self.step, self.history, self._seen = None, math.inf, None, [], False

    def __call__(self, step: int, state, info) -> bool:
        """Measures after every ``every``-th step; True when patience is at its end."""
        if (step + 1) % self.every:
            return False
        params = self._choose(state)
        if not self._seen:
            self._resume(step, params)
        value = float(self.oracle.value(params, self.batch, tol=self.tol).value)
        self.history.append((step, value))
        if value < self.value:
            self.params, self.value, self.step = params, value, step
        self._write()
        since = len([s for s, _ in self.history if s > (-1 if self.step is None else self.step)])
        return self.patience is not None and since >= self.patience

    def _write(self) -> None:
        if self.path is not None and self.params is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            meta = {"kind": KIND, "value": self.value, "step": self.step, "history": np.array(self.history)}
            io.save(self.path, self.params, meta)

    def _resume(self, step: int, like) -> None:
        self._seen = True
        if self.path is None or not self.path.exists():
            return
        meta = io.read_meta(self.path)
        if meta.get("kind") != KIND:
            raise ValueError(f"`path` {self.path} holds something else than the best parameters; give another path.")
        if meta["step"] < step:
            self.params, _ = io.load(self.path, like)
            self.value, self.step = meta["value"], meta["step"]
            self.history = [(int(s), v) for s, v in meta["history"] if s < step]
