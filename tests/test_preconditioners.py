"""Preconditioned conjugate gradients against dense solves, alone and in the adjoints of oracles and of argmin."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import (
    COUPLED,
    dense_hessian,
    dense_hypergradient,
    dense_solution,
    image_loss,
    relative,
    ridge,
    tv,
    tv_energy,
)

import jbilevel as jb
from jbilevel._core.results import Status
from jbilevel.solvers.cg import cg

DTYPES = pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["double", "single"])


def symmetric(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def badly_scaled(n=60, seed=0):
    """D A D with a well-conditioned A: the diagonal is a good preconditioner."""
    scales = np.geomspace(1e-2, 1e2, n)
    return scales[:, None] * symmetric(np.geomspace(1, 10, n), seed) * scales


def rhs(n, seed=1):
    return np.random.default_rng(seed).standard_normal(n)


@jax.jit
def solve(matrix, inverse, b, x0, tol, max_steps):
    """``inverse``: the matrix M."""
    return cg(lambda v: matrix @ v, b, x0, tol=tol, max_steps=max_steps, inverse=lambda r: inverse @ r)


def run(matrix, inverse, b, x0=None, *, tol=1e-8, max_steps=1000, dtype=np.float64):
    """(x, info, residual computed in double precision from the matrix in the given one)."""
    matrix, inverse, b = (a.astype(dtype) for a in (matrix, inverse, b))
    x, info = solve(matrix, inverse, b, None if x0 is None else x0.astype(dtype), tol, max_steps)
    return x, info, float(np.linalg.norm(b.astype(float) - matrix.astype(float) @ np.asarray(x, float)))


@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-9])
def test_agrees_with_a_dense_solve_in_fewer_steps(tol):
    matrix, b = badly_scaled(), rhs(60)
    jacobi = np.diag(1 / np.diag(matrix))
    x, info, residual = run(matrix, jacobi, b, tol=tol)
    assert info.status == Status.CONVERGED and residual <= 1.001 * tol
    assert float(info.residual) == pytest.approx(residual, rel=1e-4)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1.01 * tol / np.linalg.eigvalsh(matrix)[0])
    plain = run(matrix, np.eye(60), b, tol=tol)[1]
    assert int(info.steps) <= 60 and int(info.steps) < 0.5 * int(plain.steps)
    assert int(info.evaluations.products) == int(info.steps) + 1


@DTYPES
def test_the_identity_changes_no_step(dtype):
    matrix, b = symmetric(np.geomspace(1, 100, 40)).astype(dtype), rhs(40).astype(dtype)
    x, info = cg(lambda v: matrix @ v, b, tol=1e-3)
    same, other, _ = run(matrix, np.eye(40), b, tol=1e-3, dtype=dtype)
    assert info.status == other.status == Status.CONVERGED and info.steps == other.steps
    np.testing.assert_allclose(same, x, rtol=1e-4)
    assert same.dtype == dtype


def test_the_exact_inverse_takes_one_step():
    matrix, b = symmetric(np.geomspace(1, 1e4, 50)), rhs(50)
    for x0 in (None, rhs(50, 2)):
        x, info, _ = run(matrix, np.linalg.inv(matrix), b, x0, tol=1e-8)
        assert (info.status, int(info.steps)) == (Status.CONVERGED, 1)
        np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1e-8)


def test_an_exact_warm_start_costs_no_step():
    matrix, x = badly_scaled(30), rhs(30)
    found, info, _ = run(matrix, np.eye(30), matrix @ x, x, tol=1e-9)
    assert (info.status, int(info.steps)) == (Status.CONVERGED, 0)
    np.testing.assert_array_equal(found, x)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 0.0])
@pytest.mark.parametrize("perfect", [False, True], ids=["jacobi", "inverse"])
def test_single_precision_is_honest(perfect, tol):
    matrix, b = badly_scaled(), rhs(60)
    inverse = np.linalg.inv(matrix) if perfect else np.diag(1 / np.diag(matrix))
    _, info, residual = run(matrix, inverse, b, tol=tol, dtype=np.float32)
    assert float(info.residual) == pytest.approx(residual, rel=0.5)
    assert (info.status == Status.CONVERGED) == (float(info.residual) <= 1.01 * tol)
    assert info.status in (Status.CONVERGED, Status.PRECISION, Status.STAGNATED)


def test_negative_curvature_is_still_met():
    matrix = symmetric(np.concatenate([-np.geomspace(0.5, 5, 20), np.geomspace(0.5, 5, 20)]))
    assert run(matrix, symmetric(np.geomspace(1, 10, 40), 3), rhs(40))[1].status == Status.INDEFINITE


SPOILED = {
    "negative": lambda d: -d,
    "one negative": lambda d: np.where(np.arange(d.size) == 3, -1e3 * d, d),
    "zero": lambda d: 0 * d,
    "singular": lambda d: np.where(np.arange(d.size) == 3, 0.0, d),
}


@DTYPES
@pytest.mark.parametrize("spoil", SPOILED)
def test_a_preconditioner_that_is_not_positive_definite_is_named(spoil, dtype):
    matrix, b = badly_scaled(), rhs(60)
    x, info, residual = run(matrix, np.diag(SPOILED[spoil](1 / np.diag(matrix))), b, tol=1e-6, dtype=dtype)
    assert info.status == Status.PRECONDITIONER
    assert "preconditioner" in Status(int(info.status)).message
    assert np.all(np.isfinite(x)) and float(info.residual) == pytest.approx(residual, rel=1e-2)
    assert int(info.steps) <= 200


def test_nan_and_infinity_in_the_preconditioner():
    matrix, b = badly_scaled(20), rhs(20)
    for bad in (np.nan, np.inf):
        assert run(matrix, np.where(np.eye(20) > 0, bad, 0.0), b)[1].status == Status.NONFINITE


def test_a_preconditioner_that_is_not_symmetric_is_honest():
    matrix, b = badly_scaled(), rhs(60)
    skewed = np.diag(1 / np.diag(matrix)) @ (np.eye(60) + 0.5 * np.triu(symmetric(np.ones(60) * 2), 1))
    _, info, residual = run(matrix, skewed + 1e-3 * np.tri(60), b, tol=1e-9, max_steps=300)
    assert float(info.residual) == pytest.approx(residual, rel=1e-3)
    assert (info.status == Status.CONVERGED) == (residual <= 1.01e-9)


def test_samples_of_a_batch_do_not_disturb_each_other():
    matrices = jnp.stack([badly_scaled(30, k) for k in range(3)])
    inverses = jnp.stack([jnp.diag(1 / jnp.diag(m)) for m in matrices]).at[1].multiply(-1.0)
    b = jnp.stack([rhs(30, k) for k in range(3)])
    x, info = jax.vmap(lambda m, i, b: solve(m, i, b, None, 1e-9, 1000))(matrices, inverses, b)
    assert list(info.status) == [Status.CONVERGED, Status.PRECONDITIONER, Status.CONVERGED]
    for k in (0, 2):
        np.testing.assert_allclose(x[k], solve(matrices[k], inverses[k], b[k], None, 1e-9, 1000)[0], rtol=1e-6)


def test_one_compilation_for_all_tolerances_and_limits():
    function = jax.jit(lambda b, tol, limit: cg(lambda v: 2 * v, b, tol=tol, max_steps=limit, inverse=lambda r: r))
    for k in range(4):
        function(jnp.ones(3), 10.0**-k, 10 + k)
    assert function._cache_size() == 1


# in the adjoint of oracles


RIDGE = ridge(12)


@dataclass(frozen=True)
class Circulant(jb.solvers.Preconditioner):
    """The inverse of the ridge energy's Hessian, which is diagonal in Fourier space, times ``factor``."""

    factor: float = 1.0

    def inverse(self, params, x, data):
        spectra = jnp.abs(jnp.fft.fft2(params["filters"], x.shape)) ** 2
        symbol = 1 + jnp.sum(jnp.exp(params["log_weights"])[:, None, None] * spectra, axis=0)
        return lambda r: (self.factor * jnp.fft.ifft2(jnp.fft.fft2(r) / symbol).real).astype(r.dtype)


