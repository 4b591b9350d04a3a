"""What commands print, the names of the files they write, and their exit codes."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from semhitok._messages import printable
from semhitok.data.formats import image_stem

DONE, FAILED, UNUSABLE, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130

_MAX_NAME_BYTES = 200  # file systems take 255, and a number and suffix are added


def exit_code(skipped: int) -> int:
    """The exit code of a command that finished but skipped so many inputs."""
    return SKIPPED if skipped else DONE


def exit_code_of_process(command: str, skipped: int) -> int:
    """`exit_code`, or 0 in a process of torchrun, which takes any other for a crash; the first process says so."""
    from semhitok import distributed

    code = exit_code(skipped)
    if not (code and distributed.launched()):
        return code
    if os.environ.get("RANK", "0") == "0":
        problem = f"torchrun takes any exit code but 0 for a crash: this is 0 in place of {code}"
        print(f"semhitok {command}: {problem}, as inputs were skipped", file=sys.stderr)
    return DONE


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Aligned lines of two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {printable(str(value))}" for name, value in rows)


def usage_rows(usage: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """Rows of a table for `CodeUsage.summary`."""
    for view, figures in usage.items():
        yield f"{view} usage", f"{figures['usage']:.3f}, perplexity {figures['perplexity']:.1f}"


def png_names(names: Iterable[str]) -> list[str]:
    """A safe and unique file name for each source name: its last part, with the suffix .png.

    The names may come from an untrusted file: folders and leading dots are dropped, and everything but letters, digits,
    spaces and `-_.()` becomes `_`. Names that collide get -2, -3, ... in order; upper and lower case count as equal.
    """
    taken: set[str] = set()
    last: dict[str, int] = {}
    result = []
    for name in names:
        base = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
        stem = re.sub(r"[^\w\-. ()]", "_", image_stem(base)).lstrip(".").strip()
        stem = stem.encode("utf-8", "ignore")[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
        stem = stem.strip() or "image"
        key = stem.casefold()
        unique = stem
        while unique.casefold() in taken:
            last[key] = last.get(key, 1) + 1
            unique = f"{stem}-{last[key]}"
        taken.add(unique.casefold())
        result.append(f"{unique}.png")
    return result
