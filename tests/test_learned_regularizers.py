"""Learned regularisers: energies against their definitions, proven bounds against dense Hessians, bad input."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import image_loss, images, relative
from scipy.signal import correlate2d

import jbilevel as jb
from jbilevel.regularizers import CRR, ICNN, WCRR, FoE, SmoothedTV, WeightedTV, filters
from jbilevel.regularizers.potentials import POTENTIALS

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """A test alone sees what it sees among all others."""
    rng.bit_generator.state = np.random.default_rng(0).bit_generator.state


KEY = jax.random.key(1)
SMALL = {
    "FoE": FoE(count=3, size=3, boundary="valid"),
    "FoE, zero": FoE(count=3, size=4, potential="smoothstep", boundary="zero"),
    "FoE, symmetric": FoE(count=2, size=3, potential="spline", boundary="symmetric", overall_weight=False),
    "CRR": CRR(widths=(2, 3), sizes=(3, 2)),
    "CRR, root": CRR(widths=(3,), sizes=(4,), potential="root", boundary="symmetric"),
    "WCRR": WCRR(widths=(2, 3), sizes=(3, 2)),
    "WCRR, huber": WCRR(widths=(2, 3), sizes=(3, 2), potential="huber", boundary="zero", weak_convexity=0.5),
    "ICNN": ICNN(hidden=3, outputs=2, size=3, boundary="valid"),
    "ICNN, bias": ICNN(hidden=2, outputs=3, size=2, potential="smoothstep", boundary="symmetric", bias=True),
}
every_regularizer = pytest.mark.parametrize("R", SMALL.values(), ids=SMALL)


def params_of(R, spread=0.1):
    """Its start, moved by what keeps ICNN's second layer positive."""
    flat, assemble = ravel_pytree(R.init(KEY))
    moved = flat * (1 + spread * np.random.default_rng(2).uniform(-1, 1, flat.size))
    return assemble(jnp.asarray(moved))


# ---- filters ---------------------------------------------------------------------------------------------------------


def direct(kernels, z):
    return np.stack([sum(correlate2d(c, k, "valid") for c, k in zip(z, bank, strict=True)) for bank in kernels])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 4, 4), (2, 2, 11, 11)], ids=["patches", "product", "Fourier"])
def test_correlate_and_its_adjoints(shape):
    kernels, z = rng.standard_normal(shape), rng.standard_normal((shape[1], 17, 14))
    found = filters.correlate(jnp.asarray(kernels), jnp.asarray(z))
    np.testing.assert_allclose(found, direct(kernels, z), atol=1e-12)
    y = rng.standard_normal(found.shape)
    for one, other, at in (
        (lambda v: filters.correlate(v, z), kernels, 0),
        (lambda v: filters.correlate(kernels, v), z, 1),
    ):
        (back,) = jax.vjp(one, jnp.asarray(other))[1](jnp.asarray(y))
        assert float(jnp.vdot(back, other)) == pytest.approx(float(jnp.vdot(y, found)), rel=1e-11), at


