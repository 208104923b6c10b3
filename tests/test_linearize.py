"""Derivatives written by hand: used where they are given, checked by `verify`, the same hypergradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from problems_for_tests import relative

import jbilevel as jb

SHAPES = {None: (7, 6), 3: (3, 5, 4)}
REGULARIZERS = [
    jb.regularizers.SmoothedTV(),
    jb.regularizers.SmoothedTV(eps=0.05),
    jb.regularizers.SmoothedTV(channels=3, coupling="separate"),
    jb.regularizers.SmoothedTV(channels=3),  # not by hand
    jb.regularizers.SmoothedTV(kind="anisotropic"),  # not by hand
]


def energy(p, x, d):
    return 0.5 * jnp.sum((x - d["y"]) ** 2) + 0.25 * jnp.exp(p) * jnp.sum(x**4)


def by_hand(p, x, d):
    return energy(p, x, d), x - d["y"] + jnp.exp(p) * x**3, lambda v: v + 3 * jnp.exp(p) * x**2 * v


def problem(linearize=by_hand):
    return jb.SmoothProblem(energy, lambda p, d: 0.0 * d["y"], strong_convexity=1.0, linearize=linearize)


def sample(R):
    rng = np.random.default_rng(0)
    return R.init(), {name: jnp.asarray(rng.uniform(size=SHAPES[R.channels])) for name in ("x", "y")}


@pytest.mark.parametrize("R", REGULARIZERS, ids=repr)
def test_of_a_regulariser_it_is_what_jax_finds(R):
    params, data = sample(R)
    jb.variational(None, R).verify(params, data, tol=1e-12)
    halved = jb.variational(lambda x: 0.5 * x, R, ridge=0.1, in_shape=SHAPES[R.channels])
    halved.verify(params, data, tol=1e-12)


@pytest.mark.parametrize("R", REGULARIZERS[:2], ids=repr)
def test_hypergradients_are_the_same(R):
    params, data = sample(R)
    batch = jax.tree.map(lambda leaf: leaf[None], data)
    ours = jb.variational(None, R)
    theirs = replace(ours, linearize=None)
    first, second = (
        jb.implicit.Oracle(p, jb.losses.squared_error())(params, batch, tol=1e-11, adjoint_tol=1e-11)
        for p in (ours, theirs)
    )
    jb.check(first)
    assert relative(first.grad, second.grad) <= 1e-9


def test_it_is_what_is_used():
    """A product that is wrong shows, so solves and adjoints do not differentiate the energy themselves."""
    calls = []

    def told(p, x, d):
        calls.append(None)
        return by_hand(p, x, d)

    data = {"y": jnp.array([1.0, 2.0]), "x": jnp.zeros(2)}
    x, info = jb.solve(problem(told), 0.3, data, tol=1e-10)
    assert calls and info.status == 0
    np.testing.assert_allclose(x + jnp.exp(0.3) * x**3, data["y"], atol=1e-9)


def test_second_derivatives_pass_through_it():
    data = {"y": jnp.array([1.0, 2.0]), "x": jnp.zeros(2)}

    def value(p, linearize):
        return jnp.sum(jb.implicit.argmin(problem(linearize))(p, data, tol=1e-12, adjoint_tol=1e-12) ** 2)

    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        ours, theirs = (derivative(lambda p, h=h: value(p, h))(0.3) for h in (by_hand, None))
        assert float(ours) == pytest.approx(float(theirs), rel=1e-7)


@pytest.mark.parametrize(
    "wrong, what",
    [
        (lambda p, x, d: (2 * energy(p, x, d), *by_hand(p, x, d)[1:]), "energy"),
        (lambda p, x, d: (energy(p, x, d), x - d["y"], by_hand(p, x, d)[2]), "gradient"),
        (lambda p, x, d: (*by_hand(p, x, d)[:2], lambda v: v), "product"),
    ],
)
def test_verify_names_what_is_wrong(wrong, what):
    problem().verify(0.3, {"y": jnp.array([1.0, 2.0])})
    with pytest.raises(ValueError, match=f"`linearize` of a SmoothProblem gives another {what} than"):
        problem(wrong).verify(0.3, {"y": jnp.array([1.0, 2.0])})


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="SmoothProblem `linearize` must be a function, got int"):
        problem(3)


def test_none_as_a_result_means_jax():
    data = {"y": jnp.array([1.0, 2.0]), "x": jnp.zeros(2)}
    found = [jb.solve(problem(h), 0.3, data, tol=1e-8)[0] for h in (lambda p, x, d: None, None)]
    np.testing.assert_allclose(*found, atol=1e-12)


def test_single_precision_stays_single():
    R = jb.regularizers.SmoothedTV()
    params, data = sample(R)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, data))
    value, gradient, product = R.linearize(single[0], single[1]["y"])
    assert {leaf.dtype for leaf in (value, gradient, product(gradient))} == {jnp.dtype(jnp.float32)}
    assert ravel_pytree(gradient)[0].shape == (42,)
