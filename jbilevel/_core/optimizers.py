"""Optimisers of optax as settings: themselves, or functions that make them and so can go to other processes."""

from __future__ import annotations

from collections.abc import Callable

import optax

Optimizer = optax.GradientTransformation | Callable[[], optax.GradientTransformation]


class WithOptimizer:
    """A frozen dataclass with a field ``optimizer``, one of optax or a function without arguments that makes one."""

    optimizer: Optimizer

    def __post_init__(self):
        self.transformation()

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser itself. Raises: TypeError: it is none of optax."""
        made = self.optimizer
        if callable(made):
            made = made()
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError(
                f"`optimizer` of {type(self).__name__} must be one of optax, such as optax.adam(1e-3), or a function "
                f"that makes one, such as functools.partial(optax.adam, 1e-3), got {type(made).__name__}."
            )
        return made

    def __getstate__(self):
        if isinstance(self.optimizer, optax.GradientTransformation):
            raise TypeError(
                f"{type(self).__name__} cannot be pickled, since optimisers of optax are made of local functions; pass "
                "a function that makes yours, such as functools.partial(optax.adam, 1e-3)."
            )
        return vars(self)

    # nothing in it changes; copying by way of `__getstate__` would be refused
    def __copy__(self):
        return self

    def __deepcopy__(self, memo):
        return self
