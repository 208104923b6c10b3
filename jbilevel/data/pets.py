"""Cats and dogs by breed: the Oxford-IIIT Pet data set and Stanford Dogs."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from .files import checked_root, inside, read_text
from .matlab import read_mat
from .pictures import read_label_picture, read_picture
from .samples import (
    IGNORED,
    MAX_PIXELS,
    Labelled,
    Samples,
    check_choice,
    check_limit,
    check_same_size,
)

_OXFORD_TREE = """\
  images/Abyssinian_1.jpg ...
  annotations/trainval.txt   annotations/test.txt   annotations/trimaps/Abyssinian_1.png ...
images.tar.gz and annotations.tar.gz, unpacked into one folder."""

_STANFORD_TREE = """\
  Images/n02085620-Chihuahua/n02085620_7.jpg ...
  train_list.mat   test_list.mat   (or in a folder lists)
images.tar and lists.tar, unpacked into one folder."""

_MAX_LIST_BYTES = 20_000_000


class Pet(NamedTuple):
    """A photograph of the Oxford-IIIT Pet data set.

    Attributes:
        image: float32 (3, height, width) in [0, 1].
        label: number of the breed, 0, ..., 36.
        labels: uint8 (height, width): 1 on the pet, 0 on the background, 255 on the border between them, which the
            trimaps leave open.
        name: of the file.

    >>> pet = Pet(np.zeros((3, 6, 8), np.float32), 36, np.zeros((6, 8), np.uint8), "yorkshire_terrier_9.jpg")
    >>> pet.image.shape, pet.label, int(np.sum(pet.labels == 1))
    ((3, 6, 8), 36, 0)
    """

    image: np.ndarray
    label: int
    labels: np.ndarray
    name: str


def oxford_pets(root, split: str = "trainval", *, limit: int | None = None, max_pixels: int = MAX_PIXELS) -> Samples:
    """37 breeds of cats and dogs with trimaps, with the official split.

    Args:
        root: folder of ``images`` and ``annotations``.
        split: "trainval" (3680) or "test" (3669).
        limit: the first ``limit`` of the official list; the list goes breed by breed.
        max_pixels: refuse larger pictures.

    Returns:
        Entries of :class:`Pet`, read when they are asked for; ``classes`` names the breeds of the whole list.

    Raises:
        FileNotFoundError: a folder or list is missing; on reading, an image or a trimap is.
        ValueError: ``split`` or ``limit`` is unknown or not positive; a list is damaged or names files elsewhere; on
            reading, a file is damaged, or image and trimap do not match in size.
        ImportError: Pillow is not installed.

    Reference:
        Parkhi, Vedaldi, Zisserman, Jawahar, Cats and dogs, CVPR 2012.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root = Path(tempfile.mkdtemp())
    >>> for folder in ("images", "annotations/trimaps"):
    ...     (root / folder).mkdir(parents=True)
    >>> Image.new("RGB", (8, 6)).save(root / "images/Bengal_1.jpg")
    >>> Image.new("L", (8, 6), 2).save(root / "annotations/trimaps/Bengal_1.png")  # 2: background
    >>> _ = (root / "annotations/trainval.txt").write_text("Bengal_1 6 1 5")
    >>> (pet,) = oxford_pets(root)
    >>> pet.label, pet.image.shape, int(pet.labels.max())
    (5, (3, 6, 8), 0)
    """
    check_choice("split", split, ("trainval", "test"))
    check_limit(limit)
    root = checked_root(root, ("images", "annotations/trimaps", f"annotations/{split}.txt"), _OXFORD_TREE)
    source = root / "annotations" / f"{split}.txt"
    keys, breeds = [], {}
    for name, label in _oxford_list(source):
        paths = inside(root, f"images/{name}.jpg", source), inside(root, f"annotations/trimaps/{name}.png", source)
        keys.append((*paths, label))
        breeds[label] = name.rpartition("_")[0]
    return Samples(tuple(keys[:limit]), partial(_pet, max_pixels=max_pixels), _names(breeds))


def _pet(key, max_pixels):
    image_path, trimap_path, label = key
    image = read_picture(image_path, False, max_pixels)
    trimap = read_label_picture(trimap_path, max_pixels)
    check_same_size(image_path, image.shape[-2:], trimap_path, trimap.shape)
    if not np.all((trimap >= 1) & (trimap <= 3)):
        raise ValueError(f"{trimap_path} has values other than 1 (pet), 2 (background) and 3 (border).")
    return Pet(image, label, np.array([0, 1, 0, IGNORED], np.uint8)[trimap], image_path.name)


def _names(breeds):
    return tuple(breeds.get(k, "") for k in range(max(breeds) + 1))


def _oxford_list(path):
    """Names and breeds, from 0, in the lines of a list: name, breed from 1, and two more numbers."""
    entries = []
    for number, line in enumerate(read_text(path, _MAX_LIST_BYTES).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 4 or not words[1].isdecimal() or not 1 <= int(words[1]) <= 37:
            raise ValueError(f"{path}, line {number}: expected a name, a breed in 1, ..., 37 and two more numbers.")
        entries.append((words[0], int(words[1]) - 1))
    if not entries:
        raise ValueError(f"{path} is empty: unpack annotations.tar.gz again.")
    return entries


def stanford_dogs(root, split: str = "train", *, limit: int | None = None, max_pixels: int = MAX_PIXELS) -> Samples:
    """120 breeds of dogs, with the official split.

    Args:
        root: folder of ``Images`` and of the official lists ``train_list.mat`` and ``test_list.mat``.
        split: "train" (12,000) or "test" (8,580).
        limit: the first ``limit`` of the official list; the list goes breed by breed.
        max_pixels: refuse larger pictures.

    Returns:
        Entries of :class:`Labelled`, read when they are asked for; ``classes`` names the breeds of the whole list.

    Raises:
        FileNotFoundError: a folder or list is missing; on reading, an image is.
        ValueError: ``split`` or ``limit`` is unknown or not positive; the list is damaged or names files elsewhere; on
            reading, a file is damaged or too large.
        ImportError: Pillow is not installed.

    Reference:
        Khosla, Jayadevaprakash, Yao, Fei-Fei, Novel dataset for fine-grained image categorization, FGVC at CVPR 2011.

    >>> import tempfile, scipy.io
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> root, name = Path(tempfile.mkdtemp()), "n02085620-Chihuahua/n02085620_7.jpg"
    >>> (root / "Images" / name).parent.mkdir(parents=True)
    >>> Image.new("RGB", (8, 6)).save(root / "Images" / name)
    >>> cells = np.array([[name]], object)
    >>> scipy.io.savemat(root / "train_list.mat", {"file_list": cells, "labels": np.array([[1]], np.uint8)})
    >>> dogs = stanford_dogs(root)
    >>> dogs.classes, dogs[0].image.shape
    (('Chihuahua',), (3, 6, 8))
    """
    check_choice("split", split, ("train", "test"))
    check_limit(limit)
    root = checked_root(root, ("Images",), _STANFORD_TREE)
    source = next((p for p in (root / "lists" / f"{split}_list.mat", root / f"{split}_list.mat") if p.exists()), None)
    checked_root(root, () if source else (f"{split}_list.mat",), _STANFORD_TREE)
    content = read_mat(source, ("file_list", "labels"), _MAX_LIST_BYTES)
    try:
        names = [str(np.asarray(cell).item()) for cell in content["file_list"].ravel()]
        numbers = content["labels"].ravel().tolist()
        labels = [int(v) - 1 for v in numbers]
        if any(k + 1 != v for k, v in zip(labels, numbers, strict=True)):
            raise ValueError("labels are whole numbers")
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{source} does not hold lists of names and numbers: {error}") from error
    if len(names) != len(labels) or not names or not all(0 <= k < 120 for k in labels):
        raise ValueError(
            f"{source} has {len(names)} names and {len(labels)} labels: expected one in 1, ..., 120 for each."
        )
    keys = [(inside(root / "Images", name, source), label) for name, label in zip(names, labels, strict=True)]
    breeds = {label: path.parent.name.partition("-")[2] for path, label in keys}
    return Samples(tuple(keys[:limit]), partial(_dog, max_pixels=max_pixels), _names(breeds))


def _dog(key, max_pixels):
    path, label = key
    return Labelled(read_picture(path, False, max_pixels), label, path.name)
