"""Restore photographs of which half the pixels are lost, with a learned wavelet weight for each subband.

Lower level:   x_hat(p) = argmin_x 1/2 ||M W'x - y||^2 + alpha/2 ||x||^2 + sum_i exp(p_band(i)) |x_i|
Upper level, over photographs that are known:   min_p mean PSNR loss of W'x_hat(p)

M keeps the pixels that were seen, W is an orthogonal wavelet transform. The lower level has kinks, so hypergradients
are taken on its support (`jb.nonsmooth`), and NBA moves the weights. Compared on photographs that were not trained on
with the one weight for all coefficients that is best on the training crops.

Writes a table, a figure and the weights to --out. About a minute on two cores with the photographs that ship inside
scikit-image; --images DIR takes any folder of pictures instead.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb
from jbilevel.operators import Mask, Wavelet

RIDGE = 1e-3
TOL = 1.0  # of ||x - x_hat||, proven, for 128 x 128 pixels
LEVELS = 4


def subbands(size: int) -> np.ndarray:
    """The subband of each coefficient: 0 low-pass, then three for each level from coarse to fine."""
    index = np.zeros((size, size), int)
    for level in range(LEVELS, 0, -1):
        half, first = size >> level, 3 * (LEVELS - level) + 1
        index[:half, half : 2 * half] = first
        index[half : 2 * half, :half] = first + 1
        index[half : 2 * half, half : 2 * half] = first + 2
    return index


def restoration(size: int, share: float):
    """(problem, mask, wavelet transform) for photographs of ``size`` pixels of which ``share`` were seen."""
    mask = Mask(np.random.default_rng(0).random((size, size)) < share)
    transform, index = Wavelet((size, size), "db2", LEVELS), subbands(size)

    def smooth(params, x, data):
        return 0.5 * jnp.sum((mask(transform.T(x)) - data["y"]) ** 2) + 0.5 * RIDGE * jnp.sum(x**2)

    problem = jb.WeightedL1Problem(
        smooth, lambda params, data: jnp.zeros_like(data["y"]), weights=lambda params: jnp.exp(params)[index],
        strong_convexity=RIDGE, smoothness=1.001 + RIDGE,
    )  # fmt: skip
    return problem, mask, transform


def main(argv=None):
    parser = pictures.parser(__doc__, "restore_wavelets", sigma=0.03, work=150_000, crops=10)
    parser.add_argument("--share", type=float, default=0.5, help="share of the pixels that were seen")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    train, test = pictures.train_and_test(args, rng)
    (small, seen, transform), (large, seen_large, transform_large) = (
        restoration(batch["y"].shape[-1], args.share) for batch in (train, test)
    )
    train, test = train | {"y": seen(train["y"])}, test | {"y": seen_large(test["y"])}

    def loss(params, x, data):
        return pictures.psnr_loss(params, transform.T(x), data)

    oracle = jb.nonsmooth.Oracle(small, loss, estimate=False, chunk="auto")
    tol = TOL * args.crop_size / 128
    bands = jnp.ones(3 * LEVELS + 1, jnp.float32)
    grid = np.log(np.geomspace(3e-3, 0.3, 15))
    best = bands * min(grid, key=lambda p: float(oracle.value(p * bands, train, tol=tol).value))

    result = jb.fit(
        jb.NBA(oracle, tol=tol, adjoint_tol=1e-2), best, train, steps=25,
        work_budget=args.work, **pictures.saving(args, "nba"),
    )  # fmt: skip
    print(f"{result.steps} steps: {result.message}")
    learned = np.round(np.exp(result.params), 4).tolist()
    print(f"one weight {float(jnp.exp(best[0])):.3f}; low-pass {learned[0]}, then from coarse to fine {learned[1:]}")

    def restored(params):
        x = pictures.reconstruct(large, params, test, tol=TOL * args.size / 128)
        return np.asarray(transform_large.T(jnp.asarray(x)))

    rows = {"seen": np.asarray(test["y"]), "one weight": restored(best), "subband weights": restored(result.params)}
    jb.save(args.out / "weights.npz", {"log_weights": result.params}, {"levels": LEVELS, "sigma": args.sigma})
    pictures.report(args, test["x"], rows, name="restored.png")


if __name__ == "__main__":
    main()
