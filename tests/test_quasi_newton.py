"""Quasi-Newton descent with probed accuracies: its parts against closed forms, and what the whole must not do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import compilations

import jbilevel as jb
from jbilevel._method import excursion, lbfgs, probing
from jbilevel._method.point import Point, agreement

RNG = np.random.default_rng(0)


def quadratic(condition, n=6):
    q = np.linalg.qr(RNG.standard_normal((n, n)))[0]
    hessian = q @ np.diag(np.geomspace(1, condition, n)) @ q.T
    return hessian, jb.explicit.Oracle(lambda p, d: 0.5 * p @ hessian @ p)


# ---------------------------------------------------------------------------------------------------------- L-BFGS


def test_the_direction_is_that_of_dense_bfgs():
    n, pairs = 5, 4
    hessian = quadratic(30.0, n)[0]
    memory, inverse = lbfgs.empty(jnp.zeros(n), pairs), None
    gradient = jnp.asarray(RNG.standard_normal(n))
    memory = lbfgs.saw(memory, gradient)
    diagonal = 1 / (np.abs(gradient) + 1e-3 * np.sqrt(np.mean(gradient**2)))
    taken = [(s, hessian @ s) for s in RNG.standard_normal((pairs, n))]
    for s, y in taken:
        memory = lbfgs.learn(memory, jnp.asarray(s), jnp.asarray(y), smooth=False)
    kept = [(np.asarray(memory.s[i]), np.asarray(memory.y[i])) for i in reversed(range(pairs))]
    s, y = kept[-1]
    inverse = (s @ y) / (y @ (diagonal * y)) * np.diag(diagonal)
    for s, y in kept:
        rho = 1 / (s @ y)
        left = np.eye(n) - rho * np.outer(s, y)
        inverse = left @ inverse @ left.T + rho * np.outer(s, s)
    np.testing.assert_allclose(lbfgs.direction(memory, gradient), -inverse @ gradient, rtol=1e-10)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("curvature", [-1.0, 0.0, 0.01])
def test_a_pair_without_curvature_is_damped_so_that_the_model_stays_convex(curvature, smooth):
    n = 3
    memory = lbfgs.saw(lbfgs.empty(jnp.zeros(n), 3), jnp.ones(n))
    memory = lbfgs.learn(memory, jnp.array([1.0, 0.0, 0.0]), jnp.array([2.0, 0.0, 0.0]), smooth)
    memory = lbfgs.learn(memory, jnp.array([0.0, 1.0, 0.0]), jnp.array([0.0, curvature, 0.0]), smooth)
    assert int(memory.count) == 2
    assert np.all(np.sum(memory.s * memory.y, axis=1)[:2] > 0)
    assert lbfgs.direction(memory, jnp.ones(n)) @ jnp.ones(n) < 0


def test_on_smooth_ground_a_flat_valley_is_believed():
    memory = lbfgs.saw(lbfgs.empty(jnp.zeros(2), 3), jnp.ones(2))
    steep = lbfgs.learn(memory, jnp.array([1.0, 0.0]), jnp.array([20.0, 0.0]), smooth=True)
    flat = jnp.array([0.0, 1.0])
    known, damped = (lbfgs.learn(steep, flat, flat, smooth) for smooth in (True, False))
    np.testing.assert_allclose(lbfgs.direction(known, flat), -flat, atol=1e-12)
    assert -0.3 < float(lbfgs.direction(damped, flat)[1]) < 0


def test_the_first_pair_has_to_be_convex_and_finite():
    memory = lbfgs.saw(lbfgs.empty(jnp.zeros(2), 3), jnp.ones(2))
    for y in (-jnp.ones(2), jnp.full(2, jnp.nan)):
        assert int(lbfgs.learn(memory, jnp.ones(2), y, smooth=True).count) == 0


def test_secants_span_half_of_the_longest_recent_step():
    trail = lbfgs.Trail.at(jnp.zeros(1), jnp.zeros(1))
    at, spans = 0.0, []
    for step in (1.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        at += step
        trail, s, y = trail.secant(jnp.array([at]), jnp.array([2 * at]), jnp.asarray(step))
        np.testing.assert_allclose(y, 2 * s)
        spans.append(float(s[0]))
    for span, longest in zip(spans, lbfgs.FORGET ** np.arange(7), strict=True):
        assert span >= 0.5 * longest - 1e-12 or span == pytest.approx(at)


# --------------------------------------------------------------------------------------------------------- probing


@pytest.mark.parametrize(
    "moved, attained, factor", [(0.9, 1.0, 1 / 3), (0.3, 1.0, 1.0), (0.1, 1.0, 3.0), (0.1, 0.01, 1.0)]
)
@pytest.mark.parametrize("kind", [probing.EPS, probing.DELTA])
def test_a_probe_tightens_what_moves_and_loosens_what_does_not(moved, attained, factor, kind):
    one = jnp.ones(())
    accuracy = probing.Accuracy.first(one, one)._replace(kind=jnp.asarray(kind))
    found = accuracy.judged(
        jnp.asarray(moved), jnp.asarray(0.1), jnp.asarray(attained), jnp.asarray(attained), taken=4, failing=False
    )
    expected = [factor, 1.0] if kind == probing.EPS else [1.0, factor]
    np.testing.assert_allclose([found.eps, found.delta], expected)
    assert int(found.turn) == 1 and int(found.next) > 4


def test_a_probe_refines_what_was_attained():
    accuracy = probing.Accuracy.first(jnp.asarray(1.0), jnp.asarray(1.0))
    np.testing.assert_allclose(accuracy.finer(jnp.asarray(0.03), jnp.asarray(5.0)), [0.01, 1 / 3])


def test_agreement_of_a_quadratic_is_exact():
    hessian, oracle = quadratic(10.0)

    def point(at):
        hg = oracle(at, jnp.zeros((1, 1)))
        return Point.of(hg, at, hg.grad, 1.0)

    a = jnp.asarray(RNG.standard_normal(6))
    ratio, mismatch = agreement(point(a), point(a - 0.01 * (hessian @ a)))
    assert 0 < float(ratio) < 1 and float(mismatch) < 1e-8
    assert float(agreement(point(a), point(a + hessian @ a))[0]) == pytest.approx(-10)


# ----------------------------------------------------------------------------------------------------- excursions


def test_smooth_ground_is_no_jam_and_a_kink_is_one():
    smooth = kink = excursion.Jam.none(jnp.zeros(()))
    for k in range(12):
        size = jnp.asarray(0.5**k)
        smooth = smooth.tried(k % 2 == 0, size, size)
        kink = kink.tried(k % 2 == 0, size, jnp.ones(()))
    assert not smooth.is_one(size, size) and kink.is_one(size, jnp.ones(()))
    never = excursion.Jam.none(jnp.zeros(())).tried(False, 1.0, 1.0)
    assert not never.is_one(jnp.asarray(1e-6), jnp.ones(()))


@pytest.mark.parametrize("seed", range(3))
def test_a_jagged_valley_is_left(seed):
    """|x| has kinks everywhere along a slope: descent jams, excursions go on; params never get worse."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((40, 8))

    def loss(p, d):
        return jnp.mean(jnp.abs(a @ p - 1.0)) + 0.01 * jnp.sum((p - 2.0) ** 2)

    oracle = jb.explicit.Oracle(loss)
    start = jnp.asarray(rng.standard_normal(8))
    values = []
    result = jb.fit(
        jb.QuasiNewton(oracle),
        start,
        jnp.zeros((1, 1)),
        steps=400,
        callback=lambda step, state, info: values.append(float(loss(state.params, None))),
    )
    best = jb.fit(jb.FirstOrder(oracle, __import__("optax").adam(0.03)), start, jnp.zeros((1, 1)), steps=3000)
    assert loss(result.params, None) < 1.02 * np.min(best.history["value"])