WEIGHTS = np.geomspace(1, 1e3, 144).reshape(12, 12)


def weighted_energy(theta, x, data):
    """sum WEIGHTS (x - y)^2/2 + e^theta0 sum sqrt(down^2 + right^2 + e^(2 theta1))."""
    return tv_energy(theta, x, data) + 0.5 * jnp.sum(jnp.asarray(WEIGHTS - 1, x.dtype) * (x - data["y"]) ** 2)


def weighted_diagonal(theta, x, data):
    """Of the Hessian."""
    down, right = jnp.diff(x, axis=0, append=x[-1:]), jnp.diff(x, axis=1, append=x[:, -1:])
    squared = down**2 + right**2 + jnp.exp(2 * theta[1])
    twice_down = ((squared - down**2) / squared**1.5).at[-1].set(0.0)  # there is no neighbour
    twice_right = ((squared - right**2) / squared**1.5).at[:, -1].set(0.0)
    own = twice_down + twice_right - 2 * down * right / squared**1.5
    neighbours = jnp.roll(twice_down, 1, 0) + jnp.roll(twice_right, 1, 1)
    return jnp.asarray(WEIGHTS, x.dtype) + jnp.exp(theta[0]) * (own + neighbours)


WEIGHTED = replace(
    tv(12), name="weighted", problem=jb.SmoothProblem(weighted_energy, lambda t, data: data["y"], strong_convexity=1.0)
)
PRECONDITIONED = {
    "circulant": (RIDGE, jb.solvers.CG(preconditioner=Circulant())),
    "diagonal": (WEIGHTED, jb.solvers.CG(preconditioner=jb.solvers.Diagonal(weighted_diagonal))),
}
CASES = pytest.mark.parametrize("name", PRECONDITIONED)
SECOND_SLOW = pytest.mark.parametrize("name", ["circulant", pytest.param("diagonal", marks=pytest.mark.slow)])


