"""Saddle-point problems of different regularity, to check solvers, hypergradients, estimates and certificates on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from jbilevel import image_of, prox
from jbilevel._core.constants import Constants, SaddleConstants
from jbilevel.operators import forward_difference

WIDTH = 0.01
_THIRD_DERIVATIVE = 1.5 / 1.25**2.5  # sup of the third derivative of sqrt(1 + t^2)


class Setup(NamedTuple):
    """A problem, and makers of params and of one sample from a seed."""

    problem: jb.SaddleProblem
    params: Callable[[int], Any]
    sample: Callable[[int], Any]
    reference: float = 1e-12  # tolerance of a solve that counts as exact


def image_loss(params, pair, data):
    return 0.5 * jnp.sum((image_of(pair) - data["x"]) ** 2)


def pair_loss(params, pair, data):
    """1-smooth, convex, of both unknowns."""
    return 0.5 * jnp.sum((pair[0] - data["x"]) ** 2) + 0.5 * jnp.sum((pair[1] - data["z"]) ** 2)


# -------------------------------------------------------- smooth and strongly convex-concave: everything is certified

SIZES = (7, 5)  # of x and y


def _vectors(seed: int) -> dict:
    rng = np.random.default_rng([1, seed])
    return {name: jnp.asarray(rng.standard_normal(SIZES[name in "ez"])) for name in ("d", "e", "x", "z")}


def _matrix(seed: int) -> np.ndarray:
    rng = np.random.default_rng([2, seed])
    return rng.standard_normal(SIZES[::-1]) * 10 ** rng.uniform(-1, 0)


def _start(params, data):
    return jnp.zeros_like(data["d"]), jnp.zeros_like(data["e"])


def _frobenius(params, data):
    return jnp.linalg.norm(params["K"])


def _quadratic_constants(params, data) -> SaddleConstants:
    """g = a/2 |x - d|^2: d_a grad g = x_hat - d, f* = b/2 |y - e|^2 likewise; ||x_hat - d|| and ||y_hat - e|| from
    a |x - d|^2 + b |y - e|^2 <= |K'e| |x - d| + |K d| |y - e| at the saddle point."""
    a, b, matrix = params["a"], params["b"], params["K"]
    pull = jnp.sqrt(jnp.sum((matrix.T @ data["e"]) ** 2) / a + jnp.sum((matrix @ data["d"]) ** 2) / b)
    return SaddleConstants(
        Constants(hessian_lipschitz=0.0, mixed_lipschitz=1.0, mixed_norm=pull / jnp.sqrt(a)),
        Constants(hessian_lipschitz=0.0, mixed_lipschitz=1.0, mixed_norm=pull / jnp.sqrt(b)),
        1.0,
    )


QUADRATIC = Setup(
    jb.SaddleProblem(
        lambda p, x, data: p["K"] @ x,
        lambda p, v, step, data: prox.squared_distance(v, step, data["d"], p["a"]),
        lambda p, v, step, data: prox.squared_distance(v, step, data["e"], p["b"]),
        _start,
        mu_primal=lambda p, data: p["a"],
        mu_dual=lambda p, data: p["b"],
        norm=_frobenius,
        constants=_quadratic_constants,
    ),
    lambda seed: {
        "K": jnp.asarray(_matrix(seed)),
        "a": jnp.asarray(10 ** np.random.default_rng([3, seed]).uniform(-1, 1)),
        "b": jnp.asarray(10 ** np.random.default_rng([4, seed]).uniform(-1, 1)),
    },
    _vectors,
)


def quadratic_exact(params, data):
    """The saddle point in closed form."""
    a, b, matrix = params["a"], params["b"], params["K"]
    m, n = matrix.shape
    system = jnp.block([[a * jnp.eye(n), matrix.T], [-matrix, b * jnp.eye(m)]])
    solution = jnp.linalg.solve(system, jnp.concatenate([a * data["d"], b * data["e"]]))
    return solution[:n], solution[n:]


def root_prox(v, step, center, convexity, weight):
    """Prox of convexity/2 |x - center|^2 + weight sum sqrt(1 + x^2), by Newton's method."""

    def newton(x):
        root = jnp.sqrt(1 + x**2)
        value = x - v + step * (convexity * (x - center) + weight * x / root)
        return x - value / (1 + step * (convexity + weight / root**3))

    # from where the root is replaced by its largest curvature the iterates stay on one side for moderate weights
    x = jax.lax.stop_gradient((v + step * convexity * center) / (1 + step * (convexity + weight)))
    x = jax.lax.fori_loop(0, 30, lambda _, x: jax.lax.stop_gradient(newton(x)), x)
    return newton(newton(x))


def _root_constants(params, data) -> SaddleConstants:
    """d_w of grad g has entries x/sqrt(1 + x^2), below 1 and 1-Lipschitz."""
    sides = (
        Constants(hessian_lipschitz=params[w] * _THIRD_DERIVATIVE, mixed_lipschitz=1.0, mixed_norm=size**0.5)
        for w, size in zip("uw", SIZES, strict=True)
    )
    return SaddleConstants(*sides, 1.0)


