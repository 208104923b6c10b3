"""Smooth lower levels: the adjoint is a linear solve with the Hessian, and so is the Newton correction.

For z(x, q) = d_params loss - d_params <grad_x energy, q>, the error of z at an inexact pair (x, q) is of first order
in both residuals. One Newton step on the pair removes that order, so the change of z estimates the error, and the
changed z is a better hypergradient. No third derivative is formed: the adjoint system is linearised again at the new x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import SolveInfo, Status, Work
from jbilevel._oracle.bounds import Blocks, Norms, ratio
from jbilevel._oracle.systems import Adjoint, Correction, Lower, System
from jbilevel.solvers.cg import iterate as conjugate_gradients
from jbilevel.solvers.linear import LinearSolver
from jbilevel.solvers.mixed import hessian_at, refine

# relative residual at which CG in the Newton step stops early
NEWTON_RTOL = 1e-3
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

    def adjoint(self, loss_gradient, start, tol) -> Adjoint:
        """H q = grad loss."""
        steps, spent, limit = 0, 0, self.max_products
        if self.linear_solver.refinable and self.view.single(self.x) is not None:
            refined = refine(self.view, self.x, self.product, loss_gradient, start, tol, limit)
            start, steps, spent = refined.q, refined.products, refined.products
        solver = self.linear_solver.at(self.view, self.x)
        q, info = solver.solve(self.product, loss_gradient, start, tol=tol, max_steps=limit)
        info = info._replace(steps=info.steps + steps, evaluations=info.evaluations.plus(products=spent))
        return Adjoint(q, info.residual, info)

    def guess(self, loss_gradient, q) -> Adjoint:
        residual = trees.norm(trees.sub(self.product(q), loss_gradient))
        return Adjoint(q, residual, unsolved(residual, products=1))

    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int) -> Correction:
        """H d = -grad at x, then H' q' = grad loss at x' = x + d, from q: conjugate gradients on both."""
        view, half = self.view, steps // 2
        hessian = hessian_at(view, self.x, self.product)
        negative_gradient = trees.neg(self.gradient)
        first = hessian.start(negative_gradient, half, NEWTON_RTOL)
        newton = hessian.resume(first, steps, NEWTON_RTOL)
        candidate = trees.add(self.x, hessian.solution(newton, negative_gradient))
        # where the energy is far from quadratic the step may lose: then keep x, and improve q alone
        energy, gradient = view.value_and_gradient(candidate)
        rounding = 10 * trees.eps(candidate) * jnp.abs(self.energy)
        better = (trees.norm(gradient) <= self.residual) | (energy <= self.energy - rounding)
        x = trees.where(better, candidate, self.x)
        x_halfway = trees.where(better, trees.add(self.x, hessian.solution(first, negative_gradient)), self.x)
        _, gradient, product = view.linearize(x)
        hessian = hessian_at(view, x, product)
        adjoint_residual = trees.sub(loss_gradient_at(x), product(adjoint.q))
        first = hessian.start(adjoint_residual, half, NEWTON_RTOL)
        solve = hessian.resume(first, steps, NEWTON_RTOL)
        q, q_halfway = (trees.add(adjoint.q, hessian.solution(state, adjoint_residual)) for state in (solve, first))
        work = Work.zero().plus(gradients=2, products=newton.steps + solve.steps + 1)
        before = trees.norm(adjoint_residual)
        after = before * jnp.sqrt(solve.rr).astype(before.dtype)
        energy, residual = jnp.where(better, energy, self.energy), trees.norm(gradient)
        residual_ratio = jnp.maximum(ratio(residual, self.residual), ratio(after, before))
        indefinite = (newton.status == Status.INDEFINITE) | (solve.status == Status.INDEFINITE)
        system = replace(self, x=x, energy=energy, gradient=gradient, residual=residual)
        improved = adjoint._replace(q=q, residual=after)
        return Correction(
            system=system,
            adjoint=improved,
            halfway=(x_halfway, q_halfway),
            point=system.point(improved),
            residual_ratio=jnp.where(indefinite, jnp.inf, residual_ratio),
            evaluations=work,
        )

    def point(self, adjoint: Adjoint) -> tuple:
        return self.x, adjoint.q

    def distance(self, proven, corrected: bool):
        """As proven where mu is known, else twice the length of a few CG steps on H d = gradient.

        Lengths grow towards ||d|| with the steps (Steihaug 1983). It is ``proven``, or inf, where the Hessian is
        indefinite along the way. After a Newton step the proven one is far too large: then the smaller of the two.
        """
        if self.view.constants.strong_convexity is not None and not corrected:
            return (proven,), 0
        tol = NEWTON_RTOL * trees.norm(self.gradient)
        start = trees.zeros_like(self.gradient)
        newton = conjugate_gradients(self.product, self.gradient, start, tol, DISTANCE_STEPS, zero_start=True)
        estimate = jnp.where(newton.status == Status.INDEFINITE, jnp.inf, 2 * trees.norm(newton.x))
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

    def kept(self):
        return ()


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
        system = self._at(view, solution.x, info.residual, solution.state.curvature)
        if view.constants.smoothness is not None or view.constants.strong_convexity is None:
            return system, info
        # a warm solve may have met no curvature at all
        system = replace(system, curvature=jnp.maximum(system.curvature, largest_curvature(system.product, system.x)))
        error = view.error_bound(system.unrounded())
        return system, info._replace(error=error, evaluations=info.evaluations.plus(products=2))

    def restore(self, view, x, kept) -> SmoothSystem:
        return self._at(view, x, None, None)

    def _at(self, view, x, residual, curvature) -> SmoothSystem:
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
        )

    def pairing(self, view, x, rest):
        """<grad_x energy, q>."""
        return view.directional(x, rest)
