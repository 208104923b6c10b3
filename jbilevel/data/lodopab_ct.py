"""LoDoPaB-CT: simulated low-dose scans of chests, and their ground truth, in HDF5 files of 128 slices."""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import NamedTuple

import numpy as np

from .files import Unusable, checked_root, missing_file, named, optional_package, read_text
from .samples import Samples, check_choice, check_limit, paired

_TREE = """\
  ground_truth_train_000.hdf5 ...   observation_train_000.hdf5 ...   (patient_ids_rand_train.csv)
and the same for validation and test: the archives, unpacked into one folder."""
_MAX_VALUES = 10_000_000  # of one slice or its measurement
_MAX_SLICES = 10_000  # of one file
_MAX_CHUNK_BYTES = 300_000_000  # a whole file of 128 measurements has 263 MB
_DEFLATE = 1
_FILTERS = {_DEFLATE, 2, 3}  # and shuffle, checksum: others unpack to no known size, or are looked for as a plug-in
_HARMLESS = 200_000  # bytes of deflate: they grow to a thousand times as many at most


class Scan(NamedTuple):
    """A slice and its measurement.

    Attributes:
        ground_truth: float32 (362, 362), attenuation over 81.35858 per metre, in [0, 1]: 0.26 m square.
        observation: float32 (1000, 513), noisy line integrals in metres over the same 81.35858 per metre: a parallel
            beam of 1000 angles over half a turn, 4096 photons per bin before the patient.
        patient: number of the patient, -1 where the data set's list is missing.
        name: of the file, and the number of the slice in it.

    >>> scan = Scan(np.zeros((362, 362), np.float32), np.zeros((1000, 513), np.float32), 14, "a.hdf5[3]")
    >>> scan.observation.shape, scan.patient
    ((1000, 513), 14)
    """

    ground_truth: np.ndarray
    observation: np.ndarray
    patient: int
    name: str


def lodopab(root, split: str = "train", *, limit: int | None = None) -> Samples:
    """Slices of LoDoPaB-CT with the official split, which is by patient. Each is read from disk when it is asked for.

    A part of the files is enough, if each ``ground_truth`` has its ``observation``.

    Args:
        root: folder of the unpacked ``.hdf5`` files.
        split: "train" (35,820), "validation" (3,522) or "test" (3,553).
        limit: the first ``limit`` slices; no more files than needed are opened.

    Returns:
        Entries of :class:`Scan`.

    Raises:
        FileNotFoundError: there are no files of this split.
        ValueError: ``split`` or ``limit`` is unknown or not positive; a file is damaged, refers to other files, or is
            not of the expected form; ground truth and observations do not match in number.
        ImportError: h5py is not installed.

    Reference:
        Leuschner, Schmidt, Otero Baguer, Maass, LoDoPaB-CT, a benchmark dataset for low-dose computed tomography
        reconstruction, Scientific Data 8, 2021.

    >>> import tempfile, h5py
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> for kind, shape in (("ground_truth", (2, 362, 362)), ("observation", (2, 1000, 513))):
    ...     with h5py.File(root / f"{kind}_test_000.hdf5", "w") as file:
    ...         file["data"] = np.zeros(shape, np.float32)
    >>> scans = lodopab(root, "test")
    >>> len(scans), scans[1].ground_truth.shape, scans[1].name
    (2, (362, 362), 'ground_truth_test_000.hdf5[1]')
    """
    check_choice("split", split, ("train", "validation", "test"))
    check_limit(limit)
    root = checked_root(root, (), _TREE)
    truths, observations = (_files(root, kind, split) for kind in ("ground_truth", "observation"))
    if not truths:
        raise missing_file(root / f"ground_truth_{split}_000.hdf5", _TREE)
    keys = []
    for truth, observation in paired(truths, observations, "ground_truth", "observation"):
        n, m = _length(truth), _length(observation)
        if n != m:
            raise ValueError(f"{truth} has {n} slices, but {observation} has {m}: download both again.")
        keys += [(truth, observation, int(truth.stem[-3:]) * 128 + k, k) for k in range(n)]
        if limit is not None and len(keys) >= limit:
            break
    patients = root / f"patient_ids_rand_{split}.csv"
    return Samples(tuple(keys[:limit]), partial(_scan, patients=_patients(patients), source=patients))


