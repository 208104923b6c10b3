"""Training of networks by FirstOrder and fit: averages, validation, groups, schedules, resuming, streams, failures."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbilevel as jb
from jbilevel._core import trees

A = jb.operators.ParallelBeam((6, 6), np.pi * np.arange(4) / 4, 8)
IMAGES = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
DATA = {"x": jnp.asarray(IMAGES), "y": A(jnp.asarray(IMAGES))}


def network(layers=2, **settings):
    return jb.nets.from_flax(jb.nets.LPD(A, rngs=nnx.Rngs(0), layers=layers, width=4, depth=2, **settings))


F, PARAMS = network()
LOSS = jb.losses.squared_error(mean=True)


def loss(params, data):
    return LOSS(None, F(params, data["y"]), data)


ORACLE = jb.explicit.Oracle(loss)


def stream(step):
    index = np.random.default_rng(step).choice(6, 2, replace=False)
    return jax.tree.map(lambda v: v[index], DATA)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_network_trains_and_starts_without_an_extra_gradient():
    traces = []

    def counted(params, data):
        traces.append(0)
        return loss(params, data)

    result = jb.fit(jb.FirstOrder(jb.explicit.Oracle(counted), optax.adam(1e-2)), PARAMS, DATA, steps=30)
    assert result.history["value"][-1] < 0.5 * result.history["value"][0]
    assert len(traces) <= 4  # two for the check of the loss' shape


@pytest.mark.slow
def test_average_is_the_mean_of_the_iterates():
    decay, seen = 0.8, []
    method = jb.FirstOrder(ORACLE, optax.sgd(0.05), average=decay)
    result = jb.fit(method, PARAMS, stream, steps=5, callback=lambda step, state, info: seen.append(state.params))
    weights = decay ** np.arange(4, -1, -1.0)
    expected = jax.tree.map(lambda *v: np.tensordot(weights / weights.sum(), np.stack(v), 1), *seen)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), result.state.average.params, expected
    )
    equal(result.params, jb.fit(jb.FirstOrder(ORACLE, optax.sgd(0.05)), PARAMS, stream, steps=5).params)
    with pytest.raises(ValueError, match="`average` must lie"):
        jb.FirstOrder(ORACLE, optax.sgd(0.1), average=1.0)


@pytest.mark.slow
def test_groups_are_clipped_apart_with_a_schedule():
    """The recipe of the guide: primal and dual networks clipped by themselves, one cosine schedule for both."""

    def group(path, _):
        return (
            "primal" if jax.tree_util.keystr(path, simple=True, separator="/").startswith("layers/primal") else "dual"
        )

    labels = lambda params: jax.tree_util.tree_map_with_path(group, params)  # noqa: E731
    clip = optax.clip_by_global_norm(1e-3)
    rate = optax.cosine_decay_schedule(1.0, 4)
    optimizer = optax.chain(optax.partition({"primal": clip, "dual": clip}, labels), optax.sgd(rate))
    iterates = [PARAMS]
    method = jb.FirstOrder(ORACLE, optimizer)
    jb.fit(method, PARAMS, DATA, steps=4, callback=lambda step, state, info: iterates.append(state.params))
    for step, (before, after) in enumerate(itertools.pairwise(iterates)):
        moved = nnx.to_pure_dict(trees.sub(after, before))["layers"]
        expected = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 4))
        for part in ("primal", "dual"):  # both gradients are longer than the clip
            np.testing.assert_allclose(trees.norm(moved[part]), expected, rtol=2e-3)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    method = jb.FirstOrder(ORACLE, optax.adam(0.1), average=0.9)  # too fast to improve at each step

    def run(steps, folder):
        best = jb.Validation(ORACLE, DATA, every=2, path=folder / "best.npz", params=lambda state: state.average.params)
        return jb.fit(method, PARAMS, stream, steps=steps, checkpoint=folder / "run.npz", callback=best), best

    whole, best = run(9, tmp_path / "whole")
    run(5, tmp_path / "parts")
    again, other = run(9, tmp_path / "parts")
    equal(again.state, whole.state)
    equal(other.params, best.params)
    assert (other.value, other.step, other.history) == (best.value, best.step, best.history)
    assert [step for step, _ in best.history] == [1, 3, 5, 7]
    assert best.value == min(value for _, value in best.history) and best.step < 7
    equal(jb.load(tmp_path / "parts" / "best.npz", PARAMS)[0], best.params)


def quadratic(folder, **settings):
    """A run to 2 past 1, where it is judged, with best parameters, in a folder; what it was and what it found."""
    oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    best = jb.Validation(oracle, jnp.array([1.0]), path=folder / "best.npz", **settings)

    def run(steps):
        method, file = jb.FirstOrder(oracle, optax.sgd(0.1)), folder / "run.npz"
        return jb.fit(method, jnp.array(0.0), jnp.array([2.0]), steps=steps, callback=best, checkpoint=file)

    return run, best


def found(best):
    return best.step, best.value, float(best.params), best.history


def killed_before_validation(folder, steps):
    """A process that dies after its checkpoint is written, and before the best parameters are."""
    run, _ = quadratic(folder)
    run(steps - 1)
    file = folder / "best.npz"
    content = file.read_bytes() if file.exists() else None
    run, _ = quadratic(folder)
    run(steps)
    file.write_bytes(content) if content else file.unlink()


@pytest.mark.parametrize("steps", [1, 4, 9, 12])
def test_a_validation_that_a_kill_left_out_is_made_up_for(steps, tmp_path):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run, best = quadratic(tmp_path / "whole")
    run(12)
    killed_before_validation(tmp_path / "killed", steps)
    run, again = quadratic(tmp_path / "killed")
    run(12)
    assert found(again) == found(best) and best.step == 6


def test_validation_of_steps_that_are_taken_again(tmp_path):
    """Checkpoints every five steps, killed after the best one: that one is found again."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run, best = quadratic(tmp_path / "whole")
    run(12)
    run, _ = quadratic(tmp_path / "killed")
    run(5)
    content = (tmp_path / "killed" / "run.npz").read_bytes()
    run(9)
    (tmp_path / "killed" / "run.npz").write_bytes(content)
    run, again = quadratic(tmp_path / "killed")
    run(12)
    assert found(again) == found(best)


