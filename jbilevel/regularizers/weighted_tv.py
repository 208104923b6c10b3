"""Smoothed total variation whose weight varies over the image."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp

from jbilevel._core.constants import Constants
from jbilevel.operators.differences import forward_difference
from jbilevel.regularizers.base import Regularizer, require_theta
from jbilevel.regularizers.images import require_image
from jbilevel.regularizers.potentials import POTENTIALS
from jbilevel.regularizers.ridge_sum import RidgeSum, RidgeTerm


@dataclass(frozen=True)
class WeightedTV(Regularizer):
    """R(theta, x) = sum_p e^{(U theta)_p} sqrt(|(D x)_p|^2 + eps^2): a map of weights, interpolated from a grid.

    `SmoothedTV` (isotropic, forward differences with Neumann boundary) with one weight per pixel p: theta, of shape
    ``grid``, holds the logarithms of the weights at the centres of a coarse grid over the image, and U interpolates
    linearly. grid = x.shape is one free weight per pixel, grid = (1, 1) is SmoothedTV. For scenes that are alike (the
    same anatomy, vignetting, noise that varies over the detector); a map computed from the measurement by a network is
    an energy of one's own.

    Args:
      grid: (h, w), the shape of theta.
      eps: the smoothing, fixed.

    x has shape (H, W) with H >= h, W >= w, any float dtype; ValueError otherwise, and for theta of another shape.

    >>> import jax.numpy as jnp, jbilevel as jb
    >>> R, x = WeightedTV(grid=(2, 2), eps=0.01), jnp.eye(8)
    >>> bool(jnp.allclose(R(R.init(weight=0.1), x), jb.regularizers.SmoothedTV(eps=0.01)(jnp.log(jnp.array([0.1])), x)))
    True
    """

    grid: tuple[int, int] = (8, 8)
    _: KW_ONLY
    eps: float = 0.01

    def __post_init__(self):
        if len(self.grid) != 2 or not all(isinstance(n, int) and n >= 1 for n in self.grid):
            raise ValueError(f"`grid` must hold two positive integers, got {self.grid}.")
        if not self.eps > 0:
            raise ValueError(f"`eps` must be positive (the energy is not smooth at 0), got {self.eps}.")

    def init(self, key=None, *, weight: float = 0.05, dtype=None):
        """The same weight everywhere; deterministic (key is ignored)."""
        return jnp.full(self.grid, math.log(weight), dtype or jnp.result_type(float))

    def check(self, params) -> None:
        require_theta("WeightedTV", params, self.grid)

    def weights(self, params, shape):
        """The weight of each pixel of an image of that shape."""
        self.check(params)
        self._require(shape)
        return jnp.exp(jax.image.resize(jnp.asarray(params), shape, "linear"))

    def _require(self, shape) -> None:
        require_image("WeightedTV", shape)
        if any(n < m for n, m in zip(shape, self.grid, strict=True)):
            raise ValueError(f"WeightedTV takes one (H, W) image of at least {self.grid} pixels, got {shape}.")

    def __call__(self, params, x):
        weights = self.weights(params, x.shape)
        squares = forward_difference(x, 0) ** 2 + forward_difference(x, 1) ** 2
        return jnp.sum(weights * jnp.sqrt(squares + self.eps**2))

    def bounds(self, params, shape) -> Constants:
        """0 <= Hessian <= 8 max(weights)/eps, and the Lipschitz constants that certificates need.

        As for `SmoothedTV` with the largest weight; interpolation does not exceed max(theta). A direction d of theta
        changes grad_x R by D' diag(weights U d) flux with |flux| <= 1 and Lipschitz with 1/eps, and |U d| <= |d| at
        each pixel; mixed_norm is sqrt(8) max(weights) ||U||.
        """
        self.check(params)
        self._require(shape)
        weight = jnp.exp(jnp.max(jnp.asarray(params)))
        # rows of U sum to 1, so ||U||^2 is at most its largest column sum, per axis
        sums = [jnp.max(jnp.sum(_interpolation(n, m), axis=0)) for n, m in zip(shape, self.grid, strict=True)]
        smoothness = 8 * weight / self.eps
        return Constants(
            strong_convexity=jnp.zeros_like(weight),
            smoothness=smoothness,
            hessian_lipschitz=POTENTIALS["root"].third * 8 * math.sqrt(3.0) * weight / self.eps**2,
            mixed_lipschitz=smoothness,
            mixed_norm=math.sqrt(8.0) * weight * jnp.sqrt(sums[0] * sums[1]),
        )

    def ridges(self, params, shape) -> RidgeSum:
        self.check(params)
        self._require(shape)
        interpolate = lambda theta: jax.image.resize(theta, shape, "linear")  # noqa: E731
        transposed = jax.linear_transpose(interpolate, jax.ShapeDtypeStruct(self.grid, jnp.result_type(params)))
        term = RidgeTerm(
            potential=POTENTIALS["root"],
            weights=self.weights(params, shape),
            widths=jnp.asarray(self.eps, jnp.result_type(params)),
            axis=(0,),
            weight_pools=(lambda groups: transposed(groups)[0],),
        )
        linear = lambda x: jnp.stack([forward_difference(x, axis) for axis in (0, 1)])  # noqa: E731
        return RidgeSum(linear=linear, terms=(term,), norm=math.sqrt(8.0), rows=math.sqrt(3.0))


def _interpolation(n: int, m: int):
    """Linear interpolation from m to n points as a matrix (n, m)."""
    return jax.image.resize(jnp.eye(m), (n, m), "linear")
