"""What every method must do. A new method is one line in `METHODS`."""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems_for_tests import compilations

import jbilevel as jb
from jbilevel.alternating import Alternating, Batches

# x_hat = y + theta, and a loss whose network adds t to it: the value is a quadratic in (theta, t)
PARAMS = {"regularizer": np.array([1.0, -2.0]), "task": np.array(0.5)}
RNG = np.random.default_rng(0)
BATCH = {"y": RNG.standard_normal((3, 2)), "x": RNG.standard_normal((3, 2)), "t": np.zeros(3)}
PROBLEM = jb.SmoothProblem(
    lambda p, x, d: 0.5 * jnp.sum((x - p["regularizer"] - d["y"]) ** 2),
    lambda p, d: jnp.zeros_like(d["y"]),
    strong_convexity=1.0,
)
ASKED = []  # (what, tol) of every call of a spy


def loss(p, x, d):
    t = d["t"] if p["task"] is None else p["task"]
    return 0.5 * jnp.sum((x + t - d["x"]) ** 2)


def exact_loss(p, d):
    return loss(p, p["regularizer"] + d["y"], d)


class Spy(jb.implicit.Oracle):
    """An inexact oracle that writes down the accuracies it is asked for."""

    def value(self, params, batch, warm=None, *, tol=1e-6, sample_weight=None):
        jax.debug.callback(lambda tol: ASKED.append(("value", float(tol))), tol)
        return super().value(params, batch, warm, tol=tol, sample_weight=sample_weight)

    def __call__(self, params, batch, warm=None, *, tol=1e-6, adjoint_tol=None, sample_weight=None):
        jax.debug.callback(lambda tol: ASKED.append(("hypergradient", float(tol))), tol)
        return super().__call__(params, batch, warm, tol=tol, adjoint_tol=adjoint_tol, sample_weight=sample_weight)


EXACT = jb.explicit.Oracle(exact_loss)
INEXACT = jb.implicit.Oracle(PROBLEM, loss, solver=jb.solvers.AGD())
SPY = Spy(PROBLEM, loss, solver=jb.solvers.AGD())


@dataclass(frozen=True)
class Turns(Batches):
    def of_task(self, x, batch):
        seen = x if x is not None else batch["y"]
        return {"x": seen, "target": batch["x"]}

    def of_reconstruction(self, task_params, batch):
        return batch | {"t": jnp.broadcast_to(task_params, batch["t"].shape)}


def alternating(reconstruction, oracle, projection=None, **options):
    network = jb.explicit.Oracle(lambda t, d: 0.5 * jnp.sum((d["x"] + t - d["target"]) ** 2))
    turns = jb.FirstOrder(network, optax.sgd(0.1))
    return Alternating(oracle, reconstruction(oracle, projection=projection), turns, batches=Turns(), **options)


DESCENT = partial(jb.FirstOrder, optimizer=optax.sgd(0.2))
METHODS = {
    "MAID": jb.MAID,
    "HOAG": partial(jb.HOAG, step_size=0.2),
    "NBA": jb.NBA,
    "QuasiNewton": jb.QuasiNewton,
    "NBA, trust region": partial(jb.NBA, search="trust-region"),
    "FirstOrder": DESCENT,
    "FirstOrder, averaged Adam": partial(jb.FirstOrder, optimizer=optax.adam(0.3), average=0.9),
    "Stochastic": partial(jb.Stochastic, optimizer=optax.sgd(0.2)),
    "Stochastic, growing": jb.Stochastic,
    "Stochastic, decaying": partial(jb.Stochastic, optimizer=optax.sgd(0.2), accuracy="decay"),
    "Alternating": partial(alternating, DESCENT),
    "Alternating HOAG": partial(alternating, partial(jb.HOAG, step_size=0.2)),
}
EACH = pytest.mark.parametrize("name", METHODS)
# of methods that stand here twice, one is enough where an inexact oracle makes compiling long
VARIANTS = ("NBA, trust region", "FirstOrder, averaged Adam", "Stochastic, growing", "Stochastic, decaying")
QUICK_OR_SLOW = [pytest.param(n, marks=pytest.mark.slow if n in VARIANTS else ()) for n in METHODS]
EACH_INEXACTLY = pytest.mark.parametrize("name", QUICK_OR_SLOW)
COMPARING = [name for name in METHODS if METHODS[name](EXACT).compares_values]
OTHERS = [name for name in METHODS if name not in COMPARING]


def box(params):
    return params | {"regularizer": jnp.clip(params["regularizer"], -0.5, 0.75)}


def mini(step):
    index = np.array([step % 3, (step + 1) % 3])
    return {key: value[index] for key, value in BATCH.items()} | {"index": index}


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def types(tree):
    return jax.tree.structure(tree), [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)]


