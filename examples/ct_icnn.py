"""Computed tomography: an input-convex neural network as regulariser, learned through saddle points by piggyback.

Lower level, for each sinogram y, as a saddle point in x, z and three duals (Bogensperger et al. 2024, (32)-(33)):
    x_hat(theta) = argmin_x 1/2 ||A x - y||^2/||A||^2 + e^g sum psi_w(W z),  z = psi_w(V x),  W >= 0
Upper level, over slices with known x*:   min_theta mean 1/2 ||x_hat(theta) - x*||^2

Drawn abdomens, few views, Gaussian noise. Adam moves the filters V and W (kept nonnegative by a projection, so that
the energy stays convex); the primal-dual method finds each saddle point and then its adjoint with the same steps: no
Hessian, and no memory that grows with the iterations. Filtered backprojection and total variation with its best weight
are what it has to beat.

Writes a table and figures to --out; about four minutes on two cores, after which total variation is still ahead.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures

import jbilevel as jb
from jbilevel import image_of

WEIGHTS = tuple(3e-4 * 1.6**k for k in range(6))
SOLVER = jb.solvers.PDHG(ratio=10.0)  # the image moves by its own size, the duals by that of the noise


def scans(args, rng) -> tuple[jb.operators.ParallelBeam, float, dict]:
    """The projector, its norm, slices in [0, 1] and their noisy sinograms divided by the norm."""
    shape, pixel = (args.size, args.size), 256.0 / args.size
    drawn = [jb.data.abdomen(rng, width=240.0) for _ in range(args.train + args.test)]
    images = np.stack([jb.data.raster(phantom.ellipses, shape, pixel_size=pixel) for phantom in drawn])
    images = (images / images.max()).astype(np.float32)
    bins = math.ceil(math.sqrt(2) * args.size) + 1
    angles = np.pi * np.arange(args.views) / args.views
    A = jb.operators.ParallelBeam(shape, angles, bins, pixel_size=pixel, detector_size=pixel)
    norm = A.norm()
    noisy = jb.data.gaussian(rng, np.asarray(A(jnp.asarray(images))), args.noise)
    return A, norm, {"x": jnp.asarray(images), "y": jnp.asarray(noisy / norm, jnp.float32)}


def reconstruct(problem, params, batch) -> np.ndarray:
    """Images of the saddle points, and a check that they were found."""
    pair, info = jax.vmap(lambda data: jb.solve(problem, params, data, tol=1e-3, max_steps=20000, solver=SOLVER))(batch)
    jb.check(info)
    return np.asarray(image_of(pair))


def main(argv=None):
    parser = pictures.options(__doc__, "ct_icnn")
    parser.add_argument("--size", type=int, default=48, help="side of the slices in pixels")
    parser.add_argument("--views", type=int, default=20, help="angles in half a turn")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation on line integrals (about 100)")
    parser.add_argument("--train", type=int, default=6, help="slices to learn from")
    parser.add_argument("--test", type=int, default=3, help="slices to judge on")
    parser.add_argument(
        "--work", type=float, default=1_000_000, help="stop learning once this many gradient-equivalents are spent"
    )
    parser.add_argument("--steps", type=int, default=80, help="of Adam")
    args = pictures.parsed(parser, argv)

    A, norm, batch = scans(args, np.random.default_rng(args.seed))
    train, test = ({key: v[part] for key, v in batch.items()} for part in (slice(args.train), slice(args.train, None)))
    operator = (1 / norm) * A

    total_variation = jb.variational(operator, jb.regularizers.TV())
    oracle = jb.piggyback.Oracle(total_variation, jb.losses.squared_error(part=0), solver=SOLVER)
    thetas = [jnp.log(jnp.array([w], jnp.float32)) for w in WEIGHTS]
    best = min(thetas, key=lambda theta: float(oracle.value(theta, train, tol=1e-3).value))
    print(f"total variation: weight {float(jnp.exp(best[0])):.1e} is best on the training slices")

    network = jb.regularizers.ICNN(hidden=8, outputs=2, boundary="zero")
    problem = jb.variational(operator, network, form="saddle")
    oracle = jb.piggyback.Oracle(problem, jb.losses.squared_error(part=(0, 0)), solver=SOLVER, estimate=False)
    start = network.init(jax.random.key(args.seed), weight=1e-3)
    adam, scales = optax.adam(optax.cosine_decay_schedule(0.05, args.steps, 0.05)), oracle.scales(start, train)
    accuracy = {"tol": 1e-2 * float(scales.solution), "adjoint_tol": 1e-2 * float(scales.adjoint)}
    result = jb.fit(
        jb.FirstOrder(oracle, adam, projection=network.project, **accuracy), start, train,
        steps=args.steps, work_budget=args.work, **pictures.saving(args, "adam"),
    )  # fmt: skip
    values = result.history["value"]
    print(f"{result.steps} steps, training loss {values[0]:.3f} to {values[-1]:.3f}: {result.message}")
    jb.save(args.out / "icnn.npz", result.params)

    rows = {f"FBP, {name}": A.fbp(norm * test["y"], name) for name in ("ram-lak", "hann")}
    rows["TV, best weight"] = reconstruct(total_variation, best, test)
    rows["ICNN, learned"] = reconstruct(problem, result.params, test)
    rows = {name: np.asarray(found) for name, found in rows.items()}
    pictures.report(args, test["x"], rows, name="ct.png", window=(0.4, 0.9))
    gains = jnp.max(result.params["second"], axis=(0, 2, 3))
    pictures.filter_figure(args.out / "filters.png", np.asarray(result.params["first"]), gains, columns=8)


if __name__ == "__main__":
    main()
