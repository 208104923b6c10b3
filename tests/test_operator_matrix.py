"""What every linear operator has to do: one line in `OPERATORS` admits a new one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jbilevel.operators import (
    Astra,
    Blur,
    ConeBeam,
    DownSample,
    FanBeam,
    Gradient,
    LinearOperator,
    Mask,
    ParallelBeam,
    ParallelBeam3D,
    UndersampledFourier,
    Wavelet,
    dot_test,
    forward_difference,
    from_callbacks,
    from_functions,
)
from jbilevel.operators.cone import FDK
from jbilevel.operators.fbp import FBP

ANGLES = (0.2, 1.4, 2.8)
KEPT = ((1, 0, 0), (1, 0, 1), (0, 0, 0), (0, 0, 1))
COILS = np.exp(0.1j * np.arange(24)).reshape(2, 4, 3) * np.arange(1.0, 25).reshape(2, 4, 3) / 9
SKEW = ((0.1, 0.7), (-0.4, 0.2), (0.3, -0.1))  # a kernel without any symmetry
TURN = (0.0, 1.5, 3.0, 4.5)


class Entry(NamedTuple):
    make: Callable[[], Any]  # a new operator at each call: equal geometry has to make equal operators
    in_shape: tuple
    tolerance: float = 1e-13  # of adjointness in double precision; looser for external codes that compute in single


def vertical_difference(x):
    return forward_difference(x, 0)


def horizontal_difference(x):
    return forward_difference(x, 1)


def double_cumsum(x):
    return 2 * jnp.cumsum(x, axis=0)


def unitary_fft(x):
    return jnp.fft.fft(x, norm="ortho")


def first_frequencies(x):
    return jnp.fft.rfft(x)[:, :2]


def host_sum(x):
    return np.concatenate([x, x.sum(axis=-1, keepdims=True)], axis=-1)


def host_sum_transposed(y):
    return y[..., :-1] + y[..., -1:]


def parallel():
    return ParallelBeam((3, 2), ANGLES, 4)


def astra():
    pytest.importorskip("astra")
    return Astra((3, 2), ANGLES, 4, device="cpu")


def cumsum():
    return from_functions(double_cumsum, None, (5, 4), (5, 4))


def host(**options):
    return from_callbacks(host_sum, host_sum_transposed, (5, 4), (5, 5), **options)


# A `LinearOperator`, or a plain linear function, of which only linearity and derivatives are tested.
OPERATORS = {
    "forward difference, axis 0": Entry(lambda: vertical_difference, (5, 4)),
    "forward difference, axis 1": Entry(lambda: horizontal_difference, (5, 4)),
    "gradient, periodic, some axes": Entry(lambda: Gradient((5, 4, 2), "periodic", (-2, 0)), (5, 4, 2)),
    "blur, periodic": Entry(lambda: Blur((5, 4), SKEW), (5, 4)),
    "blur, symmetric": Entry(lambda: Blur((5, 4), SKEW, "symmetric"), (5, 4)),
    "mask": Entry(lambda: Mask([[1, 0, 1], [0, 1, 1]]), (2, 3)),
    "down-sampling, average": Entry(lambda: DownSample((4, 6), 2), (4, 6)),
    "fourier, real image": Entry(lambda: UndersampledFourier((4, 3), KEPT), (4, 3)),
    "fourier, coils": Entry(
        lambda: UndersampledFourier((4, 3), np.ones((4, 3)), coils=COILS, in_kind="complex"), (4, 3)
    ),
    "wavelet": Entry(lambda: Wavelet((4, 8), "db3", 2), (4, 8)),
    "function": Entry(cumsum, (5, 4)),
    "complex function": Entry(lambda: from_functions(unitary_fft, None, (5, 4), (5, 4), in_kind="complex"), (5, 4)),
    "real to complex": Entry(
        lambda: from_functions(first_frequencies, None, (5, 4), (5, 2), out_kind="complex"), (5, 4)
    ),
    "callback, batch": Entry(lambda: host(dtype="float64", batched=True), (5, 4)),
    "callback, single": Entry(host, (5, 4), 1e-7),
    "combination": Entry(lambda: 2.0 * (cumsum() @ cumsum().T) - cumsum(), (5, 4), 1e-12),
    "transpose": Entry(lambda: parallel().T, (3, 4)),
    "batched": Entry(lambda: cumsum().batched(2), (2, 5, 4)),
    "parallel beam": Entry(parallel, (3, 2)),
    "astra": Entry(astra, (3, 2), 1e-6),
    "parallel beam, subset": Entry(lambda: parallel().subset(1, 2), (3, 2)),
    "filtered backprojection": Entry(lambda: FBP(parallel(), "hann"), (3, 4)),
}
# kernels that take long to compile, and variants of what is above: left to the slow tests
SLOW = {
    "gradient": Entry(lambda: Gradient((5, 4)), (5, 4)),
    "blur, zero": Entry(lambda: Blur((5, 4), np.abs(SKEW), "zero"), (5, 4)),
    "blur, valid": Entry(lambda: Blur((5, 4), SKEW, "valid"), (5, 4)),
    "mask, complex": Entry(lambda: Mask([[1, 0, 1], [0, 1, 1]], "complex"), (2, 3)),
    "down-sampling, subsampling": Entry(lambda: DownSample((4, 6), 2, "subsampling"), (4, 6)),
    "fan beam": Entry(
        lambda: FanBeam((3, 2), ANGLES, 4, source_origin=6.0, origin_detector=2.0, pixel_size=1.0, detector_size=1.6),
        (3, 2),
    ),
    "parallel beam 3D": Entry(lambda: ParallelBeam3D((2, 3, 2), ANGLES[:2], (3, 4)), (2, 3, 2)),
    "cone beam": Entry(
        lambda: ConeBeam(
            (2, 3, 2), ANGLES[:2], (3, 4), source_origin=6.0, origin_detector=2.0, pixel_size=1.0, detector_size=1.6
        ),
        (2, 3, 2),
    ),
    "cone beam reconstruction": Entry(
        lambda: FDK(
            ConeBeam((2, 3, 2), TURN, (2, 3), source_origin=6.0, origin_detector=2.0, pixel_size=1.0, detector_size=2.0)
        ),
        (2, 4, 3),
    ),
}
every_entry = pytest.mark.parametrize(
    "entry",
    [pytest.param(entry, id=name) for name, entry in OPERATORS.items()]
    + [pytest.param(entry, id=name, marks=pytest.mark.slow) for name, entry in SLOW.items()],
)


def draw(shape, dtype=jnp.float64, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * rng.standard_normal(shape)
    return jnp.asarray(values, dtype)


def measured(A, x):
    out = jax.eval_shape(A, x)
    return draw(out.shape, out.dtype, seed=1)


def matrix(A, shape):
    columns = jax.vmap(A)(jnp.eye(int(np.prod(shape))).reshape(-1, *shape))
    return np.asarray(columns).reshape(len(columns), -1).T


def adjoint(A, x, y):
    """A^H y by JAX's transpose: conj(A^T conj(y)), its real part for real x."""
    return jnp.real(jnp.conj(jax.linear_transpose(A, x)(jnp.conj(y))[0]))


