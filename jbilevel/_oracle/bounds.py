"""Proven bounds and estimates: how far values and hypergradients at inexact solutions are from exact.

A smooth lower level has one block of unknowns x, a saddle point two, x and y. With the norms of an inexact solution
and its adjoint, block by block, the same sums hold for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add, mul
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core.constants import Constants

# by which an error that is left may hit z harder than the one that was removed
SAFETY = 2.0


class Norms(NamedTuple):
    """2-norms of the blocks of an inexact solution x and its adjoint q, with what is proven of them in spite of
    rounding."""

    point: tuple
    adjoint: tuple
    residual: tuple  # of q, without rounding
    error: tuple  # distances of x
    rounding: tuple  # of the gradient at x


class Blocks(NamedTuple):
    """What is known of the blocks of a lower level: see `gradient_bound`."""

    constants: Sequence[Constants]
    distances: Callable | None  # proven distances of the adjoint from its residuals; None where nothing is proven
    linear_mixed: Any = 0.0  # of `SaddleConstants`
    seen: Sequence[bool] = (True,)  # whether the loss reads the block
    near: Near | None = None  # instead of the Lipschitz constants, where it is known


class Near(NamedTuple):
    """Bounds on what changes between the computed point and the exact one: see `jbilevel.regularizers.RidgeSum`."""

    drift: tuple  # by block: what the residual of the computed adjoint in the exact system may have besides
    second: Any  # |remainder| of the first-order expansion of the upper-level value
    gradient: Callable  # (errors, residuals of the adjoint by block) -> of the indirect part of the hypergradient


def gradient_bound(blocks: Blocks, loss_smoothness, norms: Norms, unit):
    """Proven bound on ||z - exact hypergradient||, inf where a constant is missing.

    z is the hypergradient at an inexact solution x and adjoint q. With eps >= ||x - x_hat|| the exact adjoint system
    holds for q up to R = residual + (L_H ||q|| + L_g) eps, so that q is within e(R) of exact, e the bound by which
    residuals prove distances (R/mu for a smooth energy). Hence ||z - z_hat|| <= L_J eps (||q|| + e) + ||J|| e, the
    order of MAID's omega (Salehi et al. 2024, Theorem 2.1) with the computed ||q|| in place of ||grad l||/mu.

    For a saddle point the blocks add up, and parameters of the linear operator K with
    |<(d K)[e] x, y>| <= J ||e|| ||x|| ||y|| contribute J (|y| E_x + (|X| + E_x) eps_y + |x| E_y + (|Y| + E_y) eps_x):
    (13), (14) and (16) of Bogensperger et al. 2024 without inverse Hessians, hence with smaller constants, and for
    parameters in the proxes too.

    With `Near` the terms with L_H and L_J are what it says: an adjoint of the same residuals is e away from exact then.
    What rounding does to x, q and their residuals is in ``norms``. z is a sum of products with ||J||, of which it
    moves ``unit`` (J ||q||).
    """
    needed = [loss_smoothness]
    if blocks.near is None:
        needed.append(blocks.linear_mixed)
        for c in blocks.constants:
            needed += [c.hessian_lipschitz, c.mixed_lipschitz, c.mixed_norm]
    first = norms.error[0]
    if blocks.distances is None or any(c is None for c in needed):
        return jnp.full_like(first, jnp.inf)
    loss_gradient_error = loss_smoothness * reduce(
        jnp.hypot, (e for e, seen in zip(norms.error, blocks.seen, strict=True) if seen)
    )
    rows = list(zip(blocks.constants, norms.adjoint, norms.error, strict=True))
    if blocks.near is None:
        drift = [c.hessian_lipschitz * q * error for c, q, error in rows]
    else:
        drift = blocks.near.drift
    adjoint_residuals = [
        residual + (loss_gradient_error if seen else 0.0) + moved
        for residual, seen, moved in zip(norms.residual, blocks.seen, drift, strict=True)
    ]
    adjoint_errors = blocks.distances(*adjoint_residuals)
    if blocks.near is not None:
        with_rounding = [e + unit * q for e, q in zip(adjoint_errors, norms.adjoint, strict=True)]
        bound = blocks.near.gradient(with_rounding, adjoint_residuals)
        return jnp.where(jnp.isfinite(first), bound, jnp.inf).astype(first.dtype)
    bound = 0.0
    for (c, q, error), e in zip(rows, adjoint_errors, strict=True):
        bound += c.mixed_norm * (e + unit * q) + c.mixed_lipschitz * error * (q + e)
    if len(adjoint_errors) == 2:
        for i, j in ((0, 1), (1, 0)):
            bound += blocks.linear_mixed * (
                norms.point[j] * (adjoint_errors[i] + unit * norms.adjoint[i])
                + (norms.adjoint[i] + adjoint_errors[i]) * norms.error[j]
            )
    return jnp.where(jnp.isfinite(first), bound, jnp.inf).astype(first.dtype)


class ValueErrors(NamedTuple):
    """How far the upper-level value at inexact x is from exact, before and after its first-order correction."""

    estimate: Any  # of |value - shift - exact|
    bound: Any  # proven bound on |value - exact|, inf where a constant is missing
    bound_corrected: Any  # proven bound on |value - shift - exact|


def value_errors(
    blocks: Blocks, loss_smoothness, value, loss_gradient: Sequence, shift, norms: Norms, distances, unit
) -> ValueErrors:
    """loss(x_hat) = loss(x) - shift + R, |R| <= sum over blocks of residual eps + (L_g + L_H ||q||) eps^2/2.

    Holds for any q, with residual that of q in the adjoint system and shift = <q, grad energy(x)>. Taylor: loss(x_hat)
    - loss(x) = <grad loss, D> + O(L_g |D|^2/2), D = x_hat - x, |D| <= eps; grad loss = H q + r with ||r|| = residual,
    and H D = -grad energy + O(L_H |D|^2/2). With q = 0 this is MAID's interval |grad loss| eps + L_g eps^2/2 (Salehi et
    al. 2024, "Sufficient decrease"); with a warm adjoint it is of second order. The estimate takes ``distances`` for
    eps, leaves L_H out, and takes L_g = 1 where it is not given. loss_gradient: norms of its blocks.

    Rounding moves the value by ``unit`` (|value| + ||grad loss|| ||x||): a loss whose terms are far larger, by an
    offset that cancels, needs an x of higher precision. It moves the shift by ||q|| times the rounding of the gradient.
    """

    def remainder(smoothness, first, second, errors):
        """sum of first eps + (smoothness + second) eps^2/2, where 0 * inf is 0."""
        linear = reduce(add, (_times(a, e) for a, e in zip(first, errors, strict=True)))
        rows = zip(blocks.seen, second, errors, strict=True)
        return linear + 0.5 * reduce(add, (_times((smoothness if seen else 0.0) + b, e**2) for seen, b, e in rows))

    none = (0.0,) * len(blocks.seen)
    estimate = remainder(1.0 if loss_smoothness is None else loss_smoothness, norms.residual, none, distances)
    direct = weighted = jnp.full_like(shift, jnp.inf)
    if loss_smoothness is not None:
        read = [a if seen else 0.0 * a for a, seen in zip(loss_gradient, blocks.seen, strict=True)]
        direct = remainder(loss_smoothness, read, none, norms.error)
        lipschitz = [c.hessian_lipschitz for c in blocks.constants]
        if blocks.near is not None:
            weighted = remainder(loss_smoothness, norms.residual, none, norms.error) + blocks.near.second
            weighted = jnp.where(jnp.isfinite(norms.error[0]), weighted, jnp.inf).astype(shift.dtype)
        elif None not in lipschitz:
            second = [b * q for b, q in zip(lipschitz, norms.adjoint, strict=True)]
            weighted = remainder(loss_smoothness, norms.residual, second, norms.error)
    of_value = unit * reduce(add, map(mul, loss_gradient, norms.point), jnp.abs(value))
    of_shift = reduce(add, map(mul, norms.adjoint, norms.rounding))
    first_order = jnp.abs(shift)
    bound = of_value + jnp.minimum(direct, first_order + of_shift + weighted)
    bound_corrected = of_value + of_shift + jnp.minimum(weighted, first_order + direct)
    return ValueErrors(estimate, bound, bound_corrected)


def _times(size, error):
    if isinstance(size, (int, float)):
        return size * error if size else 0.0
    size = jnp.asarray(size, error.dtype)
    return jnp.where(size == 0, 0.0, size * error)


def depends_on(function, first, *others) -> bool:
    """Whether ``function(first, *others)`` uses any inexact leaf of its first argument (reading one counts)."""
    jaxpr = jax.make_jaxpr(function)(first, *others).jaxpr
    inputs = {id(v) for v in jaxpr.invars[: len(jax.tree.leaves(first))]}
    used = [v for equation in jaxpr.eqns for v in equation.invars] + list(jaxpr.outvars)
    return any(id(v) in inputs for v in used)


def removed_and_left(removed, moved_first, moved_last, left):
    """Estimate of the error of z before a Newton correction that changed z by ``removed``, in two halves.

    left: how large the error of the unknowns is after the correction, against the part that was removed. The halves
    tell how far z moves when the unknowns do: their sum, because a single change may be small by chance.
    """
    return removed + _left(left, moved_first + moved_last)


def remaining(moved_first, moved_last, left):
    """Estimate of the error of z after a Newton correction, from how far its two halves moved z.

    When each half of the steps contracts the error alike, a half that moved z by ``moved_last`` after one that moved it
    by ``moved_first`` leaves about moved_last^2/(moved_first - moved_last). left: as in `removed_and_left`.
    """
    ratio = moved_last / jnp.where(moved_first > 0, moved_first, 1.0)
    ratio = jnp.where(moved_first > 0, jnp.minimum(ratio, 0.5), 0.5)
    return jnp.maximum(moved_last * ratio / (1 - ratio), _left(left, moved_first + moved_last))


def _left(left, moved):
    return jnp.where(jnp.isfinite(left), SAFETY * left * moved, jnp.inf)


def ratio(after, before):
    """after/before, 0 where both are."""
    return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)
