"""Parameters in files: arrays as npz or safetensors, their nesting and the metadata as JSON, never pickle."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jbilevel._core import files

FORMAT = "jbilevel"
VERSION = 1
HEADER = "jbilevel.json"  # a file beside the arrays inside the npz; the key of the metadata in safetensors
SEAL, ARRAYS_SEAL = "crc32", "crc32 of the arrays"  # last entries of the header in safetensors; npz has its own
LARGEST_HEADER = 16 * 2**20  # bytes; JSON takes twenty times as many in memory
SCALARS = {"bool": bool, "int": int, "float": float, "complex": complex}
PLAIN = {"bool", "float16", "float32", "float64", "complex64", "complex128"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
NATIVE = {  # what safetensors knows by itself; all else lies there as bytes, bfloat16 under its own name
    "BOOL": "bool",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{sign}{bits}": f"{word}{bits}" for sign, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


def save(path, params, meta: dict | None = None) -> None:
    """Write a pytree and metadata to one file, atomically: the old file stays until the new one is complete on disk.

    Args:
      path: written exactly as given; safetensors where it ends in ``.safetensors`` (extra ``data``), else npz. An npz
        opens with ``numpy.load`` too: each array under its path, e.g. ``"layers/0/kernel"``.
      params: nested dicts (keys str or int), lists, tuples, named tuples, other pytree nodes and None, of arrays of any
        numeric dtype (bfloat16 and float8 too), typed PRNG keys of JAX's own generators, and Python numbers.
      meta: what JSON can hold, in a dict; NumPy and JAX scalars and arrays become numbers and lists.

    Raises:
      TypeError: a leaf is no number or array (the message names its path), or ``meta`` does not fit into JSON.
      ValueError: ``meta`` and the names in ``params`` are larger than 16 MB; keep numbers in ``params``.
      FileNotFoundError: the folder does not exist. OSError: the disk is full, or the folder may not be written to.
      ImportError: ``.safetensors`` without the package.

    >>> import jbilevel as jb, jax.numpy as jnp, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "denoiser.npz")
    >>> jb.save(path, {"log_weight": jnp.float32(0.5), "sizes": [3, 5]}, {"noise": 0.1})
    >>> params, meta = jb.load(path)
    >>> params["sizes"], float(params["log_weight"]), meta
    ([3, 5], 0.5, {'noise': 0.1})
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    tree = _encode(params, (), lambda leaf, where: _store(leaf, where, arrays))
    if not isinstance(meta, dict | None):
        raise TypeError(f"`meta` must be a dict, got {type(meta).__name__}.")
    try:
        header = json.dumps({"format": FORMAT, "version": VERSION, "meta": meta or {}, "tree": tree}, default=_jsonable)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`meta` must hold what JSON can hold: {error}.") from error
    if len(header) > LARGEST_HEADER:
        raise ValueError(f"`meta` and the names in `params` need {len(header)} bytes, more than {LARGEST_HEADER}.")
    write = _write_safetensors if path.suffix == ".safetensors" else _write_npz
    with files.atomic(path) as file:
        write(file, header, arrays)


def load(path, like=None) -> tuple[Any, dict]:
    """Read what `save` wrote: ``(params, meta)``. Nothing in the file is ever executed.

    Args:
      path: the file; safetensors where it ends in ``.safetensors``, else npz.
      like: a tree of arrays, numbers or ``jax.ShapeDtypeStruct`` to check structure, shapes and dtypes against and to
        rebuild exactly (named tuples, Flax or Equinox nodes, with their static fields taken from ``like``). Leaves are
        JAX arrays, NumPy arrays where ``like`` has those. A number in ``like`` also accepts a 0-d array of its kind.
        Without it, dicts, lists and tuples come back as they were; named tuples and other nodes as dicts by field;
        arrays as JAX arrays, as NumPy arrays where JAX would cut them to 32 bits.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, cut short or not from `save`, or does not fit ``like``: one sentence with the
        file and the reason. Content is compared with the checksums that `save` wrote.

    >>> import jbilevel as jb, jax.numpy as jnp, tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "denoiser.npz")
    >>> jb.save(path, {"filters": jnp.ones((2, 3, 3)), "weight": 0.5}, {"noise": 0.1})
    >>> params, meta = jb.load(path, like={"filters": jnp.zeros((2, 3, 3)), "weight": 0.0})  # checked against this
    >>> params["filters"].shape, params["weight"], meta["noise"]
    ((2, 3, 3), 0.5, 0.1)
    """
    expected = None if like is None else _encode(like, (), _describe)
    header, arrays = _read(path)
    with blame(path):
        if like is None:
            return _decode(header["tree"], arrays), header["meta"]
        difference = _difference(header["tree"], expected, "params")
    if difference:
        raise ValueError(f"{path} does not fit `like`: {difference}.")
    with blame(path):
        leaves, structure = jax.tree.flatten(like)
        nodes = _leaves(header["tree"])
        values = [_restore(node, arrays, isinstance(r, np.ndarray)) for node, r in zip(nodes, leaves, strict=True)]
        return jax.tree.unflatten(structure, values), header["meta"]


