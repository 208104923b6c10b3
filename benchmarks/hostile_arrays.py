"""How files that do harm are made: NIfTI, HDF5, idx."""

from __future__ import annotations

import gzip
import struct

import numpy as np

from benchmarks import sound_files as sound


def content(make):
    return lambda path: path.write_bytes(make(path.read_bytes()))


def nifti(shape=None, kind=None, bits=None, offset=None, body=b"", unpacked=0):
    """A header that announces, and ``unpacked`` bytes of zeros that cost nothing in the file."""

    def make(old):
        packed = old[:2] == b"\x1f\x8b"
        head = bytearray((gzip.decompress(old) if packed else old)[:352])
        if shape is not None:
            head[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))
        for place, form, value in ((70, "<h", kind), (72, "<h", bits), (108, "<f", offset)):
            if value is not None:
                head[place : place + struct.calcsize(form)] = struct.pack(form, value)
        if not packed:
            return bytes(head) + body
        return sound.packed(bytes(head) + body, unpacked, gz=True)

    return content(make)


def hdf5(shape, chunks=None, dtype=np.float32, written=None, mask=0, **options):
    def write(path):
        import h5py

        with h5py.File(path, "w") as file:
            array = file.create_dataset("data", shape, dtype, chunks=chunks, **options)
            for place, raw in written or ():
                array.id.write_direct_chunk(place, raw, mask)

    return write


LINKS = ("external link", "soft link", "external storage", "virtual")


def linked(kind):
    def write(path):
        import h5py

        secret = path.with_name("secret.hdf5")
        with h5py.File(secret, "w") as file:
            file["data"] = np.ones((3, 16, 16), np.float32)
        with h5py.File(path, "w") as file:
            if kind == "external link":
                file["data"] = h5py.ExternalLink(secret, "data")
            elif kind == "soft link":
                file["data"] = h5py.SoftLink("/data")
            elif kind == "external storage":
                file.create_dataset("data", (3, 16, 16), np.float32, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
            else:
                layout = h5py.VirtualLayout((3, 16, 16), np.float32)
                layout[:] = h5py.VirtualSource(secret, "data", (3, 16, 16))
                file.create_virtual_dataset("data", layout)

    return write


def idx(*shape):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
