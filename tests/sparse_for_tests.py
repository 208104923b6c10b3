"""Weighted l1 problems as a user would write them, for the tests of their solver, hypergradients and methods."""

import jax
import jax.numpy as jnp
import numpy as np
from problems_for_tests import DIAGONAL, QUADRATIC, Case, image_loss, quadratic_energy

import jbilevel as jb

RIDGE = 0.1


def zeros(params, data):
    return jnp.zeros(data["A"].shape[1])


def squares(params, x, data):
    return 0.5 * jnp.sum((data["A"] @ x - data["b"]) ** 2)


def squares_and_ridge(params, x, data):
    return squares(params, x, data) + 0.5 * RIDGE * jnp.sum(x**2)


def logistic(params, x, data):
    return jnp.sum(jnp.logaddexp(0.0, -data["b"] * (data["A"] @ x))) + 0.5 * RIDGE * jnp.sum(x**2)


def held_out(params, x, data):
    return 0.5 * jnp.sum((data["A_val"] @ x - data["b_val"]) ** 2)


def held_out_logistic(params, x, data):
    return jnp.sum(jnp.logaddexp(0.0, -data["b_val"] * (data["A_val"] @ x)))


LASSO = jb.WeightedL1Problem(squares, zeros)
NET = jb.WeightedL1Problem(
    squares_and_ridge, zeros, strong_convexity=RIDGE,
    smoothness=lambda p, d: RIDGE + jnp.linalg.norm(d["A"], 2) ** 2,
)  # fmt: skip
LOGISTIC = jb.WeightedL1Problem(logistic, zeros, strong_convexity=RIDGE)


def regression(rows, columns, seed, share=0.3, labels=False):
    """Gaussian design, sparse normal coefficients, for the lower and the upper level; with labels, their signs."""
    rng = np.random.default_rng([rows, columns, seed])
    A, A_val = rng.standard_normal((2, rows, columns))
    truth = np.where(rng.random(columns) < share, rng.standard_normal(columns), 0.0)
    b, b_val = A @ truth, A_val @ truth
    b, b_val = (v + 0.1 * rng.standard_normal(rows) for v in (b, b_val))
    if labels:
        b, b_val = np.sign(b), np.sign(b_val)
    return {"A": A, "b": b, "A_val": A_val, "b_val": b_val}


def one(data):
    """A batch of one sample."""
    return {name: value[None] for name, value in data.items()}


def log_weights(count, seed, low=0.0, high=2.0):
    return jnp.asarray(np.random.default_rng(seed).uniform(low, high, count))


# groups of two, and an unknown that is a pytree with a weight per leaf


def paired(params, x, data):
    return squares_and_ridge(params, x.reshape(-1), data)


GROUPS = jb.WeightedL1Problem(
    paired, lambda p, d: jnp.zeros((d["A"].shape[1] // 2, 2)), strong_convexity=RIDGE, groups=-1
)


def split(params, x, data):
    return squares_and_ridge(params, jnp.concatenate([x["u"], x["v"]]), data) * (1 + params["scale"] ** 2)


TREE = jb.WeightedL1Problem(
    split,
    lambda p, d: {"u": jnp.zeros(5), "v": jnp.zeros(d["A"].shape[1] - 5)},
    weights=lambda p: {"u": jnp.exp(p["u"]), "v": jnp.exp(p["v"])},
    strong_convexity=RIDGE,
)


# two that have exact solutions, for what holds of every oracle: one whose entries are apart, and one where they are not


def soft_exact(p, data):
    """Of `quadratic_energy` + e^p/2 sum |x_i|."""
    kept = jnp.maximum(jnp.abs(data["y"]) - 0.5 * jnp.exp(p), 0) * jnp.sign(data["y"])
    return image_loss(p, kept / (1 + jnp.exp(p) * DIAGONAL), data)


SOFT = Case(
    "soft",
    jb.WeightedL1Problem(
        quadratic_energy,
        lambda p, data: jnp.zeros_like(data["y"]),
        weights=lambda p: 0.5 * jnp.exp(p),
        strong_convexity=QUADRATIC.problem.strong_convexity,
        smoothness=QUADRATIC.problem.smoothness,
    ),
    image_loss,
    QUADRATIC.params,
    QUADRATIC.batch,
    soft_exact,
)

DESIGN = np.random.default_rng(3).standard_normal((12, 10))
GRAM = DESIGN.T @ DESIGN


def elastic(params, x, data):
    return 0.5 * jnp.sum((DESIGN @ x - data["y"]) ** 2) + 0.5 * jnp.exp(params["ridge"]) * jnp.sum(x**2)


def elastic_exact(params, data):
    """The support from a long run of ISTA, the solution on it from a dense system."""
    hessian, b = GRAM + jnp.exp(params["ridge"]) * jnp.eye(10), DESIGN.T @ data["y"]
    weights, step = jnp.exp(params["log_weights"]), 1 / (np.linalg.norm(GRAM, 2) + jnp.exp(params["ridge"]))

    def ista(_, x):
        moved = x - step * (hessian @ x - b)
        return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - step * weights, 0)

    signs = jax.lax.stop_gradient(jnp.sign(jax.lax.fori_loop(0, 10_000, ista, jnp.zeros(10))))
    moves = signs != 0
    system = jnp.where(moves[:, None] & moves[None, :], hessian, jnp.eye(10))
    return image_loss(params, jnp.linalg.solve(system, jnp.where(moves, b - weights * signs, 0)), data)


def responses(seed, count):
    """Measurements of sparse vectors, with noise of standard deviation 0.1."""
    rng = np.random.default_rng([10, seed])
    truth = np.where(rng.random((count, 10)) < 0.5, rng.standard_normal((count, 10)), 0)
    return {"y": jnp.asarray(truth @ DESIGN.T + 0.1 * rng.standard_normal((count, 12))), "x": jnp.asarray(truth)}


ELASTIC = Case(
    "elastic",
    jb.WeightedL1Problem(
        elastic,
        lambda params, data: jnp.zeros(10),
        weights=lambda params: jnp.exp(params["log_weights"]),
        strong_convexity=lambda params, data: jnp.exp(params["ridge"]) + np.linalg.eigvalsh(GRAM)[0],
        smoothness=lambda params, data: jnp.exp(params["ridge"]) + np.linalg.norm(GRAM, 2),
    ),
    image_loss,
    lambda seed: {"ridge": jnp.asarray(-1.0), "log_weights": log_weights(10, seed, -1.0, 1.5)},
    responses,
    elastic_exact,
)
