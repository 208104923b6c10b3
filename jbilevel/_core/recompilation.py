"""A warning where one function is made anew again and again, each time to be compiled and kept."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from types import CodeType, FunctionType

FEW = 5  # functions from the same lines that pass without a word

made: dict[tuple[str, CodeType], weakref.WeakSet] = {}


def note_compilation(*things) -> None:
    """To be called while a program of these static arguments is traced, which takes place once for each of them.

    Problems and oracles hash by their functions, and two functions from the same lines are different ones: a lambda
    that is written inside a loop is compiled at every turn, and the programs are kept.
    """
    often = []
    for function in _functions(things):
        code = function.__code__
        # equal lines of two files have equal codes
        versions = made.setdefault((code.co_filename, code), weakref.WeakSet())
        before = len(versions)
        versions.add(function)
        if before < FEW == len(versions):
            often.append(f"`{function.__qualname__}` (line {code.co_firstlineno} of {function.__module__})")
    if often:
        warnings.warn(
            f"{', '.join(often)} was made anew and compiled {FEW} times, and every program is kept; make it once, "
            "outside the loop that uses it, and pass what changes through `params` or `data`.",
            UserWarning,
            stacklevel=2,
        )


def _functions(thing) -> Iterator[FunctionType]:
    if isinstance(thing, FunctionType):
        yield thing
    elif isinstance(thing, partial):
        yield from _functions((thing.func, *thing.args, *thing.keywords.values()))
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _functions(part)
    elif is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield from _functions(getattr(thing, field.name, None))
