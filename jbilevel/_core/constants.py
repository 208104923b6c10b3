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
    """

    primal: Constants = Constants()
    dual: Constants = Constants()
    linear_mixed: Any = None

    __repr__ = brief.record
