"""What the benchmarks of learned total variation are made of, on problems whose answer is known."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.papers import bogensperger_2024_tv, bogensperger_2024_tv_descent, bogensperger_2024_tv_discretisation  # noqa: E402

BATCH = {name: jnp.asarray(np.random.default_rng(0).uniform(size=(1, 8, 7))) for name in "xy"}


@pytest.mark.slow
def test_experts_are_fields_of_experts_with_fixed_weights():
    """By the implicit hypergradient of the smooth form, in which all parameters are free."""
    experts = bogensperger_2024_tv.Experts()
    centred = lambda filters: filters - jnp.mean(filters, (1, 2), keepdims=True)  # noqa: E731
    params = {"filters": centred(jnp.asarray(experts.init()["filters"], jnp.float64))}
    assert params["filters"].size == 400
    np.testing.assert_allclose(experts.project(params)["filters"], params["filters"], atol=1e-7)
    hg = bogensperger_2024_tv.piggyback(experts, estimate=False)(params, BATCH, tol=1e-10)
    free = {
        "log_weight": jnp.log(experts.weight), "log_weights": jnp.full((16,), -np.log(16.0)),
        "log_smoothing": jnp.full((16,), np.log(experts.width)), **params,
    }  # fmt: skip
    smooth = jb.implicit.Oracle(jb.variational(None, experts.foe), jb.losses.squared_error())(free, BATCH, tol=1e-10)
    assert hg.value == pytest.approx(float(smooth.value), rel=1e-9)
    np.testing.assert_allclose(hg.grad["filters"], centred(smooth.grad["filters"]), atol=1e-7)


def test_climbing_ends_at_the_best_weight(monkeypatch):
    """Of a mean that is a parabola in the logarithm of the weight."""
    quality = lambda regularizer, weight, batch: np.array([1.0, 3.0]) - np.log(weight / 0.1) ** 2  # noqa: E731
    monkeypatch.setattr(bogensperger_2024_tv, "quality", quality)
    weight, found = bogensperger_2024_tv_discretisation.best_weight(None, lambda weight: weight, None)
    assert weight == pytest.approx(0.075 * 1.06**5)  # 0.10037, the nearest to 0.1 of its grid
    np.testing.assert_allclose(found, np.array([1.0, 3.0]) - np.log(weight / 0.1) ** 2)


def test_distances_shrink_and_reconstructions_are_solved():
    learned = jb.regularizers.LearnedTV(3, 3, dual_curvature=1e-1, auxiliary_curvature=1e-1, width=1e-2)
    params = learned.init(noise=0.0, dtype=jnp.float64)
    distances = bogensperger_2024_tv_discretisation.convergence(learned, params, np.asarray(BATCH["y"][0]), 1000)
    assert distances.shape == (20,) and distances[-1] < 1e-6 < distances[0]
    found = {"distances": distances, "stride": 50}
    first = next(i for i, d in enumerate(distances) if np.all(distances[i:] <= 1e-4))
    assert bogensperger_2024_tv_discretisation._reached(found, 1e-4) == str(50 * (first + 1))
    assert bogensperger_2024_tv_discretisation._reached(found, -1.0) == "> 1000"
    pair, _ = jb.solve(bogensperger_2024_tv.problem(learned), params, {"y": BATCH["y"][0]}, tol=1e-8, max_steps=10000)
    np.testing.assert_allclose(
        bogensperger_2024_tv.denoised(learned, params, BATCH["y"], residual=1e-7)[0], pair[0][0], atol=1e-5
    )


@pytest.mark.slow
def test_runs_of_one_kind_start_where_they_are_told():
    """State by state: accuracy, step and rate; each run spends its budget and remembers where each step began."""
    args = type("Args", (), {"eps": [0.1, 0.01], "alphas": [0.02, 0.2], "rates": [0.01]})
    batch = {name: jnp.asarray(image, jnp.float32) for name, image in BATCH.items()}
    start = bogensperger_2024_tv_descent.MODELS["exact"].init(jax.random.key(0), dtype=jnp.float32)
    runs = list(bogensperger_2024_tv_descent.runs(args, "exact", start, batch))
    assert [case["method"] for case, *_ in runs] == ["MAID"] * 4 + ["gradient descent"] * 4 + ["Adam"] * 2
    for case, _, state in runs:
        assert float(state.tol) == pytest.approx(case["eps"]) == pytest.approx(float(state.adjoint_tol))
        step = state.step if case["method"] == "MAID" else state.optimizer.hyperparams["learning_rate"]
        assert float(step) == pytest.approx(case["alpha"])
    _, method, state = runs[4]
    trace = bogensperger_2024_tv_descent.run(method, state, batch, budget=100)
    assert trace.work[0] == 0 and trace.work[-1] < 100 and np.all(np.diff(trace.work) > 0)
    move = trace.params[1]["log_weight"] - trace.params[0]["log_weight"]
    oracle = bogensperger_2024_tv.piggyback(bogensperger_2024_tv_descent.MODELS["exact"], estimate=False)
    assert move == pytest.approx(-0.02 * float(oracle(start, batch, tol=0.1).grad["log_weight"]), rel=1e-4)


def test_high_and_low_point_are_those_of_the_late_part():
    values = np.array([9.0, 1.0, 5.0, 3.0, 6.0])
    trace = bogensperger_2024_tv_descent.Trace(np.arange(5.0), values, values, values, [None] * 5, 0.0, False)
    assert bogensperger_2024_tv_descent.late_extremes(trace, 4.0) == (4, 3)
    assert (
        bogensperger_2024_tv_descent.late_extremes(trace._replace(value=np.array([1.0, 1.0, 2.0, 3.0, 4.0])), 4.0)
        is None
    )
    assert (
        bogensperger_2024_tv_descent.checkpoints(trace, 4.0)[0] == 0
        and bogensperger_2024_tv_descent.checkpoints(trace, 4.0)[-1] == 4
    )
