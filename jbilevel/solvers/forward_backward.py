"""Accelerated forward-backward splitting with restart, and semismooth Newton steps on the support it finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import RUNNING, Status, Work
from jbilevel._views.smooth import QuadraticModel
from jbilevel._views.weighted_l1 import SupportView, WeightedL1View
from jbilevel.solvers.agd import first_curvature
from jbilevel.solvers.base import Solver
from jbilevel.solvers.cg import iterate as conjugate_gradients
from jbilevel.solvers.loop import secant

# a Newton step has to lower the envelope by DECREASE of the residual's term, or the residual by RESIDUAL_DECREASE; it
# is halved HALVINGS times, towards the forward-backward step, before it is given up. Its system is solved to FORCING,
# to FAST_FORCING after a Newton step that went well.
DECREASE, RESIDUAL_DECREASE, HALVINGS, FORCING, FAST_FORCING = 1e-4, 0.5, 3, 1e-1, 1e-3
# by how much a secant may exceed L before L counts as wrong: rounding in a float32 gradient
EXCESS = 0.02
ROUNDING = 1e3
DOUBLINGS = 60


class ForwardBackwardState(NamedTuple):
    x: Any  # prox(point - gradient F(point)/L): its distance from the solution is what the residual bounds
    gradient: Any  # L (point - x), the forward-backward residual
    residual: Any
    curvature: Any  # largest met, at most L
    evaluations: Work
    failure: Any
    smoothness: Any  # the step is 1/smoothness
    point: Any  # where F is evaluated next
    previous: Any  # last point of that kind and the gradient there, for the secant
    previous_gradient: Any
    t: Any
    merit: Any  # forward-backward envelope at the last point that was kept
    newton_length: Any  # length of the Newton step that ``point`` is the end of, 0 when it is of another kind
    direction: Any  # of the Newton step, from x
    fallback: Any  # where FISTA goes on when it is given up
    since_newton: Any  # steps since the last Newton step that was refused
    wait: Any  # how many of them make the next one worthwhile: as many as the last one cost
    start_residual: Any  # at the start, and FISTA's steps since: what a Newton step has to compete with
    fista_steps: Any


class _Forward(NamedTuple):
    """One forward-backward step from a point."""

    x: Any
    smoothness: Any
    values: Any  # spent
    failed: Any


@dataclass(frozen=True, kw_only=True)
class ForwardBackward(Solver):
    """FISTA with restart, x+ = prox_{G/L}(y - grad F(y)/L), and semismooth Newton steps (for `WeightedL1Problem`).

    y = x+ + beta (x+ - x) with FISTA's t_k rule (Beck & Teboulle 2009), gradient restart (O'Donoghue & Candes 2015) and
    beta at most (1 - r)/(1 + r), r = sqrt(mu/L), where mu is known. After ``wait`` steps a semismooth Newton step on
    y = prox(y - grad F(y)/L) is tried: unknowns that the prox sets to zero go to zero, the others solve a linear system
    with the Hessian restricted to them, by conjugate gradients, and stop at zero where they would change sign. It is
    kept when it lowers the forward-backward envelope F(y) + <grad F(y), x+ - y> + L/2 ||x+ - y||^2 + G(x+), which has
    the minimum of F + G (Stella, Themelis & Patrinos 2017), or with half the residual; else it is shortened a few
    times. One that was kept and lowered the residual, per product, at FISTA's pace or better is followed by the next:
    once the support is found a few of them end a solve. After any other FISTA goes on for as many steps as it took
    products, so that attempts that come too early at most double the cost.

    ``info.residual`` is R = L ||y - x+||. Where F is convex and L a bound on its Hessian, v -> v - grad F(v)/L is
    nonexpansive, so r = L (y - x+) + grad F(x+) - grad F(y), a subgradient of F + G at x+, has
    ||r|| <= R and mu-strong convexity gives ``||x+ - x_hat|| <= R/mu``: the proven ``info.error``.

    Where L is not given, the step is found by backtracking on F(x+) <= F(y) + <grad F(y), x+ - y> + L/2 ||x+ - y||^2.
    This inequality alone gives mu (e^2 + (e - d)^2) <= L (d^2 + 2 d e) for e = ||x+ - x_hat|| and d = ||y - x+||, and
    then R is mu times the largest such e.

    Args:
      newton: False for FISTA alone. max_products: limit of conjugate gradient steps per Newton step.
      wait: FISTA steps before the first Newton step (none after a warm start).

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> lasso = jb.WeightedL1Problem(
    ...     lambda p, x, d: 0.5 * jnp.sum((x - d) ** 2), lambda p, d: jnp.zeros_like(d),
    ...     strong_convexity=1.0, smoothness=1.0)
    >>> x, info = jb.solve(lasso, jnp.array(0.0), jnp.array([3.0, 0.5]), tol=1e-4, solver=ForwardBackward())
    >>> x.tolist(), jb.Status(int(info.status)).name  # soft thresholding by exp(0)
    ([2.0, 0.0], 'CONVERGED')
    """

    newton: bool = True
    max_products: int = 200
    wait: int = 10

    patience = 1000

    def __post_init__(self):
        if self.wait < 1 or self.max_products < 1:
            raise ValueError("`wait` and `max_products` of ForwardBackward must be at least 1.")

    def init(self, view: WeightedL1View, x0, target) -> ForwardBackwardState:
        if not isinstance(view, WeightedL1View):
            raise TypeError("ForwardBackward solves a jb.WeightedL1Problem; smooth problems go to NewtonCG or AGD.")
        model = QuadraticModel.of(view.smooth, x0)
        size = model.gradient_norm
        smoothness, more = first_curvature(view.smooth, x0, model.gradient, size)
        since_newton = jnp.where(trees.norm(x0) == 0, 0, self.wait).astype(jnp.int32)
        forward = self._forward(view, model, smoothness)
        subgradient = trees.scale(forward.smoothness, trees.sub(x0, forward.x))
        residual = view.measure(trees.norm(subgradient), forward.smoothness)
        # soft thresholding would hide NaN
        residual = jnp.where(jnp.isfinite(size), residual, jnp.nan)
        bad = ~view.penalty.usable() | ~(smoothness > 0) | forward.failed
        failure = jnp.where(bad, Status.NONFINITE, RUNNING).astype(jnp.int32)
        work = Work.zero().plus(gradients=1 + more, values=forward.values)
        zero, one = jnp.zeros_like(size), jnp.ones_like(size)
        return ForwardBackwardState(
            x=forward.x,
            gradient=subgradient,
            residual=residual,
            curvature=zero,
            evaluations=work,
            failure=failure,
            smoothness=forward.smoothness,
            point=forward.x,
            previous=x0,
            previous_gradient=model.gradient,
            t=one,
            merit=jnp.full_like(size, jnp.inf),
            newton_length=zero,
            direction=trees.zeros_like(x0),
            fallback=x0,
            since_newton=since_newton,
            wait=jnp.full((), self.wait, jnp.int32),
            start_residual=residual,
            fista_steps=zero,
        )

    def step(self, view: WeightedL1View, state: ForwardBackwardState, target) -> ForwardBackwardState:
        model = QuadraticModel.of(view.smooth, state.point)
        y, value, gradient = model.x, model.value, model.gradient
        forward = self._forward(view, model, state.smoothness)
        smoothness, x = forward.smoothness, forward.x
        displacement = trees.sub(y, x)
        subgradient = trees.scale(smoothness, displacement)
        residual = view.measure(trees.norm(subgradient), smoothness)
        quadratic = 0.5 * smoothness * trees.squared_norm(displacement)
        # soft thresholding would hide NaN
        residual = jnp.where(jnp.isfinite(value) & jnp.isfinite(model.gradient_norm), residual, jnp.nan)
        merit = value - trees.dot(gradient, displacement) + quadratic + view.penalty.value(x)
        secant_curvature = secant(state.previous, state.previous_gradient, y, gradient)
        failure = state.failure
        if view.constants.smoothness is not None:
            contradicted = secant_curvature > (1 + EXCESS) * smoothness
            failure = jnp.where(contradicted, Status.SMOOTHNESS, failure).astype(jnp.int32)
        failure = jnp.where(forward.failed, Status.NONFINITE, failure).astype(jnp.int32)

        newton = state.newton_length > 0
        rounding = 10 * trees.eps(y) * jnp.abs(state.merit)
        sufficient = (merit <= state.merit - DECREASE * quadratic) & (residual < jnp.inf)
        residual_falls = (residual <= RESIDUAL_DECREASE * state.residual) & (merit <= state.merit + rounding)
        accepted = newton & (sufficient | residual_falls)
        rejected = newton & ~accepted
        backtrack = rejected & (state.newton_length > 0.5**HALVINGS)
        # per product at least the pace that FISTA had per step
        fista_steps = state.fista_steps + ~newton
        pace = jnp.log(state.start_residual / state.residual) / jnp.maximum(fista_steps, 1.0)
        fast = accepted & (jnp.log(state.residual / residual) >= pace * state.wait)
        newton_ended = newton & ~backtrack & ~fast
        extrapolated, t = self._extrapolate(view, state, y, x, smoothness)
        since_newton = jnp.where(newton_ended, 0, state.since_newton + 1)
        wanted = (~newton & (since_newton >= state.wait)) | fast
        wanted = wanted & (residual > target)
        direction, found, products = self._newton(view, model, forward, target, wanted, fast)
        work = state.evaluations.plus(gradients=1, values=forward.values, products=products)
        # at the end of a Newton step momentum starts anew
        extrapolated, t = trees.where(accepted, x, extrapolated), jnp.where(accepted, 1.0, t)
        next_state = ForwardBackwardState(
            x=x,
            gradient=subgradient,
            residual=residual,
            curvature=jnp.maximum(state.curvature, secant_curvature),
            evaluations=work,
            failure=failure,
            smoothness=smoothness,
            point=trees.where(found, view.penalty.project_orthant(trees.add(x, direction), x), extrapolated),
            previous=y,
            previous_gradient=gradient,
            t=t,
            merit=merit,
            newton_length=jnp.where(found, 1.0, 0.0).astype(residual.dtype),
            direction=direction,
            fallback=extrapolated,
            since_newton=since_newton,
            wait=jnp.where(found, jnp.maximum(self.wait, products), state.wait).astype(jnp.int32),
            start_residual=state.start_residual,
            fista_steps=fista_steps,
        )
        length = jnp.where(backtrack, 0.5 * state.newton_length, 0.0)
        shortened = view.penalty.project_orthant(trees.add_scaled(state.x, length, state.direction), state.x)
        rejected_state = state._replace(
            point=trees.where(backtrack, shortened, state.fallback),
            newton_length=length,
            since_newton=since_newton,
            evaluations=work,
            smoothness=smoothness,
            failure=failure,
        )
        return trees.where(rejected, rejected_state, next_state)

    def _forward(self, view: WeightedL1View, model: QuadraticModel, smoothness) -> _Forward:
        """x+ from the model at y, with a longer L where the decrease that L promises fails to come."""
        y, value, gradient = model.x, model.value, model.gradient

        def prox_step(smoothness):
            return view.penalty.prox(trees.add_scaled(y, -1 / smoothness, gradient), 1 / smoothness)

        none = jnp.zeros((), jnp.int32)
        if view.constants.smoothness is not None:
            return _Forward(prox_step(smoothness), smoothness, none, jnp.asarray(False))

        def sufficient(x, smoothness):
            direction = trees.sub(x, y)
            quadratic = 0.5 * smoothness * trees.squared_norm(direction)
            decrease = view.smooth.value(x) - value - trees.dot(gradient, direction)
            # where the difference of two values is rounding the Hessian decides
            above_rounding = quadratic > ROUNDING * trees.eps(y) * jnp.abs(value)
            decrease = jnp.where(above_rounding, decrease, 0.5 * trees.dot(direction, model.product(direction)))
            return decrease <= (1 + 64 * trees.eps(y)) * quadratic

        def double(carry):
            smoothness, x, values, _ = carry
            smoothness = jnp.where(values > 0, 2 * smoothness, smoothness)
            x = prox_step(smoothness)
            return smoothness, x, values + 1, sufficient(x, smoothness)

        start = (smoothness, y, none, jnp.asarray(False))
        smoothness, x, values, found = jax.lax.while_loop(lambda c: ~c[3] & (c[2] < DOUBLINGS), double, start)
        return _Forward(x, smoothness, values, ~found)

    def _extrapolate(self, view: WeightedL1View, state: ForwardBackwardState, y, x, smoothness):
        change = trees.sub(x, state.x)
        restart = trees.dot(trees.sub(y, x), change) > 0
        t = jnp.where(restart, 1.0, state.t)
        t_next = 0.5 * (1 + jnp.sqrt(1 + 4 * t**2))
        beta = jnp.where(restart, 0.0, (t - 1) / t_next)
        mu = view.constants.strong_convexity
        if mu is not None:
            root = jnp.sqrt(jnp.clip(mu / smoothness, 0.0, 1.0))
            beta = jnp.minimum(beta, (1 - root) / (1 + root))
        return trees.add_scaled(x, beta, change), t_next

    def _newton(self, view: WeightedL1View, model: QuadraticModel, forward: _Forward, target, wanted, fast):
        """(from x+ to the end of the Newton step from y, whether there is one, products)."""
        x, y, smoothness = forward.x, model.x, forward.smoothness
        if not self.newton:
            return trees.zeros_like(y), jnp.asarray(False), jnp.zeros((), jnp.int32)

        def solve(_):
            sets = view.index_sets(y, model.gradient, 1 / smoothness, 0.0)
            support = SupportView(view, sets.active, jax.tree.map(jnp.zeros_like, sets.active), sets.direction)
            displacement = trees.sub(x, y)
            # unknowns that the prox sets to zero go there, whatever the others do
            to_zero = trees.sub(displacement, support.project(displacement))
            penalty = support.penalty_hessian(x)
            rhs = trees.scale(smoothness, displacement)
            rhs = rhs if penalty is None else trees.add(rhs, penalty(displacement))
            rhs = support.project(trees.sub(rhs, model.product(to_zero)))
            size = trees.norm(rhs)
            tol = jnp.maximum(jnp.where(fast, FAST_FORCING, FORCING) * size, 0.1 * target)
            tol = jnp.where(wanted, tol, jnp.inf)
            system = support.product(x, model.product)
            start = trees.zeros_like(rhs)
            found = conjugate_gradients(system, rhs, start, tol, self.max_products, zero_start=True)
            direction = trees.sub(trees.add(to_zero, support.project(found.x)), displacement)
            good = wanted & trees.all_finite(direction) & (found.steps > 0)
            return direction, good, found.steps + 1

        def skip(_):
            return trees.zeros_like(y), jnp.asarray(False), jnp.zeros((), jnp.int32)

        return jax.lax.cond(wanted, solve, skip, None)

    def failure(self, state):
        return state.failure

    def unrounded(self, view: WeightedL1View, state):
        # sqrt(2 L F) is at least ||grad F||, which does not vanish at a solution; F itself is not kept
        energy = 0.5 * trees.squared_norm(state.previous_gradient) / state.smoothness
        return view.unrounded(state.residual, state.x, state.smoothness, energy)
