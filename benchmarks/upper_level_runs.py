"""How a method is run and judged in `upper_level.py`: exact losses at marks of work, or the work to reach targets.

Work is that of the lower level in gradient-equivalents per sample of the whole set, seconds are those of the processor;
neither holds what judging costs, nor compilation.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbilevel as jb
from benchmarks.upper_level_problems import Judge, Setting

AT_FIRST = 40  # steps after each of which targets are looked at
POINTS = 60  # of a curve
DIVERGED = 10.0  # times the start's loss above it
COMPILED = 0.1  # seconds that a program of a step takes to compile at least, and no operation of the host
BEHIND = 0.15  # of the way from the start to the best cell: a cell of a grid that lacks more at a mark is given up


@dataclass(frozen=True)
class Aim:
    """What a run is to tell: losses at ``marks`` of work, or work to ``targets``, {label: loss}.

    every: by which work grows between two looks at targets, after the first steps; least: by how much at least.
    budget: work at which runs to targets end. seconds: of the processor at which any run ends.
    """

    marks: Sequence[float] = ()
    targets: Mapping[str, float] | None = None
    budget: float = np.inf
    every: float = 1.015
    least: float = 0.0
    seconds: float = np.inf


class Run(NamedTuple):
    """marks: {work: exact loss}; reached: {label: work}; and the seconds at each."""

    marks: dict
    reached: dict
    mark_seconds: dict
    reached_seconds: dict
    work: float
    seconds: float
    value: float
    steps: int
    status: str
    message: str
    compile_seconds: float
    curve: list  # (work, seconds, exact loss) rows, at most `POINTS`
    accuracies: dict  # of the lower level and the adjoint, against the scales of the start: deciles 1, 5 and 9 of steps
    recompiled: int | None = None  # programs that were compiled after the first step

    def figures(self) -> dict[str, Any]:
        """For a row: what was asked for, with six digits."""
        return {name: _short(part) for name, part in self._asdict().items() if part not in ({}, [], None)}


def _short(part):
    if isinstance(part, dict):
        return {str(key): _short(value) for key, value in part.items()}
    if isinstance(part, (list, tuple)):
        return [_short(value) for value in part]
    return float(f"{part:.6g}") if isinstance(part, float) else part


class Watch:
    """A callback of `jb.fit` that judges params outside of the time of the run."""

    def __init__(self, setting: Setting, judge: Judge, aim: Aim, leader: Mapping[float, float] | None = None):
        """leader: the least loss that earlier cells of a grid had at each mark."""
        self.setting, self.judge, self.aim, self.leader = setting, judge, aim, leader or {}
        self.left = sorted(aim.marks)
        self.targets = sorted((aim.targets or {}).items(), key=lambda item: -item[1])
        self.marks, self.mark_seconds, self.reached, self.reached_seconds = {}, {}, {}, {}
        self.looks: list[tuple[float, float, Any]] = []  # with params in place of a value where nothing hangs on it
        self.asked: list[tuple[float, float]] = []  # of lower level and adjoint
        self.work = self.seen = self.apart = 0.0
        self.last, self.count, self.why = setting.start, 0, ""
        self.first = judge(jax.tree.map(np.asarray, setting.start))  # as later params come
        self.growth = max(1.01, (self.left[-1] / 2) ** (1 / POINTS)) if self.left else aim.every
        self.begun = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self.begun - self.apart

    def __call__(self, step, state, info) -> bool:
        before, now, start = self.work, self.seconds(), time.process_time()
        self.work += float(info.work) / self.setting.count
        self.count += 1
        self.asked.append((float(info.tol), float(info.adjoint_tol)))
        while self.left and self.work > self.left[0]:  # the params before the step that passed the mark
            mark = self.left.pop(0)
            value = self.marks[mark] = self.judge(self.last)
            self.mark_seconds[mark] = now
            best = self.leader.get(mark, np.inf)
            if value - best > BEHIND * abs(self.first - best):
                self.why = "far behind"
        params = jax.tree.map(np.asarray, state.params)
        early = self.targets and self.count <= AT_FIRST
        due = self.work > self.growth * self.seen
        if (early or due) and self.work >= self.seen + self.aim.least and (self.targets or before):
            self.seen = self.work
            self.looks.append((self.work, now, self._reach(params, now) if self.targets else params))
        self.last = params
        self.why = self.why or self._hopeless(info, now)
        self.apart += time.process_time() - start
        return bool(self.why) or not (self.left or self.targets)

    def _reach(self, params, now) -> float:
        value = self.judge(params)
        while self.targets and value <= self.targets[0][1]:
            label, _ = self.targets.pop(0)
            self.reached[label], self.reached_seconds[label] = self.work, now
        return value

    def _hopeless(self, info, now) -> str:
        if not float(info.value) <= self.first + DIVERGED * abs(self.first):
            return "diverged"
        if now > self.aim.seconds:
            return f"{self.aim.seconds:g} s are over"
        return "the budget is spent" if self.work >= self.aim.budget else ""

    def run(self, *, steps: int, status: str, message: str, compile_seconds: float, params) -> Run:
        """What was seen; a run that ended by itself stands at its last params for the marks that are left."""
        seconds, value = self.seconds(), self.judge(params)
        for mark in () if self.why else self.left:
            self.marks[mark], self.mark_seconds[mark] = value, seconds
        return Run(
            marks=self.marks, reached=self.reached, mark_seconds=self.mark_seconds,
            reached_seconds=self.reached_seconds, work=self.work, seconds=seconds, value=value, steps=steps,
            status=status, message=message, compile_seconds=compile_seconds, curve=[],
            accuracies=self.accuracies(),
        )  # fmt: skip

    def accuracies(self) -> dict[str, list[float]]:
        scales = self.setting.oracle.scales(self.setting.start, self.setting.batch)
        found = {}
        for name, scale, asked in zip(("tol", "adjoint_tol"), scales, zip(*self.asked, strict=True), strict=False):
            if 0 < float(scale) < np.inf and np.all(np.isfinite(asked)):
                found[name] = (np.quantile(asked, (0.1, 0.5, 0.9)) / float(scale)).tolist()
        return found

    def curve(self) -> list[list[float]]:
        """The start and what was looked at, judged now where it was not before, thinned."""
        chosen = np.unique(np.linspace(0, len(self.looks) - 1, POINTS - 1).round().astype(int)) if self.looks else ()
        rows = [self.looks[i] for i in chosen]
        judged = [[w, s, v if isinstance(v, float) else self.judge(v)] for w, s, v in rows]
        return [[0.0, 0.0, self.first], *judged]


def run(setting: Setting, method: jb.Method, judge: Judge, aim: Aim, batches=None, leader=None) -> Run:
    """``jb.fit`` until the last mark is passed, the last target reached, or the budget spent."""
    batches = setting.batch if batches is None else batches
    began = jb.fit(method, setting.start, batches, steps=1)  # compiles
    watch = Watch(setting, judge, aim, leader)
    with programs() as compiled:
        found = jb.fit(method, setting.start, batches, steps=10**6, callback=watch, progress=False)
    if found.status == jb.FitStatus.INTERRUPTED:
        raise SystemExit(found.message)  # half a run is no row
    status, message = (found.status.name, found.message) if not watch.why else ("STOPPED", watch.why)
    done = watch.run(
        steps=found.steps, status=status, message=message, compile_seconds=began.compile_seconds, params=found.params
    )
    return done._replace(curve=watch.curve(), recompiled=sum(seconds > COMPILED for seconds in compiled))


@contextmanager
def programs() -> Iterator[list[float]]:
    """A list that receives the seconds of every compilation in the block."""
    seconds: list[float] = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# ---------------------------------------------------------------------------------------------------------------- Adam


class Cell(NamedTuple):
    """A rate of Adam and accuracies of the lower level and the adjoint, relative to the scales of the start.

    power: accuracies over (number of passes through the data)^power. cosine: steps in which the rate falls to 0.
    """

    rate: float
    tol: float
    adjoint_tol: float
    power: float = 0.0
    cosine: int = 0

    def __str__(self) -> str:
        accuracy = f"{self.tol:g}" if self.tol == self.adjoint_tol else f"{self.tol:g}, {self.adjoint_tol:g}"
        decay = f", cosine {self.cosine}" if self.cosine else ""
        return f"rate {self.rate:g}{decay}, accuracy {accuracy}" + (f" / epoch^{self.power:g}" if self.power else "")


def grid(rates: Sequence[float], tolerances: Sequence[float | tuple[float, float]]) -> tuple[Cell, ...]:
    """All pairs; a tolerance is that of both solves, or a pair."""
    pairs = [tol if isinstance(tol, tuple) else (tol, tol) for tol in tolerances]
    return tuple(Cell(rate, *pair) for pair in pairs for rate in rates)


def _adam(learning_rate, parts=None) -> optax.GradientTransformation:
    direction = optax.scale_by_adam() if parts is None else optax.chain(optax.scale_by_adam(), parts())
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


_TRACED: dict[Any, optax.GradientTransformation] = {}  # the same object for the same parts, so that methods are equal


def traced_adam(parts: Callable | None = None) -> optax.GradientTransformation:
    """Adam whose rate is part of its state, so that all rates share one program; ``parts`` scales those of params."""
    if parts not in _TRACED:
        _TRACED[parts] = optax.inject_hyperparams(_adam, static_args=("parts",))(learning_rate=0.1, parts=parts)
    return _TRACED[parts]


def adam_states(setting: Setting, cells: Sequence[Cell]) -> tuple[jb.FirstOrder, Iterator[Any]]:
    """One method, and its first state for each cell."""
    optimizer = traced_adam(setting.parts)
    method = jb.FirstOrder(setting.oracle, optimizer, tol=1.0, adjoint_tol=1.0, projection=setting.projection)
    state, scales = method.init(setting.start, setting.batch), setting.oracle.scales(setting.start, setting.batch)

    def at(cell: Cell):
        rate = jnp.asarray(cell.rate, state.optimizer.hyperparams["learning_rate"].dtype)
        return replace(
            state,
            tol=cell.tol * scales.solution,
            adjoint_tol=cell.adjoint_tol * scales.adjoint,
            optimizer=state.optimizer._replace(hyperparams={"learning_rate": rate}),
        )

    return method, map(at, cells)


def adam(setting: Setting, judge: Judge, aim: Aim, cells: Sequence[Cell]) -> list[tuple[Cell, Run]]:
    """Every cell on the full batch; curves of those alone that are the best somewhere."""
    method, states = adam_states(setting, cells)
    found: list[tuple[Cell, Run, Watch]] = []
    leader: dict[float, float] = {}
    for cell, state in zip(cells, states, strict=True):
        began = time.perf_counter()
        jax.block_until_ready(method.step(state, setting.batch))
        compile_seconds, watch = time.perf_counter() - began if not found else 0.0, Watch(setting, judge, aim, leader)
        for k in itertools.count():
            state, info = method.step(state, setting.batch)
            if watch(k, state, jax.device_get(info)):
                break
        done = watch.run(steps=k + 1, status="STOPPED", message=watch.why, compile_seconds=compile_seconds,
                         params=watch.last)  # fmt: skip
        found.append((cell, done, watch))
        leader |= {mark: min(value, leader.get(mark, np.inf)) for mark, value in done.marks.items()}
    chosen = best(done for _, done, _ in found)
    return [(cell, done._replace(curve=w.curve() if i in chosen else [])) for i, (cell, done, w) in enumerate(found)]


def best(runs) -> set[int]:
    """Which runs have the least loss at a mark, or the least work to a target."""
    runs, chosen = list(runs), set()
    for kind in ("marks", "reached"):
        for label in {label for done in runs for label in getattr(done, kind)}:
            scores = [getattr(done, kind).get(label, np.inf) for done in runs]
            chosen.add(int(np.argmin(scores)))
    return chosen


# --------------------------------------------------------------------------------------------- Adam on changing batches


@dataclass(frozen=True)
class Sampled(jb.FirstOrder):
    """FirstOrder with accuracies over (number of passes through the data)^power, as in Salehi et al. 2025."""

    epoch: int = 1  # steps of one
    power: float = 0.0

    def step(self, state, batch):
        following, info = jb.FirstOrder.step(self, state, batch)
        passes, then = (1 + _steps(s.optimizer) // self.epoch for s in (state, following))
        factor = (passes / then) ** self.power
        return replace(following, tol=factor * state.tol, adjoint_tol=factor * state.adjoint_tol), info


def _steps(optimizer):
    """That an optimiser has taken; a schedule counts them once more."""
    return optax.tree.get_all_with_path(optimizer, "count")[0][1]


def shuffled(setting: Setting, size: int = 16) -> Callable[[int], dict]:
    """step -> batch of ``size`` samples that know who they are; every pass in an order of its own."""
    whole = jax.tree.map(np.asarray, setting.batch)

    def batch(step: int) -> dict:
        epoch, place = divmod(step, setting.count // size)
        order = np.random.default_rng([setting.order, epoch]).permutation(setting.count)
        index = order[place * size : (place + 1) * size]
        return {name: part[index] for name, part in whole.items()} | {"index": index}

    return batch


def sampled_adam(setting: Setting, judge: Judge, aim: Aim, cells: Sequence[Cell], size: int = 16):
    """Every cell on batches of ``size`` with the warm starts of their samples."""
    size = min(size, setting.count)
    batches = shuffled(setting, size)
    scales = setting.oracle.scales(setting.start, setting.batch)
    found, leader = [], {}
    for cell in cells:
        rate = optax.cosine_decay_schedule(cell.rate, cell.cosine) if cell.cosine else cell.rate
        method = Sampled(
            setting.oracle, _once(cell, rate), tol=_short(cell.tol * float(scales.solution)),
            adjoint_tol=_short(cell.adjoint_tol * float(scales.adjoint)), projection=setting.projection,
            epoch=max(1, setting.count // size), power=cell.power,
        )  # fmt: skip
        done = run(setting, method, judge, aim, batches, leader)
        found.append((cell, done))
        leader |= {mark: min(value, leader.get(mark, np.inf)) for mark, value in done.marks.items()}
    chosen = best(done for _, done in found)
    return [(cell, done if i in chosen else done._replace(curve=[])) for i, (cell, done) in enumerate(found)]


_CELLS: dict[Cell, optax.GradientTransformation] = {}


def _once(cell: Cell, rate) -> optax.GradientTransformation:
    """The same object for the same cell: a method that is equal does not compile again."""
    return _CELLS.setdefault(cell, optax.adam(rate))
