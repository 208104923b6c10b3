"""Energies that are sums of ridge functions, and how much their derivatives may change around a computed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import brief, trees
from jbilevel.regularizers.potentials import Potential


@dataclass(frozen=True, kw_only=True)
class RidgeTerm:
    """b(v) = sum over groups g of W_g nu_g h(|v_g|/nu_g), with learned log W and log nu.

    Attributes:
      potential: h, with what is known of its second derivative near a point.
      weights, widths: W and nu, which broadcast to the groups.
      axis: the axes of v that a group takes together by their 2-norm; None: each entry, with its sign, is a group.
      weight_pools: how params see the groups: linear maps P' from arrays over groups to one part of the params each,
        with d(log W) = P d(part), P >= 0 and rows of P that sum to at most 1. width_pools: likewise for log nu.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> R = jb.regularizers.SmoothedTV(eps=0.1)
    >>> term = R.ridges(R.init(weight=0.5), (8, 8)).terms[0]
    >>> float(term.weights), term.axis  # of pairs of differences
    (0.5, (0,))
    """

    potential: Potential
    weights: Any
    widths: Any
    axis: tuple[int, ...] | None = None
    weight_pools: tuple[Callable, ...] = ()
    width_pools: tuple[Callable, ...] = ()

    __repr__ = brief.settings


class Nearby(NamedTuple):
    """Of one term around v, in direction w: sizes by group, and bounds on changes (see `_near`)."""

    term: RidgeTerm
    change: Any  # bound on ||(A(v') - A(v)) w||, A the Hessian of b
    reach: Any  # of ||v' - v||
    each: Any  # of ||v'_g - v_g||
    length: Any  # |v_g|
    slope: Any  # |grad b(v)_g|
    product: Any  # |(A(v) w)_g|
    rate: Any  # Lipschitz constant of A(v)_g w_g around v_g, 0 where it may jump
    jump: Any  # bound on |(A(v') - A(v))_g w_g| where it may jump, else 0

    @property
    def curvature(self):
        """Largest curvature of b."""
        return jnp.max(self.term.potential.curvature * self.term.weights / self.term.widths)

    def in_params(self, direction_error):
        """Bound on the change of d/d(log W, log nu) <grad b(v), w> where w moves by ``direction_error`` too.

        Of group g they are m = <grad b, w> and n = -<A v, w>. m' - m = <y', w' - w> + <y' - y, w>, where y' - y is the
        mean of A times v' - v; n likewise with A v in place of y, and A'v' - A v = (A' - A) v' + A (v' - v).
        By Cauchy-Schwarz the norm of P'(a_g d_g) is at most sqrt(max P'(a^2)) ||d||, as rows of P sum to 1 at most.
        """
        term, far = self.term, self.length + self.each
        steep = self.slope + term.potential.curvature * term.weights / term.widths * self.each
        steep = jnp.minimum(term.weights, steep)
        flux = jnp.broadcast_to(term.weights * term.potential.flux, self.length.shape)
        moved = self.product + self.rate * self.each + self.jump
        bound = _pooled(term.weight_pools, moved) * self.reach + _pooled(term.weight_pools, steep) * direction_error
        moved = self.product + self.rate * far
        bound += _pooled(term.width_pools, moved) * self.reach + _pooled(term.width_pools, flux) * direction_error
        return bound + jnp.sqrt(sum(trees.squared_norm(pool(self.jump * far)) for pool in term.width_pools))


def _pooled(pools, sizes):
    return jnp.sqrt(sum(jnp.max(pool(sizes**2)) for pool in pools))


def _near(term: RidgeTerm, v, w, reach, each) -> Nearby:
    """All v' with ||v' - v|| <= reach and, group by group, ||v'_g - v_g|| <= each.

    A_g = W/nu Hess h(v_g/nu). Where no kink of h is within reach, A_g w_g is Lipschitz with W/nu^2 sup |h'''| |w_g|,
    the supremum over what is within reach; where one is, 0 <= Hess h <= c bounds its change by c W/nu |w_g|.
    """
    potential, scale = term.potential, term.weights / term.widths
    t, along, direction = _sizes(term, v, w)
    t, r = t / term.widths, each / term.widths
    slope, second = _derivatives(potential.value, t)
    if term.axis is None:
        across, third = 0.0, potential.third_near(t, r)
    else:
        # Hess h(|v|) is h'' along v and h'/|v| across
        across = jnp.where(t > 0, slope / jnp.where(t > 0, t, 1.0), second)
        across = across * jnp.sqrt(jnp.maximum(direction**2 - along**2, 0.0))
        third = potential.third_near_radial(t, r)
    product = scale * jnp.hypot(second * along, across)
    crossing = jnp.zeros(t.shape, bool)
    for kink in potential.kinks:
        crossing = crossing | (jnp.abs(t - kink) <= r)
    rate = jnp.where(crossing, 0.0, scale / term.widths * third * direction)
    largest = potential.curvature * scale * direction
    jump = jnp.where(crossing, largest, 0.0)
    smooth = jnp.minimum(reach * jnp.max(rate), trees.norm(jnp.minimum(rate * each, largest)))
    return Nearby(
        term=term,
        change=jnp.hypot(smooth, trees.norm(jump)),
        reach=reach,
        each=each,
        length=jnp.abs(t) * term.widths,
        slope=term.weights * jnp.abs(slope),
        product=product,
        rate=rate,
        jump=jump,
    )


def _sizes(term: RidgeTerm, v, w):
    """(v_g with its sign or its length, |w_g| along v_g, |w_g|)."""
    if term.axis is None:
        return v, jnp.abs(w), jnp.abs(w)
    length, direction = (jnp.sqrt(jnp.sum(u * u, term.axis)) for u in (v, w))
    inner = jnp.abs(jnp.sum(v * w, term.axis))
    return length, jnp.where(length > 0, inner / jnp.where(length > 0, length, 1.0), direction), direction


def _derivatives(h, t):
    """(h'(t), h''(t)), entry by entry."""
    ones = jnp.ones_like(t)
    return jax.jvp(lambda t: jax.vjp(h, t)[1](ones)[0], (t,), (ones,))


@dataclass(frozen=True, kw_only=True)
class RidgeSum:
    """R(x) = sum of b(L x) over the terms b, at fixed params: ridge functions of the responses v = L x.

    What certificates of `variational` are made of. Lipschitz constants of the Hessian that hold everywhere do not exist
    where a potential has kinks ("huber", "psi"), nor do constants of the mixed derivative where filters are learned: it
    grows with x. But a solve proves ||x - x_hat|| <= error, and of what happens within that distance of the computed x
    everything can be bounded, response by response (`around`). The conjugates in the saddle form have no constants
    either: balls and boxes have kinks, and the curvature of -sqrt(W^2 - q^2) is unbounded; there v is what the dual
    unknown is the gradient at, y = grad b(v), and the Hessian of b* is the inverse of that of b at v.

    Attributes:
      linear: x -> v.
      terms: the potentials.
      norm: a bound on ||L||_2. rows: bounds on ||L_g||_2, which broadcast to the groups.
      mixed: J with ||(d_params L)[e] x|| <= J ||e|| ||x||, 0 where params are not in L.
      convex: whether the sum of the potentials is.
      of_dual: the part of a dual unknown that belongs to these responses.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> R = jb.regularizers.SmoothedTV(eps=0.1)
    >>> x, q = jnp.eye(8), jnp.ones((8, 8))
    >>> ridges = R.ridges(R.init(), x.shape)
    >>> float(ridges.around(ridges.linear(x), ridges.linear(q), 1e-3).change)  # constants do not see the Hessian
    0.0
    """

    linear: Callable
    terms: tuple[RidgeTerm, ...]
    norm: Any
    rows: Any
    mixed: Any = 0.0
    convex: bool = True
    of_dual: Callable = lambda dual: dual

    __repr__ = brief.settings

    def around(self, v, w, error, offset=0.0) -> Surroundings:
        """What may change between v, at which derivatives were taken, and v_hat = L x_hat.

        Args:
          v, w: responses of x and of a direction, arrays of the structure of L x.
          error: a bound on ||x - x_hat||_2. offset: on ||v - L x||_2.
        """
        reach, each = self.norm * error + offset, self.rows * error + offset
        return Surroundings(self, tuple(_near(term, v, w, reach, each) for term in self.terms))

    def for_dual(self, of_dual: Callable) -> RidgeSum:
        """The same where the dual unknown has other parts too."""
        return replace(self, of_dual=of_dual)


class Surroundings(NamedTuple):
    """Of `RidgeSum.around`: bounds on what changes between v and all v' within reach."""

    ridges: RidgeSum
    terms: tuple[Nearby, ...]

    @property
    def reach(self):
        """Of ||v' - v||."""
        return self.terms[0].reach

    @property
    def change(self):
        """Of ||(A(v') - A(v)) w||, A the Hessian of the sum of the potentials."""
        return sum(term.change for term in self.terms)

    @property
    def curvature(self):
        """Of A(v') at most."""
        return sum(term.curvature for term in self.terms)

    def gradient(self, *, point, adjoint, error, adjoint_error, direction_error, product_error=jnp.inf):
        """Of z = d_params <grad b(L x), L q> where x, q and w = L q move by error, adjoint_error and direction_error.

        z has a part in the potentials, `Nearby.in_params`, and one in L, <dL x, Y> + <dL q, y> with y = grad b(v) and
        Y = A(v) w. With c the curvature y moves by c reach at most, and Y by change + ||A(v')(w' - w)||, for which a
        bound better than c direction_error may be known: product_error. point, adjoint: ||x||, ||q||.
        """
        bound = sum(term.in_params(direction_error) for term in self.terms)
        slope = sum(trees.norm(term.slope) for term in self.terms)
        product = sum(trees.norm(term.product) for term in self.terms)
        slope_error = self.curvature * self.reach
        product_error = self.change + jnp.minimum(self.curvature * direction_error, product_error)
        in_linear = error * product + (point + error) * product_error
        in_linear += adjoint_error * slope + (adjoint + adjoint_error) * slope_error
        return bound + jnp.where(self.ridges.mixed == 0, 0.0, self.ridges.mixed * in_linear)