@every_entry
def test_contract(entry):
    A = entry.make()
    assert isinstance(A, LinearOperator) or A in (vertical_difference, horizontal_difference)
    assert len(repr(A)) <= 360  # three lines


@every_entry
def test_linear_and_adjoint(entry):
    A = entry.make()
    x, v = draw(entry.in_shape), draw(entry.in_shape, seed=2)
    y = measured(A, x)
    np.testing.assert_allclose(A(2.0 * x - 3.0 * v), 2.0 * A(x) - 3.0 * A(v), atol=1e3 * entry.tolerance)
    size = float(jnp.linalg.norm(A(x)) * jnp.linalg.norm(y))
    left = float(jnp.real(jnp.vdot(y, A(x))))
    assert abs(left - float(jnp.vdot(adjoint(A, x, y), x))) <= entry.tolerance * size
    if isinstance(A, LinearOperator):
        assert tuple(A.in_shape) == entry.in_shape
        assert tuple(A.out_shape) == y.shape
        assert jnp.iscomplexobj(y) == (A.out_kind == "complex")


@every_entry
def test_hand_written_adjoint(entry):
    A = entry.make()
    if not isinstance(A, LinearOperator):
        pytest.skip("a plain function")
    found = dot_test(A)
    assert found.adjoint <= entry.tolerance
    assert found.transpose <= 10 * entry.tolerance or np.isnan(found.transpose)
    x = draw(entry.in_shape, jnp.complex128 if A.in_kind == "complex" else jnp.float64)
    y = measured(A, x)
    np.testing.assert_allclose(A.T(y), jax.linear_transpose(A, x)(y)[0], atol=10 * entry.tolerance)
    np.testing.assert_allclose(A.H(y), jnp.conj(A.T(jnp.conj(y))), atol=10 * entry.tolerance)
    assert A.T.T == A and A.H.H == A


@every_entry
def test_transpose_of_the_dense_matrix(entry):
    A = entry.make()
    if not isinstance(A, LinearOperator):
        pytest.skip("a plain function")
    if "complex" in (A.in_kind, A.out_kind):
        pytest.skip("the columns of a real matrix")
    forward = matrix(A, A.in_shape)
    np.testing.assert_allclose(matrix(A.T, A.out_shape).T, forward, atol=10 * entry.tolerance * np.abs(forward).max())