@partial(jax.jit, static_argnums=(0, 1))
def adjoint(problem, solver, params, data, x, b, tol):
    """(q, info) of H q = b, as the oracle solves it at x."""
    system = jb.implicit.Oracle(problem, image_loss, linear_solver=solver).lower.restore(
        problem.view(params, data), x, ()
    )
    found = system.adjoint(b, jax.tree.map(jnp.zeros_like, b), tol)
    return found.q, found.info


@DTYPES
@CASES
def test_adjoint_agrees_with_the_dense_hessian_in_fewer_steps(name, dtype):
    case, solver = PRECONDITIONED[name]
    params, data = case.params(1), case.sample(1)
    x, b = data["y"], data["x"]
    exact = np.linalg.solve(dense_hessian(case.problem.energy, params, x, data), jnp.ravel(b)).reshape(b.shape)
    tol = 1e-11 if dtype == np.float64 else 1e-3
    given = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, data, x, b))
    q, info = adjoint(case.problem, solver, *given, tol)
    plain = adjoint(case.problem, jb.solvers.CG(), *given, tol)[1]
    assert info.status == plain.status == Status.CONVERGED and q.dtype == dtype
    assert float(np.linalg.norm(q - exact)) <= 1.5 * tol  # the Hessian is at least 1
    assert int(info.steps) <= (2 if name == "circulant" else 0.3 * int(plain.steps))


def test_an_unknown_that_is_a_pytree():
    def diagonal(params, x, data):
        return {"u": jnp.full(6, 2.0) + jnp.exp(params["a"]), "v": 1 + jnp.exp(params["a"])}  # a number broadcasts

    params, data = COUPLED.params(0), COUPLED.sample()
    x = dense_solution(COUPLED.problem, params, data)
    b = jax.tree.map(jnp.ones_like, x)
    exact = np.linalg.solve(dense_hessian(COUPLED.problem.energy, params, x, data), ravel_pytree(b)[0])
    solver = jb.solvers.CG(preconditioner=jb.solvers.Diagonal(diagonal))
    q, info = adjoint(COUPLED.problem, solver, params, data, x, b, 1e-11)
    assert info.status == Status.CONVERGED
    assert relative(q, ravel_pytree(exact)[0]) <= 1e-10


