"""Newton-CG where the constants of a problem are far from what its energy does."""

import jax.numpy as jnp
import numpy as np
import pytest
from problems_for_tests import images

import jbilevel as jb

TV = jb.regularizers.SmoothedTV(eps=1e-3)


def denoising(overstated: float) -> jb.SmoothProblem:
    return jb.SmoothProblem(
        lambda theta, x, data: 0.5 * jnp.sum((x - data["y"]) ** 2) + TV(theta, x),
        lambda theta, data: data["y"],
        strong_convexity=1.0,
        smoothness=lambda theta, data: overstated * TV.bounds(theta, data["y"].shape).smoothness + 1,
    )


@pytest.mark.parametrize("overstated", [pytest.param(1.0, marks=pytest.mark.slow), 1e2, 1e6])
def test_a_loose_bound_on_the_curvature_does_not_stop_it(overstated):
    """An accelerated phase with steps of 1/L would need sqrt(L/mu) steps for every digit, and look stagnated."""
    data = {"y": images(16)(0, 1)["y"][0]}
    x, info = jb.solve(denoising(overstated), jnp.log(jnp.array([0.3])), data, tol=1e-6)
    assert int(info.status) == jb.Status.CONVERGED
    assert int(info.steps) <= 400
    exact, _ = jb.solve(denoising(1.0), jnp.log(jnp.array([0.3])), data, tol=1e-6, solver=jb.solvers.LBFGS())
    assert float(np.linalg.norm(x - exact)) <= 2e-6


@pytest.mark.parametrize("seed", [1, 2])
def test_accelerated_steps_that_are_too_long_shorten(seed):
    """float32, a photograph, a small eps: the largest curvature that CG met is a fifth of L, and the phase of gradient
    steps with it never ended."""
    from skimage.data import camera

    clean = camera()[326:454, 244:372] / 255
    noisy = clean + 0.05 * np.random.default_rng(seed).standard_normal(clean.shape)
    problem = jb.variational(None, jb.regularizers.SmoothedTV(eps=1e-3))
    theta = jnp.log(jnp.array([0.028], jnp.float32))
    _, info = jb.solve(problem, theta, {"y": jnp.asarray(noisy, jnp.float32)}, tol=1e-1)
    assert info.status == jb.Status.CONVERGED and info.steps < 100
