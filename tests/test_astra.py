"""ASTRA: agreement with the embedded X-ray transform, transposes, threads, and what is refused without a GPU."""

import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel.operators import Astra, ParallelBeam, dot_test

rng = np.random.default_rng(0)
ANGLES = tuple(np.linspace(0, np.pi, 20, endpoint=False) + 0.013)
GEOMETRY = dict(in_shape=(24, 31), angles=ANGLES, n_detectors=45)
OTHER_UNITS = dict(pixel_size=0.7, detector_size=0.9, detector_offset=2.1)

# an environment without ASTRA still runs the test of the error
needs_astra = pytest.mark.skipif("not __import__('importlib').util.find_spec('astra')", reason="needs astra-toolbox")


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@needs_astra
@pytest.mark.parametrize("units", [{}, OTHER_UNITS], ids=["pixels", "other units"])
def test_linear_is_the_embedded_projector(units):
    A, own = Astra(**GEOMETRY, **units, device="cpu"), ParallelBeam(**GEOMETRY, **units)
    x = jnp.asarray(rng.standard_normal((2, *A.in_shape)))
    y = jnp.asarray(rng.standard_normal(A.out_shape))
    assert A.out_shape == own.out_shape and A.exact_adjoint
    assert distance(A(x), own(x)) < 2e-4
    assert distance(A.T(y), own.T(y)) < 2e-4
    assert A.norm() == pytest.approx(own.norm(), rel=1e-4)


@needs_astra
@pytest.mark.parametrize("kernel", ["linear", "line", "strip"])
def test_kernels_on_the_cpu_have_exact_transposes(kernel):
    A = Astra(**GEOMETRY, **OTHER_UNITS, kernel=kernel, device="cpu")
    assert dot_test(A).adjoint < 1e-7
    assert A.mismatch(8) < 1e-6
    disc = jnp.hypot(*jnp.meshgrid(jnp.arange(24) - 11.5, jnp.arange(31) - 15.0, indexing="ij")) < 10
    same = ParallelBeam(**GEOMETRY, **OTHER_UNITS)(disc.astype(float))
    assert distance(A(disc.astype(float)), same) < 0.05  # different models of a pixel, same units


@pytest.mark.slow
@needs_astra
def test_hypergradients_through_both_agree():
    A, own = Astra(**GEOMETRY, device="cpu"), ParallelBeam(**GEOMETRY)
    y = own(jnp.asarray(rng.standard_normal(A.in_shape)))

    def slope(A):
        """d/dt of sum (x(t) - 1)^2 for the Tikhonov solution x(t), with t on the penalty."""

        def upper(t):
            normal = lambda x: A.T(A(x)) + t * x  # noqa: E731
            solve = lambda mv, b: jax.scipy.sparse.linalg.cg(mv, b, tol=1e-9)[0]  # noqa: E731
            return jnp.sum((jax.lax.custom_linear_solve(normal, A.T(y), solve, symmetric=True) - 1) ** 2)

        return float(jax.grad(upper)(30.0))

    assert slope(A) == pytest.approx(slope(own), rel=1e-3)  # the projectors differ by 4e-5


@needs_astra
def test_threads_share_nothing():
    A = Astra(**GEOMETRY, device="cpu")
    xs = jnp.asarray(rng.standard_normal((16, *A.in_shape)))
    expected = np.asarray(A(xs))
    run = jax.jit(A)
    run(xs[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: np.asarray(run(xs[i % 16])), range(64)))
    np.testing.assert_array_equal(found, expected[np.arange(64) % 16])


@needs_astra
def test_nothing_is_left_in_astra(capsys):
    import astra

    def objects():
        astra.data2d.info()
        astra.projector.info()
        return [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]

    before = objects()  # of other tests
    A = Astra(**GEOMETRY, device="cpu")
    jax.block_until_ready(A.T(A(jnp.ones(A.in_shape))))
    assert objects() == before


@needs_astra
@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"kernel": "cubic"}, ValueError, "`kernel`"),
        ({"device": "tpu"}, ValueError, "`device`"),
        ({"device": "cuda", "exact": True}, ValueError, "`exact=True` needs the CPU"),
        ({"angles": ()}, ValueError, "`angles`"),
        ({"pixel_size": -1.0}, ValueError, "`pixel_size`"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        Astra(**{**GEOMETRY, **options})


@needs_astra
def test_no_gpu(monkeypatch):
    import astra

    monkeypatch.setattr(astra, "use_cuda", lambda: False)
    assert Astra(**GEOMETRY) == Astra(**GEOMETRY, device="cpu")
    with pytest.raises(RuntimeError, match="sees none"):
        Astra(**GEOMETRY, device="cuda")


@needs_astra
def test_a_gpu_is_taken_unless_the_transpose_has_to_be_exact(monkeypatch):
    import astra

    monkeypatch.setattr(astra, "use_cuda", lambda: True)
    A = Astra(**GEOMETRY)
    assert A.device == "cuda" and not A.exact_adjoint and not A.norm_is_bound and not (2.0 * A).exact_adjoint
    assert Astra(**GEOMETRY, exact=True) == Astra(**GEOMETRY, device="cpu")


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "astra", None)
    with pytest.raises(ImportError, match=r"jbilevel\[ct\]"):
        Astra(**GEOMETRY)


@needs_astra
@pytest.mark.gpu
def test_the_gpu_has_another_transpose():
    A, own = Astra(**GEOMETRY, device="cuda"), ParallelBeam(**GEOMETRY)
    x = jnp.asarray(rng.standard_normal(A.in_shape))
    assert distance(A(x), own(x)) < 0.02
    assert 1e-4 < A.mismatch() < 0.5
