"""Small problems as a user would write them, in plain jax.numpy, with dense double-precision references.

Nothing here uses the library's operators, regularisers or solvers, so that agreement means something.
"""

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import jbilevel as jb


@dataclass(frozen=True)
class Case:
    """A problem, an upper-level loss with a 1-Lipschitz gradient, and makers of params and batches."""

    name: str
    problem: jb.Problem
    loss: Callable
    params: Callable[[int], Any]  # seed -> params
    batch: Callable[[int, int], Any]  # (seed, number of samples) -> batch
    exact: Callable | None = None  # (params, data) -> loss at the exact minimiser, where there is a closed form
    unroll: int = 60  # gradient steps that reach rounding, for unrolled oracles

    def sample(self, seed: int = 0):
        return jax.tree.map(lambda leaf: leaf[0], self.batch(seed, 1))


def image_loss(params, x, data):
    return 0.5 * jnp.sum((x - data["x"]) ** 2)


def images(size: int):
    """Batches of piecewise constant images plus a ramp, and the same with noise of standard deviation 0.1."""

    def batch(seed: int, count: int):
        rng = np.random.default_rng([size, seed])
        clean = np.zeros((count, size, size))
        for image in clean:
            for _ in range(6):
                top, left = rng.integers(0, size - 2, 2)
                height, width = rng.integers(2, size, 2)
                image[top : top + height, left : left + width] = rng.uniform(0, 1)
            image += 0.2 * np.linspace(0, 1, size)
        noisy = clean + 0.1 * rng.standard_normal(clean.shape)
        return {"y": jnp.asarray(noisy), "x": jnp.asarray(clean)}

    return batch


def measured(params, data):
    return data["y"]


# min 1/2 ||x - y||^2 + e^p/2 sum_i a_i x_i^2: everything in closed form

DIAGONAL = np.linspace(0.1, 2.0, 6)


def quadratic_energy(p, x, data):
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(jnp.asarray(DIAGONAL, x.dtype) * x**2)


def quadratic_exact(p, data):
    return image_loss(p, data["y"] / (1 + jnp.exp(p) * jnp.asarray(DIAGONAL, data["y"].dtype)), data)


def vectors(seed: int, count: int):
    rng = np.random.default_rng([6, seed])
    return {"y": jnp.asarray(rng.standard_normal((count, 6))), "x": jnp.asarray(rng.standard_normal((count, 6)))}


QUADRATIC = Case(
    "quadratic",
    jb.SmoothProblem(
        quadratic_energy,
        lambda p, data: jnp.zeros_like(data["y"]),
        strong_convexity=lambda p, data: 1 + 0.1 * jnp.exp(p),
        smoothness=lambda p, data: 1 + 2 * jnp.exp(p),
        hessian_lipschitz=0.0,
        mixed_lipschitz=lambda p, data: 2 * jnp.exp(p),  # J = e^p a x
        mixed_norm=lambda p, data: 2 * jnp.exp(p) * jnp.linalg.norm(data["y"]),  # ||x_hat|| <= ||y||
    ),
    image_loss,
    lambda seed: jnp.asarray(np.random.default_rng(seed).uniform(-1.5, 1.0)),
    vectors,
    quadratic_exact,
    unroll=80,
)


# smoothed total variation


def tv_energy(theta, x, data):
    down = jnp.diff(x, axis=0, append=x[-1:])
    right = jnp.diff(x, axis=1, append=x[:, -1:])
    roots = jnp.sqrt(down**2 + right**2 + jnp.exp(2 * theta[1]))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.exp(theta[0]) * jnp.sum(roots)


def tv(size: int) -> Case:
    problem = jb.SmoothProblem(
        tv_energy, measured, strong_convexity=1.0, smoothness=lambda t, data: 1 + 8 * jnp.exp(t[0] - t[1])
    )

    def params(seed):
        return jnp.asarray(np.random.default_rng(seed).uniform([-3.0, -4.5], [-2.0, -3.0]))

    return Case(f"tv{size}", problem, image_loss, params, images(size), unroll=800)


# filters with circular boundary: ||f_k * x||^2 (ridge) and sum psi_w(f_k * x) (fields of experts)


def responses(params, x):
    """Circular correlation of x with each 3 x 3 filter."""
    kernels = params["filters"][:, None]
    wrapped = jnp.pad(x, 1, mode="wrap")[None, None]
    return jax.lax.conv(wrapped, kernels, (1, 1), "VALID")[0]


def ridge_energy(params, x, data):
    squares = jnp.sum(responses(params, x) ** 2, axis=(1, 2))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + 0.5 * jnp.sum(jnp.exp(params["log_weights"]) * squares)


def spectra(params, shape):
    """|Fourier transform| of each filter: its singular values."""
    return jnp.abs(jnp.fft.fft2(params["filters"], shape))


