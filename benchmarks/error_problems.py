"""Denoising problems of different smoothness and conditioning, to check error estimates and certificates on."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from benchmarks import tv
from jbilevel.operators import forward_difference

FILTERS, SIDE = 8, 5
WIDTH = 0.01  # w of psi_w, and of the log-cosh


class Setup(NamedTuple):
    """A problem at parameters; ``certified``: all constants that a certificate needs are known."""

    problem: jb.SmoothProblem
    params: Any
    certified: bool = False


def _tv(weight: float, eps: float) -> Setup:
    return Setup(tv.PROBLEMS["library"], np.array([weight, eps]), certified=True)


# ------------------------------------------------------------------------------------------------- fields of experts


def huber(t):
    """psi_w(t) + psi_w(-t), psi_w the smoothed ReLU of Bogensperger et al. 2024, (31): t^2/(2w) up to w, then
    |t| - w/2; only C^{1,1}."""
    size = jnp.abs(t)
    return jnp.where(size <= WIDTH, t**2 / (2 * WIDTH), size - WIDTH / 2)


def log_cosh(t):
    """w log cosh(t/w), a smooth stand-in for |t| with the same curvature 1/w at 0."""
    size = jnp.abs(t) / WIDTH
    return WIDTH * (size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(2.0))


def _ridge(potential):
    """1/2 ||x - y||^2 + sum_k exp(w_k) sum_pixels potential(f_k * x), learned w and f."""

    def energy(params, x, data):
        kernels = params["filters"][:, None]
        responses = jax.lax.conv_general_dilated(x[None, None], kernels, (1, 1), "SAME")[0]
        weights = jnp.exp(params["weights"])[:, None, None]
        return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.sum(weights * potential(responses))

    return energy


def _ridge_smoothness(params, data):
    """1 + max over frequencies of sum_k exp(w_k) |f_k^|^2 / w, on a grid that resolves 5 x 5 filters within 1 %."""
    spectrum = jnp.abs(jnp.fft.fft2(params["filters"], (64, 64))) ** 2
    return 1 + 1.01 * jnp.max(jnp.tensordot(jnp.exp(params["weights"]), spectrum, 1)) / WIDTH


def _experts(potential, scale: float) -> Setup:
    """Zero-mean random filters of 2-norm ``scale``, all weights 1."""
    filters = np.random.default_rng(1).standard_normal((FILTERS, SIDE, SIDE))
    filters -= filters.mean(axis=(1, 2), keepdims=True)
    filters *= scale / np.sqrt(np.sum(filters**2, axis=(1, 2), keepdims=True))
    problem = jb.SmoothProblem(
        _ridge(potential), lambda params, data: data["y"], strong_convexity=1.0, smoothness=_ridge_smoothness
    )
    return Setup(problem, {"filters": filters, "weights": np.zeros(FILTERS)})


# --------------------------------------------------------------------------------------------------------- quadratics


def _quadratic(weight: float) -> Setup:
    """1/2 ||x - y||^2 + exp(theta)/2 ||D x||^2: J = exp(theta) D'D x_hat with ||D'D|| <= 8, ||x_hat|| <= ||y||."""

    def energy(theta, x, data):
        squares = sum(jnp.sum(forward_difference(x, axis) ** 2) for axis in (0, 1))
        return 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * jnp.exp(theta) * squares

    problem = jb.SmoothProblem(
        energy,
        lambda theta, data: data["y"],
        strong_convexity=1.0,
        smoothness=lambda theta, data: 1 + 8 * jnp.exp(theta),
        hessian_lipschitz=0.0,
        mixed_lipschitz=lambda theta, data: 8 * jnp.exp(theta),
        mixed_norm=lambda theta, data: 8 * jnp.exp(theta) * jnp.linalg.norm(data["y"]),
    )
    return Setup(problem, np.asarray(weight), certified=True)


def _ridge_quadratic(weight: float) -> Setup:
    """1/2 ||A x - y||^2 + exp(theta)/2 ||x||^2, A a mean over 3 x 3 pixels (||A|| <= 1).

    J = exp(theta) x_hat, and ||x_hat|| <= ||y||/(2 exp(theta/2)) from the singular values s/(s^2 + exp(theta)).
    """

    def blur(x):
        kernel = jnp.full((1, 1, 3, 3), 1 / 9, x.dtype)
        return jax.lax.conv_general_dilated(x[None, None], kernel, (1, 1), "SAME")[0, 0]

    def energy(theta, x, data):
        return 0.5 * jnp.sum((blur(x) - data["y"]) ** 2) + 0.5 * jnp.exp(theta) * jnp.sum(x**2)

    problem = jb.SmoothProblem(
        energy,
        lambda theta, data: data["y"],
        strong_convexity=lambda theta, data: jnp.exp(theta),
        smoothness=lambda theta, data: 1 + jnp.exp(theta),
        hessian_lipschitz=0.0,
        mixed_lipschitz=lambda theta, data: jnp.exp(theta),
        mixed_norm=lambda theta, data: 0.5 * jnp.exp(theta / 2) * jnp.linalg.norm(data["y"]),
    )
    return Setup(problem, np.asarray(weight), certified=True)


ESTIMATED = {
    "TV (-2.5, -4)": _tv(-2.5, -4.0),
    "TV (-3, -6)": _tv(-3.0, -6.0),
    "TV (-2, -5)": _tv(-2.0, -5.0),
    "ridge log-cosh": _experts(log_cosh, 0.1),
    "FoE psi_w, scale 0.03": _experts(huber, 0.03),
    "FoE psi_w, scale 0.1": _experts(huber, 0.1),
}
CERTIFIED = {
    "quadratic": _quadratic(0.0),
    "ridge-quadratic": _ridge_quadratic(-2.0),
    **{f"SmoothedTV{name[2:]}": setup for name, setup in ESTIMATED.items() if setup.certified},
}
