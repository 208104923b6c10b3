"""Parallel beam for volumes: slice by slice, with the rows of the detector interpolated between slices."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel.operators.base import LinearOperator
from jbilevel.operators.redundancy import slices_lack
from jbilevel.operators.xray import ParallelBeam, XRay, check_plane


@dataclass(frozen=True)
class ParallelBeam3D(XRay):
    """The X-ray transform of a volume for parallel rays perpendicular to its axis of rotation, by Joseph's method.

    Every slice of a volume (Z, H, W) is an image of `ParallelBeam`, in the same conventions. Slice z is at the height
    (z - (Z - 1)/2) ``pixel_size``, row v of the detector at (v - (rows - 1)/2) ``detector_size``; a row between two
    slices takes the interpolated one. Measurements are (rows, angles, columns), as in ASTRA and tomosipo.

    Args:
      shape: (Z, H, W), or one integer for a cube.
      angles: in radians, any numbers in any order.
      n_detectors: (rows, columns).
      pixel_size, detector_size, detector_offset: in one unit of length; the offset shifts the columns.

    Raises:
      ValueError: as for `ParallelBeam`.

    >>> import jax.numpy as jnp
    >>> A = ParallelBeam3D((3, 4, 4), [0.0], (3, 4))
    >>> A(jnp.ones((3, 4, 4)))[1, 0].tolist()
    [4.0, 4.0, 4.0, 4.0]
    """

    in_shape: tuple[int, int, int]
    angles: tuple[float, ...]
    n_detectors: tuple[int, int]
    _: KW_ONLY
    pixel_size: float = 1.0
    detector_size: float = 1.0
    detector_offset: float = 0.0

    def __post_init__(self):
        check_plane(self, ("pixel_size", "detector_size"), ("detector_offset",), "(Z, H, W)", panel=2)
        self._slice  # noqa: B018  its checks, now

    @cached_property
    def _slice(self) -> ParallelBeam:
        sizes = {name: vars(self)[name] for name in ("pixel_size", "detector_size", "detector_offset")}
        return ParallelBeam(self.in_shape[1:], self.angles, self.n_detectors[1], **sizes)

    def _measured(self, views):
        return self.n_detectors[0], views, self.n_detectors[1]

    def _subsets(self, m):
        return self._slice._subsets(m)

    def _apply(self, x, groups, transpose, bind):
        if transpose:
            return self._slice._apply(self._rows.map(x, True, bind), groups, True, bind)
        return self._rows.map(self._slice._apply(x, groups, False, bind), False, bind)

    @cached_property
    def _rows(self) -> _Rows:
        return _Rows(self.in_shape[0], self.n_detectors[0], self.detector_size / self.pixel_size)

    @property
    def _reconstruction(self):
        return self._slice._reconstruction

    def _invert(self, y, parts, filter, transpose, bind):
        """Rows are interpolated back to slices first."""
        rows = _Rows(self.n_detectors[0], self.in_shape[0], self.pixel_size / self.detector_size)
        if transpose:
            return rows.map(self._slice._invert(y, parts, filter, True, bind), True, bind)
        return self._slice._invert(rows.map(y, False, bind), parts, filter, False, bind)

    def _lacks(self):
        return self._slice._lacks() + slices_lack(
            self.in_shape[0] * self.pixel_size, self.n_detectors[0], self.detector_size
        )


@dataclass(frozen=True)
class _Rows(LinearOperator):
    """Linear interpolation along the first of three axes, from ``before`` to ``after`` samples ``step`` apart.

    A small dense matrix: its product is a few per cent of the projections it follows.
    """

    before: int
    after: int
    step: float

    in_shape = property(lambda self: (self.before, 1, 1))
    out_shape = property(lambda self: (self.after, 1, 1))

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        return self._product(x, "vz,...zab->...vab")

    def transpose(self, y):
        return self._product(y, "vz,...vab->...zab")

    def _product(self, x, indices):
        if self.before == self.after and math.isclose(self.step, 1.0):
            return x
        height = (np.arange(self.after) - (self.after - 1) / 2) * self.step + (self.before - 1) / 2
        weights = np.maximum(0, 1 - np.abs(height[:, None] - np.arange(self.before)))
        return jnp.einsum(indices, jnp.asarray(weights, x.dtype), x, precision=jax.lax.Precision.HIGHEST)