def ridge_exact(params, data):
    """The Hessian is diagonal in Fourier space."""
    gains = jnp.exp(params["log_weights"])[:, None, None] * spectra(params, data["y"].shape) ** 2
    x = jnp.real(jnp.fft.ifft2(jnp.fft.fft2(data["y"]) / (1 + jnp.sum(gains, axis=0))))
    return image_loss(params, x, data)


def norms(params, data):
    return jnp.max(spectra(params, data["y"].shape), axis=(1, 2))


def ridge_smoothness(params, data):
    return 1 + jnp.sum(jnp.exp(params["log_weights"]) * norms(params, data) ** 2)


def ridge_mixed(params, data):
    """c with ||J(x)|| <= c ||x||, J linear in x.

    With weight w_k = e^(log weight) and s_k = ||W_k||: d/dlog w_k of the gradient is w_k W_k'W_k x, of norm at most
    w_k s_k^2 ||x||; d/df_k in direction h is w_k (W_h' W_k + W_k' W_h) x, of norm at most 2 w_k s_k ||h||_1 ||x||, and
    ||h||_1 <= 3 ||h||_2 for 3 x 3 filters. Cauchy & Schwarz over all of them.
    """
    weights, s = jnp.exp(params["log_weights"]), norms(params, data)
    return jnp.sqrt(jnp.sum((weights * s**2) ** 2 + (6 * weights * s) ** 2))


def filters(count: int, log_weight: tuple[float, float]):
    """Random 3 x 3 filters of mean 0 and norm 1."""

    def params(seed: int):
        rng = np.random.default_rng(seed)
        kernels = rng.standard_normal((count, 3, 3))
        kernels -= kernels.mean(axis=(1, 2), keepdims=True)
        kernels /= np.linalg.norm(kernels, axis=(1, 2), keepdims=True)
        return {"filters": jnp.asarray(kernels), "log_weights": jnp.asarray(rng.uniform(*log_weight, count))}

    return params


def ridge(size: int) -> Case:
    problem = jb.SmoothProblem(
        ridge_energy,
        measured,
        strong_convexity=1.0,
        smoothness=ridge_smoothness,
        hessian_lipschitz=0.0,
        mixed_lipschitz=ridge_mixed,
        mixed_norm=lambda params, data: ridge_mixed(params, data) * jnp.linalg.norm(data["y"]),  # ||x_hat|| <= ||y||
    )
    return Case(f"ridge{size}", problem, image_loss, filters(3, (-2.0, 1.0)), images(size), ridge_exact, unroll=600)


WIDTH = 0.01


def psi(t):
    """psi_w(t) = t^2/(2w) for |t| < w, |t| - w/2 beyond: differentiable once, its derivative Lipschitz."""
    size = jnp.abs(t)
    return jnp.where(size < WIDTH, t**2 / (2 * WIDTH), size - WIDTH / 2)


def experts_energy(params, x, data):
    sums = jnp.sum(psi(responses(params, x)), axis=(1, 2))
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.sum(jnp.exp(params["log_weights"]) * sums)


def experts(size: int) -> Case:
    problem = jb.SmoothProblem(
        experts_energy,
        measured,
        strong_convexity=1.0,
        smoothness=lambda params, data: 1 + jnp.sum(jnp.exp(params["log_weights"]) * norms(params, data) ** 2) / WIDTH,
    )
    return Case(f"experts{size}", problem, image_loss, filters(3, (-5.0, -3.0)), images(size), unroll=3000)


# an unknown that is a pytree of different shapes, neither mu nor L given


def coupled_energy(params, x, data):
    u, v = x["u"], x["v"]
    rough = jnp.sum(jnp.sqrt((jnp.diff(u) - v) ** 2 + 0.1))
    tied = jnp.sum(params["b"] * v[:3] ** 2) + 0.5 * jnp.sum(v**2)
    return 0.5 * jnp.sum((u - data["y"]) ** 2) + jnp.exp(params["a"]) * rough + tied + 0.05 * jnp.sum(u**4)


COUPLED = Case(
    "coupled",
    jb.SmoothProblem(
        coupled_energy, lambda params, data: {"u": jnp.zeros_like(data["y"]), "v": jnp.zeros(data["y"].size - 1)}
    ),
    lambda params, x, data: image_loss(params, x["u"], data) + params["a"] ** 2 * jnp.sum(x["v"] ** 2),
    lambda seed: {
        "a": jnp.asarray(np.random.default_rng(seed).uniform(-1.0, 0.5)),
        "b": jnp.asarray(np.random.default_rng(seed).uniform(0.0, 1.0, 3)),
    },
    vectors,
)


