"""MAID: true decrease of the exact upper-level value at every accepted step, adaptation, floor, any oracle."""

import logging
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb

OPTIMUM = 3.16810134713  # of the camera man at 64 x 64 with learned weight and eps (BFGS on exact gradients)
STARTS = [(-5.0, -5.0), (-2.5, -4.0)]


def loss(params, x, data):
    return 0.5 * jnp.sum((x - data["x"]) ** 2)


DENOISING = jb.variational(None, jb.regularizers.SmoothedTV())
TV = jb.implicit.Oracle(DENOISING, loss, loss_smoothness=1.0)


def images(photograph, where=slice(None), dtype=None):
    return {
        "x": photograph.clean[where, where][None].astype(dtype),
        "y": photograph.noisy[where, where][None].astype(dtype),
    }


@pytest.fixture(scope="module")
def batch64(camera64):
    return images(camera64)


@pytest.fixture(scope="module")
def batch32(camera64):
    return images(camera64, slice(16, 48))


# a quadratic lower level whose upper level is linear least squares in theta: x_hat = A^-1 (B theta + b)
rng = np.random.default_rng(3)
Q = np.linalg.qr(rng.standard_normal((6, 6)))[0]
A, B = (Q * np.linspace(1, 5, 6)) @ Q.T, rng.standard_normal((6, 3))
SAMPLES = {"b": rng.standard_normal((4, 6)), "x": rng.standard_normal((4, 6))}
THETA = np.array([2.0, -1.0, 0.5])
QUADRATIC = jb.SmoothProblem(
    lambda theta, x, d: 0.5 * jnp.vdot(x, A @ x) - jnp.vdot(x, B @ theta + d["b"]),
    lambda theta, d: jnp.zeros_like(d["b"]),
    strong_convexity=1.0,
    smoothness=5.0,
    hessian_lipschitz=0.0,
    mixed_lipschitz=0.0,
    mixed_norm=float(np.linalg.norm(B, 2)),
)
AGD = jb.solvers.AGD()  # compiles faster than the default solver, which the images exercise
TOY = jb.implicit.Oracle(QUADRATIC, loss, solver=AGD, loss_smoothness=1.0)


def toy_value(theta, samples=SAMPLES):
    solutions = np.linalg.solve(A, (B @ theta + samples["b"]).T).T
    return 0.5 * np.mean(np.sum((solutions - samples["x"]) ** 2, axis=1))


MAP, REST = np.linalg.solve(A, B), np.mean(SAMPLES["x"] - np.linalg.solve(A, SAMPLES["b"].T).T, axis=0)
BEST = np.linalg.lstsq(MAP, REST, rcond=None)[0]


class Row(NamedTuple):
    before: object
    info: object
    after: object

    @property
    def accepted(self):
        return float(self.info.step) > 0


def walk(method, params, batch, steps, state=None):
    """Steps of a method, until it is done."""
    state = method.init(params, batch) if state is None else state
    rows = []
    for _ in range(steps):
        following, info = method.step(state, batch)
        rows.append(Row(state, info, following))
        state = following
        if info.done:
            break
    return rows


def exact_values(problem, rows, batch):
    """Upper-level values before the first and after every step, by cold and tight solves that know nothing of MAID."""
    params = [rows[0].before.params] + [row.after.params for row in rows]

    def value(p, data):
        x, info = jb.solve(problem, p, data, tol=1e-10, max_steps=20_000)
        return loss(p, x, data), info

    values, info = jax.jit(lambda ps: jax.lax.map(lambda p: jax.vmap(lambda d: value(p, d))(batch), ps))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    )
    assert np.all(np.asarray(info.status) <= jb.Status.PRECISION) and np.all(np.asarray(info.error) < 1e-8)
    return np.mean(np.asarray(values), axis=1)


def decrease_left(method, rows, values):
    """f(params) - f(params+) - armijo ||params+ - params||^2/alpha of each accepted step; MAID promises >= 0."""
    left = []
    for row, before, after in zip(rows, values, values[1:], strict=False):
        if row.accepted:
            move = jax.tree.map(lambda a, b: float(jnp.sum((a - b) ** 2)), row.after.params, row.before.params)
            left.append(before - after - method.armijo * sum(jax.tree.leaves(move)) / float(row.info.step))
    return np.array(left)


# filter learning: params are a pytree, and no constant but mu and L is known
def filters_energy(params, x, data):
    n = x.shape[0] - 2
    shifted = jnp.stack([x[i : i + n, j : j + n] for i in range(3) for j in range(3)])
    responses = jnp.tensordot(params["kernels"].reshape(-1, 9), shifted, 1)
    roots = jnp.sum(jnp.sqrt(responses**2 + 0.05**2), axis=(1, 2))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.vdot(jnp.exp(params["log_weight"]), roots)


