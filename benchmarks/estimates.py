"""Does the reported error of a hypergradient hold? Estimates against the truth, on problems that are easy and hard.

The truth is that of dense linear algebra in double precision: the minimiser polished by Newton steps with the whole
Hessian, the adjoint by a direct solve. ``error`` is asked of single samples at random parameters, data and tolerances.

    python benchmarks/estimates.py           # all kinds, both precisions, with and without a modulus of convexity
    python benchmarks/estimates.py --quick   # some cases of each
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common, estimates_saddle

NAME, PAGE = Path(__file__).stem, "certificates"
ROUNDING = {"float64": 1e-9, "float32": 1e-6}  # relative errors below are not judged
WHAT = ("gradient", "value", "warm value", "corrected gradient", "corrected value")
CONDITIONS = {"condition to 1e3": (0, 1.01e3), "to 1e4": (1.01e3, 1.01e4), "above": (1.01e4, math.inf)}
SPECTRA = ("log-uniform", "uniform", "two clusters", "linear")


class Setup(NamedTuple):
    """A kind of lower level. draw: rng -> (params, data), in double precision."""

    problem: jb.Problem
    loss: Callable
    draw: Callable


class Truth(NamedTuple):
    value: float
    grad: np.ndarray
    condition: float


def distance(params, x, data):
    return 0.5 * jnp.sum((x - data["target"]) ** 2)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


# ---------------------------------------------------------------------------------------------------- the kinds


def quadratic(n: int) -> Setup:
    """1/2 exp(t) x'Hx - x'(b + J u), params (t, u): H with eigenvalues from 1 to the condition."""

    def energy(params, x, data):
        stretched = jnp.exp(params["t"]) * (data["H"] @ x)
        return 0.5 * x @ stretched - x @ (data["b"] + data["J"] @ params["u"])

    def draw(rng):
        condition = 10 ** rng.uniform(1, 6)
        eigenvalues = spectrum(rng, n, condition)
        basis = np.linalg.qr(rng.standard_normal((n, n)))[0]
        H = (basis * eigenvalues) @ basis.T
        params = {"t": np.asarray(rng.uniform(-1, 1)), "u": rng.standard_normal(4)}
        data = {"H": 0.5 * (H + H.T), "b": rng.standard_normal(n), "J": rng.standard_normal((n, 4))}
        return params, data | {"target": rng.standard_normal(n)}

    # below the smallest eigenvalue in single precision too
    modulus = lambda params, data: 0.99 * jnp.exp(params["t"])  # noqa: E731
    problem = jb.SmoothProblem(energy, lambda params, data: 0 * data["b"], strong_convexity=modulus)
    return Setup(problem, distance, draw)


def spectrum(rng, n: int, condition: float) -> np.ndarray:
    kind = rng.choice(SPECTRA)
    if kind == "log-uniform":
        found = 10 ** rng.uniform(0, np.log10(condition), n)
    elif kind == "uniform":
        found = rng.uniform(1, condition, n)
    elif kind == "two clusters":
        found = np.where(rng.random(n) < 0.5, rng.uniform(1, 2, n), rng.uniform(condition / 2, condition, n))
    else:
        found = np.linspace(1, condition, n)
    found = np.sort(np.clip(found, 1, condition))
    found[0], found[-1] = 1.0, condition
    return found


def ridge(potential: str, n: int = 64) -> Setup:
    """m/2 |x - y|^2 + sum_k exp(w_k) h(K_k x / s) with random rows K_k: log-cosh, or the C^{1,1} psi."""
    h = {"log-cosh": lambda t: jnp.logaddexp(t, -t) - jnp.log(2.0), "psi": psi}[potential]

    def energy(params, x, data):
        return 0.5 * data["m"] * jnp.sum((x - data["y"]) ** 2) + jnp.sum(jnp.exp(params) * h(data["K"] @ x / 0.3))

    def draw(rng):
        data = {"K": rng.standard_normal((2 * n, n)) / np.sqrt(n), "y": rng.standard_normal(n)}
        data |= {"m": np.asarray(10 ** rng.uniform(-3, 0)), "target": rng.standard_normal(n)}
        return rng.uniform(-2, 1, 2 * n), data

    modulus = lambda params, data: 0.999 * data["m"]  # noqa: E731
    problem = jb.SmoothProblem(energy, lambda params, data: 0 * data["y"], strong_convexity=modulus)
    return Setup(problem, distance, draw)


def psi(t):
    u = jnp.clip(t, 0.0, 1.0)
    return u * (t - 0.5 * u)


def image(name: str, side: int = 12) -> Setup:
    """Denoising of a noisy piecewise constant image by a regulariser of the library."""
    R = {
        "smoothed TV": jb.regularizers.SmoothedTV(),
        "fields of experts": jb.regularizers.FoE(6, 3),
        "ridge filters": jb.regularizers.CRR(widths=(4, 8), sizes=(3, 3)),
    }[name]

    def draw(rng):
        clean = np.where(rng.random((side, side)).cumsum(1) > rng.uniform(1, 5), 0.8, 0.2)
        data = {"y": clean + 0.1 * rng.standard_normal((side, side)), "target": clean}
        if name == "smoothed TV":
            return R.init(weight=10 ** rng.uniform(-2, 0), eps=10 ** rng.uniform(-3, -1), dtype=jnp.float64), data
        params = R.init(jax.random.key(int(rng.integers(1 << 30))), dtype=jnp.float64)
        return jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape), params), data

    return Setup(jb.variational(None, R), distance, draw)


def sparse(n: int = 60) -> Setup:
    """1/2 |A x - b|^2 + m/2 |x|^2 + sum_i exp(w_i) |x_i|."""

    def smooth(params, x, data):
        return 0.5 * jnp.sum((data["A"] @ x - data["b"]) ** 2) + 0.5 * data["m"] * jnp.sum(x**2)

    def draw(rng):
        A = rng.standard_normal((n, n)) / np.sqrt(n)
        data = {"A": A, "b": rng.standard_normal(n), "m": np.asarray(10 ** rng.uniform(-2, 0))}
        return rng.uniform(-3, -1, n), data | {"target": rng.standard_normal(n)}

    modulus = lambda params, data: 0.999 * data["m"]  # noqa: E731
    problem = jb.WeightedL1Problem(smooth, lambda params, data: 0 * data["b"], strong_convexity=modulus)
    return Setup(problem, distance, draw)


KINDS: dict[str, Callable[[], Setup]] = {
    **{f"quadratic, n = {n}": partial(quadratic, n) for n in (8, 30, 100, 300, 1000)},
    "log-cosh ridge": partial(ridge, "log-cosh"),
    "psi ridge": partial(ridge, "psi"),
    **{name: partial(image, name) for name in ("smoothed TV", "fields of experts", "ridge filters")},
    "weighted l1": sparse,
}
WITHOUT = ("weighted l1",)  # not asked without a modulus
SADDLE = tuple(estimates_saddle.KINDS)


# ---------------------------------------------------------------------------------------------------- the truth


def truth(setup: Setup, params, data) -> Truth | None:
    """By dense linear algebra, None where the Newton steps do not end."""
    known = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, data))
    if isinstance(setup.problem, jb.WeightedL1Problem):
        return _sparse_truth(setup, *known)
    return _smooth_truth(setup.problem.energy, setup.loss, setup.problem, *known)


@lru_cache
def _derivatives(energy: Callable, loss: Callable):
    return (
        jax.jit(jax.grad(energy, 1)),
        jax.jit(jax.hessian(energy, 1)),
        jax.jit(jax.value_and_grad(loss, 1)),
        jax.jit(jax.grad(lambda p, x, d, q: -jnp.vdot(jax.grad(energy, 1)(p, x, d), q))),
    )


def _smooth_truth(energy, loss, problem, params, data, free=None, start=None) -> Truth | None:
    """free: which unknowns may move."""
    gradient, hessian, loss_gradient, pull_back = _derivatives(energy, loss)
    x = jb.solve(problem, params, data, tol=1e-9)[0] if start is None else start
    free = np.ones(x.size, bool) if free is None else free
    for _ in range(20):
        g = np.ravel(gradient(params, x, data))[free]
        H = np.asarray(hessian(params, x, data)).reshape(x.size, x.size)[np.ix_(free, free)]
        step = np.zeros(x.size)
        step[free] = np.linalg.solve(H, g)
        x = x - step.reshape(x.shape)
        if np.linalg.norm(step) <= 1e-14 * max(np.linalg.norm(x), 1.0):
            break
    else:
        return None
    value, b = loss_gradient(params, x, data)
    q = np.zeros(x.size)
    q[free] = np.linalg.solve(H, np.ravel(b)[free])
    eigenvalues = np.linalg.eigvalsh(H)
    return Truth(float(value), flat(pull_back(params, x, data, q.reshape(x.shape))), eigenvalues[-1] / eigenvalues[0])


def _sparse_truth(setup: Setup, params, data) -> Truth | None:
    """On the support of a solve to 1e-12, by the Hessian of the smooth part there."""
    x, info = jb.solve(setup.problem, params, data, tol=1e-12, max_steps=200_000)
    if int(info.status) > jb.Status.PRECISION:
        return None
    signs = jnp.sign(x)
    return _smooth_truth(_with_signs(setup.problem.smooth), setup.loss, setup.problem, params, data | {"signs": signs},
                         np.asarray(signs != 0), x)  # fmt: skip


@lru_cache
def _with_signs(smooth: Callable) -> Callable:
    return lambda params, x, data: smooth(params, x, data) + jnp.sum(jnp.exp(params) * data["signs"] * x)


# ---------------------------------------------------------------------------------------------------- the cases


def cases(kind: str, dtype: str, modulus: bool, count: int, seed: int, steps: int = 20) -> Iterator[dict[str, Any]]:
    """What is told of single samples, and the truth. steps: of the correction that estimates."""
    setup, rng = KINDS[kind](), np.random.default_rng([seed, list(KINDS).index(kind), modulus])
    problem = setup.problem if modulus else replace(setup.problem, strong_convexity=None)
    plain = problem.oracle(setup.loss, error_steps=steps)
    corrected = replace(plain, correct=True)
    for _ in range(count):
        drawn = setup.draw(rng)
        params, data = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), drawn)
        tol = 10 ** rng.uniform(-6, 0)
        if (exact := truth(setup, params, data)) is None:
            continue
        batch = jax.tree.map(lambda leaf: leaf[None], data)
        hg = plain(params, batch, tol=tol)
        told = {"condition": exact.condition, "tol": tol, "value": abs(exact.value)}
        told |= {"norm": float(np.linalg.norm(exact.grad)), "products": int(hg.adjoint.evaluations.products[0])}
        told |= compared("", hg, exact) | compared("corrected ", corrected(params, batch, tol=tol), exact)
        again = plain.value(params, batch, hg.warm, tol=tol)
        yield told | {"warm value truth": abs(float(again.value) - exact.value), "warm value": float(again.error)}


def saddle_cases(kind: str, dtype: str, count: int, seed: int) -> Iterator[dict[str, Any]]:
    for case in estimates_saddle.cases(kind, dtype, count, seed):
        exact = Truth(case.value, case.exact, case.condition)
        call, asked = (case.params, case.batch), {"tol": case.tol, "adjoint_tol": case.adjoint_tol}
        with common.precision(dtype):
            hg = case.oracle(*call, **asked)
            corrected = replace(case.oracle, correct=True)(*call, **asked)
            again = case.oracle.value(*call, hg.warm, tol=case.tol)
        told = {"condition": case.condition, "tol": case.tol, "value": abs(case.value)}
        told |= {"norm": float(np.linalg.norm(case.exact)), "products": int(hg.adjoint.evaluations.products[0])}
        told |= compared("", hg, exact) | compared("corrected ", corrected, exact)
        yield told | {"warm value truth": abs(float(again.value) - exact.value), "warm value": float(again.error)}


def compared(name: str, hg: jb.Hypergradient, exact: Truth) -> dict[str, float]:
    return {
        f"{name}gradient truth": float(np.linalg.norm(flat(hg.grad) - exact.grad)), f"{name}gradient": float(hg.error),
        f"{name}value truth": abs(float(hg.value) - exact.value), f"{name}value": float(hg.value_error),
    }  # fmt: skip


class Share(NamedTuple):
    """Of the cases in which an error is above rounding: how often one is reported, and how good it is."""

    cases: int
    reported: float
    low: float  # share of the reported ones below half of the truth
    ratios: tuple  # estimate/truth: 1 %, median, 95 %

    @classmethod
    def of(cls, told: list[dict], what: str, least: float, size: str) -> Share:
        truths = [(t[f"{what} truth"], t[what]) for t in told if t[f"{what} truth"] > least * t[size]]
        ratios = np.array([error / true for true, error in truths if np.isfinite(error)])
        quantiles = tuple(np.quantile(ratios, (0.01, 0.5, 0.95))) if ratios.size else (math.nan,) * 3
        low = float(np.mean(ratios < 0.5)) if ratios.size else math.nan
        return cls(len(truths), ratios.size / max(len(truths), 1), low, quantiles)


def judged(told: list[dict], dtype: str) -> dict[str, Any]:
    least = ROUNDING[dtype]
    found: dict[str, Any] = {"drawn": len(told)}
    for what in WHAT:
        size = "norm" if "gradient" in what else "value"
        found[what] = Share.of(told, what, least, size)._asdict()
    for name, (low, high) in CONDITIONS.items():
        some = [t for t in told if low <= t["condition"] < high]
        found[f"reported, {name}"] = Share.of(some, "gradient", least, "norm")._asdict()
    above = [t for t in told if t["gradient truth"] > least * t["norm"]]
    gains = [t["gradient truth"] / max(t["corrected gradient truth"], 1e-300) for t in above]
    worse = [
        t["corrected gradient truth"] > max(t["gradient truth"], 2 * t["corrected gradient"])
        for t in above
        if math.isfinite(t["corrected gradient"])
    ]
    found["gain"], found["worse"] = float(np.median(gains)) if gains else math.nan, int(np.sum(worse))
    found["products"] = float(np.median([t["products"] for t in told])) if told else math.nan
    return found


def measure(args, recorder) -> None:
    for kind in args.kinds:
        for dtype in args.dtype:
            for modulus in (True, False):
                if kind in (*WITHOUT, *SADDLE) and not modulus:
                    continue
                spent = time.process_time()
                with common.precision("float64"), warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # tolerances that are met at the start
                    if kind in SADDLE:
                        told = list(saddle_cases(kind, dtype, args.cases, args.seed))
                    else:
                        told = list(cases(kind, dtype, modulus, args.cases, args.seed))
                jax.clear_caches()  # each row has programs of its own, and a process not room for all
                case = {"kind": kind, "modulus": "known" if modulus else "unknown", "dtype": dtype}
                recorder.add(case, judged(told, dtype) | {"cpu_s": time.process_time() - spent})
                recorder.write()


def render(rows) -> str:
    lines, whole = [], []
    for row in rows:
        case, told = row["case"], row["figures"]
        gradient, value = told["gradient"], told["value"]
        lines.append((
            case["kind"], case["modulus"], case["dtype"], gradient["cases"],
            *(percent(told[f"reported, {name}"]) for name in CONDITIONS), shown(gradient["low"], "{:.1%}"),
            " / ".join(shown(q, "{:.2g}") for q in gradient["ratios"]), shown(value["low"], "{:.1%}"),
            shown(value["ratios"][1], "{:.2g}"), shown(told["gain"], "{:.2g}"), told["worse"],
        ))  # fmt: skip
        whole.append(told)
    count = sum(t["gradient"]["cases"] for t in whole)
    reported = sum(t["gradient"]["cases"] * t["gradient"]["reported"] for t in whole)
    low = sum(t["gradient"]["cases"] * t["gradient"]["reported"] * finite(t["gradient"]["low"]) for t in whole)
    header = ["lower level", "modulus", "", "cases", *(f"reported, {name}" for name in CONDITIONS), "below half",
              "estimate/truth: 1 %, median, 95 %", "value: below half", "median", "gain of a correction",
              "made worse"]  # fmt: skip
    return (
        f"{count} cases in which the error is above rounding; an error is reported in {reported:.0f} of them, and is "
        f"below half of the truth in {low:.0f} ({100 * low / max(reported, 1):.1f} %).\n\n"
        + common.table(header, lines)
    )


def percent(share: dict) -> str:
    return f"{100 * share['reported']:.0f} % of {share['cases']}" if share["cases"] else "–"


def shown(value, form: str) -> str:
    return "–" if value is None or math.isnan(value) else form.format(value)


def finite(value) -> float:
    return 0.0 if value is None or math.isnan(value) else value


def main(argv=None) -> None:
    options = common.parser(
        __doc__,
        defaults={"cases": 75, "kinds": [*KINDS, *SADDLE], "dtype": ["float64", "float32"]},
        quick={"cases": 3, "kinds": ["quadratic, n = 8"], "dtype": ["float64"]},
    )
    options.add_argument("--cases", type=int, help="of each row")
    options.add_argument("--kinds", nargs="+", choices=[*KINDS, *SADDLE], help="lower levels (default: all)")
    args = common.parse(options, argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
