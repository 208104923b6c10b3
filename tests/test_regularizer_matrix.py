"""What every regulariser has to do: one line in `REGULARIZERS` admits a new one."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel._core.constants import Constants


class Entry(NamedTuple):
    regularizer: Any
    shape: tuple  # of one x
    scale: float = 0.3  # of random x at which the energy is curved
    nudge: float = 0.1  # of random params around their start


REGULARIZERS = {
    "SmoothedTV": Entry(jb.regularizers.SmoothedTV(), (6, 5)),
    "SmoothedTV, fixed eps": Entry(jb.regularizers.SmoothedTV(eps=0.1), (6, 5)),
    "SmoothedTV, anisotropic": Entry(jb.regularizers.SmoothedTV(kind="anisotropic"), (6, 5)),
    "SmoothedTV, colour": Entry(jb.regularizers.SmoothedTV(), (4, 4, 3)),
    "SmoothedTV, separate channels": Entry(jb.regularizers.SmoothedTV(channels="separate"), (4, 4, 3)),
    "WeightedTV": Entry(jb.regularizers.WeightedTV(grid=(3, 2), eps=0.1), (6, 5)),
    "FoE": Entry(jb.regularizers.FoE(count=3, size=3, boundary="symmetric"), (6, 5), 0.03),
    "CRR": Entry(jb.regularizers.CRR(channels=(2, 3), sizes=(3, 2)), (6, 5), 0.1),
    "WCRR": Entry(jb.regularizers.WCRR(channels=(2, 3), sizes=(3, 2), boundary="zero"), (6, 5), 0.1),
    # nudged, its second layer would be negative
    "ICNN": Entry(jb.regularizers.ICNN(hidden=3, outputs=2, size=3, potential="smoothstep"), (6, 5), 0.03, nudge=0.0),
}
# WCRR is CRR with one more term: of the two, only it runs every time
every_entry = pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=pytest.mark.slow if name == "CRR" else ()) for name, e in REGULARIZERS.items()],
    ids=REGULARIZERS,
)


def points(entry, count=1, dtype=jnp.float64):
    draws = entry.scale * np.random.default_rng(0).standard_normal((count, *entry.shape))
    return jnp.asarray(draws, dtype)


def start(entry, dtype=jnp.float64):
    """Parameters a little off their start, so that nothing is zero by accident."""
    leaves, treedef = jax.tree.flatten(entry.regularizer.init(jax.random.key(0)))
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        treedef, [jnp.asarray(leaf + entry.nudge * rng.standard_normal(leaf.shape), dtype) for leaf in leaves]
    )


def flatten(params):
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    return flat, unflatten


@every_entry
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_energy_is_a_finite_scalar_of_the_dtype_of_x(entry, dtype):
    params, x = start(entry, dtype), points(entry, dtype=dtype)[0]
    value, (in_params, in_x) = jax.jit(jax.value_and_grad(entry.regularizer, (0, 1)))(params, x)
    assert value.shape == () and value.dtype == dtype and np.isfinite(value)
    assert in_x.shape == entry.shape and in_x.dtype == dtype
    assert all(leaf.dtype == dtype and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(in_params))


@every_entry
def test_init_needs_a_key_only_and_repeats(entry):
    first, second = entry.regularizer.init(jax.random.key(3)), entry.regularizer.init(jax.random.key(3))
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@every_entry
def test_derivatives_against_finite_differences(entry):
    R, h = jax.jit(entry.regularizer), 1e-6
    params, x, v = start(entry), *points(entry, 2)
    along = (R(params, x + h * v) - R(params, x - h * v)) / (2 * h)
    slope = jax.jit(jax.grad(R, 1))
    np.testing.assert_allclose(jnp.vdot(slope(params, x), v), along, rtol=1e-6, atol=1e-8)
    product = jax.jit(lambda x: jax.jvp(lambda z: slope(params, z), (x,), (v,))[1])(x)
    difference = (slope(params, x + h * v) - slope(params, x - h * v)) / (2 * h)
    assert float(jnp.linalg.norm(product - difference)) <= 1e-5 * float(jnp.linalg.norm(product) + 1)
    flat, unflatten = flatten(params)
    w = jnp.asarray(np.random.default_rng(2).standard_normal(flat.size))
    along = (R(unflatten(flat + h * w), x) - R(unflatten(flat - h * w), x)) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(flatten(jax.jit(jax.grad(R))(params, x))[0], w), along, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@every_entry
def test_claimed_constants_against_measured_ones(entry):
    R = entry.regularizer
    params, (x, y, *_) = start(entry), points(entry, 3)
    bounds = R.bounds(params, entry.shape)
    assert isinstance(bounds, Constants)
    flat, unflatten = flatten(params)

    @jax.jit
    def measure(x):
        slope = lambda t, z: jax.grad(R, 1)(unflatten(t), z.reshape(entry.shape)).ravel()  # noqa: E731
        return jax.jacfwd(slope, 1)(flat, x.ravel()), jax.jacfwd(slope, 0)(flat, x.ravel())

    tiny = 1e-2
    for a, b in ((x, y), (x, x + tiny * y), (tiny * x, tiny * y), (jnp.zeros_like(x), tiny * x)):
        (hessian, mixed), (hessian_b, mixed_b) = jax.tree.map(np.asarray, (measure(a), measure(b)))
        distance = float(jnp.linalg.norm(a - b))
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-10)
        spectrum = np.linalg.eigvalsh(hessian)
        claims = (
            (-spectrum[0], None if bounds.strong_convexity is None else -bounds.strong_convexity),
            (np.max(np.abs(spectrum)), bounds.smoothness),
            (np.linalg.norm(hessian - hessian_b, 2) / distance, bounds.hessian_lipschitz),
            (np.linalg.norm(mixed - mixed_b, 2) / distance, bounds.mixed_lipschitz),
            (np.linalg.norm(mixed, 2), bounds.mixed_norm),
        )
        for measured, claimed in claims:
            assert claimed is None or measured <= float(claimed) * (1 + 1e-9) + 1e-9


@pytest.mark.slow
@every_entry
def test_jit_and_vmap(entry):
    R, params, batch = entry.regularizer, start(entry), points(entry, 3)
    each = [R(params, x) for x in batch]
    np.testing.assert_allclose(jax.jit(jax.vmap(R, (None, 0)))(params, batch), each, rtol=1e-12)


@every_entry
def test_equal_settings_are_equal_and_hashable(entry):
    problem = jb.variational(None, entry.regularizer)
    assert hash(problem) == hash(jb.variational(None, entry.regularizer))


@pytest.mark.slow
@every_entry
def test_feeds_a_lower_level_and_its_hypergradient(entry):
    problem = jb.variational(None, entry.regularizer)
    oracle = jb.implicit.Oracle(problem, lambda p, x, d: 0.5 * jnp.sum(x**2), solver=jb.solvers.AGD(), estimate=False)
    params, batch = start(entry), points(entry, 2)
    hg = oracle(params, batch, tol=1e-12)
    assert int(hg.status) <= jb.Status.PRECISION
    flat, unflatten = flatten(params)
    w, h = jnp.asarray(np.random.default_rng(2).standard_normal(flat.size)), 1e-4
    w = w / jnp.linalg.norm(w)
    # the value of the hypergradient call: one program to compile instead of two
    ends = [float(oracle(unflatten(flat + s * h * w), batch, tol=1e-12).value) for s in (1, -1)]
    assert float(jnp.vdot(flatten(hg.grad)[0], w)) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-9)
