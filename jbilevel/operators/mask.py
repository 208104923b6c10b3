"""Pixels that are missing: masks (inpainting) and down-sampling (super-resolution)."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax

from jbilevel.operators.base import LinearOperator, check_tolerance, shape_of
from jbilevel.operators.frozen import FrozenArray, frozen_mask


@dataclass(frozen=True)
class Mask(LinearOperator):
    """A x = x where the mask is True, and 0 elsewhere: what inpainting observes. A^T = A, A A = A, ||A|| = 1.

    Args:
      mask: array of booleans, or of zeros and ones, with the shape of the image; True is kept.
      in_kind: "real" or "complex".

    Raises:
      ValueError: a mask that keeps nothing or has other values.

    >>> import jax.numpy as jnp
    >>> Mask([True, False, True])(jnp.array([1.0, 2.0, 3.0])).tolist()
    [1.0, 0.0, 3.0]
    """

    mask: FrozenArray
    in_kind: str = "real"

    norm_is_bound = True
    in_shape = property(lambda self: self.mask.shape)
    out_shape = property(lambda self: self.mask.shape)
    out_kind = property(lambda self: self.in_kind)

    def __post_init__(self):
        if self.in_kind not in ("real", "complex"):
            raise ValueError(f"`in_kind` must be 'real' or 'complex', got {self.in_kind!r}.")
        object.__setattr__(self, "mask", frozen_mask(self.mask))

    def forward(self, x):
        return jnp.where(jnp.broadcast_to(self.mask.array, x.shape), x, 0)

    transpose = forward

    def norm(self, tol: float = 1e-3) -> float:
        """1, exactly."""
        check_tolerance(tol)
        return 1.0


@dataclass(frozen=True)
class DownSample(LinearOperator):
    """An (H, W) image with one pixel for each block of factor x factor pixels.

    Args:
      in_shape: (H, W), both divisible by the factor.
      factor: at least 1.
      antialiasing: "average" takes the mean of the block (||A|| = 1/factor), "subsampling" its first pixel (||A|| = 1).

    Raises:
      ValueError: sizes that the factor does not divide, unknown antialiasing.

    >>> import jax.numpy as jnp
    >>> DownSample((2, 4), 2)(jnp.arange(8.0).reshape(2, 4)).tolist()
    [[2.5, 4.5]]
    """

    in_shape: tuple[int, int]
    factor: int
    antialiasing: str = "average"

    norm_is_bound = True

    def __post_init__(self):
        shape = shape_of(self.in_shape, "in_shape")
        if len(shape) != 2:
            raise ValueError(f"`in_shape` must be (H, W), got {shape}.")
        if not isinstance(self.factor, numbers.Integral) or self.factor < 1:
            raise ValueError(f"`factor` must be an integer of at least 1, got {self.factor!r}.")
        if any(n % self.factor for n in shape):
            raise ValueError(f"`factor` {self.factor} does not divide the image {shape}: crop or pad it.")
        if self.antialiasing not in ("average", "subsampling"):
            raise ValueError(f"`antialiasing` must be 'average' or 'subsampling', got {self.antialiasing!r}.")
        object.__setattr__(self, "in_shape", shape)
        object.__setattr__(self, "factor", int(self.factor))

    @property
    def out_shape(self) -> tuple[int, int]:
        return self.in_shape[0] // self.factor, self.in_shape[1] // self.factor

    def forward(self, x):
        f, (h, w) = self.factor, self.out_shape
        if self.antialiasing == "subsampling":
            return x[..., ::f, ::f]
        return jnp.mean(x.reshape(*x.shape[:-2], h, f, w, f), axis=(-3, -1))

    def transpose(self, y):
        f, (h, w), lead = self.factor, self.out_shape, y.shape[:-2]
        if self.antialiasing == "subsampling":
            widths = [(0, 0, 0)] * len(lead) + [(0, f - 1, f - 1)] * 2
            return lax.pad(y, jnp.zeros((), y.dtype), widths)
        blocks = jnp.broadcast_to((y / f**2)[..., :, None, :, None], (*lead, h, f, w, f))
        return blocks.reshape(*lead, *self.in_shape)

    def norm(self, tol: float = 1e-3) -> float:
        """1/factor for averages, 1 for subsampling, exactly."""
        check_tolerance(tol)
        return 1.0 / self.factor if self.antialiasing == "average" else 1.0
