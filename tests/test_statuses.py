"""CONVERGED is said only where something was shown to be small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel import FitStatus, Status

ONE = np.zeros(1)
METHODS = {"MAID": jb.MAID, "NBA": jb.NBA}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


def lower(**options):
    """x_hat = 2 p, whose best p is 1.5."""
    problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - p * d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    return problem.oracle(lambda p, x, d: 0.5 * (x - 3.0) ** 2, **options)


@jax.custom_jvp
def backwards(p):
    return 0.5 * jnp.sum((p - 3.0) ** 2)


@backwards.defjvp
def _(primals, tangents):
    return backwards(primals[0]), -jnp.sum((primals[0] - 3.0) * tangents[0])


STUCK = {
    "gradient of the wrong sign": (jb.explicit.Oracle(lambda p, d: backwards(p) + 0.0 * d), -3.0, ONE, {}),
    "solves that take no step": (lower(solver=jb.solvers.AGD(), max_steps=0), 1.0, np.full(1, 2.0), {}),
}


@pytest.mark.parametrize("case", STUCK.values(), ids=STUCK.keys())
def test_stuck_is_not_converged(case):
    oracle, params, data, options = case
    result = jb.fit(jb.MAID(oracle, **options), jnp.asarray(params), data, steps=50)
    assert result.status == FitStatus.STALLED, result.message
    assert "gradient" in result.message and f"{result.history['grad_norm'][-1]:.3g}"[:3] in result.message


VALLEY = jb.explicit.Oracle(lambda p, d: 0.5 * (1e8 * (p[0] - 1) ** 2 + (p[1] - 1) ** 2) + 0.0 * d)


def test_a_first_step_that_is_far_too_long_does_not_stop_maid():
    for result, best in (
        (jb.fit(jb.MAID(VALLEY), jnp.array([1.0001, 50.0]), ONE, steps=50), 1.0),
        (jb.fit(jb.MAID(lower(), step_size=1e6), jnp.array(1.0), np.full(1, 2.0), steps=50), 1.5),
    ):
        assert result.status == FitStatus.CONVERGED, result.message
        np.testing.assert_allclose(result.params, best, atol=1e-6)


@every_method
def test_a_minimum_is_converged(make):
    result = jb.fit(make(lower()), jnp.asarray(1.0), np.full(1, 2.0), steps=200)
    assert result.status == FitStatus.CONVERGED, result.message
    assert float(result.params) == pytest.approx(1.5, abs=1e-4)


@every_method
def test_a_gradient_that_is_not_finite(make):
    """The value is; the gradient at the kink is not."""
    kinked = jb.explicit.Oracle(lambda p, d: jnp.sqrt((p - 0.5) ** 2) + 0.0 * d)
    result = jb.fit(make(kinked), jnp.asarray(0.5), ONE, steps=50)
    assert result.status == FitStatus.FAILED and result.work <= 2
    assert "gradient" in result.message


@every_method
def test_a_zero_gradient_ends_at_once(make):
    oracle = jb.explicit.Oracle(lambda p, d: 0.5 * (p - d) ** 2)
    result = jb.fit(make(oracle), jnp.asarray(2.0), np.full(1, 2.0), steps=50)
    assert result.status == FitStatus.CONVERGED and result.steps == 1 and result.work <= 3


def test_a_maximum():
    saddle = jb.SmoothProblem(lambda p, x, d: -0.5 * jnp.sum(x**2) + jnp.sum(x**4), lambda p, d: jnp.zeros(3))
    for solver in (None, jb.solvers.AGD(smoothness=20.0), jb.solvers.LBFGS()):
        _, info = jb.solve(saddle, (), (), solver=solver)
        assert info.status == Status.INDEFINITE
    x, info = jb.solve(saddle, (), (), jnp.full(3, 0.1))
    np.testing.assert_allclose(x, 0.5, atol=1e-4)
    assert info.status <= Status.PRECISION


def test_a_spent_budget_is_not_converged():
    result = jb.fit(jb.MAID(lower()), jnp.asarray(1.0), np.full(1, 2.0), steps=50, work_budget=10)
    assert result.status == FitStatus.FINISHED and "budget" in result.message
