"""FirstOrder: plain optax on exact gradients, whatever the optimiser; warm starts; projection."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb

D = np.random.default_rng(0).standard_normal((3, 4))
CLEAN = np.random.default_rng(1).standard_normal((3, 4))
BATCH = {"y": jnp.asarray(D), "x": jnp.asarray(CLEAN)}
START = {"weight": jnp.array(0.5, float), "shift": jnp.array([0.1, -0.2, 0.3, 0.0])}


def energy(params, x, data):
    return 0.5 * jnp.sum((x - data["y"] - params["shift"]) ** 2) + 0.5 * jnp.exp(params["weight"]) * jnp.sum(x**2)


def loss(params, x, data):
    return 0.5 * jnp.sum((x - data["x"]) ** 2)


@jax.jit
@jax.value_and_grad
def closed_form(params):
    """Mean loss of x_hat = (y + shift)/(1 + exp(weight))."""
    x = (BATCH["y"] + params["shift"][None, :]) / (1 + jnp.exp(params["weight"]))
    return 0.5 * jnp.mean(jnp.sum((x - BATCH["x"]) ** 2, axis=1))


PROBLEM = jb.SmoothProblem(energy, lambda p, d: jnp.zeros_like(d["y"]), strong_convexity=1.0)
ORACLE = jb.implicit.Oracle(PROBLEM, loss, solver=jb.solvers.AGD(), estimate=False)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.adam(1e-1),
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.1, 8), weight_decay=0.1)),
    ],
    ids=["momentum", "adam", "clipped adamw with a schedule"],
)
def test_equals_optax_on_the_exact_gradient(optimizer):
    method = jb.FirstOrder(ORACLE, optimizer, tol=1e-12, adjoint_tol=1e-12)
    state, params, memory = method.init(START, BATCH), START, optimizer.init(START)
    for _ in range(6):
        value, gradient = closed_form(params)
        updates, memory = optimizer.update(gradient, memory, params)
        params = optax.apply_updates(params, updates)
        state, info = method.step(state, BATCH)
        assert float(info.value) == pytest.approx(float(value), rel=1e-9)
        assert float(info.grad_norm) == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-8)
        assert float(info.step) == pytest.approx(float(optax.tree.norm(updates)), rel=1e-8)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_warm_starts_are_carried():
    method = jb.FirstOrder(ORACLE, optax.sgd(0.0), tol=1e-8, adjoint_tol=1e-8)  # params stay
    cold = method.init(START, BATCH)
    once, first = method.step(cold, BATCH)
    twice, second = method.step(once, BATCH)
    solution = (BATCH["y"] + START["shift"][None, :]) / (1 + jnp.exp(START["weight"]))
    np.testing.assert_allclose(once.warm.x, solution, atol=1e-7)
    assert np.all(np.asarray(cold.warm.x) == 0)
    assert int(second.work) < 0.7 * int(first.work)
    again, third = method.step(replace(once, warm=cold.warm), BATCH)
    assert int(third.work) == int(first.work)


def test_projection_applies_at_the_start_and_after_each_update():
    def box(params):
        return params | {"shift": jnp.clip(params["shift"], -0.05, 0.05)}

    method = jb.FirstOrder(ORACLE, optax.sgd(0.5), tol=1e-6, adjoint_tol=1e-6, projection=box)
    state = method.init(START, BATCH)
    for _ in range(5):
        assert np.max(np.abs(state.params["shift"])) <= 0.05
        previous = state.params
        state, _ = method.step(state, BATCH)
    assert np.max(np.abs(state.params["shift"])) <= 0.05
    assert float(previous["weight"]) != float(START["weight"])


def test_automatic_tolerances_are_relative_to_the_cold_start():
    state = jb.FirstOrder(ORACLE, optax.sgd(0.1)).init(START, BATCH)
    gradients = np.linalg.norm(BATCH["y"] + START["shift"][None, :], axis=1)  # grad_x energy at x0 = 0, mu = 1
    assert float(state.tol) == pytest.approx(1e-3 * np.mean(gradients))
    assert float(state.adjoint_tol) == pytest.approx(1e-3 * np.mean(np.linalg.norm(CLEAN, axis=1)))
