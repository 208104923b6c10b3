"""HOAG: optima of regularised logistic regression, schedules, rejected moves, projection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel.hoag import SCHEDULES


def logistic(w, x, y):
    return jnp.sum(jnp.logaddexp(0.0, -y * (x @ w)))


def energy(alpha, w, data):
    return logistic(w, data["x"], data["y"]) + 0.5 * jnp.exp(alpha) * jnp.vdot(w, w)


def held_out(alpha, w, data):
    return logistic(w, data["x_held_out"], data["y_held_out"])


RIDGE = jb.SmoothProblem(
    energy,
    lambda alpha, d: jnp.zeros(d["x"].shape[1]),
    strong_convexity=lambda alpha, d: jnp.exp(alpha),
    smoothness=lambda alpha, d: jnp.exp(alpha) + 0.25 * jnp.sum(d["x"] ** 2),
)
ORACLE = jb.implicit.Oracle(RIDGE, held_out, estimate=False)


def classification(name):
    """Standardised features (all samples), labels -1 and 1, half for the lower level and half for the upper."""
    from sklearn.datasets import load_breast_cancer, make_classification
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    if name == "synthetic":
        x, y = make_classification(600, 100, n_informative=10, random_state=0)
    else:
        x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    parts = train_test_split(x, 2.0 * y - 1, test_size=0.5, random_state=0)
    return dict(zip(("x", "x_held_out", "y", "y_held_out"), (part[None] for part in parts), strict=True))


# optimal log weight and loss by bounded search on Newton solves to 1e-12; losses agree with fabianp/hoag to 2e-7
OPTIMA = {"synthetic": (4.437663, 189.20752371), "breast cancer": (0.347450, 23.323712135)}


def exact(alpha, batch):
    hg = ORACLE(jnp.asarray(alpha, float), batch, tol=1e-9, adjoint_tol=1e-9)
    return float(hg.value), float(hg.grad)


def walk(method, params, batch, steps):
    states, infos = [method.init(params, batch)], []
    for _ in range(steps):
        state, info = method.step(states[-1], batch)
        states.append(state)
        infos.append(info)
    return states, infos


# the upper level of "breast cancer" is flat: with the quadratic schedule the reference too is still 0.08 away
@pytest.mark.slow
@pytest.mark.parametrize("name, schedule, steps", [("synthetic", "quadratic", 40), ("breast cancer", "exact", 20)])
def test_optimal_weight_of_logistic_regression(name, schedule, steps):
    batch, (optimum, value) = classification(name), OPTIMA[name]
    reached, slope = exact(optimum, batch)
    assert reached == pytest.approx(value, abs=2e-7) and abs(slope) < 1e-4  # the recipe is the reference's
    states, infos = walk(jb.HOAG(ORACLE, schedule), jnp.zeros(()), batch, steps)
    assert all(int(info.status) <= jb.Status.PRECISION for info in infos)
    assert float(states[-1].params) == pytest.approx(optimum, abs=2e-3)
    assert exact(states[-1].params, batch)[0] - value < 1e-4


# a closed form, so that every number of a step can be recomputed: value |theta|^2/2 for the exact x_hat = theta
SHRINK = jb.implicit.Oracle(
    jb.SmoothProblem(
        lambda theta, x, d: 0.5 * jnp.sum((x - theta - d) ** 2), lambda theta, d: jnp.ones(2), strong_convexity=1.0
    ),
    lambda theta, x, d: 0.5 * jnp.sum(x**2),
    solver=jb.solvers.AGD(),
    estimate=False,
)
ZERO = jnp.zeros((1, 2))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_accuracies_follow_their_formula(schedule):
    formula = {
        "exponential": lambda k: 0.9 ** (k - 1),
        "quadratic": lambda k: k**-2.0,
        "cubic": lambda k: k**-3.0,
        "exact": lambda k: 1e-12,
    }[schedule]
    method = jb.HOAG(SHRINK, schedule, tol=0.5, adjoint_tol=2.0, step_size=0.1)
    _, infos = walk(method, jnp.array([1.0, -2.0]), ZERO, 5)
    np.testing.assert_allclose([float(i.tol) for i in infos], [0.5 * formula(k) for k in range(1, 6)], rtol=1e-12)
    np.testing.assert_allclose([float(i.adjoint_tol) for i in infos], [2 * formula(k) for k in range(1, 6)], rtol=1e-12)


def test_each_move_is_made_once_and_a_rejected_one_returns():
    # steps of 2.5 on |theta|^2/2 map theta to -1.5 theta: the value grows by 2.25 and the move is refused
    start = np.array([1.0, -2.0])
    states, infos = walk(jb.HOAG(SHRINK, "exact", tol=1e-3, adjoint_tol=1e-3, step_size=2.5), jnp.array(start), ZERO, 4)
    np.testing.assert_allclose(states[1].params, start - 2.5 * start, atol=1e-9)
    # step 2 refuses it: back to the start, half the step (twice L), half the accuracies
    np.testing.assert_allclose(states[2].params, start - 1.25 * start, atol=1e-9)
    assert float(infos[1].step) == 0 and float(states[2].shrink) == 0.5
    np.testing.assert_allclose(states[2].previous, start)
    assert float(states[2].value) == pytest.approx(2.5)
    # step 3 accepts: the step grows by 1/0.95 if the decrease is large against its length, and else stays
    assert float(infos[2].step) in (pytest.approx(1.25), pytest.approx(1.25 / 0.95))
    np.testing.assert_allclose(states[3].params, -0.25 * start + float(infos[2].step) * 0.25 * start, atol=1e-9)
    assert float(infos[3].value) < float(infos[2].value) < float(infos[0].value)


def lengths(rule, count):
    """Of the steps on |theta|^2/2, where one of length s maps theta to (1 - s) theta."""
    _, infos = walk(jb.HOAG(SHRINK, "exact", rule=rule, step_size=0.01), jnp.array([1.0, -2.0]), ZERO, count)
    assert not any(float(info.step) == 0 for info in infos)
    return np.array([float(info.step) for info in infos])


def test_a_step_that_pays_makes_the_next_one_longer():
    # the value falls by s (1 - s/2) |theta|^2, and the slope promises s |theta|^2: all of it never, 60 % up to s = 0.8
    np.testing.assert_allclose(lengths("pedregosa", 6), 0.01)
    doubled = 0.01 * 2.0 ** np.arange(8)  # the last is 1.28, after 0.64 < 0.8
    np.testing.assert_allclose(lengths("safeguarded", 9), [*doubled, doubled[-1]])


def test_values_below_zero_are_not_rejected_for_their_sign():
    oracle = jb.explicit.Oracle(lambda theta, d: jnp.sum((theta - d) ** 2) - 100.0)
    states, infos = walk(jb.HOAG(oracle, step_size=0.1), jnp.array([1.0, -2.0]), ZERO, 5)
    assert all(float(info.step) > 0 for info in infos)
    assert np.all(np.diff([float(info.value) for info in infos]) < 0)


def test_projection():
    method = jb.HOAG(SHRINK, projection=lambda theta: jnp.clip(theta, 0.25, 4.0), step_size=0.3)
    states, _ = walk(method, jnp.array([9.0, 1.0]), ZERO, 30)
    path = np.array([state.params for state in states])
    assert np.all((path >= 0.25) & (path <= 4.0))
    np.testing.assert_allclose(path[-1], 0.25, atol=1e-6)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule"):
        jb.HOAG(SHRINK, "linear")


def test_a_move_to_where_the_value_overflows_is_taken_back():
    start = np.array([1.0, -2.0])
    method = jb.HOAG(SHRINK, "exact", tol=1e-3, adjoint_tol=1e-3, step_size=1e160)
    states, infos = walk(method, jnp.array(start), ZERO, 3)
    assert float(infos[1].value) == float(infos[0].value)
    np.testing.assert_allclose(states[2].params, start - 0.5e160 * start)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[2].warm))
    result = jb.fit(method, jnp.array(start), ZERO, steps=700)
    assert result.status == jb.FitStatus.FINISHED and result.history["value"][-1] < 1e-6
