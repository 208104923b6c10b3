"""Saddle forms of regularisers: properties of their own, limits of one another, refusals; the rest is in the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jbilevel as jb
from jbilevel import image_of

SHAPE = (8, 7)


def image(seed: int = 0):
    rng = np.random.default_rng(seed)
    clean = np.zeros(SHAPE)
    clean[2:6, 1:5] = rng.uniform(0.5, 1)
    return jnp.asarray(clean), jnp.asarray(clean + 0.1 * rng.standard_normal(SHAPE))


@pytest.mark.slow
def test_colour_images_have_both_forms():
    params, data = jnp.log(jnp.array([0.1, 0.05])), jnp.stack([image(s)[1] for s in range(3)])
    for coupling in ("joint", "separate"):
        regularizer = jb.regularizers.SmoothedTV(channels=3, coupling=coupling)
        smooth, _ = jb.solve(jb.variational(None, regularizer), params, data, tol=1e-8)
        problem = jb.variational(None, regularizer, form="saddle")
        problem.verify(params, data)
        assert float(jnp.linalg.norm(jb.solve(problem, params, data, tol=1e-7)[0][0] - smooth)) <= 2e-7


@pytest.mark.slow
def test_total_variation_is_the_limit_of_the_smoothed_one():
    """And of the learned one with a single filter that is 1 at its centre."""
    data = image()[1]
    exact, info = jb.solve(
        jb.variational(None, jb.regularizers.TV()), jnp.log(jnp.array([0.1])), data, tol=1e-7, max_steps=50000
    )
    jb.check(info)
    smoothed = jb.regularizers.SmoothedTV(eps=1e-4)
    near, _ = jb.solve(jb.variational(None, smoothed), jnp.log(jnp.array([0.1])), data, tol=1e-6, max_steps=50000)
    assert float(jnp.linalg.norm(exact[0] - near)) <= 2e-3
    learned = jb.regularizers.LearnedTV(count=1, size=3)
    filters = jnp.zeros((2, 1, 3, 3)).at[:, :, 1, 1].set(1.0)
    pair, info = jb.solve(
        jb.variational(None, learned), {"filters": filters, "log_weight": jnp.log(0.1)}, data, tol=1e-6, max_steps=50000
    )
    jb.check(info)
    assert float(jnp.linalg.norm(image_of(pair) - exact[0])) <= 1e-4


def test_condat_interpolates_the_dual_field():
    """Constant fields stay what they are; the average at the edge below a pixel is that of its four neighbours."""
    learned = jb.regularizers.LearnedTV(count=3)
    params = learned.init(noise=0.0, dtype=jnp.float64)
    assert jnp.allclose(jnp.sum(params["filters"], axis=(2, 3)), 1.0)
    from jbilevel.regularizers.learned_tv import correlate

    y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 9)))
    interpolated = correlate(params["filters"], y)
    expected = (y[1, 4, 4] + y[1, 4, 3] + y[1, 5, 4] + y[1, 5, 3]) / 4
    assert jnp.allclose(interpolated[:, 0, 4, 4], jnp.stack([y[0, 4, 4], expected]))
    mirrored = (y[0, 4, 4] + y[0, 3, 4] + y[0, 4, 5] + y[0, 3, 5]) / 4
    assert jnp.allclose(interpolated[:, 1, 4, 4], jnp.stack([mirrored, y[1, 4, 4]]))
    centre = jnp.stack([y[0, 4, 4] + y[0, 3, 4], y[1, 4, 4] + y[1, 4, 3]]) / 2
    assert jnp.allclose(interpolated[:, 2, 4, 4], centre)


def test_sums_are_projected():
    noisy = {"filters": jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 5, 5))), "log_weight": 0.0}
    equal = jb.regularizers.LearnedTV().project(noisy)["filters"]
    assert jnp.allclose(jnp.sum(equal, axis=(2, 3)), 1.0)
    # nearest: the change is constant over each filter
    assert jnp.allclose(jnp.std(equal - noisy["filters"], axis=(2, 3)), 0.0, atol=1e-12)
    assert jb.regularizers.LearnedTV(sums="free").project(noisy) is noisy


def test_generalised_variation_does_not_see_affine_images():
    """Total variation does, and both see a quadratic one."""
    row, column = jnp.indices((9, 8)) / 10.0
    affine, bowl = 0.5 * row + 0.2 * column, row**2

    def change(regularizer, params, image):
        pair, info = jb.solve(jb.variational(None, regularizer), params, image, tol=1e-5, max_steps=50000)
        jb.check(info)
        return float(jnp.linalg.norm(image_of(pair) - image))

    tgv, tv = (jb.regularizers.TGV(), jnp.log(jnp.array([0.1, 0.2]))), (jb.regularizers.TV(), jnp.log(jnp.array([0.1])))
    assert change(*tgv, affine) <= 1e-4 and change(*tv, affine) > 0.1 and change(*tgv, bowl) > 0.01


@pytest.mark.slow
def test_hypergradient_equals_the_implicit_one():
    """Which takes the smooth form of the same problem: the solutions agree too."""
    foe, (clean, noisy) = jb.regularizers.FoE(3, 3, potential="psi"), image()
    params = foe.init(dtype=jnp.float64)
    # smoothing wide enough, and every parameter its own, that differences mean something
    params["log_smoothing"] = params["log_smoothing"] + 2 + 0.1 * jnp.arange(3)
    batch = {"x": clean[None], "y": noisy[None]}
    implicit = jb.implicit.Oracle(jb.variational(None, foe), jb.losses.squared_error())(params, batch, tol=1e-10)
    problem = jb.variational(None, foe, form="saddle")
    hg = jb.piggyback.Oracle(problem, jb.losses.squared_error(part=0))(params, batch, tol=1e-10)
    flat, expected = ravel_pytree(hg.grad)[0], ravel_pytree(implicit.grad)[0]
    assert jnp.linalg.norm(flat - expected) <= 1e-7 * jnp.linalg.norm(expected)


def test_what_cannot_be_is_refused():
    foe, icnn = (
        jb.regularizers.FoE(count=3, size=3, potential="spline"),
        jb.regularizers.ICNN(hidden=4, outputs=2, size=3),
    )
    with pytest.raises(ValueError, match="one of root, huber, psi"):
        jb.solve(jb.variational(None, foe, form="saddle"), foe.init(jax.random.key(0)), image()[1])
    params = icnn.init(jax.random.key(0))
    negative = params | {"second": -params["second"]}
    problem = jb.variational(None, icnn, form="saddle")
    with pytest.raises(ValueError, match="nonnegative"):
        jb.solve(problem, negative, image()[1])
    oracle = jb.piggyback.Oracle(problem, jb.losses.squared_error(part=(0, 0)))
    with pytest.raises(ValueError, match="nonnegative"):
        oracle(negative, {"x": image()[0][None], "y": image()[1][None]})
    with pytest.raises(ValueError, match="not smooth"):
        jb.variational(None, jb.regularizers.TGV(), form="smooth")
    with pytest.raises(ValueError, match="no saddle form"):
        jb.variational(None, jb.regularizers.CRR(), form="saddle")
    with pytest.raises(ValueError, match="`nonnegative`"):
        jb.variational(None, foe, nonnegative=True)
    with pytest.raises(ValueError, match="`ridge`"):
        jb.variational(None, foe, ridge=-1.0)
    with pytest.raises(ValueError, match="`form`"):
        jb.variational(None, foe, form="dual")
    with pytest.raises(ValueError, match="operator_norm"):
        jb.variational(lambda x: x, jb.regularizers.TV(), in_shape=SHAPE)
    with pytest.raises(ValueError, match="`sums`"):
        jb.regularizers.LearnedTV(sums="some")
