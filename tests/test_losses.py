"""Image losses: values against their formulas, where the clean image is found, identity as values."""

import collections
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jbilevel as jb
from jbilevel.losses import Adversarial, ImageLoss, charbonnier, huber, squared_error

rng = np.random.default_rng(0)
X, CLEAN = rng.standard_normal((5, 6)), rng.standard_normal((5, 6))
D = X - CLEAN
EXPECTED = [
    (squared_error, {}, 0.5 * np.sum(D**2)),
    (huber, {"delta": 0.4}, np.sum(np.where(np.abs(D) <= 0.4, 0.5 * D**2, 0.4 * (np.abs(D) - 0.2)))),
    (charbonnier, {"eps": 0.3}, np.sum(np.sqrt(D**2 + 0.09) - 0.3)),
]
FACTORIES = [squared_error, huber, charbonnier]
SLOPES = [
    (squared_error, {}, D),
    (huber, {"delta": 0.4}, np.clip(D, -0.4, 0.4)),
    (charbonnier, {"eps": 0.3}, D / np.sqrt(D**2 + 0.09)),
]


@pytest.mark.parametrize("factory, scale, expected", EXPECTED)
def test_sum_and_mean(factory, scale, expected):
    assert float(factory(**scale)(None, X, {"x": CLEAN})) == pytest.approx(expected, rel=1e-5)
    assert float(factory(mean=True, **scale)(None, X, {"x": CLEAN})) == pytest.approx(expected / 30, rel=1e-5)


@pytest.mark.parametrize("factory, scale, expected", SLOPES)
def test_gradients(factory, scale, expected):
    slope = jax.grad(factory(**scale), argnums=1)(None, jnp.asarray(X), {"x": jnp.asarray(CLEAN)})
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factory", FACTORIES)
def test_equal_images_have_loss_and_gradient_zero(factory):
    value, slope = jax.value_and_grad(factory(), argnums=1)(None, jnp.asarray(X), {"x": jnp.asarray(X)})
    assert float(value) == 0 and np.all(np.asarray(slope) == 0)


def test_huber_is_differentiable_where_the_parabola_ends():
    loss = huber(target=None, delta=1.0)
    for d in (1.0, -1.0):
        assert float(loss(None, jnp.array([d]), jnp.zeros(1))) == 0.5
        assert float(jax.grad(loss, argnums=1)(None, jnp.array([d]), jnp.zeros(1))[0]) == d


def test_charbonnier_keeps_small_residuals_in_single_precision():
    d = np.float32(1e-4)  # (sqrt(d^2 + 1) - 1) would round to 0
    value = charbonnier(target=None, eps=1.0)(None, jnp.array([d], jnp.float32), jnp.zeros(1, jnp.float32))
    assert float(value) == pytest.approx(5e-9, rel=1e-3)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    "target, wrap",
    [
        ("x", lambda clean: {"x": clean, "y": clean + 1}),
        ("truth", lambda clean: types.MappingProxyType({"x": clean + 1, "truth": clean})),
        (0, lambda clean: (clean, clean + 1)),
        (-1, lambda clean: [clean + 1, clean]),
        (1, lambda clean: collections.namedtuple("Sample", "y x")(clean + 1, clean)),
        (None, lambda clean: clean),
    ],
)
def test_where_the_clean_image_is_found(factory, target, wrap):
    expected = factory()(None, X, {"x": CLEAN})
    assert float(factory(target)(None, X, wrap(CLEAN))) == float(expected)


def test_part_selects_the_primal_half_of_a_saddle_point():
    pair = (jnp.asarray(X), jnp.ones((2, 5, 6)))
    assert float(squared_error(part=0)(None, pair, {"x": CLEAN})) == float(squared_error()(None, X, {"x": CLEAN}))
    with pytest.raises(ValueError, match="part"):
        squared_error()(None, pair, {"x": CLEAN})


def test_pytrees_are_compared_leaf_by_leaf():
    x, clean = {"a": X, "b": X[0]}, {"a": CLEAN, "b": CLEAN[1]}
    difference = np.concatenate([D.ravel(), X[0] - CLEAN[1]])
    loss = squared_error(target=None, mean=True)
    assert float(loss(None, x, clean)) == pytest.approx(0.5 * np.mean(difference**2), rel=1e-5)


@pytest.mark.parametrize("factory", FACTORIES)
def test_dtype_follows_the_unknown(factory):
    for clean in (CLEAN, np.ones((5, 6), np.uint8)):
        assert factory()(None, jnp.asarray(X, jnp.float32), {"x": clean}).dtype == jnp.float32


