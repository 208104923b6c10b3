"""Stochastic: accuracies by the noise of a batch, or by a schedule; the same descent as FirstOrder's otherwise."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb

RNG = np.random.default_rng(5)
SIZES = jnp.asarray(np.geomspace(1.0, 100.0, 6))  # curvatures: many steps to solve
DATA = {"y": jnp.asarray(RNG.standard_normal((8, 6))), "x": jnp.asarray(RNG.standard_normal((8, 6)))}
START = jnp.asarray(RNG.standard_normal(6))


def energy(p, x, d):
    return 0.5 * jnp.vdot(x, SIZES * x) - jnp.vdot(x, d["y"] + p)


def loss(p, x, d):
    return 50.0 * jnp.sum((x - d["x"]) ** 2)


PROBLEM = jb.SmoothProblem(energy, lambda p, d: jnp.zeros(6), strong_convexity=1.0, smoothness=100.0)
ORACLE = jb.implicit.Oracle(PROBLEM, loss, solver=jb.solvers.AGD(), estimate=False, chunk=1)


def gradient(params, tol, adjoint_tol, batch=DATA):
    return ORACLE(params, batch, tol=tol, adjoint_tol=adjoint_tol).grad


def exact(params):
    each = ((DATA["y"] + params[None, :]) / SIZES[None, :] - DATA["x"]) / SIZES[None, :]
    return 100.0 * jnp.mean(each, axis=0)


def batch(step):
    index = np.array([step % 8, (step + 3) % 8, (step + 5) % 8])
    return {name: np.asarray(part)[index] for name, part in DATA.items()} | {"index": index}


def fitted(method, steps):
    return jb.fit(method, START, batch, steps=steps)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.contrib.momo_adam(0.1)], ids=["adam", "reads the value"])
def test_at_constant_accuracy_it_is_first_order(optimizer):
    accuracies = {"tol": 1e-2, "adjoint_tol": 3e-2, "projection": lambda p: jnp.clip(p, -1, 1)}
    first = fitted(jb.FirstOrder(ORACLE, optimizer, **accuracies), 6)
    found = fitted(jb.Stochastic(ORACLE, optimizer, accuracy=lambda k: 1.0, **accuracies), 6)
    np.testing.assert_array_equal(found.params, first.params)
    for column in ("value", "grad_norm", "step", "tol", "adjoint_tol", "work", "status"):
        np.testing.assert_array_equal(found.history[column], first.history[column])
    assert np.linalg.norm(found.params - START) > 0.1


def test_an_optimizer_that_reads_the_value_gets_it():
    optimizer = optax.contrib.momo(1.0)
    method = jb.FirstOrder(ORACLE, optimizer, tol=1e-10, adjoint_tol=1e-10)
    state, _ = method.step(method.init(START, DATA), DATA)
    value = float(ORACLE(START, DATA, tol=1e-12).value)
    updates, _ = optimizer.update(exact(START), optimizer.init(START), START, value=value)
    np.testing.assert_allclose(state.params, START + updates, rtol=1e-7)


@pytest.mark.parametrize(
    "accuracy, factor",
    [
        ("decay", lambda k: (1 + k) ** -0.5),
        (optax.exponential_decay(1.0, 1, 0.5), lambda k: 0.5**k),
        (lambda k: 1.0 / (1 + k), lambda k: 1 / (1 + k)),
    ],
    ids=["decay", "of optax", "a function"],
)
def test_schedules_scale_the_first_accuracies(accuracy, factor):
    method = jb.Stochastic(ORACLE, optax.sgd(1e-3), accuracy=accuracy, epoch=2, tol=1e-2)
    first = float(method.init(START, batch(0)).adjoint_tol)
    history = fitted(method, 7).history
    np.testing.assert_allclose(history["tol"], 1e-2 * factor(np.arange(7) // 2), rtol=1e-6)
    np.testing.assert_allclose(history["adjoint_tol"], first * factor(np.arange(7) // 2), rtol=1e-6)


# accuracy="sampling"


def settled(tol, adjoint_tol):
    """The accuracies that are reached with params that stay and samples that all start cold."""
    method = jb.Stochastic(ORACLE, optax.sgd(0.0), tol=tol, adjoint_tol=adjoint_tol)
    state = cold = method.init(START, DATA)
    for _ in range(120):
        state, info = method.step(replace(state, warm=cold.warm), DATA)
        assert info.status <= jb.Status.PRECISION
    return float(state.tol), float(state.adjoint_tol)


def test_accuracies_settle_at_the_noise_from_wherever_they_begin():
    g, tight = exact(START), 1e-10
    spread = float(ORACLE(START, DATA, tol=tight).spread)

    def error(tol, adjoint_tol):
        return float(jnp.linalg.norm(gradient(START, tol, adjoint_tol) - g)) / spread

    for begin in ((1e-5, 1e-5), (1e4, 1e4), (1e-5, 1e4)):
        tol, adjoint_tol = settled(*begin)
        assert (
            error(tol, tight) <= 1.5 * 0.3 <= error(9 * tol, tight)
        )  # a threefold solve shows 2/3 of an error or more
        assert error(tight, adjoint_tol) <= 1.5 * 0.3  # six conjugate gradients end it, so it may be far below


def test_a_first_accuracy_that_means_nothing_is_mended_before_the_first_step():
    method = jb.Stochastic(ORACLE, optax.sgd(1.0), tol=1e6, adjoint_tol=1e6)
    state, info = method.step(method.init(START, DATA), DATA)
    move = START - state.params
    spread = float(ORACLE(START, DATA, tol=1e-10).spread)
    assert float(jnp.linalg.norm(move - exact(START))) <= 0.3 * spread
    assert float(info.tol) < float(state.tol) < 1e3


def test_a_probe_is_the_gradient_that_is_used_and_its_work_counts():
    method = jb.Stochastic(ORACLE, optax.sgd(1e-3), tol=1e-1, adjoint_tol=1e-1)
    state = method.init(START, DATA)
    state, _ = method.step(state, DATA)
    plain = probed = 0
    for _ in range(12):
        once = ORACLE(state.params, DATA, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        following, info = method.step(state, DATA)
        if (info.tol, info.adjoint_tol) == (state.tol, state.adjoint_tol):
            plain += 1
            assert int(info.work) == int(once.work) and float(info.grad_norm) == float(jnp.linalg.norm(once.grad))
        else:
            probed += 1
            assert info.tol <= state.tol and info.adjoint_tol <= state.adjoint_tol
            again = ORACLE(state.params, DATA, once.warm, tol=info.tol, adjoint_tol=info.adjoint_tol)
            assert int(info.work) == int(once.work) + int(again.work)
            assert float(info.grad_norm) == pytest.approx(float(jnp.linalg.norm(again.grad)), rel=1e-12)
        state = following
    assert plain and probed


def test_samples_that_are_all_alike_do_not_drive_the_accuracy_to_rounding():
    alike = jax.tree.map(lambda leaf: jnp.tile(leaf[:1], (4, 1)), DATA)
    method = jb.Stochastic(ORACLE, optax.sgd(0.0))
    state = cold = method.init(START, alike)
    for _ in range(60):
        state, _ = method.step(replace(state, warm=cold.warm), alike)
    g = gradient(START, 1e-11, 1e-11, alike)
    off = float(jnp.linalg.norm(gradient(START, state.tol, state.adjoint_tol, alike) - g) / jnp.linalg.norm(g))
    assert 1e-6 < off < 5e-3


def test_it_descends_with_less_work_than_at_an_accuracy_that_nobody_needs():
    descent = {"optimizer": optax.adam(0.05)}
    found = fitted(jb.Stochastic(ORACLE, **descent), 120)
    tight = fitted(jb.FirstOrder(ORACLE, **descent, tol=1e-6, adjoint_tol=1e-6), 120)
    value = partial(ORACLE.value, batch=DATA, tol=1e-8)
    gained = [float(value(START).value - value(result.params).value) for result in (found, tight)]
    assert gained[1] > 0 and gained[0] > 0.9 * gained[1] and found.work < 0.5 * tight.work


def test_the_program_holds_one_oracle():
    def loops(method):
        return jax.jit(method.step).lower(method.init(START, DATA), DATA).as_text().count("stablehlo.while")

    optimizer = optax.sgd(0.1)
    assert loops(jb.Stochastic(ORACLE, optimizer)) == loops(jb.FirstOrder(ORACLE, optimizer)) + 1


@pytest.mark.parametrize(
    "oracle, count", [(replace(ORACLE, chunk=None), 8), (replace(ORACLE, chunk=8), 8), (ORACLE, 1)]
)
def test_batches_in_one_chunk_are_refused(oracle, count):
    few = jax.tree.map(lambda leaf: leaf[:count], DATA)
    sentence = f"'sampling' compares the chunks .* solves all {count} samples .* give the oracle `chunk=1`"
    with pytest.raises(ValueError, match=sentence):
        jb.fit(jb.Stochastic(oracle, optax.sgd(0.1)), START, few, steps=1)
    jb.fit(jb.Stochastic(oracle, optax.sgd(0.0), accuracy="decay"), START, few, steps=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accuracy": "quick"}, "`accuracy` must be 'sampling', 'decay' or a function of the epoch, got 'quick'"),
        ({"accuracy": 0.1}, "`accuracy` must be .* got 0.1"),
        ({"accuracy": lambda k: -1.0}, "`accuracy` must give a positive number, but gives -1.0 at 0"),
        ({"accuracy": lambda k: jnp.nan * k}, "`accuracy` must give a positive number, but gives nan at 0"),
        ({"epoch": 0}, "`epoch` must be a positive number of steps, got 0"),
    ],
)
def test_what_is_no_accuracy_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jb.Stochastic(ORACLE, optax.sgd(0.1), **options)
