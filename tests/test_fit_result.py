"""What a result says of its values: the best parameters, a value that rose, a gradient that is not finite."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb

ORACLE = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
DATA = jnp.array([2.0])


def descent(rate, oracle=ORACLE):
    return jb.FirstOrder(oracle, optax.sgd(rate))


def value(params):
    return float(ORACLE.value(params, DATA).value)


def test_the_best_is_where_the_least_value_was_seen():
    momentum = jb.FirstOrder(ORACLE, optax.sgd(0.1, momentum=0.9))  # goes past its aim and comes back
    result = jb.fit(momentum, jnp.array(0.0), DATA, steps=14)
    least = int(np.argmin(result.history["value"]))
    assert 0 < least < 13 and value(result.best) == result.history["value"][least] < value(result.params)
    diverged = jb.fit(descent(2.5), jnp.array(0.0), DATA, steps=9)
    assert float(diverged.best) == 0.0 and abs(float(diverged.params)) > 10


def test_the_best_survives_a_resume(tmp_path):
    momentum = jb.FirstOrder(ORACLE, optax.sgd(0.1, momentum=0.9))
    whole = jb.fit(momentum, jnp.array(0.0), DATA, steps=14)
    for steps in (5, 11, 14, 14):
        again = jb.fit(momentum, jnp.array(0.0), DATA, steps=steps, checkpoint=tmp_path)
    assert float(again.best) == float(whole.best) != float(whole.params)


def test_values_of_other_batches_are_not_compared(tmp_path):
    for _ in range(2):  # resumed too
        result = jb.fit(descent(0.5), jnp.array(0.0), lambda step: DATA + step**2, steps=5, checkpoint=tmp_path)
        assert result.best is result.params
    assert f"the value rose from 2 to {result.history['value'][-1]:.6g}, each that of its own batch." in result.message
    best = jb.Validation(ORACLE, DATA)
    result = jb.fit(descent(0.5), jnp.array(0.0), lambda step: DATA + step**2, steps=5, callback=best)
    assert best.value < value(result.best)


@dataclass(frozen=True)
class Scripted(jb.Method):
    """Reports what it is told to; the parameters count the steps."""

    values: tuple = ()
    statuses: tuple = ()
    slopes: tuple | None = ()

    def init(self, params, batch):
        return jb.MethodState(params=params, warm=None, tol=0.0, adjoint_tol=0.0)

    def step(self, state, batch):
        at = state.params.astype(int)
        slope = None if self.slopes is None else jnp.array(self.slopes or len(self.values) * (1.0,))[at]
        status = jnp.array(self.statuses or len(self.values) * (0,))[at]
        info = jb.StepInfo(jnp.array(self.values)[at], slope, 0.0, 1.0, 0.0, 0.0, 1, status, False)
        return replace(state, params=state.params + 1.0), info


def scripted(steps=None, **script):
    method = Scripted(ORACLE, **script)
    return jb.fit(method, jnp.array(0.0), DATA, steps=len(method.values) if steps is None else steps)


def test_only_sound_values_are_best():
    status = jb.Status
    codes = (0, status.MAX_STEPS, status.PRECISION, status.STAGNATED)
    assert float(scripted(values=(4.0, 1.0, 3.0, 2.0), statuses=codes).best) == 2.0
    unsound = scripted(values=(4.0, 1.0), statuses=(status.MAX_STEPS, status.STAGNATED))
    assert float(unsound.best) == float(unsound.params) == 2.0
    assert float(scripted(values=(3.0, 3.0, 3.0)).best) == 0.0  # the first of equal ones
    assert float(scripted(values=(3.0, jnp.nan)).best) == 0.0
    assert float(scripted(values=(3.0,), steps=0).best) == 0.0


def test_a_value_that_rose_is_said():
    assert "But the value rose from 1 to 3.5." in scripted(values=(1.0, 0.5, 3.5)).message
    for values in ((3.0, 4.0, 2.0), (1.0, 1.0), (1.0,)):
        assert "rose" not in scripted(values=values).message
    assert "the value rose from 2 to" in jb.fit(descent(2.5), jnp.array(0.0), DATA, steps=4).message


def test_a_gradient_that_is_not_finite_fails():
    for slope in (jnp.nan, jnp.inf):
        result = scripted(values=(3.0, 2.0, 1.0), slopes=(1.0, 1.0, slope))
        assert result.status is jb.FitStatus.FAILED and result.steps == 2 and float(result.params) == 2.0
        assert "Step 2 gave a gradient that is not finite; the state is the one before it." in result.message
    unknown = scripted(values=(3.0, 2.0), slopes=None)  # a method that has none
    assert unknown.status is jb.FitStatus.FINISHED and np.isnan(unknown.history["grad_norm"]).all()


@pytest.mark.parametrize("make", [jb.MAID, jb.HOAG, jb.NBA, lambda oracle: descent(0.1, oracle)])
def test_no_method_ends_well_at_a_gradient_that_is_nan(make):
    """The derivative of sqrt at 0: the value is finite."""
    oracle = jb.explicit.Oracle(lambda p, d: jnp.sqrt(jnp.sum((p - d) ** 2)))
    result = jb.fit(make(oracle), jnp.array([0.5]), jnp.array([[0.5]]), steps=5)
    assert result.status is jb.FitStatus.FAILED and result.steps == 0 and "not finite" in result.message
    assert np.isfinite(np.asarray(jax.device_get(result.params))).all()
