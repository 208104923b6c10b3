"""Small sound files of every kind that is read, each with the call that reads it: what `damaged_files` begins with."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import types
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax

import jbilevel as jb
from jbilevel import data

RNG = np.random.default_rng(0)
PHOTO = np.add.outer(np.arange(24) * 4, np.arange(32) * 3)[..., None] + np.array([0, 20, 40])


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        name: of the kind.
        make: writes a sound tree into a folder, and returns the file that will be damaged.
        read: reads all of that tree, and raises what the reader raises.
        opened, sealed: what lies under a compression or a checksum, as parts; and the file of such parts. Damage done
            in between is not found by the checksum, but by what understands the content.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    opened: Callable[[bytes], list[bytes]] | None = None
    sealed: Callable[[bytes, list[bytes]], bytes] | None = None


# ----------------------------------------------------------------------------------------------- checksums, compression


def gz_sealed(_, parts):
    return gzip.compress(parts[0], 1)


def zip_opened(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [archive.read(info) for info in archive.infolist()]


def zip_sealed(content, parts):
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for info, part in zip(old.infolist(), parts, strict=True):
            new.writestr(zipfile.ZipInfo(info.filename), part)
    return file.getvalue()


def png_chunks(content):
    place = 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        yield content[place + 4 : place + 8], content[place + 8 : place + 8 + size]
        place += size + 12


def png_opened(content):
    return [zlib.decompress(body) if kind == b"IDAT" else body for kind, body in png_chunks(content)]


def png_sealed(content, parts):
    kinds = [kind for kind, _ in png_chunks(content)]
    return png((k, zlib.compress(part, 1) if k == b"IDAT" else part) for k, part in zip(kinds, parts, strict=True))


def png(chunks):
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def mat_opened(content):
    """Of the first variable, which must be compressed."""
    (size,) = struct.unpack("<I", content[132:136])
    return [zlib.decompress(content[136 : 136 + size])]


def mat_sealed(content, parts):
    (size,) = struct.unpack("<I", content[132:136])
    packed = zlib.compress(parts[0], 1)
    return content[:128] + struct.pack("<2I", 15, len(packed)) + packed + content[136 + size :]


def packed(head, megabytes=0, gz=False):
    """``head`` and that many megabytes of zeros, compressed a thousandfold without ever being whole."""
    block = bytes(1 << 20)

    def deflated(part):
        pack = zlib.compressobj(9, wbits=-15)
        return pack.compress(part) + pack.flush(zlib.Z_FULL_FLUSH)

    body = deflated(head) + deflated(block) * megabytes + b"\x03\x00"
    check = (zlib.crc32 if gz else zlib.adler32)(head)
    for _ in range(megabytes):
        check = (zlib.crc32 if gz else zlib.adler32)(block, check)
    if not gz:
        return b"\x78\xda" + body + struct.pack(">I", check)
    size = (len(head) + (megabytes << 20)) % 2**32
    return b"\x1f\x8b\x08" + bytes(6) + b"\xff" + body + struct.pack("<2I", check, size)


# ------------------------------------------------------------------------------------------------------------- our own


TREE = {"kernel": np.arange(12.0).reshape(3, 4), "bias": jnp.ones(4, jnp.bfloat16), "sizes": [3, (5, None)]}


def saved(name):
    def make(folder):
        jb.save(folder / name, TREE, {"noise": 0.1, "words": ["a", "b"]})
        return folder / name

    return make


def method(stochastic):
    if stochastic:
        problem = jb.SmoothProblem(
            lambda p, x, d: 0.5 * jnp.sum((x - d["y"]) ** 2) + 0.5 * jnp.exp(p) * jnp.sum(x**2),
            lambda p, d: jnp.zeros_like(d["y"]),
            strong_convexity=1.0,
        )
        oracle = jb.implicit.Oracle(problem, lambda p, x, d: jnp.sum((x - d["x"]) ** 2))
        return jb.FirstOrder(oracle, optax.adam(0.1), tol=1e-3, adjoint_tol=1e-3)
    return jb.FirstOrder(jb.explicit.Oracle(lambda p, d: jnp.sum((p - d) ** 2)), optax.adam(0.1))


def batches(stochastic):
    if not stochastic:
        return jnp.arange(6.0).reshape(2, 3)
    y = jnp.arange(8.0).reshape(4, 2)
    return lambda step: {k: v[2 * (step % 2) :][:2] for k, v in {"x": y, "y": y + 1, "index": jnp.arange(4)}.items()}


def resume(path, stochastic):
    params = jnp.zeros(()) if stochastic else jnp.zeros(3)
    return jb.fit(method(stochastic), params, batches(stochastic), steps=4, checkpoint=path)


def checkpoint(name, stochastic=False):
    def make(folder):
        resume(folder / name, stochastic)
        return folder / name

    label = f"checkpoint{' of mini-batches' * stochastic} {name.rpartition('.')[2]}"
    codec = (zip_opened, zip_sealed) if name.endswith("npz") else ()
    return Target(label, make, lambda folder: resume(folder / name, stochastic), *codec)


# ------------------------------------------------------------------------------------------------------------- PyTorch


def torch_file(tree_of_storages, raw, byteorder="little"):
    """The zip of torch.save: a pickle with the names of PyTorch's own things, and raw storages."""
    content = io.BytesIO()
    names = {}
    for module, name in (("torch", "FloatStorage"), ("torch._utils", "_rebuild_tensor_v2")):
        thing = types.FunctionType((lambda *a: None).__code__, {}, name)
        thing.__module__, thing.__qualname__ = module, name
        names[name] = thing

    class Storage:
        def __init__(self, key, size):
            self.identity = ("storage", names["FloatStorage"], key, "cpu", size)

    class Tensor:
        def __init__(self, key, size, shape, stride, offset=0):
            self.made = (Storage(key, size), offset, shape, stride, False, {})

    class Pickler(pickle._Pickler):  # the one in Python, which does not look whether the names exist
        def persistent_id(self, thing):
            return thing.identity if isinstance(thing, Storage) else None

        def reducer_override(self, thing):
            return (names["_rebuild_tensor_v2"], thing.made) if isinstance(thing, Tensor) else NotImplemented

        def save_global(self, thing, name=None):
            self.write(pickle.GLOBAL + f"{thing.__module__}\n{thing.__qualname__}\n".encode())
            self.memoize(thing)

        dispatch = {**pickle._Pickler.dispatch, types.FunctionType: save_global}

    Pickler(content, protocol=2).dump(tree_of_storages(Tensor))
    return torch_zip(content.getvalue(), raw, byteorder)


