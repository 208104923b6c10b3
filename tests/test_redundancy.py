"""Scans in which some lines are measured more often than others: weights against closed forms, discs, and the rule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fbp import SHEPP_LOGAN
from test_volume import ball, ball_data
from test_xray import ellipse_image, ellipse_sinogram

from jbilevel.operators import ConeBeam, FanBeam, ParallelBeam, ParallelBeam3D
from jbilevel.operators.fbp import FBP

DISTANCE = 100.0
FAN = 2 * np.degrees(np.arcsin(24 / DISTANCE))  # of the image


def views(count, degrees, start=0.0, **options):
    return np.radians(np.linspace(start, start + degrees, count, **{"endpoint": False, **options}))


TURN = views(120, 360)


def parallel(angles=TURN, n_detectors=66, **options):
    return ParallelBeam(48, angles, n_detectors, **options)


def fan(angles=TURN, n_detectors=66, **options):
    sizes = {"origin_detector": 60.0, "detector_size": 1.6, "source_origin": DISTANCE, **options}
    return FanBeam(48, angles, n_detectors, **sizes)


def reconstructed(A, filter="ram-lak"):
    """Values inside the disc of value 1, from its line integrals in single precision."""
    radius = 0.33 * A.in_shape[0] * A.pixel_size
    centre = 0.1 * radius, -0.2 * radius
    y = jnp.asarray(ellipse_sinogram(A, centre, (radius, radius), 0.0), jnp.float32)
    inside = ellipse_image(A, centre, (0.8 * radius, 0.8 * radius), 0.0, fine=1) > 0
    return np.asarray(A.fbp(y, filter))[inside]


def is_one(values):
    return abs(values.mean() - 1) < 5e-3 and values.std() < 0.015


DISCS = {
    "parallel, displaced by a third": parallel(detector_offset=22.0),
    "parallel, displaced to the other side, decreasing angles": parallel(-TURN, detector_offset=-22.0),
    "parallel, displaced to the centre": parallel(n_detectors=48, detector_offset=24.0),
    "parallel, displaced, small units": ParallelBeam(
        48, TURN + 5, 48, pixel_size=0.01, detector_size=0.015, detector_offset=0.24
    ),
    "parallel, displaced, uneven angles": parallel(np.random.default_rng(0).uniform(-9, 9, 300), detector_offset=22.0),
    "parallel, 200 degrees": parallel(views(100, 200)),
    "parallel, 2.5 turns": parallel(-views(450, 900)),
    "fan, displaced by a third": fan(detector_offset=35.2),
    "fan, displaced to the other side, decreasing angles": fan(-TURN, detector_offset=-35.2),
    "fan, displaced, three bins in common": fan(n_detectors=50, detector_offset=-38.0),
    "fan, displaced, half a bin short of the centre": fan(n_detectors=50, detector_offset=40.9),
    "fan, displaced, small units": FanBeam(
        48, TURN, 66, source_origin=0.6, origin_detector=0.3, pixel_size=0.01, detector_size=0.016, detector_offset=0.35
    ),
    "fan, displaced, 1.4 turns": fan(views(168, 504), detector_offset=35.2),
    "fan, displaced, three turns": fan(-views(360, 1080), detector_offset=35.2),
    "fan, displaced, a gap of 20 degrees": fan(views(115, 340), detector_offset=35.2),
    "fan, shortest scan": fan(views(70, 180 + FAN)),
    "fan, short, decreasing, both ends": fan(-views(80, 240, 77.0, endpoint=True)),
    "fan, short, wide": fan(views(100, 265), n_detectors=100, source_origin=50.0, origin_detector=40.0),
    "fan, short, uneven angles": fan(np.radians(np.random.default_rng(0).uniform(30, 280, 300))),
    "fan, 300 degrees": fan(views(100, 300)),
    "fan, 350 degrees": fan(views(115, 350)),
    "fan, 370 degrees": fan(views(125, 370)),
    "fan, 1.5 turns": fan(-views(160, 540)),
}


QUICK = {
    "parallel, displaced by a third", "parallel, displaced, small units", "fan, displaced by a third",
    "fan, displaced to the other side, decreasing angles", "fan, displaced, three bins in common",
    "fan, displaced, a gap of 20 degrees", "fan, short, decreasing, both ends", "fan, short, uneven angles",
    "fan, 350 degrees", "fan, 1.5 turns",
}  # fmt: skip


def quick(cases, names=QUICK):
    """The others are left to the slow tests."""
    marks = {True: (), False: pytest.mark.slow}
    return [pytest.param(case, id=name, marks=marks[name in names]) for name, case in cases.items()]


@pytest.mark.parametrize("A", quick(DISCS))
def test_a_disc_has_the_value_1(A):
    assert is_one(reconstructed(A))


def test_a_narrow_gap_is_filled_from_the_other_side():
    """Stretching the views beside it would cost more than 2 dB."""
    quality = {}
    for degrees in (335, 360):
        A = fan(views(degrees, degrees))
        phantom = [(v, *(tuple(np.multiply(x, 24)) for x in (c, a)), t) for v, c, a, t in SHEPP_LOGAN]
        y = sum(v * ellipse_sinogram(A, *e) for v, *e in phantom)
        truth = sum(v * ellipse_image(A, *e) for v, *e in phantom)
        quality[degrees] = -10 * np.log10(np.mean((np.asarray(A.fbp(jnp.asarray(y))) - truth) ** 2))
    assert quality[335] > quality[360] - 0.5 and quality[360] > 20, quality


def cone(angles=TURN, **options):
    sizes = {"source_origin": 80.0, "origin_detector": 30.0, "detector_size": 1.3}
    return ConeBeam((20, 32, 32), angles, (28, 40), **sizes, **options)


def slices(angles=TURN, **options):
    return ParallelBeam3D((20, 32, 32), angles, (22, 40), **options)


BALLS = {
    "cone, displaced by a third": cone(detector_offset=17.0),
    "cone, displaced to the other side, decreasing angles": cone(-TURN, detector_offset=-17.0),
    "cone, short, decreasing angles": cone(-views(80, 230)),
    "parallel, displaced": slices(detector_offset=13.0),
    "parallel, displaced to the other side": slices(-TURN, detector_offset=-13.0),
}


@pytest.mark.parametrize("A", BALLS.values(), ids=BALLS)
def test_a_ball_has_the_value_1(A):
    centre, radius = (1.0, -2.0, 0.0), 10.0
    if isinstance(A, ConeBeam):
        y = ball_data(A, centre, radius)
    else:  # its slices are discs
        heights = np.arange(22) - 10.5 - centre[2]
        discs = np.sqrt(np.maximum(radius**2 - heights**2, 1e-12))
        y = np.stack([ellipse_sinogram(A._slice, centre[:2], (r, r), 0.0) for r in discs])
    inside = ball(A, centre, 0.7 * radius, fine=1) > 0
    assert is_one(np.asarray(A.fbp(jnp.asarray(y, jnp.float32)))[inside])


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_of_a_displaced_detector_are_those_of_wang():
    """sin^2 of a quarter turn times (g + G) / (2 G), with the angle g of the ray, or its place on the detector."""
    for A, angle in ((parallel(detector_offset=-22.0), np.asarray), (fan(detector_offset=35.2), np.arctan)):
        scan = A._scan
        place = np.linspace(-1, 1, 9) * (scan.bins * scan.spacing / 2) + scan.offset
        g, overlap = angle(place / DISTANCE), angle((scan.bins * scan.spacing / 2 - abs(scan.offset)) / DISTANCE)
        expected = np.sin(np.pi / 4 * (np.clip(np.sign(A.detector_offset) * g / overlap, -1, 1) + 1)) ** 2
        np.testing.assert_allclose(scan.share(np.zeros((1, 1)), place)[0], expected, atol=1e-12)


def test_weights_of_a_short_scan_are_those_of_parker():
    count, degrees = 100, 220.0
    scan = fan(views(count, degrees))._scan
    t = np.asarray(scan.angles)[:, None] + np.radians(degrees) / count / 2  # from the beginning of the first view
    g, half = -np.arctan(scan.place / DISTANCE), np.radians(degrees - 180) / 2  # his fan turns the other way
    g = g[np.abs(g) < half]
    first = np.sin(np.pi / 4 * t / (half - g)) ** 2
    last = np.sin(np.pi / 4 * (np.pi + 2 * half - t) / (half + g)) ** 2
    expected = np.where(t < 2 * half - 2 * g, first, np.where(t > np.pi - 2 * g, last, 1))
    found = scan.share(np.asarray(scan.angles)[:, None], -DISTANCE * np.tan(g))
    np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize(
    "A",
    [
        fan(views(100, 230, 40.0)),
        fan(views(100, 330)),
        fan(views(100, 260), detector_offset=20.0),
        fan(detector_offset=-30.0),
        parallel(views(100, 300), detector_offset=15.0),
        fan(np.concatenate([views(50, 100), views(60, 120, 200.0)])),
    ],
    ids=["short", "long", "short and displaced", "displaced", "parallel", "two arcs"],
)
def test_all_measurements_of_a_line_count_1(A):
    """Both measurements of random lines, found by intersecting the lines with the orbit of the source."""
    rng, scan = np.random.default_rng(0), A._scan
    a, s = rng.uniform(0, 2 * np.pi, 400), rng.uniform(-24, 24, 400)
    along, normal = np.stack([-np.sin(a), np.cos(a)]), np.stack([np.cos(a), np.sin(a)])
    step = np.median(np.diff(np.sort(scan.angles)))
    count, total = np.zeros((2, 400))
    for side in (1, -1):  # the line leaves the source forwards, or comes back
        source = s * normal - side * np.sqrt(DISTANCE**2 - s**2) * along
        t = np.arctan2(source[0], -source[1]) if scan.fan_beam else a + np.pi * (side < 0)
        place = side * s / np.sqrt(1 - (s / scan.source) ** 2)
        beside = (t[:, None] - np.asarray(scan.angles) + np.pi) % (2 * np.pi) - np.pi
        seen = (abs(beside).min(1) < step / 2) & (abs(place - scan.offset) < scan.bins * scan.spacing / 2)
        for n in np.flatnonzero(seen):
            count[n] += 1
            total[n] += scan.share(t[n, None, None], place[n, None])[0, 0]
    assert np.all(np.bincount(count.astype(int), minlength=3)[1:] > 40)
    np.testing.assert_allclose(total[count > 0], 1, atol=1e-9)


def test_views_of_one_direction_share_its_weight():
    thrice = fan(np.tile(views(60, 240), 3) + 2 * np.pi * np.repeat([0, -1, 4], 60))._reconstruction
    once = fan(views(60, 240))._reconstruction
    np.testing.assert_allclose(thrice.angular, np.tile(once.angular / 3, 3), atol=1e-12)
    np.testing.assert_allclose(thrice.shares, np.tile(once.shares, (3, 1)), atol=1e-9)


@pytest.mark.parametrize("A, share", [(fan(), 0.5), (fan(detector_offset=0.4), 0.5), (parallel(views(60, 180)), 1.0)])
def test_an_ordinary_scan_has_equal_weights_and_no_padding(A, share):
    parts = A._reconstruction
    assert A._scan.padding == (0, 0) and np.all(parts.shares == share)
    np.testing.assert_allclose(share * parts.angular, np.pi / len(A.angles), rtol=1e-12)


# ---------------------------------------------------------------------------------------------------------- sufficiency


COMPLETE = {
    "4 views, parallel": parallel(views(4, 180)),
    "8 views, fan": fan(views(8, 360)),
    "a subset of few views": parallel(views(20, 180)).subset(2, 3),
    "a gap of a twelfth of a turn": parallel(views(76, 152)),
    "the image's width": parallel(n_detectors=48),
    "shifted by a quarter of a bin": fan(detector_offset=0.4),
    "180 degrees and the fan": fan(views(60, 181 + FAN)),
    "few views, 180 degrees and the fan": fan(views(9, 180 + FAN)),
    "displaced, full turn": fan(detector_offset=30.0),
}
INCOMPLETE = {
    "parallel, 120 degrees": (parallel(views(60, 120)), "`angles` cover 120.0 degrees and miss 60.0 .*take 180"),
    "one view": (parallel([0.0]), "`angles` cover 30.0 degrees"),
    "fan, half a turn": (fan(views(90, 180)), "cover 180.0 degrees and miss 27.8 .*full turn, or 180 and the 27.8"),
    "parallel, one of 5 views missing": (parallel(views(5, 180)[:4]), "`angles` cover 144.0 degrees and miss 36.0"),
    "fan, 8 views": (fan(views(8, 175, endpoint=True)), "`angles` cover 200.0 degrees and miss 7.8"),
    "wide fan, 8 views": (
        fan(views(8, 210, endpoint=True), 200, source_origin=40.0), "`angles` cover 240.0 degrees and miss 13.7"
    ),
    "fan, two thirds of all": (
        fan(np.concatenate([views(60, 120), views(60, 120, 180.0)])), "`angles` cover 240.0 degrees and miss 120.0"
    ),
    "narrow detector": (parallel(n_detectors=40), "detector sees lines up to 20 .*image reaches 24"),
    "detector beside the centre": (parallel(detector_offset=35.0), "detector sees no line within 2 "),
    "displaced, half a turn": (
        parallel(views(90, 180), detector_offset=22.0), "displaced detector .* beyond 11 .*cover 180.0 .*full turn"
    ),
    "displaced, short": (fan(views(90, 240), detector_offset=35.2), "displaced detector .*`angles` cover 240.0"),
    "subset": (fan(views(90, 180)).subset(1, 3), "`angles` cover 180.0 degrees"),
    "cone, half a turn": (cone(views(90, 180)), "`angles` cover 180.0 degrees"),
    "cone, low panel": (
        ConeBeam((20, 16, 16), TURN, (10, 40), source_origin=80.0), "detector sees a height of 10 and the volume has 20"
    ),
    "slices, low panel": (ParallelBeam3D((20, 16, 16), TURN, (10, 40)), "detector sees a height of 10"),
    "slices, narrow": (ParallelBeam3D((4, 32, 32), TURN, (4, 20)), "detector sees lines up to 10"),
}  # fmt: skip


def zeros(A):
    return jnp.zeros(A.out_shape, jnp.float32)


@pytest.mark.parametrize("A", COMPLETE.values(), ids=COMPLETE)
def test_complete_scans_are_taken_without_a_word(A):
    assert A._lacks() == []
    assert np.all(A.fbp(zeros(A), strict=True) == 0)  # warnings are errors here


@pytest.mark.parametrize("A, words", INCOMPLETE.values(), ids=INCOMPLETE)
def test_missing_lines_are_named(A, words):
    with pytest.raises(ValueError, match=words) as error:
        A.fbp(zeros(A), strict=True)
    with pytest.warns(UserWarning, match=words) as caught:
        assert np.all(A.fbp(zeros(A)) == 0)  # weights are finite
    assert len(caught) == 1 and str(caught[0].message) == str(error.value)
    assert caught[0].filename == __file__


def test_other_errors_come_first():
    A = parallel(views(60, 120))
    with pytest.raises(ValueError, match="`filter`"):
        A.fbp(zeros(A), "sharp")
    with pytest.raises(ValueError, match=r"shape \(60, 66\)"):
        A.fbp(jnp.zeros((61, 66)))
    with pytest.raises(ValueError, match=r"shape \(22, 120, 40\)"):
        slices().fbp(jnp.zeros((21, 120, 40)))


# ------------------------------------------------------------------------------------------------------- the operator


SMALL = {"source_origin": 20.0, "detector_size": 1.2}
OPERATORS = {
    "displaced": lambda: FanBeam(8, views(9, 360), 10, detector_offset=3.0, **SMALL),
    "short": lambda: FanBeam(8, views(9, 240), 12, **SMALL),
    "cone, short": lambda: ConeBeam((2, 4, 4), views(6, 240), (3, 6), **SMALL),
    "slices, displaced": lambda: ParallelBeam3D((2, 4, 4), views(6, 360), (3, 5), detector_offset=1.5),
}


@pytest.mark.parametrize("make", quick(OPERATORS, {"cone, short"}))
def test_it_is_linear_transposed_mapped_and_compiled(make):
    A, rng = make(), np.random.default_rng(0)
    y = jnp.asarray(rng.standard_normal((2, *A.out_shape)))
    F = FBP(A, "hann")
    assert F == FBP(make(), "hann") and hash(F) == hash(FBP(make(), "hann")) and F != FBP(A)
    each = jnp.stack([A.fbp(v, "hann") for v in y])
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda v: A.fbp(v, "hann")))(y), each, atol=1e-12)
    np.testing.assert_allclose(F(2 * y[0] - y[1]), 2 * each[0] - each[1], atol=1e-12)
    x = jnp.asarray(rng.standard_normal(A.in_shape))
    np.testing.assert_allclose(jnp.vdot(F.T(x), y[0]), jnp.vdot(x, each[0]), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(lambda v: jnp.vdot(x, A.fbp(v, "hann")))(y[0]), F.T(x), atol=1e-12)
    assert A.fbp(y[0].astype(jnp.float32)).dtype == jnp.float32


SCANS = {
    "fan, short": fan(views(101, 230)),
    "parallel, displaced": parallel(views(91, 360), detector_offset=22.0),
    "cone, short": ConeBeam((2, 8, 8), views(31, 230), (3, 12), source_origin=40.0),
    "slices": ParallelBeam3D((2, 8, 8), views(20, 180), (3, 12)),
}


@pytest.mark.parametrize("A", quick(SCANS, {"fan, short"}))
def test_subsets_are_scans_of_their_own(A):
    """With a number or a traced index; the last row of a shorter subset counts for nothing."""
    m = 3
    y = jnp.asarray(np.random.default_rng(0).standard_normal(A.out_shape))
    found = jax.jit(jax.vmap(lambda i: A.subset(i, m).fbp(A.subset(i, m).restrict(y), strict=True)))(jnp.arange(m))
    for i in range(m):
        own = dataclasses.replace(A, angles=A.angles[i::m])
        expected = own.fbp(y[..., i::m, :])
        np.testing.assert_allclose(found[i], expected, atol=1e-10)
        S = A.subset(i, m)
        np.testing.assert_allclose(S.fbp(S.restrict(y)), expected, atol=1e-10)
        np.testing.assert_allclose(FBP(S)(S.restrict(y)), expected, atol=1e-10)
