"""Accelerated gradient descent with the momentum that each known constant allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import Iterate, secant


class AGDState(NamedTuple):
    x: Any  # extrapolated point, where gradient and residual are known
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    value: Any
    previous: Any  # last gradient-step point
    t: Any
    smoothness: Any  # the step is 1/smoothness


@dataclass(frozen=True, kw_only=True)
class AGD(Solver):
    """Nesterov's accelerated gradient method, x+ = y - grad(y)/L, y+ = x+ + beta (x+ - x).

    beta = (sqrt(L) - sqrt(mu))/(sqrt(L) + sqrt(mu)) when mu and L are known (Chambolle & Pock 2016, section 4.3);
    FISTA's t_k rule with gradient restart (O'Donoghue & Candes 2015) when mu is unknown or 0; backtracking on L when L
    is unknown. One gradient per step (and one value with backtracking). ``momentum=False`` is plain gradient descent.

    Args:
      momentum: False for gradient descent with step 1/L.
      smoothness: overrides the problem's L by a number, e.g. when its bound is pessimistic.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - d) ** 2 + 0.5 * p * x**2, lambda p, d: 0.0 * d,
    ...     strong_convexity=1.0, smoothness=2.0)
    >>> x, info = jb.solve(ridge, 1.0, 2.0, tol=1e-4, solver=AGD())
    >>> bool(abs(x - 1.0) < 1e-3), jb.Status(int(info.status)).name
    (True, 'CONVERGED')
    """

    momentum: bool = True
    smoothness: float | None = None

    patience = 1000

    def _smoothness(self, view):
        return self.smoothness if self.smoothness is not None else view.constants.smoothness

    def init(self, view, x0, target) -> AGDState:
        first = first_iterate(view, x0, self.smoothness)
        return AGDState(
            **first._asdict(),
            previous=x0,
            t=jnp.ones_like(first.residual),
            smoothness=first.curvature,
        )

    def step(self, view, state: AGDState, target) -> AGDState:
        known = self._smoothness(view) is not None
        point = trees.add_scaled(state.x, -1.0 / state.smoothness, state.gradient)
        beta, t = self._momentum(view, state, point)
        extrapolated = trees.add_scaled(point, beta, trees.sub(point, state.previous))
        work = state.evaluations.plus(gradients=1)
        if known:
            value, gradient = view.value_and_gradient(extrapolated)
            return state._replace(
                x=extrapolated,
                gradient=gradient,
                residual=trees.norm(gradient),
                evaluations=work,
                value=value,
                previous=point,
                t=t,
            )
        # of the gradient step, up to rounding in the difference of two values
        rounding = 10 * trees.eps(state.x) * jnp.abs(state.value)
        sufficient = view.value(point) <= state.value - 0.5 * state.residual**2 / state.smoothness + rounding
        extrapolated = trees.where(sufficient, extrapolated, state.x)
        value, gradient = view.value_and_gradient(extrapolated)
        work = work.plus(values=1)
        curvature = jnp.maximum(state.curvature, secant(state.x, state.gradient, extrapolated, gradient))
        accepted = AGDState(
            x=extrapolated,
            gradient=gradient,
            residual=trees.norm(gradient),
            curvature=curvature,
            evaluations=work,
            value=value,
            previous=point,
            t=t,
            smoothness=state.smoothness,
        )
        rejected = state._replace(smoothness=2 * state.smoothness, evaluations=work)
        return trees.where(sufficient, accepted, rejected)

    def _momentum(self, view, state, point):
        if not self.momentum:
            return 0.0, state.t
        restart = trees.dot(state.gradient, trees.sub(point, state.previous)) > 0
        t = jnp.where(restart, 1.0, state.t)
        t_next = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
        beta = jnp.where(restart, 0.0, (t - 1) / t_next)
        mu = view.constants.strong_convexity
        if mu is not None:
            root = jnp.sqrt(jnp.clip(mu / state.smoothness, 0.0, 1.0))
            # mu = 0 would give the constant momentum 1, which does not converge
            beta = jnp.where(root > 0, (1 - root) / (1 + root), beta)
        return beta, t_next

    def value(self, state):
        return state.value


def first_iterate(view, x0, smoothness=None) -> Iterate:
    """What the states of the solvers for smooth energies begin with."""
    value, gradient = view.value_and_gradient(x0)
    residual = trees.norm(gradient)
    curvature, more = first_curvature(view, x0, gradient, residual, smoothness)
    work = Work.zero().plus(gradients=1 + more)
    return Iterate(x=x0, gradient=gradient, residual=residual, curvature=curvature, evaluations=work, value=value)


def first_curvature(view, x, gradient, residual, smoothness=None):
    """(L, 0) where L is known, else (a lower bound of L, 1): a secant along the gradient, which costs one gradient."""
    smoothness = view.constants.smoothness if smoothness is None else smoothness
    if smoothness is not None:
        return jnp.asarray(smoothness, residual.dtype), 0
    length = jnp.sqrt(trees.eps(x)) * (1.0 + trees.norm(x))
    step = length / jnp.where(residual > 0, residual, 1.0)
    change = trees.sub(view.gradient(trees.add_scaled(x, -step, gradient)), gradient)
    curvature = trees.norm(change) / length
    return jnp.where(curvature > 0, curvature, 1.0).astype(residual.dtype), 1


GradientDescent = AGD(momentum=False)
