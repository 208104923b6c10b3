"""Bad input ends in a typed error, or a status, whose sentence says what to do; never in a silently wrong gradient.

Covered elsewhere: statuses of `solve` (test_solvers.py), of `cg` and `minres` (test_linear_solvers.py); a NaN image,
step limits and float32 at the implicit oracle (test_oracle.py), a NaN image at every oracle (test_oracle_matrix.py), at
MAID, and MAID in float32 (test_maid.py); images of different shapes (test_variational.py, test_losses.py); what the
loop itself refuses (test_fit.py).
"""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems_for_tests import DIAGONAL, QUADRATIC, distance, image_loss, measured, quadratic_energy, relative

import jbilevel as jb
from jbilevel import FitStatus, Status
from jbilevel._oracle.base import FAILURES

AGD = jb.solvers.AGD()  # compiles fastest
STAY = jb.solvers.External(lambda energy, x0, tol, max_steps: x0)
# starts at the image, so that its NaN also enters x
PROBLEM = replace(QUADRATIC.problem, init=measured)
PARAMS = jnp.asarray(0.3)
BATCH = QUADRATIC.batch(3, 64)
SAMPLE = jax.tree.map(lambda leaf: leaf[0], BATCH)
BAD = 41
GOOD = np.arange(64) != BAD
LIMIT = 200  # steps; what converges here takes less than a hundred

ORACLES = {
    "implicit": partial(jb.implicit.Oracle, PROBLEM, image_loss, solver=AGD, estimate=False),
    "one-step": partial(jb.unroll.OneStep, PROBLEM, image_loss, solver=AGD, estimate=False),
    "unroll": partial(jb.unroll.Oracle, PROBLEM, image_loss, steps=30),
    "explicit": partial(jb.explicit.Oracle, QUADRATIC.exact),
}
METHODS = {
    "MAID": jb.MAID,
    "HOAG": jb.HOAG,
    "FirstOrder": lambda oracle, **options: jb.FirstOrder(oracle, optax.sgd(0.1), **options),
}
EACH = pytest.mark.parametrize("name", ORACLES)
EACH_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@cache
def make(name, **options):
    return ORACLES[name](chunk=None, **options)


def spoiled(leaf):
    return BATCH | {leaf: BATCH[leaf].at[BAD, 2].set(jnp.nan)}


@cache
def of_the_others(name):
    """(value, gradient) of the mean over the 63 good samples, from closed forms."""
    others = jax.tree.map(lambda leaf: np.asarray(leaf)[GOOD], BATCH)
    weight = float(jnp.exp(PARAMS)) * DIAGONAL[None, :]
    x = others["y"] / (1 + weight)
    slope = x - others["x"]
    q = slope / (1 + np.max(weight) if name == "one-step" else 1 + weight)
    return 0.5 * np.sum(slope**2) / 63, -np.sum(weight * x * q) / 63


def assert_mean_of_the_others(name, hg):
    value, gradient = of_the_others(name)
    assert float(hg.value) == pytest.approx(value, rel=1e-7)
    assert float(hg.grad) == pytest.approx(gradient, rel=1e-7)
    np.testing.assert_array_equal(np.isnan(hg.values), ~GOOD)


def with_a_bad_one(name, leaf, on_failure):
    return make(name, on_failure=on_failure)(PARAMS, spoiled(leaf), tol=1e-9, sample_weight=np.ones(64))


# ---- NaN -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["implicit", "one-step", "unroll", "explicit"])
def test_nan_that_only_the_loss_sees(name):
    """NaN in the clean image: the lower level is solved as ever."""
    hg = with_a_bad_one(name, "x", "drop")
    np.testing.assert_array_equal(np.maximum(hg.lower.status, hg.adjoint.status) == Status.NONFINITE, ~GOOD)
    assert_mean_of_the_others(name, hg)
    with pytest.raises(jb.ConvergenceError, match="NONFINITE.*check the data and the parameters of this sample"):
        jb.check(hg)


def test_nan_that_only_the_loss_sees_makes_the_mean_nan():
    hg = with_a_bad_one("implicit", "x", "nan")
    assert np.isnan(hg.value) and np.isnan(hg.grad) and np.isposinf(hg.error) and not hg.certified
    np.testing.assert_array_equal(np.isnan(hg.values), ~GOOD)


