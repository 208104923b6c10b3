"""A third party's problem and solver, written from the recipes in CONTRIBUTING.md alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb


@dataclass(frozen=True)
class Ridge(jb.Problem):
    """min_x 1/2 |x - y|^2 + exp(params)/2 |x|^2, so x_hat = y/(1 + exp(params))."""

    view_type = jb.SmoothView

    def view(self, params, data):
        def energy(x):
            return 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * jnp.exp(params) * jnp.sum(x**2)

        constants = jb.Constants(strong_convexity=1 + jnp.exp(params), smoothness=2 * (1 + jnp.exp(params)))
        return jb.SmoothView(energy, jax.lax.stop_gradient(constants))

    def start(self, params, data):
        return jnp.zeros_like(data["y"])

    def default_solver(self):
        return HeavyBall()

    def oracle(self, loss, **options):
        return jb.implicit.Oracle(self, loss, **options)


class HeavyBallState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Any
    last: Any


@dataclass(frozen=True)
class HeavyBall(jb.Solver):
    """x+ = x - grad/L + momentum (x - last)."""

    momentum: float = 0.2

    def init(self, view, x0, target):
        return self._at(view, x0, x0, jb.Work.zero())

    def step(self, view, state, target):
        move = self.momentum * (state.x - state.last) - state.gradient / view.constants.smoothness
        return self._at(view, state.x + move, state.x, state.evaluations)

    def _at(self, view, x, last, work):
        gradient = view.gradient(x)
        return HeavyBallState(
            x=x,
            gradient=gradient,
            residual=jnp.linalg.norm(gradient),
            curvature=view.constants.smoothness,
            evaluations=work.plus(gradients=1),
            last=last,
        )


THETA = jnp.asarray(0.3)
BATCH = {"y": jnp.asarray(np.random.default_rng(0).standard_normal((6, 5))), "index": jnp.arange(6)}


def loss(params, x, data):
    return 0.5 * jnp.sum((x - 0.25 * data["y"]) ** 2)


def test_solved_to_a_proven_distance():
    data = {"y": BATCH["y"][0]}
    x, info = jb.solve(Ridge(), THETA, data, tol=1e-9)
    jb.check(info)
    distance = jnp.linalg.norm(x - data["y"] / (1 + jnp.exp(THETA)))
    assert distance <= info.error <= 1e-9 and info.work == info.steps + 1


def test_a_solve_that_ends_early_says_so():
    info = jb.solve(Ridge(), THETA, {"y": BATCH["y"][0]}, tol=1e-9, max_steps=2)[1]
    with pytest.raises(jb.ConvergenceError, match="MAX_STEPS"):
        jb.check(info)


def test_hypergradient_by_its_own_oracle():
    shrink = 1 / (1 + jnp.exp(THETA))
    slope = jnp.mean(jnp.sum(BATCH["y"] ** 2, axis=1)) * (shrink - 0.25) * -jnp.exp(THETA) * shrink**2
    hg = Ridge().oracle(loss)(THETA, BATCH, tol=1e-9)
    jb.check(hg)
    np.testing.assert_allclose(hg.grad, slope, rtol=1e-7)
    through = jax.grad(lambda p: loss(p, jb.implicit.argmin(Ridge())(p, {"y": BATCH["y"][0]}, tol=1e-9), first()))
    np.testing.assert_allclose(through(THETA), Ridge().oracle(loss)(THETA, only_first(), tol=1e-9).grad, rtol=1e-6)


def first():
    return {"y": BATCH["y"][0]}


def only_first():
    return {"y": BATCH["y"][:1]}


def test_fit_with_changing_batches_a_checkpoint_and_resume(tmp_path):
    method = jb.FirstOrder(Ridge().oracle(loss), optax.adam(0.3))

    def batches(step):
        return jax.tree.map(lambda leaf: leaf[2 * (step % 3) : 2 * (step % 3) + 2], BATCH)

    whole = jb.fit(method, THETA, batches, steps=60)
    jb.fit(method, THETA, batches, steps=20, checkpoint=tmp_path / "run.npz")
    resumed = jb.fit(method, THETA, batches, steps=60, checkpoint=tmp_path / "run.npz")
    assert resumed.params == whole.params and resumed.steps == 60
    assert abs(1 / (1 + np.exp(float(whole.params))) - 0.25) < 0.02  # the best strength halves twice


def test_a_problem_that_forgets_a_method_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"Half needs a method `start\(self, params.*data.*\).*jb.Problem.*cold start"):

        class Half(jb.Problem):
            def view(self, params, data):
                return None

    with pytest.raises(TypeError, match=r"Idle needs a method `step\(self, view, state, target\)"):

        class Idle(jb.Solver):
            def init(self, view, x0, target):
                return None


def test_defaults_say_what_to_pass():
    @dataclass(frozen=True)
    class Bare(jb.Problem):
        def view(self, params, data):
            return Ridge().view(params, data)

        def start(self, params, data):
            return Ridge().start(params, data)

    with pytest.raises(TypeError, match="no default solver for Bare; pass `solver`"):
        jb.solve(Bare(), THETA, first())
    with pytest.raises(TypeError, match="no oracle is known for Bare"):
        Bare().oracle(loss)
    with pytest.raises(TypeError, match="needs a smooth problem, got Bare"):
        jb.implicit.Oracle(Bare(), loss)
    assert jb.solve(Bare(), THETA, first(), tol=1e-6, solver=HeavyBall())[1].status == jb.Status.CONVERGED
