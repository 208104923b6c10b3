"""Modules of Flax (nnx, Linen) and Equinox as energies: same output, and hypergradients against finite differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jbilevel as jb
from jbilevel._core import trees

X = jnp.linspace(-1.0, 1.0, 6)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 5, rngs=rngs, param_dtype=jnp.float64)
        self.second = nnx.Linear(5, 1, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))[0]


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1, param_dtype=jnp.float64)(jnp.tanh(linen.Dense(5, param_dtype=jnp.float64)(x)))[0]


def nnx_network():
    model = NNX(nnx.Rngs(0))
    return model, jb.nets.from_flax(model)


def linen_network():
    model = Linen()
    variables = model.init(jax.random.key(0), X)
    return (lambda x: model.apply(variables, x)), jb.nets.from_flax(model, variables)


def equinox_network():
    model = eqx.nn.MLP(6, "scalar", 5, 1, activation=jnp.tanh, key=jax.random.key(0))
    return model, jb.nets.from_equinox(model)


@pytest.mark.parametrize(
    "network", [nnx_network, *(pytest.param(n, marks=pytest.mark.slow) for n in (linen_network, equinox_network))]
)
def test_a_network_is_an_energy(network):
    model, (f, params) = network()
    np.testing.assert_allclose(f(params, X), model(X), rtol=1e-12)

    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.1 * f(p, x) ** 2, lambda p, d: d, strong_convexity=0.5
    )
    oracle = jb.implicit.Oracle(problem, lambda p, x, d: 0.5 * jnp.sum((x - X) ** 2))
    batch = jnp.stack([X + 0.3, 2 * X])
    hg = oracle(params, batch, tol=1e-11)
    assert hg.status == jb.Status.CONVERGED

    direction = jax.tree.map(jnp.ones_like, params)
    shifted = [jax.tree.map(lambda p, v, s=s: p + s * v, params, direction) for s in (1e-5, -1e-5)]
    up, down = (oracle.value(p, batch, tol=1e-11).value for p in shifted)
    slope = trees.dot(hg.grad, direction)
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-6)


def test_what_is_not_a_module_is_refused():
    with pytest.raises(TypeError, match="flax.nnx or flax.linen"):
        jb.nets.from_flax(lambda x: x)
    with pytest.raises(TypeError, match="variables"):
        jb.nets.from_flax(Linen())
    with pytest.raises(TypeError, match="no inexact array"):
        jb.nets.from_equinox(eqx.nn.Lambda(jnp.tanh))
