"""CG and MINRES against dense solves: honest residuals and statuses, warm starts, transformations, exact counts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel._core.results import Status
from jbilevel.solvers.cg import cg
from jbilevel.solvers.cg import iterate as cg_iterate
from jbilevel.solvers.cg import resume as cg_resume
from jbilevel.solvers.minres import iterate as minres_iterate
from jbilevel.solvers.minres import minres

SOLVERS = pytest.mark.parametrize("solver", [cg, minres], ids=["cg", "minres"])


def symmetric(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def indefinite(n=40):
    return symmetric(np.concatenate([-np.geomspace(0.5, 5, n // 2), np.geomspace(0.5, 5, n - n // 2)]))


def rhs(n, seed=1):
    return np.random.default_rng(seed).standard_normal(n)


@partial(jax.jit, static_argnums=0)
def dense(solver, matrix, b, x0, tol, max_steps):
    return solver(lambda v: matrix @ v, b, x0, tol=tol, max_steps=max_steps)


def run(solver, matrix, b, x0=None, *, tol, max_steps=1000, dtype=np.float64):
    """(x, info, residual computed in double precision from the matrix in the given one)."""
    matrix, b = matrix.astype(dtype), b.astype(dtype)
    x, info = dense(solver, matrix, b, None if x0 is None else x0.astype(dtype), tol, max_steps)
    with np.errstate(invalid="ignore"):
        residual = b.astype(float) - matrix.astype(float) @ np.asarray(x, float)
    return x, info, float(np.linalg.norm(residual))


@SOLVERS
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("tol", [1e-2, 1e-6, 1e-9])
def test_agrees_with_a_dense_solve(solver, condition, tol):
    matrix, b = symmetric(np.geomspace(1, condition, 50)), rhs(50)
    x, info, residual = run(solver, matrix, b, tol=tol)
    assert info.status == Status.CONVERGED
    assert residual <= tol
    assert float(info.residual) == pytest.approx(residual, rel=1e-5)
    assert np.isinf(info.error)
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1.001 * tol)  # the smallest eigenvalue is 1


@SOLVERS
def test_exact_warm_start_costs_no_step(solver):
    matrix, x = symmetric(np.geomspace(1, 100, 30)), rhs(30)
    found, info, _ = run(solver, matrix, matrix @ x, x, tol=1e-10)
    assert (int(info.steps), info.status) == (0, Status.CONVERGED)
    np.testing.assert_array_equal(found, x)


@SOLVERS
def test_good_warm_start_saves_steps(solver):
    matrix, b = symmetric(np.geomspace(1, 100, 50)), rhs(50)
    near = np.linalg.solve(matrix, b) + 1e-5 * rhs(50, 2)
    cold, warm = (int(run(solver, matrix, b, x0, tol=1e-6)[1].steps) for x0 in (None, near))
    assert 0 < warm < 0.6 * cold


@SOLVERS
def test_zero_right_hand_side_costs_no_step(solver):
    x, info, _ = run(solver, symmetric(np.ones(5)), np.zeros(5), tol=0.0)
    assert (int(info.steps), info.status) == (0, Status.CONVERGED)
    np.testing.assert_array_equal(x, 0)


@SOLVERS
def test_step_limit(solver):
    matrix, b = symmetric(np.geomspace(1, 1e4, 50)), rhs(50)
    _, info, residual = run(solver, matrix, b, tol=1e-9, max_steps=7)
    assert (int(info.steps), info.status) == (7, Status.MAX_STEPS)
    assert float(info.residual) == pytest.approx(residual, rel=1e-8)


@SOLVERS
def test_nan_and_infinity(solver):
    matrix, b = symmetric(np.geomspace(1, 10, 10)), rhs(10)
    for bad in (np.nan, np.inf):
        assert run(solver, matrix, np.where(np.arange(10) == 3, bad, b), tol=1e-6)[1].status == Status.NONFINITE
        assert run(solver, np.where(matrix == matrix[2, 5], bad, matrix), b, tol=1e-6)[1].status == Status.NONFINITE


def test_cg_refuses_an_indefinite_matrix_and_minres_solves_it():
    matrix, b = indefinite(), rhs(40)
    assert run(cg, matrix, b, tol=1e-8)[1].status == Status.INDEFINITE
    x, info, residual = run(minres, matrix, b, tol=1e-8)
    assert info.status == Status.CONVERGED and residual <= 1e-8
    np.testing.assert_allclose(x, np.linalg.solve(matrix, b), atol=1e-7)


@pytest.mark.parametrize("eigenvalues", [np.geomspace(0.1, 10, 40), -np.geomspace(0.1, 10, 40), "indefinite"], ids=str)
def test_minres_tells_the_sign_of_the_matrix(eigenvalues):
    matrix = indefinite() if isinstance(eigenvalues, str) else symmetric(eigenvalues)
    b = rhs(40)
    state = minres_iterate(lambda v: matrix @ v, b, jnp.zeros(40), 1e-9, 1000)
    smallest, largest = np.linalg.eigvalsh(matrix)[0], np.linalg.norm(matrix, 2)
    assert state.status == Status.CONVERGED
    assert float(state.lowest) >= smallest - 1e-12
    assert (float(state.lowest) < 0) == (smallest < 0)
    assert 0.5 * largest <= float(state.norm) <= largest * (1 + 1e-12)


def test_minres_residuals_decrease():
    matrix, b = indefinite(), rhs(40)
    sizes = [float(run(minres, matrix, b, tol=0.0, max_steps=k)[1].residual) for k in range(0, 30, 3)]
    assert all(after <= before * (1 + 1e-12) for before, after in zip(sizes, sizes[1:], strict=False))
    assert sizes[-1] < 0.5 * sizes[0]


@pytest.mark.parametrize("sign", [1, -1], ids=["semidefinite", "indefinite"])
def test_minres_solves_a_singular_system_whose_right_hand_side_is_in_the_range(sign):
    eigenvalues = np.concatenate([np.zeros(8), sign * np.geomspace(0.5, 2, 12), np.geomspace(1, 10, 20)])
    matrix = symmetric(eigenvalues)
    _, info, residual = run(minres, matrix, matrix @ rhs(40), tol=1e-8)
    assert info.status == Status.CONVERGED and residual <= 1e-8


@pytest.mark.parametrize("dtype", [np.float64, np.float32], ids=["double", "single"])
@pytest.mark.parametrize("part", [1.0, 1e-1])
def test_minres_stagnates_outside_the_range(part, dtype):
    """A right-hand side with a part in the null space has no solution: never CONVERGED, never merely PRECISION."""
    matrix = symmetric(np.concatenate([np.zeros(8), -np.geomspace(0.5, 2, 12), np.geomspace(1, 10, 20)]))
    null = np.linalg.eigh(matrix)[1][:, np.argmin(np.abs(np.linalg.eigvalsh(matrix)))]
    inside = matrix @ rhs(40)
    b = inside + part * np.linalg.norm(inside) * null
    _, info, residual = run(minres, matrix, b, tol=1e-8, dtype=dtype)
    assert info.status == Status.STAGNATED
    assert residual == pytest.approx(part * np.linalg.norm(inside), rel=0.02)  # of the least-squares solution


def test_minres_of_the_zero_matrix_stagnates():
    assert run(minres, np.zeros((4, 4)), np.ones(4), tol=1e-6)[1].status == Status.STAGNATED


@pytest.mark.parametrize("asymmetry", [1e-3, 0.1, 1.0, 10.0])
def test_minres_with_a_matrix_that_is_not_symmetric_is_honest(asymmetry):
    matrix = symmetric(np.geomspace(1, 10, 20)) + asymmetry * np.random.default_rng(0).standard_normal((20, 20))
    _, info, residual = run(minres, matrix, rhs(20), tol=1e-6)
    assert float(info.residual) == pytest.approx(residual, rel=1e-6)
    assert (info.status == Status.CONVERGED) == (residual <= 1e-6)
    assert info.status == Status.CONVERGED or asymmetry > 1e-3
    assert info.status in (Status.STAGNATED, Status.MAX_STEPS) or asymmetry < 10


@SOLVERS
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_single_precision_is_honest(solver, condition, tol):
    matrix, b = symmetric(np.geomspace(100 / condition, 100, 100)), rhs(100)
    x, info, residual = run(solver, matrix, b, tol=tol, max_steps=3000, dtype=np.float32)
    floor = float(np.finfo(np.float32).eps * 100 * np.linalg.norm(x))
    assert float(info.residual) == pytest.approx(residual, abs=0.3 * floor, rel=0.03)
    assert (info.status == Status.CONVERGED) == (float(info.residual) <= 1.01 * tol)
    assert info.status in (Status.CONVERGED, Status.PRECISION, Status.STAGNATED)
    assert (info.status == Status.STAGNATED) <= (condition == 1e6)  # eps cond = 0.1: no solution in single precision
    if info.status == Status.PRECISION:
        assert residual <= 16 * floor and residual <= 0.1 * np.linalg.norm(b)
        assert int(info.steps) < 1000


def test_refinement_makes_minres_as_accurate_as_its_dtype_allows():
    """The recurrence alone claims a residual eps cond(H)^2 too small (Sleijpen, van der Vorst & Modersitzki 2000)."""
    matrix, b = symmetric(np.geomspace(1e-4, 100, 100)), rhs(100)
    x, info, residual = run(minres, matrix, b, tol=1e-13, max_steps=5000)
    assert info.status == Status.PRECISION
    assert residual <= 10 * np.finfo(float).eps * 100 * np.linalg.norm(x)


@SOLVERS
def test_pytrees(solver):
    matrix, b = symmetric(np.geomspace(1, 20, 7)), rhs(7)

    def split(v):
        return {"image": v[:6].reshape(2, 3), "rest": (v[6],)}

    def join(tree):
        return jnp.append(tree["image"].reshape(-1), tree["rest"][0])

    x, info = solver(lambda tree: split(matrix @ join(tree)), split(jnp.asarray(b)), tol=1e-9)
    assert info.status == Status.CONVERGED
    np.testing.assert_allclose(join(x), np.linalg.solve(matrix, b), atol=1e-8)


@SOLVERS
def test_samples_of_a_batch_do_not_disturb_each_other(solver):
    matrices = jnp.stack([symmetric(np.geomspace(1, k, 20), k) for k in (2, 50, 300)] + [np.full((20, 20), np.nan)])
    b, tol = jnp.stack([rhs(20, k) for k in range(4)]), jnp.array([1e-8, 1e-3, 1e-8, 1e-8])
    together = jax.vmap(lambda m, b, tol: dense(solver, m, b, None, tol, 1000))
    x, info = together(matrices, b, tol)
    assert list(info.status) == [Status.CONVERGED] * 3 + [Status.NONFINITE]
    assert len(set(map(int, info.steps[:3]))) == 3
    for k in range(3):
        alone, single = dense(solver, matrices[k], b[k], None, tol[k], 1000)
        np.testing.assert_allclose(x[k], alone, atol=1e-7)
        assert abs(int(single.steps) - int(info.steps[k])) <= 1
        assert int(info.evaluations.products[k]) == int(info.steps[k]) + 1


@SOLVERS
def test_one_compilation_for_all_tolerances_and_limits(solver):
    function = jax.jit(lambda b, tol, limit: solver(lambda v: 2.0 * v, b, tol=tol, max_steps=limit))
    for k in range(6):
        function(jnp.ones(3), 10.0**-k, 10 + k)
    assert function._cache_size() == 1


@pytest.mark.slow
@SOLVERS
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("tol", [1e-2, 1e-7, 1e-20])
def test_every_product_is_counted(solver, warm, tol):
    matrix, b, calls = symmetric(np.geomspace(1, 50, 12)), rhs(12), []

    def product(v):
        calls.append(1)
        return matrix @ v

    with jax.disable_jit():
        info = solver(product, jnp.asarray(b), jnp.ones(12) if warm else None, tol=tol, max_steps=60)[1]
    assert int(info.evaluations.products) == len(calls)
    assert (int(info.evaluations.gradients), int(info.evaluations.values)) == (0, 0)


def test_cg_resumed_with_another_tolerance_continues_the_same_iteration():
    matrix, b = symmetric(np.geomspace(1, 100, 40)), jnp.asarray(rhs(40))
    product = lambda v: matrix @ v  # noqa: E731
    first = cg_iterate(product, b, jnp.zeros(40), 1e-2, 1000, zero_start=True)
    second = cg_resume(product, first, 1e-8, 1000)
    direct = cg_iterate(product, b, jnp.zeros(40), 1e-8, 1000, zero_start=True)
    assert 0 < int(first.steps) < int(second.steps) == int(direct.steps)
    np.testing.assert_allclose(second.x, direct.x, atol=1e-12)