def read_meta(path) -> dict:
    """The metadata of a file that `save` wrote, without its arrays. Raises what `load` raises."""
    return _read(path, with_arrays=False)[0]["meta"]


def outline(path) -> str:
    """Structure and metadata of a file that `save` wrote, one line per leaf. Raises what `load` raises."""
    header, _ = _read(path, with_arrays=False)
    with blame(path):
        lines = [f"{FORMAT} format {header['version']}", f"meta {json.dumps(header['meta'], indent=2)}"]
        lines += _lines(header["tree"], "params")
    # names come from the file: no control characters to the terminal
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in "\n".join(lines))


def _encode(tree, path, leaf: Callable):
    """Nesting as JSON; ``leaf(value, path)`` gives the node of a leaf."""
    if tree is None:
        return None
    if type(tree) is dict:
        bad = [key for key in tree if type(key) not in (str, int)]
        if bad or len({type(key) for key in tree}) > 1:
            raise TypeError(f"params{_at(path)} has the keys {bad or list(tree)}; use all str or all int.")
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    if len(entries) == 1 and entries[0][0] == ():
        return leaf(tree, path)
    children = [_encode(child, (*path, *key), leaf) for key, child in entries]
    if type(tree) in (list, tuple):
        return {"kind": type(tree).__name__, "children": children}
    if type(tree) is dict:
        return {"kind": "dict", "keys": [key[0].key for key, _ in entries], "children": children}
    kind = "namedtuple" if isinstance(tree, tuple) and hasattr(tree, "_fields") else "node"
    keys = [jax.tree_util.keystr(key, simple=True) for key, _ in entries]
    return {"kind": kind, "type": type(tree).__name__, "keys": keys, "children": children}


def _describe(leaf, path):
    """The node of a leaf without its content: what ``like`` asks for."""
    if SCALARS.get(type(leaf).__name__) is type(leaf):
        return {"kind": type(leaf).__name__}
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(
            f"params{_at(path)} is a {type(leaf).__name__}, not an array or a number; keep strings in `meta` and "
            "functions in the program, e.g. with jb.partition."
        )
    kind = "key" if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else "array"
    return {"kind": kind, "dtype": leaf.dtype.name, "shape": list(leaf.shape)}


def _store(leaf, path, arrays):
    node = _describe(leaf, path)
    if node["kind"] in SCALARS:
        return node | {"value": str(leaf)}
    if isinstance(leaf, jax.core.Tracer):
        raise TypeError(f"params{_at(path)} is a traced value; call save outside jit and grad.")
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(f"params{_at(path)} is a {type(leaf).__name__}; turn it into an array first.")
    if node["kind"] == "key":
        implementation = jax.random.key_impl(jnp.asarray(leaf))
        if not isinstance(implementation, str):
            raise TypeError(f"params{_at(path)} is a key of a custom generator; save jax.random.key_data(key) instead.")
        node, leaf = node | {"impl": implementation}, jax.random.key_data(jnp.asarray(leaf))
    array = np.asarray(leaf)
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    try:
        known = _dtype(array.dtype.name) == array.dtype
    except (TypeError, ValueError):
        known = False
    if not known:
        raise TypeError(f"params{_at(path)} has dtype {array.dtype}, which is not numeric; keep it in `meta`.")
    node["name"] = _name(path, arrays)
    arrays[node["name"]] = array
    return node


def _name(path, taken) -> str:
    """The path as other programs will see it; made unique, because keys may contain slashes."""
    name = jax.tree_util.keystr(path, simple=True, separator="/") or "params"
    name = "".join(c if c.isprintable() and c != "\\" else "_" for c in name)
    while name in taken or name == "__metadata__":  # reserved in safetensors
        name += "_"
    return name


def _leaves(node) -> list:
    if node is None:
        return []
    return [leaf for child in node["children"] for leaf in _leaves(child)] if "children" in node else [node]


def _decode(node, arrays):
    if node is None:
        return None
    if "children" not in node:
        return _restore(node, arrays, False)
    children = [_decode(child, arrays) for child in node["children"]]
    if node["kind"] in ("list", "tuple"):
        return children if node["kind"] == "list" else tuple(children)
    return dict(zip(node["keys"], children, strict=True))


