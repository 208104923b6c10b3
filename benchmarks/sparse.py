"""Weighted l1 problems: choosing the weight of a lasso, its hypergradients, and those of a wavelet problem.

Search: scikit-learn's path over grids against NBA, by the value on held-out rows. Hypergradients: the
library's implicit differentiation on the support against implicit FORWARD differentiation, scikit-learn's solution and
then sweeps of coordinate descent for its Jacobian on the support (Bertrand et al. 2020, ICML; written here in NumPy),
both with the loosest tolerances that reach the same accuracy. Wavelets: 256 x 256 pixels with a weight for each of the
65,536 coefficients, a hypergradient against one lower-level solve.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.linalg import solve_triangular

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, tuning
from benchmarks.papers import villacis_2025_wavelets as wavelets

NAME = "sparse"
TITLE = "Weighted l1 problems: lasso and wavelets"
RATIO = 2.0  # of a hypergradient to a solve, wanted at most
ACCURACY = 1e-5  # relative, of compared hypergradients
SHAPES = ((200, 400), (500, 2000))  # rows (of each level), columns
SHARE, NOISE = 0.05, 0.1  # of nonzeros; of the targets
DEPTH = 1e-3  # least weight of grids, relative to the one above which all is zero
CASES = {"denoising": "noise", "deblurring": "blur", "inpainting": "mask"}


# --------------------------------------------------------------------------------------------------------------- lasso


def draw(rows: int, columns: int, seed: int) -> dict[str, np.ndarray]:
    """Gaussian rows, normal coefficients, 10 % noise; rows for the lower and for the upper level."""
    rng = np.random.default_rng([rows, columns, seed])
    truth = np.where(rng.random(columns) < SHARE, rng.standard_normal(columns), 0.0)
    data = {}
    for part in ("", "_val"):
        A = rng.standard_normal((rows, columns))
        b = A @ truth
        data |= {f"A{part}": A, f"b{part}": b + NOISE * np.sqrt(np.mean(b**2)) * rng.standard_normal(rows)}
    return data | {"smoothness": np.linalg.norm(data["A"], 2) ** 2}


LASSO = jb.WeightedL1Problem(
    lambda params, x, data: 0.5 * jnp.sum((data["A"] @ x - data["b"]) ** 2),
    lambda params, data: jnp.zeros_like(data["A"][0]),
    smoothness=lambda params, data: data["smoothness"],
)
ORACLE = jb.nonsmooth.Oracle(
    LASSO, lambda params, x, data: 0.5 * jnp.sum((data["A_val"] @ x - data["b_val"]) ** 2), estimate=False
)


def batch_of(data) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value)[None] for name, value in data.items()}


def sklearn_solution(data, weight, tol: float) -> np.ndarray:
    """scikit-learn scales by the number of rows; one weight per column becomes a scaled column."""
    linear = common.peer("sklearn.linear_model")
    weight = np.broadcast_to(weight, data["A"].shape[1:])
    model = linear.Lasso(alpha=1 / len(data["b"]), fit_intercept=False, tol=tol, max_iter=100_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tolerance that is not reached shows in the error
        return model.fit(data["A"] / weight, data["b"]).coef_ / weight


class Support(NamedTuple):
    """What derivatives of a solution need: G = A_S'A_S, weights times signs, gradient of the loss on S."""

    where: np.ndarray
    gram: np.ndarray
    slopes: np.ndarray
    gradient: np.ndarray

    @classmethod
    def of(cls, data, weight, x):
        where = np.flatnonzero(x)
        A = data["A"][:, where]
        slopes = (np.broadcast_to(weight, x.shape) * np.sign(x))[where]
        return cls(where, A.T @ A, slopes, data["A_val"][:, where].T @ (data["A_val"] @ x - data["b_val"]))

    def pulled(self, gradient, weight, size):
        """The derivative in the log weight(s) from that of the weights on the support."""
        if np.ndim(weight) == 0:
            return np.sum(gradient)
        full = np.zeros(size)
        full[self.where] = gradient
        return full


def dense(data, weight) -> np.ndarray:
    """The hypergradient by a dense solve on the support of an accurate solution."""
    x = sklearn_solution(data, weight, 1e-14)
    support = Support.of(data, weight, x)
    adjoint = np.linalg.solve(support.gram, support.gradient)
    return support.pulled(-support.slopes * adjoint, weight, x.size)


def forward(data, weight, tol: float, jacobian_tol: float) -> np.ndarray:
    """Implicit forward differentiation: G J = -diag(slopes) (one column in all for one weight) by Gauss-Seidel sweeps,
    as coordinate descent makes them on the support, until the hypergradient changes by less than jacobian_tol."""
    x = sklearn_solution(data, weight, tol)
    support = Support.of(data, weight, x)
    rhs = -support.slopes if np.ndim(weight) == 0 else -np.diag(support.slopes)
    lower, upper = np.tril(support.gram), np.triu(support.gram, 1)
    jacobian, last = np.zeros_like(rhs), np.inf
    for _ in range(100_000):
        jacobian = solve_triangular(lower, rhs - upper @ jacobian, lower=True, check_finite=False)
        gradient = support.gradient @ jacobian
        if np.linalg.norm(gradient - last) <= jacobian_tol * np.linalg.norm(gradient):
            break
        last = gradient
    return np.sum(gradient) if np.ndim(weight) == 0 else support.pulled(gradient, weight, x.size)


