"""TV denoising with two learned parameters as in Ehrhardt 2025: MAID, HOAG, fixed accuracies, photographs, momentum.

Work counts gradient-equivalents: every value, gradient and Hessian product of the lower level counts one. Upper-level
values are computed again afterwards at the parameters that a method visited, by tight solves that are not counted.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common
from benchmarks.papers import ehrhardt_2025_tv_page
from jbilevel._core.results import Hypergradient, Value

NAME = "ehrhardt_2025_tv"
TITLE = "Ehrhardt 2025: TV denoising, MAID against HOAG and fixed accuracies"
PARTS = ("convergence", "photographs", "momentum")
# optimum of the reference problem, from BFGS on hypergradients solved to 1e-10
BEST = 3.16810134713
STARTS = ((-5.0, -5.0), (-2.5, -4.0))
FIRST_TOLERANCES = (1e1, 1e0, 1e-1, 1e-3, 1e-5)
FIXED_TOLERANCES = (1e-1, 1e-3, 1e-5)
RATES = {"adam": (0.03, 0.1, 0.3), "gradient descent": (0.05, 0.15, 0.25)}
OPTIMISERS = {"adam": optax.adam, "gradient descent": optax.sgd}
SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
MAID_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "corrected": {"oracle": {"correct": True}},
    "certified": {"certified": True},
    "certified, corrected": {"certified": True, "oracle": {"correct": True}},
    "paper": {"rule": "paper"},
    "window 0.85": {"window": 0.85},
    "paper, window 0.85": {"rule": "paper", "window": 0.85},
}
GAPS = (0.01, 0.001)

# -------------------------------------------------------------------------------------------------- counted work


class _CountedHypergradient(Hypergradient):
    __slots__ = ()

    @property
    def work(self):
        return jnp.stack([super().work, jnp.sum(self.lower.work)])


class _CountedValue(Value):
    __slots__ = ()

    @property
    def work(self):
        return jnp.stack([super().work, jnp.sum(self.lower.work)])


@dataclass(frozen=True)
class Counting(jb.implicit.Oracle):
    """The implicit oracle whose work is a pair: everything, and the lower-level solves alone."""

    def __call__(self, *arguments, **options):
        return _CountedHypergradient(*super().__call__(*arguments, **options))

    def value(self, *arguments, **options):
        return _CountedValue(*super().value(*arguments, **options))


# ---------------------------------------------------------------------------------------------------- convergence


class Setting(NamedTuple):
    """A lower-level problem, its batch, and the loss."""

    problem: Any
    batch: dict
    loss: Any


def reference(size: int, folder: str | None = None) -> Setting:
    """The one-image problem: camera() at ``size`` pixels with noise 0.1, isotropic smoothed TV, both scales learned."""
    pair = common.images(size, 1, folder)
    batch = {"x": jnp.asarray(pair.clean), "y": jnp.asarray(pair.noisy)}
    return Setting(jb.variational(None, jb.regularizers.SmoothedTV()), batch, jb.losses.squared_error())


class Trace(NamedTuple):
    """One run, after each step: cumulative work, lower-level work, accuracy, params, seconds without compilation."""

    work: np.ndarray
    lower: np.ndarray
    tol: np.ndarray
    params: np.ndarray
    seconds: np.ndarray
    done: bool


def run(method, state, batch, *, budget: float, stop) -> Trace:
    """Steps until ``budget`` gradient-equivalents, the method is done, or ``stop(step, work, state, info)``.

    Only the steps are timed, not what ``stop`` computes.
    """
    jax.block_until_ready(method.step(state, batch))  # compile
    rows, work, seconds, done = [], np.zeros(2), 0.0, False
    while not done and work[0] < budget:
        start = time.perf_counter()
        state, info = jax.block_until_ready(method.step(state, batch))
        seconds += time.perf_counter() - start
        work = work + np.asarray(info.work)
        rows.append((*work, float(info.tol), np.asarray(state.params), seconds))
        done = bool(info.done) or not np.isfinite(float(info.value))
        done = done or stop(len(rows) - 1, work[0], state, info)
    total, lower, tol, params, seconds = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(total, lower, tol, params, seconds, bool(info.done))


class Observer:
    """Exact values along a run, seen by the stop rule alone: at the first 30 steps, then at every 1.5 % of work."""

    def __init__(self, exact, goal: float):
        self.exact, self.goal = exact, goal
        self.steps: list[int] = []
        self.values: list[float] = []
        self.last = 0.0

    def __call__(self, step, work, state, info) -> bool:
        if step >= 30 and work < 1.015 * self.last:
            return False
        self.last = work
        self.steps.append(step)
        self.values.append(self.exact(state.params) if np.all(np.isfinite(state.params)) else np.inf)
        return self.values[-1] <= self.goal


class Exact:
    """Upper-level values by solves to 1e-10, each from the last solution."""

    def __init__(self, setting: Setting):
        self.oracle = jb.implicit.Oracle(setting.problem, setting.loss, estimate=False, max_steps=20_000)
        self.batch, self.warm = setting.batch, None

    def __call__(self, params) -> float:
        found = self.oracle.value(jnp.asarray(params), self.batch, self.warm, tol=1e-10)
        jb.check(found)
        self.warm = found.warm
        return float(found.value)


def record(recorder, case: dict, trace: Trace, seen: Observer, best: float, settings: dict) -> None:
    """One row: the trace with exact values, and the work, lower-level work and seconds to 1 % and 0.1 % of f*."""
    steps, values = np.array(seen.steps), np.array(seen.values)
    figures: dict[str, Any] = {
        "work": trace.work[steps], "value": values, "tol": trace.tol[steps], "params": trace.params[-1],
        "gap": values.min() / best - 1, "total_work": trace.work[-1], "steps": len(trace.work),
        "seconds": trace.seconds[-1], "done": trace.done,
    }  # fmt: skip
    for gap in GAPS:
        hit = np.flatnonzero(values <= (1 + gap) * best)
        for name in ("work", "lower", "seconds"):
            figures[f"{name}_to_{gap:g}"] = getattr(trace, name)[steps[hit[0]]] if hit.size else None
    recorder.add(case, figures, settings)


def target(args, setting: Setting, exact: Exact) -> float:
    """f*, known for the reference problem; for other images the best value of one long run of MAID."""
    if args.sizes[0] == 64 and not args.images:
        return BEST
    method = jb.MAID(Counting(setting.problem, setting.loss))
    state = method.init(jnp.array([-2.5, -5.0]), setting.batch)
    trace = run(method, state, setting.batch, budget=args.budget, stop=lambda *_: False)
    return exact(trace.params[-1])


def convergence(args, recorder) -> None:
    setting = reference(args.sizes[0], args.images)
    exact = Exact(setting)
    best = target(args, setting, exact)
    for start in STARTS:
        for case, method, state, settings in _methods(args, setting, jnp.array(start)):
            seen = Observer(exact, (1 + GAPS[-1]) * best)
            trace = run(method, state, setting.batch, budget=args.budget, stop=seen)
            record(recorder, {**case, "start": start}, trace, seen, best, settings)
            recorder.write()


def _methods(args, setting: Setting, params):
    """(case, method, first state, settings) of every run from ``params``; equal methods share their compiled step."""
    batch = setting.batch
    for variant in args.variants:
        options = dict(MAID_OPTIONS[variant])
        oracle = Counting(setting.problem, setting.loss, loss_smoothness=1.0, **options.pop("oracle", {}))
        method = jb.MAID(oracle, **options)
        for tol in (None, *(args.first if variant in ("default", "certified", "corrected") else ())):
            state = jb.MAID(oracle, tol=tol, adjoint_tol=tol, **options).init(params, batch)
            yield {"method": "MAID", "variant": variant, "tol": tol}, method, state, {}
    plain = Counting(setting.problem, setting.loss, estimate=False)
    for schedule in args.schedules:
        method = jb.HOAG(plain, schedule, rule="pedregosa")
        yield {"method": "HOAG", "variant": schedule, "tol": None}, method, method.init(params, batch), {}
    for name, rates in RATES.items():
        optimizer = optax.inject_hyperparams(OPTIMISERS[name])(learning_rate=0.1)
        method = jb.FirstOrder(plain, optimizer, tol=1e-3, adjoint_tol=1e-3)
        first = method.init(params, batch)
        for tol in args.fixed:
            for rate in rates if not args.quick else rates[1:2]:
                optimizer = first.optimizer._replace(hyperparams={"learning_rate": jnp.asarray(rate)})
                fixed = jnp.asarray(tol)
                state = replace(first, optimizer=optimizer, tol=fixed, adjoint_tol=fixed)
                yield {"method": name, "variant": f"rate {rate:g}", "tol": tol}, method, state, {"rate": rate}


# ---------------------------------------------------------------------------------------------------- photographs

PHOTOGRAPH_STARTS = ((-5.0, -5.0), (-2.5, -4.0), (0.0, 0.0))
LEARNED = jb.regularizers.SmoothedTV(eps_min=1e-3)
FIXED = jb.regularizers.SmoothedTV(eps=1e-3)
GRID = (0.06, 0.0665, 0.073, 0.08, 0.0896)


def photograph_pairs(args, folder: str | None = None) -> dict[str, np.ndarray]:
    """Clean and noisy crops of scikit-image's photographs, or of a folder's pictures, as float32."""
    size = args.photograph_size
    if folder is None:
        clean = jb.data.photographs(size, jb.data.PHOTOGRAPHS[: args.photographs])
    else:
        clean = jb.data.image_folder(folder, size=size, limit=args.photographs).images
    return {"x": clean, "y": jb.data.gaussian(np.random.default_rng(args.seed), clean, 0.1)}


def psnr(regularizer, params, batch, tol: float = 1e-2) -> float:
    """PSNR of the mean squared error of the denoised images, in float64 whatever they were learned in."""
    problem = jb.variational(None, regularizer)
    with common.precision("float64"):
        params, batch = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), "float64"), (params, batch))
        found = jb.implicit.Oracle(problem, jb.losses.squared_error(), estimate=False).value(params, batch, tol=tol)
        jb.check(found)
    return float(-10 * np.log10(2 * float(found.value) / np.prod(batch["x"].shape[1:])))


def photographs(args, recorder) -> None:
    pairs = photograph_pairs(args)
    held_out = photograph_pairs(args, args.images) if args.images else None
    with common.precision(args.photograph_dtype):
        batch = {name: jnp.asarray(value, args.photograph_dtype) for name, value in pairs.items()}
        for weight in args.grid:
            params = jnp.log(jnp.array([weight], args.photograph_dtype))
            recorder.add({"method": "grid", "weight": weight}, {"psnr": psnr(FIXED, params, batch)})
        for name, regularizer in (("eps learned", LEARNED), ("eps = 1e-3", FIXED)):
            for start in PHOTOGRAPH_STARTS[: args.starts]:
                params = jnp.array(start if regularizer.eps is None else start[:1], args.photograph_dtype)
                row = {"method": "MAID", "variant": name, "start": start}
                learnt, figures = learn(args, regularizer, params, batch)
                figures["psnr"] = psnr(regularizer, learnt, batch)
                if held_out is not None:
                    other = {k: jnp.asarray(v, args.photograph_dtype) for k, v in held_out.items()}
                    figures["psnr_held_out"] = psnr(regularizer, learnt, other)
                recorder.add(row, figures)
                recorder.write()
    timings(args, recorder, pairs)
    recorder.write()


def learn(args, regularizer, params, batch) -> tuple[Any, dict[str, Any]]:
    """MAID with its defaults until ten steps in a row have not lowered the loss by 1e-4."""
    oracle = jb.implicit.Oracle(jb.variational(None, regularizer), jb.losses.squared_error())
    method = jb.MAID(oracle, projection=regularizer.project)
    seen: list[float] = []

    def settled(step, work, state, info):
        seen.append(float(info.value))
        return len(seen) > 10 and seen[-11] - seen[-1] < 1e-4 * seen[-1]

    count = batch["x"].shape[0]
    state = method.init(params, batch)
    trace = run(method, state, batch, budget=args.photograph_budget * count, stop=settled)
    weight, eps = (float(v) for v in regularizer.scales(jnp.asarray(trace.params[-1])))
    figures = {
        "steps": len(trace.work), "work": trace.work[-1] / count, "seconds": trace.seconds[-1],
        "weight": weight, "eps": eps, "tol": float(trace.tol[-1]), "first_tol": float(trace.tol[0]),
    }  # fmt: skip
    return jnp.asarray(trace.params[-1]), figures


def timings(args, recorder, pairs) -> None:
    """One cold hypergradient of all photographs: both precisions, one image at a time and all in lockstep."""
    for dtype in ("float32", "float64"):
        with common.precision(dtype):
            batch = {name: jnp.asarray(value, dtype) for name, value in pairs.items()}
            params = jnp.log(jnp.array([0.073, 0.01], dtype))
            for chunk in (1, None):
                oracle = jb.implicit.Oracle(
                    jb.variational(None, LEARNED), jb.losses.squared_error(), chunk=chunk, estimate=False
                )
                call = jax.jit(lambda oracle=oracle, batch=batch, params=params: oracle(params, batch, tol=0.1))
                seconds = common.interleave({"": call}, min(args.repeats, 3))[""]
                case = {"method": "hypergradient", "dtype": dtype, "chunk": "all" if chunk is None else chunk}
                recorder.add(case, common.spread(seconds))


# ------------------------------------------------------------------------------------------------------- momentum

MOMENTUM_POINTS = ((-5.0, -5.0), (-2.5, -4.0), (-2.55, -5.0), (-2.56, -6.3))
MOMENTUM_TOLERANCES = (1e-1, 1e-3, 1e-6)


def _published_energy(theta, x, data):
    """1/2 ||x - y||^2 + 1/2 e^theta0 sum (root of each difference), anisotropic, as the authors' code has it."""
    roots = [jnp.sqrt(jnp.diff(x, axis=axis) ** 2 + jnp.exp(2 * theta[1])) for axis in (0, 1)]
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * jnp.exp(theta[0]) * sum(jnp.sum(root) for root in roots)


