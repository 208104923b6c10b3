"""Float32 products in full: what every solve, oracle and derivative asks of each product of a user's energy.

TF32, the default of recent NVIDIA GPUs, keeps three digits. A CPU has none, therefore the programs are read, not run.
"""

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

import jbilevel as jb

PRODUCTS = ("dot_general", "conv_general_dilated")
HIGHEST = jax.lax.Precision.HIGHEST
SIZE = 6


# a user's problems, with a matrix product and a convolution each


def features(params, x, data):
    filtered = jax.lax.conv(x.reshape(1, 1, 1, SIZE), params["filters"], (1, 1), "SAME").ravel()
    return jnp.concatenate([data["A"] @ x, filtered])


def energy(params, x, data):
    return 0.5 * jnp.sum((x - data["y"]) ** 2) + jnp.sum(jnp.sqrt(1 + features(params, x, data) ** 2))


def start(params, data):
    return jnp.zeros_like(data["y"])


SMOOTH = jb.SmoothProblem(energy, start, strong_convexity=1.0, smoothness=lambda p, d: 100.0)
NEWTON = jb.SmoothProblem(energy, start, strong_convexity=1.0)
SADDLE = jb.SaddleProblem(
    features,
    lambda p, v, step, d: jb.prox.squared_distance(v, step, d["y"]),
    lambda p, v, step, d: jnp.clip(v, -1, 1),
    lambda p, d: (start(p, d), jnp.zeros(3 + 2 * SIZE, d["y"].dtype)),
    mu_primal=1.0,
)
SPARSE = jb.WeightedL1Problem(energy, start, weights=lambda p: jnp.exp(p["log_weights"]), strong_convexity=1.0)


def parts(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    params = {"filters": rng.standard_normal((2, 1, 1, 3)), "log_weights": np.full(SIZE, -1.0)}
    data = {"A": rng.standard_normal((3, SIZE)), "y": rng.standard_normal(SIZE)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, data))


def batched(data):
    return jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), data)


def loss(params, x, data):
    """Of any unknown, with a product of its own."""
    return sum(jnp.sum((v - 1) ** 2) for v in jax.tree.leaves(x))


def loss_with_products(params, x, data):
    return jnp.sum(features(params, x, data) ** 2)


def pair_loss_with_products(params, pair, data):
    return loss_with_products(params, pair[0], data)


# what a program asks for


