"""The loop: what it returns, when it stops, warm starts that stay with their sample (test_checkpoint.py: resuming)."""

import csv
import itertools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_for_tests import FULL, IMAGES, PARAMS, TRACES, Toy, assert_same_run, generator, mini, state_of, without_index

from jbilevel import explicit
from jbilevel._core import io
from jbilevel._core.results import StepInfo
from jbilevel.first_order import FirstOrder
from jbilevel.training import FitStatus, fit

# What a run returns


def test_fit_is_the_plain_loop():
    method, history = Toy(rate=0.123), []
    state = method.init(PARAMS, FULL)
    for _ in range(6):
        state, info = jax.jit(method.step)(state, FULL)
        history.append((info.value, info.grad_norm))
    result = fit(method, PARAMS, FULL, steps=6)
    np.testing.assert_array_equal(result.params["w"], state.params["w"])
    np.testing.assert_array_equal(result.state.warm["x"], state.warm["x"])
    np.testing.assert_array_equal(np.stack([result.history["value"], result.history["grad_norm"]], 1), history)
    assert result.status is FitStatus.FINISHED and result.steps == 6 and result.work == 60.0
    np.testing.assert_array_equal(result.history["work"], 10.0 * np.arange(1, 7))
    np.testing.assert_array_equal(result.history["tol"], 7.0 * np.arange(6))  # warm starts carry on
    np.testing.assert_array_equal(result.history["status"], np.zeros(6))
    assert np.isnan(result.history["adjoint_tol"]).all() and (result.history["seconds"] > 0).all()
    assert result.compile_seconds > np.median(result.history["seconds"])
    assert all(len(column) == 6 for column in result.history.values())


def test_one_compilation_for_all_steps_and_one_more_per_batch_size():
    TRACES.clear()
    method = Toy(rate=0.11)
    fit(method, PARAMS, FULL, steps=5)
    fit(method, PARAMS, FULL, steps=3)
    assert len(TRACES) == 1
    fit(method, PARAMS, lambda step: mini(step, size=3 - step % 2), steps=6)
    assert len(TRACES) == 3


def test_no_step_is_a_result_too():
    result = fit(Toy(), PARAMS, FULL, steps=0)
    np.testing.assert_array_equal(result.params["w"], PARAMS["w"])
    assert result.status is FitStatus.FINISHED and result.work == 0 and result.history["value"].shape == (0,)


def test_statuses_are_sentences():
    assert all(status.message.endswith(".") for status in FitStatus)
    assert FitStatus(5) is FitStatus.FAILED


# When it stops


def test_callback_sees_each_step_and_stops():
    seen = []

    def callback(step, state, info):
        seen.append((step, int(state.count), float(info.value)))
        return step == 2

    result = fit(Toy(), PARAMS, FULL, steps=9, callback=callback)
    assert [entry[:2] for entry in seen] == [(0, 1), (1, 2), (2, 3)]
    np.testing.assert_array_equal([entry[2] for entry in seen], result.history["value"])
    assert result.status is FitStatus.STOPPED and result.steps == 3


def test_stop_rules():
    done = fit(Toy(done_at=3), PARAMS, FULL, steps=9)
    budget = fit(Toy(), PARAMS, FULL, steps=9, work_budget=35)
    value = fit(Toy(), PARAMS, FULL, steps=9, value_below=0.01)
    slope = fit(Toy(), PARAMS, FULL, steps=9, grad_norm_below=np.inf)
    assert [r.steps for r in (done, budget, value, slope)] == [4, 4, 2, 1]
    assert value.history["value"][0] > 0.01 > value.history["value"][1]
    assert all(r.status is FitStatus.CONVERGED for r in (done, value, slope))
    assert budget.status is FitStatus.FINISHED
    assert "budget of 35" in budget.message and "cannot improve" in done.message


@pytest.mark.parametrize(("setting", "words"), [("nan_value_at", "NONFINITE"), ("nan_params_at", "parameters")])
def test_failure_keeps_the_state_before_it(setting, words, tmp_path):
    method = Toy(**{setting: 4})
    result = fit(method, PARAMS, mini, steps=9, checkpoint=tmp_path)
    assert result.status is FitStatus.FAILED and result.steps == 4
    assert "Step 4" in result.message and words in result.message
    assert_same_run(result, fit(Toy(), PARAMS, mini, steps=4))
    assert fit(method, PARAMS, mini, steps=9, checkpoint=tmp_path).steps == 4  # and the checkpoint holds that state


