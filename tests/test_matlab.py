"""The reader of MATLAB files against SciPy's on what SciPy writes, and on what it must not believe."""

import math
import struct
import zlib

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from jbilevel.data.matlab import read_mat

rng = np.random.default_rng(0)


def cells(entries, shape=None):
    array = np.empty(len(entries), object)
    array[:] = entries
    return array.reshape(shape or (1, len(entries)))


VALUES = {
    **{d: (rng.random((3, 4)) * 100).astype(d) for d in "f8 f4 i1 u1 i2 u2 i4 u4 i8 u8".split()},
    "logical": rng.random((2, 3)) > 0.5,
    "complex128": rng.random((2, 3)) + 1j * rng.random((2, 3)),
    "complex64": (rng.random((2, 3)) + 1j).astype(np.complex64),
    "infinite": np.array([1 + 1j * np.inf, np.nan - 1j]),
    "scalar": 3.5,
    "large integer": np.array([[2**53 + 1, -(2**63)]]),
    "row": np.arange(5),
    "three axes": rng.random((2, 3, 4)),
    "empty": np.zeros((0, 3)),
    "text": "plain",
    "letters": "hällo wörld €",
    "empty text": "",
    "rows of text": np.array(["ab", "cdef", "g"]),
    "cells": cells([1, "a", np.eye(2)]),
    "cells in cells": cells([1, "a", np.zeros((0, 0)), cells([3, cells(["x"])])], (2, 2)),
    "no cells": np.empty((0, 0), object),
    "structure": {"a": 1, "b": "text", "c": {"d": np.arange(3)}},
    "structures": np.array([(1, "x"), (2, "yz")], [("n", object), ("s", object)]),
    "structures in cells": cells([{"Boundaries": np.eye(3, dtype=np.uint8)}, {"Boundaries": np.ones((2, 2))}]),
}


def assert_same(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype.names == b.dtype.names
    if a.dtype.names:
        for name in a.dtype.names:
            assert_same(a[name], b[name])
    elif a.dtype == object:
        assert b.dtype == object
        for x, y in zip(a.ravel(), b.ravel(), strict=True):
            assert_same(x, y)
    else:
        assert a.dtype.kind == b.dtype.kind or a.dtype.kind in "iu"  # SciPy keeps the type of the bytes in the file
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_as_scipy_reads_it(tmp_path, value, packed):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"before": np.ones(3), "v": value, "w": 2}, do_compression=packed)
    found = read_mat(path, ("v", "w"))
    assert_same(scipy.io.loadmat(path)["v"], found["v"])
    assert found["w"] == 2 and set(found) == {"v", "w"}


def test_numbers_have_the_class_that_they_had_in_matlab(tmp_path):
    """MATLAB packs doubles that are small integers into bytes."""
    path = tmp_path / "a.mat"
    path.write_bytes(mat(matrix(6, (2, 3), element(2, bytes(range(6))))))
    (found,) = read_mat(path, ("v",)).values()
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, [[0, 2, 4], [1, 3, 5]])


def test_big_endian(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(mat(matrix(4, (1, 3), element(4, "aé€".encode("utf-16-be"), ">"), order=">"), order=">"))
    assert read_mat(path, ("v",))["v"].tolist() == ["aé€"]
    path.write_bytes(mat(matrix(10, (1, 2), element(3, struct.pack(">2h", 1, -2), ">"), order=">"), order=">"))
    assert read_mat(path, ("v",))["v"].tolist() == [[1, -2]]


@pytest.mark.parametrize(
    "value, words",
    [
        (scipy.sparse.eye_array(3, format="csc"), r"holds a sparse matrix: save full\(A\)"),
        (scipy.io.matlab.MatlabObject(np.zeros((1, 1), [("x", object)]), "inline"), "holds an object: save its fields"),
    ],
)
def test_what_is_not_read_is_refused_and_may_stand_beside(tmp_path, value, words):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"v": value, "w": 1})
    assert read_mat(path, ("w",))["w"] == 1
    with pytest.raises(ValueError, match=rf"a\.mat {words}"):
        read_mat(path, ("v",))


def test_a_string_object_may_stand_beside(tmp_path):
    """Newer classes of MATLAB have no shape in front of their name."""
    path = tmp_path / "a.mat"
    words = b"".join(element(1, word) for word in (b"new", b"MCOS", b"string"))
    opaque = element(14, element(6, struct.pack("<2I", 17, 0)) + words + matrix(13, (1, 1), element(6, bytes(4))))
    path.write_bytes(mat(opaque, matrix(6, (1, 1), element(9, struct.pack("<d", 3)))))
    assert read_mat(path, ("v",))["v"] == 3
    with pytest.raises(ValueError, match=r"a\.mat holds a function or an object"):
        read_mat(path, ("new",))


@pytest.mark.parametrize("content", [b"", b"x" * 200, b"MATLAB 7.3".ljust(124) + b"\0\2IM" + bytes(500)])
def test_other_files_are_named(tmp_path, content):
    path = tmp_path / "a.mat"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.mat is (damaged, or no MATLAB file|of version 7\.3)"):
        read_mat(path, ("v",))
    with pytest.raises(FileNotFoundError, match=r"b\.mat"):
        read_mat(tmp_path / "b.mat", ("v",))


# --- what is announced and not there


def element(kind, body, order="<"):
    return struct.pack(f"{order}2I", kind, len(body)) + body + bytes(-len(body) % 8)