def test_all_steps_are_in_the_dtype_of_x():
    problem, data = replace(WEIGHTED.problem, mixed_precision=True), WEIGHTED.sample()
    programs = {
        solver: str(
            jax.make_jaxpr(lambda b, s=solver: adjoint(problem, s, WEIGHTED.params(0), data, data["y"], b, 1e-9)[0])(
                data["x"]
            )
        )
        for solver in (PRECONDITIONED["diagonal"][1], jb.solvers.CG())
    }
    assert ["f32[12,12]" in program for program in programs.values()] == [False, True]


@CASES
def test_oracle_agrees_with_the_dense_hessian(name):
    case, solver = PRECONDITIONED[name]
    params, batch = case.params(1), case.batch(1, 2)
    hg = jb.implicit.Oracle(case.problem, case.loss, linear_solver=solver, chunk=None)(params, batch, tol=1e-11)
    jb.check(hg)
    exact = []
    for k in range(2):
        data = jax.tree.map(lambda leaf: leaf[k], batch)  # noqa: B023
        x = dense_solution(case.problem, params, data)
        exact.append(dense_hypergradient(case.problem, case.loss, params, data, x))
    assert relative(hg.grad, np.mean(exact, axis=0)) <= 1e-8
    assert np.all(hg.adjoint.residual <= 1e-11)


@pytest.mark.parametrize("on_failure", ["nan", "drop"])
def test_a_bad_preconditioner_has_a_status_of_its_own(on_failure):
    solver = jb.solvers.CG(preconditioner=Circulant(-1.0))
    oracle = jb.implicit.Oracle(RIDGE.problem, RIDGE.loss, linear_solver=solver, estimate=False, on_failure=on_failure)
    hg = oracle(RIDGE.params(1), RIDGE.batch(1, 2), tol=1e-8)
    assert hg.status == jb.Status.PRECONDITIONER and np.all(np.isnan(hg.values))
    with pytest.raises(jb.ConvergenceError, match="adjoint solve of sample 0 .*PRECONDITIONER.*not positive definite"):
        jb.check(hg)


def test_a_diagonal_with_an_entry_that_is_not_positive_is_named():
    def diagonal(theta, x, data):
        return weighted_diagonal(theta, x, data).at[0, 0].set(data["entry"])

    solver = jb.solvers.CG(preconditioner=jb.solvers.Diagonal(diagonal))
    oracle = jb.implicit.Oracle(WEIGHTED.problem, WEIGHTED.loss, linear_solver=solver, estimate=False)
    batch = WEIGHTED.batch(0, 4) | {"entry": jnp.array([1.0, 0.0, -1e-3, np.nan])}
    status = oracle(WEIGHTED.params(0), batch, tol=1e-6).adjoint.status
    assert list(status) == [jb.Status.CONVERGED] + 3 * [jb.Status.PRECONDITIONER]


# in the derivatives of argmin


def flat_gradient(case, solver, tol=1e-12):
    minimiser = jb.implicit.argmin(case.problem, linear_solver=solver)
    assemble = ravel_pytree(case.params(1))[1]

    def value(params, y):
        data = case.sample(1) | {"y": y}
        return case.loss(assemble(params), minimiser(assemble(params), data, tol=tol), data)

    return jax.grad(value), ravel_pytree(case.params(1))[0]


@SECOND_SLOW
def test_gradient_through_argmin(name):
    case, solver = PRECONDITIONED[name]
    gradient, params = flat_gradient(case, solver)
    data = case.sample(1)
    exact = dense_hypergradient(
        case.problem, case.loss, case.params(1), data, dense_solution(case.problem, case.params(1), data)
    )
    assert relative(gradient(params, data["y"]), exact) <= 1e-8
    y = case.batch(3, 2)["y"]
    together = jax.jit(jax.vmap(gradient, (None, 0)))(params, y)
    assert relative(together, np.stack([gradient(params, one) for one in y])) <= 1e-9


