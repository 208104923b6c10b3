"""Computed tomography: the projector against closed forms, and a total-variation weight learned through it.

Accuracy: sinograms of a drawn Shepp-Logan phantom against its closed form (means over bins), beside ASTRA's 'linear'.
Learning: HOAG and MAID find the weight of smoothed total variation for drawn abdomens with photon noise, whose
sinograms are closed forms too, against a grid of weights; and one hypergradient through the projector against the same
through a bridge to a host code with the same matrix.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common

NAME = "ct"
TITLE = "Computed tomography: accuracy, and learning through the projector"
TV = jb.regularizers.SmoothedTV(eps=0.003)
START = 1e-2  # first weight
GRID = 2.0 ** np.arange(-1.5, 1.6, 0.5)  # around what MAID finds
BRIDGE = 1e-6  # relative difference of the hypergradients


def geometry(size: int, views: int, width: float) -> jb.operators.ParallelBeam:
    """``size`` pixels and the bins of half a turn over an object of this width."""
    angles = np.pi * np.arange(views) / views
    bins = math.ceil(math.sqrt(2) * size) + 1
    pixel = width / size
    return jb.operators.ParallelBeam((size, size), angles, bins, pixel_size=pixel, detector_size=pixel)


def accuracy(args, recorder) -> None:
    phantom = jb.data.shepp_logan()
    for size, views in args.sinograms:
        A = geometry(size, views, 2.2)
        image = jb.data.raster(phantom, A.in_shape, pixel_size=A.pixel_size, dtype=np.float64)
        exact = jb.data.parallel_sinogram(phantom, A.angles, A.n_detectors, A.detector_size, dtype=np.float64)
        found = {"pure JAX": A(jnp.asarray(image))}
        if importlib.util.find_spec("astra"):
            like = {"pixel_size": A.pixel_size, "detector_size": A.detector_size, "device": "cpu"}
            found["ASTRA linear"] = jb.operators.Astra(A.in_shape, A.angles, A.n_detectors, **like)(jnp.asarray(image))
        for name, sinogram in found.items():
            error = np.linalg.norm(np.asarray(sinogram) - exact) / np.linalg.norm(exact)
            recorder.add({"part": "accuracy", "size": size, "views": views, "projector": name}, {"error": error})


def slices(args, A) -> dict:
    """Drawn abdomens and their noisy sinograms."""
    rng = np.random.default_rng(args.seed)
    drawn = [jb.data.abdomen(rng) for _ in range(args.batch[0])]
    images = np.stack([jb.data.raster(p.ellipses, A.in_shape, pixel_size=A.pixel_size) for p in drawn])
    exact = [jb.data.parallel_sinogram(p.ellipses, A.angles, A.n_detectors, A.detector_size) for p in drawn]
    noisy = jb.data.poisson_transmission(rng, np.stack(exact), args.photons)
    return {"x": jnp.asarray(images, float), "y": jnp.asarray(noisy, float)}


def learning(args, recorder) -> None:
    A = geometry(args.sizes[0], args.views, 360.0)
    batch, norm = slices(args, A), A.norm()
    batch["y"] = batch["y"] / norm
    oracle = jb.implicit.Oracle(jb.variational((1 / norm) * A, TV), jb.losses.squared_error())
    start = jnp.log(jnp.array([START]))
    value = lambda w: float(oracle.value(jnp.log(jnp.array([w])), batch, tol=1e-4).value)  # noqa: E731
    methods = {"MAID": jb.MAID(oracle), "HOAG, quadratic": jb.HOAG(oracle)}
    weights = {}
    for name, method in methods.items():
        found = jb.fit(method, start, batch, steps=args.steps)
        weights[name] = float(jnp.exp(found.params[0]))
        figures = {
            "weight": weights[name], "loss": value(weights[name]), "steps": found.steps,
            "work": found.work / len(batch["x"]), "seconds": found.history["seconds"].sum(),
        }  # fmt: skip
        recorder.add({"part": "learning", "method": name}, figures)
        recorder.write()
    grid = {w: value(w) for w in weights["MAID"] * GRID}
    best = min(grid, key=grid.get)
    recorder.add({"part": "learning", "method": f"grid of {len(grid)}"}, {"weight": best, "loss": grid[best]})


def bridge(args, recorder) -> None:
    """The hypergradient through a host code that multiplies with the projector's matrix."""
    size, views = args.bridge
    A = geometry(size, views, 360.0)
    columns = np.asarray(A(jnp.eye(size**2).reshape(-1, size, size))).reshape(size**2, -1)
    host = jb.operators.from_callbacks(
        lambda x: (x.reshape(-1, size**2) @ columns).reshape(-1, *A.out_shape),
        lambda y: (y.reshape(-1, columns.shape[1]) @ columns.T).reshape(-1, size, size),
        A.in_shape, A.out_shape, dtype="float64", batched=True,
    )  # fmt: skip
    batch, norm = slices(args, A), A.norm()
    batch["y"] = batch["y"] / norm
    theta = jnp.log(jnp.array([1e-3]))
    embedded, bridged = (
        jb.implicit.Oracle(jb.variational((1 / norm) * K, TV), jb.losses.squared_error(), estimate=False)(
            theta, batch, tol=1e-8, adjoint_tol=1e-8
        )
        for K in (A, host)
    )  # fmt: skip
    jb.check(embedded)
    difference = float(abs(embedded.grad[0] - bridged.grad[0]) / abs(embedded.grad[0]))
    recorder.add({"part": "bridge", "size": size, "views": views}, {"difference": difference})