@pytest.mark.parametrize("name", ORACLES)
def test_value_with_nan_that_only_the_loss_sees(name):
    v = make(name, on_failure="drop").value(PARAMS, spoiled("x"), tol=1e-9, sample_weight=np.ones(64))
    np.testing.assert_array_equal(np.isnan(v.values), ~GOOD)
    np.testing.assert_array_equal(v.lower.status == Status.NONFINITE, ~GOOD)
    assert float(v.value) == pytest.approx(of_the_others(name)[0], rel=1e-7)


WEIGHTED = [(name, leaf) for name in ("implicit", "unroll", "explicit") for leaf in "xy"]


@pytest.mark.parametrize("name, leaf", WEIGHTED)
def test_a_sample_of_weight_0_is_not_in_the_mean(name, leaf):
    for on_failure in FAILURES:
        oracle = make(name, on_failure=on_failure)
        assert_mean_of_the_others(name, oracle(PARAMS, spoiled(leaf), tol=1e-9, sample_weight=1.0 * GOOD))


def test_argmin_names_nan_and_harms_no_other_sample():
    bad = jax.tree.map(lambda leaf: leaf[BAD - 1 : BAD + 2], spoiled("y"))
    alone = jax.tree.map(lambda leaf: leaf[1], bad)
    raising = jb.implicit.argmin(PROBLEM, solver=AGD)
    for function in (raising, jax.grad(lambda p, data: jnp.sum(raising(p, data)))):
        with pytest.raises(jb.ConvergenceError, match="lower-level solve ended NONFINITE.*check the data"):
            function(PARAMS, alone)
    with pytest.raises(jb.ConvergenceError, match=r"of sample 1 \(1 of 3 samples failed\) ended NONFINITE"):
        jax.vmap(raising, (None, 0))(PARAMS, bad)
    told = jb.implicit.argmin(PROBLEM, solver=AGD, with_info=True)
    x, info = jax.jit(jax.vmap(told, (None, 0)))(PARAMS, bad)
    assert [bool(jnp.all(jnp.isfinite(row))) for row in x] == [True, False, True]
    assert info.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]

    marking = jb.implicit.argmin(PROBLEM, solver=AGD, on_failure="nan")
    gradient = jax.grad(lambda p, data: jnp.sum(marking(p, data) ** 2))
    gradients = jax.jit(jax.vmap(gradient, (None, 0)))(PARAMS, bad)
    gain = 1 + jnp.exp(PARAMS) * DIAGONAL
    exact = jnp.sum(-2 * bad["y"] ** 2 * ((gain - 1) / gain**3)[None, :], axis=1)
    np.testing.assert_allclose(gradients, exact, rtol=1e-5)  # NaN where the image is


@EACH_METHOD
def test_methods_end_on_nan_and_the_loop_keeps_the_parameters(method):
    result = jb.fit(method(make("explicit")), PARAMS, spoiled("y"), steps=3)
    assert result.status == FitStatus.FAILED
    assert "NONFINITE" in result.message and "check the data and the parameters" in result.message
    assert result.params == PARAMS and result.steps == 0


def test_automatic_tolerances_leave_out_a_dropped_sample():
    oracle = make("implicit", solver=STAY, on_failure="drop")
    state = jb.FirstOrder(oracle, optax.sgd(0.1)).init(PARAMS, spoiled("y"))
    gradients = jnp.exp(PARAMS) * np.linalg.norm(DIAGONAL[None, :] * BATCH["y"][GOOD], axis=1)  # at x0 = y
    assert float(state.tol) == pytest.approx(1e-3 * np.mean(gradients) / float(1 + 0.1 * jnp.exp(PARAMS)))


# ---- shapes ----------------------------------------------------------------------------------------------------------


