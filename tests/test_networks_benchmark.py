"""What the benchmarks of learned reconstruction share: lesions and their masks, splits by patient, bad files, means."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import jbilevel as jb

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import networks  # noqa: E402
from benchmarks.papers import kadagala_2025_joint  # noqa: E402

ARGS = SimpleNamespace(sizes=[8], views=5, photons=1e6, label=5)


def stored(tmp_path, **entries):
    path = tmp_path / "slices.npz"
    np.savez(path, **entries)
    return SimpleNamespace(**vars(ARGS), data=path)


def test_lesions_lie_in_the_liver_and_are_what_the_mask_says():
    images, masks, phantoms, pixel = networks.scans.lesions(6, 48, np.random.default_rng(0))
    liver, lesion = networks.scans.LIVER, networks.scans.LESION
    rng = np.random.default_rng(0)
    for image, mask, ellipses in zip(images, masks, phantoms, strict=True):
        drawn = jb.data.abdomen(rng, lesions=0)
        organs = jb.data.label_mask(drawn.ellipses, drawn.labels, (48, 48), pixel_size=pixel)
        drawn = networks.scans.with_lesions(drawn, rng)
        assert drawn.ellipses == ellipses and drawn.labels.count(lesion) in (1, 2)
        without = jb.data.raster(ellipses[: -drawn.labels.count(lesion)], (48, 48), pixel_size=pixel)
        assert mask.sum() >= 4 and np.all(organs[mask] == liver)
        difference = without - image  # their values add to the liver's
        assert np.all(difference[mask] > 0.03) and np.all(difference <= 0.16 + 1e-5)


def test_slices_with_masks_are_split_by_patient(tmp_path):
    rng = np.random.default_rng(0)
    label = np.zeros((12, 16, 16), np.uint8)
    label[:, 4:8, 4:8] = 5
    label[:, 8:12, 8:12] = 1  # another organ
    hu = np.where(label == 5, 100, 0).astype(np.int16) + np.arange(12, dtype=np.int16)[:, None, None]
    data = kadagala_2025_joint.labelled(stored(tmp_path, hu=hu, label=label, case=np.arange(12) // 2), rng)
    parts = data.train, data.validation, data.test
    assert sum(len(part["x"]) for part in parts) == 12
    cases = [{int(v) // 2 for v in np.round(1000 * (part["x"][:, 0, 0] - 1))} for part in parts]
    assert sum(map(len, cases)) == 6 and not (cases[0] & cases[1] or cases[0] & cases[2] or cases[1] & cases[2])
    expected = np.zeros((8, 8), bool)
    expected[2:4, 2:4] = True
    for part in parts:
        np.testing.assert_array_equal(part["labels"], np.broadcast_to(expected, part["labels"].shape))
        np.testing.assert_allclose(part["x"][:, 2, 2] - part["x"][:, 0, 0], 0.1, atol=1e-4)


def test_files_without_masks_and_odd_sizes_are_sentences(tmp_path):
    hu = np.zeros((4, 16, 16), np.int16)
    with pytest.raises(SystemExit, match="no masks"):
        kadagala_2025_joint.labelled(stored(tmp_path, hu=hu), np.random.default_rng(0))
    with pytest.raises(SystemExit, match="does not divide"):
        networks.scans.coarser(hu, 7)


@pytest.mark.slow
def test_scores_of_a_perfect_and_of_an_empty_segmentation():
    test = {"x": jnp.ones((2, 16, 16)), "labels": jnp.zeros((2, 16, 16), bool).at[:, 3:6, 3:6].set(True)}
    sign = jnp.where(test["labels"], 50.0, -50.0)
    right = kadagala_2025_joint.scores((test["x"], sign), test)
    assert right["dice"] == right["pooled_dice"] == 1 and right["task"] < 1e-6 and "psnr" not in right
    nothing = kadagala_2025_joint.scores((test["x"] + 0.02, -50 * jnp.ones_like(sign)), test)
    assert nothing["dice"] == nothing["pooled_dice"] == 0 and nothing["psnr"] == pytest.approx(40, abs=1e-3)


def test_rows_are_gathered_over_seeds_and_the_order_is_told():
    def row(name, seed, dice, weight=0.5, scaling="normalised"):
        case = {"data": "d", "row": name, "weight": weight, "scaling": scaling, "seed": seed}
        settings = {"sizes": [8], "views": 5, "photons": 1e6, "steps": 2, "batch": [1]}
        return {"case": case, "figures": {"dice": dice, "pooled_dice": dice, "task": 0.1}, "settings": settings}

    def page(joint):
        rows = [row("ceiling: T on clean images", s, 0.9, None, None) for s in (0, 1)]
        rows += [row("sequential", s, 0.6 + 0.1 * s, 1.0, "raw") for s in (0, 1)]
        return kadagala_2025_joint.render(rows + [row("joint", s, v) for s, v in enumerate(joint)])

    assert "0.650 ± 0.071" in page((0.7, 0.8))
    assert "0.100 ± 0.000 over sequential (above for 2 of 2 seeds)" in page((0.7, 0.8))
    assert "≥ sequential holds" in page((0.7, 0.8)) and "does NOT hold" in page((0.5, 0.6))
    assert "does NOT hold" in page((0.95, 0.96))  # above the ceiling
