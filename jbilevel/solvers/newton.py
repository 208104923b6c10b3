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
from jbilevel.solvers.mixed import hessian_at

# by which accelerated steps shorten where the gradient grows, and at most
CAUTION, MOST_CAUTION = 1.5, 8.0
# forcing term after a start in float32, which ends where Newton's method converges fast
FAST_FORCING = 0.01


class NewtonState(NamedTuple):
    x: Any
    gradient: Any
    residual: Any
    curvature: Any
    least_curvature: Any  # of all systems
    evaluations: Work
    value: Any
    direction: Any
    directional_derivative: Any  # <gradient, direction>
    length: Any  # step length of the candidate x + length * direction
    backtracked: Any  # whether a longer one along this direction was refused
    phase_target: Any  # while positive, x moves by accelerated gradient steps until the residual is below it
    previous: Any  # last gradient-step point of those
    caution: Any  # by which their curvature is taken to be larger than what was met


@dataclass(frozen=True, kw_only=True)
class NewtonCG(Solver):
    """Line-search Newton-CG (Steihaug 1983; forcing terms of Eisenstat & Walker 1996, choice 2).

    Each step evaluates value, gradient and Hessian linearisation at one candidate. If it decreases the energy enough
    (Armijo) it becomes the iterate and CG on H d = -gradient gives the next direction, truncated at nonpositive
    curvature; otherwise the candidate moves half-way back. So a step costs one gradient and, when accepted, a few
    products, each about a third of a gradient.

    Far from the solution of a barely smooth energy (total variation with a small eps) Newton directions are short of
    useful. Where mu and L are known and two candidates in a row were refused, x therefore moves by accelerated
    gradient steps until the gradient has fallen by ``phase_reduction``, and Newton tries again. Their length follows
    the largest curvature met so far instead of L, which for a learned regulariser may be a hundred times larger than
    anything on the way, and they shorten where the gradient grows; where they would still take more than ``patience``
    steps, Newton goes on alone.

    Args:
      max_products: limit of CG steps per Newton step.
      forcing: largest relative residual of the Newton system.
      phase_reduction: factor by which an accelerated phase reduces the gradient norm.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> ridge = jb.SmoothProblem(
    ...     lambda p, x, d: 0.5 * (x - d) ** 2 + 0.5 * p * x**2, lambda p, d: 0.0 * d,
    ...     strong_convexity=1.0, smoothness=2.0)
    >>> x, info = jb.solve(ridge, 1.0, 2.0, tol=1e-4, solver=NewtonCG())  # one step, as the energy is quadratic
    >>> bool(abs(x - 1.0) < 1e-4), int(info.steps)
    (True, 1)
    """

    max_products: int = 100
    forcing: float = 0.5
    phase_reduction: float = 0.1

    memoryless = True  # a start in float32 loses nothing
    patience = 300  # steps without progress before giving up, which an accelerated phase may need to show its own

    def init(self, view, x0, target) -> NewtonState:
        model = QuadraticModel.of(view, x0)
        zero = jnp.zeros_like(model.gradient_norm)
        work = Work.zero().plus(gradients=1)
        curvatures = zero, jnp.full_like(zero, jnp.inf)
        return self._newton_state(view, model, self.forcing, target, length=1.0, curvatures=curvatures,
                                  caution=jnp.ones_like(zero), work=work)  # fmt: skip

    def step(self, view, state: NewtonState, target) -> NewtonState:
        in_phase = state.phase_target > 0
        model = QuadraticModel.of(view, trees.add_scaled(state.x, state.length, state.direction))
        candidate, value, gradient, residual = model.x, model.value, model.gradient, model.gradient_norm
        work = state.evaluations.plus(gradients=1)
        rounding = 10 * trees.eps(candidate) * jnp.abs(state.value)
        # near the minimum the difference of two values is rounding: there the gradient decides
        gradient_decreases = (value <= state.value + rounding) & (residual <= 0.9 * state.residual)
        sufficient = value <= state.value + 1e-4 * state.length * state.directional_derivative
        accept = sufficient | gradient_decreases | in_phase

        # Newton where the candidate is accepted, and the accelerated phase, if any, has done its part
        newton = accept & (residual <= jnp.where(in_phase, state.phase_target, jnp.inf))
        forcing = jnp.minimum(self.forcing, 0.9 * (residual / state.residual) ** 1.618)
        forcing = jnp.where(in_phase, self.forcing, forcing)
        # a length that had to be shortened is the first guess once more
        length = jnp.where(state.backtracked, state.length, jnp.minimum(1.0, 2 * state.length))
        length = jnp.where(in_phase, 1.0, length)
        wanted = jnp.where(newton, target, jnp.inf)
        with_newton = self._newton_state(
            view,
            model,
            forcing,
            wanted,
            length=length,
            curvatures=(state.curvature, state.least_curvature),
            caution=state.caution,
            work=work,
        )
        shorter = state._replace(length=0.25 * state.length, backtracked=jnp.asarray(True), evaluations=work)
        mu = view.constants.strong_convexity
        if mu is None or view.constants.smoothness is None:
            return trees.where(accept, with_newton, shorter)
        unmoved = state._replace(evaluations=work)
        moved = unmoved._replace(
            x=candidate,
            gradient=gradient,
            residual=residual,
            value=value,
            curvature=jnp.maximum(state.curvature, secant(state.x, state.gradient, candidate, gradient)),
            caution=jnp.minimum(jnp.where(residual > state.residual, CAUTION, 1.0) * state.caution, MOST_CAUTION),
        )
        here = trees.where(in_phase, moved, unmoved)
        with_gradient_step = self._accelerated_state(view, here, restart=~in_phase)
        accelerate = (in_phase & ~newton) | (~accept & (state.length <= 0.5))
        # steps of the phase: sqrt(L/mu) for each factor e; mu = 0 would give momentum 1, which does not converge
        squared_steps = math.log(1 / self.phase_reduction) ** 2 * self._smoothness_estimate(view, here)
        worthwhile = squared_steps <= self.patience**2 * mu
        accelerate = accelerate & (mu > 0) & (in_phase | worthwhile)
        return trees.where(newton, with_newton, trees.where(accelerate, with_gradient_step, shorter))

    def _newton_state(
        self, view, model: QuadraticModel, forcing, target, *, length, curvatures, caution, work
    ) -> NewtonState:
        """State at x with its Newton direction; no system is solved where the residual meets the target."""
        x, gradient, residual = model.x, model.gradient, model.gradient_norm
        # the last system needs no more accuracy than the target
        hessian = hessian_at(view, x, model.product)
        forcing = jnp.minimum(forcing, FAST_FORCING) if hessian.in_single else forcing
        rtol = jnp.where(residual > target, jnp.maximum(forcing, 0.3 * target / residual), jnp.inf)
        negative_gradient = trees.neg(gradient)
        inner = hessian.solve(negative_gradient, self.max_products, rtol)
        truncated_at_once = (inner.status == Status.INDEFINITE) & (inner.steps <= 1)
        direction = trees.where(truncated_at_once, negative_gradient, inner.x)
        return NewtonState(
            x=x,
            gradient=gradient,
            residual=residual,
            curvature=jnp.maximum(curvatures[0], inner.curvature),
            least_curvature=jnp.minimum(curvatures[1], inner.least_curvature),
            evaluations=work.plus(products=inner.steps),
            value=model.value,
            direction=direction,
            directional_derivative=trees.dot(gradient, direction),
            length=jnp.full_like(residual, length),
            backtracked=jnp.asarray(False),
            phase_target=jnp.zeros_like(residual),
            previous=x,
            caution=caution,
        )

    def _smoothness_estimate(self, view, state: NewtonState):
        """A guess at L here: twice the largest curvature met, which grows as x moves, and L at most.

        Where it is too small the gradient does not fall: steps that are too long keep what is steepest alive.
        """
        return jnp.minimum(view.constants.smoothness, 2 * state.caution * state.curvature)

    def _accelerated_state(self, view, state: NewtonState, restart) -> NewtonState:
        """Aim at the next point of Nesterov's method with constant momentum, from x."""
        mu, smoothness = view.constants.strong_convexity, self._smoothness_estimate(view, state)
        root = jnp.sqrt(mu / smoothness)
        beta = jnp.where(restart, 0.0, (1 - root) / (1 + root))
        point = trees.add_scaled(state.x, -1.0 / smoothness, state.gradient)
        extrapolated = trees.add_scaled(point, beta, trees.sub(point, state.previous))
        phase_target = jnp.where(restart, self.phase_reduction * state.residual, state.phase_target)
        one = jnp.ones_like(state.length)
        return state._replace(
            direction=trees.sub(extrapolated, state.x), length=one, phase_target=phase_target, previous=point
        )

    def least_curvature(self, state):
        return state.least_curvature

    def value(self, state):
        return state.value
