"""Files: exact round trips, one clear error for whatever is wrong with a file, nothing in it executed."""

import io as memory
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbilevel import cli
from jbilevel._core import io
from jbilevel._core.partition import combine, partition


class Pair(NamedTuple):
    left: object
    right: object


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: object
    scale: object


both = pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])

TREE = {
    "matrix": jnp.arange(6.0).reshape(2, 3).T,
    "zero-d": jnp.float32(2.5),
    "bfloat16": jnp.array([1.5, -0.1, np.inf], jnp.bfloat16),
    "float8": jnp.ones((2, 2), jnp.float8_e5m2),
    "int4": jnp.array([-8, 7], jnp.int4),
    "bytes": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "bool": np.array([True, False]),
    "complex": np.array([1j, np.nan], np.complex128),
    "strided": np.arange(10.0)[::-3],
    "empty": np.zeros((0, 3), np.float16),
    "numpy scalar": np.float64(0.1),
    "key": jax.random.split(jax.random.key(3), 2),
    "numbers": [1, 0.1, True, 1 - 2j, -float("inf"), 2**70],
    "nothing": [None, (), {}, []],
    "nested": ({"a/b": np.ones(1), "a": {"b": np.zeros(2)}}, [{1: np.ones(3), 10: np.zeros(1), 2: np.ones(1)}]),
}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, (bool, int, float, complex)) and not isinstance(x, np.generic):
            assert type(x) is type(y) and x == y, path
            continue
        assert x.dtype == y.dtype and x.shape == y.shape, path
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


# Round trips


@both
def test_round_trip(name, tmp_path):
    meta = {"psnr": jnp.float32(30.5), "curve": np.arange(3), "words": ["é", "\x1b[31m"], "none": None}
    io.save(tmp_path / name, TREE, meta)
    plain, back = io.load(tmp_path / name)
    assert_same(plain, TREE)
    assert back == {"psnr": 30.5, "curve": [0, 1, 2], "words": ["é", "\x1b[31m"], "none": None}
    exact, _ = io.load(tmp_path / name, like=TREE)
    assert_same(exact, TREE)
    kinds = {key: isinstance(exact[key], np.ndarray) for key in ("matrix", "bool")}
    assert kinds == {"matrix": False, "bool": True}  # JAX and NumPy arrays as in `like`
    assert isinstance(plain["bool"], jax.Array)


@both
def test_other_nodes(name, tmp_path):
    tree = {"pair": Pair(jnp.ones(2), None), "layer": Layer(jnp.ones((2, 1)), 2.0)}
    tree["state"] = optax.adam(1e-3).init({"w": jnp.ones(3)})
    io.save(tmp_path / name, tree)
    exact, meta = io.load(tmp_path / name, like=jax.eval_shape(lambda t: t, tree) | {"layer": tree["layer"]})
    assert_same(exact, tree)
    assert meta == {}
    plain, _ = io.load(tmp_path / name)
    assert plain["pair"].keys() == {"left", "right"} and plain["layer"]["scale"] == 2.0


@both
@pytest.mark.parametrize("params", [None, 3, jnp.zeros(()), [], jnp.arange(3)], ids=repr)
def test_smallest_trees(name, params, tmp_path):
    io.save(tmp_path / name, params)
    assert_same(io.load(tmp_path / name)[0], params)


def test_64_bit_arrays_survive_where_jax_has_32(tmp_path):
    io.save(tmp_path / "a.npz", {"w": np.array([0.1]), "v": jnp.ones(2, jnp.float32)})
    with jax.enable_x64(False):
        params, _ = io.load(tmp_path / "a.npz")
    assert isinstance(params["w"], np.ndarray) and params["w"].dtype == np.float64 and params["w"][0] == 0.1
    assert isinstance(params["v"], jax.Array)


def test_a_number_in_like_takes_a_0d_array(tmp_path):
    io.save(tmp_path / "a.npz", {"w": jnp.float32(0.5)})
    assert io.load(tmp_path / "a.npz", like={"w": 0.0})[0]["w"] == 0.5
    with pytest.raises(ValueError, match=r"params\['w'\] is a Python float, expected a Python int"):
        io.load(tmp_path / "a.npz", like={"w": 0})


