"""Are runs that something stops the runs that nothing stops? Processes are killed and told to end at random moments.

`kill -9`, SIGTERM and Ctrl-C come while three kinds of runs compile, take steps and write checkpoints: MAID on a full
batch, mini-batches whose samples keep their warm starts, and a network with an optax optimiser and validation. Each
process goes on from the checkpoint of the one before. At the end parameters, state and history have to be, bit by bit,
those of a run that nothing stopped.

One moment in four is anywhere before the first step, while programs are compiled. The others come after a random number
of steps, at any time within a step or while a checkpoint is being written. A chain of processes that reaches the end
before all interruptions have come is followed by another one, of a new run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common

NAME, PAGE = Path(__file__).stem, "reliability"
TITLE = "Interrupted runs"
SIGNALS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
BEGUN = "begun"  # what a process prints before it calls fit


# ------------------------------------------------------------------------------------------------ the runs, in children


class Case(NamedTuple):
    method: jb.Method
    params: Any
    batches: Any
    steps: int
    validation: Any = None  # the batch that `jb.Validation` judges by


def full_batch(size: int) -> Case:
    """MAID learns both parameters of smoothed total variation."""
    R, images = jb.regularizers.SmoothedTV(), noisy(3 * size, 2)
    method = jb.MAID(jb.variational(None, R).oracle(jb.losses.squared_error()), rule="paper")
    return Case(method, R.init(weight=0.02), images, steps=40)


def mini_batches(size: int) -> Case:
    """Adam on three of eight images, each of which goes on from its own last solution."""
    R, images = jb.regularizers.SmoothedTV(eps=0.1), noisy(2 * size, 8)

    def batches(step):
        index = np.random.default_rng(step).choice(8, 3, replace=False)
        return {name: part[index] for name, part in images.items()} | {"index": index}

    method = jb.FirstOrder(jb.variational(None, R).oracle(jb.losses.squared_error()), optax.adam(0.05))
    return Case(method, R.init(weight=0.02), batches, steps=200)


def network(size: int) -> Case:
    """A convolutional network under Adam with a schedule, clipping and an average."""
    images, keys = noisy(size, 8), jax.random.split(jax.random.key(0), 3)
    widths = [(3, 3, 1, 16), (3, 3, 16, 16), (3, 3, 16, 1)]
    params = [0.1 * jax.random.normal(key, shape, float) for key, shape in zip(keys, widths, strict=True)]

    def denoised(params, y):
        x = y[None, :, :, None]
        for kernel in params[:-1]:
            x = jax.nn.relu(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=LAYOUT))
        return y + jax.lax.conv_general_dilated(x, params[-1], (1, 1), "SAME", dimension_numbers=LAYOUT)[0, :, :, 0]

    oracle = jb.explicit.Oracle(lambda params, data: jnp.mean((denoised(params, data["y"]) - data["x"]) ** 2))
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 100)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

    def batches(step):
        index = np.random.default_rng(step).choice(8, 4, replace=False)
        return {name: part[index] for name, part in images.items()}

    return Case(jb.FirstOrder(oracle, optimizer, average=0.9), params, batches, steps=100, validation=images)


LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES: dict[str, Callable[[int], Case]] = {
    "MAID, full batch": full_batch,
    "mini-batches, warm starts by sample": mini_batches,
    "network, optax": network,
}


def noisy(size: int, count: int) -> dict[str, jax.Array]:
    """Bright squares under white noise."""
    rng = np.random.default_rng(0)
    clean = np.zeros((count, size, size))
    for image, corner in zip(clean, rng.integers(0, size // 2, (count, 2)), strict=True):
        image[corner[0] : corner[0] + size // 2, corner[1] : corner[1] + size // 2] = 1.0
    return {"x": jnp.asarray(clean), "y": jnp.asarray(clean + 0.1 * rng.standard_normal(clean.shape))}


def child(name: str, size: int, steps: int, folder: Path) -> None:
    """One process: it takes up the run in ``folder``, says how it ended, and writes the result of a whole run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it
    case = CASES[name](size)
    steps, best = steps or case.steps, None
    if case.validation is not None:
        best = jb.Validation(case.method.oracle, case.validation, every=7, path=folder / "best.npz")
    print(BEGUN, flush=True)
    began = time.monotonic()
    result = jb.fit(
        case.method, case.params, case.batches, steps=steps, checkpoint=folder / "run.npz", callback=best,
        log=folder / "log.csv", progress=False,
    )  # fmt: skip
    if result.status in (jb.FitStatus.FINISHED, jb.FitStatus.CONVERGED):
        history = {name: column for name, column in result.history.items() if name != "seconds"}
        whole = {"state": result.state, "history": history, "best": result.best, "work": result.work}
        if best is not None:
            whole |= {"validation": {"params": best.params, "value": best.value, "history": np.array(best.history)}}
        jb.save(folder / "result.npz", whole)
    seconds, steps = time.monotonic() - began, result.history["seconds"]
    times = {"compiling": seconds - float(np.sum(steps)), "step": float(np.median(steps)) if len(steps) else 0.0}
    print(json.dumps({"status": result.status.name, "steps": result.steps} | times), flush=True)


