"""Computed tomography: a learned primal-dual network against filtered backprojection from few views of low dose.

Training:   min_theta mean 1/2 mean (R_theta(y) - x*)^2       R_theta: layers of small networks around A and A^T

The data are sections through drawn abdomens with analytic line integrals and photon noise. --data FILE takes real
slices in Hounsfield units instead (.npy, or .npz with "hu" and, if they are there, "patient" and "pixel_mm"): they are
measured on their own grid, reconstructed on one of --size, and split by patient. --dataset mnist --data FOLDER takes
handwritten digits from idx files. --subsets and --sketch make the network stochastic and sketched.

The network trains by the same two lines as any model here: `FirstOrder` on an `explicit.Oracle`, and `fit` with a
checkpoint; run the command again with more --steps to go on. What is judged is the average of the iterates that is
best on validation data. Writes a table and a figure to --out; about a minute on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pictures
import scans
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees
from jbilevel.nets.lpd import NAMED

SMALL = {  # a network for minutes on a CPU: starts as the best filtered backprojection
    "memory": (5, 5), "width": 16, "initial": "fbp", "zero_last": True,
}  # fmt: skip
LOSS = jb.losses.squared_error(mean=True)


def drawn(args, rng):
    """(operator, images, sinograms, parts) of drawn abdomens; parts: indices for training, validation and test."""
    images, phantoms, pixel = scans.drawn(args.train + args.validation + args.test, args.size, rng)
    A = scans.geometry(images.shape[1:], args.views, pixel)
    return A, images, scans.measured(A, images, phantoms, args.photons, rng), split(args, len(images))


def slices(args, rng):
    """The same for slices of patients, measured on the grid that they have and reconstructed on a coarser one."""
    stored = scans.hounsfield(args.data, 3)
    fine = np.asarray(jb.data.hu_to_density(stored["hu"].astype(np.float32)))
    count, pixel = len(fine), float(np.median(stored.get("pixel_mm", args.pixel_mm)))
    A, images, sinograms = scans.rescanned(fine, pixel, args.size, args.views, args.photons, rng)
    patients = stored.get("patient", np.arange(count)).tolist()
    return A, images, sinograms, jb.data.split_by_patient(patients, (0.7, 0.1, 0.2), rng)


def digits(args, rng):
    """The same for handwritten digits, in [0, 1]; the darkest ray lets exp(-4) of its photons through."""
    images = jb.data.mnist(args.data, limit=args.train + args.validation + args.test).images
    A = scans.geometry(images.shape[1:], args.views, 1.0)
    exact = np.asarray(A(jnp.asarray(images)))
    sinograms = jb.data.poisson_transmission(rng, exact, args.photons, mu=4 / exact.max())
    return A, images, jnp.asarray(sinograms), split(args, len(images))


def split(args, count: int):
    return np.split(np.arange(count), [count - args.validation - args.test, count - args.test])


def network(args, A, filter: str):
    """``(f, params)`` of the network that the options describe."""
    settings = {"subsets": args.subsets, "sketched": args.sketched, "filter": filter}
    rngs = nnx.Rngs(args.seed)
    if args.network != "small":
        return jb.nets.from_flax(jb.nets.LPD.named(args.network, operator=A, rngs=rngs, **settings))
    coarse = [2] * args.sketch + [1] * (args.layers - args.sketch) if args.sketch else None
    return jb.nets.from_flax(jb.nets.LPD(A, rngs=rngs, layers=args.layers, sketch=coarse, **SMALL, **settings))


def train(args, f, params, training, validation):
    """The average of the iterates that is best on the validation data."""
    best, step, result = scans.train(
        lambda params, data: LOSS(None, f(params, data["y"]), data), params, training, validation, steps=args.steps,
        batch=args.batch, rate=args.rate, seed=args.seed, folder=args.out, resume=args.resume, progress=not args.quiet,
    )  # fmt: skip
    seconds = result.history["seconds"].sum()
    print(f"{result.steps} steps of {args.batch} images in {seconds:.0f} s, and {result.compile_seconds:.0f} s of "
          f"compilation: {result.message} Best on validation data after step {step}.")  # fmt: skip
    return best


def main(argv=None):
    parser = pictures.options(__doc__, "ct_lpd")
    parser.add_argument("--dataset", choices=("ct", "mnist"), default="ct")
    parser.add_argument("--data", type=Path, help="slices in Hounsfield units, or the folder of the idx files of mnist")
    parser.add_argument("--pixel-mm", type=float, default=1.4, help="pixel size of --data that does not say its own")
    parser.add_argument("--size", type=int, default=64, help="side of the reconstruction in pixels")
    parser.add_argument("--views", type=int, default=24, help="angles in half a turn")
    parser.add_argument("--photons", type=float, default=7e4, help="photons per ray before the patient")
    parser.add_argument("--network", choices=("small", *NAMED), default="small")
    parser.add_argument("--layers", type=int, default=5, help="of the small network")
    parser.add_argument("--subsets", type=int, default=1, help="of the angles, one for each layer in turn")
    parser.add_argument(
        "--sketch", type=int, default=0, help="first layers of the small network that see a coarse grid"
    )
    parser.add_argument("--sketched", choices=("operator", "primal", "residual"), default="residual")
    parser.add_argument("--train", type=int, default=300, help="drawn images to learn from")
    parser.add_argument("--validation", type=int, default=16)
    parser.add_argument("--test", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="images per step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3, help="greatest learning rate")
    args = pictures.parsed(parser, argv)
    if args.dataset == "mnist" and args.data is None:
        parser.error("--dataset mnist needs --data FOLDER with the idx files")

    rng = np.random.default_rng(args.seed)
    source = digits if args.dataset == "mnist" else drawn if args.data is None else slices
    A, images, sinograms, parts = source(args, rng)
    data = {"x": jnp.asarray(images, jnp.float32), "y": jnp.asarray(sinograms, jnp.float32)}
    training, validation, test = ({k: v[np.asarray(part)] for k, v in data.items()} for part in parts)

    filter = scans.best_filter(A, validation)
    f, params = network(args, A, filter)
    print(f"{len(training['x'])} images of {A.in_shape}, {A.out_shape[0]} views; {trees.size(params)} parameters")
    params = train(args, f, params, training, validation)

    learned = jax.jit(jax.vmap(f, (None, 0)))
    jax.block_until_ready(learned(params, test["y"]))
    started = time.perf_counter()
    found = np.asarray(learned(params, test["y"]))
    print(f"inference: {1e3 * (time.perf_counter() - started) / len(found):.1f} ms per image")
    rows = {f"FBP, {name}": np.asarray(A.fbp(test["y"], name)) for name in dict.fromkeys(("ram-lak", filter))}
    rows |= {"sketched " * bool(args.sketch) + ("LSPD" if args.subsets > 1 else "LPD"): found}
    scale = {"window": scans.WINDOW, "data_range": 2.0} if args.dataset == "ct" else {}
    pictures.report(args, test["x"], rows, name="ct_lpd.png", **scale)


if __name__ == "__main__":
    main()
