"""How far are proven bounds from the truth on photographs and a CT slice, and can a method rely on them?

Reconstructions as `jb.variational` builds them, in the smooth and in the saddle form, and their proven bounds: of the
distance to the solution, of the upper-level value and of the hypergradient, over the true errors. These come from a
solve that is four digits more accurate, in the smooth form where there is one. Then MAID with ``certified=True``, which
accepts a step only when the exact value is proven to fall, with the exact values beside it.

Rows of other scripts of this page are named "certificates: SCRIPT".
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common
from benchmarks.reliability import first_paragraph

NAME = Path(__file__).stem
TITLE = "Certificates"
RIDGE = 0.05  # of the slice: the only convexity that is known there
VIEWS = 45
NOISE = 0.02  # of the sinogram, relative
STEPS = 100_000


def smooth_loss(params, x, data):
    return 0.5 * jnp.sum((x - data["x"]) ** 2)


def saddle_loss(params, pair, data):
    return 0.5 * jnp.sum((pair[0] - data["x"]) ** 2)


class Model(NamedTuple):
    regularizer: jb.Regularizer
    forms: tuple[str, ...]
    start: Callable[[float], Any]  # params of a strength


def models(filters: int) -> dict[str, Model]:
    tv, huber, both = jb.regularizers.SmoothedTV(), jb.regularizers.TV(width=0.01), ("smooth", "saddle")
    experts = jb.regularizers.FoE(filters, 5, potential="psi")
    return {
        "Huber-TV": Model(huber, ("saddle",), lambda weight: huber.init(weight=weight)),
        "SmoothedTV": Model(tv, both, lambda weight: tv.init(weight=weight)),
        "FoE-psi": Model(experts, both, lambda weight: experts.init(jax.random.key(0), weight=weight)),
    }


class Scene(NamedTuple):
    operator: Any
    ridge: float
    batch: dict
    weight: float  # of the regularisers where bounds are measured; descents start at a fifth of it


def photograph(args) -> Scene:
    found = common.images(args.sizes[0], 1, args.images)
    return Scene(None, 0.0, {"x": jnp.asarray(found.clean), "y": jnp.asarray(found.noisy)}, 0.05)


def ct_slice(args) -> Scene:
    """A drawn abdomen, 1 is water; ||A|| = 1."""
    size, rng = args.sizes[-1], np.random.default_rng(args.seed)
    widths = {"pixel_size": 360 / size, "detector_size": 360 / size}
    A = jb.operators.ParallelBeam((size, size), np.pi * np.arange(VIEWS) / VIEWS, int(1.5 * size), **widths)
    drawn = jb.data.abdomen(rng)
    x = jnp.asarray(jb.data.raster(drawn.ellipses, A.in_shape, pixel_size=A.pixel_size), float)
    A = (1 / A.norm()) * A
    y = A(x)
    y = y + NOISE * jnp.sqrt(jnp.mean(y**2)) * rng.standard_normal(y.shape)
    return Scene(A, RIDGE, {"x": x[None], "y": y[None]}, 0.01)


MODELS = ("Huber-TV", "SmoothedTV", "FoE-psi")
SCENES = {"photograph": photograph, "CT slice": ct_slice}


def oracle_of(scene: Scene, model: Model, form: str, **options) -> jb.Oracle:
    problem = jb.variational(scene.operator, model.regularizer, form=form, ridge=scene.ridge)
    limits = {"max_steps": STEPS} | ({"max_adjoint_steps": STEPS} if form == "saddle" else {})
    loss = smooth_loss if form == "smooth" else saddle_loss
    return problem.oracle(loss, loss_smoothness=1.0, **limits, **options)


def bounds(recorder, scene_name: str, scene: Scene, name: str, model: Model, tolerances) -> None:
    params, finest = model.start(scene.weight), min(tolerances)
    reference = oracle_of(scene, model, model.forms[0], correct=True)
    exact = reference(params, scene.batch, tol=1e-4 * finest, adjoint_tol=1e-4 * finest)
    image, gradient = jb.image_of(exact.warm.x), ravel_pytree(exact.grad)[0]
    for form in model.forms:
        oracle = oracle_of(scene, model, form)
        for tol in tolerances:
            hg = oracle(params, scene.batch, tol=tol, adjoint_tol=tol)
            away = float(jnp.linalg.norm(ravel_pytree(hg.grad)[0] - gradient))
            value, distance = abs(float(hg.value - exact.value)), float(jnp.linalg.norm(jb.image_of(hg.warm.x) - image))
            figures = {
                "distance": distance, "distance_bound": float(hg.lower.error[0]),
                "value": value, "value_bound": float(hg.value_bound),
                "gradient": away, "gradient_bound": float(hg.bound),
                "exact_value": float(exact.value), "exact_gradient": float(jnp.linalg.norm(gradient)),
                "status": int(hg.status),
            }  # fmt: skip
            finite = {k: v if np.isfinite(v) else None for k, v in figures.items()}
            recorder.add({"part": "bounds", "scene": scene_name, "model": name, "form": form, "tol": tol}, finite)
            print(scene_name, name, form, tol, *(f"{k} {v:.3g}" for k, v in figures.items()), flush=True)


def descent(recorder, scene_name: str, scene: Scene, name: str, model: Model, form: str, steps: int) -> None:
    """The exact values are computed afterwards, at the params of each step."""
    start = model.start(0.2 * scene.weight)
    visited = [start]
    method = jb.MAID(oracle_of(scene, model, form, estimate=False), certified=True)
    result = jb.fit(
        method, start, scene.batch, steps=steps, callback=lambda step, state, info: visited.append(state.params)
    )
    exact = oracle_of(scene, model, form, correct=True)
    values = [float(exact.value(params, scene.batch, tol=1e-7).value) for params in visited]
    figures = {
        "first": values[0], "last": values[-1], "steps": result.steps,
        "rises": int(np.sum(np.diff(values) > 0)), "status": result.status.name, "work": float(result.work),
        "tol": float(result.state.tol),
    }  # fmt: skip
    recorder.add({"part": "descent", "scene": scene_name, "model": name, "form": form}, figures)
    print("descent", scene_name, name, form, figures, flush=True)


def measure(args, recorder) -> None:
    known = models(args.filters)
    for scene_name in args.scenes:
        scene = SCENES[scene_name](args)
        for name in args.models:
            bounds(recorder, scene_name, scene, name, known[name], args.tolerances)
            for form in known[name].forms:
                descent(recorder, scene_name, scene, name, known[name], form, args.steps)
            recorder.write()


# --------------------------------------------------------------------------------------------------------------- page


def render(rows: Sequence[dict]) -> str:
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row["benchmark"].partition(": ")[2], []).append(row)
    pages = [own_page(parts.pop(""))] if "" in parts else []
    for script, found in parts.items():
        module = importlib.import_module(f"benchmarks.{script}")
        pages.append(f"### {first_paragraph(module)}\n\n{module.render(found)}")
    return "\n".join(pages)


def own_page(rows: Sequence[dict]) -> str:
    lines, falls = [], []
    for row in rows:
        case, f = row["case"], row["figures"]
        key = [f"{case['scene']}, {case['model']}", case["form"]]
        if case["part"] == "descent":
            falls.append([*key, common.rounded(f["first"]), common.rounded(f["last"]), f["steps"], f["rises"]])
        else:
            ratios = [ratio(f, what) for what in ("distance", "value", "gradient")]
            bound = f["gradient_bound"]
            relative = "–" if bound is None else common.scientific(bound / f["exact_gradient"])
            lines.append([*key, f"{case['tol']:.0e}".replace("e-0", "e-"), *ratios, relative])
    header = [
        "problem",
        "form",
        "tolerance",
        "distance: bound/true",
        "value",
        "gradient",
        "its bound over the gradient",
    ]
    size = rows[0]["settings"]["sizes"]
    scenes = (
        f"A photograph of {size[0]} x {size[0]} pixels with noise of 0.1, and a CT slice of {size[-1]} x {size[-1]} "
        f"with {VIEWS} views, whose only known convexity is a ridge of {RIDGE}. A dash: the true error is below what "
        "the reference resolves. A bound that is larger than the gradient itself (last column above 1) says nothing.\n"
    )
    values = "Exact values at the first and the last parameters, and how often one exceeds the one before.\n"
    tables = (
        common.table(header, lines),
        common.table(["problem", "form", "first value", "last", "steps", "rises"], falls),
    )
    return "\n".join(
        ["### Bound over true error\n", scenes, tables[0], "### MAID with proven errors\n", values, tables[1]]
    )


def ratio(figures, what: str) -> str:
    bound, true = figures[f"{what}_bound"], figures[what]
    if bound is None:
        return "no bound"
    resolved = 1e-11 * max(1.0, figures.get(f"exact_{what}", 1.0))
    return common.rounded(bound / true, 2) if true > resolved else "–"


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [128, 64], "tolerances": [1e-1, 1e-2, 1e-4], "filters": 8, "steps": 5, "repeats": 1,
            "scenes": list(SCENES), "models": list(MODELS),
        },
        quick={"sizes": [8], "tolerances": [1e-2], "steps": 1, "scenes": ["photograph"], "models": ["Huber-TV"]},
    )  # fmt: skip
    options.add_argument("--scenes", nargs="+", choices=SCENES, help="what is reconstructed")
    options.add_argument("--models", nargs="+", choices=MODELS, help="how")
    options.add_argument("--tolerances", nargs="+", type=float, help="of both solves")
    options.add_argument("--filters", type=int, help="of the fields of experts")
    options.add_argument("--steps", type=int, help="of MAID")
    common.run(NAME, options, measure, render, argv=argv)


if __name__ == "__main__":
    main()
