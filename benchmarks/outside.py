"""Numbers that were wrong without a word when the library was first tried from outside, and what they are now.

    python benchmarks/outside.py

Each case is one example of a kind: what was tried, what it gave, what is right, what it gives now, and the test that
holds the kind. Then a NaN at every position of a batch of 64 for every oracle, and constants that are wrong.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jbilevel as jb
from benchmarks import common

NAME, PAGE = Path(__file__).stem, "reliability"
COUNT = 64
A = np.array([1.0, 2.0, 3.0, 4.0], np.float32)


# ------------------------------------------------------------------------------------------------------ small problems


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2) + 0.5 * p * jnp.sum(x**2)


def start(p, d):
    return jnp.zeros_like(d)


def squared(p, x, d):
    return jnp.sum(x**2)


RIDGE = jb.SmoothProblem(energy, start, strong_convexity=1.0, smoothness=5.0)
SADDLE = jb.SaddleProblem(
    lambda p, x, d: x,
    lambda p, v, step, d: jb.prox.squared_distance(v, step, d),
    lambda p, v, step, d: jb.prox.squared_distance(v, step, jnp.zeros_like(v), 1 / p),
    lambda p, d: (jnp.zeros_like(d), jnp.zeros_like(d)),
    mu_primal=1.0,
    mu_dual=lambda p, d: 1 / p,
    norm=1.0,
)
LASSO = jb.WeightedL1Problem(lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), start, strong_convexity=1.0)
ORACLES = {
    "implicit": jb.implicit.Oracle(RIDGE, squared),
    "implicit, corrected": jb.implicit.Oracle(RIDGE, squared, correct=True),
    "piggyback": jb.piggyback.Oracle(SADDLE, lambda p, x, d: jnp.sum(x[0] ** 2)),
    "piggyback, simultaneous": jb.piggyback.Oracle(SADDLE, lambda p, x, d: jnp.sum(x[0] ** 2), mode="simultaneous"),
    "nonsmooth": jb.nonsmooth.Oracle(LASSO, squared),
    "unroll": jb.unroll.Oracle(RIDGE, squared, steps=30),
    "one-step": jb.unroll.OneStep(RIDGE, squared),
    "explicit": jb.explicit.Oracle(lambda p, d: jnp.sum((d / (1 + p)) ** 2)),
}


def steep(p, d):
    """A quadratic of condition 1e8 with its minimum 0 at 0."""
    return 0.5 * (1e8 * (p[0] - 1.0) ** 2 + (p[1] - 1.0) ** 2) + 0.0 * d


def uphill(p, d):
    """A function whose gradient is reported with the wrong sign."""
    return _reversed(p) + 0.0 * d


@jax.custom_jvp
def _reversed(p):
    return 0.5 * jnp.sum((p - 3.0) ** 2)


@_reversed.defjvp
def _(primals, tangents):
    return _reversed(primals[0]), -jnp.sum((primals[0] - 3.0) * tangents[0])


def kinked(p, d):
    """Its value is finite and its gradient NaN at p = 0.5."""
    return jnp.sqrt((p - 0.5) ** 2) + 0.0 * d


# --------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    what: str
    before: str
    right: str
    now: Callable[[], str]
    test: str


def said(call: Callable) -> str:
    """What a call returns, or its error or warning, in words."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = call()
        except Exception as error:
            return f"{type(error).__name__}: {_first(error)}"
    words = [f"{w.category.__name__}: {_first(w.message)}" for w in seen]
    return "; ".join([str(found), *dict.fromkeys(words)])


def _first(words) -> str:
    text = str(words).split("\n")[0]
    return text if len(text) <= 110 else text[:107] + "..."


def _foreign() -> str:
    jb.solve(RIDGE, 1.0, A)
    x, info = jb.solve(RIDGE, 1.0, A.astype(">f4"))
    return f"{[round(float(v), 3) for v in x]}, {jb.Status(int(info.status)).name}"


def _foreign_oracle() -> str:
    ORACLES["implicit"](1.0, A[None], tol=1e-4)
    return f"value {float(ORACLES['implicit'](1.0, A[None].astype('>f4'), tol=1e-4).value):.4g}"


def _units(unit: float) -> str:
    x_hat = jb.implicit.argmin(RIDGE)
    return f"gradient {float(jax.grad(lambda p: jnp.sum(x_hat(p, unit * A)))(1.0) / unit):.4g}"


def _weights(weight) -> str:
    hg = ORACLES["implicit"](1.0, np.stack([A, 2 * A]), tol=1e-4, sample_weight=np.asarray(weight, np.float32))
    return f"value {float(hg.value):.4g}, gradient {float(hg.grad):.4g}"


