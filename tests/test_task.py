"""Task-adapted learning: gradients through the whole pipeline, what the lower level sees, fine-tuning, bad input."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import central_differences, relative

import jbilevel as jb
from jbilevel._core import trees
from jbilevel.alternating import Alternating
from jbilevel.task import Pipeline, _OnPictures, _Turns, rates, reconstruct

RNG = np.random.default_rng(0)
MASKS = np.zeros((3, 6, 6), np.int32)
MASKS[0, 1:4, 1:4] = MASKS[1, 3:, :4] = MASKS[2, 2:5, 3:] = 1
CLEAN = 0.2 + 0.6 * MASKS
BATCH = {
    "y": jnp.asarray(CLEAN + 0.2 * RNG.standard_normal(CLEAN.shape)),
    "labels": jnp.asarray(MASKS),
    "x": jnp.asarray(CLEAN),
}
TV = jb.regularizers.SmoothedTV(eps=0.1)
NET = {
    "filters": jnp.asarray(0.5 * RNG.standard_normal((3, 3, 2))),
    "head": {"slope": jnp.array([4.0, -2.0]), "bias": jnp.array(-0.8)},
}
LOSS = jb.losses.Segmentation(iou=0.5, log_cosh_dice=0.0)
DESCEND = partial(jb.FirstOrder, tol=1e-3, adjoint_tol=1e-3)
EXACTLY = partial(jb.FirstOrder, tol=1e-9, adjoint_tol=1e-9)
CHEAP = {"estimate": False, "solver": jb.solvers.GradientDescent}  # less to compile


def network(params, x):
    """A convolution, tanh, and a logit per pixel."""
    padded = jnp.pad(x, 1)
    taps = jnp.stack([padded[i : i + x.shape[0], j : j + x.shape[1]] for i in range(3) for j in range(3)], -1)
    hidden = jnp.tanh(taps @ params["filters"].reshape(9, 2))
    return hidden @ params["head"]["slope"] + 6 * (x - 0.5) + params["head"]["bias"]


def head(path, leaf):
    return path.startswith("head/")


def denoising():
    return jb.variational(None, TV), TV.init(weight=0.1), BATCH


def tomography():
    A = jb.operators.ParallelBeam((6, 6), np.pi * np.arange(4) / 4, 9)
    return jb.variational(A, TV, ridge=0.1), TV.init(weight=0.1), BATCH | {"y": A(BATCH["x"])}


def ridge_filters():
    R = jb.regularizers.CRR(widths=(2, 3), sizes=(3, 3))
    return jb.variational(None, R), R.init(jax.random.key(0)), BATCH


def saddle():
    return jb.variational(None, TV, form="saddle"), TV.init(weight=0.1), BATCH


def shrinkage():
    problem = jb.WeightedL1Problem(lambda p, x, d: 0.5 * jnp.sum((x - d["y"]) ** 2), lambda p, d: d["y"])
    return problem, jnp.full((6, 6), -2.5), BATCH


def settled(problem, theta, batch, finetune=head, **settings):
    """(pipeline, params, batch, oracle)"""
    pipeline = Pipeline(problem, network, LOSS)
    params, frozen = pipeline.split(theta, NET, finetune)
    return pipeline, params, batch | {"frozen": frozen}, pipeline.oracle([*batch, "frozen"], **settings)


@pytest.mark.parametrize(
    "made",
    [denoising, saddle, shrinkage, *(pytest.param(m, marks=pytest.mark.slow) for m in (tomography, ridge_filters))],
)
def test_gradient_of_the_whole_pipeline(made):
    pipeline, params, batch, oracle = settled(*made(), estimate=False)
    hg = oracle(params, batch, tol=1e-12)
    expected = ravel_pytree(params)[1](
        central_differences(lambda p: oracle.value(p, batch, tol=1e-12).value, params, 1e-5)
    )
    for part in ("regularizer", "task"):
        assert relative(hg.grad[part], ravel_pytree(expected[part])[0]) <= 1e-6
        assert trees.norm(hg.grad[part]) > 1e-4
    assert jax.tree.structure(hg.grad) == jax.tree.structure(params)


def test_the_lower_level_never_sees_labels_or_clean_images():
    _, params, batch, oracle = settled(*denoising(), **CHEAP)
    other = batch | {"labels": 1 - batch["labels"], "x": 7 - batch["x"]}
    a, b = (oracle(params, data, tol=1e-8) for data in (batch, other))
    assert np.array_equal(a.warm.x, b.warm.x) and not np.allclose(a.grad["regularizer"], b.grad["regularizer"])
    # not even if it tries
    spying = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum((x - d["x"]) ** 2), lambda p, d: d["y"], strong_convexity=1.0
    )
    with pytest.raises(KeyError, match="x"):
        settled(spying, TV.init(), BATCH)[3].value(params, batch)
    with pytest.raises(ValueError, match="must not hold the labels"):
        Pipeline(denoising()[0], network, LOSS, measured=("y", "labels"))
    # it does depend on what it may see
    c = oracle(params, batch | {"y": batch["y"] + 0.1}, tol=1e-8)
    assert not np.allclose(a.warm.x, c.warm.x)


def learned(**settings):
    problem, theta, batch = denoising()
    start = {"regularizer": theta, "task_params": NET, "batches": batch, "steps": 4}
    chosen = {"oracle": CHEAP, "method": partial(DESCEND, optimizer=optax.adam(0.1))}
    return jb.task_adapted(problem, network, LOSS, **start | chosen | settings)


def test_a_full_batch_needs_no_method_and_leaves_the_network_alone():
    found = learned(steps=40, method=None)  # jb.QuasiNewton
    assert isinstance(found.fit.state, jb.quasi_newton.QuasiNewtonState)
    _, params, batch, oracle = settled(*denoising(), **CHEAP)
    here = oracle(params | {"regularizer": found.regularizer}, batch, tol=1e-9)
    start = oracle(params, batch, tol=1e-9)
    assert float(here.value) < float(start.value)
    slopes = [float(trees.norm(hg.grad["regularizer"])) for hg in (here, start)]
    assert slopes[0] < 1e-2 * slopes[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found.task, NET))
    assert found(BATCH).shape == (3, 6, 6)
    x = found.reconstruct({"y": BATCH["y"]}, tol=1e-8)
    direct, info = jb.solve(denoising()[0], found.regularizer, {"y": BATCH["y"][1]}, tol=1e-8)
    np.testing.assert_allclose(x[1], direct, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": partial(DESCEND, optimizer=rates(regularizer=optax.adam(0.2), task=optax.adam(0.02)))},
        {"alternate": optax.adam(0.02), "task_steps": 2},
        pytest.param({"method": partial(jb.HOAG, step_size=0.05)}, marks=pytest.mark.slow),
        pytest.param({"method": jb.MAID, "oracle": {"correct": True}}, marks=pytest.mark.slow),
        pytest.param({"method": jb.MAID, "alternate": optax.adam(0.02)}, marks=pytest.mark.slow),
    ],
    ids=["groups", "alternating", "hoag", "maid", "alternating maid"],
)
def test_fine_tuning_moves_its_leaves_only(settings):
    found = learned(finetune=head, **settings)
    assert found.fit.history["value"][-1] < found.fit.history["value"][0]
    assert np.array_equal(found.task["filters"], NET["filters"])
    assert not np.array_equal(found.task["head"]["slope"], NET["head"]["slope"])
    assert not np.array_equal(found.regularizer, TV.init(weight=0.1))


@pytest.mark.slow
def test_learning_rates_are_those_of_their_groups():
    optimizer = rates(regularizer=optax.sgd(1e-2), task=optax.sgd(0.0))
    found = learned(finetune=head, method=partial(DESCEND, optimizer=optimizer), steps=1)
    assert jax.tree.all(jax.tree.map(np.array_equal, found.task, NET))
    _, params, batch, oracle = settled(*denoising(), **CHEAP)
    step = found.regularizer - params["regularizer"]
    np.testing.assert_allclose(step, -1e-2 * oracle(params, batch, tol=1e-9).grad["regularizer"], rtol=1e-2)


def test_projection_is_a_box_on_the_regularizer():
    low = jnp.log(jnp.array([0.09]))
    found = learned(
        finetune=head, method=partial(DESCEND, optimizer=optax.sgd(5.0)), alternate=optax.sgd(0.1),
        projection=lambda theta: jb.prox.box(theta, low, low + 0.05), steps=3,
    )  # fmt: skip
    assert float(found.regularizer[0]) in (pytest.approx(float(low[0])), pytest.approx(float(low[0]) + 0.05))
    assert not np.array_equal(found.task["head"]["slope"], NET["head"]["slope"])


def test_a_method_that_looks_ahead_moves_all_leaves_or_none():
    with pytest.raises(ValueError, match="QuasiNewton does not.* take jb.MAID"):
        learned(finetune=head, method=jb.QuasiNewton, alternate=optax.adam(0.02), steps=1)
    assert isinstance(learned(finetune=head, method=None, steps=1).fit.state, jb.quasi_newton.QuasiNewtonState)


@pytest.mark.slow
def test_alternating_is_joint_where_one_group_rests():
    slow = {"finetune": head, "steps": 3}
    joint = learned(method=partial(EXACTLY, optimizer=rates(regularizer=optax.sgd(0.3), task=optax.sgd(0.0))), **slow)
    turns = learned(method=partial(EXACTLY, optimizer=optax.sgd(0.3)), alternate=optax.sgd(0.0), **slow)
    np.testing.assert_allclose(joint.regularizer, turns.regularizer, rtol=1e-9)


def test_the_network_learns_on_reconstructions_of_the_present_accuracy():
    """HOAG's accuracy falls 216-fold in six steps, and that of the pictures with it."""
    asked = []

    class Spy(jb.implicit.Oracle):
        def value(self, params, batch, warm=None, *, tol=1e-6, sample_weight=None):
            jax.debug.callback(lambda tol: asked.append(float(tol)), tol)
            return super().value(params, batch, warm, tol=tol, sample_weight=sample_weight)

    pipeline, params, batch, _ = settled(*denoising())
    axes = {name: 0 for name in BATCH} | {"frozen": None}
    oracle = Spy(pipeline.lower, pipeline, solver=jb.solvers.GradientDescent, in_axes=axes)
    parts = {"x": 0, "labels": 0, "frozen": None}
    network = jb.FirstOrder(jb.explicit.Oracle(_OnPictures(pipeline), in_axes=parts), optax.adam(0.02))
    method = Alternating(oracle, jb.HOAG(oracle, "cubic"), network, batches=_Turns(pipeline))
    tols = jb.fit(method, params, batch, steps=6).history["tol"]
    jax.effects_barrier()
    assert tols[0] / tols[-1] == pytest.approx(216)
    np.testing.assert_array_equal(asked[1:], tols[1:])
    assert asked[0] > tols[0]  # the first accuracy is refined when the hypergradient is at hand