def test_a_finished_run_has_its_validation_too(tmp_path):
    run, best = quadratic(tmp_path, every=5)
    run(12)
    for steps in (12, 15):
        run, again = quadratic(tmp_path, every=5)
        run(steps)
        assert again.value == best.value and again.step == best.step and again.history[:2] == best.history
    run, impatient = quadratic(tmp_path, patience=3)
    (tmp_path / "run.npz").unlink()
    assert run(50).status is jb.FitStatus.STOPPED
    run, again = quadratic(tmp_path, patience=3)
    resumed = run(50)  # and is still at the end of its patience
    assert resumed.status is jb.FitStatus.STOPPED and resumed.steps == impatient.step + 1 + 3


def test_validation_finds_the_least_and_stops():
    oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    method, batch = jb.FirstOrder(oracle, optax.sgd(0.1)), jnp.array([2.0])
    best = jb.Validation(oracle, jnp.array([1.0]), patience=3)
    result = jb.fit(method, jnp.array(0.0), batch, steps=100, callback=best)
    values = 2 - 2 * 0.9 ** np.arange(1, 101)
    assert best.step == int(np.argmin(np.abs(values - 1)))
    assert result.status is jb.FitStatus.STOPPED and result.steps == best.step + 1 + 3
    broken = jb.Validation(oracle, jnp.array([jnp.nan]))
    jb.fit(method, jnp.array(0.0), batch, steps=2, callback=broken)
    assert broken.params is None and broken.value == np.inf and len(broken.history) == 2


def test_the_best_of_another_run_is_not_taken_up(tmp_path):
    oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)
    method = jb.FirstOrder(oracle, optax.sgd(0.1))
    path = tmp_path / "best.npz"
    for start, kept in ((2.0, 0.0), (3.0, 0.5)):
        best = jb.Validation(oracle, jnp.array([2.0]), path=path)
        jb.fit(method, jnp.array(start), jnp.array([start]), steps=2, callback=best)
        assert best.value == kept
    jb.save(path, {"w": 1.0})
    with pytest.raises(ValueError, match="something else than the best"):
        jb.fit(
            method, jnp.array(0.0), jnp.array([1.0]), steps=1, callback=jb.Validation(oracle, jnp.ones(1), path=path)
        )
    with pytest.raises(ValueError, match="`every` must be"):
        jb.Validation(oracle, jnp.ones(1), every=0)


def test_the_best_by_another_judge_is_refused(tmp_path):
    oracle = jb.explicit.Oracle(lambda mean, data: 0.5 * (mean - data) ** 2)

    def run(steps, data=2.0, **settings):
        best = jb.Validation(oracle, jnp.array([data]), path=tmp_path / "best.npz", **settings)
        method = jb.FirstOrder(oracle, optax.sgd(0.1))
        return jb.fit(method, jnp.array(0.0), jnp.array([2.0]), steps=steps, callback=best, checkpoint=tmp_path)

    run(2)
    with pytest.raises(ValueError, match=r"best.npz was judged by another Validation, .* in the data: .* 2.0 before, "):
        run(3, data=2.5)
    with pytest.raises(ValueError, match="in Validation, `tol`: None before, 0.001 now; give another"):
        run(5, tol=1e-3)
    assert run(7).steps == 7


@pytest.mark.slow
def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    method = jb.FirstOrder(ORACLE, optax.adam(1e-2))
    jb.fit(method, PARAMS, DATA, steps=1, checkpoint=tmp_path)
    _, deeper = network(layers=3)
    with pytest.raises(ValueError, match=r"is of another run, which differs in the params to start from: leaf"):
        jb.fit(method, deeper, DATA, steps=2, checkpoint=tmp_path)


def test_nan_loss_keeps_the_last_good_checkpoint_and_names_the_step(tmp_path):
    def poisoned(step):
        batch = stream(step)
        return batch if step != 3 else batch | {"y": batch["y"].at[0, 0, 0].set(jnp.nan)}

    method = jb.FirstOrder(ORACLE, optax.adam(1e-2))
    result = jb.fit(method, PARAMS, poisoned, steps=9, checkpoint=tmp_path)
    assert result.status is jb.FitStatus.FAILED and result.steps == 3 and "Step 3" in result.message
    resumed = jb.fit(method, PARAMS, stream, steps=5, checkpoint=tmp_path)
    equal(resumed.params, jb.fit(method, PARAMS, stream, steps=5).params)


@pytest.mark.slow
def test_half_precision_trains_too():
    f, params = network(dtype=jnp.bfloat16)
    oracle = jb.explicit.Oracle(lambda p, data: LOSS(None, f(p, data["y"]), data))
    single, half = (jb.fit(jb.FirstOrder(o, optax.adam(1e-2)), params, DATA, steps=30) for o in (ORACLE, oracle))
    assert {v.dtype for v in jax.tree.leaves(half.params)} == {jnp.dtype("float32")}
    assert half.history["value"][-1] < 1.1 * single.history["value"][-1]
