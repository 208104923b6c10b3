"""adjoint_mismatch: known norms for JAX and host operators, and that it sees what random products hide."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import Gradient, adjoint_mismatch, dot_test, from_callbacks, from_functions

rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((30, 20))
ROUGH = MATRIX + 0.1 * np.outer(rng.standard_normal(30), rng.standard_normal(20)) / 5
EXPECTED = np.linalg.norm(ROUGH - MATRIX, 2) / np.linalg.norm(MATRIX, 2)


def in_jax(back):
    return from_functions(
        lambda x: jnp.asarray(MATRIX) @ x, lambda y: jnp.asarray(back).T @ y, (20,), (30,), exact_adjoint=False
    )


def on_host(back):
    return from_callbacks(lambda x: MATRIX @ x, lambda y: back.T @ y, (20,), (30,), dtype="float64")


@pytest.mark.slow
@pytest.mark.parametrize("make", [in_jax, on_host])
def test_the_norm_of_the_difference(make):
    assert adjoint_mismatch(make(ROUGH), jax.random.key(1), tol=1e-4) == pytest.approx(EXPECTED, rel=2e-4)
    assert adjoint_mismatch(make(MATRIX)) < 1e-7
    assert adjoint_mismatch(make(ROUGH).T, tol=1e-4) == pytest.approx(EXPECTED, rel=2e-4)


def test_exact_operators_match():
    assert adjoint_mismatch(Gradient((4, 5))) < 1e-14


def test_random_products_hide_what_the_norm_shows():
    n = 400
    bump = jnp.ones(n) / np.sqrt(n)
    A = from_functions(lambda x: x, lambda y: y + 0.1 * bump * jnp.vdot(bump, y), (n,), (n,), exact_adjoint=False)
    assert adjoint_mismatch(A) == pytest.approx(0.1, rel=1e-2)
    assert dot_test(A).adjoint < 0.02


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: from_functions(lambda x: x, None, (3,), (3,), in_kind="complex"), "real operators"),
        (lambda: from_callbacks(np.sin, np.sin, (6000,), (6000,), exact_adjoint=False), "small geometry"),
        (lambda: in_jax(MATRIX) - in_jax(MATRIX), "zero"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        adjoint_mismatch(make())
