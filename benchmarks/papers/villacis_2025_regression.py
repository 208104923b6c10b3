"""Sparse regression and classification with one penalty for all coefficients, or one for each (Villacís 2025).

Lower level: 1/2 ||A y - b||^2 (or the mean logistic loss) + alpha/2 ||y||^2 + sum_i exp(x_i) |y_i| on n training rows;
upper level: the same loss without penalties on n validation rows; judged on n test rows that neither has seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import jbilevel as jb
from benchmarks import common

NAME = "villacis_2025_regression"
TITLE = "Villacís 2025: one penalty against one for each coefficient"
RIDGE = 1e-3  # alpha
NOISE = 0.1  # of the targets (the scores), relative
GRID = 20
LOWEST = 1e-3  # grid and Bayesian optimisation search [LOWEST, 1] times the weight above which all is zero
MAX_STEPS = 50_000  # tiny weights leave a lower level as ill-conditioned as A'A + alpha
FIRST = 5  # evaluations before the Gaussian process is asked
BOUNDS = (-14.0, 8.0)  # of log weights
# (n, m, nonzeros), as printed
REGRESSION = tuple((n, m, m * share // 100) for n in (100, 200) for m in (n, 2 * n, 3 * n) for share in (5, 10, 20))
LOGISTIC = tuple(row for row in REGRESSION if row[1] <= 2 * row[0])
ROWS = {"regression": REGRESSION, "logistic": LOGISTIC}
SIGNALS = ((100, 100, 10), (100, 100, 20), (100, 200, 20), (100, 200, 40))  # figures 3 to 6
METHODS = {
    "grid": "scalar: grid of 20",
    "gp": "scalar: Gaussian process, 20 values",
    "scalar": "scalar: NBA",
    "weighted": "weighted: NBA",
    "hoag": "weighted: HOAG",
}
ORDER = {"regression": min, "logistic": max}  # better NMSE, better F1


# ------------------------------------------------------------------------------------------------------------ problems


def squares(y, A, b):
    return 0.5 * jnp.sum((A @ y - b) ** 2)


def entropy(y, A, b):
    """Mean binary cross-entropy of labels 0 and 1."""
    score = A @ y
    return jnp.mean(jnp.logaddexp(0.0, score) - b * score)


def nmse(y, A, b):
    """||A y - b||^2 / ||b||^2."""
    return np.sum((A @ y - b) ** 2) / np.sum(b**2)


def f1(y, A, b):
    """2 TP / (2 TP + FP + FN) of the labels 1."""
    said = A @ y > 0
    return 2 * np.sum(said & (b == 1)) / max(np.sum(said) + np.sum(b == 1), 1)


def clip(params):
    return jnp.clip(params, *BOUNDS)


class Task(NamedTuple):
    loss: Callable  # of one level, without penalties
    score: Callable
    oracle: Any
    curvature: float  # Hessian of the loss / (A'A)


def task(loss, score, curvature) -> Task:
    problem = jb.WeightedL1Problem(
        lambda params, y, data: loss(y, data["A"], data["b"]) + 0.5 * RIDGE * jnp.sum(y**2),
        lambda params, data: jnp.zeros_like(data["A"][0]),
        strong_convexity=RIDGE,
        smoothness=lambda params, data: data["smoothness"],
    )
    held_out = lambda params, y, data: loss(y, data["A_val"], data["b_val"])  # noqa: E731
    return Task(loss, score, jb.nonsmooth.Oracle(problem, held_out, max_steps=MAX_STEPS), curvature)


TASKS = {"regression": task(squares, nmse, 1.0), "logistic": task(entropy, f1, 0.25)}


def draw(name: str, n: int, m: int, nonzeros: int, seed: int) -> tuple[dict, dict, np.ndarray]:
    """(batch of one, held-out rows, true coefficients).

    Rows are standard normal, ``nonzeros`` coefficients are too; targets A y carry 10 % white noise. Labels are the
    signs of such targets, as 0 and 1. n rows each for training, validation, test.
    """
    rng = np.random.default_rng([n, m, nonzeros, seed])
    truth = np.zeros(m)
    truth[rng.choice(m, nonzeros, replace=False)] = rng.standard_normal(nonzeros)
    parts = {}
    for part in ("", "_val", "_test"):
        A = rng.standard_normal((n, m))
        b = A @ truth
        b = b + NOISE * np.sqrt(np.mean(b**2)) * rng.standard_normal(n)
        parts |= {f"A{part}": A, f"b{part}": b if name == "regression" else np.float64(b > 0)}
    held_out = {key: parts.pop(f"{key}_test") for key in ("A", "b")}
    scale = 1 if name == "regression" else n
    parts["smoothness"] = np.array(TASKS[name].curvature * np.linalg.norm(parts["A"], 2) ** 2 / scale + RIDGE)
    return {key: jnp.asarray(value)[None] for key, value in parts.items()}, held_out, truth


# ------------------------------------------------------------------------------------------------------------- methods


def highest(job: Task, batch) -> float:
    """log of the weight above which y is zero."""
    slope = jax.grad(job.loss)(jnp.zeros_like(batch["A"][0, 0]), batch["A"][0], batch["b"][0])
    return float(jnp.log(jnp.max(jnp.abs(slope))))


def values_of(job: Task, batch, tol) -> Callable[[Any], float]:
    """The upper-level value at log weights; each lower level starts from the solution of the last one."""
    warm = None

    def value(weight) -> float:
        nonlocal warm
        found = job.oracle.value(jnp.asarray(weight), batch, warm, tol=tol)
        warm = found.warm
        return float(found.value)

    return value


def grid_search(value: Callable, low: float, high: float) -> float:
    return min(np.linspace(high, low, GRID), key=value)


def gaussian_process(value: Callable, low: float, high: float, seed: int) -> float:
    """Bayesian optimisation of log values by a Gaussian process with fixed scales: the least lower confidence bound."""
    regressor = common.peer("sklearn.gaussian_process")
    kernel = regressor.kernels.Matern(length_scale=0.3 * (high - low), nu=2.5)
    candidates = np.linspace(low, high, 400)
    tried = list(np.random.default_rng(seed).uniform(low, high, FIRST))
    found = [np.log(value(at)) for at in tried]
    while len(tried) < GRID:
        model = regressor.GaussianProcessRegressor(kernel, alpha=1e-6, normalize_y=True, optimizer=None)
        mean, spread = model.fit(np.reshape(tried, (-1, 1)), found).predict(candidates[:, None], return_std=True)
        tried.append(candidates[np.argmin(mean - 2 * spread)])
        found.append(np.log(value(tried[-1])))
    return tried[int(np.argmin(found))]


def learn(method: str, job: Task, batch, start, steps: int, tol: float):
    """Log weights by NBA or HOAG."""
    kind = {"nba": jb.NBA(job.oracle, projection=clip, tol=tol, adjoint_tol=tol),
            "hoag": jb.HOAG(job.oracle, projection=clip, tol=100 * tol, adjoint_tol=100 * tol)}[method]  # fmt: skip
    result = jb.fit(kind, start, batch, steps=steps, progress=False)
    if result.status == jb.FitStatus.FAILED:
        raise SystemExit(f"{method} failed: {result.message}")
    return result


def compare(name: str, row: Sequence[int], seed: int, args) -> dict[str, dict]:
    """What each method found for one draw: weights, coefficients, scores, steps, seconds."""
    job = TASKS[name]
    batch, held_out, truth = draw(name, *row, seed)
    high = highest(job, batch)
    low, tol = high + np.log(LOWEST), args.tol
    found: dict[str, dict] = {}

    def keep(method, params, began, steps=GRID):
        data = jax.tree.map(lambda leaf: leaf[0], batch)
        y, info = jb.solve(job.oracle.problem, jnp.asarray(params), data, tol=tol, max_steps=MAX_STEPS)
        y = np.asarray(y)
        found[method] = {
            "val": job.score(y, np.asarray(batch["A_val"][0]), np.asarray(batch["b_val"][0])),
            "test": job.score(y, held_out["A"], held_out["b"]),
            "loss": values_of(job, batch, tol)(params),
            "support": int(np.sum(y != 0)), "recovered": int(np.sum((y != 0) & (truth != 0))),
            "steps": steps, "seconds": time.perf_counter() - began, "y": y,
            "unsolved": int(info.status) > jb.Status.PRECISION,
            "params": np.asarray(params),
        }  # fmt: skip

    searches = {
        "grid": lambda: grid_search(values_of(job, batch, tol), low, high),
        "gp": lambda: gaussian_process(values_of(job, batch, tol), low, high, seed),
    }
    for method, search in searches.items():
        began = time.perf_counter()
        keep(method, search(), began)
    first = jnp.asarray(found["grid"]["params"])
    for method, how, start, steps in (
        ("scalar", "nba", lambda: first, args.scalar_steps),
        ("weighted", "nba", lambda: jnp.full(row[1], found["scalar"]["params"]), args.steps),
        ("hoag", "hoag", lambda: jnp.full(row[1], found["scalar"]["params"]), args.steps),
    ):
        if method not in args.methods:
            continue
        began = time.perf_counter()
        result = learn(how, job, batch, start(), steps, tol)
        keep(method, result.params, began, result.steps)
    found["truth"] = {"y": truth}
    return found


# ----------------------------------------------------------------------------------------------------------- measuring

FIGURES = ("val", "test", "loss", "support", "recovered", "steps", "seconds", "unsolved")


def measure(args, recorder: common.Recorder) -> None:
    args.methods = [m for m in METHODS if m != "hoag" or m in args.methods]
    for name in args.tables:
        rows = [row for row in ROWS[name] if row[0] in args.n]
        for row in rows[: args.rows]:
            case = dict(zip(("table", "n", "m", "nz"), (name, *row), strict=True))
            if recorder.kept(case):
                continue
            draws = [compare(name, row, args.seed + k, args) for k in range(args.draws)]
            figures = {m: {key: [d[m][key] for d in draws] for key in FIGURES} for m in args.methods}
            if name == "regression" and row in SIGNALS:
                shown = {m: draws[0][m] for m in ("scalar", "weighted")}
                figures["signals"] = {
                    "truth": np.round(draws[0]["truth"]["y"], 4),
                    **{m: np.round(shown[m]["y"], 4) for m in shown},
                    **{f"log weights, {m}": np.round(shown[m]["params"], 3) for m in shown},
                }
            recorder.add(case, figures)
            recorder.write()
            means = {m: round(float(np.mean(figures[m]["test"])), 4) for m in args.methods}
            seconds = {m: round(float(np.mean(figures[m]["seconds"])), 1) for m in args.methods}
            print(name, row, "test", means, "seconds", seconds, flush=True)


# ---------------------------------------------------------------------------------------------------------------- page


def better(row: dict) -> bool:
    """Whether the mean test score of the weighted model is the better one."""
    scores = {m: float(np.mean(row["figures"][m]["test"])) for m in ("scalar", "weighted")}
    return ORDER[row["case"]["table"]](scores, key=scores.get) == "weighted"


def render(rows: Sequence[dict]) -> str:
    options = rows[0]["settings"]
    parts = [
        f"Data: rows and nonzero coefficients standard normal, targets with {NOISE:.0%} noise, labels their signs; n "
        f"rows each for training, validation and test; alpha = {RIDGE:g}; {options['draws']} draws, mean ± standard "
        "deviation. The slides do not state theirs, so orders can be compared and digits cannot. NMSE = ||A y - b||² / "
        "||b||², F1 that of the labels 1. Scalar weights start from the grid, weighted ones from the scalar.\n"
    ]
    for name in dict.fromkeys(row["case"]["table"] for row in rows):
        own = [row for row in rows if row["case"]["table"] == name]
        methods = [m for m in METHODS if all(m in row["figures"] for row in own)]
        score = {"regression": "NMSE", "logistic": "F1"}[name]
        header = ["n, m, nonzeros", "validation: scalar", "weighted", *(f"test, {METHODS[m]}" for m in methods),
                  "draws won", "nonzeros found (of all): scalar", "weighted"]  # fmt: skip
        lines = []
        for row in own:
            figures, case = row["figures"], row["case"]
            pairs = zip(figures["scalar"]["test"], figures["weighted"]["test"], strict=True)
            won = sum(a != b and ORDER[name](a, b) == b for a, b in pairs)
            lines.append([
                f"{case['n']}, {case['m']}, {case['nz']}", _spread(figures["scalar"]["val"]),
                _spread(figures["weighted"]["val"]), *(_spread(figures[m]["test"]) for m in methods),
                f"{won} of {len(figures['scalar']['test'])}",
                *(f"{np.mean(figures[m]['recovered']):.1f} ({np.mean(figures[m]['support']):.1f})"
                  for m in ("scalar", "weighted")),
            ])  # fmt: skip
        wins = sum(map(better, own))
        verdict = "met" if wins >= 0.9 * len(own) else "NOT met"
        unsolved = sum(sum(row["figures"][m]["unsolved"]) for row in own for m in methods)
        parts += [
            f"### {name.capitalize()}: {score}\n", common.table(header, lines),
            f"Weighted beats scalar in test {score} in {wins} of {len(own)} rows "
            f"({len(ROWS[name])} in the slides); criterion >= 90 %: {verdict}. "
            f"Lower-level solves that ended at the step limit: {unsolved}.\n",
        ]  # fmt: skip
    parts.append("![signals and learned weights](figures/villacis_2025_signals.png)\n")
    return "\n".join(parts)


def _spread(values) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def figures(rows: Sequence[dict], folder: Path) -> None:
    """Figures 3 to 6: signals above, learned log weights below."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if "signals" in row["figures"]]
    if not shown:
        return
    figure = Figure(figsize=(3.2 * len(shown), 5), layout="constrained")
    panels = figure.subplots(2, len(shown), squeeze=False)
    styles = {"truth": ("#000000", "o", 18), "scalar": ("#d55e00", "x", 16), "weighted": ("#0072b2", ".", 22)}
    for (signal, weight), row in zip(panels.T, shown, strict=True):
        case, found = row["case"], {k: np.array(v) for k, v in row["figures"]["signals"].items()}
        for name, (colour, marker, size) in styles.items():
            at = np.flatnonzero(found[name])
            face = {"facecolors": "none", "edgecolors": colour} if name == "truth" else {"color": colour}
            signal.scatter(at, found[name][at], s=size, marker=marker, label=name, lw=0.9, **face)
        signal.set_title(f"n = {case['n']}, m = {case['m']}, {case['nz']} nonzeros", fontsize=9)
        weights, nonzero = found["log weights, weighted"], found["truth"] != 0
        at = np.arange(case["m"])
        weight.scatter(at[~nonzero], weights[~nonzero], s=8, color="#999999", label="true zeros")
        weight.scatter(at[nonzero], weights[nonzero], s=12, color="#0072b2", label="true nonzeros")
        scalar = float(found["log weights, scalar"])
        weight.axhline(scalar, color="#d55e00", lw=1, label="scalar")
        weight.set_xlabel("coefficient")
    panels[0, 0].set_ylabel("nonzero coefficients")
    panels[1, 0].set_ylabel("log weight")
    for line in panels:
        line[0].legend(fontsize=7)
        for axes in line:
            axes.grid(alpha=0.25)
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "villacis_2025_signals.png", dpi=100)


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"tables": list(TASKS), "n": [100, 200], "rows": 18, "draws": 10, "steps": 60, "scalar_steps": 15,
                  "tol": 1e-4, "methods": list(METHODS)},
        quick={"n": [100], "rows": 1, "draws": 1, "steps": 3, "scalar_steps": 2},
    )  # fmt: skip
    options.add_argument("--tables", nargs="+", choices=list(TASKS), help="which tables")
    options.add_argument("--n", nargs="+", type=int, choices=(100, 200), help="rows of which n")
    options.add_argument("--rows", type=int, help="of each table, the first ones")
    options.add_argument("--draws", type=int, help="random problems per row")
    options.add_argument("--steps", type=int, help="outer steps with one weight per coefficient")
    options.add_argument("--scalar-steps", type=int, help="outer steps of the one weight")
    options.add_argument("--tol", type=float, help="of lower-level solutions and adjoints")
    options.add_argument("--methods", nargs="+", choices=list(METHODS), help="grid, gp, scalar and weighted always run")
    common.run(f"papers/{NAME}", options, measure, render, figures, argv)


if __name__ == "__main__":
    main()
