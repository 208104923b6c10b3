"""Stochastic without an optimizer: quasi-Newton descent on nested subsets that grow as their noise asks for."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import compilations

import jbilevel as jb
from jbilevel._method.point import Point
from jbilevel._method.subsets import MEMORY, Subset
from jbilevel.quasi_newton import FIRST

RNG = np.random.default_rng(3)
# x_hat = y + params, so that the value is a mean of |params - (x - y)|^2/2
PROBLEM = jb.SmoothProblem(
    lambda p, x, d: 0.5 * jnp.sum((x - p - d["y"]) ** 2), lambda p, d: jnp.zeros_like(d["y"]), strong_convexity=1.0
)
INEXACT = PROBLEM.oracle(
    lambda p, x, d: 0.5 * jnp.sum((x - d["x"]) ** 2), solver=jb.solvers.AGD(), estimate=False, chunk=1
)
EXACT = jb.explicit.Oracle(lambda p, d: 0.5 * jnp.sum((p + d["y"] - d["x"]) ** 2), chunk=1)
START = jnp.array([4.0, -3.0])


def samples(count, noise=1.0):
    rng = np.random.default_rng(count)
    target = np.array([1.0, -2.0]) + noise * rng.standard_normal((count, 2))
    y = rng.standard_normal((count, 2))
    return {"y": jnp.asarray(y), "x": jnp.asarray(y + target)}


def optimum(batch, weight=None):
    return np.average(batch["x"] - batch["y"], axis=0, weights=weight)


def steps(method, batch, count):
    """States and reports of some steps, the state before the first in front."""
    state = method.init(START, batch)
    seen = [(state, None)]
    for _ in range(count):
        state, info = method.step(state, batch)
        seen.append((state, info))
    return seen


def sizes(seen):
    return np.array([int(state.subset.size) for state, _ in seen])


# ----------------------------------------------------------------------------------------------------- the subsets


@pytest.mark.parametrize("count, chunk", [(100, 1), (100, 8), (101, 8), (20, 16), (10, 1), (7, 7)])
def test_subsets_are_nested_and_begin_with_sixteen_or_two_chunks(count, chunk):
    ones = jnp.ones(count)
    subset = Subset.first(jax.random.key(0), ones, chunk)
    inside, seen = np.asarray(subset.weigh(ones)), []
    assert inside.sum() >= min(max(16, 2 * chunk) - chunk + 1, count) and inside.sum() <= max(16, 2 * chunk)
    while not subset.whole:
        seen.append(inside)
        subset = subset.grown()
        inside = np.asarray(subset.weigh(ones))
        assert np.all(inside >= seen[-1]) and inside.sum() > seen[-1].sum()
        for begin in range(0, count, chunk):  # what is solved together joins together
            assert len(set(inside[begin : begin + chunk])) == 1
    np.testing.assert_array_equal(inside, ones)
    other = Subset.first(jax.random.key(1), ones, chunk)
    assert subset.count <= 2 * chunk or not np.array_equal(subset.place, other.place)  # two chunks have two orders


@pytest.mark.parametrize("chunk", [1, 8])
def test_samples_join_in_the_same_order_in_every_precision(chunk):
    places = []
    for x64 in (False, True):
        with jax.enable_x64(x64):
            weight = jnp.ones(100)
            assert weight.dtype == (jnp.float64 if x64 else jnp.float32)
            places.append(np.asarray(Subset.first(jax.random.key(5), weight, chunk).place))
    np.testing.assert_array_equal(*places)
    assert np.unique(places[0]).size == -(-100 // chunk) and np.any(np.diff(places[0]) < 0)


def test_samples_without_weight_never_join():
    weight = jnp.asarray(np.arange(60) % 3, float)
    subset = Subset.first(jax.random.key(0), weight, 1)
    assert int(subset.count) == 40
    while True:
        inside = np.asarray(subset.weigh(weight))
        assert np.sum(inside > 0) == int(subset.size)
        np.testing.assert_array_equal(inside[inside > 0], weight[inside > 0])
        if subset.whole:
            break
        subset = subset.grown()
    np.testing.assert_array_equal(inside, weight)


def test_the_noise_is_that_of_the_mean_over_the_batch():
    """Over random subsets n of N, the standard error is the true one, with its finite-population factor."""
    batch = samples(48)
    errors, told = [], []
    for seed in range(40):
        subset = Subset.first(jax.random.key(seed), jnp.ones(48), 1)
        hg = EXACT(START, batch, sample_weight=subset.weigh(jnp.ones(48)))
        errors.append(float(jnp.sum((hg.grad - EXACT(START, batch).grad) ** 2)))
        told.append(float(subset.saw(hg.spread, 1.0).noise / (1 - MEMORY)) ** 2)
    assert np.mean(told) == pytest.approx(np.mean(errors), rel=0.3)
    whole = Subset.first(jax.random.key(0), jnp.ones(12), 1)
    assert float(whole.saw(jnp.ones(()), 1.0).noise) == 0


# ------------------------------------------------------------------------------------------------------ the descent


@pytest.mark.parametrize("oracle", [EXACT, INEXACT], ids=["exact", "inexact"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_up_to_sixteen_samples_it_is_quasi_newton(oracle, weighted):
    batch = samples(16) | ({"sample_weight": jnp.asarray(RNG.uniform(0.5, 2.0, 16))} if weighted else {})
    expected = jb.fit(jb.QuasiNewton(oracle), START, batch, steps=12)
    found = jb.fit(jb.Stochastic(oracle), START, batch, steps=12)
    assert found.steps == expected.steps > 3 and found.status is expected.status
    np.testing.assert_allclose(found.params, expected.params, rtol=1e-9)
    for column in ("value", "grad_norm", "step", "tol", "adjoint_tol", "work", "status"):
        np.testing.assert_allclose(found.history[column], expected.history[column], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("oracle", [EXACT, INEXACT], ids=["exact", "inexact"])
def test_it_ends_at_the_optimum_of_all_samples(oracle):
    batch = samples(100)
    result = jb.fit(jb.Stochastic(oracle), START, batch, steps=80)
    np.testing.assert_allclose(result.params, optimum(batch), atol=1e-4)
    assert bool(result.state.subset.whole), result.message
    np.testing.assert_array_equal(result.best, result.params)  # no value of a subset is taken for the best


def test_weights_of_the_batch_multiply():
    weight = RNG.uniform(0.2, 3.0, 50) * (np.arange(50) % 4 > 0)
    batch = samples(50) | {"sample_weight": jnp.asarray(weight)}
    result = jb.fit(jb.Stochastic(EXACT), START, batch, steps=80)
    np.testing.assert_allclose(result.params, optimum(batch, weight), atol=1e-6)


def test_batches_without_names_and_their_axes():
    oracle = jb.explicit.Oracle(lambda p, d: 0.5 * jnp.sum((p - d) ** 2), in_axes=1, chunk=1)
    data = jnp.asarray(RNG.standard_normal((2, 40)))
    result = jb.fit(jb.Stochastic(oracle), START, data, steps=60)
    np.testing.assert_allclose(result.params, np.mean(data, axis=1), atol=1e-6)


def test_noise_makes_the_subset_grow_and_samples_alike_do_not():
    noisy, alike = samples(200, noise=3.0), samples(200, noise=0.0)
    seen = steps(jb.Stochastic(INEXACT), noisy, 30)
    assert np.all(np.diff(sizes(seen)) >= 0) and set(sizes(seen)) >= {16, 32, 64}
    state = seen[0][0]
    for following, info in seen[1:]:
        grew = following.subset.size > state.subset.size
        assert not (grew and bool(info.done))
        if grew:  # model, radius and accuracies stay
            np.testing.assert_array_equal(following.tol, following.accuracy.eps)
            assert float(following.radius) > 0 and int(following.memory.count) >= int(state.memory.count)
        state = following
    for state, _ in steps(jb.Stochastic(INEXACT), alike, 6):  # then it is at the end
        assert int(state.subset.size) == 16
    assert float(state.subset.noise) < 0.1


def test_a_flat_end_on_a_subset_is_no_end():
    """All samples alike but one: some subset is solved exactly, and only all of them say that it is over."""
    batch = samples(64, noise=0.0)
    last = int(np.argmax(jb.Stochastic(EXACT).init(START, batch).subset.place))
    batch["x"] = batch["x"].at[last].add(100.0)
    seen = steps(jb.Stochastic(EXACT), batch, 60)
    grew = sizes(seen)
    for (_, info), size in zip(seen[1:], grew[:-1], strict=True):
        assert size == 64 or not (bool(info.done) or bool(info.stationary))
    assert grew[-1] == 64
    result = jb.fit(jb.Stochastic(EXACT), START, batch, steps=100)
    assert result.status is jb.FitStatus.CONVERGED
    np.testing.assert_allclose(result.params, optimum(batch), atol=1e-6)


def test_work_is_that_of_the_samples_in_the_subset():
    batch = samples(64, noise=3.0)
    seen = steps(jb.Stochastic(INEXACT), batch, 20)
    for (before, _), (_, info) in itertools.pairwise(seen):
        joined = np.flatnonzero(before.subset.weigh(jnp.ones(64)))
        assert joined.size == int(before.subset.size)
        few, warm = jax.tree.map(lambda leaf, joined=joined: leaf[joined], (batch, before.warm))
        alone = INEXACT(before.target, few, warm, tol=before.tol, adjoint_tol=before.adjoint_tol)
        assert int(info.work) == int(alone.work) > 0
        if int(before.phase) == FIRST:  # a trial may be rejected, and its value is not told then
            assert float(info.value) == pytest.approx(float(alone.value))
    assert int(before.subset.size) == 64


def test_samples_that_have_not_joined_are_cold():
    batch = samples(64, noise=3.0)
    cold = INEXACT.init(START, batch)
    for state, _ in steps(jb.Stochastic(INEXACT), batch, 8):
        outside = np.asarray(state.subset.weigh(jnp.ones(64))) == 0
        np.testing.assert_array_equal(np.asarray(state.kept.x)[outside], np.asarray(cold.x)[outside])


def test_the_mean_of_the_steps_of_solves_is_over_samples_with_weight():
    """Else every solve of a small subset would seem to have found nothing to do, and be asked for again."""
    batch = samples(64)
    for before, _ in steps(jb.Stochastic(INEXACT), batch, 6)[1:]:
        hg = INEXACT(START, batch, tol=1e-3, adjoint_tol=1e-3, sample_weight=before.subset.weigh(jnp.ones(64)))
        point = Point.of(hg, START, hg.grad, 1.0)
        inside = np.asarray(before.subset.weigh(jnp.ones(64))) > 0
        mean = np.mean(np.asarray(hg.lower.steps)[inside])
        assert mean > 0 and float(point.steps) == pytest.approx(mean)


def test_nothing_is_compiled_while_the_subset_grows():
    batch = samples(200, noise=3.0)
    method = jb.Stochastic(INEXACT)
    state, _ = method.step(method.init(START, batch), batch)
    with compilations() as names:
        for _ in range(30):
            state, _ = method.step(state, batch)
    assert int(state.subset.size) > 32 and not names


def test_the_program_holds_one_oracle():
    batch = samples(64)
    count = lambda f, *a: str(jax.make_jaxpr(f)(*a)).count("while[")  # noqa: E731
    weighted = batch | {"sample_weight": jnp.ones(64)}
    plain, growing = jb.QuasiNewton(INEXACT), jb.Stochastic(INEXACT)
    state = plain.init(START, weighted)
    loops = count(lambda s: plain.step(s, weighted), state)
    assert count(lambda s: growing.step(s, batch), growing.init(START, batch)) == loops


def test_growing_resumes_bit_by_bit(tmp_path):
    batch = samples(100, noise=3.0)
    method = jb.Stochastic(INEXACT)
    whole = jb.fit(method, START, batch, steps=24)
    for count in (10, 24):
        part = jb.fit(method, START, batch, steps=count, checkpoint=tmp_path / "run.npz")
    assert int(whole.state.subset.size) > 16
    for a, b in zip(jax.tree.leaves(part.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="seed"):
        jb.fit(replace(method, seed=1), START, batch, steps=30, checkpoint=tmp_path / "run.npz")


def test_a_bad_sample_that_joins_late_ends_the_run():
    batch = samples(64, noise=3.0)
    last = int(np.argmax(jb.Stochastic(EXACT).init(START, batch).subset.place))
    batch["x"] = batch["x"].at[last].set(jnp.nan)
    result = jb.fit(jb.Stochastic(EXACT), START, batch, steps=100)
    assert result.status is jb.FitStatus.FAILED and result.steps > 0 and "NONFINITE" in result.message


@pytest.mark.parametrize("chunk", [None, 40])
def test_a_batch_in_one_chunk_is_refused_where_it_is_more_than_a_subset(chunk):
    sentence = "compares the chunks .* all 40 samples .* give the oracle `chunk=1`, take jb.QuasiNewton"
    with pytest.raises(ValueError, match=sentence):
        jb.Stochastic(replace(EXACT, chunk=chunk)).init(START, samples(40))
    jb.Stochastic(replace(EXACT, chunk=chunk)).init(START, samples(16))


def test_changing_batches_are_refused_without_an_optimizer():
    batch = samples(8)
    with pytest.raises(ValueError, match="Stochastic compares values.*one full batch"):
        jb.fit(jb.Stochastic(EXACT), START, lambda step: batch, steps=2)


@pytest.mark.parametrize(
    "options", [{"accuracy": "decay"}, {"accuracy": lambda k: 1.0}, {"tol": 0.1}, {"adjoint_tol": 0.1}, {"epoch": 3}]
)
def test_options_of_an_optimizer_are_refused_without_one(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`=.* is for descents with an `optimizer`"):
        jb.Stochastic(EXACT, **options)
