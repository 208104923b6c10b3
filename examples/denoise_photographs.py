"""Learn a denoiser from photographs by differentiating through the denoiser itself.

Lower level, for each noisy photograph y:   x_hat(theta) = argmin_x 1/2 ||x - y||^2 + R_theta(x)
Upper level, over photographs with known clean x*:   min_theta mean PSNR loss of x_hat(theta)

Three rows are compared on photographs that were not trained on: total variation with the weight a grid search finds,
the same total variation with weight and smoothing learned by MAID, and a sum of learned filter responses,
R_theta(x) = sum_k w_k sum sqrt((c_k * x)^2 + e_k^2), written below as any user would write it. MAID needs no step size
and no accuracy.

Writes a table, a figure and the learned parameters to --out. About two minutes on two cores with the photographs that
ship inside scikit-image; --images DIR takes any folder of pictures instead (every fourth is kept for testing).
"""

from __future__ import annotations

import time

import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb


def responses(filters, x):
    """Correlations of x with each 3x3 filter, mirrored at the border: (k, 3, 3), (h, w) -> (k, h, w)."""
    h, w = x.shape
    padded = jnp.pad(x, 1, mode="symmetric")
    # nine shifted images: on a CPU several times faster than a convolution with so few, small filters
    shifts = [padded[i : i + h, j : j + w] for i in range(3) for j in range(3)]
    return sum(c[:, None, None] * s for c, s in zip(filters.reshape(-1, 9).T, shifts, strict=True))


def filter_energy(theta, x, data):
    filters = theta["filters"] - jnp.mean(theta["filters"], axis=(1, 2), keepdims=True)
    response = responses(filters, x)
    weight, knee = (jnp.exp(theta[name])[:, None, None] for name in ("log_weights", "log_knees"))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.sum(weight * (jnp.sqrt(response**2 + knee**2) - knee))


def first_filters():
    """The eight non-constant 3x3 cosine filters with small equal weights."""
    cosine = np.cos(np.pi * (2 * np.arange(3) + 1) * np.arange(3)[:, None] / 6)
    cosine /= np.linalg.norm(cosine, axis=1, keepdims=True)
    filters = np.stack([np.outer(a, b) for a in cosine for b in cosine][1:])
    shape = (len(filters),)
    return {
        "filters": jnp.asarray(filters, jnp.float32),
        "log_weights": jnp.full(shape, np.log(0.02), jnp.float32),
        "log_knees": jnp.full(shape, np.log(0.02), jnp.float32),
    }


class Patience:
    """Stop when the value has not improved by ``least`` decibels in ``steps`` steps."""

    def __init__(self, least=0.005, steps=15):
        self.least, self.steps, self.values = least, steps, []

    def __call__(self, step, state, info):
        self.values.append(float(info.value))
        before = self.values[: -self.steps]
        return bool(before) and min(before) - min(self.values) < self.least


def learn(name, oracle, theta, batch, args, projection=None):
    started = time.perf_counter()
    result = jb.fit(
        jb.MAID(oracle, projection=projection, window=0.85), theta, batch, steps=args.steps,
        callback=Patience(), work_budget=args.work, **pictures.saving(args, name),
    )  # fmt: skip
    print(f"{name}: {result.steps} steps, {result.work:.0f} gradient-equivalents, {time.perf_counter() - started:.0f} s"
          f" ({result.message})")  # fmt: skip
    return result.params


def main(argv=None):
    parser = pictures.parser(__doc__, "denoise_photographs")
    parser.add_argument("--steps", type=int, default=200, help="most steps of each method")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    train, test = pictures.train_and_test(args, rng)
    print(f"{len(train['x'])} training crops of {args.crop_size}^2, {len(test['x'])} test images of {args.size}^2")

    fixed = jb.variational(None, jb.regularizers.SmoothedTV(eps=1e-3))
    best = pictures.best_tv(fixed, train, np.geomspace(0.02, 0.4, 16) * args.sigma / 0.1)

    smoothed = jb.regularizers.SmoothedTV()
    tv = jb.variational(None, smoothed)
    theta_tv = learn(
        "total_variation", jb.implicit.Oracle(tv, pictures.psnr_loss), smoothed.init(dtype=jnp.float32), train, args,
        projection=smoothed.project,
    )  # fmt: skip

    filters = jb.SmoothProblem(filter_energy, lambda theta, data: data["y"], strong_convexity=1.0)
    theta = learn("filters", jb.implicit.Oracle(filters, pictures.psnr_loss), first_filters(), train, args)

    rows = {
        "noisy": np.asarray(test["y"]),
        "TV, grid search": pictures.reconstruct(fixed, best, test),
        "TV, learned": pictures.reconstruct(tv, theta_tv, test),
        "filters, learned": pictures.reconstruct(filters, theta, test),
    }
    jb.save(args.out / "filters.npz", theta, {"sigma": args.sigma, "energy": "sum_k w_k sqrt((c_k * x)^2 + e_k^2)"})
    pictures.report(args, test["x"], rows)


if __name__ == "__main__":
    main()
