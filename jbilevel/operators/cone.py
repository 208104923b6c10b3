"""The cone beam transform of a volume: flat panel, circular orbit, Joseph's method with gathers both ways.

Seen from above, a ray is one of the fan beam. On every plane of voxels that it crosses (rows, or columns where it runs
that way) it takes the four nearest by bilinear interpolation:

    (A x)[v, view, k] = weight sum_i sum_{j, z} hat(c(i) - j) hat(h(i) - z) x[z, i, j]

with the fan's crossing c and the height h(i) = v way(i) on the way from the source (0) to the panel (1). The transpose
gathers the same hats over the panel's columns around a voxel's shadow, and in each over the rows around it.

Inside, the vertical axis comes last: volumes are (i, j, z), measurements (view, k, v).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax import lax

from jbilevel.operators import joseph
from jbilevel.operators.fan import FanBeam, FanInterpolation, FanRays, depth
from jbilevel.operators.fbp import FBP, Reconstruction, ramp_filter, repeat_ends, transposed
from jbilevel.operators.joseph import Group, centred, hat
from jbilevel.operators.redundancy import slices_lack
from jbilevel.operators.xray import XRay, check_plane


@dataclass(frozen=True)
class ConeBeam(XRay):
    """The X-ray transform of a volume for rays from a point source to a flat panel, by Joseph's method.

    The central plane is `FanBeam`, in the same conventions and units. Slice z of a volume (Z, H, W) is at the height
    (z - (Z - 1)/2) ``pixel_size``, row v of the panel at (v - (rows - 1)/2) ``detector_size``; the source is at height
    0. Measurements are (rows, angles, columns), as in ASTRA and tomosipo.

    Args:
      shape: (Z, H, W), or one integer for a cube.
      angles: in radians, any numbers in any order.
      n_detectors: (rows, columns) of the panel.
      source_origin, origin_detector: distances from the centre of rotation to source and panel.
      pixel_size, detector_size, detector_offset: in the same unit of length; the offset shifts the columns.

    Raises:
      ValueError: as for `FanBeam`.

    Reference: L. A. Feldkamp, L. C. Davis, J. W. Kress, Practical cone-beam algorithm, J. Opt. Soc. Am. A 1 (1984),
    feldkamp_1984, for the reconstruction.

    >>> import jax.numpy as jnp
    >>> A = ConeBeam((4, 4, 4), [0.0], (3, 3), source_origin=10.0, origin_detector=10.0, detector_size=2.0)
    >>> A.out_shape, round(float(A(jnp.ones((4, 4, 4)))[1, 0, 1]), 3)
    ((3, 1, 3), 4.0)
    """

    in_shape: tuple[int, int, int]
    angles: tuple[float, ...]
    n_detectors: tuple[int, int]
    _: KW_ONLY
    source_origin: float
    origin_detector: float = 0.0
    pixel_size: float = 1.0
    detector_size: float = 1.0
    detector_offset: float = 0.0

    def __post_init__(self):
        positive = "source_origin", "pixel_size", "detector_size"
        check_plane(self, positive, ("origin_detector", "detector_offset"), "(Z, H, W)", panel=2)
        self._plane  # noqa: B018  its checks, now

    @cached_property
    def _plane(self) -> FanBeam:
        names = "source_origin", "origin_detector", "pixel_size", "detector_size", "detector_offset"
        return FanBeam(
            self.in_shape[1:], self.angles, self.n_detectors[1], **{name: vars(self)[name] for name in names}
        )

    @cached_property
    def _kernel(self) -> ConeJoseph:
        plane = self._plane
        radius = 0.5 * self.pixel_size * math.hypot(*self.in_shape[1:]) + self.pixel_size
        nearest = (self.source_origin + self.origin_detector) / (self.source_origin - radius)
        rows_per_voxel = nearest * self.pixel_size / self.detector_size
        taps = plane._kernel.taps, max(2, math.ceil(2 * rows_per_voxel))
        return ConeJoseph(self.in_shape, self.n_detectors, self.detector_size / self.pixel_size, taps)

    def _measured(self, views):
        return self.n_detectors[0], views, self.n_detectors[1]

    def _subsets(self, m):
        return self._plane._subsets(m)

    @property
    def _reconstruction(self):
        return self._plane._reconstruction

    def _invert(self, y, parts, filter, transpose, bind):
        kernel = Feldkamp(
            shape=self.in_shape,
            panel=self.n_detectors,
            padding=self._plane._scan.padding,
            spacing=self._plane._scan.spacing,
            source=self.source_origin,
            row_size=self._kernel.row_size,
            filter=filter,
        )
        return bind(kernel, y, *parts, transpose=transpose)

    def _lacks(self):
        scan = self._plane._scan
        return scan.lacks() + slices_lack(self.in_shape[0] * self.pixel_size, self.n_detectors[0], scan.spacing)


@dataclass(frozen=True)
class ConeJoseph:
    """The pair of maps for `linear.apply`, with the two groups of the fan as operands."""

    shape: tuple[int, int, int]
    panel: tuple[int, int]
    row_size: float  # of the panel, in voxels
    taps: tuple[int, int]  # columns and rows of the panel that may see a voxel

    def forward(self, x, *groups: Group):
        return _for_each(partial(self._forward, groups), x)

    def transpose(self, y, *groups: Group):
        return _for_each(partial(self._transpose, groups), y)

    def _forward(self, groups, x):
        total = 0.0
        for axes, group in zip(((1, 2, 0), (2, 1, 0)), groups, strict=True):
            if len(group.source):
                group = joseph.cast(group, x.dtype)
                y = project(self.panel, self.row_size, jnp.transpose(x, axes), group.view, group.weight)
                nothing = jnp.zeros((1, *y.shape[1:]), y.dtype)
                total = total + lax.concatenate([y, nothing], 0)[group.place]
        return jnp.transpose(total, (2, 0, 1))

    def _transpose(self, groups, y):
        lines, total = jnp.transpose(y, (1, 2, 0)), 0.0
        for swap, group in zip((False, True), groups, strict=True):
            if len(group.source):
                group = joseph.cast(group, y.dtype)
                rows, columns = self.shape[:0:-1] if swap else self.shape[1:]
                climb = _climb(group.view, self.panel, self.row_size, y.dtype)
                weighted = lines[group.source] * (group.weight[..., None] * climb)
                shape = rows, columns, self.shape[0]
                x = backproject(JosephHats(self.row_size), shape, self.taps, weighted, group.view)
                total = total + jnp.transpose(x, (2, 1, 0) if swap else (2, 0, 1))
        return total


def project(panel, row_size: float, volume, view, weight):
    """Line integrals of a volume (i, j, z): (views, k, v)."""
    rows, columns, slices = volume.shape
    dtype, pad = volume.dtype, joseph.PAD
    view = joseph.as_columns(view)
    k, v = centred(panel[1], dtype)[None], centred(panel[0], dtype)
    offset, slope = FanRays().ray(view, k)
    offset = offset + ((columns - 1) / 2 + pad)
    down = FanRays.towards(view, k)[0]
    planes = joseph.pad(volume, {1: (pad, pad), 2: (pad, pad)})
    width, depth_ = columns + 2 * pad, slices + 2 * pad

    def step(total, some):
        i, plane = some
        crossing = offset + slope * i
        height = ((i - view.source_row) / down)[..., None] * (row_size * v)[None, None] + ((slices - 1) / 2 + pad)
        left, below = crossing.astype(jnp.int32), height.astype(jnp.int32)
        across = (crossing - left.astype(dtype))[..., None]
        up = height - below.astype(dtype)

        def row(column):
            start = jnp.clip(column, 0, width - 1)[..., None] * depth_
            low, high = (joseph.take(plane, start + jnp.clip(z, 0, depth_ - 1)) for z in (below, below + 1))
            return low + up * (high - low)

        first, second = row(left), row(left + 1)
        return total + (first + across * (second - first)), None

    total = jnp.zeros((weight.shape[0], panel[1], panel[0]), dtype)
    total, _ = lax.scan(step, total, (centred(rows, dtype), planes.reshape(rows, -1)))
    return total * weight[..., None] * _climb(view, panel, row_size, dtype)


def backproject(hats, shape, taps, y, view):
    """Gathers (views, k, v), already weighted, to a volume (i, j, z)."""
    rows, columns, slices = shape
    views, bins, lines = y.shape
    dtype = y.dtype
    i, j, z = centred(rows, dtype)[:, None], centred(columns, dtype)[None], centred(slices, dtype)[None, None]
    middle, centre = (bins - 1) / 2 + taps[0], (lines - 1) / 2 + taps[1]
    width, height = bins + 2 * taps[0], lines + 2 * taps[1]
    padded = joseph.pad(y, {1: (taps[0], taps[0]), 2: (taps[1], taps[1])}).reshape(views, -1)

    def step(total, some):
        place, line = some
        own = hats.bin(place, i, j)
        first = (own + (middle + 1 - taps[0] / 2)).astype(jnp.int32)
        for column in (first + tap for tap in range(taps[0])):
            k = column.astype(dtype) - middle
            across, per_voxel, width_in_rows = hats.column(place, k, k - own, i, j)
            shadow = per_voxel[..., None] * z
            lowest = (shadow + (centre + 1 - taps[1] / 2)).astype(jnp.int32)
            start = jnp.clip(column, 0, width - 1)[..., None] * height
            part = 0.0
            for row in (lowest + tap for tap in range(taps[1])):
                up = hat((row.astype(dtype) - centre - shadow) / width_in_rows[..., None])
                part = part + up * joseph.take(line, start + jnp.clip(row, 0, height - 1))
            total = total + across[..., None] * part
        return total, None

    total, _ = lax.scan(step, jnp.zeros(shape, dtype), (view, padded))
    return total


@dataclass(frozen=True)
class JosephHats:
    """How much of a voxel a ray takes in Joseph's method."""

    row_size: float

    def bin(self, view, i, j):
        return FanRays().bin(view, i, j)

    def column(self, view, k, ahead, i, j):
        """Share of column k, rows of the panel per voxel of height, and the half width of the vertical hat in rows."""
        down, ahead = FanRays.towards(view, k)[0], i - view.source_row
        # rays of this group have come a long way down when they pass a voxel; the floor keeps the others finite
        ahead = jnp.where(jnp.abs(ahead) < 1e-3, 1e-3, ahead)
        per_voxel = down / (ahead * self.row_size)
        return FanRays().share(view, k, ahead, i, j), per_voxel, per_voxel


