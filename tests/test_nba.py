"""NBA: descent of every accepted step, kinks, trust region, stationarity, weighted against scalar penalties."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import compilations
from sparse_for_tests import NET, held_out, one, regression

import jbilevel as jb
from jbilevel.nba import SEARCHES, stationarity

# upper levels that need no lower one
VALLEY = jb.explicit.Oracle(lambda p, d: jnp.abs(p["a"] - d) + 0.1 * (p["b"] - 2.0) ** 2)  # a kink at a = d
RIDGE = jb.explicit.Oracle(lambda p, d: jnp.maximum(jnp.abs(p[0]) * 5.0, jnp.abs(p[1])) + 0.0 * d)

SEARCH = pytest.mark.parametrize("search", SEARCHES)


def sparse_oracle():
    return jb.nonsmooth.Oracle(NET, held_out)


def start(columns, data, strength=0.05):
    return jnp.log(strength * np.abs(data["A"].T @ data["b"]).max()) * jnp.ones(columns)


@SEARCH
def test_minimum_on_a_kink(search):
    """Each gradient at the minimum has norm 1 at least: only the least norm nearby goes to zero."""
    params = {"a": jnp.array(0.0), "b": jnp.array(0.0)}
    data = jnp.array([1.0])
    result = jb.fit(jb.NBA(VALLEY, search=search, step_size=0.3), params, data, steps=60, progress=False)
    assert result.history["value"][-1] <= 1e-6
    assert abs(float(result.params["a"]) - 1) <= 1e-4
    assert np.min(result.history["grad_norm"]) <= 1e-3


@SEARCH
def test_gradients_that_cancel_across_a_smooth_valley_show_no_minimum(search):
    """Condition 1e8: between its walls the least norm is the small slope along the valley, at params it is 1e4."""
    steep = jb.explicit.Oracle(lambda p, d: 0.5 * (1e8 * (p[0] - 1.0) ** 2 + (p[1] - 1.0) ** 2) + 0.0 * d)
    result = jb.fit(jb.NBA(steep, search=search), jnp.array([1.0001, 50.0]), jnp.zeros(1), steps=300, progress=False)
    gap = result.history["value"][-1] / result.history["value"][0]
    assert result.status != jb.FitStatus.CONVERGED or gap <= 1e-6


@SEARCH
def test_bundle_leaves_a_ridge_that_the_gradient_cannot(search):
    """max(5 |u|, |v|) from a point on its crease: one gradient alone zigzags across."""
    far, near = (
        jb.fit(
            jb.NBA(RIDGE, search=search, bundle_steps=count, step_size=0.05),
            jnp.array([0.2, 1.0]),
            jnp.zeros(1),
            steps=40,
            progress=False,
        )
        for count in (0, 5)
    )
    assert near.history["value"][-1] < 1e-3
    assert near.history["value"][-1] <= far.history["value"][-1] + 1e-12


@pytest.mark.slow
@SEARCH
def test_every_accepted_step_descends_and_weighted_beats_scalar(search):
    data = regression(40, 60, 0, share=0.1)
    oracle, values = sparse_oracle(), {}
    for name, count in (("scalar", 1), ("weighted", 60)):
        params = start(count, data)
        params = params[0] if name == "scalar" else params
        result = jb.fit(
            jb.NBA(oracle, search=search, tol=1e-8, adjoint_tol=1e-8), params, one(data), steps=25, progress=False
        )
        history = result.history["value"]
        assert np.all(np.diff(history) <= 1e-7 * history[0])
        values[name] = history[-1]
    assert values["weighted"] < 0.8 * values["scalar"]


@pytest.mark.slow
def test_armijo_holds():
    data = regression(40, 60, 1, share=0.1)
    method, batch = jb.NBA(sparse_oracle(), tol=1e-8, adjoint_tol=1e-8), one(data)
    state = method.init(start(60, data), batch)
    for _ in range(6):
        after, info = method.step(state, batch)
        value = method.oracle.value(after.params, batch, after.warm, tol=1e-8).value
        assert info.step > 0
        assert value <= info.value - 1e-4 * info.step * info.grad_norm**2 + 1e-9
        state = after


@pytest.mark.slow
def test_one_compilation_and_no_closed_batch():
    data = regression(20, 15, 2)
    method, batch = jb.NBA(sparse_oracle()), one(data)
    state, _ = method.step(method.init(start(15, data), batch), batch)
    with compilations() as names:
        for _ in range(2):
            state, _ = method.step(state, batch)
    assert not names


@pytest.mark.slow
def test_a_step_into_overflow_is_refused():
    data = regression(20, 15, 2)
    method, batch = jb.NBA(sparse_oracle(), step_size=1e6), one(data)
    state, info = method.step(method.init(start(15, data), batch), batch)
    assert np.all(np.isfinite(state.params)) and np.isfinite(info.value)


def test_all_zero_solution_is_done():
    data = regression(20, 15, 2)
    method, batch = jb.NBA(sparse_oracle()), one(data)
    _, info = method.step(method.init(jnp.full(15, 10.0), batch), batch)
    assert info.done and info.grad_norm == 0


def test_stationarity_measure():
    data, key = jnp.array([1.0]), jax.random.key(0)
    at_kink = {"a": jnp.array(1.0), "b": jnp.array(2.0)}
    assert stationarity(VALLEY, at_kink, data, radius=1e-3, key=key) <= 1e-3
    away = {"a": jnp.array(0.5), "b": jnp.array(2.0)}
    assert float(stationarity(VALLEY, away, data, radius=1e-3, key=key)) == pytest.approx(1.0, rel=1e-3)


def test_bad_arguments():
    for options in ({"search": "grid"}, {"armijo": 0.0}, {"step_down": 1.0}, {"tries": 0}, {"stationarity": -1.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
            replace(jb.NBA(VALLEY), **options)
    with pytest.raises(ValueError, match="`samples`"):
        stationarity(VALLEY, {"a": 1.0, "b": 1.0}, jnp.ones(1), radius=1.0, key=jax.random.key(0), samples=0)