def equations(jaxpr) -> Iterator:
    """All equations of a program, those inside others included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, (ClosedJaxpr, Jaxpr))
        ):
            if isinstance(value, (ClosedJaxpr, Jaxpr)):
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def precisions(function, *arguments) -> dict[str, set]:
    """What each kind of product asks for, over all of them."""
    found = {name: set() for name in PRODUCTS}
    for equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name in PRODUCTS:
            found[equation.primitive.name].add(equation.params["precision"])
    return found


FULL = {name: {(HIGHEST, HIGHEST)} for name in PRODUCTS}

ORACLES = {
    "implicit": lambda **o: jb.implicit.Oracle(NEWTON, loss_with_products, **o),
    "implicit, corrected": lambda **o: jb.implicit.Oracle(
        SMOOTH, loss_with_products, solver=jb.solvers.AGD(), correct=True, **o
    ),
    "implicit, L-BFGS and MINRES": lambda **o: jb.implicit.Oracle(
        SMOOTH, loss_with_products, solver=jb.solvers.LBFGS(), linear_solver=jb.solvers.MINRES(), **o
    ),
    "piggyback": lambda **o: jb.piggyback.Oracle(SADDLE, pair_loss_with_products, **o),
    "piggyback, simultaneous": lambda **o: jb.piggyback.Oracle(
        SADDLE, pair_loss_with_products, mode="simultaneous", correct=True, **o
    ),
    "nonsmooth": lambda **o: jb.nonsmooth.Oracle(SPARSE, loss_with_products, **o),
    "unroll": lambda **o: jb.unroll.Oracle(SMOOTH, loss_with_products, steps=5, checkpoint=True, **o),
    "one step": lambda **o: jb.unroll.OneStep(SMOOTH, loss_with_products, **o),
    "explicit": lambda **o: jb.explicit.Oracle(lambda p, d: energy(p, d["y"], d), **o),
}


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("name", ORACLES)
def test_oracles(name, chunk):
    oracle, (params, data) = ORACLES[name](chunk=chunk), parts()
    for ask in (oracle, oracle.value):
        assert precisions(lambda p, b, t, ask=ask: ask(p, b, tol=t), params, batched(data), 1e-3) == FULL


@pytest.mark.parametrize("problem", [SMOOTH, NEWTON, SADDLE, SPARSE])
def test_solve(problem):
    params, data = parts()
    assert precisions(lambda p, d: jb.solve(problem, p, d, tol=1e-3), params, data) == FULL


SOLUTIONS = {
    "implicit": jb.implicit.argmin(SMOOTH),
    "implicit, Newton": jb.implicit.argmin(NEWTON),
    "piggyback": jb.piggyback.saddle_point(SADDLE),
    "nonsmooth": jb.nonsmooth.argmin(SPARSE),
}


def through(solution):
    return lambda params, data: loss(params, solution(params, data, tol=1e-3), data)


@pytest.mark.parametrize("name", SOLUTIONS)
def test_gradients_of_solutions(name):
    """In params and in data, also under vmap."""
    params, data = parts()
    gradient = jax.grad(through(SOLUTIONS[name]), (0, 1))
    assert precisions(gradient, params, data) == FULL
    assert precisions(jax.vmap(gradient, (None, 0)), params, batched(data)) == FULL


@pytest.mark.parametrize("name", ["implicit", "implicit, Newton"])
def test_second_derivatives_of_solutions(name):
    params, data = parts()
    value = through(SOLUTIONS[name])
    squared = lambda p, d: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(value)(p, d)))  # noqa: E731
    assert precisions(jax.grad(squared), params, data) == FULL
    ones = jax.tree.map(jnp.ones_like, params)
    forward = lambda p, d: jax.jvp(lambda p: jax.grad(value)(p, d), (p,), (ones,))  # noqa: E731
    assert precisions(forward, params, data) == FULL


def test_the_float32_part_of_a_solve_in_float64():
    params, data = parts(jnp.float64)
    mixed = jb.SmoothProblem(energy, start, strong_convexity=1.0, mixed_precision=True)
    oracle = jb.implicit.Oracle(mixed, loss_with_products)
    assert precisions(lambda p, b: oracle(p, b, tol=1e-3), params, batched(data)) == FULL
    assert precisions(lambda p, d: jb.solve(mixed, p, d, tol=1e-3), params, data) == FULL


# inside operators, which are traced a second time when the program around them is lowered


def mixed(x):
    return jnp.asarray(np.arange(1.0, 3 * SIZE + 1).reshape(3, SIZE), x.dtype) @ x


MIXED = jb.operators.from_functions(mixed, None, (SIZE,), (3,))
OPERATOR = jb.SmoothProblem(
    lambda p, x, d: energy(p, x, d) + jnp.sum(MIXED(x) ** 2), start, strong_convexity=1.0, smoothness=lambda p, d: 1e4
)


def lowered_precisions(function, *arguments) -> set:
    return set(re.findall(r"precision = \[(\w+), (\w+)\]", jax.jit(function).lower(*arguments).as_text()))


def test_products_inside_operators():
    params, data = parts()
    full = {("HIGHEST", "HIGHEST")}
    oracle = jb.implicit.Oracle(OPERATOR, loss, solver=jb.solvers.AGD())
    assert lowered_precisions(lambda p, b: oracle(p, b, tol=1e-3), params, batched(data)) == full
    assert lowered_precisions(lambda p, d: jb.solve(OPERATOR, p, d, tol=1e-3), params, data) == full
    gradient = jax.grad(through(jb.implicit.argmin(OPERATOR, solver=jb.solvers.AGD())))
    assert lowered_precisions(gradient, params, data) == full
    assert lowered_precisions(jax.vmap(gradient, (None, 0)), params, batched(data)) == full
    # the caller's elsewhere, however often the operator was traced before
    for precision, expected in ((None, "DEFAULT"), ("highest", "HIGHEST"), (None, "DEFAULT")):
        with jax.default_matmul_precision(precision):
            for function in (MIXED, jax.jit(jax.vmap(lambda x: MIXED.T(MIXED(x))))):
                assert lowered_precisions(function, batched(data["y"])) == {(expected, expected)}


# networks may have less


def asked(precision, **around):
    params, data = parts()
    oracle = ORACLES["explicit"](matmul_precision=precision)
    with jax.default_matmul_precision(around.get("ambient")):
        return precisions(oracle, params, batched(data))


def test_explicit_oracles_ask_for_what_they_are_told():
    default = {name: {None} for name in PRODUCTS}
    assert asked("highest") == asked("highest", ambient="bfloat16") == FULL
    assert asked(None) == default
    assert asked(None, ambient="highest") == FULL
    short = asked("tensorfloat32")
    assert short != FULL and short != default
    assert short == precisions_of_plain("tensorfloat32")
    with pytest.raises(ValueError):
        jb.explicit.Oracle(lambda p, d: 0.0, matmul_precision="three digits")


def precisions_of_plain(precision):
    """Of the loss by itself in the ambient precision, as JAX says it."""
    params, data = parts()
    with jax.default_matmul_precision(precision):
        return precisions(jax.grad(lambda p, d: energy(p, d["y"], d)), params, data)


def test_a_product_of_the_default_precision_is_seen():
    """The tests above could not fail otherwise."""
    params, data = parts()
    assert precisions(energy, params, data["y"], data) == {name: {None} for name in PRODUCTS}
    inside = jax.checkpoint(lambda x: jax.lax.scan(lambda x, _: (data["A"].T @ (data["A"] @ x), None), x, length=2)[0])
    assert precisions(jax.grad(lambda x: jnp.sum(inside(x))), data["y"])["dot_general"] == {None}
    unguarded = jax.grad(lambda p, x, d: jnp.sum(jax.grad(energy, 1)(p, x, d) ** 2))
    assert precisions(unguarded, params, data["y"], data) == {name: {None} for name in PRODUCTS}
