"""Hypergradient errors: one inexact Newton step on (x, q) to estimate or remove them, and a proven bound.

For z(x, q) = d_params loss - d_params <grad_x energy, q>, the error of z at an inexact pair (x, q) is of first order
in both residuals. One Newton step on the pair removes that order, so the change of z estimates the error, and the
changed z is a better hypergradient. No third derivative is formed: the adjoint system is linearised again at the new x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel import trees
from jbilevel.constants import Constants
from jbilevel.results import Status, Work
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


def certificate(constants: Constants, loss_smoothness, pair: Pair, error, direct: bool):
    """Proven bound on ||z(x, q) - exact hypergradient|| (in exact arithmetic), inf where a constant is missing.

    With eps >= ||x - x_hat||, H(x_hat)(q - q_hat) = [H q - grad l](x) + (H(x_hat) - H(x)) q + grad l(x) - grad l(x_hat)
    gives ||q - q_hat|| <= e = (defect + (L_g + L_H ||q||) eps) / mu, hence
    ||z - z_hat|| <= L_J eps (||q|| + e) + ||J|| e. Same order as MAID's omega (paper 2; Theorem 2.1 there), with the
    computed ||q|| in place of ||grad l||/mu.

    Args:
      constants: of the energy. loss_smoothness: L_g, Lipschitz constant of x -> grad_x loss.
      error: eps. direct: True when the loss itself depends on params, whose Lipschitz constant is unknown here.
    """
    mu, _, hessian_lipschitz, mixed_lipschitz, mixed_norm = constants
    needed = (mu, hessian_lipschitz, mixed_lipschitz, mixed_norm, loss_smoothness)
    if direct or any(c is None for c in needed):
        return jnp.full_like(error, jnp.inf)
    q = trees.norm(pair.q)
    drift = (pair.defect + (loss_smoothness + hessian_lipschitz * q) * error) / mu
    bound = mixed_lipschitz * error * (q + drift) + mixed_norm * drift
    return jnp.where(jnp.isfinite(error), bound, jnp.inf).astype(error.dtype)


class ValueErrors(NamedTuple):
    """How far the upper-level value at inexact x is from exact, before and after its first-order correction."""

    shift: Any  # <q, grad_x energy>: value - shift is correct to second order
    estimate: Any  # of |value - shift - exact|
    bound: Any  # proven bound on |value - exact|, inf where a constant is missing
    bound_corrected: Any  # proven bound on |value - shift - exact|


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


def value_errors(constants: Constants, loss_smoothness, slope, pair: Pair, error, likely_error) -> ValueErrors:
    """loss(x_hat) = loss(x) - <q, grad energy(x)> + rest, |rest| <= defect eps + (L_g + L_H ||q||) eps^2/2, any q.

    Taylor: loss(x_hat) - loss(x) = <slope, D> + O(L_g |D|^2/2), D = x_hat - x, |D| <= eps; slope = H q + r with
    ||r|| = defect, and H D = -grad energy + O(L_H |D|^2/2). With q = 0 this is MAID's interval
    |slope| eps + L_g eps^2/2 (paper 2, "Sufficient decrease"); with a warm adjoint it is of second order. The estimate
    takes eps from `distance`, leaves L_H out, and takes L_g = 1 where it is not given.
    """
    smoothness = 1.0 if loss_smoothness is None else loss_smoothness
    shift = trees.dot(pair.q, pair.gradient)
    curved = 0.5 * error**2
    unknown = jnp.full_like(pair.defect, jnp.inf)
    # 0 * inf, of a loss that does not see x, is not NaN here
    times = lambda factor, size: jnp.where(jnp.isfinite(size), factor * size, jnp.inf)  # noqa: E731
    estimate = times(pair.defect, likely_error) + smoothness * 0.5 * likely_error**2
    direct = unknown if loss_smoothness is None else times(trees.norm(slope), error) + smoothness * curved
    weighted = unknown
    if loss_smoothness is not None and constants.hessian_lipschitz is not None:
        drift = smoothness + constants.hessian_lipschitz * trees.norm(pair.q)
        weighted = times(pair.defect, error) + drift * curved
    away = jnp.abs(shift)
    bound = jnp.minimum(direct, away + weighted)
    return ValueErrors(shift, estimate, bound, jnp.minimum(weighted, away + direct))


def depends_on_params(loss, params, x, data) -> bool:
    """Whether ``loss`` uses any inexact leaf of params (conservatively: reading one counts)."""
    jaxpr = jax.make_jaxpr(loss)(params, x, data).jaxpr
    count = len(jax.tree.leaves(params))
    inputs = {id(v) for v in jaxpr.invars[:count]}
    used = [v for equation in jaxpr.eqns for v in equation.invars] + list(jaxpr.outvars)
    return any(id(v) in inputs for v in used)


class SaddlePair(NamedTuple):
    """2-norms of an inexact saddle point (x, y), its adjoint (X, Y), and proven distances of (x, y) from exact.

    defect: of (G X + K*Y + grad_x l, F Y - K X - grad_y l), G and F the Hessians of g and f* at (x, y).
    """

    point: tuple
    adjoint: tuple
    defect: tuple
    error: tuple


def saddle_certificate(view, constants, loss_smoothness, sees_dual: bool, pair: SaddlePair, direct: bool):
    """Proven bound on ||z - exact hypergradient|| of a saddle point (in exact arithmetic), inf where one is missing.

    z = d_params[<K x, Y> + <K X, y> + <grad g(x), X> - <grad f*(y), Y>]. At the exact (x_hat, y_hat) the adjoint system
    of (X, Y) has a defect of at most R_x = defect_x + (L_g'' |X| + L) eps_x, and R_y likewise; its operator is strongly
    monotone, so that the distances E_x, E_y of (X, Y) from the exact adjoint follow from (R_x, R_y) as those of (x, y)
    from its residuals (`SaddleView.bounds`). This is (13)-(14) of paper 3 without inverse Hessians, hence with smaller
    constants, and for parameters in the proxes too; the sum below is its (16).
    """
    first, second, mixed = constants.primal, constants.dual, constants.linear_mixed
    needed = [loss_smoothness, mixed]
    needed += [getattr(c, n) for c in (first, second) for n in ("hessian_lipschitz", "mixed_lipschitz", "mixed_norm")]
    error_x, error_y = pair.error
    if direct or view.certified is False or not view.proven_norm or any(c is None for c in needed):
        return jnp.full_like(error_x, jnp.inf)
    (x, y), (adjoint_x, adjoint_y), (defect_x, defect_y) = pair.point, pair.adjoint, pair.defect
    rise = loss_smoothness * (jnp.hypot(error_x, error_y) if sees_dual else error_x)
    drift_x = defect_x + first.hessian_lipschitz * adjoint_x * error_x + rise
    drift_y = defect_y + second.hessian_lipschitz * adjoint_y * error_y + (rise if sees_dual else 0.0)
    off_x, off_y = view.bounds(drift_x, drift_y)
    bound = mixed * (y * off_x + (adjoint_x + off_x) * error_y + x * off_y + (adjoint_y + off_y) * error_x)
    for c, off, adjoint, error in ((first, off_x, adjoint_x, error_x), (second, off_y, adjoint_y, error_y)):
        bound = bound + c.mixed_norm * off + c.mixed_lipschitz * error * (adjoint + off)
    return jnp.where(jnp.isfinite(error_x), bound, jnp.inf).astype(error_x.dtype)


def saddle_value_errors(constants, loss_smoothness, slope, sees_dual: bool, shift, pair: SaddlePair, likely):
    """`value_errors` of a saddle point: loss(x_hat, y_hat) = loss(x, y) - shift + rest, shift = <Y, r_y> - <X, r_x>.

    |rest| <= |defect_x| eps_x + |defect_y| eps_y + sum of (L + L'' |adjoint|) eps^2/2, for any (X, Y), because
    T(x_hat, y_hat) = 0 contains T(x, y) - (derivative of T)(error). slope: norms of the two parts of grad loss.
    likely: estimated distances, for the estimate, which leaves L'' out and takes L = 1 where it is not given.
    """
    see = (1.0, 1.0 if sees_dual else 0.0)

    def rest(smoothness, first, bends, errors):
        """sum of first eps + (smoothness + bend) eps^2/2, where 0 * inf is 0."""
        linear = sum(_times(a, e) for a, e in zip(first, errors, strict=True))
        curved = (_times(smoothness * s + b, e**2) for s, b, e in zip(see, bends, errors, strict=True))
        return linear + 0.5 * sum(curved)

    none = (0.0, 0.0)
    estimate = rest(1.0 if loss_smoothness is None else loss_smoothness, pair.defect, none, likely)
    direct = weighted = jnp.full_like(shift, jnp.inf)
    if loss_smoothness is not None:
        direct = rest(loss_smoothness, [a * s for a, s in zip(slope, see, strict=True)], none, pair.error)
        bends = (constants.primal.hessian_lipschitz, constants.dual.hessian_lipschitz)
        if None not in bends:
            bends = [b * a for b, a in zip(bends, pair.adjoint, strict=True)]
            weighted = rest(loss_smoothness, pair.defect, bends, pair.error)
    away = jnp.abs(shift)
    return ValueErrors(shift, estimate, jnp.minimum(direct, away + weighted), jnp.minimum(weighted, away + direct))


def _times(size, error):
    size = jnp.asarray(size, error.dtype)
    return jnp.where(size == 0, 0.0, size * error)
