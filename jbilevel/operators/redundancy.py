"""How often a scan measures each line, and the weights with which its measurements together count once.

A ray at the angle g from the middle of the fan of the view at angle t runs along the line x cos a + y sin a = s with
a = t - g and s = R sin g, where R is the source's distance from the centre of rotation. The view at t + pi - 2 g sees
that line once more, from the other side, at -g. Parallel rays have g = 0, and s is their place on the detector.

A measurement with the margin m, which is 0 at the edge of all that is measured, has the weight

    sin^2(pi/2 m / (m + m'))

where m' is the margin of the other measurement of the line, 0 if there is none. Both weights add up to 1, and they do
not jump along the detector, which the ramp filter would answer with streaks. With the angle to the first or last view
as the margin this is the short scan of Parker (1982), and with the angle to the near edge of a displaced detector that
of Wang (2002); the product of both serves scans that are either, both or, with 1/2 throughout, neither.

Parallel views that see all lines are counted without weights: modulo half a turn each stands for a part of it.

References: D. L. Parker, Optimal short scan convolution reconstruction for fan beam CT, Med. Phys. 9 (1982),
parker_1982; G. Wang, X-ray micro-CT with a displaced detector array, Med. Phys. 29 (2002), wang_displaced_2002.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jbilevel.operators.fbp import arcs, covers, ends, spacings, unscanned

TURN = 2 * math.pi
OVERLAP = 4  # bins past the centre that a displaced detector is given at least, by repeating the last that it has
NOTABLE = 1.0  # degrees: fewer missing directions are not worth a word


@dataclass(frozen=True, eq=False)
class Scan:
    """The lines in the plane of the source that a scan measures; lengths in any one unit, at the centre of rotation."""

    angles: tuple[float, ...]
    bins: int
    spacing: float  # of the bins
    offset: float  # of the detector's middle
    radius: float  # lines that come this close to the centre of rotation meet the image
    source: float = math.inf  # its distance from there

    @property
    def fan_beam(self) -> bool:
        return math.isfinite(self.source)

    @property
    def place(self) -> np.ndarray:
        """Of the bins and their padding, on a detector through the centre of rotation."""
        before, after = self.padding
        k = np.arange(-before, self.bins + after) - (self.bins - 1) / 2
        return k * self.spacing + self.offset

    @property
    def cosine(self) -> np.ndarray:
        """Of the fan's angle at each bin, (1, 1 or bins)."""
        return (self.source / np.hypot(self.source, self.place))[None] if self.fan_beam else np.ones((1, 1))

    @property
    def near(self) -> float:
        """Lines up to this distance are seen from both sides; negative where the detector stands beside the centre."""
        return self._distance(self._edge(-1))

    @property
    def far(self) -> float:
        """Lines up to this distance are seen at all, if not closer than ``-near``."""
        return self._distance(self._edge(1))

    @property
    def needed(self) -> float:
        return min(self.radius, self.far)

    @property
    def displaced(self) -> bool:
        """Whether lines that are needed are seen from one side only."""
        return self.near < self.needed - self.spacing

    @property
    def period(self) -> float:
        """After which views see the same lines: parallel ones after half a turn, if each sees all of them."""
        return TURN if self.displaced or self.fan_beam else math.pi

    @property
    def padding(self) -> tuple[int, int]:
        """Bins before and after the detector with which a displaced one is as wide on either side: what the filter
        spreads beyond the near edge belongs to the image."""
        count = math.ceil(2 * abs(self.offset) / self.spacing - 1e-6) if self.displaced else 0
        return (count, 0) if self.offset > 0 else (0, count)

    @cached_property
    def apart(self) -> Callable:
        """Which gaps between views end the scan: also narrow ones, if their lines are measured from the other side."""
        return ends if self.period == TURN and math.degrees(max(self.missing(ends))) <= NOTABLE else unscanned

    def missing(self, apart: Callable) -> tuple[float, float]:
        """Directions, in radians, that are not measured of the worst line: among those that the detector sees from both
        sides, and among those that it sees from one."""
        start, length = arcs(self.angles, self.period, apart)
        total = float(length.sum())
        if not self.period == TURN:
            return total, 0.0
        twice = max(min(self.near, self.needed), 0.0) if self.displaced else self.needed
        fan = np.arcsin(twice / self.source * np.linspace(-1, 1, 101))[:, None, None]
        # a direction is missing where both views are that see its line: an arc, and an arc turned by pi - 2 g
        first, second = length[:, None], length
        shift = np.mod(start - start[:, None] - math.pi + 2 * fan, TURN)
        common = np.maximum(np.minimum(first, shift + second) - shift, 0)
        common += np.maximum(np.minimum(first, shift + second - TURN), 0)
        return float(common.sum((1, 2)).max()), total if self.displaced else 0.0

    def angular(self) -> np.ndarray:
        """The part of ``period`` that each view stands for, (views,)."""
        return spacings(self.angles, self.period, self.apart)

    def shares(self) -> np.ndarray:
        """The weight of every measurement among those of its line, (1 or views, 1 or bins)."""
        if not self.period == TURN:
            return np.ones((1, 1))  # `angular` has shared among views that see the same
        return self.share(np.array(self.angles)[:, None], self.place)

    def share(self, view, place) -> np.ndarray:
        """The weight of the measurement at a place on the detector of a view that was taken."""
        own = other = np.ones((1, 1))
        if not covers(self.angles, TURN, self.apart):
            opposite = view + math.pi - 2 * np.arctan(place / self.source)
            own, other = self._from_last(view), self._from_last(opposite)
        if self.displaced:
            side = math.copysign(1, self.offset)
            place, edge = self._along(side * place), self._along(max(self._edge(-1), OVERLAP * self.spacing))
            own, other = own * np.maximum(edge + place, 0), other * np.maximum(edge - place, 0)
        # sin^2 in the form that is exactly 1/2 for equal margins; bins that only pad have none
        both = np.where(own > 0, own + other, 1.0)
        return np.where(own > 0, 0.5 + 0.5 * np.sin(0.5 * math.pi * (own - other) / both), 0.0)

    def _from_last(self, view) -> np.ndarray:
        """Angle between a view and the end of the scan, 0 outside."""
        start, length = arcs(self.angles, TURN, self.apart)
        past = np.mod(view[..., None] - start, TURN)
        return np.where(past < length, 0, np.minimum(past - length, TURN - past)).min(-1)

    def _edge(self, side: int):
        """Place of the far (1) or the near (-1) end of the detector, away from the centre."""
        return 0.5 * self.bins * self.spacing + side * abs(self.offset)

    def _along(self, place):
        """Places on the detector as angles of the fan; those of parallel rays as they are."""
        return np.arctan(place / self.source) if self.fan_beam else place

    def _distance(self, place):
        """Of rays from the centre of rotation, signed."""
        return place / np.hypot(1, place / self.source)

    def lacks(self) -> list[str]:
        """What of the image is not measured, and what that takes: a phrase for each reason; none if complete."""
        found = []
        if self.far < self.radius - self.spacing:
            found.append(
                f"the detector sees lines up to {self.far:.4g} from the centre of rotation and the image reaches "
                f"{self.radius:.4g} (take more `n_detectors`, or an object within {self.far:.4g})"
            )
        if self.near < -self.spacing:
            found.append(
                f"the detector sees no line within {-self.near:.4g} of the centre of rotation (take a smaller "
                "`detector_offset`, or more `n_detectors`)"
            )
        missing, beyond = (math.degrees(v) for v in self.missing(self.apart))
        covered = math.degrees(self.period - arcs(self.angles, self.period, self.apart)[1].sum())
        if missing > NOTABLE:
            fan = 2 * math.degrees(math.asin(self.needed / self.source))
            need = f"a full turn, or 180 and the {fan:.1f} of the fan" if self.fan_beam else "180"
            found.append(f"`angles` cover {covered:.1f} degrees and miss {missing:.1f} of some lines (take {need})")
        if beyond > NOTABLE:
            found.append(
                f"the displaced detector sees lines beyond {max(self.near, 0):.4g} from one side only and `angles` "
                f"cover {covered:.1f} degrees (take a full turn)"
            )
        return found


def slices_lack(height: float, rows: int, size: float) -> list[str]:
    """The same along the axis of rotation, for a volume of this height and a detector with rows of this size."""
    seen = rows * size
    if seen >= height - 2 * size:
        return []
    return [f"the detector sees a height of {seen:.4g} and the volume has {height:.4g} (take more rows)"]


def report(lacks: Sequence[str], strict: bool) -> None:
    """Warns the caller of the function that calls this, or raises."""
    if lacks:
        sentence = f"filtered backprojection lacks lines through the image: {'; '.join(lacks)}."
        if strict:
            raise ValueError(sentence)
        warnings.warn(sentence, UserWarning, stacklevel=4)
