"""The Berkeley segmentation data set BSDS500."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import checked_root, missing_file
from .matlab import read_mat
from .pictures import read_picture
from .samples import MAX_PIXELS, Samples, check_choice, check_limit, check_same_size, paired

_TREE = """\
  images/train/*.jpg   groundTruth/train/*.mat
  images/val/*.jpg     groundTruth/val/*.mat
  images/test/*.jpg    groundTruth/test/*.mat
or one that holds it as BSDS500/data or BSR/BSDS500/data. (groundTruth is needed for boundaries only.)"""


class Photograph(NamedTuple):
    """A photograph of BSDS500.

    Attributes:
        image: float32 in [0, 1], (height, width) or (3, height, width).
        boundaries: uint8 (annotators, height, width), 1 on the outlines that each person drew; None if not asked for.
        name: of the file.

    >>> photograph = Photograph(np.zeros((321, 481), np.float32), np.zeros((5, 321, 481), np.uint8), "100075.jpg")
    >>> photograph.boundaries.mean(axis=0).shape  # how many of five people drew an outline here
    (321, 481)
    """

    image: np.ndarray
    boundaries: np.ndarray | None
    name: str


def bsds500(
    root,
    split: str = "train",
    *,
    grey: bool = True,
    boundaries: bool = False,
    limit: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Samples:
    """Natural photographs of 481 x 321 or 321 x 481 pixels, with the official split.

    Args:
        root: folder of ``images`` and ``groundTruth``, or one that holds it as in the distributed archive.
        split: "train" (200), "val" (100) or "test" (200).
        grey: grey images, 0.299 R + 0.587 G + 0.114 B; otherwise RGB.
        boundaries: read the outlines that people drew as well.
        limit: the first ``limit`` by name.
        max_pixels: refuse larger pictures.

    Returns:
        Entries of :class:`Photograph`, read when they are asked for.

    Raises:
        FileNotFoundError: a folder is missing or without pictures.
        ValueError: ``split`` or ``limit`` is unknown or not positive; images and ground truth do not match; on reading,
            a file is damaged or too large.
        ImportError: Pillow is not installed.

    Reference:
        Arbeláez, Maire, Fowlkes, Malik, Contour detection and hierarchical image segmentation, IEEE PAMI 33, 2011.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> (root / "images/train").mkdir(parents=True)
    >>> Image.new("RGB", (8, 6)).save(root / "images/train/100075.jpg")
    >>> photographs = bsds500(root)
    >>> len(photographs), photographs[0].name, photographs[0].image.shape
    (1, '100075.jpg', (6, 8))
    """
    check_choice("split", split, ("train", "val", "test"))
    check_limit(limit)
    root = Path(root)
    root = next((f for f in (root, root / "BSDS500/data", root / "BSR/BSDS500/data") if (f / "images").is_dir()), root)
    checked_root(root, (f"images/{split}", *([f"groundTruth/{split}"] if boundaries else [])), _TREE)
    images = {p.stem: p for p in (root / "images" / split).glob("*.jpg")}
    if not images:
        raise missing_file(root / "images" / split / "*.jpg", _TREE)
    if boundaries:
        drawn = {p.stem: p for p in (root / "groundTruth" / split).glob("*.mat")}
        keys = paired(images, drawn, f"images/{split}", f"groundTruth/{split}")
    else:
        keys = [(images[name], None) for name in sorted(images)]
    return Samples(tuple(keys[:limit]), partial(_photograph, grey=grey, max_pixels=max_pixels))


def _photograph(key, grey, max_pixels):
    path, drawing = key
    image = read_picture(path, grey, max_pixels)
    outlines = None if drawing is None else _boundaries(drawing)
    if outlines is not None:
        check_same_size(path, image.shape[-2:], drawing, outlines.shape[1:])
    return Photograph(image, outlines, path.name)


def _boundaries(path):
    cells = read_mat(path, ("groundTruth",))["groundTruth"]
    try:
        drawings = [np.asarray(cell["Boundaries"][0, 0]) for cell in cells.ravel()]
        return np.stack([d.astype(bool) for d in drawings]).astype(np.uint8)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has no drawings of one size as in BSDS500: {error}") from error
