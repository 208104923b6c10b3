"""The bridge to tomosipo: a stand-in with its protocol everywhere, the real one where it and a GPU are."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import adjoint_mismatch, from_tomosipo

rng = np.random.default_rng(0)
MATRIX = rng.standard_normal((6, 20)).astype(np.float32)  # from a slice (4, 5) to (3 angles, 2 columns)


class StandIn:
    """(z, y, x) = (2, 4, 5) to (rows, angles, columns) = (2, 3, 2), each slice by a matrix; it cannot be hashed."""

    domain_shape, range_shape = (2, 4, 5), (2, 3, 2)
    __hash__ = None

    def __init__(self, transposed=None):
        self.seen = []
        self.transposed = transposed

    def __eq__(self, other):
        raise AssertionError("compared by value")

    def __call__(self, x):
        assert type(x) is np.ndarray and x.dtype == np.float32 and x.flags.c_contiguous and x.flags.writeable
        self.seen.append(x.shape)
        assert x.shape == self.domain_shape
        return (x.reshape(2, 20) @ MATRIX.T).reshape(2, 3, 2)

    @property
    def T(self):
        back = MATRIX.T if self.transposed is None else self.transposed
        return lambda y: (y.reshape(2, 6) @ back.T).reshape(2, 4, 5)


def test_forward_transpose_and_batches():
    op = StandIn()
    A = from_tomosipo(op)
    x = jnp.asarray(rng.standard_normal((3, 2, 4, 5)))
    expected = (np.asarray(x).reshape(3, 2, 20) @ MATRIX.T).reshape(3, 2, 3, 2)
    np.testing.assert_allclose(jax.jit(jax.vmap(A))(x), expected, rtol=1e-5, atol=1e-5)
    assert op.seen == [(2, 4, 5)] * 3
    slope = jax.grad(lambda x: 0.5 * jnp.sum(A(x) ** 2))(x[0])
    np.testing.assert_allclose(slope, A.T(A(x[0])), rtol=1e-5, atol=1e-5)
    assert not A.exact_adjoint and A == from_tomosipo(op) and hash(A) == hash(from_tomosipo(op))
    assert from_tomosipo(op, exact_adjoint=True).exact_adjoint


def test_mismatch_is_measured():
    assert adjoint_mismatch(from_tomosipo(StandIn())) < 1e-6
    off = MATRIX.T + 0.1 * rng.standard_normal((20, 6)).astype(np.float32)
    expected = np.linalg.norm(off - MATRIX.T, 2) / np.linalg.norm(MATRIX, 2)
    assert adjoint_mismatch(from_tomosipo(StandIn(off))) == pytest.approx(expected, rel=1e-4)


def test_what_is_no_tomosipo_operator():
    with pytest.raises(TypeError, match="has no T, domain_shape, range_shape"):
        from_tomosipo(lambda x: x)


def test_without_a_gpu_it_is_refused_before_it_can_end_the_process(monkeypatch):
    astra = pytest.importorskip("astra")
    monkeypatch.setattr(astra, "use_cuda", lambda: False)
    monkeypatch.setattr(StandIn, "__module__", "tomosipo.Operator")
    op = StandIn()
    with pytest.raises(RuntimeError, match="needs a GPU"):
        from_tomosipo(op)
    assert op.seen == []


@pytest.mark.gpu
@pytest.mark.skipif(not importlib.util.find_spec("tomosipo"), reason="needs tomosipo")
def test_the_real_one():
    ts = pytest.importorskip("tomosipo")
    volume = ts.volume(shape=(1, 32, 32))
    A = from_tomosipo(ts.operator(volume, ts.parallel(angles=16, shape=(1, 47))))
    x = jnp.asarray(rng.standard_normal((2, 1, 32, 32)), jnp.float32)
    assert jax.vmap(A)(x).shape == (2, 1, 16, 47)
    assert adjoint_mismatch(A) < 0.5
