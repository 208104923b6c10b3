"""Volumes of the Medical Segmentation Decathlon: NIfTI images with organs labelled by experts."""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np

from .samples import Samples, check_choice, check_limit, check_same_size, checked_root, inside, opened, optional_package

_TREE = """\
  dataset.json
  imagesTr/liver_0.nii.gz ...   labelsTr/liver_0.nii.gz ...   (imagesTs/...)
one task of the Decathlon, such as Task03_Liver.tar, unpacked."""
_MAX_LIST_BYTES = 10_000_000
_MAX_HEADER_BYTES = 1_000_000
_MAX_VOXELS = 600_000_000  # 2.4 GB in single precision


class Volume(NamedTuple):
    """One patient of the Decathlon.

    Attributes:
        image: float32 (slices, height, width), or (channels, slices, height, width) for several sequences of an MRI;
            Hounsfield units for CT. Slices go from the feet to the head; in each the front is at the top and the
            patient's right on the left.
        labels: uint8 (slices, height, width); None in the test split, whose labels are not public.
        voxel_mm: distances of slices, rows and columns.
        name: of the file.
    """

    image: np.ndarray
    labels: np.ndarray | None
    voxel_mm: tuple[float, float, float]
    name: str


def decathlon(root, split: str = "training", *, limit: int | None = None, max_voxels: int = _MAX_VOXELS) -> Samples:
    """Volumes of one task of the Medical Segmentation Decathlon, one file and one entry per patient.

    The official training split is for :func:`split_by_patient`, with ``range(len(samples))`` as patients.

    Args:
        root: folder of ``dataset.json``.
        split: "training" (with labels) or "test" (without).
        limit: the first ``limit`` of ``dataset.json``.
        max_voxels: refuse larger volumes, before they are unpacked.

    Returns:
        Entries of :class:`Volume`, read when they are asked for; ``classes`` are the names of the labels.

    Raises:
        FileNotFoundError: ``dataset.json`` is missing, or, on reading, a volume.
        ValueError: ``split`` or ``limit`` is unknown or not positive; ``dataset.json`` is damaged, of another form, or
            names files elsewhere; on reading, a file is damaged, truncated or too large, image and labels do not cover
            the same space, or a label is not in ``dataset.json``.
        ImportError: nibabel is not installed.

    Reference:
        Antonelli et al., The medical segmentation decathlon, Nature Communications 13, 2022.
    """
    nibabel = optional_package("nibabel", "medical")
    check_choice("split", split, ("training", "test"))
    check_limit(limit)
    root = checked_root(root, ("dataset.json",), _TREE)
    source = root / "dataset.json"
    classes, entries = _listed(source, split)
    keys = [tuple(inside(root, name, source) if name else None for name in pair) for pair in entries[:limit]]

    def read(key):
        image_path, label_path = key
        image, voxel_mm, space = _volume(nibabel, image_path, max_voxels, (3, 4))
        if not np.all(np.isfinite(image)):
            raise ValueError(f"{image_path} has voxels that are NaN or infinite.")
        labels = None
        if label_path is not None:
            values, _, label_space = _volume(nibabel, label_path, max_voxels, (3,))
            check_same_size(image_path, image.shape[-3:], label_path, values.shape)
            if not np.allclose(space, label_space, atol=0.1):
                raise ValueError(f"{image_path} and {label_path} lie at different places in space.")
            if not np.all(np.isin(values, np.arange(len(classes)))):
                raise ValueError(f"{label_path} has labels other than those in dataset.json, 0 to {len(classes) - 1}.")
            labels = values.astype(np.uint8)
        return Volume(image, labels, voxel_mm, image_path.name)

    return Samples(tuple(keys), read, classes)


def _listed(path, split):
    """Names of the classes, and of image and labels of each entry."""
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise ValueError("it is too large")
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {int(number): str(name) for number, name in content["labels"].items()}
        if sorted(names) != list(range(len(names))) or len(names) > 256:
            raise ValueError(f"the labels are {sorted(names)}, not 0, 1, ...")
        if split == "training":
            entries = [(str(entry["image"]), str(entry["label"])) for entry in content["training"]]
        else:
            entries = [(str(entry), None) for entry in content["test"]]
        if not entries:
            raise ValueError(f"it names no files for {split!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # JSON's errors are ValueErrors
        raise ValueError(f"{path} is no dataset.json of the Decathlon: {error!r}. Expected\n{_TREE}") from error
    return tuple(names[k] for k in range(len(names))), entries


def _volume(nibabel, path, max_voxels, dimensions):
    """The array of a NIfTI file in radiological order, the sizes of its voxels, and its affine map."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but dataset.json names it: unpack the archive again.")
    try:
        _check_announced(path, max_voxels, dimensions)
        file = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asarray(file.dataobj, np.float32)
    except _Unusable as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:  # nibabel raises anything on damaged files: ImageFileError, EOFError, zlib.error, ...
        raise ValueError(f"{path} is damaged, truncated or no NIfTI file: {error}") from error
    # Now x goes from the patient's left to the right, y to the front, z to the head.
    values = np.moveaxis(values, (0, 1, 2), (-1, -2, -3))[..., ::-1, ::-1]
    x, y, z = (float(v) for v in file.header.get_zooms()[:3])
    return np.ascontiguousarray(values), (z, y, x), file.affine


def _check_announced(path, max_voxels, dimensions):
    """Refuse what is too large before nibabel allocates memory for it."""
    with opened(path) as stream:
        try:
            head = stream.read(348)
        except (EOFError, OSError, zlib.error) as error:
            raise _Unusable(f"is damaged or truncated: {error}") from error
    if len(head) < 348 or head[344:348] != b"n+1\0":
        raise _Unusable("is truncated, or no NIfTI-1 file.")
    order = "<" if head[:4] == struct.pack("<i", 348) else ">"
    ndim, *sizes = struct.unpack(f"{order}8h", head[40:56])
    (bits,) = struct.unpack(f"{order}h", head[72:74])
    (offset,) = struct.unpack(f"{order}f", head[108:112])
    shape = tuple(sizes[: max(ndim, 0)])
    if ndim not in dimensions or min(shape) < 1 or not 0 < bits <= 64:
        raise _Unusable(
            f"announces the shape {shape} with {bits} bits: expected {' or '.join(map(str, dimensions))} axes."
        )
    if math.prod(shape) > max_voxels:
        raise _Unusable(f"announces the shape {shape}, more than `max_voxels`={max_voxels}.")
    if not 348 <= offset <= _MAX_HEADER_BYTES:
        raise _Unusable(f"has a header of {offset} bytes.")
    if path.suffix != ".gz" and path.stat().st_size < offset + math.prod(shape) * bits // 8:
        raise _Unusable(f"is truncated: it is shorter than its shape {shape} says.")


class _Unusable(Exception):
    """A NIfTI file that cannot be used, with the reason."""
