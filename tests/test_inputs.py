"""What users hand over, as they have it: byte order, lists, units, dtypes, weights, JAX settings, closures."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb
from jbilevel import Status
from jbilevel._core.recompilation import note_compilation

A = np.array([1.0, 2.0, 3.0, 4.0])


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2) + 0.5 * p * jnp.sum(x**2)


def start(p, d):
    return jnp.zeros_like(d)


def loss(p, x, d):
    return jnp.sum(x**2)


def saddle_loss(p, x, d):
    return jnp.sum(x[0] ** 2)


# all have x_hat = d/(1 + p) or, of the last one, d - exp(p)
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
    "implicit": jb.implicit.Oracle(RIDGE, loss),
    "corrected": jb.implicit.Oracle(RIDGE, loss, correct=True),
    "piggyback": jb.piggyback.Oracle(SADDLE, saddle_loss),
    "nonsmooth": jb.nonsmooth.Oracle(LASSO, loss),
    "unroll": jb.unroll.Oracle(RIDGE, loss, steps=60),
    "one-step": jb.unroll.OneStep(RIDGE, loss),
    "explicit": jb.explicit.Oracle(lambda p, d: jnp.sum((d / (1 + p)) ** 2)),
}
every_oracle = pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES.keys())


def exact_value(oracle):
    return 7.5 if oracle is not ORACLES["nonsmooth"] else np.sum(np.maximum(A - np.e, 0) ** 2)


def foreign(array):
    return np.asarray(array).astype(np.asarray(array).dtype.newbyteorder())


# byte order


def test_solve_reads_foreign_bytes():
    for data in (A, foreign(A)):  # the second call takes the compiled function's fast path
        x, info = jb.solve(RIDGE, 1.0, data, tol=1e-9)
        np.testing.assert_allclose(x, A / 2, atol=1e-8)
    x, _ = jb.solve(RIDGE, foreign(1.0), A, foreign(np.ones(4)), tol=1e-9)
    np.testing.assert_allclose(x, A / 2, atol=1e-8)


@pytest.mark.parametrize(
    "solution",
    [jb.implicit.argmin(RIDGE), jb.piggyback.saddle_point(SADDLE), jb.nonsmooth.argmin(LASSO)],
    ids=["implicit", "piggyback", "nonsmooth"],
)
def test_solutions_read_foreign_bytes(solution):
    first, second = (jb.image_of(solution(1.0, data, tol=1e-9)) for data in (A, foreign(A)))
    np.testing.assert_array_equal(first, second)
    assert float(jnp.linalg.norm(first)) > 1


@every_oracle
def test_oracles_read_foreign_bytes(oracle):
    results = [oracle(1.0, batch, oracle.init(1.0, batch), tol=1e-9) for batch in (A[None], foreign(A[None]))]
    results += [oracle(foreign(1.0), A[None], tol=1e-9, sample_weight=foreign(np.ones(1)))]
    for hg in results:
        assert float(hg.value) == pytest.approx(exact_value(oracle), rel=1e-6)
        assert float(hg.grad) == pytest.approx(float(results[0].grad), rel=1e-12)
    assert float(oracle.value(1.0, foreign(A[None]), tol=1e-9).value) == pytest.approx(exact_value(oracle), rel=1e-6)


@pytest.mark.parametrize("make", [jb.MAID, jb.HOAG, jb.NBA, lambda o: jb.FirstOrder(o, optax.sgd(0.1))])
def test_methods_read_foreign_bytes(make):
    method = make(ORACLES["explicit"])
    stepped = []
    for batch in (A[None], foreign(A[None])):
        state, info = method.step(method.init(np.asarray(1.0), batch), batch)
        stepped.append((float(state.params), float(info.value)))
    assert stepped[0] == stepped[1] and stepped[0][1] == pytest.approx(7.5)
    fits = [jb.fit(method, foreign(1.0), batch, steps=1).params for batch in (A[None], foreign(A[None]))]
    assert fits[0] == fits[1] == stepped[0][0]


# what is no array


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (A.reshape(2, 2).tolist(), "is a list of lists, which JAX takes for a tree of scalars; make it np.asarray"),
        (np.ma.masked_array(A, [0, 1, 0, 0]), "is a masked array, whose mask would be lost; fill it"),
        (A.astype(np.longdouble), "has dtype float128, which JAX does not have"),
        (np.zeros(2, [("a", "f4")]), "which JAX does not have"),
        (np.array(["a"]), "is a ndarray, not numbers"),
    ],
)
def test_data_that_is_no_array_is_named(data, sentence):
    for call in (
        lambda: jb.solve(RIDGE, 1.0, data),
        lambda: jb.implicit.argmin(RIDGE)(1.0, data),
        lambda: ORACLES["implicit"](1.0, {"y": data}),
        lambda: jb.fit(jb.FirstOrder(ORACLES["explicit"], optax.sgd(0.1)), 1.0, {"y": data}, steps=1),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()


def test_lists_of_numbers_are_named():
    with pytest.raises(TypeError, match="lists of numbers arrays"):
        jb.solve(
            jb.SmoothProblem(lambda p, x, d: energy(p, x, d["y"]), lambda p, d: jnp.zeros(2)), 1.0, {"y": [1.0, 2.0]}
        )
    with pytest.raises(ValueError, match=r"batch\['y'\]\[0\] .* lists of numbers arrays"):
        ORACLES["implicit"](1.0, {"y": [1.0, 2.0]})


def test_an_equinox_module_gets_the_right_hint():
    equinox = pytest.importorskip("equinox")
    module = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    with pytest.raises(TypeError, match="equinox.is_inexact_array"):
        ORACLES["implicit"](module, A[None])


# units


@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e-8, 1e-12, 1e6])
def test_default_tolerances_do_not_depend_on_units(unit):
    x_hat = jb.implicit.argmin(RIDGE)
    of_data = jax.grad(lambda p: jnp.sum(x_hat(p, unit * A)))(1.0) / unit
    of_loss = jax.grad(lambda p: unit * jnp.sum(x_hat(p, A)))(1.0) / unit
    assert float(of_data) == pytest.approx(-2.5, rel=1e-4)
    assert float(of_loss) == pytest.approx(-2.5, rel=1e-4)
    of_weights = jb.nonsmooth.argmin(LASSO)
    found = jax.grad(lambda p: jnp.sum(of_weights(p, unit * A)))(np.log(unit)) / unit
    assert float(found) == pytest.approx(-3.0, rel=1e-4)
    hg = ORACLES["implicit"](1.0, unit * A[None])
    assert float(hg.value) / unit**2 == pytest.approx(7.5, rel=1e-4)
    assert float(hg.grad) / unit**2 == pytest.approx(-7.5, rel=1e-4)


def test_a_small_cotangent_is_solved_for_though_tol_is_larger():
    x_hat = jb.implicit.argmin(RIDGE)
    gradient = jax.grad(lambda p: 1e-8 * jnp.sum(x_hat(p, A, tol=1e-6)))(1.0)
    assert float(gradient) == pytest.approx(-2.5e-8, rel=2e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jb.solve(RIDGE, 1.0, 1e-8 * A, tol=1e-6),
        lambda: jb.implicit.argmin(RIDGE)(1.0, 1e-8 * A, tol=1e-6),
        lambda: ORACLES["implicit"](1.0, 1e-8 * A[None], tol=1e-6),
        lambda: ORACLES["piggyback"].value(1.0, 1e-8 * A[None], tol=1e-6),
    ],
)
def test_a_tolerance_larger_than_the_problem_is_said(call):
    with pytest.warns(UserWarning, match="`tol`=1.0e-06 is larger than what there is to solve"):
        call()


def test_a_gradient_that_was_not_solved_for_is_said():
    x_hat = jb.implicit.argmin(RIDGE)
    with pytest.warns(UserWarning, match="`adjoint_tol`=1.0e-06 is larger than what there is to solve"):
        jax.grad(lambda p: 1e-8 * jnp.sum(x_hat(p, A, tol=1e-6, adjoint_tol=1e-6)))(1.0)


# dtypes and settings of JAX


@every_oracle
def test_a_float32_warm_start_does_not_pull_down_a_float64_batch(oracle):
    cold = oracle.init(1.0, A[None])
    warm = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cold)
    expected, found = (oracle(1.0, A[None], w, tol=1e-9) for w in (cold, warm))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(found.warm))
    assert float(found.grad) == pytest.approx(float(expected.grad), rel=1e-12)


@pytest.mark.parametrize("setting", ["strict", "debug_infs"])
def test_settings_of_jax_that_a_user_may_have(setting):
    context = jax.numpy_dtype_promotion("strict") if setting == "strict" else jax.debug_infs(True)
    single = jnp.asarray(A, jnp.float32), jnp.asarray(1.0, jnp.float32)
    with context:
        x, info = jb.solve(RIDGE, single[1], single[0])
        gradient = jax.grad(lambda p: jnp.sum(jb.implicit.argmin(RIDGE)(p, single[0])))(single[1])
        curvature = jax.grad(jax.grad(lambda p: jnp.sum(jb.implicit.argmin(RIDGE)(p, single[0]))))(single[1])
        for kind in ("implicit", "piggyback", "explicit"):
            assert np.isfinite(ORACLES[kind](single[1], single[0][None], tol=1e-3).grad)
        result = jb.fit(jb.MAID(ORACLES["explicit"]), single[1], single[0][None], steps=2)
    assert jb.check(info) is None and float(gradient) == pytest.approx(-2.5, rel=1e-4)
    assert float(curvature) == pytest.approx(2.5, rel=1e-3) and result.steps == 2


def closed_over(what, value):
    """A call that closes over ``value`` in one of the user's functions."""
    functions = {"energy": energy, "init": start, "strong_convexity": lambda p, d: 1.0, "loss": loss}
    plain = functions[what]
    functions[what] = lambda *arguments: value * plain(*arguments)
    problem = jb.SmoothProblem(functions["energy"], functions["init"], strong_convexity=functions["strong_convexity"])
    return jnp.sum(jb.implicit.Oracle(problem, functions["loss"])(1.0, A[None]).value)


