"""Piggyback hypergradients: closed forms, other oracles, differences, proven bounds, estimates, cost."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import central_differences, compilations, relative

import jbilevel as jb
from benchmarks.saddle_problems import (
    QUADRATIC,
    ROOTS,
    experts,
    huber_energy,
    huber_tv,
    image_loss,
    pair_loss,
    quadratic_exact,
    total_variation,
)
from jbilevel.solvers import PDHG

HUBER, EXPERTS = huber_tv(8), experts(8)
MODES = pytest.mark.parametrize("mode", ["sequential", "simultaneous"])


@cache
def oracle(setup, loss, **options):
    return jb.piggyback.Oracle(setup.problem, loss, **options)


def batch_of(setup, seed, count=1):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(setup.sample(seed + i) for i in range(count)))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@jax.jit
def quadratic_gradient(params, batch):
    def mean(params):
        losses = jax.vmap(lambda data: pair_loss(params, quadratic_exact(params, data), data))(batch)
        return jnp.mean(losses)

    return jax.value_and_grad(mean)(params)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"correct": True}, marks=pytest.mark.slow),
        pytest.param({"mode": "simultaneous", "estimate": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_closed_form(options):
    """All parameters at once: the matrix K, and one in either prox; a loss of both unknowns."""
    params, batch = QUADRATIC.params(0), batch_of(QUADRATIC, 0, 2)
    hg = oracle(QUADRATIC, pair_loss, **options)(params, batch, tol=1e-12)
    jb.check(hg)
    value, gradient = quadratic_gradient(params, batch)
    assert float(hg.value) == pytest.approx(float(value), rel=1e-12)
    assert relative(hg.grad, gradient) <= 1e-9
    assert hg.lower.steps.shape == hg.adjoint.steps.shape == (2,)


def test_parameters_of_a_prox_to_ten_digits():
    params, batch = QUADRATIC.params(2), batch_of(QUADRATIC, 2, 2)
    hg = oracle(QUADRATIC, pair_loss)(params, batch, tol=1e-14)
    for name in ("a", "b"):
        assert float(hg.grad[name]) == pytest.approx(float(quadratic_gradient(params, batch)[1][name]), rel=1e-10)


@pytest.mark.slow
def test_loss_of_the_parameters_and_weights_of_samples():
    def loss(params, pair, data):
        return pair_loss(params, pair, data) + params["a"] ** 2 + params["K"][0, 1] * pair[0][0]

    params, batch = QUADRATIC.params(1), batch_of(QUADRATIC, 1, 2)
    exact = lambda params, data: loss(params, quadratic_exact(params, data), data)  # noqa: E731
    first, second = (jax.grad(exact)(params, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in (0, 1))
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, first, second)
    hg = oracle(QUADRATIC, loss, estimate=False)(params, batch, tol=1e-12, sample_weight=jnp.array([1.0, 3.0]))
    assert relative(hg.grad, expected) <= 1e-9


@pytest.mark.slow
def test_huber_tv_four_ways():
    """As a smooth problem by implicit differentiation; as a saddle point by piggyback, unrolled, and by differences."""
    params, data = HUBER.params(0), HUBER.sample(0)
    batch = batch_of(HUBER, 0)
    found = oracle(HUBER, image_loss)(params, batch, tol=1e-11).grad
    smooth = jb.SmoothProblem(huber_energy, lambda p, data: data["y"], strong_convexity=1.0)
    loss = lambda p, x, data: image_loss(p, (x,), data)  # noqa: E731
    own = jb.implicit.Oracle(smooth, loss, solver=jb.solvers.AGD(), estimate=False)
    implicit = own(params, batch, tol=1e-11).grad

    @jax.jit
    def unrolled(params):
        pair = PDHG().iterate(HUBER.problem.view(params, data), HUBER.problem.start(params, data), 300)
        return image_loss(params, pair, data)

    value = lambda params: oracle(HUBER, image_loss).value(params, batch, tol=1e-13).value  # noqa: E731
    for other in (implicit, jax.jit(jax.grad(unrolled))(params), central_differences(value, params, 1e-6)):
        assert relative(found, other) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("setup", [EXPERTS, ROOTS], ids=["experts", "roots"])
def test_differences(setup):
    """Filters and weights in K and in the conjugate of psi_w; parameters of a prox found by Newton's method."""
    params, batch = setup.params(1), batch_of(setup, 1)
    found = oracle(setup, image_loss)(params, batch, tol=1e-11).grad
    point, assemble = ravel_pytree(params)
    direction = np.random.default_rng(0).standard_normal(point.size)

    def line(t):
        return oracle(setup, image_loss).value(assemble(point + t * direction), batch, tol=1e-13).value

    slope = float(central_differences(line, jnp.asarray(0.0), 1e-6)[0])
    assert direction @ flat(found) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
