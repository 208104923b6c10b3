"""A regulariser from the recipe in CONTRIBUTING.md, written outside the package and learned with, in both its forms."""

from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb


def differences(x):
    return x[:, 1:] - x[:, :-1]


@dataclass(frozen=True)
class HuberRows(jb.Regularizer):
    """R(theta, x) = e^theta sum h(x[i, j + 1] - x[i, j]), h(t) = t^2/(2 width) up to width, |t| - width/2 beyond."""

    width: float = 0.1
    _: KW_ONLY
    least: float = 1e-3

    def init(self, key=None, *, weight=0.05, dtype=None):
        return jnp.log(jnp.asarray(weight, dtype))

    def __call__(self, params, x):
        self._require(x.shape)
        t = differences(x)
        u = jnp.clip(t, -self.width, self.width)
        return jnp.exp(params) * jnp.sum(u * (t - u / 2)) / self.width

    def bounds(self, params, shape):
        self._require(shape)
        weight = jnp.exp(params)
        return jb.Constants(
            strong_convexity=jnp.zeros_like(weight),
            smoothness=4 * weight / self.width,
            mixed_lipschitz=4 * weight / self.width,
            mixed_norm=2 * weight * np.sqrt(shape[0] * (shape[1] - 1)),
        )

    def saddle(self, params):
        weight = jnp.exp(params)

        def transpose(q):
            around = jnp.pad(q, ((0, 0), (1, 1)))
            return around[:, :-1] - around[:, 1:], ()

        return jb.regularizers.SaddleBlocks(
            linear=lambda x, z: differences(x),
            transpose=transpose,
            prox_dual=lambda v, step: jb.prox.huber_conjugate(v, step, weight, self.width),
            start=lambda x: ((), jnp.zeros_like(differences(x))),
            scaling=lambda: ((0.5, ()), 0.5),
            mu_dual=self.width / weight,
        )

    def check(self, params):
        if np.shape(params) != ():
            raise ValueError(f"params of HuberRows must be one number, got shape {np.shape(params)}.")

    def project(self, params):
        return jnp.maximum(params, np.log(self.least))

    def _require(self, shape):
        if len(shape) != 2:
            raise ValueError(f"HuberRows takes one (H, W) image, got {shape}; batch with vmap.")


R = HuberRows()


def images():
    rng = np.random.default_rng(0)
    clean = jnp.asarray(np.repeat(rng.random((2, 4, 2)), 3, axis=2))
    return {"x": clean, "y": clean + 0.1 * rng.standard_normal(clean.shape)}


def learn(form, checkpoint, steps):
    """The oracle is the problem's own; a method of one step after another; nothing here knows the regulariser."""
    problem = jb.variational(None, R, form=form)
    oracle = problem.oracle(jb.losses.squared_error(part=0 if form == "saddle" else None))
    method = jb.FirstOrder(oracle, optax.adam(0.3), tol=1e-6, adjoint_tol=1e-6, projection=R.project)
    params = R.init(weight=0.02, dtype=jnp.float64)
    return jb.fit(method, params, images(), steps=steps, checkpoint=checkpoint, progress=False)


def test_both_forms_have_one_solution():
    params, y = R.init(dtype=jnp.float64), images()["y"][0]
    x, info = jb.solve(jb.variational(None, R), params, y, tol=1e-8)
    jb.check(info)
    problem = jb.variational(None, R, form="saddle")
    problem.verify(params, y)
    pair, info = jb.solve(problem, params, y, tol=1e-8)
    jb.check(info)
    assert np.isfinite(info.error)
    np.testing.assert_allclose(jb.image_of(pair), x, atol=2e-8)


@pytest.mark.parametrize("form", ["smooth", "saddle"])
def test_learning_stops_and_goes_on(form, tmp_path):
    whole = learn(form, None, 2)
    assert whole.status == jb.FitStatus.FINISHED
    assert whole.history["value"][1] < whole.history["value"][0]
    assert learn(form, tmp_path / "run.npz", 1).steps == 1
    resumed = learn(form, tmp_path / "run.npz", 2)
    np.testing.assert_array_equal(resumed.params, whole.params)


def test_both_forms_have_one_hypergradient():
    params, batch = R.init(dtype=jnp.float64), images()
    found = []
    for form, part in (("smooth", None), ("saddle", 0)):
        oracle = jb.variational(None, R, form=form).oracle(jb.losses.squared_error(part=part))
        found.append(float(oracle(params, batch, tol=1e-9, adjoint_tol=1e-9).grad))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_it_refuses_reaches_the_user():
    with pytest.raises(ValueError, match="must be one number"):
        jb.solve(jb.variational(None, R), jnp.zeros(2), images()["y"][0])
    with pytest.raises(ValueError, match="takes one"):
        jax.eval_shape(R, R.init(), images()["y"])


def test_a_class_that_forgets_the_energy_is_refused_when_it_is_made():
    with pytest.raises(TypeError, match="Nothing needs a method `__call__"):

        class Nothing(jb.Regularizer):
            def init(self, key=None):
                return jnp.zeros(())
