"""The fan beam transform: rays from a point source to a flat detector, with exact transpose."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jbilevel.operators import joseph
from jbilevel.operators.joseph import Joseph
from jbilevel.operators.redundancy import Scan
from jbilevel.operators.xray import PlaneXRay, check_plane


class _FanView(NamedTuple):
    """Row and column, in pixels from the image's centre, of the source, of the vector from there to the middle of the
    detector, and of the step from bin to bin."""

    source_row: np.ndarray
    source_column: np.ndarray
    middle_row: np.ndarray
    middle_column: np.ndarray
    step_row: np.ndarray
    step_column: np.ndarray


@dataclass(frozen=True)
class FanRays:
    def ray(self, view, k):
        slope = self._slope(view, k)
        return view.source_column - slope * view.source_row, slope

    def bin(self, view, i, j):
        down, across = i - view.source_row, j - view.source_column
        return (across * view.middle_row - down * view.middle_column) / depth(view, down, across)

    def share(self, view, k, ahead, i, j):
        return joseph.hat((view.source_column - j) + self._slope(view, k) * (i - view.source_row))

    @staticmethod
    def _slope(view, k):
        """Columns per row."""
        down, across = FanRays.towards(view, k)
        return across / down

    @staticmethod
    def towards(view, k):
        """Rows and columns from the source to bin k. Rays close to a row belong to the other group: a floor keeps
        their slope finite."""
        down, across = view.middle_row + k * view.step_row, view.middle_column + k * view.step_column
        floor = 1e-3 * jnp.abs(across)
        return jnp.where(jnp.abs(down) < floor, floor, down), across


def depth(view, down, across):
    """Proportional to the distance between the source and a point, measured along the detector's normal."""
    return down * view.step_column - across * view.step_row


@dataclass(frozen=True)
class FanInterpolation:
    """Interpolated values with the weight (source distance / depth)^2 of a flat detector."""

    def bin(self, view, i, j):
        return FanRays().bin(view, i, j)

    def share(self, view, k, ahead, i, j):
        centre = depth(view, -view.source_row, -view.source_column)
        return joseph.hat(ahead) * (centre / depth(view, i - view.source_row, j - view.source_column)) ** 2


@dataclass(frozen=True)
class FanBeam(PlaneXRay):
    """The X-ray transform of an image for rays from a point source to a flat detector, by Joseph's method.

    Image, units and angles are those of `ParallelBeam`, which this tends to as the source moves away. At angle t the
    source is at ``source_origin`` (sin t, -cos t), the middle of the detector at ``origin_detector`` (-sin t, cos t) +
    ``detector_offset`` (cos t, sin t), and bins lie ``detector_size`` apart along (cos t, sin t) (ASTRA's 'fanflat').

    Args:
      shape: (H, W), or one integer for a square.
      angles: in radians, any numbers in any order.
      n_detectors: number of rays per view.
      source_origin: distance from the source to the centre of rotation, the image's centre.
      origin_detector: distance from there to the detector, 0 for a detector through the centre.
      pixel_size, detector_size, detector_offset: in the same unit of length.

    Raises:
      ValueError: as for `ParallelBeam`, and if the source comes closer than the corners of the image.

    >>> import jax.numpy as jnp
    >>> A = FanBeam((4, 4), [0.0], 3, source_origin=10.0, origin_detector=10.0, detector_size=2.0)
    >>> A.out_shape, round(float(A(jnp.ones((4, 4)))[0, 1]), 3)
    ((1, 3), 4.0)
    """

    in_shape: tuple[int, int]
    angles: tuple[float, ...]
    n_detectors: int
    _: KW_ONLY
    source_origin: float
    origin_detector: float = 0.0
    pixel_size: float = 1.0
    detector_size: float = 1.0
    detector_offset: float = 0.0

    def __post_init__(self):
        check_plane(self, ("source_origin", "pixel_size", "detector_size"), ("origin_detector", "detector_offset"))
        radius = 0.5 * self.pixel_size * math.hypot(*self.in_shape) + self.pixel_size
        if self.source_origin <= radius:
            raise ValueError(
                f"`source_origin` {self.source_origin} puts the source inside the image, whose corners are within "
                f"{radius:.4g} of the centre: check the units of `pixel_size` and `source_origin`."
            )
        if self.origin_detector < 0:
            raise ValueError(f"`origin_detector` must not be negative, got {self.origin_detector}.")
        half = 0.5 * self.n_detectors * self.detector_size
        if abs(self.detector_offset) - half >= self.magnification * self.source_origin * math.tan(
            math.asin(radius / self.source_origin)
        ):
            raise ValueError(
                f"the detector misses the image at every angle: `detector_offset` {self.detector_offset} exceeds half "
                "the image's shadow plus half the detector."
            )

    @property
    def magnification(self) -> float:
        """Of the centre of rotation: (source_origin + origin_detector) / source_origin."""
        return (self.source_origin + self.origin_detector) / self.source_origin

    @cached_property
    def _kernel(self):
        reach = max(self._bins_per_column(transposed) for transposed in (False, True))
        return Joseph(FanRays(), self.in_shape, self.n_detectors, max(2, math.ceil(2 * reach - 1e-9)))

    def _bins_per_column(self, transposed: bool) -> float:
        """The most bins that one step along a row may cross: |d bin / d j| = |down| (middle x step) / depth^2."""
        view, weight = self._views(transposed)
        rows, columns = self.in_shape[::-1] if transposed else self.in_shape
        view = _FanView(*(v[np.any(weight > 0, axis=1), None, None] for v in view))
        down = (np.arange(rows) - (rows - 1) / 2)[None, :, None] - view.source_row
        across = np.array([-(columns + 1) / 2, (columns + 1) / 2])[None, None] - view.source_column
        area = view.middle_row * view.step_column - view.middle_column * view.step_row
        return float(np.max(np.abs(down * area) / depth(view, down, across) ** 2, initial=0.0))

    def _views(self, transposed):
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        along = (self.source_origin + self.origin_detector) / self.pixel_size  # from the source to the detector
        source, step = self.source_origin / self.pixel_size, self.detector_size / self.pixel_size
        offset = self.detector_offset / self.pixel_size
        # x counts columns, -y rows
        rows = source * cos, -along * cos - offset * sin, -step * sin
        columns = source * sin, -along * sin + offset * cos, step * cos
        if transposed:
            rows, columns = columns, rows
        view = _FanView(
            source_row=rows[0],
            source_column=columns[0],
            middle_row=rows[1],
            middle_column=columns[1],
            step_row=rows[2],
            step_column=columns[2],
        )
        k = np.arange(self.n_detectors) - (self.n_detectors - 1) / 2
        down = view.middle_row[:, None] + k * view.step_row[:, None]
        across = view.middle_column[:, None] + k * view.step_column[:, None]
        own = np.abs(down) > np.abs(across) if transposed else np.abs(down) >= np.abs(across)
        length = self.pixel_size * np.hypot(down, across) / np.where(own, np.abs(down), 1.0)
        return view, np.where(own, length, 0.0)

    @property
    def _interpolation(self):
        return FanInterpolation()

    @cached_property
    def _scan(self):
        return Scan(
            angles=self.angles,
            bins=self.n_detectors,
            spacing=self.detector_size / self.magnification,
            offset=self.detector_offset / self.magnification,
            radius=0.5 * self.pixel_size * max(self.in_shape),
            source=self.source_origin,
        )
