"""Proximal maps against brute-force minimisation, Moreau's identity and differences; derivatives at kinks and at 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jbilevel import prox

GRID = np.linspace(-9, 9, 72001)
WEIGHT, WIDTH = 1.3, 0.4


def relu(t):
    return np.where(t <= 0, 0.0, np.where(t < WIDTH, t**2 / (2 * WIDTH), t - WIDTH / 2))


def smoothed_abs(t):
    size = np.abs(t)
    return np.where(size <= WIDTH, t**2 / (2 * WIDTH), size - WIDTH / 2)


def on(inside, values):
    return np.where(inside, values, np.inf)


# name: (prox(v, step), f on numbers)
SCALAR = {
    "soft": (lambda v, s: prox.soft(v, s, WEIGHT), lambda t: WEIGHT * np.abs(t)),
    "box": (lambda v, s: prox.box(v, -0.5, 1.0), lambda t: on((t >= -0.5) & (t <= 1.0), 0.0)),
    "nonnegative": (lambda v, s: prox.box(v, 0.0), lambda t: on(t >= 0, 0.0)),
    "squared": (lambda v, s: prox.squared_distance(v, s, 0.7, WEIGHT), lambda t: WEIGHT / 2 * (t - 0.7) ** 2),
    "squared-conjugate": (
        lambda v, s: prox.squared_distance_conjugate(v, s, 0.7, WEIGHT),
        lambda t: t**2 / (2 * WEIGHT) + 0.7 * t,
    ),
    "huber": (lambda v, s: prox.huber(v, s, WEIGHT, WIDTH), lambda t: WEIGHT * smoothed_abs(t)),
    "huber-conjugate": (
        lambda v, s: prox.huber_conjugate(v, s, WEIGHT, WIDTH),
        lambda t: on(np.abs(t) <= WEIGHT, WIDTH / (2 * WEIGHT) * t**2),
    ),
    "root": (lambda v, s: prox.root(v, s, WEIGHT, WIDTH), lambda t: WEIGHT * np.sqrt(t**2 + WIDTH**2)),
    "root-conjugate": (
        lambda v, s: prox.root_conjugate(v, s, WEIGHT, WIDTH),
        lambda t: on(np.abs(t) <= WEIGHT, -WIDTH * np.sqrt(np.maximum(WEIGHT**2 - t**2, 0))),
    ),
    "relu": (lambda v, s: prox.smoothed_relu(v, s, WEIGHT, WIDTH), lambda t: WEIGHT * relu(t)),
    "relu-conjugate": (
        lambda v, s: prox.smoothed_relu_conjugate(v, s, WEIGHT, WIDTH),
        lambda t: on((t >= 0) & (t <= WEIGHT), WIDTH / (2 * WEIGHT) * t**2),
    ),
}
CONJUGATES = {
    "squared": "squared-conjugate",
    "huber": "huber-conjugate",
    "root": "root-conjugate",
    "relu": "relu-conjugate",
}


@pytest.mark.parametrize("name", SCALAR)
def test_minimises(name):
    apply, function = SCALAR[name]
    rng = np.random.default_rng(0)
    v, step = 3 * rng.standard_normal(40), rng.uniform(0.2, 2.0, 40)
    brute = [GRID[np.argmin(function(GRID) + (GRID - a) ** 2 / (2 * s))] for a, s in zip(v, step, strict=True)]
    np.testing.assert_allclose(apply(jnp.asarray(v), jnp.asarray(step)), brute, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", CONJUGATES)
def test_moreau_identity(name):
    v = jnp.asarray(3 * np.random.default_rng(1).standard_normal(100))
    step = jnp.asarray(np.random.default_rng(2).uniform(0.2, 2.0, 100))
    np.testing.assert_allclose(
        prox.conjugate(SCALAR[name][0])(v, step), SCALAR[CONJUGATES[name]][0](v, step), rtol=0, atol=1e-14
    )
    back = prox.conjugate(prox.conjugate(SCALAR[name][0]))
    np.testing.assert_allclose(back(v, step), SCALAR[name][0](v, step), rtol=0, atol=1e-13)


# over groups: (map of an array of shape (2, 5), the same on one group of length r as a function of r)
GROUPS = {
    "group": (lambda v, s: prox.group(v, s, WEIGHT, axis=0), lambda r, s: prox.soft(r, s, WEIGHT)),
    "ball": (lambda v, s: prox.ball(v, WEIGHT, axis=0), lambda r, s: prox.box(r, 0.0, WEIGHT)),
    "huber": (lambda v, s: prox.huber(v, s, WEIGHT, WIDTH, axis=0), lambda r, s: prox.huber(r, s, WEIGHT, WIDTH)),
    "huber-conjugate": (
        lambda v, s: prox.huber_conjugate(v, s, WEIGHT, WIDTH, axis=0),
        lambda r, s: prox.huber_conjugate(r, s, WEIGHT, WIDTH),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_keep_their_direction(name):
    """The prox of a function of the length of v moves v along itself, by the prox of that function."""
    apply, radial = GROUPS[name]
    v = jnp.asarray(2 * np.random.default_rng(3).standard_normal((2, 50)))
    length = jnp.linalg.norm(v, axis=0, keepdims=True)
    np.testing.assert_allclose(apply(v, 0.7), v / length * radial(length, 0.7), rtol=0, atol=1e-14)


def test_ball_over_the_whole_array():
    v = jnp.asarray([[3.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(prox.ball(v, 1.0), v / 5)
    np.testing.assert_array_equal(prox.ball(v, 6.0), v)


@jax.jit
def epigraph(pair, step):
    return jnp.stack(prox.smoothed_relu_epigraph(pair[0], pair[1], WIDTH))


EVERY = {name: (apply, (50,)) for name, (apply, _) in SCALAR.items()}
EVERY |= {f"{name}-groups": (apply, (2, 50)) for name, (apply, _) in GROUPS.items()}
EVERY["epigraph"] = (epigraph, (2, 50))


@pytest.mark.parametrize("name", EVERY)
def test_is_a_prox_with_the_right_derivative(name):
    apply, shape = EVERY[name]
    prox.check_prox(apply, jnp.zeros(shape), 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_no_derivative_is_nan(name):
    apply, shape = EVERY[name]
    total = lambda v, step: jnp.sum(jnp.sin(apply(v, step)))  # noqa: E731
    derivatives = jax.jit(lambda v, step: (
        jax.grad(total, (0, 1))(v, step), jax.jvp(jax.grad(total), (v, step), (v, 0.0))
    ))  # fmt: skip
    for v in (jnp.zeros(shape), jnp.ones(shape), jnp.full(shape, WEIGHT)):
        for step in (1e-300, 0.7):
            for derivative in jax.tree.leaves(derivatives(v, step)):
                assert bool(jnp.all(jnp.isfinite(derivative)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_transformations_and_dtypes(name):
    apply, shape = EVERY[name]
    v = jnp.asarray(np.random.default_rng(4).standard_normal((3, *shape)))
    single = jax.jit(apply)
    one = jnp.stack([single(u, 0.7) for u in v])
    batched = jax.jit(jax.vmap(apply, (0, None)))(v, 0.7)  # a traced step
    np.testing.assert_allclose(batched, one, rtol=0, atol=1e-15)
    narrow = single(v[0].astype(jnp.float32), jnp.float32(0.7))
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, one[0], rtol=0, atol=1e-5)


def test_second_derivative_of_the_curved_part():
    total = lambda s: jnp.sum(epigraph(jnp.stack([s, 0.1 * jnp.ones_like(s)]), None) ** 2)  # noqa: E731
    s, h = jnp.asarray([0.1, 0.2, 0.3]), 1e-5
    first = jax.jit(jax.grad(total))
    second = jax.jit(jax.grad(lambda s: jnp.sum(jax.grad(total)(s))))(s)
    np.testing.assert_allclose(second, (first(s + h) - first(s - h)) / (2 * h), rtol=1e-7)


def test_epigraph_is_nearest():
    """Against a fine grid of the boundary, at three scales; and feasible."""
    rng = np.random.default_rng(5)
    boundary = np.concatenate([np.linspace(-1, 1, 100001), np.linspace(-40, 40, 100001)])
    for scale in (0.3, 1.0, 10.0):
        s, t = scale * rng.standard_normal((2, 60))
        p, q = (np.asarray(a) for a in prox.smoothed_relu_epigraph(jnp.asarray(s), jnp.asarray(t), WIDTH))
        assert np.all(relu(p) <= q + 1e-14)
        found = (p - s) ** 2 + (q - t) ** 2
        inside = relu(s) <= t
        nearest = [np.min((boundary - a) ** 2 + (relu(boundary) - b) ** 2) for a, b in zip(s, t, strict=True)]
        assert np.all(found <= np.where(inside, 0.0, nearest) + 1e-14)


def test_epigraph_jacobian_by_pieces():
    jacobian = jax.jit(jax.jacobian(lambda v: epigraph(v, None)))
    at = lambda s, t: np.asarray(jacobian(jnp.asarray([s, t])))  # noqa: E731
    np.testing.assert_allclose(at(0.1, 1.0), np.eye(2))
    np.testing.assert_allclose(at(-0.3, -1.0), np.diag([1.0, 0.0]))
    np.testing.assert_allclose(at(2.0, 0.0), np.full((2, 2), 0.5))
    s, t = 0.3, -0.2
    p, q = (float(a) for a in prox.smoothed_relu_epigraph(jnp.asarray(s), jnp.asarray(t), WIDTH))
    tangent = np.array([1.0, p / WIDTH])
    expected = np.outer(tangent, tangent) / (1 + (p / WIDTH) ** 2 + (q - t) / WIDTH)
    np.testing.assert_allclose(at(s, t), expected, rtol=1e-12)


def test_conventions_at_kinks():
    slope = lambda apply, v: float(jax.grad(apply)(v))  # noqa: E731
    assert slope(lambda v: prox.soft(v, 1.0), 1.0) == 0.0
    assert slope(lambda v: prox.box(v, 0.0, 1.0), 0.0) == 1.0
    assert slope(lambda v: prox.box(v, 0.0, 1.0), 1.0) == 1.0
    assert slope(lambda v: prox.group(v[None], 1.0, axis=0)[0], 1.0) == 0.0


@pytest.mark.parametrize(
    "bad, message",
    [
        (lambda v, step: 2 * v, "not firmly nonexpansive"),
        (lambda v, step: v[:2], "must return the shape"),
        (lambda v, step: (v, v), "must return the structure"),
        (lambda v, step: v.astype(jnp.float32), "must return the dtype"),
        (lambda v, step: 0.4 * v + 0.1 * jnp.roll(v, 1), "not symmetric"),
        (lambda v, step: prox.soft(jax.lax.stop_gradient(v), step), "differs from its differences"),
    ],
)
def test_check_names_what_is_wrong(bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prox.check_prox(bad, jnp.zeros(5))
