"""What all benchmarks share: options, data, timing, and the record format.

A benchmark is a script ``benchmarks/NAME.py`` (or ``benchmarks/papers/NAME.py``) that measures something, appends one
JSON line per row to ``benchmarks/results/NAME.jsonl`` through `Recorder`, and exports ``render(rows) -> markdown`` for
`benchmarks.report`. Options left out of the command line take the benchmark's defaults, or its quick ones.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jbilevel as jb

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PACKAGES = (
    "jax",
    "jaxlib",
    "numpy",
    "optax",
    "jaxopt",
    "optimistix",
    "lineax",
    "equinox",
    "flax",
    "scikit-image",
    "astra-toolbox",
)
# Photographs of scikit-image with at least 512 x 512 pixels; the first is the reference problem's.
LARGE = ("camera", "astronaut", "brick", "grass", "gravel", "moon", "ihc", "hubble_deep_field")
NOISE = 0.1


# ------------------------------------------------------------------------------------------------------------- options


def parser(description: str, *, defaults: Mapping[str, Any], quick: Mapping[str, Any]) -> argparse.ArgumentParser:
    """Options of every benchmark; ``defaults`` and ``quick`` name the values of options that were not given.

    A benchmark adds its own options with ``default=None`` and lists them in ``defaults`` (and ``quick``) too.
    """
    options = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    options.add_argument("--device", choices=("cpu", "gpu"), help="where to run (default: cpu)")
    options.add_argument("--dtype", nargs="+", choices=("float32", "float64"), help="floating types to measure")
    options.add_argument("--sizes", nargs="+", type=int, help="image sides in pixels")
    options.add_argument("--batch", nargs="+", type=int, help="numbers of images per call")
    options.add_argument("--repeats", type=int, help="timed repetitions per row (at least 5 to be reported)")
    options.add_argument("--images", metavar="DIR", help="folder of pictures (default: scikit-image's photographs)")
    options.add_argument("--seed", type=int, help="seed of noise, crops and order (default: 0)")
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes: checks that it runs")
    options.add_argument("--out", metavar="FILE", help="JSON lines (default: benchmarks/results/NAME.jsonl)")
    options.add_argument(
        "--keep", action="store_true", help="keep earlier rows of cases that this run does not measure"
    )
    common = {"device": "cpu", "dtype": ["float64"], "repeats": 9, "seed": 0}
    options.set_defaults(_defaults={**common, **defaults}, _quick=dict(quick))
    return options


def parse(options: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, fill in what was not given, keep the command as typed, and take the device."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = options.parse_args(argv)
    values = {**args._defaults, **(args._quick if args.quick else {})}
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    del args._defaults, args._quick
    args.argv = [_without_machine_path(a) for a in argv]
    take_device(args.device)
    return args


def take_device(name: str) -> None:
    """Use the CPU or a GPU for everything that follows; a missing GPU ends the program with a sentence."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise SystemExit(f"--device gpu: JAX could not start its backends: {error}") from error
    if found != "gpu":
        raise SystemExit(
            f"--device gpu: JAX sees no GPU, only {found!r}. Install jbilevel[cuda12] or jbilevel[cuda13] on a machine "
            "that has one, and unset JAX_PLATFORMS."
        )


def _without_machine_path(argument: str) -> str:
    """Absolute paths say nothing to a reader elsewhere: relative to the repository, or the last part alone."""
    if not os.path.isabs(argument):
        return argument
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def precision(dtype: str):
    """Context in which arrays are made, compiled and run in ``dtype`` as in a program that uses only that."""
    return jax.enable_x64(dtype == "float64")