def test_composed_filters_respond_as_the_layers_do():
    shapes = [(2, 1, 3, 3), (3, 2, 2, 2), (4, 3, 4, 4)]
    layers = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    x = jnp.asarray(rng.standard_normal((12, 11)))
    z = x[None]
    for layer in layers:
        z = filters.correlate(layer, z)
    bank = filters.compose(layers)
    assert bank.shape == (4, 7, 7)
    np.testing.assert_allclose(filters.correlate(bank[:, None], x[None]), z, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", filters.BOUNDARIES)
@pytest.mark.parametrize("size", [3, 6])
def test_spectral_bound_is_a_bound_and_nearly_met(boundary, size):
    bank = jnp.asarray(rng.standard_normal((2, size, size)))
    bound = float(filters.spectral_bound(bank))
    fine = np.sum(np.abs(np.fft.fft2(bank, (1500, 1500))) ** 2, axis=0).max()
    assert fine <= bound <= 1.04 * fine
    shape = (12, 9)
    apply = lambda x: filters.correlate(bank[:, None], filters.extend(x.reshape(1, *shape), size, boundary)).ravel()  # noqa: E731
    dense = jax.jit(jax.jacfwd(apply))(jnp.zeros(shape[0] * shape[1]))
    assert np.linalg.norm(dense, 2) ** 2 <= filters.copies(boundary) * bound


def test_fast_length():
    assert [filters.fast_length(n) for n in (1, 7, 64, 76, 321)] == [1, 8, 64, 80, 324]


# ---- potentials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
def test_potentials_are_convex_with_the_claimed_derivatives(potential):
    t, h = np.linspace(-3, 3, 1999), 1e-5
    value, slope = potential.value, jax.vmap(jax.grad(potential.value))
    curve = jax.vmap(jax.grad(jax.grad(potential.value)))
    t = jnp.asarray(t[np.abs(np.abs(t[:, None]) - [0, 1, 1.5]).min(axis=1) > h])  # between the joints
    np.testing.assert_allclose(slope(t), (value(t + h) - value(t - h)) / (2 * h), atol=1e-9)
    np.testing.assert_allclose(curve(t), (slope(t + h) - slope(t - h)) / (2 * h), atol=1e-9)
    assert np.all(np.abs(slope(t)) <= 1) and np.min(curve(t)) >= 0
    assert 0.999 * potential.curvature <= np.max(curve(t)) <= potential.curvature
    if potential.third is not None:
        steepest = np.max(np.abs(jax.vmap(jax.grad(jax.grad(jax.grad(potential.value))))(t)))
        assert 0.99 * potential.third <= steepest <= potential.third
    assert potential.increasing == bool(np.all(slope(t) >= 0))


def test_psi_is_that_of_bogensperger_et_al():
    w, t = 0.3, np.linspace(-1, 1, 101)
    expected = np.where(t <= 0, 0, np.where(t < w, t**2 / (2 * w), t - w / 2))
    np.testing.assert_allclose(w * POTENTIALS["psi"].value(jnp.asarray(t) / w), expected, atol=1e-15)


# ---- energies --------------------------------------------------------------------------------------------------------


def test_layouts_have_the_published_numbers_of_parameters():
    count = lambda R: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(R.init, KEY)))  # noqa: E731
    assert count(FoE()) == 2449 and count(FoE(overall_weight=False)) == 2448
    assert count(CRR()) == count(WCRR()) == 13767
    assert count(ICNN()) == 2001
    assert count(ICNN(hidden=32, outputs=32, bias=True)) == 1 + 32 * 26 + 32 * (32 * 25 + 1)


def test_foe_is_the_sum_over_experts():
    R, x = SMALL["FoE"], rng.standard_normal((7, 6))
    p = jax.tree.map(np.asarray, params_of(R))
    expected = 0.0
    for weight, smoothing, kernel in zip(p["log_weights"], p["log_smoothing"], p["filters"], strict=True):
        roots = np.sqrt(correlate2d(x, kernel, "valid") ** 2 + np.exp(2 * smoothing))
        expected += np.exp(p["log_weight"] + weight) * roots.sum()
    assert float(R(p, jnp.asarray(x))) == pytest.approx(expected, rel=1e-13)


def test_ridge_is_the_sum_over_layered_responses():
    R, x = SMALL["WCRR, huber"], rng.standard_normal((7, 6))
    p = jax.tree.map(np.asarray, params_of(R))
    first, second = p["kernels"]
    first = first - first.mean(axis=(1, 2, 3), keepdims=True)
    norm = np.sqrt(float(filters.spectral_bound(filters.compose([jnp.asarray(first), jnp.asarray(second)]))))
    z = direct(second, direct(first, np.pad(x, ((1, 2), (1, 2)))[None])) / norm
    a, b, s, k = p["log_weight"], p["log_slope"], p["log_scale"], p["log_scalings"][:, None, None]
    huber = lambda t: np.where(np.abs(t) < 1, t**2 / 2, np.abs(t) - 0.5)  # noqa: E731
    u = np.exp(s + k) * z
    potential = np.exp(-b) * huber(np.exp(b) * u) - 0.5 * huber(u)
    expected = np.exp(a - 2 * s) * np.sum(np.exp(-2 * k) * potential)
    assert float(R(p, jnp.asarray(x))) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_icnn_is_two_layers():
    R, x = ICNN(hidden=3, outputs=2, size=3, bias=True, boundary="valid"), rng.standard_normal((7, 6))
    p = jax.tree.map(np.asarray, params_of(R)) | {"first_bias": np.arange(3) / 9, "second_bias": -np.arange(2) / 7}
    psi = lambda t: np.where(t <= 0, 0, np.where(t < 0.01, t**2 / 0.02, t - 0.005))  # noqa: E731
    z = psi(direct(p["first"][:, None], x[None]) + p["first_bias"][:, None, None])
    expected = np.exp(p["log_weight"]) * np.sum(psi(direct(p["second"], z) + p["second_bias"][:, None, None]))
    assert float(R(p, jnp.asarray(x))) == pytest.approx(expected, rel=1e-12)


