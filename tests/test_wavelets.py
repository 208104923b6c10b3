"""Wavelets: filters against closed forms, orthogonality, vanishing moments, layout."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import Wavelet
from jbilevel.operators.wavelets import daubechies

rng = np.random.default_rng(0)
# Daubechies 1992, table 6.1
DB4 = (0.2303778133088964, 0.7148465705529154, 0.6308807679298587, -0.0279837694168599,
       -0.1870348117190931, 0.0308413818355607, 0.0328830116668852, -0.0105974017850690)  # fmt: skip


def closed_form(N):
    if N == 1:
        return np.ones(2) / math.sqrt(2)
    if N == 2:
        s = math.sqrt(3)
        return np.array([1 + s, 3 + s, 3 - s, 1 - s]) / (4 * math.sqrt(2))
    if N == 3:
        s, t = math.sqrt(10), math.sqrt(5 + 2 * math.sqrt(10))
        taps = [1 + s + t, 5 + s + 3 * t, 10 - 2 * s + 2 * t, 10 - 2 * s - 2 * t, 5 + s - 3 * t, 1 + s - t]
        return np.array(taps) / (16 * math.sqrt(2))
    return np.array(DB4)


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_filters(N):
    h = daubechies(N)
    np.testing.assert_allclose(h, closed_form(N), atol=1e-12)
    for shift in range(N):
        product = float(np.dot(h[2 * shift :], h[: len(h) - 2 * shift]))
        assert product == pytest.approx(1.0 if shift == 0 else 0.0, abs=1e-13)
    g = h[::-1] * (-1.0) ** np.arange(2 * N)
    for power in range(N):
        assert abs(np.dot(g, np.arange(2 * N, dtype=float) ** power)) < 1e-9


@pytest.mark.parametrize(
    "name, shape, levels",
    [("haar", (4, 2, 6), 1), ("db2", (16,), 3), ("db3", (2,), 1), ("db3", (4, 12), 2), ("db4", (8, 8), 3)],
)
def test_the_transpose_is_the_inverse(name, shape, levels):
    W = Wavelet(shape, name, levels)
    x = rng.standard_normal((2, *shape))
    y = W(jnp.asarray(x))
    np.testing.assert_allclose(W.T(y), x, atol=1e-13)
    np.testing.assert_allclose(W(W.T(jnp.asarray(x))), x, atol=1e-13)
    assert float(jnp.linalg.norm(y)) == pytest.approx(np.linalg.norm(x))
    assert W.norm() == 1.0


def test_one_level_is_the_sum_of_its_definition():
    x, h = rng.standard_normal(8), daubechies(2)
    low = [sum(h[k] * x[(2 * i + k) % 8] for k in range(4)) for i in range(4)]
    g = [h[3], -h[2], h[1], -h[0]]
    high = [sum(g[k] * x[(2 * i + k) % 8] for k in range(4)) for i in range(4)]
    np.testing.assert_allclose(Wavelet((8,), "db2")(jnp.asarray(x)), low + high, atol=1e-14)


def test_layout():
    """Level l of the details lies where the docstring says, and the corner holds the next level."""
    x = jnp.asarray(rng.standard_normal((8, 16)))
    one, two = Wavelet((8, 16), "db2", 1)(x), Wavelet((8, 16), "db2", 2)(x)
    np.testing.assert_allclose(two[4:], one[4:])
    np.testing.assert_allclose(two[:, 8:], one[:, 8:])
    np.testing.assert_allclose(two[:4, :8], Wavelet((4, 8), "db2", 1)(one[:4, :8]), atol=1e-14)
    stripes = jnp.broadcast_to(jnp.array([1.0, -1.0] * 8), (8, 16))  # high along the second axis only
    y = np.asarray(Wavelet((8, 16), "haar", 1)(stripes))
    assert np.all(np.abs(y[:4, 8:]) > 0.5) and np.abs(y[4:]).max() < 1e-14 and np.abs(y[:, :8]).max() < 1e-14


@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_polynomials_have_no_details_away_from_the_border(N):
    x = (np.arange(32) / 32.0) ** (N - 1)
    details = np.asarray(Wavelet((32,), f"db{N}")(jnp.asarray(x)))[16:]
    assert np.abs(details[: 16 - N]).max() < 1e-12
    if N > 1:
        assert np.abs(details[-1]) > 1e-3  # where the signal starts again


@pytest.mark.parametrize(
    "arguments, words",
    [
        (((8, 7), "db2"), "crop or pad"),
        (((8, 12), "db2", 3), "fewer levels"),
        (((8, 8), "sym4"), "`name`"),
        (((8, 8), "db2", 0), "`levels`"),
        (((8, 8), "db2", 1.5), "`levels`"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        Wavelet(*arguments)