@pytest.mark.parametrize("what", ["energy", "init", "strong_convexity", "loss"])
@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
def test_a_traced_value_in_a_closure_is_named(what, transform):
    with pytest.raises(TypeError, match=f"{what}.* closes over a traced value of shape"):
        transform(lambda value: closed_over(what, value))(1.0)


@pytest.mark.parametrize("name", ["mu_primal", "mu_dual", "norm", "prox_dual", "scaling"])
def test_a_traced_value_in_a_closure_of_a_saddle_problem_is_named(name):
    options = {"mu_primal": lambda p, d: 1.0, "mu_dual": lambda p, d: 1.0, "norm": lambda p, d: 1.0}
    functions = {
        "prox_dual": lambda p, v, step, d: jb.prox.squared_distance(v, step, jnp.zeros_like(v)),
        "scaling": lambda p, d: (1.0, 1.0),
    }

    def call(value):
        given = options | functions
        plain = given[name]
        given[name] = lambda *arguments: jax.tree.map(lambda leaf: value * leaf, plain(*arguments))
        prox_dual = given.pop("prox_dual")
        problem = jb.SaddleProblem(SADDLE.linear, SADDLE.prox_primal, prox_dual, SADDLE.init, **given)
        return jnp.sum(jb.solve(problem, 1.0, A)[0][0])

    with pytest.raises(TypeError, match=f"`{name}` closes over a traced value"):
        jax.jit(call)(1.0)