def torch_zip(pickled, raw, byteorder="little", compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in raw.items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def weights(folder):
    a, b = RNG.random((3, 4)).astype(np.float32), RNG.random(5).astype(np.float32)
    tree = lambda Tensor: {"a.weight": Tensor("0", 12, (3, 4), (4, 1)), "a.bias": Tensor("1", 5, (5,), (1,))}  # noqa: E731
    (folder / "weights.pth").write_bytes(torch_file(tree, {"0": a, "1": b}))
    return folder / "weights.pth"


def safetensors_weights(folder):
    from safetensors.numpy import save_file

    save_file({"a.weight": RNG.random((3, 4)), "a.bias": RNG.random(5).astype(np.float32)}, folder / "w.safetensors")
    return folder / "w.safetensors"


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(name, pixels, mode=None, **options):
    def make(folder):
        from PIL import Image

        image = Image.fromarray(pixels)
        (image if mode is None else image.convert(mode)).save(folder / name, **options)
        return folder / name

    codec = (png_opened, png_sealed) if name.endswith("png") else ()
    return Target(f"picture {name}", make, lambda folder: data.image_folder(folder, grey=False), *codec)


def street(folder):
    from PIL import Image

    for split, pixels in (
        ("train", PHOTO.astype(np.uint8)),
        ("trainannot", np.uint8(np.arange(768) % 12).reshape(24, 32)),
    ):
        (folder / split).mkdir()
        Image.fromarray(pixels).save(folder / split / "a.png")
    return folder / "trainannot" / "a.png"


def pets(folder):
    from PIL import Image

    for name in ("images", "annotations/trimaps"):
        (folder / name).mkdir(parents=True)
    for name in ("Abyssinian_1", "Bengal_2"):
        Image.fromarray(PHOTO.astype(np.uint8)).save(folder / f"images/{name}.jpg")
        trimap = np.uint8(1 + np.arange(768) % 3).reshape(24, 32)
        Image.fromarray(trimap).save(folder / f"annotations/trimaps/{name}.png")
    path = folder / "annotations/trainval.txt"
    path.write_text("# names\nAbyssinian_1 1 1 1\nBengal_2 6 1 5\n")
    return path


# ------------------------------------------------------------------------------------------------ MATLAB, DICOM, NIfTI


def cells(entries):
    array = np.empty((1, len(entries)), object)
    array[0, :] = entries
    return array


def outlines(folder):
    import scipy.io
    from PIL import Image

    for name in ("images/val", "groundTruth/val"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(PHOTO.astype(np.uint8)).save(folder / "images/val/3.jpg")
    drawn = cells([{"Boundaries": RNG.integers(0, 2, (24, 32), np.uint8), "Segmentation": np.eye(3)} for _ in range(2)])
    scipy.io.savemat(folder / "groundTruth/val/3.mat", {"groundTruth": drawn}, do_compression=True)
    return folder / "groundTruth/val/3.mat"


def dogs(folder):
    import scipy.io
    from PIL import Image

    names = [f"n0208{k}-Breed/n0208{k}_7.jpg" for k in range(4)]
    for name in names:
        (folder / "Images" / name).parent.mkdir(parents=True)
        Image.fromarray(PHOTO.astype(np.uint8)).save(folder / "Images" / name)
    labels = np.arange(1, 5, dtype=np.float64)[:, None]
    scipy.io.savemat(folder / "train_list.mat", {"file_list": cells(names).T, "labels": labels})
    return folder / "train_list.mat"


def dicom_bytes(kind="raw", shape=(40, 34), **changes):
    import pydicom
    from pydicom import uid

    pixels = RNG.integers(0, 4096, shape, np.uint16)
    values = pydicom.Dataset()
    values.file_meta = pydicom.dataset.FileMetaDataset()
    values.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if kind == "raw" else uid.ExplicitVRLittleEndian
    values.file_meta.MediaStorageSOPClassUID = values.SOPClassUID = uid.CTImageStorage
    values.file_meta.MediaStorageSOPInstanceUID = values.SOPInstanceUID = "1.2.3.4"
    values.PatientID, values.SeriesInstanceUID, values.Modality = "p1", "1.2.3", "CT"
    values.Rows, values.Columns = shape
    values.BitsAllocated, values.BitsStored, values.HighBit = 16, 12, 11
    values.SamplesPerPixel, values.PhotometricInterpretation, values.PixelRepresentation = 1, "MONOCHROME2", 0
    values.PixelSpacing, values.ImagePositionPatient = [0.8, 0.7], [-10, -20, 0]
    values.ImageOrientationPatient, values.ImageType = [1, 0, 0, 0, 1, 0], ["ORIGINAL", "PRIMARY", "AXIAL"]
    values.RescaleSlope, values.RescaleIntercept = 1, -1024
    values.PixelData = pixels.tobytes()
    if kind in ("RLE", "JPEG 2000"):
        values.compress(uid.RLELossless if kind == "RLE" else uid.JPEG2000Lossless)
    if kind == "JPEG":
        from PIL import Image

        stream = io.BytesIO()
        Image.fromarray((pixels >> 4).astype(np.uint8)).save(stream, "JPEG", quality=90)
        values.BitsAllocated, values.BitsStored, values.HighBit = 8, 8, 7
        values.PixelData = pydicom.encaps.encapsulate([stream.getvalue()])
        values["PixelData"].VR = "OB"
        values.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    for name, value in changes.items():
        setattr(values, name, value)
    stream = io.BytesIO()
    values.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def slices(kind):
    def make(folder):
        (folder / "a.dcm").write_bytes(dicom_bytes(kind))
        return folder / "a.dcm"

    return Target(f"DICOM {kind}", make, lambda folder: [list(s.slices) for s in data.dicom_series(folder)])


def nifti_bytes(array, affine=(0.8, 0.7, 2.5, 1.0)):
    import nibabel

    return nibabel.Nifti1Image(array, np.diag(affine)).to_bytes()


def liver(ending, damaged):
    def make(folder):
        for name in ("imagesTr", "labelsTr"):
            (folder / name).mkdir()
        names = {"image": f"imagesTr/a.{ending}", "label": f"labelsTr/a.{ending}"}
        listed = {"labels": {"0": "background", "1": "liver"}, "training": [names], "test": []}
        (folder / "dataset.json").write_text(json.dumps(listed))
        image, labels = RNG.integers(-1000, 1000, (9, 8, 7), np.int16), RNG.integers(0, 2, (9, 8, 7), np.uint8)
        for name, array in ((names["image"], image), (names["label"], labels)):
            content = nifti_bytes(array)
            (folder / name).write_bytes(gzip.compress(content, 1) if ending.endswith("gz") else content)
        return folder / (damaged if damaged.endswith("json") else names[damaged])

    codec = ((lambda c: [gzip.decompress(c)]), gz_sealed) if ending.endswith("gz") and damaged != "dataset.json" else ()
    return Target(f"NIfTI {ending} {damaged}", make, lambda folder: list(data.decathlon(folder)), *codec)


# ---------------------------------------------------------------------------------------------------- HDF5, idx, CIFAR


def scans(damaged, **options):
    def make(folder):
        import h5py

        for name, shape in (("ground_truth", (3, 16, 16)), ("observation", (3, 20, 11))):
            with h5py.File(folder / f"{name}_train_000.hdf5", "w") as file:
                chunked = {"chunks": (1, *shape[1:]), **options} if options else {}
                file.create_dataset("data", data=RNG.random(shape, np.float32), **chunked)
        (folder / "patient_ids_rand_train.csv").write_text("1\n1\n2\n")
        return folder / damaged

    label = f"{damaged.rpartition('.')[2]} {'packed' if options else ''}".strip()
    return Target(f"LoDoPaB {label}", make, lambda folder: list(data.lodopab(folder)))


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(damaged, packed):
    def make(folder):
        ending = ".gz" if packed else ""
        images, labels = RNG.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            (folder / f"train-{name}-ubyte{ending}").write_bytes(gzip.compress(content, 1) if packed else content)
        return folder / f"train-{damaged}-ubyte{ending}"

    codec = ((lambda content: [gzip.decompress(content)]), gz_sealed) if packed else ()
    return Target(f"idx {damaged}{' packed' * packed}", make, lambda folder: data.mnist(folder), *codec)


def cifar(folder):
    for k in range(1, 6):
        records = RNG.integers(0, 10, (3, 3073), np.uint8)
        (folder / f"data_batch_{k}.bin").write_bytes(records.tobytes())
    return folder / "data_batch_2.bin"


GREY16 = RNG.integers(0, 65536, (24, 32), np.uint16)
COLOUR = PHOTO.astype(np.uint8)

TARGETS = (
    Target("load npz", saved("a.npz"), lambda f: jb.load(f / "a.npz"), zip_opened, zip_sealed),
    Target("load safetensors", saved("a.safetensors"), lambda f: jb.load(f / "a.safetensors")),
    Target("load like npz", saved("a.npz"), lambda f: jb.load(f / "a.npz", TREE), zip_opened, zip_sealed),
    checkpoint("checkpoint.npz"),
    checkpoint("checkpoint.safetensors"),
    checkpoint("checkpoint.npz", True),
    Target("torch pth", weights, lambda f: jb.nets.read_torch(f / "weights.pth"), zip_opened, zip_sealed),
    Target("torch safetensors", safetensors_weights, lambda f: jb.nets.read_torch(f / "w.safetensors")),
    picture("colour.png", COLOUR),
    picture("grey16.png", GREY16),
    picture("palette.png", COLOUR, "P"),
    picture("a.jpg", COLOUR, quality=90),
    picture("a.tif", COLOUR),
    picture("grey16.tif", GREY16, compression="tiff_lzw"),
    picture("float.tif", RNG.random((24, 32), np.float32)),
    picture("a.webp", COLOUR),
    picture("a.bmp", COLOUR),
    Target("labels png", street, lambda f: list(data.camvid(f)), png_opened, png_sealed),
    Target("list of pets", pets, lambda f: list(data.oxford_pets(f))),
    Target("MATLAB packed", outlines, lambda f: list(data.bsds500(f, "val", boundaries=True)), mat_opened, mat_sealed),
    Target("MATLAB plain", dogs, lambda f: list(data.stanford_dogs(f))),
    slices("raw"),
    slices("RLE"),
    slices("JPEG 2000"),
    slices("JPEG"),
    liver("nii.gz", "image"),
    liver("nii.gz", "label"),
    liver("nii", "image"),
    liver("nii.gz", "dataset.json"),
    scans("ground_truth_train_000.hdf5"),
    scans("observation_train_000.hdf5", compression="gzip", shuffle=True),
    scans("patient_ids_rand_train.csv"),
    digits("images-idx3", packed=True),
    digits("images-idx3", packed=False),
    digits("labels-idx1", packed=False),
    Target("CIFAR-10", cifar, lambda f: data.cifar10(f)),
)  # fmt: skip
