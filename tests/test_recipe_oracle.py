"""A third party's oracle and linear solver, written from the recipe in CONTRIBUTING.md alone."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb


@dataclass(frozen=True)
class ClosedForm(jb.ForwardOracle):
    """Ridge regression whose lower level is one dense solve: x_hat = (A'A + exp(params) I)^-1 A'b."""

    loss: Callable
    _: KW_ONLY
    chunk: int | None = None

    exact = True

    def start(self, params, data):
        return jb.Warm(None, None)

    def forward(self, params, data, warm, tol):
        A = data["A"]
        x = jnp.linalg.solve(A.T @ A + jnp.exp(params) * jnp.eye(A.shape[1]), A.T @ data["b"])
        value = self.loss(params, x, data)
        info = jb.SolveInfo.exact(jax.lax.stop_gradient(value))
        return value, jb.Sample(value=jax.lax.stop_gradient(value), warm=warm, lower=info, adjoint=info)


@dataclass(frozen=True)
class Jacobi(jb.solvers.LinearSolver):
    """q + omega (b - H q), again and again."""

    omega: float

    def solve(self, product, b, q, *, tol, max_steps):
        def unfinished(carry):
            return (jnp.linalg.norm(b - product(carry[0])) > tol) & (carry[1] < max_steps)

        def step(carry):
            q, steps = carry
            return q + self.omega * (b - product(q)), steps + 1

        q, steps = jax.lax.while_loop(unfinished, step, (jnp.zeros_like(b) if q is None else q, jnp.asarray(0)))
        residual = jnp.linalg.norm(b - product(q))
        status = jnp.where(residual <= tol, jb.Status.CONVERGED, jb.Status.MAX_STEPS)
        work = jb.Work.zero().plus(products=2 * steps + 2)
        return q, jb.SolveInfo.exact(residual)._replace(
            status=status.astype(jnp.int32), steps=steps, residual=residual, evaluations=work
        )


RNG = np.random.default_rng(0)
TRUTH = RNG.standard_normal(4)
MATRICES = RNG.standard_normal((6, 7, 4))
BATCH = {
    "A": jnp.asarray(MATRICES),
    "b": jnp.asarray(MATRICES @ TRUTH + 0.5 * RNG.standard_normal((6, 7))),
    "index": jnp.arange(6),
}
THETA = jnp.asarray(-1.0)


def loss(params, x, data):
    return 0.5 * jnp.sum((x - TRUTH) ** 2)


def energy(params, x, data):
    return 0.5 * jnp.sum((data["A"] @ x - data["b"]) ** 2) + 0.5 * jnp.exp(params) * jnp.sum(x**2)


REGRESSION = jb.SmoothProblem(energy, init=lambda params, data: jnp.zeros(4), strong_convexity=lambda p, d: jnp.exp(p))


def test_agrees_with_implicit_differentiation():
    own = ClosedForm(loss)(THETA, BATCH)
    exact = jb.implicit.Oracle(REGRESSION, loss)(THETA, BATCH, tol=1e-10)
    jb.check(own)
    np.testing.assert_allclose(own.values, exact.values, rtol=1e-7)
    np.testing.assert_allclose(own.grad, exact.grad, rtol=1e-6)


def test_own_linear_solver():
    omega = 1 / (np.exp(-1.0) + max(np.linalg.norm(A, 2) ** 2 for A in MATRICES))
    oracle = jb.implicit.Oracle(REGRESSION, loss, linear_solver=Jacobi(float(omega)))
    hg = oracle(THETA, BATCH, tol=1e-8)
    jb.check(hg)
    np.testing.assert_allclose(hg.grad, jb.implicit.Oracle(REGRESSION, loss)(THETA, BATCH, tol=1e-8).grad, rtol=1e-5)


def test_a_bad_sample_is_named_and_left_out():
    bad = BATCH | {"b": BATCH["b"].at[3].set(jnp.nan)}
    hg = ClosedForm(loss)(THETA, bad)
    with pytest.raises(jb.ConvergenceError, match="sample 3 .*NONFINITE"):
        jb.check(hg)
    others = jax.tree.map(lambda leaf: jnp.delete(leaf, 3, axis=0), BATCH)
    dropped = ClosedForm(loss, on_failure="drop")(THETA, bad)
    np.testing.assert_allclose(dropped.grad, ClosedForm(loss)(THETA, others).grad, rtol=1e-12)


def test_fit_with_changing_batches_a_checkpoint_and_resume(tmp_path):
    method = jb.FirstOrder(ClosedForm(loss), optax.adam(0.2))

    def batches(step):
        return jax.tree.map(lambda leaf: leaf[2 * (step % 3) : 2 * (step % 3) + 2], BATCH)

    whole = jb.fit(method, THETA, batches, steps=30)
    jb.fit(method, THETA, batches, steps=10, checkpoint=tmp_path / "run.npz")
    resumed = jb.fit(method, THETA, batches, steps=30, checkpoint=tmp_path / "run.npz")
    assert resumed.params == whole.params
    assert whole.history["value"][-3:].mean() < whole.history["value"][:3].mean()


def test_an_oracle_that_forgets_a_method_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match=r"Half needs a method `forward\(self, params, data, warm.*jb.ForwardOracle"):

        class Half(jb.ForwardOracle):
            def start(self, params, data):
                return jb.Warm(None, None)

    with pytest.raises(TypeError, match=r"None_ needs a method `solve"):

        class None_(jb.solvers.LinearSolver):
            pass


def test_an_oracle_of_another_kind_of_problem_is_refused_when_it_is_made():
    saddle = jb.variational(None, jb.regularizers.TV())
    with pytest.raises(TypeError, match="jb.implicit.Oracle needs a smooth problem, got VariationalSaddle"):
        jb.implicit.Oracle(saddle, loss)
    with pytest.raises(
        TypeError, match="`linear_solver` must be one such as jb.solvers.CG.. or jb.solvers.MINRES.., got str"
    ):
        jb.implicit.Oracle(REGRESSION, loss, linear_solver="cg")


def test_what_an_oracle_needs_is_said_when_it_is_made():
    with pytest.raises(ValueError, match="OneStep needs `step`, or a problem with `smoothness`"):
        jb.unroll.OneStep(REGRESSION, loss)
    assert jb.unroll.OneStep(REGRESSION, loss, step=0.01).step == 0.01
    assert jb.implicit.Oracle(REGRESSION, loss, error_steps=1).error_steps == 1
    with pytest.raises(ValueError, match="`error_steps` must be at least 1, got 0"):
        jb.implicit.Oracle(REGRESSION, loss, error_steps=0)
    saddle = jb.variational(None, jb.regularizers.TV())
    with pytest.raises(ValueError, match="`error_steps` must be at least 2, got 1"):
        jb.piggyback.Oracle(saddle, loss, error_steps=1)
