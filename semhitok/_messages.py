"""Text for the terminal: errors and names on one line, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from semhitok._optional import require

MINUTE = 60.0  # seconds between lines of progress


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
    """A tqdm bar on stderr, over `items` or updated by the caller, shown by the first process.

    Without a terminal to show a bar there is a line every minute.
    """
    from semhitok import distributed  # imports torch

    if sys.stderr.isatty():
        style: dict[str, Any] = {"leave": False}
    else:
        known = total is not None or hasattr(items, "__len__")
        line = "{desc}: {n_fmt} of {total_fmt}, {remaining} left\n" if known else "{desc}: {n_fmt}, {elapsed} so far\n"
        style = {"mininterval": MINUTE, "maxinterval": MINUTE, "delay": MINUTE, "bar_format": line}
    return require("tqdm").tqdm(items, desc=label, total=total, disable=distributed.rank() != 0, **style)
