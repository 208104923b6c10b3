"""Lazy readers in other processes: their samples can be pickled, and a worker that was spawned can read them."""

import gzip
import json
import multiprocessing
import operator
import pickle

import h5py
import nibabel
import numpy as np
import pytest
import scipy.io
from PIL import Image
from test_readers_dicom import ct
from test_readers_dicom import save as save_dicom

from jbilevel.data import bsds500, camvid, cityscapes, decathlon, dicom_series, lodopab, oxford_pets, stanford_dogs

rng = np.random.default_rng(0)
PHOTO = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def cells(entries):
    array = np.empty((1, len(entries)), object)
    array[0, :] = entries
    return array


def make_bsds500(root):
    for name in ("images/train", "groundTruth/train"):
        (root / name).mkdir(parents=True)
    picture(root / "images/train/1.jpg", PHOTO)
    drawn = cells([{"Boundaries": np.ones((6, 8), np.uint8)}])
    scipy.io.savemat(root / "groundTruth/train/1.mat", {"groundTruth": drawn})
    return bsds500(root, boundaries=True)


def make_camvid(root):
    picture(root / "train/a.png", PHOTO)
    picture(root / "trainannot/a.png", PHOTO[..., 0] % 12)
    return camvid(root)


def make_cityscapes(root):
    picture(root / "leftImg8bit/train/ulm/a_leftImg8bit.png", PHOTO)
    picture(root / "gtFine/train/ulm/a_gtFine_labelIds.png", PHOTO[..., 0] % 34)
    return cityscapes(root)


def make_oxford_pets(root):
    picture(root / "images/Bengal_1.jpg", PHOTO)
    picture(root / "annotations/trimaps/Bengal_1.png", 1 + PHOTO[..., 0] % 3)
    (root / "annotations/trainval.txt").write_text("Bengal_1 6 1 5\n")
    return oxford_pets(root)


def make_stanford_dogs(root):
    picture(root / "Images/n1-Pug/a.jpg", PHOTO)
    scipy.io.savemat(root / "train_list.mat", {"file_list": cells(["n1-Pug/a.jpg"]), "labels": 7})
    return stanford_dogs(root)


def make_decathlon(root):
    listed = {"labels": {"0": "air"}, "training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}
    (root / "dataset.json").write_text(json.dumps(listed))
    for name, array in (("a", rng.integers(0, 99, (3, 4, 5), dtype=np.int16)), ("b", np.zeros((3, 4, 5), np.uint8))):
        (root / f"{name}.nii.gz").write_bytes(gzip.compress(nibabel.Nifti1Image(array, np.eye(4)).to_bytes()))
    return decathlon(root)


def make_lodopab(root):
    for name in ("ground_truth", "observation"):
        with h5py.File(root / f"{name}_train_000.hdf5", "w") as file:
            file["data"] = rng.random((2, 4, 5), dtype=np.float32)
    (root / "patient_ids_rand_train.csv").write_text("7\n8\n")
    return lodopab(root)


def make_dicom(root):
    save_dicom(ct(), root / "a.dcm")
    return dicom_series(root)[0].slices


MAKERS = (
    make_bsds500,
    make_camvid,
    make_cityscapes,
    make_oxford_pets,
    make_stanford_dogs,
    make_decathlon,
    make_lodopab,
    make_dicom,
)


@pytest.fixture
def all_samples(tmp_path):
    found = []
    for make in MAKERS:
        (tmp_path / make.__name__).mkdir()
        found.append(make(tmp_path / make.__name__))
    return found


def assert_same(a, b):
    assert type(a) is type(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def test_samples_survive_pickling(all_samples):
    for samples in all_samples:
        copy = pickle.loads(pickle.dumps(samples))
        assert copy.keys == samples.keys and copy.classes == samples.classes
        assert_same(copy[0], samples[0])
        assert_same(copy[:1].select([0])[0], samples[0])


def test_a_series_survives_pickling(tmp_path):
    for k in range(3):
        save_dicom(ct(z=float(k)), tmp_path / f"{k}.dcm")
    (series,) = dicom_series(tmp_path)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(series)).volume(), series.volume())


def test_a_spawned_process_reads_samples(all_samples):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.map(operator.itemgetter(0), all_samples)
    for sample, samples in zip(found, all_samples, strict=True):
        assert_same(sample, samples[0])