def _warm() -> str:
    with jax.enable_x64(True):
        batch = np.asarray(A, np.float64)[None]
        oracle = ORACLES["implicit"]
        warm = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), oracle.init(1.0, batch))
        hg = oracle(1.0, batch, warm, tol=1e-9)
        return f"off by {abs(float(hg.grad) + 7.5):.1e}, reported error {float(hg.error):.1e}"


def _padding() -> str:
    oracle = jb.explicit.Oracle(lambda p, d: d["y"] + 0.0 * p)
    batch = {"y": np.array([1.0, 1.0, 9.0], np.float32), "sample_weight": np.array([1.0, 1.0, 0.0], np.float32)}
    return f"value {float(oracle(1.0, batch).value):.4g}"


def ended(method, params, *, data=None, steps=50) -> str:
    result = jb.fit(method, jnp.asarray(params), np.zeros(1, np.float32) if data is None else data, steps=steps)
    return f"{result.status.name}: {result.message}"


def _lower(**options) -> jb.Oracle:
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    return problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, **options)


def _maximum() -> str:
    problem = jb.SmoothProblem(lambda p, x, d: -0.5 * jnp.sum(x**2) + jnp.sum(x**4), lambda p, d: jnp.zeros(3))
    return jb.Status(int(jb.solve(problem, (), ())[1].status)).name


def _logistic(method) -> str:
    problem = jb.SmoothProblem(
        lambda p, x, d: jnp.sum(jax.nn.softplus(-d["A"] @ x)) + 0.5 * jnp.exp(p) * jnp.sum(x**2),
        lambda p, d: jnp.zeros(d["A"].shape[1]),
    )
    rng = np.random.default_rng(0)
    data = {"A": rng.standard_normal((1, 40, 8)).astype(np.float32)}
    oracle = problem.oracle(lambda p, x, d: jnp.sum((x - 1.0) ** 2))
    return ended(method(oracle), 0.0, data=data)


def _dropped(kind: str) -> str:
    oracle = replace(ORACLES[kind], on_failure="drop")
    pair = np.stack([A, 2 * A])
    first = oracle(1.0, np.stack([A, np.full(4, np.nan, np.float32)]), tol=1e-4)
    again, cold = oracle(1.0, pair, first.warm, tol=1e-4), oracle(1.0, pair, tol=1e-4)
    return f"gradient {float(again.grad):.4g} (cold {float(cold.grad):.4g}), {jb.Status(int(again.status)).name}"


def _wrong_modulus(factor: float, count: int = 300) -> str:
    """How many of random quadratics with mu too large by a factor are certified all the same."""
    silent = warned = named = 0
    rng = np.random.default_rng(1)
    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * x @ d["H"] @ x - d["b"] @ x,
        lambda p, d: jnp.zeros(8),
        strong_convexity=lambda p, d: d["mu"],
    )
    for _ in range(count):
        basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
        values = 10.0 ** np.append(rng.uniform(0, 3, 7), 0.0)
        H = (basis * values) @ basis.T
        data = {"H": H, "b": rng.standard_normal(8), "mu": factor}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            x, info = jb.solve(problem, (), jax.tree.map(np.float32, data), tol=0.3)
        broken = np.linalg.norm(np.asarray(x) - np.linalg.solve(H, data["b"])) > float(info.error) * 1.001
        if int(info.status) == jb.Status.CONVEXITY:
            named += 1
        elif broken and int(info.status) == jb.Status.CONVERGED:
            warned, silent = warned + bool(seen), silent + (not seen)
    return (
        f"CONVEXITY {named} of {count}; bound broken and CONVERGED {silent}, and {warned} with a warning that the "
        "tolerance is larger than what there is to solve"
    )


def _wrong_adjoint() -> str:
    rng = np.random.default_rng(0)
    K = rng.standard_normal((6, 4)).astype(np.float32)
    wrong = K.copy()
    wrong[0] *= 1.3
    problem = replace(
        SADDLE,
        linear=lambda p, x, d: K @ x,
        transpose=lambda p, y, d: wrong.T @ y,
        init=lambda p, d: (jnp.zeros(4), jnp.zeros(6)),
        norm=float(np.linalg.norm(K, 2) * 1.3),
    )
    info = jb.solve(problem, 1.0, A, tol=1e-4)[1]
    return f"{jb.Status(int(info.status)).name}, error {float(info.error):.1e}"


def _anew() -> str:
    for k in range(6):
        jb.solve(replace(RIDGE, energy=lambda p, x, d, k=k: energy(p, x, d) + k), 1.0, A, tol=1e-3)
    return "6 compilations"


