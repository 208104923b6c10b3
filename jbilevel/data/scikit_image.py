"""Fifteen photographs that come with scikit-image: examples and benchmarks need no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# All are files of scikit-image's wheel. The order is part of the data set: noise drawn for the stack depends on it.
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "motorcycle_left": "motorcycle_left.png",
    "moon": "moon.png",
    "rocket": "rocket.jpg",
    "page": "page.png",
    "ihc": "ihc.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "cell": "cell.png",
}

PHOTOGRAPHS = tuple(_FILES)
TEST_PHOTOGRAPHS = ("camera", "chelsea", "coins", "gravel", "moon")
TRAIN_PHOTOGRAPHS = tuple(name for name in PHOTOGRAPHS if name not in TEST_PHOTOGRAPHS)


def photographs(size: int = 128, names: Sequence[str] = PHOTOGRAPHS, dtype=np.float32) -> np.ndarray:
    """Grey photographs in [0, 1], the centre ``size`` x ``size`` pixels of each, without network access.

    Eight bits divided by 255; colours to grey with scikit-image's ``rgb2gray`` (0.2125 R + 0.7154 G + 0.0721 B).

    Args:
        size: side of the crops in pixels; at most 191 if all photographs are read (the height of ``page``).
        names: entries of :data:`PHOTOGRAPHS`, such as :data:`TRAIN_PHOTOGRAPHS` and :data:`TEST_PHOTOGRAPHS`, which
            share no image.
        dtype: floating dtype of the result.

    Returns:
        Array of shape (len(names), size, size), in the order of ``names``.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: a name is unknown, there is none, or ``size`` does not fit into a photograph.
        FileNotFoundError: the installed scikit-image comes without one of the files.

    >>> images = photographs(64, names=["camera", "coins"])
    >>> images.shape, images.dtype, bool(images.min() >= 0 and images.max() <= 1)
    ((2, 64, 64), dtype('float32'), True)
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in _FILES]
    if unknown or not names:
        raise ValueError(f"`names` has {unknown or 'no entries'}: choose some of {', '.join(PHOTOGRAPHS)}.")
    return np.stack([centre_crop(_grey_photograph(name), size, name) for name in names]).astype(dtype)


def centre_crop(image: np.ndarray, size: int, name: str = "the image") -> np.ndarray:
    """The ``size`` x ``size`` pixels at the centre of an image (..., height, width), as a view; where a margin is odd,
    its larger half is cut off at the bottom or the right.

    Raises:
        ValueError: ``size`` is not positive, or the image, called ``name`` in the message, is smaller.

    >>> centre_crop(np.arange(20).reshape(4, 5), 2)
    array([[ 6,  7],
           [11, 12]])
    """
    height, width = _checked_extent(image, size, name)
    top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size]


def crops(image: np.ndarray, size: int, n: int, rng: np.random.Generator | int) -> np.ndarray:
    """``n`` independent ``size`` x ``size`` crops of an image, each position equally likely.

    Args:
        image: array (height, width) or (channels, height, width).
        size: side of the crops in pixels.
        n: how many, at least 1; crops may overlap or coincide.
        rng: NumPy generator, which is advanced, or an integer seed.

    Returns:
        Array of shape (n, size, size) or (n, channels, size, size), of the dtype of ``image``.

    Raises:
        ValueError: ``size`` or ``n`` is not positive, or the image is smaller than ``size``.

    >>> crops(np.zeros((32, 48)), 16, 5, rng=0).shape
    (5, 16, 16)
    """
    height, width = _checked_extent(image, size, "the image")
    if n < 1:
        raise ValueError(f"`n` is {n}: ask for at least one crop.")
    rng = np.random.default_rng(rng)
    tops, lefts = rng.integers(height - size + 1, size=n), rng.integers(width - size + 1, size=n)
    return np.stack([image[..., i : i + size, j : j + size] for i, j in zip(tops, lefts, strict=True)])


def _checked_extent(image, size, name):
    shape = np.shape(image)
    if size < 1:
        raise ValueError(f"`size` is {size}: give a positive number of pixels.")
    if len(shape) < 2 or min(shape[-2:]) < size:
        raise ValueError(f"`size` is {size}, but {name} has shape {shape}: choose a smaller size or leave it out.")
    return shape[-2:]


def _grey_photograph(name):
    """One photograph as a float64 array in [0, 1], read from the package's own folder.

    Not through ``skimage.data.NAME()``: that falls back to a download when a file is absent or altered.
    """
    try:
        from importlib.resources import files

        from PIL import Image
        from skimage.color import rgb2gray

        path = files("skimage") / "data" / _FILES[name]
    except ImportError as error:
        raise ImportError(
            "photographs() reads files of scikit-image, which is missing: pip install 'jbilevel[examples]'."
        ) from error
    if not path.is_file():
        raise FileNotFoundError(
            f"The installed scikit-image comes without {_FILES[name]}: leave {name!r} out of `names`, "
            "or install scikit-image 0.26."
        )
    with path.open("rb") as stream, Image.open(stream, formats=("PNG", "JPEG")) as picture:
        pixels = np.asarray(picture, dtype=np.float64) / 255
    return rgb2gray(pixels) if pixels.ndim == 3 else pixels
