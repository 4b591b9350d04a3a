"""Writing files atomically, and reading text and JSON with errors that name the file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; ValueError if it holds other bytes."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes") from None


Pairs = Callable[[list[tuple[str, Any]]], dict[str, Any]]


def parse_json(text: str | bytes, pairs: Pairs | None = None) -> Any:
    """The value of a JSON text; ValueError for whatever is none, also where it is nested too deep.

    pairs: makes each object from its keys and values; None keeps the last of equal keys.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("values nested too deep") from None


def read_object(path: Path, decode: Callable[[bytes], str | bytes] = bytes, pairs: Pairs | None = None) -> Any:
    """The JSON object in a file; ValueError if there is none.

    decode: what makes text of the file's bytes, if it need not be UTF-8.
    pairs: see `parse_json`.
    """
    try:
        content = parse_json(decode(path.read_bytes()), pairs)
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_atomic(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Write `data` to `path`, as `open_atomic` does."""
    with open_atomic(path) as file:
        file.write(data)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON with a last line end, as `open_atomic` does."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


@contextlib.contextmanager
def open_atomic(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when it is closed: readers see the old file or the new one, never a part.

    The bytes go to a hidden file in the same folder, which is flushed to the disk and then renamed. An exception
    removes it; a killed process may leave `.semhitok-*.tmp` behind.

    Raises:
        OSError: the folder does not exist or is not writable, or the disk is full.
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
            raise  # about another file, by the code that writes this one
        # The user knows the file by `path`, not by the temporary name.
        raise type(error)(error.errno, error.strerror, str(path)) from None
    finally:
        if descriptor is not None:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