CASES = (
    Case("`>f4` data, jb.solve after a native call", "x = 0, CONVERGED, bound 0", "0.5, 1, 1.5, 2", _foreign,
         "test_inputs.py::test_solve_reads_foreign_bytes"),
    Case("`>f4` data, implicit.Oracle", "value 0", "7.5", _foreign_oracle,
         "test_inputs.py::test_oracles_read_foreign_bytes"),
    Case("argmin without tol, data in units of 1e-6", "16 % off", "-2.5", lambda: _units(1e-6),
         "test_inputs.py::test_default_tolerances_do_not_depend_on_units"),
    Case("the same in units of 1e-8", "0, no warning", "-2.5", lambda: _units(1e-8),
         "test_inputs.py::test_default_tolerances_do_not_depend_on_units"),
    Case("tol=1e-6 for data in units of 1e-8", "x = 0, CONVERGED", "a warning",
         lambda: said(lambda: jb.solve(RIDGE, 1.0, 1e-8 * A, tol=1e-6)[1].steps),
         "test_inputs.py::test_a_tolerance_larger_than_the_problem_is_said"),
    Case("float32 warm start of a float64 batch, tol 1e-9", "7.8e-7 off, reported 8.7e-8", "off by < 1e-9", _warm,
         "test_inputs.py::test_a_float32_warm_start_does_not_pull_down_a_float64_batch"),
    Case("weights [2e38, 2e38] in float32", "value 0, gradient 0, CONVERGED", "18.75, -18.75",
         lambda: _weights([2e38, 2e38]), "test_inputs.py::test_weights_whose_sum_overflows"),
    Case("weights [0, 0]", "NaN, CONVERGED", "ValueError", lambda: said(lambda: _weights([0, 0])),
         "test_inputs.py::test_weights_that_say_nothing"),
    Case("a padded batch, values 1, 1, 9", "3.667 (negative index)", "1 (weight 0)", _padding,
         "test_inputs.py::test_weights_in_the_batch_and_padding"),
    Case("MAID, gradient of the wrong sign", "CONVERGED, gradient norm 6", "STALLED",
         lambda: ended(jb.MAID(jb.explicit.Oracle(uphill)), -3.0), "test_statuses.py::test_stuck_is_not_converged"),
    Case("MAID, condition 1e8 from (1.0001, 50)", "CONVERGED, value 1201 (minimum 0)", "STALLED",
         lambda: ended(jb.MAID(jb.explicit.Oracle(steep)), [1.0001, 50.0]),
         "test_statuses.py::test_stuck_is_not_converged"),
    Case("MAID, step_size=1e6", "CONVERGED, nothing moved", "STALLED",
         lambda: ended(jb.MAID(_lower(), step_size=1e6), 1.0, data=np.full(1, 2.0, np.float32)),
         "test_statuses.py::test_stuck_is_not_converged"),
    Case("MAID, NaN gradient with a finite value", "CONVERGED after 62 evaluations", "FAILED",
         lambda: ended(jb.MAID(jb.explicit.Oracle(kinked)), 0.5),
         "test_statuses.py::test_a_gradient_that_is_not_finite"),
    Case("MAID, gradient exactly 0", "60 refinements (work 1,013)", "CONVERGED at once",
         lambda: ended(jb.MAID(_lower()), 1.5, data=np.full(1, 2.0, np.float32)),
         "test_statuses.py::test_a_zero_gradient_ends_at_once"),
    Case("jb.solve on a maximum", "CONVERGED", "INDEFINITE", _maximum, "test_statuses.py::test_a_maximum"),
    Case("HOAG with step_size=1e30", "FINISHED at -8e29, nothing said", "the value rose",
         lambda: ended(jb.HOAG(_lower(), step_size=1e30), 1.0, data=np.full(1, 2.0, np.float32)),
         "test_fit_result.py"),
    Case("a sample that failed once, on_failure=drop: piggyback", "dropped for ever", "comes back",
         lambda: _dropped("piggyback"), "test_inputs.py::test_a_sample_that_failed_once_comes_back"),
    Case("the same: unroll", "dropped for ever", "comes back", lambda: _dropped("unroll"),
         "test_inputs.py::test_a_sample_that_failed_once_comes_back"),
    Case("mu twice too large, 300 random quadratics", "100 bounds broken, all CONVERGED", "named where it is seen",
         lambda: _wrong_modulus(2.0), "test_contradictions.py::test_a_modulus_that_is_too_large"),
    Case("the same, ten times", "206 broken", "named where it is seen", lambda: _wrong_modulus(10.0),
         "test_contradictions.py::test_a_modulus_that_is_too_large"),
    Case("a transpose with one row 1.3 times too large", "CONVERGED, error 1.3e-7 (truth 1.8e-2)", "ADJOINT",
         _wrong_adjoint, "test_contradictions.py::test_a_transpose_that_is_none"),
    Case("a new function at every step", "28 s and 12.8 MB a call, no word", "a warning that names it",
         lambda: said(_anew), "test_inputs.py::test_a_function_made_anew_at_every_step_is_named"),
)  # fmt: skip


