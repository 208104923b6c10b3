"""The reference problem: smoothed TV denoising with theta = (-2.5, -4), by a user, by the library, as a saddle point.

min_x 1/2 ||x - y||^2 + exp(theta_0) sum_pixels sqrt(|grad x|^2 + exp(theta_1)^2),   loss 1/2 ||x_hat - clean||^2
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from benchmarks import common

THETA = (-2.5, -4.0)
# Hypergradients of the one-image problem from an independent solve (accelerated gradient to 1e-12, CG to 1e-13) that
# agrees with central differences to 7 digits.
PUBLISHED = {64: (-0.06102705117516, 0.24773792918776), 256: (-7.24933921446041, 4.73636325976029)}


def user_energy(theta, x, data):
    """Plain JAX, the way a user writes it: differences, padding, a root."""
    down = jnp.pad(jnp.diff(x, axis=0), ((0, 1), (0, 0)))
    right = jnp.pad(jnp.diff(x, axis=1), ((0, 0), (0, 1)))
    root = jnp.sqrt(down**2 + right**2 + jnp.exp(theta[1]) ** 2)
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.exp(theta[0]) * jnp.sum(root)


def smoothness(theta, data):
    return 1 + 8 * jnp.exp(theta[0] - theta[1])


def loss(theta, x, data):
    return 0.5 * jnp.sum((x - data["clean"]) ** 2)


PROBLEMS = {
    "user": jb.SmoothProblem(
        user_energy, init=lambda theta, data: data["y"], strong_convexity=1.0, smoothness=smoothness
    ),
    "library": jb.variational(None, jb.regularizers.SmoothedTV()),
}


SADDLE = jb.variational(None, jb.regularizers.SmoothedTV(), form="saddle")


def pair_loss(theta, pair, data):
    return loss(theta, pair[0], data)


def batch(size: int, count: int, dtype: str, folder: str | None = None):
    """Data of ``count`` images as arrays of ``dtype``."""
    images = common.images(size, count, folder)
    return {"y": jnp.asarray(images.noisy, dtype), "clean": jnp.asarray(images.clean, dtype)}


def reference(size: int, count: int, folder: str | None = None) -> np.ndarray:
    """The hypergradient to about 12 digits: Newton-CG to 1e-12 in float64, then one Newton step on (x, q)."""
    with common.precision("float64"):
        oracle = jb.implicit.Oracle(PROBLEMS["library"], loss, correct=True, error_steps=200)
        found = oracle(jnp.asarray(THETA), batch(size, count, "float64", folder), tol=1e-12)
        jb.check(found)
        return np.asarray(found.grad)


def published_distance(size: int, count: int, folder: str | None, gradient: np.ndarray) -> float | None:
    """Relative distance to the published reference, where there is one."""
    if count > 1 or folder or size not in PUBLISHED:
        return None
    return relative_error(gradient, np.asarray(PUBLISHED[size]))


def relative_error(gradient, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(gradient, np.float64) - exact) / np.linalg.norm(exact))
