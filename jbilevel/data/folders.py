"""Folders of picture files as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import is_entry
from .pictures import read_picture
from .samples import MAX_PIXELS, check_limit
from .scikit_image import centre_crop

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


class ImageFolder(NamedTuple):
    """Images of a folder and their file names, in the same order.

    >>> found = ImageFolder(np.zeros((2, 6, 6), np.float32), ("0001.png", "0002.png"))
    >>> [(name, image.shape) for image, name in zip(*found, strict=True)]
    [('0001.png', (6, 6)), ('0002.png', (6, 6))]
    """

    images: np.ndarray | list[np.ndarray]
    names: tuple[str, ...]


def image_folder(
    root,
    *,
    grey: bool = True,
    size: int | None = None,
    limit: int | None = None,
    dtype=np.float32,
    max_pixels: int = MAX_PIXELS,
) -> ImageFolder:
    """Read the pictures of one folder (not of folders in it) into memory, sorted by file name.

    Files ending in png, jpg, jpeg, tif, tiff, bmp or webp, whatever the case, are read; other files and hidden ones
    are not. Eight bits are divided by 255, twelve by 4095, sixteen by 65535; float pixels must lie in [0, 1] already,
    and signed ones are refused. Where a TIFF says that 0 is white, it is, in every depth. Pictures are turned as their
    orientation says (EXIF, TIFF), alpha is dropped, neither colour profiles nor gamma are applied, and of a file with
    several pages the first is read.

    Args:
        root: path of the folder.
        grey: return grey images, 0.299 R + 0.587 G + 0.114 B (Rec. 601) of colour pictures; otherwise RGB, with grey
            pictures repeated three times.
        size: side in pixels of the square cut out at the centre of each picture; None: whole pictures.
        limit: read the first ``limit`` files only.
        dtype: floating dtype of the images.
        max_pixels: refuse larger pictures, before they are decompressed.

    Returns:
        ``(images, names)``. With ``size``, images is an array (n, size, size), or (n, 3, size, size) in colour;
        without, a list of arrays (height, width) or (3, height, width), for pictures may differ in size.

    Raises:
        FileNotFoundError: ``root`` is not a folder, or holds no picture.
        ValueError: a file is damaged, too large, smaller than ``size`` or of a kind that has no known range, with its
            name; or ``size`` or ``limit`` is not positive.
        ImportError: Pillow is not installed.

    Warns:
        UserWarning: a picture has 16 bits per colour, of which Pillow keeps 8; or a TIFF of 16 bits says that values
            end where those of fewer do, such as at 4095, which by its standard does not change what they mean.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for name in ("0002.png", "0001.png"):
    ...     Image.new("RGB", (8, 6), (255, 255, 255)).save(root / name)
    >>> images, names = image_folder(root, size=4)
    >>> images.shape, float(images.max()), names
    ((2, 4, 4), 1.0, ('0001.png', '0002.png'))
    """
    check_limit(size, "size")
    check_limit(limit)
    paths = _picture_paths(Path(root))[:limit]
    images = []
    for path in paths:
        image = read_picture(path, grey, max_pixels, dtype)
        # a copy: a view would keep the whole picture in memory
        images.append(image if size is None else centre_crop(image, size, str(path)).copy())
    return ImageFolder(images if size is None else np.stack(images), tuple(path.name for path in paths))


def _picture_paths(root):
    problem = None
    if not root.is_dir():
        problem = f"{root} is not a folder"
    else:
        paths = sorted(
            (p for p in root.iterdir() if p.suffix.lower() in _SUFFIXES and not p.name.startswith(".") and is_entry(p)),
            key=lambda p: p.name,
        )
        if not paths:
            problem = f"{root} holds no picture"
    if problem:
        raise FileNotFoundError(
            f"{problem}: `root` must hold files that end in {', '.join(_SUFFIXES)}, such as\n"
            f"  {root.name or root}/\n    0001.png\n    0002.png"
        )
    return paths