@EACH_INEXACTLY
def test_descends(name):
    method = METHODS[name](INEXACT)
    result = jb.fit(method, PARAMS, BATCH, steps=15)
    assert result.history["value"][-1] < 0.5 * result.history["value"][0]
    assert np.all(np.diff(result.history["work"]) > 0) and np.all(result.history["status"] <= jb.Status.PRECISION)
    assert np.all(result.history["tol"] > 0)


@pytest.mark.parametrize("name", ["HOAG", "FirstOrder"])
def test_an_error_that_nobody_reads_costs_nothing(name):
    method = METHODS[name](INEXACT)
    silent = jb.fit(method, PARAMS, BATCH, steps=3)
    logged = jb.fit(dataclasses.replace(method, log_error=True), PARAMS, BATCH, steps=3)
    assert np.all(np.isinf(silent.history["error"])) and np.all(np.isfinite(logged.history["error"]))
    assert silent.work < logged.work
    same(silent.params, logged.params)


@EACH
def test_the_state_is_a_frozen_pytree_that_steps_leave_in_its_form(name):
    method = METHODS[name](EXACT)
    state = method.init(PARAMS, BATCH)
    following, info = method.step(state, BATCH)
    for one in (state, following):
        assert isinstance(one, jb.MethodState) and jax.tree.structure(one.params) == jax.tree.structure(PARAMS)
        assert len(repr(one)) <= 360
        with pytest.raises(dataclasses.FrozenInstanceError):
            one.params = PARAMS
        same(jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(one)), one)
    assert isinstance(info, jb.StepInfo) and all(np.shape(number) == () for number in info)
    assert types(state) == types(following)
    assert len(repr(method)) <= 360 and "0x" not in repr(method)
    of_optax = name.startswith(("Alternating", "FirstOrder", "Stochastic"))  # which compares by identity
    assert method == METHODS[name](EXACT) or of_optax
    assert hash(method) == hash(dataclasses.replace(method))


@EACH_INEXACTLY
def test_the_state_tells_the_accuracy_with_which_the_next_step_begins(name):
    method = METHODS[name](SPY)
    state = method.init(PARAMS, BATCH)
    for _ in range(3):
        jax.effects_barrier()
        ASKED.clear()
        following, info = method.step(state, BATCH)
        jax.effects_barrier()
        assert max(tol for _, tol in ASKED) == float(state.tol)  # within a step it only gets better
        assert min(tol for what, tol in ASKED if what == "hypergradient") == float(info.tol)
        if "Alternating" in name:  # both solves at the same accuracy, so that the second finds its solution ready
            assert {tol for what, tol in ASKED if what == "value"} == {float(state.tol)}
            assert float(state.tol) in {tol for what, tol in ASKED if what == "hypergradient"}
        state = following


@EACH
def test_one_compilation_whatever_the_accuracy(name):
    method = METHODS[name](EXACT)
    state, _ = method.step(jax.jit(method.init)(PARAMS, BATCH), BATCH)
    tighter = dataclasses.replace(state, tol=0.5 * state.tol, adjoint_tol=0.1 * state.adjoint_tol)
    state, _ = method.step(state, BATCH)
    with compilations() as names:
        for start in (state, tighter):
            method.step(start, BATCH)
    assert not names


