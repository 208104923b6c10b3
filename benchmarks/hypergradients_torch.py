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
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import tuning  # noqa: E402

NAME = "hypergradients_torch"
TITLE = "Hypergradients in PyTorch"
PACKAGES = ("torch", "deepinv", "torchvision", "numpy", "scikit-image")
THETA = (-2.5, -4.0)
# Of an independent solve (accelerated gradient to 1e-12, CG to 1e-13) that agrees with central differences.
PUBLISHED = {64: (-0.06102705117516, 0.24773792918776), 256: (-7.24933921446041, 4.73636325976029)}
NOISE = 0.1
SMOOTHNESS = 1 + 8 * math.exp(THETA[0] - THETA[1])  # and strong convexity 1
GD_STEP = 2 / (SMOOTHNESS + 1)
ROOT_CONDITION = math.sqrt(SMOOTHNESS)
STEP_LIMIT = 400  # of unrolling, as in benchmarks.hypergradients
MOST_ITERATIONS = 1000  # of everything that stops by a tolerance
FINEST = 1e-12
ANDERSON = {"history": 10, "beta": 1.0, "eps": 1e-18}
ENERGIES = {"autograd": "energy by its value", "closed form": "gradient by hand"}

# ----------------------------------------------------------------------------------------------------------- libraries


@cache
def libraries() -> SimpleNamespace:
    """torch and deepinv, or the end of the program with what to install."""
    try:
        import torch

        _declare_vision_operators(torch)
        import deepinv
        import deepinv.optim
        import skimage  # noqa: F401
    except ImportError as error:
        usage = "\n".join(line for line in __doc__.splitlines() if line.startswith("    "))
        raise SystemExit(f"{error}. This benchmark runs in an environment of its own:\n\n{usage}") from error
    if not hasattr(deepinv.optim, "SmoothedTVPrior"):
        raise SystemExit(f"deepinv {deepinv.__version__} has no SmoothedTVPrior: pip install 'deepinv>=0.5'")
    torch.set_default_dtype(torch.float64)  # deepinv rounds the step of proximal operators to the default type
    return SimpleNamespace(torch=torch, deepinv=deepinv, optim=deepinv.optim)


def _declare_vision_operators(torch) -> None:
    """Let deepinv import a torchvision whose compiled operators do not fit this torch (a CUDA build, say).

    Such a torchvision fails while it describes two operators that torch has not heard of. deepinv imports it for its
    transforms; nothing measured here calls an operator of it, so that declaring the two is enough.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declare_vision_operators.library = library  # the declarations last as long as this object


# ------------------------------------------------------------------------------------------------------------- problem


class Problem:
    """Image, noisy image, and the energy as its value or with its gradient in closed form; tensors (1, 1, n, n)."""

    def __init__(self, size: int):
        from skimage.data import camera
        from skimage.transform import resize

        self.torch = libraries().torch
        clean = resize(camera() / 255, (size, size), anti_aliasing=True)
        noisy = clean + NOISE * np.random.default_rng(0).standard_normal((size, size))
        self.clean, self.y = (self.torch.from_numpy(image)[None, None] for image in (clean, noisy))
        self.theta = self.torch.tensor(THETA, dtype=self.torch.float64)

    def loss(self, x):
        return 0.5 * ((x - self.clean) ** 2).sum()

    def differences(self, x):
        pad = self.torch.nn.functional.pad
        return pad(x.diff(dim=-2), (0, 0, 0, 1)), pad(x.diff(dim=-1), (0, 1))

    def regulariser(self, theta, x):
        down, right = self.differences(x)
        return theta[0].exp() * self.torch.sqrt(down**2 + right**2 + (2 * theta[1]).exp()).sum(dim=(1, 2, 3))

    def energy(self, theta, x):
        return 0.5 * ((x - self.y) ** 2).sum() + self.regulariser(theta, x).sum()

    def gradient_closed(self, theta, x):
        pad = self.torch.nn.functional.pad
        down, right = self.differences(x)
        root = self.torch.sqrt(down**2 + right**2 + (2 * theta[1]).exp())
        down, right = (down / root)[..., :-1, :], (right / root)[..., :-1]
        adjoint = pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1)) + pad(right, (1, 0)) - pad(right, (0, 1))
        return x - self.y + theta[0].exp() * adjoint

    def gradient_autograd(self, theta, x):
        """Differentiable itself where the caller's graph asks for that, and then also in theta."""
        keep = self.torch.is_grad_enabled()
        with self.torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (gradient,) = self.torch.autograd.grad(self.energy(theta, x), x, create_graph=keep)
        return gradient

    def gradient(self, energy: str) -> Callable:
        return self.gradient_closed if energy == "closed form" else self.gradient_autograd


