"""Variables of MATLAB files, version 5 to 7, in which some data sets keep labels and lists.

SciPy's reader believes what these files announce: damaged ones have crashed it, kept it busy for good or made it ask
for gigabytes. This one takes memory only for what is there. The format is level 5 of MathWorks, MAT-File Format.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .files import Unusable, named

MAX_BYTES = 100_000_000
_KIND = "MATLAB file of version 5 to 7"
_MATRIX, _COMPRESSED = 14, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # of elements
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _OBJECT, _CHAR, _SPARSE, _OPAQUE = 1, 2, 3, 4, 5, 17
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
_COMPLEX = 0x800
_MAX_AXES, _MAX_FIELDS, _MAX_DEPTH = 32, 4096, 64
_OBJECT_BYTES = 200  # about what Python takes for an array, a string or an entry of a structure, without its content


def read_mat(path, names: tuple[str, ...], max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """The variables ``names`` of a MATLAB file; nothing in the file is executed.

    Numbers come as arrays of their class, logical ones as uint8, cells as object arrays, structures as arrays with a
    field of objects for each of theirs, and text as strings by row; all with at least two axes, but for text, whose
    last axis is inside the strings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not of version 5 to 7, larger than ``max_bytes`` when unpacked, or lacks one of
            the variables; or one of them is sparse, an object or a function.
    """
    path, found = Path(path), {}
    with named(path, _KIND), path.open("rb") as stream:
        head = stream.read(128)
        if len(head) < 128 or head[126:128] not in (b"IM", b"MI"):
            raise Unusable(f"is damaged, or no {_KIND}: it has no header of one.")
        reader = _Reader("<" if head[126:128] == b"IM" else ">", max_bytes)
        if reader.numbers(head[124:126], "u2")[0] >> 8 != 1:
            raise Unusable("is of version 7.3, or of none that is known: write it again with save -v7.")
        content = memoryview(stream.read(max_bytes + 1))
        reader.spend(len(content))
        while content:
            kind, part, content = reader.element(content)
            if kind == _COMPRESSED:
                kind, part, _ = reader.element(reader.unpacked(part))
            if kind != _MATRIX:
                raise ValueError(f"it has an element of type {kind} in place of a variable")
            name, matrix = reader.header(part)
            if name in names:
                found[name] = reader.value(matrix)
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"{path} has no variable {missing[0]!r}: it is another file than expected.")
    return found


class _Matrix(NamedTuple):
    """What stands in front of the content of a variable, a cell or a field."""

    kind: int
    is_complex: bool
    shape: tuple[int, ...]
    size: int
    rest: memoryview


class _Reader:
    """Takes a file apart, and keeps account of the memory that may still be taken."""

    def __init__(self, order: str, max_bytes: int):
        self.order, self.max_bytes, self.left = order, max_bytes, 2 * max_bytes

    def spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0 or size > self.max_bytes:
            raise Unusable(f"unpacks to more than {self.max_bytes} bytes.")

    def numbers(self, part, dtype: str) -> np.ndarray:
        return np.frombuffer(part, np.dtype(self.order + dtype))

    def element(self, content: memoryview) -> tuple[int, memoryview, memoryview]:
        """The type and content of the first data element, and what comes after it."""
        if len(content) < 8:
            raise ValueError("it ends early")
        kind, size = struct.unpack(f"{self.order}2I", content[:8])
        if kind >> 16:  # up to four bytes lie in the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, 4, 8
            if size > 4:
                raise ValueError(f"a small element announces {size} bytes")
        else:
            start, end = 8, 8 + size if kind == _COMPRESSED else 8 + -(-size // 8) * 8
        if start + size > len(content):
            raise ValueError(f"it ends early: {len(content) - start} bytes are left of {size} announced")
        return kind, content[start : start + size], content[end:]

    def unpacked(self, part: memoryview) -> memoryview:
        unpack = zlib.decompressobj()
        content = unpack.decompress(part, self.max_bytes + 1)
        self.spend(len(content))
        if not unpack.eof:
            raise ValueError("a compressed variable ends early")
        return memoryview(content)

    def header(self, part: memoryview) -> tuple[str, _Matrix]:
        """The name of a matrix and what stands in front of its content."""
        _, flags, rest = self.element(part)
        word = int(self.numbers(flags, "u4")[0])
        if word & 0xFF == _OPAQUE:  # has no shape; refused by its name, if it is asked for
            return bytes(self.element(rest)[1]).decode("latin-1"), _Matrix(_OPAQUE, False, (0, 0), 0, rest)
        _, dims, rest = self.element(rest)
        _, name, rest = self.element(rest)
        shape = tuple(self.numbers(dims, "i4").tolist())
        if not 2 <= len(shape) <= _MAX_AXES or min(shape) < 0:
            raise ValueError(f"it announces the shape {shape[: _MAX_AXES + 1]}")
        return bytes(name).decode("latin-1"), _Matrix(word & 0xFF, bool(word & _COMPLEX), shape, math.prod(shape), rest)

    def value(self, matrix: _Matrix, depth: int = 0) -> np.ndarray:
        if depth > _MAX_DEPTH:
            raise Unusable(f"has more than {_MAX_DEPTH} cells or structures in each other.")
        if matrix.kind in _CLASSES:
            return self._numeric(matrix)
        if matrix.kind == _CHAR:
            return self._text(matrix)
        if matrix.kind == _CELL:
            return self._cells(matrix, depth)
        if matrix.kind == _STRUCT:
            return self._structure(matrix, depth)
        what = {_SPARSE: "a sparse matrix: save full(A)", _OBJECT: "an object: save its fields"}
        raise Unusable(f"holds {what.get(matrix.kind, 'a function or an object: save numbers, cells and structures')}.")

    def _numeric(self, matrix):
        dtype = np.dtype(_CLASSES[matrix.kind])
        values, rest = self._part(matrix.rest, matrix.size, dtype)
        if matrix.is_complex:
            both = values.astype(np.result_type(dtype, np.complex64))
            both.imag, _ = self._part(rest, matrix.size, dtype)
            values = both
        return values.reshape(matrix.shape, order="F")

    def _part(self, content, size, dtype):
        """Numbers, which may be packed as those of a smaller type."""
        kind, part, rest = self.element(content)
        if kind not in _NUMBERS:
            raise ValueError(f"it has an element of type {kind} in place of numbers")
        packed = self.numbers(part, _NUMBERS[kind])
        if packed.size != size:
            raise ValueError(f"it announces {size} numbers and holds {packed.size}")
        self.spend(size * dtype.itemsize + _OBJECT_BYTES)
        return packed.astype(dtype), rest

    def _text(self, matrix):
        if not matrix.size:
            return np.zeros(0, "U1")
        kind, part, _ = self.element(matrix.rest)
        if kind not in _TEXTS:
            raise ValueError(f"it has an element of type {kind} in place of text")
        self.spend(8 * len(part) + _OBJECT_BYTES)
        wide = _TEXTS[kind] in ("utf-16", "utf-32")
        letters = bytes(part).decode(_TEXTS[kind] + ("-le" if self.order == "<" else "-be") * wide)
        if len(letters) != matrix.size:
            raise ValueError(f"it announces {matrix.size} letters and holds {len(letters)}")
        rows = np.frombuffer(letters.encode("utf-32-le"), "<U1").reshape(matrix.shape, order="F")
        return np.ascontiguousarray(rows).view(f"<U{matrix.shape[-1]}")[..., 0]

    def _cells(self, matrix, depth):
        self._announced(matrix.size, matrix.rest)
        cells, rest = np.empty(matrix.size, object), matrix.rest
        for k in range(matrix.size):
            cells[k], rest = self._child(rest, depth)
        return cells.reshape(matrix.shape, order="F")

    def _structure(self, matrix, depth):
        _, length, rest = self.element(matrix.rest)
        _, content, rest = self.element(rest)
        width = int(self.numbers(length, "i4")[0])
        if width < 1 or len(content) % width or len(content) // width > _MAX_FIELDS:
            raise ValueError(f"it announces names of {width} letters in {len(content)} bytes")
        raw = [bytes(content[k : k + width]) for k in range(0, len(content), width)]
        names = [name.split(b"\0")[0].decode("latin-1") for name in raw]
        self._announced(matrix.size * max(1, len(names)), rest if names else b"")
        values = np.empty(matrix.size, [(name, object) for name in names])
        for k in range(matrix.size):
            for name in names:
                values[name][k], rest = self._child(rest, depth)
        return values.reshape(matrix.shape, order="F")

    def _announced(self, count, content):
        """Refuse more entries than there are bytes for: each has a tag at least."""
        if 8 * count > len(content):
            raise ValueError(f"it announces {count} entries in {len(content)} bytes")
        self.spend(count * _OBJECT_BYTES)

    def _child(self, content, depth):
        kind, part, rest = self.element(content)
        if kind != _MATRIX:
            raise ValueError(f"it has an element of type {kind} in place of an entry")
        if not part:
            return np.zeros((0, 0)), rest
        return self.value(self.header(part)[1], depth + 1), rest
