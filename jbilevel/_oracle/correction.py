"""Hypergradient errors: one inexact Newton step on (x, q) to estimate or remove them, and a proven bound.

For z(x, q) = d_params loss - d_params <grad_x energy, q>, the error of z at an inexact pair (x, q) is of first order
in both residuals. One Newton step on the pair removes that order, so the change of z estimates the error, and the
changed z is a better hypergradient. No third derivative is formed: the adjoint system is linearised again at the new x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.constants import Constants
from jbilevel._core.results import Status, Work
from jbilevel.solvers.cg import iterate as conjugate_gradients
from jbilevel.solvers.mixed import curvature

# CG in the Newton step stops early once it removed all but this share of the residual.
ENOUGH = 1e-3
# CG steps towards the Newton step whose length estimates ||x - x_hat|| where mu is unknown
DISTANCE_STEPS = 5


class Pair(NamedTuple):
    """An inexact lower-level solution and adjoint, with the residuals that measure them."""

    x: Any
    q: Any
    energy: Any
    gradient: Any  # grad_x energy(x)
    residual: Any  # ||grad_x energy(x)||
    defect: Any  # ||H(x) q - grad_x loss(x)||


class Correction(NamedTuple):
    pair: Pair
    halfway: tuple  # (x, q) after half of the steps: how far the last half moved z tells what is left
    left: Any  # share of the two residuals that is left
    evaluations: Work


def newton_step(view, loss_gradient, pair: Pair, product, steps: int) -> Correction:
    """One inexact Newton step on (x, q): H d = -grad at x, then H' q' = grad loss at x' = x + d, from q.

    Args:
      view: the problem at (params, data). loss_gradient: x -> grad_x loss.
      pair: the current pair. product: Hessian product at pair.x. steps: CG steps in each of the two systems.
    """
    half = steps // 2
    hessian = curvature(view, pair.x, product)
    downhill = trees.neg(pair.gradient)
    first = hessian.start(downhill, half, ENOUGH)
    move = hessian.resume(first, steps, ENOUGH)
    candidate = trees.add(pair.x, hessian.lift(move, downhill))
    # where the energy is far from quadratic the step may lose: then keep x, and improve q alone
    energy, gradient = view.value_and_gradient(candidate)
    room = 10 * trees.eps(candidate) * jnp.abs(pair.energy)
    better = (trees.norm(gradient) <= pair.residual) | (energy <= pair.energy - room)
    x = trees.where(better, candidate, pair.x)
    x_halfway = trees.where(better, trees.add(pair.x, hessian.lift(first, downhill)), pair.x)
    _, gradient, product = view.linearize(x)
    hessian = curvature(view, x, product)
    missing = trees.sub(loss_gradient(x), product(pair.q))
    first = hessian.start(missing, half, ENOUGH)
    solve = hessian.resume(first, steps, ENOUGH)
    q, q_halfway = (trees.add(pair.q, hessian.lift(state, missing)) for state in (solve, first))
    work = Work.zero().plus(gradients=2, products=move.steps + solve.steps + 1)
    before = trees.norm(missing)
    defect = before * jnp.sqrt(solve.squared).astype(before.dtype)
    new = Pair(x, q, jnp.where(better, energy, pair.energy), gradient, trees.norm(gradient), defect)
    left = jnp.maximum(_share(new.residual, pair.residual), _share(defect, before))
    indefinite = (move.status == Status.INDEFINITE) | (solve.status == Status.INDEFINITE)
    left = jnp.where(indefinite, jnp.inf, left)
    return Correction(new, (x_halfway, q_halfway), left, work)


def _share(after, before):
    return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)


def remaining(moved_first, moved_last, left):
    """Estimate of the error of z after the correction, from how far its two halves moved z.

    When each half of the steps contracts the error alike, a half that moved z by ``moved_last`` after one that moved it
    by ``moved_first`` leaves about moved_last^2/(moved_first - moved_last). Where both halves converged it is the share
    ``left`` of the residuals that tells: it also holds what the linearisation missed.
    """
    ratio = moved_last / jnp.where(moved_first > 0, moved_first, 1.0)
    ratio = jnp.where(moved_first > 0, jnp.minimum(ratio, 0.5), 0.5)
    return jnp.maximum(moved_last * ratio / (1 - ratio), left * (moved_first + moved_last))


def distance(constants: Constants, product, gradient, proven, sharpen: bool = False):
    """(||x - x_hat||, products spent): as proven where mu is known, else estimated.

    The estimate is twice the length of a few CG steps on H d = gradient: lengths grow towards ||d|| with the steps
    (Steihaug 1983). It is ``proven``, or inf, where the Hessian is indefinite along the way. ``sharpen`` takes the
    smaller of the two where mu is known: after a Newton step the proven one is far too large.
    """
    if constants.strong_convexity is not None and not sharpen:
        return proven, 0
    enough = ENOUGH * trees.norm(gradient)
    start = trees.zeros_like(gradient)
    newton = conjugate_gradients(product, gradient, start, enough, DISTANCE_STEPS, zero_start=True)
    estimate = jnp.where(newton.status == Status.INDEFINITE, jnp.inf, 2 * trees.norm(newton.x))
    return jnp.minimum(estimate, proven), newton.steps
