"""Learn total variation for deblurring by differentiating through the deblurring itself.

Lower level, for each blurred photograph y:   x_hat(theta) = argmin_x 1/2 ||A x - y||^2 + TV_theta(x)
Upper level, over photographs with known sharp x*:   min_theta mean PSNR loss of x_hat(theta)

A is a Gaussian blur that mirrors the image at its border. The data are made otherwise, by blurring a larger photograph
and cutting out the middle, so that the border is as unknown as in practice. A is nearly singular, the lower level not
strongly convex: no constant bounds the distance to its solution, MAID works with estimated errors, and solves stop
on the norm of the gradient.

Weight and smoothing learned by MAID are compared on photographs that were not trained on with the weight that a grid
search finds, and with plain least squares. Writes a table, a figure and the learned parameters to --out. About a minute
on two cores with the photographs that ship inside scikit-image; --images DIR takes any folder of pictures instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb
from jbilevel.operators import Blur, gaussian_blur


def blurred_pairs(images, width: float, sigma: float, rng):
    """Sharp photographs without their margins, and what a noisy camera sees of them."""
    kernel = gaussian_blur(images.shape[1:], width).kernel
    see = Blur(images.shape[1:], kernel, "valid")
    margin = kernel.shape[0] // 2
    blurred = np.asarray(see(jnp.asarray(images)))
    return {
        "x": jnp.asarray(images[:, margin:-margin, margin:-margin]),
        "y": jnp.asarray(jb.data.gaussian(rng, blurred, sigma).astype(np.float32)),
    }


def least_squares(A, y, steps=200):
    """Conjugate gradients on A'A x = A'y: what the noise does to an inverse without a regulariser."""
    return jax.scipy.sparse.linalg.cg(lambda x: A.T(A(x)), A.T(y), maxiter=steps, tol=1e-6)[0]


def main(argv=None):
    parser = pictures.parser(__doc__, "deblur_tv", sigma=0.01, crops=40, work=60_000)
    parser.add_argument("--blur", type=float, default=1.5, help="standard deviation of the blur in pixels")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    training, testing = pictures.load(args)
    cut = pictures.training_crops(training, args.crop_size, args.crops, rng)
    train, test = (blurred_pairs(images, args.blur, args.sigma, rng) for images in (cut, testing))
    small, large = (gaussian_blur(batch["y"].shape[1:], args.blur) for batch in (train, test))

    fixed, learned = jb.regularizers.SmoothedTV(eps=3e-3), jb.regularizers.SmoothedTV(eps_min=3e-3)
    weights = np.geomspace(1e-4, 3e-3, 10) * args.sigma / 0.01
    best = pictures.best_tv(jb.variational(small, fixed), train, weights, tol=1e-3)

    problem = jb.variational(small, learned)
    start = learned.init(weight=1e-3, eps=0.03, dtype=jnp.float32)
    theta = pictures.learn_tv(problem, learned, start, train, args, best)

    rows = {
        "blurred": np.asarray(test["y"]),
        "least squares": np.asarray(least_squares(large, test["y"])),
        "TV, grid search": pictures.reconstruct(jb.variational(large, fixed), best, test, tol=1e-3),
        "TV, learned": pictures.reconstruct(jb.variational(large, learned), theta, test, tol=1e-3),
    }
    jb.save(args.out / "tv.npz", {"theta": theta}, {"sigma": args.sigma, "blur": args.blur})
    pictures.report(args, test["x"], rows, name="deblurred.png")


if __name__ == "__main__":
    main()
