"""MAID against fixed steps and Adam on learned total variation (Bogensperger et al. 2024, Figures 1b and 3).

All runs learn eight filters and the weight, start at the same filters, and may spend the same number of iterations,
lower and adjoint ones together with what MAID's error estimates cost. MAID starts from accuracy eps for both solves and
step alpha; gradient descent and Adam keep theirs. Losses are computed again afterwards at checkpoints, by solves to a
small residual that are not counted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common
from benchmarks.papers import bogensperger_2024_tv as shared

NAME = "bogensperger_2024_tv_descent"
TITLE = "Bogensperger et al. 2024: MAID against fixed steps, learned total variation"
MODELS = {  # as it is in the paper, and strongly convex-concave at the price of 0.02 dB
    "exact": jb.regularizers.LearnedTV(),
    "curved": jb.regularizers.LearnedTV(dual_curvature=1e-2, auxiliary_curvature=1e-2, width=1e-3),
}
CHECKPOINTS = 6  # per run, at geometrically growing work
LATE = 0.5  # the part of the budget after which oscillation is looked for
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#000000")
STYLES = (":", "-.", "--", "-")  # from the smallest eps


class Trace(NamedTuple):
    """A run; entry k of each list belongs to step k, ``params`` are those it started from."""

    work: np.ndarray  # per image, before the step
    value: np.ndarray  # as the method saw it
    tol: np.ndarray
    step: np.ndarray
    params: list
    seconds: float
    done: bool


# ---------------------------------------------------------------------------------------------------------- measurement


def run(method, state, batch, budget: float) -> Trace:
    """Steps of ``method`` until ``budget`` iterations per image are spent."""
    jax.block_until_ready(method.step(state, batch))  # compile
    rows, points, work, done, count = [], [], 0.0, False, len(batch["x"])
    started = time.perf_counter()
    while not done and work < budget:
        points.append(jax.device_get(state.params))
        state, info = method.step(state, batch)
        rows.append([work, *map(float, (info.value, info.tol, info.step))])
        work += float(info.work) / count
        done = bool(info.done) or not np.isfinite(rows[-1][1])
    return Trace(*np.array(rows).T, points, time.perf_counter() - started, bool(info.done))


def runs(args, name: str, start, batch) -> Iterator[tuple[dict, Any, Any]]:
    """(case, method, first state); runs of one kind share their compiled step, for all that differs is in the state."""
    model = MODELS[name]
    oracle = shared.piggyback(model, estimate=False)

    def cases(kind: str, alphas):
        for eps in args.eps:
            for alpha in alphas:
                yield {"model": name, "method": kind, "eps": eps, "alpha": alpha}, jnp.asarray(eps, float), alpha

    def first_order(kind: str, optimizer, alphas):
        tunable = optax.inject_hyperparams(optimizer)(learning_rate=1.0)
        method = jb.FirstOrder(oracle, tunable, tol=1.0, adjoint_tol=1.0, projection=model.project)
        state = method.init(start, batch)
        for case, tol, alpha in cases(kind, alphas):
            own = state.optimizer.hyperparams | {"learning_rate": jnp.asarray(alpha, jnp.float32)}
            rate = state.optimizer._replace(hyperparams=own)
            yield case, method, replace(state, tol=tol, adjoint_tol=tol, optimizer=rate)

    method = jb.MAID(oracle, projection=model.project, tol=1.0, adjoint_tol=1.0, rule="paper")
    state = method.init(start, batch)
    for case, tol, alpha in cases("MAID", args.alphas):
        yield case, method, replace(state, tol=tol, adjoint_tol=tol, step=jnp.asarray(alpha, float))
    yield from first_order("gradient descent", optax.sgd, args.alphas)
    yield from first_order("Adam", optax.adam, args.rates)


class Exact:
    """Losses by solves to a small residual, each from the last solution; inf for params where one fails."""

    def __init__(self, model, batch):
        self.oracle = shared.piggyback(model, estimate=False, max_steps=shared.LIMIT)
        self.batch, self.warm = batch, None
        self.tol = shared.RESIDUAL * np.sqrt(batch["x"][0].size)

    def __call__(self, params) -> float:
        found = self.oracle.value(params, self.batch, self.warm, tol=self.tol)
        if found.status > jb.Status.PRECISION:
            return np.inf
        self.warm = found.warm
        return float(found.value)


def checkpoints(trace: Trace, budget: float) -> list[int]:
    """Steps whose params are looked at: geometrically in work, and the last."""
    marks = np.geomspace(budget / 50, budget, CHECKPOINTS)
    steps = np.searchsorted(trace.work, marks[:-1])
    return sorted({0, len(trace.work) - 1, *np.minimum(steps, len(trace.work) - 1).tolist()})


def late_extremes(trace: Trace, budget: float) -> tuple[int, int] | None:
    """Steps (high, low) of the largest rise in the late part, from the lowest value so far; None where nothing rises.

    Nor where the run did not get there, or is not below its start any more.
    """
    late = np.flatnonzero(trace.work >= LATE * budget)
    if late.size < 2 or not np.all(np.isfinite(trace.value)) or trace.value[late].min() >= trace.value[0]:
        return None
    values = trace.value[late]
    rises = values - np.minimum.accumulate(values)
    high = int(np.argmax(rises))
    return (int(late[high]), int(late[np.argmin(values[:high])])) if rises[high] > 0 else None


def measure(args, recorder) -> None:
    train_images, test_images = shared.pictures(args.images)
    batch = shared.noisy_crops(train_images, args.sizes[0], args.batch[0], [args.seed, 1])
    test = shared.noisy_crops(test_images, args.sizes[1], args.batch[1], [args.seed, 0])
    start = MODELS["exact"].init(jax.random.key(args.seed), dtype=jnp.float32)
    for name in args.models:
        exact, traces = Exact(MODELS[name], batch), []
        first = exact(start)
        for case, method, state in runs(args, name, start, batch):
            trace = run(method, state, batch, args.budget)
            traces.append((case, trace))
            record(args, recorder, case, trace, exact, first)
        oscillation(args, recorder, traces, exact, test)


def record(args, recorder, case: dict, trace: Trace, exact: Exact, first: float) -> None:
    seen = [step for step in checkpoints(trace, args.budget) if _finite(trace.params[step])]
    losses = [exact(trace.params[step]) for step in seen]
    late = late_extremes(trace, args.budget)
    figures = {
        "start": first, "loss": losses[-1] if np.isfinite(trace.value[-1]) else np.inf, "least": min(losses),
        "checked work": trace.work[seen], "checked": losses, "steps": len(trace.work), "seconds": trace.seconds,
        "rises": np.mean(np.diff(trace.value) > 0) if len(trace.value) > 1 else 0.0,
        "late rise": trace.value[late[0]] - trace.value[late[1]] if late else 0.0, "done": trace.done,
        **{name: np.round(getattr(trace, name), 6).tolist() for name in ("work", "value")},
        **{name: [float(f"{v:.4g}") for v in getattr(trace, name)] for name in ("tol", "step")},
    }  # fmt: skip
    recorder.add(case, figures)
    recorder.write()
    print(f"{case}: loss {first:.4f} -> {figures['loss']:.4f}, {figures['steps']} steps, "
          f"{figures['rises']:.0%} rises, {trace.seconds:.0f} s", flush=True)  # fmt: skip


def oscillation(args, recorder, traces, exact, test) -> None:
    """High and low point of the fixed step that rises most, and MAID from the same start after as much work."""
    rising = {}
    for i, (case, trace) in enumerate(traces):
        ends = late_extremes(trace, args.budget)
        if case["method"] == "gradient descent" and ends is not None:
            rising[i] = trace.value[ends[0]] - trace.value[ends[1]]
    if not rising:
        return
    case, trace = traces[max(rising, key=rising.__getitem__)]
    high, low = late_extremes(trace, args.budget)
    maid = next(t for c, t in traces if c == case | {"method": "MAID"})
    same = int(np.searchsorted(maid.work, trace.work[high], side="right")) - 1
    for point, run_, step in (("high", trace, high), ("low", trace, low), ("MAID", maid, same)):
        params = run_.params[step]
        quality = shared.quality(MODELS[case["model"]], params, test)
        figures = {
            "work": run_.work[step], "loss": exact(params), "psnr": quality.mean(), "psnrs": np.round(quality, 3),
            "params": common.as_lists(params),
        }  # fmt: skip
        recorder.add(case | {"method": "point", "point": point}, figures)
        recorder.write()
        print(f"{point}: loss {figures['loss']:.4f}, unseen {figures['psnr']:.3f} dB", flush=True)


def _finite(params) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


# ---------------------------------------------------------------------------------------------------------------- page


def of(rows: Sequence[dict], method: str) -> list[dict]:
    return [row for row in rows if row["case"]["method"] == method]


def render(rows: Sequence[dict]) -> str:
    settings = rows[0]["settings"]
    intro = (
        f"{settings['batch'][0]} crops of {settings['sizes'][0]} x {settings['sizes'][0]}, "
        f'{settings["budget"]} iterations per image and run. "rises": share of steps after which the value that the '
        'method saw is higher; "late swing": its range in the last half.\n'
    )
    header = ["method", "eps", "alpha", "loss", "least loss", "steps", "rises", "late rise", "s"]
    parts = [intro]
    for name, own in _by_model(rows).items():
        learned = [row for row in own if row["case"]["method"] != "point"]
        parts.append(f"**{name.capitalize()}**, loss at the start {learned[0]['figures']['start']:.4f}\n")
        parts.append(common.table(header, [_line(row["case"], row["figures"]) for row in learned]))
        parts += [_comparison(learned), _points(of(own, "point"))]
    parts.append("![Loss over iterations](figures/bogensperger_2024_tv_descent.png)\n")
    if of(rows, "point"):
        parts.append("![Reconstructions at the high and the low point](figures/bogensperger_2024_tv_oscillation.png)\n")
    return "\n".join(parts)


def _by_model(rows: Sequence[dict]) -> dict[str, list[dict]]:
    names = dict.fromkeys(row["case"]["model"] for row in rows)
    return {name: [row for row in rows if row["case"]["model"] == name] for name in names}


def _line(case: dict, found: dict) -> list:
    return [
        case["method"], common.scientific(case["eps"], 0), common.scientific(case["alpha"], 0),
        common.rounded(found["loss"], 4), common.rounded(found["least"], 4), found["steps"], f"{found['rises']:.0%}",
        common.rounded(found.get("late rise"), 2), common.whole(found["seconds"]),
    ]  # fmt: skip


def _comparison(learned: Sequence[dict]) -> str:
    lines = []
    for method in dict.fromkeys(row["case"]["method"] for row in learned):
        ends = [common.number(row["figures"]["loss"]) for row in of(learned, method)]
        finite = [end for end in ends if np.isfinite(end)]
        lines.append(
            f"- {method}, {len(ends)} runs: final loss from {min(finite):.4f} to {max(finite):.4f}, median "
            f"{np.median(ends):.4f}; {sum(end >= learned[0]['figures']['start'] for end in ends)} not below the start."
        )
    return "\n".join(lines) + "\n"


def _points(points: Sequence[dict]) -> str:
    if not points:
        return "No high and low point recorded.\n"
    case = points[0]["case"]
    lines = [
        [row["case"]["point"], common.whole(row["figures"]["work"]), common.rounded(row["figures"]["loss"], 4),
         f"{row['figures']['psnr']:.3f}"]
        for row in points
    ]  # fmt: skip
    text = f"Gradient descent from eps = {case['eps']:g}, alpha = {case['alpha']:g}, and MAID after as much work:\n\n"
    return text + common.table(["point", "iterations per image", "loss", "PSNR of unseen crops"], lines)


def figures(rows: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models = _by_model(rows)
    methods = [m for m in dict.fromkeys(row["case"]["method"] for row in rows) if m != "point"]
    alphas, epsilons = (sorted({row["case"][key] for row in rows}) for key in ("alpha", "eps"))
    figure = Figure(figsize=(4.2 * len(methods), 0.6 + 3.4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(methods), sharey="row", sharex=True, squeeze=False)
    for line, (name, own) in zip(axes, models.items(), strict=True):
        learned = [row for row in own if row["case"]["method"] != "point"]
        lowest, start = min(common.number(r["figures"]["least"]) for r in learned), learned[0]["figures"]["start"]
        for axis, method in zip(line, methods, strict=True):
            _curves(axis, of(own, method), alphas, epsilons)
            axis.set(title=f"{method}, {name}", ylim=(lowest - 0.05 * (start - lowest), start + 0.2 * (start - lowest)))
        line[0].set_ylabel("training loss")
    for axis in axes[-1]:
        axis.set_xlabel("iterations per image")
    handles = [Line2D([], [], color=COLOURS[i], label=f"$\\alpha$ = {a:g}") for i, a in enumerate(alphas)]
    handles += [Line2D([], [], color="0.3", ls=STYLES[i], label=f"$\\epsilon$ = {e:g}")
                for i, e in enumerate(epsilons)]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    shared.save(figure, folder, "bogensperger_2024_tv_descent.png")

    points = {row["case"]["point"]: row for row in of(models.get("exact", []), "point")}
    if points:
        clean, noisy = shared.photograph()
        shown = {"clean": clean}
        for name, row in points.items():
            params = common.as_arrays(row["figures"]["params"])
            title = name if name == "MAID" else f"{name} point"
            shown[title] = shared.denoised(MODELS["exact"], params, noisy[None], residual=1e-4)[0]
        figure = Figure(figsize=(2.2 * len(shown), 4.8), layout="constrained")
        shared.show_reconstructions(figure, clean, shown, shared.WINDOW)
        shared.save(figure, folder, "bogensperger_2024_tv_oscillation.png")


def _curves(axis, rows: Sequence[dict], alphas: list, epsilons: list) -> None:
    """What the methods saw, as lines, and the losses at checkpoints, as dots."""
    for row in rows:
        found, case = row["figures"], row["case"]
        colour, style = COLOURS[alphas.index(case["alpha"])], STYLES[epsilons.index(case["eps"])]
        axis.plot(found["work"], [common.number(v) for v in found["value"]], style, lw=0.9, color=colour)
        axis.plot(found["checked work"], [common.number(v) for v in found["checked"]], "o", ms=2.5, color=colour)
    axis.grid(alpha=0.25)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [32, 128], "batch": [4, 24], "budget": 10000, "eps": [1e-1, 1e-2, 1e-3, 1e-4],
            "alphas": [1e-2, 1e-1, 1.0], "rates": [1e-2],
            "models": ["exact"], "dtype": ["float32"],
        },
        quick={"sizes": [12, 12], "batch": [2, 2], "budget": 200, "eps": [1e-1], "alphas": [3e-2], "rates": [1e-2]},
    )  # fmt: skip
    options.add_argument("--budget", type=int, help="iterations per image of each run")
    options.add_argument("--eps", nargs="+", type=float, help="first (MAID) or fixed accuracies of both solves")
    options.add_argument("--alphas", nargs="+", type=float, help="first (MAID) or fixed steps")
    options.add_argument("--models", nargs="+", choices=MODELS, help="total variation as in the paper, or curved")
    options.add_argument("--rates", nargs="+", type=float, help="of Adam")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
