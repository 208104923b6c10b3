"""What all readers share: samples that are read when they are asked for, splits by patient, checked arguments."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IGNORED = 255  # label of pixels that belong to no class
MAX_PIXELS = 50_000_000  # of one picture: 200 MB in single precision


class Labelled(NamedTuple):
    """An image with its class.

    Attributes:
        image: float32 (3, height, width) in [0, 1].
        label: number of the class, from 0.
        name: of the file.

    >>> sample = Labelled(np.zeros((3, 6, 8), np.float32), 7, "dog.jpg")
    >>> image, label, name = sample
    >>> image.shape, label, name
    ((3, 6, 8), 7, 'dog.jpg')
    """

    image: np.ndarray
    label: int
    name: str


class Segmented(NamedTuple):
    """An image with a class for each pixel.

    Attributes:
        image: float32 (3, height, width) in [0, 1].
        labels: uint8 (height, width), :data:`IGNORED` = 255 where a pixel belongs to no class.
        name: of the file.

    >>> sample = Segmented(np.zeros((3, 6, 8), np.float32), np.full((6, 8), IGNORED, np.uint8), "street.png")
    >>> int(np.sum(sample.labels != IGNORED))  # pixels that count
    0
    """

    image: np.ndarray
    labels: np.ndarray
    name: str


class LabelledImages(NamedTuple):
    """Small images in memory, with their classes.

    Attributes:
        images: float32 in [0, 1], (n, height, width) or (n, 3, height, width).
        labels: int32 (n,), from 0.
        classes: name of each class.

    >>> digits = LabelledImages(np.zeros((2, 28, 28), np.float32), np.array([3, 1], np.int32), tuple("0123456789"))
    >>> [digits.classes[label] for label in digits.labels]
    ['3', '1']
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Samples(Sequence):
    """A sequence whose entries are read from their files each time they are asked for, and not kept.

    ``samples[i]`` reads one entry, ``samples[a:b]`` is a shorter sequence that has read nothing yet, ``select`` one of
    chosen entries; ``len`` and iteration as usual. All methods raise what the reader of an entry raises.

    Those of this package can be pickled, and so be read by other processes.

    Attributes:
        keys: what tells the reader which entry to read, such as paths.
        read: reads the entry of a key; a function of a module, or ``functools.partial`` of one, can be pickled.
        classes: names of the classes, where there are any.

    >>> squares = Samples((1, 2, 3, 4), lambda key: key**2)
    >>> print(len(squares), squares[-1], list(squares[1:3]), list(squares.select([3, 0])))
    4 16 [4, 9] [16, 1]
    """

    keys: tuple
    read: Callable[[Any], Any]
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Samples(self.keys[index], self.read, self.classes)
        return self.read(self.keys[index])

    def __iter__(self) -> Iterator:
        # Not by __getitem__ until IndexError, as Sequence does: a reader that raises one would end the iteration.
        return map(self.read, self.keys)

    def select(self, indices: Sequence[int]) -> Samples:
        """The entries of some indices, such as those of :func:`split_by_patient`."""
        return Samples(tuple(self.keys[i] for i in indices), self.read, self.classes)


def split_by_patient(
    patients: Sequence[Hashable], fractions: Sequence[float], rng: np.random.Generator | int
) -> tuple[list[int], ...]:
    """Indices of random parts that share no patient: neighbouring slices of one body in two parts would leak.

    Args:
        patients: the patient of each sample.
        fractions: share of the patients in each part; they add up to 1. Numbers of patients are rounded, but no part
            with a positive share is left empty.
        rng: NumPy generator, which is advanced, or an integer seed.

    Returns:
        For each part its indices into ``patients``, ascending.

    Raises:
        ValueError: the fractions are negative or do not add up to 1, or there are fewer patients than parts.

    >>> patients = ["a", "a", "b", "c", "c", "d"]
    >>> train, test = split_by_patient(patients, (0.75, 0.25), rng=0)
    >>> print(sorted(train + test), {patients[i] for i in train} & {patients[i] for i in test})
    [0, 1, 2, 3, 4, 5] set()
    """
    shares = np.asarray(fractions, np.float64)
    if not (shares.ndim == 1 and np.all(shares >= 0) and np.isclose(shares.sum(), 1)):
        raise ValueError(f"`fractions` is {shares.tolist()}: give shares that are not negative and add up to 1.")
    names = list(dict.fromkeys(patients))
    wanted = shares > 0
    if len(names) < wanted.sum():
        raise ValueError(f"`patients` has {len(names)} different patients, fewer than the {wanted.sum()} parts.")
    # Each part one patient, and then one by one to the part that lacks most.
    sizes = wanted.astype(int)
    while sizes.sum() < len(names):
        sizes[np.argmax(np.where(wanted, shares * len(names) - sizes, -np.inf))] += 1
    order = np.random.default_rng(rng).permutation(len(names))
    part_of = {names[k]: part for part, some in enumerate(np.split(order, np.cumsum(sizes)[:-1])) for k in some}
    return tuple([i for i, p in enumerate(patients) if part_of[p] == part] for part in range(len(shares)))


def check_choice(name: str, value, choices: Sequence) -> None:
    """Raises ValueError when ``value``, the argument ``name``, is not among ``choices``."""
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}: choose one of {', '.join(map(repr, choices))}.")


def check_limit(limit: int | None, name: str = "limit") -> int | None:
    """Raises ValueError when ``limit`` is neither None nor positive."""
    if limit is not None and limit < 1:
        raise ValueError(f"`{name}` is {limit}: give a positive number, or None.")
    return limit


def check_same_size(path, shape: tuple[int, ...], other, other_shape: tuple[int, ...]) -> None:
    """Raises ValueError when an image and its labels do not cover the same pixels."""
    if tuple(shape) != tuple(other_shape):
        raise ValueError(f"{path} has {shape} pixels, but {other} has {other_shape}: they do not belong together.")


def paired(images: dict[str, Path], labels: dict[str, Path], image_folder, label_folder) -> list[tuple[Path, Path]]:
    """Images and labels of the same key, in the order of the keys.

    Raises:
        ValueError: an image has no labels, or labels have no image, with the number of such and the first one.
    """
    for some, others, here, there in (
        (images, labels, image_folder, label_folder),
        (labels, images, label_folder, image_folder),
    ):
        lonely = sorted(some.keys() - others.keys())
        if lonely:
            raise ValueError(
                f"{len(lonely)} of the {len(some)} files in {here} have no counterpart in {there}, "
                f"such as {some[lonely[0]].name}: copy the missing files, or remove the others."
            )
    return [(images[key], labels[key]) for key in sorted(images)]
