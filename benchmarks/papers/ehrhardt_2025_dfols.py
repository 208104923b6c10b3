"""MAID against DFO-LS, which needs no hypergradient, on total variation with two parameters (Ehrhardt 2025).

Crops of photographs with noise 0.1, weight and smoothing of isotropic smoothed TV learned from three starts. DFO-LS
solves the lower level to an accuracy that follows its trust region (first accuracy as named), MAID chooses its own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common

NAME = "ehrhardt_2025_dfols"
TITLE = "Ehrhardt 2025: MAID against DFO-LS"
STARTS = ((-5.0, -5.0), (-2.5, -4.0), (0.0, 0.0))
FIRST = (1.0, 1e-1, 1e-2)  # first accuracies of DFO-LS, absolute 2-norms per crop
LEARNED = jb.regularizers.SmoothedTV()
LOWER, UPPER = (-7.0, float(np.log(LEARNED.eps_min))), (1.0, float(np.log(LEARNED.eps_max)))
CLOSE = 0.02  # dB below the best of all runs: reached


def measure(args, recorder) -> None:
    crops = common.crops(args.sizes[0], args.batch[0], args.images, args.seed)
    batch = {"x": jnp.asarray(crops.clean), "y": jnp.asarray(crops.noisy)}
    count, pixels = args.batch[0], args.sizes[0] ** 2
    oracle = jb.implicit.Oracle(jb.variational(None, LEARNED), jb.losses.squared_error())
    exact = lambda params: float(oracle.value(params, batch, tol=1e-4).value)  # noqa: E731

    def row(method: str, start, first, works, values, params, seconds) -> None:
        figures = {
            "work": np.asarray(works) / count, "value": values, "final": exact(params), "params": params,
            "seconds": seconds, "psnr": 10 * np.log10(pixels / (2 * exact(params))),
        }  # fmt: skip
        recorder.add({"method": method, "start": start, "first": first}, figures)
        recorder.write()
        print(f"{method} {start} {first}: {figures['psnr']:.3f} dB after {works[-1] / count:.0f} per image", flush=True)

    for start in STARTS[: args.starts]:
        theta = jnp.asarray(start)
        found = jb.fit(
            jb.MAID(oracle, projection=LEARNED.project), theta, batch, steps=500, work_budget=args.budget * count
        )
        row("MAID", start, None, found.history["work"], found.history["value"], found.params,
            found.history["seconds"].sum())  # fmt: skip
        for first in FIRST:
            found = jb.dfols.minimise(
                oracle,
                theta,
                batch,
                budget=args.budget * count,
                tol=first,
                lower=jnp.array(LOWER),
                upper=jnp.array(UPPER),
            )
            best = np.minimum.accumulate(found.history["value"])
            row("DFO-LS", start, first, found.history["work"], best, found.params, found.history["seconds"].sum())


# ---------------------------------------------------------------------------------------------------------------- page


def _psnr(value, rows) -> np.ndarray:
    pixels = rows[0]["settings"]["sizes"][0] ** 2
    return 10 * np.log10(pixels / (2 * np.asarray([common.number(v) for v in value])))


def _reached(row, rows, goal: float):
    """Work per image at which the run came within CLOSE of the goal, by the values that it measured itself."""
    good = np.flatnonzero(_psnr(row["figures"]["value"], rows) >= goal - CLOSE)
    return row["figures"]["work"][good[0]] if good.size else None


def render(rows: Sequence[dict]) -> str:
    goal = max(row["figures"]["psnr"] for row in rows)
    lines = []
    for row in rows:
        case, figures = row["case"], row["figures"]
        work = _reached(row, rows, goal)
        lines.append([
            case["method"] if case["first"] is None else f"{case['method']}, first accuracy {case['first']:g}",
            "({:g}, {:g})".format(*case["start"]), f"{figures['psnr']:.3f}", common.whole(figures["work"][-1]),
            "–" if work is None else common.whole(work),
        ])  # fmt: skip
    header = ["method", "from", "PSNR of mean MSE", "work per image", f"to {CLOSE} dB of the best"]
    settings = rows[0]["settings"]
    intro = (
        f"{settings['batch'][0]} crops of {settings['sizes'][0]} x {settings['sizes'][0]}; best of all {goal:.3f} dB.\n"
    )
    return "\n".join([intro, common.table(header, lines), "![MAID and DFO-LS](figures/ehrhardt_2025_dfols.png)\n"])


def figures(rows: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    starts = list(dict.fromkeys(tuple(row["case"]["start"]) for row in rows))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(starts), sharey=True))
    for start, axes in zip(starts, panels, strict=True):
        for row in rows:
            if tuple(row["case"]["start"]) != start:
                continue
            first = row["case"]["first"]
            style = {"color": "#0072b2", "lw": 2} if first is None else {"lw": 1, "ls": "--"}
            label = "MAID, automatic" if first is None else f"DFO-LS, first accuracy {first:g}"
            axes.plot(row["figures"]["work"], _psnr(row["figures"]["value"], rows), label=label, **style)
        axes.set(xscale="log", xlabel="gradient-equivalents per image", title=f"from ({start[0]:g}, {start[1]:g})")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("PSNR of mean MSE [dB]")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "ehrhardt_2025_dfols.png", dpi=110)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"sizes": [64], "batch": [10], "budget": 5000, "starts": 3},
        quick={"sizes": [16], "batch": [2], "budget": 100, "starts": 1},
    )
    options.add_argument("--budget", type=int, help="gradient-equivalents per image of each run")
    options.add_argument("--starts", type=int, help="number of starts")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
