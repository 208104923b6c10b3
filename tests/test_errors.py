"""Estimated errors against true ones, what a correction gains, and proven bounds, over random problems.

The quick cases are small and their references dense; the slow ones are the photographs of `benchmarks/correction.py`.
"""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import (
    QUADRATIC,
    dense_hypergradient,
    dense_solution,
    experts,
    image_loss,
    ridge,
    tv,
)

import jbilevel as jb
from benchmarks import common
from benchmarks import errors as calibration
from benchmarks.error_problems import CERTIFIED, ESTIMATED
from jbilevel._core.constants import Constants
from jbilevel._oracle import bounds

SEEDS = range(4)
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
ROUNDING = 1e-12


class Found(NamedTuple):
    """Per case: hypergradient, value and what is said about their errors, next to the exact ones."""

    grad_error: np.ndarray
    estimate: np.ndarray
    bound: np.ndarray
    value_error: np.ndarray
    value_estimate: np.ndarray
    value_bound: np.ndarray


@cache
def dense(case, seed):
    """(hypergradient, value) from dense linear algebra."""
    params, data = case.params(seed), case.sample(seed)
    x = dense_solution(case.problem, params, data)
    return dense_hypergradient(case.problem, case.loss, params, data, x), float(case.loss(params, x, data))


def over_cases(case, **options) -> Found:
    """One image at a time (a mean would let errors cancel), for all seeds and tolerances."""
    oracle = jb.implicit.Oracle(case.problem, case.loss, **options)
    rows = []
    for seed in SEEDS:
        params, batch = case.params(seed), case.batch(seed, 1)
        exact, value = dense(case, seed)
        for tol in TOLERANCES:
            hg = oracle(params, batch, tol=tol)
            gradient = np.linalg.norm(ravel_pytree(hg.grad)[0] - exact)
            away = abs(float(hg.value) - value)
            rows.append((gradient, hg.error, hg.bound, away, hg.value_error, hg.value_bound))
    return Found(*np.asarray(rows, float).T)


TV, RIDGE, EXPERTS = tv(8), ridge(8), experts(8)
SMOOTH_CASES = [TV, RIDGE, EXPERTS]


@pytest.fixture(scope="module")
def plain():
    return [over_cases(case, loss_smoothness=1.0) for case in SMOOTH_CASES]


@pytest.fixture(scope="module")
def corrected():
    return [over_cases(case, correct=True, loss_smoothness=1.0) for case in SMOOTH_CASES]


def above_rounding(found: Found, floor=1e-10):
    return found.grad_error > floor


@pytest.mark.slow
def test_estimates_are_the_true_errors(plain):
    ratios = np.concatenate([f.estimate[above_rounding(f)] / f.grad_error[above_rounding(f)] for f in plain])
    assert ratios.size >= 40
    assert 0.9 <= np.median(ratios) <= 1.2
    assert np.mean(ratios >= 0.5) >= 0.97  # of few cases on 8 x 8 pixels; the slow test asks for 99 %
    assert np.mean(ratios <= 2.0) >= 0.97


@pytest.mark.slow
def test_a_correction_divides_the_error_by_ten_and_never_hides_what_is_left(plain, corrected):
    gains, left = [], []
    for before, after in zip(plain, corrected, strict=True):
        kept = above_rounding(before) & above_rounding(after, 1e-12)
        gains.append(before.grad_error[kept] / after.grad_error[kept])
        left.append(after.estimate[kept] / after.grad_error[kept])
    gains, left = np.concatenate(gains), np.concatenate(left)
    assert np.median(gains) >= 10 and np.mean(gains >= 1) >= 0.95
    assert np.mean(left >= 0.5) >= 0.85


@pytest.mark.slow
def test_values_are_estimated_within_their_second_order(plain, corrected):
    for found in (*plain, *corrected):
        seen = found.value_error > 1e-11
        assert np.mean(found.value_estimate[seen] >= 0.5 * found.value_error[seen]) >= 0.95
    # a correction removes the first order from values too
    before, after = (np.concatenate([f.value_error for f in group]) for group in (plain, corrected))
    assert np.median(after[before > 1e-8] / before[before > 1e-8]) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", [QUADRATIC, RIDGE], ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{}, {"correct": True}], ids=str)
def test_proven_bounds_hold(case, options):
    found = over_cases(case, loss_smoothness=1.0, **options)
    assert np.all(np.isfinite(found.bound))
    assert np.all(found.grad_error <= found.bound + ROUNDING)
    assert np.all(found.value_error <= found.value_bound + ROUNDING)
    # and say something: for these quadratics within three orders of magnitude
    assert np.median(found.bound / np.maximum(found.grad_error, ROUNDING)) <= 1e3


def test_smoothed_tv_of_the_library_is_certified():
    regularizer = jb.regularizers.SmoothedTV()
    problem = jb.variational(None, regularizer)
    oracle = jb.implicit.Oracle(problem, image_loss, loss_smoothness=1.0)
    case = TV
    for seed in SEEDS:
        params, batch = case.params(seed), case.batch(seed, 1)
        exact, _ = dense(case, seed)
        for tol in (1e-2, 1e-4):
            hg = oracle(params, batch, tol=tol)
            assert bool(hg.certified)
            assert np.linalg.norm(hg.grad - exact) <= hg.bound


KNOWN = Constants(2.0, 9.0, 3.0, 5.0, 7.0)


def proven(constants, smoothness, error, residual):
    """Of one block with ||q|| = 1."""
    mu = constants.strong_convexity
    blocks = bounds.Blocks((constants,), None if mu is None else lambda drift: (drift / mu,))
    one = jnp.asarray(1.0)
    norms = bounds.Norms((one,), (one,), (jnp.asarray(residual),), (jnp.asarray(error),), (0.0 * one,))
    return bounds.gradient_bound(blocks, smoothness, norms, 0.0)


