"""Arrays that hash and compare by their content, so that an operator may have one as a field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jbilevel._core import brief


@dataclass(frozen=True)
class FrozenArray:
    """A constant array: its bytes, shape and dtype. Python computes the hash of ``content`` once and keeps it.

    >>> import numpy as np
    >>> frozen(np.eye(2)) == frozen(np.eye(2)), hash(frozen(np.eye(2))) == hash(frozen(np.eye(2)))
    (True, True)
    """

    content: bytes
    shape: tuple[int, ...]
    dtype: str

    @property
    def array(self) -> np.ndarray:
        """The array, read-only and without a copy."""
        return np.frombuffer(self.content, self.dtype).reshape(self.shape)

    def __repr__(self):
        return brief.brief(self.array)


def frozen(values) -> FrozenArray:
    """An array, or anything numpy makes one of, as a `FrozenArray`."""
    if isinstance(values, FrozenArray):
        return values
    values = np.ascontiguousarray(values).reshape(np.shape(values))  # the former makes scalars vectors
    return FrozenArray(values.tobytes(), values.shape, values.dtype.str)


def frozen_mask(mask, name: str = "mask") -> FrozenArray:
    """A mask of booleans or of zeros and ones, with at least one True.

    Raises:
      ValueError: other values, or nothing is kept.
    """
    values = mask.array if isinstance(mask, FrozenArray) else np.asarray(mask)
    kept = values.astype(bool)
    if not np.array_equal(kept, values):
        raise ValueError(f"`{name}` must contain booleans or zeros and ones only: threshold it first.")
    if not kept.any():
        raise ValueError(f"`{name}` keeps nothing: at least one entry must be True.")
    return frozen(kept)


def frozen_field(values, name: str, kind: str = "real") -> FrozenArray:
    """A finite array in double precision, complex only where ``kind`` is "complex".

    Raises:
      TypeError: complex or not numbers.
      ValueError: NaN, infinity, or no entry.
    """
    values = values.array if isinstance(values, FrozenArray) else np.asarray(values)
    wide = complex if kind == "complex" else float
    if not np.can_cast(values.dtype, wide, "safe") and values.dtype.kind not in "biu":
        raise TypeError(f"`{name}` must be an array of {kind} numbers, got {values.dtype}.")
    if values.size == 0 or not np.all(np.isfinite(values)):
        raise ValueError(f"`{name}` must be finite and not empty.")
    return frozen(values.astype(wide))
