"""The contract of a lower-level solver."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import jax.numpy as jnp

from jbilevel._core.contracts import Contract
from jbilevel._core.results import RUNNING


class Solver(Contract, abstract="jb.Solver"):
    """An iteration that lowers a residual; the driver loop (`jbilevel.solvers.loop`) decides when it ends and how.

    A solver is static configuration (a frozen dataclass). Its state, a pytree, has at least the fields of
    `jbilevel.solvers.loop.Iterate`: ``x``, ``gradient``, ``residual``, ``curvature`` and ``evaluations``.

    Attributes:
      patience: steps without a better residual or a lower value before a solve counts as stagnated.
      stride: iterations of its own that one step takes.
      memoryless: whether the next step depends on x alone, so that most steps may be taken in float32.
      one_shot: whether `init` does all the work, and then gets the step limit too, ``init(view, x0, target,
        max_steps)``.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Descent(jb.Solver):  # x+ = x - rate gradient
    ...     rate: float = 0.4
    ...     def init(self, view, x0, target):
    ...         return self.at(view, x0, jb.Work.zero())
    ...     def step(self, view, state, target):
    ...         return self.at(view, state.x - self.rate * state.gradient, state.evaluations)
    ...     def at(self, view, x, work):
    ...         gradient, work = view.gradient(x), work.plus(gradients=1)
    ...         size = jnp.abs(gradient)
    ...         return jb.solvers.loop.Iterate(
    ...             x=x, gradient=gradient, residual=size, curvature=1.0, evaluations=work, value=size)
    >>> problem = jb.SmoothProblem(lambda p, x, d: 0.5 * (x - d) ** 2, lambda p, d: 0.0 * d, strong_convexity=1.0)
    >>> x, info = jb.solve(problem, (), 3.0, tol=1e-4, solver=Descent())
    >>> bool(abs(x - 3.0) <= info.error <= 1e-4), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    patience: ClassVar[int] = 1000
    stride: int = 1
    memoryless: ClassVar[bool] = False
    one_shot: ClassVar[bool] = False

    @abstractmethod
    def init(self, view, x0, target) -> Any:
        """The state before the first step, with the residual at x0. target: the residual that ends the solve."""

    @abstractmethod
    def step(self, view, state, target) -> Any:
        """The state after one step more."""

    def first_residual(self, view, x0) -> Any:
        """The residual where a solve from x0 begins: what default tolerances are relative to."""
        return self.init(view, x0, jnp.inf).residual

    def value(self, state) -> Any:
        """The energy, None where it is not known: a step that lowers it counts as progress, as one that lowers the
        residual does."""
        return None

    def unrounded(self, view, state) -> Any:
        """Bound on what the residual of a state would be without rounding."""
        return view.unrounded(state.residual, state.x, state.curvature, self.value(state))

    def least_curvature(self, state) -> Any:
        """The smallest curvature that was seen on the way, inf where nobody looked: it may disprove a modulus."""
        return jnp.inf

    def failure(self, state) -> Any:
        """The `Status` that says why the solver cannot go on, RUNNING while it can."""
        return RUNNING