PUBLISHED = jb.SmoothProblem(
    _published_energy,
    init=lambda theta, data: jnp.zeros_like(data["y"]),
    strong_convexity=1.0,
    smoothness=lambda theta, data: 1 + jnp.exp(theta[0] - theta[1]) * np.sqrt(8.0),
)


def momentum(args, recorder) -> None:
    data = {"y": jnp.asarray(common.images(args.sizes[0], 1, args.images).noisy[0])}
    for point in MOMENTUM_POINTS:
        theta = jnp.array(point)
        condition = float(PUBLISHED.smoothness(theta, data))
        for tol in MOMENTUM_TOLERANCES:
            steps = {}
            for name, solver in (("plain", jb.solvers.GradientDescent), ("momentum", jb.solvers.AGD())):
                _, info = jb.solve(PUBLISHED, theta, data, tol=tol, max_steps=100_000, solver=solver)
                jb.check(info)
                steps[name] = int(info.steps)
            recorder.add({"theta": point, "tol": tol}, {"condition": condition, **steps})
    recorder.write()


# ----------------------------------------------------------------------------------------------------------- main

render, figures = ehrhardt_2025_tv_page.render, ehrhardt_2025_tv_page.figures


def recorder_of(part: str, args) -> common.Recorder:
    """Each part replaces its own rows in the one file."""
    out = args.out or str(common.RESULTS / f"{NAME}.jsonl")
    own = argparse.Namespace(**{**vars(args), "out": out})
    return common.Recorder(f"{NAME}: {part}", own, script=f"benchmarks/papers/{NAME}.py")


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64], "budget": 60_000, "variants": list(MAID_OPTIONS), "first": list(FIRST_TOLERANCES),
            "fixed": list(FIXED_TOLERANCES), "schedules": list(SCHEDULES), "photographs": 15, "photograph_size": 128,
            "photograph_budget": 4000, "photograph_dtype": "float32", "grid": list(GRID), "starts": 3,
        },
        quick={
            "sizes": [16], "budget": 400, "variants": ["default"], "first": [1e-1], "fixed": [1e-2],
            "schedules": ["quadratic"], "photographs": 2, "photograph_size": 16, "photograph_budget": 200,
            "grid": [0.073], "starts": 1, "repeats": 2,
        },
    )  # fmt: skip
    options.add_argument("--part", nargs="+", choices=("all", *PARTS), default=["all"], help="which experiments")
    options.add_argument("--budget", type=int, help="gradient-equivalents of a run of `convergence`")
    options.add_argument("--variants", nargs="+", choices=list(MAID_OPTIONS), metavar="V", help="forms of MAID")
    options.add_argument("--starts", type=int, help="number of starts of `photographs`")
    options.add_argument("--photograph-dtype", choices=("float32", "float64"), help="floating type of `photographs`")
    args = common.parse(options, argv)
    jobs = {"convergence": convergence, "photographs": photographs, "momentum": momentum}
    rows = []
    for part in PARTS if "all" in args.part else args.part:
        recorder, start = recorder_of(part, args), time.perf_counter()
        with common.precision("float64"):
            jobs[part](args, recorder)
        print(f"{part}: {len(recorder.rows)} rows, {time.perf_counter() - start:.0f} s", flush=True)
        rows += recorder.rows
    print(ehrhardt_2025_tv_page.render(rows))
    if args.out is None:
        ehrhardt_2025_tv_page.figures(common.read_rows(common.RESULTS / f"{NAME}.jsonl"), common.FIGURES)


if __name__ == "__main__":
    main()
