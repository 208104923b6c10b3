"""Learn total variation for magnetic resonance imaging with few measurements and several coils.

Lower level, for each scan y:   x_hat(theta) = argmin_x 1/2 sum_coils ||M F (s_c x) - y_c||^2 + TV_theta(x)
Upper level, over phantoms x* that are known:   min_theta mean PSNR loss of x_hat(theta)

F is the Fourier transform, s_c the sensitivity of a coil, and M keeps every fourth line of the k-space on average, all
of them near the middle. The scans are of phantoms drawn three times finer than the reconstruction, since no scanner
sees pixels. M F s_c has no useful bound from below: solves stop on the norm of the gradient, and MAID works with
estimated errors.

Weight and smoothing learned by MAID on drawings of abdomens are compared on other ones, and on the Shepp-Logan phantom,
with the weight that a grid search finds, the zero-filled inverse and least squares. Writes a table, a figure and the
learned parameters to --out. Needs no data and about a minute on two cores.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb
from jbilevel.operators import UndersampledFourier, cartesian_mask

FINER = 3


def sensitivities(count: int, size: int) -> np.ndarray:
    """Coils around the image, each seeing what is near it, with a phase of its own; sum |s_c|^2 = 1."""
    position = (np.arange(size) + 0.5) / size * 2 - 1
    turn = 2 * np.pi * np.arange(count)[:, None, None] / count
    across, down = position - 1.2 * np.cos(turn), position[:, None] - 1.2 * np.sin(turn)
    coils = np.exp(-(across**2 + down**2) / 2 + 0.5j * (across * np.sin(turn) + down * np.cos(turn)) + 1j * turn)
    return coils / np.sqrt(np.sum(np.abs(coils) ** 2, axis=0))


def scan(phantoms, size: int, coils: int, mask, sigma: float, rng) -> dict[str, jax.Array]:
    """Pixel means of the phantoms, and the noisy k-space of a finer drawing of them."""
    fine = size * FINER
    drawings = np.stack([jb.data.raster(p, (fine, fine), 1 / fine) for p in phantoms])
    # the middle of a coarse pixel is that of a fine one, but the coarse centre lies one fine pixel further
    seen = np.roll(drawings[:, None] * sensitivities(coils, fine), -1, axis=(-2, -1))
    k_space = UndersampledFourier((fine, fine), np.ones((fine, fine)), in_kind="complex")(jnp.asarray(seen))
    y = np.asarray(k_space)[..., fine // 2 - size // 2 :, fine // 2 - size // 2 :][..., :size, :size] / FINER
    noise = sigma / np.sqrt(2) * (rng.standard_normal(y.shape) + 1j * rng.standard_normal(y.shape))
    truth = np.stack([jb.data.raster(p, (size, size), 1 / size) for p in phantoms])
    return {"x": jnp.asarray(truth), "y": jnp.asarray((mask * (y + noise)).astype(np.complex64))}


def abdomen(rng):
    """A drawing whose organs differ more than they do in density: from 0.85 to 1.2 becomes from 0 to 1."""
    bright = lambda density: float(np.clip((density - 0.85) / 0.35, 0, 1))  # noqa: E731
    drawn = jb.data.abdomen(rng, width=0.9)
    pairs = zip(drawn.ellipses, drawn.densities, strict=True)
    return [e._replace(value=bright(density) - bright(density - e.value)) for e, density in pairs]


def least_squares(A, y, steps=100):
    """Conjugate gradients on the normal equations: parallel imaging without a regulariser."""
    return jax.scipy.sparse.linalg.cg(lambda x: A.H(A(x)), A.H(y), maxiter=steps, tol=1e-6)[0]


def main(argv=None):
    parser = pictures.options(__doc__, "mri_tv")
    parser.add_argument("--size", type=int, default=96, help="side of the images, an even number")
    parser.add_argument("--phantoms", type=int, default=8, help="number of training phantoms")
    parser.add_argument("--coils", type=int, default=4, help="number of coils")
    parser.add_argument("--acceleration", type=float, default=4.0, help="one line of so many is measured")
    parser.add_argument("--sigma", type=float, default=0.02, help="noise of each measurement, for values of about 1")
    parser.add_argument(
        "--work", type=float, default=30_000, help="stop learning once this many gradient-equivalents are spent"
    )
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    mask = cartesian_mask((args.size, args.size), args.acceleration, 0.08, rng)
    A = UndersampledFourier((args.size, args.size), mask, coils=sensitivities(args.coils, args.size))
    phantoms = [abdomen(rng) for _ in range(args.phantoms + 3)]
    train, test = phantoms[: args.phantoms], [*phantoms[args.phantoms :], jb.data.shepp_logan(0.45)]
    train, test = (scan(p, args.size, args.coils, mask, args.sigma, rng) for p in (train, test))

    fixed, learned = jb.regularizers.SmoothedTV(eps=3e-3), jb.regularizers.SmoothedTV(eps_min=3e-3)
    grid, problem = jb.variational(A, fixed), jb.variational(A, learned)
    best = pictures.best_tv(grid, train, np.geomspace(3e-4, 3e-2, 10) * args.sigma / 0.02, tol=1e-2)

    start = learned.init(weight=1e-2, eps=0.03, dtype=jnp.float32)
    theta = pictures.learn_tv(problem, learned, start, train, args, best)

    rows = {
        "zero-filled": np.asarray(A.H(test["y"])),
        "least squares": np.asarray(least_squares(A, test["y"])),
        "TV, grid search": pictures.reconstruct(grid, best, test),
        "TV, learned": pictures.reconstruct(problem, theta, test),
    }
    jb.save(args.out / "tv.npz", {"theta": theta}, {"sigma": args.sigma, "acceleration": args.acceleration})
    pictures.report(args, test["x"], rows, range(1, len(test["x"])), name="reconstructed.png")


if __name__ == "__main__":
    main()
