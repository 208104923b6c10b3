"""Smooth problems with and without constants, convex and not, and solvers of others, for the tests of solvers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import optimistix

import jbilevel as jb
from jbilevel._core import trees


class Case(NamedTuple):
    problem: jb.SmoothProblem
    params: Any
    data: Any
    other: Any  # data of another sample


HESSIAN = np.array([[4.0, 1.0, 0.5], [1.0, 3.0, 0.2], [0.5, 0.2, 2.0]])


def quadratic_energy(params, x, data):
    """x = {"value": (2,), "grad": ()}: names that optax uses for itself."""
    flat = jnp.append(x["value"], x["grad"])
    return 0.5 * flat @ (params * (HESSIAN @ flat).astype(flat.dtype)) - data @ flat


def quadratic() -> Case:
    low, high = np.linalg.eigvalsh(HESSIAN)[[0, -1]]
    problem = jb.SmoothProblem(
        quadratic_energy,
        lambda params, data: {"value": jnp.zeros_like(data[:2]), "grad": jnp.zeros_like(data[2])},
        strong_convexity=lambda params, data: params * float(low),
        smoothness=lambda params, data: params * float(high),
    )
    return Case(problem, 2.0, np.array([1.0, -2.0, 3.0]), np.array([0.5, 40.0, -1.0]))


def tv_energy(params, x, data):
    """Smoothed total variation, params = (weight, eps), isotropic with Neumann boundary."""
    weight, eps = params
    down, right = jnp.diff(x, axis=0, append=x[-1:]), jnp.diff(x, axis=1, append=x[:, -1:])
    return 0.5 * jnp.sum((x - data) ** 2) + weight * jnp.sum(jnp.sqrt(down**2 + right**2 + eps**2))


def tv_gradient(params, x, data):
    """By hand, in numpy."""
    weight, eps = params
    down, right = np.diff(x, axis=0, append=x[-1:]), np.diff(x, axis=1, append=x[:, -1:])
    root = np.sqrt(down**2 + right**2 + eps**2)
    flux = down / root, right / root
    back = [np.diff(f, axis=axis, prepend=np.zeros_like(np.take(f, [0], axis))) for axis, f in enumerate(flux)]
    return x - data - weight * (back[0] + back[1])


def square(seed):
    clean = np.zeros((32, 32))
    clean[8:24, 8:24], clean[12:20, 4:12] = 1.0, 0.5
    return clean + 0.1 * np.random.default_rng(seed).standard_normal(clean.shape)


def tv() -> Case:
    problem = jb.SmoothProblem(
        tv_energy,
        lambda params, data: jnp.zeros_like(data),
        strong_convexity=1.0,
        smoothness=lambda params, data: 1 + 8 * params[0] / params[1],
    )
    return Case(problem, (0.1, 0.01), square(0), square(1))


def tv_without_constants() -> Case:
    return tv()._replace(problem=jb.SmoothProblem(tv_energy, lambda params, data: jnp.zeros_like(data)))


def logistic_energy(params, x, data):
    features, labels = data
    return jnp.sum(jax.nn.softplus(-labels * (features @ x))) + 0.5 * params * jnp.sum(x**2)


def logistic() -> Case:
    def sample(seed):
        rng = np.random.default_rng(seed)
        features = rng.standard_normal((60, 5)) * np.array([1.0, 2.0, 0.5, 1.0, 3.0])
        return features, np.sign(features @ np.ones(5) + rng.standard_normal(60))

    problem = jb.SmoothProblem(
        logistic_energy,
        lambda params, data: jnp.zeros_like(data[0][0]),
        strong_convexity=lambda params, data: params,
        smoothness=lambda params, data: params + 0.25 * jnp.sum(data[0] ** 2),
    )
    return Case(problem, 0.5, sample(0), sample(1))


def weakly_convex_energy(params, x, data):
    """A denoiser with the redescending potential t^2/(t^2 + s), as in weakly convex regularisers."""
    potential = lambda t: jnp.sum(t**2 / (t**2 + 0.02))  # noqa: E731
    edges = potential(jnp.diff(x, axis=0)) + potential(jnp.diff(x, axis=1))
    return 0.05 * jnp.sum((x - data) ** 2) + params * edges


def weakly_convex() -> Case:
    problem = jb.SmoothProblem(weakly_convex_energy, lambda params, data: jnp.asarray(data))
    return Case(problem, 0.1, square(0)[4:16, 4:16], square(1)[4:16, 4:16])


VALLEY = Case(
    jb.SmoothProblem(
        lambda p, x, d: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2), lambda p, d: -jnp.ones(20)
    ),
    *((), (), ()),
)
CASES = {case.__name__: case() for case in (quadratic, tv, tv_without_constants, logistic, weakly_convex)}


def solve(case, solver, data=None, **options):
    return jb.solve(case.problem, case.params, case.data if data is None else data, solver=solver, **options)


def gradient_norm(case, x, data=None):
    energy = lambda x: case.problem.energy(case.params, x, case.data if data is None else data)  # noqa: E731
    return float(trees.norm(jax.grad(energy)(x)))


def flat(x):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])


def in_single(tree):
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), tree)


# solvers of others


def by_jaxopt(energy, x0, tol, max_steps):
    return jaxopt.LBFGS(energy, tol=tol, maxiter=max_steps).run(x0).params


def by_optimistix(energy, x0, tol, max_steps):
    bfgs = optimistix.BFGS(rtol=0.0, atol=0.01 * tol)
    return optimistix.minimise(lambda x, _: energy(x), bfgs, x0, max_steps=1000, throw=False).value


def descend(energy, x0, tol, max_steps):
    """Gradient steps for the quadratic, to rounding."""
    step = lambda _, x: jax.tree.map(lambda v, g: v - 0.15 * g, x, jax.grad(energy)(x))  # noqa: E731
    return jax.lax.fori_loop(0, 100, step, x0)