@pytest.mark.parametrize("alternate", [None, optax.adam(0.02)], ids=["joint", "alternating"])
def test_without_a_method_changing_batches_go_to_adam(alternate):
    def batch(step):
        chosen = np.array([step % 3, (step + 1) % 3])
        return {k: v[chosen] for k, v in BATCH.items()} | {"index": chosen}

    found = learned(method=None, batches=batch, steps=3, finetune=head, alternate=alternate)
    moved = float(jnp.abs(found.regularizer - TV.init(weight=0.1))[0])
    assert 0.1 < moved <= 0.3 + 1e-6  # three steps of Adam with rate 0.1
    assert not np.array_equal(found.task["head"]["slope"], NET["head"]["slope"]) and len(repr(found)) <= 360
    with pytest.raises(ValueError, match="MAID compares values|Alternating compares values"):
        learned(method=jb.MAID, batches=batch, steps=1, finetune=head, alternate=alternate)


@pytest.mark.slow
def test_alternating_and_joint_descent_find_the_same_minimum():
    problem = jb.SmoothProblem(  # x_hat = y + theta
        lambda theta, x, d: 0.5 * jnp.sum((x - d["y"] - theta) ** 2), lambda theta, d: d["y"], strong_convexity=1.0
    )
    coupled = partial(
        jb.task_adapted, problem, lambda p, x: jnp.sum(p["w"] * jnp.array([1.0, 0.5])) + jnp.sum(x),
        lambda output, target: 0.5 * (output - target) ** 2,
        batches={"y": jnp.array([[0.1, 0.2], [0.1, 0.2]]), "labels": jnp.array([1.0, 3.0])},
        regularizer=jnp.array(0.0), task_params={"w": jnp.zeros(2)}, finetune={"w": True}, steps=60, oracle=CHEAP,
    )  # fmt: skip
    joint = coupled(method=partial(EXACTLY, optimizer=optax.sgd(0.1)))
    turns = coupled(method=partial(EXACTLY, optimizer=optax.sgd(0.1)), alternate=optax.sgd(0.1))
    output = lambda found: float(found.task["w"] @ jnp.array([1.0, 0.5]) + 2 * found.regularizer + 0.3)  # noqa: E731
    assert output(joint) == pytest.approx(2.0, abs=1e-6) and output(turns) == pytest.approx(2.0, abs=1e-6)