def render(rows: Sequence[dict]) -> str:
    def of(part):
        return [row for row in rows if row["case"]["part"] == part]

    lines = [
        [
            f"{r['case']['size']}², {r['case']['views']} views", r["case"]["projector"],
            f"{100 * r['figures']['error']:.3f} %",
        ]
        for r in of("accuracy")
    ]  # fmt: skip
    text = "Relative error against the closed form:\n\n" + common.table(["phantom", "projector", "error"], lines)
    lines = [
        [
            r["case"]["method"], common.scientific(r["figures"]["weight"], 2), common.rounded(r["figures"]["loss"], 5),
            r["figures"].get("steps", "–"), common.whole(r["figures"].get("work")),
            common.rounded(r["figures"].get("seconds")),
        ]
        for r in of("learning")
    ]  # fmt: skip
    settings = rows[0]["settings"]
    text += (
        f"\n{settings['batch'][0]} slices of {settings['sizes'][0]}², {settings['views']} views, "
        f"{settings['photons']:g} photons per ray, from the weight {START:g}:\n\n"
    )
    text += common.table(["", "weight", "loss", "steps", "work per slice", "s"], lines)
    for row in of("bridge"):
        difference = row["figures"]["difference"]
        met = "met" if difference <= BRIDGE else "NOT met"
        text += (
            f"\n- Hypergradient through a bridge with the same matrix ({row['case']['size']}², {row['case']['views']} "
            f"views): relative difference {common.scientific(difference)}; criterion <= {BRIDGE:g}: {met}.\n"
        )
    return text


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={
            "sizes": [64], "batch": [3], "views": 45, "photons": 7e4, "steps": 30, "bridge": (24, 20),
            "sinograms": ((128, 180), (512, 90)),
        },
        quick={"sizes": [16], "batch": [1], "views": 10, "steps": 2, "bridge": (8, 6), "sinograms": ((32, 20),)},
    )  # fmt: skip
    options.add_argument("--views", type=int, help="angles in half a turn")
    options.add_argument("--photons", type=float, help="photons per ray before the patient")
    options.add_argument("--steps", type=int, help="of each method")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    # for all threads: JAX runs callbacks in others, which do not see the context of `common.precision`
    jax.config.update("jax_enable_x64", True)
    for part in (accuracy, bridge, learning):
        part(args, recorder)
        recorder.write()
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
