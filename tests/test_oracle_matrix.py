"""What every hypergradient oracle must do. A new oracle is one line in `ORACLES`."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import QUADRATIC, SADDLES, central_differences, compilations, primal, relative, ridge
from sparse_for_tests import ELASTIC, SOFT

import jbilevel as jb

AGD = jb.solvers.AGD()  # compiles faster than the default solver
ORACLES = {
    "implicit": lambda case, **options: jb.implicit.Oracle(case.problem, case.loss, **options),
    "implicit-corrected": lambda case, **options: jb.implicit.Oracle(
        case.problem, case.loss, solver=AGD, correct=True, **options
    ),
    "minres": lambda case, **options: jb.implicit.Oracle(
        case.problem, case.loss, solver=AGD, linear_solver=jb.solvers.MINRES(), loss_smoothness=1.0, **options
    ),
    "unroll": lambda case, **options: jb.unroll.Oracle(case.problem, case.loss, steps=case.unroll, **options),
    "unroll-checkpointed": lambda case, **options: jb.unroll.Oracle(
        case.problem, case.loss, steps=case.unroll, checkpoint=True, **options
    ),
    "one-step-corrected": lambda case, **options: jb.unroll.OneStep(
        case.problem, case.loss, solver=AGD, correct=True, error_steps=30, **options
    ),
    "piggyback": lambda case, **options: jb.piggyback.Oracle(SADDLES[case.name], primal(case.loss), **options),
    "piggyback-simultaneous-corrected": lambda case, **options: jb.piggyback.Oracle(
        SADDLES[case.name], primal(case.loss), mode="simultaneous", correct=True, **options
    ),
    "nonsmooth": lambda case, **options: jb.nonsmooth.Oracle(case.problem, case.loss, loss_smoothness=1.0, **options),
    "nonsmooth-corrected": lambda case, **options: jb.nonsmooth.Oracle(
        case.problem, case.loss, correct=True, loss_smoothness=1.0, **options
    ),
    "explicit": lambda case, **options: jb.explicit.Oracle(case.exact, **options),
}
# exact by other means, ``case.exact``: one whose entries are apart, and one that takes more steps
CASES = [QUADRATIC, ridge(8)]
SPARSE_CASES = [SOFT, ELASTIC]
# what an oracle that is exact in no limit reaches; the others are exact at tight tolerances
ACCURACY = {"one-step-corrected": 1e-3}
COUNT = 7
TIGHT = 1e-11
BAD = COUNT - 1  # the last sample: with chunks of 3 it is alone in its chunk

EACH = pytest.mark.parametrize("name", ORACLES)
# another linear solver, or other storage, changes what a sample gives, but not what is done with the samples
VARIANTS = ("minres", "unroll-checkpointed", "piggyback-simultaneous-corrected", "nonsmooth-corrected")
KINDS = [name for name in ORACLES if name not in VARIANTS]
EACH_KIND = pytest.mark.parametrize("name", KINDS)


def cases(name):
    return SPARSE_CASES if name.startswith("nonsmooth") else CASES


PAIRS = [(name, case) for name in ORACLES for case in cases(name) if case is not cases(name)[0] or name in KINDS]
QUICK_OR_SLOW = [
    pytest.param(name, case, id=f"{case.name}-{name}", marks=() if case is cases(name)[0] else pytest.mark.slow)
    for name, case in PAIRS
]


@cache
def make(name, case, **options):
    return ORACLES[name](case, **options)


@cache
def problem(case):
    """params, batch, weights of mean, exact values and gradients per sample (one row each)."""
    params, batch = case.params(1), case.batch(1, COUNT)
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(case.exact), (None, 0)))(params, batch)
    rows = np.stack([ravel_pytree(jax.tree.map(lambda g, i=i: g[i], grads))[0] for i in range(COUNT)])
    weights = np.random.default_rng(0).uniform(0.5, 2.0, COUNT)
    return params, batch, weights / weights.sum(), np.asarray(values), rows


@pytest.mark.parametrize("name, case", QUICK_OR_SLOW)
def test_values_and_gradient_are_exact_at_tight_tolerances(name, case):
    params, batch, weights, values, rows = problem(case)
    # weights need not be normalised
    hg = make(name, case)(params, batch, tol=TIGHT, sample_weight=3 * weights)
    if name not in ACCURACY:
        jb.check(hg)
    np.testing.assert_allclose(hg.values, values, rtol=1e-9)
    assert float(hg.value) == pytest.approx(weights @ values, rel=1e-9)
    assert relative(hg.grad, weights @ rows) <= ACCURACY.get(name, 1e-8)
    assert jax.tree.map(jnp.shape, hg.grad) == jax.tree.map(jnp.shape, params)
    # what it says about its error holds, whatever it says
    true = np.linalg.norm(ravel_pytree(hg.grad)[0] - weights @ rows)
    assert float(hg.error) >= 0
    assert bool(hg.certified) == bool(np.isfinite(hg.bound))
    assert true <= float(hg.bound) + 1e-14 * np.linalg.norm(rows)


@EACH
def test_a_relative_error_is_met_or_refused(name):
    """By its own estimate; the true error holds too. Padding has no say, and the sum of all work is told."""
    case = cases(name)[0]
    params, batch, weights, values, rows = problem(case)
    oracle = make(name, case)
    if name.startswith(("unroll", "one-step")):
        with pytest.raises(ValueError, match="`rtol` needs an (oracle that estimates|adjoint that can be refined)"):
            oracle(params, batch, rtol=1e-2)
        return
    weights = np.where(np.arange(COUNT) == BAD, 0.0, weights)
    weights /= weights.sum()
    batch = jax.tree.map(lambda leaf: leaf.at[BAD].set(jnp.nan), batch)
    with compilations() as names:
        found = [oracle(params, batch, rtol=rtol, sample_weight=weights) for rtol in (1e-1, 1e-3, 1e-6)]
    assert sum("_relative" in name for name in names) <= 1
    for rtol, hg in zip((1e-1, 1e-3, 1e-6), found, strict=True):
        size = float(jnp.linalg.norm(ravel_pytree(hg.grad)[0]))
        assert float(hg.error) <= rtol * size or hg.status > 0
        if hg.status == 0:
            assert relative(hg.grad, weights @ rows) <= 1.5 * rtol
    assert found[-1].status == 0
    if not name.startswith("nonsmooth"):  # where no error is told until the support is right
        assert float(found[0].work) <= float(found[-1].work)


@EACH_KIND
def test_weights_choose_samples(name):
    case = cases(name)[0]
    params, batch, _, values, rows = problem(case)
    oracle = make(name, case)
    for i in (0, BAD):
        hg = oracle(params, batch, tol=TIGHT, sample_weight=np.eye(COUNT)[i])
        assert float(hg.value) == pytest.approx(values[i], rel=1e-9)
        assert relative(hg.grad, rows[i]) <= ACCURACY.get(name, 1e-8)


@pytest.mark.slow
@EACH_KIND
def test_value_agrees_with_the_hypergradient_and_its_differences_with_the_gradient(name):
    case = cases(name)[0]
    params, batch, weights, values, rows = problem(case)
    oracle = make(name, case)

    def value(params):
        v = oracle.value(params, batch, tol=1e-13, sample_weight=weights)
        jb.check(v)
        return v.value

    assert float(value(params)) == pytest.approx(weights @ values, rel=1e-9)
    assert relative(central_differences(value, params), weights @ rows) <= 1e-7


@pytest.mark.slow
@EACH
def test_errors_hold_at_loose_tolerances(name):
    """The estimate is the true error within a factor 2, or inf; what a correction leaves is not underestimated."""
    case = cases(name)[1]
    params, batch, weights, values, rows = problem(case)
    oracle = make(name, case)
    for tol in (1e-1, 1e-2):
        hg = oracle(params, batch, tol=tol, sample_weight=weights)
        true = np.linalg.norm(ravel_pytree(hg.grad)[0] - weights @ rows)
        value_error = abs(float(hg.value) - weights @ values)
        assert true <= float(hg.bound) + 1e-12
        assert value_error <= float(hg.value_bound) + 1e-12
        assert value_error <= 2 * float(hg.value_error) + 1e-12
        assert true <= (3 if oracle.correct else 2) * float(hg.error) + 1e-12
        if np.isfinite(hg.error) and not oracle.correct:
            assert float(hg.error) <= 2 * true + 1e-12


@pytest.mark.slow
@EACH_KIND
def test_bad_sample_is_named_and_may_be_dropped(name):
    case = cases(name)[0]
    params, batch, _, values, rows = problem(case)
    bad = batch | {"y": batch["y"].at[BAD, 2].set(jnp.nan)}
    weights = np.full(COUNT, 1.0)
    good = np.arange(COUNT) != BAD

    hg = make(name, case)(params, bad, tol=TIGHT, sample_weight=weights)
    assert np.isnan(hg.value) and np.isnan(hg.grad)
    assert np.isposinf(hg.error) and np.isposinf(hg.value_error) and not hg.certified
    np.testing.assert_array_equal(np.isnan(hg.values), ~good)
    assert hg.status == jb.Status.NONFINITE
    np.testing.assert_array_equal(hg.lower.status == jb.Status.NONFINITE, ~good)
    with pytest.raises(jb.ConvergenceError, match=rf"sample {BAD} \(1 of {COUNT} samples failed\) ended NONFINITE"):
        jb.check(hg)

    hg = make(name, case, on_failure="drop", chunk=3)(params, bad, tol=TIGHT, sample_weight=weights)
    assert float(hg.value) == pytest.approx(values[good].mean(), rel=1e-11)
    assert relative(hg.grad, rows[good].mean(axis=0)) <= ACCURACY.get(name, 1e-11)
    assert hg.status == jb.Status.NONFINITE
    np.testing.assert_array_equal(np.isnan(hg.values), ~good)


@pytest.mark.slow
@EACH_KIND
def test_one_compilation_for_all_tolerances_and_warm_starts(name):
    case = cases(name)[0]
    params, batch, weights, *_ = problem(case)
    oracle = make(name, case)
    hg = oracle(params, batch, tol=1e-1, sample_weight=weights)
    v = oracle.value(params, batch, tol=1e-1, sample_weight=weights)
    cold = oracle.init(params, batch)
    signature = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree)  # noqa: E731
    for warm in (hg.warm, v.warm):
        assert signature(warm) == signature(cold)
    tolerances = (1e-2, np.float64(1e-3), jnp.asarray(1e-4), jnp.float32(1e-5), 0, np.inf)
    with compilations() as compiled:
        for tol in tolerances:
            hg = oracle(params, batch, hg.warm, tol=tol, adjoint_tol=10 * tol, sample_weight=weights)
            v = oracle.value(params, batch, hg.warm, tol=tol, sample_weight=weights)
        oracle(params, batch, cold, sample_weight=weights)
        oracle.value(params, batch, v.warm, sample_weight=weights)
    own = [message for message in compiled if "_hypergradient" in message or "_value" in message]
    assert not own
