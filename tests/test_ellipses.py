"""Ellipses on a grid and their X-ray measurements: areas, chords and integrals that are known in closed form."""

import numpy as np
import pytest

from jbilevel.data import Ellipse, label_mask, line_integrals, parallel_sinogram, raster

rng = np.random.default_rng(0)
SOME = [
    Ellipse(*rng.uniform(-8, 8, 2), *rng.uniform(0.5, 6, 2), rng.uniform(0, np.pi), rng.uniform(-1, 2))
    for _ in range(6)
]
ANGLES = np.linspace(0, np.pi, 13)


def mass(ellipses):
    return sum(np.pi * e.a * e.b * e.value for e in ellipses)


# --- images


@pytest.mark.parametrize("pixel_size, shape", [(0.5, (80, 90)), (2.0, (31, 20)), (7.0, (7, 8))])
def test_sum_of_the_pixels_is_the_integral(pixel_size, shape):
    for e in SOME:
        total = raster([e], shape, pixel_size, supersample=64, dtype=np.float64).sum() * pixel_size**2
        assert total == pytest.approx(mass([e]), rel=2e-3, abs=0.002 * pixel_size**2)


def test_pixel_means_against_a_fine_grid():
    fine = raster(SOME, (40 * 8, 50 * 8), 0.5 / 8, supersample=1, dtype=np.float64)
    coarse = raster(SOME, (40, 50), 0.5, supersample=8, dtype=np.float64)
    np.testing.assert_allclose(coarse, fine.reshape(40, 8, 50, 8).mean(axis=(1, 3)), atol=1e-12)


def test_right_is_along_the_columns_and_up_against_the_rows():
    image = raster([Ellipse(2, 1, 0.4, 0.4)], (5, 7))
    assert np.argwhere(image).tolist() == [[1, 5]]
    long = raster([Ellipse(0, 0, 10, 1, np.pi / 4)], (31, 31))  # rises to the right: top right and bottom left
    assert long[10, 20] == 1 == long[20, 10] and long[10, 10] == 0 == long[20, 20]


def test_parts_outside_of_the_image_are_cut_off():
    image = raster([Ellipse(0, 0, 100, 100, value=2.0), Ellipse(50, 0, 1, 1), Ellipse(0, -50, 1, 1)], (4, 4))
    np.testing.assert_array_equal(image, np.full((4, 4), 2, np.float32))
    half = raster([Ellipse(2, 0, 1.5, 1.5)], (4, 4), supersample=32, dtype=np.float64)
    assert half.sum() == pytest.approx(np.pi * 1.5**2 / 2, rel=2e-3)


def test_needles_thinner_than_a_pixel_are_not_lost():
    e = Ellipse(0.2, 0.1, 8, 0.05, 0.3)
    assert raster([e], (20, 20), supersample=64).sum() == pytest.approx(mass([e]), rel=0.02)


def test_labels_are_those_of_the_last_ellipse_at_the_pixel_centre():
    outer, inner = Ellipse(0, 0, 9, 6, 0.5), Ellipse(2, 1, 2, 1.5, 1.0)
    mask = label_mask([outer, inner], [3, 200], (24, 24))
    assert mask.dtype == np.uint8
    expected = np.where(
        raster([inner], (24, 24), supersample=1) > 0, 200, 3 * (raster([outer], (24, 24), supersample=1) > 0)
    )
    np.testing.assert_array_equal(mask, expected)
    assert set(np.unique(mask)) == {0, 3, 200}


# --- sinograms


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_each_projection_holds_the_whole_mass(offset):
    for bins, tolerance in ((True, 1e-12), (False, 2e-3)):
        sinogram = parallel_sinogram(SOME, ANGLES, 500, 0.08, offset, bins=bins, dtype=np.float64)
        np.testing.assert_allclose(sinogram.sum(axis=1) * 0.08, mass(SOME), rtol=tolerance)


def test_chords_of_a_disc():
    x, y, radius = 1.5, -2.0, 3.0
    sinogram = parallel_sinogram([Ellipse(x, y, radius, radius, 0.3, 0.5)], ANGLES, 41, 0.25, 0.1, bins=False)
    assert sinogram.dtype == np.float32
    s = (np.arange(41) - 20) * 0.25 + 0.1
    t = s - (x * np.cos(ANGLES) + y * np.sin(ANGLES))[:, None]
    np.testing.assert_allclose(sinogram, np.sqrt(np.maximum(radius**2 - t**2, 0)), atol=1e-6)


