"""Saddle points: the derivative of the optimality system through the proxes, its adjoint, a Newton step, the pull-back.

With x = prox_g(p) and y = prox_f*(r) all Hessians appear through VJPs of the two proxes at p and r: (d prox_g)' =
(I + tau G)^-1 for the Hessian G of g at x, and where g has none it is what takes its place. The adjoint (X, Y) solves
G X + K*Y = -grad_x l, F Y - K X = grad_y l, with G, F the Hessians of g, f*: the same primal-dual iteration, with the
VJPs of the same proxes at the same arguments (Bogensperger et al. 2024, Algorithms 1 and 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel._oracle.bounds import Blocks, Norms, depends_on, ratio
from jbilevel._oracle.smooth_system import DISTANCE_STEPS, NEWTON_RTOL
from jbilevel._oracle.systems import Adjoint, Correction, Lower, System
from jbilevel._views.saddle import SaddleView
from jbilevel.prox import divided, times
from jbilevel.solvers.loop import Solution, run
from jbilevel.solvers.minres import iterate as minimal_residual
from jbilevel.solvers.pdhg import PDHG

# what a Newton step left of the error, per what it left of the residual: errors lie where the system is weak
SAFETY = 5.0


class ProxPoint(NamedTuple):
    """A saddle point by the arguments of its proxes, x = prox_g(p) and y = prox_f*(r), and its adjoint likewise.

    cotangents c: X = tau (d prox_g)' c_x and Y = sigma (d prox_f*)' c_y; tau and sigma are the steps of the proxes.
    """

    p: Any
    r: Any
    cotangents: Any
    tau: Any
    sigma: Any


class Linearization(NamedTuple):
    """The two proxes at p and r: their values and their VJPs."""

    x: Any
    y: Any
    tau: Any  # step trees
    sigma: Any
    pull_x: Callable
    pull_y: Callable

    @classmethod
    def of(cls, view: SaddleView, p, r, tau, sigma) -> Linearization:
        t, s = view.step_trees(tau, sigma)
        x, pull_x = jax.vjp(lambda v: view.prox_primal(v, t), p)
        y, pull_y = jax.vjp(lambda v: view.prox_dual(v, s), r)
        return cls(x, y, tau=t, sigma=s, pull_x=lambda c: pull_x(c)[0], pull_y=lambda c: pull_y(c)[0])

    def lift(self, c):
        """(X, Y) of the cotangents."""
        return times(self.tau, self.pull_x(c[0])), times(self.sigma, self.pull_y(c[1]))


@dataclass(frozen=True)
class SaddleSystem(System):
    """T(x, y) = (dg(x) + K*y, df*(y) - K x) = 0 at a point right after the proxes."""

    view: SaddleView
    p: Any
    r: Any
    tau: Any
    sigma: Any
    at: Linearization
    subgradient: Any  # the element of T(x, y) that is known
    residual: Any
    norm: Any  # the bound on ||K|| in use
    solver: PDHG
    max_steps: int

    @classmethod
    def of(cls, view, p, r, tau, sigma, subgradient, **rest) -> SaddleSystem:
        at = Linearization.of(view, p, r, tau, sigma)
        residual = _measure(view, subgradient)
        return cls(view, p, r, tau, sigma, at=at, subgradient=subgradient, residual=residual, **rest)

    @property
    def x(self):
        return self.at.x, self.at.y

    def adjoint(self, loss_gradient, start, tol) -> Adjoint:
        found = run(self.solver, self.adjoint_view(loss_gradient), start, tol, self.max_steps)
        return self.found(found, loss_gradient)

    def guess(self, loss_gradient, q) -> Adjoint:
        # of a given (X, Y), not of cotangents: G X by the difference of two VJPs is not at hand, so one step is taken
        return self.found(run(self.solver, self.adjoint_view(loss_gradient), q, jnp.inf, 0), loss_gradient)

    def adjoint_view(self, loss_gradient) -> SaddleView:
        """The adjoint as a saddle problem of its own, whose proxes hold for these steps only."""
        at, (first, second) = self.at, loss_gradient
        return replace(
            self.view,
            prox_primal=lambda v, _: times(at.tau, at.pull_x(trees.sub(divided(v, at.tau), first))),
            prox_dual=lambda v, _: times(at.sigma, at.pull_y(trees.add(divided(v, at.sigma), second))),
            steps=(self.tau, self.sigma),
            linear_system=True,
        )

    def found(self, solution: Solution, loss_gradient) -> Adjoint:
        """An (X, Y) right after the proxes of `adjoint_view`, with its residual and its cotangents."""
        (x, y), residual = solution.x, solution.gradient
        first = trees.add(divided(x, self.at.tau), residual[0])
        second = trees.add(divided(y, self.at.sigma), residual[1])
        c = (
            trees.sub(first, trees.add(self.view.transpose(y), loss_gradient[0])),
            trees.add(second, trees.add(self.view.linear(x), loss_gradient[1])),
        )
        return Adjoint(solution.x, solution.info.residual, solution.info, (residual, c))

    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int) -> Correction:
        """One inexact semismooth step on (p, r), and as much for the adjoint at the new point, by MINRES."""
        half, c = max(steps // 2, 1), adjoint.parts[1]
        subgradient = self.normal_map()
        tol = self._symmetric_tol(subgradient)
        first, rest, spent = self._minres(trees.zeros_like(c), subgradient, half, tol)
        move, _, more = self._minres(first, rest, steps - half, NEWTON_RTOL * tol)
        candidate = self._moved(move)
        before, after = self.residual_of(subgradient), self.residual_of(candidate.normal_map())
        better = after <= before
        p, r = trees.where(better, (candidate.p, candidate.r), (self.p, self.r))
        corrected_system = self._with(p, r)
        corrected_system = replace(corrected_system, subgradient=corrected_system.normal_map())
        corrected_system = replace(corrected_system, residual=self.residual_of(corrected_system.subgradient))
        halfway = self._moved(trees.where(better, first, trees.zeros_like(c)))
        adjoint_residual = corrected_system._adjoint_residual(c, loss_gradient_at(corrected_system.x))
        tol = corrected_system._symmetric_tol(adjoint_residual)
        c_half, rest, half_spent = corrected_system._minres(c, adjoint_residual, half, tol)
        c_new, remaining, last_spent = corrected_system._minres(c_half, rest, steps - half, NEWTON_RTOL * tol)
        size = self.residual_of(remaining)
        part = jnp.maximum(ratio(corrected_system.residual, before), ratio(size, self.residual_of(adjoint_residual)))
        improved = adjoint._replace(q=corrected_system.at.lift(c_new), residual=size, parts=(remaining, c_new))
        work = Work.zero().plus(products=spent + more + half_spent + last_spent + 4)
        return Correction(
            system=corrected_system,
            adjoint=improved,
            halfway=halfway._point(c_half),
            point=corrected_system._point(c_new),
            residual_ratio=SAFETY * part,
            evaluations=work,
        )

    def normal_map(self):
        """The element of T(x, y) that belongs to p and r (Robinson's normal map)."""
        at = self.at
        first = trees.add(divided(trees.sub(self.p, at.x), at.tau), self.view.transpose(at.y))
        return first, trees.sub(divided(trees.sub(self.r, at.y), at.sigma), self.view.linear(at.x))

    def residual_of(self, parts):
        return _measure(self.view, parts)

    def _with(self, p, r) -> SaddleSystem:
        return replace(self, p=p, r=r, at=Linearization.of(self.view, p, r, self.tau, self.sigma))

    def _moved(self, move) -> SaddleSystem:
        p, r = trees.add(self.p, times(self.at.tau, move[0])), trees.add(self.r, times(self.at.sigma, move[1]))
        return self._with(p, r)

    def _product(self, c):
        """(G X + K*Y, F Y - K X) for (X, Y) = lift(c): c - X/tau stands for G X."""
        x, y = self.at.lift(c)
        first = trees.add(trees.sub(c[0], divided(x, self.at.tau)), self.view.transpose(y))
        return first, trees.sub(trees.sub(c[1], divided(y, self.at.sigma)), self.view.linear(x))

    def _adjoint_residual(self, c, loss_gradient):
        """(G X + K*Y + grad_x l, F Y - K X - grad_y l)."""
        first, second = self._product(c)
        return trees.add(first, loss_gradient[0]), trees.sub(second, loss_gradient[1])

    def _symmetric_tol(self, residual):
        """Where MINRES on the system made symmetric may stop."""
        return NEWTON_RTOL * trees.norm(self.at.lift(residual))

    def _minres(self, c, residual, steps, tol):
        """(c, residual, products): ``steps`` MINRES steps on the system, made symmetric by applying `lift` to it.

        The part of c that `lift` does not see follows from its own equations, to which K contributes nothing.
        """

        def symmetric(c):
            x, y = self.at.lift(self._product(c))
            return x, trees.neg(y)

        x, y = self.at.lift(residual)
        rhs = (trees.neg(x), y)
        found = minimal_residual(symmetric, rhs, trees.zeros_like(rhs), tol, steps, zero_start=True)
        residual = trees.add(residual, self._product(found.x))
        pulls = (self.at.pull_x, self.at.pull_y)
        kernel_part = tuple(trees.sub(d, pull(d)) for d, pull in zip(residual, pulls, strict=True))
        c = trees.sub(trees.add(c, found.x), kernel_part)
        return c, trees.sub(residual, self._product(kernel_part)), found.products + 2

    def point(self, adjoint: Adjoint) -> tuple:
        return self._point(adjoint.parts[1])

    def _point(self, c) -> tuple:
        return self.x, ProxPoint(p=self.p, r=self.r, cotangents=c, tau=self.tau, sigma=self.sigma)

    def distance(self, proven, corrected: bool):
        """Twice the length of a short Newton step, of x at most as proven."""
        parts = self.subgradient
        c, _, spent = self._minres(trees.zeros_like(parts), parts, DISTANCE_STEPS, self._symmetric_tol(parts))
        first, second = (2 * trees.norm(part) for part in self.at.lift(c))
        return (jnp.minimum(first, proven), second), spent

    def unrounded(self):
        return self.view.measure(*self._unrounded(self.subgradient, self.x, (self.p, self.r)))

    def unrounded_adjoint(self, adjoint: Adjoint):
        return self.view.measure(*self._unrounded_adjoint(adjoint))

    def _unrounded_adjoint(self, adjoint: Adjoint):
        residual, c = adjoint.parts
        return self._unrounded(residual, adjoint.q, (times(self.at.tau, c[0]), times(self.at.sigma, c[1])))

    def _unrounded(self, parts, values, arguments):
        """Norms of the parts without rounding: they are sums of values and arguments of proxes, over their steps."""
        blocks = zip(parts, values, arguments, (self.at.tau, self.at.sigma), strict=True)
        return tuple(
            self.view.unrounded(trees.norm(part), (divided(v, step), divided(a, step)), 1.0)
            for part, v, a, step in blocks
        )

    def norms(self, adjoint: Adjoint, error) -> Norms:
        known = self._unrounded(self.subgradient, self.x, (self.p, self.r))
        return Norms(
            point=tuple(trees.norm(part) for part in self.x),
            adjoint=tuple(trees.norm(part) for part in adjoint.q),
            residual=self._unrounded_adjoint(adjoint),
            error=self.view.bounds(*known),
            rounding=tuple(size - trees.norm(part) for size, part in zip(known, self.subgradient, strict=True)),
        )

    def shift(self, adjoint: Adjoint):
        (first, second), (x, y) = self.subgradient, adjoint.q
        return trees.dot(y, second) - trees.dot(x, first)

    def blocks(self, loss, params, data) -> Blocks:
        view, constants = self.view, self.view.constants
        sees_dual = depends_on(lambda y, x, data: loss(params, (x, y), data), self.x[1], self.x[0], data)
        distances = None if view.certified is False or not view.proven_norm else view.bounds
        return Blocks((constants.primal, constants.dual), distances, constants.linear_mixed, (True, sees_dual))

    def kept(self):
        return self.subgradient, self.norm


def _measure(view: SaddleView, parts):
    return view.measure(*(trees.norm(part) for part in parts))


@dataclass(frozen=True)
class SaddleLower(Lower):
    """A saddle point: x of the system is the pair (x, y), its adjoint the pair (X, Y)."""

    max_adjoint_steps: int

    def solve(self, view, x0, tol):
        solution = self.run(view, x0, tol)
        return self.system(view, solution.x, solution.gradient, solution.state.norm), solution.info

    def restore(self, view, x, kept) -> SaddleSystem:
        return self.system(view, x, *kept)

    def system(self, view: SaddleView, pair, subgradient, norm) -> SaddleSystem:
        """At a pair right after the proxes, from the element of T known there; the adjoint's steps do not shrink."""
        tau, sigma = replace(self.solver, accelerate=False).steps(view, norm)
        t, s = view.step_trees(tau, sigma)
        p = trees.add(pair[0], times(t, trees.sub(subgradient[0], view.transpose(pair[1]))))
        r = trees.add(pair[1], times(s, trees.add(subgradient[1], view.linear(pair[0]))))
        settings = {"norm": norm, "solver": self.solver, "max_steps": self.max_adjoint_steps}
        return SaddleSystem.of(view, p, r, tau, sigma, subgradient, **settings)

    def pairing(self, view, x, rest: ProxPoint):
        """-(<K x, Y> + <K X, y> - <c_x, prox_g(p)> + <c_y, prox_f*(r)>).

        -c_x times the derivative of the prox in a parameter equals X times that of grad g, as X = tau (d prox)' c_x.
        """
        fixed, c = jax.lax.stop_gradient, rest.cotangents
        at = Linearization.of(view, rest.p, rest.r, rest.tau, rest.sigma)
        adjoint_x, adjoint_y = fixed(at.lift(c))
        through_proxes = trees.dot(c[1], at.y) - trees.dot(c[0], at.x)
        through_linear = trees.dot(view.linear(fixed(at.x)), adjoint_y) + trees.dot(view.linear(adjoint_x), fixed(at.y))
        return -(through_linear + through_proxes)