def test_batches_may_end(tmp_path):
    result = fit(Toy(), PARAMS, itertools.islice(generator(), 4), steps=9, checkpoint=tmp_path)
    assert result.status is FitStatus.EXHAUSTED and result.steps == 4
    shorter = fit(Toy(), PARAMS, itertools.islice(generator(), 2), steps=9, checkpoint=tmp_path)
    assert shorter.status is FitStatus.EXHAUSTED and shorter.steps == 4
    with pytest.raises(ValueError, match="fresh iterator"):
        fit(Toy(), PARAMS, iter(()), steps=1)


@pytest.mark.parametrize("where", ["callback", "batches"])
def test_ctrl_c_leaves_the_last_finished_step(where, tmp_path):
    def interrupt(step):
        if step == 3:
            raise KeyboardInterrupt

    def callback(step, state, info):
        interrupt(step + 1)  # after the third step

    def batches(step):
        interrupt(step)  # before the fourth step
        return mini(step)

    given = {"callback": callback} if where == "callback" else {}
    source = batches if where == "batches" else mini
    result = fit(Toy(), PARAMS, source, steps=9, checkpoint=tmp_path, checkpoint_every=100, **given)
    assert result.status is FitStatus.INTERRUPTED and result.steps == 3
    assert_same_run(result, fit(Toy(), PARAMS, mini, steps=3))
    assert_same_run(fit(Toy(), PARAMS, mini, steps=6, checkpoint=tmp_path), fit(Toy(), PARAMS, mini, steps=6))


def test_other_exceptions_pass_after_the_checkpoint_is_written(tmp_path):
    def callback(step, state, info):
        if step == 2:
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fit(Toy(), PARAMS, FULL, steps=9, callback=callback, checkpoint=tmp_path, checkpoint_every=100)
    assert io.read_meta(tmp_path / "checkpoint.npz")["steps"] == 3


# Warm starts


def test_warm_starts_stay_with_their_sample():
    result = fit(Toy(), PARAMS, mini, steps=12)
    visits, expected = dict.fromkeys(range(7), 0), []
    for step in range(12):
        index = mini(step)["index"].tolist()
        expected.append(sum(visits[sample] for sample in index))
        visits.update({sample: visits[sample] + 1 for sample in index})
    assert max(expected) > 3
    np.testing.assert_array_equal(result.history["tol"], expected)  # each was where it had been left
    np.testing.assert_array_equal(result.history["error"], np.zeros(12))  # and nobody else's