def measure(args, recorder: common.Recorder) -> None:
    for case in CASES:
        figures = {"before": case.before, "right": case.right, "now": said(case.now), "test": case.test}
        recorder.add({"row": case.what}, figures)
        recorder.write()
    for name, oracle in ORACLES.items():
        recorder.add({"row": f"NaN at each of {COUNT} positions", "oracle": name}, positions(oracle))
        recorder.write()
    for name, call in wrong_constants().items():
        recorder.add({"row": "wrong constants", "what": name}, {"now": said(call)})
        recorder.write()


def positions(oracle) -> dict[str, int]:
    """Positions at which the bad sample, and no other, is named, and leaves the mean with on_failure="drop"."""
    batch = np.linspace(0.5, 2.0, COUNT * 4, dtype=np.float32).reshape(COUNT, 4)
    dropping = replace(oracle, on_failure="drop")
    sound = np.asarray(oracle(1.0, batch, tol=1e-3).values)
    named = left = 0
    for k in range(COUNT):
        bad = batch.copy()
        bad[k, k % 4] = np.nan
        others = np.arange(COUNT) != k
        hg, dropped = oracle(1.0, bad, tol=1e-3), dropping(1.0, bad, tol=1e-3)
        codes = np.asarray(hg.lower.status)
        named += codes[k] == jb.Status.NONFINITE and np.all(codes[others] < jb.Status.NONFINITE) and np.isnan(hg.value)
        left += bool(np.isclose(dropped.value, sound[others].mean(), rtol=1e-3) and np.isfinite(dropped.grad))
    return {"positions": COUNT, "named": int(named), "left": left}


def wrong_constants() -> dict[str, Callable]:
    def status(problem, solver=None):
        return lambda: jb.Status(int(jb.solve(problem, 1.0, 1e3 * A, tol=1e-4, solver=solver)[1].status)).name

    def wrong_prox(p, v, step, d):
        return 2.0 * v

    small = replace(RIDGE, smoothness=0.5)
    return {
        "smoothness 4 times too small: AGD": status(small, jb.solvers.AGD()),
        "smoothness 4 times too small: weighted l1": status(replace(LASSO, smoothness=0.25)),
        "norm half of the true one: PDHG": status(replace(SADDLE, norm=0.5)),
        "a proximal map that is none: PDHG": status(replace(SADDLE, prox_dual=wrong_prox)),
        "a proximal map that is none: verify": lambda: replace(SADDLE, prox_dual=wrong_prox).verify(1.0, A),
    }


def render(rows: Sequence[dict]) -> str:
    tried = [r for r in rows if "before" in r["figures"]]
    nan = [r for r in rows if "positions" in r["figures"]]
    wrong = [r for r in rows if "what" in r["case"]]
    parts = ["**Tried from outside**\n"]
    parts.append(
        common.table(
            ["tried", "gave", "right", "gives now", "held by"],
            [
                [_cell(r["case"]["row"]), *(_cell(r["figures"][k]) for k in ("before", "right", "now", "test"))]
                for r in tried
            ],
        )
    )
    parts.append(f"**A NaN at every position of {COUNT} samples**\n")
    header = ["oracle", "positions", "that sample named, and no other", "leaves the mean with on_failure='drop'"]
    body = [[r["case"]["oracle"], *(r["figures"][k] for k in ("positions", "named", "left"))] for r in nan]
    parts.append(common.table(header, body))
    parts.append("**Wrong constants**\n")
    parts.append(common.table(["wrong", "said"], [[r["case"]["what"], _cell(r["figures"]["now"])] for r in wrong]))
    return "\n".join(parts)


def _cell(words: Any) -> str:
    return str(words).replace("|", "\\|")


def main(argv: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, defaults={"dtype": ["float32"]}, quick={"dtype": ["float32"]})
    args = common.parse(options, argv)
    recorder = common.recorder_of(PAGE, NAME, args)
    measure(args, recorder)
    print(render(recorder.rows))


if __name__ == "__main__":
    main()