@dataclass(frozen=True)
class _Bilinear:
    """Bilinear interpolation on the panel at a voxel's own shadow, with the weight of a flat detector."""

    row_size: float

    def bin(self, view, i, j):
        return FanRays().bin(view, i, j)

    def column(self, view, k, ahead, i, j):
        panel = view.middle_row * view.step_column - view.middle_column * view.step_row
        per_voxel = panel / (depth(view, i - view.source_row, j - view.source_column) * self.row_size)
        return FanInterpolation().share(view, k, ahead, i, j), per_voxel, jnp.ones_like(per_voxel)


def _climb(view, panel, row_size: float, dtype):
    """Length of a ray over that of its shadow on the central plane, (views, k, v)."""
    view = view if view.source_row.ndim == 2 else joseph.as_columns(view)
    down, across = FanRays.towards(view, centred(panel[1], dtype)[None])
    height = row_size * centred(panel[0], dtype)[None, None]
    return jnp.sqrt(1 + height**2 / (down**2 + across**2)[..., None])


def _for_each(function, v):
    """One volume after the other: a batch of volumes would not fit into the cache anyway."""
    dtype = v.dtype
    v = v.astype(jnp.promote_types(dtype, jnp.float32))
    lead = v.shape[:-3]
    if not lead:
        return function(v).astype(dtype)
    out = lax.map(function, v.reshape(-1, *v.shape[-3:]))
    return out.reshape(*lead, *out.shape[1:]).astype(dtype)