def relative_error(gradient, exact) -> float:
    return float(np.linalg.norm(np.asarray(gradient) - exact) / np.linalg.norm(exact))


def hypergradients(args, recorder, shape) -> None:
    data = draw(*shape, args.seed)
    highest = np.abs(data["A"].T @ data["b"]).max()
    batch = batch_of(data)
    call = jax.jit(lambda p, b, tol, adjoint_tol: ORACLE(p, b, tol=tol, adjoint_tol=adjoint_tol).grad)
    spread = np.random.default_rng(args.seed).uniform(0.5, 2.0, shape[1])
    for name, weight in (("one weight", 0.05 * highest), ("one per column", 0.05 * highest * spread)):
        exact, params = dense(data, weight), jnp.log(weight)
        ways = {
            "implicit": lambda tol, adjoint, p=params: call(p, batch, 1e3 * tol, 1e3 * adjoint),
            "implicit forward": lambda tol, adjoint, w=weight: forward(data, w, tol, adjoint),
        }
        tuned = {way: tuning.tune(lambda t, a, f=f, e=exact: relative_error(f(t, a), e), ACCURACY, 1e-14)
                 for way, f in ways.items()}  # fmt: skip
        calls = {way: partial(f, tuned[way].tol, tuned[way].adjoint_tol) for way, f in ways.items()}
        seconds = common.interleave(calls, args.repeats, args.seed)
        for way in ways:
            figures = common.spread(seconds[way]) | {"error": tuned[way].error}
            case = {"part": "hypergradient", "shape": shape, "weights": name, "way": way}
            recorder.add(case, figures, {"tol": tuned[way].tol, "adjoint_tol": tuned[way].adjoint_tol})
    recorder.write()


def search(args, recorder, shape) -> None:
    """The weight of a lasso by value on held-out rows: grids of scikit-learn's path, and NBA, which is local."""
    data = draw(*shape, args.seed)
    batch, linear = batch_of(data), common.peer("sklearn.linear_model")
    highest = float(np.abs(data["A"].T @ data["b"]).max())
    grid = lambda count: highest * np.geomspace(1, DEPTH, count)  # noqa: E731

    def path(weights):
        found = linear.lasso_path(data["A"], data["b"], alphas=weights / len(data["b"]), tol=1e-6, max_iter=100_000)[1]
        values = 0.5 * np.sum((data["A_val"] @ found - data["b_val"][:, None]) ** 2, 0)
        return weights[np.argmin(values)], values.min()

    method = jb.NBA(ORACLE, tol=1e-2, adjoint_tol=1e-2)

    def nba(start):
        state, last = method.init(jnp.asarray(np.log(start)), batch), np.inf
        for _ in range(30):
            state, info = method.step(state, batch)
            if bool(info.done) or last - float(info.value) < 1e-3 * last:
                break
            last = float(info.value)
        return float(jnp.exp(state.params)), state

    ways = {f"grid of {count}": partial(path, grid(count)) for count in (20, 100)} | {
        "NBA from a tenth": partial(nba, 0.1 * highest), "grid of 10, then NBA": lambda: nba(path(grid(10))[0]),
    }  # fmt: skip
    finest = path(np.geomspace(0.3, 1e-3, 1000) * highest)[1]
    found = {way: run()[0] for way, run in ways.items()}
    seconds = common.interleave(ways, args.repeats, args.seed)
    for way, weight in found.items():
        x = sklearn_solution(data, weight, 1e-12)
        value = 0.5 * np.sum((data["A_val"] @ x - data["b_val"]) ** 2)
        figures = common.spread(seconds[way]) | {
            "value": value,
            "excess": value / finest - 1,
            "weight": weight / highest,
        }
        recorder.add({"part": "search", "shape": shape, "way": way}, figures)
    recorder.write()


# ------------------------------------------------------------------------------------------------------------ wavelets


