"""Warm starts that stay with their sample when batches change: a dictionary from the sample's index to its row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._training.stepping import Run, cold

Store = dict[int, tuple]  # of each sample seen: host arrays, one per leaf of a warm start


def restart(method, run: Run, batch) -> tuple[Any, list[int] | None]:
    """(the state with the warm starts of the samples of ``batch``, their index or None where they have none).

    Samples that were never seen start cold, as do all where the batch does not say who they are.

    Raises: ValueError: an ill-formed index, or a sample whose unknown has another shape than before.
    """
    if not jax.tree.leaves(run.state.warm):
        return run.state, None
    start = cold(method, run.state.params, batch)
    if not (isinstance(batch, Mapping) and "index" in batch):
        return replace(run.state, warm=start), None
    index = np.asarray(batch["index"])
    if np.any(index < 0):
        raise ValueError(
            "batch['index'] names samples and must not be negative; padding has the weight 0 in batch['sample_weight']."
        )
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"batch['index'] must hold one integer per sample, got {index.dtype} of shape {index.shape}.")
    return replace(run.state, warm=_recalled(run.store, start, index)), index.tolist()


def remember(store: Store, index: list[int] | None, warm) -> Store:
    """The store with the rows of ``warm``; a sample whose row is not finite is forgotten and starts cold."""
    if index is None:
        return store
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(warm)]
    rows = {sample: tuple(np.array(leaf[i]) for leaf in leaves) for i, sample in enumerate(index)}
    lost = {sample for sample, row in rows.items() if not all(np.isfinite(leaf).all() for leaf in row)}
    return {sample: row for sample, row in (store | rows).items() if sample not in lost}


def _recalled(store: Store, start, index):
    """The cold ``start`` with the rows of the samples that the store knows."""
    leaves, structure = jax.tree.flatten(start)
    leaves = [np.array(leaf) for leaf in leaves]  # to be written to
    for leaf in leaves:
        if leaf.shape[:1] != index.shape:
            raise ValueError(f"batch['index'] has {len(index)} entries for a warm start of shape {leaf.shape}.")
    for i, sample in enumerate(index.tolist()):
        for leaf, known in zip(leaves, store.get(sample, ()), strict=False):  # not yet seen: nothing to copy
            if leaf.shape[1:] != known.shape:
                raise ValueError(f"Sample {sample} had a warm start of shape {known.shape}, now {leaf.shape[1:]}.")
            leaf[i] = known
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves))