@pytest.mark.slow
def test_batches_may_change_and_runs_resume(tmp_path):
    def batch(step):
        chosen = np.random.default_rng(step).permutation(3)[:2]
        return {k: v[chosen] for k, v in BATCH.items()} | {"index": chosen}

    settings = {"finetune": head, "batches": batch, "alternate": optax.adam(0.02)}
    whole = learned(steps=4, **settings)
    assert len(whole.fit.history["value"]) == 4 and np.isfinite(whole.fit.history["value"]).all()
    learned(steps=2, checkpoint=tmp_path / "run.npz", **settings)
    resumed = learned(steps=4, checkpoint=tmp_path / "run.npz", **settings)
    np.testing.assert_allclose(resumed.regularizer, whole.regularizer, rtol=1e-12)
    iterator = learned(steps=3, **settings | {"batches": (batch(step) for step in range(3))})
    np.testing.assert_allclose(iterator.fit.history["value"], whole.fit.history["value"][:3], rtol=1e-12)


@pytest.mark.slow
def test_other_names_and_raw_measurements():
    problem = jb.SmoothProblem(
        lambda p, x, y: 0.5 * jnp.sum((x - y) ** 2) + TV(p, x), lambda p, y: y, strong_convexity=1.0
    )
    named = {"noisy": BATCH["y"], "organs": BATCH["labels"]}
    pipeline = Pipeline(problem, network, LOSS, measured="noisy", labels="organs")
    params, frozen = pipeline.split(TV.init(weight=0.1), NET)
    names = ("noisy", "organs", "frozen")
    found = pipeline.oracle(names, **CHEAP).value(params, named | {"frozen": frozen}, tol=1e-9)
    _, _, batch, oracle = settled(*denoising(), finetune=None, **CHEAP)
    assert float(found.value) == pytest.approx(float(oracle.value(params, batch, tol=1e-9).value), rel=1e-9)
    assert reconstruct(pipeline, params["regularizer"], {"noisy": BATCH["y"]}).shape == (3, 6, 6)