@EACH
def test_within_jit(name):
    method = METHODS[name](EXACT)
    state, info = jax.jit(lambda p, b: method.step(method.init(p, b), b))(PARAMS, BATCH)
    expected, told = method.step(method.init(PARAMS, BATCH), BATCH)
    for x, y in zip(jax.tree.leaves((state, info)), jax.tree.leaves((expected, told)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


@EACH
def test_a_projection_that_is_none_is_refused_before_the_first_step(name):
    shrink = partial(jax.tree.map, lambda leaf: 0.9 * leaf)
    with pytest.raises(ValueError, match="`projection` of .* is none: applied twice it moves params once more"):
        jb.fit(METHODS[name](EXACT, projection=shrink), PARAMS, BATCH, steps=1)


@EACH
def test_a_start_that_is_not_finite_is_no_fault_of_a_projection(name):
    params = PARAMS | {"regularizer": jnp.full_like(PARAMS["regularizer"], jnp.nan)}
    for projection in ({}, {"projection": box}):
        assert jb.fit(METHODS[name](EXACT, **projection), params, BATCH, steps=2).status is jb.FitStatus.FAILED


@EACH
def test_a_start_that_nothing_depends_on_is_said(name):
    blind = jb.explicit.Oracle(lambda params, d: jnp.sum(d["y"] ** 2) + 0.0 * jnp.sum(params["regularizer"]))
    words = "the hypergradient was exactly zero from the start"
    assert words in jb.fit(METHODS[name](blind), PARAMS, BATCH, steps=3).message
    assert words not in jb.fit(METHODS[name](EXACT), PARAMS, BATCH, steps=3).message


@EACH
def test_every_iterate_is_feasible(name):
    seen = []
    method = METHODS[name](EXACT, projection=box)
    result = jb.fit(method, PARAMS, BATCH, steps=8, callback=lambda step, state, info: seen.append(state.params))
    for params in (method.init(PARAMS, BATCH).params, *seen):
        same(box(params), params)
    assert result.history["value"][-1] < result.history["value"][0]


@EACH
def test_an_exact_oracle_has_no_tolerances(name):
    method = METHODS[name](EXACT)
    result = jb.fit(method, PARAMS, BATCH, steps=3)
    assert float(result.state.tol) == float(result.state.adjoint_tol) == 0
    np.testing.assert_array_equal(result.history["tol"], 0.0)
    np.testing.assert_array_equal(result.history["error"], 0.0)


def resumed(method, batches, folder):
    whole = jb.fit(method, PARAMS, batches, steps=5)
    for steps in (2, 5):
        part = jb.fit(method, PARAMS, batches, steps=steps, checkpoint=folder / "run.npz")
    same(part.state, whole.state)
    for column in part.history.keys() - {"seconds"}:
        np.testing.assert_array_equal(part.history[column], whole.history[column])
    return whole


@EACH
def test_a_resumed_run_is_the_uninterrupted_one(name, tmp_path):
    whole = resumed(METHODS[name](EXACT), BATCH, tmp_path)
    assert not np.array_equal(whole.params["regularizer"], PARAMS["regularizer"])


@pytest.mark.parametrize("name", [p for p in QUICK_OR_SLOW if p.values[0] in OTHERS])
def test_batches_may_change(name, tmp_path):
    whole = resumed(METHODS[name](INEXACT), mini, tmp_path)
    assert np.max(np.abs(whole.params["regularizer"] - PARAMS["regularizer"])) > 0.1
    assert np.all(whole.history["status"] <= jb.Status.PRECISION)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_batches_may_change_their_size(name):
    def sized(step):
        index = np.arange(2 + step % 2)
        return {key: value[index] for key, value in BATCH.items()} | {"index": index}

    result = jb.fit(METHODS[name](INEXACT), PARAMS, sized, steps=4)
    assert result.status is jb.FitStatus.FINISHED and result.history["value"][-1] < result.history["value"][1]


@pytest.mark.parametrize("name", COMPARING)
def test_changing_batches_are_refused_where_values_are_compared(name):
    for batches in (mini, iter([BATCH])):
        with pytest.raises(ValueError, match="compares values.*one full batch.*jb.FirstOrder"):
            jb.fit(METHODS[name](EXACT), PARAMS, batches, steps=2)


@EACH
def test_a_bad_sample_ends_the_run_and_keeps_the_parameters(name):
    bad = BATCH | {"x": np.where(np.arange(3)[:, None] == 1, np.nan, BATCH["x"])}
    result = jb.fit(METHODS[name](EXACT), PARAMS, bad, steps=3)
    assert result.status is jb.FitStatus.FAILED and result.steps == 0 and "NONFINITE" in result.message
    same(result.params, PARAMS)


@pytest.mark.parametrize(
    "make",
    [jb.MAID, jb.HOAG, jb.NBA, DESCENT, METHODS["Stochastic"], lambda o: Alternating(o, None, None, batches=Turns())],
)
def test_what_is_no_oracle_is_refused(make):
    for thing, what in ((PROBLEM, "SmoothProblem"), (loss, "function"), (jb.implicit.Oracle, "Oracle")):
        with pytest.raises(TypeError, match=f"`oracle` of .* must be a hypergradient oracle, got {what}; make one"):
            make(thing)


def test_other_parts_of_methods_are_refused_too():
    with pytest.raises(TypeError, match="`optimizer` of FirstOrder must be one of optax.*got str"):
        jb.FirstOrder(EXACT, "adam")
    with pytest.raises(TypeError, match="`task` of Alternating must be a method"):
        Alternating(EXACT, DESCENT(EXACT), optax.sgd(0.1), batches=Turns())
    with pytest.raises(TypeError, match=r"Half needs a method `step\(self, state: .*\) -> .*` to be a jb.Method"):

        class Half(jb.Method):
            def init(self, params, batch):
                return jb.MethodState(params=params, warm=None, tol=0.0, adjoint_tol=0.0)

    for positional in (jb.MAID, jb.NBA):
        with pytest.raises(TypeError, match="positional"):
            positional(EXACT, 0.5)


def test_a_state_may_be_decorated_by_its_author():
    @dataclass(frozen=True)
    class Decorated(jb.MethodState):
        count: int = 0

    state = Decorated(params=1.0, warm=None, tol=0.0, adjoint_tol=0.0)
    assert jax.tree.leaves(dataclasses.replace(state, count=2)) == [1.0, 0.0, 0.0, 2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.count = 1
