"""How a method is run and judged in `upper_level.py`: exact losses at marks of work, or the work to reach targets."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np

import jbilevel as jb
from benchmarks.upper_level_problems import Judge, Setting

EVERY = 1.015  # by which work grows between two looks, after the first 40
AT_FIRST = 40


class Run(NamedTuple):
    """marks: {work: exact loss}; reached: {target: work}; seconds of the processor at each, without compilation."""

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
    curve: np.ndarray  # (work, seconds, exact loss) rows where it was looked at


class _Watch:
    """A callback of `jb.fit` that judges params outside of the time of the run."""

    def __init__(self, setting: Setting, judge: Judge, marks, targets):
        self.setting, self.judge = setting, judge
        self.left, self.targets = list(marks), list(targets)
        self.rows: list[tuple[float, float, float]] = []
        self.marks: dict[Any, float] = {}
        self.mark_seconds: dict[Any, float] = {}
        self.reached: dict[Any, float] = {}
        self.reached_seconds: dict[Any, float] = {}
        self.work = self.seen = 0.0
        self.apart, self.begun, self.last, self.count = 0.0, 0.0, setting.start, 0

    def seconds(self) -> float:
        return time.process_time() - self.begun - self.apart

    def __call__(self, step, state, info) -> bool:
        before = self.work
        self.work += float(info.work) / self.setting.count
        self.count += 1
        now, start = self.seconds(), time.process_time()
        while self.left and self.work > self.left[0]:  # the params before the step that passed the mark
            mark = self.left.pop(0)
            self.marks[mark], self.mark_seconds[mark] = self.judge(self.last), now
        due = self.count <= AT_FIRST or self.work > EVERY * self.seen
        if self.targets and due:
            self.seen = self.work
            value = self.judge(state.params)
            self.rows.append((self.work, now, value))
            while self.targets and value <= (1 + self.targets[0]) * self.setting.goal:
                target = self.targets.pop(0)
                self.reached[target], self.reached_seconds[target] = self.work, now
        elif due and before:
            self.seen = self.work
            self.rows.append((self.work, now, self.judge(state.params)))
        self.last = jax.tree.map(np.asarray, state.params)
        self.apart += time.process_time() - start
        return not (self.left or self.targets)


def run(setting: Setting, method, judge: Judge, *, marks=(), targets=(), budget=None, batches=None, steps=10**6) -> Run:
    """``jb.fit`` until the last mark is passed, the last target reached, or ``budget`` work per sample is spent.

    targets: losses, as shares above the least one that is known.
    """
    watch = _Watch(setting, judge, marks, targets)
    batches = setting.batch if batches is None else batches
    jb.fit(method, setting.start, batches, steps=1)  # compiles
    watch.begun = time.process_time()
    limit = np.inf if budget is None else budget * setting.count
    found = jb.fit(method, setting.start, batches, steps=steps, callback=watch, work_budget=limit)
    seconds = watch.seconds()
    for mark in watch.left:
        watch.marks[mark] = judge(found.params)
    return Run(
        marks=watch.marks,
        reached=watch.reached,
        mark_seconds=watch.mark_seconds,
        reached_seconds=watch.reached_seconds,
        work=found.work / setting.count,
        seconds=seconds,
        value=judge(found.params),
        steps=found.steps,
        status=found.status.name,
        message=found.message,
        compile_seconds=found.compile_seconds,
        curve=np.array(watch.rows),
    )