def test_weighted_tv_interpolates_its_weights():
    R, x = WeightedTV(grid=(2, 3), eps=0.1), jnp.asarray(rng.standard_normal((6, 9)))
    theta = jnp.asarray(rng.standard_normal((2, 3)))
    weights = np.asarray(R.weights(theta, (6, 9)))
    np.testing.assert_allclose(weights[1::3, 1::3], np.exp(theta), rtol=1e-12)  # at the centres of the grid
    full = WeightedTV(grid=(6, 9), eps=0.1)
    assert float(full(jnp.log(weights), x)) == pytest.approx(float(R(theta, x)), rel=1e-12)
    one = SmoothedTV(eps=0.1)(jnp.array([-2.0]), x)
    assert float(R(jnp.full((2, 3), -2.0), x)) == pytest.approx(float(one), rel=1e-12)


@pytest.mark.parametrize("R", [FoE(count=3, size=3), CRR(widths=(3,), sizes=(3,)), ICNN(hidden=2, outputs=1, size=3)])
@pytest.mark.parametrize("boundary", ["valid", "symmetric"])
def test_constants_cost_nothing(R, boundary):
    R = type(R)(**{**vars(R), "boundary": boundary})
    p, x = R.init(KEY), jnp.asarray(rng.standard_normal((7, 8)))
    energy = jax.jit(R)
    assert float(energy(p, x + 3.0)) == pytest.approx(float(energy(p, x)), rel=1e-11)


def test_noise_level_scaling():
    """Images and noise t times larger are denoised alike with log_scale - log t."""
    R, t, x = SMALL["WCRR"], 2.5, jnp.asarray(0.1 * rng.standard_normal((6, 6)))
    p = params_of(R)
    scaled = p | {"log_scale": p["log_scale"] - np.log(t)}
    assert float(R(scaled, t * x)) == pytest.approx(t**2 * float(R(p, x)), rel=1e-12)


def test_large_filters_and_large_weights_of_a_ridge_keep_its_bounds():
    R = SMALL["WCRR"]
    p = params_of(R)
    larger = p | {"kernels": tuple(100 * k for k in p["kernels"])}
    assert float(R(larger, jnp.eye(6))) == pytest.approx(float(R(p, jnp.eye(6))), rel=1e-11)


# ---- proven bounds ---------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def dense_hessian(R, params, x):
    return jax.jacfwd(lambda v: jax.grad(R, 1)(params, v.reshape(x.shape)).ravel())(x.ravel())


def spectra(R, params, shape, count=3):
    draws = [np.zeros(shape), *(scale * rng.standard_normal(shape) for scale in np.geomspace(0.01, 0.3, count))]
    return [np.linalg.eigvalsh(dense_hessian(R, params, jnp.asarray(x))) for x in draws]


@pytest.mark.slow
@every_regularizer
def test_hessian_lies_within_the_proven_bounds(R):
    params = params_of(R)
    bounds = R.bounds(params, (10, 9))
    found = spectra(R, params, (10, 9))
    lowest, largest = min(s[0] for s in found), max(s[-1] for s in found)
    rho = R.weak_convexity if isinstance(R, CRR) else 0.0
    assert lowest >= float(bounds.strong_convexity) - 1e-10
    assert largest <= float(bounds.smoothness)
    if rho:
        assert lowest < -0.05 * rho  # it is not convex
    if not isinstance(R, ICNN) and R.boundary != "symmetric":
        assert largest >= float(bounds.smoothness) / 3  # of 9 x 10 pixels, at random x: an infinite image comes closer
    # denoising: the sum is what `variational` claims
    y = jnp.zeros((10, 9))
    constants = jb.variational(None, R).constants(params, y)
    assert float(constants.strong_convexity) == pytest.approx(1 + float(bounds.strong_convexity))
    assert float(constants.strong_convexity) > 0


def test_hessian_lipschitz_is_met_within_an_order():
    for R in (FoE(count=2, size=3, boundary="valid"), SMALL["WCRR"]):
        params = params_of(R)
        bound = float(R.bounds(params, (6, 6)).hessian_lipschitz)
        rates = []
        for scale in np.geomspace(3e-3, 0.1, 4):
            x, step = jnp.asarray(scale * rng.standard_normal((6, 6))), np.zeros((6, 6))
            step[2, 3] = 1e-5
            change = dense_hessian(R, params, x + step) - dense_hessian(R, params, x)
            rates.append(np.linalg.norm(change, 2) / 1e-5)
        assert 0.03 * bound <= max(rates) <= bound


