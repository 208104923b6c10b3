"""Proven bounds against solutions in extended precision, rounding included; and these solutions against differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb
from benchmarks import common, violations
from benchmarks.violation_problems import FAMILIES, LONG

GRADIENTS = ("quadratic", "ridge, log cosh", "smoothed TV", "saddle")
EPS = {"float32": np.finfo("float32").eps, "float64": np.finfo("float64").eps}


def drawn(name, seed=0, dtype="float64"):
    family = FAMILIES[name]
    return family, *family.draw(np.random.default_rng(seed), family.sizes[0], np.dtype(dtype))


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", ["quadratic", "saddle, bounded dual", "weighted l1"])
def test_no_bound_is_broken(name, dtype):
    family = FAMILIES[name]
    size = family.sizes[:2][-1]
    with common.precision(dtype):
        rows = [violations.judged(row) for row in violations.measured(family, size, 24, dtype, 1)]
    assert sum(row["cases"] for row in rows) == sum(row["distance_bounds"] for row in rows) == 48
    assert sum(row[f"{kind}_violations"] for row in rows for kind in violations.KINDS) == 0
    # and they say something
    assert max(row["distance_largest"] for row in rows) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("name", FAMILIES)
def test_no_bound_of_any_family_is_broken(name, dtype):
    with common.precision(dtype):
        for size in FAMILIES[name].sizes[:2]:
            for row in map(violations.judged, violations.measured(FAMILIES[name], size, 30, dtype, 2)):
                assert row["cases"] == 30 and row["value_bounds"] == 60
                assert row["gradient_bounds"] == (30 if name.startswith(GRADIENTS) else 0)
                assert sum(row[f"{kind}_violations"] for kind in violations.KINDS) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_references_solve_what_is_stored(name):
    """The derivative of the energy at the reference, by JAX in float64, is rounding."""
    family, params, data = drawn(name)
    found = family.exact(params, data)
    if not isinstance(family.problem, jb.SmoothProblem):
        x, info = jb.solve(family.problem, params, data, tol=1e-10, max_steps=50_000)
        away = np.linalg.norm(np.asarray(jb.image_of(x)) - found.x)
        assert away <= float(info.error) < 1e-6
        return
    gradient = jax.grad(family.problem.energy, 1)(params, jnp.asarray(found.x, float), data)
    view = family.problem.view(params, data)
    assert np.linalg.norm(gradient) <= 16 * EPS["float64"] * float(view.constants.smoothness or 1.0) * (
        np.linalg.norm(found.x) + np.linalg.norm(data.get("y", data.get("b")))
    )


@pytest.mark.parametrize("name", GRADIENTS)
def test_hypergradients_of_references_are_differences_of_their_values(name):
    family, params, data = drawn(name, seed=3)
    leaves, structure = jax.tree.flatten(params)
    step, slopes = LONG(1e-6), []
    for i, leaf in enumerate(leaves):
        for k in range(leaf.size):
            values = []
            for sign in (-1, 1):
                moved = np.asarray(leaf, LONG).copy()
                moved.flat[k] += sign * step
                others = [np.asarray(other, LONG) for other in leaves]
                others[i] = moved
                values.append(family.exact(jax.tree.unflatten(structure, others), data).value)
            slopes.append((values[1] - values[0]) / (2 * step))
    exact = family.exact(params, data).gradient
    np.testing.assert_allclose(np.asarray(slopes, float), exact.astype(float), rtol=1e-6, atol=1e-8 * abs(exact).max())


def ridge(dtype, condition):
    """A diagonal of that condition, with constants."""
    diagonal = jnp.geomspace(1, 1 / condition, 6).astype(dtype)
    problem = jb.SmoothProblem(
        lambda p, x, d: 0.5 * jnp.sum(diagonal * x**2) - d @ x, lambda p, d: jnp.zeros_like(d),
        strong_convexity=1 / condition, smoothness=1.0,
    )  # fmt: skip
    return problem, jnp.asarray(np.random.default_rng(0).standard_normal(6), dtype)


@pytest.mark.parametrize(("dtype", "tol"), [("float32", 1e-1), ("float64", 1e-6)])
def test_far_above_rounding_a_bound_is_what_it_was(dtype, tol):
    problem, data = ridge(dtype, 10.0)
    _, info = jb.solve(problem, (), data, tol=tol, solver=jb.solvers.AGD())
    exact = float(info.residual) * 10
    assert 0.1 * tol < exact <= float(info.error) <= exact * (1 + 1e-3)


@pytest.mark.parametrize("dtype", EPS)
def test_at_the_precision_of_the_dtype_the_bound_is_eps_times_the_condition(dtype):
    problem, data = ridge(dtype, 1e4)
    x, info = jb.solve(problem, (), data, tol=0.0)
    unit = EPS[dtype] * 1e4 * float(jnp.linalg.norm(x))
    assert unit <= float(info.error) <= 32 * unit


def test_bounds_on_residuals_scale_with_the_units():
    """Of x, and of the energy."""
    view = jb.SmoothView(lambda x: jnp.sum(x), jb.Constants(strong_convexity=0.1))
    residual, x, energy = jnp.asarray(1e-9), jnp.arange(3.0), jnp.asarray(-4.0)
    found = view.unrounded(residual, x, 2.0, energy)
    assert found > residual
    assert view.unrounded(3 * residual, 3 * x, 2.0, 9 * energy) == pytest.approx(3 * float(found), rel=1e-14)
    assert view.unrounded(5 * residual, x, 10.0, 5 * energy) == pytest.approx(5 * float(found), rel=1e-14)


def test_the_largest_curvature_that_is_known_counts():
    x, zero = jnp.ones(4), jnp.asarray(0.0)
    unit = 8 * EPS["float64"] * 2.0
    for constants, met, expected in (
        (jb.Constants(), 3.0, 3.0),
        (jb.Constants(strong_convexity=5.0), 3.0, 5.0),
        (jb.Constants(smoothness=7.0), 3.0, 7.0),
    ):
        assert float(jb.SmoothView(jnp.sum, constants).unrounded(zero, x, met)) == pytest.approx(expected * unit)
