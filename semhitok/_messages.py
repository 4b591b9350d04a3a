"""Text for the terminal: errors and names on one line, and the progress bar."""

from __future__ import annotations

import sys
import time
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


def warn(text: str) -> None:
    """Print what the user should know on stderr, in one line."""
    print(f"semhitok: {printable(text)}", file=sys.stderr)


def progress(items: Iterable[Any] | None, label: str, total: int | None = None) -> Any:
    """A tqdm bar on stderr, over `items` or updated by the caller, shown by the first process.

    Without a terminal to show a bar there is a line every minute.
    """
    from semhitok import distributed  # imports torch

    tqdm: Any = require("tqdm").tqdm
    hidden = distributed.rank() != 0
    if sys.stderr.isatty():
        return tqdm(items, desc=label, total=total, disable=hidden, leave=False)

    class Lines(tqdm):
        """A bar that prints itself as a line now and then, and not anew with every message."""

        shown = time.monotonic()

        def clear(self, *_: Any, **__: Any) -> None:
            pass

        def display(self, *_: Any, **__: Any) -> None:
            now = time.monotonic()
            if now - self.shown >= MINUTE:
                self.shown = now
                print(self, file=self.fp, flush=True)

    known = total is not None or hasattr(items, "__len__")
    line = "{desc}: {n_fmt} of {total_fmt}, {remaining} left" if known else "{desc}: {n_fmt}, {elapsed} so far"
    rare = {"mininterval": MINUTE, "maxinterval": MINUTE, "delay": MINUTE}
    return Lines(items, desc=label, total=total, disable=hidden, bar_format=line, **rare)
