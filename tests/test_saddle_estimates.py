"""Estimated errors of saddle points against dense references: images of 8 x 8 pixels, tolerances from 1 to 1e-6."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jbilevel as jb
from benchmarks import estimates_saddle as estimates
from benchmarks import saddle_problems as problems
from benchmarks.estimates import saddle_cases


@pytest.fixture(scope="module", params=["Huber-TV", "TV, x >= 0", "learned TV"])
def found(request):
    """(kind, rows) of two images in double precision."""
    return request.param, list(saddle_cases(request.param, "float64", 2 * len(estimates.TOLERANCES), 0))


def column(rows, name):
    return np.array([row[name] for row in rows])


def test_what_is_reported_holds(found):
    """Of the hypergradient as it is and after a correction, of its value, and of values alone."""
    kind, rows = found
    norm = column(rows, "norm")
    for part in ("", "corrected "):
        truth, error = column(rows, f"{part}gradient truth"), column(rows, f"{part}gradient")
        seen = np.isfinite(error) & (truth > 1e-11 * norm)
        assert np.all(error[seen] >= 0.5 * truth[seen]), part
        value_truth, value_error = column(rows, f"{part}value truth"), column(rows, f"{part}value")
        seen = value_truth > 1e-12
        assert np.all(value_error[seen] >= 0.5 * value_truth[seen]), part
    truth, error = column(rows, "gradient truth"), column(rows, "gradient")
    reported = np.isfinite(error)
    assert np.median(error[reported] / truth[reported]) <= 3
    assert np.mean(reported) >= {"Huber-TV": 1.0, "TV, x >= 0": 0.85, "learned TV": 0.4}[kind]


def test_a_correction_gains(found):
    kind, rows = found
    gain = column(rows, "gradient truth") / np.maximum(column(rows, "corrected gradient truth"), 1e-300)
    assert np.median(gain) >= {"Huber-TV": 1e4, "TV, x >= 0": 100, "learned TV": 1.1}[kind]


def test_an_estimate_costs_what_is_asked_for(found):
    _, rows = found
    products = column(rows, "products")
    assert jb.piggyback.Oracle.error_steps == 32
    # one more in each half to begin with, and one for the residual after each
    assert np.all(products <= 2 * 32 + 4) and np.max(products) > 32


@pytest.mark.slow
def test_more_steps_make_errors_known_more_often():
    known = []
    for steps in (8, 32, 128):
        reported = [
            float(replace(c.oracle, error_steps=steps)(c.params, c.batch, tol=c.tol, adjoint_tol=c.adjoint_tol).error)
            for c in estimates.cases("learned TV", "float64", 4 * len(estimates.TOLERANCES))
        ]
        known.append(np.mean(np.isfinite(reported)))
    assert known[0] < known[1] < known[2]


@pytest.mark.parametrize("kind", estimates.KINDS)
def test_references_are_exact(kind):
    """Against differences of exact values; the loss sees nothing that is not determined."""
    setup = estimates.KINDS[kind](estimates.SIZE)
    params, data = setup.params(1), setup.sample(1)
    dense = estimates.Dense(setup.problem, problems.image_loss, params, data)
    exact = dense.exact(params, data)
    assert exact.residual <= 1e-13 and exact.seen <= 1e-12
    flat, unravel = ravel_pytree(params)
    direction, h = jax.random.normal(jax.random.key(0), flat.shape), 1e-5
    after, before = (dense.exact(unravel(flat + s * h * direction), data).value for s in (1, -1))
    np.testing.assert_allclose((after - before) / (2 * h), jnp.vdot(exact.gradient, direction), rtol=1e-4)