def test_same_content_same_bytes_and_numpy_can_read_it(tmp_path):
    io.save(tmp_path / "a.npz", TREE)
    io.save(tmp_path / "b.npz", TREE)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["matrix"], TREE["matrix"])
        assert {"nested/0/a/b", "nested/0/a/b_"} <= set(arrays.files)  # the keys "a" / "b" and "a/b"


# What cannot be saved


@pytest.mark.parametrize(
    "leaf", [abs, "text", np.array([{}], object), np.array(["a"]), np.zeros(1, "M8[s]"), np.zeros(1, [("x", int)])]
)
def test_leaf_that_is_no_number(leaf, tmp_path):
    with pytest.raises(TypeError, match=r"params\['a'\]\[1\]"):
        io.save(tmp_path / "a.npz", {"a": [0, leaf]})
    assert not list(tmp_path.iterdir())


def test_other_refusals(tmp_path, monkeypatch):
    file = tmp_path / "a.npz"
    with pytest.raises(TypeError, match="traced"):
        jax.jit(lambda x: io.save(file, {"x": x}))(1.0)
    for keys in ({1.5: 0}, {"a": 0, 1: 0}, {True: 0}):
        with pytest.raises(TypeError, match="use all str or all int"):
            io.save(file, keys)
    with pytest.raises(TypeError, match="`meta`"):
        io.save(file, 0, {"f": abs})
    with pytest.raises(TypeError, match="`meta`"):
        io.save(file, 0, [1])
    with pytest.raises(FileNotFoundError):
        io.save(tmp_path / "no" / "a.npz", 0)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"jbilevel\[data\]"):
        io.save(tmp_path / "a.safetensors", 0)
    assert not list(tmp_path.iterdir())


@both
def test_failed_write_leaves_the_old_file(name, tmp_path, monkeypatch):
    io.save(tmp_path / name, {"w": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        io.save(tmp_path / name, {"w": 2})
    assert io.load(tmp_path / name)[0] == {"w": 1}
    assert os.listdir(tmp_path) == [name]


def test_new_file_is_complete_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    file, order = tmp_path / "a.npz", []
    io.save(file, {"w": 1})
    replace, sync = os.replace, os.fsync

    def spy(new, old):
        order.append("replace")
        assert Path(new).parent == Path(old).parent
        assert io.load(new)[0] == {"w": 2} and io.load(old)[0] == {"w": 1}
        replace(new, old)

    monkeypatch.setattr(os, "replace", spy)
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("sync"), sync(number)))
    io.save(file, {"w": 2})
    assert order[:2] == ["sync", "replace"] and io.load(file)[0] == {"w": 2}


# Files that are not right


@both
def test_structure_is_checked(name, tmp_path):
    tree = {"a": jnp.zeros((2, 3)), "b": [1, (None, Pair(1.0, 2.0))]}
    io.save(tmp_path / name, tree)
    cases = {
        r"params\['a'\] is float64 of shape \(2, 3\), expected float64 of shape \(3, 2\)": {"a": jnp.zeros((3, 2))},
        r"params\['a'\] is float64 .* expected float32": {"a": jnp.zeros((2, 3), jnp.float32)},
        r"params\['a'\] is float64 .* expected a list": {"a": [1]},
        r"params has \['b'\] in addition": {"b": KeyError},
        r"params lacks \['c'\]": {"c": 1},
        r"params\['b'\] has \[1\] in addition": {"b": [1]},
        r"params\['b'\]\[1\] is a tuple, expected a list": {"b": [1, [None, Pair(1.0, 2.0)]]},
        r"params\['b'\]\[1\]\[0\] is None, expected a Python int": {"b": [1, (3, Pair(1.0, 2.0))]},
        r"params\['b'\]\[1\]\[1\].right is a Python float, expected None": {"b": [1, (None, Pair(1.0, None))]},
        r"params\['b'\]\[1\]\[1\] is a Pair, expected a tuple": {"b": [1, (None, (1.0, 2.0))]},
    }
    for words, change in cases.items():
        like = {key: value for key, value in (tree | change).items() if value is not KeyError}
        with pytest.raises(ValueError, match=f"{name} does not fit `like`: {words}"):
            io.load(tmp_path / name, like)


