"""Running a method: `fit`, what it returns, and validation on the way; its parts are in the folder _training."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jbilevel._core import brief, files, io
from jbilevel._core.settings import own_settings
from jbilevel._method.base import Method, require_oracle
from jbilevel._training import fingerprint, stopping, warm_store
from jbilevel._training.batches import END, Source, as_arrays, source
from jbilevel._training.checkpoint import Checkpoint
from jbilevel._training.interruption import Interruption
from jbilevel._training.log import History, Progress
from jbilevel._training.stepping import Run, Stepper

__all__ = ["FitResult", "FitStatus", "Validation", "fit"]

BEST = "best parameters of jbilevel.Validation"


class FitStatus(enum.IntEnum):
    """Why `fit` returned; ``message`` says it in a sentence (`FitResult.message` with the numbers of the run).

    >>> FitStatus.EXHAUSTED.message
    'The batches ended before the steps did.'
    """

    FINISHED = 0, "All steps were taken, or the budget was spent."
    CONVERGED = 1, "The gradient was shown to be small where the method cannot improve any further, or a rule was met."
    STOPPED = 2, "The callback asked to stop, or a file could not be written."
    EXHAUSTED = 3, "The batches ended before the steps did."
    INTERRUPTED = 4, "Interrupted by Ctrl-C or SIGTERM; the state is the one after the last finished step."
    STALLED = 6, "The method cannot go on, and its gradient was not shown to be small."
    FAILED = 5, "A step gave a value, a gradient or parameters that are not finite; the state is the one before it."

    message: str

    def __new__(cls, code: int, message: str):
        member = int.__new__(cls, code)
        member._value_, member.message = code, message
        return member


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` returns.

    params, state: after the last finished step; state is None where the run was interrupted before it had one. best: on
    a full batch, the parameters with the least value in the history among the steps whose solves met their tolerance
    (values are measured where a step begins, so those after the last step are not judged); ``params`` where there is no
    such step, or batches change and values cannot be compared: `Validation` then finds the best. history: NumPy arrays
    with one entry per finished step, ``value``, ``grad_norm``, ``error``, ``step``, ``tol``, ``adjoint_tol``,
    ``status`` (codes of `Status`) as the method reported them, ``seconds`` (without compilation) and ``work``
    (gradient-equivalents so far). status, message: why it ended, and in sentences what else is to be known: solves that
    failed, a value that rose, files that could not be written. steps: finished ones, with those before a resume; work:
    total; compile_seconds: spent on compiling.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> result = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.5)), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=3)
    >>> result.status.name, result.steps, result.history["value"].tolist(), float(result.params)
    ('FINISHED', 3, [2.5, 1.0, 0.625], 1.75)
    """

    params: Any = field(repr=False)
    best: Any = field(repr=False)
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
    resume: bool | str = True,
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
    without ``"index"``. No sample ever starts from another one. Padding has the weight 0 under ``"sample_weight"``.

    Args:
      method: any `jb.Method`, such as ``jb.MAID(oracle)``.
      params: pytree of arrays; split off what is not trained with `partition`. On resume: those the run began with,
        or those of the checkpoint.
      batches: arrays in a pytree, lists included (the full batch, at every step) | ``batches(step) -> batch`` with
        step = 0, 1, ... | an iterator or an iterable that is no pytree. A new size of the batch compiles again.
        Resuming skips what an iterator gave before: give one that starts anew, in the same order. Methods that compare
        values of different steps (`jb.MAID`, `jb.HOAG`, `jb.NBA`) take the full batch only.
      steps: total number of steps, those before a resume included.
      callback: ``callback(step, state, info)`` after each step (0, 1, ... as for batches) with the new state and what
        the step reported; stops when it returns something true.
      checkpoint: file (``.npz``, ``.safetensors``) or folder, made if missing, for state, history and warm starts.
        Written atomically, so that ``kill -9`` loses the steps since the last write only. If it is there, the run goes
        on from it with the same numbers (``seconds`` apart) as if it had never stopped. Where it cannot be written (a
        full disk), the run is STOPPED and returns what it has; likewise for ``log``, and files of a callback.
      checkpoint_every: steps between writes; one more write when the loop ends, in whatever way.
      resume: True: a checkpoint is refused, by a sentence that says what differs, if it is of another run: other
        options, problem, loss or constants that their functions read, data (of the first batch, where they change) or
        params. Only changed code or versions are a warning; ``steps``, budgets, callbacks, log and progress are free.
        "force": go on from it nevertheless. False: begin anew and replace it.
      value_below, grad_norm_below: stop after a step that reports less. Both are measured where the step began.
      work_budget: stop once this many gradient-equivalents are spent; the last step may exceed it.
      log: CSV file, one line per step, flushed. A resumed run continues it, a new one replaces it.
      progress: a bar on standard error; None: only where that is a terminal.

    Returns `FitResult`. Statuses, not exceptions, are: Ctrl-C and SIGTERM (in the main thread; a step that has
    begun and its callback are finished first, unless a second one comes; a user's own handler of SIGTERM is called too,
    and handlers are as before afterwards); a value, gradient or parameter that is not finite, after which the state is
    the one that the failing step began with.

    Raises:
      ValueError: a checkpoint of another run, or damaged; no batch at all; batches that change under a method that
        compares values; an ill-formed ``index``.
      OSError: ``checkpoint`` cannot be written, which is seen before the first step.
      TypeError: ``method`` is no `jb.Method`, is not hashable, or its state is no `jb.MethodState`; a leaf of
        ``params`` is no array; a step changes the type of its state.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> result = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.5)), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=20)
    >>> round(float(result.params), 3), result.message
    (2.0, 'All 20 steps were taken.')
    """
    _check_arguments(method, steps, checkpoint_every, resume)
    params, begun = as_arrays(params, "params"), None
    with Interruption() as interruption:
        with interruption.ends():
            interruption.check()
            given = source(batches)
            _check_batches(method, given)
            file = Checkpoint(checkpoint, method, given, checkpoint_every, resume)
            begun = file.open(params, interruption.check)
        if begun is None:
            return _not_begun(params, interruption.cause)
        run, history = begun
        one_objective = not (given.changing or method.grows_batch)
        rules, take = stopping.Rules(value_below, grad_norm_below, work_budget), Stepper(method)
        if _ended(run, history, rules, steps) is None:
            file.require_writable()
        shown = Progress(run, steps, log, progress)
        ended = FitStatus.INTERRUPTED, ""  # unless it ends in another way
        try:
            with interruption.ends():
                interruption.check()
                later, reason = given.since(run.steps), None
                if run.steps and isinstance(callback, Validation) and callback.resume(run.steps - 1, run.state):
                    reason = _stopped(run)
                while (reason := reason or _ended(run, history, rules, steps)) is None:
                    interruption.check()
                    batch = next(later, END)
                    if batch is END:
                        reason = FitStatus.EXHAUSTED, f"The batches ended after {run.steps} of {steps} steps."
                        break
                    batch = as_arrays(batch, "batch")
                    state, index = warm_store.restart(method, run, batch) if given.changing else (run.state, None)
                    taken = take(state, batch, interruption.check)
                    if taken.broken:
                        reason = FitStatus.FAILED, stopping.failure(run.steps, taken)
                        break
                    store = warm_store.remember(run.store, index, taken.state.warm)
                    following = run.after(taken, store, compared=one_objective)
                    history.record(run.steps, taken, following.work)
                    interruption.wait()  # all that belongs to a finished step is done before the run ends
                    run = following
                    shown.show(run, history)
                    file.save_if_due(run, history)
                    if callback is not None and callback(run.steps - 1, run.state, taken.info):
                        reason = _stopped(run)
                ended = reason
        except files.WriteError as error:
            stopped = FitStatus.STOPPED, f"Stopped after {run.steps} of {steps} steps: {error.strerror}"
            ended = _ended(run, history, rules, steps) or stopped
        except BaseException as error:
            for sentence in _closed(run, history, shown, file):
                error.add_note(sentence)
            raise
        unwritten = _closed(run, history, shown, file)
        if interruption.came and ended[0] is not FitStatus.FAILED:
            ended = FitStatus.INTERRUPTED, ""
    status, message = ended
    if status is FitStatus.INTERRUPTED:
        message = f"Interrupted{interruption.cause}; the state is the one after {run.steps} finished steps."
    told = [message, stopping.still(history), stopping.rise(history, one_objective), history.failures()]
    told += [sentence for sentence in unwritten if sentence not in message]
    return FitResult(
        params=run.state.params,
        best=run.state.params if run.best is None else run.best.params,
        state=run.state,
        history=history.arrays(),
        status=status,
        steps=run.steps,
        work=run.work,
        message=" ".join(filter(None, told)),
        compile_seconds=take.compile_seconds,
    )


def _closed(run: Run, history, shown: Progress, file: Checkpoint) -> list[str]:
    """Write what there is, and say what could not be written."""
    history.keep(run.steps)
    failures = []
    for write in (partial(shown.close, history), partial(file.save, run, history)):
        try:
            write()
        except files.WriteError as error:
            failures.append(str(error.strerror))
    return failures


def _not_begun(params, cause: str) -> FitResult:
    """Of a run that was interrupted before it had a state."""
    return FitResult(
        params=params,
        best=params,
        state=None,
        history=History().arrays(),
        status=FitStatus.INTERRUPTED,
        steps=0,
        work=0.0,
        message=f"Interrupted{cause} before the first step; the params are those given.",
        compile_seconds=0.0,
    )


def _ended(run: Run, history, rules: stopping.Rules, steps: int) -> tuple[FitStatus, str] | None:
    found = rules.met(run, history)
    if found is not None:
        return FitStatus[found[0]], found[1]
    return (FitStatus.FINISHED, f"All {run.steps} steps were taken.") if run.steps >= steps else None


def _stopped(run: Run) -> tuple[FitStatus, str]:
    return FitStatus.STOPPED, f"The callback asked to stop after {run.steps} steps."


def _check_arguments(method, steps, checkpoint_every, resume) -> None:
    if not isinstance(method, Method):
        what = method.__name__ if isinstance(method, type) else type(method).__name__
        raise TypeError(f"`method` must be a jb.Method such as jb.MAID(oracle), got {what}; derive your own from it.")
    try:
        hash(method)
    except TypeError as error:
        raise TypeError(f"`method` must be hashable, so that it compiles once: {error}.") from error
    if resume not in (True, False, "force"):
        raise ValueError(f"`resume` must be True, False or 'force', got {resume!r}.")
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
        checkpoint, the best value is taken up again from it. A file that has another value for the first step seen is
        of another run, and begins anew.
      params: what is judged, e.g. ``lambda state: state.average.params``.
      tol: of the lower-level solves; None: relative to the problem, see `jb.Oracle`.

    Attributes:
      params, value, step: of the best measurement; None, inf and None before there is one. A value that is NaN is never
        the best. history: list of (step, value).

    Raises:
      TypeError: ``oracle`` is no `jb.Oracle`.
      ValueError: ``every`` or ``patience`` is not positive, or ``path`` holds parameters of another form, or such as
        were judged by another oracle, batch or tolerance.

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
        tol: float | None = None,
    ):
        require_oracle(oracle, "Validation")
        for name, number in (("every", every), ("patience", patience)):
            if number is not None and number < 1:
                raise ValueError(f"`{name}` must be at least 1, got {number}.")
        self.oracle, self.batch, self.every, self.patience, self.tol = oracle, batch, every, patience, tol
        self.path, self._choose = None if path is None else Path(path), params
        self.params, self.value, self.step, self.history, self._seen = None, math.inf, None, [], False
        self._judged_by: dict[str, Any] | None = None

    def __repr__(self) -> str:
        found = (f"{name}={brief.brief(vars(self)[name])}" for name in ("every", "patience", "value", "step"))
        return brief.call("Validation", [brief.brief(self.oracle), *found])

    def __call__(self, step: int, state, info) -> bool:
        """Measures after every ``every``-th step; True when patience is at its end."""
        if (step + 1) % self.every:
            return False
        params = self._choose(state)
        value = float(self.oracle.value(params, self.batch, tol=self.tol).value)
        if not self._seen:
            self._take_up(step, value, params)
        self.history.append((step, value))
        if value < self.value:
            self.params, self.value, self.step = params, value, step
        self._write()
        return self._at_its_end()

    def resume(self, step: int, state) -> bool:
        """Go on with ``path`` where a run goes on after ``step``, which is measured if a killed process did not."""
        if any(at == step for at, _ in self.history):
            return self._at_its_end()
        if (meta := self._meta()) is not None:
            self._require_same_judge(meta.get("judged by"))
        if (step + 1) % self.every == 0:
            return self(step, state, None)
        self._take_up(step + 1, None, self._choose(state))
        return False

    def _at_its_end(self) -> bool:
        since = len([s for s, _ in self.history if s > (-1 if self.step is None else self.step)])
        return self.patience is not None and since >= self.patience

    def _write(self) -> None:
        if self.path is not None and self.params is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            meta = {"kind": BEST, "value": self.value, "step": self.step, "history": np.array(self.history)}
            io.save(self.path, self.params, meta | {"judged by": self._judge()})

    def _meta(self) -> dict[str, Any] | None:
        """What the file says of itself; None where there is none."""
        if self.path is None or not self.path.exists():
            return None
        meta = io.read_meta(self.path)
        if meta.get("kind") != BEST:
            raise ValueError(f"`path` {self.path} holds something else than the best parameters; give another path.")
        return meta

    def _take_up(self, step: int, value: float | None, like) -> None:
        """What the file knows of the steps before ``step``, whose ``value`` tells whether the file is of this run."""
        meta, self._seen = self._meta(), value is not None
        if self.path is None or meta is None:
            return
        known = {int(at): seen for at, seen in meta["history"]}
        other = value is None or not np.array_equal(known.get(step, math.inf), value, equal_nan=True)
        if max(known) >= step and other:
            return
        self._require_same_judge(meta.get("judged by"))
        self._seen = True
        self.params, _ = io.load(self.path, like)
        self.value, self.step = meta["value"], meta["step"]  # maybe of a later step, which is seen again
        self.history = [(at, seen) for at, seen in known.items() if at < step]

    def _judge(self) -> dict[str, Any]:
        if self._judged_by is None:
            parts = {"oracle": self.oracle, "params": self._choose, "tol": self.tol}
            self._judged_by = {
                "judge": {name: fingerprint.describe(part) for name, part in parts.items()},
                "data": fingerprint.leaves(self.batch),
                "versions": fingerprint.versions(),
            }
        return self._judged_by

    def _require_same_judge(self, before: dict[str, Any] | None) -> None:
        now = self._judge()
        if before is None:
            raise ValueError(f"`path` {self.path} is of another version of jbilevel; give another path.")
        same_code = before["versions"] == now["versions"]
        found = [*fingerprint.between(before["judge"], now["judge"], "Validation", same_code)]
        found += fingerprint.between_leaves(before["data"], now["data"], "the data")
        if serious := [str(difference) for difference in found if not difference.code_only]:
            what = "; ".join(serious[:3])
            raise ValueError(
                f"`path` {self.path} was judged by another Validation, which differs in {what}; give another."
            )


def __dir__():
    return __all__
