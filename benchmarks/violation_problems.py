"""Random problems with the constants of their proven bounds, and their solutions in extended precision.

What is drawn is stored in the precision it is solved in and then taken as exact: the unrounded solution of just that
problem is the truth.

References share no code with the library. They are Newton's method (on a support for weighted l1) with gradients in
`numpy.longdouble` and dense Hessians in float64, and end where a step is rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jbilevel as jb
from jbilevel import prox
from jbilevel._core.constants import Constants, SaddleConstants

LONG = np.longdouble
PARAMS = 3  # of a quadratic
THIRD = 4 / 27**0.5  # sup of the derivative of sech^2
STEPS, ROUNDS = 200, 6  # of Newton's method, of the refinement of a linear solve


class Exact(NamedTuple):
    """The solution of what is stored, and its value and hypergradient, in extended precision."""

    x: np.ndarray
    value: Any
    gradient: np.ndarray | None  # None where no bound on it is proven


class Family(NamedTuple):
    """A kind of problem: ``draw(rng, size, dtype)`` makes (params, data) of one, ``exact(params, data)`` solves it."""

    problem: jb.Problem
    draw: Callable
    exact: Callable
    sizes: tuple[int, ...]


def loss(params, x, data):
    return 0.5 * jnp.sum((jb.image_of(x) - data["target"]) ** 2)


# --------------------------------------------------------------------------------------------------- what references do


def long(tree: dict) -> dict:
    return {name: np.asarray(leaf, LONG) for name, leaf in tree.items()}


def linear_solve(matrix, rhs):
    """Iterative refinement: a float64 factorisation, residuals in extended precision."""
    inverse = np.linalg.inv(np.asarray(matrix, float))
    x = np.zeros_like(rhs)
    for _ in range(ROUNDS):
        x = x + inverse @ np.asarray(rhs - matrix @ x, float)
    return x


def minimise(energy: Callable, gradient: Callable, hessian: Callable, x):
    """Damped Newton; once the energy cannot tell steps apart, undamped as long as the gradient falls."""
    value, slope = energy(x), gradient(x)
    for _ in range(STEPS):
        step = -np.linalg.solve(np.asarray(hessian(x), float), np.asarray(slope, float)).astype(LONG)
        length, rounding = LONG(1), 1e-17 * abs(value)
        while energy(x + length * step) > value + 1e-4 * length * (slope @ step) + rounding and length > 1e-12:
            length /= 2
        moved = x + length * step
        following = gradient(moved)
        if not np.linalg.norm(following) < np.linalg.norm(slope) and abs(slope @ step) <= 10 * rounding:
            break
        x, value, slope = moved, energy(moved), following
        if not np.any(slope):
            break
    return x


def outcome(x, target, hessian=None, mixed=None) -> Exact:
    """mixed: d/dparams of the gradient of the energy at x, (unknowns, parameters)."""
    away = x - target
    gradient = None if mixed is None else -mixed.T @ linear_solve(hessian, away)
    return Exact(x, 0.5 * away @ away, gradient)


def above(number, dtype):
    """The number rounded up, with room for the rounding of the float64 computation that gave it."""
    return np.nextafter(np.asarray(float(number) * (1 + 1e-12), dtype), np.asarray(np.inf, dtype))


def below(number, dtype):
    return np.nextafter(np.asarray(float(number) * (1 - 1e-12), dtype), np.asarray(0, dtype))


def spectrum(matrix, dtype) -> dict:
    """mu and L of a symmetric matrix as it is stored."""
    values = np.linalg.eigvalsh(np.asarray(matrix, float))
    slack = 16 * np.finfo(float).eps * values[-1] * len(values) ** 0.5
    return {"mu": below(values[0] - slack, dtype), "L": above(values[-1] + slack, dtype)}


def norm(matrix, dtype):
    return above(np.linalg.norm(np.asarray(matrix, float), 2), dtype)


def conditioned(rng, size: int, dtype, decades: float = 6.0):
    """A symmetric matrix with eigenvalues from 1 down to 10^-U(0, decades), as positive as dtype can hold."""
    basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
    values = 10.0 ** -(rng.uniform(0, decades) * np.linspace(0, 1, size) ** rng.uniform(0.5, 2))
    matrix = np.tril(np.asarray((basis * values) @ basis.T, dtype))
    matrix = matrix + np.tril(matrix, -1).T
    least = np.linalg.eigvalsh(matrix.astype(float))[0]
    return matrix + np.diag(np.full(size, max(0.0, 0.5 * values[-1] - least), dtype))


# ----------------------------------------------------------------------------------------------------------- quadratics


def _quadratic(smoothness):
    """1/2 <x, H x> - <b + B params, x>."""
    return jb.SmoothProblem(
        lambda p, x, d: 0.5 * x @ (d["H"] @ x) - (d["b"] + d["B"] @ p) @ x,
        lambda p, d: jnp.zeros_like(d["b"]),
        strong_convexity=lambda p, d: d["mu"],
        smoothness=smoothness,
        hessian_lipschitz=0.0,
        mixed_lipschitz=0.0,
        mixed_norm=lambda p, d: d["J"],
    )


def draw_quadratic(rng, size, dtype):
    H = conditioned(rng, size, dtype)
    x = rng.standard_normal(size) * 10 ** rng.uniform(-2, 2)
    data = {"H": H, "b": H @ x if rng.random() < 0.5 else x, "B": rng.standard_normal((size, PARAMS))}
    data["target"] = x + rng.standard_normal(size) * 10 ** rng.uniform(-3, 1)
    data = {name: leaf.astype(dtype) for name, leaf in data.items()}
    return rng.standard_normal(PARAMS).astype(dtype), data | spectrum(H, dtype) | {"J": norm(data["B"], dtype)}


def exact_quadratic(params, data):
    d = long(data)
    x = linear_solve(d["H"], d["b"] + d["B"] @ params.astype(LONG))
    return outcome(x, d["target"], d["H"], -d["B"])


# -------------------------------------------------------------------------------------------------------------- ridges


def log_cosh(t):
    size = jnp.abs(t)
    return size + jnp.log1p(jnp.exp(-2 * size)) - jnp.log(2.0).astype(t.dtype)


def huber(t):
    size = jnp.abs(t)
    return jnp.where(size <= 1, 0.5 * t**2, size - 0.5)


def _ridge(potential, third):
    """a/2 ||x - y||^2 + w sum_k exp(params_k) potential((W x)_k/w).

    The potential has slope and curvature at most 1 and third derivative at most ``third``; J_k = exp(params_k) slope
    W_k, with ||W|| and the longest row of W in the data. With top = max_k exp(params_k): curvature top ||W||^2/w, its
    change top ||W||^2 third row/w^2, ||J|| <= top ||W||, its change top ||W|| row/w.
    """

    def energy(p, x, d):
        return 0.5 * d["a"] * jnp.sum((x - d["y"]) ** 2) + d["w"] * jnp.sum(jnp.exp(p) * potential(d["W"] @ x / d["w"]))

    def top(p):
        return jnp.max(jnp.exp(p))

    known = {} if third is None else {
        "hessian_lipschitz": lambda p, d: third * top(p) * d["norm"] ** 2 * d["row"] / d["w"] ** 2,
        "mixed_lipschitz": lambda p, d: top(p) * d["norm"] * d["row"] / d["w"],
        "mixed_norm": lambda p, d: top(p) * d["norm"],
    }  # fmt: skip
    return jb.SmoothProblem(
        energy,
        lambda p, d: d["y"],
        strong_convexity=lambda p, d: d["a"],
        smoothness=lambda p, d: d["a"] + top(p) * d["norm"] ** 2 / d["w"],
        **known,
    )


def draw_ridge(rng, size, dtype):
    W = rng.standard_normal((size, size)) / size**0.5
    y = np.cumsum(rng.standard_normal(size)) * 10 ** rng.uniform(-1, 1)
    data = {"W": W, "y": y, "a": 10 ** rng.uniform(-3, 1), "w": 10 ** rng.uniform(-2, 0)}
    data = {name: np.asarray(leaf, dtype) for name, leaf in data.items()}
    data["target"] = np.asarray(y + rng.standard_normal(size), dtype)
    rows = np.linalg.norm(data["W"].astype(float), axis=1)
    constants = {"norm": norm(data["W"], dtype), "row": above(rows.max(), dtype)}
    return rng.uniform(-2, 1, size).astype(dtype), data | constants


def _exact_ridge(potential, slope, curvature, certified):
    def exact(params, data):
        d = long(data)
        scale = np.exp(params.astype(LONG))
        inner = lambda x: d["W"] @ x / d["w"]  # noqa: E731
        bent = lambda x: (d["W"].T * (scale * curvature(inner(x)) / d["w"])) @ d["W"]  # noqa: E731
        hessian = lambda x: d["a"] * np.eye(len(x)) + bent(x)  # noqa: E731
        energy = lambda x: 0.5 * d["a"] * np.sum((x - d["y"]) ** 2) + d["w"] * scale @ potential(inner(x))  # noqa: E731
        gradient = lambda x: d["a"] * (x - d["y"]) + d["W"].T @ (scale * slope(inner(x)))  # noqa: E731
        x = minimise(energy, gradient, hessian, d["y"])
        if not certified:
            return outcome(x, d["target"])
        return outcome(x, d["target"], hessian(x), d["W"].T * (scale * slope(inner(x))))

    return exact


def long_log_cosh(t):
    return np.abs(t) + np.log1p(np.exp(-2 * np.abs(t))) - np.log(LONG(2))


def long_huber(t):
    return np.where(np.abs(t) <= 1, 0.5 * t**2, np.abs(t) - LONG(0.5))


def clipped(t):
    return np.clip(t, -1, 1)


def inside(t):
    return (np.abs(t) <= 1).astype(LONG)


EXACT_LOG_COSH = _exact_ridge(long_log_cosh, np.tanh, lambda t: 1 - np.tanh(t) ** 2, True)
EXACT_HUBER = _exact_ridge(long_huber, clipped, inside, False)


# ------------------------------------------------------------------------------------------------------ total variation

TV_EPS = 2.0**-6  # exact in every precision
TV = jb.variational(None, jb.regularizers.SmoothedTV(eps=TV_EPS))


def draw_tv(rng, size, dtype):
    """Steps with noise; the weight is the parameter."""
    clean = np.where(np.add.outer(np.arange(size), rng.uniform(-1, 1) * np.arange(size)) > size / 2, 1.0, 0.2)
    y = clean + 0.1 * rng.standard_normal((size, size))
    return np.asarray([rng.uniform(-5, 0)], dtype), {"y": y.astype(dtype), "target": clean.astype(dtype)}


def exact_tv(params, data):
    d = long(data)
    size, weight = len(d["y"]), np.exp(params.astype(LONG)[0])
    step = np.diff(np.eye(size), axis=0, append=np.eye(size)[-1:])  # of the last entry: 0
    D = np.stack([np.kron(step, np.eye(size)), np.kron(np.eye(size), step)]).astype(LONG)
    y, target = d["y"].ravel(), d["target"].ravel()

    def roots(x):
        flux = D @ x
        return flux, np.sqrt(flux[0] ** 2 + flux[1] ** 2 + LONG(TV_EPS) ** 2)

    def slope(x):
        flux, root = roots(x)
        return weight * sum(D[k].T @ (flux[k] / root) for k in range(2))

    def hessian(x):
        flux, root = roots(x)
        unit = flux / root
        rows = [(D[k], D[j], ((k == j) - unit[k] * unit[j]) / root) for k in range(2) for j in range(2)]
        return np.eye(len(x)) + weight * sum((a.T * scale) @ b for a, b, scale in rows)

    def energy(x):
        return 0.5 * np.sum((x - y) ** 2) + weight * np.sum(roots(x)[1])

    x = minimise(energy, lambda x: x - y + slope(x), hessian, y)
    return outcome(x, target, hessian(x), slope(x)[:, None])._replace(x=x.reshape(size, size))


# -------------------------------------------------------------------------------------------------------- saddle points


def _coupling(p, d):
    return d["K"][0] + jnp.tensordot(p["K"], d["K"][1:], 1)


def _zero_pair(p, d):
    return jnp.zeros_like(d["d"]), jnp.zeros_like(d["e"])


def _pull_constants(p, d):
    """d_a of a (x - d) is x - d, with a |x_hat - d|^2 + b |y_hat - e|^2 <= |K'e| |x_hat - d| + |K d| |y_hat - e|."""
    K = _coupling(p, d)
    pull = jnp.sqrt(jnp.sum((K.T @ d["e"]) ** 2) / p["a"] + jnp.sum((K @ d["d"]) ** 2) / p["b"])
    sides = (
        Constants(hessian_lipschitz=0.0, mixed_lipschitz=1.0, mixed_norm=pull / jnp.sqrt(p[mu])) for mu in ("a", "b")
    )
    return SaddleConstants(*sides, linear_mixed=d["J"])


