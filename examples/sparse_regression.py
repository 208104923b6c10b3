"""Learn one l1 weight for each coefficient of a sparse regression, instead of one for all.

Lower level, on training rows:     y_hat(x) = argmin_y 1/2 ||A y - b||^2 + alpha/2 ||y||^2 + sum_i exp(x_i) |y_i|
Upper level, on validation rows:   min_x 1/2 ||A' y_hat(x) - b'||^2

One weight has to be small enough to keep the true coefficients, and then lets many others in; with one each, NBA raises
those of coefficients that validation does not want and lowers those it does. Judged on test rows that neither has seen.

Writes a table and a figure of coefficients and weights to --out. Half a minute on two cores; nothing is downloaded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pictures

import jbilevel as jb

RIDGE = 1e-3
PROBLEM = jb.WeightedL1Problem(
    lambda params, y, data: 0.5 * jnp.sum((data["A"] @ y - data["b"]) ** 2) + 0.5 * RIDGE * jnp.sum(y**2),
    lambda params, data: jnp.zeros_like(data["A"][0]),
    strong_convexity=RIDGE,
    smoothness=lambda params, data: data["smoothness"],
)


def held_out(params, y, data):
    return 0.5 * jnp.sum((data["A_val"] @ y - data["b_val"]) ** 2)


ORACLE = jb.nonsmooth.Oracle(PROBLEM, held_out)


def draw(rows: int, columns: int, nonzeros: int, noise: float, rng) -> tuple[dict, dict, np.ndarray]:
    """Training and validation rows, test rows, and the true coefficients."""
    truth = np.zeros(columns)
    truth[rng.choice(columns, nonzeros, replace=False)] = rng.standard_normal(nonzeros)

    def sample():
        A = rng.standard_normal((rows, columns))
        return A, A @ truth + noise * np.linalg.norm(truth) * rng.standard_normal(rows)

    (A, b), (A_val, b_val), (A_test, b_test) = sample(), sample(), sample()
    bound = np.array(np.linalg.norm(A, 2) ** 2 + RIDGE)
    train = {"A": A, "b": b, "A_val": A_val, "b_val": b_val, "smoothness": bound}
    return jax.tree.map(jnp.asarray, train), {"A": A_test, "b": b_test}, truth


def figure(path, truth, found: dict, weights: dict) -> None:
    plt = pictures.pyplot()
    fig, (above, below) = plt.subplots(2, 1, figsize=(9.5, 5.2), sharex=True, layout="constrained")
    nonzero = truth != 0
    above.scatter(np.flatnonzero(nonzero), truth[nonzero], s=45, facecolors="none", edgecolors="black", label="truth")
    for (name, y), colour, marker in zip(found.items(), ("#d55e00", "#0072b2"), ("x", "."), strict=True):
        at = np.flatnonzero(y)
        above.scatter(at, y[at], s=26, color=colour, marker=marker, label=f"{name}: {len(at)} nonzeros")
    above.set_ylabel("coefficients off zero")
    scalar, learned = weights.values()
    below.axhline(scalar, color="#d55e00", lw=1, label="one weight")
    at = np.arange(len(truth))
    below.scatter(at[~nonzero], learned[~nonzero], s=10, color="#999999", label="learned, true zeros")
    below.scatter(at[nonzero], learned[nonzero], s=22, color="#0072b2", label="learned, true nonzeros")
    below.set(xlabel="coefficient", ylabel="weight", yscale="log")
    for axes in (above, below):
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.grid(alpha=0.25)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(argv=None):
    parser = pictures.options(__doc__, "sparse_regression")
    parser.add_argument("--rows", type=int, default=100, help="of each of training, validation and test")
    parser.add_argument("--columns", type=int, default=200, help="number of coefficients")
    parser.add_argument("--nonzeros", type=int, default=20, help="true coefficients that are not zero")
    parser.add_argument("--noise", type=float, default=0.1, help="relative to the targets")
    parser.add_argument("--steps", type=int, default=60, help="of NBA")
    args = pictures.parsed(parser, argv)

    # 1e-3 of strong convexity needs more digits than float32 has
    with jax.enable_x64(True):
        data, test, truth = draw(args.rows, args.columns, args.nonzeros, args.noise, np.random.default_rng(args.seed))
        batch = jax.tree.map(lambda leaf: leaf[None], data)
        highest = jnp.log(jnp.max(jnp.abs(data["A"].T @ data["b"])))  # above this all coefficients are zero
        grid = np.linspace(highest + np.log(1e-3), highest, 40)
        ones = jnp.ones(args.columns)
        best = min(grid, key=lambda x: float(ORACLE.value(x * ones, batch, tol=1e-4).value))

        method = jb.NBA(ORACLE, tol=1e-4, adjoint_tol=1e-4)
        result = jb.fit(method, best * ones, batch, steps=args.steps, **pictures.saving(args, "nba"))
        print(f"{result.steps} steps: {result.message}")

        found, lines = {}, ["| | validation | test NMSE | nonzeros | true ones among them |", "|---|---|---|---|---|"]
        for name, params in (("one weight, grid search", best * ones), ("one weight each, NBA", result.params)):
            y, info = jb.solve(PROBLEM, params, data, tol=1e-4, max_steps=50_000)
            jb.check(info)
            found[name] = y = np.asarray(y)
            error = np.sum((test["A"] @ y - test["b"]) ** 2) / np.sum(test["b"] ** 2)
            lines.append(f"| {name} | {float(held_out(params, y, data)):.3f} | {error:.4f} | {np.sum(y != 0)} "
                         f"| {np.sum((y != 0) & (truth != 0))} of {args.nonzeros} |")  # fmt: skip
        weights = {"one": float(np.exp(best)), "each": np.exp(np.asarray(result.params))}
        jb.save(args.out / "weights.npz", {"log_weights": result.params}, {"rows": args.rows, "noise": args.noise})

    print("\n".join(lines))
    (args.out / "table.md").write_text("\n".join(lines) + "\n")
    figure(args.out / "weights.png", truth, found, weights)
    print(f"table, figure and parameters are in {args.out}")


if __name__ == "__main__":
    main()
