"""Convolution of images with a fixed kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators import norms
from jbilevel.operators.base import LinearOperator, check_tolerance, shape_of
from jbilevel.operators.frozen import FrozenArray, frozen_field

BOUNDARIES = ("periodic", "symmetric", "zero", "valid")


@dataclass(frozen=True)
class Blur(LinearOperator):
    """Convolution with a fixed kernel: (A x)[i, j] = sum_{k, l} kernel[k, l] x[i + c_h - k, j + c_w - l].

    (c_h, c_w) = (h // 2, w // 2) is the centre of an (h, w) kernel. All boundaries are one formula: extend the image,
    convolve it cyclically by the fast Fourier transform on a grid with only small prime factors, cut out the result;
    the transpose does the transposed steps in reverse order.

    Args:
      in_shape: (H, W).
      kernel: (h, w) array or nested sequence of real numbers, not larger than the image.
      boundary: beyond its border the image is "periodic", mirrored including the border pixel ("symmetric"), "zero", or
        not looked at ("valid": the result is (H - h + 1, W - w + 1)).

    ``norm`` is exact for "periodic" (the largest modulus of the transfer function), proven for kernels without negative
    entries, else the estimate of `LinearOperator.norm`.

    Raises:
      ValueError: a kernel that is not two-dimensional, not finite, or larger than the image; unknown boundary.
      TypeError: a complex kernel.

    >>> import jax.numpy as jnp
    >>> A = Blur((1, 4), [[1.0, 2.0, 3.0]], "zero")
    >>> [round(float(v), 4) for v in A(jnp.array([[0.0, 1.0, 0.0, 0.0]]))[0]]
    [1.0, 2.0, 3.0, 0.0]
    """

    in_shape: tuple[int, int]
    kernel: FrozenArray
    boundary: str = "periodic"

    def __post_init__(self):
        shape, kernel = shape_of(self.in_shape, "in_shape"), frozen_field(self.kernel, "kernel")
        if len(shape) != 2 or len(kernel.shape) != 2:
            raise ValueError(f"`in_shape` and `kernel` must be two-dimensional, got {shape} and {kernel.shape}.")
        if any(k > n for k, n in zip(kernel.shape, shape, strict=True)):
            raise ValueError(
                f"`kernel` of shape {kernel.shape} is larger than the image {shape}: cut it, or pad the image."
            )
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"`boundary` must be one of {BOUNDARIES}, got {self.boundary!r}.")
        object.__setattr__(self, "in_shape", shape)
        object.__setattr__(self, "kernel", kernel)

    @property
    def out_shape(self) -> tuple[int, int]:
        if self.boundary != "valid":
            return self.in_shape
        return tuple(n - k + 1 for n, k in zip(self.in_shape, self.kernel.shape, strict=True))

    def forward(self, x):
        return self._cut(self._filter(self._extend(x), transpose=False))

    def transpose(self, y):
        # extension and cut only copy: JAX's transposes of them are exact and cost nothing
        lead = y.shape[:-2]
        cut = jax.linear_transpose(self._cut, jax.ShapeDtypeStruct((*lead, *self._extended), y.dtype))
        extend = jax.linear_transpose(self._extend, jax.ShapeDtypeStruct((*lead, *self.in_shape), y.dtype))
        return extend(self._filter(cut(y)[0], transpose=True))[0]

    @property
    def norm_is_bound(self) -> bool:
        return self.boundary == "periodic" or bool(np.all(self.kernel.array >= 0))

    def norm(self, tol: float = 1e-3) -> float:
        check_tolerance(tol)
        if self.boundary == "periodic":
            return float(np.max(np.abs(self._transfer)))
        return norms.nonnegative(self, tol) if self.norm_is_bound else super().norm(tol)

    # ------------------------------------------------------------------------------------------------------- the steps

    @property
    def _extended(self) -> tuple[int, int]:
        """Shape of the extended image, and of the part of the convolution that is kept track of."""
        if self.boundary in ("periodic", "valid"):
            return self.in_shape
        return tuple(n + k - 1 for n, k in zip(self.in_shape, self.kernel.shape, strict=True))

    @property
    def _grid(self) -> tuple[int, int]:
        """Shape of the Fourier transforms; zeros beyond the extended image, which the kept results never see."""
        return self.in_shape if self.boundary == "periodic" else tuple(fast_length(n) for n in self._extended)

    def _extend(self, x):
        if self.boundary in ("periodic", "valid"):
            return x
        for axis, k in zip((-2, -1), self.kernel.shape, strict=True):
            x = _with_margins(x, k - 1 - k // 2, k // 2, axis, mirrored=self.boundary == "symmetric")
        return x

    def _cut(self, z):
        if self.boundary == "periodic":
            return z
        (h, w), (rows, columns) = self.kernel.shape, self.out_shape
        return z[..., h - 1 : h - 1 + rows, w - 1 : w - 1 + columns]

    def _filter(self, z, transpose: bool):
        transfer = jnp.asarray(np.conj(self._transfer) if transpose else self._transfer)
        spectrum = jnp.fft.rfft2(z, self._grid)
        spectrum = spectrum * jnp.broadcast_to(transfer.astype(spectrum.dtype), spectrum.shape)
        rows, columns = self._extended
        return jnp.fft.irfft2(spectrum, self._grid)[..., :rows, :columns]

    @cached_property
    def _transfer(self) -> np.ndarray:
        kernel = np.zeros(self._grid)
        h, w = self.kernel.shape
        kernel[:h, :w] = self.kernel.array
        if self.boundary == "periodic":
            kernel = np.roll(kernel, (-(h // 2), -(w // 2)), (0, 1))
        return np.fft.rfft2(kernel)


def gaussian_blur(shape, sigma: float, *, boundary: str = "symmetric", truncate: float = 3.0) -> Blur:
    """Blur with a Gaussian of standard deviation ``sigma`` pixels, sampled, cut at ``truncate * sigma``, of sum 1.

    Raises:
      ValueError: sigma or truncate not positive, or the kernel larger than the image.

    >>> gaussian_blur((32, 32), 1.5).kernel.shape
    (11, 11)
    """
    for name, value in (("sigma", sigma), ("truncate", truncate)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` must be positive, got {value}.")
    radius = math.ceil(truncate * sigma)
    profile = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = np.outer(profile, profile)
    return Blur(shape, kernel / kernel.sum(), boundary)


def _with_margins(x, before: int, after: int, axis: int, mirrored: bool):
    n, axis = x.shape[axis], x.ndim + axis
    part = lambda start, stop: jax.lax.slice_in_dim(x, start, stop, axis=axis)  # noqa: E731
    margins = part(0, before), part(n - after, n)
    first, last = (jnp.flip(m, axis) if mirrored else jnp.zeros_like(m) for m in margins)
    return jnp.concatenate([first, x, last], axis)


def fast_length(n: int) -> int:
    """The smallest number from n on without a prime factor above 5, for which Fourier transforms are fast."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
