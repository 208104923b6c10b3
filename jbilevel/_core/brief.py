"""Short words for things whose full `repr` nobody reads: what stands in the repr of methods, states and results."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

import jax
import jax.core
import numpy as np

LONGEST = 40  # characters of one value
WIDEST = 240  # of a whole call: it fits three lines


def brief(value: Any) -> str:
    """A value in a few words.

    >>> import jax.numpy as jnp
    >>> brief(0.1), brief(np.zeros((2, 3), np.float32)), brief({"a": jnp.zeros(3), "b": jnp.ones(())}), brief(len)
    ('0.1', 'float32[2,3]', 'dict of 2 arrays', 'len')
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        if value.ndim == 0 and not isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
            return f"{value}"[:LONGEST]
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    name = type(value).__name__
    if is_dataclass(value) and not isinstance(value, type):
        room = type(value).__module__.rsplit(".", 1)[-1]
        return f"{room}.Oracle(...)" if name == "Oracle" else f"{name}(...)"
    if isinstance(value, (dict, list, tuple)):
        arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, (jax.Array, np.ndarray))]
        return f"{name} of {len(arrays)} arrays" if arrays else _short(repr(value), name)
    if callable(value):
        return getattr(value, "__qualname__", name)
    return _short(repr(value), name)


def call(name: str, parts: Iterable[str]) -> str:
    """``name(parts)``, cut off where it would be longer than three lines."""
    text = ", ".join(parts)
    return f"{name}({text})" if len(text) <= WIDEST else f"{name}({text[:WIDEST].rsplit(', ', 1)[0]}, ...)"


def settings(thing: Any) -> str:
    """A dataclass as the call that makes it: what has no default, and what differs from its default."""
    parts = []
    for f in fields(thing):
        value = vars(thing)[f.name]
        if f.repr and (f.default is MISSING or value is not f.default and value != f.default):
            parts.append(brief(value) if f.default is MISSING and not f.kw_only else f"{f.name}={brief(value)}")
    return call(type(thing).__name__, parts)


def _short(text: str, name: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{name}(...)"
