"""PSNR and SSIM against scikit-image and against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jbilevel.metrics import mean_psnr, psnr, psnr_of_mean_mse, ssim

KINDS = ["smooth", "noise", "flat", "unrelated"]


def pair(shape, kind, seed=0):
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.linspace(0, 3, shape[0]), np.linspace(0, 5, shape[1]), indexing="ij")
    smooth = (0.5 + 0.4 * np.sin(rows) * np.cos(2 * columns)).reshape(shape[:2] + (1,) * (len(shape) - 2))
    reference = np.broadcast_to(smooth, shape) * (1 + 0.1 * rng.random(shape[2:]))
    if kind == "flat":
        reference = np.full(shape, 0.7)
    if kind == "unrelated":
        return rng.random(shape), rng.random(shape)
    return reference + (0.01 if kind == "smooth" else 0.1) * rng.standard_normal(shape), np.array(reference)


def skimage_ssim(x, reference, data_range, channel_axis=None):
    return structural_similarity(
        x.astype(np.float64),
        reference.astype(np.float64),
        data_range=data_range,
        channel_axis=channel_axis,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(11, 11), (11, 40), (32, 32), (37, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ssim_equals_scikit_image_on_grey_images(shape, kind, dtype):
    x, reference = (v.astype(dtype) for v in pair(shape, kind))
    assert float(ssim(x, reference)) == pytest.approx(skimage_ssim(x, reference, 1.0), abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_ssim_equals_scikit_image_on_colour_images(channels):
    x, reference = (np.moveaxis(v, -1, 0) for v in pair((20, 31, channels), "noise"))
    assert float(ssim(x, reference, channels=channels)) == pytest.approx(skimage_ssim(x, reference, 1.0, 0), abs=1e-6)


@pytest.mark.parametrize("data_range", [0.3, 2.0, 255.0])
def test_ssim_scales_with_the_data_range(data_range):
    x, reference = pair((24, 24), "noise")
    expected = skimage_ssim(x, reference, data_range)
    assert float(ssim(x, reference, data_range)) == pytest.approx(expected, abs=1e-6)
    scaled = ssim(x / data_range, reference / data_range, 1.0)
    assert float(scaled) == pytest.approx(expected, abs=1e-6)


def test_ssim_takes_integer_images_without_wrapping():
    rng = np.random.default_rng(1)
    x, reference = (rng.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(2))
    assert float(ssim(x, reference, 255.0)) == pytest.approx(skimage_ssim(x, reference, 255.0), abs=1e-6)


def test_ssim_of_equal_images_is_one_with_zero_gradient():
    for _, reference in (pair((16, 18), kind) for kind in KINDS):
        value, slope = jax.value_and_grad(ssim)(jnp.asarray(reference), jnp.asarray(reference))
        assert float(value) == pytest.approx(1.0, abs=1e-6)
        assert np.all(np.isfinite(slope)) and np.max(np.abs(slope)) < 1e-4


def test_ssim_of_equal_black_images_has_a_finite_gradient():
    black = jnp.zeros((12, 12))
    assert float(ssim(black, black)) == 1.0
    assert np.all(np.isfinite(jax.grad(ssim)(black, black)))


@pytest.mark.slow
def test_gradients_agree_with_finite_differences():
    x, reference = pair((14, 15), "noise")
    direction = np.random.default_rng(2).standard_normal(x.shape)
    for metric in (psnr, ssim):
        slope = float(jnp.sum(jax.grad(metric)(jnp.asarray(x), jnp.asarray(reference)) * direction))
        h = 1e-6 if jax.config.jax_enable_x64 else 1e-3
        difference = float(metric(x + h * direction, reference) - metric(x - h * direction, reference)) / (2 * h)
        assert slope == pytest.approx(difference, rel=2e-2 if h > 1e-6 else 1e-6)


def test_ssim_under_jit_and_vmap():
    xs, references = (np.stack(v) for v in zip(*(pair((16, 16), "noise", seed) for seed in range(3)), strict=True))
    together = jax.jit(jax.vmap(ssim))(xs, references)
    single = [skimage_ssim(x, r, 1.0) for x, r in zip(xs, references, strict=True)]
    np.testing.assert_allclose(together, single, atol=1e-6)


@pytest.mark.parametrize("data_range", [1.0, 0.5, 255.0])
@pytest.mark.parametrize("shape", [(5,), (8, 9), (8, 9, 3)])
def test_psnr_equals_scikit_image(shape, data_range):
    rng = np.random.default_rng(3)
    x, reference = rng.random(shape), rng.random(shape)
    expected = peak_signal_noise_ratio(reference, x, data_range=data_range)
    assert float(psnr(x, reference, data_range)) == pytest.approx(expected, rel=1e-5)
    assert float(jax.jit(psnr)(x, reference, data_range)) == pytest.approx(expected, rel=1e-5)


def test_psnr_of_integers_does_not_wrap():
    x, reference = np.array([[0, 255]], np.uint8), np.array([[255, 0]], np.uint8)
    assert float(psnr(x, reference, 255.0)) == pytest.approx(0.0, abs=1e-5)


def test_psnr_of_half_precision_is_computed_in_single():
    x = jnp.full((4, 4), 1e-4, jnp.float16)
    assert psnr(x, jnp.zeros_like(x)).dtype == jnp.float32
    assert float(psnr(x, jnp.zeros_like(x))) == pytest.approx(80.0, abs=0.01)


def test_psnr_of_equal_images_is_infinite():
    assert float(psnr(np.ones((3, 3)), np.ones((3, 3)))) == np.inf


def test_the_two_means_over_a_batch():
    rng = np.random.default_rng(4)
    references = rng.random((4, 6, 7))
    xs = references + np.array([0.01, 0.03, 0.1, 0.3]).reshape(4, 1, 1) * rng.standard_normal(references.shape)
    single = [peak_signal_noise_ratio(r, x, data_range=1.0) for x, r in zip(xs, references, strict=True)]
    of_mean = 10 * np.log10(1 / np.mean((xs - references) ** 2))
    assert float(mean_psnr(xs, references)) == pytest.approx(np.mean(single), rel=1e-5)
    assert float(psnr_of_mean_mse(xs, references)) == pytest.approx(of_mean, rel=1e-5)
    assert of_mean < np.mean(single) - 1


def test_mean_psnr_takes_one_data_range_per_image():
    rng = np.random.default_rng(5)
    xs, references = rng.random((3, 6, 7)), rng.random((3, 6, 7))
    ranges = np.array([0.5, 1.0, 2.0])
    single = [peak_signal_noise_ratio(r, x, data_range=d) for x, r, d in zip(xs, references, ranges, strict=True)]
    assert float(jax.jit(mean_psnr)(xs, references, ranges)) == pytest.approx(np.mean(single), rel=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim, mean_psnr, psnr_of_mean_mse])
def test_different_shapes_are_refused(metric):
    with pytest.raises(ValueError, match=r"\(12, 12\).*\(12, 1\)"):
        metric(np.ones((12, 12)), np.ones((12, 1)))


@pytest.mark.parametrize("metric", [psnr, ssim, mean_psnr, psnr_of_mean_mse])
@pytest.mark.parametrize("data_range", [0.0, -1.0, np.nan])
def test_data_ranges_that_are_not_positive_are_refused(metric, data_range):
    with pytest.raises(ValueError, match="data_range"):
        metric(np.ones((12, 12)), np.zeros((12, 12)), data_range)


@pytest.mark.parametrize("metric", [psnr, ssim, psnr_of_mean_mse])
def test_several_data_ranges_for_one_number_are_refused(metric):
    with pytest.raises(ValueError, match="data_range"):
        metric(np.ones((12, 12)), np.zeros((12, 12)), np.ones(12))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_complex_and_empty_images_are_refused(metric):
    with pytest.raises(TypeError, match="real"):
        metric(np.ones((12, 12)) * 1j, np.ones((12, 12)))
    with pytest.raises(ValueError, match="nothing"):
        metric(np.ones((0, 12)), np.ones((0, 12)))


@pytest.mark.parametrize("shape", [(10, 30), (30, 10)])
def test_images_smaller_than_the_window_are_refused(shape):
    with pytest.raises(ValueError, match="window of 11"):
        ssim(np.ones(shape), np.ones(shape))


@pytest.mark.parametrize("shape, channels", [((3, 12, 12), None), ((12,), None), ((12, 12), 3), ((12, 12, 3), 3)])
def test_shapes_that_do_not_fit_the_channels_are_refused(shape, channels):
    with pytest.raises(ValueError, match="`channels`"):
        ssim(np.ones(shape), np.ones(shape), channels=channels)