FEWER = {"y": BATCH["y"], "x": BATCH["x"][:4]}
VECTOR = jb.SmoothProblem(lambda p, x, data: (x - data["y"]) ** 2, measured)
SHAPES = {
    "samples": (lambda name: make(name)(PARAMS, FEWER), r"disagree on the number of samples.*batch\['x'\]'?\"?: 4"),
    "none": (lambda name: make(name)(PARAMS, jax.tree.map(lambda v: v[:0], BATCH)), "no samples"),
    "axis": (lambda name: make(name)(PARAMS, SAMPLE | {"y": 1.0}), r"batch\['y'\].*no sample axis 0; set in_axes=None"),
    "axes": (lambda name: make(name, in_axes=(0, None))(PARAMS, BATCH), "`in_axes`.*not a prefix"),
    "weights": (lambda name: make(name)(PARAMS, BATCH, sample_weight=np.ones(63)), r"`sample_weight`.*shape \(64,\)"),
    "negative weights": (lambda name: make(name)(PARAMS, BATCH, sample_weight=-np.ones(64)), "`sample_weight`.*nonneg"),
}


@pytest.mark.parametrize("what", SHAPES)
@EACH
def test_oracles_name_the_mismatch(name, what):
    call, sentence = SHAPES[what]
    with pytest.raises(ValueError, match=sentence):
        call(name)


@pytest.mark.parametrize("name", ["implicit", "one-step", "unroll"])
def test_warm_start_of_another_batch(name):
    oracle = make(name)
    other = oracle.init(PARAMS, jax.tree.map(lambda v: v[:4], BATCH))
    with pytest.raises(ValueError, match=r"warm.x has shape \(4, 6\).*64 samples"):
        oracle(PARAMS, BATCH, other)
    with pytest.raises(TypeError, match="`warm` must come from init"):
        oracle(PARAMS, BATCH, other.x)


@EACH_METHOD
def test_methods_refuse_the_batch_of_another_state(method):
    method = method(make("implicit"), tol=1.0, adjoint_tol=1.0)
    with pytest.raises(ValueError, match="disagree on the number of samples"):
        method.init(PARAMS, FEWER)
    with pytest.raises(ValueError, match="a warm start belongs to the samples it came from"):
        method.step(method.init(PARAMS, BATCH), jax.tree.map(lambda v: v[:4], BATCH))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: jb.implicit.argmin(PROBLEM)(PARAMS, SAMPLE, jnp.zeros(3)), r"x0 has shape \(3,\).*\(6,\)"),
        (lambda: jb.solve(PROBLEM, PARAMS, SAMPLE, {"u": jnp.zeros(6)}), "x0 has structure"),
        (lambda: jb.implicit.argmin(VECTOR)(PARAMS, SAMPLE), "energy must return a scalar.*sum over pixels"),
        (lambda: jb.implicit.Oracle(VECTOR, image_loss)(PARAMS, BATCH), "energy must return a scalar.*in_axes"),
        (lambda: jb.implicit.Oracle(PROBLEM, lambda p, x, d: x)(PARAMS, BATCH), "loss must return a scalar"),
        (lambda: jb.unroll.Oracle(PROBLEM, lambda p, x, d: x)(PARAMS, BATCH), "loss must return a scalar"),
        (lambda: jb.explicit.Oracle(lambda p, d: d["y"])(PARAMS, BATCH), "loss must return a scalar"),
    ],
)
def test_shapes_of_starts_energies_and_losses(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@EACH
def test_leaves_of_one_sample_that_do_not_fit_each_other(name):
    with pytest.raises((TypeError, ValueError), match="loss.*'x'"):
        make(name)(PARAMS, {"y": BATCH["y"], "x": BATCH["x"][:, :4]})


# ---- leaves that are no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        *(lambda p, d, name=name: make(name)(p, d) for name in ORACLES),
        lambda p, d: make("unroll").value(p, d),
        lambda p, d: make("implicit").init(p, d),
        lambda p, d: jb.solve(PROBLEM, p, d),
        lambda p, d: jb.implicit.argmin(PROBLEM)(p, d),
        lambda p, d: jax.grad(lambda w: jnp.sum(jb.implicit.argmin(PROBLEM)(p | {"w": w}, d)))(1.0),
        *(lambda p, d, m=m: m(make("implicit"), tol=1.0, adjoint_tol=1.0).init(p, d) for m in METHODS.values()),
    ],
)
def test_a_leaf_that_is_a_function(call):
    with pytest.raises(TypeError, match=r"params\['f'\] is a function, not numbers; .*jb.partition"):
        call({"w": PARAMS, "f": lambda x: x}, BATCH)