def _restore(node, arrays, as_numpy: bool):
    if node["kind"] in SCALARS:
        return node["value"] == "True" if node["kind"] == "bool" else SCALARS[node["kind"]](node["value"])
    raw, shape = arrays[node["name"]], tuple(node["shape"])
    if node["kind"] == "key":
        key = jax.random.wrap_key_data(jnp.asarray(raw), impl=node["impl"])
        return _same_shape(key, shape, node)
    dtype = _dtype(node["dtype"])
    if raw.dtype != dtype:  # extended dtypes lie in the file as bytes
        if raw.dtype != np.uint8 or raw.nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the array {node['name']!r} is not the {node['dtype']} {shape} that the header announces")
        raw = raw.view(dtype).reshape(shape)
    _same_shape(raw, shape, node)
    array = raw if as_numpy else jnp.asarray(raw)
    return np.array(raw) if array.dtype != dtype or as_numpy else array


def _same_shape(array, shape, node):
    if array.shape != shape:
        raise ValueError(f"the array {node['name']!r} has shape {array.shape}, the header announces {shape}")
    return array


def _dtype(name: str) -> np.dtype:
    """Only numeric dtypes by their plain names: NumPy's and those that JAX adds."""
    if name in PLAIN or (hasattr(jnp, name) and np.dtype(name).name == name and np.dtype(name).isbuiltin == 2):
        return np.dtype(name)
    raise ValueError(f"unknown dtype {name!r}")


def _difference(found, expected, where: str) -> str | None:
    """The first place where a file's structure is not the expected one, in words."""
    if found is None or expected is None:
        return None if found is expected else f"{where} is {_words(found)}, expected {_words(expected)}"
    if expected["kind"] in SCALARS and found["kind"] == "array" and found["shape"] == []:
        kinds = {"b": "bool", "i": "int", "u": "int", "c": "complex"}
        found = {"kind": kinds.get(_dtype(found["dtype"]).kind, "float")}
    if found["kind"] != expected["kind"]:
        return f"{where} is {_words(found)}, expected {_words(expected)}"
    if "children" not in expected:
        differs = any(found.get(item) != expected.get(item) for item in ("shape", "dtype"))
        return f"{where} is {_words(found)}, expected {_words(expected)}" if differs else None
    keys = [list(node.get("keys", range(len(node["children"])))) for node in (found, expected)]
    missing, extra = ([key for key in a if key not in b] for a, b in (keys[::-1], keys))
    if missing or extra:
        parts = [f"lacks {missing}"] * bool(missing) + [f"has {extra} in addition"] * bool(extra)
        return f"{where} {' and '.join(parts)}"
    for key, a, b in zip(keys[0], found["children"], expected["children"], strict=True):
        difference = _difference(a, b, _child(where, key, expected))
        if difference:
            return difference
    return None


def _words(node) -> str:
    if node is None:
        return "None"
    if "shape" in node:
        return f"{node['dtype']} of shape {tuple(node['shape'])}"
    return f"a Python {node['kind']}" if node["kind"] in SCALARS else f"a {node.get('type') or node['kind']}"


def _child(where: str, key, node) -> str:
    return f"{where}.{key}" if node["kind"] in ("namedtuple", "node") else f"{where}[{key!r}]"


def _lines(node, where: str) -> list[str]:
    if node is None or "children" not in node or not node["children"]:
        value = f" {node['value']}" if node and "value" in node else ""
        return [f"{where}: {_words(node)}{value}"]
    keys = node.get("keys", range(len(node["children"])))
    pairs = zip(keys, node["children"], strict=True)
    return [line for key, child in pairs for line in _lines(child, _child(where, key, node))]


def _at(path) -> str:
    return jax.tree_util.keystr(path)


def _jsonable(value):
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not among it")


@contextlib.contextmanager
def blame(path):
    """Whatever goes wrong while a file is taken apart is one ValueError that names the file."""
    if Path(path).exists() and not Path(path).is_file():
        raise ValueError(f"{path} cannot be loaded: it is a folder or a device.")
    try:
        yield
    except (ImportError, FileNotFoundError, PermissionError):
        raise
    except ValueError as error:
        raise ValueError(f"{path} cannot be loaded: {error}.") from error
    except Exception as error:
        reason = f"it is damaged, cut short or of another format ({type(error).__name__}: {error})"
        raise ValueError(f"{path} cannot be loaded: {reason}.") from error


def _read(path, with_arrays: bool = True) -> tuple[dict, dict[str, np.ndarray]]:
    with blame(path), open(path, "rb") as file:
        read = _read_safetensors if Path(path).suffix == ".safetensors" else _read_npz
        text, arrays = read(file, with_arrays)
        if text is None:
            raise ValueError("it was not written by jb.save (no jbilevel header)")
        header = json.loads(text)
        if header["format"] != FORMAT or not isinstance(header["meta"], dict) or "tree" not in header:
            raise ValueError("its header is not one of jb.save")
        if header["version"] > VERSION:
            raise ValueError(f"it has format version {header['version']}, this jbilevel reads up to {VERSION}: upgrade")
        names = [node["name"] for node in _leaves(header["tree"]) if "name" in node]
        if len(set(names)) < len(names):  # a small file could stand for any number of large arrays
            raise ValueError("its header names one array several times")
        return header, arrays


