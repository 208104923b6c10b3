"""Learn how total variation is discretised: eight filters that interpolate its dual field between the pixels.

Lower level: min_x 1/2 ||x - y||^2 + max over dual fields q of <D x, q> with |(k_j * q)(p)|_2 <= lambda for all pixels p
and positions j (Chambolle & Pock 2021), a saddle point problem without any smoothing. Its hypergradient in the filters
k and in lambda comes from piggyback: 60 warm primal-dual iterations for the saddle point and 60 for its adjoint at each
step of Adam. Compared on photographs that were not trained on with the total variation that is best on the training
crops.

Writes a table, the denoised photographs, the learned filters and the parameters to --out. Two minutes on two cores with
the photographs that ship inside scikit-image; --images DIR takes any folder of pictures instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pictures

import jbilevel as jb

ITERATIONS = 60  # of each of the two solves, from where the last ones ended


def main(argv=None):
    parser = pictures.parser(__doc__, "denoise_learned_tv", crops=32, work=200_000)
    parser.add_argument("--sums", choices=("equal", "free"), default="equal", help="of the filters")
    parser.add_argument("--steps", type=int, default=120, help="steps of Adam at most")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    train, test = pictures.train_and_test(args, rng)

    standard = jb.variational(None, jb.regularizers.TV())
    best = pictures.best_tv(standard, train, np.geomspace(0.04, 0.12, 12) * args.sigma / 0.1)

    learned = jb.regularizers.LearnedTV(sums=args.sums)
    problem = jb.variational(None, learned)
    oracle = jb.piggyback.Oracle(
        problem, pictures.image_loss, solver=jb.solvers.PDHG(stride=ITERATIONS), estimate=False,
        max_steps=ITERATIONS, max_adjoint_steps=ITERATIONS,
    )  # fmt: skip
    # tolerances of 0: every solve takes all of its iterations
    method = jb.FirstOrder(oracle, optax.adam(1e-2), tol=0.0, adjoint_tol=0.0, projection=learned.project)
    start = learned.init(jax.random.key(args.seed), weight=float(jnp.exp(best[0])), dtype=jnp.float32)
    result = jb.fit(
        method, start, train, steps=args.steps, work_budget=args.work, **pictures.saving(args, "adam"),
    )  # fmt: skip
    print(f"{result.steps} steps, weight {float(jnp.exp(result.params['log_weight'])):.4f} after "
          f"{float(jnp.exp(best[0])):.4f} ({result.message})")  # fmt: skip

    rows = {
        "noisy": np.asarray(test["y"]),
        "best TV": pictures.reconstruct(standard, best, test),
        "learned TV": pictures.reconstruct(problem, result.params, test),
    }
    filters = np.asarray(result.params["filters"])
    in_order = -np.arange(2 * learned.count)  # a line for each component of the dual field
    pictures.filter_figure(args.out / "filters.png", filters.reshape(-1, *filters.shape[2:]), in_order, learned.count)
    jb.save(args.out / "learned_tv.npz", result.params, {"sigma": args.sigma, "regularizer": repr(learned)})
    pictures.report(args, test["x"], rows)


if __name__ == "__main__":
    main()
