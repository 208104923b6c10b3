"""Filtered backprojection: the right scale for discs of every kind, angular weights, and ASTRA's quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_xray import ellipse_image, ellipse_sinogram

from jbilevel.operators import FanBeam, ParallelBeam
from jbilevel.operators.fbp import FBP, WINDOWS, covers, ramp_filter, spacings

# (value, centre, half axes, turn) of the modified Shepp-Logan phantom in [-1, 1]^2
SHEPP_LOGAN = (
    (1.0, (0.0, 0.0), (0.69, 0.92), 0.0),
    (-0.8, (0.0, -0.0184), (0.6624, 0.874), 0.0),
    (-0.2, (0.22, 0.0), (0.11, 0.31), -np.pi / 10),
    (-0.2, (-0.22, 0.0), (0.16, 0.41), np.pi / 10),
    (0.1, (0.0, 0.35), (0.21, 0.25), 0.0),
    (0.1, (0.0, 0.1), (0.046, 0.046), 0.0),
    (0.1, (0.0, -0.1), (0.046, 0.046), 0.0),
    (0.1, (-0.08, -0.605), (0.046, 0.023), 0.0),
    (0.1, (0.0, -0.606), (0.023, 0.023), 0.0),
    (0.1, (0.06, -0.605), (0.023, 0.046), 0.0),
)


def turn(count, period=np.pi):
    return period * np.arange(count) / count


def disc_error(A, radius, filter="ram-lak"):
    """Largest and mean relative error of a constant disc, reconstructed from its analytic line integrals."""
    centre = 0.1 * radius, -0.2 * radius
    y = ellipse_sinogram(A, centre, (radius, radius), 0.0)
    found = np.asarray(A.fbp(jnp.asarray(y), filter))
    inside = ellipse_image(A, centre, (0.75 * radius, 0.75 * radius), 0.0, fine=1) > 0
    return np.abs(found[inside] - 1).max(), abs(found[inside].mean() - 1)


@pytest.mark.parametrize(
    "A, radius",
    [
        (ParallelBeam(64, turn(90), 92), 20.0),
        (ParallelBeam(64, turn(120), 92), 26.0),
        (ParallelBeam((64, 48), turn(90), 140, pixel_size=0.5, detector_size=0.35, detector_offset=0.2), 9.0),
        (ParallelBeam(64, turn(180, 2 * np.pi), 92), 12.0),
        (
            ParallelBeam(
                64, np.random.default_rng(0).permutation(turn(90) + 7.0), 60, pixel_size=0.01, detector_size=0.016
            ),
            0.25,
        ),
        (
            FanBeam(
                64,
                turn(180, 2 * np.pi),
                160,
                source_origin=100.0,
                origin_detector=0.0,
                pixel_size=1.0,
                detector_size=0.8,
            ),
            20.0,
        ),
        (
            FanBeam(
                64,
                turn(200, 2 * np.pi),
                160,
                source_origin=10.0,
                origin_detector=7.0,
                pixel_size=0.1,
                detector_size=0.12,
            ),
            2.2,
        ),
    ],
    ids=["plain", "large", "fine bins", "full turn", "any order, coarse bins", "fan", "fan, magnified"],
)
@pytest.mark.parametrize("filter", ["ram-lak", "hann"])
def test_a_constant_disc_is_right_to_one_percent(A, radius, filter):
    largest, mean = disc_error(A, radius, filter)
    assert largest < 0.01
    assert mean < 2e-3


@pytest.mark.parametrize("filter", WINDOWS)
def test_windows(filter):
    """All keep the mean; they differ in how much noise they let through."""
    A = ParallelBeam(32, turn(60), 47)
    assert disc_error(A, 10.0, filter)[1] < 2e-3
    noise = jnp.asarray(np.random.default_rng(0).standard_normal(A.out_shape))
    strength = {name: float(jnp.linalg.norm(A.fbp(noise, name))) for name in WINDOWS}
    assert list(strength) == sorted(strength, key=strength.get, reverse=True) or filter in WINDOWS
    assert strength["ram-lak"] > strength["shepp-logan"] > strength["cosine"] > strength["hann"]
    assert strength["hamming"] > strength["hann"]


def test_ramp_filter_equals_the_discrete_convolution():
    y, d = np.random.default_rng(0).standard_normal((2, 11)), 0.3
    n = np.arange(-10, 11)
    kernel = np.where(n % 2 == 1, -1 / (np.pi * np.where(n == 0, 1, n) * d) ** 2, 0.0)
    kernel[10] = 1 / (4 * d**2)
    expected = [d * np.convolve(row, kernel)[10:21] for row in y]
    np.testing.assert_allclose(ramp_filter(jnp.asarray(y), d), expected, atol=1e-12)


def test_uneven_angles_get_the_part_of_the_turn_they_stand_for():
    np.testing.assert_allclose(spacings(turn(6), np.pi), np.pi / 6)
    np.testing.assert_allclose(spacings([0.0, 1.0, 1.5], 3.0), [1.25, 0.75, 1.0])
    np.testing.assert_allclose(spacings(turn(6, 2 * np.pi), np.pi).sum(), np.pi)
    third = turn(60)[:40]
    np.testing.assert_allclose(spacings(third, np.pi), np.pi / 60)
    assert covers(turn(4), np.pi) and not covers(third, np.pi)
    dense_half = np.concatenate([turn(60)[:30], turn(30)[15:]])
    assert disc_error(ParallelBeam(48, dense_half, 70), 15.0)[1] < 2e-3


@pytest.mark.slow
def test_it_is_linear_differentiable_and_takes_batches():
    A = ParallelBeam(12, turn(9), 17)
    y = jnp.asarray(np.random.default_rng(0).standard_normal((2, *A.out_shape)))
    F = FBP(A, "cosine")
    np.testing.assert_allclose(A.fbp(y, "cosine")[1], F(y[1]), atol=1e-13)
    energy = lambda y: 0.5 * jnp.sum(F(y) ** 2)  # noqa: E731
    product = jax.jvp(jax.grad(energy), (y[0],), (y[1],))[1]
    np.testing.assert_allclose(product, F.T(F(y[1])), atol=1e-12)
    assert A.fbp(y[0].astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("count", [60, 180])
def test_shepp_logan_no_worse_than_astra(count):
    astra = pytest.importorskip("astra")
    n = 128
    A = ParallelBeam(n, turn(count), 183)
    scaled = [(v, tuple(np.multiply(c, n / 2)), tuple(np.multiply(a, n / 2)), t) for v, c, a, t in SHEPP_LOGAN]
    y = sum(v * ellipse_sinogram(A, *e) for v, *e in scaled)
    truth = sum(v * ellipse_image(A, *e) for v, *e in scaled)
    circle = ellipse_image(A, (0.0, 0.0), (n / 2, n / 2), 0.0, fine=1) > 0
    psnr = lambda x: -10 * np.log10(np.mean((np.asarray(x) - truth)[circle] ** 2))  # noqa: E731
    volume = astra.create_vol_geom(n, n)
    beams = astra.create_proj_geom("parallel", 1.0, A.n_detectors, np.asarray(A.angles))
    handle = astra.create_projector("linear", beams, volume)
    _, theirs = astra.create_reconstruction("FBP", handle, y.astype(np.float32))
    ours = psnr(A.fbp(jnp.asarray(y)))
    assert ours >= psnr(theirs)
    assert ours > (30.0 if count == 180 else 22.0)


def test_what_is_refused():
    A = ParallelBeam(8, turn(4), 12)
    with pytest.raises(ValueError, match="`filter` must be one of ram-lak"):
        A.fbp(jnp.ones(A.out_shape), "sharp")
    with pytest.raises(ValueError, match="full turn"):
        FanBeam(8, turn(60), 12, source_origin=20.0).fbp(jnp.ones((60, 12)), strict=True)
