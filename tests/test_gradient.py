"""Gradient: closed forms of values and norms, boundaries, axes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import Gradient, forward_difference

rng = np.random.default_rng(0)


def dense(D):
    units = np.eye(int(np.prod(D.in_shape))).reshape(-1, *D.in_shape)
    return np.asarray(D(jnp.asarray(units))).reshape(len(units), -1).T


@pytest.mark.parametrize(
    "boundary, end", [("neumann", lambda x, a: x.take([-1], a)), ("periodic", lambda x, a: x.take([0], a))]
)
def test_equals_numpy(boundary, end):
    x = rng.standard_normal((3, 5, 4, 2))
    D = Gradient((5, 4, 2), boundary, axes=(0, -1))
    expected = [np.diff(x, axis=a, append=end(x, a)) for a in (1, 3)]
    np.testing.assert_array_equal(D(jnp.asarray(x)), np.stack(expected, axis=1))
    assert D.out_shape == (2, 5, 4, 2) and D == Gradient((5, 4, 2), boundary, axes=(0, 2))


def test_agrees_with_the_difference_of_total_variation():
    x = jnp.asarray(rng.standard_normal((5, 4)))
    np.testing.assert_array_equal(Gradient((5, 4))(x), [forward_difference(x, axis) for axis in (0, 1)])


@pytest.mark.parametrize("boundary", ["neumann", "periodic"])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (1, 6), (5, 4), (3, 5), (4, 2, 3)])
def test_norm_is_exact(boundary, shape):
    D = Gradient(shape, boundary)
    assert D.norm() == pytest.approx(np.linalg.norm(dense(D), 2), abs=1e-12)
    assert D.norm() <= np.sqrt(4 * len(shape))


def test_gradient_of_constants_and_divergence_of_fields_vanish():
    for boundary in ("neumann", "periodic"):
        D = Gradient((6, 5), boundary)
        assert not np.any(D(jnp.full((6, 5), 3.0)))
        assert abs(float(jnp.sum(D.T(jnp.asarray(rng.standard_normal(D.out_shape)))))) < 1e-13


@pytest.mark.parametrize(
    "arguments, words",
    [
        (((5, 4), "mirror"), "`boundary`"),
        (((5, 4), "neumann", (2,)), "`axes`"),
        (((5, 4), "neumann", ()), "`axes`"),
        (((5, 4), "neumann", (0, -2)), "different"),
        (((5, 0),), "`in_shape`"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match=words):
        Gradient(*arguments)
