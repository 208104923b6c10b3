"""DFO-LS: it finds the minimiser without gradients, in its bounds and its budget, and says how it ended."""

import signal
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import DIAGONAL, QUADRATIC

import jbilevel as jb

ORACLE = jb.implicit.Oracle(QUADRATIC.problem, QUADRATIC.loss)


@pytest.fixture
def dfols():
    pytest.importorskip("dfols")
    return jb.dfols


def test_finds_parameters_that_explain_the_data(dfols):
    """x = y/(1 + e^p a) at p = -1/2, plus noise that moves the minimiser a little."""
    noisy = QUADRATIC.batch(0, 4)
    batch = noisy | {"x": noisy["y"] / (1 + np.exp(-0.5) * DIAGONAL[None]) + 0.01 * noisy["x"]}
    result = dfols.minimise(ORACLE, jnp.asarray(-3.0), batch, budget=5000, tol=1e-2)
    grid = np.linspace(-1.0, 0.0, 101)
    values = [float(ORACLE.value(jnp.asarray(p), batch, tol=1e-8).value) for p in grid]
    found = float(ORACLE.value(result.params, batch, tol=1e-8).value)
    assert found <= min(values) * (1 + 1e-3)
    assert abs(float(result.params) - grid[np.argmin(values)]) <= 0.02
    assert np.all(np.diff(result.history["work"]) > 0) and result.work == result.history["work"][-1]
    assert result.history["tol"].min() < 1e-2  # the accuracy followed the trust region


def test_bounds_and_budget_are_kept(dfols):
    batch = QUADRATIC.batch(0, 4)
    seen = []
    result = dfols.minimise(
        ORACLE, jnp.asarray(-3.0), batch, budget=150, tol=1e-2, lower=-3.5, upper=-2.9,
        callback=lambda k, params, value: seen.append(float(params)),
    )  # fmt: skip
    assert min(seen) >= -3.5 and max(seen) <= -2.9
    assert result.work <= 150 + 60  # the evaluation under way is finished
    assert len(seen) == result.steps


def test_a_callback_stops(dfols):
    result = dfols.minimise(
        ORACLE, jnp.asarray(0.0), QUADRATIC.batch(0, 2), budget=1e4, tol=1e-2, callback=lambda k, p, v: k == 2
    )
    assert result.steps == 3 and result.status == jb.FitStatus.STOPPED


def test_what_cannot_be_done_is_said(dfols):
    batch = QUADRATIC.batch(0, 2)
    with pytest.raises(ValueError, match="at most 50 parameters"):
        dfols.minimise(ORACLE, jnp.zeros(51), batch, budget=10, tol=1e-2)
    with pytest.raises(ValueError, match="`budget` must be positive"):
        dfols.minimise(ORACLE, jnp.asarray(0.0), batch, budget=0, tol=1e-2)
    negative = jb.implicit.Oracle(QUADRATIC.problem, lambda p, x, data: -jnp.sum(x**2))
    with pytest.raises(ValueError, match="nonnegative losses"):
        dfols.minimise(negative, jnp.asarray(0.0), batch, budget=10, tol=1e-2)


def test_params_keep_their_dtype(dfols):
    result = dfols.minimise(ORACLE, jnp.asarray(0.0, jnp.float32), QUADRATIC.batch(0, 2), budget=60, tol=1e-2)
    assert result.params.dtype == jnp.float32


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(number, monkeypatch):
    """Whatever package owns the loop: this one evaluates the same point for ever."""

    def solve(function, start, **settings):
        while True:
            function(start)

    monkeypatch.setitem(sys.modules, "dfols", types.SimpleNamespace(solve=solve))
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = jb.dfols.minimise(
            ORACLE, jnp.asarray(-3.0), QUADRATIC.batch(0, 2), budget=1e9, tol=1e-2,
            callback=lambda step, params, value: signal.raise_signal(number) if step == 2 else None,
        )  # fmt: skip
        assert result.status is jb.FitStatus.INTERRUPTED and result.steps == 3 and result.best is result.params
        assert signal.getsignal(signal.SIGTERM) == before[0]
    finally:
        signal.signal(signal.SIGINT, before[1])