@every_entry
def test_norm_bound(entry):
    A = entry.make()
    if not isinstance(A, LinearOperator):
        pytest.skip("claims no norm")
    columns = matrix(A, entry.in_shape)
    stacked = np.concatenate([columns.real, columns.imag]) if A.in_kind == "real" else columns
    largest, norm = np.linalg.norm(stacked, 2), A.norm()
    assert largest <= norm * (1 + 1e-6)
    assert norm <= largest * (1 + 2e-3)


@every_entry
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_dtype_and_jit(entry, dtype):
    A, x = entry.make(), draw(entry.in_shape, dtype)
    out = A(x)
    assert jnp.real(out).dtype == dtype
    np.testing.assert_allclose(jax.jit(A)(x), out, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@every_entry
def test_single_precision_session(entry):
    exact = np.asarray(entry.make()(draw(entry.in_shape)))
    with jax.enable_x64(False):
        A, x = entry.make(), draw(entry.in_shape, jnp.float32)
        out = A(x)
        assert jnp.real(out).dtype == jnp.float32
        np.testing.assert_allclose(out, exact, atol=1e-5 * np.abs(exact).max())
        y = draw(out.shape, out.dtype, seed=1)
        gap = jnp.real(jnp.vdot(y, out)) - jnp.vdot(adjoint(A, x, y), x)
        assert abs(gap) <= 1e-6 * float(jnp.linalg.norm(out) * jnp.linalg.norm(y))


@pytest.mark.slow
@every_entry
def test_vmap_over_any_axis(entry):
    A, batch = entry.make(), draw((3, *entry.in_shape))
    each = np.stack([A(x) for x in batch])
    for axis in range(batch.ndim):
        mapped = jax.vmap(A, in_axes=axis)(jnp.moveaxis(batch, 0, axis))
        np.testing.assert_allclose(mapped, each, atol=1e2 * entry.tolerance)
    ys = jnp.asarray(each)
    back = jax.vmap(lambda y: adjoint(A, batch[0], y))(ys)
    np.testing.assert_allclose(back, [adjoint(A, batch[0], y) for y in ys], atol=1e2 * entry.tolerance)
    if isinstance(A, LinearOperator):
        np.testing.assert_allclose(A(batch[None]), each[None], atol=1e2 * entry.tolerance)  # leading axes


@pytest.mark.slow
@every_entry
def test_first_and_second_derivatives(entry):
    A, x, v = entry.make(), draw(entry.in_shape), draw(entry.in_shape, seed=2)
    tolerance = 1e3 * entry.tolerance
    np.testing.assert_allclose(jax.jvp(A, (x,), (v,))[1], A(v), atol=tolerance)
    energy = lambda x: 0.5 * jnp.sum(jnp.abs(A(x)) ** 2)  # noqa: E731
    np.testing.assert_allclose(jax.grad(energy)(x), adjoint(A, x, A(x)), atol=tolerance)
    for product in (jax.jvp(jax.grad(energy), (x,), (v,))[1], jax.vjp(jax.grad(energy), x)[1](v)[0]):
        np.testing.assert_allclose(product, adjoint(A, x, A(v)), atol=tolerance)
    transpose = lambda y: jax.linear_transpose(A, x)(y)[0]  # noqa: E731
    (twice,) = jax.linear_transpose(transpose, A(x))(x)
    np.testing.assert_allclose(twice, A(x), atol=tolerance)


@every_entry
def test_inside_scan_and_checkpoint(entry):
    A, x = entry.make(), draw(entry.in_shape)

    def descended(x):
        body = jax.checkpoint(lambda x, _: (x - 0.01 * adjoint(A, x, A(x)), None))
        return jax.lax.scan(body, x, length=2)[0]

    M = matrix(A, entry.in_shape)
    step = np.eye(x.size) - 0.01 * np.real(M.conj().T @ M)
    gradient = jax.jit(jax.grad(lambda x: 0.5 * jnp.sum(descended(x) ** 2)))(x)
    power = np.linalg.matrix_power(step, 4)
    np.testing.assert_allclose(gradient.ravel(), power @ np.asarray(x).ravel(), atol=1e3 * entry.tolerance)


@pytest.mark.slow
@every_entry
def test_shard_map_over_two_devices(entry):
    A, batch = entry.make(), draw((4, *entry.in_shape))
    mesh = jax.make_mesh((2,), ("samples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    slopes = jax.vmap(jax.grad(lambda x: jnp.sum(jnp.abs(A(x)) ** 2)))
    spec = PartitionSpec("samples")
    sharded = jax.jit(jax.shard_map(slopes, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(batch)
    np.testing.assert_allclose(sharded, slopes(batch), atol=1e2 * entry.tolerance)
    assert len(sharded.sharding.device_set) == 2


@every_entry
def test_equal_geometry_is_equal_and_hashable(entry):
    assert entry.make() == entry.make()
    assert hash(entry.make()) == hash(entry.make())
