"""Volumes of the Decathlon from small files made here, whole and damaged."""

import gzip
import json
import struct
import sys
import tracemalloc

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
    with pytest.raises(ValueError, match=r"a\.nii is damaged, truncated.* ends after 240 of 240000000 bytes"):
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


# --- what a header says


def single(folder, image):
    """The volume of the test split from a NIfTI image of nibabel, or from bytes."""
    content = image if isinstance(image, bytes) else image.to_bytes()
    (folder / "imagesTs/liver_9.nii.gz").write_bytes(gzip.compress(content))
    return decathlon(folder, "test")[0]


def plain(array=IMAGE, affine=RAS, **fields):
    image = nibabel.Nifti1Image(array, affine)
    for name, value in fields.items():
        image.header[name] = value
    return image


def raw(array=IMAGE, affine=RAS, **fields):
    """As bytes, for nibabel would correct the header."""
    image = nibabel.Nifti1Image(array, affine)
    head = image.header.copy()
    head["magic"], head["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        head[name] = value
    return head.binaryblock + bytes(4) + array.tobytes("F")


def test_a_volume_without_orientation_says_what_was_assumed(liver):
    content = raw(sform_code=0, qform_code=0)
    with pytest.warns(UserWarning, match=r"liver_9\.nii\.gz does not say how it lies.*right to the left"):
        volume = single(liver, content)
    np.testing.assert_array_equal(volume.image, radiological(IMAGE[::-1]))
    np.testing.assert_array_equal(  # which is what nibabel assumes
        volume.image, radiological(nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(content)).get_fdata())
    )
    assert volume.voxel_mm == pytest.approx((2.5, 0.7, 0.8))


@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (2, 4)])
def test_either_orientation_is_enough(liver, codes):
    image = nibabel.Nifti1Image(IMAGE, LAS)
    image.set_sform(LAS, codes[0])
    image.set_qform(LAS, codes[1])
    np.testing.assert_array_equal(single(liver, image).image, radiological(IMAGE[::-1]))


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_voxels_are_refused(liver, dtype):
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz has voxels of type complex\d+: convert"):
        single(liver, plain(IMAGE.astype(dtype)))


def test_colours_are_refused(liver):
    colours = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz has voxels of type"):
        single(liver, nibabel.Nifti1Image(colours, RAS))


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_all_real_types_in_both_byte_orders(liver, dtype, order):
    array = (np.abs(IMAGE) % 100).astype(dtype)
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    np.testing.assert_array_equal(
        single(liver, nibabel.Nifti1Image(array, RAS, header)).image, radiological(array.astype(np.float32))
    )


@pytest.mark.parametrize(
    "slope, intercept, expected",
    [
        (2.0, -1024.0, IMAGE * 2.0 - 1024),
        (0.0, 5.0, IMAGE),
        (np.nan, np.nan, IMAGE),
        (-0.5, 0.0, IMAGE * -0.5),
    ],
)
def test_slope_and_intercept_are_obeyed(liver, slope, intercept, expected):
    """A slope of 0 or NaN means that there is none."""
    volume = single(liver, raw(scl_slope=slope, scl_inter=intercept))
    np.testing.assert_allclose(volume.image, radiological(expected), rtol=1e-6)


def test_an_intercept_that_is_no_number_is_refused(liver):
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz is damaged.*intercept"):
        single(liver, raw(scl_slope=1.0, scl_inter=np.inf))


@pytest.mark.parametrize("unit, factor", [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1)])
def test_sizes_are_in_mm_whatever_the_unit_of_the_file(liver, unit, factor):
    """10 is mm and seconds."""
    affine = np.diag([*(RAS.diagonal()[:3] / factor), 1])
    assert single(liver, plain(affine=affine, xyzt_units=unit)).voxel_mm == pytest.approx((2.5, 0.7, 0.8))


@pytest.mark.parametrize("degrees", [20, -5])
def test_a_sheared_volume_is_refused(liver, degrees):
    affine = RAS.copy()
    affine[1, 2] = 2.5 * np.tan(np.radians(degrees))
    moved = 3 * abs(affine[1, 2])
    with pytest.raises(ValueError, match=rf"liver_9\.nii\.gz is sheared.* move by {moved:.3g} mm.* {abs(degrees)}\.0"):
        single(liver, plain(affine=affine))


def test_a_turned_volume_is_not_sheared(liver):
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    volume = single(liver, plain(affine=turn @ RAS))
    np.testing.assert_array_equal(volume.image, radiological(IMAGE))
    assert volume.voxel_mm == pytest.approx((2.5, 0.7, 0.8))


@pytest.mark.parametrize(
    "content, message",
    [
        (raw(srow_x=[np.nan] * 4, sform_code=1), "make no sense"),
        (raw(srow_x=[0] * 4, sform_code=1), "make no sense"),
        (raw(datatype=64), "announces 16 bits for voxels of type float64"),
        (raw(datatype=4097), "is damaged"),
        (raw(vox_offset=np.nan), "header of nan"),
        (raw() + bytes(2_000_000), "is longer than its shape"),
    ],
)
def test_headers_that_make_no_sense_are_named(liver, content, message):
    with pytest.raises(ValueError, match=rf"liver_9\.nii\.gz.*{message}"):
        single(liver, content)


def test_the_checksum_is_compared(liver):
    path = liver / "imagesTs/liver_9.nii.gz"
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"liver_9\.nii\.gz is damaged.*CRC"):
        decathlon(liver, "test")[0]


def test_no_memory_is_taken_for_voxels_that_are_not_there(liver):
    content = raw(datatype=64, bitpix=64)[:400]
    content = content[:40] + struct.pack("<8h", 3, 1000, 1000, 500, 1, 1, 1, 1) + content[56:]
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"ends after \d+ of 4000000000 bytes"):
        single(liver, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


def test_a_volume_is_in_memory_once_as_it_is_stored_and_once_as_it_is_returned(liver):
    array = np.zeros((200, 200, 100), np.int16)
    content = raw(array, scl_slope=2.0, scl_inter=1.0)
    tracemalloc.start()
    image = single(liver, content).image
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert image.flags.c_contiguous and peak < array.nbytes + 1.3 * image.nbytes + 2_000_000
