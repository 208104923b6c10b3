"""The standard error of a hypergradient, and batches of which only a part has weight."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import QUADRATIC

import jbilevel as jb

RNG = np.random.default_rng(3)
LINEAR = jb.explicit.Oracle(lambda p, d: jnp.vdot(p, d))  # the gradient of a sample is its data
ORACLE = jb.implicit.Oracle(QUADRATIC.problem, QUADRATIC.loss, solver=jb.solvers.AGD(), chunk=1, estimate=False)
TIGHT = 1e-12


def spread(data, weight=None, chunk=1, **options):
    oracle = replace(LINEAR, chunk=chunk, **options)
    return float(oracle(jnp.zeros(data.shape[1]), jnp.asarray(data), sample_weight=weight).spread)


def test_of_single_samples_it_is_the_textbook_formula():
    data = RNG.standard_normal((7, 3)) * [1.0, 10.0, 0.1] + 5
    expected = np.sqrt(np.sum(np.var(data, axis=0, ddof=1)) / 7)
    assert spread(data) == pytest.approx(expected, rel=1e-12)
    weight = RNG.uniform(0.1, 2, 7)
    share = weight / weight.sum()
    variance = share @ np.sum((data - share @ data) ** 2, axis=1) / (1 - share @ share)  # weights of reliability
    assert spread(data, weight) == pytest.approx(np.sqrt(share @ share * variance), rel=1e-12)


def test_of_equal_chunks_it_is_that_of_their_means():
    data = RNG.standard_normal((12, 3))
    for size in (2, 3, 6):
        sums = data.reshape(-1, size, 3).sum(axis=1) / 12
        K = len(sums)
        square = K / (K - 1) * (np.sum(sums**2) - np.sum(sums.sum(axis=0) ** 2) / K)
        assert spread(data, chunk=size) == pytest.approx(np.sqrt(square), rel=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize(
    "weight", [np.ones(7), np.array([1.0, 5, 0.2, 0, 3, 1, 1]), np.array([0, 0, 0, 2.0, 1, 0, 0.5])], ids=str
)
def test_its_square_is_the_variance_of_the_mean_over_many_draws(chunk, weight):
    """Also where the last chunk is short, weights are uneven, and chunks are in part or wholly padding."""
    oracle, params = replace(LINEAR, chunk=chunk), jnp.zeros(4)
    scales = jnp.array([[1.0, 2.0, 0.5, 3.0]])

    def draw(key):
        data = 7.0 + scales * jax.random.exponential(key, (7, 4))
        hg = oracle(params, data, sample_weight=jnp.asarray(weight))
        return hg.spread**2, hg.grad

    squares, means = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 40_000))
    share = weight / weight.sum()
    variance = float(jnp.sum(scales**2)) * share @ share
    assert float(jnp.sum(jnp.var(means, axis=0))) == pytest.approx(variance, rel=0.04)
    assert float(jnp.mean(squares)) == pytest.approx(variance, rel=0.04)


def test_it_is_inf_where_nothing_can_be_told():
    data = RNG.standard_normal((4, 2))
    assert np.isposinf(spread(data, chunk=None)) and np.isposinf(spread(data, chunk=4))
    assert np.isposinf(spread(data[:1])) and np.isposinf(spread(data, np.eye(4)[2]))
    assert np.isposinf(spread(data, np.array([1.0, 2, 0, 0]), chunk=2)) and np.isfinite(spread(data, chunk=2))
    bad = np.where(np.arange(4)[:, None] == 1, np.nan, data)
    assert np.isposinf(spread(bad))
    weights_that_say_nothing = jax.jit(lambda w: replace(LINEAR, chunk=1)(jnp.zeros(2), data, sample_weight=w).spread)
    assert np.isposinf(weights_that_say_nothing(jnp.zeros(4)))


def test_equal_samples_have_none_and_bad_ones_leave_it():
    data = RNG.standard_normal((5, 2))
    assert spread(np.tile(1e8 + data[:1], (5, 1))) < 1e-6
    bad = np.where(np.arange(5)[:, None] == 1, np.nan, data)
    assert spread(bad, on_failure="drop") == pytest.approx(spread(np.delete(data, 1, axis=0)), rel=1e-12)
    assert spread(bad, np.array([1.0, 0, 1, 1, 1])) == pytest.approx(spread(np.delete(data, 1, axis=0)), rel=1e-12)


def test_of_what_is_returned():
    params, batch = QUADRATIC.params(1), QUADRATIC.batch(1, 5)
    rows = np.asarray(jax.vmap(jax.grad(QUADRATIC.exact), (None, 0))(params, batch))
    loose = {"tol": 0.3, "adjoint_tol": 0.3}
    errors = {}
    for correct in (False, True):
        found = replace(ORACLE, correct=correct)(params, batch, **loose)
        errors[correct] = abs(float(found.spread) - np.std(rows, ddof=1) / np.sqrt(5))
    assert errors[True] < 0.1 * errors[False]


# batches of which only a part has weight


@pytest.mark.parametrize("chunk", [1, 2, None])
def test_padding_is_not_solved_and_nothing_is_told_of_it(chunk):
    params, batch = QUADRATIC.params(1), QUADRATIC.batch(1, 7)
    weight = np.array([1.0, 0, 0, 0, 3, 0, 0])
    oracle = replace(ORACLE, chunk=chunk)
    warm = oracle(params, batch, tol=0.1).warm
    expected = ORACLE(
        params, jax.tree.map(lambda leaf: leaf[np.array([0, 4])], batch), tol=TIGHT, sample_weight=[1.0, 3.0]
    )
    found = oracle(params, batch, warm, tol=TIGHT, sample_weight=weight)
    value = oracle.value(params, batch, warm, tol=TIGHT, sample_weight=weight)
    padding = weight == 0
    for result in (found, value):
        assert float(result.value) == pytest.approx(float(expected.value), rel=1e-9)
        np.testing.assert_array_equal(np.isnan(result.values), padding)
        np.testing.assert_array_equal(np.isnan(result.lower.residual), padding)
        np.testing.assert_array_equal(np.isinf(result.lower.error), padding)
        np.testing.assert_array_equal(result.lower.steps == 0, padding)
        assert int(result.status) == jb.Status.CONVERGED
        np.testing.assert_array_equal(result.warm.x[padding], warm.x[padding])
    assert float(found.grad) == pytest.approx(float(expected.grad), rel=1e-9)
    np.testing.assert_array_equal(found.warm.adjoint[padding], warm.adjoint[padding])
    assert np.all(np.any(found.warm.x[~padding] != warm.x[~padding], axis=1))


def test_a_chunk_of_padding_does_no_work():
    params, batch = QUADRATIC.params(1), QUADRATIC.batch(1, 40)
    few = jax.tree.map(lambda leaf: leaf[10:13], batch)
    weight = np.where((np.arange(40) >= 10) & (np.arange(40) < 13), 1.0, 0.0)
    alone, found = ORACLE(params, few, tol=1e-6), ORACLE(params, batch, tol=1e-6, sample_weight=weight)
    assert int(found.work) == int(alone.work)
    np.testing.assert_array_equal(np.asarray(found.lower.work + found.adjoint.work) > 0, weight > 0)
    np.testing.assert_array_equal(found.warm.x[10:13], alone.warm.x)
    assert float(found.grad) == pytest.approx(float(alone.grad), rel=1e-12)
    assert float(found.spread) == pytest.approx(float(alone.spread), rel=1e-12)
    assert int(ORACLE.value(params, batch, tol=1e-6, sample_weight=weight).work) == int(
        ORACLE.value(params, few, tol=1e-6).work
    )


def test_a_tolerance_that_is_too_large_is_still_named_beside_padding():
    params, batch = QUADRATIC.params(1), QUADRATIC.batch(1, 3)
    with pytest.warns(UserWarning, match="`tol`=1.0e.06 is larger than what there is to solve"):
        ORACLE(params, batch, tol=1e6, adjoint_tol=1e-6, sample_weight=np.array([1.0, 1, 0]))


def test_a_warm_start_of_padding_that_is_not_finite_waits_for_its_turn():
    params, batch = QUADRATIC.params(1), QUADRATIC.batch(1, 2)
    warm = ORACLE.init(params, batch)
    warm = warm._replace(x=warm.x.at[1].set(jnp.nan))
    first = ORACLE(params, batch, warm, tol=1e-6, sample_weight=np.array([1.0, 0]))
    assert np.isfinite(first.value) and np.all(np.isnan(first.warm.x[1]))
    second = ORACLE(params, batch, first.warm, tol=1e-6)
    assert np.isfinite(second.value) and np.all(np.isfinite(second.warm.x))