# ------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_an_ill_conditioned_quadratic_is_solved_or_stalls(condition):
    hessian, oracle = quadratic(condition)
    start = jnp.asarray(RNG.standard_normal(6))
    result = jb.fit(jb.QuasiNewton(oracle), start, jnp.zeros((1, 1)), steps=600)
    first = 0.5 * start @ hessian @ start
    assert 0.5 * result.params @ hessian @ result.params < 1e-4 * first
    if result.status == jb.FitStatus.CONVERGED:
        assert np.linalg.norm(hessian @ result.params) < 1e-4 * np.linalg.norm(hessian @ start)


def test_a_narrow_valley_of_condition_1e8_is_followed_to_its_end():
    oracle = jb.explicit.Oracle(lambda p, d: 0.5 * (1e8 * (p[0] - 1.0) ** 2 + (p[1] - 1.0) ** 2))
    result = jb.fit(jb.QuasiNewton(oracle), jnp.array([1.0001, 50.0]), jnp.zeros((1, 1)), steps=120)
    np.testing.assert_allclose(result.params, 1.0, atol=1e-3)


def wrong_sign(loss):
    @jax.custom_vjp
    def f(p):
        return loss(p)

    f.defvjp(lambda p: (loss(p), p), lambda p, c: (-c * jax.grad(loss)(p),))
    return jb.explicit.Oracle(lambda p, d: f(p))


def test_a_gradient_of_the_wrong_sign_stalls_within_a_few_evaluations():
    oracle = wrong_sign(lambda p: jnp.sum((p - 1.0) ** 2))
    result = jb.fit(jb.QuasiNewton(oracle), jnp.array([3.0, 2.0]), jnp.zeros((1, 1)), steps=200)
    assert result.status == jb.FitStatus.STALLED and result.steps <= 15, result.message
    np.testing.assert_array_equal(result.params, [3.0, 2.0])