SADDLE = jb.SaddleProblem(  # <K x, y> + a/2 |x - d|^2 - b/2 |y - e|^2 with K = K_0 + sum_k params_k K_k
    lambda p, x, d: _coupling(p, d) @ x,
    lambda p, v, step, d: prox.squared_distance(v, step, d["d"], p["a"]),
    lambda p, v, step, d: prox.squared_distance(v, step, d["e"], p["b"]),
    _zero_pair,
    mu_primal=lambda p, d: p["a"],
    mu_dual=lambda p, d: p["b"],
    norm=lambda p, d: d["norm"],
    constants=_pull_constants,
)
BOUNDED = jb.SaddleProblem(  # <K x, y> + a/2 |x - d|^2 - b/2 |y|^2, |y_k| <= exp(params_k): Huber's function of K x
    lambda p, x, d: d["K"] @ x,
    lambda p, v, step, d: prox.squared_distance(v, step, d["d"], d["a"]),
    lambda p, v, step, d: jnp.clip(v / (1 + step * d["b"]), -jnp.exp(p), jnp.exp(p)),
    _zero_pair,
    mu_primal=lambda p, d: d["a"],
    mu_dual=lambda p, d: d["b"],
    norm=lambda p, d: d["norm"],
)


def _moduli(rng):
    return {"a": 10 ** rng.uniform(-3, 1), "b": 10 ** rng.uniform(-3, 1)}


