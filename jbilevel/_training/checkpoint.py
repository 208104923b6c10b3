"""A run in a file, from which it goes on with the same numbers as if it had never stopped."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbilevel._core import files, io
from jbilevel._training import fingerprint, stepping
from jbilevel._training.batches import Source
from jbilevel._training.log import History
from jbilevel._training.stepping import Best, Run

KIND = "checkpoint of jbilevel.fit"
ENTRIES = ("steps", "done", "stationary", "samples", "warm", "best", "run")  # of the metadata
PARAMS = "the params to start from"
OTHER = "give another path or delete the file"


class Checkpoint:
    """The file of one run of ``method``; without a path nothing is ever written, and nothing found.

    Where batches change, a step makes its warm start from the store of warm starts; the state's own is that of the last
    batch, kept for whoever reads the result.
    """

    def __init__(self, path, method, source: Source, every: int, resume: bool | str = True):
        self.file = None if path is None else _file(path)
        self.method, self.source, self.every, self.resume, self.written = method, source, every, resume, 0
        self.origin: dict[str, Any] = {}  # what makes this run the run it is

    def open(self, params, check: Callable[[], None]) -> tuple[Run, History]:
        """The run as the file has it, or one that begins at ``params``; ``check`` may raise while it is compiled."""
        if self.file is not None:
            files.remove_leftovers(self.file)
            self.origin = {
                "batches": "changing" if self.source.changing else "full",
                "method": fingerprint.describe(self.method),
                "data": fingerprint.leaves(self.source.first),
                "params": fingerprint.leaves(params),
                "versions": fingerprint.versions(),
            }
            if self.resume is not False and self.file.exists():
                run, history = self._resume(params)
                self.written = run.steps
                return run, history
            self.require_writable()
        start = self.method, params, self.source.first
        stepping.compile_apart(stepping.init, *start, check=check)
        begun = stepping.init(*start)
        stepping.require_projection(self.method, params, begun, self.source.first)
        return Run.at(begun), History()

    def require_writable(self) -> None:
        """OSError before the first step, instead of after it."""
        if self.file is not None:
            files.require_writable(self.file, "checkpoint")

    def save_if_due(self, run: Run, history: History) -> None:
        if run.steps % self.every == 0:
            self.save(run, history)

    def save(self, run: Run, history: History) -> None:
        """Write the run unless the file has it already. Raises `files.WriteError`."""
        if self.file is None or self.written == run.steps:
            return
        warm = jax.tree.leaves(run.state.warm) if self.source.changing else []
        content = {
            "state": replace(run.state, warm=None) if self.source.changing else run.state,
            "warm": warm,
            "best": run.best and run.best._asdict(),
            "history": history.arrays(run.steps),
            "index": np.array(list(run.store), dtype=np.int64),
            "store": [np.stack(column) for column in zip(*run.store.values(), strict=True)],  # by leaf
        }
        meta = {
            "kind": KIND,
            "steps": run.steps,
            "done": run.done,
            "stationary": run.stationary,
            "samples": len(run.store),
            "warm": [leaf.shape for leaf in warm],
            "best": run.best is not None,
            "run": self.origin,
        }
        io.save(self.file, content, meta)
        self.written = run.steps

    def _resume(self, params) -> tuple[Run, History]:
        meta = io.read_meta(self.file)
        if meta.get("kind") != KIND:
            raise ValueError(f"checkpoint={self.file} is no checkpoint of fit; {OTHER}.")
        if missing := [name for name in ENTRIES if name not in meta]:
            raise ValueError(f"checkpoint={self.file} is of another version of jbilevel, without {missing}; {OTHER}.")
        if self.resume != "force":
            with io.blame(self.file):
                run = {name: dict(meta["run"][name]) for name in ("versions", "data", "params")} | dict(meta["run"])
            self._require_same(run)
        template = jax.eval_shape(lambda p, batch: stepping.init(self.method, p, batch), params, self.source.first)
        try:
            with io.blame(self.file):
                like = self._like(template, meta)
            content, _ = io.load(self.file, like)
        except ValueError as error:
            raise ValueError(f"`checkpoint` cannot be resumed: {error} If the problem has changed, {OTHER}.") from error
        with io.blame(self.file):
            history, state = History(content["history"]), content["state"]
            history.failures()  # raises where a status is none
        other = list(fingerprint.between_leaves(meta["run"]["params"], self.origin["params"], PARAMS))
        if self.resume != "force" and other and self.origin["params"] != fingerprint.leaves(state.params):
            self._refuse(other)
        if self.source.changing:
            warm = jax.tree.unflatten(jax.tree.structure(template.warm), content["warm"])
            state = replace(state, warm=warm)
        run = Run(
            state=state,
            steps=meta["steps"],
            work=history.last("work", 0.0),
            done=meta["done"],
            stationary=meta["stationary"],
            store=dict(zip(content["index"].tolist(), zip(*content["store"], strict=True), strict=True)),
            best=content["best"] and Best(**content["best"]),
        )
        return run, history

    def _require_same(self, before: dict[str, Any]) -> None:
        """ValueError where the file is of another run; a warning where only code or versions differ."""
        now = self.origin
        versions = {name: (before["versions"].get(name), new) for name, new in now["versions"].items()}
        same_code = versions["python"][0] == versions["python"][1]
        found = list(fingerprint.between(before["method"], now["method"], "the method", same_code))
        if before["batches"] != now["batches"]:
            found.append(fingerprint.Difference("`batches`", before["batches"], now["batches"]))
        data = "the data of the first batch" if self.source.changing else "the data"
        found += fingerprint.between_leaves(before["data"], now["data"], data)
        shapes, wanted = fingerprint.shapes(before["params"]), fingerprint.shapes(now["params"])
        found += fingerprint.between_leaves(shapes, wanted, PARAMS)
        self._refuse(difference for difference in found if not difference.code_only)
        texts = [f"the code of {difference.what} has changed" for difference in found]
        texts += [f"{name} was {old}, now is {new}" for name, (old, new) in versions.items() if old != new]
        if texts:
            warnings.warn(
                f"the run goes on from checkpoint={self.file}, but {'; '.join(texts)}: its numbers may no longer be "
                "those of an uninterrupted run.",
                UserWarning,
                stacklevel=5,
            )

    def _refuse(self, differences) -> None:
        found = [str(difference) for difference in differences]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"checkpoint={self.file} is of another run, which differs in {'; '.join(found[:3])}{more}; {OTHER}, or "
                'pass resume="force" to go on from it nevertheless.'
            )

    def _like(self, template, meta) -> dict[str, Any]:
        """What the file must hold to belong to this run: shapes that it announces, and no memory for them."""

        def of(shape, dtype):
            return np.broadcast_to(np.zeros((), dtype), shape)

        samples, steps, changing = int(meta["samples"]), int(meta["steps"]), self.source.changing
        warm = jax.tree.leaves(template.warm)
        shapes = zip(meta["warm"], warm, strict=True) if changing else ()
        return {
            "state": replace(template, warm=None) if changing else template,
            "warm": [jax.ShapeDtypeStruct(shape, leaf.dtype) for shape, leaf in shapes],
            "best": {"params": template.params, "value": 0.0} if meta["best"] else None,
            "history": {name: of((steps,), column.dtype) for name, column in History().arrays().items()},
            "index": of((samples,), np.int64),
            "store": [of((samples, *leaf.shape[1:]), leaf.dtype) for leaf in warm if samples],
        }


def _file(path) -> Path:
    """The file that ``checkpoint`` names, in a folder that is there."""
    path = Path(path)
    path = path / "checkpoint.npz" if path.is_dir() or not path.suffix else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        path.stat()
    except FileNotFoundError:  # not yet written
        pass
    except FileExistsError as error:
        sentence = f"`checkpoint`={path} needs a folder where a file or a loop of symbolic links is; give another path."
        raise NotADirectoryError(errno.ENOTDIR, sentence) from error
    except OSError as error:
        kind = ValueError if error.errno == errno.ELOOP else partial(OSError, error.errno)
        raise kind(f"`checkpoint`={path} is no file: {error.strerror}; give another path.") from error
    return path
