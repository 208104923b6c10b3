"""How a batch is checked and taken apart: sample axes, shared leaves, weights, chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core import brief, trees
from jbilevel._core.validate import arrays

WEIGHTS = "sample_weight"  # entry of a batch


@dataclass(frozen=True)
class Axes:
    """A pytree of sample axes as a hashable value, so that oracles can be static arguments of jit."""

    leaves: tuple
    treedef: Any

    @classmethod
    def of(cls, in_axes):
        if isinstance(in_axes, Axes):
            return in_axes
        leaves, treedef = jax.tree.flatten(in_axes, is_leaf=lambda a: a is None)
        if not all(leaf is None or isinstance(leaf, int) for leaf in leaves):
            raise TypeError(f"`in_axes` must hold integers and None, as for jax.vmap, got {in_axes}.")
        return cls(tuple(leaves), treedef)

    def __repr__(self) -> str:
        return brief.brief(self.tree())

    def tree(self):
        return jax.tree.unflatten(self.treedef, self.leaves)


def inputs(params, batch):
    """Both as arrays that a compiled function takes; params are refused where they have no gradient."""
    params, batch = arrays(params, "params"), arrays(batch, "batch")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not trees.is_inexact(leaf):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {jnp.result_type(leaf)}, which has no gradient; move it "
                "into the data or use jb.partition."
            )
    return params, batch


def weights(batch, sample_weight):
    """The weights of the samples, from the argument or from the batch; None: uniform."""
    inside = batch.get(WEIGHTS) if isinstance(batch, Mapping) else None
    if sample_weight is None:
        sample_weight = inside
    elif inside is not None:
        raise ValueError(f"weights are given twice: leave out `sample_weight` or the entry {WEIGHTS!r} of the batch.")
    if sample_weight is None or isinstance(sample_weight, jax.core.Tracer):
        return sample_weight
    weight = np.asarray(arrays(sample_weight, WEIGHTS))
    if weight.dtype.kind not in "biuf" or not np.all(np.isfinite(weight) & (weight >= 0)):
        raise ValueError(f"`{WEIGHTS}` must hold finite nonnegative numbers.")
    if not np.any(weight > 0):
        raise ValueError(f"`{WEIGHTS}` is zero for every sample, so there is no mean; give one a positive weight.")
    return np.ldexp(weight, -np.frexp(np.max(weight))[1])  # exact, and neither a cast nor their sum overflows


def weighed(batch, weight):
    """(the batch, and a ``sample_weight`` for it) whose samples have these weights in place of their own."""
    if isinstance(batch, Mapping) and WEIGHTS in batch:
        return type(batch)({**batch, WEIGHTS: weight}), None  # type: ignore[call-arg]
    return batch, weight


class Split(NamedTuple):
    """A batch as (mapped leaves with the sample axis in front, shared leaves) and the way back."""

    mapped: list
    shared: list
    is_mapped: tuple
    treedef: Any
    count: int

    def data(self, mapped):
        pools = {True: iter(mapped), False: iter(self.shared)}
        return jax.tree.unflatten(self.treedef, [next(pools[flag]) for flag in self.is_mapped])


def split(batch, in_axes) -> Split:
    leaves, treedef = jax.tree.flatten(batch)
    axes = []
    try:
        # None is a leaf of in_axes (a shared part) but not of the batch (an absent one)
        repeat = lambda axis, part: axes.extend([axis] * len(jax.tree.leaves(part)))  # noqa: E731
        jax.tree.map(repeat, in_axes, batch, is_leaf=lambda a: a is None)
    except ValueError as error:
        raise ValueError(f"`in_axes` {in_axes} is not a prefix of the batch's structure {treedef}.") from error
    mapped, shared, counts = [], [], []
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(batch), axes, strict=True):
        if axis is None:
            shared.append(leaf)
            continue
        name = f"batch{jax.tree_util.keystr(path)}"
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"{name} has shape {jnp.shape(leaf)} and no sample axis {axis}; "
                "set in_axes=None for it, and make lists of numbers arrays."
            )
        mapped.append(jnp.moveaxis(jnp.asarray(leaf), axis, 0))
        counts.append((name, mapped[-1].shape[0]))
    if not counts:
        raise ValueError("no leaf of the batch has a sample axis; give at least one an integer in `in_axes`.")
    if len({count for _, count in counts}) > 1:
        raise ValueError(f"leaves of the batch disagree on the number of samples: {dict(counts)}.")
    if counts[0][1] == 0:
        raise ValueError("the batch holds no samples.")
    return Split(
        mapped=mapped,
        shared=shared,
        is_mapped=tuple(axis is not None for axis in axes),
        treedef=treedef,
        count=counts[0][1],
    )


def in_chunks(evaluate, size, carry, inputs, weight, may_skip: bool):
    """``carry, outs = evaluate(carry, (inputs, weight))`` over chunks of ``size`` samples, scanned.

    The last chunk is padded with copies of the last sample, of weight 0. ``may_skip``: a chunk without weight is not
    evaluated, and its outs are zeros.
    """
    count = weight.shape[0]
    if size is None or size >= count:
        return evaluate(carry, (inputs, weight))
    pad = -count % size

    def fold(leaf):
        leaf = jnp.concatenate([leaf, jnp.repeat(leaf[-1:], pad, axis=0)]) if pad else leaf
        return leaf.reshape((count + pad) // size, size, *leaf.shape[1:])

    weights = jnp.concatenate([weight, jnp.zeros((pad,), weight.dtype)]).reshape(-1, size)
    scan = _scan_weighted if may_skip else jax.lax.scan
    carry, outs = scan(evaluate, carry, (jax.tree.map(fold, inputs), weights))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], outs)


def _scan_weighted(evaluate, carry, chunks):
    """`jax.lax.scan` over the chunks with weight; the outs of others are zeros.

    The loop ends early, over chunks in another order, because XLA's code for a CPU is half as fast within a branch.
    """
    evaluate = jax.jit(evaluate)  # traced once for its shapes and its code
    weighs = jnp.any(chunks[1] != 0, axis=1)
    order = jnp.argsort(~weighs, stable=True)
    _, shapes = jax.eval_shape(evaluate, carry, jax.tree.map(lambda leaf: leaf[0], chunks))
    outs = jax.tree.map(lambda out: jnp.zeros((weighs.size, *out.shape), out.dtype), shapes)

    def step(i, state):
        carry, outs = state
        chunk = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, order[i], keepdims=False), chunks)
        carry, out = evaluate(carry, chunk)
        return carry, jax.tree.map(lambda every, one: every.at[order[i]].set(one), outs, out)

    return jax.lax.fori_loop(0, jnp.sum(weighs), step, (carry, outs))


def over_samples(function):
    """vmap, but a single sample runs as itself: a batched loop copies its state at each step to freeze samples."""

    def run(*arguments):
        if jax.tree.leaves(arguments)[0].shape[0] > 1:
            return jax.vmap(function)(*arguments)
        single = jax.tree.map(lambda leaf: leaf[0], arguments)
        return jax.tree.map(lambda leaf: leaf[None], function(*single))

    return run


def finite_mean(sizes):
    """Mean without samples that are NaN, which no accuracy is meant for."""
    finite = jnp.isfinite(sizes)
    return jnp.sum(jnp.where(finite, sizes, 0.0)) / jnp.maximum(jnp.sum(finite), 1)


def mean(values, weight):
    """Weighted mean without the samples of weight 0, NaN where no sample is left (their weights are 0/0)."""
    mean = jnp.sum(jnp.where(weight > 0, weight * values, 0.0))
    return jnp.where(jnp.isnan(jnp.sum(weight)), jnp.nan, mean)


def infinite_unless(finite, error):
    """Nothing is known about the error of a mean that is NaN."""
    return jnp.where(finite & ~jnp.isnan(error), error, jnp.inf)
