"""Filtered backprojection: the ramp filter in the spatial domain, windows, and angular weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators import joseph
from jbilevel.operators.base import Composite

_SAME = 1e-5  # radians: views closer than this see the same lines
# of the frequency as a share of the Nyquist frequency
WINDOWS = {
    "ram-lak": lambda nu: np.ones_like(nu),
    "shepp-logan": lambda nu: np.sinc(nu / 2),
    "cosine": lambda nu: np.cos(np.pi * nu / 2),
    "hamming": lambda nu: 0.54 + 0.46 * np.cos(np.pi * nu),
    "hann": lambda nu: 0.5 + 0.5 * np.cos(np.pi * nu),
}


class Reconstruction(NamedTuple):
    """What filtered backprojection needs to know of the views."""

    view: NamedTuple  # constants of each, of the detector with its padding
    cosine: Any  # of the angle between each ray and the middle of the fan, (1, 1 or bins)
    shares: Any  # weight of every measurement among those of its line, (1 or views, 1 or bins)
    angular: Any  # the part of the angular integral that each view stands for, (views,)


def select(parts: Sequence[Reconstruction], views: int, i) -> Reconstruction:
    """Entry i, which may be traced, of the parts of one scan, with views that count for nothing up to a number."""

    def filled(part: Reconstruction):
        own = np.arange(views) < len(part.angular)
        index = np.where(own, np.arange(views), 0)
        shares = part.shares[index] if len(part.shares) > 1 else part.shares
        return jax.tree.map(lambda v: v[index], part.view), shares, part.angular[index] * own

    each = [filled(part) for part in parts]
    shape = np.broadcast_shapes(*(shares.shape for _, shares, _ in each))
    each = [(view, np.broadcast_to(shares, shape), angular) for view, shares, angular in each]
    view, shares, angular = jax.tree.map(lambda *v: jnp.asarray(np.stack(v))[i], *each)
    return parts[0]._replace(view=view, shares=shares, angular=angular)


@dataclass(frozen=True)
class Interpolation:
    """Rays for `joseph.backproject` that give a pixel the value interpolated linearly between its two bins."""

    rays: Any

    def bin(self, view, i, j):
        return self.rays.bin(view, i, j)

    def share(self, view, k, ahead, i, j):
        return joseph.hat(ahead)


@dataclass(frozen=True)
class FilteredBackprojection:
    """The pair of maps for `linear.apply` in the plane, with the entries of `Reconstruction` as operands."""

    rays: Any  # `Interpolation`, perhaps with a weight for each pixel
    shape: tuple[int, int]  # of the image
    bins: int
    padding: tuple[int, int]  # bins before and after them, most of which have no share
    spacing: float  # of the bins, where the filter sees them
    filter: str

    def forward(self, y, *parts):
        return joseph.with_trailing_batch(self._forward, y, Reconstruction(*parts))

    def transpose(self, x, *parts):
        return transposed(self, x, (len(parts[-1]), self.bins), parts)

    def _forward(self, y, parts: Reconstruction):
        view, cosine, shares, angular = jax.tree.map(lambda v: v.astype(y.dtype), parts)
        weighted = repeat_ends(y, self.padding) * joseph.expand(cosine * shares, y.shape[2:])
        q = ramp_filter(weighted, self.spacing, self.filter)
        kernel = partial(joseph.backproject, self.rays, self.shape, 2)
        return joseph.on_platform(kernel, q, view, angular[:, None])


def repeat_ends(y, count: tuple[int, int]):
    """y (views, bins, ...) with its first and last bins repeated as often as ``count`` says."""
    return jnp.pad(y, [(0, 0), count, *[(0, 0)] * (y.ndim - 2)], mode="edge")


def transposed(pair, x, measured, parts):
    """The transpose of ``pair.forward``, which takes measurements of one shape to ``pair.shape``."""
    lead = x.shape[: x.ndim - len(pair.shape)]
    y = jax.ShapeDtypeStruct((*lead, *measured), x.dtype)
    return jax.linear_transpose(lambda y: pair.forward(y, *parts), y)(x)[0]


@dataclass(frozen=True)
class FBP(Composite):
    """Filtered backprojection for an X-ray transform: a linear operator from measurements to images.

    Every view is convolved with the ramp filter, given by its exact samples in the spatial domain, 1/(4 d^2) at 0,
    -1/(pi n d)^2 at odd n (Ramachandran & Lakshminarayanan 1971; Kak & Slaney 1988, eq. 3.61), times a window in the
    frequency domain, and padded with zeros to a power of two of at least twice its length. Sampled |f| instead would
    lower the mean. Pixels take values interpolated between two bins, which is sharper than the projector's transpose.

    Every view stands for half the gap to either neighbour, so angles may come in any order, unevenly, and several times
    round. Measurements of one line together count once, with the weights of `jbilevel.operators.redundancy`. Volumes
    are reconstructed slice by slice for parallel rays, and by `FDK` for a cone beam.

    This is the operator alone: it applies to any scan, and `fbp` of the transform says what a scan lacks.

    Args:
      operator: `ParallelBeam`, `FanBeam`, `ParallelBeam3D`, `ConeBeam`, or a subset of one.
      filter: "ram-lak" (no window), "shepp-logan", "cosine", "hamming" or "hann".

    Raises:
      ValueError: unknown filter.

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

    in_shape = property(lambda self: self.operator.out_shape)
    out_shape = property(lambda self: self.operator.in_shape)

    def map(self, x, transpose, bind):
        parts = self.operator._reconstruction
        return self.operator._whole._invert(x, parts, self.filter, transpose, bind)


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


