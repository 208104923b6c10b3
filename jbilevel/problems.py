"""Lower-level problems: what is solved, and the constants that are known about it.

A problem is static (hashable) and holds only functions of ``(params, x, data)`` for one sample; its view at one
``(params, data)`` is what solvers see.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel import trees
from jbilevel.constants import Constants

# below, an image stays in the processor's cache and float32 gains little
MIXED_SIZE = 2**14

Constant = float | Callable[[Any, Any], Any] | None


class SmoothView(NamedTuple):
    """A smooth energy at fixed params and data, as solvers use it."""

    value: Callable
    constants: Constants
    reduced: Callable | None = None  # x -> the view in float32, None where x should stay in its dtype

    def single(self, x):
        """The view for x in float32, None where x is not float64, is small, or the energy insists on float64."""
        return None if self.reduced is None else self.reduced(x)

    def gradient(self, x):
        return trees.cast_like(jax.grad(self.value)(x), x)

    def value_and_gradient(self, x):
        value, gradient = jax.value_and_grad(self.value)(x)
        return value, trees.cast_like(gradient, x)

    def linearize(self, x):
        """(value, gradient, Hessian product) at x from one evaluation.

        The product reuses what the evaluation stored; energies that only have reverse mode (a ``custom_vjp``, a
        callback) fall back to the transposed derivative of the gradient, which is the same map.
        """

        def gradient_and_value(x):
            value, gradient = self.value_and_gradient(x)
            return gradient, value

        try:
            gradient, product, value = jax.linearize(gradient_and_value, x, has_aux=True)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            gradient, pullback, value = jax.vjp(gradient_and_value, x, has_aux=True)
            product = lambda v: pullback(v)[0]  # noqa: E731
        return value, gradient, product

    def slope(self, x, direction):
        """<gradient(x), direction>, by forward mode where the energy has it."""
        try:
            return jax.jvp(self.value, (x,), (direction,))[1]
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            return trees.dot(jax.grad(self.value)(x), direction)

    @property
    def tolerance_scale(self):
        """Gradient norm per ||x - x_hat||: mu when it is known and positive, else 1."""
        mu = self.constants.strong_convexity
        return 1.0 if mu is None else jnp.where(mu > 0, mu, 1.0)

    def error_bound(self, residual):
        """||x - x_hat|| <= ||gradient|| / mu for strongly convex energies (paper 3, Lemma 1), inf otherwise."""
        mu = self.constants.strong_convexity
        if mu is None:
            return jnp.full_like(residual, jnp.inf)
        known = (mu > 0) & ~jnp.isnan(residual)
        return jnp.where(known, residual / jnp.where(mu > 0, mu, 1.0), jnp.inf).astype(residual.dtype)


@dataclass(frozen=True)
class SmoothProblem:
    """x_hat(params) = argmin_x energy(params, x, data) with a twice differentiable energy.

    Args:
      energy: ``energy(params, x, data) -> scalar`` for ONE sample, written in JAX; params, x, data are any pytrees.
      init: ``init(params, data) -> x0``, the cold start; it fixes the shape and dtype of x.
      strong_convexity, smoothness: mu and L, numbers or ``(params, data) -> number``, or None where unknown. With mu
        the stop ``||grad||/mu <= tol`` is a true bound on ``||x - x_hat||``; a wrong mu makes that bound wrong.
      hessian_lipschitz, mixed_lipschitz, mixed_norm: used by certificates only, see `Constants`.
      mixed_precision: whether solves for a float64 x may take most of their steps in float32, with every residual that
        decides in float64; None: where x has at least 2^14 entries. Set False for an energy that float32 overflows.

    Two problems made from the same functions are equal, so jitted solvers compile once; make the functions once,
    outside the loop that uses them.

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> ridge = jb.SmoothProblem(
    ...     energy=lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2),
    ...     init=lambda p, d: jnp.zeros_like(d), strong_convexity=1.0)
    >>> x, info = jb.solve(ridge, 0.0, jnp.array([2.0, 4.0]), tol=1e-6)
    >>> bool(jnp.allclose(x, jnp.array([1.0, 2.0]), atol=1e-5))
    True
    """

    energy: Callable
    init: Callable
    strong_convexity: Constant = None
    smoothness: Constant = None
    hessian_lipschitz: Constant = None
    mixed_lipschitz: Constant = None
    mixed_norm: Constant = None
    mixed_precision: bool | None = None

    def __post_init__(self):
        for name in ("energy", "init"):
            if not callable(getattr(self, name)):
                raise TypeError(f"SmoothProblem `{name}` must be a function, got {type(getattr(self, name)).__name__}.")
        for name in Constants._fields:
            value = getattr(self, name)
            if value is None or callable(value):
                continue
            if not isinstance(value, numbers.Real):
                kind = type(value).__name__
                raise TypeError(f"SmoothProblem `{name}` must be a number, a function or None, got {kind}.")
            if not value >= 0:
                raise ValueError(f"SmoothProblem `{name}` must be nonnegative, got {value}; use None when unknown.")
        require_hashable(self)

    def constants(self, params, data) -> Constants:
        def evaluate(constant):
            return constant(params, data) if callable(constant) else constant

        return Constants(*(evaluate(getattr(self, name)) for name in Constants._fields))

    def at(self, params, data) -> SmoothView:
        constants = jax.lax.stop_gradient(self.constants(params, data))
        return SmoothView(lambda x: self.energy(params, x, data), constants, partial(self._single, params, data))

    def _single(self, params, data, x):
        wanted = trees.size(x) >= MIXED_SIZE if self.mixed_precision is None else self.mixed_precision
        if not wanted or any(jnp.result_type(leaf) != jnp.float64 for leaf in jax.tree.leaves(x)):
            return None
        params, data = trees.to_single((params, data))

        def value(x):
            return jnp.asarray(self.energy(params, x, data), jnp.float32)

        try:
            jax.eval_shape(value, trees.to_single(x))
        except (TypeError, ValueError):  # constants of the energy that do not mix with float32
            return None
        constants = trees.to_single(jax.lax.stop_gradient(self.constants(params, data)))
        return SmoothView(value, constants)

    def check(self, params) -> None:
        """Refuse params that the energy knows to be wrong (its ``check(params)``), while their values are concrete."""
        validate_arrays(params, "params")
        getattr(self.energy, "check", lambda params: None)(params)

    def start(self, params, data):
        """The cold start as arrays; real inexact leaves only."""
        return as_start(self.init(params, data))

    def validate(self, params, data, x0=None) -> None:
        """Check, at trace time and without computing, what would otherwise fail far from its cause."""
        start = start_shapes(self, params, data, x0)
        no_closed_over_tracer("energy", self.energy, params, start, data)
        trace_scalar(self.energy, "energy", params, start, data)


def start_shapes(problem, params, data, x0=None):
    """Shapes of the cold start, after the checks of arguments that all problems share; ``x0`` must have them too."""
    validate_arrays(params, "params")
    validate_arrays(data, "data")
    start = jax.eval_shape(problem.start, params, data)
    if x0 is not None:
        same_shapes(x0, start)
    return start


def as_start(x0):
    """What a user's init returned, as real arrays; strongly typed like what solvers return, so that a warm start
    compiles nothing new."""
    x0 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), x0)
    if not jax.tree.leaves(x0):
        raise TypeError(f"init(params, data) must return the start x0 as arrays, got {x0}.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x0):
        name = f"init(params, data){jax.tree_util.keystr(path)}"
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise TypeError(f"{name} is complex; split the unknown into real and imaginary parts.")
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(f"{name} has dtype {leaf.dtype}; return a float array, e.g. x0.astype(float).")
    return x0


def require_scalar(out, name: str) -> None:
    """``out``: what `jax.eval_shape` of a user's energy or loss returned."""
    if not hasattr(out, "shape") or out.shape != ():
        raise ValueError(
            f"{name} must return a scalar for one sample, got {jax.tree.map(lambda o: o.shape, out)}; "
            "sum over pixels, and batch with the oracle's in_axes."
        )
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"{name} must return a real number, got dtype {out.dtype}; take its real part.")


