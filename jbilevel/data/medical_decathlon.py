"""Volumes of the Medical Segmentation Decathlon: NIfTI images with organs labelled by experts."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np

from .files import Unusable, checked_root, inside, named, opened, optional_package, read_exactly, read_text
from .samples import Samples, check_choice, check_limit, check_same_size
from .stacks import leaning

_TREE = """\
  dataset.json
  imagesTr/liver_0.nii.gz ...   labelsTr/liver_0.nii.gz ...   (imagesTs/...)
one task of the Decathlon, such as Task03_Liver.tar, unpacked."""
_MAX_LIST_BYTES = 10_000_000
_MAX_HEADER_BYTES = 1_000_000
_MAX_VOXELS = 600_000_000  # 2.4 GB in single precision
_MAX_REST = 1_000_000  # bytes after the last voxel
_MM = {1: 1000.0, 2: 1.0, 3: 0.001}  # metres, millimetres, micrometres


class Volume(NamedTuple):
    """One patient of the Decathlon.

    Attributes:
        image: float32 (slices, height, width), or (channels, slices, height, width) for several sequences of an MRI;
            Hounsfield units for CT; slope and intercept of the file are applied. Slices go from the feet to the head;
            in each the front is at the top and the patient's right on the left.
        labels: uint8 (slices, height, width); None in the test split, whose labels are not public.
        voxel_mm: distances of slices, rows and columns, in mm whatever the unit of the file.
        name: of the file.

    >>> volume = Volume(np.zeros((4, 6, 8), np.float32), np.zeros((4, 6, 8), np.uint8), (2.5, 0.8, 0.8), "liver_0.nii")
    >>> float(np.sum(volume.labels == 1) * np.prod(volume.voxel_mm))  # mm^3 of liver
    0.0
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
            names files elsewhere; on reading, a file is damaged, truncated or too large, holds complex numbers or
            colours, or is sheared, as from a tilted gantry; image and labels do not cover the same space, or a label is
            not in ``dataset.json``.
        ImportError: nibabel is not installed.

    Warns:
        UserWarning: on reading, a file does not say how it lies in space; and what is assumed.

    Reference:
        Antonelli et al., The medical segmentation decathlon, Nature Communications 13, 2022.

    >>> import json, tempfile, nibabel
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> pair = {"image": "imagesTr/liver_0.nii.gz", "label": "labelsTr/liver_0.nii.gz"}
    >>> for name, dtype in ((pair["image"], np.int16), (pair["label"], np.uint8)):
    ...     (root / name).parent.mkdir()
    ...     nibabel.save(nibabel.Nifti1Image(np.zeros((8, 6, 4), dtype), np.diag([0.5, 0.5, 2.0, 1.0])), root / name)
    >>> listed = {"labels": {"0": "background", "1": "liver"}, "training": [pair], "test": []}
    >>> _ = (root / "dataset.json").write_text(json.dumps(listed))
    >>> volumes = decathlon(root)
    >>> volumes.classes, volumes[0].image.shape, volumes[0].voxel_mm  # slices first
    (('background', 'liver'), (4, 6, 8), (2.0, 0.5, 0.5))
    """
    check_choice("split", split, ("training", "test"))
    check_limit(limit)
    root = checked_root(root, ("dataset.json",), _TREE)
    source = root / "dataset.json"
    classes, entries = _listed(source, split)
    keys = [tuple(inside(root, name, source) if name else None for name in pair) for pair in entries[:limit]]
    optional_package("nibabel", "medical")
    return Samples(tuple(keys), partial(_patient, classes=len(classes), max_voxels=max_voxels), classes)


def _patient(key, classes, max_voxels):
    image_path, label_path = key
    image, voxel_mm, space = _volume(image_path, max_voxels, (3, 4))
    if not np.all(np.isfinite(image)):
        raise ValueError(f"{image_path} has voxels that are NaN or infinite.")
    labels = None
    if label_path is not None:
        values, _, label_space = _volume(label_path, max_voxels, (3,))
        check_same_size(image_path, image.shape[-3:], label_path, values.shape)
        if not np.allclose(space, label_space, atol=0.1):
            raise ValueError(f"{image_path} and {label_path} lie at different places in space.")
        if not np.all(np.isin(values, np.arange(classes))):
            raise ValueError(f"{label_path} has labels other than those in dataset.json, 0 to {classes - 1}.")
        labels = values.astype(np.uint8)
    return Volume(image, labels, voxel_mm, image_path.name)


def _listed(path, split):
    """Names of the classes, and of image and labels of each entry."""
    try:
        content = json.loads(read_text(path, _MAX_LIST_BYTES))
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


def _volume(path, max_voxels, dimensions):
    """The array of a NIfTI file in radiological order, the sizes of its voxels, and its affine map, in mm."""
    from nibabel import Nifti1Header, orientations
    from nibabel.affines import voxel_sizes

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, but dataset.json names it: unpack the archive again.")
    with named(path, "NIfTI-1 file"):
        with opened(path) as stream:
            head = stream.read(348)
            if len(head) < 348 or head[344:348] != b"n+1\0":
                raise Unusable("is truncated, or no NIfTI-1 file.")
            header = Nifti1Header(head, check=False)
            shape, dtype = _announced(header, max_voxels, dimensions)
            read_exactly(stream, int(header["vox_offset"]) - 348)  # extensions
            raw = np.frombuffer(read_exactly(stream, math.prod(shape) * dtype.itemsize), dtype)
            if len(stream.read(_MAX_REST)) == _MAX_REST:  # to the end, where gzip compares its checksum
                raise Unusable(f"is longer than its shape {shape} says.")
        affine = _affine(header, shape)
        turn = orientations.io_orientation(affine)
        values = orientations.apply_orientation(raw.reshape(shape, order="F"), turn)
        affine = affine @ orientations.inv_ornt_aff(turn, shape)
        # Now x goes from the patient's left to the right, y to the front, z to the head.
        image = _scaled(np.moveaxis(values, (0, 1, 2), (-1, -2, -3))[..., ::-1, ::-1], header)
    if not (header["sform_code"] or header["qform_code"]):
        warnings.warn(
            f"{path} does not say how it lies in space: its first axis is taken to go from the patient's right to the "
            "left, its second to the front and its third to the head, as in Analyze.",
            UserWarning,
            stacklevel=4,
        )
    x, y, z = (float(v) for v in voxel_sizes(affine))
    return image, (z, y, x), affine


def _announced(header, max_voxels, dimensions):
    """Shape and dtype of what the file should hold, refused before memory is taken for it."""
    ndim, *sizes = (int(n) for n in header["dim"])
    shape = tuple(sizes[: max(ndim, 0)])
    if ndim not in dimensions or min(shape) < 1:
        raise Unusable(f"announces the shape {shape}: expected {' or '.join(map(str, dimensions))} axes.")
    if math.prod(shape) > max_voxels:
        raise Unusable(f"announces the shape {shape}, more than `max_voxels`={max_voxels}.")
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise Unusable(f"has voxels of type {dtype}: convert them to real numbers of 64 bits at most.")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        raise Unusable(f"announces {header['bitpix']} bits for voxels of type {dtype}: it is damaged.")
    if not 348 <= header["vox_offset"] <= _MAX_HEADER_BYTES:  # false for NaN as well
        raise Unusable(f"has a header of {header['vox_offset']} bytes.")
    return shape, dtype


def _scaled(values, header):
    """Values times slope plus intercept, where the header has them, in single precision."""
    slope, intercept = header.get_slope_inter()
    image = np.empty(values.shape, np.float32)
    for k in np.ndindex(values.shape[:-2]):  # in double precision, which would not fit into memory as a whole
        image[k] = values[k] if slope is None else values[k] * float(slope) + float(intercept)
    return image


def _affine(header, shape):
    """From voxels to mm."""
    affine = header.get_best_affine()
    affine[:3] *= _MM.get(int(header["xyzt_units"]) & 7, 1.0)
    axes = affine[:3, :3].T
    if not np.all(np.isfinite(affine)) or abs(np.linalg.det(axes)) < 1e-12:
        raise Unusable("has directions or sizes of voxels that make no sense.")
    stacks = [_stack(shape[i], axes[i], axes[j]) for i, j in itertools.permutations(range(3), 2)]
    if words := leaning(*max(stacks)):
        raise Unusable(f"is sheared: its slices {words}; resample it upright.")
    return affine


def _stack(n, step, pixel):
    """How far the last of ``n`` slices has moved along a side of their pixels, how high it lies, and that side."""
    way, size = (n - 1) * step, float(np.linalg.norm(pixel))
    moved = abs(float(way @ pixel)) / size
    return moved, math.sqrt(max(way @ way - moved**2, 0)), size
