"""The lower-level solvers of task-adapted denoising at its two tolerances, and optax optimisers as solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems_for_tests import dense_solution, tv

import jbilevel as jb
from jbilevel.solvers import LBFGS, GradientDescent, Optax

ADAM = Optax(optax.adam(1e-2))


@pytest.mark.parametrize("solver", [GradientDescent, ADAM, LBFGS()], ids=["gradient descent", "adam", "lbfgs"])
def test_printed_solvers_meet_the_printed_tolerances(solver):
    case = tv(6)
    params, data = case.params(0), case.sample()
    exact = dense_solution(case.problem, params, data)
    for tol in (1e-3, 1e-5):
        x, info = jb.solve(case.problem, params, data, tol=tol, solver=solver)
        assert info.status == jb.Status.CONVERGED
        assert np.linalg.norm(x - exact) <= info.error <= tol
        assert np.linalg.norm(case.problem.start(params, data) - exact) > 0.1  # there was something to do


def test_one_step_is_that_of_adam():
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * jnp.sum(p * (x - d) ** 2), lambda p, d: 0.0 * d)
    x, info = jb.solve(problem, 3.0, jnp.array([1.0, -2.0]), max_steps=1, solver=ADAM)
    np.testing.assert_allclose(x, [0.01, -0.01], rtol=1e-6)  # Adam's first step is the sign of the gradient
    assert info.status == jb.Status.MAX_STEPS and info.evaluations.gradients == 3  # start, curvature, step


def test_a_rate_that_does_not_suit_is_a_status():
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: 0.0 * d)
    solve = lambda rate: jb.solve(problem, 1.0, jnp.ones(2), max_steps=20000, solver=Optax(optax.sgd(rate)))[1].status  # noqa: E731
    assert solve(2.5) in (jb.Status.NONFINITE, jb.Status.STAGNATED)
    assert solve(0.5) == jb.Status.CONVERGED


def test_batches_agree_with_single_solves():
    problem = jb.SmoothProblem(lambda p, x, d: jnp.sum(jnp.cosh(x - d)), lambda p, d: 0.0 * d, strong_convexity=1.0)
    data = jnp.array([[1.0], [-0.3]])
    batched, info = jax.vmap(lambda d: jb.solve(problem, (), d, tol=1e-4, solver=ADAM))(data)
    for n in range(2):
        single, alone = jb.solve(problem, (), data[n], tol=1e-4, solver=ADAM)
        np.testing.assert_allclose(batched[n], single, rtol=1e-9)
        assert info.steps[n] == alone.steps
