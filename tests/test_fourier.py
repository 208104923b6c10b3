"""Undersampled Fourier transforms: conventions, closed forms of adjoint and norm, masks, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import UndersampledFourier, cartesian_mask, dot_test

rng = np.random.default_rng(0)
SHAPE = (6, 5)
MASK = rng.random(SHAPE) < 0.5
COILS = rng.standard_normal((3, *SHAPE)) + 1j * rng.standard_normal((3, *SHAPE))


def centred_matrix(n):
    """exp(-2 pi i k j / n) / sqrt(n) with k and j counted from the centre n // 2."""
    index = np.arange(n) - n // 2
    return np.exp(-2j * np.pi * np.outer(index, index) / n) / np.sqrt(n)


def transform(x):
    return centred_matrix(SHAPE[0]) @ x @ centred_matrix(SHAPE[1]).T


def largest_singular_value(A):
    """Over real images a complex operator is a real one with real and imaginary parts as rows."""
    columns = np.asarray(A(jnp.eye(30).reshape(-1, *SHAPE))).reshape(30, -1)
    return np.linalg.norm(np.hstack([columns.real, columns.imag]) if A.in_kind == "real" else columns, 2)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_is_the_centred_orthonormal_transform(kind):
    x = rng.standard_normal(SHAPE) + (1j * rng.standard_normal(SHAPE) if kind == "complex" else 0)
    plain = UndersampledFourier(SHAPE, MASK, in_kind=kind)
    np.testing.assert_allclose(plain(jnp.asarray(x)), MASK * transform(x), atol=1e-14)
    A = UndersampledFourier(SHAPE, MASK, coils=COILS, in_kind=kind)
    expected = np.stack([MASK * transform(s * x) for s in COILS])
    np.testing.assert_allclose(A(jnp.asarray(x)), expected, atol=1e-13)
    y = rng.standard_normal(A.out_shape) + 1j * rng.standard_normal(A.out_shape)
    inverse = [centred_matrix(6).conj() @ (MASK * v) @ centred_matrix(5).conj() for v in y]
    adjoint = sum(np.conj(s) * v for s, v in zip(COILS, inverse, strict=True))
    np.testing.assert_allclose(A.H(jnp.asarray(y)), adjoint.real if kind == "real" else adjoint, atol=1e-13)
    assert max(dot_test(A)) < 1e-13 and max(dot_test(plain)) < 1e-13


def test_a_constant_image_has_only_the_central_frequency():
    y = UndersampledFourier(SHAPE, np.ones(SHAPE))(jnp.ones(SHAPE))
    assert float(jnp.abs(y[3, 2])) == pytest.approx(np.sqrt(30))
    assert float(jnp.sum(jnp.abs(y) ** 2)) == pytest.approx(30)


@pytest.mark.slow
def test_norms():
    lone = np.zeros(SHAPE)
    lone[4, 3] = 1  # without its mirror image
    for mask in (lone, MASK, np.ones(SHAPE), np.roll(lone, (-1, -1), (0, 1))):
        for kind in ("real", "complex"):
            A = UndersampledFourier(SHAPE, mask, in_kind=kind)
            assert A.norm() == pytest.approx(largest_singular_value(A))
    assert UndersampledFourier(SHAPE, lone).norm() == pytest.approx(np.sqrt(0.5))
    full = UndersampledFourier(SHAPE, np.ones(SHAPE), coils=COILS, in_kind="complex")
    assert full.norm() == pytest.approx(np.sqrt(np.max(np.sum(np.abs(COILS) ** 2, axis=0))))
    for coils in (COILS, COILS.real):
        for mask in (lone, MASK, np.ones(SHAPE)):
            for kind in ("real", "complex"):
                A = UndersampledFourier(SHAPE, mask, coils=coils, in_kind=kind)
                assert largest_singular_value(A) <= A.norm() * (1 + 1e-12)


def test_single_precision():
    A = UndersampledFourier(SHAPE, MASK, coils=COILS)
    out = jax.jit(A)(jnp.ones(SHAPE, jnp.float32))
    assert out.dtype == jnp.complex64 and A.H(out).dtype == jnp.float32


def test_compare_by_content():
    A = UndersampledFourier(SHAPE, MASK, coils=COILS)
    assert A == UndersampledFourier(SHAPE, MASK.astype(int), coils=COILS.copy())
    assert hash(A) == hash(UndersampledFourier(SHAPE, MASK, coils=COILS.copy()))
    assert A != UndersampledFourier(SHAPE, MASK, coils=COILS + 1e-12) and A != UndersampledFourier(
        SHAPE, ~MASK, coils=COILS
    )


def test_cartesian_mask():
    mask = cartesian_mask((6, 50), 5.0, 0.08, np.random.default_rng(0))
    assert mask.shape == (6, 50) and np.all(mask == mask[0]) and mask[0].sum() == 10
    assert np.all(mask[:, 23:27])
    assert not np.array_equal(mask, cartesian_mask((6, 50), 5.0, 0.08, np.random.default_rng(1)))
    assert np.all(cartesian_mask((6, 50), 1.0, 0.0, np.random.default_rng(0)))
    odd = cartesian_mask((1, 5), 5.0, 0.2, np.random.default_rng(0))
    assert odd.tolist() == [[False, False, True, False, False]]  # the zero frequency


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: UndersampledFourier(SHAPE, MASK.T), ValueError, "`mask` must have the shape"),
        (lambda: UndersampledFourier(SHAPE, np.zeros(SHAPE)), ValueError, "`mask` keeps nothing"),
        (lambda: UndersampledFourier(SHAPE, MASK, coils=COILS[0]), ValueError, r"`coils` must have shape \(C, 6, 5\)"),
        (lambda: UndersampledFourier(SHAPE, MASK, coils=COILS * np.nan), ValueError, "`coils` must be finite"),
        (lambda: UndersampledFourier(SHAPE, MASK, coils=COILS[:0]), ValueError, "`coils` must be finite and not empty"),
        (lambda: UndersampledFourier(SHAPE, MASK, in_kind="quaternion"), ValueError, "`in_kind`"),
        (lambda: UndersampledFourier((6, 5, 2), MASK), ValueError, "`in_shape`"),
        (lambda: UndersampledFourier(SHAPE, MASK)(1j * jnp.ones(SHAPE)), TypeError, "real and imaginary"),
        (lambda: UndersampledFourier(SHAPE, MASK)(jnp.ones((5, 6))), ValueError, r"shape \(6, 5\)"),
        (lambda: cartesian_mask((6, 50), 0.5, 0.0, rng), ValueError, "`acceleration`"),
        (lambda: cartesian_mask((6, 50), 200.0, 0.0, rng), ValueError, "leaves none"),
        (lambda: cartesian_mask((6, 50), 5.0, 0.5, rng), ValueError, "`centre_fraction`.*more than the 10"),
        (lambda: cartesian_mask((6, 50), 5.0, -0.1, rng), ValueError, "`centre_fraction`"),
        (lambda: cartesian_mask((50,), 5.0, 0.1, rng), ValueError, "`shape`"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
