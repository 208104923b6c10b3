"""Images made of ellipses, and their X-ray measurements in closed form: data without an inverse crime.

One convention for all functions here. Lengths are in the unit of ``pixel_size``. The image's x axis points right along
its columns and its y axis **up**, against the order of its rows; the origin is the centre of the image, so pixel (i, j)
of an H x W image has its centre at ((j - (W-1)/2) h, ((H-1)/2 - i) h), h = ``pixel_size``. A parallel beam at angle
theta measures, at the detector coordinate s = x cos(theta) + y sin(theta), the integral along the line of all (x, y)
with that s; bin k of D has its centre at (k - (D-1)/2) ``detector_size`` + ``detector_offset``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .hounsfield import check_positive


class Ellipse(NamedTuple):
    """An ellipse that adds ``value`` to the image inside of it.

    Attributes:
        x, y: the centre.
        a, b: semi-axes, positive: ``a`` along the direction ``angle``, ``b`` across it.
        angle: in radians, counter-clockwise from the x axis.
        value: added to the image, per unit of length for line integrals; negative values make holes.

    >>> hole = Ellipse(0.0, 0.0, a=2.0, b=1.0, value=-0.5)
    >>> hole.angle, raster([Ellipse(0, 0, 5, 5), hole], (3, 3))[1, 1]
    (0.0, np.float32(0.5))
    """

    x: float
    y: float
    a: float
    b: float
    angle: float = 0.0
    value: float = 1.0


def raster(
    ellipses: Sequence[Ellipse],
    shape: tuple[int, int],
    pixel_size: float = 1.0,
    *,
    supersample: int = 8,
    dtype=np.float32,
) -> np.ndarray:
    """Pixel means of the sum of ellipses, an array (H, W).

    Pixels wholly inside or outside an ellipse are exact; those that its outline may cross are averaged over
    ``supersample``² points on a regular grid.

    Args:
        ellipses: entries of :class:`Ellipse`.
        shape: (H, W).
        pixel_size: side of a pixel.
        supersample: points along each side of a pixel.
        dtype: floating dtype of the image; sums are done in float64.

    Raises:
        ValueError: an ellipse has a semi-axis that is not positive or a number that is not finite; ``shape``,
            ``pixel_size`` or ``supersample`` is not positive.

    >>> print(raster([Ellipse(1, 1, 0.5, 0.5, value=4.0)], (3, 3), supersample=16).round())
    [[0. 0. 3.]
     [0. 0. 0.]
     [0. 0. 0.]]
    """
    ellipses, x, y = _checked(ellipses), *_pixel_centres(shape, pixel_size)
    if supersample < 1:
        raise ValueError(f"`supersample` is {supersample}: give a positive number of points.")
    offsets = ((np.arange(supersample) + 0.5) / supersample - 0.5) * pixel_size
    dx, dy = (v.ravel() for v in np.meshgrid(offsets, offsets))
    image = np.zeros(shape)
    for e in ellipses:
        rows, columns = _box(e, x, y, pixel_size)
        radius = np.hypot(*to_unit_disc(e, x[columns], y[rows, None]))
        # Half a diagonal of a pixel, after the map of the ellipse to the unit disc, is at most this long:
        reach = pixel_size / np.sqrt(2) / min(e.a, e.b)
        cover = (radius <= 1 - reach).astype(np.float64)
        i, j = np.nonzero(np.abs(radius - 1) < reach)
        u, v = to_unit_disc(e, x[columns][j, None] + dx, y[rows][i, None] + dy)
        cover[i, j] = np.mean(u**2 + v**2 <= 1, axis=1)
        image[rows, columns] += e.value * cover
    return image.astype(dtype)


def label_mask(
    ellipses: Sequence[Ellipse], labels: Sequence[int], shape: tuple[int, int], pixel_size: float = 1.0
) -> np.ndarray:
    """The label of the last ellipse that contains the centre of each pixel, 0 where there is none: uint8 (H, W).

    Args:
        ellipses: entries of :class:`Ellipse`; later ones lie on top.
        labels: one number in 0, ..., 255 for each ellipse.
        shape, pixel_size: as for :func:`raster`.

    Raises:
        ValueError: as :func:`raster`, or ``labels`` is not as long as ``ellipses`` or out of range.

    >>> print(label_mask([Ellipse(0, 0, 1.1, 1.1), Ellipse(1, 0, 0.5, 0.5)], [1, 2], (3, 3)))
    [[0 1 0]
     [1 1 2]
     [0 1 0]]
    """
    ellipses, x, y = _checked(ellipses), *_pixel_centres(shape, pixel_size)
    if len(labels) != len(ellipses) or not all(0 <= k <= 255 for k in labels):
        raise ValueError(
            f"`labels` is {labels}: give one number in 0, ..., 255 for each of the {len(ellipses)} ellipses."
        )
    mask = np.zeros(shape, np.uint8)
    for e, label in zip(ellipses, labels, strict=True):
        rows, columns = _box(e, x, y, pixel_size)
        mask[rows, columns][np.hypot(*to_unit_disc(e, x[columns], y[rows, None])) <= 1] = label
    return mask


def parallel_sinogram(
    ellipses: Sequence[Ellipse],
    angles,
    n_detectors: int,
    detector_size: float = 1.0,
    detector_offset: float = 0.0,
    *,
    bins: bool = True,
    dtype=np.float32,
) -> np.ndarray:
    """Parallel-beam sinogram in closed form, an array (angles, detectors); see the top of the file for the geometry.

    At distance t from the projected centre, an ellipse of value v and half-width w = sqrt(a² cos² + b² sin²) of the
    angle between beam and ellipse contributes 2 a b v sqrt(w² - t²) / w².

    Args:
        ellipses: entries of :class:`Ellipse`.
        angles: in radians, shape (n,).
        n_detectors: number of bins.
        detector_size: width of a bin, in the unit of the ellipses.
        detector_offset: shift of all bins along s.
        bins: average over each bin, what a detector measures; otherwise the line integral at the centre of the bin.
        dtype: floating dtype of the result; sums are done in float64.

    Raises:
        ValueError: an ellipse is out of range as for :func:`raster`, the angles are no vector of finite numbers, or the
            detector has no bin or no size.

    >>> disc = [Ellipse(0, 0, 3, 3)]
    >>> print(parallel_sinogram(disc, [0.0], 3, detector_size=3.0, bins=False))
    [[0. 6. 0.]]
    >>> print(parallel_sinogram(disc, [0.0], 1, detector_size=6.0), np.float32(9 * np.pi / 6))
    [[4.712389]] 4.712389
    """
    ellipses, angles = _checked(ellipses), np.asarray(angles, np.float64)
    if angles.ndim != 1 or not np.all(np.isfinite(angles)):
        raise ValueError("`angles` must be a vector of finite numbers, in radians.")
    if n_detectors < 1:
        raise ValueError(f"`n_detectors` is {n_detectors}: give a positive number of bins.")
    check_positive("detector_size", detector_size)
    s = (np.arange(n_detectors) - (n_detectors - 1) / 2) * detector_size + detector_offset
    edges = np.append(s - detector_size / 2, s[-1] + detector_size / 2)
    sinogram = np.zeros((len(angles), n_detectors))
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    for e in ellipses:
        width = np.hypot(e.a * np.cos(angles - e.angle), e.b * np.sin(angles - e.angle))[:, None]
        t = np.clip(((edges if bins else s) - e.x * cos - e.y * sin) / width, -1, 1)
        if bins:
            area_left = e.a * e.b * (t * np.sqrt(1 - t**2) + np.arcsin(t))
            sinogram += e.value * np.diff(area_left, axis=1) / detector_size
        else:
            sinogram += e.value * 2 * e.a * e.b * np.sqrt(1 - t**2) / width
    return sinogram.astype(dtype)


def line_integrals(ellipses: Sequence[Ellipse], points, directions, *, dtype=np.float32) -> np.ndarray:
    """Integrals along arbitrary lines, for fan beams and any other geometry.

    Args:
        ellipses: entries of :class:`Ellipse`.
        points: a point (x, y) of each line, shape (..., 2); for a fan beam the source.
        directions: the direction of each line, shape (..., 2) that broadcasts with ``points``, of any length but zero;
            for a fan beam the detector pixel minus the source. Lines are infinite.
        dtype: floating dtype of the result; sums are done in float64.

    Returns:
        The integrals, of the shape of points and directions without the last axis.

    Raises:
        ValueError: an ellipse is out of range as for :func:`raster`, a shape is wrong, or a direction is zero.

    >>> print(line_integrals([Ellipse(5, 0, 2, 1)], points=(0, 0), directions=[(1, 0), (1, 1)]))
    [4. 0.]
    """
    points, directions = np.asarray(points, np.float64), np.asarray(directions, np.float64)
    if points.shape[-1:] != (2,) or directions.shape[-1:] != (2,):
        raise ValueError(f"`points` {points.shape} and `directions` {directions.shape} must have 2 as their last axis.")
    length = np.hypot(directions[..., 0], directions[..., 1])
    if not (np.all(length > 0) and np.all(np.isfinite(length)) and np.all(np.isfinite(points))):
        raise ValueError("`points` and `directions` must be finite, and no direction zero.")
    total = np.zeros(np.broadcast_shapes(points.shape, directions.shape)[:-1])
    for e in _checked(ellipses):
        u, v = to_unit_disc(e, points[..., 0], points[..., 1])
        p, q = to_unit_disc(e._replace(x=0, y=0), directions[..., 0], directions[..., 1])
        speed = p**2 + q**2
        half = np.sqrt(np.maximum(speed - (u * q - v * p) ** 2, 0)) / speed  # of the chord, in units of the direction
        total += e.value * 2 * half * length
    return total.astype(dtype)


def to_unit_disc(e: Ellipse, x, y):
    """Points after the affine map that takes the ellipse to the unit disc."""
    cos, sin = np.cos(e.angle), np.sin(e.angle)
    return (cos * (x - e.x) + sin * (y - e.y)) / e.a, (cos * (y - e.y) - sin * (x - e.x)) / e.b


def from_unit_disc(e: Ellipse, u, v):
    """The inverse map: points of the unit disc in the ellipse."""
    cos, sin = np.cos(e.angle), np.sin(e.angle)
    return e.x + cos * e.a * u - sin * e.b * v, e.y + sin * e.a * u + cos * e.b * v


def _box(e, x, y, pixel_size):
    """Slices of the rows and columns whose pixels the ellipse may touch."""
    half_width = np.hypot(e.a * np.cos(e.angle), e.b * np.sin(e.angle)) + pixel_size
    half_height = np.hypot(e.a * np.sin(e.angle), e.b * np.cos(e.angle)) + pixel_size
    columns = np.searchsorted(x, [e.x - half_width, e.x + half_width])
    rows = np.searchsorted(-y, [-e.y - half_height, -e.y + half_height])  # y falls along the rows
    return slice(*rows), slice(*columns)


def _pixel_centres(shape, pixel_size):
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"`shape` is {shape}: give (H, W), both positive.")
    check_positive("pixel_size", pixel_size)
    height, width = shape
    return (np.arange(width) - (width - 1) / 2) * pixel_size, ((height - 1) / 2 - np.arange(height)) * pixel_size


def _checked(ellipses):
    ellipses = [Ellipse(*e) for e in ellipses]
    for e in ellipses:
        if not (np.all(np.isfinite(e)) and e.a > 0 and e.b > 0):
            raise ValueError(f"{e} is no ellipse: its numbers must be finite and its semi-axes positive.")
    return ellipses