def filters_smoothness(params, data):
    return 1 + jnp.vdot(jnp.exp(params["log_weight"]), jnp.sum(jnp.abs(params["kernels"]), axis=(1, 2)) ** 2) / 0.05


FILTERS = jb.SmoothProblem(
    filters_energy, lambda p, d: d["y"], strong_convexity=1.0, smoothness=filters_smoothness
)  # fmt: skip


# ---- true decrease ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("certified", [True, False])
def test_exact_value_decreases_at_every_accepted_step_of_tv(batch64, start, certified):
    method = jb.MAID(TV, certified=certified)
    rows = walk(method, jnp.array(start), batch64, 25)
    left = decrease_left(method, rows, exact_values(DENOISING, rows, batch64))
    assert left.size >= 20
    assert np.min(left) > -1e-9
    assert float(rows[-1].info.value) < 1.01 * OPTIMUM


@pytest.mark.parametrize("certified", [True, False])
def test_closed_form_minimum_is_reached_with_true_decrease(certified):
    method = jb.MAID(TOY, certified=certified)
    rows = walk(method, jnp.array(THETA), SAMPLES, 100)
    values = [toy_value(np.asarray(row.before.params)) for row in rows] + [toy_value(np.asarray(rows[-1].after.params))]
    assert np.min(decrease_left(method, rows, values)) > -1e-13
    np.testing.assert_allclose(rows[-1].after.params, BEST, atol=1e-5)
    assert values[-1] - toy_value(BEST) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("certified", [True, False])
def test_filter_learning_with_a_pytree_of_parameters(batch32, certified):
    kernels = np.random.default_rng(5).standard_normal((3, 3, 3))
    kernels = jnp.asarray(kernels - kernels.mean(axis=(1, 2), keepdims=True))
    params = {"kernels": kernels, "log_weight": jnp.full(3, -5.0, float)}
    batch = jax.tree.map(lambda v: jnp.stack([v[0, :12, :12], v[0, 20:, 20:]]), batch32)
    method = jb.MAID(jb.implicit.Oracle(FILTERS, loss, loss_smoothness=1.0), certified=certified)
    rows = walk(method, params, batch, 16)
    left = decrease_left(method, rows, exact_values(FILTERS, rows, batch))
    assert left.size >= 14
    assert np.min(left) > -1e-9
    assert float(rows[-1].info.value) < 0.85 * float(rows[0].info.value)
    assert jax.tree.structure(rows[-1].after.params) == jax.tree.structure(params)


def test_projection_keeps_every_step_feasible_and_finds_the_minimum_in_the_box():
    low, high = np.array([-0.2, -1.0, -0.3]), np.array([0.1, 0.0, 0.05])
    method = jb.MAID(TOY, projection=lambda theta: jnp.clip(theta, low, high), certified=True)
    rows = walk(method, jnp.array(THETA), SAMPLES, 60)
    path = np.array([rows[0].before.params] + [row.after.params for row in rows])
    assert np.all((path >= low) & (path <= high))  # the start lies outside and is projected too
    assert np.min(decrease_left(method, rows, [toy_value(theta) for theta in path])) > -1e-13

    theta, rate = path[0], 1 / np.linalg.norm(MAP, 2) ** 2
    for _ in range(5000):  # plain projected gradients on the closed form
        theta = np.clip(theta - rate * MAP.T @ (MAP @ theta - REST), low, high)
    assert np.sum((theta == low) | (theta == high)) >= 1  # the box matters
    np.testing.assert_array_equal((path[-1] == low) | (path[-1] == high), (theta == low) | (theta == high))
    np.testing.assert_allclose(path[-1], theta, atol=1e-5)


# ---- adaptation ------------------------------------------------------------------------------------------------------


def halvings(small, large, factor):
    count = np.log(float(small) / float(large)) / np.log(factor)
    assert count == pytest.approx(round(count), abs=1e-6) and count > -0.5
    return round(count)