@both
def test_cut_files(name, tmp_path):
    io.save(tmp_path / name, TREE)
    content = (tmp_path / name).read_bytes()
    lengths = {0, 1, 3, 8, 9, 100, len(content) // 2, len(content) - 100, len(content) - 1}
    for length in lengths:
        (tmp_path / name).write_bytes(content[:length])
        for read in (io.load, io.outline):
            with pytest.raises(ValueError, match=f"{name} cannot be loaded"):
                read(tmp_path / name)


@both
def test_flipped_bits(name, tmp_path):
    """Every byte of a file matters or does not matter: the content is never wrong without an error."""
    file = tmp_path / name
    tree = {"w": jnp.arange(4.0), "b": jnp.ones(1, jnp.bfloat16)}
    io.save(file, tree, {"a": 1})
    content = bytearray(file.read_bytes())
    refused = 0
    for place in range(0, len(content), 3):
        content[place] ^= 0x10
        file.write_bytes(content)
        content[place] ^= 0x10
        try:
            params, meta = io.load(file)
            assert io.read_meta(file) == meta
        except ValueError as error:
            assert str(file) in str(error)
            refused += 1
        else:
            assert_same(params, tree)
            assert meta == {"a": 1}
    assert refused > len(content) // 6


def test_safetensors_are_sealed(tmp_path):
    """Metadata are compared without reading the arrays; the same content is the same bytes; others have no seal."""
    from safetensors.numpy import save_file

    file = tmp_path / "a.safetensors"
    io.save(file, TREE, {"psnr": 30.5})
    content = file.read_bytes()
    io.save(file, TREE, {"psnr": 30.5})
    assert file.read_bytes() == content
    file.write_bytes(content.replace(b"30.5", b"31.5"))
    for read in (io.load, io.read_meta, io.outline):
        with pytest.raises(ValueError, match="a.safetensors cannot be loaded: its content does not fit its checksum"):
            read(file)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert io.read_meta(file) == {"psnr": 30.5}
    with pytest.raises(ValueError, match="does not fit its checksum"):
        io.load(file)
    tree = {"kind": "dict", "keys": ["w"], "children": [
        {"kind": "array", "dtype": "float64", "shape": [3], "name": "w"}
    ]}  # fmt: skip
    header = {"format": "jbilevel", "version": 1, "meta": {}, "tree": tree}
    save_file({"w": np.arange(3.0)}, file, {"jbilevel.json": json.dumps(header)})
    np.testing.assert_array_equal(io.load(file)[0]["w"], np.arange(3.0))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        io.load(tmp_path / "no.npz")
    np.savez(tmp_path / "foreign.npz", w=np.ones(3))
    np.save(tmp_path / "foreign.npy", np.ones(3))
    (tmp_path / "text.safetensors").write_text("hello, world")
    (tmp_path / "large.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    from safetensors.numpy import save_file

    save_file({"w": np.ones(3)}, tmp_path / "foreign.safetensors")
    for file in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{file.name} cannot be loaded"):
            io.load(file)
    with pytest.raises(ValueError, match="not written by jb.save"):
        io.load(tmp_path / "foreign.npz")


class Bomb:
    gone_off = False

    def __reduce__(self):
        return setattr, (Bomb, "gone_off", True)


def test_pickles_are_refused_unopened(tmp_path):
    np.savez(tmp_path / "foreign.npz", w=np.array([Bomb()], object), allow_pickle=True)
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Bomb()))
    io.save(tmp_path / "good.npz", {"w": np.ones(1)})
    npy = memory.BytesIO()
    np.lib.format.write_array(npy, np.array([Bomb()], object), allow_pickle=True)
    rewrite(tmp_path / "good.npz", tmp_path / "swapped.npz", {"w.npy": npy.getvalue()})
    for name in ("foreign", "plain", "swapped"):
        with pytest.raises(ValueError, match=f"{name}.npz cannot be loaded"):
            io.load(tmp_path / f"{name}.npz")
    assert not Bomb.gone_off
    with np.load(tmp_path / "swapped.npz", allow_pickle=True) as arrays:
        assert arrays["w"] is not None and Bomb.gone_off  # it was a live one


