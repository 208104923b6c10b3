"""Joint and sequential losses: who gets whose gradient, the weights, a frozen task network, training of both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees

A = jb.operators.ParallelBeam((8, 8), np.pi * np.arange(5) / 5, 11)
PARAMS = {
    "reconstruction": {"scale": jnp.array(0.9), "shift": jnp.full((8, 8), 0.1)},
    "task": {"slope": jnp.array(2.0), "bias": jnp.array(-1.0)},
}
LABELS = np.random.default_rng(0).random((4, 8, 8)) < 0.4
IMAGES = jnp.asarray(np.where(LABELS, 1.0, 0.2))
BATCH = {"y": A(IMAGES), "x": IMAGES, "labels": jnp.asarray(LABELS)}
ONE = jax.tree.map(lambda v: v[0], BATCH)


def R(params, y):
    return params["scale"] * A.fbp(y) + params["shift"]


def T(params, x):
    return params["slope"] * x + params["bias"]


def made(weight, **settings):
    return jb.nets.JointLoss(R, T, jb.losses.dice, weight, **settings)


def mse(params, data):
    return jnp.mean((R(params["reconstruction"], data["y"]) - data["x"]) ** 2)


def task(params, data):
    return jb.losses.dice(T(params["task"], R(params["reconstruction"], data["y"])), data["labels"])


def close(a, b):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-9, atol=1e-12), a, b)


@pytest.fixture(scope="module")
def slopes():
    return {f: jax.jit(jax.grad(f))(PARAMS, ONE) for f in (mse, task)}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_who_gets_whose_gradient(weight, slopes):
    loss = made(weight, scales=(0.1, 2.0))
    found = jax.jit(jax.grad(loss))(PARAMS, ONE)
    of_mse, of_task = (jax.tree.map(lambda v, s=s: v / s, slopes[f]) for f, s in ((mse, 0.1), (task, 2.0)))
    if weight == 1:  # each as if alone
        close(found, {"reconstruction": of_mse["reconstruction"], "task": of_task["task"]})
    else:
        close(found, jax.tree.map(lambda a, b: weight * a + (1 - weight) * b, of_mse, of_task))
    assert trees.norm(slopes[task]["reconstruction"]) > 1e-6  # there was something to keep away
    terms = loss.terms(PARAMS, ONE)
    close(tuple(terms), (mse(PARAMS, ONE), task(PARAMS, ONE)))
    parts = terms.mse / 0.1, terms.task / 2.0
    close(loss(PARAMS, ONE), sum(parts) if weight == 1 else weight * parts[0] + (1 - weight) * parts[1])


def test_both_train_and_the_task_may_be_frozen():
    loss = made(0.5, scales=(0.01, 1.0))
    method = jb.FirstOrder(jb.explicit.Oracle(loss), optax.adam(1e-2))
    result = jb.fit(method, PARAMS, BATCH, steps=15)
    assert result.history["value"][-1] < 0.9 * result.history["value"][0]
    trained, frozen = jb.partition(PARAMS, {"reconstruction": True, "task": False})
    oracle = jb.explicit.Oracle(
        lambda params, data: loss(jb.combine(params, data["frozen"]), data),
        in_axes=dict.fromkeys(BATCH, 0) | {"frozen": None},
    )  # fmt: skip
    alone = jb.fit(jb.FirstOrder(oracle, optax.adam(1e-2)), trained, BATCH | {"frozen": frozen}, steps=15)
    assert trees.size(alone.params) == 65
    assert alone.history["value"][-1] < alone.history["value"][0]


def test_bad_input():
    with pytest.raises(ValueError, match="`weight` must lie"):
        made(1.5)
    with pytest.raises(ValueError, match="`scales` must be"):
        made(0.5, scales=(0.0, 1.0))
    with pytest.raises(KeyError, match="labels"):
        made(0.5)(PARAMS, {"y": ONE["y"], "x": ONE["x"]})


@pytest.mark.slow
def test_networks_train_together():
    small = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    reconstruct, first = jb.nets.from_flax(jb.nets.LPD(A, layers=2, width=3, depth=2, initial="fbp", **small))
    segment, second = jb.nets.from_flax(jb.nets.UNet(1, 1, widths=(3, 4), **small))
    loss = jb.nets.JointLoss(reconstruct, segment, jb.losses.dice, 0.5, scales=(0.01, 1.0))
    params = {"reconstruction": first, "task": second}
    result = jb.fit(jb.FirstOrder(jb.explicit.Oracle(loss), optax.adam(1e-2)), params, BATCH, steps=15)
    assert result.history["value"][-1] < 0.8 * result.history["value"][0]
