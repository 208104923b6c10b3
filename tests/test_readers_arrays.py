"""MNIST, CIFAR-10 and LoDoPaB-CT from small files made here, whole and damaged."""

import gzip
import os
import resource
import struct
import sys
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

from jbilevel.data import cifar10, lodopab, mnist
from jbilevel.data.idx_digits import read_idx

rng = np.random.default_rng(0)


# --- MNIST

DIGITS = rng.integers(0, 256, (12, 28, 28), dtype=np.uint8)
LABELS = np.arange(12, dtype=np.uint8) % 10


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def digits(tmp_path):
    for name, count in (("train", 12), ("t10k", 5)):
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(DIGITS[:count]))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(LABELS[:count]))
    return tmp_path


def pack(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


@pytest.mark.parametrize("packed", [False, True])
def test_mnist(digits, packed):
    if packed:
        for path in list(digits.iterdir()):
            pack(path)
    train, test, some = mnist(digits), mnist(str(digits), "test"), mnist(digits, limit=3)
    np.testing.assert_array_equal(train.images, DIGITS / np.float32(255))
    np.testing.assert_array_equal(train.labels, LABELS)
    assert train.images.dtype == np.float32 and train.labels.dtype == np.int32 and len(train.classes) == 10
    assert len(test.images) == len(test.labels) == 5
    np.testing.assert_array_equal(some.images, train.images[:3])
    np.testing.assert_array_equal(some.labels, train.labels[:3])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keep", [0, 3, 10, 100, -1])
def test_truncated_digits_are_named(digits, packed, keep):
    path = digits / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    if packed:
        pack(path)
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.* (another file|ends after)"):
        mnist(digits)


def test_a_truncated_archive_is_named(digits):
    path = digits / "train-images-idx3-ubyte"
    pack(path)
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(packed.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged, truncated"):
        mnist(digits)


def test_a_file_that_only_claims_to_be_packed_is_named(digits):
    path = digits / "train-images-idx3-ubyte"
    path.rename(path.with_name(path.name + ".gz"))
    with pytest.raises(ValueError, match=r"ubyte\.gz is damaged"):
        mnist(digits)


@pytest.mark.parametrize(
    "content, message",
    [
        (idx(DIGITS) + b"x", "longer"),
        (idx(DIGITS[0]), "another file"),  # two axes
        (b"\0\0\x0d" + idx(DIGITS)[3:], "another file"),  # floats
        (b"\x89PNG" + bytes(100), "another file"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**16, 2**16), "max_bytes"),
        (bytes([0, 0, 8, 3]) + struct.pack(">3I", 12, 0, 28), "empty"),
        (idx(DIGITS[:11]), "has 11 images, but .*labels-idx1-ubyte has 12 labels"),
    ],
)
def test_other_idx_files_are_refused(digits, content, message):
    (digits / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.*{message}"):
        mnist(digits)


def test_an_archive_is_not_unpacked_further_than_announced(digits):
    path = digits / "train-images-idx3-ubyte"
    path.unlink()
    with gzip.open(digits / "train-images-idx3-ubyte.gz", "wb") as stream:
        stream.write(idx(DIGITS))
        for _ in range(64):
            stream.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="longer"):
        mnist(digits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000  # of 64 MB


def test_no_memory_is_taken_for_digits_that_are_not_there(digits):
    (digits / "train-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", 200_000, 28, 28))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is damaged.* ends after 0 of 156800000 bytes"):
        mnist(digits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


def test_a_pipe_in_place_of_a_file_is_not_waited_for(digits, tmp_path):
    path = digits / "train-labels-idx1-ubyte"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte is missing"):
        mnist(digits)
    with pytest.raises(ValueError, match="train-labels-idx1-ubyte is no idx file .*, but a folder or a device"):
        read_idx(path, 1)


def test_labels_that_are_no_digits_are_refused(digits):
    (digits / "train-labels-idx1-ubyte").write_bytes(idx(LABELS + 5))
    with pytest.raises(ValueError, match="labels-idx1-ubyte has the label 14"):
        mnist(digits)


# --- CIFAR-10

PHOTOS = rng.integers(0, 256, (5, 6, 3, 32, 32), dtype=np.uint8)
KINDS = rng.integers(0, 10, (5, 6), dtype=np.uint8)


def records(images, labels):
    return np.concatenate([labels[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


@pytest.fixture
def cifar(tmp_path):
    for k in range(5):
        (tmp_path / f"data_batch_{k + 1}.bin").write_bytes(records(PHOTOS[k], KINDS[k]))
    (tmp_path / "test_batch.bin").write_bytes(records(PHOTOS[0][::-1], KINDS[0][::-1]))
    return tmp_path


def test_cifar10(cifar):
    train, test, some = cifar10(cifar), cifar10(cifar, "test"), cifar10(cifar, limit=8)
    np.testing.assert_array_equal(train.images, PHOTOS.reshape(-1, 3, 32, 32) / np.float32(255))
    np.testing.assert_array_equal(train.labels, KINDS.ravel())
    assert train.images.dtype == np.float32 and train.classes[3] == "cat"
    np.testing.assert_array_equal(test.images, train.images[:6][::-1])
    np.testing.assert_array_equal(some.images, train.images[:8])
    np.testing.assert_array_equal(some.labels, train.labels[:8])


def test_cifar10_in_the_folder_of_its_archive(cifar, tmp_path):
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for path in list(tmp_path.glob("*.bin")):
        path.rename(inner / path.name)
    assert len(cifar10(tmp_path).labels) == 30


@pytest.mark.parametrize("folder", [".", "cifar-10-batches-py"])
def test_the_pickled_version_is_never_read(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ValueError, match=r"pickled.*cifar-10-binary"):
        cifar10(tmp_path)


@pytest.mark.parametrize("content", [b"", bytes(3072), bytes(3 * 3073 + 1), b"\x0a" + bytes(3072), None])
def test_damaged_records_are_named(cifar, content):
    path = cifar / "data_batch_2.bin"
    if content is None:
        with path.open("wb") as stream:
            stream.truncate(10_001 * 3073)  # takes no space on disk
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_2\.bin has (\d+ bytes|the label 10)"):
        cifar10(cifar)


def test_a_missing_batch_is_named(cifar):
    (cifar / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_4\.bin is missing(?s:.*)test_batch\.bin"):
        cifar10(cifar)
    assert len(cifar10(cifar, limit=18).labels) == 18  # which does not need it


# --- LoDoPaB-CT

SLICES = rng.random((5, 6, 6), dtype=np.float32)
SCANS = rng.random((5, 4, 3), dtype=np.float32)


def write(path, array, **options):
    with h5py.File(path, "w") as file:
        file.create_dataset("data", data=array, **options)


@pytest.fixture
def scans(tmp_path):
    for k, part in enumerate((slice(0, 3), slice(3, 5))):
        write(tmp_path / f"ground_truth_train_{k:03d}.hdf5", SLICES[part])
        write(tmp_path / f"observation_train_{k:03d}.hdf5", SCANS[part], chunks=(1, 4, 3), compression="gzip")
    write(tmp_path / "ground_truth_test_000.hdf5", SLICES)
    write(tmp_path / "observation_test_000.hdf5", SCANS)
    (tmp_path / "patient_ids_rand_test.csv").write_text("".join(f"{600 + k // 2}\n" for k in range(5)))
    return tmp_path


def test_lodopab(scans):
    train = lodopab(scans)
    assert len(train) == 5 and len(lodopab(scans, limit=4)) == 4
    for k, scan in enumerate(train):
        np.testing.assert_array_equal(scan.ground_truth, SLICES[k])
        np.testing.assert_array_equal(scan.observation, SCANS[k])
        assert scan.ground_truth.dtype == np.float32 and scan.patient == -1
    assert train[3].name == "ground_truth_train_001.hdf5[0]"
    assert [s.patient for s in lodopab(scans, "test")] == [600, 600, 601, 601, 602]


def test_no_more_files_than_needed_are_opened(scans):
    (scans / "observation_train_001.hdf5").write_bytes(b"")
    assert len(list(lodopab(scans, limit=3))) == 3
    with pytest.raises(ValueError, match=r"observation_train_001\.hdf5 is damaged"):
        lodopab(scans, limit=4)


@pytest.mark.parametrize("name", ["ground_truth_train_000.hdf5", "observation_train_001.hdf5"])
@pytest.mark.parametrize("keep", [0, 20, 500, -8])
def test_truncated_hdf5_is_named(scans, name, keep):
    path = scans / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{name[:-5]}\.hdf5 is damaged, truncated"):
        list(lodopab(scans))


def test_damaged_bytes_are_named(scans):
    path = scans / "observation_train_000.hdf5"
    content = path.read_bytes()
    with h5py.File(path) as file:
        start = file["data"].id.get_chunk_info(1).byte_offset
    path.write_bytes(content[:start] + bytes(20) + content[start + 20 :])
    samples = lodopab(scans)
    assert samples[0].observation.shape == (4, 3)
    with pytest.raises(ValueError, match=r"observation_train_000\.hdf5 is damaged"):
        samples[1]


@pytest.mark.parametrize(
    "array, message",
    [
        (SLICES[0], r"shape \(6, 6\)"),
        (SLICES.astype(np.int16), "int16"),
        (SLICES[:, :0], r"\(5, 0, 6\)"),
    ],
)
def test_other_arrays_are_refused(scans, array, message):
    write(scans / "ground_truth_train_000.hdf5", array)
    with pytest.raises(ValueError, match=rf"ground_truth_train_000\.hdf5.*{message}"):
        lodopab(scans)


def test_a_header_that_announces_too_much_allocates_nothing(scans):
    path = scans / "ground_truth_train_000.hdf5"
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (3, 100_000, 100_000), np.float32, chunks=(1, 64, 64))
    with pytest.raises(ValueError, match=r"shape \(3, 100000, 100000\)"):
        lodopab(scans)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (1000, 1000, 1000), np.float32, chunks=(300, 1000, 1000))
    with pytest.raises(ValueError, match="chunks"):
        lodopab(scans)


@pytest.mark.parametrize("chunks", [None, (1, 4, 3)])
def test_scans_that_were_not_written_are_not_zeros(scans, chunks):
    with h5py.File(scans / "observation_train_000.hdf5", "w") as file:
        data = file.create_dataset("data", (3, 4, 3), np.float32, chunks=chunks)
        if chunks:
            data[:2] = SCANS[:2]
    with pytest.raises(ValueError, match=r"observation_train_000\.hdf5 does not hold all of its shape \(3, 4, 3\)"):
        lodopab(scans)


@pytest.mark.parametrize(
    "shape, chunks, message",
    [
        ((2**40, 4, 3), (1, 4, 3), "no file of LoDoPaB-CT has so many slices"),
        ((100_000, 1, 1), (100_000, 1, 1), "no file of LoDoPaB-CT has so many slices"),
        ((128, 1000, 1000), (128, 1000, 1000), "chunks"),
    ],
)
def test_more_slices_than_a_file_can_have_are_refused(scans, shape, chunks, message):
    with h5py.File(scans / "ground_truth_train_000.hdf5", "w") as file:
        data = file.create_dataset("data", shape, np.float32, chunks=chunks, compression="gzip")
        data.id.write_direct_chunk((0, 0, 0), zlib.compress(b""))
    with pytest.raises(ValueError, match=rf"ground_truth_train_000\.hdf5.*{message}"):
        lodopab(scans)


@pytest.mark.parametrize("shuffle, mask", [(False, 0), (True, 0), (True, 1)])  # the mask leaves out a filter
def test_a_chunk_that_unpacks_to_more_than_its_shape_is_not_unpacked(scans, shuffle, mask):
    """HDF5 would unpack all of it, and a thousand times as much as the file has."""
    path = scans / "observation_train_000.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("data", (3, 4, 3), "f4", chunks=(3, 4, 3), compression="gzip", shuffle=shuffle)
        data.id.write_direct_chunk((0, 0, 0), zlib.compress(bytes(300_000_000), 1), mask)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"observation_train_000\.hdf5 has a chunk that unpacks to more"):
        lodopab(scans)[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize("options", [{"fletcher32": True}, {"shuffle": True}, {"shuffle": True, "fletcher32": True}])
def test_large_chunks_that_are_what_they_should_be_are_read(scans, options):
    stacks = {"ground_truth": (2, 300, 300), "observation": (2, 300, 301)}
    values = {name: rng.random(shape, dtype=np.float32) for name, shape in stacks.items()}
    for name, array in values.items():
        write(scans / f"{name}_train_000.hdf5", array, chunks=(2, 300, 300), compression="gzip", **options)
    scan = lodopab(scans)[1]
    np.testing.assert_array_equal(scan.ground_truth, values["ground_truth"][1])
    np.testing.assert_array_equal(scan.observation, values["observation"][1])


@pytest.mark.parametrize("options", [{"compression": "lzf"}, {"scaleoffset": 3}])
def test_packings_of_which_nothing_is_known_are_refused(scans, options):
    write(scans / "observation_train_000.hdf5", SCANS[:3], chunks=(1, 4, 3), **options)
    with pytest.raises(ValueError, match="packed in another way than by deflate"):
        lodopab(scans)


def test_values_beyond_the_end_are_not_zeros(scans):
    """HDF5 would fill them in, where the file says that it is longer."""
    path = scans / "ground_truth_train_000.hdf5"
    with h5py.File(path) as file:
        place = file["data"].id.get_offset()
    content = path.read_bytes()
    layout = content.index(struct.pack("<2Q", place, SLICES[:3].nbytes))  # where the values are, and how many bytes
    path.write_bytes(content[:layout] + (len(content) - 8).to_bytes(8, "little") + content[layout + 8 :])
    with pytest.raises(ValueError, match=r"ground_truth_train_000\.hdf5 (does not hold all|is damaged)"):
        lodopab(scans)


def test_patients_are_those_of_the_file_when_others_are_missing(scans):
    for kind, array in (("ground_truth", SLICES), ("observation", SCANS)):
        (scans / f"{kind}_test_000.hdf5").unlink()
        write(scans / f"{kind}_test_001.hdf5", array)
    (scans / "patient_ids_rand_test.csv").write_text("".join(f"{k}\n" for k in range(133)))
    assert [s.patient for s in lodopab(scans, "test")] == [128, 129, 130, 131, 132]


def test_other_files_are_not_reached_through_a_link(scans, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.hdf5"
    write(secret, SLICES[:3])
    path = scans / "ground_truth_train_000.hdf5"
    with h5py.File(path, "w") as file:
        file["data"] = h5py.ExternalLink(secret, "data")
    with pytest.raises(ValueError, match="no array called data of its own"):
        lodopab(scans)
    layout = h5py.VirtualLayout((3, 6, 6), np.float32)
    layout[:] = h5py.VirtualSource(secret, "data", (3, 6, 6))
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("data", layout)
    with pytest.raises(ValueError, match="other files"):
        lodopab(scans)
    with h5py.File(path, "w") as file:
        file.create_dataset("data", (3, 6, 6), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(ValueError, match="other files"):
        lodopab(scans)


def test_scans_that_do_not_match_are_named(scans):
    write(scans / "observation_train_001.hdf5", SCANS[:1])
    with pytest.raises(
        ValueError, match=r"ground_truth_train_001\.hdf5 has 2 slices.*observation_train_001\.hdf5 has 1"
    ):
        lodopab(scans)
    (scans / "observation_train_001.hdf5").unlink()
    with pytest.raises(ValueError, match=r"no counterpart in observation, such as ground_truth_train_001\.hdf5"):
        lodopab(scans)


def test_values_that_are_not_finite_are_named(scans):
    write(scans / "observation_train_000.hdf5", np.full((3, 4, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"observation_train_000\.hdf5 .* slice 2"):
        lodopab(scans)[2]


@pytest.mark.parametrize("text, message", [("a\nb\n", "no list of numbers"), ("1\n", "1 entries, none for slice 1")])
def test_a_wrong_list_of_patients_is_named(scans, text, message):
    (scans / "patient_ids_rand_test.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        lodopab(scans, "test")[1]


def test_without_h5py_the_extra_is_named(scans, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"h5py.*jbilevel\[medical\]"):
        lodopab(scans)


# --- all of them


@pytest.mark.parametrize("reader", [mnist, cifar10, lodopab])
def test_missing_folders_and_unknown_arguments(reader, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.* is missing: `root` must be a folder with\n"):
        reader(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is missing"):
        reader(tmp_path)
    with pytest.raises(ValueError, match="`split` is 'dev': choose one of 'train'"):
        reader(tmp_path, "dev")
    with pytest.raises(ValueError, match="`limit` is 0"):
        reader(tmp_path, limit=0)
