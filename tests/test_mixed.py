"""Mixed precision: float32 takes the many steps, and changes neither the answer nor what is said about it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import QUADRATIC, image_loss, relative, tv

import jbilevel as jb
from jbilevel._core import trees
from jbilevel.solvers import mixed

CASE = tv(12)
FULL = replace(CASE.problem, mixed_precision=False)
MIXED = replace(CASE.problem, mixed_precision=True)


@pytest.mark.slow
@pytest.mark.parametrize("correct", [False, True])
def test_answers_agree_with_float64_throughout(correct):
    params, batch = CASE.params(0), CASE.batch(0, 2)
    full, reduced = (
        jb.implicit.Oracle(problem, image_loss, correct=correct)(params, batch, tol=1e-10) for problem in (FULL, MIXED)
    )
    assert reduced.status == jb.Status.CONVERGED
    assert np.all(np.asarray(reduced.lower.error) <= 1e-10) and np.all(np.asarray(reduced.adjoint.residual) <= 1e-10)
    assert reduced.grad.dtype == jnp.float64
    assert relative(reduced.grad, full.grad) <= 1e-8


def test_most_steps_are_in_float32():
    """The jaxpr of a mixed solve has a float32 loop; that of a float64 one has nothing in float32."""
    params, data = CASE.params(0), CASE.sample(0)
    programs = {
        problem: str(jax.make_jaxpr(lambda p, d, problem=problem: jb.solve(problem, p, d, tol=1e-9)[0])(params, data))
        for problem in (FULL, MIXED)
    }
    assert "f32[12,12]" in programs[MIXED] and "f32" not in programs[FULL]


@pytest.mark.slow
def test_estimate_of_a_loose_solve_is_right():
    params, batch = CASE.params(1), CASE.batch(1, 1)
    exact = jb.implicit.Oracle(FULL, image_loss)(params, batch, tol=1e-12).grad
    for tol in (1e-1, 1e-2, 1e-3):
        hg = jb.implicit.Oracle(MIXED, image_loss)(params, batch, tol=tol)
        assert 0.7 <= float(hg.error) / float(trees.norm(hg.grad - exact)) <= 1.4


def test_an_energy_that_overflows_float32_is_still_solved():
    """exp(100) is finite in float64 only; the minimiser is x = 0 along that coordinate."""

    def energy(p, x, data):
        return 0.5 * jnp.sum((x - data) ** 2) + 0.5 * jnp.exp(p) * x[0] ** 2

    problem = jb.SmoothProblem(energy, lambda p, d: d, strong_convexity=1.0, mixed_precision=True)
    x, info = jb.solve(problem, jnp.asarray(100.0), jnp.asarray([1.0, 2.0, 3.0]), tol=1e-8)
    jb.check(info)
    np.testing.assert_allclose(x, [np.exp(-100.0), 2.0, 3.0], atol=1e-8)


def test_an_energy_that_insists_on_float64_stays_there():
    kernel = np.ones((1, 1, 3, 3))  # lax.conv refuses two dtypes

    def energy(p, x, data):
        return 0.5 * jnp.sum((x - data) ** 2) + p * jnp.sum(jax.lax.conv(x[None, None], kernel, (1, 1), "SAME") ** 2)

    problem = jb.SmoothProblem(energy, lambda p, d: d, strong_convexity=1.0, mixed_precision=True)
    assert problem.view(jnp.asarray(0.1), jnp.ones((5, 5))).single(jnp.ones((5, 5))) is None
    x, info = jb.solve(problem, jnp.asarray(0.1), jnp.ones((5, 5)), tol=1e-10)
    jb.check(info)


def test_only_large_float64_unknowns_by_default():
    view = QUADRATIC.problem.view(QUADRATIC.params(0), QUADRATIC.sample())
    assert view.single(jnp.ones(6)) is None
    assert MIXED.view(CASE.params(0), CASE.sample()).single(jnp.ones((12, 12), jnp.float32)) is None
    large = jb.variational(None, jb.regularizers.SmoothedTV())
    assert large.view(jnp.zeros(2), jnp.zeros((128, 128))).single(jnp.zeros((128, 128))) is not None


def test_refinement_reaches_float64_accuracy_and_says_what_is_left():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((30, 30)))[0]
    matrix = basis * np.geomspace(1.0, 1e3, 30) @ basis.T
    b = jnp.asarray(rng.standard_normal(30))

    def energy(p, x, data):
        return 0.5 * x @ (data @ x)

    problem = jb.SmoothProblem(energy, lambda p, d: jnp.zeros(30), mixed_precision=True)
    view = problem.view((), jnp.asarray(matrix))
    product = view.linearize(b)[2]
    refined = mixed.refine(view, b, product, b, jnp.zeros(30), 1e-11, 1000)
    assert float(trees.norm(refined.residual)) <= 1e-11
    np.testing.assert_allclose(refined.residual, b - matrix @ refined.q, atol=1e-13)
    assert 30 < int(refined.products) < 400
    # impossible: it ends, and the residual is that of the returned point
    floor = mixed.refine(view, b, product, b, jnp.zeros(30), 0.0, 1000)
    assert 0 < float(trees.norm(floor.residual)) < 1e-11 and int(floor.products) < 1000


@pytest.mark.slow
def test_gradient_through_argmin_in_mixed_precision():
    params, data = CASE.params(2), CASE.sample(2)

    def gradient(problem):
        x_hat = jb.implicit.argmin(problem)
        return jax.grad(lambda p: image_loss(p, x_hat(p, data, tol=1e-10), data))(params)

    assert relative(gradient(MIXED), gradient(FULL)) <= 1e-8