# -------------------------------------------------------------------------------------------------------------- angles


class Directions(NamedTuple):
    """The distinct angles of the views on a circle, rising."""

    at: np.ndarray
    gaps: np.ndarray  # from each to the next
    of: np.ndarray  # (views,): which of them a view has
    count: np.ndarray  # how many views have it


def directions(angles, period: float) -> Directions:
    turned = np.mod(angles, period)
    order = np.argsort(turned, kind="stable")
    rising = turned[order]
    new = np.diff(rising, prepend=rising[-1] - period) > _SAME
    at, of = rising[new], np.zeros(len(order), int)
    of[order] = (np.cumsum(new) - 1) % len(at)
    return Directions(at=at, gaps=np.diff(at, append=at[0] + period), of=of, count=np.bincount(of))


def unscanned(gaps) -> np.ndarray:
    """Which gaps between views were not scanned: those wider than a twelfth of a turn in which another view would fit
    at the distance that the others have. Few views that are equally far apart are undersampled, and no more."""
    return (gaps > (1 + 1e-6) * math.pi / 6) & (gaps > (2 - 1e-6) * _typical(gaps))


def ends(gaps) -> np.ndarray:
    """Gaps between which a scan may be taken to run: also those that are wide beside their neighbours."""
    return unscanned(gaps) | (gaps > 3 * np.maximum(np.roll(gaps, 1), np.roll(gaps, -1)))


def spacings(angles, period: float, apart: Callable = unscanned) -> np.ndarray:
    """The part of the period that each view stands for: half the gap to both neighbours.

    At a gap that is ``apart`` a view reaches as far as to its other side. Views of the same direction share.

    >>> spacings([0.0, 1.0, 2.0, 3.0], period=4.0).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    seen = directions(angles, period)
    back, ahead = _reach(seen.gaps, apart(seen.gaps))
    return ((back + ahead) / seen.count)[seen.of]


def covers(angles, period: float, apart: Callable = unscanned) -> bool:
    """Whether no gap in the period is ``apart``."""
    return not np.any(apart(directions(angles, period).gaps))


def arcs(angles, period: float, apart: Callable = unscanned) -> tuple[np.ndarray, np.ndarray]:
    """Start and length of what no view stands for."""
    seen = directions(angles, period)
    open_ = apart(seen.gaps)
    back, ahead = _reach(seen.gaps, open_)
    return (seen.at + ahead)[open_], (seen.gaps - ahead - np.roll(back, -1))[open_]


def _reach(gaps, open_) -> tuple[np.ndarray, np.ndarray]:
    """How far each direction stands for what comes before and after it."""
    before, open_before, alone = np.roll(gaps, 1), np.roll(open_, 1), min(_typical(gaps), math.pi / 6)
    back = np.where(open_before, np.where(open_, alone, gaps), before)
    ahead = np.where(open_, np.where(open_before, alone, before), gaps)
    return 0.5 * back, 0.5 * ahead


def _typical(gaps) -> float:
    """The median, the lower one of two; half a period for a single view."""
    return min(np.sort(gaps)[(len(gaps) - 1) // 2], 0.5 * gaps.sum())
