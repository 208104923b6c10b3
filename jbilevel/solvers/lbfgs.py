"""Limited-memory BFGS: optax's two-loop recursion and zoom line search on the driver of `jbilevel.solvers.loop`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel.solvers.agd import first_iterate
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import secant


class LBFGSState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    value: Any
    memory: Any  # optax's state; its last entry is the line search's


@dataclass(frozen=True, kw_only=True)
class LBFGS(Solver):
    """Limited-memory BFGS (Liu & Nocedal 1989) with optax's zoom line search (Nocedal & Wright 2006, algorithm 3.5).

    Each step tries x + alpha p, p = -(approximate inverse Hessian) gradient, until the strong Wolfe conditions hold
    (near the minimum the approximate ones of Hager & Zhang 2005, which rounding of the value does not spoil). A step
    that increases the energy is refused and the memory cleared, so that the next one starts from the gradient. One
    value and gradient per trial, none besides: those of the accepted trial are the next step's.

    Args:
      memory: number of pairs (change of x, change of gradient) kept.
      trials: limit of line search trials per step.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - d) ** 2 + 0.5 * p * x**2, lambda p, d: 0.0 * d,
    ...     strong_convexity=1.0, smoothness=2.0)
    >>> x, info = jb.solve(ridge, 1.0, 2.0, tol=1e-4, solver=LBFGS())
    >>> bool(abs(x - 1.0) < 1e-3), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    memory: int = 10
    trials: int = 20

    patience = 40  # steps of up to `trials` evaluations each

    def _method(self):
        search = optax.scale_by_zoom_linesearch(self.trials, initial_guess_strategy="one")
        return optax.lbfgs(memory_size=self.memory, linesearch=search)

    def init(self, view, x0, target) -> LBFGSState:
        return LBFGSState(**first_iterate(view, x0)._asdict(), memory=self._method().init(x0))

    def step(self, view, state: LBFGSState, target) -> LBFGSState:
        def energy(x):
            return view.value(trees.cast_like(x, state.x))

        method = self._method()
        change, memory = method.update(
            state.gradient, state.memory, state.x, value=state.value, grad=state.gradient, value_fn=energy
        )
        memory = trees.cast_like(memory, state.memory)
        search = memory[-1]
        # under vmap optax.value_and_grad_from_state would evaluate again: its condition becomes a selection
        x, value, gradient = trees.cast_like(
            (optax.apply_updates(state.x, change), search.value, search.grad), (state.x, state.value, state.gradient)
        )
        residual = trees.norm(gradient)
        slack = 1e-6 * jnp.abs(state.value)  # of the approximate Wolfe conditions
        accept = (value <= state.value + slack) & jnp.isfinite(residual)
        work = state.evaluations.plus(gradients=search.info.num_linesearch_steps)
        curvature = jnp.maximum(state.curvature, secant(state.x, state.gradient, x, gradient))
        accepted = LBFGSState(
            x=x,
            gradient=gradient,
            residual=residual,
            curvature=curvature,
            evaluations=work,
            value=value,
            memory=memory,
        )
        refused = state._replace(evaluations=work, memory=method.init(state.x))
        return trees.where(accept, accepted, refused)

    def value(self, state):
        return state.value
