"""Variables of MATLAB files, version 5 to 7, in which some data sets keep labels and lists."""

from __future__ import annotations

import zlib
from pathlib import Path

MAX_BYTES = 100_000_000


def read_mat(path, names: tuple[str, ...], max_bytes: int = MAX_BYTES) -> dict:
    """The variables ``names`` of a MATLAB file, as SciPy gives them; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, not of version 5 to 7, larger than ``max_bytes`` when unpacked, or lacks one of
            the variables.
    """
    import scipy.io

    path = Path(path)
    try:
        with path.open("rb") as stream:
            _check_size(stream, max_bytes)
        content = scipy.io.loadmat(path, variable_names=list(names))
    except FileNotFoundError:
        raise
    except Exception as error:  # SciPy raises anything on damaged files: TypeError, KeyError, zlib.error, ...
        raise ValueError(f"{path} is damaged, or no MATLAB file of version 5 to 7: {error}") from error
    missing = [name for name in names if name not in content]
    if missing:
        raise ValueError(f"{path} has no variable {missing[0]!r}: it is another file than expected.")
    return content


def _check_size(stream, max_bytes):
    """Unpack the variables without keeping them: SciPy would allocate whatever they unpack to."""
    head, total = stream.read(128), 0
    if len(head) < 128 or head[126:128] not in (b"IM", b"MI"):
        raise ValueError("it has no header of such a file")
    order = "little" if head[126:128] == b"IM" else "big"
    while tag := stream.read(8):
        kind, size = int.from_bytes(tag[:4], order), int.from_bytes(tag[4:], order)
        content = stream.read(min(size, max_bytes + 1))
        if len(content) < min(size, max_bytes + 1):
            raise ValueError("it ends early")
        if kind == 15:  # compressed
            unpack = zlib.decompressobj()
            while content:
                total += len(unpack.decompress(content, 1 << 20))
                content = unpack.unconsumed_tail
                if total > max_bytes:
                    break
        else:
            total += len(content)
        if total > max_bytes:
            raise ValueError(f"it unpacks to more than {max_bytes} bytes")
