"""Scalar potentials of learned regularisers, with the bounds on their derivatives that curvature constants need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Potential(NamedTuple):
    """A convex h with |h'| <= 1 and 0 <= h'' <= curvature; w h(t/w) is the same potential smoothed over a width w.

    w h(t/w) has |h'| <= 1, 0 <= h'' <= curvature/w and |h'''| <= third/w^2. third is None where h'' jumps: then the
    energy is only piecewise twice differentiable and its Hessian has no Lipschitz constant.
    """

    value: Callable
    curvature: float
    third: float | None
    increasing: bool = False  # h' >= 0, as convexity of a composition asks for


def _twice_differentiable(h, first, second):
    """h with given h' and h'': the product with a Hessian then reads one stored number per response, h''."""

    @jax.custom_jvp
    def slope(t):
        return first(t)

    @jax.custom_jvp
    def value(t):
        return h(t)

    slope.defjvps(lambda tangent, _, t: second(t) * tangent)
    value.defjvps(lambda tangent, _, t: slope(t) * tangent)
    return value


# sqrt(t^2 + 1)
_root = _twice_differentiable(
    lambda t: jnp.sqrt(t**2 + 1),
    lambda t: t * lax.rsqrt(t**2 + 1),
    lambda t: lax.rsqrt(t**2 + 1) ** 3,
)


# The others are linear outside an interval: u is t clipped to it, and h(t) = h(u) + (t - u) h'(u).


def _both_sides(t, knot=1.0):
    return jnp.clip(t, -knot, knot)


def _one_side(t):
    return jnp.clip(t, 0.0, 1.0)


# t^2/2 for |t| < 1, |t| - 1/2 beyond
_huber = _twice_differentiable(
    lambda t: _both_sides(t) * (t - 0.5 * _both_sides(t)),
    _both_sides,
    lambda t: (jnp.abs(t) < 1).astype(t.dtype),
)

# The C^2 Huber function: h'' = 1 - (t/k)^2 for |t| < k = 1.5, 0 beyond, so that h' = +-1 and h = |t| - 9/16 there.
_KNOT = 1.5


def _spline_slope(t):
    u = _both_sides(t, _KNOT)
    return u * (1 - (u / _KNOT) ** 2 / 3)


def _spline_value(t):
    u = _both_sides(t, _KNOT)
    return u**2 * (0.5 - (u / _KNOT) ** 2 / 12) + (t - u) * _spline_slope(u)


_spline = _twice_differentiable(_spline_value, _spline_slope, lambda t: 1 - (_both_sides(t, _KNOT) / _KNOT) ** 2)

# 0 for t < 0, t^2/2 for 0 < t < 1, t - 1/2 beyond; w psi(t/w) is psi_w of Bogensperger et al. 2024, equation (31)
_psi = _twice_differentiable(
    lambda t: _one_side(t) * (t - 0.5 * _one_side(t)),
    _one_side,
    lambda t: ((t > 0) & (t < 1)).astype(t.dtype),
)


# psi with a continuous h'' = 6 t (1 - t) on (0, 1): h' = t^2 (3 - 2t), and h = t - 1/2 for t > 1 too
def _smoothstep_slope(t):
    u = _one_side(t)
    return u**2 * (3 - 2 * u)


def _smoothstep_value(t):
    u = _one_side(t)
    return u**3 * (1 - 0.5 * u) + (t - u) * _smoothstep_slope(u)


_smoothstep = _twice_differentiable(
    _smoothstep_value, _smoothstep_slope, lambda t: 6 * _one_side(t) * (1 - _one_side(t))
)

POTENTIALS = {
    # sup |h'''| of the root is met at t = 1/2
    "root": Potential(_root, 1.0, 1.5 / 1.25**2.5),
    "huber": Potential(_huber, 1.0, None),
    "spline": Potential(_spline, 1.0, 2 / _KNOT),
    "psi": Potential(_psi, 1.0, None, increasing=True),
    "smoothstep": Potential(_smoothstep, 1.5, 6.0, increasing=True),
}


def potential_named(name: str, *, among: tuple[str, ...] = tuple(POTENTIALS)) -> Potential:
    """The potential of that name; ValueError that lists the names ``among`` which one may choose."""
    if name not in among:
        raise ValueError(f"`potential` must be one of {', '.join(map(repr, among))}, got {name!r}.")
    return POTENTIALS[name]