def _scan(key, patients, source):
    truth, observation, number, k = key
    if patients is not None and number >= len(patients):
        raise ValueError(f"{source} has {len(patients)} entries, none for slice {number}.")
    patient = -1 if patients is None else patients[number]
    return Scan(_slice(truth, k), _slice(observation, k), patient, f"{truth.name}[{k}]")


def _files(root, kind, split):
    return {p.stem[-3:]: p for p in root.glob(f"{kind}_{split}_[0-9][0-9][0-9].hdf5")}


def _length(path):
    return _with_data(path, lambda data: data.shape[0])


def _slice(path, k):
    def read(data):
        _check_chunks(data, k)
        return data[k]

    values = _with_data(path, read)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{path} has values that are NaN or infinite in slice {k}.")
    return np.asarray(values, np.float32)


def _with_data(path, use):
    """``use`` of the array called data in an HDF5 file, once it is known to be what it should be."""
    h5py = optional_package("h5py", "medical")
    with named(path, "HDF5 file of LoDoPaB-CT"), h5py.File(path, "r") as file:
        link = file.get("data", getlink=True)
        if not isinstance(link, h5py.HardLink) or not isinstance(file["data"], h5py.Dataset):
            raise Unusable("has no array called data of its own.")
        data = file["data"]
        if data.external or data.is_virtual:
            raise Unusable("takes its data from other files.")
        if data.ndim != 3 or data.dtype.kind != "f" or math.prod(data.shape[1:]) not in range(1, _MAX_VALUES + 1):
            raise Unusable(f"has data of shape {data.shape} and dtype {data.dtype}, not a stack of float images.")
        if data.shape[0] > _MAX_SLICES:
            raise Unusable(f"has data of shape {data.shape}: no file of LoDoPaB-CT has so many slices.")
        if data.chunks and math.prod(data.chunks) * data.dtype.itemsize > _MAX_CHUNK_BYTES:
            raise Unusable(f"is packed in chunks of shape {data.chunks}, too large to unpack.")
        filters = _filters(data)
        if not set(filters) <= _FILTERS or len(set(filters)) < len(filters):
            raise Unusable("is packed in another way than by deflate: unpack it with h5repack.")
        if not _complete(data):
            raise Unusable(f"does not hold all of its shape {data.shape}, and HDF5 would fill in zeros.")
        return use(data)


def _filters(data):
    properties = data.id.get_create_plist()
    return [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]


def _complete(data):
    """Whether all values have been written."""
    if not data.chunks:
        return data.id.get_storage_size() == data.size * data.dtype.itemsize
    return data.id.get_num_chunks() == math.prod(-(-n // m) for n, m in zip(data.shape, data.chunks, strict=True))


def _check_chunks(data, k):
    """HDF5 unpacks a deflated chunk to wherever it ends, whatever its size should be: refuse one that is longer."""
    filters = _filters(data)
    if not data.chunks or _DEFLATE not in filters:
        return
    size = math.prod(data.chunks) * data.dtype.itemsize + 8  # and a checksum
    depth, *sides = data.chunks
    grid = np.ndindex(*(-(-n // side) for n, side in zip(data.shape[1:], sides, strict=True)))
    for place in grid:
        start = (k - k % depth, *(i * side for i, side in zip(place, sides, strict=True)))
        if data.id.get_chunk_info_by_coord(start).size <= _HARMLESS:
            continue
        left_out, content = data.id.read_direct_chunk(start)
        deflated = not left_out >> filters.index(_DEFLATE) & 1
        if deflated and len(zlib.decompressobj().decompress(content, size + 1)) > size:
            raise Unusable(f"has a chunk that unpacks to more than its shape {data.chunks}.")


def _patients(path):
    """The first column of the list of patients, by number of the slice; None where there is no list."""
    if not path.is_file():
        return None
    with named(path, "list of numbers of patients"):
        return tuple(int(line.split(",")[0]) for line in read_text(path).splitlines() if line.strip())
