"""What a Python function computes with: its code without names, lines and docstrings, and what that code reads."""

from __future__ import annotations

import dis
import hashlib
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

PACKAGE, STDLIB = str(Path(__file__).parents[1]), str(Path(os.__file__).parent)
SILENT = {"CACHE", "EXTENDED_ARG", "NOP", "PRECALL", "RESUME"}
BY_NAME = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
REBINDS = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}
MUTATORS = {
    "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault",
    "update", "write",
}  # fmt: skip


class Reading(NamedTuple):
    """What code does with names that are not its own."""

    globals: dict[str, set[tuple[str, ...]]]  # each global with the chains of attributes that are read of it
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
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                    chain = tuple(s.argval for s in itertools.takewhile(_is_attribute, steps[i + 1 :]))
                    found.globals.setdefault(step.argval, set()).add(chain)
    return found


def text_of(code: CodeType) -> Text:
    words, numbers = [], []
    for part in _with_inner(code):
        for step in _instructions(part):
            if step.opcode in dis.hasconst or step.opname == "LOAD_SMALL_INT":
                numbers += _numbers(step.argval)
                words.append(f"const {_masked(step.argval)}")
            else:
                named = step.opcode in dis.hasname or step.opcode in dis.hasfree
                words.append(f"{step.opname} {step.argval if named else step.arg}")
    digest = hashlib.blake2b("\n".join(words).encode(), digest_size=8).hexdigest()
    return Text(digest, ", ".join(numbers))


def closure(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not yet filled
            continue


def defaults(function: FunctionType) -> Iterator[tuple[str, Any]]:
    code, values = function.__code__, function.__defaults__ or ()
    positional = code.co_varnames[: code.co_argcount]
    yield from zip(positional[len(positional) - len(values) :], values, strict=True)
    yield from (function.__kwdefaults__ or {}).items()


def read_globals(function: FunctionType, found: Reading) -> Iterator[tuple[str, Any]]:
    """The globals that a function reads, and those of the user's modules (``settings.SCALE``) under a dotted name."""
    for name in sorted(found.globals.keys() & function.__globals__.keys() - found.state):
        value = function.__globals__[name]
        if not isinstance(value, ModuleType):
            yield name, value
            continue
        for chain in sorted(found.globals[name]):
            if (member := _member(value, chain)) is not None:
                yield f"{name}.{'.'.join(chain[: len(member[0])])}", member[1]


def _member(module: ModuleType, chain: tuple[str, ...]) -> tuple[tuple[str, ...], Any] | None:
    """(the chain up to it, what stands there) of the first member that is no module; None inside libraries."""
    for length, name in enumerate(chain, 1):
        if in_library(vars(module).get("__file__")) or name not in vars(module):
            return None
        value = vars(module)[name]
        if not isinstance(value, ModuleType):
            return chain[:length], value
        module = value
    return None


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
