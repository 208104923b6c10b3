"""Learn convex and weakly convex ridge regularisers, 13,767 parameters each, from photographs.

Three stages, each cheap for what it brings: denoising score matching (no lower-level solve at all), the weight that
suits reconstructions (a line of values), then bilevel learning by implicit differentiation with Adam on random crops.
Compared on photographs that were not trained on with the total variation that is best on the training crops.

Writes a table, the denoised photographs, the learned filters and the parameters to --out. Some three minutes on two
cores with the photographs that ship inside scikit-image; --images DIR takes any folder of pictures instead.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures

import jbilevel as jb

WEIGHTS = 1.25 ** np.arange(-3, 6)  # factors on what score matching left


def batches(images, args, count: int, seed: int):
    """step -> random crops with fresh noise, mirrored and turned; the same for the same step."""

    def batch(step: int):
        rng = np.random.default_rng([args.seed, seed, step])
        cut = [jb.data.crops(images[i], args.crop_size, 1, rng)[0] for i in rng.integers(len(images), size=count)]
        cut = [np.rot90(image, rng.integers(4))[:, :: rng.choice([-1, 1])] for image in cut]
        return pictures.noisy_pairs(np.stack(cut), args.sigma, rng)

    return batch


def learn(name: str, regularizer, images, batch, args):
    """Parameters of ``regularizer``; ``batch`` is for choosing the weight between the stages."""
    started = time.perf_counter()
    keep = getattr(regularizer, "project", lambda params: params)
    rate = partial(optax.cosine_decay_schedule, alpha=0.05)

    score = jb.explicit.Oracle(jb.losses.DenoisingScore(regularizer))
    method = jb.FirstOrder(score, optax.adam(rate(1e-2, args.score_steps), b2=0.99), projection=keep)
    first = regularizer.init(jax.random.key(args.seed), dtype=jnp.float32)
    scored = jb.fit(
        method, first, batches(images, args, 8, 0), steps=args.score_steps, **pictures.saving(args, f"{name}_score")
    ).params

    problem = jb.variational(None, regularizer)
    oracle = jb.implicit.Oracle(problem, pictures.psnr_loss, estimate=False)
    tried = [keep(scored | {"log_weight": scored["log_weight"] + np.log(w)}) for w in WEIGHTS]
    theta = tried[int(np.argmin([float(oracle.value(t, batch, tol=0.1).value) for t in tried]))]

    adam = optax.chain(optax.clip_by_global_norm(10.0), optax.adam(rate(1e-2, args.steps), b2=0.99))
    method = jb.FirstOrder(oracle, adam, tol=0.1, adjoint_tol=0.1, projection=keep)
    result = jb.fit(
        method, theta, batches(images, args, 4, 1), steps=args.steps, work_budget=args.work,
        **pictures.saving(args, name),
    )  # fmt: skip
    print(f"{name}: {args.score_steps} steps of score matching, {result.steps} bilevel steps, "
          f"{time.perf_counter() - started:.0f} s ({result.message})")  # fmt: skip
    jb.save(args.out / f"{name}.npz", result.params, {"sigma": args.sigma, "regularizer": repr(regularizer)})
    weights = np.linalg.norm(regularizer.filters(result.params), axis=(1, 2))
    pictures.filter_figure(args.out / f"{name}_filters.png", np.asarray(regularizer.filters(result.params)), weights)
    return problem, result.params


def main(argv=None):
    parser = pictures.parser(__doc__, "denoise_crr", crop_size=40, work=100_000)
    parser.add_argument("--score-steps", type=int, default=300, help="steps of score matching")
    parser.add_argument("--steps", type=int, default=150, help="bilevel steps at most")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    train, test_images = pictures.load(args)
    batch = pictures.noisy_pairs(pictures.training_crops(train, args.crop_size, args.crops, rng), args.sigma, rng)
    test = pictures.noisy_pairs(test_images, args.sigma, rng)

    fixed = jb.variational(None, jb.regularizers.SmoothedTV(eps=1e-3))
    best = pictures.best_tv(fixed, batch, np.geomspace(0.04, 0.12, 12) * args.sigma / 0.1)
    rows = {"noisy": np.asarray(test["y"]), "best TV": pictures.reconstruct(fixed, best, test)}
    for name, regularizer in (("CRR", jb.regularizers.CRR()), ("WCRR", jb.regularizers.WCRR())):
        rows[name] = pictures.reconstruct(*learn(name, regularizer, train, batch, args), test)

    pictures.report(args, test["x"], rows)


if __name__ == "__main__":
    main()