@EACH
def test_parameters_without_a_gradient_and_data_that_are_no_numbers(name):
    with pytest.raises(TypeError, match=r"params\['k'\] has dtype int64, which has no gradient; move it into the data"):
        make(name)({"k": 3}, BATCH)
    with pytest.raises(TypeError, match=r"batch\['f'\] is a str, not numbers; .*outside"):
        make(name)(PARAMS, BATCH | {"f": "camera"})


# ---- closed-over tracers ---------------------------------------------------------------------------------------------


def by_vjp(a, x):
    square = jax.custom_vjp(lambda x: a * jnp.sum(x**2))
    square.defvjp(lambda x: (square(x), x), lambda x, g: (2 * g * a * x,))
    return square(x)


HIDDEN = {
    "plain": lambda a, x: a * jnp.sum(x**2),
    "jit": lambda a, x: jax.jit(lambda x: a * jnp.sum(x**2))(x),
    "scan": lambda a, x: jax.lax.scan(lambda total, v: (total + a * v**2, None), 0.0, x)[0],
    "checkpoint": lambda a, x: jax.checkpoint(lambda x: a * jnp.sum(x**2))(x),
    "custom_vjp": by_vjp,
}
USES = {
    "argmin": lambda problem: jnp.sum(jb.implicit.argmin(problem)(PARAMS, SAMPLE)),
    "solve": lambda problem: jnp.sum(jb.solve(problem, PARAMS, SAMPLE)[0]),
    "implicit": lambda problem: jb.implicit.Oracle(problem, image_loss)(PARAMS, BATCH).value,
    "value": lambda problem: jb.implicit.Oracle(problem, image_loss).value(PARAMS, BATCH).value,
    "one-step": lambda problem: jb.unroll.OneStep(problem, image_loss, step=0.1)(PARAMS, BATCH).value,
    "unroll": lambda problem: jb.unroll.Oracle(problem, image_loss)(PARAMS, BATCH).value,
}


def closing_over(a, hidden):
    return jb.SmoothProblem(lambda p, x, data: quadratic_energy(p, x, data) + hidden(a, x), measured)


@pytest.mark.parametrize("use, way", [("argmin", way) for way in HIDDEN] + [(use, "plain") for use in list(USES)[1:]])
def test_a_tracer_closed_over_in_the_energy(use, way):
    def function(a):
        return USES[use](closing_over(a, HIDDEN[way]))

    for transformed in (jax.grad(function), jax.jit(function), lambda a: jax.vmap(function)(jnp.array([a, a]))):
        with pytest.raises(TypeError, match="energy closes over a traced value.*pass it through `params` or `data`"):
            transformed(0.5)


# ---- tolerances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1.0, np.nan, "small"])
@pytest.mark.parametrize("which", ["tol", "adjoint_tol"])
def test_tolerances_that_are_none(which, bad):
    calls = [partial(jb.implicit.argmin(PROBLEM), PARAMS, SAMPLE), *(partial(make(n), PARAMS, BATCH) for n in ORACLES)]
    if which == "tol":
        calls.append(partial(jb.solve, PROBLEM, PARAMS, SAMPLE))
        calls += [partial(make(name).value, PARAMS, BATCH) for name in ORACLES]
    for call in calls:
        with pytest.raises(ValueError, match=f"^`{which}` must be a nonnegative number, got {bad!r}"):
            call(**{which: bad})


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize("which", ["tol", "adjoint_tol"])
@EACH_METHOD
def test_methods_refuse_tolerances_that_are_none(method, which, bad):
    with pytest.raises(ValueError, match=f"`{which}`.*nonnegative"):
        method(make("explicit"), **({"tol": 1.0, "adjoint_tol": 1.0} | {which: bad})).init(PARAMS, BATCH)


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def test_argmin_with_a_tolerance_beyond_single_precision():
    """Would raise MAX_STEPS if it did not end early."""
    minimiser = jb.implicit.argmin(PROBLEM, solver=AGD, max_steps=LIMIT, max_products=LIMIT)
    with pytest.warns(UserWarning, match="below the precision of float32.*PRECISION. Loosen it, or use float64"):
        gradient = jax.grad(lambda p: image_loss(p, minimiser(p, single(SAMPLE), tol=1e-12), single(SAMPLE)))(
            single(PARAMS)
        )
    assert relative(gradient, jax.grad(QUADRATIC.exact)(PARAMS, SAMPLE)) <= 1e-5


