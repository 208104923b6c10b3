"""Weights in torchvision's layout: files as torch.save writes them, built here, and files that must be refused."""

import io
import pickle
import sys
import tracemalloc
import types
import zipfile
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from test_resnet import forward, made, shaken, state_dict

import jbilevel as jb

RNG = np.random.default_rng(0)


class Stored:
    """A tensor to be written: an array, or a strided view into the storage of a key."""

    def __init__(self, array, key=None, offset=0, shape=None, stride=None):
        self.array = np.asarray(array)
        self.key, self.offset = key, offset
        self.shape = self.array.shape if shape is None else shape
        steps = tuple(s // self.array.itemsize for s in np.ascontiguousarray(self.array).strides)
        self.stride = steps if stride is None else stride


class Parameter(NamedTuple):
    stored: Stored


@pytest.fixture
def torch_names(monkeypatch):
    """Empty things with the names that torch.save writes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("DoubleStorage", "FloatStorage", "LongStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *a: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    torch._utils = utils
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def write(path, tree, torch, *, compression=zipfile.ZIP_STORED, byteorder="little"):
    """The zip of torch.save since version 1.6: data.pkl of protocol 2 and one raw member for each storage."""
    kinds = {"float64": torch.DoubleStorage, "float32": torch.FloatStorage, "int64": torch.LongStorage}
    raw = {}

    class Storage:
        def __init__(self, stored):
            self.key = stored.key or str(len(raw))
            raw[self.key] = stored.array
            self.identity = ("storage", kinds[stored.array.dtype.name], self.key, "cpu", stored.array.size)

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return thing.identity if isinstance(thing, Storage) else None

        def reducer_override(self, thing):
            if isinstance(thing, Parameter):
                return torch._utils._rebuild_parameter, (thing.stored, True, {})
            if isinstance(thing, Stored):
                arguments = (Storage(thing), thing.offset, thing.shape, thing.stride, False, {})
                return torch._utils._rebuild_tensor_v2, arguments
            return NotImplemented

    content = io.BytesIO()
    Pickler(content, protocol=2).dump(tree)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content.getvalue())
        archive.writestr("archive/byteorder", byteorder)
        for key, array in raw.items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def test_tensors_come_back_as_they_were(tmp_path, torch_names):
    a, b = RNG.random((2, 3, 4)), RNG.integers(0, 9, 5)
    pool = RNG.random(12).astype(np.float32)
    tree = {
        "a": Stored(a),
        "b": Parameter(Stored(b)),
        "transposed": Stored(pool, "7", 0, (4, 3), (1, 4)),
        "tail": Stored(pool, "7", 8, (4,), (1,)),
        "number": Stored(np.float64(2.5), shape=(), stride=()),
    }
    found = jb.nets.read_torch(write(tmp_path / "w.pth", tree, torch_names))
    assert list(found) == list(tree)
    np.testing.assert_array_equal(found["a"], a)
    np.testing.assert_array_equal(found["b"], b)
    np.testing.assert_array_equal(found["transposed"], pool.reshape(3, 4).T)
    np.testing.assert_array_equal(found["tail"], pool[8:])
    assert found["number"] == 2.5 and found["number"].shape == () and found["tail"].dtype == np.float32
    nested = {"state_dict": {"module.a": Stored(a)}, "epoch": 3}
    np.testing.assert_array_equal(
        jb.nets.read_torch(write(tmp_path / "n.pth", nested, torch_names))["a"], a
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_of_a_resnet(tmp_path, torch_names, kind):
    source = state_dict(shaken(made(stem="small"), 5))
    counters = {"bn1.num_batches_tracked": np.array([7])}
    path = tmp_path / f"resnet.{kind}"
    if kind == "pth":
        write(path, {k: Stored(v) for k, v in (source | counters).items()}, torch_names)
    else:
        save_file(source | counters, path)
    net = jb.nets.load_torch(made(stem="small", rngs=nnx.Rngs(3)), path)
    x = RNG.random((3, 8, 8))
    np.testing.assert_allclose(net(jnp.asarray(x)), forward(source, x, bottleneck=False, stem="small"), rtol=1e-9)
    other = made(stem="small", classes=5)
    head = np.asarray(other.fc.kernel[...])
    jb.nets.load_torch(other, path, skip=("fc.",))  # another number of classes
    np.testing.assert_array_equal(other.fc.kernel[...], head)
    np.testing.assert_array_equal(other.conv1.kernel[...], net.conv1.kernel[...])
    with pytest.raises(ValueError, match=r"fc\.\w+ has shape"):
        jb.nets.load_torch(made(stem="small", classes=5), path)
    with pytest.raises(ValueError, match="lacks .*layer1.2"):
        jb.nets.load_torch(made(34, stem="small"), path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_is_executed(tmp_path, torch_names):
    trace = tmp_path / "trace"
    path = write(tmp_path / "attack.pth", {"w": Attack(str(trace))}, torch_names)
    with pytest.raises(ValueError, match=r"asks for \w+.open, which is no part of a tensor"):
        jb.nets.read_torch(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("tree", "settings", "words"),
    [
        ({"w": Stored(np.ones(3), None, 0, (4,), (1,))}, {}, "beyond its storage"),
        ({"w": Stored(np.ones(3), None, 2, (2,), (1,))}, {}, "beyond its storage"),
        ({"w": Stored(np.ones(3), None, 0, (10**12,), (0,))}, {}, "beyond its storage"),
        (
            {"w": Stored(np.ones(3), None, -1, (2,), (1,))},
            {},
            "a shape, strides or an offset that are impossible",
        ),
        ({"w": Stored(np.ones(3), "../../w")}, {}, "no storage"),
        ({"w": 3.0}, {}, "'w' is a float, not a tensor"),
        ([Stored(np.ones(3))], {}, "holds a list"),
        ({"w": {1, 2}}, {}, "no part of a tensor|does not need|do not need"),
        ({"w": Stored(np.ones(300))}, {"compression": zipfile.ZIP_DEFLATED}, "compressed"),
        ({"w": Stored(np.ones(3))}, {"byteorder": "big"}, "little-endian"),
    ],
)
def test_what_is_refused(tmp_path, torch_names, tree, settings, words):
    path = write(tmp_path / "w.pth", tree, torch_names, **settings)
    with pytest.raises(ValueError, match=words):
        jb.nets.read_torch(path)


def test_damaged_files(tmp_path, torch_names):
    whole = write(tmp_path / "w.pth", {"w": Stored(np.ones(30))}, torch_names).read_bytes()
    for n, part in enumerate((b"", b"\x80\x02}q\x00.", whole[: len(whole) // 2])):
        path = tmp_path / f"{n}.pth"
        path.write_bytes(part)
        with pytest.raises(ValueError, match=rf"{n}\.pth cannot be loaded: .*zip"):
            jb.nets.read_torch(path)
    path = tmp_path / "w.safetensors"
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"w\.safetensors cannot be loaded"):
        jb.nets.read_torch(path)
    with pytest.raises(FileNotFoundError):
        jb.nets.read_torch(tmp_path / "absent.pth")
    for cut in range(1, 120, 7):  # a pickle that ends too early, or holds nonsense, is refused too
        with zipfile.ZipFile(tmp_path / "cut.pth", "w") as archive:
            archive.writestr("archive/data.pkl", zipfile.ZipFile(tmp_path / "w.pth").read("archive/data.pkl")[:-cut])
        with pytest.raises(ValueError, match=r"cut\.pth cannot be loaded"):
            jb.nets.read_torch(tmp_path / "cut.pth")


def zipped(path, pickled, raw=b""):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", raw)
    return path


@pytest.mark.parametrize("where", ["directory", "version", "offset", "encrypted", "method"])
def test_a_damaged_directory_of_the_zip_is_named(tmp_path, torch_names, where):
    """OSError, NotImplementedError and RuntimeError are what the zip module makes of these."""
    path = write(tmp_path / "w.pth", {"w": Stored(np.ones(30))}, torch_names)
    content = bytearray(path.read_bytes())
    entry, end = content.index(b"PK\1\2"), content.rindex(b"PK\5\6")
    place, value = {
        "directory": (end + 16, b"\xff\xff\xff\x7f"),
        "version": (entry + 6, b"\x54"),
        "offset": (entry + 42, b"\xff\xff\xff\x7f"),
        "encrypted": (entry + 8, b"\x01"),
        "method": (entry + 10, b"\x63"),
    }[where]
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth cannot be loaded"):
        jb.nets.read_torch(path)


def test_every_flipped_byte_is_read_or_named(tmp_path, torch_names):
    path = write(tmp_path / "w.pth", {"w": Stored(np.ones(3)), "b": Parameter(Stored(np.ones(2)))}, torch_names)
    whole = path.read_bytes()
    for place in range(0, len(whole), 2):
        for change in (0x01, 0xC0):
            content = bytearray(whole)
            content[place] ^= change
            path.write_bytes(content)
            try:
                jb.nets.read_torch(path)
            except ValueError as error:
                assert str(path) in str(error)


# of two twos of two twos, ...: sixty bytes of pickle that have 2^60 entries to hash, to compare or to show
MANY = b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(1, 61))


@pytest.mark.parametrize(
    "use",
    [b"K\x01s.", b"s.", b"Q.", b"h\x3c\x93.", b"X\x07\x00\x00\x00storageh\x3ch\x3ch\x3c\x87Q.", b"h\x3cR."],
    ids=["key", "value", "storage", "name", "key of a storage", "call"],
)
def test_a_pickle_cannot_keep_the_reader_busy(tmp_path, use):
    path = zipped(tmp_path / "w.pth", b"\x80\x02}X\x01\x00\x00\x00a" + MANY + use)
    with pytest.raises(ValueError, match=r"w\.pth cannot be loaded: (its pickle|it holds|its entry|it is damaged)"):
        jb.nets.read_torch(path)


def test_tensors_on_one_storage_take_its_memory_once(tmp_path, torch_names):
    pool = np.arange(100_000.0)
    tree = {f"w{k}": Stored(pool, "0", 0, (100, 1000), (1000, 1)) for k in range(500)}
    path = write(tmp_path / "w.pth", tree, torch_names)
    tracemalloc.start()
    found = jb.nets.read_torch(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 500 and peak < 5 * pool.nbytes  # of 500
    np.testing.assert_array_equal(found["w499"], pool.reshape(100, 1000))


def test_an_optimiser_beside_the_weights_does_not_matter(tmp_path, torch_names):
    tree = {"state_dict": {"w": Stored(np.ones(2))}, "optimizer": {"state": {0: {"step": Stored(np.ones(1))}}}}
    assert list(jb.nets.read_torch(write(tmp_path / "w.pth", tree, torch_names))) == ["w"]


@pytest.mark.parametrize("shape", [(2,) * 65, (2**40,), (0, 2**62, 2**62)])
def test_shapes_that_no_array_has(tmp_path, torch_names, shape):
    tree = {"w": Stored(np.ones(3), None, 0, shape, (0,) * len(shape))}
    with pytest.raises(ValueError, match=r"w\.pth cannot be loaded"):
        jb.nets.read_torch(write(tmp_path / "w.pth", tree, torch_names))
