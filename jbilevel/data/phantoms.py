"""Phantoms made of ellipses: Shepp-Logan, random ellipses, and abdomens with organs, lesions and exact masks."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .ellipses import Ellipse, from_unit_disc, to_unit_disc
from .hounsfield import check_positive

# Shepp and Logan's table in the square [-1, 1]²: x, y, a, b, angle in degrees, value, and the value in Toft's thesis,
# which makes the inner structures visible on a screen.
_SHEPP_LOGAN = (
    (0, 0, 0.69, 0.92, 0, 2, 1),
    (0, -0.0184, 0.6624, 0.874, 0, -0.98, -0.8),
    (0.22, 0, 0.11, 0.31, -18, -0.02, -0.2),
    (-0.22, 0, 0.16, 0.41, 18, -0.02, -0.2),
    (0, 0.35, 0.21, 0.25, 0, 0.01, 0.1),
    (0, 0.1, 0.046, 0.046, 0, 0.01, 0.1),
    (0, -0.1, 0.046, 0.046, 0, 0.01, 0.1),
    (-0.08, -0.605, 0.046, 0.023, 0, 0.01, 0.1),
    (0, -0.606, 0.023, 0.023, 0, 0.01, 0.1),
    (0.06, -0.605, 0.023, 0.046, 0, 0.01, 0.1),
)


def shepp_logan(radius: float = 1.0, *, contrast: str = "modified") -> list[Ellipse]:
    """The ten ellipses of the head phantom of Shepp and Logan, for :func:`raster` and :func:`parallel_sinogram`.

    Args:
        radius: half the side of the square that the phantom is drawn in; N h / 2 fills N x N pixels of size h.
        contrast: "original" has the skull at 2 and the brain within 2 % of 1.02; "modified" has the skull at 1 and
            the brain at 0.2, as in most toolboxes.

    Raises:
        ValueError: ``contrast`` is neither of the two, or ``radius`` is not positive.

    References:
        Shepp, Logan, The Fourier reconstruction of a head section, IEEE Trans. Nucl. Sci. 21, 1974, Table 1;
        Toft, The Radon transform, theory and implementation, PhD thesis, 1996, Table B.3.

    >>> from jbilevel.data import raster
    >>> image = raster(shepp_logan(32), (64, 64))
    >>> print(image.shape, image[32, 32].round(2), image.max().round(2))
    (64, 64) 0.2 1.0
    """
    if contrast not in ("original", "modified"):
        raise ValueError(f'`contrast` is {contrast!r}: choose "original" or "modified".')
    r = check_positive("radius", radius)
    return [
        Ellipse(r * x, r * y, r * a, r * b, math.radians(angle), original if contrast == "original" else modified)
        for x, y, a, b, angle, original, modified in _SHEPP_LOGAN
    ]


def random_ellipses(
    rng: np.random.Generator, n: int, radius: float = 1.0, *, values: tuple[float, float] = (0.1, 1.0)
) -> list[Ellipse]:
    """``n`` independent ellipses inside a disc around the origin; where they overlap, their values add up.

    Centres are uniform in the disc of 0.8 ``radius``, long semi-axes uniform between 0.05 ``radius`` and the distance
    to the rim, at most 0.5 ``radius``, short ones between 0.3 and 1 of the long one, angles and values uniform.

    Args:
        rng: NumPy generator, which is advanced.
        n: how many, at least 0.
        radius: of the disc that holds all of them, such as half the side of the image.
        values: least and greatest value.

    Raises:
        ValueError: ``n`` is negative, ``radius`` not positive, or ``values`` are not finite and in order.

    >>> phantom = random_ellipses(np.random.default_rng(0), 20, radius=32)
    >>> print(len(phantom), max(np.hypot(e.x, e.y) + e.a for e in phantom) <= 32)
    20 True
    """
    check_positive("radius", radius)
    low, high = values
    if n < 0:
        raise ValueError(f"`n` is {n}: give a number of ellipses.")
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"`values` is {values}: give the least and the greatest value, finite.")
    distance, direction = 0.8 * np.sqrt(rng.random(n)), rng.uniform(0, 2 * np.pi, n)
    a = rng.uniform(0.05, np.minimum(0.5, 1 - distance))
    b = a * rng.uniform(0.3, 1, n)
    x, y, angle = distance * np.cos(direction), distance * np.sin(direction), rng.uniform(0, np.pi, n)
    columns = (radius * x, radius * y, radius * a, radius * b, angle, rng.uniform(low, high, n))
    return [Ellipse(*map(float, row)) for row in zip(*columns, strict=True)]


class Organ(NamedTuple):
    """An entry of the table of :func:`abdomen`, for a body that is 2 wide.

    Attributes:
        label: its name in :data:`ABDOMEN_LABELS`.
        inside: the number of the entry that holds it, None for the outermost.
        x, y, a, b, angle: centre, semi-axes and angle in degrees, before they are varied.
        density: least and greatest density relative to water.
    """

    label: str
    inside: int | None
    x: float
    y: float
    a: float
    b: float
    angle: float
    density: tuple[float, float]


#: Names of the labels of :func:`abdomen`, by number.
ABDOMEN_LABELS = (
    "air",
    "fat",
    "muscle",
    "liver",
    "spleen",
    "kidney",
    "vertebra",
    "spinal canal",
    "aorta",
    "vena cava",
    "stomach",
    "bowel",
    "gas",
    "lesion",
)

# Siblings are disjoint and each entry lies in its parent, so that densities can be written as sums of ellipses and each
# point has one label. The patient's right is on the left of the image, the front at the top, as in radiology.
_ABDOMEN = (
    Organ("fat", None, 0, 0, 1.0, 0.72, 0, (0.91, 0.95)),
    Organ("muscle", 0, 0, 0, 0.92, 0.64, 0, (1.04, 1.07)),
    Organ("fat", 1, 0, 0.08, 0.80, 0.48, 0, (0.92, 0.96)),  # around the organs
    Organ("vertebra", 1, 0, -0.53, 0.13, 0.06, 0, (1.25, 1.45)),  # the arch
    Organ("spinal canal", 3, 0, -0.53, 0.05, 0.035, 0, (1.01, 1.03)),
    Organ("vertebra", 2, 0, -0.25, 0.14, 0.11, 0, (1.20, 1.40)),  # the body
    Organ("aorta", 2, 0.08, -0.07, 0.05, 0.05, 0, (1.05, 1.20)),
    Organ("vena cava", 2, -0.09, -0.07, 0.055, 0.045, 20, (1.05, 1.15)),
    Organ("liver", 2, -0.46, 0.17, 0.30, 0.21, 50, (1.05, 1.11)),
    Organ("liver", 2, -0.07, 0.40, 0.14, 0.09, -5, (1.05, 1.11)),  # the left lobe
    Organ("stomach", 2, 0.28, 0.32, 0.19, 0.13, -20, (1.00, 1.04)),
    Organ("gas", 10, 0.28, 0.37, 0.09, 0.04, 0, (0.0, 0.01)),
    Organ("spleen", 2, 0.60, 0.06, 0.11, 0.20, 15, (1.05, 1.12)),
    Organ("kidney", 2, -0.33, -0.20, 0.09, 0.11, -25, (1.03, 1.15)),
    Organ("kidney", 2, 0.33, -0.20, 0.09, 0.11, 25, (1.03, 1.15)),
    Organ("bowel", 2, 0.14, 0.11, 0.08, 0.07, 0, (1.01, 1.05)),
    Organ("gas", 15, 0.14, 0.135, 0.04, 0.025, 0, (0.0, 0.01)),
    Organ("bowel", 2, 0.34, 0.06, 0.08, 0.07, 0, (1.01, 1.05)),
    Organ("bowel", 2, -0.09, 0.15, 0.08, 0.07, 0, (1.01, 1.05)),
    Organ("gas", 18, -0.09, 0.175, 0.045, 0.025, 0, (0.0, 0.01)),
)
_LESIONS_IN = ("liver", "spleen", "kidney")


class Abdomen(NamedTuple):
    """A phantom with labels; ``raster(ellipses, ...)`` is its image, ``label_mask(ellipses, labels, ...)`` its mask.

    Attributes:
        ellipses: each organ after the one that holds it; their values add up to densities relative to water.
        labels: the number of each ellipse in :data:`ABDOMEN_LABELS`.
        densities: what the image is equal to in each ellipse, outside of those that it holds.

    >>> phantom = abdomen(np.random.default_rng(0), lesions=1)
    >>> ABDOMEN_LABELS[phantom.labels[-1]], len(phantom.ellipses) == len(phantom.labels) == len(phantom.densities)
    ('lesion', True)
    """

    ellipses: list[Ellipse]
    labels: list[int]
    densities: list[float]


def abdomen(rng: np.random.Generator, width: float = 340.0, *, lesions: int = 2, variation: float = 1.0) -> Abdomen:
    """A random section through an upper abdomen: densities relative to water, with an exact label for each point.

    Body fat, muscle, liver in two lobes, spleen, kidneys, vertebra with its canal, aorta, vena cava, stomach and bowel
    with gas; lesions in liver, spleen or kidneys, 0.02 to 0.06 denser or less dense. Every organ's place, size, angle
    and density are varied; organs do not overlap, and each lies inside the one that holds it. The shapes are those of a
    drawing, not of an atlas: for methods that need labelled data in known units, not for clinical claims.

    Args:
        rng: NumPy generator, which is advanced.
        width: of the body, in mm for line integrals in mm of water.
        lesions: how many.
        variation: from 0, the mean anatomy (densities and lesions still vary), to 1.

    Raises:
        ValueError: ``width`` is not positive, ``lesions`` is negative, or ``variation`` is outside [0, 1].

    >>> from jbilevel.data import label_mask, raster
    >>> phantom = abdomen(np.random.default_rng(0))
    >>> image = raster(phantom.ellipses, (90, 120), pixel_size=3.0)
    >>> mask = label_mask(phantom.ellipses, phantom.labels, (90, 120), pixel_size=3.0)
    >>> print(image.shape, mask.shape, ABDOMEN_LABELS[mask[45, 30]])
    (90, 120) (90, 120) liver
    """
    check_positive("width", width)
    if lesions < 0:
        raise ValueError(f"`lesions` is {lesions}: give a number of lesions.")
    if not 0 <= variation <= 1:
        raise ValueError(f"`variation` is {variation}: give a number in [0, 1].")
    placed: list[Ellipse] = []
    parents: list[int | None] = []
    labels, densities = [], []
    for organ in _ABDOMEN:
        around = None if organ.inside is None else (placed[organ.inside], _ABDOMEN[organ.inside])
        placed.append(_fitting(rng, _varied(organ, variation, around), organ.inside, placed, parents))
        parents.append(organ.inside)
        labels.append(organ.label)
        densities.append(rng.uniform(*organ.density))
    lobes = [k for k, organ in enumerate(_ABDOMEN) if organ.label == "liver"]
    densities[lobes[1]] = densities[lobes[0]]  # one organ

    hosts = [k for k, organ in enumerate(_ABDOMEN) if organ.label in _LESIONS_IN]
    areas = np.array([placed[k].a * placed[k].b for k in hosts])
    for _ in range(lesions):
        host = hosts[rng.choice(len(hosts), p=areas / areas.sum())]
        placed.append(_fitting(rng, _lesion(placed[host]), host, placed, parents))
        parents.append(host)
        labels.append("lesion")
        densities.append(densities[host] + rng.choice([-1, 1]) * rng.uniform(0.02, 0.06))

    r, ellipses = width / 2, []
    for e, parent, density in zip(placed, parents, densities, strict=True):
        around = 0 if parent is None else densities[parent]
        ellipses.append(Ellipse(*(float(v) for v in (r * e.x, r * e.y, r * e.a, r * e.b, e.angle, density - around))))
    return Abdomen(ellipses, [ABDOMEN_LABELS.index(k) for k in labels], [float(d) for d in densities])


def _varied(organ, variation, around):
    """A rule that draws the ellipse of an organ, about ``scale`` times its usual size; it moves and grows with what is
    around it, given as placed and as in the table."""
    x, y, a, b = organ.x, organ.y, organ.a, organ.b
    if around is not None:
        now, usual = around
        wider, higher = now.a / usual.a, now.b / usual.b
        x, y = now.x + wider * (x - usual.x), now.y + higher * (y - usual.y)
        a, b = a * math.sqrt(wider * higher), b * math.sqrt(wider * higher)

    def draw(rng, scale):
        shift = variation * scale * rng.uniform(-0.15, 0.15, 2) * min(a, b, 0.15)
        size = scale * (1 + variation * rng.uniform(-0.12, 0.08, 2))
        angle = math.radians(organ.angle) + variation * rng.uniform(-0.15, 0.15)
        if organ.label in ("fat", "muscle"):  # layers of the body stay level
            angle = 0.0
        if organ.inside is None:  # and the body centred and as wide as asked for
            shift, size = np.zeros(2), np.array([1, size[1]])
        return Ellipse(x + shift[0], y + shift[1], a * size[0], b * size[1], angle)

    return draw


def _lesion(host):
    """A rule that draws a small ellipse somewhere in ``host``."""

    def draw(rng, scale):
        r, phi = np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        x, y = from_unit_disc(host, r * np.cos(phi), r * np.sin(phi))
        a = scale * rng.uniform(0.1, 0.35) * min(host.a, host.b)
        return Ellipse(x, y, a, a * rng.uniform(0.6, 1), rng.uniform(0, np.pi))

    return draw


def _fitting(rng, draw, inside, placed, parents):
    """Draw, each time 2 % smaller, until the ellipse lies in its parent and meets no sibling."""
    siblings = [e for e, parent in zip(placed, parents, strict=True) if parent == inside]
    for trial in range(400):
        e = draw(rng, 0.98**trial)
        held = inside is None or np.all(_contains(placed[inside], *_outline(e)))
        if held and not any(np.any(_contains(s, *_outline(e))) or np.any(_contains(e, *_outline(s))) for s in siblings):
            return e
    raise RuntimeError("no place was found for an organ: report this with the seed of the generator.")


def _outline(e):
    """Points 2 % outside of the outline, so that what lies between them is covered as well."""
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return from_unit_disc(e, 1.02 * np.cos(t), 1.02 * np.sin(t))


def _contains(e, x, y):
    return np.hypot(*to_unit_disc(e, x, y)) <= 1
