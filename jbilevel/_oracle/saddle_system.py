"""Saddle points: the derivative of the optimality system through the proxes, its adjoint, corrections, the pull-back.

With x = prox_g(p) and y = prox_f*(r) all Hessians appear through VJPs of the two proxes at p and r: (d prox_g)' =
(I + tau G)^-1 for the Hessian G of g at x, and where g has none it is what takes its place. The adjoint (X, Y) solves
G X + K*Y = -grad_x l, F Y - K X = grad_y l, with G, F the Hessians of g, f*: the same primal-dual iteration, with the
VJPs of the same proxes at the same arguments (Bogensperger et al. 2024, Algorithms 1 and 2).

A correction takes some of these iterations, accelerated, for both. A semismooth Newton step would have to guess which
constraints are active: far from the solution it guesses wrong, and then says nothing of the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jbilevel._core import trees
from jbilevel._core.results import Work
from jbilevel._oracle import acceleration
from jbilevel._oracle.bounds import Blocks, Near, Norms, depends_on
from jbilevel._oracle.smooth_system import DISTANCE_RTOL, DISTANCE_STEPS
from jbilevel._oracle.systems import Adjoint, Correction, Lower, System
from jbilevel._views.saddle import SaddleView
from jbilevel.prox import divided, times
from jbilevel.solvers.loop import Solution, run
from jbilevel.solvers.pdhg import PDHG

# pairs of vectors that an accelerated iteration remembers
MEMORY = 12
# an error that is left after a correction is told up to so many times what was removed
MOST_LEFT = 0.5


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


class _Halves(NamedTuple):
    """The best of the first half of some accelerated iterations, and of all."""

    halfway: Any
    last: Any
    away: Any  # estimated distance from the fixed point
    left: Any  # the same, against how far they moved
    products: Any


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
    away: Any = None  # estimated distance from (p, r) to exact ones, in the norm of the steps; None: not known

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

    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int, rtol: float) -> Correction:
        """Accelerated iterations for (p, r), and as many for the adjoint at the best of them."""
        half, c = max(steps // 2, 1), adjoint.parts[1]
        own = self._accelerated(self.iteration, (self.p, self.r), half, steps, rtol)
        corrected = replace(self._with(*own.last), away=own.away)
        corrected = replace(corrected, subgradient=corrected.normal_map())
        corrected = replace(corrected, residual=self.residual_of(corrected.subgradient))
        loss_gradient = loss_gradient_at(corrected.x)
        iteration = corrected.adjoint_iteration(loss_gradient)
        other = corrected._accelerated(iteration, c, half, steps, rtol, of_cotangents=True)
        remaining = corrected._adjoint_residual(other.last, loss_gradient)
        q, size = corrected.at.lift(other.last), self.residual_of(remaining)
        left = own.left + other.left
        return Correction(
            system=corrected,
            adjoint=adjoint._replace(q=q, residual=size, parts=(remaining, other.last)),
            halfway=self._with(*own.halfway)._point(other.halfway),
            point=corrected._point(other.last),
            left=jnp.where(left <= MOST_LEFT, left, jnp.inf),
            evaluations=Work.zero().plus(products=own.products + other.products + 2),
        )

    def iteration(self, z):
        """One primal-dual iteration in terms of the arguments (p, r) of its proxes."""
        at, (p, r) = self.at, z
        x, y = self.view.prox_primal(p, at.tau), self.view.prox_dual(r, at.sigma)
        p = trees.sub(x, times(at.tau, self.view.transpose(y)))
        ahead = trees.sub(trees.scale(2.0, self.view.prox_primal(p, at.tau)), x)
        return p, trees.add(y, times(at.sigma, self.view.linear(ahead)))

    def adjoint_iteration(self, loss_gradient):
        """The same for the adjoint, in terms of its cotangents."""
        at, (first, second) = self.at, loss_gradient

        def iteration(c):
            x, y = at.lift(c)
            c_x = trees.sub(divided(x, at.tau), trees.add(self.view.transpose(y), first))
            ahead = trees.sub(trees.scale(2.0, times(at.tau, at.pull_x(c_x))), x)
            return c_x, trees.add(divided(y, at.sigma), trees.add(self.view.linear(ahead), second))

        return iteration

    def _accelerated(
        self, iteration, start, half: int, steps: int, rtol: float, of_cotangents: bool = False
    ) -> _Halves:
        """``steps`` of an iteration in the norm of its steps, sqrt(|x|^2/tau + |y|^2/sigma)."""
        roots = jax.tree.map(jnp.sqrt, (self.at.tau, self.at.sigma))
        if not of_cotangents:
            roots = jax.tree.map(lambda root: 1 / root, roots)
        flat = lambda pair: ravel_pytree(tuple(map(times, roots, pair)))[0]  # noqa: E731
        unravel = ravel_pytree(start)[1]
        back = lambda v: tuple(map(divided, unravel(v), roots))  # noqa: E731
        step = lambda v: flat(iteration(back(v)))  # noqa: E731
        first = acceleration.begin(step, flat(start), min(MEMORY, steps))
        middle = acceleration.resume(step, first, rtol * first.size, half)
        last = acceleration.resume(step, middle, rtol**2 * first.size, steps)
        moved = trees.norm(trees.sub(last.best, first.best))
        left = last.distance / jnp.where(moved > 0, moved, 1.0)
        left = jnp.where(last.size == 0, 0.0, jnp.where(moved > 0, left, jnp.inf))
        return _Halves(back(middle.best), back(last.best), last.distance, left, last.steps + 1)

    def normal_map(self):
        """The element of T(x, y) that belongs to p and r (Robinson's normal map)."""
        at = self.at
        first = trees.add(divided(trees.sub(self.p, at.x), at.tau), self.view.transpose(at.y))
        return first, trees.sub(divided(trees.sub(self.r, at.y), at.sigma), self.view.linear(at.x))

    def residual_of(self, parts):
        return _measure(self.view, parts)

    def _with(self, p, r) -> SaddleSystem:
        return replace(self, p=p, r=r, at=Linearization.of(self.view, p, r, self.tau, self.sigma))

    def _product(self, c):
        """(G X + K*Y, F Y - K X) for (X, Y) = lift(c): c - X/tau stands for G X."""
        x, y = self.at.lift(c)
        first = trees.add(trees.sub(c[0], divided(x, self.at.tau)), self.view.transpose(y))
        return first, trees.sub(trees.sub(c[1], divided(y, self.at.sigma)), self.view.linear(x))

    def _adjoint_residual(self, c, loss_gradient):
        """(G X + K*Y + grad_x l, F Y - K X - grad_y l)."""
        first, second = self._product(c)
        return trees.add(first, loss_gradient[0]), trees.sub(second, loss_gradient[1])

    def point(self, adjoint: Adjoint) -> tuple:
        return self._point(adjoint.parts[1])

    def _point(self, c) -> tuple:
        return self.x, ProxPoint(p=self.p, r=self.r, cotangents=c, tau=self.tau, sigma=self.sigma)

    def distance(self, proven, corrected: bool):
        """Of x at most as proven: what a correction knows, else twice the length of a few accelerated iterations."""
        if self.away is not None:
            first, second = (self.away * _largest(steps) ** 0.5 for steps in (self.at.tau, self.at.sigma))
            return (jnp.minimum(first, proven), second), 0
        found = self._accelerated(self.iteration, (self.p, self.r), DISTANCE_STEPS, DISTANCE_STEPS, DISTANCE_RTOL)
        moved = trees.sub(self._with(*found.last).x, self.x)
        first, second = (2 * trees.norm(part) for part in moved)
        return (jnp.minimum(first, proven), second), found.products

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

    def near(self, adjoint: Adjoint, norms: Norms) -> Near | None:
        """y is the gradient of the potentials b at v = (r - y)/sigma, and Y = A w with their Hessian A at v.

        (X, Y) solves the system of the exact point, with the Hessian A' of b at K x_hat, up to its own residuals and
        K*(A - A')w in the first equation, once Y is replaced by Y + (A' - A)w. The loss at the exact point is, apart
        from residuals and its own second order, off by <w, (mean of A' on the way - A)(K x_hat - v)>.
        """
        ridges = self.view.known_ridges()
        if ridges is None or self.view.certified is False:
            return None
        second = ridges.of_dual(self.subgradient[1])
        y, product = (ridges.of_dual(pair[1]) for pair in (self.x, adjoint.q))
        sigma, r, c = (ridges.of_dual(tree) for tree in (self.at.sigma, self.r, adjoint.parts[1][1]))
        around = ridges.around((r - y) / sigma, c - product / sigma, norms.error[0], trees.norm(second))
        (point, _), (q, _), (error, _) = norms.point, norms.adjoint, norms.error

        def gradient(errors, residuals):
            return around.gradient(
                point=point,
                adjoint=q,
                error=error,
                adjoint_error=errors[0],
                direction_error=ridges.norm * errors[0] + residuals[1],
                product_error=errors[1],
            )

        zero = jnp.zeros_like(error)
        return Near(drift=(ridges.norm * around.change, zero), second=around.change * around.reach, gradient=gradient)

    def kept(self):
        return self.subgradient, self.norm


def _largest(steps):
    return reduce(jnp.maximum, map(jnp.max, jax.tree.leaves(steps)))


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

    def adjoint_size(self, view, loss_gradient):
        return _measure(view, loss_gradient)

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