def rewrite(old, new, changes, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(new, "w", compression) as target:
        for member in source.namelist():
            target.writestr(member, changes.get(member, source.read(member)))


def test_forged_files(tmp_path, monkeypatch):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    io.save(good, {"w": np.ones(3)})
    with zipfile.ZipFile(good) as archive:
        header, npy = json.loads(archive.read("jbilevel.json")), archive.read("w.npy")

    def refused(words, changes, compression=zipfile.ZIP_STORED):
        rewrite(good, bad, changes, compression)
        with pytest.raises(ValueError, match=f"bad.npz cannot be loaded: .*{words}"):
            io.load(bad)

    def head(**changes):
        return {"jbilevel.json": json.dumps(header | changes)}

    node = header["tree"]["children"][0]

    def leaf(**changes):
        return head(tree=header["tree"] | {"children": [node | changes]})

    refused("upgrade", head(version=99))
    refused("header is not one", head(format="x"))
    refused("header is not one", head(meta=[]))
    refused("damaged", {"jbilevel.json": "[" * 100_000})
    refused("damaged", {"jbilevel.json": "[]"})
    refused("damaged", leaf(name="other"))
    refused("damaged", leaf(name=None, shape=None))
    refused("announces", leaf(shape=[4]))
    refused("announces", leaf(dtype="float32"))
    refused("unknown dtype 'object'", leaf(dtype="object"))
    refused("unknown dtype", leaf(dtype="V8"))
    huge = memory.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"shape": (10**15,), "fortran_order": False, "descr": "<f8"})
    refused("bytes for the shape", {"w.npy": huge.getvalue()})
    refused("bytes for the shape", {"w.npy": npy[:-8]})
    refused("compressed", {}, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(io, "LARGEST_HEADER", 100)
    refused("header is larger", {})


@pytest.mark.parametrize("n", [1, 1000])
def test_one_array_does_not_stand_for_many(tmp_path, n):
    """Or a small file could ask for any amount of memory."""
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    io.save(good, [np.ones(3)])
    with zipfile.ZipFile(good) as archive:
        header = json.loads(archive.read("jbilevel.json"))
    header["tree"]["children"] *= n
    rewrite(good, bad, {"jbilevel.json": json.dumps(header)})
    if n == 1:
        np.testing.assert_array_equal(io.load(bad)[0][0], np.ones(3))
    else:
        with pytest.raises(ValueError, match="bad.npz cannot be loaded: its header names one array several times"):
            io.load(bad)


def test_members_cannot_lie_inside_each_other(tmp_path):
    """A bomb without compression: each member has all that follow as its content."""
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    io.save(good, {"w": np.ones(300)})
    inner = good.read_bytes()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
        target.writestr("outer.npy", inner)
        for info in source.infolist():
            info.header_offset += len(target.infolist()[0].filename) + 30
            target.filelist.append(info)
            target.NameToInfo[info.filename] = info
    with zipfile.ZipFile(bad) as archive:
        assert archive.read("w.npy") == zipfile.ZipFile(good).read("w.npy")
    with pytest.raises(ValueError, match="bad.npz cannot be loaded: its members are larger than the file"):
        io.load(bad)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")  # would wait for ever
    (tmp_path / "folder.npz").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name}.npz cannot be loaded: it is a folder or a device"):
            io.load(tmp_path / f"{name}.npz")