@pytest.mark.parametrize("missing", ["strong_convexity", "hessian_lipschitz", "mixed_lipschitz", "mixed_norm", "loss"])
def test_nothing_is_certified_where_a_constant_is_missing(missing):
    constants = KNOWN if missing == "loss" else KNOWN._replace(**{missing: None})
    assert np.isfinite(proven(KNOWN, 1.0, 1e-3, 1e-3))
    assert np.isposinf(proven(constants, None if missing == "loss" else 1.0, 1e-3, 1e-3))


def test_nothing_is_certified_where_the_loss_reads_params():
    """Its direct part has a Lipschitz constant that nobody gave."""
    problem, batch = certified_quadratic()
    for loss, known in ((lambda p, x, d: jnp.sum(x), True), (lambda p, x, d: jnp.sum(x) + 0.0 * p, False)):
        hg = jb.implicit.Oracle(problem, loss, loss_smoothness=1.0)(jnp.asarray(0.0), batch, tol=1e-6)
        assert bool(hg.certified) is known and bool(np.isfinite(hg.bound)) is known


def certified_quadratic():
    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum((x - d - p) ** 2), lambda p, d: d, strong_convexity=1.0, smoothness=1.0,
        hessian_lipschitz=0.0, mixed_lipschitz=0.0, mixed_norm=2.0,
    )  # fmt: skip
    return problem, jnp.ones((2, 4))


def test_certificate_by_hand():
    """mu = 2, L_H = 3, L_J = 5, ||J|| = 7, L_g = 11, ||q|| = 1, eps = 0.1, residual = 0.2."""
    drift = (0.2 + (11 + 3) * 0.1) / 2
    assert float(proven(KNOWN, 11.0, 0.1, 0.2)) == pytest.approx(5 * 0.1 * (1 + drift) + 7 * drift)


def test_a_step_that_raises_the_energy_and_the_gradient_is_refused():
    """From x = 3 Newton's step on sqrt(1 + x^2) overshoots to -27: x must stay, and the error be admitted."""
    problem = jb.SmoothProblem(lambda p, x, d: jnp.sqrt(1 + (x - p) ** 2), lambda p, d: p + 3.0)
    lower = jb.implicit.Oracle(problem, lambda p, x, d: 0.5 * x**2).lower
    view = problem.view(jnp.asarray(0.0), ())
    system = replace(lower.restore(view, jnp.asarray(3.0), ()), residual=jnp.abs(view.gradient(jnp.asarray(3.0))))
    newton = system.correct(lambda x: x, system.guess(jnp.asarray(3.0), jnp.asarray(0.0)), 10, 1e-3)
    assert float(newton.system.x) == 3.0
    assert np.isposinf(newton.left)


def test_remaining_of_two_halves():
    """Two halves that contract alike by r leave the rest of a geometric series."""
    assert float(bounds.remaining(1.0, 0.1, 0.0)) == pytest.approx(0.1 * 0.1 / 0.9)
    assert float(bounds.remaining(1.0, 0.0, 1e-3)) == pytest.approx(bounds.SAFETY * 1e-3)
    assert float(bounds.remaining(0.0, 0.0, 0.5)) == 0.0


def test_a_loss_reads_params_or_not():
    reads = bounds.depends_on
    x, data = jnp.ones(3), jnp.ones(3)
    assert reads(lambda p, x, d: jnp.sum(p * x), jnp.ones(3), x, data)
    assert not reads(lambda p, x, d: jnp.sum(x * d), jnp.ones(3), x, data)
    assert reads(lambda p, x, d: p["a"], {"a": jnp.asarray(1.0), "b": jnp.asarray(1.0)}, x, data)


# ------------------------------------------------------------------------------------------------- photographs, slow

CROPS, SIDE = 4, 32


@pytest.fixture(scope="module")
def crops():
    return common.crops(SIDE, CROPS, None, 5)


@pytest.mark.slow
def test_estimates_on_photographs(crops):
    """More than 150 cases: total variation, ridge energies, fields of experts with psi_w."""
    estimate, gain = [], []
    for setup in ESTIMATED.values():
        exact = calibration.reference(setup, crops)
        for solver in calibration.SOLVERS.values():
            plain = calibration.each_crop(setup, "float64", solver=solver)
            better = calibration.each_crop(setup, "float64", solver=solver, correct=True)
            for tol in calibration.TOLERANCES:
                data = calibration.arrays(crops, "float64")
                first, second = (calibration.on_host(f(data, tol)) for f in (plain, better))
                error = calibration.distance(first, exact)
                estimate.append(first["error"] / error)
                gain.append(error / calibration.distance(second, exact))
    estimate, gain = np.concatenate(estimate), np.concatenate(gain)
    assert estimate.size >= 150
    assert 0.9 <= np.median(estimate) <= 1.2
    assert np.mean(estimate >= 0.5) >= 0.98
    assert np.median(gain) >= 10


@pytest.mark.slow
def test_certificates_on_photographs(crops):
    count = 0
    for setup in CERTIFIED.values():
        exact = calibration.reference(setup, crops)
        certified = calibration.each_crop(setup, "float64", loss_smoothness=1.0, estimate=False)
        for tol in calibration.TOLERANCES:
            found = calibration.on_host(certified(calibration.arrays(crops, "float64"), tol))
            slack = 100 * np.finfo(float).eps * np.linalg.norm(exact["gradient"], axis=1)
            assert np.all(np.isfinite(found["bound"]))
            assert np.all(calibration.distance(found, exact) <= found["bound"] + slack)
            count += found["bound"].size
    assert count >= 80