def test_icnn_with_negative_weights_loses_what_its_bound_says():
    R = ICNN(hidden=3, outputs=2, size=3, potential="smoothstep", width=0.1, boundary="valid")
    p = params_of(R)
    p = p | {"second": p["second"].at[:, 0].multiply(-0.5)}
    bounds = jax.jit(lambda p: R.bounds(p, (9, 9)))(p)  # traced: nothing raises
    lowest = min(s[0] for s in spectra(R, p, (9, 9)))
    assert float(bounds.strong_convexity) <= lowest < 0
    assert float(R.bounds(R.project(p), (9, 9)).strong_convexity) == 0


@pytest.mark.parametrize("R", [SMALL["FoE"], SMALL["CRR"], SMALL["ICNN, bias"]], ids=lambda R: type(R).__name__)
def test_convex_along_segments(R):
    p, energy = params_of(R), jax.jit(jax.vmap(R, (None, 0)))
    x, y = (jnp.asarray(scale * rng.standard_normal((50, 8, 8))) for scale in (0.1, 1.0))
    assert np.all(energy(p, 0.3 * x + 0.7 * y) <= 0.3 * energy(p, x) + 0.7 * energy(p, y) + 1e-12)


# ---- parameters and bad input ----------------------------------------------------------------------------------------


