"""The binary files of CIFAR-10."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .files import missing_file
from .samples import LabelledImages, check_choice, check_limit

_FILES = {"train": tuple(f"data_batch_{k}.bin" for k in range(1, 6)), "test": ("test_batch.bin",)}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TREE = """\
  data_batch_1.bin ... data_batch_5.bin   test_batch.bin
or with a folder cifar-10-batches-bin of these: what cifar-10-binary.tar.gz unpacks to."""
_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue pixels


def cifar10(root, split: str = "train", *, limit: int | None = None) -> LabelledImages:
    """Small colour photographs of ten classes, with the official split, from the **binary** version.

    Args:
        root: folder of the ``.bin`` files, or the one that holds ``cifar-10-batches-bin``.
        split: "train" (50,000 images: 614 MB) or "test" (10,000).
        limit: read the first ``limit`` images only.

    Returns:
        Images (n, 3, 32, 32), labels and names of the classes.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ``root`` holds the Python version, which is pickled: reading it could execute anything; ``split`` or
            ``limit`` is unknown or not positive; a file is truncated, empty, larger than any of CIFAR-10 or has a
            label above 9.

    Reference:
        Krizhevsky, Learning multiple layers of features from tiny images, technical report, 2009.

    >>> import tempfile
    >>> from pathlib import Path
    >>> root = Path(tempfile.mkdtemp())
    >>> np.zeros((2, 1 + 3 * 32 * 32), np.uint8).tofile(root / "test_batch.bin")  # a label and three colours of pixels
    >>> images, labels, classes = cifar10(root, "test")
    >>> images.shape, classes[labels[0]]
    ((2, 3, 32, 32), 'airplane')
    """
    check_choice("split", split, tuple(_FILES))
    check_limit(limit)
    folder, left, parts = _folder(Path(root)), limit, []
    for name in _FILES[split]:
        if left is None or left > 0:
            parts.append(_records(folder / name, left))
            left = None if left is None else left - len(parts[-1])
    records = np.concatenate(parts)
    images = records[:, 1:].reshape(-1, 3, 32, 32) / np.float32(255)
    return LabelledImages(images, records[:, 0].astype(np.int32), _CLASSES)


def _records(path, limit):
    if not path.is_file():
        raise missing_file(path, _TREE)
    size = path.stat().st_size
    if size == 0 or size % _RECORD or size > 10_000 * _RECORD:
        raise ValueError(
            f"{path} has {size} bytes: a file of CIFAR-10 has at most 10,000 records of {_RECORD}. Download it again."
        )
    records = np.fromfile(path, np.uint8, count=-1 if limit is None else limit * _RECORD).reshape(-1, _RECORD)
    if records[:, 0].max() > 9:
        raise ValueError(f"{path} has the label {records[:, 0].max()}, above 9: it is no file of CIFAR-10.")
    return records


def _folder(root):
    for folder in (root, root / "cifar-10-batches-bin"):
        if (folder / "data_batch_1.bin").exists() or (folder / "test_batch.bin").exists():
            return folder
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / "data_batch_1").exists() or (folder / "test_batch").exists():
            raise ValueError(
                f"{folder} holds the Python version of CIFAR-10, which is pickled: reading it could execute anything. "
                "Get the binary version, cifar-10-binary.tar.gz."
            )
    raise missing_file(root / "data_batch_1.bin", _TREE)
