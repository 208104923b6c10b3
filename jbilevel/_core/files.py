"""Files that are written whole or not at all, and the temporary ones that killed processes leave behind."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


class WriteError(OSError):
    """A file could not be written; ``strerror`` is a sentence that names it. What was there before is still there."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator:
    """A binary file that takes the place of ``path`` only once it is complete and on disk.

    Raises:
      FileNotFoundError: the folder does not exist. WriteError: the disk is full, or the folder may not be written to.
    """
    remove_leftovers(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(error.errno, f"the folder of {path} does not exist; make it first") from error
    except OSError as error:
        _remove(temporary)
        raise unwritable(path, error) from error
    except BaseException:
        _remove(temporary)
        raise
    with contextlib.suppress(OSError):  # the new name itself; not every system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def unwritable(path, error: OSError) -> WriteError:
    """The sentence that says which file could not be written, and why."""
    sentence = f"{path} could not be written: {error.strerror or error}; free space there, or give another path."
    return WriteError(error.errno, sentence)


def require_writable(path: Path, name: str) -> None:
    """OSError, of the kind that the system says, unless a file can be made beside ``path``, the argument ``name``."""
    temporary = _temporary(path)
    try:
        open(temporary, "wb").close()
    except OSError as error:
        sentence = f"`{name}`={path} cannot be written: {error.strerror}; give a folder that you may write to."
        raise OSError(error.errno, sentence) from error
    _remove(temporary)


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of ``path`` whose process is dead and which nobody, here or on another host, holds."""
    if os.name != "posix" or not path.parent.is_dir():
        return
    for name in os.listdir(path.parent):
        found = re.fullmatch(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.tmp", name)
        if found and _is_dead(int(found[1])):
            with contextlib.suppress(OSError), open(path.with_name(name), "rb+") as file:
                _lock(file)
                os.unlink(path.with_name(name))


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _lock(file) -> None:
    """Hold the file as long as it is open, so that a host which does not see this process leaves it alone.

    Raises: OSError: somebody else holds it.
    """
    if os.name == "posix":
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:  # somebody else's
        pass
    return False
