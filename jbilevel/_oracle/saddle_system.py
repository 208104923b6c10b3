"""The derivative of a saddle-point system through its proxes: products, solves, a Newton step, the pull-back.

With x = prox_g(p) and y = prox_f*(r) all Hessians appear through VJPs of the two proxes at p and r: (d prox_g)' =
(I + tau G)^-1 for the Hessian G of g at x, and where g has none it is what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._views.saddle import SaddleView
from jbilevel.prox import divided, times
from jbilevel.solvers.minres import iterate as minimal_residual

# MINRES in a Newton step stops once it removed all but this share of the residual, in either half of its steps
ENOUGH = 1e-3
# what a Newton step left of the error, per what it left of the residual: errors lie where the system is weak
CAUTION = 5.0


class Arguments(NamedTuple):
    """A saddle point by the arguments of its proxes, x = prox_g(p) and y = prox_f*(r), and its adjoint likewise.

    cotangents c: X = tau (d prox_g)' c_x and Y = sigma (d prox_f*)' c_y; tau and sigma are the steps of the proxes.
    """

    p: Any
    r: Any
    cotangents: Any
    tau: Any
    sigma: Any


class Frozen(NamedTuple):
    """The derivative of the saddle-point system at one point, through the proxes."""

    view: SaddleView
    p: Any
    r: Any
    x: Any
    y: Any
    tau: Any  # step trees
    sigma: Any
    pull_x: Callable  # VJP of prox_g at p
    pull_y: Callable

    @classmethod
    def at(cls, view: SaddleView, p, r, tau, sigma) -> Frozen:
        t, s = view.step_trees(tau, sigma)
        x, pull_x = jax.vjp(lambda v: view.prox_primal(v, t), p)
        y, pull_y = jax.vjp(lambda v: view.prox_dual(v, s), r)
        return cls(view, p, r, x, y, t, s, lambda c: pull_x(c)[0], lambda c: pull_y(c)[0])

    def element(self):
        """The element of T(x, y) that belongs to p and r (Robinson's normal map)."""
        first = trees.add(divided(trees.sub(self.p, self.x), self.tau), self.view.transpose(self.y))
        return first, trees.sub(divided(trees.sub(self.r, self.y), self.sigma), self.view.linear(self.x))

    def lift(self, c):
        """(X, Y) of the cotangents."""
        return times(self.tau, self.pull_x(c[0])), times(self.sigma, self.pull_y(c[1]))

    def product(self, c):
        """(G X + K*Y, F Y - K X) for (X, Y) = lift(c): c - X/tau stands for G X."""
        x, y = self.lift(c)
        first = trees.add(trees.sub(c[0], divided(x, self.tau)), self.view.transpose(y))
        return first, trees.sub(trees.sub(c[1], divided(y, self.sigma)), self.view.linear(x))

    def defect(self, c, slopes):
        """(G X + K*Y + slope_x, F Y - K X - slope_y)."""
        first, second = self.product(c)
        return trees.add(first, slopes[0]), trees.sub(second, slopes[1])

    def adjoint_view(self, slopes, tau, sigma) -> SaddleView:
        """The adjoint as a saddle problem of its own, whose proxes hold for these steps only."""
        return replace(
            self.view,
            prox_primal=lambda v, _: times(self.tau, self.pull_x(trees.sub(divided(v, self.tau), slopes[0]))),
            prox_dual=lambda v, _: times(self.sigma, self.pull_y(trees.add(divided(v, self.sigma), slopes[1]))),
            steps=(tau, sigma), linear_system=True,
        )  # fmt: skip

    def cotangents(self, adjoint, defect, slopes):
        """Those of an (X, Y) right after the proxes of `adjoint_view`, from the defect known there."""
        x, y = adjoint
        first = trees.sub(trees.add(divided(x, self.tau), defect[0]), trees.add(self.view.transpose(y), slopes[0]))
        second = trees.add(trees.add(divided(y, self.sigma), defect[1]), trees.add(self.view.linear(x), slopes[1]))
        return first, second

    def enough(self, defect):
        """Where MINRES on the system made symmetric may stop."""
        return ENOUGH * trees.norm(self.lift(defect))

    def improve(self, c, defect, steps, tol):
        """(c, defect, products): ``steps`` MINRES steps on the system, made symmetric by applying `lift` to it.

        The part of c that `lift` does not see follows from its own equations, to which K contributes nothing.
        """

        def symmetric(c):
            first, second = self.product(c)
            x, y = self.lift((first, second))
            return x, trees.neg(y)

        x, y = self.lift(defect)
        rhs = (trees.neg(x), y)
        found = minimal_residual(symmetric, rhs, trees.zeros_like(rhs), tol, steps, zero_start=True)
        defect = trees.add(defect, self.product(found.x))
        unseen = tuple(trees.sub(d, pull(d)) for d, pull in zip(defect, (self.pull_x, self.pull_y), strict=True))
        c = trees.sub(trees.add(c, found.x), unseen)
        return c, trees.sub(defect, self.product(unseen)), found.products + 2


def arguments(view: SaddleView, pair, element, tau, sigma):
    """(p, r) of a point right after the proxes, from the element of T known there."""
    (x, y), (first, second) = pair, element
    t, s = view.step_trees(tau, sigma)
    p = trees.add(x, times(t, trees.sub(first, view.transpose(y))))
    return p, trees.add(y, times(s, trees.add(second, view.linear(x))))


def measure(view: SaddleView, element):
    return view.measure(*(trees.norm(part) for part in element))


class Correction(NamedTuple):
    arguments: Arguments
    halfway: Arguments
    frozen: Frozen
    element: Any
    defect: Any
    left: Any
    products: Any


def newton_step(frozen: Frozen, loss_gradient, c, steps: int, tau, sigma) -> Correction:
    """One inexact semismooth Newton step on (p, r), and as much for the adjoint at the new point.

    As `jbilevel.errors.newton_step`, with MINRES on the saddle-point system in place of CG on the Hessian.
    """
    view, half = frozen.view, max(steps // 2, 1)
    element = frozen.element()
    zero = trees.zeros_like(c)
    tol = frozen.enough(element)
    first, rest, spent = frozen.improve(zero, element, half, tol)
    move, _, more = frozen.improve(first, rest, steps - half, ENOUGH * tol)

    def moved(move):
        p, r = trees.add(frozen.p, times(frozen.tau, move[0])), trees.add(frozen.r, times(frozen.sigma, move[1]))
        return Frozen.at(view, p, r, tau, sigma)

    candidate = moved(move)
    before, after = measure(view, element), measure(view, candidate.element())
    better = after <= before
    p, r = trees.where(better, (candidate.p, candidate.r), (frozen.p, frozen.r))
    fresh = Frozen.at(view, p, r, tau, sigma)
    halfway = moved(trees.where(better, first, zero))
    new_element = fresh.element()
    slopes = loss_gradient((fresh.x, fresh.y))
    missing = fresh.defect(c, slopes)
    tol = fresh.enough(missing)
    c_half, rest, half_spent = fresh.improve(c, missing, half, tol)
    c_new, defect, last_spent = fresh.improve(c_half, rest, steps - half, ENOUGH * tol)
    left = jnp.maximum(
        _share(measure(view, new_element), before), _share(measure(view, defect), measure(view, missing))
    )
    products = spent + more + half_spent + last_spent + 4
    return Correction(
        Arguments(p, r, c_new, tau, sigma), Arguments(halfway.p, halfway.r, c_half, tau, sigma), fresh, new_element,
        defect, CAUTION * left, products,
    )  # fmt: skip


def _share(after, before):
    return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)


def pairing(view: SaddleView, arguments: Arguments):
    """A function of the parameters behind ``view`` whose gradient is the indirect part of the hypergradient.

    <K x, Y> + <K X, y> - <c_x, prox_g(p)> + <c_y, prox_f*(r)>, all but K and the proxes held fixed: -c_x times the
    derivative of the prox in a parameter equals X times that of grad g, because X = tau (d prox)' c_x.
    """
    p, r, c, tau, sigma = jax.lax.stop_gradient(arguments)
    t, s = view.step_trees(tau, sigma)
    x, pull_x = jax.vjp(lambda v: view.prox_primal(v, t), p)
    y, pull_y = jax.vjp(lambda v: view.prox_dual(v, s), r)
    fixed = jax.lax.stop_gradient
    adjoint_x, adjoint_y = fixed(times(t, pull_x(c[0])[0])), fixed(times(s, pull_y(c[1])[0]))
    through_proxes = trees.dot(c[1], y) - trees.dot(c[0], x)
    through_linear = trees.dot(view.linear(fixed(x)), adjoint_y) + trees.dot(view.linear(adjoint_x), fixed(y))
    return through_linear + through_proxes
