"""Driving scenes with a class for each pixel: CamVid and Cityscapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from .files import checked_root, missing_file
from .pictures import read_label_picture, read_picture
from .samples import (
    IGNORED,
    MAX_PIXELS,
    Samples,
    Segmented,
    check_choice,
    check_limit,
    check_same_size,
    paired,
)

CAMVID_CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
_CAMVID_TREE = """\
  train/*.png   trainannot/*.png
  val/*.png     valannot/*.png
  test/*.png    testannot/*.png
with equal names of images and labels: CamVid in the form of SegNet, labels 0, ..., 10 and 11 for void."""

CITYSCAPES_CLASSES = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
# The label id of each of the classes above; the other ids, 0 to 33, are not evaluated.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_TREE = """\
  leftImg8bit/train/CITY/NAME_leftImg8bit.png
  gtFine/train/CITY/NAME_gtFine_labelIds.png
and the same for val and test: leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip, unpacked into one folder."""


def camvid(root, split: str = "train", *, limit: int | None = None, max_pixels: int = MAX_PIXELS) -> Samples:
    """CamVid in the form of SegNet: 480 x 360 pixels, eleven classes, with the split that SegNet made common.

    Frames are from videos: neighbours in the sequence are alike.

    Args:
        root: folder of ``train``, ``trainannot`` and so on.
        split: "train" (367), "val" (101) or "test" (233).
        limit: the first ``limit`` by name.
        max_pixels: refuse larger pictures.

    Returns:
        Entries of :class:`Segmented`, read when they are asked for; void, 11 in the files, is 255.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: ``split`` or ``limit`` is unknown or not positive; images and labels do not match in name; on
            reading, a file is damaged, they do not match in size, or a label is above 11.
        ImportError: Pillow is not installed.

    Reference:
        Brostow, Fauqueur, Cipolla, Semantic object classes in video, Pattern Recognition Letters 30, 2009;
        Badrinarayanan, Kendall, Cipolla, SegNet, IEEE PAMI 39, 2017.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for folder, picture in (("train", Image.new("RGB", (8, 6))), ("trainannot", Image.new("L", (8, 6), 3))):
    ...     (root / folder).mkdir()
    ...     picture.save(root / folder / "0001TP_0.png")
    >>> streets = camvid(root)
    >>> streets[0].image.shape, streets.classes[streets[0].labels[0, 0]]
    ((3, 6, 8), 'road')
    """
    check_choice("split", split, ("train", "val", "test"))
    check_limit(limit)
    root = checked_root(root, (split, f"{split}annot"), _CAMVID_TREE)
    images = {p.name: p for p in (root / split).glob("*.png")}
    labels = {p.name: p for p in (root / f"{split}annot").glob("*.png")}
    if not images:
        raise missing_file(root / split / "*.png", _CAMVID_TREE)
    table = np.full(256, -1, np.int16)
    table[:12] = [*range(11), IGNORED]
    return _segmented(paired(images, labels, split, f"{split}annot")[:limit], table, CAMVID_CLASSES, max_pixels)


def cityscapes(root, split: str = "train", *, limit: int | None = None, max_pixels: int = MAX_PIXELS) -> Samples:
    """Cityscapes with fine annotations: 2048 x 1024 pixels, nineteen classes, with the official split by city.

    Args:
        root: folder of ``leftImg8bit`` and ``gtFine``.
        split: "train" (2975), "val" (500) or "test" (1525, whose public labels are all void).
        limit: the first ``limit`` by city and name.
        max_pixels: refuse larger pictures.

    Returns:
        Entries of :class:`Segmented`, read when they are asked for. The label ids of the files become the nineteen
        train ids; all others are 255.

    Raises:
        As :func:`camvid`; label ids above 33 are refused.

    Reference:
        Cordts et al., The Cityscapes dataset for semantic urban scene understanding, CVPR 2016.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root, name = Path(tempfile.mkdtemp()), "train/aachen/aachen_000001_000019"
    >>> for path, picture in ((f"leftImg8bit/{name}_leftImg8bit.png", Image.new("RGB", (8, 6))),
    ...                       (f"gtFine/{name}_gtFine_labelIds.png", Image.new("L", (8, 6), 26))):
    ...     (root / path).parent.mkdir(parents=True)
    ...     picture.save(root / path)
    >>> streets = cityscapes(root)
    >>> streets[0].image.shape, streets.classes[streets[0].labels[0, 0]]
    ((3, 6, 8), 'car')
    """
    check_choice("split", split, ("train", "val", "test"))
    check_limit(limit)
    root = checked_root(root, (f"leftImg8bit/{split}", f"gtFine/{split}"), _CITYSCAPES_TREE)
    images = _by_scene(root / "leftImg8bit" / split, "_leftImg8bit.png")
    labels = _by_scene(root / "gtFine" / split, "_gtFine_labelIds.png")
    if not images:
        raise missing_file(root / "leftImg8bit" / split / "CITY" / "*_leftImg8bit.png", _CITYSCAPES_TREE)
    table = np.full(256, -1, np.int16)
    table[:34] = table[255] = IGNORED
    table[list(_CITYSCAPES_IDS)] = range(19)
    pairs = paired(images, labels, f"leftImg8bit/{split}", f"gtFine/{split}")
    return _segmented(pairs[:limit], table, CITYSCAPES_CLASSES, max_pixels)


def _by_scene(folder: Path, ending: str) -> dict[str, Path]:
    return {f"{p.parent.name}/{p.name.removesuffix(ending)}": p for p in folder.glob(f"*/*{ending}")}


def _segmented(pairs, table, classes, max_pixels):
    return Samples(tuple(pairs), partial(_scene, table=table, max_pixels=max_pixels), classes)


def _scene(pair, table, max_pixels):
    """``table`` takes the numbers in a label file to classes, and to -1 where there is no such class."""
    image_path, label_path = pair
    image = read_picture(image_path, False, max_pixels)
    numbers = read_label_picture(label_path, max_pixels)
    check_same_size(image_path, image.shape[-2:], label_path, numbers.shape)
    labels = table[numbers]
    if labels.min() < 0:
        raise ValueError(f"{label_path} has the label {numbers[labels < 0][0]}, which this data set does not have.")
    return Segmented(image, labels.astype(np.uint8), image_path.name)