@both
def test_headers_have_a_limit_in_both_directions(name, tmp_path, monkeypatch):
    io.save(tmp_path / name, 0, {"note": "x" * 3000})
    monkeypatch.setattr(io, "LARGEST_HEADER", 1000)
    with pytest.raises(ValueError, match="cannot be loaded: its header is larger than [12]000 bytes"):
        io.load(tmp_path / name)
    with pytest.raises(ValueError, match=r"`meta` and the names in `params` need \d+ bytes, more than 1000"):
        io.save(tmp_path / name, 0, {"note": "x" * 3000})


# partition and combine


def test_partition_hides_what_is_frozen_from_grad():
    params = {"net": [jnp.ones(2), jnp.ones(3)], "name": "relu", "none": None}
    trainable, frozen = partition(params, lambda path, leaf: path == "net/0")
    assert jax.tree.leaves(frozen)[1:] and trainable["name"] is None and frozen["name"] == "relu"

    @jax.grad
    def gradient(trainable):
        whole = combine(trainable, frozen)
        assert whole["name"] == "relu" and whole["none"] is None
        return jnp.sum(whole["net"][0] ** 2) * jnp.sum(whole["net"][1])

    np.testing.assert_array_equal(gradient(trainable)["net"][0], 6 * np.ones(2))
    assert len(jax.tree.leaves(gradient(trainable))) == 1
    assert combine(trainable, frozen) is not params and combine(frozen, trainable)["net"][1] is params["net"][1]


def test_partition_by_bools_and_by_prefix():
    params = {"a": [1.0, 2.0], "b": Pair(3.0, None)}
    for where in ({"a": [False, True], "b": True}, {"a": [False, np.True_], "b": Pair(True, None)}):
        assert partition(params, where) == (
            {"a": [None, 2.0], "b": Pair(3.0, None)},
            {"a": [1.0, None], "b": Pair(None, None)},
        )
    assert partition(params, True)[0] == params


def test_partition_and_combine_refuse():
    params = {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=r"selects none of the 2 leaves.*'a', 'b'"):
        partition(params, lambda path, leaf: path == "c")
    with pytest.raises(ValueError, match="structure"):
        partition(params, {"a": True})
    with pytest.raises(TypeError, match="True or False for 'a'"):
        partition(params, lambda path, leaf: leaf)
    with pytest.raises(ValueError, match="leaf at 'a'"):
        combine({"a": 1.0, "b": None}, {"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="not halves of one tree"):
        combine({"a": 1.0, "b": None}, {"b": 2.0})


# The command line


@both
def test_show(name, tmp_path, capsys):
    io.save(tmp_path / name, {"w": jnp.zeros((2, 3), jnp.bfloat16), "\x1b[31m": [1, None]}, {"noise": 0.1})
    assert cli.main(["show", str(tmp_path / name)]) == 0
    shown = capsys.readouterr().out
    assert "params['w']: bfloat16 of shape (2, 3)" in shown and '"noise": 0.1' in shown
    assert "[0]: a Python int 1" in shown and "[1]: None" in shown and "\x1b" not in shown


def test_show_names_what_is_wrong(tmp_path, capsys):
    (tmp_path / "a.npz").write_bytes(b"PK")
    assert cli.main(["show", str(tmp_path / "a.npz")]) == 1
    assert "a.npz cannot be loaded" in capsys.readouterr().err
    assert cli.main(["show", str(tmp_path / "b.npz")]) == 1
    assert "b.npz" in capsys.readouterr().err


def test_info_and_version(capsys):
    assert cli.main(["info"]) == 0
    told = capsys.readouterr().out
    assert f"jax {jax.__version__}" in told and "(jax_enable_x64): on" in told and "safetensors" in told
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jbilevel ")
    with pytest.raises(SystemExit, match="2"):
        cli.main([])


def test_command_as_a_process(tmp_path):
    io.save(tmp_path / "a.npz", {"w": 1})
    command = [sys.executable, "-m", "jbilevel.cli", "show", str(tmp_path / "a.npz")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "params['w']" in done.stdout, done.stderr
