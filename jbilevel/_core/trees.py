"""Vector-space algebra on pytrees of real arrays: unknowns, gradients and parameters are all vectors here."""

from __future__ import annotations

import operator
from functools import reduce

import jax
import jax.numpy as jnp


def add(a, b):
    return jax.tree.map(jnp.add, a, b)


def sub(a, b):
    return jax.tree.map(jnp.subtract, a, b)


def scale(s, a):
    return jax.tree.map(lambda v: (s * v).astype(v.dtype), a)


def add_scaled(a, s, b):
    """a + s b, in the dtypes of a."""
    return jax.tree.map(lambda u, v: (u + s * v).astype(u.dtype), a, b)


def neg(a):
    return jax.tree.map(jnp.negative, a)


def dot(a, b):
    """Euclidean inner product of two trees of the same structure, in the widest dtype among the leaves."""
    terms = jax.tree.leaves(jax.tree.map(lambda u, v: jnp.sum(u * v), a, b))
    return reduce(operator.add, terms, jnp.zeros((), dtype(a)))


def squared_norm(a):
    return dot(a, a)


def norm(a):
    return jnp.sqrt(squared_norm(a))


def zeros_like(a):
    return jax.tree.map(jnp.zeros_like, a)


def where(condition, a, b):
    """a where the scalar ``condition`` holds, else b."""
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), a, b)


def cast_like(a, reference):
    return jax.tree.map(lambda u, r: jnp.asarray(u).astype(jnp.result_type(r)), a, reference)


def to_single(a):
    """a with float64 leaves as float32 and complex128 ones as complex64."""
    narrow = {jnp.dtype("float64"): jnp.float32, jnp.dtype("complex128"): jnp.complex64}
    return jax.tree.map(lambda v: jnp.asarray(v, narrow.get(jnp.result_type(v), jnp.result_type(v))), a)


def random_like(a, seed: int):
    """A fixed normal vector shaped like a pytree of real arrays (or of their shapes)."""
    leaves, treedef = jax.tree.flatten(a)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    normal = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, normal)


def dtype(a):
    """Widest inexact dtype among the leaves (the default float when there is none)."""
    kinds = [jnp.result_type(v) for v in jax.tree.leaves(a)]
    kinds = [k for k in kinds if jnp.issubdtype(k, jnp.inexact)]
    return jnp.result_type(*kinds) if kinds else jnp.result_type(float)


def eps(a) -> float:
    """Unit round-off of the coarsest leaf."""
    kinds = [jnp.result_type(v) for v in jax.tree.leaves(a)]
    return max((float(jnp.finfo(k).eps) for k in kinds if jnp.issubdtype(k, jnp.inexact)), default=1e-16)


def size(a) -> int:
    return sum(jnp.size(v) for v in jax.tree.leaves(a))


def all_finite(a):
    leaves = [jnp.all(jnp.isfinite(v)) for v in jax.tree.leaves(a) if jnp.issubdtype(jnp.result_type(v), jnp.inexact)]
    return reduce(jnp.logical_and, leaves, jnp.asarray(True))


def is_inexact(leaf) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
