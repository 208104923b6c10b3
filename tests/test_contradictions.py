"""Constants and transposes that are wrong: what a solve sees of it ends as a status that names it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel import Status
from jbilevel.operators import from_callbacks, from_functions

QUADRATIC = jb.SmoothProblem(
    lambda p, x, d: 0.5 * x @ d["H"] @ x - d["b"] @ x,
    lambda p, d: jnp.zeros(8),
    strong_convexity=lambda p, d: d["mu"],
)
K = np.random.default_rng(0).standard_normal((6, 4))
WRONG = K.copy()
WRONG[2] *= 1.3
A = np.array([1.0, 2.0, 3.0, 4.0])


def quadratic(seed, mu):
    """Eigenvalues between 1, which is one of them, and 1000."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    return {
        "H": (basis * 10.0 ** np.append(rng.uniform(0, 3, 7), 0.0)) @ basis.T,
        "b": rng.standard_normal(8),
        "mu": mu,
    }


@pytest.mark.parametrize("solver", [jb.solvers.NewtonCG(), jb.solvers.LBFGS()], ids=["NewtonCG", "LBFGS"])
def test_a_modulus_that_is_too_large(solver):
    run = jax.jit(lambda d: jb.solve(QUADRATIC, (), d, tol=1e-3, solver=solver)[1])
    statuses = {mu: [int(run(quadratic(seed, mu)).status) for seed in range(30)] for mu in (0.5, 1.0, 2.0, 5.0)}
    assert set(statuses[0.5] + statuses[1.0]) == {Status.CONVERGED}
    assert statuses[2.0].count(Status.CONVEXITY) >= 15 and statuses[5.0].count(Status.CONVEXITY) >= 20
    with pytest.raises(jb.ConvergenceError, match="CONVEXITY.*smaller"):
        seed = statuses[2.0].index(Status.CONVEXITY)
        jb.check(jb.solve(QUADRATIC, (), quadratic(seed, 2.0), tol=1e-3, solver=solver)[1])


def saddle(transpose, **options):
    return jb.SaddleProblem(
        lambda p, x, d: K @ x,
        lambda p, v, step, d: jb.prox.squared_distance(v, step, d),
        lambda p, v, step, d: jb.prox.squared_distance(v, step, jnp.zeros_like(v), 1 / p),
        lambda p, d: (jnp.zeros(4), jnp.zeros(6)),
        mu_primal=1.0,
        mu_dual=lambda p, d: 1 / p,
        norm=float(1.3 * np.linalg.norm(K, 2)),
        transpose=transpose,
        **options,
    )


def test_a_transpose_that_is_none():
    info = jb.solve(saddle(lambda p, y, d: WRONG.T @ y), 1.0, A, tol=1e-6)[1]
    assert info.status == Status.ADJOINT
    with pytest.raises(jb.ConvergenceError, match="ADJOINT.*not the transpose"):
        jb.check(info)
    hg = jb.piggyback.Oracle(saddle(lambda p, y, d: WRONG.T @ y), lambda p, x, d: jnp.sum(x[0] ** 2))(1.0, A[None])
    assert hg.status == Status.ADJOINT and np.isnan(hg.value)


def test_a_transpose_that_is_said_to_be_rough():
    rough = saddle(lambda p, y, d: WRONG.T @ y, exact_adjoint=False)
    _, info = jb.solve(rough, 1.0, A, tol=1e-6)
    assert info.status == Status.CONVERGED and np.isinf(info.error) and "transpose" in rough.lacks()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_transpose_that_is_right(dtype):
    for transpose in (None, lambda p, y, d: K.T.astype(y.dtype) @ y):
        problem = replace(saddle(transpose), linear=lambda p, x, d: K.astype(x.dtype) @ x)
        start = lambda p, d: (jnp.zeros(4, d.dtype), jnp.zeros(6, d.dtype))  # noqa: E731
        info = jb.solve(replace(problem, init=start), dtype(1.0), 1e3 * A.astype(dtype))[1]
        assert info.status <= Status.PRECISION and np.isfinite(info.error)


@pytest.mark.parametrize("make", [from_functions, from_callbacks])
def test_an_operator_with_a_wrong_transpose_is_refused(make):
    with pytest.raises(ValueError, match=r"`transpose` is not the transpose of `forward`.*exact_adjoint=False"):
        make(lambda x: K @ x, lambda y: WRONG.T @ y, (4,), (6,))
    make(lambda x: K @ x, lambda y: K.T @ y, (4,), (6,))
    assert not make(lambda x: K @ x, lambda y: WRONG.T @ y, (4,), (6,), exact_adjoint=False).exact_adjoint


def test_an_operator_that_closes_over_a_traced_value_is_named():
    with pytest.raises(TypeError, match="closes over a traced value"):
        jax.jit(lambda v: from_functions(lambda x: v * x, lambda y: v * y, (4,), (4,))(jnp.ones(4)))(2.0)


@pytest.mark.parametrize("solver", [jb.solvers.AGD(), jb.solvers.NewtonCG()], ids=["AGD", "NewtonCG"])
def test_a_smoothness_that_is_too_small(solver):
    small = replace(QUADRATIC, strong_convexity=0.5, smoothness=10.0)
    status = Status(int(jb.solve(small, (), quadratic(0, 1.0), tol=1e-3, solver=solver)[1].status))
    # without a look at each step, steps that are too long only end at infinity
    assert status is (Status.NONFINITE if isinstance(solver, jb.solvers.AGD) else Status.SMOOTHNESS)
    assert "`smoothness`" in status.message
    right = replace(QUADRATIC, strong_convexity=0.5, smoothness=1000.0)
    assert jb.solve(right, (), quadratic(0, 1.0), tol=1e-3, solver=solver)[1].status == Status.CONVERGED


@pytest.mark.parametrize("name", ["prox_primal", "prox_dual"])
def test_a_map_that_is_no_proximal_one(name):
    wrong = replace(saddle(None), **{name: lambda p, v, step, d: 2.0 * v})
    info = jb.solve(wrong, 1.0, A, tol=1e-3)[1]
    assert info.status == Status.PROX
