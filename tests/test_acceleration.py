"""Accelerated iterations: linear systems against dense solves, distances against true ones, and no worse than plain."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel._oracle import acceleration

N = 30


def linear(least: float, dtype):
    """v -> v - A v + b with singular values of A between ``least`` and 1, and its fixed point."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.standard_normal((N, N)))[0] for _ in range(2))
    # far from normal, and its symmetric part is positive definite
    A = left @ np.diag(np.geomspace(least, 1.0, N)) @ left.T + 0.3 * (right - right.T)
    b = rng.standard_normal(N)
    return lambda v: v - jnp.asarray(A, dtype) @ v + jnp.asarray(b, dtype), np.linalg.solve(A, b), A


def accelerated(step, start, steps, memory, tol=0.0):
    return acceleration.resume(step, acceleration.begin(step, start, memory), tol, steps)


@pytest.mark.parametrize("dtype, accuracy", [("float64", 1e-10), ("float32", 2e-4)])
def test_as_many_steps_as_unknowns_solve_a_linear_system(dtype, accuracy):
    step, exact, _ = linear(0.05, dtype)
    found = accelerated(step, jnp.zeros(N, dtype), N + 2, N + 2)
    assert found.best.dtype == dtype
    np.testing.assert_allclose(found.best, exact, atol=accuracy * np.linalg.norm(exact))


def test_what_is_remembered_describes_the_map():
    step, exact, A = linear(0.05, "float64")
    found = accelerated(step, jnp.zeros(N), 12, 6)
    images, directions = np.asarray(found.images), np.asarray(found.directions)
    np.testing.assert_allclose(images @ images.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(images, -directions @ A.T, atol=1e-10)  # residual = step - 1 = b - A v
    assert np.linalg.norm(directions, 2) <= found.inverse
    inverse = 1 / np.linalg.svd(A, compute_uv=False)[-1]
    assert np.linalg.norm(directions, 2) <= inverse * (1 + 1e-10)
    true = np.linalg.norm(found.best - exact)
    assert 0.5 * true <= found.distance <= 10 * true


def test_resuming_is_the_same_as_going_on():
    step, _, _ = linear(0.1, "float64")
    first = acceleration.begin(step, jnp.ones(N), 8)
    at_once = acceleration.resume(step, first, 0.0, 15)
    in_parts = acceleration.resume(step, acceleration.resume(step, first, 0.0, 7), 0.0, 15)
    assert all(np.array_equal(a, b) for a, b in zip(at_once, in_parts, strict=True))
    early = acceleration.resume(step, first, 0.1 * first.size, 15)
    assert int(early.steps) < 15 and early.size <= 0.1 * first.size


def test_residuals_never_grow_where_kinks_mislead():
    """Plain iterations take over: the residual at what was best is what is reported."""

    @jax.jit
    def sizes(A, b, kinks, start):
        def step(v):
            misfit = A @ v - b
            return jnp.clip(v - 0.1 * A.T @ (jnp.where(misfit > kinks, 1.0, 0.01) * misfit), -0.3, 0.3)

        def advance(state, steps):
            following = acceleration.resume(step, state, 0.0, steps)
            return following, (following.size, jnp.linalg.norm(step(following.best) - following.best))

        first = acceleration.begin(step, start, 4)
        return first.size, jax.lax.scan(advance, first, jnp.arange(1, 30))[1]

    rng = np.random.default_rng(0)
    for _ in range(20):
        first, (told, true) = sizes(
            rng.standard_normal((N, N)) / 8, 3 * rng.standard_normal(N), rng.uniform(-3, 3, N), rng.standard_normal(N)
        )
        np.testing.assert_allclose(told, true, rtol=1e-8, atol=1e-13)
        assert np.all(np.diff(np.append(first, told)) <= 0)


def test_at_the_fixed_point_nothing_happens():
    found = accelerated(lambda v: v, jnp.ones(3), 5, 3)
    assert found.size == 0 and int(found.steps) == 0 and found.distance == 0
    assert not jax.tree.reduce(lambda bad, leaf: bad | bool(jnp.any(jnp.isnan(leaf))), found, False)
