"""Weighted l1 problems: the smooth system of the unknowns that may move.

Off its kinks x_hat moves smoothly on the set S of unknowns that the forward-backward map lets through, and the rest
stays zero. So with H = Hessian of F (plus that of group norms), H_SS q_S = (grad_x loss)_S and q = 0 elsewhere. At a
kink some unknowns are biactive, |grad F_i| = weight_i with x_i = 0, and x_hat has several one-sided derivatives: a
policy chooses which of them count as moving. Each choice is a limit of the derivative formula on one side of the kink.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.results import Status, acceptable
from jbilevel._oracle.bounds import Norms
from jbilevel._oracle.smooth_system import SmoothSystem
from jbilevel._oracle.systems import Adjoint, Correction, Lower
from jbilevel._views.weighted_l1 import SupportView, WeightedL1View
from jbilevel.solvers.cg import cg
from jbilevel.solvers.linear import CG

BIACTIVE = ("none", "all", "sign", "self-consistent")


@dataclass(frozen=True)
class Policy:
    """What chooses and solves the adjoint system, see `jbilevel.nonsmooth.Oracle`."""

    biactive: str
    biactive_tol: float
    damping: float

    def __post_init__(self):
        if self.biactive not in BIACTIVE:
            raise ValueError(f"`biactive` must be one of {BIACTIVE}, got {self.biactive!r}.")
        if not 0 <= self.biactive_tol < 1:
            raise ValueError(f"`biactive_tol` must be at least 0 and below 1, got {self.biactive_tol}.")
        if not self.damping >= 0:
            raise ValueError(f"`damping` must be nonnegative, got {self.damping}.")


@dataclass(frozen=True)
class SupportSystem(SmoothSystem):
    """`SmoothSystem` on the support, which is chosen with the adjoint: ``view`` is then a `SupportView`."""

    whole: WeightedL1View
    linearized: tuple  # (value, gradient, product) of F at x
    step: Any  # of the forward-backward map that tells the indices
    policy: Policy
    solved: Any = None  # residual of the solve
    outside: Any = False  # whether x is where a correction left the set on which this system holds

    def adjoint(self, loss_gradient, start, tol) -> Adjoint:
        """H_SS q_S = (grad loss)_S with the biactive unknowns that the policy lets move."""
        sets = self.whole.index_sets(self.x, self.linearized[1], self.step, self.policy.biactive_tol)
        penalty, rounding = self.whole.penalty, 64 * trees.eps(self.x) / self.step

        def along(v, one_sided):
            """Its part along the direction in which each biactive unknown would leave zero, where ``one_sided``."""
            inner = jax.tree.map(jnp.multiply, sets.direction, v)
            if penalty.axis is not None:
                inner = jax.tree.map(lambda leaf: jnp.sum(leaf, penalty.axis, keepdims=True), inner)
            return jax.tree.map(lambda e, leaf: jnp.where(e, leaf, 0.0), one_sided, inner)

        def solve(one_sided, q):
            support = SupportView(self.whole, sets.active, one_sided, sets.direction)
            plain = support.product(self.x, self.linearized[2])

            def system(d):
                mapped = trees.add_scaled(plain(d), self.policy.damping, support.project(d))
                # curvature that is rounding counts as none, so that dependent columns end CG before it divides by it
                curved = trees.dot(d, mapped) > rounding * trees.squared_norm(d)
                return trees.where(curved, mapped, trees.zeros_like(mapped))

            rhs, limit = support.project(loss_gradient), self.max_products
            q, info = cg(system, rhs, support.project(q), tol=tol, max_steps=limit)
            status = jnp.where(info.status == Status.INDEFINITE, Status.STAGNATED, info.status).astype(jnp.int32)
            return support.project(q), info._replace(status=status)

        none = jax.tree.map(jnp.zeros_like, sets.biactive)
        descending = jax.tree.map(lambda part: part < 0, along(loss_gradient, sets.biactive))  # the loss, off zero
        one_sided = {"none": none, "sign": descending}.get(self.policy.biactive, sets.biactive)
        q, info = solve(one_sided, start)
        if self.policy.biactive == "self-consistent":
            # those that the adjoint does not want off zero leave, until all agree
            def disagree(one_sided, q):
                return jax.tree.map(lambda part: part > 0, along(q, one_sided))

            def any_disagree(carry):
                return jnp.any(jnp.stack([jnp.any(leaf) for leaf in jax.tree.leaves(disagree(*carry[:2]))]))

            def drop(carry):
                one_sided, q, info = carry
                one_sided = jax.tree.map(lambda e, off: e & ~off, one_sided, disagree(one_sided, q))
                q, again = solve(one_sided, q)
                evaluations = info.evaluations.join(again.evaluations)
                return one_sided, q, again._replace(steps=info.steps + again.steps, evaluations=evaluations)

            one_sided, q, info = jax.lax.while_loop(any_disagree, drop, (one_sided, q, info))
        return Adjoint(q, info.residual, info, SupportView(self.whole, sets.active, one_sided, sets.direction))

    def at_adjoint(self, adjoint: Adjoint) -> SupportSystem:
        return self.on(adjoint.parts)

    def on(self, support: SupportView) -> SupportSystem:
        """The system on a support that was chosen."""
        energy, gradient, product = support.assemble(self.x, *self.linearized)
        residual = trees.norm(gradient)
        return replace(self, view=support, energy=energy, gradient=gradient, product=product, residual=residual)

    def guess(self, loss_gradient, q) -> Adjoint:
        q = self.view.project(q)
        return super().guess(self.view.project(loss_gradient), q)

    def correct(self, loss_gradient_at, adjoint: Adjoint, steps: int, rtol: float) -> Correction:
        support: SupportView = self.view
        found = super().correct(lambda z: support.project(loss_gradient_at(support.project(z))), adjoint, steps, rtol)
        # the step stays on one support: where another begins it proves nothing
        x = support.project(found.system.x)
        after, rounding = self._proven_residual(x), trees.eps(self.x) * trees.norm(self.x) / self.step * 64
        outside = ~(after <= jnp.maximum(self.solved, rounding))
        left = jnp.where(outside | ~acceptable(adjoint.info.status), jnp.inf, found.left)
        system = replace(found.system, x=x, residual=after, outside=outside)
        improved = found.adjoint._replace(q=support.project(found.adjoint.q))
        halfway = _point(support, *(support.project(part) for part in found.halfway))
        return found._replace(
            system=system,
            adjoint=improved,
            halfway=halfway,
            point=system.point(improved),
            left=left,
            approach=None,
            evaluations=found.evaluations.plus(gradients=1),
        )

    def _proven_residual(self, x):
        """mu times a bound on ||x - x_hat|| (without mu the forward-backward residual), for any x.

        The residual bounds the distance of x+ = prox(x - step grad F(x)); x is step times its norm away from there.
        """
        moved = trees.add_scaled(x, -self.step, self.whole.smooth.gradient(x))
        size = trees.norm(trees.sub(x, self.whole.penalty.prox(moved, self.step))) / self.step
        mu = self.whole.constants.strong_convexity
        return self.whole.measure(size, 1 / self.step) + (0.0 if mu is None else mu * self.step * size)

    def point(self, adjoint: Adjoint) -> tuple:
        return _point(self.view, self.x, adjoint.q)

    def distance(self, proven, corrected: bool):
        (likely,), spent = super().distance(proven, True)
        return (jnp.where(self.outside, jnp.inf, likely),), spent

    def near(self, adjoint: Adjoint, norms: Norms) -> None:
        """Nothing: the support itself may change nearby."""
        return None

    def kept(self):
        return self.step


def _point(support: SupportView, x, q):
    """(x, (q, sign(x))), and where x is zero the sign it would take."""
    kept, penalty = support.project(x), support.view.penalty
    choose = lambda u, fixed, s: jnp.where(s > 0, u, fixed)  # noqa: E731
    return x, (q, jax.tree.map(choose, penalty.direction(kept), support.direction, penalty.sizes(kept)))


@dataclass(frozen=True)
class SupportLower(Lower):
    """A weighted l1 problem."""

    policy: Policy
    max_products: int

    def solve(self, view, x0, tol):
        system, info = self._solve(view, x0, tol)
        sets = view.index_sets(system.x, system.linearized[1], system.step, 0.0)
        none = jax.tree.map(jnp.zeros_like, sets.active)
        return system.on(SupportView(view, sets.active, none, sets.direction)), info

    def solve_both(self, view, loss_gradient_at, warm, tol, adjoint_tol):
        system, info = self._solve(view, warm.x, tol)
        adjoint = system.adjoint(loss_gradient_at(system.x), warm.adjoint, adjoint_tol)
        return system.at_adjoint(adjoint), info, adjoint

    def _solve(self, view, x0, tol):
        solution = self.run(view, x0, tol)
        info = solution.info._replace(evaluations=solution.info.evaluations.plus(gradients=1))
        return replace(self.restore(view, solution.x, 1 / solution.state.smoothness), solved=info.residual), info

    def restore(self, view: WeightedL1View, x, kept) -> SupportSystem:
        """Not yet on a support."""
        linearized = view.smooth.linearize(x)
        energy, gradient, product = linearized
        return SupportSystem(
            view=None,
            x=x,
            energy=energy,
            gradient=gradient,
            product=product,
            residual=None,
            curvature=1 / kept,
            linear_solver=CG(),
            max_products=self.max_products,
            least_curvature=math.inf,
            whole=view,
            linearized=linearized,
            step=kept,
            policy=self.policy,
        )

    def pairing(self, view: WeightedL1View, x, rest):
        """<grad F(x) + weights sign(x), q>."""
        q, direction = rest
        weighted = jax.tree.map(lambda w, u, part: jnp.sum(w * u * part), view.penalty.weights, direction, q)
        return view.smooth.directional(x, q) + sum(jax.tree.leaves(weighted))
