"""Fields of Experts with thousands of parameters, MAID without tuning against HOAG (Ehrhardt 2025).

Crops of photographs with noise 0.1. Every method starts at the same filters, chooses its own first accuracies, and
may spend the same work, counted in gradient-equivalents of the lower level (values, gradients and Hessian
products count one each). Losses are computed again afterwards by tight solves that are not counted, on the training
crops and on crops that were not trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common

NAME = "ehrhardt_2025_foe"
TITLE = "Ehrhardt 2025: Fields of Experts, MAID against HOAG"
SCHEDULES = ("exponential", "quadratic", "cubic", "exact")
TV = jb.regularizers.SmoothedTV(eps=1e-3)
TV_WEIGHTS = tuple(0.05 * 1.1**k for k in range(8))
TIGHT = 1e-2  # of the losses that are compared, absolute 2-norm per crop
WITHIN = 1.02  # MAID's training loss over the best of HOAG
COLOURS = {"MAID": "#0072b2", **dict(zip(SCHEDULES, ("#d55e00", "#e69f00", "#cc79a7", "#999999"), strict=True))}


def crops(args) -> tuple[dict, dict]:
    """Training and test crops, from different pictures."""

    def batch(clean, rng):
        return {"x": jnp.asarray(clean, jnp.float32), "y": jnp.asarray(jb.data.gaussian(rng, clean, 0.1), jnp.float32)}

    size, count = args.sizes[0], args.batch[0]
    if args.images is None:
        side = max(size, min(2 * size, 180))  # the smallest photograph has 191 pixels
        train, test = (
            jb.data.photographs(side, names) for names in (jb.data.TRAIN_PHOTOGRAPHS, jb.data.TEST_PHOTOGRAPHS)
        )
    else:
        images = jb.data.image_folder(args.images).images
        train, test = images[1::2], images[::2]
    rng = np.random.default_rng(args.seed)

    def drawn(images):
        return np.concatenate([jb.data.crops(images[i % len(images)], size, 1, rng) for i in range(count)])

    return batch(drawn(train), rng), batch(drawn(test), rng)


def methods(args, oracle, projection, short: float):
    """(case, method) of every run; HOAG as its author has it, also with MAID's ``short`` first step, as its own is far
    too long here."""
    yield {"method": "MAID", "schedule": None}, jb.MAID(oracle, projection=projection)
    for schedule in args.schedules:
        for first, length in (("own", None), ("short", short)):
            case = {"method": "HOAG", "schedule": schedule, "first step": first}
            yield case, jb.HOAG(oracle, schedule, rule="pedregosa", projection=projection, step_size=length)


def measure(args, recorder) -> None:
    train, test = crops(args)
    count, pixels = args.batch[0], args.sizes[0] ** 2
    foe = jb.regularizers.FoE(count=args.filters, size=args.filter_size)
    start = foe.init(jax.random.key(args.seed), dtype=jnp.float32)

    def exact(regularizer, params, batch) -> float:
        judge = jb.implicit.Oracle(jb.variational(None, regularizer), jb.losses.squared_error(), estimate=False)
        found = judge.value(params, batch, tol=TIGHT)
        jb.check(found)
        return float(found.value)

    def psnr(loss: float) -> float:
        return float(10 * np.log10(pixels / (2 * loss)))

    weights = [jnp.log(jnp.array([w], jnp.float32)) for w in TV_WEIGHTS]
    best = {name: min(exact(TV, w, batch) for w in weights) for name, batch in (("train", train), ("test", test))}
    recorder.add(
        {"method": "TV, best weight", "schedule": None},
        {"loss": best["train"], "psnr": psnr(best["train"]), "psnr_test": psnr(best["test"])},
    )
    oracle = jb.implicit.Oracle(jb.variational(None, foe), jb.losses.squared_error())
    hg = oracle(start, train, tol=TIGHT)
    short = 0.1 * float(optax.tree.norm(start)) / float(optax.tree.norm(hg.grad))
    for case, method in methods(args, oracle, foe.project, short):
        found = jb.fit(method, start, train, steps=10**6, work_budget=args.budget * count)
        if found.status == jb.FitStatus.FAILED:
            raise SystemExit(f"{case}: {found.message}")
        history, loss = found.history, exact(foe, found.params, train)
        figures = {
            "loss": loss, "psnr": psnr(loss), "psnr_test": psnr(exact(foe, found.params, test)), "steps": found.steps,
            "seconds": history["seconds"].sum(), "work": history["work"] / count, "value": history["value"],
            "tol": history["tol"], "adjoint_tol": history["adjoint_tol"], "step": history["step"],
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)), "message": found.message,
        }  # fmt: skip
        recorder.add(case, figures)
        recorder.write()
        print(f"{case}: loss {loss:.4f}, {figures['psnr']:.3f} dB, unseen {figures['psnr_test']:.3f} dB, "
              f"{found.steps} steps, {figures['seconds']:.0f} s", flush=True)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- page


def _name(row: dict) -> str:
    case = row["case"]
    if case["schedule"] is None:
        return case["method"]
    return f"{case['method']}, {case['schedule']}" + (", MAID's first step" if case["first step"] == "short" else "")


def render(rows: Sequence[dict]) -> str:
    settings = rows[0]["settings"]
    lines = [
        [
            _name(row), common.rounded(row["figures"]["loss"], 4), f"{row['figures']['psnr']:.2f}",
            f"{row['figures']['psnr_test']:.2f}", row["figures"].get("steps", "–"),
            common.whole(row["figures"]["work"][-1]) if "work" in row["figures"] else "–",
            common.whole(row["figures"].get("seconds")),
        ]
        for row in rows
    ]  # fmt: skip
    learned = [row for row in rows if "work" in row["figures"]]
    intro = (
        f"{settings['batch'][0]} crops of {settings['sizes'][0]} x {settings['sizes'][0]}, {settings['filters']} "
        f"filters of {settings['filter_size']} x {settings['filter_size']}: "
        f"{learned[0]['figures']['parameters']} parameters; budget {settings['budget']} gradient-equivalents "
        "per image.\n"
    )
    header = ["method", "training loss", "PSNR of mean MSE", "unseen crops", "steps", "work per image", "s"]
    maid = [row["figures"]["loss"] for row in learned if row["case"]["method"] == "MAID"]
    hoag = [row["figures"]["loss"] for row in learned if row["case"]["method"] == "HOAG"]
    verdict = ""
    if maid and hoag:
        ratio = maid[0] / min(hoag)
        met = "met" if ratio <= WITHIN else "NOT met"
        verdict = f"- MAID's training loss over the best schedule's: {ratio:.3f}; criterion <= {WITHIN}: {met}.\n"
    picture = "![Training loss and accuracy of MAID and HOAG](figures/ehrhardt_2025_foe.png)\n"
    return "\n".join([intro, common.table(header, lines), verdict, picture])


def figures(rows: Sequence[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    loss, tol, step = figure.subplots(1, 3)
    for row in rows:
        if "work" not in row["figures"]:
            continue
        found, case = row["figures"], row["case"]
        colour = COLOURS[case["schedule"] or "MAID"]
        style = {"color": colour, "lw": 2 if case["method"] == "MAID" else 1.2}
        style["ls"] = "--" if case.get("first step") == "own" else "-"
        loss.plot(found["work"], found["value"], label=_name(row), **style)
        tol.plot(found["work"], found["tol"], **style)
        step.plot(found["work"], np.where(np.asarray(found["step"]) > 0, found["step"], np.nan), **style)
    loss.set(ylabel="training loss", yscale="log")
    tol.set(ylabel="accuracy of the lower level", yscale="log")
    step.set(ylabel="step length", yscale="log")
    for axes in (loss, tol, step):
        axes.set(xlabel="gradient-equivalents per image", xscale="log")
        axes.grid(alpha=0.25)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "ehrhardt_2025_foe.png", dpi=110)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64], "batch": [8], "budget": 3000, "filters": 48, "filter_size": 7, "dtype": ["float32"],
            "schedules": SCHEDULES,
        },
        quick={"sizes": [16], "batch": [2], "budget": 60, "filters": 4, "filter_size": 3, "schedules": SCHEDULES[:1]},
    )  # fmt: skip
    options.add_argument("--budget", type=int, help="gradient-equivalents per image of each run")
    options.add_argument("--filters", type=int, help="number of filters")
    options.add_argument("--filter-size", type=int, help="their side in pixels")
    options.add_argument("--schedules", nargs="+", choices=SCHEDULES, help="of HOAG")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
