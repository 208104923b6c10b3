"""Checks of what users pass, with sentences that name the argument and the cure."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def start_shapes(problem, params, data, x0=None):
    """Shapes of the cold start, after the checks of arguments that all problems share; ``x0`` must have them too."""
    arrays(params, "params")
    arrays(data, "data")
    start = traced("init", problem.start, params, data)
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
        out = traced(name, function, *arguments)
    except ClosedOver:
        raise
    except TypeError as error:
        if "shape" not in str(error):
            raise
        names = ("params", "x", "data") if len(arguments) == 3 else ("params", "data")
        shapes = jax.tree.map(jnp.shape, dict(zip(names, arguments, strict=True)))
        raise ValueError(f"{name} does not fit the shapes of one sample, {shapes}: {error}") from error
    require_scalar(out, name)


def require_function(thing, name: str) -> None:
    if not callable(thing):
        raise TypeError(f"`{name}` must be a function, got {type(thing).__name__}.")


def require_hashable(thing) -> None:
    """Problems and oracles are static arguments of jit, which hashes them."""
    try:
        hash(thing)
    except TypeError as error:
        raise TypeError(
            f"{type(thing).__name__} must be hashable, but {error}; give it plain functions (or frozen dataclasses "
            "without arrays), and pass arrays through `params` or `data`."
        ) from error


def arrays(tree, name: str):
    """The pytree as compiled functions may take it, after a look at every leaf: NumPy arrays in native byte order.

    A function that was compiled for a shape and dtype reads foreign bytes as if they were native, without a word.

    Raises:
      TypeError: a leaf is no array and no number, or is of a dtype that JAX does not have; a list of lists of numbers,
        which JAX takes for a tree of scalars. ValueError: a masked array.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_table)
    return jax.tree.unflatten(treedef, [_array(leaf, f"{name}{jax.tree_util.keystr(path)}") for path, leaf in leaves])


def _is_table(node) -> bool:
    """Whether a node is a list of lists of numbers: an array, as it is written down."""
    return isinstance(node, list) and bool(node) and all(isinstance(row, list) and _numbers(row) for row in node)


def _numbers(row: list) -> bool:
    return bool(row) and all(isinstance(v, (int, float, complex)) or (isinstance(v, list) and _numbers(v)) for v in row)


def _array(leaf, name: str):
    if isinstance(leaf, (jax.Array, jax.core.Tracer, bool, int, float, complex)):
        return leaf
    if isinstance(leaf, list):
        raise TypeError(
            f"{name} is a list of lists, which JAX takes for a tree of scalars; make it np.asarray({name})."
        )
    kind = getattr(getattr(leaf, "dtype", None), "kind", "O")
    if kind in "OSUMm":
        raise TypeError(
            f"{name} is a {type(leaf).__name__}, not numbers; keep functions and strings outside, e.g. with "
            "jb.partition(params, where) or equinox.partition(model, equinox.is_inexact_array)."
        )
    if not isinstance(leaf, (np.ndarray, np.generic)):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask would be lost; fill it, e.g. {name}.filled(0.0).")
    if leaf.dtype.names or leaf.dtype.itemsize > (16 if kind == "c" else 8):
        raise TypeError(f"{name} has dtype {leaf.dtype}, which JAX does not have; make it float64 or float32.")
    return native(leaf)


def native(array):
    """A NumPy array in this machine's byte order; whatever else it is, as it is."""
    foreign = isinstance(array, np.ndarray) and not array.dtype.isnative
    return array.astype(array.dtype.newbyteorder("=")) if foreign else array


def same_shapes(x0, start) -> None:
    if jax.tree.structure(x0) != jax.tree.structure(start):
        raise ValueError(f"x0 has structure {jax.tree.structure(x0)}, init returns {jax.tree.structure(start)}.")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(x0), jax.tree.leaves(start), strict=True):
        if jnp.shape(a) != b.shape:
            raise ValueError(f"x0{jax.tree_util.keystr(path)} has shape {jnp.shape(a)}, init returns {b.shape}.")


class ClosedOver(TypeError):
    """A function closes over a traced value."""


def traced(name: str, function, *arguments):
    """Shapes of what a user's function returns; a traced value hidden in its closure would get no gradient, silently.

    Raises:
      ClosedOver: there is one.
    """
    try:
        jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*arguments)
    except TypeError as error:
        if "list" not in str(error):
            raise
        raise TypeError(
            f"{name} met a list, which JAX takes for a tree; make lists of numbers arrays: {error}"
        ) from error
    for constant in jaxpr.consts:
        if isinstance(constant, jax.core.Tracer):
            raise ClosedOver(
                f"{name} closes over a traced value of shape {jnp.shape(constant)}; pass it through `params` or "
                "`data`, otherwise no gradient would flow to it."
            )
    return out
