"""One cold hypergradient of smoothed TV in PyTorch: deepinv unfolded and as a deep equilibrium model, and by hand.

The problem of `benchmarks.hypergradients` at batch 1 in float64. It needs PyTorch and deepinv, which nothing else in
this project does, so it runs in an environment of its own and imports neither JAX nor jbilevel:

    python3 -m venv torchenv
    torchenv/bin/pip install torch "deepinv>=0.5" scikit-image numpy
    torchenv/bin/python benchmarks/hypergradients_torch.py

CPU builds of torch are enough. Each alternative gets the loosest tolerance, or the fewest steps, whose measured error
is at most the target; then all are timed in turn within each repeat, with one and with two threads, and the faster
counts. deepinv is given what makes it faster: the best constant step, no evaluation of the energy between iterations,
Anderson acceleration with a regularisation small enough for the target (its default stalls long before), and, in one
row, the momentum of a strongly convex problem as a list of FISTA's parameter ``a``.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import tuning  # noqa: E402
from benchmarks.hypergradients_torch_page import ENERGIES, render  # noqa: E402
from benchmarks.torch_alternatives import ANDERSON, ROWS, STEP_LIMIT, Found, Problem, Row, by_hand, libraries  # noqa: E402

NAME = "hypergradients_torch"
TITLE = "Hypergradients in PyTorch"
PACKAGES = ("torch", "deepinv", "torchvision", "numpy", "scikit-image")
# Of an independent solve (accelerated gradient to 1e-12, CG to 1e-13) that agrees with central differences.
PUBLISHED = {64: (-0.06102705117516, 0.24773792918776), 256: (-7.24933921446041, 4.73636325976029)}
FINEST = 1e-12

# ----------------------------------------------------------------------------------------------------------- measuring


class Entry(NamedTuple):
    run: Callable[[], Found]
    error: float
    settings: dict[str, Any]


def prepare(row: Row, problem: Problem, energy: str, target: float, exact: np.ndarray, known: dict) -> Entry:
    """The loosest tolerances on a grid of two per decade, or the fewest steps, with error at most ``target``.

    known: settings found for the same alternative with another energy, kept where they reach the target here too.
    """

    def error(*tuned) -> float:
        found = relative_error(row.make(problem, energy, *tuned)()[0], exact)
        gc.collect()  # an unfolded model and its graph refer to each other
        return found if math.isfinite(found) else math.inf

    if known:
        tuned = [known["steps"]] if "steps" in known else [known["tol"], known["adjoint_tol"]]
        tuned = tuned[:1] if row.tuned == "tolerance" else tuned
        reached = error(*tuned)
        if reached <= target:
            return Entry(row.make(problem, energy, *tuned), reached, known)
    if row.tuned == "steps":
        steps, reached = tuning.fewest(error, target, row.guess, STEP_LIMIT)
        return Entry(row.make(problem, energy, steps), reached, {"steps": steps})
    if row.tuned == "tolerances":
        tol, adjoint_tol, reached = tuning.tune(error, target, FINEST)
        settings = {"tol": tol, "adjoint_tol": adjoint_tol}
        return Entry(row.make(problem, energy, tol, adjoint_tol), reached, settings)
    if row.tuned == "tolerance":  # one for both
        tol, _, reached = tuning.tune(lambda tol, _: error(tol), target, FINEST)
        return Entry(row.make(problem, energy, tol), reached, {"tol": tol, "adjoint_tol": tol})
    return Entry(row.make(problem, energy), error(), {})


def relative_error(gradient, exact) -> float:
    return float(np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact))


def reference(problem: Problem, size: int) -> np.ndarray:
    """The published hypergradient, or for other sizes the one by hand at the smallest tolerances."""
    if size in PUBLISHED:
        return np.asarray(PUBLISHED[size])
    return by_hand(problem, "closed form", FINEST, FINEST)()[0]


def _on_threads(count: int, call: Callable) -> Callable:
    def run():
        libraries().torch.set_num_threads(count)
        return call()

    return run


def interleave(calls: dict[Any, Callable], repeats: int, seed: int) -> dict[Any, list[float]]:
    """Seconds per call: every repeat goes once round all of them in a new order, after one warm-up of each.

    A measurement is the mean over as many calls as take about 20 ms (at most 20), as in `benchmarks.common`.
    """
    order, seconds, inner = list(calls), {key: [] for key in calls}, {}
    for key, call in calls.items():
        call()
        inner[key] = min(20, math.ceil(0.02 / max(_seconds(call, 1), 1e-9)))
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for key in order:
            seconds[key].append(_seconds(calls[key], inner[key]))
    return seconds


def _seconds(call: Callable, times: int) -> float:
    gc.collect()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def spread(seconds: Sequence[float]) -> dict[str, float]:
    names = {"ms": 50, "ms_q1": 25, "ms_q3": 75, "ms_min": 0}
    found = {name: float(np.percentile(1e3 * np.asarray(seconds), q)) for name, q in names.items()}
    return found | {"repeats": len(seconds)}


def peak_bytes(call: Callable) -> int | None:
    """By how much resident memory rises at most during a call; Linux alone tells, elsewhere None."""
    try:
        import ctypes

        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls have freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest value so far
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (AttributeError, KeyError, OSError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * int(fields[name].split()[0])


def measure(args, size: int, common: dict) -> list[dict]:
    problem = Problem(size)
    exact = reference(problem, size)
    entries = {}
    for energy in args.energies:
        for name in args.rows:
            start = time.perf_counter()
            known = next((entry.settings for (other, _), entry in entries.items() if other == name), {})
            entries[name, energy] = entry = prepare(ROWS[name], problem, energy, args.target, exact, known)
            chosen = ", ".join(f"{k} {v:g}" for k, v in entry.settings.items())
            print(f"{size}: {name}, {energy}: error {entry.error:.1e} ({chosen}), tuned in "
                  f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    runs = {(key, n): _on_threads(n, entry.run) for key, entry in entries.items() for n in args.threads}
    seconds = interleave(runs, args.repeats, args.seed)
    rows = []
    for (name, energy), entry in entries.items():
        _, steps = entry.run()
        by_threads = {n: spread(seconds[(name, energy), n]) for n in args.threads}
        threads = min(by_threads, key=lambda n: by_threads[n]["ms"])
        kind = "unrolled" if ROWS[name].tuned == "steps" else "peer"
        case = {"row": name, "kind": kind, "energy": energy, "size": size, "batch": 1, "dtype": "float64"}
        figures = by_threads[threads] | {"ms_by_threads": {str(n): found["ms"] for n, found in by_threads.items()}}
        figures |= {"error": entry.error, "peak_bytes": peak_bytes(entry.run), **steps}
        settings = {"quick": args.quick, "threads": threads, "target": args.target}
        settings |= {"repeats": args.repeats, "reference": "published" if size in PUBLISHED else "own"}
        settings |= entry.settings
        if "Anderson" in name:
            settings |= {f"anderson_{key}": value for key, value in ANDERSON.items()}
        rows.append({**common, "case": case, "settings": settings, "figures": figures})
    return rows


# ------------------------------------------------------------------------------------------- records, as in common.py


def about_this_run(args, argv: Sequence[str]) -> dict[str, Any]:
    """The fields that all rows share; the command without paths that say nothing elsewhere."""
    typed = [Path(a).name if os.path.isabs(a) else a for a in argv]
    return {
        "benchmark": NAME,
        "command": shlex.join(["python", f"benchmarks/{NAME}.py", *typed]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": args.seed,
        "versions": _versions(),
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "x64": True,
    }


def _commit() -> str | None:
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "jbilevel", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    ours = re.search(r'__version__ = "(.*)"', (ROOT / "jbilevel" / "__init__.py").read_text(encoding="utf-8"))
    found = {"python": platform.python_version(), "jbilevel": ours[1]}
    modules = {"torchvision": "torchvision", "torch": "torch"}  # these tell their build, their metadata does not
    for name in PACKAGES:
        module = sys.modules.get(modules.get(name, ""))
        found[name] = getattr(module, "__version__", None) or importlib.metadata.version(name)
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: Path, rows: Sequence[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(path)


def _finite(value):
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------- main


def parse(argv: Sequence[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Needs torch, deepinv (at least 0.5), scikit-image and numpy, in an environment of its own.",
    )
    options.add_argument("--sizes", nargs="+", type=int, help="image sides in pixels (default: 64 256)")
    options.add_argument("--repeats", type=int, help="timed repetitions per row (default: 9)")
    options.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"some of: {'; '.join(ROWS)}")
    options.add_argument("--energies", nargs="+", choices=list(ENERGIES), help="how the energy is written")
    options.add_argument("--target", type=float, help="relative error asked for (default: 1e-6)")
    options.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="the fastest counts (default: 1 2)")
    options.add_argument("--seed", type=int, default=0, help="seed of the order of timing (default: 0)")
    options.add_argument("--quick", action="store_true", help="size 16, target 1e-2: checks that it runs")
    options.add_argument("--out", metavar="FILE", help=f"JSON lines (default: benchmarks/results/{NAME}.jsonl)")
    args = options.parse_args(argv)
    args.sizes = args.sizes or ([16] if args.quick else [64, 256])
    args.target = args.target or (1e-2 if args.quick else 1e-6)
    args.repeats = args.repeats or (2 if args.quick else 9)
    args.rows, args.energies = args.rows or list(ROWS), args.energies or list(ENERGIES)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    try:
        libraries().torch.set_num_threads(max(args.threads))
    except ImportError as error:
        usage = "\n".join(line for line in __doc__.splitlines() if line.startswith("    "))
        raise SystemExit(f"{error}. This benchmark runs in an environment of its own:\n\n{usage}") from error
    common = about_this_run(args, argv)
    path = Path(args.out) if args.out else ROOT / "benchmarks" / "results" / f"{NAME}.jsonl"
    rows = []
    for size in args.sizes:
        rows += measure(args, size, common)
        write(path, rows)
    print("\n" + render(rows))


if __name__ == "__main__":
    main()
