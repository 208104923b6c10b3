"""Where batches come from: one for all steps, a function of the step, or an iterator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core.validate import arrays

END = object()


class Source(NamedTuple):
    changing: bool  # whether steps may see different batches
    first: Any  # the batch of step 0
    since: Callable[[int], Iterator]  # step -> iterator over the batches of that step and the following ones


def source(batches) -> Source:
    """The source behind what a user gave: a pytree of arrays (full batch), ``step -> batch``, or an iterable.

    Raises: ValueError: an iterable without any batch. TypeError: a leaf of the first batch is no array.
    """
    if callable(batches):
        first = as_arrays(batches(0), "batches(0)")
        return Source(True, first, lambda start: (first if k == 0 else batches(k) for k in itertools.count(start)))
    if _is_iterable(batches):
        first, stream = _peeked(batches)
        first = as_arrays(first, "batches")
        # the items stay as they came: what is skipped on a resume is never made an array
        return Source(True, first, lambda start: itertools.islice(stream, start, None))
    full = as_arrays(batches, "batches")
    return Source(False, full, lambda start: itertools.repeat(full))


def is_changing(batches) -> bool:
    """Whether steps may see different batches."""
    return callable(batches) or _is_iterable(batches)


def mapped(batches, function):
    """(the first batch, batches) with ``function`` applied to each batch, whatever kind ``batches`` are."""
    if callable(batches):
        return function(batches(0)), lambda step: function(batches(step))
    if _is_iterable(batches):
        first, stream = _peeked(batches)
        return function(first), map(function, stream)
    full = function(batches)
    return full, full


def as_arrays(tree, name: str):
    """The pytree with JAX arrays as leaves; TypeError with the path of a leaf that is none."""
    return jax.tree.map(jnp.asarray, arrays(tree, name))


def _is_iterable(batches) -> bool:
    """An iterable that is neither an array nor a pytree: generators, loaders."""
    return isinstance(batches, Iterable) and not hasattr(batches, "shape") and jax.tree_util.all_leaves([batches])


def _peeked(batches) -> tuple[Any, Iterator]:
    iterator = iter(batches)
    first = next(iterator, END)
    if first is END:
        raise ValueError("`batches` ended before the first step; give a fresh iterator with at least one batch.")
    return first, itertools.chain([first], iterator)
