"""Mask and down-sampling: closed forms and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import DownSample, Mask

rng = np.random.default_rng(0)


def test_mask_is_an_orthogonal_projection():
    mask = rng.random((6, 5)) < 0.4
    A, x = Mask(mask), jnp.asarray(rng.standard_normal((2, 6, 5)))
    np.testing.assert_array_equal(A(x), np.where(mask, x, 0))
    np.testing.assert_array_equal(A.T(A(x)), A(x))
    assert A == Mask(mask.astype(int)) and A != Mask(~mask) and A.norm() == 1.0
    np.testing.assert_array_equal(A(x.at[0].set(jnp.where(mask, x[0], jnp.nan))), A(x))  # what is masked has no say


def test_complex_mask():
    A = Mask([True, False], "complex")
    assert A(jnp.array([1 + 2j, 3.0])).tolist() == [1 + 2j, 0]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_average(factor):
    A, x = DownSample((6, 12), factor), rng.standard_normal((3, 6, 12))
    h, w = A.out_shape
    expected = [[x[:, factor * i : factor * (i + 1), factor * j : factor * (j + 1)].mean((1, 2)) for j in range(w)]
                for i in range(h)]  # fmt: skip
    np.testing.assert_allclose(A(jnp.asarray(x)), np.moveaxis(np.array(expected), 2, 0), atol=1e-15)
    y = jnp.asarray(rng.standard_normal((h, w)))
    np.testing.assert_allclose(A(A.T(y)), y / factor**2, atol=1e-15)
    assert A.norm() == pytest.approx(1 / factor)


def test_subsampling():
    A, x = DownSample((6, 12), 3, "subsampling"), jnp.asarray(rng.standard_normal((6, 12)))
    np.testing.assert_array_equal(A(x), x[::3, ::3])
    np.testing.assert_array_equal(A(A.T(x[:2, :4])), x[:2, :4])
    assert A.norm() == 1.0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Mask(np.zeros((3, 3))), "keeps nothing"),
        (lambda: Mask(np.zeros((0, 3))), "keeps nothing"),
        (lambda: Mask([0.0, 0.5]), "zeros and ones"),
        (lambda: Mask([0.0, np.nan]), "zeros and ones"),
        (lambda: Mask([True], "quaternion"), "`in_kind`"),
        (lambda: Mask(np.ones((3, 3)))(jnp.ones((3, 4))), r"shape \(3, 3\)"),
        (lambda: DownSample((6, 7), 2), "does not divide"),
        (lambda: DownSample((6, 6), 0), "`factor`"),
        (lambda: DownSample((6, 6), 1.5), "`factor`"),
        (lambda: DownSample((6, 6, 3), 2), "`in_shape`"),
        (lambda: DownSample((6, 6), 2, "bicubic"), "`antialiasing`"),
    ],
)
def test_bad_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()