def draw_saddle(rng, size, dtype):
    rows = size + 2
    data = {"K": rng.standard_normal((1 + PARAMS, rows, size)) / size**0.5, "d": rng.standard_normal(size)}
    data |= {"e": rng.standard_normal(rows), "target": rng.standard_normal(size)}
    data = {name: leaf.astype(dtype) for name, leaf in data.items()}
    params = {name: np.asarray(mu, dtype) for name, mu in _moduli(rng).items()}
    params["K"] = rng.standard_normal(PARAMS).astype(dtype)
    J = np.sqrt(sum(np.linalg.norm(K.astype(float), 2) ** 2 for K in data["K"][1:]))
    whole = data["K"][0] + np.tensordot(params["K"].astype(float), data["K"][1:].astype(float), 1)
    room = 1 + 16 * np.finfo(dtype).eps  # K itself is rounded where it is formed
    return params, data | {"J": above(J, dtype), "norm": above(room * np.linalg.norm(whole, 2), dtype)}


def exact_saddle(params, data):
    d, p = long(data), long(params)
    K = d["K"][0] + np.tensordot(p["K"], d["K"][1:], 1)
    rows, size = K.shape
    system = np.block([[p["a"] * np.eye(size), K.T], [-K, p["b"] * np.eye(rows)]])
    pair = linear_solve(system, np.concatenate([p["a"] * d["d"], p["b"] * d["e"]]))
    x, y = pair[:size], pair[size:]
    of_coupling = [np.append(Q.T @ y, -Q @ x) for Q in d["K"][1:]]
    of_moduli = [np.append(x - d["d"], 0 * y), np.append(0 * x, y - d["e"])]
    mixed = np.stack([*of_coupling, *of_moduli], 1)  # in the order of the names: K, a, b
    # the loss does not see y
    return outcome(pair, np.append(d["target"], y), system.T, mixed)._replace(x=x)


