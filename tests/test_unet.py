"""U-Net against numpy, its size, fine-tuning of the last blocks, odd sides, volumes, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees


def made(inputs=1, outputs=3, **settings):
    settings = {"widths": (4, 6, 5), "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)} | settings
    return jb.nets.UNet(inputs, outputs, **settings)


def convolve(v, conv):
    half = conv["kernel"].shape[0] // 2
    padded = np.pad(v, ((half, half), (half, half), (0, 0)))
    taps = np.lib.stride_tricks.sliding_window_view(padded, conv["kernel"].shape[:2], (0, 1))  # (H, W, channels, a, b)
    return np.einsum("hwcab,abcd->hwd", taps, conv["kernel"]) + conv["bias"]


def pair(v, block):
    for n in range(2):
        v = np.maximum(convolve(v, block["convs"][n]), 0)
    return v


def up(v):
    def along(v):
        before, after = np.concatenate([v[:1], v[:-1]]), np.concatenate([v[1:], v[-1:]])
        return np.stack([0.75 * v + 0.25 * before, 0.75 * v + 0.25 * after], 1).reshape(-1, *v.shape[1:])

    return along(along(v).swapaxes(0, 1)).swapaxes(0, 1)


def pool(v):
    return v.reshape(v.shape[0] // 2, 2, v.shape[1] // 2, 2, -1).max((1, 3))


def test_equals_numpy():
    f, params = jb.nets.from_flax(made())
    x = np.random.default_rng(0).random((8, 12))
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    first = pair(x[..., None], p["downs"][0])
    second = pair(pool(first), p["downs"][1])
    third = pair(pool(second), p["downs"][2])
    v = pair(np.concatenate([up(third), second], -1), p["ups"][0])
    v = pair(np.concatenate([up(v), first], -1), p["ups"][1])
    expected = convolve(v, p["output"])
    np.testing.assert_allclose(jax.jit(f)(params, x), np.moveaxis(expected, -1, 0), rtol=1e-9, atol=1e-12)
    assert expected.shape == (8, 12, 3) and np.ptp(expected) > 1e-3


def test_odd_sides_and_volumes():
    x = np.random.default_rng(0).random((7, 10))
    net = made()
    whole = net(np.pad(x, ((0, 1), (0, 2)), mode="edge"))
    np.testing.assert_allclose(net(x), whole[:, :7, :10], rtol=1e-12)
    volume = made(2, 1, dims=3, widths=(2, 3))
    assert volume(jnp.ones((2, 4, 5, 6))).shape == (4, 5, 6)


def test_residual_starts_from_the_image():
    net = made(1, 1, residual=True)
    plain = made(1, 1)
    x = jnp.asarray(np.random.default_rng(0).random((8, 8)))
    np.testing.assert_allclose(net(x), x + plain(x), rtol=1e-12)
    assert net(x).shape == (8, 8)


def test_fine_tuning_moves_the_last_blocks_only():
    net = made(widths=(4, 6, 5, 3))
    f, params = jb.nets.from_flax(net)
    trainable, frozen = jb.partition(params, net.last(2))

    def loss(trainable, data):
        return jnp.mean((f(jb.combine(trainable, data["frozen"]), data["x"]) - 1.0) ** 2)

    oracle = jb.explicit.Oracle(loss, in_axes={"x": 0, "frozen": None})
    batch = {"x": jnp.ones((2, 8, 8)), "frozen": frozen}
    result = jb.fit(jb.FirstOrder(oracle, optax.adam(1e-2), tol=1.0, adjoint_tol=1.0), trainable, batch, steps=3)
    assert result.history["value"][-1] < result.history["value"][0]
    before, after = (jax.tree.leaves(tree) for tree in (trainable, result.params))
    assert not any(np.array_equal(a, b) for a, b in zip(after, before, strict=True))
    assert trees.size(trainable) == sum(trees.size(nnx.state(m)) for m in (net.ups[1], net.ups[2], net.output))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: made(widths=(4,)), "at least two levels"),
        (lambda: made(1, 3, residual=True), "as many outputs"),
        (lambda: made()(jnp.ones((2, 8, 8))), "`x` must have 2 axes"),
        (lambda: made(2, 1)(jnp.ones((8, 8))), "2 axes after 2 channels"),
        (lambda: jb.nets.VGG, "no attribute 'VGG'"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises((ValueError, AttributeError), match=words):
        build()