def test_accuracies_beyond_single_precision_in_a_method():
    oracle = jb.implicit.Oracle(PROBLEM, image_loss, solver=AGD, estimate=False, max_steps=LIMIT, max_products=LIMIT)
    with jax.enable_x64(False):
        result = jb.fit(jb.HOAG(oracle, "exact", tol=1.0, adjoint_tol=1.0), single(PARAMS), single(BATCH), steps=3)
    assert list(result.history["status"]) == [Status.PRECISION] * 3
    assert result.work < 3 * 64 * LIMIT
    assert result.history["value"][0] == pytest.approx(of_the_others("implicit")[0], rel=0.1)  # one sample more


# ---- step limits -----------------------------------------------------------------------------------------------------


def test_argmin_at_a_step_limit():
    """Neither a minimiser nor a gradient that is not one gets out."""
    short = jb.implicit.argmin(PROBLEM, solver=AGD, max_steps=1)
    with pytest.raises(jb.ConvergenceError, match="lower-level solve ended MAX_STEPS.*raise `max_steps`, loosen `tol`"):
        short(PARAMS, SAMPLE)
    inexact = jb.implicit.argmin(PROBLEM, solver=AGD, max_products=1)
    short = jax.grad(lambda p: jnp.sum(inexact(p, SAMPLE)))
    with pytest.raises(jb.ConvergenceError, match="adjoint solve ended MAX_STEPS.*raise `max_steps`, loosen `tol`"):
        short(PARAMS)
    with pytest.raises(jb.ConvergenceError, match="of sample 0 .3 of 3 samples failed. ended MAX_STEPS"):
        jax.vmap(short)(jnp.full((3,), PARAMS))
    assert jnp.isnan(jax.jit(short)(PARAMS))


FEW = jb.FirstOrder(jb.unroll.Oracle(PROBLEM, image_loss, steps=2), optax.sgd(0.1), tol=1e-6, adjoint_tol=1e-6)


def test_too_few_unrolled_steps_are_a_status_and_no_known_error():
    hg = FEW.oracle(PARAMS, BATCH, tol=1e-6)
    assert np.all(hg.lower.status == Status.MAX_STEPS) and np.isposinf(hg.error) and not hg.certified
    with pytest.raises(jb.ConvergenceError, match="64 of 64 samples failed.*MAX_STEPS"):
        jb.check(hg)


def test_step_limits_are_in_the_history():
    assert list(jb.fit(FEW, PARAMS, BATCH, steps=2).history["status"]) == [Status.MAX_STEPS] * 2


def test_step_limits_are_in_the_message():
    result = jb.fit(FEW, PARAMS, BATCH, steps=2)
    assert "MAX_STEPS" in result.message and "max_steps" in result.message


# ---- energies that are not convex ------------------------------------------------------------------------------------


def curved_energy(p, x, data):
    return 0.5 * jnp.sum(data["c"] * x**2) - p * jnp.sum(x * data["y"])


def curved_exact(p, data):
    return image_loss(p, p * data["y"] / data["c"], data)


# starts at its stationary point, which for a negative curvature is a saddle
CURVED = jb.SmoothProblem(curved_energy, lambda p, data: jax.lax.stop_gradient(p) * data["y"] / data["c"])
CURVATURE = jnp.tile(jnp.linspace(1, 2, 6), (64, 1))
ONE_SADDLE = BATCH | {"c": CURVATURE.at[BAD, 1].set(-0.5)}