# the two with a closed form again, as saddle points: the regulariser dualised, f* = sum y^2/(2 weight)


def dualised(linear, weight, norm) -> jb.SaddleProblem:
    """1/2 ||x - y||^2 + sum weight(params)/2 (linear x)^2; weight: an array that broadcasts against K x."""

    def start(params, data):
        x = jnp.zeros_like(data["y"])
        return x, jnp.zeros_like(linear(params, x, data))

    return jb.SaddleProblem(
        linear,
        lambda params, v, step, data: (v + step * data["y"]) / (1 + step),
        lambda params, v, step, data: v / (1 + step / weight(params, v)),
        start,
        mu_primal=1.0,
        mu_dual=lambda params, data: 1 / jnp.max(weight(params, data["y"])),
        norm=norm,
    )


SADDLES = {
    "quadratic": dualised(lambda p, x, data: x, lambda p, v: jnp.exp(p) * jnp.asarray(DIAGONAL, v.dtype), 1.0),
    "ridge8": dualised(
        lambda params, x, data: responses(params, x),
        lambda params, v: jnp.exp(params["log_weights"])[:, None, None],
        lambda params, data: jnp.linalg.norm(norms(params, data)),
    ),
}


@dataclass(frozen=True)
class primal:
    """A loss of x as the loss of a saddle point."""

    loss: Callable

    def __call__(self, params, pair, data):
        return self.loss(params, pair[0], data)


# references


@partial(jax.jit, static_argnums=0)
def value_and_gradient(energy, params, x, data):
    value, gradient = jax.value_and_grad(energy, 1)(params, x, data)
    return value, ravel_pytree(gradient)[0]


@partial(jax.jit, static_argnums=0)
def dense_hessian(energy, params, x, data):
    flat, assemble = ravel_pytree(x)
    return jax.hessian(lambda flat: energy(params, assemble(flat), data))(flat)


def dense_solution(problem, params, data, x0=None):
    """The minimiser by Newton's method with dense Hessians and backtracking, to rounding."""
    flat, assemble = ravel_pytree(problem.init(params, data) if x0 is None else x0)
    flat = np.asarray(flat)
    value, slope = value_and_gradient(problem.energy, params, assemble(flat), data)
    for _ in range(100):
        if np.linalg.norm(slope) <= 1e-12:
            return assemble(flat)
        step = -np.linalg.solve(dense_hessian(problem.energy, params, assemble(flat), data), slope)
        for halvings in range(30):
            trial = flat + 0.5**halvings * step
            trial_value, trial_slope = value_and_gradient(problem.energy, params, assemble(trial), data)
            if trial_value < value or np.linalg.norm(trial_slope) < 0.5 * np.linalg.norm(slope):
                break
        flat, value, slope = trial, trial_value, trial_slope
    raise AssertionError(f"the reference has a gradient of norm {np.linalg.norm(slope):.1e}")


def dense_hypergradient(problem, loss, params, data, x):
    """d loss(params, x_hat(params), data) at the minimiser x, from the dense Hessian, as a flat vector."""
    direct, slope = _loss_gradients(loss, params, x, data)
    q = np.linalg.solve(dense_hessian(problem.energy, params, x, data), slope)
    return np.asarray(direct - _pull_back(problem.energy, params, x, data, q))


@partial(jax.jit, static_argnums=0)
def _loss_gradients(loss, params, x, data):
    direct, slope = jax.grad(loss, (0, 1))(params, x, data)
    return ravel_pytree(direct)[0], ravel_pytree(slope)[0]


@partial(jax.jit, static_argnums=0)
def _pull_back(energy, params, x, data, q):
    """d <grad_x energy, q>/d params."""
    pairing = lambda params: ravel_pytree(jax.grad(energy, 1)(params, x, data))[0] @ q  # noqa: E731
    return ravel_pytree(jax.grad(pairing)(params))[0]


def relative(a, b):
    """||a - b||/||b|| of two pytrees."""
    a, b = (np.asarray(ravel_pytree(tree)[0]) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def distance(a, b):
    """||a - b|| of two pytrees."""
    a, b = (np.asarray(ravel_pytree(tree)[0]) for tree in (a, b))
    return np.linalg.norm(a - b)


def central_differences(function, params, step=1e-5):
    """Gradient of a function of params by central differences, as a flat numpy vector; one call of it per entry."""
    point, assemble = ravel_pytree(params)
    moves = step * np.eye(point.size)
    change = [float(function(assemble(point + m))) - float(function(assemble(point - m))) for m in moves]
    return np.asarray(change) / (2 * step)


@contextmanager
def compilations():
    """A list that receives the name of every program that is compiled in the block."""
    names = []

    class Collect(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                names.append(record.getMessage())

    logger, handler = logging.getLogger("jax"), Collect()
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
