"""X-ray transforms in the plane: parallel and fan beam, any angles, with exact transposes and traced angle subsets."""

from __future__ import annotations

import math
import numbers
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jbilevel._core.settings import own_settings
from jbilevel.operators import norms
from jbilevel.operators.base import Composite, check_tolerance, checked, shape_of
from jbilevel.operators.fbp import FBP, FilteredBackprojection, Interpolation, Reconstruction, select
from jbilevel.operators.joseph import Group, Joseph, hat
from jbilevel.operators.redundancy import Scan, report


class XRayViews(Composite, abstract="XRayViews"):
    """An X-ray transform or a part of one: what has a filtered backprojection."""

    @own_settings
    def fbp(self, y, filter: str = "ram-lak", *, strict: bool = False):
        """Filtered backprojection of a measurement: the image whose line integrals y are, up to resolution.

        Measurements of one line count once together, with the weights of Parker (1982) where the scan is shorter or
        longer than a turn, and of Wang (2002) where the detector is displaced, which then is padded to be as wide on
        either side. Angles may be unequal, in any order, and come round several times. Cone beams are reconstructed by
        the algorithm of Feldkamp, Davis & Kress (1984), exact in the central plane and good near it.

        **Which scans are complete.** The detector sees every line through the disc that has the image's longer side as
        its diameter, to a bin, and the angles cover a full turn, or 180 degrees plus the angle of the fan to that disc
        (parallel rays: 180 degrees), to a degree. A displaced detector sees lines from one side only and needs the full
        turn, for parallel rays too. Gaps up to a twelfth of a turn count as scanned, and so do those of few views, if
        no other would fit in between: they are undersampled and no more. The rows of a volume's detector see its height
        at the axis of rotation, to a row.

        Args:
          y: measurement of shape ``out_shape`` after any batch axes, floating.
          filter: "ram-lak", "shepp-logan", "cosine", "hamming" or "hann", see `FBP`.
          strict: raise an error in place of the warning.

        Returns:
          Array of shape ``in_shape`` after the same batch axes, of the dtype of y.

        Raises:
          UserWarning: the scan is not complete; says what the detector or the angles miss, and what it takes. Inside
            ``jit`` once, when the function is traced.
          ValueError: the same with ``strict``; unknown filter; y of another shape.

        References: A. C. Kak, M. Slaney, Principles of Computerized Tomographic Imaging (1988), kak_1988; D. L. Parker,
        Optimal short scan convolution reconstruction for fan beam CT, Med. Phys. 9 (1982), parker_1982; G. Wang, X-ray
        micro-CT with a displaced detector array, Med. Phys. 29 (2002), wang_displaced_2002; feldkamp_1984.

        >>> import jax.numpy as jnp, numpy as np
        >>> from jbilevel.operators import ParallelBeam
        >>> turn = 2 * np.pi * np.arange(90) / 90
        >>> A = ParallelBeam((32, 32), turn, 32, detector_offset=10.0)  # sees from -6 to 26
        >>> disc = (np.hypot(*np.mgrid[-15.5:16, -15.5:16]) < 12).astype(np.float32)
        >>> bool(abs(A.fbp(A(disc))[12:20, 12:20].mean() - 1) < 0.01)
        True
        """
        inverse = FBP(self, filter)
        y = checked(y, self.out_shape, self.out_kind, "`fbp`")
        report(self._lacks(), strict)
        return inverse(y)

    @property
    @abstractmethod
    def _whole(self) -> XRay:
        """The transform that these views are of."""

    @property
    @abstractmethod
    def _reconstruction(self) -> Reconstruction:
        """What filtered backprojection needs to know of the views."""

    @abstractmethod
    def _lacks(self) -> list[str]:
        """What of the image is not measured, a phrase for each reason."""


