"""The loop around a method: batches, warm starts per sample, history, stopping, checkpoints, a bar and a log."""

from __future__ import annotations

import csv
import enum
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jbilevel._core import io, trees
from jbilevel._core.results import Status

KIND = "checkpoint of jbilevel.fit"
BEST = "best parameters of jbilevel.Validation"
REPORTED = ("value", "grad_norm", "error", "step", "tol", "adjoint_tol")  # fields of StepInfo
COLUMNS = (*REPORTED, "status", "seconds", "work")
END = object()


class FitStatus(enum.IntEnum):
    """Why `fit` returned; ``message`` says it in a sentence (`FitResult.message` with the numbers of the run)."""

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
    """

    params: Any = field(repr=False)
    state: Any = field(repr=False)
    history: dict[str, np.ndarray] = field(repr=False)
    status: FitStatus
    steps: int
    work: float
    message: str
    compile_seconds: float


class _Run(NamedTuple):
    """Everything that moves. One assignment replaces it, so that Ctrl-C finds either the old or the new one whole."""

    state: Any
    steps: int
    work: float
    done: bool
    store: dict[int, tuple]  # warm start of each sample seen: host arrays, one per leaf of state.warm


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
      method: hashable, with traceable ``init(params, batch) -> state`` and ``step(state, batch) -> (state, StepInfo)``.
      params: pytree of arrays; split off what is not trained with `partition`. On resume only its structure is used.
      batches: arrays in a pytree, lists included (the full batch, at every step) | ``batches(step) -> batch`` with
        step = 0, 1, ... | an iterator or an iterable that is no pytree. A new size of the batch compiles again.
        Resuming skips what an iterator gave before: give one that starts anew, in the same order.
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
      ValueError: a checkpoint of another method, of other shapes, or damaged; no batch at all; an ill-formed ``index``.
      TypeError: the method is not hashable, a leaf of ``params`` is no array, or a step changes the type of its state.

    >>> import jbilevel as jb, jax.numpy as jnp, optax
    >>> oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    >>> result = jb.fit(jb.FirstOrder(oracle, optax.sgd(0.5)), jnp.array(0.0), jnp.array([1.0, 3.0]), steps=20)
    >>> round(float(result.params), 3), result.message
    (2.0, 'All 20 steps were taken.')
    """
    _check_arguments(method, steps, checkpoint_every)
    params = _as_arrays(params, "params")
    changing, first, stream = _source(batches)
    file = None if checkpoint is None else _checkpoint_file(checkpoint)
    origin = {"batches": "changing" if changing else "full", **_describe(method, "method")}
    if file is not None and file.exists():
        run, rows = _resume(file, method, params, first, changing, origin)
    else:
        run, rows = _Run(_init(method, params, first), 0, 0.0, False, {}), []
    written, compiled, compile_seconds = run.steps, set(), 0.0
    lines = None if log is None else _Log(log)
    bar = tqdm(total=steps, initial=run.steps, disable=None if progress is None else not progress, unit="step")
    try:
        later = stream(run.steps)
        while not (ended := _ended(run, rows, steps, value_below, grad_norm_below, work_budget)):
            batch = next(later, END)
            if batch is END:
                ended = FitStatus.EXHAUSTED, f"The batches ended after {run.steps} of {steps} steps."
                break
            batch = _as_arrays(batch, "batch")
            state, index = _warm_start(method, run, batch) if changing else (run.state, None)
            shapes, started = repr(jax.tree.map(jax.typeof, batch)), time.perf_counter()
            if shapes not in compiled:
                _step.lower(method, state, batch).compile()  # kept by JAX for the call below
                compile_seconds += time.perf_counter() - started
                compiled.add(shapes)
                started = time.perf_counter()
            state, info, finite = _step(method, state, batch)
            info, finite = jax.device_get((info, finite))
            if not finite:
                ended = FitStatus.FAILED, _failure(run.steps, info)
                break
            store = run.store if index is None else _remember(run.store, index, state.warm)
            work = run.work + float(info.work)
            numbers = [float(getattr(info, name)) for name in REPORTED]
            rows[run.steps :] = [(*numbers, int(info.status), time.perf_counter() - started, work)]
            run = _Run(state, run.steps + 1, work, bool(info.done), store)
            if lines is not None:
                lines.write(rows)
            if file is not None and run.steps % checkpoint_every == 0:
                _save(file, run, rows, changing, origin)
                written = run.steps
            bar.update()
            bar.set_postfix(value=f"{float(info.value):.4g}", work=f"{work:.4g}")
            if callback is not None and callback(run.steps - 1, run.state, info):
                ended = FitStatus.STOPPED, f"The callback asked to stop after {run.steps} steps."
                break
    except KeyboardInterrupt:
        ended = FitStatus.INTERRUPTED, f"Interrupted; the state is the one after {run.steps} finished steps."
    finally:
        rows = rows[: run.steps]
        bar.close()
        if lines is not None:
            lines.write(rows)
            lines.file.close()
        if file is not None and written != run.steps:
            _save(file, run, rows, changing, origin)
    status, message = ended
    message = _with_failures(message, rows)
    return FitResult(run.state.params, run.state, _history(rows), status, run.steps, run.work, message, compile_seconds)


