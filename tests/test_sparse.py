"""Weighted l1 problems and their solver: scikit-learn, optimality, proven distances, tolerances, bad input."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import compilations
from sparse_for_tests import GROUPS, LASSO, LOGISTIC, NET, RIDGE, TREE, log_weights, one, regression, zeros

import jbilevel as jb
from jbilevel.nonsmooth import residual
from jbilevel.solvers import ForwardBackward


def solve(problem, params, data, **options):
    x, info = jb.solve(problem, params, data, **options)
    jb.check(info)
    return x, info


def test_closed_form():
    problem = jb.WeightedL1Problem(lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d))
    d = jnp.array([-3.0, 0.5, 2.0, 0.0])
    x, _ = solve(problem, jnp.log(jnp.array([1.0, 0.6, 2.5, 0.1])), d, tol=1e-12)
    np.testing.assert_allclose(x, [-2.0, 0.0, 0.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("smoothness", [True, False], ids=["L", "backtracking"])
@pytest.mark.parametrize("strength", [0.3, 0.01])
def test_elastic_net_of_scikit_learn(strength, smoothness):
    from sklearn.linear_model import ElasticNet

    data = regression(40, 60, 0)
    weight = strength * np.abs(data["A"].T @ data["b"]).max()
    problem = NET if smoothness else replace(NET, smoothness=None)
    x, info = solve(problem, jnp.log(weight), data, tol=1e-10)
    reference = ElasticNet(
        alpha=(weight + RIDGE) / 40, l1_ratio=weight / (weight + RIDGE), fit_intercept=False, tol=1e-14,
        max_iter=100_000,
    ).fit(data["A"], data["b"]).coef_  # fmt: skip
    np.testing.assert_allclose(x, reference, atol=1e-9)
    np.testing.assert_array_equal(x != 0, reference != 0)
    assert info.error <= 1e-10


def test_lasso_of_scikit_learn():
    from sklearn.linear_model import Lasso

    data = regression(30, 50, 1)
    x, info = solve(LASSO, jnp.log(2.0), data, tol=1e-9)
    reference = Lasso(alpha=2.0 / 30, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(data["A"], data["b"]).coef_
    np.testing.assert_allclose(x, reference, atol=1e-9)
    assert np.isinf(info.error)  # no mu: nothing is proven


def test_logistic_regression_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    data = regression(60, 20, 2, labels=True)
    C = RIDGE + 2.0
    options = {"solver": "saga", "C": 1 / C, "l1_ratio": 2.0 / C, "fit_intercept": False, "tol": 1e-12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its names of penalties change between versions
        try:
            model = LogisticRegression(max_iter=100_000, **options).fit(data["A"], data["b"])
            assert np.any(model.coef_ == 0)
        except (AssertionError, ValueError):
            model = LogisticRegression(max_iter=100_000, penalty="elasticnet", **options).fit(data["A"], data["b"])
    x, _ = solve(LOGISTIC, jnp.log(2.0), data, tol=1e-10)
    np.testing.assert_allclose(x, model.coef_[0], atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem",
    [NET, replace(NET, smoothness=None), pytest.param(LOGISTIC, marks=pytest.mark.slow)],
    ids=["L", "backtracking", "logit"],
)
def test_proven_distance(problem):
    for seed in range(5):
        data, params = regression(20, 30, seed, labels=problem is LOGISTIC), log_weights(30, seed)
        exact, _ = solve(problem, params, data, tol=1e-12)
        for solver in (ForwardBackward(), ForwardBackward(newton=False)):
            for tol in (1.0, 1e-1, 1e-2, 1e-4):
                x, info = solve(problem, params, data, tol=tol, solver=solver)
                assert jnp.linalg.norm(x - exact) <= info.error <= tol


def test_optimality_of_a_tree_with_scales_and_a_forward_backward_residual_that_is_zero():
    data = regression(20, 12, 3)
    params = {"u": jnp.array(0.5), "v": log_weights(7, 3), "scale": jnp.array(0.3)}
    x, _ = solve(TREE, params, data, tol=1e-11)
    assert 0 < sum(int(jnp.sum(leaf == 0)) for leaf in x.values()) < 12
    for leaf in residual(TREE, params, x, data, step=1e-2).values():
        np.testing.assert_allclose(leaf, 0.0, atol=1e-9)
    away = jax.tree.map(lambda leaf: leaf + 0.1, x)
    assert max(float(jnp.abs(leaf).max()) for leaf in residual(TREE, params, away, data, step=1e-2).values()) > 0.1


def test_groups():
    """At the solution: (grad F)_g = -weight x_g/|x_g| on the support, |(grad F)_g| <= weight elsewhere."""
    data, params = regression(30, 24, 4), log_weights(12, 4, 1.0, 3.0)
    x, info = solve(GROUPS, params, data, tol=1e-12)
    slope = jax.grad(GROUPS.smooth, 1)(params, x, data)
    sizes = jnp.linalg.norm(x, axis=-1)
    assert 0 < int(jnp.sum(sizes > 0)) < 12
    active = np.asarray(sizes > 0)
    expected = -(jnp.exp(params)[:, None] * x)[active] / sizes[active][:, None]
    np.testing.assert_allclose(slope[active], expected, atol=1e-9)
    assert np.all(jnp.linalg.norm(slope, axis=-1)[~active] <= jnp.exp(params)[~active])
    assert info.steps < 60


def test_newton_steps_save_work():
    data = regression(60, 100, 5)
    params = jnp.full(100, jnp.log(1e-2 * np.abs(data["A"].T @ data["b"]).max()))
    _, fast = solve(NET, params, data, tol=1e-8)
    _, slow = solve(NET, params, data, tol=1e-8, solver=ForwardBackward(newton=False))
    assert fast.work < 0.8 * slow.work


def test_warm_start_and_one_compilation():
    data, params = regression(20, 30, 6), log_weights(30, 6)
    x, cold = solve(NET, params, data, tol=1e-8)
    _, warm = solve(NET, params + 1e-4, data, x0=x, tol=1e-8)
    assert warm.steps < cold.steps
    with compilations() as names:
        for tol in (1e-3, 1e-5, 1e-7):
            solve(NET, params, data, x0=x, tol=tol)
    assert not names


def test_jit_and_vmap():
    data, params = regression(20, 30, 7), log_weights(30, 7)
    stack = jax.tree.map(lambda v: jnp.stack([jnp.asarray(v), 1.1 * jnp.asarray(v)]), data)
    run = jax.jit(jax.vmap(lambda d: jb.solve(NET, params, d, tol=1e-9)))
    x, info = run(stack)
    for i in range(2):
        alone, _ = solve(NET, params, jax.tree.map(lambda v, i=i: v[i], stack), tol=1e-9)
        np.testing.assert_allclose(x[i], alone, atol=2e-9)
    assert np.all(info.status == jb.Status.CONVERGED)


def test_float32_ends_as_precision():
    data = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), regression(20, 30, 8))
    problem = replace(NET, init=lambda p, d: jnp.zeros(30, jnp.float32))
    with pytest.warns(UserWarning, match="float32"):
        x, info = jb.solve(problem, log_weights(30, 8).astype(jnp.float32), data, tol=1e-12)
    assert info.status == jb.Status.PRECISION and x.dtype == jnp.float32


def test_unpenalised_entries_and_the_all_zero_solution():
    data = regression(30, 10, 9)
    weights = jnp.full(10, 1e6).at[0].set(0.0)
    x, _ = solve(replace(NET, weights=lambda p: p), weights, data, tol=1e-10)
    a = data["A"][:, 0]
    np.testing.assert_allclose(x, jnp.zeros(10).at[0].set(a @ data["b"] / (a @ a + RIDGE)), atol=1e-9)
    x, info = solve(NET, jnp.full(10, 10.0), data)
    assert not np.any(x) and info.error < 1e-9  # the rounding of a gradient that is far from the kink


@pytest.mark.parametrize(
    "params, options, match",
    [
        (jnp.full(10, 800.0), {}, "weights\\(params\\).*inf"),
        (jnp.full(10, -1.0), {"weights": lambda p: p}, "holds -1.0"),
        (jnp.zeros(7), {}, "shape \\(7,\\)"),
        ((jnp.zeros(5), jnp.zeros(5)), {}, "`weights` must return one array"),
        (jnp.zeros(10), {"groups": 3}, "`groups` is axis 3"),
    ],
)
def test_bad_weights_are_named(params, options, match):
    with pytest.raises(ValueError, match=match):
        jb.solve(replace(NET, **options), params, regression(20, 10, 0))


def test_bad_numbers_have_a_status():
    data, params = regression(20, 10, 0), jnp.zeros(10)
    x, info = jax.jit(lambda p: jb.solve(NET, p, data))(jnp.full(10, 800.0))
    assert info.status == jb.Status.NONFINITE and np.all(np.isfinite(x))
    assert jb.solve(NET, params, {**data, "b": np.nan * data["b"]})[1].status == jb.Status.NONFINITE
    assert jb.solve(replace(NET, smoothness=1.0), params, data)[1].status == jb.Status.SMOOTHNESS
    assert jb.solve(NET, params, data, tol=1e-12, max_steps=2)[1].status == jb.Status.MAX_STEPS


def test_bad_arguments():
    data = regression(20, 10, 0)
    with pytest.raises(TypeError, match="`smooth` must be a function"):
        jb.WeightedL1Problem(1.0, zeros)
    with pytest.raises(ValueError, match="`smoothness` must be positive"):
        replace(NET, smoothness=0.0)
    with pytest.raises(TypeError, match="has kinks"):
        jb.solve(NET, jnp.zeros(10), data, solver=jb.solvers.NewtonCG())
    smooth = jb.SmoothProblem(squares_of, zeros)
    with pytest.raises(TypeError, match="WeightedL1Problem"):
        jb.solve(smooth, jnp.zeros(10), data, solver=ForwardBackward())
    with pytest.raises(ValueError, match="`wait`"):
        ForwardBackward(wait=0)
    with pytest.raises(TypeError, match="weights closes over a traced value"):
        jax.grad(lambda t: jb.solve(replace(NET, weights=lambda p: p * t), jnp.ones(10), data)[0].sum())(1.0)


def squares_of(params, x, data):
    return jnp.sum(x**2)


@pytest.mark.slow
def test_separable_labels_without_ridge_have_a_finite_answer():
    data = regression(20, 10, 1)
    data["b"] = np.sign(data["A"][:, 0])
    problem = jb.WeightedL1Problem(
        lambda p, x, d: jnp.sum(jnp.logaddexp(0.0, -d["b"] * (d["A"] @ x))), zeros
    )  # fmt: skip
    for level in (-2.0, -20.0, -700.0):
        oracle = jb.nonsmooth.Oracle(problem, lambda p, x, d: jnp.sum((d["A_val"] @ x) ** 2) / 100)
        hg = oracle(jnp.full(10, level), one(data), tol=1e-8)
        assert np.isfinite(hg.value) and np.all(np.isfinite(hg.grad)) and int(hg.status) in list(jb.Status)