def test_accuracies_and_steps_move_by_their_factors():
    # from a loose start some steps need better accuracies, others do not
    method = jb.MAID(TOY, tol=10.0, adjoint_tol=20.0, rule="paper", accuracy_up=1.25, step_up=1.5)
    rows = walk(method, jnp.array(THETA), SAMPLES, 200)
    assert all(row.accepted for row in rows[:-1]) and len(rows) > 20
    assert toy_value(np.asarray(rows[-1].after.params)) - toy_value(BEST) < 1e-6
    refinements, trials = [], []
    for row in rows[:-1]:
        assert float(row.info.adjoint_tol) == pytest.approx(2 * float(row.info.tol))
        assert float(row.after.tol) == pytest.approx(1.25 * float(row.info.tol))
        assert float(row.after.adjoint_tol) == pytest.approx(1.25 * float(row.info.adjoint_tol))
        assert float(row.after.step) == pytest.approx(1.5 * float(row.info.step))
        refinements.append(halvings(row.info.tol, row.before.tol, 0.5))
        if float(row.before.step) > 0:
            trials.append(halvings(row.info.step, row.before.step, 0.5))
    assert max(refinements) >= 1 and min(refinements) == 0
    assert max(trials) >= 1 and min(trials) == 0


@pytest.mark.slow
def test_descent_test_refines_until_the_hypergradient_is_accurate_enough():
    method = jb.MAID(TOY, descent=0.9, certified=True, tol=1.0, adjoint_tol=1.0)
    for row in walk(method, jnp.array(THETA), SAMPLES, 6):
        hg = TOY(row.before.params, SAMPLES, row.before.warm, tol=row.info.tol, adjoint_tol=row.info.adjoint_tol)
        gradient = MAP.T @ (MAP @ np.asarray(row.before.params) - REST)
        assert np.linalg.norm(hg.grad - gradient) <= 0.1 * np.linalg.norm(hg.grad)


def test_loss_below_zero_does_not_lift_the_nonmonotone_reference():
    # values far below zero: a reference that began at 0 would accept any step
    oracle = jb.explicit.Oracle(lambda theta, d: jnp.sum((theta - d) ** 2) - 100.0)
    method = jb.MAID(oracle, window=0.85, step_size=1.01)
    row = walk(method, jnp.ones(2), jnp.zeros((1, 2)), 1)[0]
    assert float(jnp.sum(row.after.params**2)) < 2.0


def test_nonmonotone_variant_stays_below_the_average_of_past_values():
    rows = walk(jb.MAID(TOY, window=0.85), jnp.array(THETA), SAMPLES, 150)
    values = [toy_value(np.asarray(row.after.params)) for row in rows]
    assert values[-1] - toy_value(BEST) < 1e-6
    reference, weight = toy_value(THETA), 1.0
    for value in values:  # Zhang & Hager (2004), (1.6)
        assert value <= reference + 1e-9
        weight_next = 0.85 * weight + 1
        reference, weight = (0.85 * weight * reference + value) / weight_next, weight_next


# ---- convergence and its end -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("tol", [None, 1e1, 1e0, 1e-1, 1e-3, 1e-5])
def test_tv_converges_from_any_first_accuracy(batch64, start, tol):
    state = jb.MAID(TV, tol=tol, adjoint_tol=tol).init(jnp.array(start), batch64)
    method, work, value = jb.MAID(TV), 0, np.inf
    while work <= 8000 and value > 1.001 * OPTIMUM:
        state, info = method.step(state, batch64)
        work, value = work + int(info.work), float(info.value)
        assert not info.done
    assert value <= 1.001 * OPTIMUM, work


def test_ends_at_the_floor_instead_of_looping():
    method = jb.MAID(TOY)
    rows = walk(method, jnp.array(THETA), SAMPLES, 200)
    last = rows[-1]
    assert bool(last.info.done) and bool(last.after.done) and not last.accepted
    assert bool(last.info.stationary) and float(last.info.grad_norm) < 1e-6 * float(rows[0].info.grad_norm)
    np.testing.assert_array_equal(last.after.params, last.before.params)
    assert int(last.info.work) < 10_000


@pytest.mark.slow
def test_start_that_meets_a_loose_tolerance_is_not_taken_for_stationary(batch64):
    # x0 and q = 0 meet tol = 10, so z is exactly 0: the accuracy has to improve, nothing has converged
    state = jb.MAID(TV, tol=10.0, adjoint_tol=10.0).init(jnp.array(STARTS[0]), batch64)
    hg = TV(state.params, batch64, state.warm, tol=10.0)
    assert float(jnp.sum(jnp.abs(hg.grad))) == 0
    state, info = jb.MAID(TV).step(state, batch64)
    assert not info.done and float(info.step) > 0


def test_nan_in_the_data_is_reported(batch64):
    batch = batch64 | {"y": batch64["y"].at[0, 3, 4].set(jnp.nan)}
    rows = walk(jb.MAID(TV), jnp.array(STARTS[0]), batch, 3)
    assert len(rows) == 1
    assert bool(rows[0].info.done) and int(rows[0].info.status) == jb.Status.NONFINITE
    np.testing.assert_array_equal(rows[0].after.params, STARTS[0])