def test_forward_mode_says_what_to_do_instead():
    x_hat = jb.implicit.argmin(RIDGE)
    with pytest.raises(TypeError, match="reverse mode: use jax.grad, jax.jacrev or jax.vjp"):
        jax.jacfwd(lambda p: x_hat(p, A))(1.0)
    np.testing.assert_allclose(jax.jacrev(lambda p: x_hat(p, A))(1.0), -A / 4, rtol=1e-4)


# weights

PAIR = np.stack([A, 2 * A])


@every_oracle
def test_weights_whose_sum_overflows(oracle):
    plain = oracle(1.0, PAIR, tol=1e-9)
    for weight in (np.full(2, 1e308), np.full(2, 2e38, np.float32), np.full(2, 1e-300), np.array([7, 7])):
        hg = oracle(1.0, PAIR, tol=1e-9, sample_weight=weight)
        traced = jax.jit(lambda w: oracle(1.0, PAIR, tol=1e-9, sample_weight=w))(weight)  # noqa: B023
        for found in (hg, traced):
            assert float(found.value) == pytest.approx(float(plain.value), rel=1e-12)
            assert float(found.grad) == pytest.approx(float(plain.grad), rel=1e-12)


@pytest.mark.parametrize("weight", [[0.0, 0.0], [1.0, np.inf], [1.0, np.nan], [1.0, -1.0]])
def test_weights_that_say_nothing(weight):
    with pytest.raises(ValueError, match="`sample_weight`"):
        ORACLES["implicit"](1.0, PAIR, sample_weight=weight)
    found = jax.jit(lambda w: ORACLES["implicit"](1.0, PAIR, tol=1e-6, sample_weight=w))(jnp.asarray(weight))
    assert np.isnan(found.value) and np.isnan(found.grad)
    np.testing.assert_array_equal(found.lower.status, Status.NONFINITE)
    with pytest.raises(jb.ConvergenceError):
        jb.check(found)


