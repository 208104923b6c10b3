"""A smooth energy at fixed parameters and data, as solvers and oracles see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbilevel._core import trees
from jbilevel._core.constants import Constants
from jbilevel._core.results import RUNNING, Status
from jbilevel._views.base import View


class QuadraticModel(NamedTuple):
    """A smooth energy to second order around x: value + <gradient, d> + 1/2 <d, product(d)>."""

    x: Any
    value: Any
    gradient: Any
    gradient_norm: Any
    product: Callable

    @classmethod
    def of(cls, view, x) -> QuadraticModel:
        """From one evaluation, `SmoothView.linearize`."""
        value, gradient, product = view.linearize(x)
        return cls(x=x, value=value, gradient=gradient, gradient_norm=trees.norm(gradient), product=product)


NOISE = 64.0  # of curvatures, in units of rounding
EXCESS = 1e-3  # by which a constant is off before it is called wrong


@dataclass(frozen=True)
class SmoothView(View):
    """A smooth energy at fixed params and data, as solvers use it.

    >>> import jbilevel as jb
    >>> view = jb.SmoothView(lambda x: 0.5 * jnp.sum(x**2), jb.Constants(strong_convexity=1.0, smoothness=1.0))
    >>> value, gradient, product = view.linearize(jnp.array([3.0, 4.0]))
    >>> float(value), gradient.tolist(), product(jnp.ones(2)).tolist(), float(view.error_bound(trees.norm(gradient)))
    (12.5, [3.0, 4.0], [1.0, 1.0], 5.0)
    """

    value: Callable
    constants: Constants
    reduced: Callable | None = None  # x -> the view in float32, None where x should stay in its dtype
    inputs: tuple | None = None  # (params, data), for preconditioners
    ridges: Callable | None = None  # () -> `RidgeSum` of what is not quadratic, for certificates
    by_hand: Callable | None = None  # x -> (value, gradient, product), or None where derivatives should be JAX's

    def single(self, x):
        """The view for x in float32, None where x is not float64, is small, or the energy insists on float64."""
        return None if self.reduced is None else self.reduced(x)

    def known_ridges(self):
        return None if self.ridges is None else self.ridges()

    def gradient(self, x):
        return trees.cast_like(jax.grad(self.value)(x), x)

    def value_and_gradient(self, x):
        value, gradient = jax.value_and_grad(self.value)(x)
        return value, trees.cast_like(gradient, x)

    def linearize(self, x):
        """(value, gradient, Hessian product) at x from one evaluation.

        By hand where the problem has a ``linearize``. The product reuses what the evaluation stored; energies that only
        have reverse mode (a ``custom_vjp``, a callback) fall back to the transposed derivative of the gradient, which
        is the same map.
        """

        if self.by_hand is not None and (found := self.by_hand(x)) is not None:
            value, gradient, product = found
            return value, trees.cast_like(gradient, x), product

        def gradient_and_value(x):
            value, gradient = self.value_and_gradient(x)
            return gradient, value

        try:
            gradient, product, value = jax.linearize(gradient_and_value, x, has_aux=True)
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            gradient, pullback, value = jax.vjp(gradient_and_value, x, has_aux=True)
            product = lambda v: pullback(v)[0]  # noqa: E731
        return value, gradient, product

    def directional(self, x, direction):
        """<gradient(x), direction>, by forward mode where the energy has it."""
        try:
            return jax.jvp(self.value, (x,), (direction,))[1]
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            return trees.dot(jax.grad(self.value)(x), direction)

    def concave_at(self):
        """By one Hessian product with a fixed random vector, where no modulus of convexity is known."""
        return self._concave if self.constants.strong_convexity is None else None

    def _concave(self, x):
        direction = trees.random_like(x, 0)
        image = self.linearize(x)[2](direction)
        noise = NOISE * trees.eps(x) * trees.norm(direction) * trees.norm(image)
        return trees.dot(direction, image) < -noise

    def contradiction(self, start, end, least_curvature):
        """mu ||change of x||^2 <= <change of gradient, change of x>, and no curvature met is larger than L."""
        mu, smoothness = self.constants.strong_convexity, self.constants.smoothness
        status = jnp.full((), RUNNING, jnp.int32)
        if smoothness is not None:
            status = jnp.where(end.curvature > (1 + EXCESS) * smoothness, Status.SMOOTHNESS, status)
        if mu is not None:
            move, change = trees.sub(end.x, start.x), trees.sub(end.gradient, start.gradient)
            squared = trees.squared_norm(move)
            steepness = trees.norm(change) + end.curvature * (trees.norm(end.x) + trees.norm(start.x))
            noise = NOISE * trees.eps(end.x) * (steepness + mu * jnp.sqrt(squared)) * jnp.sqrt(squared)
            wrong = trees.dot(change, move) < (1 - EXCESS) * mu * squared - noise
            eps = trees.eps(end.x) if self.single(end.x) is None else jnp.finfo(jnp.float32).eps
            wrong = wrong | (least_curvature < (1 - EXCESS) * mu - NOISE * eps * end.curvature)
            status = jnp.where(wrong, Status.CONVEXITY, status)
        return status

    def unrounded(self, residual, x, curvature, energy=None):
        """`View.unrounded` with the L that is given; where none is, mu if no larger curvature was met."""
        mu, smoothness = self.constants.strong_convexity, self.constants.smoothness
        if smoothness is None and mu is not None:
            smoothness = jnp.maximum(curvature, mu)
        return super().unrounded(residual, x, curvature if smoothness is None else smoothness, energy)

    @property
    def tolerance_scale(self):
        """Gradient norm per ||x - x_hat||: mu when it is known and positive, else 1."""
        mu = self.constants.strong_convexity
        return 1.0 if mu is None else jnp.where(mu > 0, mu, 1.0)

    def error_bound(self, residual):
        """||x - x_hat|| <= ||gradient||/mu where mu is known (Bogensperger et al. 2024, Lemma 1), else inf."""
        mu = self.constants.strong_convexity
        if mu is None:
            return jnp.full_like(residual, jnp.inf)
        known = (mu > 0) & ~jnp.isnan(residual)
        return jnp.where(known, residual / jnp.where(mu > 0, mu, 1.0), jnp.inf).astype(residual.dtype)
