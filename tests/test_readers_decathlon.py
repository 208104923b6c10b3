"""Volumes of the Decathlon from small files made here, whole and damaged."""

import gzip
import json
import struct
import sys

import nibabel
import numpy as np
import pytest

from jbilevel.data import decathlon

rng = np.random.default_rng(0)
SHAPE = (5, 6, 4)  # x, y, z
IMAGE = rng.integers(-1000, 1000, SHAPE, dtype=np.int16)
LABELS = rng.integers(0, 3, SHAPE, dtype=np.uint8)
RAS = np.diag([0.8, 0.7, 2.5, 1.0])
LAS = np.diag([-0.8, 0.7, 2.5, 1.0])


@pytest.fixture
def liver(tmp_path):
    listed = {
        "labels": {"0": "background", "1": "liver", "2": "cancer"},
        "training": [
            {"image": f"./imagesTr/liver_{k}.nii.gz", "label": f"./labelsTr/liver_{k}.nii.gz"} for k in (7, 3)
        ],
        "test": ["./imagesTs/liver_9.nii.gz"],
    }
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dataset.json").write_text(json.dumps(listed))
    for name in ("imagesTr/liver_7", "imagesTr/liver_3", "imagesTs/liver_9"):
        nibabel.save(nibabel.Nifti1Image(IMAGE, RAS), tmp_path / f"{name}.nii.gz")
    for name in ("labelsTr/liver_7", "labelsTr/liver_3"):
        nibabel.save(nibabel.Nifti1Image(LABELS, RAS), tmp_path / f"{name}.nii.gz")
    return tmp_path


def radiological(array):
    """From x to the right, y to the front, z to the head: slices, front at the top, patient's right on the left."""
    return array.transpose(2, 1, 0)[:, ::-1, ::-1]


def test_decathlon(liver):
    samples = decathlon(liver)
    assert len(samples) == 2 and samples.classes == ("background", "liver", "cancer")
    volume = samples[0]
    np.testing.assert_array_equal(volume.image, radiological(IMAGE))
    np.testing.assert_array_equal(volume.labels, radiological(LABELS))
    assert volume.image.dtype == np.float32 and volume.labels.dtype == np.uint8
    assert volume.voxel_mm == pytest.approx((2.5, 0.7, 0.8)) and volume.name == "liver_7.nii.gz"
    (test,) = decathlon(liver, "test")
    assert test.labels is None and test.image.shape == (4, 6, 5)
    assert [v.name for v in decathlon(liver, limit=1)] == ["liver_7.nii.gz"]


def test_all_orientations_give_the_same_volume(liver):
    left = IMAGE[::-1]
    nibabel.save(nibabel.Nifti1Image(left, LAS), liver / "imagesTs/liver_9.nii.gz")
    np.testing.assert_array_equal(decathlon(liver, "test")[0].image, radiological(IMAGE))
    turned = np.array([[0, 0, 0.8, 0], [0.7, 0, 0, 0], [0, 2.5, 0, 0], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(IMAGE.transpose(1, 2, 0), turned), liver / "imagesTs/liver_9.nii.gz")
    volume = decathlon(liver, "test")[0]
    np.testing.assert_array_equal(volume.image, radiological(IMAGE))
    assert volume.voxel_mm == pytest.approx((2.5, 0.7, 0.8))


def test_slope_and_intercept_and_several_sequences(liver):
    image = nibabel.Nifti1Image(np.stack([IMAGE, IMAGE + 1], -1), RAS)
    image.header.set_slope_inter(2.0, -5.0)
    nibabel.save(image, liver / "imagesTs/liver_9.nii.gz")
    volume = decathlon(liver, "test")[0]
    stored = np.asarray(nibabel.load(liver / "imagesTs/liver_9.nii.gz").dataobj)
    assert volume.image.shape == (2, 4, 6, 5)
    np.testing.assert_allclose(volume.image[1], radiological(stored[..., 1]), atol=1e-3)
    np.testing.assert_allclose(volume.image[1], volume.image[0] + 1, atol=2.1)


def volume_bytes(shape=SHAPE, bits=16, offset=352.0, array=IMAGE):
    head = bytearray(nibabel.Nifti1Image(array, RAS).to_bytes()[:352])
    head[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))
    head[72:74] = struct.pack("<h", bits)
    head[108:112] = struct.pack("<f", offset)
    return bytes(head) + array.tobytes("F")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated, or no NIfTI-1"),
        (bytes(400), "no NIfTI-1"),
        (volume_bytes()[:200], "truncated"),
        (volume_bytes()[:-10], "damaged, truncated"),
        (volume_bytes(shape=(32767, 32767, 32767)), r"\(32767, 32767, 32767\), more than `max_voxels`"),
        (volume_bytes(shape=(5, 24)), "expected 3 or 4 axes"),
        (volume_bytes(shape=(5, 0, 4)), "expected 3 or 4 axes"),
        (volume_bytes(shape=(5, -6, 4)), "expected 3 or 4 axes"),
        (volume_bytes(bits=2048), "2048 bits"),
        (volume_bytes(offset=1e9), "header of 1000000000"),
    ],
)
def test_damaged_volumes_are_named(liver, content, message):
    (liver / "imagesTs/liver_9.nii.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"liver_9\.nii\.gz.*{message}"):
        decathlon(liver, "test")[0]


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.9])
def test_truncated_archives_are_named(liver, keep):
    path = liver / "imagesTs/liver_9.nii.gz"
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep in (0, 5) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz"):
        decathlon(liver, "test")[0]


