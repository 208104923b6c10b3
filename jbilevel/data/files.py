"""What all readers share about files: errors that name them, folders of an expected form, bytes that were announced."""

from __future__ import annotations

import contextlib
import gzip
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

_BLOCK = 1 << 24


class Unusable(Exception):
    """A file that cannot be used; the message goes on with a sentence that begins with its path."""


@contextlib.contextmanager
def named(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside is one ValueError that names the file, which should be a ``kind``.

    What is no file, but a folder or a pipe (which would wait for ever), is not opened. Packages raise anything on
    damaged files. :class:`Unusable` gives the rest of the sentence itself. A file that is
    missing or locked (the error names it) and a package that is missing are told as they are.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no {kind}, but a folder or a device.")
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError):
        raise
    except Unusable as error:
        raise ValueError(f"{path} {error}") from None
    except Exception as error:
        raise ValueError(f"{path} is damaged, truncated or no {kind}: {error or type(error).__name__}") from error


def checked_root(root, expected: Sequence[str], tree: str) -> Path:
    """``root`` as a path.

    Raises:
        FileNotFoundError: it is no folder, or lacks one of ``expected``; the message shows the expected ``tree``.
    """
    root = Path(root)
    missing = (
        root if not root.is_dir() else next((root / name for name in expected if not (root / name).exists()), None)
    )
    if missing is not None:
        raise missing_file(missing, tree)
    return root


def missing_file(path, tree: str) -> FileNotFoundError:
    return FileNotFoundError(f"{path} is missing: `root` must be a folder with\n{tree}")


def inside(root: Path, name: str, source) -> Path:
    """The path of a file that a list names, relative to ``root``.

    Raises:
        ValueError: it would lie outside of ``root``: the list, called ``source``, is not to be trusted.
    """
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name:
        raise ValueError(f"{source} names the file {name!r}, which is not below `root`.")
    return root / relative


def read_text(path: Path, most: int = 20_000_000) -> str:
    """A list of a data set, in UTF-8.

    Raises:
        ValueError: it is larger than ``most`` bytes, or no text; with its name.
    """
    with named(path, "list in UTF-8"), path.open("rb") as stream:
        content = stream.read(most + 1)
        if len(content) > most:
            raise Unusable(f"is larger than {most} bytes, more than any list of such a data set.")
        return content.decode("utf-8")


def is_entry(path: Path) -> bool:
    """Whether a file is there, or a link to none: that one should fail by its name and not be left out."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def opened(path: Path) -> BinaryIO:
    """A file to read bytes from, unpacked on the way if its name ends in ``.gz``."""
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def read_exactly(stream: BinaryIO, size: int) -> bytearray:
    """The next ``size`` bytes, in blocks: memory grows with what is there and not with what was announced.

    Raises:
        EOFError: there are fewer.
    """
    content = bytearray()
    while part := stream.read(min(size - len(content), _BLOCK)):
        content += part
    if len(content) < size:
        raise EOFError(f"it ends after {len(content)} of {size} bytes")
    return content


def optional_package(module: str, extra: str):
    """An optional package, imported now.

    Raises:
        ImportError: it is missing; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"This reader needs {package}, which is missing: pip install 'jbilevel[{extra}]'.") from error
