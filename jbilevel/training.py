"""Running a method: `fit`, what it returns, and validation on the way; its parts are in the folder _training."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jbilevel._core import brief, io
from jbilevel._core.settings import own_settings
from jbilevel._method.base import Method, require_oracle
from jbilevel._training import stopping, warm_store
from jbilevel._training.batches import END, Source, as_arrays, source
from jbilevel._training.checkpoint import Checkpoint
from jbilevel._training.log import Progress
from jbilevel._training.stepping import Run, Stepper

__all__ = ["FitResult", "FitStatus", "Validation", "fit"]

BEST = "best parameters of jbilevel.Validation"


class FitStatus(enum.IntEnum):
    """Why `fit` returned; ``message`` says it in a sentence (`FitResult.message` with the numbers of the run).

    >>> FitStatus.EXHAUSTED.message
    'The batches ended before the steps did.'
    """

    FINISHED = 0, "All steps were taken."
    CONVERGED = 1, "The method cannot improve any further, or a stop rule was met."
    STOPPED = 2, "The callback asked to stop."
    EXHAUSTED = 3, "The batches ended before the steps did."
    INTERRUPTED = 4, "Interrupted by the user; the state is the one after the last finished step."
    FAILED = 5, "A step gave a value or parameters that are not finite; the state is the one before that step."

    message: str

    def __new__(cls, code: int, message: str):
        member = int.__new__(cls, code)
        member._value_, member.message = code, message
        return member


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` returns.

    params, state: after the last finished step; history: NumPy arrays with one entry per finished step, ``value``,
    ``grad_norm``, ``error``, ``step``, ``tol``, ``adjoint_tol``, ``status`` (codes of `Status`) as the method reported
    them, ``seconds`` (without compilation) and ``work`` (gradient-equivalents so far); status, message: why it ended,
    in a sentence; steps: finished ones, with those before a resume; work: total; compile_seconds: spent on compiling.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> result = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.5)), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=3)
    >>> result.status.name, result.steps, result.history["value"].tolist(), float(result.params)
    ('FINISHED', 3, [2.5, 1.0, 0.625], 1.75)
    """

    params: Any = field(repr=False)
    state: Any = field(repr=False)
    history: dict[str, np.ndarray] = field(repr=False)
    status: FitStatus
    steps: int
    work: float
    message: str
    compile_seconds: float


@own_settings
def fit(
    method,
    params,
    batches,
    *,
    steps: int,
    callback: Callable[[int, Any, Any], Any] | None = None,
    checkpoint=None,
    checkpoint_every: int = 1,
    value_below: float = -math.inf,
    grad_norm_below: float = -math.inf,
    work_budget: float = math.inf,
    log=None,
    progress: bool | None = None,
) -> FitResult:
    """Take up to ``steps`` steps of ``method`` from ``params``.

    The step is compiled once per method and batch shape. Full batches keep their warm start in the state. When batches
    change, a batch that is a mapping with integers under ``"index"``, one per sample, has the warm start of each sample
    remembered on the host (of a sample that occurs twice, the last one); a sample not yet seen starts cold, as do all
    without ``"index"`` and those with a negative one (padding). No sample ever starts from another one.

    Args:
      method: any `jb.Method`, such as ``jb.MAID(oracle)``.
      params: pytree of arrays; split off what is not trained with `partition`. On resume only its structure is used.
      batches: arrays in a pytree, lists included (the full batch, at every step) | ``batches(step) -> batch`` with
        step = 0, 1, ... | an iterator or an iterable that is no pytree. A new size of the batch compiles again.
        Resuming skips what an iterator gave before: give one that starts anew, in the same order. Methods that compare
        values of different steps (`jb.MAID`, `jb.HOAG`, `jb.NBA`) take the full batch only.
      steps: total number of steps, those before a resume included.
      callback: ``callback(step, state, info)`` after each step (0, 1, ... as for batches) with the new state and what
        the step reported; stops when it returns something true.
      checkpoint: file (``.npz``, ``.safetensors``) or folder, made if missing, for state, history and warm starts.
        Written atomically, so that ``kill -9`` loses the steps since the last write only. If it is there, the run goes
        on from it with the same numbers (``seconds`` apart) as if it had never stopped.
      checkpoint_every: steps between writes; one more write when the loop ends, in whatever way.
      value_below, grad_norm_below: stop after a step that reports less. Both are measured where the step began.
      work_budget: stop once this many gradient-equivalents are spent; the last step may exceed it.
      log: CSV file, one line per step, flushed. A resumed run continues it, a new one replaces it.
      progress: a bar on standard error; None: only where that is a terminal.

    Returns `FitResult`. Ctrl-C and a value or parameter that is not finite are statuses, not exceptions; after the
    latter the state is the one that the failing step began with.

    Raises:
      ValueError: a checkpoint of another method, of other shapes, or damaged; no batch at all; batches that change
        under a method that compares values; an ill-formed ``index``.
      TypeError: ``method`` is no `jb.Method`, is not hashable, or its state is no `jb.MethodState`; a leaf of
        ``params`` is no array; a step changes the type of its state.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> result = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.5)), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=20)
    >>> round(float(result.params), 3), result.message
    (2.0, 'All 20 steps were taken.')
    """
    _check_arguments(method, steps, checkpoint_every)
    params, given = as_arrays(params, "params"), source(batches)
    _check_batches(method, given)
    file = Checkpoint(checkpoint, method, given, checkpoint_every)
    run, history = file.open(params)
    rules, take = stopping.Rules(value_below, grad_norm_below, work_budget), Stepper(method)
    shown = Progress(run, steps, log, progress)
    try:
        later = given.since(run.steps)
        while not (ended := _ended(run, history, rules, steps)):
            batch = next(later, END)
            if batch is END:
                ended = FitStatus.EXHAUSTED, f"The batches ended after {run.steps} of {steps} steps."
                break
            batch = as_arrays(batch, "batch")
            state, index = warm_store.restart(method, run, batch) if given.changing else (run.state, None)
            taken = take(state, batch)
            if not taken.finite:
                ended = FitStatus.FAILED, stopping.failure(run.steps, taken.info)
                break
            work, store = run.work + float(taken.info.work), warm_store.remember(run.store, index, taken.state.warm)
            history.record(run.steps, taken, work)
            run = Run(taken.state, steps=run.steps + 1, work=work, done=bool(taken.info.done), store=store)
            shown.show(run, history)
            file.save_if_due(run, history)
            if callback is not None and callback(run.steps - 1, run.state, taken.info):
                ended = FitStatus.STOPPED, f"The callback asked to stop after {run.steps} steps."
                break
    except KeyboardInterrupt:
        ended = FitStatus.INTERRUPTED, f"Interrupted; the state is the one after {run.steps} finished steps."
    finally:
        history.keep(run.steps)
        shown.close(history)
        file.save(run, history)
    status, message = ended
    return FitResult(
        params=run.state.params,
        state=run.state,
        history=history.arrays(),
        status=status,
        steps=run.steps,
        work=run.work,
        message=message + history.failures(),
        compile_seconds=take.compile_seconds,
    )