@every_oracle
def test_weights_in_the_batch_and_padding(oracle):
    inside = {"explicit": jb.explicit.Oracle(lambda p, d: ORACLES["explicit"].loss(p, d["y"]))}
    kind = next(name for name, known in ORACLES.items() if known is oracle)
    named = inside[kind] if kind in inside else _on_mapping(oracle)
    batch = {"y": np.stack([A, 2 * A, np.full(4, np.nan)]), "sample_weight": np.array([1.0, 3.0, 0.0])}
    expected = oracle(1.0, PAIR, tol=1e-9, sample_weight=np.array([1.0, 3.0]))
    for found in (named(1.0, batch, tol=1e-9), jax.jit(lambda b: named(1.0, b, tol=1e-9))(batch)):
        assert float(found.value) == pytest.approx(float(expected.value), rel=1e-12)
        assert float(found.grad) == pytest.approx(float(expected.grad), rel=1e-12)
        assert np.all(found.lower.status <= Status.PRECISION)
    if kind not in ("unroll", "explicit"):  # these do the same work whatever is asked
        assert found.lower.steps[2] == 0
    with pytest.raises(ValueError, match="weights are given twice"):
        named(1.0, batch, sample_weight=np.ones(3))


def test_padding_has_no_say_in_default_tolerances():
    oracle, padded = ORACLES["implicit"], np.concatenate([PAIR, 1e6 * PAIR[:1]])
    alone, weighted = oracle.scales(1.0, PAIR), oracle.scales(1.0, padded, np.array([1.0, 3.0, 0.0]))
    np.testing.assert_allclose(weighted, alone, rtol=1e-12)
    assert oracle.scales(1.0, padded).solution > 1e5 * alone.solution


def _on_mapping(oracle):
    """The oracle for data under "y"."""
    from dataclasses import replace

    problem = oracle.problem
    reads = {
        "energy": lambda f: lambda p, x, d: f(p, x, d["y"]),
        "init": lambda f: lambda p, d: f(p, d["y"]),
        "smooth": lambda f: lambda p, x, d: f(p, x, d["y"]),
        "linear": lambda f: lambda p, x, d: f(p, x, d["y"]),
        "prox_primal": lambda f: lambda p, v, step, d: f(p, v, step, d["y"]),
        "prox_dual": lambda f: lambda p, v, step, d: f(p, v, step, d["y"]),
    }
    changed = {name: wrap(vars(problem)[name]) for name, wrap in reads.items() if name in vars(problem)}
    return replace(oracle, problem=replace(problem, **changed))


# warm starts that are not finite


@pytest.mark.parametrize("kind", [k for k in ORACLES if k != "explicit"])
def test_a_sample_that_failed_once_comes_back(kind):
    from dataclasses import replace

    oracle = replace(ORACLES[kind], on_failure="drop")
    bad = np.stack([A, np.full(4, np.nan)])
    first = oracle(1.0, bad, tol=1e-6)
    assert first.lower.status[1] == Status.NONFINITE
    again, cold = oracle(1.0, PAIR, first.warm, tol=1e-6), oracle(1.0, PAIR, tol=1e-6)
    assert np.all(again.lower.status <= Status.PRECISION)
    assert float(again.grad) == pytest.approx(float(cold.grad), rel=1e-5)


def test_a_start_that_is_not_finite_is_replaced():
    x, info = jb.solve(RIDGE, 1.0, A, np.full(4, np.nan), tol=1e-9)
    np.testing.assert_allclose(x, A / 2, atol=1e-8)


# functions made anew


def test_a_function_made_anew_at_every_step_is_named():
    with pytest.warns(
        UserWarning, match=r"`.*made_anew.*` \(line \d+ of .*\) was made anew and compiled 5 times"
    ) as seen:
        for k in range(8):

            def made_anew(p, x, d, k=k):
                return energy(p, x, d) + k

            jb.solve(jb.SmoothProblem(made_anew, start, strong_convexity=1.0), 1.0, A, tol=1e-3)
    assert len(seen) == 1


def test_equal_lines_of_several_files_are_not_one_function():
    kept = []
    for k in range(8):
        scope = {}
        exec(compile("def energy(x): return x", f"file{k}.py", "exec"), scope)
        kept.append(scope["energy"])
        note_compilation(scope["energy"])  # a warning would be an error
    assert len({function.__code__ for function in kept}) == 1


def test_a_dataclass_with_slots_in_an_oracle():
    """Those have no ``__dict__`` to look for functions in."""

    @dataclass(frozen=True, slots=True)
    class Slotted:
        target: float = 1.0

        def __call__(self, p, d):
            return 0.5 * (p * d - self.target) ** 2

    assert float(jb.explicit.Oracle(Slotted())(1.0, A).value) == pytest.approx(0.5 * np.mean((A - 1.0) ** 2))
