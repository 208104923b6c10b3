"""Smooth lower levels: the adjoint is a linear solve with the Hessian, and so is the Newton correction.

For z(x, q) = d_params loss - d_params <grad_x energy, q>, the error of z at an inexact pair (x, q) is of first order
in both residuals. One Newton step on the pair removes that order, so the change of z estimates the error, and the
changed z is a better hypergradient. No third derivative is formed: the adjoint system is linearised again at the new x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Work
from jbilevel._oracle.bounds import Blocks, Near, Norms, ratio
from jbilevel._oracle.systems import Adjoint, Approach, Correction, Lower, System
from jbilevel.solvers.cg import distance_left, smallest_ritz_value
from jbilevel.solvers.cg import iterate as conjugate_gradients
from jbilevel.solvers.linear import LinearSolver
from jbilevel.solvers.mixed import hessian_at, refine

# relative residual of CG that estimates a distance
DISTANCE_RTOL = 1e-3
# an error that is left after a Newton step is told up to so many times what the step removed
MOST_LEFT = 8.0
# share of the smallest Ritz value that is taken for a modulus of convexity, and of a rough estimate of one
SEEN = 0.8
ROUGH = 0.5
# units of rounding of a gradient that one at the floor may have
AT_FLOOR = 16.0
# of the rounding that a condition number admits, what is met
FELT = 0.1
# by which it may still be too large where another modulus is known
DOUBT = 10.0
# CG steps that look for a singular Hessian, and the eigenvalue that counts as none, in units of rounding
PROBE_STEPS = 8
ROUNDING = 64.0
# CG steps towards the Newton step whose length estimates ||x - x_hat|| where mu is unknown
DISTANCE_STEPS = 5


@dataclass(frozen=True)
class SmoothSystem(System):
    """grad_x energy = 0, with its Hessian product, at x."""

    view: Any  # a `SmoothView`, or what behaves like one
    x: Any
    energy: Any
    gradient: Any
    product: Callable
    residual: Any
    curvature: Any  # the largest that the solver met
    linear_solver: LinearSolver
    max_products: int
    least_curvature: Any  # that the solver saw on its way

    def adjoint(self, loss_gradient, start, tol) -> Adjoint:
        """H q = grad loss."""
        steps, spent, limit, seen = 0, 0, self.max_products, jnp.inf
        if self.linear_solver.refinable and self.view.single(self.x) is not None:
            refined = refine(self.view, self.x, self.product, loss_gradient, start, tol, limit)
            start, steps, spent, seen = refined.q, refined.products, refined.products, refined.least_curvature
        solver = self.linear_solver.at(self.view, self.x)
        q, info, least = solver.observed(self.product, loss_gradient, start, tol=tol, max_steps=limit)
        info = info._replace(steps=info.steps + steps, evaluations=info.evaluations.plus(products=spent))
        return Adjoint(q, info.residual, info, least_curvature=jnp.minimum(seen, least))

    def guess(self, loss_gradient, q) -> Adjoint:
        residual = trees.norm(trees.sub(self.product(q), loss_gradient))
        return Adjoint(q, residual, unsolved(residual, products=1))

    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int, rtol: float) -> Correction:
        """H d = -grad at x, then H' q' = grad loss at x' = x + d, from q: conjugate gradients on both."""
        view, half, halfway = self.view, steps // 2, math.sqrt(rtol)
        hessian = hessian_at(view, self.x, self.product)
        negative_gradient = trees.neg(self.gradient)
        first = hessian.start(negative_gradient, half, halfway, kept=steps)
        newton = hessian.resume(first, steps, rtol)
        candidate = trees.add(self.x, hessian.solution(newton, negative_gradient))
        # where the energy is far from quadratic the step may lose: then keep x, and improve q alone
        energy, gradient = view.value_and_gradient(candidate)
        rounding = 10 * trees.eps(candidate) * jnp.abs(self.energy)
        unit = trees.eps(candidate) * newton.curvature.astype(energy.dtype) * trees.norm(candidate)
        better = (trees.norm(gradient) <= jnp.maximum(self.residual, AT_FLOOR * unit)) | (
            energy <= self.energy - rounding
        )
        x = trees.where(better, candidate, self.x)
        x_halfway = trees.where(better, trees.add(self.x, hessian.solution(first, negative_gradient)), self.x)
        _, gradient, product = view.linearize(x)
        hessian = hessian_at(view, x, product)
        adjoint_residual = trees.sub(loss_gradient_at(x), product(adjoint.q))
        first = hessian.start(adjoint_residual, half, halfway, kept=steps)
        solve = hessian.resume(first, steps, rtol)
        q, q_halfway = (trees.add(adjoint.q, hessian.solution(state, adjoint_residual)) for state in (solve, first))
        before = trees.norm(adjoint_residual)
        # not that of conjugate gradients, which may be float32's: bounds are proven with it
        after = trees.norm(trees.sub(loss_gradient_at(x), product(q)))
        moved = trees.norm(trees.sub(x, self.x)), jnp.sqrt(jnp.maximum(solve.dd, 0.0)) * before
        relative = [ratio(trees.norm(unknown), by) for unknown, by in zip((x, q), moved, strict=True)]
        energy, residual = jnp.where(better, energy, self.energy), trees.norm(gradient)
        states, work = (newton, solve), Work.zero()
        if view.constants.strong_convexity is None:
            probe = self._probe()
            states, work = (*states, probe), work.plus(products=probe.steps)
        modulus = self._modulus(adjoint.least_curvature, *states)
        # of the Newton step, what conjugate gradients left and what the linearisation missed
        missed = ratio(residual, self.residual) - jnp.sqrt(newton.rr)
        left_x, left_q = (distance_left(state, modulus) for state in (newton, solve))
        indefinite = reduce(jnp.logical_or, (state.status == Status.INDEFINITE for state in states))
        largest = reduce(jnp.maximum, (state.curvature.astype(modulus.dtype) for state in states))
        fine = better & ~indefinite & (modulus > ROUNDING * trees.eps(self.x) * largest)
        left_x = _trusted(left_x + jnp.maximum(missed, 0.0), fine)
        left = jnp.maximum(left_x, _trusted(left_q, fine))
        work = work.plus(gradients=2, products=newton.steps + solve.steps + 2)
        system = replace(self, x=x, energy=energy, gradient=gradient, residual=residual)
        improved = adjoint._replace(q=q, residual=after)
        return Correction(
            system=system,
            adjoint=improved,
            halfway=(x_halfway, q_halfway),
            point=system.point(improved),
            left=left,
            evaluations=work,
            rounding=FELT * trees.eps(self.x) * ratio(largest, modulus) * jnp.maximum(*relative),
            approach=Approach(halfway=x_halfway, end=x, left=left_x),
        )

    def _probe(self):
        """A few CG steps with a fixed random vector, which see a Hessian that is singular where no solve has to."""
        b = trees.random_like(self.x, 0)
        return conjugate_gradients(
            self.product, b, trees.zeros_like(b), 0.0, PROBE_STEPS, zero_start=True, kept=PROBE_STEPS
        )

    def _modulus(self, least_curvature, *states):
        """A modulus of convexity for estimates: by what was seen of the smallest eigenvalue, and the one that is known.

        The one that is known may be far below all eigenvalues here, but what was seen above them by chance.
        """
        ritz = [smallest_ritz_value(state) for state in states]
        least = [ROUGH * jnp.minimum(least_curvature, self.least_curvature), *(SEEN * value for value in ritz)]
        least = reduce(jnp.minimum, (jnp.asarray(value, self.residual.dtype) for value in least))
        known = self.view.constants.strong_convexity
        return least if known is None else jnp.where(known > 0, jnp.maximum(known, least / DOUBT), least)

    def point(self, adjoint: Adjoint) -> tuple:
        return self.x, adjoint.q

    def distance(self, proven, corrected: bool):
        """As proven where mu is known, else the length of a few CG steps on H d = gradient, and what they leave.

        Lengths grow towards ||d|| with the steps (Steihaug 1983). It is ``proven``, or inf, where the Hessian is
        indefinite along the way. After a Newton step the proven one is far too large: then the smaller of the two.
        """
        if self.view.constants.strong_convexity is not None and not corrected:
            return (proven,), 0
        tol = DISTANCE_RTOL * trees.norm(self.gradient)
        start = trees.zeros_like(self.gradient)
        count = DISTANCE_STEPS
        newton = conjugate_gradients(self.product, self.gradient, start, tol, count, zero_start=True, kept=count)
        whole = trees.norm(newton.x) * (1 + distance_left(newton, self._modulus(jnp.inf, newton)))
        estimate = jnp.where(newton.status == Status.INDEFINITE, jnp.inf, whole)
        return (jnp.minimum(estimate, proven),), newton.steps

    def unrounded(self):
        return self.view.unrounded(self.residual, self.x, self.curvature, self.energy)

    def unrounded_adjoint(self, adjoint: Adjoint):
        return self.view.unrounded(adjoint.residual, adjoint.q, self.curvature)

    def norms(self, adjoint: Adjoint, error) -> Norms:
        return Norms(
            point=(trees.norm(self.x),),
            adjoint=(trees.norm(adjoint.q),),
            residual=(self.unrounded_adjoint(adjoint),),
            error=(error,),
            rounding=(self.unrounded() - self.residual,),
        )

    def shift(self, adjoint: Adjoint):
        return trees.dot(adjoint.q, self.gradient)

    def blocks(self, loss, params, data) -> Blocks:
        mu = self.view.constants.strong_convexity
        return Blocks((self.view.constants,), None if mu is None else lambda drift: (drift / mu,))

    def near(self, adjoint: Adjoint, norms: Norms) -> Near | None:
        """With H' the Hessian at x_hat, <d, H' d> <= R e for an adjoint that is d away, |d| <= e, of residual R there.

        Hence ||A' L d||^2 <= c <L d, A' L d> <= c R e where the potentials, and so what else is in H', are convex.
        """
        ridges = self.view.known_ridges()
        if ridges is None or self.view.constants.strong_convexity is None:
            return None
        (q,), (error,), point = norms.adjoint, norms.error, trees.norm(self.x)
        around = ridges.around(ridges.linear(self.x), ridges.linear(adjoint.q), error)

        def gradient(errors, residuals):
            (e,), (residual,) = errors, residuals
            return around.gradient(
                point=point,
                adjoint=q,
                error=error,
                adjoint_error=e,
                direction_error=ridges.norm * e,
                product_error=jnp.sqrt(around.curvature * residual * e) if ridges.convex else jnp.inf,
            )

        return Near(drift=(ridges.norm * around.change,), second=around.change * around.reach, gradient=gradient)

    def kept(self):
        return ()


