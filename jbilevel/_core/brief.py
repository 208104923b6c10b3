"""Short words for things whose full `repr` nobody reads: the repr of every object of the package, three lines at most.

Objects show what has no default and what differs from its default (`settings`), results each of their fields
(`record`). An object inside another one is written out where it is short and holds no further one.
"""

from __future__ import annotations

import enum
import functools
import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

LONGEST = 40  # characters of one value
OBJECT = 80  # of an object inside another one
WIDEST = 240  # of a whole call: it fits three lines

_ARRAYS = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def brief(value: Any) -> str:
    """A value in a few words.

    >>> brief(0.1), brief(np.zeros((2, 3), np.float32)), brief({"a": np.zeros(3), "b": np.ones(())}), brief(len)
    ('0.1', 'float32[2,3]', 'dict of 2 arrays', 'len')
    """
    if isinstance(value, _ARRAYS):
        shape = ",".join(map(str, value.shape))
        return _number(value) if known(value) and not shape else f"{value.dtype}[{shape}]"
    name = label(value)
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float):
        return repr(float(value)) if len(repr(float(value))) <= 10 else f"{value:.6g}"
    if isinstance(value, (dict, list, tuple)):
        arrays = [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, _ARRAYS)]
        if arrays:
            return f"{name} of {len(arrays)} arrays"
        if type(value) in (dict, list, tuple):
            return _collection(value, name)
    if is_dataclass(value) and not isinstance(value, type) or isinstance(value, tuple):
        text = " ".join(repr(value).split())
        plain = len(text) <= OBJECT and len(re.findall(r"\w\(", text)) <= 1 and "0x" not in text
        return text if plain else f"{name}(...)"
    if isinstance(value, functools.partial):
        return brief(value.func)
    if callable(value):
        return getattr(value, "__qualname__", name).rsplit("<locals>.", 1)[-1]
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST and "0x" not in text else f"{name}(...)"


def label(thing: Any) -> str:
    """The name of its class; that of an oracle together with the file it is from, as all are called the same."""
    kind = type(thing)
    return f"{kind.__module__.rsplit('.', 1)[-1]}.Oracle" if kind.__name__ == "Oracle" else kind.__name__


def call(name: str, parts: Iterable[str]) -> str:
    """``name(parts)``, cut off where it would be longer than three lines."""
    text = ", ".join(parts)
    return f"{name}({text})" if len(text) <= WIDEST else f"{name}({text[:WIDEST].rsplit(', ', 1)[0]}, ...)"


def settings(self: Any) -> str:
    """``__repr__`` of a dataclass as the call that makes it; of other objects by the name of their class."""
    return call(label(self), parts(self)) if is_dataclass(self) else f"{label(self)}(...)"


def parts(thing: Any) -> list[str]:
    """The arguments of that call: what has no default, then what differs from its default."""
    first, later = [], []
    for f in fields(thing):
        value, default = getattr(thing, f.name), _default(f)
        if default is MISSING and not f.kw_only:
            first.append(brief(value))
        elif f.repr and f.init and not _same(value, default):
            later.append(f"{f.name}={brief(value)}")
    return first + later


def record(self: Any, **words: str) -> str:
    """``__repr__`` of a named tuple or a dataclass with its fields by name, but for those at their default; ``words``
    say some of them in another way."""
    if is_dataclass(self):
        defaults = {f.name: _default(f) for f in fields(self) if f.repr}
    else:
        defaults = {name: self._field_defaults.get(name, MISSING) for name in self._fields}
    values = {name: getattr(self, name) for name in defaults}
    shown = {name: value for name, value in values.items() if not _same(value, defaults[name])}
    return call(label(self), (f"{name}={words.get(name) or brief(value)}" for name, value in shown.items()))


def known(value: Any) -> bool:
    """Whether the numbers in it can be looked at: not while it is traced, nor after it was donated to a computation."""
    if isinstance(value, (jax.core.Tracer, jax.ShapeDtypeStruct)):
        return False
    return not isinstance(value, jax.Array) or (value.is_fully_addressable and not value.is_deleted())


def span(values: Any) -> str:
    """Of a number per sample, the least and the largest.

    >>> span(np.array([3, 12, 7])), span(np.array([0.5, 0.5]))
    ('3 to 12', '0.5')
    """
    if not isinstance(values, _ARRAYS) or not known(values) or not values.size:
        return brief(values)
    numbers = np.asarray(values)
    least, most = _number(np.min(numbers)), _number(np.max(numbers))
    return least if least == most else f"{least} to {most}"


def _number(value) -> str:
    if jnp.issubdtype(value.dtype, jnp.floating):
        return f"{float(value):.4g}"
    return f"{value.dtype}[]" if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else f"{value}"[:LONGEST]


def _collection(value, name: str) -> str:
    if isinstance(value, dict):
        inside = [f"{key!r}: {brief(part)}" for key, part in value.items()]
    else:
        inside = [brief(part) for part in value]
    text = ", ".join(inside)
    if len(text) > (OBJECT if "(" in text else LONGEST):
        return f"{name} of {len(inside)}"
    if isinstance(value, dict):
        return f"{{{text}}}"
    return f"[{text}]" if isinstance(value, list) else f"({text},)" if len(inside) == 1 else f"({text})"


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _same(value, default) -> bool:
    if value is default:
        return True
    traced = any(isinstance(leaf, _ARRAYS) for leaf in jax.tree.leaves(value))
    return not traced and bool(value == default)
