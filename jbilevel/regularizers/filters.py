"""Banks of convolution filters: responses, composition, proven norm bounds, and the checks of learned regularisers."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbilevel.operators.blur import fast_length

BOUNDARIES = ("valid", "zero", "symmetric")
# From this filter size on the Fourier transform takes less time and k^2 times less memory than patches.
_FOURIER = 10
# points per axis at which spectral_bound samples
_GRID = 256


def correlate(kernels, z):
    """y_o[p] = sum_{c, j} kernels[o, c, j] z[c, p + j] at all p where the kernel lies inside z.

    ``kernels`` (O, C, k, k) and ``z`` (C, H, W) give (O, H - k + 1, W - k + 1). One matrix product between kernels and
    shifted copies of z, or a product of Fourier transforms for large kernels: on a CPU, XLA's convolution takes several
    times as long, and so does a sum of shifted products, which each of its consumers computes anew. Derivatives and
    adjoints in both arguments are those that JAX derives: the transposed product, and sums of shifts.
    """
    count, channels, size, _ = kernels.shape
    _, height, width = z.shape
    h, w = height - size + 1, width - size + 1
    if size >= _FOURIER:
        shape = fast_length(height), fast_length(width)
        spectra = jnp.conj(jnp.fft.rfft2(kernels, shape)) * jnp.fft.rfft2(z, shape)[None]
        return jnp.fft.irfft2(jnp.sum(spectra, axis=1), shape)[:, :h, :w]
    # rows first, then columns: 2k slices to compile instead of k^2
    if channels <= count:
        rows = jnp.stack([z[:, i : i + h] for i in range(size)], axis=1)
        patches = jnp.stack([rows[..., j : j + w] for j in range(size)], axis=2)
        flat = kernels.reshape(count, -1), patches.reshape(channels * size**2, -1)
        return jnp.matmul(*flat, precision=lax.Precision.HIGHEST).reshape(count, h, w)
    # fewer rows when the product comes first
    flat = jnp.moveaxis(kernels, 1, 3).reshape(-1, channels), z.reshape(channels, -1)
    parts = jnp.matmul(*flat, precision=lax.Precision.HIGHEST).reshape(count, size, size, height, width)
    rows = sum(parts[:, i, :, i : i + h] for i in range(size))
    return sum(rows[:, j, :, j : j + w] for j in range(size))


def extend(z, size: int, boundary: str):
    """z (C, H, W), extended so that a size x size filter has a response at every pixel; unchanged for "valid"."""
    if boundary == "valid":
        return z
    before = (size - 1) // 2
    widths = ((0, 0), (before, size - 1 - before), (before, size - 1 - before))
    return jnp.pad(z, widths, mode="constant" if boundary == "zero" else "symmetric")


def copies(boundary: str) -> int:
    """||extension||^2: how often a pixel occurs in the extended image. Twice per axis at most, as filters fit in it."""
    return 4 if boundary == "symmetric" else 1


class Bank(NamedTuple):
    """The convolution layer of kernels (O, C, k, k) with a boundary as a linear map, with its transpose and norm."""

    kernels: jax.Array
    boundary: str

    def linear(self, z):
        """(C, H, W) to (O, h, w)."""
        return correlate(self.kernels, extend(z, self.kernels.shape[-1], self.boundary))

    def transpose(self, y):
        _, channels, size, _ = self.kernels.shape
        more = size - 1 if self.boundary == "valid" else 0
        z = jax.ShapeDtypeStruct((channels, *(n + more for n in y.shape[-2:])), y.dtype)
        return jax.linear_transpose(self.linear, z)(y)[0]

    def norm_squared(self):
        """A proven bound: by the spectrum for one channel, by the sums of absolute values for more."""
        if self.kernels.shape[1] == 1:
            bound = spectral_bound(self.kernels[:, 0])
        else:
            bound = jnp.linalg.norm(jnp.sum(jnp.abs(self.kernels), axis=(2, 3)), 2) ** 2
        return copies(self.boundary) * bound


def compose(kernels):
    """One bank (K, k, k) whose responses are those of the layers one after the other.

    Args:
      kernels: layers of shape (C_l, C_(l-1), k_l, k_l) with C_0 = 1. k = 1 + sum_l (k_l - 1).
    """
    bank = kernels[0][:, 0]
    for layer in kernels[1:]:
        around = layer.shape[-1] - 1
        bank = correlate(jnp.flip(layer, (2, 3)), jnp.pad(bank, ((0, 0), (around, around), (around, around))))
    return bank


def spectral_bound(bank):
    """A proven bound on ||W||^2 for (W x)_i = c_i * x, the filters c_i = bank[i], (K, k, k); at most 4 % too large.

    Without boundary ||W||^2 = sup_w S(w) with S = sum_i |c_i^(w)|^2, and with "valid" or "zero" boundary it is no
    larger (a compression of that operator). S is a trigonometric polynomial of degree d = k - 1 per axis, sampled on a
    grid of n points per axis. A trigonometric polynomial is at least cos(d t) times its largest value at distance
    t <= pi/(2d) from where that is met (M. Riesz; see Ehlich & Zeller 1964), and a grid point lies within pi/n: the
    supremum exceeds the largest sample by a factor 1/cos(pi d/n)^2 at most.
    """
    degree = bank.shape[-1] - 1
    support = 2 * degree + 1
    grid = max(_GRID, 2 ** math.ceil(math.log2(8 * support)))
    # S is the transform of the autocorrelation, which its samples at 2k - 1 points per axis determine
    coarse = jnp.sum(power(bank, support), axis=0)
    lags = jnp.roll(jnp.fft.irfft2(coarse, (support, support)), (degree, degree), (0, 1))
    samples = jnp.fft.rfft2(lags, (grid, grid)).ravel()
    largest = jnp.abs(samples[jnp.argmax(jnp.abs(samples))])  # no derivative of |z| where z may be 0
    return largest / math.cos(math.pi * degree / grid) ** 2


def power(kernels, grid: int):
    """|transform|^2 of each kernel on a grid of n x n frequencies; smooth at 0, which the square of |z| is not for
    every compiler."""
    spectra = jnp.fft.rfft2(kernels, (grid, grid))
    return spectra.real**2 + spectra.imag**2


def zero_mean(kernels):
    """The nearest kernels (K, ...) whose entries sum to zero, so that their responses do not see constants."""
    return kernels - jnp.mean(kernels, axis=tuple(range(1, kernels.ndim)), keepdims=True)


# ---- what can be wrong with the input ------------------------------------------------------------------------------


def require_bank(name: str, boundary: str, **numbers: int) -> None:
    """Settings of a regulariser: numbers of filters >= 1, sizes >= 2 (else no filter has mean 0), a known boundary."""
    for argument, value in numbers.items():
        least = 2 if "size" in argument else 1
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{argument}` of {name} must be an integer of at least {least}, got {value!r}.")
    if boundary not in BOUNDARIES:
        raise ValueError(f"`boundary` of {name} must be one of {BOUNDARIES}, got {boundary!r}.")


def require_params(name: str, params, shapes: dict) -> None:
    """params must be a dict with the keys of ``shapes``, and arrays (or tuples of arrays) of those shapes."""
    if not isinstance(params, dict) or params.keys() != shapes.keys():
        found = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(f"params of {name} must be a dict with the keys {sorted(shapes)}, got {found}; see its init.")
    for key, shape in shapes.items():
        nested = bool(shape) and isinstance(shape[0], tuple)
        found = tuple(map(jnp.shape, params[key])) if nested else jnp.shape(params[key])
        if found != shape:
            raise ValueError(f"params[{key!r}] of {name} must have shape {shape}, got {found}; see its init.")


def require_filters(name: str, key: str, filters) -> None:
    """Some entry of ``filters`` must differ from 0, where they are known (not under a trace)."""
    if not isinstance(filters, jax.core.Tracer) and not np.any(np.asarray(filters)):
        raise ValueError(f"params[{key!r}] of {name} are all zero: the energy is constant and learning cannot start.")