def refuse_derivatives(tree, what: str, instead: str):
    """``tree`` itself; TypeError when it is differentiated, because the result would carry no derivative, silently."""

    @jax.custom_jvp
    def same(tree):
        return tree

    @same.defjvp
    def _(primals, tangents):
        raise TypeError(f"the result {what} has no derivative: {instead}.")

    leaves, treedef = jax.tree.flatten(tree)
    where = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.core.Tracer)]
    if not where:
        return tree
    for k, leaf in zip(where, same([leaves[k] for k in where]), strict=True):
        leaves[k] = leaf
    return jax.tree.unflatten(treedef, leaves)


def trace_scalar(function, name: str, *arguments) -> None:
    """`require_scalar` of a user's function, with the shapes of one sample where the function does not fit them."""
    try:
        out = jax.eval_shape(function, *arguments)
    except TypeError as error:
        if "shape" not in str(error):
            raise
        names = ("params", "x", "data") if len(arguments) == 3 else ("params", "data")
        shapes = jax.tree.map(jnp.shape, dict(zip(names, arguments, strict=True)))
        raise ValueError(f"{name} does not fit the shapes of one sample, {shapes}: {error}") from error
    require_scalar(out, name)


def require_hashable(thing) -> None:
    """Problems and oracles are static arguments of jit, which hashes them."""
    try:
        hash(thing)
    except TypeError as error:
        raise TypeError(
            f"{type(thing).__name__} must be hashable, but {error}; give it plain functions (or frozen dataclasses "
            "without arrays), and pass arrays through `params` or `data`."
        ) from error


def validate_arrays(tree, name: str) -> None:
    """Raise TypeError naming the first leaf that is not an array or a number."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        known = isinstance(leaf, (jax.Array, jax.core.Tracer, bool, int, float, complex))
        if not known and getattr(getattr(leaf, "dtype", None), "kind", "O") in "OSUMm":
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not numbers; keep functions "
                "and strings outside, e.g. with jb.partition(params, where) or equinox.partition(model, is_array)."
            )


def same_shapes(x0, start) -> None:
    if jax.tree.structure(x0) != jax.tree.structure(start):
        raise ValueError(f"x0 has structure {jax.tree.structure(x0)}, init returns {jax.tree.structure(start)}.")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(start), strict=True):
        if jnp.shape(a) != b.shape:
            raise ValueError(f"x0{jax.tree_util.keystr(path)} has shape {jnp.shape(a)}, init returns {b.shape}.")


def no_closed_over_tracer(name: str, function, *arguments) -> None:
    """A traced value hidden in a closure would get no gradient, silently."""
    for constant in jax.make_jaxpr(function)(*arguments).consts:
        if isinstance(constant, jax.core.Tracer):
            raise TypeError(
                f"{name} closes over a traced value of shape {jnp.shape(constant)}; pass it through `params` or "
                "`data`, otherwise no gradient would flow to it."
            )
