"""Inexact Newton-CG: the Hessian product is linearised once per step and used for all conjugate gradient steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Status, Work
from jbilevel._views.smooth import QuadraticModel
from jbilevel.solvers.base import Solver
from jbilevel.solvers.loop import secant
from jbilevel.solvers.mixed import curvature as hessian

# forcing term after a start in float32, which ends where Newton's method converges fast
CLOSE = 0.01


class NewtonState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    evaluations: Work
    value: Any
    direction: Any
    slope: Any  # <gradient, direction>
    length: Any  # step length of the candidate x + length * direction
    shortened: Any  # whether a longer one along this direction was refused
    goal: Any  # while positive, x moves by accelerated gradient steps until the residual is below it
    previous: Any  # last gradient-step point of those


@dataclass(frozen=True, kw_only=True)
class NewtonCG(Solver):
    """Line-search Newton-CG (Steihaug 1983; forcing terms of Eisenstat & Walker 1996, choice 2).

    Each step evaluates value, gradient and Hessian linearisation at one candidate. If it decreases the energy enough
    (Armijo) it becomes the iterate and CG on H d = -gradient gives the next direction, truncated at nonpositive
    curvature; otherwise the candidate moves half-way back. So a step costs one gradient and, when accepted, a few
    products, each about a third of a gradient.

    Far from the solution of a barely smooth energy (total variation with a small eps) Newton directions are short of
    useful. Where mu and L are known and two candidates in a row were refused, x therefore moves by accelerated
    gradient steps until the gradient has fallen by ``relief``, and Newton tries again. Their length follows the largest
    curvature met so far instead of L, which for a learned regulariser may be a hundred times larger than anything on
    the way; where they would still take more than ``patience`` steps, Newton goes on alone.

    Args:
      max_products: limit of CG steps per Newton step.
      forcing: largest relative residual of the Newton system.
      relief: factor by which an accelerated phase reduces the gradient norm.
    """

    max_products: int = 100
    forcing: float = 0.5
    relief: float = 0.1

    memoryless = True  # a start in float32 loses nothing
    patience = 300  # steps without progress before giving up, which an accelerated phase may need to show its own

    def init(self, view, x0, target) -> NewtonState:
        model = QuadraticModel.of(view, x0)
        zero = jnp.zeros_like(model.gradient_norm)
        work = Work.zero().plus(gradients=1)
        return self._aim(view, model, self.forcing, target, length=1.0, curvature=zero, work=work)

    def step(self, view, state: NewtonState, target) -> NewtonState:
        accelerated = state.goal > 0
        model = QuadraticModel.of(view, trees.add_scaled(state.x, state.length, state.direction))
        candidate, value, gradient, residual = model.x, model.value, model.gradient, model.gradient_norm
        work = state.evaluations.plus(gradients=1)
        room = 10 * trees.eps(candidate) * jnp.abs(state.value)
        # near the minimum the difference of two values is rounding: there the gradient decides
        gentle = (value <= state.value + room) & (residual <= 0.9 * state.residual)
        accept = (value <= state.value + 1e-4 * state.length * state.slope) | gentle | accelerated

        # Newton where the candidate is accepted, and the accelerated phase, if any, has done its part
        newton = accept & (residual <= jnp.where(accelerated, state.goal, jnp.inf))
        forcing = jnp.minimum(self.forcing, 0.9 * (residual / state.residual) ** 1.618)
        forcing = jnp.where(accelerated, self.forcing, forcing)
        # a length that had to be shortened is the first guess once more
        length = jnp.where(state.shortened, state.length, jnp.minimum(1.0, 2 * state.length))
        length = jnp.where(accelerated, 1.0, length)
        wanted = jnp.where(newton, target, jnp.inf)
        aimed = self._aim(view, model, forcing, wanted, length=length, curvature=state.curvature, work=work)
        shorter = state._replace(length=0.25 * state.length, shortened=jnp.asarray(True), evaluations=work)
        mu = view.constants.strong_convexity
        if mu is None or view.constants.smoothness is None:
            return trees.where(accept, aimed, shorter)
        here = state._replace(evaluations=work)
        moved = here._replace(
            x=candidate,
            gradient=gradient,
            residual=residual,
            value=value,
            curvature=jnp.maximum(state.curvature, secant(state.x, state.gradient, candidate, gradient)),
        )
        here = trees.where(accelerated, moved, here)
        moving = self._accelerate(view, here, restart=~accelerated)
        far = (accelerated & ~newton) | (~accept & (state.length <= 0.5))
        # steps of the phase: sqrt(L/mu) for each factor e; mu = 0 would give momentum 1, which does not converge
        worthwhile = math.log(1 / self.relief) ** 2 * self._steepness(view, here) <= self.patience**2 * mu
        far = far & (mu > 0) & (accelerated | worthwhile)
        return trees.where(newton, aimed, trees.where(far, moving, shorter))

    def _aim(self, view, model: QuadraticModel, forcing, target, *, length, curvature, work) -> NewtonState:
        """State at x with its Newton direction; no system is solved where the residual meets the target."""
        x, gradient, residual = model.x, model.gradient, model.gradient_norm
        # the last system needs no more accuracy than the target
        system = hessian(view, x, model.product)
        forcing = jnp.minimum(forcing, CLOSE) if system.rough else forcing
        share = jnp.where(residual > target, jnp.maximum(forcing, 0.3 * target / residual), jnp.inf)
        downhill = trees.neg(gradient)
        inner = system.solve(downhill, self.max_products, share)
        stuck = (inner.status == Status.INDEFINITE) & (inner.steps <= 1)
        direction = trees.where(stuck, downhill, inner.x)
        return NewtonState(
            x=x,
            gradient=gradient,
            residual=residual,
            curvature=jnp.maximum(curvature, inner.curvature),
            evaluations=work.plus(products=inner.steps),
            value=model.value,
            direction=direction,
            slope=trees.dot(gradient, direction),
            length=jnp.full_like(residual, length),
            shortened=jnp.asarray(False),
            goal=jnp.zeros_like(residual),
            previous=x,
        )

    def _steepness(self, view, state: NewtonState):
        """A guess at L here: twice the largest curvature met, which grows as x moves, and L at most."""
        return jnp.minimum(view.constants.smoothness, 2 * state.curvature)

    def _accelerate(self, view, state: NewtonState, restart) -> NewtonState:
        """Aim at the next point of Nesterov's method with constant momentum, from x."""
        mu, smoothness = view.constants.strong_convexity, self._steepness(view, state)
        root = jnp.sqrt(mu / smoothness)
        beta = jnp.where(restart, 0.0, (1 - root) / (1 + root))
        point = trees.add_scaled(state.x, -1.0 / smoothness, state.gradient)
        following = trees.add_scaled(point, beta, trees.sub(point, state.previous))
        goal = jnp.where(restart, self.relief * state.residual, state.goal)
        one = jnp.ones_like(state.length)
        return state._replace(direction=trees.sub(following, state.x), length=one, goal=goal, previous=point)

    def value(self, state):
        return state.value
