"""Smoothed total variation: energy against a loop, derivatives, and every claimed constant under attack."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbilevel.regularizers import SmoothedTV

rng = np.random.default_rng(0)
THETA = jnp.array([-0.7, -2.0])
SETTINGS = [
    (SmoothedTV(), (8, 8)),
    (SmoothedTV(kind="anisotropic"), (8, 8)),
    (SmoothedTV(channels=3), (3, 5, 4)),
    (SmoothedTV(channels=3, coupling="separate"), (3, 5, 4)),
    (SmoothedTV(channels=3, kind="anisotropic"), (3, 5, 4)),
    (SmoothedTV(channels=3, kind="anisotropic", coupling="separate"), (3, 5, 4)),
    (SmoothedTV(eps=0.05), (8, 8)),
]
every_setting = pytest.mark.parametrize("R, shape", SETTINGS, ids=lambda v: str(v).replace("SmoothedTV", ""))


def theta_of(R):
    return THETA if R.eps is None else THETA[:1]


def loop(R, theta, x):
    """The energy, pixel by pixel, from its definition."""
    weight, eps = np.exp(theta[0]), np.exp(theta[1]) if R.eps is None else R.eps
    x = x[None] if x.ndim == 2 else x
    channels, height, width = x.shape
    total = 0.0
    for i, j in itertools.product(range(height), range(width)):
        down = [x[c, i + 1, j] - x[c, i, j] if i + 1 < height else 0.0 for c in range(channels)]
        right = [x[c, i, j + 1] - x[c, i, j] if j + 1 < width else 0.0 for c in range(channels)]
        groups = [range(channels)] if R.coupling == "joint" else [[c] for c in range(channels)]
        for group in groups:
            a, b = sum(down[c] ** 2 for c in group), sum(right[c] ** 2 for c in group)
            if R.kind == "isotropic":
                total += np.sqrt(a + b + eps**2)
            else:
                total += np.sqrt(a + eps**2) + np.sqrt(b + eps**2)
    return weight * total


def dense_hessian(R, theta, x):
    return jax.hessian(lambda v: R(theta, v.reshape(x.shape)))(x.ravel())


def mixed(R, theta, x):
    """J = d/dtheta grad_x R as a matrix (pixels, parameters)."""
    return jax.jacfwd(lambda t: jax.grad(R, 1)(t, x).ravel())(theta)


@every_setting
def test_energy_is_that_of_the_loop(R, shape):
    x = rng.standard_normal(shape)
    assert float(R(theta_of(R), jnp.asarray(x))) == pytest.approx(loop(R, np.asarray(theta_of(R)), x), rel=1e-13)


@every_setting
def test_gradient_and_hessian(R, shape):
    theta, x, v = theta_of(R), jnp.asarray(rng.standard_normal(shape)), jnp.asarray(rng.standard_normal(shape))
    slope, h = jax.grad(R, 1), 1e-5
    along = (loop(R, theta, np.asarray(x + h * v)) - loop(R, theta, np.asarray(x - h * v))) / (2 * h)
    assert float(jnp.vdot(slope(theta, x), v)) == pytest.approx(along, rel=1e-7)
    product = jax.jvp(lambda z: slope(theta, z), (x,), (v,))[1]
    np.testing.assert_allclose(product, (slope(theta, x + h * v) - slope(theta, x - h * v)) / (2 * h), atol=1e-6)
    hessian = dense_hessian(R, theta, x)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)
    np.testing.assert_allclose(hessian @ v.ravel(), product.ravel(), atol=1e-10)
    in_theta = jax.grad(R)(theta, x)
    for k, unit in enumerate(np.eye(theta.size)):
        change = loop(R, theta + h * unit, np.asarray(x)) - loop(R, theta - h * unit, np.asarray(x))
        assert float(in_theta[k]) == pytest.approx(change / (2 * h), rel=1e-6)


# ---- constants -------------------------------------------------------------------------------------------------------


@every_setting
def test_spectrum_lies_within_the_claimed_bounds(R, shape):
    theta = theta_of(R)
    bounds, eps = R.bounds(theta, shape), R.scales(theta)[1]
    checker = (-1.0) ** np.sum(np.indices(shape), axis=0)
    points = [np.zeros(shape), 0.1 * eps * checker, *(scale * rng.standard_normal(shape) for scale in (0.1, 1.0))]
    spectra = [np.linalg.eigvalsh(dense_hessian(R, theta, jnp.asarray(x))) for x in points]
    assert min(s[0] for s in spectra) >= float(bounds.strong_convexity) - 1e-12
    largest = max(s[-1] for s in spectra)
    assert largest <= float(bounds.smoothness)
    assert largest >= 0.8 * float(bounds.smoothness)  # met up to the size of the image: at a flat one, D'D has it


def attack(objective, start, steps=150, rate=0.05):
    """Largest value met by ascent from ``start``."""
    optimizer = optax.adam(rate)

    def step(carry, _):
        at, memory = carry
        value, slope = jax.value_and_grad(objective)(at)
        updates, memory = optimizer.update(jax.tree.map(jnp.negative, slope), memory)
        return (optax.apply_updates(at, updates), memory), value

    return float(jnp.max(jax.jit(lambda a: jax.lax.scan(step, (a, optimizer.init(a)), length=steps)[1])(start)))


@pytest.mark.slow
@every_setting
def test_hessian_lipschitz_resists_ascent_on_the_third_derivative(R, shape):
    # the third derivative is a symmetric form: its norm is its largest value on a diagonal (v, v, v)
    theta = theta_of(R)
    eps = R.scales(theta)[1]

    def third(at):
        x, v = eps * at[0], at[1] / jnp.linalg.norm(at[1])
        second = lambda t: jax.jvp(lambda s: jax.jvp(lambda r: R(theta, x + r * v), (s,), (1.0,))[1], (t,), (1.0,))[1]  # noqa: E731
        return jax.jvp(second, (0.0,), (1.0,))[1]

    bound = float(R.bounds(theta, shape).hessian_lipschitz)
    met = max(attack(third, jnp.asarray(rng.standard_normal((2, *shape)))) for _ in range(2))
    assert 0.25 * bound <= met <= bound


@every_setting
def test_mixed_constants_bound_random_pairs(R, shape):
    theta = theta_of(R)
    bounds, eps = R.bounds(theta, shape), float(R.scales(theta)[1])
    derivative = jax.jit(lambda x: mixed(R, theta, x))
    norms, rates = [], []
    checker = (-1.0) ** np.sum(np.indices(shape), axis=0)
    for scale in (0.01, 0.3, 1.0, 3.0, 100.0):
        for direction in (rng.standard_normal(shape), checker):
            x = jnp.asarray(scale * eps * direction)
            norms.append(np.linalg.norm(derivative(x), 2))
            for step in (1e-3, 1.0):
                y = x + step * eps * jnp.asarray(rng.choice([rng.standard_normal(shape), checker]))
                rates.append(np.linalg.norm(derivative(x) - derivative(y), 2) / float(jnp.linalg.norm(x - y)))
    assert 0.4 * float(bounds.mixed_norm) <= max(norms) <= float(bounds.mixed_norm)
    assert 0.3 * float(bounds.mixed_lipschitz) <= max(rates) <= float(bounds.mixed_lipschitz)


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_init_and_scales():
    assert SmoothedTV().init().shape == (2,) and SmoothedTV(eps=0.1).init().shape == (1,)
    weight, eps = SmoothedTV().scales(SmoothedTV().init(weight=0.3, eps=0.02))
    assert float(weight) == pytest.approx(0.3) and float(eps) == pytest.approx(0.02)
    assert float(SmoothedTV(eps=0.1).scales(jnp.zeros(1))[1]) == pytest.approx(0.1)
    assert SmoothedTV().init(dtype=jnp.float32).dtype == jnp.float32


def test_project_bounds_eps_alone():
    R = SmoothedTV(eps_min=1e-2, eps_max=0.5)
    for theta in ([-3.0, -9.0], [2.0, 3.0], [0.0, -1.0]):
        projected = np.asarray(R.project(jnp.array(theta)))
        assert projected[0] == theta[0]
        assert projected[1] == np.clip(theta[1], np.log(1e-2), np.log(0.5))
    assert float(SmoothedTV(eps=1e-9).project(jnp.array([3.0]))[0]) == 3.0


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "round"},
        {"channels": "joint"},
        {"channels": 0},
        {"coupling": "mixed"},
        {"eps": 0.0},
        {"eps": -1.0},
        {"eps": float("nan")},
        {"eps_min": 2.0},
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SmoothedTV(**options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        SmoothedTV()(jnp.zeros(3), jnp.zeros((4, 4)))


def test_single_precision_stays_single():
    x = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    value, slope = jax.value_and_grad(SmoothedTV(), 1)(THETA.astype(jnp.float32), x)
    assert value.dtype == slope.dtype == jnp.float32
    assert float(value) == pytest.approx(loop(SmoothedTV(), np.asarray(THETA), np.asarray(x, np.float64)), rel=1e-5)