# --------------------------------------------------------------------------------------------------------- interrupting


class Life(NamedTuple):
    """How one process ended: what it said, or nothing where it was killed."""

    code: int
    status: str | None = None
    steps: int = 0
    compiling: float = 0.0  # seconds, with all else that is no step
    step: float = 0.0

    @property
    def finished(self) -> bool:
        return self.status in ("FINISHED", "CONVERGED")


class Moment(NamedTuple):
    """When an interruption comes: after a number of steps, maybe while a checkpoint is written, and some seconds."""

    steps: int
    seconds: float
    written: bool = False

    @classmethod
    def of(cls, number: int, before: int, whole: Life, rng: random.Random) -> Moment:
        """That of interruption ``number``, in a run that has taken ``before`` steps."""
        if number % 4 == 0:
            return cls(0, rng.uniform(0.0, whole.compiling))
        steps = before + rng.randint(1, max(1, whole.steps // 4))
        return cls(steps, 0.0, written=True) if number % 4 == 2 else cls(steps, rng.uniform(0.0, whole.step))

    def wait(self, folder: Path, process: subprocess.Popen) -> None:
        """Looks often, and as long as the process lives."""
        while process.poll() is None and lines_in(folder / "log.csv") < self.steps:
            time.sleep(2e-3)
        while process.poll() is None and self.written and not any(name.endswith(".tmp") for name in os.listdir(folder)):
            time.sleep(2e-4)
        time.sleep(self.seconds)


class Runner:
    """Starts processes of one case."""

    def __init__(self, name: str, size: int, steps: int):
        self.options = ["--child", name, "--sizes", str(size), "--steps", str(steps)]

    def life(self, folder: Path, number: int | None = None, moment: Moment | None = None) -> Life:
        """One process, which gets the signal ``number`` at the ``moment``."""
        command = [sys.executable, __file__, *self.options, "--folder", str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline().strip()
            if first != BEGUN:
                raise SystemExit(f"a process failed before it began: {first!r}")
            if number is not None and moment is not None:
                moment.wait(folder, process)
                if process.poll() is None:
                    process.send_signal(number)
            told = process.stdout.read().strip()
        return Life(process.returncode, **json.loads(told.splitlines()[-1] if told else "{}"))


def interrupted(runner: Runner, how: str, count: int, whole: Life, rng: random.Random, result: Path) -> dict:
    """Chains of processes with ``count`` interruptions altogether, whose ends are compared with the ``whole`` run's."""
    told = {"interruptions": 0, "early": 0, "runs": 0, "identical": 0, "wrong": 0, "leftovers": 0, "most_lost": 0}
    while told["interruptions"] < count:
        with tempfile.TemporaryDirectory() as name:
            folder, life = Path(name), None
            while life is None or not life.finished:
                (folder / "log.csv").unlink(missing_ok=True)
                number = SIGNALS[how] if told["interruptions"] < count else None
                moment = Moment.of(told["interruptions"], steps_in(folder / "run.npz"), whole, rng)
                life = runner.life(folder, number, moment)
                if life.finished:
                    break
                told["interruptions"] += 1
                kept = steps_in(folder / "run.npz")
                told["early"] += kept == 0
                told["most_lost"] = max(told["most_lost"], lines_in(folder / "log.csv") - kept)
                if number != signal.SIGKILL:
                    told["wrong"] += (life.status, life.steps, life.code) != ("INTERRUPTED", kept, 0)
            told["runs"] += 1
            told["identical"] += same(folder / "result.npz", result)
            told["leftovers"] += sum(name.endswith(".tmp") for name in os.listdir(folder))
    return told


def steps_in(checkpoint: Path) -> int:
    """Steps that a checkpoint holds, all of whose arrays are read: ValueError where it is damaged."""
    return int(jb.load(checkpoint)[1]["steps"]) if checkpoint.exists() else 0


def lines_in(log: Path) -> int:
    """Steps that a log holds, which is written before the checkpoint; the last line may be cut off."""
    return max(0, log.read_text(encoding="utf-8").count("\n") - 1) if log.exists() else 0


def same(file: Path, other: Path) -> bool:
    """Whether two results are the same bit by bit."""
    results = [jax.tree.flatten(jb.load(path)[0]) for path in (file, other)]
    (leaves, structure), (others, wanted) = results
    pairs = zip(leaves, others, strict=False)
    return structure == wanted and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------ benchmark


def measure(args, recorder) -> None:
    rng = random.Random(args.seed)
    for name in args.cases:
        runner = Runner(name, args.sizes[0], args.steps)
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            whole.mkdir()
            life = runner.life(whole)
            if not life.finished:
                raise SystemExit(f"{name}: the run that nothing stops did not finish: {life}")
            for how in SIGNALS:
                count = args.kills if how == "kill -9" else args.signals
                told = interrupted(runner, how, count, life, rng, whole / "result.npz")
                recorder.add({"case": name, "by": how}, told)
                recorder.write()


def render(rows) -> str:
    lines = []
    for row in rows:
        case, told = row["case"], row["figures"]
        lines.append(
            (case["case"], case["by"], told["interruptions"], told["early"], f"{told['identical']} of {told['runs']}",
             told["most_lost"], told["wrong"], told["leftovers"])
        )  # fmt: skip
    header = ["run", "by", "interruptions", "before the first checkpoint", "runs that are identical at the end",
              "steps lost, at most", "did not end as INTERRUPTED", "temporary files left"]  # fmt: skip
    return common.table(header, lines)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "cases": list(CASES), "sizes": [48], "kills": 20, "signals": 10, "steps": 0,
        },
        quick={"cases": list(CASES)[1:2], "sizes": [8], "kills": 2, "signals": 1, "steps": 30},
    )  # fmt: skip
    options.add_argument("--cases", nargs="+", choices=list(CASES), help="runs (default: all)")
    options.add_argument("--kills", type=int, help="kill -9 for each run")
    options.add_argument("--signals", type=int, help="SIGTERM, and Ctrl-C, for each run")
    options.add_argument("--steps", type=int, help="of each run; 0: as many as take some seconds")
    options.add_argument("--child", choices=list(CASES), help="be one of the processes")
    options.add_argument("--folder", type=Path, help="of the process")
    args = common.parse(options, argv)
    if args.child:
        with common.precision("float64"):
            child(args.child, args.sizes[0], args.steps, args.folder)
        return
    with common.precision("float64"):
        recorder = common.recorder_of(PAGE, NAME, args)
        measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
