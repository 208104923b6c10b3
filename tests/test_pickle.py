"""What may go to another process: problems, solutions, oracles and methods, as far as the user's functions can."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jbilevel as jb
from jbilevel import task


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2)


def distance(p, x, d):
    return 0.5 * jnp.sum((x - d) ** 2)


def start(p, d):
    return jnp.zeros_like(d)


def loss(p, x, d):
    return jnp.sum((jax.tree.leaves(x)[0] - 1.0) ** 2)


def value(p, d):
    return jnp.sum((p - d) ** 2)


def linear(p, x, d):
    return x


def prox_primal(p, v, step, d):
    return jb.prox.squared_distance(v, step, d)


def halved(v, step):
    return v / (1.0 + step)


CONJUGATE = jb.prox.conjugate(halved)


def prox_dual(p, v, step, d):
    return sent(CONJUGATE)(v, step)


def both(p, d):
    return jnp.zeros_like(d), jnp.zeros_like(d)


SMOOTH = jb.SmoothProblem(energy, start, strong_convexity=1.0)
SPARSE = jb.WeightedL1Problem(distance, start, strong_convexity=1.0)  # with the default weights
SADDLE = jb.SaddleProblem(linear, prox_primal, prox_dual, both, mu_primal=1.0, mu_dual=1.0, norm=1.0)
THETA, DATA = jnp.array(0.1), jnp.linspace(-2.0, 2.0, 8).reshape(2, 4)


def sent(thing):
    return pickle.loads(pickle.dumps(thing))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jb.implicit.argmin(SMOOTH, with_info=True),
        lambda: jb.piggyback.saddle_point(SADDLE, with_info=True),
        lambda: jb.nonsmooth.argmin(SPARSE, with_info=True),
    ],
    ids=["smooth", "saddle", "weighted l1"],
)
def test_solutions_as_functions(make):
    solution, theirs = make(), sent(make())
    assert theirs == solution and hash(theirs) == hash(solution)

    def gradient(solution):
        return jax.grad(lambda p, d: jnp.sum(jax.tree.leaves(solution(p, d, tol=1e-6)[0])[0]), (0, 1))(THETA, DATA[0])

    jax.tree.map(np.testing.assert_array_equal, gradient(theirs), gradient(solution))


def test_weights_given_as_the_exponential_are_the_default_ones():
    assert sent(replace(SPARSE, weights=jnp.exp)) == SPARSE


METHODS = {
    "MAID": lambda: jb.MAID(SMOOTH.oracle(loss)),
    "HOAG": lambda: jb.HOAG(SADDLE.oracle(loss)),
    "NBA": lambda: jb.NBA(SPARSE.oracle(loss)),
    "FirstOrder": lambda: jb.FirstOrder(SMOOTH.oracle(loss), partial(optax.adam, 0.1), average=0.5),
    "Stochastic, growing": lambda: jb.Stochastic(SMOOTH.oracle(loss)),
    "Stochastic": lambda: jb.Stochastic(SMOOTH.oracle(loss), partial(optax.adam, 0.1), accuracy="decay"),
    "rates": lambda: jb.FirstOrder(jb.explicit.Oracle(value), task.default_rates),
    "Optax": lambda: jb.HOAG(SMOOTH.oracle(loss, solver=jb.solvers.Optax(partial(optax.sgd, 0.3)))),
    "axes": lambda: jb.MAID(SMOOTH.oracle(loss, in_axes=({"y": 0, "frozen": None}, [0]))),
    "variational": lambda: jb.MAID(
        jb.variational(
            jb.operators.ParallelBeam((4, 4), np.arange(3.0), 6), jb.regularizers.SmoothedTV(eps=0.1), form="saddle"
        ).oracle(jb.losses.squared_error())
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name):
    method = METHODS[name]()
    theirs = sent(method)
    assert repr(theirs) == repr(method) and type(theirs.oracle) is type(method.oracle)
    if name not in ("FirstOrder", "Stochastic", "Optax"):  # a functools.partial equals no other one
        assert theirs == method
    if name in ("MAID", "FirstOrder"):
        runs = [jb.fit(each, THETA, DATA, steps=2) for each in (method, theirs)]
        np.testing.assert_array_equal(*(result.history["value"] for result in runs))


def test_networks():
    nnx = pytest.importorskip("flax.nnx")
    A = jb.operators.ParallelBeam((4, 4), np.arange(3.0), 6)
    f, params = jb.nets.from_flax(jb.nets.LPD(A, layers=1, width=2, depth=2, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(sent(f)(params, jnp.ones((3, 6))), f(params, jnp.ones((3, 6))))


def test_an_optimiser_that_cannot_go_says_so():
    method = jb.FirstOrder(jb.explicit.Oracle(value), optax.adam(0.1))
    assert copy.deepcopy(method) == copy.copy(method) == method
    for thing in (method, jb.solvers.Optax(optax.adam(0.1))):
        with pytest.raises(
            TypeError, match=r"cannot be pickled, since .* such as functools.partial\(optax.adam, 1e-3\)"
        ):
            pickle.dumps(thing)
    for wrong in (0.1, partial(dict), None):
        with pytest.raises(
            TypeError, match="`optimizer` of FirstOrder must be one of optax, .* or a function that makes"
        ):
            jb.FirstOrder(jb.explicit.Oracle(value), wrong)


def test_a_function_that_makes_an_optimiser_is_that_optimiser():
    oracle = jb.explicit.Oracle(value)
    made, given = (
        jb.fit(jb.FirstOrder(oracle, optimizer), THETA, DATA[0], steps=5)
        for optimizer in (partial(optax.adam, 0.1), optax.adam(0.1))
    )
    np.testing.assert_array_equal(made.history["value"], given.history["value"])
