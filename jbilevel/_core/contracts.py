"""Contracts: base classes whose subclasses are refused, by name, where they forget what they must supply."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import ClassVar

from jbilevel._core import brief


class Contract:
    """A base class with required methods, marked by `abc.abstractmethod`.

    A class that leaves one out is refused when it is made, with the method's signature and what it should do. A class
    that is itself a base for others gives the name by which it is known: ``class S(Contract, abstract="jb.S")``. Its
    repr is that of `jbilevel._core.brief`, also where a subclass is made a dataclass.

    Raises:
      TypeError: a required method is missing.
    """

    known_as: ClassVar[str] = "Contract"

    def __init_subclass__(cls, abstract: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__repr__" not in vars(cls):  # or the decorator of a dataclass would write one that shows all of everything
            cls.__repr__ = cls.__repr__
        if abstract is not None:
            cls.known_as = abstract
            return
        found: dict[str, object] = {}
        for ancestor in reversed(cls.__mro__):
            found |= vars(ancestor)
        for name, method in found.items():
            if isinstance(method, FunctionType) and method.__dict__.get("__isabstractmethod__"):
                what = (inspect.getdoc(method) or "").split("\n")[0]
                signature = f"{name}{inspect.signature(method)}"
                raise TypeError(f"{cls.__name__} needs a method `{signature}` to be a {cls.known_as}: {what}")

    def __repr__(self) -> str:
        return brief.settings(self)
