"""Files made to do harm: bombs, announced sizes, links, pickles, names. Each takes the place of a sound file."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks import sound_files as sound
from benchmarks.hostile_arrays import LINKS, content, hdf5, idx, linked, nifti

MEGA = 1 << 20


class Hostile(NamedTuple):
    """What it does, the kind of file that it takes the place of, and how it is written to a path."""

    label: str
    target: str
    write: Callable


# ------------------------------------------------------------------------------------- npz, safetensors, zip, pickles


def npz(changes=None, compression=zipfile.ZIP_STORED, more=()):
    """The members of a file of jb.save, some replaced by what ``changes`` makes of them."""

    def make(old):
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(old)) as archive, zipfile.ZipFile(file, "w", compression) as new:
            for name in archive.namelist():
                new.writestr(name, (changes or {}).get(name, lambda part: part)(archive.read(name)))
            for name, part in more:
                new.writestr(name, part)
        return file.getvalue()

    return content(make)


def npy(shape, descr="<f8", body=b"", order=False):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": order, "descr": descr})
    return file.getvalue() + body


def header(change):
    """A change of the header in a file of jb.save, and so under all checksums."""

    def changed(part):
        tree = json.loads(part)
        change(tree)
        return json.dumps(tree).encode()

    return npz({"jbilevel.json": changed})


def many_leaves(tree):
    leaf = next(c for c in tree["tree"]["children"] if c["kind"] == "array")
    tree["tree"] = {"kind": "list", "children": [leaf] * 200_000}


def deep(part):
    text = json.dumps({**json.loads(part), "tree": "HERE"})
    return text.replace('"HERE"', '{"kind": "list", "children": [' * 900 + "null" + "]}" * 900).encode()


def metadata(**changes):
    return header(lambda tree: tree["meta"].update(changes))


def safetensors(old_header=None, size=None, body=b"\0" * 64):
    def make(_):
        text = json.dumps(old_header).encode() if not isinstance(old_header, bytes) else old_header
        return struct.pack("<Q", len(text) if size is None else size) + text + body

    return content(make)


def tensor_header(**changes):
    return {"w": {"dtype": "F64", "shape": [8], "data_offsets": [0, 64]} | changes}


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def pickled_array(_):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.array([Attack()], object), allow_pickle=True)
    return file.getvalue()


def pth(pickled, raw=None, **options):
    return content(lambda _: sound.torch_zip(pickled, raw or {"0": np.ones(12, np.float32)}, **options))


def tensors(*arguments, n=1):
    """``n`` tensors with these sizes, shapes and strides on one storage of a megabyte."""
    tree = lambda Tensor: {f"w{k}": Tensor("0", *arguments) for k in range(n)}  # noqa: E731
    return content(lambda _: sound.torch_file(tree, {"0": np.zeros(MEGA // 4, np.float32)}))


def exponential(use):
    """A pickle with a tuple of twice a tuple of twice a tuple, ...: small, but of 2^60 entries to hash or to show."""
    nest = b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(1, 61))
    return b"\x80\x02}" + b"X\x01\x00\x00\x00a" + nest + use


# ------------------------------------------------------------------------------------------------------------ pictures


def png(width, height, depth, colour, body, more=()):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return content(lambda _: sound.png([(b"IHDR", head), *more, (b"IDAT", body), (b"IEND", b"")]))


def zeros(rows, columns):
    pack = zlib.compressobj(9)
    return b"".join([*(pack.compress(bytes(columns + 1)) for _ in range(rows)), pack.flush()])


def tiff(entries, order="<", body=b"\0" * 64):
    """A directory of (tag, type, count, value)."""
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(f"{order}HHII", tag, kind, count, value)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return content(lambda _: start + struct.pack(f"{order}I", 8) + directory + bytes(4) + body)


def tiff_of(width, height, count=1, more=()):
    basic = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    return tiff(sorted([*basic, (273, 4, count, 200), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, count, 64), *more]))


def patched(place, value):
    return content(lambda old: old[:place] + value + old[place + len(value) :])


def jpeg_of_scans(n):
    """A progressive JPEG whose last scan is repeated: each goes once more over all pixels."""

    def make(_):
        from PIL import Image

        file = io.BytesIO()
        Image.new("L", (5000, 5000)).save(file, "JPEG", progressive=True)
        whole = file.getvalue()
        start = whole.rindex(b"\xff\xc4", 0, whole.rindex(b"\xff\xda"))
        return whole[:-2] + whole[start:-2] * n + whole[-2:]

    return content(make)


def jpeg_of(width, height):
    def make(old):
        start = next(old.index(bytes([0xFF, kind])) for kind in (0xC0, 0xC2) if bytes([0xFF, kind]) in old)
        return old[: start + 5] + struct.pack(">HH", height, width) + old[start + 9 :]

    return content(make)


# -------------------------------------------------------------------------------------------------------------- MATLAB


def element(kind, body):
    return struct.pack("<2I", kind, len(body)) + body + bytes(-len(body) % 8)


def matrix(kind, dims, *parts, flags=0, name=b""):
    head = element(6, struct.pack("<2I", kind | flags << 8, 0)) + element(5, struct.pack(f"<{len(dims)}i", *dims))
    return element(14, head + element(1, name) + b"".join(parts))


def mat(*variables, packed=False):
    body = b"".join(variables)
    if packed:
        small = zlib.compress(body, 9)
        body = struct.pack("<2I", 15, len(small)) + small
    return content(lambda old: old[:128] + body)


def outline(kind, dims, *parts, **options):
    return mat(matrix(kind, dims, *parts, name=b"groundTruth"), **options)


def nested(depth):
    inner = matrix(6, (1, 1), element(9, bytes(8)))
    for _ in range(depth):
        inner = matrix(1, (1, 1), inner)
    return outline(1, (1, 1), inner)


def mat_bomb(megabytes):
    size = megabytes * MEGA
    head = element(6, struct.pack("<2I", 9, 0)) + element(5, struct.pack("<2i", size, 1)) + element(1, b"groundTruth")
    start = struct.pack("<2I", 14, len(head) + 8 + size) + head + struct.pack("<2I", 2, size)

    def make(old):
        body = sound.packed(start, megabytes)
        return old[:128] + struct.pack("<2I", 15, len(body)) + body

    return content(make)


def listed(names, labels):
    """The list of dogs."""
    entries = [matrix(4, (1, len(name)), element(16, name.encode())) for name in names]
    file_list = matrix(1, (len(names), 1), *entries, name=b"file_list")
    return mat(file_list, matrix(6, (len(labels), 1), element(2, bytes(labels)), name=b"labels"))


# --------------------------------------------------------------------------------------------------------------- DICOM


def dicom(kind="raw", **changes):
    return content(lambda _: sound.dicom_bytes(kind, **changes))


def code_stream(place, value):
    """A lie in the header of the JPEG 2000 code stream."""

    def make(_):
        whole = sound.dicom_bytes("JPEG 2000")
        start = whole.index(b"\xff\x4f\xff\x51") + place
        return whole[:start] + value + whole[start + len(value) :]

    return content(make)


def precincts(_):
    """A picture cut into a million parts, for which a decoder takes memory one by one."""
    import pydicom

    values = pydicom.dcmread(io.BytesIO(sound.dicom_bytes("JPEG 2000")))
    stream = bytearray(pydicom.encaps.get_frame(values.PixelData, 0, number_of_frames=1))
    values.Rows = values.Columns = 2048
    stream[8:16] = stream[24:32] = struct.pack(">2I", 2048, 2048)
    place = stream.index(b"\xff\x52")
    (size,) = struct.unpack(">H", stream[place + 2 : place + 4])
    parts = b"\x22" * (stream[place + 9] + 1)
    stream[place + 2 : place + 5] = struct.pack(">HB", size + len(parts), stream[place + 4] | 1)
    end = place + 2 + size
    stream[end:end] = parts
    values.PixelData = pydicom.encaps.encapsulate([bytes(stream)])
    file = io.BytesIO()
    values.save_as(file)
    return file.getvalue()


def jpeg_in_dicom(_):
    whole = sound.dicom_bytes("JPEG")
    start = whole.index(b"\xff\xc0") + 5
    return whole[:start] + struct.pack(">HH", 60000, 60000) + whole[start + 4 :]


def sequences(depth):
    """Sequences in sequences, all of undefined length, in front of everything else."""
    item = b"\x08\x00\x40\x11\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"

    def make(_):
        whole = sound.dicom_bytes()
        start = whole.index(b"\x08\x00\x16\x00")
        return whole[:start] + item * depth + whole[start:]

    return content(make)


# ------------------------------------------------------------------------------------------------ what stands in place


def folder_in_place(path):
    path.unlink()
    path.mkdir()


def pipe_in_place(path):
    path.unlink()
    os.mkfifo(path)


def loop_in_place(path):
    path.unlink()
    path.symlink_to(path.name)


def dangling_in_place(path):
    path.unlink()
    path.symlink_to("nowhere")


def text(value):
    return content(lambda _: value)


PLACES = ("load npz", "checkpoint npz", "torch pth", "picture colour.png", "MATLAB packed", "DICOM raw",
          "NIfTI nii.gz image", "LoDoPaB hdf5", "idx images-idx3", "CIFAR-10", "list of pets",
          "NIfTI nii.gz dataset.json")  # fmt: skip

HOSTILE = (
    # npz, safetensors, checkpoints
    Hostile("compressed members", "load npz", npz(compression=zipfile.ZIP_DEFLATED)),
    Hostile("zip bomb", "load npz", npz(compression=zipfile.ZIP_DEFLATED, more=[("x.npy", bytes(512 * MEGA))])),
    Hostile("names outside", "load npz", npz(more=[("../../owned.npy", b"x"), ("/etc/owned.npy", b"x")])),
    Hostile("announced 8 PB", "load npz", npz({"kernel.npy": lambda _: npy((10**15,))})),
    Hostile("announced negative", "load npz", npz({"kernel.npy": lambda _: npy((-3, -4), body=bytes(96))})),
    Hostile("pickle inside", "load npz", npz({"kernel.npy": pickled_array})),
    Hostile("dtype of 1 GB", "load npz", npz({"kernel.npy": lambda _: npy((1,), "|V1000000000")})),
    Hostile("one array as 200,000 leaves", "load npz", header(many_leaves)),
    Hostile("900 lists in each other", "load npz", npz({"jbilevel.json": deep})),
    Hostile("lists in lists", "load npz", npz({"jbilevel.json": lambda _: b"[" * 1_000_000})),
    Hostile("30 MB of empty lists", "load npz", npz({"jbilevel.json": lambda _: b"[" + b"[]," * 10_000_000 + b"[]]"})),
    Hostile("no keys", "load npz", header(lambda tree: tree.pop("tree"))),
    Hostile("header of 2^60 bytes", "load safetensors", safetensors(b"{}", 2**60)),
    Hostile("announced 2^62", "load safetensors", safetensors(tensor_header(shape=[2**62]))),
    Hostile("offsets outside", "load safetensors", safetensors(tensor_header(data_offsets=[0, 2**40]))),
    Hostile("90 MB of spaces", "load safetensors", safetensors(b"{}" + b" " * (90 * MEGA))),
    Hostile("announced 2^62", "torch safetensors", safetensors(tensor_header(shape=[2**62]))),
    Hostile("offsets outside", "torch safetensors", safetensors(tensor_header(data_offsets=[0, 2**40]))),
    Hostile("unknown dtype", "torch safetensors", safetensors(tensor_header(dtype="F4096"))),
    Hostile("bfloat16", "torch safetensors", safetensors(tensor_header(dtype="BF16", shape=[32]))),
    Hostile("10^12 samples", "checkpoint npz", metadata(samples=10**12)),
    Hostile("10^12 steps", "checkpoint npz", metadata(steps=10**12)),
    Hostile("-1 samples", "checkpoint npz", metadata(samples=-1)),
    Hostile("words for numbers", "checkpoint npz", metadata(samples="many", steps=None)),
    Hostile("no origin", "checkpoint npz", header(lambda tree: tree["meta"].pop("run"))),
    Hostile("no end", "checkpoint npz", header(lambda tree: tree["meta"].pop("done"))),
    # .pth
    Hostile("pickle that calls", "torch pth", pth(pickle.dumps({"w": Attack()}, 2))),
    Hostile("pickle that calls, protocol 0", "torch pth", pth(pickle.dumps({"w": Attack()}, 0))),
    Hostile("compressed", "torch pth", pth(b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED)),
    Hostile("compressed bomb", "torch pth", pth(bytes(512 * MEGA), compression=zipfile.ZIP_DEFLATED)),
    Hostile("10,000 views of a megabyte", "torch pth", tensors(MEGA // 4, (512, 512), (512, 1), n=10_000)),
    Hostile("shape of 10^18", "torch pth", tensors(MEGA // 4, (10**9, 10**9), (0, 0))),
    Hostile("negative stride", "torch pth", tensors(MEGA // 4, (3, 3), (-3, 1))),
    Hostile("100,000 axes", "torch pth", tensors(MEGA // 4, (2,) * 100_000, (0,) * 100_000)),
    Hostile("empty with 10^18", "torch pth", tensors(MEGA // 4, (0, 10**18), (1, 1))),
    Hostile("2^60 entries to hash", "torch pth", pth(exponential(b"K\x01s."))),
    Hostile("2^60 entries to show", "torch pth", pth(exponential(b"s."))),
    Hostile("2^60 entries as a storage", "torch pth", pth(exponential(b"Q."))),
    Hostile("2^60 entries as a name", "torch pth", pth(exponential(b"h\x3c\x93."))),
    Hostile("names outside", "torch pth", tensors(3, (3,), (1,), n=1)),
    # pictures
    Hostile("2^31 x 2^31", "picture colour.png", png(2**31 - 1, 2**31 - 1, 8, 2, b"")),
    Hostile("50 megapixels announced", "picture colour.png", png(10_000, 5_000, 8, 2, zeros(2, 30_000))),
    Hostile("50 megapixels of zeros", "picture colour.png", png(10_000, 5_000, 8, 2, zeros(5_000, 30_000))),
    Hostile("50 megapixels of 16 bits", "picture grey16.png", png(10_000, 5_000, 16, 0, zeros(5_000, 20_000))),
    Hostile("60 megapixels of 1 bit", "picture colour.png", png(10_000, 6_000, 1, 0, zeros(6_000, 1_250))),
    Hostile("profile of 256 MB", "picture colour.png",
            png(8, 8, 8, 0, zeros(8, 8), [(b"iCCP", b"x\0\0" + sound.packed(b"", 256))])),
    Hostile("text of 256 MB", "picture colour.png",
            png(8, 8, 8, 0, zeros(8, 8), [(b"zTXt", b"x\0\0" + sound.packed(b"", 256))])),
    Hostile("labels of 50 megapixels", "labels png", png(10_000, 5_000, 8, 0, zeros(5_000, 10_000))),
    Hostile("65500 x 65500", "picture a.jpg", jpeg_of(65500, 65500)),
    Hostile("10,000 scans", "picture a.jpg", jpeg_of_scans(10_000)),
    Hostile("7000 x 7000", "picture a.jpg", jpeg_of(7000, 7000)),
    Hostile("2^31 x 2^31", "picture a.tif", tiff_of(2**31 - 1, 2**31 - 1)),
    Hostile("7000 x 7000", "picture a.tif", tiff_of(7000, 7000)),
    Hostile("2^31 strips", "picture a.tif", tiff_of(8, 8, 2**31 - 1)),
    Hostile("65535 samples", "picture a.tif", tiff_of(8, 8, more=[(338, 3, 65535, 200)])),
    Hostile("itself as its next page", "picture a.tif", tiff([(256, 4, 1, 8), (330, 4, 1, 8)])),
    Hostile("2^31 wide", "picture a.bmp", patched(18, struct.pack("<2i", 2**31 - 1, 2**31 - 1))),
    Hostile("7000 x 7000", "picture a.bmp", patched(18, struct.pack("<2i", 7000, 7000))),
    Hostile("16383 x 16383", "picture a.webp", patched(26, struct.pack("<2H", 0x3FFF, 0x3FFF))),
    # MATLAB
    Hostile("10^9 cells", "MATLAB packed", outline(1, (10**9, 1))),
    Hostile("2^31 x 2^31 cells", "MATLAB packed", outline(1, (2**31 - 1, 2**31 - 1))),
    Hostile("negative dimensions", "MATLAB packed", outline(6, (-5, -8), element(9, bytes(320)))),
    Hostile("10^9 numbers", "MATLAB packed", outline(6, (10**9, 1), element(9, bytes(8)))),
    Hostile("10^9 structures without fields", "MATLAB packed",
            outline(2, (10**9, 1), element(5, struct.pack("<i", 32)), element(1, b""))),
    Hostile("a million fields", "MATLAB packed",
            outline(2, (1, 1), element(5, struct.pack("<i", 1)), element(1, bytes(MEGA)))),
    Hostile("field names of length 0", "MATLAB packed",
            outline(2, (1, 1), element(5, struct.pack("<i", 0)), element(1, b"abc"))),
    Hostile("a million empty cells", "MATLAB packed", outline(1, (1_000_000, 1), bytes([14, *[0] * 7]) * 1_000_000)),
    Hostile("80 MB of empty cells, packed", "MATLAB packed",
            outline(1, (10_000_000, 1), bytes([14, *[0] * 7]) * 10_000_000, packed=True)),
    Hostile("sparse of 10^9 x 10^9", "MATLAB packed",
            outline(5, (10**9, 10**9), element(5, bytes(4)), element(5, bytes(8)), element(9, bytes(8)))),
    Hostile("50 cells in each other", "MATLAB packed", nested(50)),
    Hostile("5,000 cells in each other", "MATLAB packed", nested(5000)),
    Hostile("a function", "MATLAB packed", outline(16, (1, 1), matrix(6, (1, 1), element(9, bytes(8))))),
    Hostile("an opaque thing", "MATLAB packed", outline(17, (1, 1), element(1, b"MCOS"))),
    Hostile("bomb of 90 MB", "MATLAB packed", mat_bomb(90)),
    Hostile("bomb of 1 GB", "MATLAB packed", mat_bomb(1024)),
    Hostile("90 million bytes as doubles", "MATLAB packed",
            outline(6, (90_000_000, 1), element(2, bytes(90_000_000)), packed=True)),
    Hostile("names elsewhere", "MATLAB plain", listed(["../../etc/passwd", "/etc/passwd"], [1, 2])),
    Hostile("10^9 names", "MATLAB plain", mat(matrix(1, (10**9, 1), name=b"file_list"))),
    Hostile("version 7.3", "MATLAB plain", text(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(600))),
    # DICOM
    Hostile("65535 x 65535", "DICOM raw", dicom(Rows=65535, Columns=65535)),
    Hostile("4096 x 4096", "DICOM raw", dicom(Rows=4096, Columns=4096)),
    Hostile("4096 x 4096", "DICOM RLE", dicom("RLE", Rows=4096, Columns=4096)),
    Hostile("2^31 frames", "DICOM raw", dicom(NumberOfFrames=2**31 - 1)),
    Hostile("65535 samples", "DICOM raw", dicom(SamplesPerPixel=65535)),
    Hostile("64 bits", "DICOM raw", dicom(BitsAllocated=64, BitsStored=64, HighBit=63)),
    Hostile("deflated bomb", "DICOM raw", content(lambda _: sound.dicom_bytes().replace(
        b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.1.99")[:300] + sound.packed(b"", 256))),
    Hostile("unknown syntax", "DICOM raw",
            content(lambda old: old.replace(b"1.2.840.10008.1.2\0", b"1.2.840.10008.9.9\0"))),
    Hostile("code stream of 60000 x 60000", "DICOM JPEG 2000", code_stream(8, struct.pack(">2I", 60000, 60000))),
    Hostile("code stream of 16384 components", "DICOM JPEG 2000", code_stream(40, struct.pack(">H", 16384))),
    Hostile("code stream of 1 x 1 tiles", "DICOM JPEG 2000", code_stream(24, struct.pack(">2I", 1, 1))),
    Hostile("code stream of a million parts", "DICOM JPEG 2000", content(precincts)),
    Hostile("code stream of 38 bits", "DICOM JPEG 2000", code_stream(42, bytes([37]))),
    Hostile("JPEG of 60000 x 60000", "DICOM JPEG", content(jpeg_in_dicom)),
    Hostile("100 sequences in each other", "DICOM raw", sequences(100)),
    Hostile("100,000 sequences in each other", "DICOM raw", sequences(100_000)),
    # NIfTI
    Hostile("32767^3 voxels", "NIfTI nii.gz image", nifti((32767, 32767, 32767))),
    Hostile("600 million voxels, none there", "NIfTI nii.gz image", nifti((1000, 1000, 600), kind=64, bits=64)),
    Hostile("600 million voxels, none there", "NIfTI nii image", nifti((1000, 1000, 600), kind=64, bits=64)),
    Hostile("bits that contradict the type", "NIfTI nii image", nifti((1000, 1000, 600), kind=64, bits=1)),
    Hostile("80 MB more than announced", "NIfTI nii.gz image", nifti((9, 8, 7), body=bytes(1008), unpacked=800)),
    Hostile("complex numbers", "NIfTI nii.gz image", nifti(kind=32, bits=64, body=bytes(9 * 8 * 7 * 8))),
    Hostile("colours", "NIfTI nii.gz image", nifti(kind=128, bits=24, body=bytes(9 * 8 * 7 * 3))),
    Hostile("unknown type", "NIfTI nii.gz image", nifti(kind=4097, bits=16, body=bytes(1008))),
    Hostile("header of 10^9 bytes", "NIfTI nii.gz image", nifti(offset=1e9)),
    Hostile("header of NaN bytes", "NIfTI nii.gz image", nifti(offset=float("nan"))),
    # HDF5
    Hostile("3 x 100,000 x 100,000", "LoDoPaB hdf5", hdf5((3, 100_000, 100_000), (1, 64, 64))),
    Hostile("2^40 slices", "LoDoPaB hdf5", hdf5((2**40, 16, 16), (1, 16, 16))),
    Hostile("chunk of 1 GB", "LoDoPaB hdf5", hdf5((250, 1000, 1000), (250, 1000, 1000))),
    Hostile("100 million slices in a chunk", "LoDoPaB hdf5 packed", hdf5((100_000_000, 1, 1), (100_000_000, 1, 1),
            compression="gzip", written=[((0, 0, 0), sound.packed(bytes(484_352), 381))])),
    Hostile("chunk that unpacks to 2 GB", "LoDoPaB hdf5 packed", hdf5((3, 20, 11), (3, 20, 11),
            compression="gzip", written=[((0, 0, 0), sound.packed(b"", 2048))])),
    Hostile("chunk that unpacks to 2 GB, not shuffled", "LoDoPaB hdf5 packed", hdf5((3, 20, 11), (3, 20, 11),
            compression="gzip", shuffle=True, mask=1, written=[((0, 0, 0), sound.packed(b"", 2048))])),
    Hostile("no values", "LoDoPaB hdf5", hdf5((3, 16, 16))),
    *(Hostile(kind, "LoDoPaB hdf5", linked(kind)) for kind in LINKS),
    # idx, lists
    Hostile("2^31 images", "idx images-idx3", text(idx(2**31, 28, 28))),
    Hostile("0.9 GB announced, none there", "idx images-idx3", text(idx(1_147_959, 28, 28))),
    Hostile("0.9 GB of zeros", "idx images-idx3 packed",
            content(lambda _: sound.packed(idx(1_203_658, 28, 28), 900, gz=True))),
    Hostile("longer by 0.9 GB", "idx images-idx3 packed",
            content(lambda _: sound.packed(idx(12, 28, 28), 900, gz=True))),
    Hostile("lists in lists", "NIfTI nii.gz dataset.json", text(b"[" * 1_000_000)),
    Hostile("10^5 digits", "NIfTI nii.gz dataset.json",
            text(b'{"labels": {"0": "a"}, "training": ' + b"9" * 100_000 + b"}")),
    Hostile("names elsewhere", "NIfTI nii.gz dataset.json",
            text(b'{"labels": {"0": "a"}, "training": [{"image": "/etc/passwd", "label": "../../x"}]}')),
    Hostile("names elsewhere", "list of pets", text(b"../../../etc/passwd 1 1 1\n")),
    Hostile("10^5 digits", "LoDoPaB csv", text(b"9" * 100_000 + b"\n")),
    # what stands where a file should be
    *(Hostile("a folder", name, folder_in_place) for name in PLACES),
    *(Hostile("a pipe", name, pipe_in_place) for name in PLACES),
    *(Hostile("a link to itself", name, loop_in_place) for name in PLACES),
    *(Hostile("a link to nothing", name, dangling_in_place) for name in PLACES),
)  # fmt: skip