def test_ellipse_seen_along_its_axes():
    e = Ellipse(0, 0, 5, 2, np.pi / 6)
    along, across = parallel_sinogram([e], [np.pi / 6 + np.pi / 2, np.pi / 6], 1, bins=False)[:, 0]
    assert along == pytest.approx(10) and across == pytest.approx(4)


def test_bins_are_means_of_lines():
    fine = parallel_sinogram(SOME, ANGLES, 20 * 1000, 1e-3, 0.3, bins=False, dtype=np.float64)
    coarse = parallel_sinogram(SOME, ANGLES, 20, 1.0, 0.3, dtype=np.float64)
    np.testing.assert_allclose(coarse, fine.reshape(len(ANGLES), 20, 1000).mean(axis=2), atol=1e-4)


def test_arbitrary_lines_agree_with_the_parallel_beam():
    s = (np.arange(60) - 29.5) * 0.4 - 0.6
    normal, along = (np.stack(v, -1) for v in ((np.cos(ANGLES), np.sin(ANGLES)), (-np.sin(ANGLES), np.cos(ANGLES))))
    points = s[:, None] * normal[:, None] + 7 * along[:, None]  # anywhere on the line
    integrals = line_integrals(SOME, points, -3 * along[:, None], dtype=np.float64)
    expected = parallel_sinogram(SOME, ANGLES, 60, 0.4, -0.6, bins=False, dtype=np.float64)
    np.testing.assert_allclose(integrals, expected, atol=1e-12)


def test_the_image_and_the_sinogram_are_of_the_same_object():
    # Moments tie the two conventions together: the mean of s is that of x cos + y sin.
    h, shape = 0.25, (160, 140)
    image = raster(SOME, shape, h, dtype=np.float64)
    x, y = (np.arange(140) - 69.5) * h, (79.5 - np.arange(160)) * h
    s = (np.arange(400) - 199.5) * 0.1
    sinogram = parallel_sinogram(SOME, ANGLES, 400, 0.1, dtype=np.float64)
    first = image.sum(0) @ x * np.cos(ANGLES) + image.sum(1) @ y * np.sin(ANGLES)
    np.testing.assert_allclose(sinogram @ s * 0.1, first * h**2, rtol=2e-3, atol=0.1)
    for angle, projection in ((0.0, image.sum(0)), (np.pi / 2, image.sum(1)[::-1])):  # s = x, and s = y
        exact = parallel_sinogram(SOME, [angle], len(projection), h, dtype=np.float64)[0]
        assert np.abs(h * projection - exact).max() < 0.02 * np.abs(exact).max()


# --- bad input


@pytest.mark.parametrize(
    "bad", [Ellipse(0, 0, 0, 1), Ellipse(0, 0, 1, -1), Ellipse(np.nan, 0, 1, 1), Ellipse(0, 0, 1, np.inf)]
)
def test_degenerate_ellipses_are_refused(bad):
    for use in (
        lambda: raster([bad], (4, 4)),
        lambda: label_mask([bad], [1], (4, 4)),
        lambda: parallel_sinogram([bad], [0.0], 4),
        lambda: line_integrals([bad], (0, 0), (1, 0)),
    ):
        with pytest.raises(ValueError, match="no ellipse"):
            use()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: raster(SOME, (4,)), "shape"),
        (lambda: raster(SOME, (4, 0)), "shape"),
        (lambda: raster(SOME, (4, 4), 0.0), "pixel_size"),
        (lambda: raster(SOME, (4, 4), supersample=0), "supersample"),
        (lambda: label_mask(SOME, [1], (4, 4)), "labels"),
        (lambda: label_mask(SOME, [256] * 6, (4, 4)), "labels"),
        (lambda: parallel_sinogram(SOME, 0.0, 4), "angles"),
        (lambda: parallel_sinogram(SOME, [np.nan], 4), "angles"),
        (lambda: parallel_sinogram(SOME, [0.0], 0), "n_detectors"),
        (lambda: parallel_sinogram(SOME, [0.0], 4, -1.0), "detector_size"),
        (lambda: line_integrals(SOME, (0, 0, 0), (1, 0)), "last axis"),
        (lambda: line_integrals(SOME, (0, 0), (0, 0)), "zero"),
        (lambda: line_integrals(SOME, (0, np.nan), (1, 0)), "finite"),
    ],
)
def test_wrong_geometries_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