class XRay(XRayViews, abstract="XRay"):
    """What the X-ray transforms have in common; a subclass says where its rays run.

    It has the fields ``in_shape``, ``angles``, ``n_detectors``, and the pair of maps ``_kernel`` of the views that
    `_subsets` lists.
    """

    in_shape: tuple[int, int]
    angles: tuple[float, ...]
    n_detectors: int
    norm_is_bound = True
    _kernel: Any

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self._measured(len(self.angles))

    def map(self, x, transpose, bind):
        return self._apply(x, self._all, transpose, bind)

    @cached_property
    def _all(self):
        """The two groups of all views, as numpy arrays."""
        return jax.tree.map(lambda v: v[0], self._subsets(1))

    def _measured(self, views: int) -> tuple[int, ...]:
        """Shape of a measurement with this number of views."""
        return views, self.n_detectors

    def _apply(self, x, groups, transpose, bind):
        """The transform of the views in ``groups``."""
        return bind(self._kernel, x, *groups, transpose=transpose)

    def subset(self, i, m: int) -> Subset:
        """The operator of the angles i, i + m, i + 2 m, ...; ``i`` may be traced, for example by ``lax.scan``.

        All m subsets have ceil(angles / m) views; where a subset is shorter, its last view is zero.
        The sum of A_i^T A_i over i is A^T A. ``subset.restrict(y)`` picks the rows of a measurement.

        Raises:
          ValueError: m is not between 1 and the number of angles, or i is a number outside 0, ..., m - 1.
        """
        if not isinstance(m, numbers.Integral) or not 1 <= int(m) <= len(self.angles):
            raise ValueError(f"`m` must be an integer between 1 and the number of angles {len(self.angles)}, got {m}.")
        if isinstance(i, numbers.Integral) and not 0 <= int(i) < int(m):
            raise ValueError(f"`i` must lie in 0, ..., m - 1 = {m - 1}, got {i}.")
        return Subset(self, i, int(m))

    def norm(self, tol: float = 1e-3) -> float:
        """A proven upper bound on ||A||_2 (rounding apart), which ends within ``tol`` of it or after 100 products.

        From the nonnegative entries of A: ||A||^2 <= max (A^T A p) / p for every positive p (Collatz, Wielandt), with p
        from the power method. The object keeps the number.
        """
        check_tolerance(tol)
        known = self.__dict__.setdefault("_known_norms", {})
        if tol not in known:
            known[tol] = norms.nonnegative(self, tol)
        return known[tol]

    @property
    def _whole(self):
        return self

    @abstractmethod
    def _subsets(self, m: int) -> tuple[Group, Group]:
        """The two groups of all m subsets: the leading axis counts the subsets."""

    @abstractmethod
    def _invert(self, y, parts: Reconstruction, filter: str, transpose, bind):
        """Filtered backprojection of the views in ``parts``."""


class PlaneXRay(XRay, abstract="PlaneXRay"):
    """An X-ray transform of an image, as a function of its rays."""

    detector_size: float
    detector_offset: float

    @abstractmethod
    def _views(self, transposed: bool) -> tuple[Any, np.ndarray]:
        """View constants of all angles, and the weights of the rays that cross the rows of the (transposed) image."""

    @property
    @abstractmethod
    def _scan(self) -> Scan:
        """The lines that are measured."""

    @property
    @abstractmethod
    def _interpolation(self) -> Any:
        """Its rays with values interpolated between two bins, for `FBP`."""

    @cached_property
    def _reconstruction(self):
        scan, same = self._scan, cast(Any, self)  # a dataclass, as all subclasses are
        before, after = scan.padding
        middle = self.detector_offset + 0.5 * (after - before) * self.detector_size
        wide = replace(same, n_detectors=self.n_detectors + before + after, detector_offset=middle)
        return Reconstruction(
            view=wide._views(False)[0], cosine=scan.cosine, shares=scan.shares(), angular=scan.angular()
        )

    def _invert(self, y, parts, filter, transpose, bind):
        kernel = FilteredBackprojection(
            rays=self._interpolation,
            shape=self.in_shape,
            bins=self.n_detectors,
            padding=self._scan.padding,
            spacing=self._scan.spacing,
            filter=filter,
        )
        return bind(kernel, y, *parts, transpose=transpose)

    def _lacks(self):
        return self._scan.lacks()

    def _subsets(self, m: int) -> tuple[Group, Group]:
        return _subset_tables(*self._views(False), m), _subset_tables(*self._views(True), m)


