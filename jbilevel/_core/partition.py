"""Splitting parameters into what is trained and what stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def partition(params, where: Callable[[str, Any], Any] | Any):
    """Split ``params`` into ``(trainable, frozen)``: two trees nested alike, `None` where the other has the leaf.

    `None` is an empty subtree to JAX, so ``jax.grad``, methods and optimisers see the trainable leaves only. Hand the
    frozen half to the problem with the data (``in_axes=None``) and put both together with `combine`.

    Args:
      params: any pytree; leaves need not be arrays.
      where: which leaves are trainable. Either ``where(path, leaf) -> bool`` with paths like ``"encoder/0/kernel"``, or
        a pytree of bools with the structure of ``params`` or of its top (one bool for a whole subtree).

    Raises:
      ValueError: ``where`` selects nothing, or its structure is not a top of that of ``params``.
      TypeError: ``where`` has a leaf, or returns a value, that is not a bool.

    >>> import jbilevel as jb
    >>> net = {"encoder": {"kernel": 1.0, "bias": 2.0}, "head": 3.0}
    >>> trainable, frozen = jb.partition(net, lambda path, leaf: path.startswith("encoder"))
    >>> trainable
    {'encoder': {'bias': 2.0, 'kernel': 1.0}, 'head': None}
    >>> jb.partition(net, {"encoder": True, "head": False})[1]
    {'encoder': {'bias': None, 'kernel': None}, 'head': 3.0}
    >>> jb.combine(trainable, frozen) == net
    True
    """
    entries, structure = jax.tree_util.tree_flatten_with_path(params)
    answers = _answers(params, where, entries)
    selected = [_bool(answer, path) for answer, (path, _) in zip(answers, entries, strict=True)]
    if not any(selected):
        raise ValueError(
            f"`where` selects none of the {len(entries)} leaves; the paths it is asked about look like "
            f"{[_name(path) for path, _ in entries[:3]]}."
        )
    leaves = [leaf for _, leaf in entries]
    trainable = [leaf if chosen else None for leaf, chosen in zip(leaves, selected, strict=True)]
    frozen = [None if chosen else leaf for leaf, chosen in zip(leaves, selected, strict=True)]
    return jax.tree.unflatten(structure, trainable), jax.tree.unflatten(structure, frozen)


def combine(trainable, frozen):
    """The parameters whose halves `partition` returned; the halves may have been changed or traced meanwhile.

    A leaf that is `None` in both halves stays `None`: parameters may themselves hold `None`.

    Raises:
      ValueError: the halves are nested differently, or both have a leaf at the same place.

    >>> import jbilevel as jb
    >>> jb.combine({"w": 1.0, "b": None}, {"w": None, "b": 2.0})
    {'b': 2.0, 'w': 1.0}
    """
    ours, structure = jax.tree_util.tree_flatten_with_path(trainable, is_leaf=_is_none)
    theirs, other = jax.tree_util.tree_flatten_with_path(frozen, is_leaf=_is_none)
    if structure != other:
        raise ValueError(
            f"`trainable` and `frozen` are not halves of one tree, their structures differ: {structure} and {other}."
        )
    leaves = []
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        if a is not None and b is not None:
            raise ValueError(
                f"Both `trainable` and `frozen` have a leaf at {_name(path)!r}; use the two halves of one `partition`."
            )
        leaves.append(b if a is None else a)
    return jax.tree.unflatten(structure, leaves)


def _answers(params, where, entries) -> list:
    if callable(where):
        return [where(_name(path), leaf) for path, leaf in entries]
    try:
        return jax.tree.leaves(jax.tree.broadcast(where, params))
    except ValueError as error:
        raise ValueError(
            f"`where` must have the structure of `params` or of its top; it has {jax.tree.structure(where)}, "
            f"`params` has {jax.tree.structure(params)}."
        ) from error


def _bool(answer, path) -> bool:
    if not isinstance(answer, (bool, np.bool_)):
        raise TypeError(f"`where` must say True or False for {_name(path)!r}, not {answer!r}.")
    return bool(answer)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_none(node) -> bool:
    return node is None