@SECOND_SLOW
def test_gradient_of_gradient_does_not_see_the_preconditioner(name):
    """It depends on params and x, but the solution of the system does not depend on it."""
    case, solver = PRECONDITIONED[name]
    gradient, params = flat_gradient(case, solver)
    y, gradient = case.sample(1)["y"], jax.jit(gradient)
    rng = np.random.default_rng(0)
    weights, direction = (jnp.asarray(rng.standard_normal(params.size)) for _ in range(2))
    twice = jax.jit(jax.grad(lambda p: gradient(p, y) @ weights))(params)
    ahead, behind = (gradient(params + sign * 1e-5 * direction, y) @ weights for sign in (1, -1))
    assert float(twice @ direction) == pytest.approx(float(ahead - behind) / 2e-5, rel=1e-6)


def test_argmin_raises_and_says_what_is_wrong():
    gradient, params = flat_gradient(RIDGE, jb.solvers.CG(preconditioner=Circulant(-1.0)), tol=1e-8)
    with pytest.raises(jb.ConvergenceError, match="adjoint solve ended PRECONDITIONER"):
        gradient(params, RIDGE.sample(1)["y"])
    assert np.all(np.isnan(jax.jit(gradient)(params, RIDGE.sample(1)["y"])))


def test_equal_preconditioners_compile_once():
    params, batch = RIDGE.params(0), RIDGE.batch(0, 1)

    @partial(jax.jit, static_argnums=0)
    def value(oracle, params):
        return oracle(params, batch, tol=1e-6).value

    for _ in range(3):
        value(
            jb.implicit.Oracle(RIDGE.problem, RIDGE.loss, linear_solver=jb.solvers.CG(preconditioner=Circulant())),
            params,
        )
    assert value._cache_size() == 1


# what is refused


def test_a_preconditioner_without_inverse_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"Nothing needs a method `inverse\(self, params, x, data\).*Preconditioner"):

        class Nothing(jb.solvers.Preconditioner):
            pass


def test_what_is_no_preconditioner_is_refused():
    with pytest.raises(TypeError, match="`preconditioner` of CG must be a jb.solvers.Preconditioner, got function"):
        jb.solvers.CG(preconditioner=lambda r: r)

    @dataclass(frozen=True)
    class Held(jb.solvers.Preconditioner):
        matrix: Any

        def inverse(self, params, x, data):
            return lambda r: self.matrix @ r

    with pytest.raises(TypeError, match="must be hashable"):
        jb.solvers.CG(preconditioner=Held(np.eye(3)))


def test_a_result_of_another_shape_or_dtype_is_refused():
    for diagonal, message in (
        (lambda t, x, data: jnp.ones((2, *x.shape)), r"a preconditioner must return the shape \(12, 12\)"),
        (lambda t, x, data: jnp.ones(x.shape) + 1j, "a preconditioner must return the dtype float64"),
    ):
        solver = jb.solvers.CG(preconditioner=jb.solvers.Diagonal(diagonal))
        with jax.numpy_rank_promotion("allow"), pytest.raises((ValueError, TypeError), match=message):
            jb.implicit.Oracle(WEIGHTED.problem, image_loss, linear_solver=solver)(
                WEIGHTED.params(0), WEIGHTED.batch(0, 1), tol=1e-3
            )


def test_a_view_has_to_tell_its_params_and_data():
    solver = jb.solvers.CG(preconditioner=Circulant())
    with pytest.raises(TypeError, match=r"inputs=\(params, data\)"):
        solver.at(jb.SmoothView(lambda x: jnp.sum(x**2), jb.Constants()), jnp.ones(3))
    with pytest.raises(TypeError, match="solves at a point"):
        solver.solve(lambda v: v, jnp.ones(3), None, tol=1e-3, max_steps=10)