def learned_with(problem, batches, task=network, loss=LOSS, **settings):
    start = {"regularizer": TV.init(weight=0.1), "task_params": NET, "steps": 2}
    return jb.task_adapted(problem, task, loss, batches=batches, **start | settings)


def test_a_hypergradient_of_zero_is_warned_of():
    for task, loss in (
        (network, lambda logits, labels: jnp.mean(1.0 * labels)),
        (lambda p, x: jnp.round(x) + p["head"]["bias"], LOSS),
        (lambda p, x: network(p, jax.lax.stop_gradient(x)), LOSS),
    ):
        with pytest.warns(UserWarning, match="hypergradient of the regulariser is zero"):
            pipeline = Pipeline(denoising()[0], task, loss)
            params, frozen = pipeline.split(TV.init(), NET)
            pipeline.inspect(params, BATCH | {"frozen": frozen})


def callback(p, x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x, vmap_method="sequential")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"finetune": lambda path, leaf: "decoder" in path}, ValueError, "`finetune` .*selects none of the 3"),
        ({"finetune": {"tail": True}}, ValueError, "`finetune` does not fit"),
        ({"alternate": optax.sgd(0.1)}, ValueError, "say which in `finetune`"),
        ({"task": lambda p, x: np.asarray(x)}, TypeError, "`task` cannot be differentiated, write it in JAX"),
        ({"task": lambda p, x: x if x[0, 0] > 0 else -x}, TypeError, "`task` cannot be differentiated"),
        ({"task": lambda p, x: (x > 0.5).astype(int)}, TypeError, "return logits, not classes"),
        ({"task": callback}, TypeError, "cannot be differentiated"),
        ({"task": 3}, TypeError, "`task` must be a function"),
        ({"loss": lambda logits, labels: logits}, ValueError, "must return a scalar"),
        (
            {"batches": BATCH | {"labels": BATCH["labels"].at[1].set(2)}},
            ValueError,
            r"sample 1 hold \[2\].*classes 0 to 1",
        ),
        ({"batches": BATCH | {"labels": BATCH["labels"].at[2, 0].set(-1)}}, ValueError, r"sample 2 hold \[-1\]"),
        ({"batches": BATCH | {"y": BATCH["y"].at[1, 0].set(jnp.nan)}}, ValueError, "loss of sample 1 is nan"),
        ({"batches": {"y": BATCH["y"]}}, ValueError, "no entry 'labels'"),
        ({"batches": BATCH["y"]}, TypeError, "must be mappings"),
        ({"batches": BATCH | {"frozen": 1.0}}, ValueError, "'frozen' of a batch is kept"),
        ({"problem": network}, TypeError, "`problem` must be a problem"),
        ({"task_steps": 0, "finetune": head, "alternate": optax.sgd(0.1)}, ValueError, "`task_steps` must be"),
    ],
)
def test_bad_input_is_said_at_once(changes, error, words):
    settings = {"problem": denoising()[0], "batches": BATCH} | changes
    with pytest.raises(error, match=words):
        learned_with(**settings)


def test_labels_that_do_not_count():
    batch = BATCH | {"labels": BATCH["labels"].at[0, 0].set(255)}
    pipeline = Pipeline(denoising()[0], network, jb.losses.Segmentation(ignore=255))
    params, frozen = pipeline.split(TV.init(), NET)
    pipeline.inspect(params, batch | {"frozen": frozen})