@partial(jax.jit, static_argnums=0)
def _init(method, params, batch):
    return _strong(method.init(params, batch))


@partial(jax.jit, static_argnums=0)
def _cold(method, params, batch):
    return _strong(method.oracle.init(params, batch))


@partial(jax.jit, static_argnums=0)
def _step(method, state, batch):
    new, info = method.step(state, batch)
    new, info = _strong(new), info._replace(**{name: jnp.nan for name in REPORTED if getattr(info, name) is None})
    _same_types(state, new)
    return new, info, trees.all_finite(new.params) & jnp.isfinite(info.value)


def _strong(tree):
    """Without JAX's weak types, which would compile a second time when a later step loses them."""

    def strong(leaf):
        leaf = jnp.asarray(leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key else jax.lax.convert_element_type(leaf, leaf.dtype)

    return jax.tree.map(strong, tree)


def _same_types(old, new) -> None:
    before, after = (
        {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (old, new))
    )
    for place in [*before, *after]:
        a, b = before.get(place), after.get(place)
        if a != b:
            raise TypeError(f"method.step turned state{place} from {a} into {b}; let init and step agree.")


def _ended(run: _Run, rows, steps: int, value_below, grad_norm_below, work_budget) -> tuple[FitStatus, str] | None:
    value, grad_norm = rows[run.steps - 1][:2] if run.steps else (math.inf, math.inf)
    reasons = (
        (run.done, "The method cannot improve any further"),
        (value < value_below, f"The value {value:.6g} is below {value_below:.6g}"),
        (grad_norm < grad_norm_below, f"The gradient norm {grad_norm:.6g} is below {grad_norm_below:.6g}"),
        (run.work >= work_budget, f"The work budget of {work_budget:.6g} gradient-equivalents is spent"),
    )
    for met, reason in reasons:
        if met:
            return FitStatus.CONVERGED, f"{reason} after {run.steps} steps (work {run.work:.6g})."
    return (FitStatus.FINISHED, f"All {run.steps} steps were taken.") if run.steps >= steps else None


def _with_failures(message: str, rows) -> str:
    """``message``, and how many steps had a solve that did not meet its tolerance: nothing fails silently."""
    codes = [int(row[COLUMNS.index("status")]) for row in rows]
    failed = [code for code in codes if code > Status.PRECISION]
    if not failed:
        return message
    worst = Status(max(failed))
    return f"{message} In {len(failed)} of {len(codes)} steps a solve failed, at worst {worst.name}: {worst.message}"


def _failure(step: int, info) -> str:
    value, code = float(info.value), int(info.status)
    what = "new parameters that are not finite" if math.isfinite(value) else f"the value {value}"
    cause = f" Worst solve, {Status(code).name}: {Status(code).message}" if code in list(Status) else ""
    return f"Step {step} gave {what}; the state is the one before it.{cause}"


def _history(rows) -> dict[str, np.ndarray]:
    table = np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS)).T
    return {k: column.astype(np.int32 if k == "status" else float) for k, column in zip(COLUMNS, table, strict=True)}


def _source(batches) -> tuple[bool, Any, Callable[[int], Any]]:
    """(do batches change?, the first one, start -> iterator over the batches of steps start, start + 1, ...)."""
    if callable(batches):
        first = _as_arrays(batches(0), "batches(0)")
        return True, first, lambda start: (first if step == 0 else batches(step) for step in itertools.count(start))
    if isinstance(batches, Iterable) and not hasattr(batches, "shape") and jax.tree_util.all_leaves([batches]):
        iterator = iter(batches)
        first = next(iterator, END)
        if first is END:
            raise ValueError("`batches` ended before the first step; give a fresh iterator with at least one batch.")
        first = _as_arrays(first, "batches")
        return True, first, lambda start: itertools.islice(itertools.chain([first], iterator), start, None)
    full = _as_arrays(batches, "batches")
    return False, full, lambda start: itertools.repeat(full)


def _as_arrays(tree, name: str):
    def convert(path, leaf):
        try:
            return jnp.asarray(leaf)
        except TypeError as error:
            what = f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}"
            raise TypeError(f"{what}, not an array; keep it outside, e.g. with jb.partition.") from error

    return jax.tree_util.tree_map_with_path(convert, tree)


def _warm_start(method, run: _Run, batch):
    """(state whose warm start belongs to the samples of ``batch``, their index or None)."""
    if not jax.tree.leaves(run.state.warm):
        return run.state, None
    if not (isinstance(batch, Mapping) and "index" in batch):
        return run.state._replace(warm=_cold(method, run.state.params, batch)), None
    index = np.asarray(batch["index"])
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"batch['index'] must hold one integer per sample, got {index.dtype} of shape {index.shape}.")
    leaves, structure = jax.tree.flatten(_cold(method, run.state.params, batch))
    leaves = [np.array(leaf) for leaf in leaves]  # to be written to
    for leaf in leaves:
        if leaf.shape[:1] != index.shape:
            raise ValueError(f"batch['index'] has {len(index)} entries for a warm start of shape {leaf.shape}.")
    for i, sample in enumerate(index.tolist()):
        for leaf, known in zip(leaves, run.store.get(sample, ()), strict=False):  # not yet seen: nothing to copy
            if leaf.shape[1:] != known.shape:
                raise ValueError(f"Sample {sample} had a warm start of shape {known.shape}, now {leaf.shape[1:]}.")
            leaf[i] = known
    return run.state._replace(warm=jax.tree.unflatten(structure, map(jnp.asarray, leaves))), index.tolist()