def _write_npz(file, header: str, arrays) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(HEADER), header.encode())  # ZipInfo: no time stamp, same bytes every time
        for name, array in arrays.items():
            if array.dtype.name not in PLAIN:  # unknown to NumPy's format
                array = np.frombuffer(array.tobytes(), np.uint8)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def stored_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name, none of them compressed, which together fit into the ``size`` bytes of the file."""
    members = {info.filename: info for info in archive.infolist()}
    packed = [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"its member {packed[0]!r} is compressed")
    if sum(info.file_size for info in members.values()) > size:
        raise ValueError("its members are larger than the file")
    return members


def _read_npz(file, with_arrays: bool):
    with zipfile.ZipFile(file) as archive:
        if HEADER not in archive.namelist():
            return None, {}
        members = stored_members(archive, os.fstat(file.fileno()).st_size)
        if members[HEADER].file_size > LARGEST_HEADER:
            raise ValueError(f"its header is larger than {LARGEST_HEADER} bytes")
        text = archive.read(HEADER)
        names = [name for name in members if name != HEADER] if with_arrays else []
        return text, {name.removesuffix(".npy"): _read_npy(archive, members[name]) for name in names}


def _read_npy(archive, info) -> np.ndarray:
    """One array, its size compared with the bytes that are there before any memory is taken."""
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError(f"its member {info.filename!r} has another npy version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if dtype.name not in PLAIN:
            raise ValueError(f"its member {info.filename!r} holds {dtype}, not numbers")
        if math.prod(shape) * dtype.itemsize != info.file_size - member.tell():
            raise ValueError(f"its member {info.filename!r} does not have the bytes for the shape {shape}")
        array = np.frombuffer(member.read(), dtype)  # to the end, so that the CRC is compared
    return array.astype(dtype.newbyteorder("="), copy=False).reshape(shape, order="F" if fortran else "C")


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('Files ending in .safetensors need a package: pip install "jbilevel[data]".') from error
    return safetensors


def _write_safetensors(file, header: str, arrays) -> None:
    known = {"bfloat16", *NATIVE.values()}
    stored = {k: a if a.dtype.name in known else np.frombuffer(a.tobytes(), np.uint8) for k, a in arrays.items()}
    body = f'{header[:-1]}, "{ARRAYS_SEAL}": "{_checksum(stored)}"}}'
    sealed = f'{body[:-1]}, "{SEAL}": "{zlib.crc32(body.encode()):08x}"}}'
    file.write(_safetensors().numpy.save(stored, {HEADER: sealed}))


def check_header(file) -> None:
    """ValueError where a safetensors file announces a header that would take gigabytes when read."""
    largest = 2 * LARGEST_HEADER  # ours, and the names and places of the arrays
    if int.from_bytes(file.read(8), "little") > largest:
        raise ValueError(f"its header is larger than {largest} bytes")
    file.seek(0)


def _read_safetensors(file, with_arrays: bool):
    package = _safetensors()
    check_header(file)
    with package.safe_open(file.name, framework="numpy") as opened:
        text = (opened.metadata() or {}).get(HEADER)
    if len(text or "") > LARGEST_HEADER:
        raise ValueError(f"its header is larger than {LARGEST_HEADER} bytes")
    if seal := re.fullmatch(rf'(.*), "{SEAL}": "([0-9a-f]{{8}})"}}', text or "", re.DOTALL):
        _compare(seal[2], f"{zlib.crc32((seal[1] + '}').encode()):08x}")
    if text is None or not with_arrays:
        return text, {}
    arrays = {}
    for name, entry in package.deserialize(file.read()):
        raw = np.frombuffer(entry["data"], NATIVE.get(entry["dtype"], "uint8"))
        arrays[name] = raw.reshape(entry["shape"]) if entry["dtype"] in NATIVE else raw
    if (written := json.loads(text).get(ARRAYS_SEAL)) is not None:  # files made elsewhere have none
        _compare(written, _checksum(arrays))
    return text, arrays


def _checksum(arrays) -> str:
    """CRC of the names and bytes of arrays, in the order of their names."""
    crc = 0
    for name in sorted(arrays):
        content = np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8)
        crc = zlib.crc32(content.data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _compare(written: str, computed: str) -> None:
    if written != computed:
        raise ValueError("its content does not fit its checksum, so it is damaged")
