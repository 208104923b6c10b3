"""What is written down of a run: the history, its CSV file, and a bar."""

from __future__ import annotations

import contextlib
import csv

import numpy as np
from tqdm import tqdm

from jbilevel._core import files
from jbilevel._core.results import Status
from jbilevel._training.stepping import REPORTED, Run, Taken

COLUMNS = (*REPORTED, "status", "seconds", "work")


class History:
    """One row per finished step. A row beyond those of a run belongs to a step that was not finished."""

    def __init__(self, table: dict[str, np.ndarray] | None = None):
        columns = [table[name].tolist() for name in COLUMNS] if table else []
        self.rows = list(zip(*columns, strict=True))

    def record(self, step: int, taken: Taken, work: float) -> None:
        info = taken.info._asdict()
        numbers = [float(info[name]) for name in REPORTED]
        self.rows[step:] = [(*numbers, int(info["status"]), taken.seconds, work)]

    def last(self, name: str, otherwise: float) -> float:
        return self.rows[-1][COLUMNS.index(name)] if self.rows else otherwise

    def keep(self, steps: int) -> None:
        del self.rows[steps:]

    def arrays(self, steps: int | None = None) -> dict[str, np.ndarray]:
        table = np.array(self.rows[:steps], dtype=np.float64).reshape(-1, len(COLUMNS))
        return {name: table[:, i].astype(np.int32 if name == "status" else float) for i, name in enumerate(COLUMNS)}

    def failures(self) -> str:
        """How many steps had a solve that did not meet its tolerance, in a sentence: nothing fails silently."""
        codes = [int(row[COLUMNS.index("status")]) for row in self.rows]
        failed = [code for code in codes if code > Status.PRECISION]
        if not failed:
            return ""
        worst = Status(max(failed))
        return f"In {len(failed)} of {len(codes)} steps a solve failed, at worst {worst.name}: {worst.message}"


class Log:
    """The history as CSV, written anew at the start: after a kill the file may be ahead of the checkpoint."""

    def __init__(self, path):
        self.path, self.file = path, open(path, "w", newline="", encoding="utf-8")
        self.table = csv.writer(self.file)
        self.table.writerow(("iteration", *COLUMNS))
        self.lines = 0

    def write(self, history: History) -> None:
        """Raises `files.WriteError`."""
        try:
            for row in history.rows[self.lines :]:
                self.table.writerow((self.lines, *row))
                self.lines += 1
            self.file.flush()
        except OSError as error:
            raise files.unwritable(self.path, error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
            self.file.close()


class Progress:
    """What somebody sees of a run while it goes on: a bar on standard error, and the log file where one is wanted."""

    def __init__(self, run: Run, steps: int, log=None, bar: bool | None = None):
        self.log = None if log is None else Log(log)
        self.bar = tqdm(total=steps, initial=run.steps, disable=None if bar is None else not bar, unit="step")

    def show(self, run: Run, history: History) -> None:
        self.write(history)
        self.bar.update()
        self.bar.set_postfix(value=f"{history.last('value', np.nan):.4g}", work=f"{run.work:.4g}")

    def write(self, history: History) -> None:
        if self.log is not None:
            self.log.write(history)

    def close(self, history: History) -> None:
        self.bar.close()
        try:
            self.write(history)
        finally:
            if self.log is not None:
                self.log.close()