def test_volumes_that_are_not_packed(liver):
    listed = json.loads((liver / "dataset.json").read_text())
    listed["test"] = ["imagesTs/a.nii"]
    (liver / "dataset.json").write_text(json.dumps(listed))
    (liver / "imagesTs/a.nii").write_bytes(volume_bytes())
    np.testing.assert_array_equal(decathlon(liver, "test")[0].image, radiological(IMAGE))
    (liver / "imagesTs/a.nii").write_bytes(volume_bytes(shape=(500, 600, 400)))
    with pytest.raises(ValueError, match=r"a\.nii is truncated.*\(500, 600, 400\)"):
        decathlon(liver, "test")[0]


def test_the_limit_of_voxels_is_the_users(liver):
    assert decathlon(liver, max_voxels=120)[0].image.size == 120
    with pytest.raises(ValueError, match="max_voxels"):
        decathlon(liver, max_voxels=119)[0]


@pytest.mark.parametrize(
    "labels, affine, message",
    [
        (LABELS[:4], RAS, r"liver_7\.nii\.gz has \(4, 6, 5\) pixels, but .*\(4, 6, 4\)"),
        (LABELS, LAS, "different places"),
        (LABELS, np.diag([0.8, 0.7, 3.0, 1.0]), "different places"),
        (LABELS + np.uint8(1), RAS, "labels other than those in dataset.json, 0 to 2"),
        (LABELS / np.float32(2), RAS, "labels other than"),
        (np.full(SHAPE, np.nan, np.float32), RAS, "labels other than"),
    ],
)
def test_labels_that_do_not_fit_are_named(liver, labels, affine, message):
    nibabel.save(nibabel.Nifti1Image(labels, affine), liver / "labelsTr/liver_7.nii.gz")
    with pytest.raises(ValueError, match=rf"(?=.*labelsTr).*{message}"):
        decathlon(liver)[0]


def test_images_that_are_not_finite_are_named(liver):
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, np.inf, np.float32), RAS), liver / "imagesTs/liver_9.nii.gz")
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz has voxels that are NaN or infinite"):
        decathlon(liver, "test")[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "{}",
        '{"labels": {"0": "a"}, "training": []}',
        '{"labels": {"0": "a"}, "training": ["x"]}',
        '{"labels": {"background": 0}, "training": [{"image": "a", "label": "b"}]}',
        '{"labels": {"0": "a", "2": "b"}, "training": [{"image": "a", "label": "b"}]}',
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_damaged_lists_are_named(liver, text):
    (liver / "dataset.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"dataset\.json is no dataset\.json of the Decathlon"):
        decathlon(liver)


def test_lists_cannot_name_volumes_elsewhere(liver):
    listed = {"labels": {"0": "a"}, "training": [{"image": "../x.nii.gz", "label": "./y.nii.gz"}]}
    (liver / "dataset.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match=r"dataset\.json names the file '\.\./x\.nii\.gz', which is not below"):
        decathlon(liver)


def test_folders_and_arguments_of_decathlon(liver, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"dataset\.json is missing: `root` must be a folder with\n"):
        decathlon(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="`split` is 'train': choose one of 'training', 'test'"):
        decathlon(liver, "train")
    with pytest.raises(ValueError, match="limit"):
        decathlon(liver, limit=0)
    (liver / "labelsTr/liver_7.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"liver_7\.nii\.gz is missing, but dataset\.json names it"):
        decathlon(liver)[0]


def test_without_nibabel_the_extra_is_named(liver, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ImportError, match=r"nibabel.*jbilevel\[medical\]"):
        decathlon(liver)
