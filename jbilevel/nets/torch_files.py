"""Weights in torchvision's layout from local files: safetensors, and ``.pth`` without executing its pickle.

A ``.pth`` file is a zip of raw arrays and one pickle that says how they make tensors. Here that pickle is read
operation by operation; of the objects it can name only dictionaries and tensors are understood, all else is refused.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jbilevel._core.io import blame, check_header, stored_members

LARGEST_PICKLE = 4 * 2**20  # about 20,000 tensors
LARGEST_RANK = 64
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
# what a tensor in a state dictionary is made with; nothing of this is imported or called
ALLOWED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in STORAGES),
}
LITERALS = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_torch(path) -> dict[str, np.ndarray]:
    """The arrays of a state dictionary, by name, as PyTorch lays them out; nothing in the file is executed.

    Args:
      path: ``.safetensors``, or what ``torch.save`` wrote since version 1.6: a dictionary of tensors, or one with such
        a dictionary under "state_dict". A leading "module." of all names is dropped. Tensors that share their storage
        in the file share it here.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, of the format before 1.6, or holds anything but names and tensors: one sentence
        with the file and the reason.
      ImportError: ``.safetensors`` without the package.

    >>> import os, tempfile, jbilevel as jb, numpy as np
    >>> from safetensors.numpy import save_file
    >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
    >>> save_file({"module.fc.weight": np.ones((3, 2), np.float32), "module.fc.bias": np.zeros(3, np.float32)}, path)
    >>> {name: array.shape for name, array in sorted(jb.nets.read_torch(path).items())}
    {'fc.bias': (3,), 'fc.weight': (3, 2)}
    """
    path = Path(path)
    with blame(path), open(path, "rb") as file:
        arrays = _read_safetensors(file) if path.suffix == ".safetensors" else _state(_read_zip(file))
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): array for name, array in arrays.items()}
    return arrays


def load_torch(model, path, *, skip: tuple[str, ...] = ()):
    """Put the weights and batch statistics of a file into a Flax nnx module whose parameters have torchvision's names.

    "layer1.0.conv1.weight" goes to ``model.layer1[0].conv1.kernel``, transposed from (out, in, h, w) to
    (h, w, in, out), and so on; dtypes stay those of the module.

    Args:
      model: such as `ResNet`; changed in place. path: as for `read_torch`.
      skip: beginnings of names in the file to leave out, ``("fc.",)`` for another number of classes.

    Returns: ``model``.

    Raises: what `read_torch` raises; ValueError: names that are missing, left over or of another shape.

    >>> import os, tempfile, jbilevel as jb
    >>> from flax import nnx
    >>> from safetensors.numpy import save_file
    >>> path = os.path.join(tempfile.mkdtemp(), "weights.safetensors")
    >>> save_file({"fc.weight": np.ones((3, 2), np.float32), "fc.bias": np.zeros(3, np.float32)}, path)
    >>> model = jb.nets.load_torch(nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0))), path)
    >>> model.fc(jnp.ones(2)).tolist()
    [2.0, 2.0, 2.0]
    """
    from flax import nnx

    arrays = {k: v for k, v in read_torch(path).items() if not k.startswith(skip) and "num_batches_tracked" not in k}
    wanted = {_torch_name(where): v for where, v in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))}
    wanted = {name: v for name, v in wanted.items() if not name.startswith(skip)}
    missing, surplus = sorted(set(wanted) - set(arrays)), sorted(set(arrays) - set(wanted))
    if missing or surplus:
        raise ValueError(f"{path} does not fit the module: it lacks {missing[:3]} and has {surplus[:3]} besides.")
    found = {name: _flax_layout(array) for name, array in arrays.items()}
    for name, variable in wanted.items():
        if found[name].shape != variable[...].shape:
            raise ValueError(
                f"{path} does not fit the module: {name} has shape {arrays[name].shape}, which would be "
                f"{found[name].shape} here, not {variable[...].shape}."
            )
    for name, variable in wanted.items():
        variable[...] = jnp.asarray(found[name], variable[...].dtype)
    return model


def _torch_name(where: tuple) -> str:
    names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    *outer, last = where
    return ".".join([*map(str, outer), names.get(last, last)])


def _flax_layout(array):
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T


# ---------------------------------------------------------------------------------------------------------------- files


def _read_safetensors(file) -> dict[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError('Files ending in .safetensors need a package: pip install "jbilevel[data]".') from error
    check_header(file)
    return load_file(file.name)


class Storage(NamedTuple):
    """Raw numbers in the file."""

    key: str
    dtype: np.dtype


class Global(NamedTuple):
    """A name that the pickle mentions, not the thing itself."""

    module: str
    name: str


class _Reader:
    """The raw numbers in an archive, each storage once, however many tensors share it."""

    def __init__(self, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], folder: str):
        self.archive, self.members, self.folder = archive, members, folder
        self.storages: dict[Storage, np.ndarray] = {}

    def member(self, name: str) -> bytes:
        return self.archive.read(self.members[f"{self.folder}/{name}"])

    def storage(self, storage: Storage) -> np.ndarray:
        if storage not in self.storages:
            self.storages[storage] = np.frombuffer(bytearray(self.member(f"data/{storage.key}")), storage.dtype)
        return self.storages[storage]

    def tensor(self, storage, offset, shape, stride) -> np.ndarray:
        """A strided view of a storage, after a look at whether it lies inside."""
        if not isinstance(storage, Storage):
            raise ValueError("a tensor has no storage")
        if type(shape) is not tuple or type(stride) is not tuple or not len(shape) == len(stride) <= LARGEST_RANK:
            raise ValueError("a tensor has a shape and strides that do not fit, or too many axes")
        if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *stride)):
            raise ValueError("a tensor has a shape, strides or an offset that are impossible")
        raw = self.storage(storage)
        if not (size := math.prod(shape)):
            return np.zeros(shape, storage.dtype)
        reach = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
        if max(reach, size) > raw.size:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage")
        strides = tuple(s * storage.dtype.itemsize for s in stride)
        return np.lib.stride_tricks.as_strided(raw[offset:], shape, strides)


def _read_zip(file):
    """What the pickle of the archive stands for."""
    if not zipfile.is_zipfile(file):
        raise ValueError("it is not a zip; files of PyTorch before 1.6 have to be saved again")
    with zipfile.ZipFile(file) as archive:
        members = stored_members(archive, file.seek(0, 2))
        names = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError("it has no data.pkl")
        reader = _Reader(archive, members, names[0].split("/")[0])
        if f"{reader.folder}/byteorder" in members and reader.member("byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        if members[names[0]].file_size > LARGEST_PICKLE:
            raise ValueError(f"its pickle is larger than {LARGEST_PICKLE} bytes")
        return _interpret(reader.member("data.pkl"), reader)


def _state(tree) -> dict[str, np.ndarray]:
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
    for name, value in tree.items():
        if not isinstance(value, np.ndarray):
            raise ValueError(f"its entry {name!r} is a {type(value).__name__}, not a tensor")
    return dict(tree)


# --------------------------------------------------------------------------------------------------------------- pickle


def _interpret(content: bytes, reader: _Reader):
    """Run a pickle on a stack of plain values; ValueError at the first operation that is not needed for tensors."""
    stack, marks, memo = [], [], {}

    def since_mark() -> list:
        start = marks.pop()
        top = stack[start:]
        del stack[start:]
        return top

    for operation, argument, _ in pickletools.genops(content):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in SIZES:
            stack[-SIZES[name] :] = [tuple(stack[-SIZES[name] :])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_named(*stack[-2:])]
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_made(stack.pop(), arguments, reader))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _dictionary(stack[-1])[_plain(key, str, int)] = value
        elif name == "SETITEMS":
            items = since_mark()
            _dictionary(stack[-1]).update(zip([_plain(key, str, int) for key in items[::2]], items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name == "BUILD":  # attributes of a state dictionary, such as its version
            stack.pop()
            _dictionary(stack[-1])
        else:
            raise ValueError(f"its pickle has the operation {name}, which tensors do not need")
    raise ValueError("its pickle has no end")


def _plain(value, *kinds: type):
    """No nested tuples, which can be small in the file and take forever to hash, to compare or to show."""
    if type(value) not in kinds:
        raise ValueError(f"its pickle has a {type(value).__name__} where a name should be")
    return value


def _named(module, name) -> Global:
    if (_plain(module, str), _plain(name, str)) not in ALLOWED:
        raise ValueError(f"its pickle asks for {module}.{name}, which is no part of a tensor")
    return Global(module, name)


def _dictionary(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"its pickle sets entries of a {type(value).__name__}")
    return value


def _storage(identity) -> Storage:
    if type(identity) is not tuple or len(identity) < 3:
        raise ValueError("its pickle refers to something that is no storage")
    kind, typed, key = identity[:3]
    if _plain(kind, str) != "storage" or not isinstance(typed, Global) or typed.name not in STORAGES:
        raise ValueError(f"its pickle refers to {kind!r}, which is no storage")
    if not _plain(key, str).isalnum():
        raise ValueError(f"its pickle names {key!r}, which is no storage")
    return Storage(key, np.dtype(jnp.dtype(STORAGES[typed.name])))


def _made(function, arguments, reader: _Reader):
    if function == Global("collections", "OrderedDict") and not arguments:
        return {}
    if function == Global("torch._utils", "_rebuild_tensor_v2"):
        return reader.tensor(*arguments[:4])
    if function == Global("torch._utils", "_rebuild_parameter") and isinstance(arguments[0], np.ndarray):
        return arguments[0]
    raise ValueError("its pickle calls something that makes no tensor")