# -------------------------------------------------------------------------------------------------------- alternatives

Found = tuple[np.ndarray, dict[str, float]]  # hypergradient, and iterations as {"lower": ..., "adjoint": ...}


def by_hand(problem: Problem, energy: str, tol: float, adjoint_tol: float) -> Callable[[], Found]:
    """FISTA until the gradient is ``tol`` of the first, CG with autograd's Hessian until its residual is as small."""
    torch, gradient = problem.torch, problem.gradient(energy)
    beta = (ROOT_CONDITION - 1) / (ROOT_CONDITION + 1)

    def lower(theta):
        x = z = problem.y
        g, steps = gradient(theta, z), 0
        goal = tol * float(g.norm())
        while float(g.norm()) > goal and steps < MOST_ITERATIONS:
            x, before = z - g / SMOOTHNESS, x
            z = x + beta * (x - before)
            g, steps = gradient(theta, z), steps + 1
        return z, steps

    def solve(product, right):
        q, residual = torch.zeros_like(right), right
        direction, square, steps = residual, float((residual**2).sum()), 0
        goal = adjoint_tol**2 * square
        while square > goal and steps < MOST_ITERATIONS:
            image = product(direction)
            step = square / float((direction * image).sum())
            q = q + step * direction
            residual = residual - step * image
            square, before = float((residual**2).sum()), square
            direction, steps = residual + (square / before) * direction, steps + 1
        return q, steps

    def hypergradient() -> Found:
        with torch.no_grad():
            z, steps = lower(problem.theta)
        x, theta = z.detach().requires_grad_(), problem.theta.clone().requires_grad_()
        g = gradient(theta, x)  # one graph serves all products with the Hessian
        product = lambda v: torch.autograd.grad(g, x, v, retain_graph=True)[0]  # noqa: E731
        q, adjoint_steps = solve(product, z - problem.clean)
        (cross,) = torch.autograd.grad(g, theta, q)
        return -cross.numpy(), {"lower": steps, "adjoint": adjoint_steps}

    return hypergradient


def unrolled(problem: Problem, energy: str, steps: int) -> Callable[[], Found]:
    """Backpropagation through FISTA with the same momentum."""
    gradient = problem.gradient(energy)
    beta = (ROOT_CONDITION - 1) / (ROOT_CONDITION + 1)

    def hypergradient() -> Found:
        theta = problem.theta.clone().requires_grad_()
        x = z = problem.y
        for _ in range(steps):
            x, before = z - gradient(theta, z) / SMOOTHNESS, x
            z = x + beta * (x - before)
        (found,) = problem.torch.autograd.grad(problem.loss(x), theta)
        return found.numpy(), {"lower": steps}

    return hypergradient


@cache
def priors() -> dict[str, type]:
    """deepinv priors with trainable theta: one given by its value, one built on deepinv's own closed-form gradient."""
    libs = libraries()
    torch = libs.torch

    class TV(libs.optim.Prior):
        def __init__(self, problem):
            super().__init__()
            self.explicit_prior = True
            self.theta = torch.nn.Parameter(problem.theta.clone())
            self.value = problem.regulariser
            self.gradients = 0

        def fn(self, x, *args, **kwargs):
            return self.value(self.theta, x)

        def grad(self, x, *args, **kwargs):
            self.gradients += 1
            return super().grad(x, *args, **kwargs)

    class ClosedTV(libs.optim.SmoothedTVPrior):
        def __init__(self, problem):
            super().__init__()
            self.theta = torch.nn.Parameter(problem.theta.clone())
            self.gradients = 0

        def fn(self, x, *args, **kwargs):
            self.eps = self.theta[1].exp()
            return self.theta[0].exp() * super().fn(x)

        def grad(self, x, *args, **kwargs):
            self.gradients += 1
            self.eps = self.theta[1].exp()
            return self.theta[0].exp() * super().grad(x)

    return {"autograd": TV, "closed form": ClosedTV}


def _deepinv(problem: Problem, energy: str, build: Callable) -> Callable[[], Found]:
    """A step of deepinv training: reconstruct, evaluate the loss, backpropagate to the prior's parameters."""
    libs = libraries()
    prior, physics = priors()[energy](problem), libs.deepinv.physics.Denoising()
    shared = {"data_fidelity": libs.optim.L2(), "prior": prior, "trainable_params": []}
    model = build(libs.optim, cost_fn=lambda *_: None, **shared)  # otherwise each iteration evaluates the energy too
    backward = _count_checks(model) if model.DEQ else None

    def hypergradient() -> Found:
        prior.theta.grad, prior.gradients = None, 0
        if backward:
            backward.clear()
        problem.loss(model(problem.y, physics)).backward()
        steps = {"lower": prior.gradients}
        if backward is not None:  # two more gradients are taken after the last iteration
            steps = {"lower": prior.gradients - 2, "adjoint": 2 + len(backward)}
        return prior.theta.grad.numpy().copy(), steps

    return hypergradient