def test_saddle_point_is_differentiable():
    params, data = QUADRATIC.params(0), QUADRATIC.sample(0)
    point = jb.piggyback.saddle_point(QUADRATIC.problem)

    def through(params, data):
        return pair_loss(params, point(params, data, tol=1e-12), data)

    def exact(params, data):
        return pair_loss(params, quadratic_exact(params, data), data)

    expected = jax.grad(exact, (0, 1))(params, data)
    assert relative(jax.grad(through, (0, 1))(params, data), expected) <= 1e-9
    assert relative(jax.jit(jax.grad(through, (0, 1)))(params, data), expected) <= 1e-9
    batch = batch_of(QUADRATIC, 0, 2)
    several = jax.jit(jax.vmap(jax.grad(through), (None, 0)))(params, batch)
    assert relative(several, jax.vmap(jax.grad(exact), (None, 0))(params, batch)) <= 1e-9


def test_saddle_point_does_not_fail_silently():
    params, data = QUADRATIC.params(0), QUADRATIC.sample(0)
    loss = lambda point: jax.grad(lambda p: jnp.sum(point(p, data, tol=1e-12, adjoint_tol=1e-12)[0]))  # noqa: E731
    make = jb.piggyback.saddle_point
    with pytest.raises(jb.ConvergenceError, match="the lower-level solve ended MAX_STEPS"):
        loss(make(QUADRATIC.problem, max_steps=10))(params)
    with pytest.raises(jb.ConvergenceError, match="the adjoint solve ended MAX_STEPS"):
        loss(make(QUADRATIC.problem, max_adjoint_steps=10))(params)
    assert np.isnan(loss(make(QUADRATIC.problem, max_adjoint_steps=10, on_failure="nan"))(params)["a"])
    with pytest.raises(TypeError, match="needs a jb.SaddleProblem"):
        make(jb.SmoothProblem(lambda p, x, d: x**2, lambda p, d: d))


# -------------------------------------------------------------------------------------------------------- errors


def exact_hypergradient(setup, loss, params, batch):
    hg = oracle(setup, loss, correct=True, loss_smoothness=1.0)(params, batch, tol=1e-12)
    jb.check(hg)
    return hg


@pytest.mark.parametrize(
    "setup, loss",
    [
        (QUADRATIC, pair_loss),
        pytest.param(ROOTS, image_loss, marks=pytest.mark.slow),
        pytest.param(ROOTS, pair_loss, marks=pytest.mark.slow),
    ],
)
def test_bounds_hold(setup, loss):
    """Of x, of the value and of the hypergradient, from hardly solved to well solved."""
    own, corrected = (oracle(setup, loss, loss_smoothness=1.0, correct=c, estimate=False) for c in (False, True))
    for seed in range(12):
        params, batch = setup.params(seed), batch_of(setup, seed)
        exact = exact_hypergradient(setup, loss, params, batch)
        x_hat = exact.warm.x[0]
        for tol, adjoint_tol in ((10.0, 10.0), (1e-1, 1e-3), (1e-3, 1e-1), (1e-5, 1e-5)):
            for hg in (f(params, batch, tol=tol, adjoint_tol=adjoint_tol) for f in (own, corrected)):
                assert bool(hg.certified)
                assert np.linalg.norm(flat(hg.grad) - flat(exact.grad)) <= float(hg.bound) + 1e-11
                assert abs(float(hg.value - exact.value)) <= float(hg.value_bound) + 1e-11
                assert float(jnp.linalg.norm(hg.warm.x[0] - x_hat)) <= float(hg.lower.error[0]) + 1e-11
            v = own.value(params, batch, hg.warm, tol=tol)
            assert abs(float(v.value - exact.value)) <= float(v.bound) + 1e-11


@pytest.mark.slow
def test_nothing_is_certified_without_constants():
    params, batch = QUADRATIC.params(0), batch_of(QUADRATIC, 0)
    bare = replace(QUADRATIC.problem, constants=None)
    for problem in (bare, replace(bare, norm=None), replace(bare, mu_dual=0.0)):
        hg = jb.piggyback.Oracle(problem, pair_loss, loss_smoothness=1.0, estimate=False)(params, batch, tol=1e-4)
        jb.check(hg)
        assert not hg.certified and np.isposinf(hg.bound)
    hg = oracle(QUADRATIC, pair_loss, estimate=False)(params, batch, tol=1e-4)  # loss_smoothness is missing
    assert not hg.certified


@pytest.mark.slow
@pytest.mark.parametrize("setup", [HUBER, EXPERTS], ids=["huber", "experts"])
@pytest.mark.parametrize("mode", ["sequential", "simultaneous"])
def test_estimates_and_corrections(setup, mode):
    """Estimate over true error within [0.5, 5] in 95 % of the cases; what a correction leaves is not underestimated."""
    plain = oracle(setup, image_loss, mode=mode)
    corrected = oracle(setup, image_loss, mode=mode, correct=True, loss_smoothness=1.0)
    ratios, gains, rests, value_ratios = [], [], [], []
    for seed in range(8):
        params, batch = setup.params(seed), batch_of(setup, seed)
        exact = exact_hypergradient(setup, image_loss, params, batch)
        for tol in (1e-1, 1e-2, 1e-3):
            hg, better = plain(params, batch, tol=tol), corrected(params, batch, tol=tol)
            true, left = (np.linalg.norm(flat(h.grad) - flat(exact.grad)) for h in (hg, better))
            ratios.append(float(hg.error) / true)
            gains.append(true / left)
            rests.append(float(better.error) / left)
            value_ratios.append(float(hg.value_error) / abs(float(hg.value - exact.value)))
    assert np.mean((np.array(ratios) >= 0.5) & (np.array(ratios) <= 5)) >= 0.95
    assert np.median(gains) >= 5
    assert np.mean(np.array(rests) >= 0.5) >= 0.9
    assert np.mean(np.array(value_ratios) >= 0.5) >= 0.95