def peer(name: str):
    """Import a library that is only compared with, or end the program naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"{name}, which this compares with, is missing: pip install 'jbilevel[test]'") from error


# ---------------------------------------------------------------------------------------------------------------- data


class Images(NamedTuple):
    """Clean images in [0, 1] and the same with white noise of standard deviation 0.1, (n, size, size) float64."""

    clean: np.ndarray
    noisy: np.ndarray


def images(size: int, count: int, folder: str | None = None) -> Images:
    """``count`` whole photographs resized to ``size``; the first is the reference problem's.

    The reference problem is scikit-image's camera()/255, resized with anti-aliasing, plus 0.1 times
    ``numpy.random.default_rng(0).standard_normal``; image number i takes its noise from ``default_rng(i)``. Beyond
    scikit-image's photographs come crops of them.
    """
    from skimage.transform import resize

    whole = _squares(min(count, len(LARGE)) if folder is None else count, folder)
    clean = np.stack([resize(image, (size, size), anti_aliasing=True) for image in whole])
    if count > len(clean):
        clean = np.concatenate([clean, crops(size, count - len(clean)).clean])
    noise = np.stack([np.random.default_rng(i).standard_normal((size, size)) for i in range(count)])
    return Images(clean, clean + NOISE * noise)


def crops(size: int, count: int, folder: str | None = None, seed: int = 0) -> Images:
    """``count`` crops of ``size`` pixels at random positions, taken in turn from the photographs."""
    sources = _squares(None, folder, at_least=size)
    rng = np.random.default_rng(seed)
    clean = np.concatenate([jb.data.crops(sources[i % len(sources)], size, 1, rng) for i in range(count)])
    return Images(clean, clean + NOISE * rng.standard_normal(clean.shape))


def _squares(count: int | None, folder: str | None, at_least: int = 1) -> list[np.ndarray]:
    if folder is None:
        return list(jb.data.photographs(512, LARGE[:count], dtype=np.float64))
    found = jb.data.image_folder(folder, limit=count, dtype=np.float64).images
    squares = [jb.data.centre_crop(image, min(image.shape[-2:])) for image in found]
    squares = [image for image in squares if image.shape[0] >= at_least]
    if not squares or (count is not None and len(squares) < count):
        raise SystemExit(f"--images: {len(squares)} pictures are large enough, {count or 1} are needed")
    return squares


# -------------------------------------------------------------------------------------------------------------- timing


class Compiled(NamedTuple):
    """A function compiled ahead of time for fixed shapes, the seconds that took, and its temporary memory."""

    call: Callable
    seconds: float
    temp_bytes: int | None


def compile_apart(function: Callable, *arguments) -> Compiled:
    """Trace and compile without running."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    try:
        temp = int(compiled.memory_analysis().temp_size_in_bytes)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # not every backend tells
        temp = None
    return Compiled(compiled, seconds, temp)


