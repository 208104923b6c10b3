"""Photon counts against the Poisson law, and the units in which they are right. (Gaussian noise: test_data.py.)"""

import numpy as np
import pytest

from jbilevel.data import (
    MU_WATER,
    attenuation_to_hu,
    density_to_hu,
    hu_to_attenuation,
    hu_to_density,
    poisson_transmission,
)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("thickness, mean", [(0, 70000), (100, 9473), (200, 1282), (300, 174), (400, 24)])
def test_counts_behind_water(thickness, mean):
    sinogram = np.full((200, 200), float(thickness))
    _, counts = poisson_transmission(rng(), sinogram, 7e4, return_counts=True)
    assert counts.dtype == np.int64
    expected = 7e4 * np.exp(-0.02 * thickness)
    assert expected == pytest.approx(mean, abs=0.6)  # the table is rounded
    assert counts.mean() == pytest.approx(expected, abs=5 * np.sqrt(expected / counts.size))
    assert counts.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / counts.size) + 1 / expected / 50)


def test_noise_of_the_line_integrals_is_that_of_the_logarithm():
    noisy = poisson_transmission(rng(), np.full(40000, 200.0), 7e4)
    assert noisy.mean() == pytest.approx(200, abs=0.1)
    assert 0.02 * noisy.std() == pytest.approx(1 / np.sqrt(1282), rel=0.03)


def test_counts_and_line_integrals_belong_together():
    sinogram = rng(1).uniform(0, 300, (5, 7)).astype(np.float32)
    noisy, counts = poisson_transmission(rng(), sinogram, 1e4, return_counts=True)
    assert noisy.dtype == np.float32 and noisy.shape == counts.shape == (5, 7)
    np.testing.assert_allclose(noisy, -np.log(counts / 1e4) / 0.02, rtol=1e-6)
    np.testing.assert_array_equal(noisy, poisson_transmission(rng(), sinogram, 1e4))


def test_other_units_are_the_same_experiment():
    mm = rng(1).uniform(0, 300, (5, 7))
    noisy = poisson_transmission(rng(), mm, 1e4)
    np.testing.assert_allclose(poisson_transmission(rng(), 0.02 * mm, 1e4, mu=1), 0.02 * noisy, rtol=1e-12)


@pytest.mark.parametrize("min_count", [0.1, 0.5, 1.0])
def test_opaque_rays_stay_finite(min_count):
    noisy, counts = poisson_transmission(rng(), np.full((3, 4), 5000.0), 1e3, min_count=min_count, return_counts=True)
    assert np.all(counts == 0)
    np.testing.assert_allclose(noisy, np.log(1e3 / min_count) / 0.02)


def test_one_intensity_per_angle():
    photons = np.array([[1e2], [1e6]])
    _, counts = poisson_transmission(rng(), np.zeros((2, 1000)), photons, return_counts=True)
    np.testing.assert_allclose(counts.mean(axis=1), photons[:, 0], rtol=0.01)


def test_rounding_below_zero_is_forgiven():
    sinogram = np.array([100.0, -1e-5])
    np.testing.assert_array_equal(
        poisson_transmission(rng(), sinogram, 1e4), poisson_transmission(rng(), np.array([100.0, 0.0]), 1e4)
    )


@pytest.mark.parametrize(
    "sinogram, options, message",
    [
        ([1.0, -0.1], {}, "negative line integrals, down to -0.1"),
        ([100.0, -1e-3], {}, "negative"),
        ([-1e-9], {}, "negative"),
        ([1.0, np.nan], {}, "NaN"),
        ([1.0, np.inf], {}, "infinite"),
        ([1.0], {"photons": 0}, "photons"),
        ([1.0], {"photons": -1e4}, "photons"),
        ([1.0], {"photons": np.nan}, "photons"),
        ([1.0], {"photons": 1e19}, "1e18"),
        ([[1.0], [1.0]], {"photons": np.ones(2)}, r"photons.*\(2,\).*sinogram.*\(2, 1\)"),
        ([1.0], {"mu": 0}, "mu"),
        ([1.0], {"mu": np.nan}, "mu"),
        ([1.0], {"min_count": 0}, "min_count"),
        ([1.0], {"min_count": 2}, "min_count"),
    ],
)
def test_impossible_measurements_are_refused(sinogram, options, message):
    with pytest.raises(ValueError, match=message):
        poisson_transmission(rng(), np.array(sinogram), **{"photons": 1e4, **options})


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="default_rng"):
        poisson_transmission(0, np.ones(3), 1e4)
    with pytest.raises(TypeError, match="int64"):
        poisson_transmission(rng(), np.ones(3, np.int64), 1e4)


def test_hounsfield_units():
    hu = np.array([-1024, -1000, -100, 0, 60, 1000], np.int16)
    density = hu_to_density(hu)
    assert density.dtype == np.float32
    np.testing.assert_allclose(density, [0, 0, 0.9, 1, 1.06, 2], rtol=1e-6)
    np.testing.assert_allclose(hu_to_attenuation(hu), MU_WATER * density, rtol=1e-6)
    np.testing.assert_allclose(hu_to_attenuation(hu, 0.019), 0.019 * density, rtol=1e-6)
    np.testing.assert_allclose(density_to_hu(density)[1:], hu[1:], atol=1e-3)
    np.testing.assert_allclose(attenuation_to_hu(hu_to_attenuation(hu, 0.019), 0.019)[1:], hu[1:], atol=1e-3)
    assert hu_to_density(np.zeros(2, np.float64)).dtype == np.float64


@pytest.mark.parametrize("convert", [hu_to_attenuation, attenuation_to_hu])
@pytest.mark.parametrize("mu", [0, -0.02, np.nan, np.inf])
def test_water_attenuates(convert, mu):
    with pytest.raises(ValueError, match="mu_water"):
        convert(0.0, mu)