@pytest.mark.parametrize("factory", FACTORIES)
def test_equal_losses_compare_and_hash_equal(factory):
    assert factory() == factory() and hash(factory()) == hash(factory())
    assert len({factory(), factory(), factory("truth"), factory(mean=True), factory(part=0)}) == 4
    assert pickle.loads(pickle.dumps(factory())) == factory()


def test_different_losses_differ():
    assert len({f() for f in FACTORIES} | {huber(delta=0.2), charbonnier(eps=0.2)}) == 5
    assert huber(delta=1) == huber(delta=np.float64(1.0))


def test_equal_losses_compile_once():
    traces = []

    def value(loss, x, data):
        traces.append(loss)
        return loss(None, x, data)

    jitted = jax.jit(value, static_argnums=0)
    for loss in (huber(), huber(), huber(delta=0.1)):
        jitted(loss, jnp.asarray(X), {"x": jnp.asarray(CLEAN)})
    assert len(traces) == 1


def test_a_penalty_of_one_s_own():
    loss = ImageLoss(lambda d, scale: scale * jnp.abs(d), 2.0)
    assert float(loss(None, X, {"x": CLEAN})) == pytest.approx(2 * np.sum(np.abs(D)), rel=1e-5)


def test_under_vmap_one_value_per_sample():
    xs, cleans = np.stack([X, CLEAN]), np.stack([CLEAN, CLEAN])
    values = jax.vmap(squared_error(), in_axes=(None, 0, 0))(None, xs, {"x": cleans})
    np.testing.assert_allclose(values, [0.5 * np.sum(D**2), 0], rtol=1e-5)


@pytest.mark.parametrize(
    "target, data, error, message",
    [
        ("z", {"x": CLEAN}, KeyError, "'z'"),
        (2, (CLEAN, CLEAN), IndexError, "2 entries"),
        ("x", (CLEAN, CLEAN), TypeError, "position"),
        (0, CLEAN, TypeError, "target=None"),
        ("x", {"x": CLEAN[:, :1]}, ValueError, r"\(5, 6\).*\(5, 1\)"),
        ("x", {"x": CLEAN * 1j}, TypeError, "real"),
    ],
)
def test_data_that_does_not_fit_is_refused(target, data, error, message):
    with pytest.raises(error, match=message):
        squared_error(target)(None, X, data)


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_scales_must_be_positive_and_finite(value):
    with pytest.raises(ValueError, match="delta"):
        huber(delta=value)
    with pytest.raises(ValueError, match="eps"):
        charbonnier(eps=value)


def half_square(weight, x):
    return 0.5 * weight * jnp.sum(x**2)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_adversarial_loss_of_a_quadratic_in_closed_form(t):
    weight, data = 0.7, {"x": CLEAN, "naive": X, "mix": t}
    slope = weight * np.linalg.norm(t * CLEAN + (1 - t) * X)
    expected = 0.5 * weight * (np.sum(CLEAN**2) - np.sum(X**2)) + 3 * (slope - 1) ** 2
    assert float(Adversarial(half_square, penalty=3.0)(weight, data)) == pytest.approx(expected, rel=1e-5)


def test_adversarial_gradient_against_differences():
    """Through the gradient of a convex network, in all of its parameters."""
    with jax.enable_x64(True):
        R = jb.regularizers.ICNN(hidden=4, outputs=2, size=3, width=0.3)
        theta, back = ravel_pytree(R.init(jax.random.key(0), weight=1.0, dtype=jnp.float64))
        clean, naive = (np.pad(v, 2) for v in (CLEAN, X))
        data = {"x": jnp.asarray(clean), "naive": jnp.asarray(naive), "mix": 0.4}
        value = jax.jit(lambda flat: Adversarial(R)(back(flat), data))
        slope, step = jax.grad(value)(theta), 1e-6
        for seed in range(3):
            v = np.random.default_rng(seed).standard_normal(theta.shape)
            difference = (value(theta + step * v) - value(theta - step * v)) / (2 * step)
            assert float(slope @ v) == pytest.approx(float(difference), rel=1e-5)


def test_adversarial_loss_where_the_gradient_of_the_regularizer_is_zero():
    data = {"x": jnp.zeros(3), "naive": jnp.zeros(3), "mix": 0.5}
    value, slope = jax.value_and_grad(Adversarial(half_square))(1.0, data)
    assert float(value) == 10 and float(slope) == 0


def test_adversarial_loss_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="penalty"):
        Adversarial(half_square, penalty=-1.0)
    with pytest.raises(ValueError, match="shape"):
        Adversarial(half_square)(1.0, {"x": CLEAN[:, :1], "naive": X, "mix": 0.5})
    with pytest.raises(KeyError, match="mix"):
        Adversarial(half_square)(1.0, {"x": CLEAN, "naive": X})