ROOTS = Setup(
    jb.SaddleProblem(
        lambda p, x, data: p["K"] @ x,
        lambda p, v, step, data: root_prox(v, step, data["d"], 1.0, p["u"]),
        lambda p, v, step, data: root_prox(v, step, data["e"], 0.5, p["w"]),
        _start,
        mu_primal=1.0,
        mu_dual=0.5,
        norm=_frobenius,
        constants=_root_constants,
    ),
    lambda seed: {
        "K": jnp.asarray(_matrix(seed)),
        "u": jnp.asarray(np.random.default_rng([3, seed]).uniform(0.1, 1.0)),
        "w": jnp.asarray(np.random.default_rng([4, seed]).uniform(0.1, 1.0)),
    },
    _vectors,
)


# ------------------------------------------------------------------------------------------------------- denoising


def gradient(x):
    return jnp.stack([forward_difference(x, axis) for axis in (0, 1)])


def images(size: int, seed: int) -> dict:
    """A piecewise constant image on a ramp, and the same with noise of standard deviation 0.1."""
    rng = np.random.default_rng([size, seed])
    clean = np.tile(0.2 * np.linspace(0, 1, size), (size, 1))
    for _ in range(6):
        (top, left), (height, width) = rng.integers(0, size - 2, 2), rng.integers(2, size, 2)
        clean[top : top + height, left : left + width] = rng.uniform(0, 1)
    return {"y": jnp.asarray(clean + 0.1 * rng.standard_normal(clean.shape)), "x": jnp.asarray(clean)}


def huber_energy(params, x, data):
    """1/2 |x - y|^2 + e^p0 sum h(|D x|), h Huber's function of width e^p1: the primal form of `huber_tv`."""
    squared = jnp.sum(gradient(x) ** 2, axis=0)
    weight, width = jnp.exp(params[0]), jnp.exp(params[1])
    far = squared > width**2
    length = jnp.sqrt(jnp.where(far, squared, 1.0))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + weight * jnp.sum(
        jnp.where(far, length - width / 2, squared / (2 * width))
    )


def _noisy(params, data):
    return data["y"], jnp.zeros((2, *data["y"].shape), data["y"].dtype)


def huber_tv(size: int, weight=(-3.0, -2.0), width=(-4.5, -2.5)) -> Setup:
    problem = jb.SaddleProblem(
        lambda p, x, data: gradient(x),
        lambda p, v, step, data: prox.squared_distance(v, step, data["y"]),
        lambda p, v, step, data: prox.huber_conjugate(v, step, jnp.exp(p[0]), jnp.exp(p[1]), axis=0),
        _noisy,
        mu_primal=1.0,
        mu_dual=lambda p, data: jnp.exp(p[1] - p[0]),
        norm=8**0.5,
    )
    draw = lambda seed: np.random.default_rng([5, seed]).uniform(*zip(weight, width, strict=True))  # noqa: E731
    return Setup(problem, lambda seed: jnp.asarray(draw(seed)), partial(images, size))


def total_variation(size: int) -> Setup:
    """1/2 |x - y|^2 + e^p TV(x) with x >= 0: no modulus in the dual."""
    problem = jb.SaddleProblem(
        lambda p, x, data: gradient(x),
        lambda p, v, step, data: prox.box(prox.squared_distance(v, step, data["y"]), 0.0),
        lambda p, v, step, data: prox.ball(v, jnp.exp(p), axis=0),
        _noisy,
        mu_primal=1.0,
        norm=8**0.5,
    )
    return Setup(problem, lambda seed: jnp.asarray(-2.5), partial(images, size), 1e-9)


def learned_tv(size: int) -> Setup:
    """Bogensperger et al. 2024, (29): no modulus in the auxiliary field nor in the dual."""
    learned = jb.regularizers.LearnedTV(count=3, size=3)

    def params(seed: int):
        return learned.init(jax.random.key(seed), noise=0.1, dtype=jnp.float64)

    return Setup(jb.variational(None, learned), params, partial(images, size), 1e-8)


def _responses(filters, x):
    kernels = filters[:, None]
    return jax.lax.conv(jnp.pad(x, 1, mode="wrap")[None, None], kernels, (1, 1), "VALID")[0]


def experts(size: int, filters: int = 3) -> Setup:
    """1/2 |x - y|^2 + sum_k e^w_k sum psi(+-(f_k * x)), psi of width 0.01 (Bogensperger et al. 2024, (34)).

    f* = width/(2 e^w) y^2 on |y| <= e^w.
    """

    def spectrum(params, data):
        return jnp.sqrt(jnp.max(jnp.sum(jnp.abs(jnp.fft.fft2(params["filters"], data["y"].shape)) ** 2, axis=0)))

    def weights(params):
        return jnp.exp(params["log_weights"])[:, None, None]

    problem = jb.SaddleProblem(
        lambda p, x, data: _responses(p["filters"], x),
        lambda p, v, step, data: prox.squared_distance(v, step, data["y"]),
        lambda p, v, step, data: prox.huber_conjugate(v, step, weights(p), WIDTH),
        lambda p, data: (data["y"], jnp.zeros((filters, *data["y"].shape), data["y"].dtype)),
        mu_primal=1.0,
        mu_dual=lambda p, data: WIDTH * jnp.exp(-jnp.max(p["log_weights"])),
        norm=spectrum,
    )

    def params(seed: int):
        rng = np.random.default_rng([6, seed])
        kernels = rng.standard_normal((filters, 3, 3))
        kernels -= kernels.mean(axis=(1, 2), keepdims=True)
        kernels /= np.linalg.norm(kernels, axis=(1, 2), keepdims=True)
        return {"filters": jnp.asarray(kernels), "log_weights": jnp.asarray(rng.uniform(-5.0, -3.0, filters))}

    return Setup(problem, params, partial(images, size))
