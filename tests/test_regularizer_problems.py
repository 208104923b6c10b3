"""What every regulariser has to do inside problems: its saddle form, its solutions, its hypergradients.

The list is `regularizers_for_tests.REGULARIZERS`; what solves a lower level is slow.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import central_differences
from regularizers_for_tests import REGULARIZERS, has_energy, has_saddle, measured, names, points, start

import jbilevel as jb
from jbilevel import image_of, prox
from jbilevel.regularizers import ICNN

with_saddle, with_both = names(has_saddle), names(lambda R: has_energy(R) and has_saddle(R))
with_both_smooth = names(lambda R: has_energy(R) and has_saddle(R) and R.form == "smooth")


def picture(shape, seed=0):
    """Something with an edge, clean and noisy."""
    rng = np.random.default_rng(seed)
    clean = np.zeros(shape)
    clean[..., 1:4, 1:4] = rng.uniform(0.5, 1)
    return jnp.asarray(clean), jnp.asarray(clean + 0.1 * rng.standard_normal(shape))


# ---- the saddle form -------------------------------------------------------------------------------------------------


def flat_blocks(name):
    """The blocks of an entry, and L as a function of flat vectors (x, z) with the flattened steps."""
    entry = REGULARIZERS[name]
    blocks = entry.regularizer.saddle(start(entry))
    x = points(entry)[0]
    z, q = blocks.start(x)
    (t_x, t_z), s = blocks.scaling()
    steps = lambda step, like: ravel_pytree(jax.tree.map(lambda s, v: jnp.full(v.shape, s, v.dtype), step, like))[0]  # noqa: E731
    return blocks, x, z, q, steps((t_x, t_z), (x, z)), steps(s, q)


@with_saddle
def test_the_steps_of_the_saddle_form_fit_its_linear_map(name):
    """||s^(1/2) L t^(1/2)|| <= 1, L' is its transpose, and what is not linear in (x, z) shows."""
    blocks, x, z, q, t, s = flat_blocks(name)
    assert isinstance(blocks, jb.regularizers.SaddleBlocks)
    flat, assemble = ravel_pytree((x, z))
    dual, assemble_dual = ravel_pytree(q)
    rng = np.random.default_rng(3)

    @jax.jit
    def columns(units, y):
        forward = jax.vmap(lambda v: ravel_pytree(blocks.linear(*assemble(v)))[0])(units)
        return forward, ravel_pytree(blocks.transpose(assemble_dual(y)))[0]

    u = jnp.asarray(rng.standard_normal(flat.size))
    y = jnp.asarray(rng.standard_normal(dual.size))
    images, back = columns(jnp.concatenate([jnp.eye(flat.size), u[None]]), y)
    matrix = np.asarray(images[:-1]).T
    np.testing.assert_allclose(matrix @ u, images[-1], atol=1e-10)
    np.testing.assert_allclose(back, matrix.T @ y, atol=1e-10)
    # the power method in numpy: the norm is not overestimated by it
    scaled = np.sqrt(np.asarray(s))[:, None] * matrix * np.sqrt(np.asarray(t))
    v = rng.standard_normal(flat.size)
    for _ in range(300):
        v = scaled.T @ (scaled @ v)
        v /= np.linalg.norm(v)
    assert 0.2 <= np.linalg.norm(scaled @ v) <= 1 + 1e-9


@with_saddle
def test_the_proxes_of_the_saddle_form_are_proxes(name):
    blocks, x, z, q, _, _ = flat_blocks(name)
    (_, t_z), s = blocks.scaling()
    prox.check_prox(blocks.prox_dual, q, s, pairs=10)
    if jax.tree.leaves(z):
        prox.check_prox(blocks.prox_auxiliary, z, t_z, pairs=10)