def restoration(args, recorder, name: str, dtype: str) -> None:
    """One photograph, a weight per coefficient around the level that suits the damage."""
    size, damage = args.sizes[0], CASES[name]
    with common.precision(dtype):
        image = jb.data.photographs(size, ["camera"], dtype=np.dtype(dtype))
        batch = wavelets.damaged(image, damage, args.levels, args.seed)
        data = jax.tree.map(lambda leaf: leaf[0], batch)
        problem = wavelets.problem(damage, "coefficients", size, args.levels)
        oracle = wavelets.oracle(damage, "coefficients", size, args.levels)
        level = {"noise": 0.15, "blur": 0.005, "mask": 0.03}[damage]
        jitter = np.random.default_rng(args.seed).uniform(-0.5, 0.5, (size, size))
        params = jnp.asarray(np.log(level) + jitter, dtype)
        tol = wavelets.DAMAGES[damage].tol * size / 128
        adjoint_tol = 1e-3 * 10 / np.log(10) * 2 / (0.05 * size)
        solve = jax.jit(lambda p, d: jb.solve(problem, p, d, tol=tol))
        hypergradient = jax.jit(lambda p, b: oracle(p, b, tol=tol, adjoint_tol=adjoint_tol))
        info, found = solve(params, data)[1], hypergradient(params, batch)
        jb.check(info)
        jb.check(found.adjoint)
        calls = {"solve": lambda: solve(params, data), "hypergradient": lambda: hypergradient(params, batch)}
        seconds = common.interleave(calls, args.repeats, args.seed)
        rows = {way: common.spread(times) for way, times in seconds.items()}
        figures = {
            "solve": rows["solve"], "hypergradient": rows["hypergradient"], "weights": params.size,
            "ratio": common.times_faster(rows["solve"], rows["hypergradient"]),
            "support": int(jnp.sum(found.warm.x != 0)), "steps": int(info.steps),
            "adjoint": int(found.adjoint.steps[0]), "products": int(info.evaluations.products),
        }  # fmt: skip
        recorder.add({"part": "wavelets", "problem": name, "dtype": dtype}, figures)
    recorder.write()


# ---------------------------------------------------------------------------------------------------------------- page


def render(rows: Sequence[dict]) -> str:
    parts: dict[str, list[dict]] = {}
    for row in rows:
        parts.setdefault(row["case"]["part"], []).append(row)
    pages = {"search": _search_page, "hypergradient": _hypergradient_page, "wavelets": _wavelet_page}
    return "\n".join(pages[part](own) for part, own in parts.items())


def _shape(row) -> str:
    return "{} x {}".format(*row["case"]["shape"])


def _search_page(rows) -> str:
    lines = [
        [f"{_shape(row)}, {row['case']['way']}", common.rounded(row["figures"]["ms"]),
         common.rounded(row["figures"]["weight"]), f"{row['figures']['excess']:+.2%}"]
        for row in rows
    ]  # fmt: skip
    intro = (
        "Excess: value on held-out rows over the least of a grid of 1000. Weights relative to the one above which all "
        "is zero. Times of compiled programs.\n"
    )
    return "\n".join(["### The weight of a lasso\n", intro, common.table(["", "ms", "weight", "excess"], lines)])


def _hypergradient_page(rows) -> str:
    lines = []
    for row in rows:
        case, figures = row["case"], row["figures"]
        other = next(r["figures"] for r in rows if r["case"] == {**case, "way": "implicit forward"})
        lines.append([
            f"{_shape(row)}, {case['weights']}, {case['way']}", common.rounded(figures["ms"]),
            common.scientific(figures["error"]), f"{common.times_faster(figures, other):.1f}",
        ])  # fmt: skip
    header = ["", "ms", "relative error", "times faster than implicit forward"]
    return "\n".join([f"### One hypergradient of a lasso to {ACCURACY:g}\n", common.table(header, lines)])


def _wavelet_page(rows) -> str:
    lines, most = [], 0.0
    for row in rows:
        case, figures = row["case"], row["figures"]
        most = max(most, figures["ratio"])
        lines.append([
            f"{case['problem']}, {case['dtype']}", figures["weights"], figures["support"], figures["steps"],
            figures["products"], figures["adjoint"], common.rounded(figures["solve"]["ms"]),
            common.rounded(figures["hypergradient"]["ms"]), f"{figures['ratio']:.2f}",
        ])  # fmt: skip
    header = ["", "weights", "nonzeros", "steps", "their products", "adjoint products", "solve ms", "hypergradient ms",
              "ratio"]  # fmt: skip
    met = "met" if most <= RATIO else "NOT met"
    verdict = f"Largest ratio {most:.2f}; criterion <= {RATIO:g}: {met}.\n"
    size = rows[0]["settings"]["sizes"][0]
    return "\n".join([f"### Wavelets, {size} x {size} pixels\n", common.table(header, lines), verdict])


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"sizes": [256], "dtype": ["float32", "float64"], "levels": 4, "shapes": len(SHAPES),
                  "problems": list(CASES)},
        quick={"sizes": [16], "dtype": ["float64"], "levels": 2, "shapes": 1, "repeats": 1, "problems": ["denoising"]},
    )  # fmt: skip
    options.add_argument("--levels", type=int, help="of the wavelet transform")
    options.add_argument("--shapes", type=int, help="number of lasso shapes")
    options.add_argument("--problems", nargs="+", choices=list(CASES), help="wavelet problems")
    args = common.parse(options, argv)
    recorder = common.Recorder(NAME, args)
    with common.precision("float64"):
        for shape in SHAPES[: args.shapes]:
            search(args, recorder, shape)
            hypergradients(args, recorder, shape)
    for name in args.problems:
        for dtype in args.dtype:
            restoration(args, recorder, name, dtype)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