def test_fit_with_index_is_the_loop_with_a_dictionary():
    method, known, step = Toy(), {}, jax.jit(Toy().step)
    state = method.init(PARAMS, mini(0))
    for number in range(8):
        batch = mini(number)
        cold = jax.tree.map(np.array, method.oracle.init(PARAMS, batch))
        for row, sample in enumerate(batch["index"].tolist()):
            for name, value in known.get(sample, {}).items():
                cold[name][row] = value
        state, _ = step(replace(state, warm=jax.tree.map(jnp.asarray, cold)), batch)
        for row, sample in enumerate(batch["index"].tolist()):
            known[sample] = {name: np.array(leaf[row]) for name, leaf in state.warm.items()}
    result = fit(method, PARAMS, mini, steps=8)
    for a, b in zip(jax.tree.leaves(result.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_index_every_step_starts_cold():
    result = fit(Toy(), PARAMS, without_index, steps=5)
    np.testing.assert_array_equal(result.history["tol"], np.zeros(5))
    np.testing.assert_array_equal(result.history["error"], np.zeros(5))


def test_a_negative_index_is_refused():
    with pytest.raises(ValueError, match="must not be negative; padding has the weight 0"):
        fit(Toy(), PARAMS, lambda step: {"y": IMAGES[:2], "index": np.array([3, -1])}, steps=4)


def test_bad_rows_are_not_remembered():
    @dataclass(frozen=True)
    class Spoiling(Toy):  # as an oracle that drops failed samples would: the value is fine, one row is not
        def step(self, state, batch):
            new, info = super().step(state, batch)
            spoil = (batch["index"] == 1) & (state.count == 2)
            x = jnp.where(spoil[:, None], jnp.nan, new.warm["x"])
            return replace(new, warm=new.warm | {"x": x}), info

    spoilt = fit(Spoiling(), PARAMS, lambda step: {"y": IMAGES[:2], "index": np.array([0, 1])}, steps=5)
    assert spoilt.status is FitStatus.FINISHED
    np.testing.assert_array_equal(spoilt.history["tol"], [0, 2, 4, 3, 5])  # sample 1 starts anew after step 2


def test_warm_may_be_none():
    @dataclass(frozen=True)
    class NoWarmStart(Toy):
        def init(self, params, batch):
            return state_of(params, None, jnp.zeros((), int))

        def step(self, state, batch):
            value = jnp.sum(state.params["w"]) + jnp.mean(batch["y"])
            return replace(state, count=state.count + 1), StepInfo(value, 1.0, 0.0, 0.0, 0.0, 0.0, 1, 0, False)

    assert fit(NoWarmStart(), PARAMS, mini, steps=3).status is FitStatus.FINISHED


def test_warm_may_be_empty(tmp_path):
    """As that of `explicit.Oracle`, which has neither a lower level nor an adjoint."""
    method = FirstOrder(explicit.Oracle(lambda w, d: jnp.sum((w["w"] - d["y"]) ** 2)), optax.adam(0.1))
    whole = fit(method, PARAMS, mini, steps=4)
    fit(method, PARAMS, mini, steps=2, checkpoint=tmp_path)
    assert_same_run(fit(method, PARAMS, mini, steps=4, checkpoint=tmp_path), whole)


@pytest.mark.parametrize("index", [np.array([0.0, 1.0]), np.array([[0], [1]]), np.array([0, 1, 2])])
def test_ill_formed_index(index):
    with pytest.raises(ValueError, match="index"):
        fit(Toy(), PARAMS, lambda step: {"y": IMAGES[:2], "index": index}, steps=1)


# Log, bar, arguments


def read(log):
    with open(log, newline="") as file:
        return list(csv.DictReader(file))


def test_log_is_the_history(tmp_path):
    log = tmp_path / "log.csv"
    lines_so_far = []

    def callback(step, state, info):
        lines_so_far.append(len(read(log)))

    first = fit(Toy(), PARAMS, FULL, steps=3, log=log, callback=callback)
    assert lines_so_far == [1, 2, 3]  # flushed at each step
    for log_column, column in first.history.items():
        np.testing.assert_array_equal([float(line[log_column]) for line in read(log)], column)
    assert [line["iteration"] for line in read(log)] == ["0", "1", "2"]
    assert [line["status"] for line in read(log)] == ["0"] * 3
    fit(Toy(), PARAMS, FULL, steps=2, log=log)
    assert len(read(log)) == 2  # a new run, a new file


def test_log_continues_where_the_checkpoint_is(tmp_path):
    log, file = tmp_path / "log.csv", tmp_path / "run.npz"
    fit(Toy(), PARAMS, FULL, steps=2, log=log, checkpoint=file)
    before = log.read_text()
    log.write_text(before + "2,0.1,half a li")  # killed between log and checkpoint
    result = fit(Toy(), PARAMS, FULL, steps=4, log=log, checkpoint=file)
    assert log.read_text().startswith(before)
    np.testing.assert_array_equal([float(line["value"]) for line in read(log)], result.history["value"])


def test_bar_on_request_only(capsys):
    fit(Toy(), PARAMS, FULL, steps=2)
    fit(Toy(), PARAMS, FULL, steps=2, progress=False)
    assert capsys.readouterr().err == ""
    fit(Toy(), PARAMS, FULL, steps=2, progress=True)
    bar = capsys.readouterr().err
    assert "2/2" in bar and "value=" in bar and "work=20" in bar


def test_wrong_arguments():
    class Unhashable(Toy):
        __hash__ = None

    class Growing(Toy):
        def step(self, state, batch):
            new, info = super().step(state, batch)
            return replace(new, count=new.count + 0.5), info

    class Stateless(Toy):
        def init(self, params, batch):
            return params, None

    with pytest.raises(TypeError, match="hashable"):
        fit(Unhashable(), PARAMS, FULL, steps=1)
    with pytest.raises(TypeError, match="must be a jb.Method such as .*, got function; derive"):
        fit(lambda: None, PARAMS, FULL, steps=1)
    with pytest.raises(TypeError, match="`init` of Stateless must return a jb.MethodState, got tuple"):
        fit(Stateless(), PARAMS, FULL, steps=1)
    with pytest.raises(TypeError, match=r"state.count from int64\[\] into float64\[\]"):
        fit(Growing(), PARAMS, FULL, steps=1)
    with pytest.raises(TypeError, match=r"params\['f'\] is a builtin_function_or_method"):
        fit(Toy(), {"f": abs}, FULL, steps=1)
    with pytest.raises(ValueError, match="`steps`"):
        fit(Toy(), PARAMS, FULL, steps=-1)
    with pytest.raises(ValueError, match="`checkpoint_every`"):
        fit(Toy(), PARAMS, FULL, steps=1, checkpoint_every=0)