# --------------------------------------------------------------------------------------------------- cost and use


@pytest.mark.slow
def test_memory_does_not_grow_with_the_iterations():
    setup = huber_tv(16)
    params, batch = setup.params(0), batch_of(setup, 0)
    data = setup.sample(0)

    def piggyback(steps):
        own = jb.piggyback.Oracle(setup.problem, image_loss, max_steps=steps, max_adjoint_steps=steps)
        return jax.jit(lambda params: own(params, batch, tol=0.0).grad)

    def unrolled(steps):
        def value(params):
            pair = PDHG().iterate(setup.problem.view(params, data), setup.problem.start(params, data), steps)
            return image_loss(params, pair, data)

        return jax.jit(jax.grad(value))

    def temporary(function):
        return function.lower(params).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary(piggyback(steps)) for steps in (100, 1000))
    assert many == few
    assert temporary(unrolled(1000)) > 5 * temporary(unrolled(100)) > 5 * few


@pytest.mark.slow
@MODES
def test_one_compilation(mode):
    params, batch = HUBER.params(0), batch_of(HUBER, 0)
    own = oracle(HUBER, image_loss, **({} if mode == "sequential" else {"mode": mode, "estimate": False}))
    hg = own(params, batch, tol=1e-1)
    v = own.value(params, batch, tol=1e-1)
    with compilations() as compiled:
        for tol in (1e-2, jnp.asarray(1e-6), 0, np.inf):
            hg = own(params, batch, hg.warm, tol=tol, adjoint_tol=10 * tol)
            v = own.value(params, batch, v.warm, tol=tol)
    assert not [message for message in compiled if "_hypergradient" in message or "_value" in message]


@pytest.mark.slow
def test_warm_starts_of_both_adjoints():
    params, batch = HUBER.params(0), batch_of(HUBER, 0)
    own = oracle(HUBER, image_loss, estimate=False)
    first = own(params, batch, tol=1e-6)
    again = own(params, batch, first.warm, tol=1e-6)
    assert np.all(first.lower.steps > 0) and np.all(first.adjoint.steps > 0)
    assert np.all(again.lower.steps == 0) and np.all(again.adjoint.steps == 0)
    moved = own(params + 1e-4, batch, first.warm, tol=1e-6)
    assert np.sum(moved.adjoint.steps) < np.sum(first.adjoint.steps)


@pytest.mark.slow
def test_maid_decreases_exact_values():
    params, batch = jnp.asarray([-4.0, -2.5]), batch_of(HUBER, 0, 2)
    own = oracle(HUBER, image_loss)
    method = jb.MAID(own)
    state = method.init(params, batch)
    exact = [float(own.value(state.params, batch, tol=1e-10).value)]
    for _ in range(5):
        state, info = method.step(state, batch)
        assert not bool(info.done)
        exact.append(float(own.value(state.params, batch, tol=1e-10).value))
    assert np.all(np.diff(exact) < 0)
    assert exact[-1] < 0.9 * exact[0]


def test_certified_maid_needs_the_moduli():
    with pytest.raises(ValueError, match="a positive `mu_dual` to the problem"):
        jb.MAID(jb.piggyback.Oracle(total_variation(8).problem, image_loss, loss_smoothness=1.0), certified=True)
    with pytest.raises(ValueError, match="`loss_smoothness` to the oracle"):
        jb.MAID(oracle(HUBER, image_loss), certified=True)


def test_bad_input_is_named():
    params, batch = HUBER.params(0), batch_of(HUBER, 0, 3)
    bad = batch | {"y": batch["y"].at[1, 2, 2].set(jnp.nan)}
    hg = oracle(HUBER, image_loss, estimate=False)(params, bad, tol=1e-3)
    assert list(hg.lower.status == jb.Status.NONFINITE) == [False, True, False] and np.isnan(hg.value)
    small = jb.piggyback.Oracle(replace(HUBER.problem, norm=0.5), image_loss, estimate=False)(params, batch, tol=1e-3)
    assert small.status == jb.Status.NORM_BOUND and np.isnan(small.value)
    with pytest.raises(TypeError, match="piggyback.Oracle needs a jb.SaddleProblem"):
        jb.piggyback.Oracle(jb.SmoothProblem(huber_energy, lambda p, data: data["y"]), image_loss)
    with pytest.raises(ValueError, match="`mode` must be one of"):
        jb.piggyback.Oracle(HUBER.problem, image_loss, mode="alternating")
