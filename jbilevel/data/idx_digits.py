"""The idx files of MNIST and of sets in its form (Fashion-MNIST, KMNIST)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from .files import Unusable, missing_file, named, opened, read_exactly
from .samples import LabelledImages, check_choice, check_limit

_FILES = {"train": "train", "test": "t10k"}
_TREE = """\
  train-images-idx3-ubyte   train-labels-idx1-ubyte
  t10k-images-idx3-ubyte    t10k-labels-idx1-ubyte
as they come, with .gz, or unpacked."""
_MAX_BYTES = 200_000_000  # 250,000 digits, and 0.8 GB in single precision


def mnist(root, split: str = "train", *, limit: int | None = None, max_bytes: int = _MAX_BYTES) -> LabelledImages:
    """Handwritten digits, with the official split.

    Args:
        root: folder of the files ``train-images-idx3-ubyte`` and so on, packed with gzip (``.gz``) or not; where both
            are there, the one that is not packed is read.
        split: "train" or "test".
        limit: read the first ``limit`` images only.
        max_bytes: refuse files that announce more.

    Returns:
        Images (n, 28, 28), their labels and the digits as classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``split`` or ``limit`` is unknown or not positive; a file is damaged, truncated, not an idx file,
            too large, or images and labels differ in number.

    Reference:
        LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, Proc. IEEE 86, 1998.

    >>> import tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> head = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28])  # bytes of three axes, (2, 28, 28)
    >>> _ = (root / "train-images-idx3-ubyte").write_bytes(head + bytes(2 * 28 * 28))
    >>> _ = (root / "train-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + bytes([7, 3]))
    >>> digits = mnist(root)
    >>> digits.images.shape, digits.labels.tolist()
    ((2, 28, 28), [7, 3])
    """
    check_choice("split", split, tuple(_FILES))
    check_limit(limit)
    stem = Path(root) / _FILES[split]
    image_path, label_path = _existing(f"{stem}-images-idx3-ubyte"), _existing(f"{stem}-labels-idx1-ubyte")
    images, n_images = read_idx(image_path, 3, limit, max_bytes)
    labels, n_labels = read_idx(label_path, 1, limit, max_bytes)
    if n_images != n_labels:
        raise ValueError(f"{image_path} has {n_images} images, but {label_path} has {n_labels} labels.")
    if labels.max() > 9:
        raise ValueError(f"{label_path} has the label {labels.max()}: digits are 0, ..., 9.")
    return LabelledImages(images / np.float32(255), labels.astype(np.int32), tuple("0123456789"))


def read_idx(path, ndim: int, limit: int | None = None, max_bytes: int = _MAX_BYTES) -> tuple[np.ndarray, int]:
    """The array of uint8 in an idx file, and the length of its first axis before ``limit``.

    Of a packed file, no more is unpacked than what the header announces.

    Args:
        path: of the file, packed if it ends in ``.gz``.
        ndim: the number of axes that is expected.
        limit: read the first entries only.
        max_bytes: refuse a header that announces more than this for what is to be read.

    Raises:
        ValueError: the file is no idx file of ``ndim`` axes of bytes, is damaged, too short, too long or too large.
    """
    path = Path(path)
    with named(path, f"idx file of bytes with {ndim} axes"), opened(path) as stream:
        head = stream.read(4 + 4 * ndim)
        if head[:4] != bytes([0, 0, 8, ndim]) or len(head) != 4 + 4 * ndim:
            raise Unusable(f"does not begin like an idx file of bytes with {ndim} axes: it is another file.")
        shape = tuple(int(n) for n in np.frombuffer(head[4:], ">u4"))
        total, wanted = shape[0], min(shape[0], limit or shape[0])
        size = wanted * math.prod(shape[1:])
        if not size:
            raise Unusable(f"is empty: its shape is {shape}.")
        if size > max_bytes:
            raise Unusable(f"announces the shape {shape}, more than `max_bytes`={max_bytes}: set `limit`.")
        content = read_exactly(stream, size)
        if wanted == total and stream.read(1):  # the end, at which gzip compares its checksum
            raise Unusable(f"is longer than its shape {shape} says: download it again.")
    return np.frombuffer(content, np.uint8).reshape(wanted, *shape[1:]), total


def _existing(path):
    for candidate in (Path(path), Path(f"{path}.gz")):
        if candidate.is_file():
            return candidate
    raise missing_file(path, _TREE)
