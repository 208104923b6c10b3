"""Forward differences and the linear primitive below them, under every JAX transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jbilevel.operators import forward_difference

rng = np.random.default_rng(0)
CASES = [((7,), 0), ((4, 5), 0), ((4, 5), 1), ((3, 4, 5), 1), ((3, 4, 5), -1), ((1, 3), 0), ((2, 1), -1)]
every_case = pytest.mark.parametrize("shape, axis", CASES)


def difference(axis):
    return lambda x: forward_difference(x, axis)


def expected(x, axis):
    """numpy.diff, and 0 at the last index."""
    last = np.take(x, [-1], axis)
    return np.diff(x, axis=axis, append=last)


def dense(shape, axis):
    columns = [expected(unit.reshape(shape), axis).ravel() for unit in np.eye(int(np.prod(shape)))]
    return np.array(columns).T


@every_case
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_equals_numpy(shape, axis, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    result = forward_difference(jnp.asarray(x), axis)
    assert result.dtype == dtype
    np.testing.assert_array_equal(result, expected(x, axis))


@every_case
def test_dot_test(shape, axis):
    x, y = jnp.asarray(rng.standard_normal(shape)), jnp.asarray(rng.standard_normal(shape))
    (back,) = jax.linear_transpose(difference(axis), x)(y)
    left, right = float(jnp.vdot(forward_difference(x, axis), y)), float(jnp.vdot(x, back))
    assert abs(left - right) <= 1e-14 * float(jnp.linalg.norm(x) * jnp.linalg.norm(y))
    np.testing.assert_allclose(back.ravel(), dense(shape, axis).T @ y.ravel(), atol=1e-14)


@pytest.mark.slow
@every_case
def test_derivatives(shape, axis):
    x, v = jnp.asarray(rng.standard_normal(shape)), jnp.asarray(rng.standard_normal(shape))
    value, tangent = jax.jvp(difference(axis), (x,), (v,))
    np.testing.assert_array_equal(value, forward_difference(x, axis))
    np.testing.assert_array_equal(tangent, forward_difference(v, axis))
    D = dense(shape, axis)
    energy = lambda x: jnp.sum(jnp.cosh(forward_difference(x, axis)))  # noqa: E731
    flat = D @ np.asarray(x).ravel()
    np.testing.assert_allclose(jax.grad(energy)(x).ravel(), D.T @ np.sinh(flat), atol=1e-13)
    hessian = D.T @ np.diag(np.cosh(flat)) @ D
    for product in (
        jax.jvp(jax.grad(energy), (x,), (v,))[1],
        jax.linearize(jax.grad(energy), x)[1](v),
        jax.vjp(jax.grad(energy), x)[1](v)[0],
    ):
        np.testing.assert_allclose(product.ravel(), hessian @ np.asarray(v).ravel(), atol=1e-12)
    np.testing.assert_allclose(jax.hessian(energy)(x).reshape(hessian.shape), hessian, atol=1e-12)


def test_double_transpose_is_the_map_itself():
    x = jnp.asarray(rng.standard_normal((4, 5)))
    transpose = lambda y: jax.linear_transpose(difference(1), x)(y)[0]  # noqa: E731
    (twice,) = jax.linear_transpose(transpose, x)(x)
    np.testing.assert_array_equal(twice, forward_difference(x, 1))


@pytest.mark.parametrize("in_axis", [0, 1, 2, -1])
@pytest.mark.parametrize("out_axis", [0, 1, -1])
def test_vmap_over_any_axis(in_axis, out_axis):
    batch = rng.standard_normal((3, 4, 5))
    mapped = jax.vmap(difference(0), in_axes=in_axis, out_axes=out_axis)
    each = [expected(x, 0) for x in np.moveaxis(batch, in_axis, 0)]
    np.testing.assert_array_equal(mapped(jnp.asarray(batch)), np.stack(each, axis=out_axis))
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.asarray(batch)), np.stack(each, axis=out_axis))


def test_vmap_of_vmap_and_of_the_transpose():
    batch = rng.standard_normal((2, 3, 4, 5))
    twice = jax.vmap(jax.vmap(difference(0)), in_axes=1, out_axes=1)(jnp.asarray(batch))
    np.testing.assert_array_equal(twice, expected(batch, 2))
    x = jnp.zeros((4, 5))
    back = jax.vmap(lambda y: jax.linear_transpose(difference(0), x)(y)[0])(jnp.asarray(batch[0]))
    for one, y in zip(back, batch[0], strict=True):
        np.testing.assert_allclose(one.ravel(), dense((4, 5), 0).T @ y.ravel(), atol=1e-14)


def test_scan_checkpoint_and_loops():
    x = jnp.asarray(rng.standard_normal((4, 5)))

    def three(x):
        body = jax.checkpoint(lambda c, _: (c + 0.1 * forward_difference(c, 0), jnp.sum(c)))
        return jnp.sum(jax.lax.scan(body, x, length=3)[0] ** 2)

    step = np.eye(20) + 0.1 * dense((4, 5), 0)
    power = np.linalg.matrix_power(step, 3)
    np.testing.assert_allclose(
        jax.jit(jax.grad(three))(x).ravel(), 2 * power.T @ power @ np.asarray(x).ravel(), atol=1e-12
    )
    last = jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + 0.1 * forward_difference(c[1], 0)), (0, x)
    )
    np.testing.assert_allclose(last[1].ravel(), power @ np.asarray(x).ravel(), atol=1e-13)


def test_shard_map_over_two_devices():
    mesh = jax.make_mesh((2,), ("samples",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    batch = jnp.asarray(rng.standard_normal((4, 6, 5)))
    energy = lambda x: jnp.sum(jnp.sqrt(forward_difference(x, 0) ** 2 + 1))  # noqa: E731

    def local(x):
        value, slope = jax.vmap(jax.value_and_grad(energy))(x)
        product = jax.vmap(lambda x: jax.jvp(jax.grad(energy), (x,), (x,))[1])(x)
        return value, slope, product

    spec = PartitionSpec("samples")
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(batch)
    for a, b in zip(sharded, local(batch), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-14)
        assert len(a.sharding.device_set) == 2


def test_equal_geometry_compiles_once():
    traces = []

    @jax.jit
    def energy(x):
        traces.append(1)
        return jnp.sum(forward_difference(x, 0) ** 2)

    for _ in range(3):
        energy(jnp.ones((4, 5)))
    assert len(traces) == 1


@pytest.mark.parametrize("axis", [2, -3])
def test_axis_outside_the_array(axis):
    with pytest.raises(ValueError, match="axis"):
        forward_difference(jnp.zeros((4, 5)), axis)
