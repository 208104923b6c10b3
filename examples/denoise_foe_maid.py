"""Learn Fields of Experts with MAID: hundreds of parameters, no learning rate, no accuracy to choose.

Lower level: 1/2 ||x - y||^2 + e^a sum_i e^{w_i} sum sqrt((c_i * x)^2 + nu_i^2), all filters c_i, weights w_i and
smoothings nu_i learned. MAID picks step lengths and accuracies from the errors of values and hypergradients: the figure
accuracy.png shows what it chose. Compared on photographs that were not trained on with the total variation that is best
on the training crops.

Writes a table, the denoised photographs, the learned filters, the schedule and the parameters to --out. Two minutes
on two cores with the photographs that ship inside scikit-image; --images DIR takes any folder of pictures instead.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb


def schedule_figure(path, history):
    """Loss, accuracy and step of each accepted step over the work spent."""
    plt = pictures.pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    labels = {"value": "loss [dB]", "tol": "accuracy of the lower level", "step": "step length"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        axis.plot(history["work"], history[key], lw=1.2)
        axis.set(xlabel="gradient-equivalents", ylabel=label, xscale="log")
        axis.set_yscale("linear" if key == "value" else "log")
        axis.grid(alpha=0.25)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = pictures.parser(__doc__, "denoise_foe_maid", work=150_000)
    parser.add_argument("--filters", type=int, default=16, help="number of filters")
    parser.add_argument("--filter-size", type=int, default=5, help="their side in pixels")
    args = pictures.parsed(parser, argv)

    rng = np.random.default_rng(args.seed)
    train, test = pictures.train_and_test(args, rng)

    fixed = jb.variational(None, jb.regularizers.SmoothedTV(eps=1e-3))
    best = pictures.best_tv(fixed, train, np.geomspace(0.04, 0.12, 12) * args.sigma / 0.1)

    foe = jb.regularizers.FoE(count=args.filters, size=args.filter_size)
    problem = jb.variational(None, foe)
    method = jb.MAID(jb.implicit.Oracle(problem, pictures.psnr_loss), projection=foe.project, window=0.85)
    result = jb.fit(
        method, foe.init(jax.random.key(args.seed), dtype=jnp.float32), train, steps=1000,
        work_budget=args.work, **pictures.saving(args, "maid"),
    )  # fmt: skip
    count = sum(leaf.size for leaf in jax.tree.leaves(result.params))
    print(f"{count} parameters, {result.steps} steps, {result.work:.0f} gradient-equivalents: {result.message}")

    rows = {
        "noisy": np.asarray(test["y"]),
        "best TV": pictures.reconstruct(fixed, best, test),
        "Fields of Experts": pictures.reconstruct(problem, result.params, test),
    }
    weights, _ = foe.weights(result.params)
    pictures.filter_figure(args.out / "filters.png", np.asarray(result.params["filters"]), weights)
    schedule_figure(args.out / "accuracy.png", result.history)
    jb.save(args.out / "foe.npz", result.params, {"sigma": args.sigma, "regularizer": repr(foe)})
    pictures.report(args, test["x"], rows)


if __name__ == "__main__":
    main()
