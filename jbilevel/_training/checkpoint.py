"""A run in a file, from which it goes on with the same numbers as if it had never stopped."""

from __future__ import annotations

import hashlib
import re
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import jax
import numpy as np

from jbilevel._core import io
from jbilevel._training import stepping
from jbilevel._training.batches import Source
from jbilevel._training.log import History
from jbilevel._training.stepping import Run

KIND = "checkpoint of jbilevel.fit"


class Checkpoint:
    """The file of one run of ``method``; without a path nothing is ever written, and nothing found.

    Where batches change, the state's warm start is not written: each step makes it from the store of warm starts.
    """

    def __init__(self, path, method, source: Source, every: int):
        self.file = None if path is None else _file(path)
        self.method, self.source, self.every, self.written = method, source, every, 0
        self.origin = {"batches": "changing" if source.changing else "full", **describe(method, "method")}

    def open(self, params) -> tuple[Run, History]:
        """The run as the file has it, or one that begins at ``params``."""
        if self.file is None or not self.file.exists():
            return Run.at(stepping.init(self.method, params, self.source.first)), History()
        run, history = self._resume(params)
        self.written = run.steps
        return run, history

    def save_if_due(self, run: Run, history: History) -> None:
        if run.steps % self.every == 0:
            self.save(run, history)

    def save(self, run: Run, history: History) -> None:
        """Write the run unless the file has it already."""
        if self.file is None or self.written == run.steps:
            return
        content = {
            "state": replace(run.state, warm=None) if self.source.changing else run.state,
            "history": history.arrays(run.steps),
            "index": np.array(list(run.store), dtype=np.int64),
            "warm": [np.stack(column) for column in zip(*run.store.values(), strict=True)],  # by leaf
        }
        meta = {"kind": KIND, "steps": run.steps, "done": run.done, "samples": len(run.store), "made by": self.origin}
        io.save(self.file, content, meta)
        self.written = run.steps

    def _resume(self, params) -> tuple[Run, History]:
        meta = io.read_meta(self.file)
        cure = "give another path or delete the file"
        if meta.get("kind") != KIND:
            raise ValueError(f"checkpoint={self.file} is no checkpoint of fit; {cure}.")
        with io.blame(self.file):
            steps, done, made_by = int(meta["steps"]), bool(meta["done"]), dict(meta["made by"])
        self._same_origin(made_by, cure)
        template = jax.eval_shape(lambda p, batch: stepping.init(self.method, p, batch), params, self.source.first)
        try:
            with io.blame(self.file):
                like = self._like(template, steps, int(meta["samples"]))
            content, _ = io.load(self.file, like)
        except ValueError as error:
            raise ValueError(f"`checkpoint` cannot be resumed: {error} If the problem has changed, {cure}.") from error
        with io.blame(self.file):
            history = History(content["history"])
            history.failures()  # raises where a status is none
        state = content["state"]
        if self.source.changing and template.warm is not None:
            state = replace(state, warm=stepping.cold(self.method, state.params, self.source.first))
        store = dict(zip(content["index"].tolist(), zip(*content["warm"], strict=True), strict=True))
        work = history.last("work", 0.0)
        return Run(state=state, steps=steps, work=work, done=done, store=store), history

    def _same_origin(self, made_by: dict, cure: str) -> None:
        keys = [key for key in dict.fromkeys([*self.origin, *made_by]) if self.origin.get(key) != made_by.get(key)]
        if keys:
            changes = "; ".join(f"{key} was {made_by.get(key)}, now {self.origin.get(key)}" for key in keys[:3])
            raise ValueError(f"checkpoint={self.file} comes from another run: {changes}; {cure}.")

    def _like(self, template, steps: int, samples: int) -> dict[str, Any]:
        """What the file must hold to belong to this run: shapes that it announces, and no memory for them."""

        def of(shape, dtype):
            return np.broadcast_to(np.zeros((), dtype), shape)

        leaves = jax.tree.leaves(template.warm) if samples else []
        return {
            "state": replace(template, warm=None) if self.source.changing else template,
            "history": {name: of((steps,), column.dtype) for name, column in History().arrays().items()},
            "index": of((samples,), np.int64),
            "warm": [of((samples, *leaf.shape[1:]), leaf.dtype) for leaf in leaves],
        }


def describe(thing, name: str) -> dict[str, str]:
    """Class and settings of a method in words that are the same in every process."""
    if is_dataclass(thing) and not isinstance(thing, type):
        parts = [describe(vars(thing)[f.name], f"{name}.{f.name}") for f in fields(thing) if f.compare]
        return {name: type(thing).__name__} | {key: text for part in parts for key, text in part.items()}
    return {name: re.sub(r" at 0x[0-9a-fA-F]+", "", _spelt(thing))}


def _spelt(thing: Any) -> str:
    """All of a thing inside another one: what the repr of objects leaves out tells two runs apart."""
    kind = type(thing)
    if is_dataclass(kind):
        inside = (f"{f.name}={_spelt(vars(thing)[f.name])}" for f in fields(kind) if f.compare)
        return f"{kind.__qualname__}({', '.join(inside)})"
    if issubclass(kind, tuple) and kind is not tuple:  # a named one
        return f"{kind.__qualname__}({', '.join(f'{name}={_spelt(v)}' for name, v in thing._asdict().items())})"
    if kind is tuple:
        return f"({', '.join(map(_spelt, thing))}{',' if len(thing) == 1 else ''})"
    if isinstance(thing, partial):
        given = [*map(_spelt, thing.args), *(f"{key}={_spelt(value)}" for key, value in thing.keywords.items())]
        return f"functools.partial({', '.join([_spelt(thing.func), *given])})"
    if isinstance(thing, bytes):  # the numbers of an array
        return f"sha256 {hashlib.sha256(thing).hexdigest()}"
    if isinstance(thing, MethodType):
        return f"<bound method {thing.__func__.__qualname__} of {_spelt(thing.__self__)}>"
    return repr(thing)


def _file(path) -> Path:
    path = Path(path)
    path = path / "checkpoint.npz" if path.is_dir() or not path.suffix else path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
