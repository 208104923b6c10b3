"""Hypergradients of weighted l1 problems: closed form, differences, policies at kinks, errors, argmin, bad input."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import central_differences, compilations, distance, relative
from sparse_for_tests import (
    ELASTIC,
    GROUPS,
    LASSO,
    LOGISTIC,
    NET,
    TREE,
    held_out,
    held_out_logistic,
    log_weights,
    one,
    regression,
)

import jbilevel as jb
from jbilevel.nonsmooth import BIACTIVE


@cache
def oracle(problem, loss, **options):
    return jb.nonsmooth.Oracle(problem, loss, **options)


def differences(which, params, batch):
    return central_differences(lambda p: which.value(p, batch, tol=1e-13).value, params)


# 1/2 |x - d|^2 with one unknown exactly at the kink: |d_2| is its weight

KINK = {"d": jnp.array([0.4, 1.2, 0.0]), "target": jnp.array([0.0, 1.2, 0.0])}
LOG_WEIGHTS = jnp.log(jnp.array([0.35, 1.2, 2.0]))
IDENTITY = jb.WeightedL1Problem(
    lambda p, x, data: 0.5 * jnp.sum((x - data["d"]) ** 2), lambda p, data: jnp.zeros(3), strong_convexity=1.0,
    smoothness=1.0,
)  # fmt: skip


def to_target(params, x, data):
    return 0.5 * jnp.sum((x - data["target"]) ** 2)


@pytest.mark.parametrize("policy", BIACTIVE)
def test_closed_form_at_a_kink(policy):
    hg = oracle(IDENTITY, to_target, biactive=policy)(LOG_WEIGHTS, one(KINK), tol=1e-12)
    np.testing.assert_allclose(hg.warm.x[0], [0.05, 0.0, 0.0], atol=1e-15)
    assert float(hg.value) == pytest.approx(0.72125, abs=1e-15)
    # a smaller weight would let x_2 go to its target: all but "none" see that
    second = 0.0 if policy == "none" else 1.44
    np.testing.assert_allclose(hg.grad, [-0.0175, second, 0.0], atol=1e-12)


@pytest.mark.parametrize("policy, second", [("all", -1.44), ("none", 0.0), ("sign", 0.0), ("self-consistent", 0.0)])
def test_unknowns_that_had_better_stay_zero(policy, second):
    data = {**KINK, "target": jnp.array([0.0, -1.2, 0.0])}
    hg = oracle(IDENTITY, to_target, biactive=policy)(LOG_WEIGHTS, one(data), tol=1e-12)
    np.testing.assert_allclose(hg.grad, [-0.0175, second, 0.0], atol=1e-12)


@pytest.mark.slow
def test_self_consistency_sees_what_signs_do_not():
    """Two biactive unknowns: alone the second would lower the loss, but not once the first has moved."""
    H = np.array([[1.0, 0.9], [0.9, 1.0]])
    problem = jb.WeightedL1Problem(
        lambda p, x, data: 0.5 * x @ (jnp.asarray(H) @ x) - x @ data["d"], lambda p, data: jnp.zeros(2)
    )
    loss = lambda p, x, data: x @ data["slope"]  # noqa: E731
    batch = one({"d": jnp.ones(2), "slope": jnp.array([-1.0, -0.5])})
    signs = oracle(problem, loss, biactive="sign")(jnp.zeros(2), batch, tol=1e-12).grad
    consistent = oracle(problem, loss, biactive="self-consistent")(jnp.zeros(2), batch, tol=1e-12).grad
    np.testing.assert_allclose(signs, -np.linalg.solve(H, [-1.0, -0.5]), atol=1e-9)
    np.testing.assert_allclose(consistent, [1.0, 0.0], atol=1e-9)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_elastic_nets_against_differences(seed):
    batch, params = one(regression(50, 60, seed)), log_weights(60, seed)
    hg = oracle(NET, held_out)(params, batch, tol=1e-13)
    assert 5 < int(jnp.sum(hg.warm.x != 0)) < 55
    assert relative(hg.grad, differences(oracle(NET, held_out), params, batch)) <= 1e-8
    assert not np.any(np.asarray(hg.grad)[np.asarray(hg.warm.x[0] == 0)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem, loss, params, data",
    [
        (LOGISTIC, held_out_logistic, log_weights(15, 0), regression(40, 15, 0, labels=True)),
        (GROUPS, lambda p, x, d: held_out(p, x.reshape(-1), d), log_weights(6, 1, 1.0, 3.0), regression(20, 12, 1)),
        (LASSO, held_out, jnp.array(0.7), regression(20, 15, 2)),
        (
            TREE,
            lambda p, x, d: held_out(p, jnp.concatenate([x["u"], x["v"]]), d) + p["scale"] ** 3,
            {"u": jnp.array(0.5), "v": log_weights(7, 3), "scale": jnp.array(0.3)},
            regression(20, 12, 3),
        ),
    ],
    ids=["logistic", "groups", "scalar weight", "tree, learned F"],
)
def test_other_problems_against_differences(problem, loss, params, data):
    which = oracle(problem, loss)
    hg = which(params, one(data), tol=1e-12)
    zeros = sum(int(jnp.sum(leaf == 0)) for leaf in jax.tree.leaves(hg.warm.x))
    assert 0 < zeros < sum(leaf.size for leaf in jax.tree.leaves(hg.warm.x))
    assert relative(hg.grad, differences(which, params, one(data))) <= 1e-7
    for value in ("plain", "corrected"):
        rough = oracle(problem, loss, correct=value == "corrected")(params, one(data), tol=1e-3)
        assert 0.2 * distance(rough.grad, hg.grad) - 1e-10 <= rough.error


@pytest.mark.slow
@pytest.mark.parametrize("tol", [1e-1, 1e-2, 1e-3, 1e-4])
def test_error_estimates(tol):
    for seed in range(4):
        batch, params = one(regression(50, 60, seed)), log_weights(60, seed)
        exact = oracle(NET, held_out)(params, batch, tol=1e-13)
        plain = oracle(NET, held_out)(params, batch, tol=tol)
        fixed = oracle(NET, held_out, correct=True)(params, batch, tol=tol)
        true = distance(plain.grad, exact.grad)
        assert 0.8 * true <= plain.error <= 1.25 * true
        assert abs(plain.value - exact.value) <= 1.05 * plain.value_error + 1e-12
        assert distance(fixed.grad, exact.grad) <= 0.2 * true
        assert distance(fixed.grad, exact.grad) <= 5 * fixed.error
        assert distance(fixed.warm.x, exact.warm.x) <= float(fixed.lower.error[0]) <= tol


@pytest.mark.slow
def test_proven_value_bound():
    smoothness = float(np.linalg.norm(regression(50, 60, 0)["A_val"], 2) ** 2)
    which = oracle(NET, held_out, loss_smoothness=smoothness)
    batch, params = one(regression(50, 60, 0)), log_weights(60, 0)
    exact = which.value(params, batch, tol=1e-12)
    for tol in (1e-1, 1e-3):
        value = which.value(params, batch, tol=tol)
        assert abs(value.value - exact.value) <= value.bound < np.inf
    assert not which(params, batch, tol=1e-3).certified


@pytest.mark.slow
def test_a_correction_that_leaves_the_support_says_that_its_errors_are_unknown():
    """On a wrong support x is exact after the step: what is left there tells nothing of the value either."""
    params, batch = ELASTIC.params(1), ELASTIC.batch(1, 7)
    hg = oracle(ELASTIC.problem, ELASTIC.loss, correct=True, loss_smoothness=1.0)(params, batch, tol=1.0)
    exact = np.asarray([ELASTIC.exact(params, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(7)])
    assert np.max(np.abs(hg.values - exact)) > 1e-4
    assert np.isposinf(hg.error) and np.isposinf(hg.value_error)
    assert abs(hg.value - exact.mean()) <= hg.value_bound < np.inf


def test_warm_start_and_one_compilation():
    batch, params = one(regression(50, 60, 0)), log_weights(60, 0)
    which = oracle(NET, held_out)
    cold = which(params, batch, tol=1e-6)
    warm = which(params, batch, cold.warm, tol=1e-6)
    assert warm.lower.steps[0] <= 1 and warm.adjoint.steps[0] <= 1
    with compilations() as names:
        for tol in (1e-2, 1e-4):
            which(params, batch, cold.warm, tol=tol, adjoint_tol=tol / 2)
    assert not names


@pytest.mark.slow
def test_batches_are_means_of_their_samples():
    samples = [one(regression(20, 15, seed)) for seed in range(2)]
    batch = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *samples)
    params = log_weights(15, 0)
    alone = [oracle(NET, held_out)(params, sample, tol=1e-11).grad for sample in samples]
    for chunk in (1, None):
        together = oracle(NET, held_out, chunk=chunk)(params, batch, tol=1e-11)
        np.testing.assert_allclose(together.grad, sum(alone) / 2, atol=1e-7)


def test_argmin_of_a_lasso():
    data, params = regression(20, 15, 4), jnp.array(0.7)
    x_hat = jb.nonsmooth.argmin(LASSO)
    target = jnp.arange(15.0)

    def loss(params, data):
        return jnp.sum(jnp.sin(target + x_hat(params, data, tol=1e-12)))

    got = jax.grad(loss, (0, 1))(params, data)
    want = central_differences(lambda p: loss(p, data), params)
    assert relative(got[0], want) <= 1e-7
    want = central_differences(lambda b: loss(params, {**data, "b": b}), jnp.asarray(data["b"]))
    assert relative(got[1]["b"], want) <= 1e-7
    many = jnp.array([0.5, 0.7])
    jitted = jax.jit(jax.vmap(jax.grad(loss), (0, None)))(many, data)
    np.testing.assert_allclose(jitted[1], got[0], rtol=1e-6)


def test_argmin_through_groups():
    data, params = regression(20, 12, 1), log_weights(6, 1, 1.0, 3.0)
    x_hat = jb.nonsmooth.argmin(GROUPS)
    loss = lambda p: jnp.sum(jnp.cos(x_hat(p, data, tol=1e-12)))  # noqa: E731
    assert relative(jax.grad(loss)(params), central_differences(loss, params)) <= 1e-6


def test_argmin_raises_where_a_solve_fails():
    data = regression(20, 15, 4)
    x_hat = jb.nonsmooth.argmin(LASSO, max_steps=1)
    with pytest.raises(jb.ConvergenceError, match="MAX_STEPS"):
        jax.grad(lambda p: jnp.sum(x_hat(p, data, tol=1e-12)))(0.0)


def test_all_zero_solution_has_gradient_zero():
    hg = oracle(NET, held_out)(jnp.full(15, 10.0), one(regression(20, 15, 0)), tol=1e-10)
    assert hg.status == jb.Status.CONVERGED and hg.error == 0
    np.testing.assert_array_equal(hg.grad, 0.0)


@pytest.mark.slow
def test_dependent_columns_are_named_and_damping_helps():
    data = regression(20, 10, 5)
    data["A"][:, 1] = data["A"][:, 0]
    batch, params = one(data), jnp.full(10, -3.0)
    hg = oracle(LASSO, held_out)(params, batch, tol=1e-8)
    assert hg.adjoint.status[0] == jb.Status.STAGNATED and hg.error == np.inf
    assert np.all(np.isfinite(hg.grad))
    damped = oracle(LASSO, held_out, damping=1e-3)(params, batch, tol=1e-8)
    assert damped.adjoint.status[0] == jb.Status.CONVERGED


def test_overflowing_weights_and_bad_data_have_a_status():
    batch = one(regression(20, 15, 0))
    hg = jax.jit(lambda p: oracle(NET, held_out)(p, batch))(jnp.full(15, 800.0))
    assert hg.status == jb.Status.NONFINITE and hg.error == np.inf
    hg = oracle(NET, held_out)(jnp.zeros(15), {**batch, "b": np.nan * batch["b"]})
    assert hg.lower.status[0] == jb.Status.NONFINITE


def test_bad_arguments():
    smooth = jb.SmoothProblem(lambda p, x, d: jnp.sum(x**2), lambda p, d: jnp.zeros(3))
    with pytest.raises(TypeError, match="needs a jb.WeightedL1Problem"):
        jb.nonsmooth.Oracle(smooth, held_out)
    with pytest.raises(TypeError, match="needs a jb.WeightedL1Problem"):
        jb.nonsmooth.argmin(smooth)
    with pytest.raises(TypeError, match="must be a ForwardBackward"):
        jb.nonsmooth.Oracle(NET, held_out, solver=jb.solvers.AGD())
    for options in ({"biactive": "some"}, {"biactive_tol": 1.0}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            jb.nonsmooth.Oracle(NET, held_out, **options)
    with pytest.raises(TypeError, match="jb.implicit.Oracle needs a smooth problem, got WeightedL1Problem"):
        jb.implicit.Oracle(NET, held_out)
    with pytest.raises(TypeError, match="has kinks"):
        jb.solve(NET, jnp.zeros(15), regression(20, 15, 0), solver=jb.solvers.AGD())


def test_trees_of_parameters_by_default():
    """The default weights are the exponentials of all of params, whatever their structure."""
    smooth = lambda p, x, d: 0.5 * jnp.sum((x["u"] - 2) ** 2) + jnp.sum(x["v"] ** 2)  # noqa: E731
    problem = replace(TREE, weights=jnp.exp, smooth=smooth)
    params = {"u": jnp.array(0.0), "v": jnp.zeros(7)}
    x, _ = jb.solve(problem, params, regression(20, 12, 3), tol=1e-10)
    np.testing.assert_allclose(ravel_pytree(x)[0], [1.0] * 5 + [0.0] * 7, atol=1e-9)
