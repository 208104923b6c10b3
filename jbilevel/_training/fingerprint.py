"""What makes a run the run it is, as JSON that is the same in every process, and what differs between two of them.

Settings and numbers count by their value, arrays by their bytes, a function by what it computes with: the values that
it closes over, its defaults, the arguments of a `functools.partial`, the globals that it reads and the numbers in its
code. Names of files, docstrings and comments do not count. Of code that comes with a library only what was handed to it
is looked at.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import re
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbilevel._training import functions

Node = str | dict[str, Any]

TYPE, FUNCTION, CODE, NUMBERS, USES = "@type", "@function", "@code", "@numbers", "@uses"
NOUNS = {
    "oracle": "the oracle",
    "problem": "the problem",
    "loss": "the loss",
    "solver": "the solver",
    "optimizer": "the optimiser",
}
CONSTRUCTION = ("__init__", "__post_init__", "__setstate__")
NAMESPACES = ("Namespace", "SimpleNamespace")
JITTED = type(jax.jit(len))
FEW = 4  # entries of an array that is shown by its values
LONG = 200  # characters of a text; a longer one is shown by its digest
DEEPEST = 100  # parts within parts
LARGE = 20_000  # characters of an object of another library with a user's code in it
VALUES = " of content "


def describe(thing) -> Node:
    """A method, an oracle, a function or any other setting."""
    return _Walk().node(thing)


def leaves(tree) -> dict[str, str]:
    """Every array or number of a pytree under its path."""
    entries = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): _array(leaf) if _is_array(leaf) else repr(leaf) for path, leaf in entries}


def shapes(leaves: dict[str, str]) -> dict[str, str]:
    """Dtype and shape of what `leaves` returned."""
    return {path: text.split(" ")[0] for path, text in leaves.items()}


def versions() -> dict[str, str]:
    """Of what computes, and of the byte code that functions are compared by."""
    ours, python = vars(sys.modules["jbilevel"])["__version__"], sys.implementation.cache_tag
    return {"jbilevel": ours, "jax": jax.__version__, "optax": optax.__version__, "python": str(python)}


class _Walk:
    """One way through settings. What was seen once is not walked again: large arrays are read once."""

    def __init__(self):
        self.known: dict[int, tuple[Any, Node]] = {}  # with the thing itself, so that its id stays its own
        self.open: set[int] = set()

    def node(self, thing) -> Node:
        text = _plain(thing)
        if text is not None:
            return text
        if id(thing) in self.known:
            return self.known[id(thing)][1]
        if id(thing) in self.open or len(self.open) > DEEPEST:
            return _name(type(thing))
        self.open.add(id(thing))
        node = _array(thing) if _is_array(thing) else self._parts(thing)
        self.open.discard(id(thing))
        self.known[id(thing)] = thing, node
        return node

    def _nodes(self, pairs) -> dict[str, Node]:
        return {name: self.node(value) for name, value in pairs}

    def _parts(self, thing) -> Node:
        if isinstance(thing, type):
            return self._class(thing)
        if isinstance(thing, functools.partial):
            given = ((f"argument {i}", value) for i, value in enumerate(thing.args))
            return self._nodes([("the function", thing.func), *given, *sorted(thing.keywords.items())])
        if isinstance(thing, types.MethodType):
            return self._nodes([("the method", thing.__func__), ("its object", thing.__self__)])
        if isinstance(thing, types.FunctionType):
            return self._function(thing)
        if isinstance(thing, JITTED):
            return self.node(vars(thing)["__wrapped__"])
        if isinstance(thing, Mapping):
            return self._nodes(sorted(((f"[{_key(key)}]", value) for key, value in thing.items()), key=itemgetter(0)))
        if isinstance(thing, tuple) and "_fields" in vars(type(thing)):
            return self._nodes(zip(vars(type(thing))["_fields"], thing, strict=True))
        if isinstance(thing, (tuple, list, deque)):
            if len(thing) > FEW and all(isinstance(value, (int, float, complex)) for value in thing):
                return f"{type(thing).__name__} of {len(thing)} numbers{VALUES}{_digest(repr(thing).encode())}"
            return self._nodes((f"[{i}]", value) for i, value in enumerate(thing))
        if isinstance(thing, (set, frozenset)):
            return ", ".join(sorted(str(self.node(value)) for value in thing))
        return self._object(thing)

    def _function(self, function: types.FunctionType) -> Node:
        code = function.__code__
        if functions.in_library(code.co_filename):
            closed = self._nodes(functions.closure(function))
            return {FUNCTION: function.__qualname__} | closed if closed else function.__qualname__
        found, text = functions.reading(code), functions.text_of(code)
        node = {FUNCTION: function.__name__, CODE: text.code, NUMBERS: text.numbers, USES: " ".join(sorted(found.uses))}
        return node | self._nodes(functions.constants(function, found))

    def _object(self, thing) -> Node:
        """An instance: the fields of a dataclass that it is compared by, the attributes of another one."""
        cls = type(thing)
        node: dict[str, Any] = {TYPE: _name(cls)}
        library = functions.is_library_class(cls)
        if is_dataclass(thing):
            told = self._nodes((f.name, getattr(thing, f.name, None)) for f in fields(thing) if f.compare)
        elif not library:
            changing = _changing(cls)
            told = self._nodes(pair for pair in _attributes(thing, "__") if pair[0] not in changing)
        elif cls.__module__ in sys.stdlib_module_names and cls.__name__ not in NAMESPACES:
            told = self._nodes(_attributes(thing, ""))
        else:
            is_node = not jax.tree_util.all_leaves([thing])
            told = leaves(thing) if is_node else self._nodes(_attributes(thing, "_"))
            told = told or {"itself": _shortened(_without_addresses(repr(thing)))}
        if not library:
            return node | {"its class": self._class(cls)} | told
        return node | told if cls.__module__.startswith("jbilevel.") else _digested(node | told)

    def _class(self, cls: type) -> Node:
        if functions.is_library_class(cls):
            return _name(cls)
        own = [ancestor for ancestor in reversed(cls.__mro__) if not functions.is_library_class(ancestor)]
        fields_of_it = {f.name for f in fields(cls)} if is_dataclass(cls) else set()
        members: dict[str, Any] = {}
        for ancestor in own:
            members |= vars(ancestor)
        told = {}
        for name, member in members.items():
            if (name.startswith("__") and name != "__call__") or name in fields_of_it:
                continue
            member = _unbound(member)
            constant = _plain(member) is not None or _is_array(member)
            if constant or isinstance(member, (types.FunctionType, functools.partial)):
                told[name] = self.node(member)
        return {TYPE: _name(cls)} | told


class Difference(NamedTuple):
    """A place where two descriptions are not the same; a sentence is made of ``str`` of it."""

    what: str  # in words: "the loss", "the option `step_size` of MAID"
    before: str
    now: str
    code_only: bool = False

    def __str__(self) -> str:
        if not self.before:
            return self.what
        before, now = (text.split(VALUES)[0] for text in (self.before, self.now))
        if before == now:
            return f"{self.what}: other values of {before}"
        return f"{self.what}: {_cut(before)} before, {_cut(now)} now"


def between_leaves(before: dict[str, str], now: dict[str, str], what: str) -> Iterator[Difference]:
    """Of what `leaves` returned; ``what``: "the data"."""
    for path in dict.fromkeys([*before, *now]):
        if before.get(path) != now.get(path):
            where = f"{what}: leaf {path}" if path else what
            yield Difference(where, before.get(path, "absent"), now.get(path, "absent"))


def between(before: Node, now: Node, what: str, same_code: bool) -> Iterator[Difference]:
    """Of what `describe` returned for ``what``; ``same_code``: whether code can be compared (the same Python)."""
    found = _Comparison(what, same_code).of(before, now, (), None)
    yield from dict.fromkeys(found)  # a part that occurs in several places is named once


class _Comparison:
    def __init__(self, what: str, same_code: bool):
        self.what, self.same_code = what, same_code

    def of(self, a: Node, b: Node, path: tuple[str, ...], owner: str | None) -> Iterator[Difference]:
        if a == b:
            return
        if isinstance(a, str) or isinstance(b, str) or a.get(TYPE) != b.get(TYPE) or (FUNCTION in a) != (FUNCTION in b):
            yield Difference(self._words(path, owner), _word(a), _word(b))
            return
        if FUNCTION in a:
            yield from self._of_functions(a, b, path, owner)
        for name in dict.fromkeys([*a, *b]):
            if name.startswith("@"):
                continue
            if name in a and name in b:
                yield from self.of(a[name], b[name], (*path, name), a.get(TYPE))
            elif FUNCTION not in a or a.get(CODE) == b.get(CODE):  # other code reads other things: said already
                before, after = (_word(side[name]) if name in side else "absent" for side in (a, b))
                yield Difference(self._words((*path, name), a.get(TYPE)), before, after)

    def _of_functions(self, a, b, path, owner) -> Iterator[Difference]:
        where = self._words(path, owner)
        if CODE not in a and CODE not in b:
            if a[FUNCTION] != b[FUNCTION]:
                yield Difference(where, a[FUNCTION], b[FUNCTION])
        elif not self.same_code:
            return
        elif a.get(CODE) == b.get(CODE):
            if a[NUMBERS] != b[NUMBERS]:
                yield Difference(f"{where}, by the numbers in its code", a[NUMBERS], b[NUMBERS])
        elif a[FUNCTION] != b[FUNCTION]:
            yield Difference(where, f"`{a[FUNCTION]}`", f"`{b[FUNCTION]}`")
        elif a[FUNCTION] == "<lambda>" and a.get(USES) != b.get(USES):
            yield Difference(f"{where}: another function", "", "")
        else:
            yield Difference(where, "", "", code_only=True)

    def _words(self, path: tuple[str, ...], owner: str | None) -> str:
        """The place that a reader knows by name: an option of its owner, or the last noun on the way there."""
        named = [name for name in path if not name.startswith(("[", "the ", "its "))]
        if not named:
            return self.what
        if named[-1] == path[-1] and owner is not None and named[-1] not in NOUNS:
            return f"the option `{named[-1]}` of {owner}"
        nouns = [NOUNS[name] for name in named if name in NOUNS]
        whole = nouns[-1] if nouns else f"{self.what}, `{named[0]}`"
        return whole if named[-1] in NOUNS or (not nouns and len(named) == 1) else f"{whole} (`{named[-1]}`)"


def _word(node: Node) -> str:
    if isinstance(node, str):
        return node
    return node.get(TYPE) or node.get(FUNCTION) or f"{len(node)} parts"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _plain(thing) -> str | None:
    """Things that are shown by their value."""
    if isinstance(thing, np.generic):
        return None
    if isinstance(thing, enum.Enum):
        return f"{type(thing).__name__}.{thing.name}"
    if thing is None or isinstance(thing, (Number, np.dtype, range, slice, types.EllipsisType, itemgetter)):
        return repr(thing)
    if isinstance(thing, bytes):
        return f"{len(thing)} bytes{VALUES}{_digest(thing)}"
    if isinstance(thing, str):
        return _shortened(repr(thing))
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    if isinstance(thing, (types.BuiltinFunctionType, np.ufunc)):
        return thing.__name__
    return None


def _is_array(thing) -> bool:
    return isinstance(thing, (jax.Array, np.ndarray, np.generic))


def _array(array) -> str:
    """Dtype, shape, and the content: by value where it is short, else by a digest of its bytes."""
    name = f"{array.dtype}[{','.join(map(str, array.shape))}]"
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:  # other hosts hold the rest
            return name
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = jax.random.key_data(array)
    array = np.ascontiguousarray(array)
    if array.dtype.hasobject:
        return name
    if array.size <= FEW and array.dtype.isbuiltin == 1:
        return f"{name} {' '.join(map(repr, array.ravel().tolist()))}"
    return f"{name}{VALUES}{_digest(array.reshape(-1).view(np.uint8))}"


def _digest(content) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _shortened(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:40]}...{VALUES}{_digest(text.encode())}"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _key(key) -> str:
    return _shortened(_without_addresses(repr(key)))


def _name(cls: type) -> str:
    room = cls.__module__.rsplit(".", 1)[-1]
    return f"{room}.Oracle" if cls.__name__ == "Oracle" else cls.__name__


def _attributes(thing, hidden: str) -> list[tuple[str, Any]]:
    """Those whose name does not begin with ``hidden``, and the function behind a decorator."""
    slots = [name for cls in type(thing).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
    found = {name: getattr(thing, name, None) for name in slots} | getattr(thing, "__dict__", {})
    return [(name, found[name]) for name in sorted(found) if not name.startswith(hidden) or name == "__wrapped__"]


def _names(slots) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _changing(cls: type) -> set[str]:
    """The attributes that methods write to: counters and caches."""
    found: set[str] = set()
    for ancestor in cls.__mro__:
        for name, member in vars(ancestor).items():
            if isinstance(member, functools.cached_property):
                found.add(name)
            function = _unbound(member)
            if isinstance(function, types.FunctionType) and name not in CONSTRUCTION:
                found |= functions.reading(function.__code__).written
    return found


def _digested(node: dict[str, Any]) -> Node:
    """An object of another library in short: nobody knows its inner parts by name."""

    def without_code(node: Node) -> Node:
        if isinstance(node, str):
            return node
        code = {CODE, NUMBERS, USES} | ({FUNCTION} if CODE in node else set())
        return {name: without_code(part) for name, part in node.items() if name not in code}

    whole, values = json.dumps(node), json.dumps(without_code(node))
    small = len(whole) <= (LARGE if whole != values else LONG)  # in short, code could no longer be told from numbers
    return node if small else f"{node[TYPE]}{VALUES}{_digest(values.encode())}"


def _unbound(member):
    """The function behind what stands in a class."""
    if isinstance(member, (staticmethod, classmethod)):
        return member.__func__
    if isinstance(member, property):
        return member.fget
    return vars(member)["__wrapped__"] if isinstance(member, JITTED) else member