def _trusted(left, fine):
    return jnp.where(fine & (left <= MOST_LEFT), left, jnp.inf)


def largest_curvature(product, x):
    """A lower bound of the largest eigenvalue of a Hessian, most often within a factor of two: ||H H v||/||H v|| for a
    fixed random vector v."""
    first = product(trees.random_like(x, 0))
    size = trees.norm(first)
    return jnp.where(size > 0, trees.norm(product(first)) / jnp.where(size > 0, size, 1.0), 0.0)


def unsolved(residual, products) -> SolveInfo:
    """Of an adjoint that was taken as it is."""
    zero = jnp.zeros((), jnp.int32)
    return SolveInfo(
        status=zero,
        steps=zero,
        residual=residual,
        error=jnp.full_like(residual, jnp.inf),
        evaluations=Work.zero().plus(products=products),
    )


@dataclass(frozen=True)
class SmoothLower(Lower):
    """A smooth energy."""

    linear_solver: LinearSolver
    max_products: int

    def solve(self, view, x0, tol):
        solution = self.run(view, x0, tol)
        info = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1))
        seen = solution.state.curvature, self.solver.least_curvature(solution.state)
        system = self._at(view, solution.x, info.residual, *seen)
        if view.constants.smoothness is not None or view.constants.strong_convexity is None:
            return system, info
        # a warm solve may have met no curvature at all
        system = replace(system, curvature=jnp.maximum(system.curvature, largest_curvature(system.product, system.x)))
        error = view.error_bound(system.unrounded())
        return system, info._replace(error=error, evaluations=info.evaluations.plus(products=2))

    def restore(self, view, x, kept) -> SmoothSystem:
        return self._at(view, x, None, None)

    def _at(self, view, x, residual, curvature, least_curvature=math.inf) -> SmoothSystem:
        energy, gradient, product = view.linearize(x)
        return SmoothSystem(
            view=view,
            x=x,
            energy=energy,
            gradient=gradient,
            product=product,
            residual=residual,
            curvature=curvature,
            linear_solver=self.linear_solver,
            max_products=self.max_products,
            least_curvature=least_curvature,
        )

    def pairing(self, view, x, rest):
        """<grad_x energy, q>."""
        return view.directional(x, rest)
