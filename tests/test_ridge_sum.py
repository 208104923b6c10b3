"""Energies as sums of ridge functions: what they say may change near a point, against derivatives by JAX.

The bounds are compared with the energies themselves, not with the formulas that they come from: nothing met at random
and adversarial points within reach is larger, and the largest is not far below.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from regularizers_for_tests import REGULARIZERS, places_of, start

import jbilevel as jb
from jbilevel.regularizers import CRR, TV, WCRR, FoE, SmoothedTV
from jbilevel.regularizers.potentials import POTENTIALS

rng = np.random.default_rng(0)
RIDGED = [
    name
    for name, entry in REGULARIZERS.items()
    if type(entry.regularizer).ridges is not jb.Regularizer.ridges and name != "TV"
]
every_sum = pytest.mark.parametrize("name", RIDGED)


def sum_of(name):
    entry = REGULARIZERS[name]
    return entry.regularizer.ridges(start(entry), entry.shape)


# ---- potentials ------------------------------------------------------------------------------------------------------


REACHES = (0.0, 0.05, 0.4, 1.3)


def within(t, r):
    """401 points at distance r of each t at most, and t itself."""
    return np.concatenate([t[:, None] + r * np.linspace(-1, 1, 401), t[:, None]], axis=1)


@pytest.mark.parametrize("name", POTENTIALS)
def test_third_derivatives_near_a_point(name):
    potential, t = POTENTIALS[name], np.linspace(-2.2, 2.2, 45) + 1e-3
    third = jax.jit(jax.vmap(jax.vmap(jax.grad(jax.grad(jax.grad(potential.value))))))
    for r in REACHES:
        met = np.max(np.abs(third(jnp.asarray(within(t, r)))), axis=1)
        claimed = np.asarray(potential.third_near(jnp.asarray(t), jnp.asarray(r)))
        assert np.all(met <= claimed + 1e-12)
        away = np.min(np.abs(np.abs(t[:, None]) - [0.0, 1.0, 1.5]), axis=1) > r + 0.02  # from where it jumps
        assert np.all(met[away] >= 0.98 * claimed[away] - 1e-12)


@pytest.mark.parametrize("name", [name for name, p in POTENTIALS.items() if p.third_near_radial])
def test_third_derivatives_of_lengths(name):
    """A symmetric form has its norm on a diagonal: d^3/ds^3 h(|v + s u|) over unit vectors u."""
    potential, angles = POTENTIALS[name], jnp.linspace(0, jnp.pi, 181)

    def along(t, angle):
        line = lambda s: potential.value(jnp.sqrt((t + s * jnp.cos(angle)) ** 2 + (s * jnp.sin(angle)) ** 2))  # noqa: E731
        return jnp.abs(jax.grad(jax.grad(jax.grad(line)))(0.0))

    size = jax.jit(jax.vmap(jax.vmap(lambda t: jnp.max(jax.vmap(along, (None, 0))(t, angles)))))
    t = np.array([0.06, 0.31, 0.52, 0.73, 0.91, 1.12, 2.03, 5.04])
    for r in (0.0, 0.1, 0.6):
        places = np.maximum(within(t, r)[:, ::8], 1e-3)
        met = np.max(size(jnp.asarray(places)), axis=1)
        claimed = np.asarray(potential.third_near_radial(jnp.asarray(t), jnp.asarray(r)))
        assert np.all(met <= claimed * (1 + 1e-9) + 1e-9)
        assert np.all(met >= (0.99 if r == 0 else 0.7) * claimed - 1e-9)


@pytest.mark.parametrize("potential", POTENTIALS.values(), ids=POTENTIALS)
def test_kinks_and_flux(potential):
    curve = jax.vmap(jax.grad(jax.grad(potential.value)))
    t, h = np.linspace(-2, 2, 401), 1e-7  # the ends of the intervals are among them
    jumps = t[np.abs(curve(jnp.asarray(t + h)) - curve(jnp.asarray(t - h))) > 1e-3]
    np.testing.assert_allclose(jumps, potential.kinks, atol=1e-12)
    t = jnp.asarray(np.linspace(-3, 3, 60001) + 1e-9)
    flux = float(jnp.max(jnp.abs(t * curve(t))))
    assert 0.999 * potential.flux <= flux <= potential.flux + 1e-9


# ---- linear maps -----------------------------------------------------------------------------------------------------


def dense(linear, shape):
    units = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    return jnp.moveaxis(jax.vmap(linear)(units), 0, -1)


@every_sum
def test_norms_of_the_linear_map(name):
    ridges, shape = sum_of(name), REGULARIZERS[name].shape
    matrix = dense(ridges.linear, shape)  # (*v, x)
    norm = np.linalg.norm(np.asarray(matrix).reshape(-1, matrix.shape[-1]), 2)
    assert norm <= ridges.norm <= 4 * norm
    axis = ridges.terms[0].axis
    groups = jnp.sqrt(jnp.sum(matrix**2, axis=-1)) if axis is None else _group_norms(matrix, axis)
    assert np.all(groups <= ridges.rows * (1 + 1e-12))
    assert np.max(groups / jnp.broadcast_to(ridges.rows, groups.shape)) >= 0.4


def _group_norms(matrix, axis):
    inside = jnp.moveaxis(matrix, axis, range(len(axis)))
    rest = inside.shape[len(axis) : -1]
    blocks = np.asarray(inside).reshape(-1, int(np.prod(rest)), inside.shape[-1]).swapaxes(0, 1)
    return np.linalg.norm(blocks, 2, axis=(1, 2)).reshape(rest)


@every_sum
def test_the_terms_are_the_energy(name):
    entry, ridges = REGULARIZERS[name], sum_of(name)
    R, params = entry.regularizer, start(entry)

    def energy(x):
        v, parts = ridges.linear(x), []
        for term in ridges.terms:
            length = v if term.axis is None else jnp.sqrt(jnp.sum(v**2, term.axis))
            values = term.weights * term.widths * term.potential.value(length / term.widths)
            parts.append(jnp.sum(jnp.broadcast_to(values, length.shape)))
        return parts[0] - sum(parts[1:])  # what follows is the concave part

    x, y = places_of(entry)[:2]
    assert float(energy(x) - energy(y)) == pytest.approx(float(R(params, x) - R(params, y)), rel=1e-9)


@pytest.mark.parametrize("R", [CRR((2, 3), (3, 2)), CRR((3,), (3,), boundary="symmetric")], ids=["layers", "symmetric"])
def test_filters_move_by_what_the_sensitivity_says(R):
    for seed in range(3):
        params = R.init(jax.random.key(seed))
        kernels, assemble = ravel_pytree(params["kernels"])
        x = jnp.asarray(rng.standard_normal((7, 6)))

        def responses(flat):
            moved = params | {"kernels": assemble(flat)}  # noqa: B023
            return R.ridges(moved, (7, 6)).linear(x).ravel()  # noqa: B023

        met = np.linalg.norm(jax.jacfwd(responses)(kernels), 2) / np.linalg.norm(x)
        bound = float(R.ridges(params, (7, 6)).mixed)
        assert bound / 40 <= met <= bound


# ---- changes near a point --------------------------------------------------------------------------------------------


@cache
def derivatives(name):
    """(x, q) -> (H(x) q, d/dparams <grad_x R, q>), and the bounds of `RidgeSum.around`, compiled."""
    entry = REGULARIZERS[name]
    R, (flat, assemble) = entry.regularizer, ravel_pytree(start(entry))
    slope = jax.grad(lambda t, x: R(assemble(t), x), 1)

    @jax.jit
    @jax.vmap
    def exact(x, q):
        product = jax.jvp(lambda x: slope(flat, x), (x,), (q,))[1]
        return product, jax.grad(lambda t: jnp.vdot(slope(t, x), q))(flat)

    @jax.jit
    def bounds(x, q, error, adjoint_error):
        ridges = R.ridges(assemble(flat), entry.shape)
        around = ridges.around(ridges.linear(x), ridges.linear(q), error)
        norms = {"point": jnp.linalg.norm(x), "adjoint": jnp.linalg.norm(q)}
        mixed = around.gradient(
            **norms, error=error, adjoint_error=adjoint_error, direction_error=ridges.norm * adjoint_error
        )
        return ridges.norm * around.change, mixed

    return exact, bounds


def directions(shape, count, moving):
    """Of norm 1: random ones, single pixels, checkerboards, and the most sensitive one first."""
    found = [moving, -moving, *rng.standard_normal((count, *shape))]
    pixels = np.zeros((count, *shape)).reshape(count, -1)
    pixels[np.arange(count), rng.integers(pixels.shape[1], size=count)] = rng.choice([-1.0, 1.0], count)
    found += [*pixels.reshape(count, *shape), (-1.0) ** np.sum(np.indices(shape), axis=0)]
    return jnp.asarray([d / np.linalg.norm(d) for d in found])


# The largest change met over its bound. Filters that change see the mean of the image, which random filters do not.
SHARE = {"hessian": 1 / 40, "mixed": 1 / 1000}


@every_sum
def test_changes_near_a_point(name):
    entry = REGULARIZERS[name]
    exact, bounds = derivatives(name)
    places = np.asarray(places_of(entry))[[0, 1, 2, 3, 10, 14]]
    shares = {"hessian": [], "mixed": []}
    for x in map(jnp.asarray, places):
        sparse = np.zeros(entry.shape)
        sparse[(..., 2, 1)] = 1.0
        for q in (jnp.asarray(rng.standard_normal(entry.shape)), jnp.asarray(sparse)):
            for error in entry.scale * np.array([1e-4, 1e-2, 0.3, 3.0]):
                (first,), (mixed,) = exact(x[None], q[None])
                d = directions(entry.shape, 12, jnp.where(x == 0, 1.0, x) + 1e-3)
                products, moved = exact(x[None] + error * d, jnp.broadcast_to(q, d.shape))
                adjoint_error = 0.1 * error
                turned = q[None] + adjoint_error * jnp.roll(d, 5, axis=0)
                _, both = exact(x[None] + error * d, turned)
                change, total = bounds(x, q, error, adjoint_error)
                _, alone = bounds(x, q, error, 0.0)
                met = np.linalg.norm((products - first[None]).reshape(len(d), -1), axis=1).max()
                slack = 1e-12 * (1 + float(jnp.linalg.norm(first)))
                assert met <= change + slack
                slack = 1e-12 * (1 + float(jnp.linalg.norm(mixed)))
                met_alone, met_both = (np.linalg.norm(m - mixed[None], axis=1).max() for m in (moved, both))
                assert met_alone <= alone + slack and met_both <= total + slack
                shares["hessian"].append(met / max(float(change), 1e-300))
                shares["mixed"].append(met_alone / max(float(alone), 1e-300))
    for what, found in shares.items():
        assert max(found) >= SHARE[what], what


@every_sum
def test_nothing_changes_within_reach_zero(name):
    entry = REGULARIZERS[name]
    x, q = places_of(entry)[:2]
    change, mixed = derivatives(name)[1](x, q, 0.0, 0.0)
    assert float(change) == 0 and float(mixed) == 0
    change, mixed = derivatives(name)[1](x, q, np.inf, np.inf)
    assert not np.isfinite(mixed)


# ---- certificates ----------------------------------------------------------------------------------------------------

SIDE, COUNT = 6, 2


def loss_of(form):
    if form == "smooth":
        return lambda p, x, d: 0.5 * jnp.sum((x - d["x"]) ** 2)
    return lambda p, pair, d: 0.5 * jnp.sum((pair[0] - d["x"]) ** 2)


def crops(seed):
    random = np.random.default_rng(seed)
    clean = np.zeros((COUNT, SIDE, SIDE))
    clean[:, 2:4, 3:] = random.uniform(0.3, 1, (COUNT, 1, 1))
    return {"x": jnp.asarray(clean), "y": jnp.asarray(clean + 0.1 * random.standard_normal(clean.shape))}


CASES = {
    "SmoothedTV": (SmoothedTV(), ("smooth", "saddle")),
    "SmoothedTV, anisotropic": (SmoothedTV(kind="anisotropic"), ("saddle",)),
    "Huber-TV": (TV(width=0.02), ("saddle",)),
    "FoE, psi": (FoE(4, 3, potential="psi"), ("smooth", "saddle")),
    "FoE, huber": (FoE(3, 3, potential="huber", boundary="valid"), ("smooth", "saddle")),
    "FoE, root": (FoE(3, 2), ("saddle",)),
    "CRR": (CRR((2, 3), (3, 2)), ("smooth",)),
    "WCRR": (WCRR((2, 3), (3, 2), weak_convexity=0.5), ("smooth",)),
}
PAIRS = [(name, form) for name, (_, forms) in CASES.items() for form in forms]


@pytest.mark.parametrize("name, form", [("Huber-TV", "saddle"), ("FoE, psi", "smooth")])
def test_certificates_hold(name, form):
    R = CASES[name][0]
    check_certificates(jb.variational(None, R, form=form), form, {}, R.init(jax.random.key(1)), crops(2))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"estimate": False}, {"correct": True}], ids=str)
@pytest.mark.parametrize("name, form", PAIRS)
def test_certificates_hold_for_every_kind(name, form, options):
    R = CASES[name][0]
    check_certificates(jb.variational(None, R, form=form), form, options, R.init(jax.random.key(1)), crops(2))


def check_certificates(problem, form, options, params, batch):
    limits = {"max_steps": 200_000, **({"max_adjoint_steps": 200_000} if form == "saddle" else {})}
    reference = problem.oracle(loss_of(form), correct=True, **limits)
    oracle = problem.oracle(loss_of(form), loss_smoothness=1.0, **limits, **options)
    exact = reference(params, batch, tol=1e-12, adjoint_tol=1e-12)
    image = lambda hg: np.asarray(jb.image_of(hg.warm.x)).reshape(COUNT, -1)  # noqa: E731
    for tol in (1.0, 1e-1, 1e-2, 1e-4, 1e-6):
        hg = oracle(params, batch, tol=tol, adjoint_tol=tol)
        assert bool(hg.certified)
        away = np.linalg.norm(ravel_pytree(hg.grad)[0] - ravel_pytree(exact.grad)[0])
        assert away <= hg.bound + 1e-10
        assert abs(float(hg.value - exact.value)) <= float(hg.value_bound) + 1e-10
        assert np.all(np.linalg.norm(image(hg) - image(exact), axis=1) <= hg.lower.error + 1e-10)
        value = oracle.value(params, batch, hg.warm, tol=tol)
        assert abs(float(value.value - exact.value)) <= float(value.bound) + 1e-10
    if not options:
        assert hg.bound <= 300 * max(away, 1e-10)  # at 1e-6: it says something


@pytest.mark.slow
@pytest.mark.parametrize("form", ["smooth", "saddle"])
def test_certificates_hold_through_an_operator(form):
    blur = jb.operators.Blur((SIDE, SIDE), jnp.full((3, 3), 1 / 9))
    R, batch = FoE(3, 3, potential="psi"), crops(4)
    batch |= {"y": jax.vmap(blur)(batch["x"]) + 0.02}
    problem = jb.variational(blur, R, form=form, ridge=0.1)
    check_certificates(problem, form, {"estimate": True}, R.init(jax.random.key(1)), batch)


def test_what_has_kinks_elsewhere_is_not_certified():
    data, learned = crops(0), jb.regularizers.LearnedTV(3, 3, dual_curvature=0.1, auxiliary_curvature=0.1)
    for R, options in ((TV(), {}), (TV(width=0.02), {"nonnegative": True}), (learned, {})):
        problem = jb.variational(None, R, **options)
        assert problem.view(R.init(), jax.tree.map(lambda v: v[0], data)).known_ridges() is None
    problem = jb.variational(None, TV(width=0.02), nonnegative=True)
    hg = problem.oracle(loss_of("saddle"), loss_smoothness=1.0)(TV().init(), data, tol=1e-3)
    assert not hg.certified and np.isposinf(hg.bound) and np.all(np.isfinite(hg.lower.error))


def test_the_residual_after_a_correction_is_the_true_one():
    """Large float64 images take these steps in float32, whose residual is not that of the system."""
    R = SmoothedTV()
    problem = replace(jb.variational(None, R), mixed_precision=True)
    params, batch = R.init(), jax.tree.map(lambda v: v[0], crops(3))
    oracle = problem.oracle(loss_of("smooth"), correct=True)
    view = problem.view(params, batch)
    gradient = lambda x: x - batch["x"]  # noqa: E731
    system, _ = oracle.lower.solve(view, batch["y"], 1e-3)
    newton = system.correct(gradient, system.adjoint(gradient(system.x), 0 * system.x, 1e-3), 40, 1e-3)
    x, q = newton.point
    product = view.linearize(x)[2]
    assert float(newton.adjoint.residual) == pytest.approx(float(jnp.linalg.norm(product(q) - gradient(x))), rel=1e-6)


@pytest.mark.slow
def test_maid_certified_decreases():
    R, batch = TV(width=0.02), crops(5)
    problem = jb.variational(None, R)
    oracle = problem.oracle(loss_of("saddle"), loss_smoothness=1.0, max_steps=50_000)
    result = jb.fit(jb.MAID(oracle, certified=True), R.init(weight=0.02), batch, steps=4)
    exact = problem.oracle(loss_of("saddle"), max_steps=100_000)
    values = [float(exact.value(p, batch, tol=1e-10).value) for p in (R.init(weight=0.02), result.params)]
    assert result.steps >= 3 and values[1] < values[0]
