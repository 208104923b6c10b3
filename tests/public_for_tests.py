"""Every public name of the package: what stands in the `__all__` of the package and of its public modules."""

import importlib
import pkgutil
import types
from typing import Any, NamedTuple

import jbilevel


class Public(NamedTuple):
    """A thing and all names under which it is public, such as "jbilevel.solve" and "jbilevel.solvers.solve"."""

    thing: Any
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        """The shortest one."""
        return min(self.names, key=len).removeprefix("jbilevel.")


def public_modules(package=jbilevel):
    yield package
    for found in pkgutil.iter_modules(package.__path__):
        if not found.name.startswith("_") and found.name != "cli":
            module = importlib.import_module(f"{package.__name__}.{found.name}")
            yield from public_modules(module) if found.ispkg else [module]


def public_names() -> list[Public]:
    """Functions, classes and constants, each once; modules are no names of their own."""
    found: dict[int, Public] = {}
    for module in public_modules():
        for name in vars(module).get("__all__", ()):
            thing = getattr(module, name)
            if not isinstance(thing, types.ModuleType):
                names = found[id(thing)].names if id(thing) in found else ()
                found[id(thing)] = Public(thing, (*names, f"{module.__name__}.{name}"))
    return list(found.values())
