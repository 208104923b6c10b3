"""Phantoms: tables against other sources, and that image, mask and sinogram are of the same object."""

import numpy as np
import pytest

from jbilevel.data import ABDOMEN_LABELS, abdomen, label_mask, parallel_sinogram, random_ellipses, raster, shepp_logan


def rng(seed=0):
    return np.random.default_rng(seed)


def image_and_mask(phantom, shape=(130, 180), pixel_size=2.0, supersample=8):
    image = raster(phantom.ellipses, shape, pixel_size, supersample=supersample, dtype=np.float64)
    return image, label_mask(phantom.ellipses, phantom.labels, shape, pixel_size)


# --- Shepp-Logan


def test_shepp_logan_is_the_picture_that_scikit_image_ships():
    from skimage.data import shepp_logan_phantom

    shipped = shepp_logan_phantom()  # 400 x 400, drawn by others
    ours = raster(shepp_logan(200), (400, 400))
    assert np.mean(np.abs(ours - shipped)) < 0.005
    assert np.mean(np.abs(ours[:, ::-1] - shipped)) > 0.01  # and not its mirror image
    assert np.mean(np.abs(ours[::-1] - shipped)) > 0.01


def test_original_contrast_is_low():
    image = raster(shepp_logan(100, contrast="original"), (200, 200), supersample=1)
    assert set(np.unique(image.round(4))) == {np.float32(v) for v in (0, 1, 1.01, 1.02, 1.03, 1.04, 2)}


def test_shepp_logan_fills_the_square_it_is_asked_to_fill():
    small, large = raster(shepp_logan(1.0), (50, 50), 2 / 50), raster(shepp_logan(30.0), (50, 50), 60 / 50)
    np.testing.assert_allclose(small, large, atol=1e-6)
    rows, columns = np.nonzero(small)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (2, 47, 7, 42)


# --- random ellipses


def test_random_ellipses_stay_in_their_disc_and_range():
    ellipses = random_ellipses(rng(), 500, 32.0, values=(0.2, 0.7))
    assert len(ellipses) == 500
    sinogram = parallel_sinogram(ellipses, np.linspace(0, np.pi, 20), 202, 0.5)
    bins = (np.arange(202) - 100.5) * 0.5
    assert np.all(sinogram[:, np.abs(bins) > 32.5] == 0) and np.all(sinogram[:, np.abs(bins) < 20] > 0)
    values = np.array([e.value for e in ellipses])
    assert 0.2 <= values.min() < 0.21 and 0.69 < values.max() <= 0.7


def test_random_ellipses_repeat_with_the_seed_and_differ_otherwise():
    assert random_ellipses(rng(1), 5) == random_ellipses(rng(1), 5) != random_ellipses(rng(2), 5)
    assert random_ellipses(rng(), 0) == []


# --- abdomens


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_is_that_of_the_image(seed):
    phantom = abdomen(rng(seed), lesions=3)
    image, mask = image_and_mask(phantom)
    assert set(np.unique(mask)) == set(range(len(ABDOMEN_LABELS)))
    of_label = {0: {0.0}}
    for label, density in zip(phantom.labels, phantom.densities, strict=True):
        of_label.setdefault(label, set()).add(density)
    windows = np.lib.stride_tricks.sliding_window_view(mask, (3, 3))
    inner = np.pad(np.all(windows == windows[..., 1:2, 1:2], axis=(2, 3)), 1)  # no border within the pixel
    checked = set()
    for label, densities in of_label.items():
        pixels = image[inner & (mask == label)]
        if pixels.size:
            error = np.min(np.abs(pixels[:, None] - np.array(sorted(densities))), axis=1)
            # a border between organs of one label, or a sliver thinner than a pixel, may run through a few
            assert np.mean(error > 1e-9) <= 0.02
            checked.add(label)
    assert len(checked) >= 12


@pytest.mark.parametrize("seed", range(40))
def test_organs_do_not_overlap(seed):
    phantom = abdomen(rng(seed), lesions=4)
    points = raster(phantom.ellipses, (200, 280), 1.3, supersample=1, dtype=np.float64).ravel()  # values at the centres
    allowed = np.array([0.0, *phantom.densities])
    assert np.min(np.abs(points[:, None] - allowed), axis=1).max() < 1e-9  # an overlap would add up to another value