def test_projections():
    R = FoE(count=2, size=3, smoothing_min=1e-2)
    p = R.project(R.init(KEY, smoothing=1e-5) | {"filters": jnp.ones((2, 3, 3)) + jnp.eye(3)[None]})
    np.testing.assert_allclose(jnp.sum(p["filters"], axis=(1, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(jnp.exp(p["log_smoothing"]), 1e-2)
    R = WCRR(widths=(2,), sizes=(3,), weak_convexity=0.75)
    p = R.init(KEY)
    for weight in (-1.0, 2.0):
        projected = R.project(p | {"log_weight": jnp.asarray(weight)})
        assert float(projected["log_weight"]) == min(weight, 0.0)
        assert float(R.bounds(projected, (9, 9)).strong_convexity) >= -0.75
    R = ICNN(hidden=2, outputs=2, size=2)
    p = R.init(KEY)
    np.testing.assert_array_equal(R.project(p)["second"], p["second"])
    projected = R.project(p | {"second": p["second"] - 0.1, "first": p["first"] + 0.1})
    assert np.all(projected["second"] >= 0)
    np.testing.assert_allclose(jnp.sum(projected["first"], axis=(1, 2)), 0, atol=1e-14)
    kept = replace(R, zero_mean=False).project(p | {"first": p["first"] + 0.1})["first"]
    np.testing.assert_array_equal(kept, p["first"] + 0.1)


@pytest.mark.parametrize("make", [FoE, CRR, WCRR, ICNN, WeightedTV])
def test_init_takes_a_dtype(make):
    params = jax.eval_shape(partial(make().init, dtype=jnp.float32), KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}


@pytest.mark.parametrize(
    "make, options",
    [
        (FoE, {"count": 0}),
        (FoE, {"size": 1}),
        (FoE, {"potential": "log"}),
        (FoE, {"boundary": "periodic"}),
        (FoE, {"smoothing_min": 0.0}),
        (CRR, {"widths": (4, 8)}),
        (CRR, {"sizes": (5, 5, 1)}),
        (CRR, {"potential": "psi"}),
        (WCRR, {"weak_convexity": 1.0}),
        (WCRR, {"weak_convexity": -0.1}),
        (ICNN, {"hidden": 0}),
        (ICNN, {"width": 0.0}),
        (ICNN, {"potential": "root"}),
        (WeightedTV, {"grid": (0, 3)}),
        (WeightedTV, {"eps": -1.0}),
    ],
    ids=str,
)
def test_constructors_name_the_bad_argument(make, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        make(**options)


@every_regularizer
def test_bad_params_and_images_are_named(R):
    p, x, name = R.init(KEY), jnp.ones((9, 9)), type(R).__name__
    some = next(iter(p))
    missing = {key: value for key, value in p.items() if key != some}
    with pytest.raises(ValueError, match=f"params of {name} must be a dict with the keys"):
        R(missing, x)
    with pytest.raises(ValueError, match=f"params of {name} must be a dict"):
        R.bounds(jnp.zeros(3), (9, 9))
    vector = next(key for key in ("log_weights", "log_scalings", "second") if key in p)
    with pytest.raises(ValueError, match=rf"params\['{vector}'\] of {name} must have shape"):
        jax.eval_shape(R, p | {vector: p[vector][:1]}, x)
    with pytest.raises(ValueError, match="vmap"):
        R(p, jnp.ones((2, 9, 9)))
    with pytest.raises(ValueError, match="needs images of at least"):
        R(p, jnp.ones((9, 1)))
    zero = next(key for key in ("filters", "kernels", "first") if key in p)
    with pytest.raises(ValueError, match=rf"params\['{zero}'\] of {name} are all zero"):
        R(p | {zero: jax.tree.map(jnp.zeros_like, p[zero])}, x)


def test_bad_weights_and_kernels_are_not_silent_under_a_trace():
    R = SMALL["CRR"]
    p = R.init(KEY)
    assert np.isnan(jax.jit(R)(p | {"kernels": tuple(0 * k for k in p["kernels"])}, jnp.ones((6, 6))))
    with pytest.raises(ValueError, match="weights|shape"):
        WeightedTV(grid=(2, 2))(jnp.zeros((3, 2)), jnp.ones((4, 4)))
    with pytest.raises(ValueError, match="at least"):
        WeightedTV(grid=(2, 2))(jnp.zeros((2, 2)), jnp.ones((1, 4)))


# ---- lower levels ----------------------------------------------------------------------------------------------------


def estimate_and_truth(oracle, params, batch, tol, exact):
    hg = oracle(params, batch, tol=tol)
    true = np.linalg.norm(ravel_pytree(hg.grad)[0] - ravel_pytree(exact)[0])
    return float(hg.error), true


@pytest.mark.slow
def test_estimated_errors_of_foe_hypergradients():
    R = FoE(count=4, size=3, boundary="symmetric")
    batch, params = images(12)(0, 2), R.init(KEY)
    oracle = jb.implicit.Oracle(jb.variational(None, R), image_loss)
    exact = oracle(params, batch, tol=1e-11)
    jb.check(exact)
    for tol in (1e-1, 1e-2):
        error, true = estimate_and_truth(oracle, params, batch, tol, exact.grad)
        assert true / 2 <= error <= 2 * true


def weakly_convex():
    R = WCRR(widths=(2, 4), sizes=(3, 3), weak_convexity=0.9)
    return jb.variational(None, R), R.init(KEY, slope=2.0), images(12)(0, 2)


@pytest.mark.slow
def test_weakly_convex_lower_level():
    """Nonmonotone solver and MINRES adjoint; no bound is claimed where convexity is lost."""
    problem, params, batch = weakly_convex()
    oracle = jb.implicit.Oracle(
        problem, image_loss, solver=jb.solvers.NonmonotoneAPG(), linear_solver=jb.solvers.MINRES()
    )
    exact = oracle(params, batch, tol=1e-10)
    jb.check(exact)
    assert np.all(np.isfinite(exact.lower.error))
    error, true = estimate_and_truth(oracle, params, batch, 1e-2, exact.grad)
    assert true / 3 <= error <= 3 * true

    heavy = params | {"log_weight": jnp.asarray(0.5)}  # 1 - 0.9 e^0.5 < 0
    assert float(problem.constants(heavy, batch["y"][0]).strong_convexity) < 0
    hg = oracle(heavy, batch, tol=1e-9)
    assert np.all(np.isposinf(hg.lower.error)) and not hg.certified
    assert np.all(np.isfinite(ravel_pytree(hg.grad)[0]))


@pytest.mark.slow
def test_one_step_direction_of_a_weakly_convex_lower_level():
    problem, params, batch = weakly_convex()
    solver = jb.solvers.NonmonotoneAPG()
    exact = jb.implicit.Oracle(problem, image_loss, estimate=False)(params, batch, tol=1e-10)
    cheap = jb.unroll.OneStep(problem, image_loss, solver=solver, estimate=False)(params, batch, tol=1e-10)
    a, b = (np.asarray(ravel_pytree(hg.grad)[0]) for hg in (cheap, exact))
    assert a @ b > 0.5 * np.linalg.norm(a) * np.linalg.norm(b)
    assert relative(cheap.grad, exact.grad) > 1e-3  # it is biased


def test_solves_and_oracles_refuse_what_the_regularizer_refuses():
    icnn = jb.regularizers.ICNN(hidden=2, outputs=2, size=3)
    params = icnn.init(jax.random.key(0))
    bad = params | {"second": -jnp.ones_like(params["second"])}
    problem, image = jb.variational(None, icnn), jnp.ones((12, 12))
    batch = {"y": image[None], "x": image[None]}
    oracle = jb.implicit.Oracle(problem, jb.losses.squared_error())
    calls = (
        lambda: jb.solve(problem, bad, {"y": image}),
        lambda: jb.implicit.argmin(problem)(bad, {"y": image}),
        lambda: oracle(bad, batch),
        lambda: oracle.value(bad, batch),
    )
    for call in calls:
        with pytest.raises(ValueError, match="second"):
            call()
