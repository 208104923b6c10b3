"""Solvers of others: what they get, what is made of what they return, and that they are not believed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smooth_cases_for_tests import CASES, by_jaxopt, by_optimistix, descend, gradient_norm, in_single, solve, tv_energy

import jbilevel as jb
from jbilevel._core.results import Status
from jbilevel.solvers import External
from jbilevel.solvers.loop import solve_jitted


@pytest.mark.parametrize("call", [by_jaxopt, by_optimistix])
def test_the_documented_external_solvers(call):
    solver, case = External(call), CASES["logistic"]
    before = solve_jitted._cache_size()
    for tol in (1e-1, 1e-3, 1e-6):
        x, info = solve(case, solver, tol=tol)
        assert info.status == Status.CONVERGED and gradient_norm(case, x) <= tol * case.params * (1 + 1e-6)
    assert solve_jitted._cache_size() - before == 1


def test_an_external_solver_is_not_believed():
    case = CASES["tv"]
    x, info = solve(case, External(lambda energy, x0, tol, max_steps: x0 + 1.0), x0=jnp.zeros((32, 32)))
    np.testing.assert_array_equal(x, 1.0)
    assert info.status == Status.STAGNATED
    assert float(info.residual) == pytest.approx(gradient_norm(case, x))
    assert float(info.error) == pytest.approx(float(info.residual), rel=1e-11) and info.error >= info.residual
    assert tuple(map(int, info.evaluations)) == (0, 1, 0)


def test_an_external_solver_gets_the_energy_the_warm_start_and_the_limits():
    case, seen = CASES["tv"], {}

    def spy(energy, x0, tol, max_steps):
        jax.debug.callback(lambda **kept: seen.update(kept), value=energy(x0), x0=x0, tol=tol, max_steps=max_steps)
        return x0

    x0 = jnp.full((32, 32), 0.5)
    solve(case, External(spy), x0=x0, tol=0.25, max_steps=77)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen["x0"], x0)
    assert float(seen["value"]) == pytest.approx(float(tv_energy(case.params, x0, case.data)))
    assert (float(seen["tol"]), int(seen["max_steps"])) == (0.25, 77)  # mu = 1


def test_an_external_solver_may_report_its_work():
    def report(energy, x0, tol, max_steps):
        return x0, jnp.asarray(41)

    _, info = solve(CASES["quadratic"], External(report))
    assert int(info.work) == 42


@pytest.mark.parametrize("bad, status", [(np.nan, Status.NONFINITE), (np.inf, Status.NONFINITE)])
def test_an_external_solver_that_returns_no_number(bad, status):
    _, info = solve(CASES["quadratic"], External(lambda energy, x0, *_: jax.tree.map(lambda v: v + bad, x0)))
    assert info.status == status


def test_an_external_solver_that_returns_something_else():
    with pytest.raises(TypeError, match="shaped like x0"):
        solve(CASES["tv"], External(lambda energy, x0, tol, max_steps: x0[0]))
    with pytest.raises(TypeError, match="shaped like x0"):
        solve(CASES["quadratic"], External(lambda energy, x0, tol, max_steps: x0["value"]))


def test_an_external_solver_at_the_precision_of_its_dtype():
    case = CASES["quadratic"]
    near = External(lambda *given: jax.tree.map(lambda v: v * (1 + 4e-7), descend(*given)))
    _, info = jb.solve(case.problem, case.params, in_single(case.data), tol=0.0, solver=near)
    assert info.status == Status.PRECISION
