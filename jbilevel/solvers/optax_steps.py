"""Any optax optimiser as a lower-level solver, on the driver of `jbilevel.solvers.loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jbilevel._core import trees
from jbilevel._core.optimizers import Optimizer, WithOptimizer
from jbilevel._core.results import Work
from jbilevel.solvers.agd import first_iterate
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import secant


class OptaxState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    value: Any
    memory: Any  # optax's state


@dataclass(frozen=True)
class Optax(WithOptimizer, Solver):
    """x+ = x + update(gradient) by an optax optimiser, such as ``Optax(optax.adam(1e-2))`` for Adam.

    For comparisons: the steps know no constant of the problem, and a rate that does not suit ends as MAX_STEPS,
    STAGNATED or NONFINITE. One gradient per step. The optimiser's state starts anew in every solve. A function that
    makes the optimiser, ``Optax(functools.partial(optax.adam, 1e-2))``, can be pickled.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - d) ** 2 + 0.5 * p * x**2, lambda p, d: 0.0 * d,
    ...     strong_convexity=1.0, smoothness=2.0)
    >>> x, info = jb.solve(ridge, 1.0, 2.0, tol=1e-4, solver=Optax(optax.sgd(0.4)))
    >>> bool(abs(x - 1.0) < 1e-3), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    optimizer: Optimizer

    patience = 1000

    def init(self, view, x0, target) -> OptaxState:
        return OptaxState(**first_iterate(view, x0)._asdict(), memory=self.transformation().init(x0))

    def step(self, view, state: OptaxState, target) -> OptaxState:
        change, memory = self.transformation().update(state.gradient, state.memory, state.x)
        x = trees.cast_like(optax.apply_updates(state.x, change), state.x)
        value, gradient = view.value_and_gradient(x)
        return OptaxState(
            x=x,
            gradient=gradient,
            residual=trees.norm(gradient),
            curvature=jnp.maximum(state.curvature, secant(state.x, state.gradient, x, gradient)),
            evaluations=state.evaluations.plus(gradients=1),
            value=value,
            memory=trees.cast_like(memory, state.memory),
        )

    def value(self, state):
        return state.value
