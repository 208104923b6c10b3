"""The one linear primitive: a map and its hand-written transpose under every JAX transformation.

``custom_vjp`` has no forward mode and ``linear_call`` no batching, so a hand-written transpose needs a primitive. This
is the only file that uses JAX names outside the documented public API; tests run it on the oldest and newest JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class LinearPair(Protocol):
    """A hashable linear map and its exact transpose, both accepting any leading batch axes.

    Further arguments are the constants of the map (angles chosen by a traced index, say): the map is linear in its
    first argument only, and nothing is differentiated in the others.
    """

    @property
    def forward(self) -> Callable[..., Any]: ...

    @property
    def transpose(self) -> Callable[..., Any]: ...


def plain(pair: LinearPair, x, *operands, transpose: bool = False):
    """The pair as ordinary JAX functions, which JAX differentiates and transposes in its own way."""
    return pair.transpose(x, *operands) if transpose else pair.forward(x, *operands)


def apply(pair: LinearPair, x, *operands, transpose: bool = False):
    """``pair.forward(x, *operands)`` (or ``pair.transpose``) with the pair itself as derivative and transpose.

    ``operands`` are pytrees of arrays, which may be traced. The pair is traced again when the program around it is
    lowered, where `jax.default_matmul_precision` of the call is forgotten: the primitive keeps it.
    """
    leaves, tree = jax.tree.flatten(operands)
    leaves = [jax.lax.stop_gradient(jnp.asarray(leaf)) for leaf in leaves]
    precision = jax.config.jax_default_matmul_precision
    return linear_p.bind(x, *leaves, pair=pair, tree=tree, transpose=transpose, precision=precision)


def _run(x, *leaves, pair, tree, transpose, precision):
    with jax.default_matmul_precision(precision):
        return plain(pair, x, *jax.tree.unflatten(tree, leaves), transpose=transpose)


# traced once for shape, lowering and execution
_jitted = jax.jit(_run, static_argnames=("pair", "tree", "transpose", "precision"))


def _abstract(x, *leaves, **static):
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in (x, *leaves)]
    out = _jitted.eval_shape(*shapes, **static)
    return x.update(shape=out.shape, dtype=out.dtype)


def _jvp(primals, tangents, **static):
    (x, *leaves), tangent = primals, tangents[0]
    out = linear_p.bind(x, *leaves, **static)
    if type(tangent) is ad.Zero:
        return out, jnp.zeros_like(out)
    return out, linear_p.bind(tangent, *leaves, **static)


def _transpose(cotangent, _, *leaves, transpose, **static):
    back = linear_p.bind(cotangent, *leaves, transpose=not transpose, **static)
    return [back, *[None] * len(leaves)]


def _batch(arguments, axes, *, pair, transpose, **static):
    (x, *leaves), (axis, *leaf_axes) = arguments, axes
    if all(a is None for a in leaf_axes):
        # leading axes are batch axes for a pair, so batching is moving the new axis to the front
        x = jnp.moveaxis(x, axis, 0)
        return linear_p.bind(x, *leaves, pair=pair, transpose=transpose, **static), 0
    size = next(v.shape[a] for v, a in zip(arguments, axes, strict=True) if a is not None)
    x, *leaves = (
        jnp.broadcast_to(v[None], (size, *v.shape)) if a is None else jnp.moveaxis(v, a, 0)
        for v, a in zip(arguments, axes, strict=True)
    )
    one = [jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for v in (x, *leaves)]
    out = _jitted.eval_shape(*one, pair=pair, transpose=transpose, **static)
    ranks = (len(out.shape), x.ndim - 1) if transpose else (x.ndim - 1, len(out.shape))
    return linear_p.bind(x, *leaves, pair=_Mapped(pair, *ranks), transpose=transpose, **static), 0


@dataclass(frozen=True)
class _Mapped:
    """A pair for each entry of an axis that x and the operands share, counted from the end in x and y."""

    pair: LinearPair
    rank_in: int
    rank_out: int

    def forward(self, x, *operands):
        axes = -self.rank_in - 1, -self.rank_out - 1
        return self._map(self.pair.forward, *axes, x, operands)

    def transpose(self, y, *operands):
        axes = -self.rank_out - 1, -self.rank_in - 1
        return self._map(self.pair.transpose, *axes, y, operands)

    @staticmethod
    def _map(function, axis_in, axis_out, v, operands):
        return jax.vmap(function, (axis_in, *[0] * len(operands)), axis_out)(v, *operands)


linear_p = Primitive("jbilevel_linear")
linear_p.def_impl(_jitted)
linear_p.def_abstract_eval(_abstract)
ad.deflinear2(linear_p, _transpose)
ad.primitive_jvps[linear_p] = _jvp  # of x alone: `deflinear2` takes the map for linear in every argument
batching.primitive_batchers[linear_p] = _batch
mlir.register_lowering(linear_p, mlir.lower_fun(_jitted, multiple_results=False))
