"""Saddle points: do proven bounds ever fail, are estimates right, and what does a hypergradient cost?

Random problems with closed smoothness constants (bounds), denoising problems (estimates; total variation, which is
neither smooth nor strongly concave, is reported too), and learned total variation with 8 filters (times).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common
from benchmarks import saddle_problems as problems

NAME = "saddle_errors"
TITLE = "Saddle points: bounds, estimates, cost"
TOLERANCES = (1.0, 1e-1, 1e-2, 1e-4)
ESTIMATED = {
    "Huber-TV": problems.huber_tv,
    "FoE psi_w": problems.experts,
    "TV, x >= 0 (not certified)": problems.total_variation,
    "learned TV (29) (not certified)": problems.learned_tv,
}
STEPS = 60  # of each solve in the timed hypergradient


def distances(setup: problems.Setup, loss, seeds: int, **options) -> list[dict]:
    """One row per case: true errors of x, value and hypergradient next to what is said about them."""
    limits = {"max_steps": 50000, "max_adjoint_steps": 50000}
    oracle = jb.piggyback.Oracle(setup.problem, loss, loss_smoothness=1.0, **limits, **options)
    corrected = jb.piggyback.Oracle(setup.problem, loss, correct=True, **limits)
    rows = []
    for seed in range(seeds):
        params, batch = setup.params(seed), jax.tree.map(lambda leaf: leaf[None], setup.sample(seed))
        exact = corrected(params, batch, tol=setup.reference)
        for tol in TOLERANCES:
            hg = oracle(params, batch, tol=tol)
            away = ravel_pytree(hg.grad)[0] - ravel_pytree(exact.grad)[0]
            rows.append({
                "x": float(jnp.linalg.norm(ravel_pytree(hg.warm.x[0])[0] - ravel_pytree(exact.warm.x[0])[0])),
                "x_bound": float(hg.lower.error[0]),
                "gradient": float(jnp.linalg.norm(away)),
                "bound": float(hg.bound),
                "estimate": float(hg.error),
                "value": abs(float(hg.value - exact.value)),
                "value_bound": float(hg.value_bound),
            })  # fmt: skip
    return rows


def column(rows: Sequence[dict], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows])


def bounds(recorder, seeds: int) -> None:
    for name in ("QUADRATIC", "ROOTS"):
        rows = distances(getattr(problems, name), problems.pair_loss, seeds, estimate=False)
        figures = {"cases": len(rows)}
        for what, bound in (("x", "x_bound"), ("gradient", "bound"), ("value", "value_bound")):
            true, proven = column(rows, what), column(rows, bound)
            figures |= {
                f"{what}_violations": int(np.sum(true > proven + 1e-10)),
                f"{what}_median": float(f"{np.median(proven / true):.4g}"),
                f"{what}_certified": int(np.sum(np.isfinite(proven))),
            }
        recorder.add({"part": "bounds", "problem": name.lower(), "dtype": "float64"}, figures)


def estimates(recorder, seeds: int, size: int) -> None:
    for name, make in ESTIMATED.items():
        rows = distances(make(size), problems.image_loss, seeds)
        ratio = column(rows, "estimate") / column(rows, "gradient")
        low, median, high = np.percentile(ratio, [5, 50, 95])
        figures = {
            "cases": len(rows), "inside": float(np.mean((ratio >= 0.5) & (ratio <= 5))),
            "low": float(low), "median": float(median), "high": float(high),
        }  # fmt: skip
        recorder.add({"part": "estimates", "problem": name, "size": size, "dtype": "float64"}, figures)


def seconds(function, *arguments, repeats: int = 5) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times)


def against_unrolling(recorder, size: int) -> None:
    """Piggyback and reverse mode through the same PDHG on Huber-TV, each as short as reaches a relative error."""
    setup = problems.huber_tv(size, weight=(-2.5, -2.5), width=(-4.0, -4.0))
    params, data = setup.params(0), setup.sample(0)
    batch = jax.tree.map(lambda leaf: leaf[None], data)
    exact = ravel_pytree(jb.piggyback.Oracle(setup.problem, problems.image_loss)(params, batch, tol=1e-12).grad)[0]

    def piggyback(steps):
        oracle = jb.piggyback.Oracle(
            setup.problem, problems.image_loss, estimate=False, max_steps=steps, max_adjoint_steps=steps
        )
        return jax.jit(lambda params: oracle(params, batch, tol=0.0).grad)

    def unrolled(steps):
        def value(params):
            pair = jb.solvers.PDHG().iterate(setup.problem.view(params, data), setup.problem.start(params, data), steps)
            return problems.image_loss(params, pair, data)

        return jax.jit(jax.grad(value))

    for wanted in (1e-1, 1e-2, 1e-4):
        found = {}
        for name, make in (("piggyback", piggyback), ("unrolled", unrolled)):
            for steps in (10, 20, 30, 40, 60, 80, 100, 130, 160, 200, 300, 400, 600):
                function = make(steps)
                error = float(jnp.linalg.norm(function(params) - exact) / jnp.linalg.norm(exact))
                if error <= wanted:
                    break
            memory = function.lower(params).compile().memory_analysis().temp_size_in_bytes
            found |= {
                f"{name}_steps": steps, f"{name}_error": error, f"{name}_seconds": seconds(function, params),
                f"{name}_megabytes": memory / 1e6,
            }  # fmt: skip
        found["ratio"] = found["unrolled_seconds"] / found["piggyback_seconds"]
        recorder.add({"part": "unrolled", "size": size, "error": wanted, "dtype": "float64"}, found)


def warm_hypergradient(recorder, size: int, count: int) -> None:
    """60 + 60 warm iterations for all samples of learned total variation, float32."""
    crops = [problems.images(size, seed) for seed in range(count)]
    batch = {name: jnp.asarray(np.stack([crop[name] for crop in crops]), jnp.float32) for name in ("x", "y")}
    learned = jb.regularizers.LearnedTV()
    params = learned.init(jax.random.key(0), dtype=jnp.float32)
    oracle = jb.piggyback.Oracle(
        jb.variational(None, learned), jb.losses.squared_error(part=(0, 0)), solver=jb.solvers.PDHG(stride=STEPS),
        estimate=False, max_steps=STEPS, max_adjoint_steps=STEPS, chunk=4,
    )  # fmt: skip
    call = jax.jit(lambda params, warm: oracle(params, batch, warm, tol=0.0))
    hg = call(params, oracle.init(params, batch))
    taken = seconds(call, params, hg.warm)
    figures = {"seconds": taken, "milliseconds_per_iteration": 1e3 * taken / (2 * STEPS * count)}
    recorder.add({"part": "warm", "size": size, "samples": count, "steps": STEPS, "dtype": "float32"}, figures)


def render(rows: Sequence[dict]) -> str:
    part = lambda name: [(row["case"], row["figures"]) for row in rows if row["case"]["part"] == name]  # noqa: E731
    tables = []
    if part("bounds"):
        lines = [
            [c["problem"], f["cases"]] + [f"{f[f'{w}_violations']} ({f[f'{w}_median']:.3g})" for w in WHAT]
            for c, f in part("bounds")
        ]
        header = ["problem", "cases", *(f"{w}: violations (median bound/true)" for w in WHAT)]
        tables.append("### Proven bounds\n\n" + common.table(header, lines))
    if part("estimates"):
        header = ["problem", "cases", "estimate/true within [0.5, 5]", "5 %", "median", "95 %"]
        lines = [
            [c["problem"], f["cases"], f"{100 * f['inside']:.0f} %"]
            + [f"{f[k]:.2f}" for k in ("low", "median", "high")]
            for c, f in part("estimates")
        ]
        tables.append("### Estimated errors of the hypergradient\n\n" + common.table(header, lines))
    if part("unrolled"):
        header = ["relative error", "piggyback: iterations, ms, MB", "unrolled: iterations, ms, MB", "time ratio"]
        lines = [
            [f"{c['error']:.0e}"]
            + [f"{f[n + '_steps']}, {1e3 * f[n + '_seconds']:.1f}, {f[n + '_megabytes']:.2g}" for n in WAYS]
            + [f"{f['ratio']:.1f}"]
            for c, f in part("unrolled")
        ]
        tables.append("### Piggyback against reverse mode through the same iteration\n\n" + common.table(header, lines))
    for c, f in part("warm"):
        tables.append(
            f"One warm hypergradient of learned TV, {c['steps']} + {c['steps']} iterations on {c['samples']} crops of "
            f"{c['size']} x {c['size']} pixels: {f['seconds']:.2f} s, {f['milliseconds_per_iteration']:.3f} ms per "
            "iteration and crop.\n"
        )
    return "\n".join(tables)


PERCENTILES = ("low", "median", "high")
WHAT, WAYS = ("x", "gradient", "value"), ("piggyback", "unrolled")
PARTS = ("bounds", "estimates", "unrolled", "warm")


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"sizes": [64], "batch": [32], "seeds": 150, "parts": list(PARTS), "repeats": 1},
        quick={"sizes": [12], "batch": [2], "seeds": 2},
    )
    options.add_argument("--seeds", type=int, help="random problems of each kind, at four tolerances each")
    options.add_argument("--parts", nargs="+", choices=PARTS, help="what to measure")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    size, count = args.sizes[0], args.batch[0]
    with common.precision("float64"):
        if "bounds" in args.parts:
            bounds(recorder, args.seeds)
        if "estimates" in args.parts:
            estimates(recorder, max(args.seeds // 10, 2), min(size, 16))
        if "unrolled" in args.parts:
            against_unrolling(recorder, size)
    if "warm" in args.parts:
        with common.precision("float32"):
            warm_hypergradient(recorder, size, count)
    recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
