"""Scalar potentials of learned regularisers, with the bounds on their derivatives that curvature constants need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Potential:
    """A convex h with |h'| <= 1 and 0 <= h'' <= curvature; w h(t/w) is the same potential smoothed over a width w.

    w h(t/w) has |h'| <= 1, 0 <= h'' <= curvature/w and |h'''| <= third/w^2. third is None where h'' jumps: then the
    energy is only piecewise twice differentiable and its Hessian has no Lipschitz constant.

    third_near(t, r) bounds |h'''| at distance r of t at most, kinks apart; third_near_radial the norm of the third
    derivative of v -> h(|v|) likewise, for |v| >= 0 within r of t; None where that is not used. A symmetric trilinear
    form attains its norm on the diagonal (Banach 1938).
    """

    value: Callable
    curvature: float
    third: float | None
    increasing: bool = False  # h' >= 0, as convexity of a composition asks for
    _: KW_ONLY
    third_near: Callable
    third_near_radial: Callable | None = None
    kinks: tuple[float, ...] = ()  # where h'' jumps
    flux: float = 1.0  # sup |t h''(t)|


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

# ---- third derivatives near a point --------------------------------------------------------------------------------


def _root_third(t, r):
    """Of 3t/(1 + t^2)^(5/2), which grows up to t = 1/2 and falls beyond: at the point within reach nearest to that."""
    u = _within_reach(t, r)
    return 3 * u * lax.rsqrt(1 + u * u) ** 5


def _root_third_radial(t, r):
    """Along a unit vector at <v, u> = a: 3a (1 + |v|^2 - a^2)/(1 + |v|^2)^(5/2), whose largest a <= |v| is sqrt((1 +
    |v|^2)/3) or |v|; it too grows up to |v| = 1/2 and falls beyond."""
    u = _within_reach(t, r)
    far = 2 / math.sqrt(3) / (1 + u * u)
    return jnp.where(u * u < 0.5, 3 * u * lax.rsqrt(1 + u * u) ** 5, far)


def _within_reach(t, r):
    t = jnp.abs(t)
    return jnp.clip(0.5, jnp.maximum(t - r, 0.0), t + r)


def _huber_third_radial(t, r):
    """Of |v|, where |v| > 1: 2/sqrt(3)/|v|^2."""
    return jnp.where(t + r > 1, 2 / math.sqrt(3) / jnp.maximum(t - r, 1.0) ** 2, 0.0)


def _spline_third(t, r):
    t = jnp.abs(t)
    return jnp.where(t - r <= _KNOT, 2 * jnp.minimum(t + r, _KNOT) / _KNOT**2, 0.0)


def _smoothstep_third(t, r):
    """|6 - 12 t| on (0, 1) is largest where t is nearest to an end."""
    low, high = jnp.clip(t - r, 0.0, 1.0), jnp.clip(t + r, 0.0, 1.0)
    largest = jnp.maximum(jnp.abs(6 - 12 * low), jnp.abs(6 - 12 * high))
    return jnp.where((t + r >= 0) & (t - r <= 1), largest, 0.0)


def _none(t, r):
    return jnp.zeros_like(t)


POTENTIALS = {
    # sup |h'''| of the root is met at t = 1/2, that of t h'' at 1/sqrt(2)
    "root": Potential(
        _root,
        1.0,
        1.5 / 1.25**2.5,
        third_near=_root_third,
        third_near_radial=_root_third_radial,
        flux=math.sqrt(0.5) / 1.5**1.5,
    ),
    "huber": Potential(_huber, 1.0, None, third_near=_none, third_near_radial=_huber_third_radial, kinks=(-1.0, 1.0)),
    "spline": Potential(_spline, 1.0, 2 / _KNOT, third_near=_spline_third, flux=2 * _KNOT / 3**1.5),
    "psi": Potential(_psi, 1.0, None, increasing=True, third_near=_none, kinks=(0.0, 1.0)),
    "smoothstep": Potential(_smoothstep, 1.5, 6.0, increasing=True, third_near=_smoothstep_third, flux=8 / 9),
}


def potential_named(name: str, *, among: tuple[str, ...] = tuple(POTENTIALS)) -> Potential:
    """The potential of that name; ValueError that lists the names ``among`` which one may choose."""
    if name not in among:
        raise ValueError(f"`potential` must be one of {', '.join(map(repr, among))}, got {name!r}.")
    return POTENTIALS[name]