@pytest.mark.slow
def test_single_precision_runs_to_its_floor(batch32):
    with jax.enable_x64(False):
        batch = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), jnp.float32), batch32)
        rows = walk(jb.MAID(TV), jnp.array(STARTS[1], jnp.float32), batch, 200)
        last = rows[-1]
        assert {leaf.dtype for leaf in jax.tree.leaves(last.after.params)} == {jnp.dtype("float32")}
    assert bool(last.info.done) and int(last.info.status) == jb.Status.PRECISION
    assert float(last.info.value) < 1.45


def test_single_precision_parameters_with_a_double_tolerance():
    samples = jax.tree.map(lambda v: v.astype(np.float32), SAMPLES)
    method = jb.MAID(TOY, tol=0.1, adjoint_tol=0.1, step_size=0.1)
    rows = walk(method, jnp.array(THETA, jnp.float32), samples, 10)
    assert rows[-1].after.params.dtype == jnp.float32
    assert float(rows[-1].info.value) < 1.5 * toy_value(BEST) + 0.1


# ---- any oracle ------------------------------------------------------------------------------------------------------


def closed_form(theta, data):
    return loss(theta, jnp.linalg.solve(A, B @ theta + data["b"]), data)


ORACLES = {
    "implicit": TOY,
    "corrected": jb.implicit.Oracle(QUADRATIC, loss, solver=AGD, correct=True),
    "without mu": jb.implicit.Oracle(jb.SmoothProblem(QUADRATIC.energy, QUADRATIC.init), loss, solver=AGD),
    "unroll": jb.unroll.Oracle(QUADRATIC, loss, steps=60),
    "explicit": jb.explicit.Oracle(closed_form),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ("corrected", "without mu") else ()) for n in ORACLES]
)
def test_never_knows_which_oracle_feeds_it(name):
    rows = walk(jb.MAID(ORACLES[name]), jnp.array(THETA), SAMPLES, 100)
    values = [toy_value(np.asarray(row.before.params)) for row in rows] + [toy_value(np.asarray(rows[-1].after.params))]
    assert np.all(np.diff(values) < 1e-13)
    assert values[-1] - toy_value(BEST) < 1e-6


@pytest.mark.slow
def test_one_step_oracle_descends_until_its_bias_stops_it():
    rows = walk(jb.MAID(jb.unroll.OneStep(QUADRATIC, loss, solver=AGD)), jnp.array(THETA), SAMPLES, 30)
    values = [toy_value(np.asarray(row.before.params)) for row in rows] + [toy_value(np.asarray(rows[-1].after.params))]
    assert np.all(np.diff(values) < 1e-13)
    assert values[-1] - toy_value(BEST) < 0.1 * (values[0] - toy_value(BEST))


# ---- one compiled function -------------------------------------------------------------------------------------------


def test_ten_steps_and_new_tolerances_compile_once(caplog):
    method = jb.MAID(TOY, armijo=0.02)  # a method of its own: nothing is compiled yet
    state = method.init(jnp.array(THETA), SAMPLES)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(5):
            state, _ = method.step(state, SAMPLES)
        for tol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            state = replace(state, tol=jnp.float64(tol), adjoint_tol=jnp.float64(3 * tol))
            state, _ = method.step(state, SAMPLES)
    compiled = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Compiling ")]
    assert len([message for message in compiled if "step" in message.split(" with ")[0]]) == 1
    assert len(compiled) <= 2, compiled  # nothing else but perhaps a constant


# ---- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"accuracy_down": 1.0},
        {"accuracy_down": 0.0},
        {"accuracy_up": 0.9},
        {"step_down": 1.5},
        {"step_up": 0.5},
        {"armijo": 0.0},
        {"armijo": 1.0},
        {"descent": 1.0},
        {"window": 1.0},
        {"window": -0.1},
        {"rule": "printed"},
        {"tries": 0},
        {"rounds": 0},
    ],
    ids=str,
)
def test_constructor_names_the_bad_argument(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        jb.MAID(TOY, **options)


def test_constructor_refuses_an_oracle_that_knows_no_error():
    no_mu = jb.SmoothProblem(QUADRATIC.energy, QUADRATIC.init, smoothness=5.0)
    with pytest.raises(ValueError, match="loss_smoothness"):
        jb.MAID(jb.implicit.Oracle(QUADRATIC, loss), certified=True)
    with pytest.raises(ValueError, match="strong_convexity"):
        jb.MAID(jb.implicit.Oracle(no_mu, loss, loss_smoothness=1.0), certified=True)
    with pytest.raises(ValueError, match="strong_convexity"):
        jb.MAID(jb.unroll.Oracle(no_mu, loss))
