"""A method in which every number depends on the warm starts, for the tests of the loop."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel import explicit
from jbilevel._core.results import Status, StepInfo
from jbilevel._method.base import Method, MethodState

TRACES = []  # one entry per trace of a step


class State(MethodState):
    count: Any


def state_of(params, warm, count):
    return State(params=params, warm=warm, tol=0.0, adjoint_tol=0.0, count=count)


class Cold(explicit.Oracle):
    """An oracle as far as `fit` needs one: x starts at zero, with no owner and no visits."""

    def init(self, params, batch):
        n = batch["y"].shape[0]
        return {"x": jnp.zeros_like(batch["y"]), "owner": jnp.full(n, -1), "visits": jnp.zeros(n)}


@dataclass(frozen=True)
class Toy(Method):
    """Denoising by a few relaxation steps from the warm start, so that every number depends on the warm starts.

    The warm start also carries its owner and its number of visits; ``error`` reports how many samples got the warm
    start of another one, and ``tol`` how often the samples of the batch had been there before.
    """

    oracle: explicit.Oracle = Cold(jnp.sum)
    rate: float = 0.1
    nan_value_at: int = -1
    nan_params_at: int = -1
    done_at: int = -1

    def init(self, params, batch):
        return state_of(params, self.oracle.init(params, batch), 0)  # 0: weakly typed, as users write it

    def step(self, state, batch):
        TRACES.append(jax.tree.map(jnp.shape, batch))
        owner = batch.get("index", jnp.arange(batch["y"].shape[0])).astype(state.warm["owner"].dtype)
        strangers = jnp.sum((state.warm["owner"] != owner) & (state.warm["owner"] != -1))

        def loss(params):
            x = 0.7 * state.warm["x"] + 0.3 * jnp.tanh(batch["y"] * jnp.exp(params["w"])[None, :])
            return jnp.mean((x - 0.5 * batch["y"]) ** 2), x

        (value, x), grad = jax.value_and_grad(loss, has_aux=True)(state.params)
        params = jax.tree.map(lambda p, g: p - self.rate * g, state.params, grad)
        params["w"] = jnp.where(state.count == self.nan_params_at, jnp.nan, params["w"])
        info = StepInfo(
            value=jnp.where(state.count == self.nan_value_at, jnp.nan, value),
            grad_norm=jnp.sqrt(jnp.sum(grad["w"] ** 2)),
            error=strangers,
            step=self.rate,
            tol=jnp.sum(state.warm["visits"]),
            adjoint_tol=None,
            work=10,
            status=jnp.where(state.count == self.nan_value_at, Status.NONFINITE, Status.CONVERGED),
            done=state.count == self.done_at,
            stationary=state.count == self.done_at,
        )
        warm = {"x": x, "owner": owner, "visits": state.warm["visits"] + 1}
        return state_of(params, warm, state.count + 1), info


PARAMS = {"w": jnp.array([0.3, -0.2, 0.1])}
IMAGES = np.sin(np.arange(7 * 3, dtype=float)).reshape(7, 3)
FULL = {"y": IMAGES}


def mini(step, size=3):
    """Three of seven images per step, in an order that visits some before others."""
    index = (np.array([0, 1, 3])[:size] * (step + 1) + step) % 7
    return {"y": IMAGES[index], "index": index}


def without_index(step):
    return {"y": mini(step)["y"]}


def generator():
    return map(mini, itertools.count())


KINDS = {"full": lambda: FULL, "indexed": lambda: mini, "plain": lambda: without_index, "iterator": generator}


def assert_same_run(a, b):
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert (a.steps, a.work) == (b.steps, b.work)
    for name in a.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(a.history[name], b.history[name], err_msg=name)
