"""Hypergradients and solutions by their relative error, ``rtol``: met, refused, or told that it cannot be."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import QUADRATIC, compilations, dense_solution, relative, ridge, tv

import jbilevel as jb

CASE = ridge(8)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.fixture(scope="module")
def television():
    """(oracle, params, batch, its gradient from solves to 1e-12)."""
    case = tv(16)
    oracle = jb.implicit.Oracle(case.problem, case.loss)
    params, batch = case.params(1), case.batch(1, 2)
    return oracle, params, batch, oracle(params, batch, tol=1e-12, adjoint_tol=1e-12).grad


@pytest.mark.parametrize("rtol", [1e-1, 1e-2, 1e-4, 1e-7])
def test_the_true_error_is_below(television, rtol):
    oracle, params, batch, exact = television
    hg = oracle(params, batch, rtol=rtol)
    jb.check(hg)
    assert relative(hg.grad, exact) <= rtol
    assert float(hg.error) <= rtol * np.linalg.norm(flat(hg.grad))


def test_a_looser_error_costs_less_and_a_warm_start_less_again(television):
    oracle, params, batch, _ = television
    work = [float(oracle(params, batch, rtol=rtol).work) for rtol in (1e-1, 1e-3, 1e-6)]
    assert work[0] < work[1] < work[2]
    warm = oracle(params, batch, rtol=1e-6).warm
    assert float(oracle(params, batch, warm, rtol=1e-6).work) < 0.5 * work[2]
    near = jax.tree.map(lambda leaf: leaf + 1e-3, params)
    assert float(oracle(near, batch, warm, rtol=1e-3).work) < 0.8 * work[1]


def test_work_is_that_of_all_rounds(television):
    """More than one solve to what was attained, and the steps of both solves add up too."""
    oracle, params, batch, _ = television
    hg = oracle(params, batch, rtol=1e-6)
    assert np.all(np.asarray(hg.lower.steps) >= 5) and np.all(np.asarray(hg.adjoint.steps) >= 10)
    once = oracle(params, batch, tol=1e-2, adjoint_tol=1e-2)
    assert float(hg.work) > float(once.work)


def test_units_do_not_matter():
    """Losses and data in other units: the same steps."""
    case = QUADRATIC
    params, batch = case.params(1), case.batch(1, 3)
    plain = jb.implicit.Oracle(case.problem, case.loss)
    scaled = jb.implicit.Oracle(case.problem, lambda p, x, d: 2.0**40 * case.loss(p, x, d))
    first, second = (oracle(params, batch, rtol=1e-3) for oracle in (plain, scaled))
    np.testing.assert_array_equal(first.lower.steps, second.lower.steps)
    assert relative(second.grad, 2.0**40 * flat(first.grad)) <= 1e-12
    large = oracle_of(1e6 * np.ones(3))
    small = oracle_of(1e-6 * np.ones(3))
    np.testing.assert_array_equal(large.lower.steps, small.lower.steps)


def oracle_of(scale):
    batch = jax.tree.map(lambda leaf: leaf * scale[:, None], QUADRATIC.batch(1, 3))
    return jb.implicit.Oracle(QUADRATIC.problem, QUADRATIC.loss)(QUADRATIC.params(1), batch, rtol=1e-3)


def test_float32_that_cannot_says_so_and_what_it_reached():
    case = tv(16)
    oracle = jb.implicit.Oracle(case.problem, case.loss)
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    params, batch = case.params(1), case.batch(1, 2)
    exact = flat(oracle(params, batch, tol=1e-12, adjoint_tol=1e-12).grad)
    hg = oracle(single(params), single(batch), rtol=3e-7)
    assert jb.Status.CONVERGED < hg.status <= jb.Status.STAGNATED
    assert 3e-7 < float(hg.error) / np.linalg.norm(exact) < 1e-2
    assert np.linalg.norm(flat(hg.grad) - exact) <= 2 * float(hg.error)
    assert oracle(single(params), single(batch), rtol=1e-2).status == 0


def test_a_solve_that_ran_out_of_steps_says_so(television):
    """Though the best round may be one before it."""
    oracle, params, batch, _ = television
    hg = replace(oracle, max_steps=2)(params, batch, rtol=1e-10)
    assert hg.status == jb.Status.MAX_STEPS
    assert float(hg.error) > 1e-10 * np.linalg.norm(flat(hg.grad))


def test_one_compilation_for_all_errors():
    oracle = jb.implicit.Oracle(CASE.problem, CASE.loss, solver=jb.solvers.AGD(), max_steps=4999)
    params, batch = CASE.params(1), CASE.batch(1, 2)
    warm = oracle.init(params, batch)
    with compilations() as names:
        for rtol in (1e-1, 1e-3, jnp.asarray(1e-6)):
            warm = oracle(params, batch, warm, rtol=rtol).warm
    assert sum("_relative" in name for name in names) == 1
    assert sum("_hypergradient" in name for name in names) == 0


def test_without_an_estimate_it_is_made_all_the_same():
    params, batch = CASE.params(1), CASE.batch(1, 2)
    oracles = (jb.implicit.Oracle(CASE.problem, CASE.loss, estimate=estimate) for estimate in (True, False))
    first, second = (oracle(params, batch, rtol=1e-4) for oracle in oracles)
    assert np.isfinite(second.error) and relative(first.grad, second.grad) == 0


def test_an_exact_oracle_meets_all():
    oracle = jb.explicit.Oracle(lambda p, d: 0.5 * (p - d) ** 2)
    hg = oracle(jnp.array(0.0), jnp.array([1.0, 3.0]), rtol=1e-9)
    assert float(hg.grad) == -2.0 and float(hg.error) == 0.0


def test_a_zero_gradient_ends():
    """No relative error of zero is met, but nothing is left to refine."""
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    hg = problem.oracle(lambda p, x, d: x)(jnp.array(1.0), jnp.array([2.0]), rtol=1e-3)
    assert float(hg.grad) == 0.0 and float(hg.error) == 0.0 and hg.status == 0


def test_one_bad_sample_ends_it():
    params, batch = CASE.params(1), CASE.batch(1, 3)
    batch = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), batch)
    hg = jb.implicit.Oracle(CASE.problem, CASE.loss)(params, batch, rtol=1e-3)
    assert np.isnan(float(hg.value)) and hg.lower.status.tolist()[1] == jb.Status.NONFINITE


@pytest.mark.parametrize("options", [{"tol": 1e-3}, {"adjoint_tol": 1e-3}, {"tol": 1e-3, "adjoint_tol": 1e-3}])
def test_two_ways_to_ask_are_refused(options):
    params, batch = CASE.params(1), CASE.batch(1, 2)
    oracle, x_hat = jb.implicit.Oracle(CASE.problem, CASE.loss), jb.implicit.argmin(CASE.problem)
    with pytest.raises(ValueError, match="in place of `tol` and `adjoint_tol`"):
        oracle(params, batch, rtol=1e-2, **options)
    with pytest.raises(ValueError, match="in place of `tol` and `adjoint_tol`"):
        x_hat(params, CASE.sample(), rtol=1e-2, **options)


@pytest.mark.parametrize("rtol", [0.0, -1.0, float("nan"), float("inf"), "small"])
def test_what_is_no_relative_error_is_refused(rtol):
    params, batch = CASE.params(1), CASE.batch(1, 2)
    with pytest.raises(ValueError, match="`rtol` must be a positive number"):
        jb.implicit.Oracle(CASE.problem, CASE.loss)(params, batch, rtol=rtol)
    with pytest.raises(ValueError, match="`rtol` must be a positive number"):
        jb.implicit.argmin(CASE.problem)(params, CASE.sample(), rtol=rtol)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_solutions_by_their_relative_error(rtol, known):
    """Proven where the modulus is known, else by the length of the step towards the minimum."""
    params, data = CASE.params(1), CASE.sample()
    problem = CASE.problem if known else jb.SmoothProblem(CASE.problem.energy, CASE.problem.init)
    x, info = jb.implicit.argmin(problem, with_info=True)(params, data, rtol=rtol)
    assert info.status == 0
    assert relative(x, dense_solution(CASE.problem, params, data)) <= rtol


def test_derivatives_of_such_solutions():
    params, data = CASE.params(1), CASE.sample()
    x_hat = jb.implicit.argmin(CASE.problem)
    loss = lambda params, rtol: CASE.loss(params, x_hat(params, data, rtol=rtol), data)  # noqa: E731
    exact = jax.grad(lambda params: CASE.exact(params, data))(params)
    assert relative(jax.grad(loss)(params, 1e-7), exact) <= 1e-5
    single = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (params, data))
    _, info = jb.implicit.argmin(CASE.problem, with_info=True, on_failure="ignore")(*single, rtol=1e-9)
    assert info.status > jb.Status.CONVERGED