def _subset_tables(view, weight, m: int) -> Group:
    """Splits the views with any weight into the m interleaved subsets, padded to a common length."""
    count = len(weight)
    rows = -(-count // m)
    used = np.flatnonzero(np.any(weight > 0, axis=1))
    members = [used[used % m == i] for i in range(m)]
    length = max(map(len, members))
    index = np.zeros((m, length), int)
    live = np.zeros((m, length), bool)
    place = np.full((m, rows), length)
    for i, own in enumerate(members):
        index[i, : len(own)] = own
        live[i, : len(own)] = True
        place[i, own // m] = np.arange(len(own))
    # of views that only fill, constants of another view keep everything finite
    index[~live] = used[0] if len(used) else 0
    return Group(
        view=jax.tree.map(lambda v: v[index], view),
        weight=weight[index] * live[..., None],
        source=np.where(live, index // m, 0),
        place=place,
    )


@dataclass(frozen=True)
class Subset(XRayViews):
    """The angles i, i + m, ... of an X-ray transform, see `XRay.subset`; hashable where i is a number."""

    operator: Any
    i: Any
    m: int

    norm_is_bound = True
    in_shape = property(lambda self: self.operator.in_shape)

    @property
    def out_shape(self):
        return self.operator._measured(-(-len(self.operator.angles) // self.m))

    def map(self, x, transpose, bind):
        known = isinstance(self.i, numbers.Integral)
        groups = jax.tree.map(lambda v: (v if known else jnp.asarray(v))[self.i], self.operator._subsets(self.m))
        return self.operator._apply(x, groups, transpose, bind)

    @property
    def _whole(self):
        return self.operator

    @property
    def _meant(self) -> Sequence[int]:
        """The numbers that i may have."""
        return [int(self.i)] if isinstance(self.i, numbers.Integral) else range(self.m)

    def _alone(self, i: int) -> XRay:
        """Subset i as a transform of its own, without what fills the last row."""
        return replace(self.operator, angles=self.operator.angles[i :: self.m])

    @property
    def _reconstruction(self):
        parts = [self._alone(i)._reconstruction for i in self._meant]
        return select(parts, self.out_shape[-2], self.i if len(parts) > 1 else 0)

    def _lacks(self):
        """Of a traced i, what the first incomplete subset lacks."""
        lacks = (self._alone(i)._lacks() for i in self._meant)
        return next((found for found in lacks if found), [])

    def restrict(self, y):
        """The rows of a measurement y (..., angles, detectors) that belong to this subset, 0 where it is shorter."""
        count, rows = len(self.operator.angles), self.out_shape[-2]
        index = self.i + self.m * jnp.arange(rows)
        picked = jnp.moveaxis(jnp.take(y, index, axis=-2, mode="clip"), -2, -1)
        return jnp.moveaxis(jnp.where(jnp.broadcast_to(index < count, picked.shape), picked, 0), -1, -2)

    def norm(self, tol: float = 1e-3) -> float:
        """As for the whole operator; for a traced i, the bound of the whole operator, which holds for each subset."""
        check_tolerance(tol)
        known = isinstance(self.i, numbers.Integral)
        return norms.nonnegative(self, tol) if known else self.operator.norm(tol)


# ------------------------------------------------------------------------------------------------------- parallel beam


class _ParallelView(NamedTuple):
    """The column where ray k crosses row i is offset + slope i + spacing k, and its inverse."""

    offset: np.ndarray
    slope: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray  # bin that sees the image's centre
    down: np.ndarray  # bins per row
    across: np.ndarray  # bins per column


@dataclass(frozen=True)
class _ParallelRays:
    def ray(self, view, k):
        return view.offset + view.spacing * k, view.slope

    def bin(self, view, i, j):
        return (view.origin + view.down * i) + view.across * j

    def share(self, view, k, ahead, i, j):
        return hat(view.spacing * ahead)


@dataclass(frozen=True)
class ParallelBeam(PlaneXRay):
    """The X-ray transform of an image for parallel rays, by Joseph's method.

    Pixel (i, j) of an (H, W) image has its centre at (j - (W - 1)/2, (H - 1)/2 - i) times ``pixel_size``: x to the
    right, y upwards. Ray k of the view at angle t is the line x cos t + y sin t = u, with
    u = (k - (n_detectors - 1)/2) ``detector_size`` + ``detector_offset``. Entry (view, k) of the sinogram is the
    integral along that line, in the unit of ``pixel_size`` times that of the image (ASTRA's conventions; its projector
    'linear' has the same entries).

    Args:
      shape: (H, W), or one integer for a square.
      angles: in radians, any numbers in any order.
      n_detectors: number of rays per view.
      pixel_size, detector_size, detector_offset: in one unit of length.

    Raises:
      ValueError: no angles, angles that are not finite, sizes that are not positive, or a detector that no ray from
        the image meets.

    Reference: P. M. Joseph, An improved algorithm for reprojecting rays through pixel images, IEEE Trans. Med. Imaging
    1 (1982), joseph_1982.

    >>> import jax.numpy as jnp
    >>> A = ParallelBeam((4, 4), angles=[0.0, 1.5707963], n_detectors=4, pixel_size=0.5)
    >>> A.out_shape, A(jnp.ones((4, 4)))[0].tolist()
    ((2, 4), [0.0, 2.0, 2.0, 0.0])
    """

    in_shape: tuple[int, int]
    angles: tuple[float, ...]
    n_detectors: int
    _: KW_ONLY
    pixel_size: float = 1.0
    detector_size: float = 1.0
    detector_offset: float = 0.0

    def __post_init__(self):
        check_plane(self, ("pixel_size", "detector_size"), ("detector_offset",))
        corners = 0.5 * self.pixel_size * np.array(self.in_shape)
        reach = np.abs(np.cos(self.angles)) * corners[1] + np.abs(np.sin(self.angles)) * corners[0]
        nearest = abs(self.detector_offset) - 0.5 * self.n_detectors * self.detector_size
        if np.all(nearest >= reach):
            raise ValueError(
                f"the detector misses the image at every angle: `detector_offset` {self.detector_offset} exceeds half "
                f"the image plus half the detector; check the units of `pixel_size` and `detector_size`."
            )

    @cached_property
    def _kernel(self):
        taps = math.ceil(2 * self.pixel_size / self.detector_size - 1e-9)
        return Joseph(_ParallelRays(), self.in_shape, self.n_detectors, max(2, taps))

    def _views(self, transposed):
        per_pixel = self.pixel_size / self.detector_size
        cos, sin = np.cos(self.angles), np.sin(self.angles)
        down, across = -per_pixel * sin, per_pixel * cos  # y points upwards, rows count downwards
        own = np.abs(cos) >= np.abs(sin)
        if transposed:
            down, across, own = across, down, ~own
        safe = np.where(own, across, 1.0)
        origin = np.full_like(cos, -self.detector_offset / self.detector_size)
        view = _ParallelView(
            offset=-origin / safe, slope=-down / safe, spacing=1 / safe, origin=origin, down=down, across=across
        )
        length = self.pixel_size * per_pixel / np.abs(safe)
        return view, np.where(own, length, 0.0)[:, None]

    @property
    def _interpolation(self):
        return Interpolation(_ParallelRays())

    @cached_property
    def _scan(self):
        return Scan(
            angles=self.angles,
            bins=self.n_detectors,
            spacing=self.detector_size,
            offset=self.detector_offset,
            radius=0.5 * self.pixel_size * max(self.in_shape),
        )


def check_plane(A, positive, finite, axes: str = "(H, W)", panel: int = 1) -> None:
    """Brings the fields of an X-ray transform into their types and refuses what cannot be meant."""
    put = lambda name, value: object.__setattr__(A, name, value)  # noqa: E731
    dimension = axes.count(",") + 1
    shape = shape_of(A.in_shape, "shape")
    put("in_shape", shape * dimension if len(shape) == 1 else shape)
    if len(A.in_shape) != dimension:
        raise ValueError(f"`shape` must be {axes}, got {shape}.")
    put("angles", angles_of(A.angles))
    bins = shape_of(A.n_detectors, "n_detectors")
    if len(bins) != panel:
        raise ValueError(f"`n_detectors` must be {'(rows, columns)' if panel == 2 else 'one integer'}, got {bins}.")
    put("n_detectors", bins if panel == 2 else bins[0])
    for name in (*positive, *finite):
        value = float(vars(A)[name])
        if not math.isfinite(value) or (name in positive and value <= 0):
            raise ValueError(f"`{name}` must be {'positive' if name in positive else 'finite'}, got {value}.")
        put(name, value)


def angles_of(angles) -> tuple[float, ...]:
    """Angles in radians as a tuple of floats."""
    values = np.atleast_1d(np.asarray(angles, float))
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"`angles` must be a non-empty list of numbers in radians, got shape {values.shape}.")
    if not np.all(np.isfinite(values)):
        raise ValueError("`angles` must be finite, they contain NaN or infinity.")
    return tuple(values.tolist())
