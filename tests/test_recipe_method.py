"""A method of somebody else's, written from the recipe in CONTRIBUTING.md: it runs in `fit` like ours."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from jbilevel._method import steps


class DecayingState(jb.MethodState):
    first_tol: Any
    k: Any


@dataclass(frozen=True)
class Decaying(jb.Method):
    """Inexact stochastic gradient descent: steps rate/sqrt(k) with accuracies first/k (after Salehi et al. 2025)."""

    rate: float = 0.1
    _: KW_ONLY
    tol: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.rate > 0:
            raise ValueError(f"`rate` must be positive, got {self.rate}.")

    def init(self, params, batch):
        first = steps.first_tolerances(self.asked, params, batch, 1e-1, self.tol, self.tol)
        return DecayingState(
            params=steps.project(None, params),
            warm=self.oracle.init(params, batch),
            tol=first.tol,
            adjoint_tol=first.tol,
            first_tol=first.tol,
            k=jnp.ones_like(first.tol),
        )

    @partial(jax.jit, static_argnums=0)
    def step(self, state, batch):
        hg = self.asked(state.params, batch, state.warm, tol=state.tol, adjoint_tol=state.adjoint_tol)
        length = self.rate / jnp.sqrt(state.k)
        params, moved = steps.projected_step(None, state.params, hg.grad, length)
        tol = state.first_tol / (state.k + 1)
        following = replace(state, params=params, warm=hg.warm, tol=tol, adjoint_tol=tol, k=state.k + 1)
        return following, self.report(hg, state, step=jnp.sqrt(moved))


TRUTH = np.array([0.5, -1.0])
DATA = np.random.default_rng(0).standard_normal((6, 2))
PROBLEM = jb.SmoothProblem(  # x_hat = y + theta
    lambda theta, x, d: 0.5 * jnp.sum((x - d["y"] - theta) ** 2), lambda theta, d: jnp.zeros(2), strong_convexity=1.0
)
ORACLE = jb.implicit.Oracle(PROBLEM, lambda theta, x, d: 0.5 * jnp.sum((x - d["x"]) ** 2), solver=jb.solvers.AGD())
START = np.zeros(2)


def batches(step):
    index = np.random.default_rng(step).choice(6, 2, replace=False)
    return {"y": DATA[index], "x": DATA[index] + TRUTH, "index": index}


def test_it_learns_from_changing_batches_and_resumes(tmp_path):
    method = Decaying(ORACLE, 0.5)
    whole = jb.fit(method, START, batches, steps=30)
    np.testing.assert_allclose(whole.params, TRUTH, atol=0.05)
    np.testing.assert_allclose(whole.history["tol"], whole.history["tol"][0] / np.arange(1, 31), rtol=1e-12)
    np.testing.assert_allclose(whole.state.tol, whole.history["tol"][0] / 31, rtol=1e-12)
    jb.fit(method, START, batches, steps=11, checkpoint=tmp_path)
    again = jb.fit(method, START, batches, steps=30, checkpoint=tmp_path)
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    names = jb.load(tmp_path / "checkpoint.npz")[0]["state"]
    assert set(names) == {"params", "warm", "tol", "adjoint_tol", "first_tol", "k"} and names["warm"] is None
    with pytest.raises(ValueError, match="the option `rate` of Decaying: 0.5 before, 0.25 now"):
        jb.fit(Decaying(ORACLE, 0.25), START, batches, steps=30, checkpoint=tmp_path)


def test_it_refuses_what_ours_refuse_and_shows_itself_in_a_line():
    assert repr(Decaying(ORACLE, 0.5, tol=1e-3)) == "Decaying(implicit.Oracle(...), rate=0.5, tol=0.001)"
    with pytest.raises(TypeError, match="`oracle` of Decaying must be a hypergradient oracle, got SmoothProblem"):
        Decaying(PROBLEM)
    with pytest.raises(ValueError, match="`rate` must be positive"):
        Decaying(ORACLE, 0.0)
