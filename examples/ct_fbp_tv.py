"""Computed tomography: filtered backprojection against total variation whose weight is learned through the projector.

Lower level, for each sinogram y:   x_hat(theta) = argmin_x 1/2 ||A x - y||^2/||A||^2 + e^theta sum sqrt(|Dx|^2 + eps^2)
Upper level, over slices with known x*:   min_theta mean -PSNR of x_hat(theta)

The data are sections through drawn abdomens with analytic line integrals (so the projector that reconstructs did not
make them) and the photon noise of I0 photons per ray; units are millimetres and densities relative to water. MAID
learns the weight from a few slices through A, in pure JAX; a grid of weights is a check on it. --slices FILE takes an
array (n, H, W) of real slices in Hounsfield units (.npy, or the entry "hu" of an .npz) instead.

Writes a table and a figure to --out; about a minute on two cores.
"""

from __future__ import annotations

import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pictures
import scans

import jbilevel as jb

TV = jb.regularizers.SmoothedTV(eps=0.003)


def slices_of(args, rng):
    """(densities (n, H, W), ellipses or None, pixel size in mm)."""
    count = args.train + args.test
    if args.slices is None:
        return scans.drawn(count, args.size, rng)
    hu = scans.hounsfield(args.slices, count)["hu"]
    chosen = rng.permutation(len(hu))[:count]
    return jb.data.hu_to_density(hu[chosen].astype(np.float32)), None, args.pixel_mm


def psnr_loss(params, x, data):
    """-PSNR in decibels for densities of up to 2."""
    return 10 * jnp.log10(jnp.mean((x - data["x"]) ** 2) / 4)


def main(argv=None):
    parser = pictures.options(__doc__, "ct_fbp_tv")
    parser.add_argument("--slices", type=Path, help="array of slices in Hounsfield units instead of drawn abdomens")
    parser.add_argument("--pixel-mm", type=float, default=1.4, help="pixel size of --slices")
    parser.add_argument("--size", type=int, default=128, help="side of the drawn slices in pixels")
    parser.add_argument("--views", type=int, default=60, help="angles in half a turn")
    parser.add_argument("--photons", type=float, default=7e4, help="photons per ray before the patient")
    parser.add_argument("--train", type=int, default=3, help="slices to learn from")
    parser.add_argument("--test", type=int, default=3, help="slices to judge on")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    images, phantoms, pixel = slices_of(args, rng)
    A = scans.geometry(images.shape[1:], args.views, pixel)
    sinograms = scans.measured(A, images, phantoms, args.photons, rng)

    norm = A.norm()
    problem = jb.variational((1 / norm) * A, TV)
    batch = {"x": jnp.asarray(images), "y": sinograms / norm}
    train, test = ({key: v[part] for key, v in batch.items()} for part in (slice(args.train), slice(args.train, None)))

    oracle = jb.implicit.Oracle(problem, psnr_loss)
    started = time.perf_counter()
    start = jnp.log(jnp.array([1e-2], jnp.float32))
    result = jb.fit(jb.MAID(oracle), start, train, steps=30, **pictures.saving(args, "maid"))
    print(f"learned weight {float(jnp.exp(result.params[0])):.2e} in {result.steps} steps, {result.work:.0f} "
          f"gradient-equivalents, {time.perf_counter() - started:.0f} s: {result.message}")  # fmt: skip
    grid = np.exp(float(result.params[0]) + np.log(2) * np.arange(-2, 3))
    losses = [float(oracle.value(jnp.log(jnp.array([w], jnp.float32)), train, tol=0.05).value) for w in grid]
    print("training PSNR around it:", ", ".join(f"{-v:.2f} dB at {w:.2e}" for w, v in zip(grid, losses, strict=True)))

    rows = {f"FBP, {name}": A.fbp(sinograms[args.train :], name) for name in ("ram-lak", "hann")}
    rows["TV, learned"] = pictures.reconstruct(problem, result.params, test)
    rows = {name: np.asarray(found) for name, found in rows.items()}
    pictures.report(args, test["x"], rows, name="ct.png", window=scans.WINDOW, data_range=2.0)


if __name__ == "__main__":
    main()