def _count_checks(model) -> list:
    """Grows by one with each check of the backward iteration, which deepinv does not count; the first two have none.

    The forward iteration keeps the method that it was given when it was built.
    """
    seen, check = [], model.check_conv_fn

    def counting(*arguments):
        seen.append(None)
        return check(*arguments)

    model.check_conv_fn = counting
    return seen


def unfolded_gd(problem: Problem, energy: str, steps: int) -> Callable[[], Found]:
    build = lambda optim, **shared: optim.GD(stepsize=GD_STEP, max_iter=steps, unfold=True, **shared)  # noqa: E731
    return _deepinv(problem, energy, build)


def unfolded_fista(problem: Problem, energy: str, steps: int, constant: bool = False) -> Callable[[], Found]:
    """Gradient step on the prior, proximal step on the data fidelity; its momentum is 1 - 1 / (k + a)."""
    step = 1 / (SMOOTHNESS - 1)
    ratio = math.sqrt(step / (1 + step))
    momentum = (1 - ratio) / (1 + ratio)
    a = [1 / (1 - momentum) - k for k in range(steps)] if constant else 3
    params = {"stepsize": step, "lambda": 1.0, "g_param": None, "a": a}

    def build(optim, **shared):
        return optim.FISTA(g_first=True, max_iter=steps, unfold=True, params_algo=params, **shared)

    return _deepinv(problem, energy, build)


def equilibrium(problem: Problem, energy: str, tol: float, anderson: bool = False) -> Callable[[], Found]:
    """DEQ=True: gradient descent to a fixed point, and a fixed-point iteration for the adjoint."""

    def build(optim, **shared):
        backward, forward = {"max_iter_backward": MOST_ITERATIONS}, None
        if anderson:
            forward = optim.AndersonAccelerationConfig(ANDERSON["history"], ANDERSON["beta"], ANDERSON["eps"])
            backward |= {f"{name}_backward": ANDERSON[name] for name in ("beta", "eps")}
            backward |= {"anderson_acceleration_backward": True, "history_size_backward": ANDERSON["history"]}
        stop = {"early_stop": True, "thres_conv": tol, "max_iter": MOST_ITERATIONS}
        deq = optim.DEQConfig(**backward)
        return optim.GD(stepsize=GD_STEP, DEQ=deq, anderson_acceleration=forward, **stop, **shared)

    return _deepinv(problem, energy, build)


def equilibrium_defaults(problem: Problem, energy: str) -> Callable[[], Found]:
    """DEQ=True and nothing else: 100 iterations, then at most 50 for the adjoint."""
    return _deepinv(problem, energy, lambda optim, **shared: optim.GD(stepsize=GD_STEP, DEQ=True, **shared))


class Row(NamedTuple):
    make: Callable[..., Callable[[], Found]]  # of problem, energy and what is tuned
    tuned: str  # "tolerances", "tolerance", "steps" or "nothing"
    guess: int = 130  # of steps


ROWS = {
    "torch, FISTA + CG": Row(by_hand, "tolerances"),
    "torch, unrolled FISTA": Row(unrolled, "steps"),
    "deepinv, DEQ": Row(equilibrium, "tolerance"),
    "deepinv, DEQ, Anderson": Row(partial(equilibrium, anderson=True), "tolerance"),
    "deepinv, DEQ, defaults": Row(equilibrium_defaults, "nothing"),
    "deepinv, unfolded GD": Row(unfolded_gd, "steps", 290),
    "deepinv, unfolded FISTA": Row(unfolded_fista, "steps", STEP_LIMIT),
    "deepinv, unfolded FISTA, constant momentum": Row(partial(unfolded_fista, constant=True), "steps"),
}

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


# ------------------------------------------------------------------------------------------------------------ markdown