def interleave(calls: Mapping[str, Callable[[], Any]], repeats: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of each entry: every repeat goes once round all of them, in a new random order.

    A slow phase of the machine then hits all alternatives, so that ratios stay fair. Each call is warmed up once, and
    one measurement is the mean over as many calls as take about 20 ms (at most 20).
    """
    inner, order, seconds = {}, list(calls), {name: [] for name in calls}
    for name, call in calls.items():
        jax.block_until_ready(call())
        inner[name] = min(20, math.ceil(0.02 / max(_seconds(call, 1), 1e-9)))
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(_seconds(calls[name], inner[name]))
    return seconds


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        jax.block_until_ready(call())
    return (time.perf_counter() - start) / times


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and minimum in milliseconds, and every measurement."""
    milliseconds = 1e3 * np.asarray(seconds)
    names = {"ms": 50, "ms_q1": 25, "ms_q3": 75, "ms_min": 0}
    summary = {name: float(np.percentile(milliseconds, q)) for name, q in names.items()}
    return summary | {"repeats": len(seconds), "times_ms": [float(f"{t:.4g}") for t in milliseconds]}


def times_faster(figures: Mapping[str, Any], than: Mapping[str, Any]) -> float:
    """Median ratio of the times of two interleaved rows, repeat by repeat: slow phases of the machine cancel."""
    return float(np.median(np.divide(all_times(than), all_times(figures))))


def all_times(figures: Mapping[str, Any]) -> list[float]:
    """Every measurement of a row; of rows recorded without them, their median."""
    return figures.get("times_ms", [figures["ms"]])


# ------------------------------------------------------------------------------------------------------------- records


class Recorder:
    """Collects the rows of one run of a benchmark and writes them as JSON lines.

    `write` replaces the rows that an earlier run left for the same benchmark and device (with ``--keep`` those of the
    same cases only), and may be called after every case, so that an interrupted run keeps what it has measured.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace, script: str | None = None):
        self.path = Path(args.out) if args.out else RESULTS / f"{benchmark}.jsonl"
        self.rows: list[dict] = []
        self.keep = args.keep
        self.common = {
            "benchmark": benchmark,
            "command": shlex.join(["python", script or f"benchmarks/{benchmark}.py", *args.argv]),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": args.seed,
            "versions": versions(),
            **machine(),
        }
        left_out = {"argv", "out", "keep", "seed", "device"}
        self.options = {
            k: _without_machine_path(v) if isinstance(v, str) else v for k, v in vars(args).items() if k not in left_out
        }
        if args.images:
            self.options["images"] = Path(args.images).name

    def add(
        self, case: Mapping[str, Any], figures: Mapping[str, Any], settings: Mapping[str, Any] | None = None
    ) -> dict:
        """One row: ``case`` says which, ``figures`` what was measured, ``settings`` what else was set for this row."""
        row = {
            **self.common,
            "x64": bool(jax.config.jax_enable_x64),
            "case": dict(case),
            "settings": {**self.options, **(settings or {})},
            "figures": dict(figures),
        }
        row = _plain(row)
        self.rows.append(row)
        return row

    def kept(self, case: Mapping[str, Any]) -> bool:
        """Whether an earlier run measured this case and ``--keep`` spares doing it again."""
        old = read_rows(self.path) if self.keep and self.path.exists() else []
        return any(_device(row) == _device(self.common) and row["case"] == _plain(case) for row in old)

    def write(self) -> None:
        measured = [row["case"] for row in self.rows]
        old = read_rows(self.path) if self.path.exists() else []
        kept = [
            row
            for row in old
            if (row["benchmark"], _device(row)) != (self.common["benchmark"], _device(self.common))
            or (self.keep and row["case"] not in measured)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in kept + self.rows), encoding="utf-8")
        draft.replace(self.path)


def recorder_of(page: str, script: str, args: argparse.Namespace) -> Recorder:
    """For one of several scripts whose rows stand on one page, in its file unless ``--out`` says otherwise."""
    args.out = args.out or RESULTS / f"{page}.jsonl"
    return Recorder(f"{page}: {script}", args, script=f"benchmarks/{script}.py")


def run(script: str, options: argparse.ArgumentParser, measure, render, figures=None, argv=None) -> None:
    """All of a script that measures in one precision: ``measure(args, recorder)``, print its section, draw its figures.

    ``script`` is the path below benchmarks/, without .py. Rows that went elsewhere (``--out``) are not drawn.
    """
    args = parse(options, argv)
    recorder = Recorder(Path(script).name, args, script=f"benchmarks/{script}.py")
    with precision(args.dtype[0]):
        measure(args, recorder)
        recorder.write()
        ours = recorder.common["benchmark"], _device(recorder.common)  # of a file that several benchmarks may share
        rows = [row for row in read_rows(recorder.path) if (row["benchmark"], _device(row)) == ours]
        print(render(rows))
        if figures is not None and args.out is None:
            figures(rows, FIGURES)


def read_rows(path: Path) -> list[dict]:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _device(row: Mapping[str, Any]) -> tuple:
    return row["device"]["platform"], row["device"]["kind"]


def _plain(value):
    """JSON has no arrays and neither NaN nor infinity: lists, None and "inf"."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def as_lists(params: Any) -> Any:
    """Params as lists for JSON, with seven decimals."""
    return jax.tree.map(lambda leaf: np.round(np.asarray(leaf, np.float64), 7).tolist(), params)


def as_arrays(params: Any) -> Any:
    """Params that `as_lists` wrote, in the default floating type."""
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(leaf, float), params, is_leaf=lambda leaf: isinstance(leaf, list)
    )


def number(value) -> float:
    """The number that a figure of a JSON line stands for."""
    return math.nan if value is None else float(value)


def machine() -> dict[str, Any]:
    """Device, processor and cores; no host name."""
    device = jax.devices()[0]
    return {
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jbilevel": jb.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Short hash of HEAD, with "+changes" when library or benchmarks differ from it; None outside a git checkout."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "jbilevel", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ------------------------------------------------------------------------------------------------------------ markdown


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; the first column is left-aligned, all others right-aligned."""
    rules = [":--"] + ["--:"] * (len(header) - 1)
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in (header, rules, *rows)]
    return "\n".join(lines) + "\n"


def scientific(value, digits: int = 1) -> str:
    """A number to read in a table: 3.2e-7, 'inf', or a dash for one that was not measured."""
    value = number(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def rounded(value, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, without exponent."""
    value = number(value)
    if math.isnan(value) or math.isinf(value):
        return "–" if math.isnan(value) else f"{value:g}"
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}"


def whole(value) -> str:
    """A count, which may be a mean over images."""
    value = number(value)
    return "–" if math.isnan(value) else f"{value:.0f}"