def _remember(store: dict, index: list[int], warm) -> dict:
    """The store with the rows of ``warm``; a sample whose row is not finite is forgotten and starts cold."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(warm)]
    rows = {sample: tuple(np.array(leaf[i]) for leaf in leaves) for i, sample in enumerate(index) if sample >= 0}
    lost = {sample for sample, row in rows.items() if not all(np.isfinite(leaf).all() for leaf in row)}
    return {sample: row for sample, row in (store | rows).items() if sample not in lost}


def _checkpoint_file(checkpoint) -> Path:
    path = Path(checkpoint)
    path = path / "checkpoint.npz" if path.is_dir() or not path.suffix else path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _save(file: Path, run: _Run, rows, changing: bool, origin: dict) -> None:
    content = {
        "state": run.state._replace(warm=None) if changing else run.state,  # rebuilt from the store at each step
        "history": _history(rows[: run.steps]),
        "index": np.array(list(run.store), dtype=np.int64),
        "warm": [np.stack(column) for column in zip(*run.store.values(), strict=True)],  # by leaf
    }
    meta = {"kind": KIND, "steps": run.steps, "done": run.done, "samples": len(run.store), "made by": origin}
    io.save(file, content, meta)


def _resume(file: Path, method, params, first, changing: bool, origin: dict) -> tuple[_Run, list[tuple]]:
    """The run as `_save` left it, and its history."""
    meta = io.read_meta(file)
    cure = "give another path or delete the file"
    if meta.get("kind") != KIND:
        raise ValueError(f"checkpoint={file} is no checkpoint of fit; {cure}.")
    made_by = meta["made by"]
    keys = [key for key in dict.fromkeys([*origin, *made_by]) if origin.get(key) != made_by.get(key)]
    if keys:
        changes = "; ".join(f"{key} was {made_by.get(key)}, now {origin.get(key)}" for key in keys[:3])
        raise ValueError(f"checkpoint={file} comes from another run: {changes}; {cure}.")
    template = jax.eval_shape(partial(_init, method), params, first)
    samples = meta["samples"]
    like = {
        "state": template._replace(warm=None) if changing else template,
        "history": {name: np.zeros((meta["steps"],), column.dtype) for name, column in _history([]).items()},
        "index": np.zeros((samples,), np.int64),
        "warm": [
            np.zeros((samples, *leaf.shape[1:]), leaf.dtype) for leaf in jax.tree.leaves(template.warm) if samples
        ],
    }
    try:
        content, _ = io.load(file, like)
    except ValueError as error:
        raise ValueError(f"`checkpoint` cannot be resumed: {error} If the problem has changed, {cure}.") from error
    rows = list(zip(*(content["history"][name].tolist() for name in COLUMNS), strict=True))
    state = content["state"]
    if changing and template.warm is not None:
        state = state._replace(warm=_cold(method, state.params, first))
    store = dict(zip(content["index"].tolist(), zip(*content["warm"], strict=True), strict=True))
    return _Run(state, meta["steps"], rows[-1][-1] if rows else 0.0, meta["done"], store), rows


def _describe(thing, name: str) -> dict[str, str]:
    """Class and settings of a method in words that are the same in every process."""
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = [_describe(getattr(thing, f.name), f"{name}.{f.name}") for f in fields(thing) if f.compare]
        return {name: type(thing).__name__} | {key: text for part in parts for key, text in part.items()}
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))}


class _Log:
    """The history as CSV, written anew at the start: after a kill the file may be ahead of the checkpoint."""

    def __init__(self, path):
        self.file = open(path, "w", newline="", encoding="utf-8")
        self.table = csv.writer(self.file)
        self.table.writerow(("iteration", *COLUMNS))
        self.lines = 0

    def write(self, rows) -> None:
        for row in rows[self.lines :]:
            self.table.writerow((self.lines, *row))
            self.lines += 1
        self.file.flush()


def _check_arguments(method, steps, checkpoint_every) -> None:
    if not callable(getattr(method, "init", None)) or not callable(getattr(method, "step", None)):
        raise TypeError(f"`method` must have `init` and `step`, {type(method).__name__} has not; try jb.MAID(oracle).")
    try:
        hash(method)
    except TypeError as error:
        raise TypeError(f"`method` must be hashable, so that it compiles once: {error}.") from error
    for name, number, least in (("steps", steps, 0), ("checkpoint_every", checkpoint_every, 1)):
        if not isinstance(number, (int, np.integer)) or number < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}, got {number!r}.")


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
