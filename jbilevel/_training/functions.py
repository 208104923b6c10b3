"""What a Python function computes with: its code without names, lines and docstrings, and what that code reads."""

from __future__ import annotations

import dis
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

PACKAGE, STDLIB = str(Path(__file__).parents[1]), str(Path(os.__file__).parent)
SILENT = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "RESUME"}
BY_NAME = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
REBINDS = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
MUTATORS = set("add append appendleft clear discard extend insert pop popitem remove setdefault update write".split())


class Access(NamedTuple):
    """One step from a thing to a part of it: an attribute, or an item under a constant key."""

    key: Any
    is_item: bool

    def of(self, thing) -> tuple[Any, ...]:
        """(the part,), empty where there is none that stands there for itself, such as a method."""
        if self.is_item:
            known = isinstance(thing, Mapping) and self.key in thing
            return (thing[self.key],) if known else ()
        attributes = thing.__dict__ if isinstance(thing, ModuleType) or type(thing).__dictoffset__ else {}
        return (attributes[self.key],) if self.key in attributes else ()

    def __str__(self) -> str:
        return f"[{self.key!r}]" if self.is_item else f".{self.key}"


class Reading(NamedTuple):
    """What code does with names that are not its own."""

    names: dict[str, set[tuple[Access, ...]]]  # globals and free variables, with what is read of each
    state: set[str]  # names of what is written to: counters and caches, which are no constants
    written: set[str]  # the same for attributes
    uses: set[str]  # every global and attribute that is named


class Text(NamedTuple):
    """Code as words that change neither with comments nor with the names and places of things."""

    code: str  # digest of the instructions, with numbers left out
    numbers: str  # the numbers in their order


def in_library(path: str | None) -> bool:
    """Whether a file belongs to this package, to Python or to what is installed, whose code is told by versions."""
    if path is None:
        return False
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
    return bool(installed) or path.startswith((PACKAGE + os.sep, STDLIB + os.sep, "<frozen"))


def is_library_class(cls: type) -> bool:
    if cls.__module__ == "__main__":
        return False
    root = cls.__module__.split(".")[0]
    modules = [sys.modules[name] for name in (cls.__module__, root) if name in sys.modules]
    path = next((vars(module)["__file__"] for module in modules if vars(module).get("__file__")), None)
    return in_library(path) or root in sys.stdlib_module_names


def reading(code: CodeType) -> Reading:
    """Of this code and of the functions inside it."""
    found = Reading({}, set(), set(), set())
    for part in _with_inner(code):
        found.uses.update(part.co_names)
        steps = _instructions(part)
        for i, step in enumerate(steps):
            if step.opname in REBINDS:
                found.state.add(step.argval)
            elif step.opname == "STORE_ATTR":
                found.written.add(step.argval)
            elif step.opname in BY_NAME or _is_attribute(step):
                names = found.state if step.opname in BY_NAME else found.written
                if _is_changed([after.opname for after in steps[i + 1 : i + 4]]) or _is_mutator(steps[i + 1 : i + 2]):
                    names.add(step.argval)
                if step.opname in BY_NAME:
                    found.names.setdefault(step.argval, set()).add(_accesses(steps[i + 1 :]))
    return found


def text_of(code: CodeType) -> Text:
    words, numbers = [], []
    for part in _with_inner(code):
        for step in _instructions(part):
            if _is_constant(step):
                numbers += _numbers(step.argval)
                words.append(f"const {_masked(step.argval)}")
            else:
                named = step.opcode in dis.hasname or step.opcode in dis.hasfree
                words.append(f"{step.opname} {step.argval if named else step.arg}")
    digest = hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()
    return Text(digest, ", ".join(numbers))


def constants(function: FunctionType, found: Reading) -> Iterator[tuple[str, Any]]:
    """(its name, the value) of all that a function reads from outside: closure, defaults, globals.

    Of a module, a namespace or a mapping of settings only the entries that are read (``settings.scale``) count.
    """
    names = dict(closure(function))
    used = sorted(found.names.keys() & function.__globals__.keys() - names.keys())
    names |= {name: function.__globals__[name] for name in used}
    for name, value in names.items():
        if name not in found.state:
            yield from _parts(name, value, found.names.get(name, {()}))
    yield from _defaults(function)


def closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not yet filled
            continue


def _defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code, values = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(positional[len(positional) - len(values) :], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def _parts(name: str, value, chains: set[tuple[Access, ...]]) -> Iterator[tuple[str, Any]]:
    """A value whole, or, where only named entries of it are read, these."""
    is_module = isinstance(value, ModuleType)
    if is_module and in_library(vars(value).get("__file__")):
        return
    first = {chain[:1] for chain in chains}
    parts = {access: access.of(value) for chain in first for access in chain}
    if not is_module and (() in first or not all(parts.values())):
        yield name, value
        return
    for access in sorted(parts, key=str):
        rest = {chain[1:] for chain in chains if chain[:1] == (access,)}
        for part in parts[access]:
            yield from _parts(f"{name}{access}", part, rest)


def _accesses(steps: list[dis.Instruction]) -> tuple[Access, ...]:
    """What is read of a thing that was loaded just before."""
    found: list[Access] = []
    while steps:
        if _is_attribute(steps[0]):
            found.append(Access(steps[0].argval, is_item=False))
            steps = steps[1:]
        elif len(steps) > 1 and _is_constant(steps[0]) and _is_subscript(steps[1]):
            found.append(Access(steps[0].argval, is_item=True))
            steps = steps[2:]
        else:
            break
    return tuple(found)


def _is_constant(step: dis.Instruction) -> bool:
    return step.opcode in dis.hasconst or step.opname == "LOAD_SMALL_INT"


def _is_subscript(step: dis.Instruction) -> bool:
    return step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]")


def _is_attribute(step: dis.Instruction) -> bool:
    return step.opname in ("LOAD_ATTR", "LOAD_METHOD")


def _is_mutator(following: list[dis.Instruction]) -> bool:
    """x.append(...)"""
    return any(_is_attribute(step) and step.argval in MUTATORS for step in following)


def _is_changed(following: list[str]) -> bool:
    """x.a = ..., x.a += ..., x[k] = ... and x[k] += ..., by what comes after x is loaded."""
    return (
        following[:1] in (["STORE_ATTR"], ["DELETE_ATTR"])
        or following[:2] == ["COPY", "LOAD_ATTR"]
        or following[1:2] in (["STORE_SUBSCR"], ["DELETE_SUBSCR"])
        or following[1:3] == ["COPY", "COPY"]
    )


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _instructions(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in SILENT]


def _numbers(constant) -> list[str]:
    if isinstance(constant, (tuple, frozenset)):
        return [number for part in _in_order(constant) for number in _numbers(part)]
    return [repr(constant)] if isinstance(constant, (bool, int, float, complex)) else []


def _masked(constant) -> str:
    if isinstance(constant, (tuple, frozenset)):
        return f"({', '.join(_masked(part) for part in _in_order(constant))})"
    if isinstance(constant, (bool, int, float, complex)):
        return "number"
    return "code" if isinstance(constant, CodeType) else repr(constant)


def _in_order(constant):
    return sorted(constant, key=repr) if isinstance(constant, frozenset) else constant
