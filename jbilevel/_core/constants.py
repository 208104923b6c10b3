"""Curvature and Lipschitz constants of an energy, passed as data from regularisers to problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jbilevel._core import brief

Constant = float | Callable[[Any, Any], Any] | None  # a number, or a function of (params, data), or unknown


class Constants(NamedTuple):
    """Constants of an energy at one (params, data); ``None`` where unknown.

    strong_convexity mu and smoothness L bound the Hessian in x, mu <= Hessian and ||Hessian|| <= L; a negative mu is
    minus a modulus of weak convexity, which a data term may make up for. hessian_lipschitz: Lipschitz constant of
    x -> Hessian; mixed_lipschitz: of x -> J = d/dparams grad_x; mixed_norm: bound on ||J|| (all in 2-norms).

    >>> import jbilevel as jb, jax.numpy as jnp
    >>> jb.Constants(strong_convexity=1.0)
    Constants(strong_convexity=1.0)
    >>> bounds = jb.regularizers.SmoothedTV(eps=0.5).bounds(jnp.zeros(1), (4, 4))  # weight exp(0)
    >>> float(bounds.strong_convexity), float(bounds.smoothness)
    (0.0, 16.0)
    """

    strong_convexity: Any = None
    smoothness: Any = None
    hessian_lipschitz: Any = None
    mixed_lipschitz: Any = None
    mixed_norm: Any = None

    __repr__ = brief.record


class SaddleConstants(NamedTuple):
    """What certified hypergradients of a saddle point need beside the moduli: `jbilevel.errors.saddle_certificate`.

    primal, dual: of g and f* (their hessian_lipschitz, mixed_lipschitz and mixed_norm count, 0 for a quadratic and for
    one without parameters). linear_mixed: J with |<(d_params K)[e] x, y>| <= J ||e|| ||x|| ||y||; 1 where the
    parameters are the entries of K, 0 where K has none.

    >>> import jbilevel as jb
    >>> flat = jb.Constants(hessian_lipschitz=0.0, mixed_lipschitz=0.0, mixed_norm=0.0)  # of a quadratic
    >>> jb.SaddleConstants(primal=flat, dual=flat, linear_mixed=1.0).linear_mixed
    1.0
    """

    primal: Constants = Constants()
    dual: Constants = Constants()
    linear_mixed: Any = None

    __repr__ = brief.record
