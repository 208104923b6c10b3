"""Orthogonal wavelet transforms with periodic boundary."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from jbilevel.operators.base import LinearOperator, check_tolerance, shape_of

MOMENTS = {"haar": 1, "db1": 1, "db2": 2, "db3": 3, "db4": 4}  # vanishing moments


@dataclass(frozen=True)
class Wavelet(LinearOperator):
    """The periodic orthogonal wavelet transform W of an array along all its axes: W^T = W^-1, ||W|| = 1.

    One level splits every axis into a[i] = sum_k h[k] x[2 i + k] and d[i] = sum_k g[k] x[2 i + k], indices modulo its
    length n, with Daubechies' filter h of 2 N taps and g[k] = (-1)^k h[2 N - 1 - k]. The next level splits the part
    that is low in all axes.

    **Layout** (Mallat's): one array of the shape of x. Along each axis, the first half holds a and the second d; the
    corner of all first halves holds the next level, laid out alike. After L levels the low-pass part is the corner of
    size n / 2^L, and d of level l lies at n / 2^l, ..., n / 2^(l-1) - 1.

    Args:
      in_shape: any shape whose sizes 2^levels divides.
      name: "haar" (= "db1"), "db2", "db3" or "db4"; dbN has N vanishing moments.
      levels: at least 1.

    Raises:
      ValueError: unknown name, or a size that cannot be halved that often.

    References: I. Daubechies, Ten Lectures on Wavelets, SIAM (1992), section 6.4, daubechies_1992; S. Mallat, A
    theory for multiresolution signal decomposition, IEEE Trans. Pattern Anal. Mach. Intell. 11 (1989), mallat_1989.

    >>> import jax.numpy as jnp
    >>> W = Wavelet((4,), "haar", levels=2)
    >>> [round(float(c), 4) for c in W(jnp.array([1.0, 1.0, 1.0, 3.0]))]
    [3.0, -1.0, 0.0, -1.4142]
    """

    in_shape: tuple[int, ...]
    name: str = "db2"
    levels: int = 1

    norm_is_bound = True
    out_shape = property(lambda self: self.in_shape)

    def __post_init__(self):
        shape = shape_of(self.in_shape, "in_shape")
        if self.name not in MOMENTS:
            raise ValueError(f"`name` must be one of {tuple(MOMENTS)}, got {self.name!r}.")
        if not isinstance(self.levels, numbers.Integral) or self.levels < 1:
            raise ValueError(f"`levels` must be an integer of at least 1, got {self.levels!r}.")
        if any(n % 2**self.levels for n in shape):
            raise ValueError(
                f"`levels` {self.levels} needs sizes that 2^{self.levels} = {2**self.levels} divides, got {shape}: "
                f"crop or pad the image, or take fewer levels."
            )
        object.__setattr__(self, "in_shape", shape)
        object.__setattr__(self, "levels", int(self.levels))

    def forward(self, x):
        for level in range(self.levels):
            corner = self._corner(level)
            part = x[corner]
            for axis in self._axes:
                part = self._split(part, axis)
            x = part if level == 0 else x.at[corner].set(part)
        return x

    def transpose(self, y):
        for level in reversed(range(self.levels)):
            corner = self._corner(level)
            part = y[corner]
            for axis in self._axes:
                part = self._merge(part, axis)
            y = part if level == 0 else y.at[corner].set(part)
        return y

    def norm(self, tol: float = 1e-3) -> float:
        """1, exactly."""
        check_tolerance(tol)
        return 1.0

    @property
    def _axes(self):
        return range(-len(self.in_shape), 0)

    def _corner(self, level: int):
        return (..., *(slice(n >> level) for n in self.in_shape))

    @cached_property
    def _taps(self):
        """Pairs of taps of h and g that meet even and odd entries, as numbers: they take the dtype of the image."""
        h = daubechies(MOMENTS[self.name])
        g = h[::-1] * (-1.0) ** np.arange(len(h))
        return [(float(a), float(b)) for a, b in h.reshape(-1, 2)], [(float(a), float(b)) for a, b in g.reshape(-1, 2)]

    def _split(self, x, axis):
        axis += x.ndim
        pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
        even, odd = (pairs.take(i, axis + 1) for i in (0, 1))
        halves = [
            sum(a * jnp.roll(even, -m, axis) + b * jnp.roll(odd, -m, axis) for m, (a, b) in enumerate(taps))
            for taps in self._taps
        ]
        return jnp.concatenate(halves, axis)

    def _merge(self, y, axis):
        axis += y.ndim
        halves = jnp.split(y, 2, axis)
        even, odd = (
            sum(
                pair[i] * jnp.roll(half, m, axis)
                for half, taps in zip(halves, self._taps, strict=True)
                for m, pair in enumerate(taps)
            )
            for i in (0, 1)
        )
        return jnp.stack([even, odd], axis + 1).reshape(y.shape)


def daubechies(moments: int) -> np.ndarray:
    """The 2 N taps of Daubechies' extremal-phase low-pass filter with N vanishing moments; their sum is sqrt(2).

    sum_k h[k] z^k = c (1 + z)^N prod (z - z_j), where z_j are the roots inside the unit circle that solve
    z + 1/z = 2 - 4 y for the roots y of sum_{k<N} binom(N - 1 + k, k) y^k (Daubechies 1992, section 6.1), in the order
    that starts with the large taps. Accurate to rounding for the small N used here.

    >>> [round(float(v), 6) for v in daubechies(2)]
    [0.482963, 0.836516, 0.224144, -0.12941]
    """
    N = moments
    polynomial = np.polynomial.Polynomial([math.comb(N - 1 + k, k) for k in range(N)])
    inside = []
    for y in polynomial.roots() if N > 1 else []:
        centre = 1 - 2 * y
        root = centre + np.sqrt(centre**2 - 1 + 0j)
        inside.append(root if abs(root) < 1 else 1 / root)
    h = np.real(np.poly([-1.0] * N + inside))
    return math.sqrt(2) * h / h.sum()
