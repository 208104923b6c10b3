"""Blur: convolution against SciPy for every boundary, norms, Gaussian kernels, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, signal

from jbilevel.operators import Blur, dot_test, gaussian_blur

rng = np.random.default_rng(0)
KERNELS = [rng.standard_normal(shape) for shape in ((3, 5), (1, 1), (4, 2), (7, 6))]
IMAGE = rng.standard_normal((7, 11))


def direct(x, kernel, boundary):
    """The sum of the docstring, term by term, on an extended image."""
    (h, w), (rows, columns) = kernel.shape, x.shape
    mode = {"periodic": "wrap", "symmetric": "symmetric", "zero": "constant"}[boundary]
    padded = np.pad(x, ((h, h), (w, w)), mode=mode)
    i, j = h + h // 2, w + w // 2
    parts = [
        kernel[k, m] * padded[i - k : i - k + rows, j - m : j - m + columns] for k in range(h) for m in range(w)
    ]  # fmt: skip
    return sum(parts)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: str(k.shape))
@pytest.mark.parametrize("boundary", ["periodic", "symmetric", "zero"])
def test_is_the_sum_of_its_definition(boundary, kernel):
    A = Blur(IMAGE.shape, kernel, boundary)
    np.testing.assert_allclose(A(jnp.asarray(IMAGE)), direct(IMAGE, kernel, boundary), atol=1e-13)
    assert max(dot_test(A)) < 1e-13


def test_equals_scipy():
    kernel = KERNELS[0]
    for boundary, mode in (("periodic", "wrap"), ("symmetric", "reflect"), ("zero", "constant")):
        expected = ndimage.convolve(IMAGE, kernel, mode=mode)
        np.testing.assert_allclose(Blur(IMAGE.shape, kernel, boundary)(jnp.asarray(IMAGE)), expected, atol=1e-13)
    for kernel in KERNELS:
        A = Blur(IMAGE.shape, kernel, "valid")
        np.testing.assert_allclose(A(jnp.asarray(IMAGE)), signal.convolve2d(IMAGE, kernel, "valid"), atol=1e-13)
        assert max(dot_test(A)) < 1e-13


def test_float32_is_as_accurate_as_float32():
    x = jnp.asarray(IMAGE, jnp.float32)
    out = jax.jit(Blur(IMAGE.shape, KERNELS[0], "symmetric"))(x)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, direct(IMAGE, KERNELS[0], "symmetric"), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ["periodic", "symmetric", "zero", "valid"])
def test_norm(boundary):
    for kernel in (KERNELS[0], np.abs(KERNELS[2])):
        A = Blur(IMAGE.shape, kernel, boundary)
        columns = np.asarray(A(jnp.eye(IMAGE.size).reshape(-1, *IMAGE.shape))).reshape(IMAGE.size, -1)
        exact = np.linalg.norm(columns, 2)
        assert exact * (1 - 1e-10) <= A.norm() <= exact * (1 + 2e-3)
        assert A.norm_is_bound == (boundary == "periodic" or np.all(kernel >= 0))


def test_gaussian_blur():
    A = gaussian_blur((40, 40), 2.0)
    kernel = A.kernel.array
    assert kernel.shape == (13, 13) and kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel[6, 8] / kernel[6, 6], np.exp(-0.5))
    np.testing.assert_allclose(A(jnp.ones((40, 40))), 1, atol=1e-12)
    x = rng.standard_normal((40, 40))
    expected = ndimage.gaussian_filter(x, 2.0, truncate=3.0, mode="reflect")
    np.testing.assert_allclose(A(jnp.asarray(x)), expected, atol=1e-13)
    assert A.norm() == pytest.approx(1, rel=1e-3)


def test_kernels_compare_by_content():
    kernel = KERNELS[0]
    assert Blur((7, 11), kernel) == Blur((7, 11), kernel.tolist())
    assert hash(Blur((7, 11), kernel)) == hash(Blur((7, 11), kernel.copy()))
    assert Blur((7, 11), kernel) != Blur((7, 11), kernel + 1e-12)
    assert repr(Blur((7, 11), kernel)) == "Blur((7, 11), float64[3,5])"


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: Blur((4, 4), np.ones((5, 3))), ValueError, "`kernel` .* larger than the image"),
        (lambda: Blur((4, 4), np.ones(3)), ValueError, "two-dimensional"),
        (lambda: Blur((4, 4), np.full((3, 3), np.nan)), ValueError, "`kernel` must be finite"),
        (lambda: Blur((4, 4), np.zeros((0, 3))), ValueError, "`kernel` must be finite and not empty"),
        (lambda: Blur((4, 4), 1j * np.ones((3, 3))), TypeError, "`kernel`"),
        (lambda: Blur((4, 4), [["a"]]), TypeError, "`kernel`"),
        (lambda: Blur((4, 4, 3), np.ones((3, 3))), ValueError, "two-dimensional"),
        (lambda: Blur((4, 4), np.ones((3, 3)), "mirror"), ValueError, "`boundary`"),
        (lambda: gaussian_blur((32, 32), 0.0), ValueError, "`sigma`"),
        (lambda: gaussian_blur((32, 32), 8.0), ValueError, "larger than the image"),
        (lambda: gaussian_blur((32, 32), 1.0, truncate=-1), ValueError, "`truncate`"),
        (lambda: gaussian_blur((8, 8), 1.0)(jnp.ones((8, 9))), ValueError, r"shape \(8, 8\)"),
        (lambda: gaussian_blur((8, 8), 1.0)(1j * jnp.ones((8, 8))), TypeError, "real and imaginary"),
    ],
)
def test_bad_input(make, error, words):
    with pytest.raises(error, match=words):
        make()
