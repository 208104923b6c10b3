"""Contracts: base classes whose subclasses are refused, by name, where they forget what they must supply."""

from __future__ import annotations

import inspect
from types import FunctionType


class Contract:
    """A base class with required methods, marked by `abc.abstractmethod`.

    A class that leaves one out is refused when it is made, with the method's signature and what it should do. A class
    that is itself a base for others says so: ``class Partial(Contract, abstract=True)``.

    Raises:
      TypeError: a required method is missing.
    """

    def __init_subclass__(cls, abstract: bool = False, **kwargs):
        super().__init_subclass__(**kwargs)
        if abstract:
            return
        found: dict[str, object] = {}
        for ancestor in reversed(cls.__mro__):
            found |= vars(ancestor)
        for name, method in found.items():
            if isinstance(method, FunctionType) and method.__dict__.get("__isabstractmethod__"):
                what = (inspect.getdoc(method) or "").split("\n")[0]
                base = next(c.__name__ for c in cls.__mro__ if vars(c).get(name) is method)
                raise TypeError(
                    f"{cls.__name__} needs a method `{name}{inspect.signature(method)}` to be a jb.{base}: {what}"
                )