@dataclass(frozen=True)
class Feldkamp:
    """The pair of maps for `linear.apply`, with the entries of the fan's `Reconstruction` as operands."""

    shape: tuple[int, int, int]
    panel: tuple[int, int]
    padding: tuple[int, int]  # columns before and after those of the panel, most of which have no share
    spacing: float  # of columns and rows, where the filter sees them
    source: float  # its distance from the centre of rotation
    row_size: float  # of the panel, in voxels
    filter: str

    def forward(self, y, *parts):
        return _for_each(partial(self._forward, Reconstruction(*parts)), y)

    def transpose(self, x, *parts):
        return transposed(self, x, (self.panel[0], len(parts[-1]), self.panel[1]), parts)

    def _forward(self, parts: Reconstruction, y):
        view, cosine, shares, angular = jax.tree.map(lambda v: v.astype(y.dtype), parts)
        height = centred(self.panel[0], y.dtype) * self.spacing
        # 1 / cos of the fan angle, squared, plus the squared height over the source's distance
        cosine = 1 / jnp.sqrt(cosine[..., None] ** -2 + (height[None, None] / self.source) ** 2)
        weighted = repeat_ends(jnp.transpose(y, (1, 2, 0)), self.padding) * (cosine * shares[..., None])
        q = ramp_filter(weighted, self.spacing, self.filter)
        z, *plane = self.shape
        x = backproject(_Bilinear(self.row_size), (*plane, z), (2, 2), q * angular[:, None, None], view)
        return jnp.transpose(x, (2, 0, 1))


class FDK(FBP):
    """`FBP` of a `ConeBeam` or of a subset of one: the algorithm of Feldkamp, Davis & Kress (1984).

    Cosine weights, ramp filter along the rows of the panel, weighted backprojection: exact in the central plane, good
    near it. Measurements are weighted as in that plane.
    """
