"""Writing a file so that its name never stands for half of it."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Put `data` under `path`: readers see the old file or the new one, never a part.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    with open_atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` at the end: readers see the old file or the new one, never a part.

    The bytes go to a hidden file of the same folder, reach the disk, and are then renamed. An
    exception removes the hidden file; a killed process may leave `.semhitok-*.tmp` behind.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    path = Path(path)
    temporary = path.parent / f".semhitok-{secrets.token_hex(8)}.tmp"
    descriptor = None
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb", closefd=False) as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise  # about another file, from what was done while this one was open
        # The user knows the file by its own name, not by the temporary one.
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        if descriptor is not None:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