def test_a_gradient_of_the_wrong_sign_through_a_solve_stalls_too():
    loss = lambda x: jnp.sum((x - 1.0) ** 2)  # noqa: E731
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * jnp.sum((x - p) ** 2), lambda p, d: d, strong_convexity=1.0)
    wrong = wrong_sign(loss).loss
    oracle = problem.oracle(lambda p, x, d: wrong(x, d), solver=jb.solvers.AGD())
    result = jb.fit(jb.QuasiNewton(oracle), jnp.array([3.0, 2.0]), jnp.zeros((1, 2)), steps=200)
    assert result.status == jb.FitStatus.STALLED and result.steps <= 30, result.message


def test_a_start_where_nothing_depends_on_params_ends_at_once():
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    for oracle in (problem.oracle(lambda p, x, d: x**2), jb.explicit.Oracle(lambda p, d: jnp.sum(d))):
        result = jb.fit(jb.QuasiNewton(oracle), jnp.array(1.0), jnp.array([2.0]), steps=200)
        assert result.steps <= 12 and float(result.params) == 1.0, result.message


def test_a_gradient_that_is_not_finite_fails():
    oracle = jb.explicit.Oracle(lambda p, d: jnp.sqrt((p - 0.5) ** 2))
    result = jb.fit(jb.QuasiNewton(oracle), jnp.array(0.5), jnp.zeros(1), steps=20)
    assert result.status == jb.FitStatus.FAILED


def test_a_trial_beyond_the_domain_is_taken_back():
    oracle = jb.explicit.Oracle(lambda p, d: p - jnp.log(p))
    result = jb.fit(jb.QuasiNewton(oracle), jnp.array(30.0), jnp.zeros(1), steps=60)
    assert float(result.params) == pytest.approx(1.0, abs=1e-4), result.message


def test_the_exact_minimum_of_a_box_is_found_on_its_boundary():
    target = jnp.array([2.0, -3.0, 0.5])
    oracle = jb.explicit.Oracle(lambda p, d: jnp.sum((p - target) ** 2))
    method = jb.QuasiNewton(oracle, projection=lambda p: jnp.clip(p, -1, 1))
    result = jb.fit(method, jnp.zeros(3), jnp.zeros(1), steps=60)
    np.testing.assert_allclose(result.params, [1.0, -1.0, 0.5], atol=1e-5)
    assert result.status in (jb.FitStatus.CONVERGED, jb.FitStatus.FINISHED), result.message


TV = jb.regularizers.SmoothedTV(eps=0.05)
IMAGES = RNG.random((2, 8, 8))
PAIRS = {"x": IMAGES, "y": IMAGES + 0.1 * RNG.standard_normal(IMAGES.shape)}
SMOOTH = jb.variational(None, TV).oracle(jb.losses.squared_error(), loss_smoothness=1.0)


def exact_values(oracle, seen):
    tight = dataclasses.replace(oracle, estimate=False)
    return np.array([float(tight.value(params, PAIRS, tol=1e-9).value) for params in seen])


def test_certified_steps_never_let_the_exact_value_rise():
    seen = []
    start = jnp.array([1.0])
    method = jb.QuasiNewton(SMOOTH, certified=True)
    jb.fit(method, start, PAIRS, steps=60, callback=lambda step, state, info: seen.append(state.params))
    values = exact_values(SMOOTH, [start, *seen])
    assert np.all(np.diff(values) <= 0) and values[-1] < 0.9 * values[0]


def test_certified_needs_an_oracle_that_proves():
    with pytest.raises(ValueError, match="loss_smoothness"):
        jb.QuasiNewton(dataclasses.replace(SMOOTH, loss_smoothness=None), certified=True)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tolerances_units_and_precisions_do_not_matter(dtype):
    """The same problem in other units of images: the same decrease."""
    decrease = []
    for unit in (1.0, 255.0):
        batch = {name: jnp.asarray(unit * part, dtype) for name, part in PAIRS.items()}
        R = jb.regularizers.SmoothedTV(eps=0.05 * unit)
        oracle = jb.variational(None, R).oracle(jb.losses.squared_error())
        start = jnp.asarray([1.0 + np.log(unit)], dtype)
        result = jb.fit(jb.QuasiNewton(oracle), start, batch, steps=25)
        decrease.append(float(result.history["value"][-1] / result.history["value"][0]))
    assert decrease[0] < 0.9 and decrease[0] == pytest.approx(decrease[1], rel=0.02)


def test_one_compilation_and_one_copy_of_the_oracle():
    method = jb.QuasiNewton(SMOOTH)
    start = jnp.array([1.0])
    state, _ = method.step(method.init(start, PAIRS), PAIRS)
    with compilations() as names:
        for _ in range(6):
            state, _ = method.step(state, PAIRS)
    assert not names
    count = lambda f, *a: str(jax.make_jaxpr(f)(*a)).count("while[")  # noqa: E731
    loops = count(lambda w: SMOOTH.without_estimate()(start, PAIRS, w, tol=0.1), SMOOTH.init(start, PAIRS))
    assert count(lambda s: method.step(s, PAIRS), state) <= loops + 4  # and the loops of L-BFGS