def _ended(run: Run, history, rules: stopping.Rules, steps: int) -> tuple[FitStatus, str] | None:
    reason = rules.met(run, history)
    if reason is not None:
        return FitStatus.CONVERGED, reason
    return (FitStatus.FINISHED, f"All {run.steps} steps were taken.") if run.steps >= steps else None


def _check_arguments(method, steps, checkpoint_every) -> None:
    if not isinstance(method, Method):
        what = method.__name__ if isinstance(method, type) else type(method).__name__
        raise TypeError(f"`method` must be a jb.Method such as jb.MAID(oracle), got {what}; derive your own from it.")
    try:
        hash(method)
    except TypeError as error:
        raise TypeError(f"`method` must be hashable, so that it compiles once: {error}.") from error
    for name, number, least in (("steps", steps, 0), ("checkpoint_every", checkpoint_every, 1)):
        if not isinstance(number, (int, np.integer)) or number < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {number!r}.")


def _check_batches(method: Method, given: Source) -> None:
    if given.changing and method.compares_values:
        raise ValueError(
            f"{type(method).__name__} compares values of one step with values of another, which says nothing where "
            "`batches` change from step to step; pass one full batch of arrays (no function and no iterator), or take "
            "a method that compares none, such as jb.FirstOrder(oracle, optax.adam(1e-2))."
        )


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
      TypeError: ``oracle`` is no `jb.Oracle`.
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
        require_oracle(oracle, "Validation")
        for name, number in (("every", every), ("patience", patience)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.oracle, self.batch, self.every, self.patience, self.tol = oracle, batch, every, patience, tol
        self.path, self._choose = None if path is None else Path(path), params
        self.params, self.value, self.step, self.history, self._seen = None, math.inf, None, [], False

    def __repr__(self) -> str:
        found = (f"{name}={brief.brief(vars(self)[name])}" for name in ("every", "patience", "value", "step"))
        return brief.call("Validation", [brief.brief(self.oracle), *found])

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
            meta = {"kind": BEST, "value": self.value, "step": self.step, "history": np.array(self.history)}
            io.save(self.path, self.params, meta)

    def _resume(self, step: int, like) -> None:
        self._seen = True
        if self.path is None or not self.path.exists():
            return
        meta = io.read_meta(self.path)
        if meta.get("kind") != BEST:
            raise ValueError(f"`path` {self.path} holds something else than the best parameters; give another path.")
        if meta["step"] < step:
            self.params, _ = io.load(self.path, like)
            self.value, self.step = meta["value"], meta["step"]
            self.history = [(int(s), v) for s, v in meta["history"] if s < step]


def __dir__():
    return __all__
