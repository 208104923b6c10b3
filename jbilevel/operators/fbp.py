"""Filtered backprojection: the ramp filter in the spatial domain, windows, and angular weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators import joseph
from jbilevel.operators.base import LinearOperator

# of the frequency as a share of the Nyquist frequency
WINDOWS = {
    "ram-lak": lambda nu: np.ones_like(nu),
    "shepp-logan": lambda nu: np.sinc(nu / 2),
    "cosine": lambda nu: np.cos(np.pi * nu / 2),
    "hamming": lambda nu: 0.54 + 0.46 * np.cos(np.pi * nu),
    "hann": lambda nu: 0.5 + 0.5 * np.cos(np.pi * nu),
}


class Reconstruction(NamedTuple):
    """What filtered backprojection needs to know of a geometry."""

    rays: Any  # `Interpolation`, perhaps with a weight for each pixel
    view: NamedTuple
    before: np.ndarray  # factors of the sinogram, (1 or views, 1 or bins)
    angular: np.ndarray  # the part of the angular integral that each view stands for, (views,)
    spacing: float  # of the detector, where the filter sees it


@dataclass(frozen=True)
class Interpolation:
    """Rays for `joseph.backproject` that give a pixel the value interpolated linearly between its two bins."""

    rays: Any

    def bin(self, view, i, j):
        return self.rays.bin(view, i, j)

    def share(self, view, k, ahead, i, j):
        return joseph.hat(ahead)


@dataclass(frozen=True)
class FBP(LinearOperator):
    """Filtered backprojection for an X-ray transform: a linear operator from sinograms to images.

    Every view is convolved with the ramp filter, given by its exact samples in the spatial domain, 1/(4 d^2) at 0,
    -1/(pi n d)^2 at odd n (Ramachandran & Lakshminarayanan 1971; Kak & Slaney 1988, eq. 3.61), times a window in the
    frequency domain, and padded with zeros to a power of two of at least twice its length. Sampled |f| instead would
    lower the mean. Pixels take values interpolated between two bins, which is sharper than the projector's transpose.

    Args:
      operator: `ParallelBeam`, `FanBeam` or `ConeBeam`.
      filter: "ram-lak" (no window), "shepp-logan", "cosine", "hamming" or "hann".

    Parallel beam: angles are taken modulo pi, and each view counts for half the gap to either neighbour, so they may
    come in any order, unevenly, or cover 2 pi. A gap wider than 30 degrees and five times the median gap counts as not
    scanned. Fan and cone beam: the same modulo 2 pi, and a full turn is needed.

    Raises:
      ValueError: unknown filter, or a fan or cone beam that does not cover the full turn.

    >>> import jax.numpy as jnp, numpy as np
    >>> from jbilevel.operators import ParallelBeam
    >>> A = ParallelBeam((32, 32), np.pi * np.arange(60) / 60, 47)
    >>> disc = (np.hypot(*np.mgrid[-15.5:16, -15.5:16]) < 12).astype(np.float32)
    >>> bool(abs(A.fbp(A(disc))[12:20, 12:20].mean() - 1) < 0.01)
    True
    """

    operator: Any
    filter: str = "ram-lak"

    def __post_init__(self):
        if self.filter not in WINDOWS:
            raise ValueError(f"`filter` must be one of {', '.join(WINDOWS)}, got {self.filter!r}.")
        self.operator._reconstruction()  # raises where there is none

    in_shape = property(lambda self: self.operator.out_shape)
    out_shape = property(lambda self: self.operator.in_shape)

    def forward(self, y):
        return joseph.with_trailing_batch(self._reconstruct, y, self.operator._reconstruction())

    def transpose(self, x):
        lead = x.shape[: x.ndim - len(self.out_shape)]
        y = jax.ShapeDtypeStruct((*lead, *self.in_shape), x.dtype)
        return jax.linear_transpose(self.forward, y)(x)[0]

    def _reconstruct(self, y, parts: Reconstruction):
        cast = lambda v: jnp.asarray(v, y.dtype)  # noqa: E731
        weighted = y * cast(parts.before).reshape(*parts.before.shape, *[1] * (y.ndim - 2))
        q = ramp_filter(weighted, parts.spacing, self.filter)
        kernel = partial(joseph.backproject, parts.rays, self.operator.in_shape, 2)
        return joseph.on_platform(kernel, q, jax.tree.map(cast, parts.view), cast(parts.angular)[:, None])


def ramp_filter(y, spacing: float, filter: str = "ram-lak"):
    """The windowed ramp filter along axis 1 of y (views, bins, ...)."""
    bins = y.shape[1]
    length = 2 ** int(np.ceil(np.log2(2 * bins)))
    response = jnp.asarray(_response(length, spacing, filter), y.dtype)
    spectrum = jnp.fft.rfft(y, length, axis=1)
    filtered = jnp.fft.irfft(spectrum * response.reshape(1, -1, *[1] * (y.ndim - 2)), length, axis=1)
    return filtered[:, :bins]


def _response(length: int, spacing: float, filter: str) -> np.ndarray:
    n = np.minimum(np.arange(length), length - np.arange(length))
    odd = n % 2 == 1
    kernel = np.where(odd, -1 / (np.pi * np.where(odd, n, 1) * spacing) ** 2, 0.0)
    kernel[0] = 1 / (4 * spacing**2)
    nu = np.arange(length // 2 + 1) / (length // 2)
    return spacing * np.fft.rfft(kernel).real * WINDOWS[filter](nu)


def spacings(angles, period: float) -> np.ndarray:
    """Half the gap to both neighbours modulo ``period``; a gap that was not scanned counts as nothing to its ends.

    >>> spacings([0.0, 1.0, 2.0, 3.0], period=4.0).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    turned = np.mod(angles, period)
    order = np.argsort(turned, kind="stable")
    after = np.diff(turned[order], append=turned[order[0]] + period)
    after = np.where(_unscanned(after), _typical(after), after)
    weights = np.zeros(len(order))
    weights[order] = 0.5 * (after + np.roll(after, 1))
    return weights


def covers(angles, period: float) -> bool:
    """Whether angles leave no gap in the period that `spacings` takes for not scanned."""
    turned = np.sort(np.mod(angles, period))
    return not np.any(_unscanned(np.diff(turned, append=turned[0] + period)))


def _unscanned(gaps):
    return (gaps > np.pi / 6) & (gaps > 5 * _typical(gaps))


def _typical(gaps):
    """The median gap between distinct directions."""
    return np.median(gaps[gaps > 1e-9])
