"""Text for the terminal: errors and names on one line, and the progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from semhitok._optional import require


def message(error: BaseException) -> str:
    """What went wrong, without Python's decoration and the system's error numbers."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def printable(text: str) -> str:
    """`text` with control characters, line breaks and broken Unicode escaped: one line that cannot disturb a terminal.

    File names and archive members may hold any of them.
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def progress(items: Iterable[Any] | None, label: str, total: int | None = None) -> Any:
    """A tqdm bar on stderr, over `items` or updated by the caller; shown on a terminal, by the first process."""
    from semhitok import distributed  # imports torch

    hidden = None if distributed.rank() == 0 else True  # None: shown if stderr is a terminal
    return require("tqdm").tqdm(items, desc=label, total=total, disable=hidden, leave=False)