def render(rows: Sequence[dict], ours: Sequence[dict] = ()) -> str:
    """Markdown of these rows; ``ours``, rows of `benchmarks.hypergradients`, adds how they compare."""
    first = rows[0]
    versions, settings = first["versions"], first["settings"]
    threads = dict.fromkeys(n for row in rows for n in row["figures"]["ms_by_threads"])
    parts = [
        f"The same problem in PyTorch {versions['torch']} and deepinv {versions['deepinv']}, float64, one image, "
        f"cold start at y; number of threads: {' or '.join(threads)}, whichever is faster. **Error**: relative 2-norm "
        "distance to the reference. What has a tolerance has the loosest on a grid of two per decade that reaches the "
        f"target ({settings['target']:.0e}), what is unrolled the fewest steps, at most {STEP_LIMIT}; rows above the "
        "target are the best that was reached. *Energy by its value*: a torch function that autograd differentiates; "
        "*gradient by hand*: deepinv's SmoothedTVPrior, or the same formula. Times are medians with quartiles. "
        "*Memory*: how much resident memory rises at most during a call. *Constant momentum*: the strongly convex "
        "problem's, which deepinv's FISTA takes as a list of its parameter a.\n"
    ]
    for size in dict.fromkeys(row["case"]["size"] for row in rows):
        here = [row for row in rows if row["case"]["size"] == size]
        parts += [f"### {size} x {size}, PyTorch\n", _table(here), _conclusion(here, size, ours)]
    return "\n".join(parts)


def _table(rows: Sequence[dict]) -> str:
    energies = [e for e in ENERGIES if any(row["case"]["energy"] == e for row in rows)]
    header = ["", *(f"ms, {ENERGIES[e]}" for e in energies), "error", "iterations", "memory MB", "tolerance or steps"]
    lines = [header, [":--"] + ["--:"] * (len(header) - 1)]
    for name in dict.fromkeys(row["case"]["row"] for row in rows):
        found = {row["case"]["energy"]: row for row in rows if row["case"]["row"] == name}
        lines.append([name, *(_time(found.get(e)) for e in energies), *_cells(next(iter(found.values())))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _time(row: dict | None) -> str:
    if row is None:
        return "–"
    return "{} ({}–{})".format(*(_rounded(row["figures"][k]) for k in ("ms", "ms_q1", "ms_q3")))


def _cells(row: dict) -> list[str]:
    figures, settings = row["figures"], row["settings"]
    error, peak = float(figures["error"]), figures["peak_bytes"]
    chosen = f"{settings['steps']} steps" if "steps" in settings else "defaults"
    if "tol" in settings:
        chosen = " / ".join(dict.fromkeys(f"{settings[k]:.1e}" for k in ("tol", "adjoint_tol")))
    steps = " + ".join(str(figures[k]) for k in ("lower", "adjoint") if k in figures)
    return [f"{error:.1e}", steps, "–" if peak is None else _rounded(peak / 1e6), chosen]


def _rounded(value: float) -> str:
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, digits)}f}"


def _conclusion(rows: Sequence[dict], size: int, ours: Sequence[dict]) -> str:
    """The fastest on target: of deepinv, by hand, and of jbilevel where its rows were handed over."""
    good = [row for row in rows if float(row["figures"]["error"]) <= row["settings"]["target"]]
    best = {}
    for library in ("deepinv", "torch"):
        own = [row for row in good if row["case"]["row"].startswith(library)]
        if own:
            best[library] = min(own, key=lambda row: row["figures"]["ms"])
    lines = [f"- Fastest of {library}: {_named(row)}." for library, row in best.items()]
    fastest = _fastest_of_ours(ours, size)
    if fastest is not None:
        times = {library: row["figures"]["ms"] / fastest["figures"]["ms"] for library, row in best.items()}
        ratios = [f"the fastest of {library} **{ratio:.1f} times** as long" for library, ratio in times.items()]
        lines.append(f"- jbilevel takes {', '.join([_named(fastest), *ratios])}.")
    return "\n".join(lines) + "\n"


def _named(row: dict) -> str:
    return f"{_rounded(row['figures']['ms'])} ms ({row['case']['row']}, {row['case']['energy']})"


def _fastest_of_ours(rows: Sequence[dict], size: int) -> dict | None:
    """Cold, on target, one image in float64 on a CPU, with the energy that the user wrote."""
    wanted = {"kind": "jbilevel", "energy": "user", "size": size, "batch": 1, "dtype": "float64"}
    found = [
        row
        for row in rows
        if wanted.items() <= row["case"].items()
        and row["device"]["platform"] == "cpu"
        and "warm" not in row["case"]["row"]
        and "ms" in row["figures"]
        and float(row["figures"]["error"]) <= row["settings"]["target"]
    ]
    return min(found, key=lambda row: row["figures"]["ms"]) if found else None


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
    libraries().torch.set_num_threads(max(args.threads))
    common = about_this_run(args, argv)
    path = Path(args.out) if args.out else ROOT / "benchmarks" / "results" / f"{NAME}.jsonl"
    rows = []
    for size in args.sizes:
        rows += measure(args, size, common)
        write(path, rows)
    print("\n" + render(rows))


if __name__ == "__main__":
    main()
