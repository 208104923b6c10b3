"""Saddle-point problems and PDHG: closed forms, certificates, the invariant of the steps, statuses, refusals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import compilations, distance

import jbilevel as jb
from benchmarks.saddle_problems import (
    QUADRATIC,
    ROOTS,
    _frobenius,
    experts,
    huber_energy,
    huber_tv,
    quadratic_exact,
    total_variation,
)
from jbilevel import prox
from jbilevel._views.saddle import power_norm
from jbilevel.solvers import PDHG
from jbilevel.solvers.loop import run

HUBER = huber_tv(8)
SETUPS = {"quadratic": QUADRATIC, "roots": ROOTS, "huber": HUBER, "experts": experts(8), "tv": total_variation(8)}


def of(setup, seed=0):
    return setup.problem, setup.params(seed), setup.sample(seed)


@pytest.mark.parametrize("name", SETUPS)
def test_problems_are_what_they_claim(name):
    problem, params, data = of(SETUPS[name])
    problem.verify(params, data)


def test_closed_form_and_the_certificate():
    """The bound on ||x - x_hat|| holds at every tolerance, is met by tol, and is not far off."""
    ratios = []
    for seed in range(25):
        problem, params, data = of(QUADRATIC, seed)
        exact = quadratic_exact(params, data)
        for tol in (1e-1, 1e-3, 1e-6):
            (x, _), info = jb.solve(problem, params, data, tol=tol)
            jb.check(info)
            true = float(jnp.linalg.norm(x - exact[0]))
            assert true <= float(info.error) + 1e-14 and float(info.error) <= tol
            ratios.append(float(info.error) / true)
    assert 1 <= np.median(ratios) <= 4
    pair, _ = jb.solve(problem, params, data, tol=1e-13)
    assert distance(pair, exact) <= 1e-12


def test_certificate_where_both_functions_have_kinks():
    for seed in range(6):
        problem, params, data = of(HUBER, seed)
        nonnegative = replace(problem, prox_primal=_nonnegative)
        (exact, _), _ = jb.solve(nonnegative, params, data, tol=1e-12)
        assert float(jnp.min(exact)) == 0.0
        for tol in (1.0, 1e-1, 1e-3):
            (x, _), info = jb.solve(nonnegative, params, data, tol=tol)
            assert float(jnp.linalg.norm(x - exact)) <= float(info.error) + 1e-12


def _nonnegative(params, v, step, data):
    return prox.box(prox.squared_distance(v, step, data["y"] - 0.5), 0.0)


def test_huber_tv_is_the_smooth_problem():
    smooth = jb.SmoothProblem(huber_energy, lambda p, data: data["y"], strong_convexity=1.0)
    problem, params, data = of(HUBER)
    (x, _), _ = jb.solve(problem, params, data, tol=1e-11)
    expected, info = jb.solve(smooth, params, data, tol=1e-11)
    jb.check(info)
    assert distance(x, expected) <= 1e-10


# what is claimed to be known, of a problem that has both moduli
KNOWN = {"both": {}, "primal": {"mu_dual": 0.0}, "dual": {"mu_primal": 0.0}, "none": {"mu_primal": 0.0, "mu_dual": 0.0}}


@pytest.mark.slow
@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("known", KNOWN)
def test_steps_obey_the_norm_and_reach_the_solution(known, accelerate):
    problem, params, data = of(QUADRATIC, 1)
    problem = replace(problem, constants=None, **KNOWN[known])
    exact = quadratic_exact(params, data)
    solver = PDHG(accelerate=accelerate, stride=7)
    view, target = problem.view(params, data), jnp.asarray(0.0)

    @jax.jit
    def states():
        first = solver.init(view, problem.start(params, data), target)
        return jax.lax.scan(lambda s, _: (solver.step(view, s, target),) * 2, first, length=100)[1]

    found = states()
    matrix = np.linalg.norm(params["K"], 2)
    assert np.all(found.point.tau * found.point.sigma * matrix**2 <= 1 + 1e-12)
    away = [np.linalg.norm(part - hat[None], axis=1) for part, hat in zip(found.x, exact, strict=True)]
    if accelerate and known in ("primal", "dual"):
        # Chambolle & Pock 2011, Theorem 2, with tau = sigma = 1/||K|| at the start; twice that for its (1 + epsilon)
        own, mu = (away[0], params["a"]) if known == "primal" else (away[1], params["b"])
        count = 7 * np.arange(1, 101) + 1
        start = distance(problem.start(params, data), exact)
        assert np.all(own[20:] <= np.sqrt(2) * float(_frobenius(params, data) / mu) * start / count[20:])
    else:
        assert max(a[-1] for a in away) <= 1e-9
    proven = np.isfinite(jb.solve(problem, params, data, solver=solver)[1].error)
    assert proven == (known == "both")


def test_fixed_length_is_the_same_iteration():
    problem, params, data = of(HUBER)
    view, x0 = problem.view(params, data), problem.start(params, data)
    solver = PDHG(stride=1)
    fixed = solver.iterate(view, x0, 30)
    looped = run(solver, view, x0, 0.0, 29).x  # the start takes one
    np.testing.assert_allclose(fixed[0], looped[0], rtol=0, atol=1e-14)


def test_statuses():
    problem, params, data = of(HUBER)
    status = lambda problem, data=data, **options: jb.solve(problem, params, data, **options)[1].status  # noqa: E731
    assert status(problem) == jb.Status.CONVERGED
    assert status(problem, max_steps=10, tol=1e-9) == jb.Status.MAX_STEPS
    assert status(problem, tol=0.0) == jb.Status.PRECISION
    assert status(problem, data | {"y": data["y"].at[2, 3].set(jnp.nan)}) == jb.Status.NONFINITE
    assert status(replace(problem, norm=0.5)) == jb.Status.NORM_BOUND
    with pytest.raises(jb.ConvergenceError, match="stretched a vector by more than `norm` says"):
        jb.check(jb.solve(replace(problem, norm=0.5), params, data)[1])


def test_float32_says_what_it_attained():
    problem, params, data = of(HUBER)
    params, data = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, data))
    (x, y), info = jb.solve(problem, params, data, tol=1e-3)
    assert x.dtype == y.dtype == info.error.dtype == jnp.float32
    assert info.status == jb.Status.CONVERGED
    info = jb.solve(problem, params, data, tol=0.0)[1]
    assert info.status == jb.Status.PRECISION and info.steps < 2000


def test_estimated_norm():
    problem, params, data = of(experts(8))
    view = replace(problem, norm=None).view(params, data)
    exact = float(problem.norm(params, data))
    assert 0.95 * exact <= float(view.norm) <= 1.06 * exact
    # one that is far too small is raised while solving
    small = replace(view, norm=0.3 * view.norm)
    solution = run(PDHG(), small, problem.start(params, data), 1e-8, 5000)
    assert solution.info.status == jb.Status.CONVERGED
    assert float(solution.state.norm) > float(small.norm)
    expected = jb.solve(problem, params, data, tol=1e-8)[0]
    assert distance(solution.x, expected) <= 1e-6
    assert float(power_norm(view, problem.start(params, data)[0])) <= exact * (1 + 1e-12)


def test_one_compilation_and_warm_starts():
    problem, params, data = of(HUBER, 3)
    pair, _ = jb.solve(problem, params, data, tol=1e-8)
    with compilations() as compiled:
        for tol in (1e-2, 1e-7, np.inf):
            assert jb.solve(problem, params, data, pair, tol=tol)[1].steps == 0
    assert not [message for message in compiled if "solve" in message]


class Unhashable(dict):
    def __call__(self, params, x, data):
        return params["K"] @ x


def changed(**fields):
    return replace(QUADRATIC.problem, constants=None, **fields)


@pytest.mark.parametrize(
    "problem, message",
    [
        (changed(linear=lambda p, x, data: p["K"] @ x**2), "must be linear in x"),
        (changed(linear=lambda p, x, data: x), "`linear` of a SaddleProblem must return the shape"),
        (changed(prox_dual=lambda p, v, step, data: (v, v)), "`prox_dual` .* must return the structure"),
        (changed(prox_primal=lambda p, v, step, data: v.astype(jnp.float32)), "`prox_primal` .* the dtype float64"),
        (changed(init=lambda p, data: data["d"][0]), "must return a pair"),
        (changed(init=lambda p, data: (data["d"], jnp.zeros(5, int))), "return a float array"),
    ],
)
def test_refuses(problem, message):
    _, params, data = of(QUADRATIC)
    with pytest.raises((TypeError, ValueError), match=message):
        jb.solve(problem, params, data)


@pytest.mark.parametrize(
    "problem, message",
    [
        (changed(norm=0.01), "is no bound on the norm"),
        (changed(linear=lambda p, x, data: p["K"] @ x + 1.0), "is not linear in x"),
        (changed(transpose=lambda p, y, data: 2 * p["K"].T @ y), "is not the transpose"),
        (changed(prox_dual=lambda p, v, step, data: -v), "`prox_dual` .* not firmly nonexpansive"),
        (
            changed(prox_primal=lambda p, v, step, data: prox.soft(jax.lax.stop_gradient(v), step)),
            "`prox_primal` .* differs from its differences",
        ),
    ],
)
def test_verify_names_what_is_wrong(problem, message):
    _, params, data = of(QUADRATIC)
    with pytest.raises(ValueError, match=message):
        problem.verify(params, data)


def test_construction_is_checked():
    with pytest.raises(TypeError, match="`linear` must be a function"):
        changed(linear=None)
    with pytest.raises(ValueError, match="`mu_dual` must be nonnegative"):
        changed(mu_dual=-1.0)
    with pytest.raises(ValueError, match="certify nothing with norm=None"):
        replace(QUADRATIC.problem, norm=None)
    with pytest.raises(TypeError, match="must be hashable"):
        changed(linear=Unhashable())
    with pytest.raises(ValueError, match="`relaxation` of PDHG must lie"):
        PDHG(relaxation=2.0)
    problem, params, data = of(QUADRATIC)
    with pytest.raises(ValueError, match="must be 1 where a modulus"):
        jb.solve(problem, params, data, solver=PDHG(relaxation=1.5))
