"""An operator from the recipe in CONTRIBUTING.md, written outside the package and learned with."""

from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb


@dataclass(frozen=True)
class ShiftAndScale(jb.operators.LinearOperator):
    """(A x)[i] = factor x[i - shift] along the last axis, which is cyclic."""

    in_shape: tuple[int, ...]
    shift: int
    _: KW_ONLY
    factor: float = 1.0

    norm_is_bound = True
    out_shape = property(lambda self: self.in_shape)

    def forward(self, x):
        return self.factor * jnp.roll(x, self.shift, axis=-1)

    def transpose(self, y):
        return self.factor * jnp.roll(y, -self.shift, axis=-1)

    def norm(self, tol=1e-3):
        return abs(self.factor)


A = ShiftAndScale((6, 5), 2, factor=0.5)


def test_the_base_class_supplies_the_rest():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, *A.in_shape)))
    assert max(jb.operators.dot_test(A)) < 1e-14
    np.testing.assert_allclose(A(x), 0.5 * np.roll(x, 2, axis=-1))
    np.testing.assert_allclose(jax.vmap(A)(x), A(x))
    np.testing.assert_allclose((A.T @ A)(x), 0.25 * x, atol=1e-15)
    np.testing.assert_allclose(jax.grad(lambda x: 0.5 * jnp.sum(A(x) ** 2))(x), 0.25 * x, atol=1e-15)
    assert A == ShiftAndScale((6, 5), 2, factor=0.5) and A != ShiftAndScale((6, 5), 1, factor=0.5)
    with pytest.raises(ValueError, match=r"x of ShiftAndScale must have shape \(6, 5\)"):
        A(jnp.ones((5, 6)))


def learn(problem, checkpoint, steps):
    """``steps`` steps for the weight of a regulariser, on two images seen by A."""
    rng = np.random.default_rng(1)
    clean = np.repeat(rng.random((2, 6, 1)), 5, axis=2)
    batch = {"x": jnp.asarray(clean), "y": A(jnp.asarray(clean)) + 0.05 * rng.standard_normal((2, 6, 5))}
    oracle = problem.oracle(jb.losses.squared_error(part=None))
    params = jb.regularizers.SmoothedTV(eps=0.1).init(weight=0.01, dtype=jnp.float64)
    method = jb.FirstOrder(oracle, optax.adam(0.5), tol=1e-4, adjoint_tol=1e-4)
    return jb.fit(method, params, batch, steps=steps, checkpoint=checkpoint, progress=False)


def test_learning_stops_and_goes_on(tmp_path):
    problem = jb.variational(A, jb.regularizers.SmoothedTV(eps=0.1), ridge=0.1)
    whole = learn(problem, None, 2)
    assert whole.status == jb.FitStatus.FINISHED
    assert whole.history["value"][1] < whole.history["value"][0]
    assert learn(problem, tmp_path / "run.npz", 1).steps == 1
    resumed = learn(problem, tmp_path / "run.npz", 2)
    np.testing.assert_array_equal(resumed.params, whole.params)
