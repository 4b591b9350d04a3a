"""Reading the files of the benchmarks; errors name the file and the place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from semhitok._files import parse_json, read_object
from semhitok.data.captions import clean, decode_text
from semhitok.data.skipped import Skipped

NAMED = 3  # missing files that a message lists


def data_files(data: Path, *patterns: str) -> list[Path]:
    """The benchmark's own files: `data` itself, or all files in it that match the first pattern with a match."""
    if data.is_file():
        return [data]
    for pattern in patterns:
        found = sorted(data.glob(pattern))
        if found:
            return found
    raise FileNotFoundError(f"{data}: expected {patterns[0]} there, found none")


def image_folder(data: Path, given: Path | None, *names: str) -> Path:
    """The folder of the images: the one given, or the first of these names beside the annotations."""
    if given is not None:
        if not given.is_dir():
            raise FileNotFoundError(f"--images: no folder {given}")
        return given
    base = data.parent if data.is_file() else data
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise FileNotFoundError(f"{base}: expected the images in {names[0]} there, or --images, found none")


def read_lines(path: Path, skipped: Skipped) -> Iterator[tuple[int, Any, str]]:
    """The number of each line of a file, from 1, its JSON value, and its name in messages. Other lines are skipped."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                skipped(f"{where}: expected JSON, got {error}")
                continue
            yield number, row, where


def read_items(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """The items of the JSON object in a file; of a key that comes again the first counts, and the others are skipped.

    Raises:
        ValueError: there is no object.
    """
    pairs: list[tuple[str, Any]] = []

    def keep(found: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal pairs
        pairs = found  # at the end, those of the outermost object
        return dict(found)

    read_object(path, decode_text, keep)
    seen: set[str] = set()
    for key, value in pairs:
        if key in seen:
            skipped(f"{path}: {key}: expected once, got it again")
        else:
            seen.add(key)
            yield key, value


def read_content(path: Path) -> dict[str, Any]:
    """The JSON object in a file, with U+FFFD for bytes that are not UTF-8; ValueError if there is none."""
    content: dict[str, Any] = read_object(path, decode_text)
    return content


def field(row: Any, key: str, kinds: type | tuple[type, ...] = str) -> Any:
    """row[key], clean text or another of these types; ValueError if there is none."""
    if not isinstance(row, dict) or key not in row:
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"expected an object with {key!r}, got {got!s:.80}")
    value = row[key]
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{key}: expected {expected}, got {value!r:.80}")
    return clean(value)


def check_any_exists(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError if every file is missing; single ones are skipped where they are read."""
    names = list(dict.fromkeys(paths))
    if names and not any(map(os.path.isfile, names)):
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise FileNotFoundError(f"images: all missing: {', '.join(map(str, names[:NAMED]))}{more}")
