"""Proven bounds and estimates: how far inexact values and hypergradients are from exact."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.constants import Constants
from jbilevel._oracle.correction import Pair


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