@with_both
def test_the_saddle_form_has_the_slope_of_the_energy(name):
    """x fixed, (z, q) by the primal-dual method: then grad R(x) is the part of L' q that belongs to x."""
    blocks, x, z, q, t, s = flat_blocks(name)
    auxiliary = bool(jax.tree.leaves(z))
    steps, (_, t_z) = blocks.scaling()[1], blocks.scaling()[0]
    # without z this is the proximal point method in q, whose steps may be long
    steps = steps if auxiliary else jax.tree.map(lambda s: 1e3 * s, steps)

    @jax.jit
    def solve(z, q):
        def step(_, state):
            z, z_ahead, q = state
            q = blocks.prox_dual(jax.tree.map(lambda q, s, v: q + s * v, q, steps, blocks.linear(x, z_ahead)), steps)
            back = blocks.transpose(q)[1]
            new = blocks.prox_auxiliary(jax.tree.map(lambda z, t, v: z - t * v, z, t_z, back), t_z) if auxiliary else z
            return new, jax.tree.map(lambda a, b: 2 * a - b, new, z), q

        return jax.lax.fori_loop(0, 4000 if auxiliary else 100, step, (z, z, q))[2]

    slope = np.asarray(blocks.transpose(solve(z, q))[0])
    expected = measured(name).slopes[0]
    assert np.linalg.norm(slope - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
@with_saddle
def test_the_saddle_problem_is_what_it_claims(name):
    entry = REGULARIZERS[name]
    problem = jb.variational(None, entry.regularizer, form="saddle")
    assert isinstance(problem, jb.SaddleProblem)
    problem.verify(start(entry), picture(entry.shape)[1])


OPERATORS = {
    "views": jb.operators.ParallelBeam((6, 5), 5, 9),
    "complex": jb.operators.UndersampledFourier((6, 5), np.arange(30).reshape(6, 5) % 3 < 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("name", ["TGV", "FoE, psi"])
def test_dualised_operators_are_what_they_claim(name, kind):
    operator, entry = OPERATORS[kind], REGULARIZERS[name]
    problem = jb.variational(operator, entry.regularizer, form="saddle", ridge=0.1)
    problem.verify(start(entry), operator(picture(entry.shape)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["identity", *OPERATORS])
@with_both_smooth
def test_both_forms_have_one_solution(name, kind):
    entry, operator = REGULARIZERS[name], OPERATORS.get(kind)
    if operator is not None and entry.shape != operator.in_shape:
        pytest.skip("colour images have no operator here")
    R, params, noisy = entry.regularizer, start(entry), picture(entry.shape)[1]
    data = noisy if operator is None else operator(noisy)
    smooth, info = jb.solve(jb.variational(operator, R, ridge=0.5), params, data, tol=1e-7, max_steps=50000)
    jb.check(info)
    problem = jb.variational(operator, R, form="saddle", ridge=0.5)
    pair, info = jb.solve(problem, params, data, tol=1e-6, max_steps=50000)
    jb.check(info)
    assert float(jnp.linalg.norm(image_of(pair) - smooth)) <= 2e-5
    # with z in the problem nothing is strongly convex
    assert np.isfinite(info.error) == (not isinstance(R, ICNN))


@pytest.mark.parametrize("name", ["TV", "TV, Huber"])
def test_the_dual_solution_has_the_energy_of_the_image(name):
    """R(x) = <D x, q> - b*(q) at the solution, y - x = D' q, and |q| <= lambda."""
    entry = REGULARIZERS[name]
    R, params, noisy = entry.regularizer, start(entry), picture(entry.shape)[1]
    (x, q), info = jb.solve(jb.variational(None, R), params, noisy, tol=1e-8, max_steps=50000)
    jb.check(info)
    blocks, weight = R.saddle(params), jnp.exp(params[0])
    conjugate = R.width / (2 * weight) * jnp.sum(q**2)
    dual = jnp.vdot(blocks.linear(x, ()), q) - conjugate
    assert float(dual) == pytest.approx(float(R(params, x)), rel=1e-5)
    np.testing.assert_allclose(noisy - x, blocks.transpose(q)[0], atol=1e-6)
    assert float(jnp.max(jnp.linalg.norm(q, axis=0))) <= float(weight) * (1 + 1e-12)


# ---- lower levels ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@names(lambda R: R.form == "smooth")
def test_feeds_a_lower_level_and_its_hypergradient(name):
    entry = REGULARIZERS[name]
    problem = jb.variational(None, entry.regularizer)
    oracle = jb.implicit.Oracle(problem, lambda p, x, d: 0.5 * jnp.sum(x**2), solver=jb.solvers.AGD(), estimate=False)
    params, batch = start(entry), points(entry, 2)
    hg = oracle(params, batch, tol=1e-12)
    assert int(hg.status) <= jb.Status.PRECISION
    flat, assemble = ravel_pytree(params)
    w, h = jnp.asarray(np.random.default_rng(2).standard_normal(flat.size)), 1e-4
    w = w / jnp.linalg.norm(w)
    # the value of the hypergradient call: one program to compile instead of two
    ends = [float(oracle(assemble(flat + s * h * w), batch, tol=1e-12).value) for s in (1, -1)]
    assert float(jnp.vdot(ravel_pytree(hg.grad)[0], w)) == pytest.approx(
        (ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-9
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TV, Huber", "LearnedTV, curved", "FoE, psi", "FoE, huber", "ICNN"])
def test_saddle_hypergradients_against_differences(name):
    entry = REGULARIZERS[name]
    params, (clean, noisy) = start(entry), picture(entry.shape)
    batch = {"x": clean[None], "y": noisy[None]}
    problem = jb.variational(None, entry.regularizer, form="saddle")
    loss = jb.losses.squared_error(part=(0, 0) if name.startswith(("ICNN", "LearnedTV")) else 0)
    oracle = jb.piggyback.Oracle(problem, loss, max_steps=100000, max_adjoint_steps=100000, estimate=False)
    tol = 1e-9 if name == "ICNN" else 1e-12
    hg = oracle(params, batch, tol=tol)
    jb.check(hg)
    point, assemble = ravel_pytree(params)
    direction = np.random.default_rng(0).standard_normal(point.size)
    line = lambda t: oracle.value(assemble(point + t * direction), batch, hg.warm, tol=tol).value  # noqa: E731
    slope = float(central_differences(line, jnp.asarray(0.0), 1e-6)[0])
    assert direction @ ravel_pytree(hg.grad)[0] == pytest.approx(slope, rel=2e-5)
