"""What all oracles share: batches, weights, chunks, bad samples, warm starts, compilations, statuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import COUPLED, QUADRATIC, compilations, distance, image_loss, relative, tv

import jbilevel as jb

TIGHT = 1e-11
COUNT = 5
AGD = jb.solvers.AGD()  # compiles faster than the default solver, which test_oracle_matrix.py uses
ORACLE = jb.implicit.Oracle(QUADRATIC.problem, QUADRATIC.loss, solver=AGD)
TV = tv(16)


def small():
    return QUADRATIC.params(1), QUADRATIC.batch(1, COUNT)


def oracle(**options):
    return jb.implicit.Oracle(QUADRATIC.problem, QUADRATIC.loss, **({"solver": AGD} | options))


def exact(params, batch, weights):
    """(values, gradient) from the closed form."""
    values = jax.vmap(QUADRATIC.exact, (None, 0))(params, batch)
    gradients = jax.vmap(jax.grad(QUADRATIC.exact), (None, 0))(params, batch)
    return np.asarray(values), np.asarray(gradients) @ weights


# batches


def test_sample_axes_shared_leaves_integers_and_absent_leaves():
    def loss(params, x, data):
        return data["scale"] * data["repeats"][1] * image_loss(params, x, data["pair"])

    params, batch = small()
    odd = {
        "y": batch["y"].T, "pair": {"x": batch["x"].T, "none": None}, "scale": jnp.asarray(3.0),
        "repeats": np.array([7, 2]), "index": np.arange(COUNT), "absent": None,
    }  # fmt: skip
    axes = {"y": 1, "pair": -1, "scale": None, "repeats": None, "index": 0, "absent": None}
    hg = jb.implicit.Oracle(QUADRATIC.problem, loss, solver=AGD, estimate=False, in_axes=axes)(params, odd, tol=TIGHT)
    values, gradient = exact(params, batch, np.full(COUNT, 1 / COUNT))
    np.testing.assert_allclose(hg.values, 6 * values, rtol=1e-10)
    assert relative(hg.grad, 6 * gradient) <= 1e-9


@pytest.mark.slow
def test_chunks_do_not_change_the_result():
    params, batch = small()
    whole = oracle(chunk=None)(params, batch, tol=1e-3)
    for chunk in (2, "auto"):  # with two, the last chunk is padded
        part = oracle(chunk=chunk)(params, batch, tol=1e-3)
        for name in ("value", "values", "value_error", "grad", "error", "warm"):
            assert distance(getattr(part, name), getattr(whole, name)) <= 1e-12
        for name in ("lower", "adjoint"):
            assert distance(getattr(part, name).steps, getattr(whole, name).steps) == 0
            assert distance(getattr(part, name).residual, getattr(whole, name).residual) <= 1e-12


def test_weighted_mean_by_hand():
    params, batch = small()
    weights = np.array([0.0, 1.0, 2.0, 0.5, 4.0])
    for given, used in ((weights, weights / 7.5), (None, np.full(COUNT, 1 / COUNT))):
        hg = ORACLE(params, batch, tol=TIGHT, sample_weight=given)
        v = ORACLE.value(params, batch, tol=TIGHT, sample_weight=given)
        values, gradient = exact(params, batch, used)
        assert relative(hg.grad, gradient) <= 1e-9
        assert float(hg.value) == pytest.approx(values @ used, rel=1e-10)
        assert float(v.value) == pytest.approx(values @ used, rel=1e-10)


def test_weights_that_say_nothing_give_nan():
    params, batch = small()
    inside = jax.jit(lambda w: ORACLE(params, batch, sample_weight=w))  # where negative weights cannot be refused
    for weights in (jnp.zeros(COUNT), jnp.array([-1.0, 1.0, 1.0, 1.0, 1.0])):
        hg = inside(weights)
        assert np.isnan(hg.value) and np.isnan(hg.grad)
        assert not hg.certified and np.isposinf(hg.error) and np.isposinf(hg.bound)


def test_a_nan_sample_of_weight_0_leaves_value_and_gradient():
    params, batch = small()
    bad = batch | {"y": batch["y"].at[2].set(jnp.nan)}
    others = np.arange(COUNT) != 2
    values, gradient = exact(params, batch, others / (COUNT - 1))
    unrolled = jb.unroll.Oracle(QUADRATIC.problem, QUADRATIC.loss, steps=QUADRATIC.unroll)
    for kind in (ORACLE, oracle(chunk=2), unrolled):
        hg = kind(params, bad, tol=TIGHT, sample_weight=others.astype(float))
        assert float(hg.value) == pytest.approx(values[others].mean(), rel=1e-10)
        assert relative(hg.grad, gradient) <= 1e-9
        assert hg.status == jb.Status.CONVERGED and np.isnan(hg.values[2])  # of padding


# bad samples


@pytest.mark.slow
def test_one_bad_image_among_64():
    params, batch = QUADRATIC.params(2), QUADRATIC.batch(2, 64)
    batch = batch | {"index": np.arange(64)}
    bad = batch | {"y": batch["y"].at[41].set(jnp.nan)}
    others = np.arange(64) != 41
    values, gradient = exact(params, batch, others / 63)

    marking, dropping = oracle(estimate=False), oracle(estimate=False, on_failure="drop")
    for result in (marking(params, bad, tol=TIGHT), marking.value(params, bad, tol=TIGHT)):
        assert np.isnan(result.value)
        np.testing.assert_array_equal(np.isnan(result.values), ~others)
        np.testing.assert_array_equal(result.lower.status, np.where(others, jb.Status.CONVERGED, jb.Status.NONFINITE))
        with pytest.raises(jb.ConvergenceError, match=r"sample 41 \(1 of 64 samples failed\) ended NONFINITE"):
            jb.check(result)

    hg = dropping(params, bad, tol=TIGHT)
    assert float(hg.value) == pytest.approx(values[others].mean(), rel=1e-11)
    assert float(dropping.value(params, bad, tol=TIGHT).value) == pytest.approx(values[others].mean(), rel=1e-11)
    assert relative(hg.grad, gradient) <= 1e-9
    assert hg.status == jb.Status.NONFINITE


def test_nothing_is_left_when_every_sample_is_dropped():
    params, batch = small()
    hg = oracle(on_failure="drop", loss_smoothness=1.0)(params, batch | {"y": jnp.nan * batch["y"]})
    assert np.isnan(hg.value) and np.isnan(hg.grad)
    assert not hg.certified
    for error in (hg.error, hg.bound, hg.value_error, hg.value_bound):
        assert np.isposinf(error)


def test_step_limit_is_a_status_and_a_sentence():
    params, batch = small()
    hg = oracle(solver=jb.solvers.GradientDescent, max_steps=2, max_products=1)(params, batch, tol=1e-6)
    assert np.all(hg.lower.status == jb.Status.MAX_STEPS) and np.all(hg.adjoint.status == jb.Status.MAX_STEPS)
    assert np.all(hg.lower.steps == 2) and np.all(hg.adjoint.steps == 1)
    assert np.isfinite(hg.value) and np.isfinite(hg.error)  # not nothing: its error is known
    with pytest.raises(jb.ConvergenceError, match="lower-level solve.*MAX_STEPS.*raise `max_steps`, loosen `tol`"):
        jb.check(hg)


def test_unreachable_tolerance_ends_quickly_as_precision():
    params, batch = small()
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    hg = ORACLE(single(params), single(batch), tol=0)
    assert np.all(hg.lower.status == jb.Status.PRECISION) and np.max(hg.lower.steps) < 100
    assert np.all(hg.adjoint.status <= jb.Status.PRECISION)
    assert np.isfinite(hg.value)
    jb.check(hg)
    with pytest.raises(jb.ConvergenceError, match="PRECISION.*use float64"):
        jb.check(hg, strict=True)


# warm starts and compilations


@pytest.mark.slow
def test_correction_may_meet_a_tolerance_that_the_solves_did_not():
    params, batch = small()
    limited = {"max_steps": 3, "max_products": 3, "estimate": False}
    reached = oracle(**limited)(params, batch, tol=1e-8)
    tol = 0.1 * min(np.min(reached.lower.residual), np.min(reached.adjoint.residual))
    corrected = oracle(correct=True, **limited)(params, batch, tol=tol)
    assert reached.status == oracle(**limited)(params, batch, tol=tol).status == jb.Status.MAX_STEPS
    assert corrected.status == jb.Status.CONVERGED
    assert np.all(corrected.lower.error <= tol) and np.all(corrected.adjoint.residual <= tol)


def test_warm_start_saves_work():
    params, batch = TV.params(1), TV.batch(1, 2)
    tv_oracle = jb.implicit.Oracle(TV.problem, TV.loss, estimate=False)
    cold = tv_oracle(params, batch, tol=1e-6)
    again = tv_oracle(params, batch, cold.warm, tol=1e-6)
    assert np.all(cold.lower.steps > 0) and np.all(cold.adjoint.steps > 0)
    assert np.all(again.lower.steps == 0) and np.all(again.adjoint.steps == 0)
    near = tv_oracle(params + 0.01, batch, cold.warm, tol=1e-6)
    assert 0 < np.sum(near.lower.steps) < np.sum(cold.lower.steps)
    assert 0 < near.work < cold.work


def test_one_compilation_of_solve_for_six_tolerances_and_any_start():
    params, data = QUADRATIC.params(0), QUADRATIC.sample(0)
    x, _ = jb.solve(QUADRATIC.problem, params, data, tol=1e-1)
    with compilations() as compiled:
        for tol in (1e-2, np.float64(1e-3), jnp.asarray(1e-4), np.float32(1e-5), 0, 1):
            jb.solve(QUADRATIC.problem, params, data, tol=tol)
            jb.solve(QUADRATIC.problem, params, data, x, tol=tol, max_steps=7)
    assert not [name for name in compiled if "solve" in name]


@pytest.mark.slow
def test_one_compilation_inside_jit_and_the_same_result():
    params, batch = small()
    calls = {
        "hypergradient": jax.jit(lambda p, b, warm, tol: ORACLE(p, b, warm, tol=tol)),
        "value": jax.jit(lambda p, b, warm, tol: ORACLE.value(p, b, warm, tol=tol)),
        "solve": jax.jit(lambda p, b, x, tol: jb.solve(QUADRATIC.problem, p, {"y": b["y"][0]}, x.x[0], tol=tol)),
    }
    warm = ORACLE.init(params, batch)
    for name, call in calls.items():
        for tol in np.geomspace(1e-1, 1e-9, 6):
            call(params, batch, warm, tol)
        assert call._cache_size() == 1, name
    inside, outside = calls["hypergradient"](params, batch, warm, 1e-3), ORACLE(params, batch, tol=1e-3)
    for field in ("value", "values", "grad", "error", "warm"):
        assert distance(getattr(inside, field), getattr(outside, field)) <= 1e-13


# values, work, direct parts


def test_value_costs_no_adjoint_solve():
    params, batch = TV.params(1), TV.batch(1, 2)
    both = jb.implicit.Oracle(TV.problem, TV.loss, estimate=False)
    v, hg = both.value(params, batch, tol=1e-6), both(params, batch, tol=1e-6)
    np.testing.assert_array_equal(v.lower.steps, hg.lower.steps)
    assert distance(v.warm.x, hg.warm.x) <= 1e-13
    assert not np.any(v.warm.adjoint)  # passed on as it came
    assert v.work < hg.work - np.sum(hg.adjoint.steps)


def test_error_is_infinite_where_none_is_estimated_or_known():
    params, batch = COUPLED.params(1), COUPLED.batch(1, 2)
    hg = jb.implicit.Oracle(COUPLED.problem, COUPLED.loss, estimate=False, loss_smoothness=1.0)(params, batch, tol=1e-3)
    assert np.isposinf(hg.error) and np.isposinf(hg.bound) and np.isposinf(hg.value_bound) and not hg.certified
    assert np.all(np.isposinf(hg.lower.error))


def test_loss_that_sees_params_only_is_not_certified_and_has_no_indirect_part():
    params, batch = small()
    options = {"solver": AGD, "estimate": False}
    constant = jb.implicit.Oracle(QUADRATIC.problem, lambda p, x, data: p**3, loss_smoothness=0.0, **options)
    hg = constant(params, batch, tol=1e-2)
    assert float(hg.grad) == pytest.approx(3 * params**2)
    assert not hg.certified
    # certified when the loss reads x only, although it is handed params
    assert oracle(loss_smoothness=1.0, estimate=False)(params, batch, tol=1e-2).certified


def test_infinite_tolerance_returns_the_start_with_its_residuals():
    """What methods ask for to choose their first tolerances."""
    params, batch = small()
    hg = ORACLE(params, batch, tol=jnp.inf, adjoint_tol=jnp.inf)
    np.testing.assert_allclose(hg.lower.residual, jnp.linalg.norm(batch["y"], axis=1))  # |grad energy(0)|
    np.testing.assert_allclose(hg.adjoint.residual, jnp.linalg.norm(batch["x"], axis=1))  # |grad loss(0)|
    assert np.all(hg.lower.steps == 0) and np.all(hg.adjoint.steps == 0)
