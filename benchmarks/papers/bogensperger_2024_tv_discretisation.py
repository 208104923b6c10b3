"""Total variation discretised by piggyback, against standard TV at its best (Bogensperger et al. 2024, section 4.1).

Crops of photographs with noise 25.5/255. Every gain is a difference of PSNR, image by image, to standard total
variation with the weight that is best on the test crops. Learning takes Adam with 60 warm primal-dual iterations and
60 for the adjoint per update; reconstructions that are compared are solved to a small residual. No test image was
trained on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common
from benchmarks.papers import bogensperger_2024_tv as shared

NAME = "bogensperger_2024_tv_discretisation"
TITLE = "Bogensperger et al. 2024: learned discretisations of total variation"
TV, CONDAT = jb.regularizers.TV(), jb.regularizers.LearnedTV(count=3)
LEARNED = {sums: jb.regularizers.LearnedTV(sums=sums) for sums in ("equal", "free")}
FOE = shared.Experts()
MODELS = {  # regulariser and loss; None is half the squared error
    **{f"learned, {sums} sums": (LEARNED[sums], None) for sums in LEARNED},
    **{f"learned, {sums} sums, by PSNR": (LEARNED[sums], shared.negative_psnr) for sums in LEARNED},
    "FoE": (FOE, None),
    "FoE, by PSNR": (FOE, shared.negative_psnr),
}
RATE, WARM = 1e-2, 60  # Adam's step; iterations of each solve
CURVED = {  # of LearnedTV, names of its fields
    "dual curvature 1e-2": {"dual_curvature": 1e-2},
    "and auxiliary 1e-3, width 1e-3": {"dual_curvature": 1e-2, "auxiliary_curvature": 1e-3, "width": 1e-3},
    "and auxiliary 1e-2, width 1e-3": {"dual_curvature": 1e-2, "auxiliary_curvature": 1e-2, "width": 1e-3},
}
STRIDE = 50  # iterations between two looks at the distance from the solution
DISTANCES = (1e-4, 1e-5, 1e-6, 1e-8)  # root mean square per pixel
TARGETS = {"learned, equal sums": 0.30, "learned, free sums": 0.40, "FoE": 0.25}
OVER_CONDAT, SAME = 0.15, 0.002  # dB


# ---------------------------------------------------------------------------------------------------------- measurement


def best_weight(regularizer, params_at: Callable, batch, start: float = 0.075, ratio: float = 1.06):
    """(weight, PSNR of each image) with the best mean among start * ratio^k, by climbing from k = 0."""

    @cache
    def at(k: int) -> tuple:
        return tuple(shared.quality(regularizer, params_at(start * ratio**k), batch))

    k = 0
    while (best := max((k - 1, k, k + 1), key=lambda k: np.mean(at(k)))) != k:
        k = best
    return start * ratio**k, np.array(at(k))


def tv_at(weight: float):
    return TV.init(weight=weight, dtype=jnp.float32)


def condat_at(weight: float):
    return CONDAT.init(weight=weight, noise=0.0, dtype=jnp.float32)


def gains(quality, baseline) -> dict:
    """Mean PSNR and its paired gain with spread; and the gain in PSNR of the mean squared error over all images."""
    quality, baseline = (np.asarray(v, np.float64) for v in (quality, baseline))
    gain = quality - baseline
    spread = {"std": gain.std(ddof=1), "min": gain.min(), "median": np.median(gain), "max": gain.max()}
    mean_gain = 10 * np.log10(np.mean(10 ** (-baseline / 10)) / np.mean(10 ** (-quality / 10)))
    return {
        "psnr": quality.mean(), "gain": gain.mean(), **(spread if gain.size > 1 else {}), "gain of mean": mean_gain,
        "gains": np.round(gain, 4), "psnrs": np.round(quality, 4),
    }  # fmt: skip


def adam(args, regularizer, loss, start, train, iterations: int):
    """Adam; solves are cut after ``iterations`` on purpose, which the message says."""
    oracle = shared.piggyback(
        regularizer, loss, solver=jb.solvers.PDHG(stride=iterations), estimate=False, max_steps=iterations,
        max_adjoint_steps=iterations, chunk=4 if jax.default_backend() == "cpu" else "auto",
    )  # fmt: skip
    method = jb.FirstOrder(oracle, optax.adam(RATE), tol=0.0, adjoint_tol=0.0, projection=regularizer.project)
    return jb.fit(method, start, train, steps=args.steps)


def learn(args, row: str, train, seed: int) -> dict:
    """What a row says about learning, with the params."""
    started = time.perf_counter()
    (regularizer, loss), experts = MODELS[row], row.startswith("FoE")
    iterations = WARM // 2 if experts else WARM  # smooth: half of them are enough
    start = regularizer.init() if experts else regularizer.init(jax.random.key(seed), dtype=jnp.float32)
    found = adam(args, regularizer, loss, start, train, iterations)
    if found.status == jb.FitStatus.FAILED:
        raise SystemExit(f"{row}: {found.message}")
    return {
        "weight": _weight(found.params), "steps": found.steps, "seconds": time.perf_counter() - started,
        "compile": found.compile_seconds, "work": found.work / args.batch[0], "message": found.message,
        "value": np.round(found.history["value"], 5), "params": common.as_lists(found.params),
    }  # fmt: skip


def measure(args, recorder) -> None:
    train_images, test_images = shared.pictures(args.images)
    test = shared.noisy_crops(test_images, args.sizes[1], args.batch[1], [args.seed, 0])

    def record(row: str, quality, more: dict, seed=None) -> None:
        recorder.add({"row": row, "training seed": seed}, gains(quality, baseline) | more)
        recorder.write()
        print(f"{row}: gain {np.mean(quality - baseline):+.3f} dB", flush=True)

    weight, baseline = best_weight(TV, tv_at, test)
    record("noisy", shared.psnr(test["y"], test), {})
    record("TV", baseline, {"weight": weight})
    condat_weight, quality = best_weight(CONDAT, condat_at, test)
    record("Condat", quality, {"weight": condat_weight})
    for seed in args.training_seeds:
        train = shared.noisy_crops(train_images, args.sizes[0], args.batch[0], [seed, 1])
        own_best = best_weight(TV, tv_at, train)[1]
        for row, (regularizer, _) in MODELS.items():
            if row.startswith("FoE") and seed != args.training_seeds[0]:
                continue
            if recorder.kept({"row": row, "training seed": seed}):
                continue
            more = learn(args, row, train, seed)
            params = common.as_arrays(more["params"])
            more["train gain"] = gains(shared.quality(regularizer, params, train), own_best)["gain"]
            record(row, shared.quality(regularizer, params, test), more, seed)
    smooth(args, recorder, test)


def _weight(params) -> float | None:
    return float(np.exp(params["log_weight"])) if "log_weight" in params else None


def smooth(args, recorder, test) -> None:
    """The curved variants on the learned filters: change of PSNR, and distance from the solution over iterations."""
    modes = {"exact": {}, **CURVED}
    modes = {name: v for name, v in modes.items() if not recorder.kept({"row": "strongly convex", "mode": name})}
    if not modes:
        return
    row = next(row for row in common.read_rows(recorder.path) if row["case"]["row"] == "learned, equal sums")
    params = common.as_arrays(row["figures"]["params"])
    exact = shared.denoised(LEARNED["equal"], params, test["y"])
    for name, options in modes.items():
        regularizer = replace(LEARNED["equal"], **options)
        images = shared.denoised(regularizer, params, test["y"]) if options else exact
        change = gains(shared.psnr(images, test), shared.psnr(exact, test))
        with common.precision("float64"):
            corner = np.asarray(test["y"][0, :64, :64], np.float64)
            distances = convergence(regularizer, params, corner, args.iterations)
        figures = {
            "change": change["gain"], "largest change": np.abs(change["gains"]).max(),
            "image change": np.sqrt(np.mean((images - exact) ** 2)), "distances": distances, "stride": STRIDE,
        }  # fmt: skip
        recorder.add({"row": "strongly convex", "mode": name}, figures)
        recorder.write()
        print(f"{name}: change {change['gain']:+.4f} dB, distance {distances[-1]:.1e}", flush=True)


def convergence(regularizer, params, noisy, iterations: int) -> np.ndarray:
    """Distance to the end of a run twice as long, root mean square per pixel, every STRIDE iterations."""
    problem, solver = shared.problem(regularizer), jb.solvers.PDHG(stride=STRIDE)

    @jax.jit
    def trace(params, data):
        view = problem.view(params, data)
        state = solver.init(view, problem.start(params, data), 0.0)

        def step(state, _):
            state = solver.step(view, state, 0.0)
            return state, state.x[0][0]

        return jax.lax.scan(step, state, length=2 * iterations // STRIDE)[1]

    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
    images = np.asarray(trace(params, {"y": jnp.asarray(noisy)}))
    return np.sqrt(np.mean((images - images[-1]) ** 2, axis=(1, 2)))[: len(images) // 2]


# ---------------------------------------------------------------------------------------------------------------- page


def of(rows: Sequence[dict], *names: str) -> list[dict]:
    return [row for row in rows if row["case"]["row"] in names]


def met(condition: bool) -> str:
    return "met" if condition else "**not met**"


def render(rows: Sequence[dict]) -> str:
    settings = rows[0]["settings"]
    (small, large), (trained, tested) = settings["sizes"], settings["batch"]
    intro = (
        f"Trained on {trained} crops of {small} x {small}, judged on {tested} unseen crops of {large} x {large}; gains "
        "over standard TV at its best weight on the test crops, with standard deviation and extremes over these.\n"
    )
    results = [row for row in rows if "gain" in row["figures"]]
    header = [
        "", "training seed", "PSNR", "gain", "std", "least", "median", "most", "gain of PSNR of mean MSE",
        "gain on training", "weight", "updates", "s",
    ]  # fmt: skip
    lines = [_line(row) for row in results]
    parts = [intro, common.table(header, lines), _verdicts(results), _smooth_table(of(rows, "strongly convex"))]
    parts.append("![Learned filters](figures/bogensperger_2024_tv_filters.png)\n")
    parts.append(
        "![Reconstructions of a photograph that was not trained on](figures/bogensperger_2024_tv_reconstructions.png)\n"
    )
    return "\n".join(parts)


def _line(row: dict) -> list:
    found, seed = row["figures"], row["case"]["training seed"]
    keys = ("gain", "std", "min", "median", "max", "gain of mean", "train gain")
    decibels = [f"{found[key]:{'' if key == 'std' else '+'}.3f}" if key in found else "–" for key in keys]
    return [
        row["case"]["row"], "–" if seed is None else seed, f"{found['psnr']:.3f}", *decibels,
        common.rounded(found.get("weight")), found.get("steps", "–"), common.whole(found.get("seconds")),
    ]  # fmt: skip


def _verdicts(results: Sequence[dict]) -> str:
    condat = of(results, "Condat")[0]["figures"]["gain"]
    lines = []
    for row in results:
        name, gain = row["case"]["row"], row["figures"]["gain"]
        target = TARGETS.get(name.removesuffix(", by PSNR"))
        if target is None:
            continue
        text = f"- {name}, seed {row['case']['training seed']}: {gain:+.3f} dB; criterion >= {target:.2f}: "
        text += met(gain >= target)
        if name.startswith("learned, equal sums"):
            over = gain - condat
            text += f"; over Condat's {over:+.3f}; criterion >= {OVER_CONDAT}: {met(over >= OVER_CONDAT)}"
        lines.append(text + ".")
    return "\n".join(lines) + "\n"


def _smooth_table(rows: Sequence[dict]) -> str:
    header = ["mode, on the learned filters", "change of PSNR", "largest", "change of images"]
    header += [f"iterations to {common.scientific(d, 0)}" for d in DISTANCES]
    lines = []
    for row in rows:
        found = row["figures"]
        lines.append([
            row["case"]["mode"], f"{found['change']:+.4f} dB", f"{found['largest change']:.4f} dB",
            common.scientific(found["image change"]), *(_reached(found, distance) for distance in DISTANCES),
        ])  # fmt: skip
    verdicts = [
        f"- {row['case']['mode']} changes PSNR by {abs(row['figures']['change']):.4f} dB; criterion <= {SAME}: "
        f"{met(abs(row['figures']['change']) <= SAME)}.\n"
        for row in rows if row["case"]["mode"] == "dual curvature 1e-2"
    ]  # fmt: skip
    return "\n".join([common.table(header, lines), *verdicts])


def _reached(found: dict, distance: float) -> str:
    """First look after which the distance from the solution stays below; a crop, in float64."""
    above = np.flatnonzero(np.asarray(found["distances"]) > distance)
    looks = 0 if above.size == 0 else above[-1] + 1
    return f"> {looks * found['stride']}" if looks == len(found["distances"]) else str((looks + 1) * found["stride"])


def figures(rows: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    first = {row["case"]["row"]: row["figures"] for row in reversed(rows)}
    learned = {name: common.as_arrays(first[f"learned, {name} sums"]["params"]) for name in LEARNED}

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    banks = {"equal sums": learned["equal"], "free sums": learned["free"]}
    for part, (name, params) in zip(figure.subfigures(len(banks), 1), banks.items(), strict=True):
        shared.show_filters(part, np.asarray(params["filters"]), name)
    shared.save(figure, folder, "bogensperger_2024_tv_filters.png")

    clean, noisy = shared.photograph()
    models = {"TV": (TV, tv_at(first["TV"]["weight"])), "Condat": (CONDAT, condat_at(first["Condat"]["weight"]))}
    for name, (regularizer, _) in MODELS.items():
        if name in first and f"{name}, by PSNR" not in first:
            models[name] = regularizer, common.as_arrays(first[name]["params"])
    shown = {"clean": clean, "noisy": np.asarray(noisy)}
    for name, (regularizer, params) in models.items():
        shown[name] = shared.denoised(regularizer, params, noisy[None], residual=1e-4)[0]
    figure = Figure(figsize=(2 * len(shown), 4.3), layout="constrained")
    shared.show_reconstructions(figure, clean, shown, shared.WINDOW)
    shared.save(figure, folder, "bogensperger_2024_tv_reconstructions.png")


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64, 128], "batch": [32, 64], "steps": 200, "training_seeds": [0, 1], "iterations": 5000,
            "dtype": ["float32"],
        },
        quick={
            "sizes": [16, 16], "batch": [2, 2], "steps": 2, "training_seeds": [0], "iterations": 200,
        },
    )  # fmt: skip
    options.add_argument("--steps", type=int, help="updates of the filters")
    options.add_argument("--training-seeds", nargs="+", type=int, help="of training crops, noise and first filters")
    options.add_argument("--iterations", type=int, help="over which the convergence of the curved modes is followed")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
