"""Implicit differentiation against dense references and central differences, under every JAX transformation."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import (
    COUPLED,
    QUADRATIC,
    central_differences,
    compilations,
    dense_hessian,
    dense_hypergradient,
    dense_solution,
    experts,
    relative,
    ridge,
    tv,
    tv_energy,
)

import jbilevel as jb

TIGHT = 1e-11
# from an independent accelerated gradient solve to 1e-12 and CG to 1e-13; agrees with central differences
CAMERA_THETA = jnp.array([-2.5, -4.0])
CAMERA_GRADIENT = np.array([-0.06102705117516, 0.24773792918776])

TV, RIDGE = tv(16), ridge(16)
SMOOTH = [COUPLED, TV, RIDGE]  # central differences need more than a Lipschitz gradient
CASES = [COUPLED, TV, experts(16)]  # the oracle matrix has the quadratic and the ridge energy, in closed form


def ids(cases):
    return {"argnames": "case", "argvalues": cases, "ids": [case.name for case in cases]}


@cache
def reference(case, seed):
    """(params, data, minimiser, hypergradient) without the library."""
    params, data = case.params(seed), case.sample(seed)
    x = dense_solution(case.problem, params, data)
    return params, data, x, dense_hypergradient(case.problem, case.loss, params, data, x)


def through_argmin(case, **options):
    minimiser = jb.implicit.argmin(case.problem, **options)
    return lambda params, data, tol=TIGHT: case.loss(params, minimiser(params, data, tol=tol), data)


@pytest.mark.parametrize(**ids(CASES))
def test_oracle_agrees_with_the_dense_hessian(case):
    oracle = jb.implicit.Oracle(case.problem, case.loss, estimate=False)
    params, data, x, exact = reference(case, 1)
    hg = oracle(params, jax.tree.map(lambda leaf: leaf[None], data), tol=TIGHT)
    jb.check(hg)
    assert relative(hg.grad, exact) <= 1e-8
    assert float(hg.value) == pytest.approx(float(case.loss(params, x, data)), rel=1e-8)
    assert jax.tree.structure(hg.grad) == jax.tree.structure(params)


@pytest.mark.slow
@pytest.mark.parametrize(**ids(SMOOTH))
def test_gradient_through_argmin_agrees_with_the_dense_hessian(case):
    params, data, _, exact = reference(case, 1)
    assert relative(jax.jit(jax.grad(through_argmin(case)))(params, data), exact) <= 1e-8


@pytest.mark.parametrize(**ids(SMOOTH))
def test_reference_agrees_with_central_differences(case):
    """So the library does, which the two tests above compare with the same reference."""
    params, data, x, exact = reference(case, 1)
    value = lambda params: case.loss(params, dense_solution(case.problem, params, data, x), data)  # noqa: E731
    assert relative(central_differences(value, params), exact) <= 1e-7


def test_camera_man_to_all_known_digits(camera64):
    data = {"y": camera64.noisy, "x": camera64.clean}
    case = tv(64)
    library = jb.variational(None, jb.regularizers.SmoothedTV())
    oracle = jb.implicit.Oracle(library, case.loss, estimate=False)
    hg = oracle(CAMERA_THETA, jax.tree.map(lambda leaf: leaf[None], data), tol=TIGHT)
    assert relative(hg.grad, CAMERA_GRADIENT) <= 1e-10
    assert relative(jax.grad(through_argmin(case))(CAMERA_THETA, data), CAMERA_GRADIENT) <= 1e-10


def test_gradient_flows_to_every_inexact_leaf_of_data():
    """d loss/dy = H^{-1} grad loss for denoising; weights and integers travel in data too."""
    theta, plain, _, _ = reference(TV, 1)
    upper = np.linspace(0.5, 1.5, 256).reshape(16, 16)

    def energy(theta, x, data):
        count = jnp.where(data["mask"], data["repeats"], 0.0)
        return tv_energy(theta, x, data) + 0.5 * data["pull"] * jnp.sum(count * x**2)

    problem = jb.SmoothProblem(energy, lambda theta, data: data["y"], strong_convexity=1.0)
    data = plain | {
        "pull": jnp.asarray(0.3), "repeats": jnp.asarray(2), "mask": jnp.asarray(upper > 1), "absent": None,
    }  # fmt: skip
    minimiser = jb.implicit.argmin(problem)
    gradient = jax.grad(lambda data: jnp.sum(upper * minimiser(theta, data, tol=TIGHT)), allow_int=True)(data)

    x = dense_solution(problem, theta, data, minimiser(theta, data, tol=TIGHT))
    q = np.linalg.solve(dense_hessian(energy, theta, x, data), upper.ravel())
    assert relative(gradient["y"], q) <= 1e-9
    assert float(gradient["pull"]) == pytest.approx(-q @ np.ravel(2.0 * (upper > 1) * x), rel=1e-9)
    assert gradient["absent"] is None
    assert not np.any(gradient["x"])  # energy does not use it
    for name in ("repeats", "mask"):
        assert gradient[name].dtype == jax.dtypes.float0
        assert gradient[name].shape == data[name].shape


def test_integer_leaf_of_params_has_no_gradient():
    def energy(params, x, data):
        return 0.5 * jnp.sum((x - data) ** 2) + 0.5 * params["a"] * params["k"] * jnp.sum(x**2)

    minimiser = jb.implicit.argmin(jb.SmoothProblem(energy, lambda params, data: data, strong_convexity=1.0))
    params = {"a": jnp.asarray(0.5), "k": jnp.asarray(2)}
    gradient = jax.grad(lambda p: minimiser(p, jnp.ones(()), tol=TIGHT), allow_int=True)(params)
    assert gradient["k"].dtype == jax.dtypes.float0
    assert float(gradient["a"]) == pytest.approx(-2 / (1 + 2 * 0.5) ** 2)


def test_no_gradient_to_the_start_or_the_tolerances():
    minimiser = jb.implicit.argmin(QUADRATIC.problem)
    params, data = QUADRATIC.params(0), QUADRATIC.sample(0)

    def value(x0, tol, adjoint_tol):
        return jnp.sum(minimiser(params, data, x0, tol=tol, adjoint_tol=adjoint_tol) ** 2)

    gradients = jax.grad(value, (0, 1, 2))(jnp.ones(6), 1e-3, 1e-3)
    assert not any(np.any(g) for g in gradients)


def test_start_does_not_change_the_answer():
    params, data, x, _ = reference(COUPLED, 1)
    minimiser = jb.implicit.argmin(COUPLED.problem)
    far = jax.tree.map(lambda leaf: leaf + 3.0, x)
    assert relative(minimiser(params, data, far, tol=TIGHT), x) <= 1e-9


# second derivatives and batching, on the problem whose params and unknown are both pytrees


@cache
def coupled():
    """(value, gradient) of (flat params, y), to rounding."""
    value = through_argmin(COUPLED)
    assemble = ravel_pytree(COUPLED.params(0))[1]

    def flat(params, y):
        return value(assemble(params), {"y": y, "x": jnp.ones(6)}, 1e-13)

    return flat, jax.jit(jax.grad(flat))


POINT = ravel_pytree(COUPLED.params(4))[0]
Y = COUPLED.batch(4, 3)["y"]


@cache
def hessian_by_differences():
    gradient = coupled()[1]
    moves = 1e-5 * np.eye(POINT.size)
    return np.stack([(gradient(POINT + m, Y[0]) - gradient(POINT - m, Y[0])) / 2e-5 for m in moves])


@pytest.mark.slow
def test_gradient_of_gradient_agrees_with_differences_of_the_gradient():
    gradient = coupled()[1]
    weights = jnp.arange(1.0, 5.0)
    twice = jax.jit(jax.grad(lambda p: gradient(p, Y[0]) @ weights))(POINT)
    assert relative(twice, hessian_by_differences() @ weights) <= 1e-7


def test_jvp_of_gradient_agrees_with_differences_of_the_gradient():
    gradient = coupled()[1]
    direction = jnp.array([1.0, -2.0, 0.5, 3.0])
    slope = jax.jvp(lambda p: gradient(p, Y[0]), (POINT,), (direction,))[1]
    assert relative(slope, hessian_by_differences() @ direction) <= 1e-7


@pytest.mark.slow
def test_batched_gradients_equal_single_ones():
    value, gradient = coupled()
    single = np.stack([gradient(POINT, y) for y in Y])
    assert relative(jax.jit(jax.vmap(jax.grad(value), (None, 0)))(POINT, Y), single) <= 1e-9
    total = lambda p: jnp.sum(jax.vmap(jax.jit(value), (None, 0))(p, Y))  # noqa: E731
    assert relative(jax.jit(jax.grad(total))(POINT), single.sum(axis=0)) <= 1e-9


def test_forward_mode_alone_is_a_type_error():
    minimiser = jb.implicit.argmin(QUADRATIC.problem)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda p: minimiser(p, QUADRATIC.sample()), (0.5,), (1.0,))


STAY = jb.solvers.External(lambda energy, x0, tol, max_steps: x0)


def test_minres_differentiates_a_stationary_point_that_is_no_minimum():
    """energy = x0^2/2 - x1^2/2 + <p, x> has the stationary point (-p0, p1), where CG does not apply."""
    signs = jnp.array([1.0, -1.0])
    problem = jb.SmoothProblem(
        lambda p, x, data: 0.5 * jnp.sum(signs * x**2) + p @ x, lambda p, data: -signs * jax.lax.stop_gradient(p)
    )
    p = jnp.array([0.3, 0.7])
    found = {}
    for name, linear_solver in (("minres", jb.solvers.MINRES()), ("cg", jb.solvers.CG())):
        minimiser = jb.implicit.argmin(problem, solver=STAY, linear_solver=linear_solver, on_failure="nan")
        found[name] = jax.grad(lambda p: minimiser(p, (), tol=1e-12) @ jnp.array([2.0, 5.0]))(p)  # noqa: B023
    np.testing.assert_allclose(found["minres"], [-2.0, 5.0], rtol=1e-12)
    assert np.all(np.isnan(found["cg"]))


def test_single_precision_stays_single_precision():
    params, data, _, exact = reference(QUADRATIC, 1)
    to_single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    gradient = jax.grad(through_argmin(QUADRATIC, solver=jb.solvers.AGD()))(to_single(params), to_single(data), 1e-5)
    assert gradient.dtype == jnp.float32
    assert relative(gradient, exact) <= 1e-4


def test_tolerances_and_equal_minimisers_compile_once():
    params, data = QUADRATIC.params(0), QUADRATIC.sample(0)
    value = jax.jit(jax.value_and_grad(lambda p, tol: jnp.sum(jb.implicit.argmin(QUADRATIC.problem)(p, data, tol=tol))))
    for tol in np.geomspace(1e-1, 1e-10, 6):
        value(params, tol)
    assert value._cache_size() == 1

    # without jit around it the solves are compiled on their own, once for all tolerances, starts and equal minimisers
    eager = jax.grad(lambda p, x0, tol: jnp.sum(jb.implicit.argmin(QUADRATIC.problem)(p, data, x0, tol=tol)))
    start = jnp.ones(6)
    with compilations() as compiled:
        eager(params, None, 1e-1)
    assert compiled
    with compilations() as compiled:
        for tol in (1e-2, np.float64(1e-3), jnp.asarray(1e-4), 0):
            eager(params, start, tol)
    assert not compiled
