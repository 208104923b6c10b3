"""ResNet against numpy in PyTorch's layout, its sizes, frozen statistics, fine-tuning, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees
from jbilevel.nets import resnet

RNG = np.random.default_rng(0)


def made(depth=18, **settings):
    settings = {"classes": 3, "width": 2, "param_dtype": jnp.float64, "rngs": nnx.Rngs(0)} | settings
    return jb.nets.ResNet(depth, **settings)


def shaken(net, seed=0):
    """Random statistics and norms, and something after every block, so that nothing is compared with its start."""
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(net):
        if isinstance(module, nnx.BatchNorm):
            for name, low, high in (("mean", -0.3, 0.3), ("var", 0.5, 2.0), ("scale", 0.5, 1.5), ("bias", -0.2, 0.2)):
                variable = getattr(module, name)
                variable[...] = jnp.asarray(rng.uniform(low, high, variable[...].shape), variable[...].dtype)
    return net


def state_dict(net) -> dict:
    """The names and layouts of torchvision."""
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    found = {}
    for (*outer, last), variable in nnx.to_flat_state(nnx.state(net, (nnx.Param, nnx.BatchStat))):
        array = np.asarray(variable[...])
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
        found[".".join([*map(str, outer), names.get(last, last)])] = np.ascontiguousarray(array)
    return found


# an independent forward pass: channels first, loops over blocks by name


def conv(x, w, stride):
    half = w.shape[2] // 2
    x = np.pad(x, ((0, 0), (half, half), (half, half)))
    taps = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (1, 2))[:, ::stride, ::stride]
    return np.einsum("ihwab,oiab->ohw", taps, w)


def norm(x, d, name):
    mean, var, scale, bias = (
        d[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
    )
    return scale * (x - mean) / np.sqrt(var + 1e-5) + bias


def forward(d, x, *, bottleneck, stem="imagenet"):
    relu = lambda v: np.maximum(v, 0)  # noqa: E731
    x = relu(norm(conv(x, d["conv1.weight"], 2 if stem == "imagenet" else 1), d, "bn1"))
    if stem == "imagenet":
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
        x = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::2, ::2].max((-2, -1))
    for stage in range(1, 5):
        blocks = {name.split(".")[1] for name in d if name.startswith(f"layer{stage}.")}
        for block in sorted(blocks, key=int):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == "0" else 1
            strides = (1, stride, 1) if bottleneck else (stride, 1)
            v = x
            for n, s in enumerate(strides, 1):
                v = norm(conv(v, d[f"{at}.conv{n}.weight"], s), d, f"{at}.bn{n}")
                v = relu(v) if n < len(strides) else v
            if f"{at}.downsample.0.weight" in d:
                x = norm(conv(x, d[f"{at}.downsample.0.weight"], stride), d, f"{at}.downsample.1")
            x = relu(v + x)
    return d["fc.weight"] @ x.mean((1, 2)) + d["fc.bias"]


@pytest.mark.parametrize(
    ("depth", "stem", "shape"),
    [(18, "imagenet", (33, 46)), (18, "small", (8, 9)), pytest.param(50, "imagenet", (32, 40), marks=pytest.mark.slow)],
)
def test_equals_numpy(depth, stem, shape):
    net = shaken(made(depth, stem=stem))
    f, params = jb.nets.from_flax(net)
    x = RNG.random((3, *shape))
    expected = forward(state_dict(net), x, bottleneck=depth >= 50, stem=stem)
    np.testing.assert_allclose(jax.jit(f)(params, x), expected, rtol=1e-9, atol=1e-12)
    assert np.ptp(expected) > 1e-3


@pytest.mark.parametrize(
    ("depth", "size"),
    [
        (18, 11_689_512),
        (50, 25_557_032),
        pytest.param(34, 21_797_672, marks=pytest.mark.slow),
        pytest.param(101, 44_549_160, marks=pytest.mark.slow),
    ],
)
def test_sizes_of_the_paper(depth, size):
    net = nnx.eval_shape(lambda: jb.nets.ResNet(depth, 1000, rngs=nnx.Rngs(0)))
    assert sum(v.size for v in jax.tree.leaves(nnx.state(net, nnx.Param))) == size


def test_statistics_are_frozen_and_calibrated():
    images = jnp.asarray(RNG.random((6, 16, 16)))
    net = made(channels=1, stem="small").calibrate(images)
    f, params = jb.nets.from_flax(net)
    alone, together = f(params, images[0]), jax.jit(jax.vmap(f, (None, 0)))(params, images)[0]
    np.testing.assert_allclose(alone, together, rtol=1e-9)  # no sample sees another
    first = net.conv1(images[..., None])
    np.testing.assert_allclose(net.bn1.mean[...], first.mean((0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(net.bn1.var[...], first.var((0, 1, 2)), rtol=1e-9)


def test_normalisation_is_of_the_input():
    net, plain = (shaken(made(stem="small", normalise=n)) for n in (resnet.IMAGENET, None))
    x = jnp.asarray(RNG.random((3, 8, 8)))
    mean, deviation = (np.reshape(part, (3, 1, 1)) for part in resnet.IMAGENET)
    np.testing.assert_allclose(net(x), plain((x - mean) / deviation), rtol=1e-9)


def test_fine_tuning_moves_the_head_only():
    net = shaken(made(stem="small"))
    f, params = jb.nets.from_flax(net)
    trainable, frozen = jb.partition(params, net.last())
    assert trees.size(trainable) == 16 * 3 + 3
    assert trees.size(jb.partition(params, net.last(1))[0]) > 1000
    oracle = jb.explicit.Oracle(
        lambda p, d: jb.losses.cross_entropy(f(jb.combine(p, d["frozen"]), d["x"]), d["labels"]),
        in_axes={"x": 0, "labels": 0, "frozen": None},
    )
    batch = {
        "x": jnp.moveaxis(jnp.asarray(RNG.random((4, 8, 8, 3))), -1, 1),
        "labels": jnp.array([0, 1, 2, 0]),
        "frozen": frozen,
    }
    result = jb.fit(jb.FirstOrder(oracle, optax.adam(0.1)), trainable, batch, steps=4)
    assert result.history["value"][-1] < result.history["value"][0]


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: made(20), "`depth` must be one of"),
        (lambda: made(stem="tiny"), "`stem` must be one of"),
        (lambda: made(channels=1, normalise=resnet.IMAGENET), "1 means and 1 deviations"),
        (lambda: made()(jnp.ones((2, 3, 8, 8))), "use jax.vmap"),
        (lambda: jb.nets.from_flax(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), "model.eval"),
        (lambda: jb.nets.from_flax(nnx.Dropout(0.5, rngs=nnx.Rngs(0))), "training mode"),
    ],
)
def test_bad_input(build, words):
    with pytest.raises(ValueError, match=words):
        build()