def test_units_and_orientation_of_the_abdomen():
    phantom = abdomen(rng(3), width=300.0, variation=0.0, lesions=0)
    image, mask = image_and_mask(phantom)
    x, y = (np.arange(180) - 89.5) * 2, (64.5 - np.arange(130)) * 2
    body = mask > 0
    assert np.ptp(x[body.any(axis=0)]) == pytest.approx(300, abs=4)
    centre = {
        name: (x @ (mask == k).sum(0), y @ (mask == k).sum(1)) / np.sum(mask == k)
        for k, name in enumerate(ABDOMEN_LABELS)
        if name not in ("air", "lesion")
    }
    assert centre["liver"][0] < -40 and centre["spleen"][0] > 40  # the patient's right is on the left of the image
    assert centre["vertebra"][1] < -20 and centre["stomach"][1] > 20  # the front is at the top
    assert centre["gas"][1] > centre["bowel"][1]
    assert 1.2 < image[mask == ABDOMEN_LABELS.index("vertebra")].mean() < 1.45
    assert 1.04 < image[mask == ABDOMEN_LABELS.index("liver")].mean() < 1.12
    assert image.min() >= 0 and 0.9 < image[body].mean() < 1.1


def test_the_abdomen_absorbs_like_a_body():
    # Density 1 over 300 mm at mu = 0.02/mm: the longest path loses about exp(-6).
    phantom = abdomen(rng(), width=300.0)
    sinogram = parallel_sinogram(phantom.ellipses, np.linspace(0, np.pi, 90), 400, 1.0)
    assert 250 < sinogram.max() < 320 and sinogram.min() >= 0
    image, _ = image_and_mask(phantom, supersample=16)
    np.testing.assert_allclose(sinogram.sum(axis=1), image.sum() * 4, rtol=1e-3)


def test_lesions_lie_in_organs_and_differ_from_them():
    seen = 0
    for seed in range(10):
        phantom = abdomen(rng(seed), lesions=5)
        lesions = [e for e, k in zip(phantom.ellipses, phantom.labels, strict=True) if ABDOMEN_LABELS[k] == "lesion"]
        organs = [
            (e, k) for e, k in zip(phantom.ellipses, phantom.labels, strict=True) if ABDOMEN_LABELS[k] != "lesion"
        ]
        assert len(lesions) == 5
        for lesion in lesions:
            assert 0.02 <= abs(lesion.value) <= 0.06
            at = [k for e, k in organs if raster([e._replace(x=e.x - lesion.x, y=e.y - lesion.y)], (1, 1), 1e-6)[0, 0]]
            assert ABDOMEN_LABELS[at[-1]] in ("liver", "spleen", "kidney")
            seen += 1
    assert seen == 50


def test_the_lobes_of_the_liver_are_one_organ():
    for seed in range(5):
        phantom = abdomen(rng(seed), lesions=0)
        liver = {d for d, k in zip(phantom.densities, phantom.labels, strict=True) if ABDOMEN_LABELS[k] == "liver"}
        assert len(liver) == 1


def test_abdomens_repeat_with_the_seed_and_vary_otherwise():
    assert abdomen(rng(1)) == abdomen(rng(1)) != abdomen(rng(2))
    centres = np.array([[e[:2] for e in abdomen(rng(k), lesions=0).ellipses] for k in range(10)])
    assert np.all(centres.std(axis=0)[1:].max(axis=1) > 0.5)
    still = np.array([[e[:5] for e in abdomen(rng(k), lesions=0, variation=0.0).ellipses] for k in range(3)])
    assert np.all(still == still[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: shepp_logan(contrast="high"), "contrast.*original"),
        (lambda: shepp_logan(0.0), "radius"),
        (lambda: random_ellipses(rng(), -1), "`n`"),
        (lambda: random_ellipses(rng(), 3, -1.0), "radius"),
        (lambda: random_ellipses(rng(), 3, values=(1.0, 0.0)), "values"),
        (lambda: random_ellipses(rng(), 3, values=(0.0, np.nan)), "values"),
        (lambda: abdomen(rng(), 0.0), "width"),
        (lambda: abdomen(rng(), lesions=-1), "lesions"),
        (lambda: abdomen(rng(), variation=1.5), "variation"),
        (lambda: abdomen(rng(), variation=np.nan), "variation"),
    ],
)
def test_impossible_phantoms_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