def matrix(kind, dims, *parts, name=b"v", order="<"):
    head = element(6, struct.pack(f"{order}2I", kind, 0), order)
    head += element(5, struct.pack(f"{order}{len(dims)}i", *dims), order) + element(1, name, order)
    return element(14, head + b"".join(parts), order)


def mat(*variables, order="<"):
    mark = struct.pack(f"{order}H", 0x100) + (b"IM" if order == "<" else b"MI")
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + b"".join(variables)


def nested(depth):
    inner = matrix(6, (1, 1), element(9, bytes(8)))
    for _ in range(depth):
        inner = matrix(1, (1, 1), inner)
    return inner


EMPTY = element(14, b"")
HOSTILE = {
    "a billion cells": (matrix(1, (10**9, 1)), "announces 1000000000 entries in 0 bytes"),
    "cells of 2^62": (matrix(1, (2**31 - 1, 2**31 - 1)), "entries in 0 bytes"),
    "a billion numbers": (matrix(6, (10**9, 1), element(9, bytes(8))), "announces 1000000000 numbers and holds 1"),
    "negative": (matrix(6, (-2, -4), element(9, bytes(64))), r"announces the shape \(-2, -4\)"),
    "no axes": (matrix(6, (), element(9, bytes(64))), r"announces the shape \(\)"),
    "1000 axes": (matrix(6, (1,) * 1000, element(9, bytes(8))), "announces the shape"),
    "structures without fields": (
        matrix(2, (10**9, 1), element(5, struct.pack("<i", 32)), element(1, b"")),
        "announces 1000000000 entries in 0 bytes",
    ),
    "names of no letters": (matrix(2, (1, 1), element(5, bytes(4)), element(1, b"abc")), "names of 0 letters"),
    "a million fields": (
        matrix(2, (1, 1), element(5, struct.pack("<i", 1)), element(1, bytes(10**6))),
        "names of 1 letters in 1000000 bytes",
    ),
    "two fields of one name": (
        matrix(2, (1, 1), element(5, struct.pack("<i", 2)), element(1, b"a\0a\0"), EMPTY, EMPTY),
        "is damaged",
    ),
    "text that is longer": (matrix(4, (1, 5), element(16, b"abc")), "announces 5 letters and holds 3"),
    "text of doubles": (matrix(4, (1, 1), element(9, bytes(8))), "in place of text"),
    "numbers of letters": (matrix(6, (1, 1), element(16, bytes(8))), "in place of numbers"),
    "a cell that is none": (matrix(1, (1, 1), element(9, bytes(8))), "in place of an entry"),
    "a thousand levels": (nested(1000), "more than 64 cells or structures in each other"),
    "a function": (matrix(16, (1, 1), nested(0)), "holds a function or an object"),
    "a small element of 9 bytes": (matrix(6, (1, 1), struct.pack("<2I", 9 << 16 | 9, 0)), "announces 9 bytes"),
    "an end too early": (matrix(6, (1, 1), struct.pack("<2I", 9, 800)), "of 800 announced"),
    "no variable": (element(9, bytes(8)), "in place of a variable"),
    "packed, no end": (struct.pack("<2I", 15, 20) + zlib.compress(bytes(1000))[:20].ljust(20), "is damaged"),
    "packed twice": (element(15, zlib.compress(element(15, zlib.compress(bytes(99))))), "in place of a variable"),
}


@pytest.mark.parametrize("variable, words", HOSTILE.values(), ids=HOSTILE)
def test_announcements_are_compared_with_what_is_there(tmp_path, variable, words):
    path = tmp_path / "a.mat"
    path.write_bytes(mat(variable))
    with pytest.raises(ValueError, match=rf"a\.mat .*{words}"):
        read_mat(path, ("v",))


def test_fifty_levels_are_read(tmp_path):
    path = tmp_path / "a.mat"
    path.write_bytes(mat(nested(50)))
    value, depth = read_mat(path, ("v",))["v"], 0
    while value.dtype == object:
        value, depth = value[0, 0], depth + 1
    assert depth == 50 and value == 0


@pytest.mark.parametrize(
    "variable",
    [
        matrix(6, (200_000, 1), element(2, bytes(200_000))),  # bytes that stand for doubles
        matrix(1, (20_000, 1), EMPTY * 20_000),  # of which each costs more in memory than in the file
        matrix(6, (2000, 1000), element(2, bytes(2_000_000))),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_would_take_more_than_is_allowed_is_refused(tmp_path, variable, packed):
    path = tmp_path / "a.mat"
    small = zlib.compress(variable)
    path.write_bytes(mat(struct.pack("<2I", 15, len(small)) + small if packed else variable))
    with pytest.raises(ValueError, match=r"a\.mat unpacks to more than 1000000 bytes"):
        read_mat(path, ("v",), max_bytes=1_000_000)
    assert math.prod(read_mat(path, ("v",))["v"].shape) >= 20_000


def test_every_flipped_bit_is_read_or_named(tmp_path):
    """A file of which single flipped bits have crashed SciPy."""
    path = tmp_path / "a.mat"
    value = cells([{"Boundaries": np.eye(3, dtype=np.uint8), "text": "abc"}, np.array([1.5 + 2j]), "x"])
    scipy.io.savemat(path, {"v": value})
    sound = path.read_bytes()
    refused = 0
    for place in range(124, len(sound)):
        for bit in range(8):
            content = bytearray(sound)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            try:
                read_mat(path, ("v",))
            except ValueError as error:
                assert "a.mat" in str(error)
                refused += 1
    assert refused > 1000