def draw_bounded(rng, size, dtype):
    rows = size + 2
    data = {"K": rng.standard_normal((rows, size)) / size**0.5, "d": np.cumsum(rng.standard_normal(size))}
    data |= {"e": np.zeros(rows), "target": rng.standard_normal(size), **_moduli(rng)}
    data = {name: np.asarray(leaf, dtype) for name, leaf in data.items()}
    return rng.uniform(-3, 1, rows).astype(dtype), data | {"norm": norm(data["K"], dtype)}


def exact_bounded(params, data):
    d, bound = long(data), np.exp(params.astype(LONG))
    unit = d["b"] * bound
    inner = lambda x: d["K"] @ x / unit  # noqa: E731
    energy = lambda x: 0.5 * d["a"] * np.sum((x - d["d"]) ** 2) + (unit * bound) @ long_huber(inner(x))  # noqa: E731
    gradient = lambda x: d["a"] * (x - d["d"]) + d["K"].T @ (bound * clipped(inner(x)))  # noqa: E731
    hessian = lambda x: d["a"] * np.eye(len(x)) + (d["K"].T * inside(inner(x)) / d["b"]) @ d["K"]  # noqa: E731
    return outcome(minimise(energy, gradient, hessian, d["d"]), d["target"])


# ---------------------------------------------------------------------------------------------------------- weighted l1


