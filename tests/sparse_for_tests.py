"""Weighted l1 problems as a user would write them, for the tests of their solver, hypergradients and methods."""

import jax.numpy as jnp
import numpy as np

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