def test_a_saddle_among_64_minima():
    """Its status and its value say so, and the mean is that of the others."""
    hg = jb.implicit.Oracle(CURVED, image_loss, solver=STAY, estimate=False, on_failure="drop")(
        PARAMS, ONE_SADDLE, tol=1e-6
    )
    np.testing.assert_array_equal(hg.adjoint.status == Status.INDEFINITE, ~GOOD)
    np.testing.assert_array_equal(np.isnan(hg.values), ~GOOD)
    with pytest.raises(jb.ConvergenceError, match=rf"adjoint solve of sample {BAD} .*INDEFINITE.*MINRES"):
        jb.check(hg)
    others = jax.tree.map(lambda leaf: leaf[GOOD], ONE_SADDLE)
    mean = lambda p: jnp.mean(jax.vmap(curved_exact, (None, 0))(p, others))  # noqa: E731
    assert float(hg.value) == pytest.approx(float(mean(PARAMS)), rel=1e-12)
    assert float(hg.grad) == pytest.approx(float(jax.grad(mean)(PARAMS)), rel=1e-12)


def test_argmin_at_a_saddle():
    minimiser, data = jb.implicit.argmin(CURVED, solver=STAY), jax.tree.map(lambda leaf: leaf[BAD], ONE_SADDLE)
    with pytest.raises(jb.ConvergenceError, match="adjoint solve ended INDEFINITE.*MINRES"):
        jax.grad(lambda p: image_loss(p, minimiser(p, data), data))(PARAMS)


def test_one_step_at_a_saddle_does_not_underestimate_its_error():
    saddle = jax.tree.map(lambda leaf: leaf[:1], BATCH | {"c": CURVATURE.at[0, 1].set(-0.5)})
    hg = jb.unroll.OneStep(CURVED, image_loss, solver=STAY, step=0.1)(PARAMS, saddle, tol=1e-6)
    exact = jax.grad(lambda p: curved_exact(p, jax.tree.map(lambda leaf: leaf[0], saddle)))(PARAMS)
    assert hg.status >= Status.INDEFINITE or distance(hg.grad, exact) <= 3 * float(hg.error)


@pytest.mark.parametrize(
    "solver",
    [
        jb.solvers.NewtonCG(),
        AGD,
        jb.solvers.NonmonotoneAPG(),
    ],
)
def test_an_energy_without_a_minimum(solver):
    falling = jb.SmoothProblem(lambda p, x, data: jnp.sum(x), lambda p, data: data)
    _, info = jb.solve(falling, (), jnp.ones(3), solver=solver)
    with pytest.raises(jb.ConvergenceError):
        jb.check(info)


# ---- derivatives of what carries none --------------------------------------------------------------------------------


def refused(derivative, expected):
    """Either the derivative is right, or it is refused with an error that says what to use."""
    try:
        found = derivative()
    except (TypeError, ValueError) as error:
        assert any(word in str(error) for word in ("argmin", "grad", "Reverse-mode"))
        return
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@cache
def exact_derivatives():
    few = jax.tree.map(lambda leaf: leaf[:2], BATCH)
    mean = lambda p: jnp.mean(jax.vmap(QUADRATIC.exact, (None, 0))(p, few))  # noqa: E731
    return few, jax.grad(mean)(PARAMS), jax.grad(jax.grad(mean))(PARAMS)


STOPPED = "its value is behind stop_gradient: derivative 0"


@pytest.mark.parametrize("name", ["unroll", "explicit"])
def test_gradient_of_the_value_of_an_oracle(name):
    few, first, _ = exact_derivatives()
    refused(lambda: jax.grad(lambda p: make(name).value(p, few, tol=1e-9).value)(PARAMS), first)


@pytest.mark.parametrize("name", ["implicit", "unroll", "explicit"])
def test_derivative_of_a_hypergradient(name):
    few, _, second = exact_derivatives()
    refused(lambda: jax.jacfwd(lambda p: make(name)(p, few, tol=1e-9).grad)(PARAMS), second)


def test_forward_derivative_of_a_warm_solve():
    x, _ = jb.solve(PROBLEM, PARAMS, SAMPLE, tol=1e-10, solver=AGD)
    warm = lambda p: jb.solve(PROBLEM, p, SAMPLE, x, tol=1e-6, solver=AGD)[0]  # noqa: E731
    gain = 1 + jnp.exp(PARAMS) * DIAGONAL
    refused(lambda: jax.jvp(warm, (PARAMS,), (1.0,))[1], -SAMPLE["y"] * (gain - 1) / gain**2)