def _lasso(smoothness):
    return jb.WeightedL1Problem(
        lambda p, x, d: 0.5 * jnp.sum((d["A"] @ x - d["b"]) ** 2) + 0.5 * d["ridge"] * jnp.sum(x**2),
        lambda p, d: jnp.zeros_like(d["target"]),
        strong_convexity=lambda p, d: d["mu"],
        smoothness=smoothness,
    )


def draw_lasso(rng, size, dtype):
    rows = size + rng.integers(1, size) if size > 2 else size  # one shape for all that are solved together
    A = (rng.standard_normal((2 * size, size)) / size**0.5).astype(dtype)
    A[rows:] = 0
    b = A @ np.where(rng.random(size) < 0.3, rng.standard_normal(size), 0) + 0.1 * rng.standard_normal(2 * size)
    square = A.astype(float).T @ A.astype(float)
    ridge = np.asarray(10 ** rng.uniform(-6, 0), dtype)
    known = spectrum(square + float(ridge) * np.eye(size), dtype)
    highest = np.abs(A.T @ b).max()
    params = np.log(highest * 10 ** rng.uniform(-3, 0) * rng.uniform(0.5, 2, size))
    data = {"A": A, "b": b.astype(dtype), "ridge": ridge, "target": rng.standard_normal(size).astype(dtype)}
    return params.astype(dtype), data | known


def exact_lasso(params, data):
    """Newton's method on the support, along weights that fall to their own; its conditions are checked at the end."""
    d, weights = long(data), np.exp(params.astype(LONG))
    H, c = d["A"].T @ d["A"] + d["ridge"] * np.eye(len(weights)), d["A"].T @ d["b"]
    step = 1 / np.linalg.norm(H.astype(float), 2)

    def on(signs, weights):
        where = np.flatnonzero(signs)
        x = np.zeros_like(c)
        if where.size:
            x[where] = linear_solve(H[np.ix_(where, where)], c[where] - weights[where] * signs[where])
        return x

    def signs_at(x, weights):
        v = x + step * (c - H @ x)
        return np.sign(v) * (np.abs(v) > step * weights)

    signs = np.zeros_like(c)
    for factor in np.append(np.geomspace(max(1.0, float(np.max(np.abs(c) / weights))), 1, 60), [1.0] * 60):
        signs = signs_at(on(signs, factor * weights), factor * weights)
    x = on(signs, weights)
    slope = c - H @ x
    settled = np.array_equal(np.sign(x), signs) and np.all(np.abs(slope[signs == 0]) <= weights[signs == 0])
    return outcome(x, d["target"]) if settled else None


# ------------------------------------------------------------------------------------------------------------- families


def _given(p, d):
    return d["L"]


FAMILIES = {
    "quadratic": Family(_quadratic(_given), draw_quadratic, exact_quadratic, (2, 20, 200)),
    "quadratic, L unknown": Family(_quadratic(None), draw_quadratic, exact_quadratic, (20,)),
    "ridge, log cosh": Family(_ridge(log_cosh, THIRD), draw_ridge, EXACT_LOG_COSH, (12,)),
    "ridge, psi": Family(_ridge(huber, None), draw_ridge, EXACT_HUBER, (12,)),
    "smoothed TV": Family(TV, draw_tv, exact_tv, (6,)),
    "saddle": Family(SADDLE, draw_saddle, exact_saddle, (6,)),
    "saddle, bounded dual": Family(BOUNDED, draw_bounded, exact_bounded, (6,)),
    "weighted l1": Family(_lasso(_given), draw_lasso, exact_lasso, (12,)),
    "weighted l1, L unknown": Family(_lasso(None), draw_lasso, exact_lasso, (12,)),
}
