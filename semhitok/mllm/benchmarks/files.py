"""Reading the files of the benchmarks; errors name the file and the place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from semhitok._files import parse_json
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


def read_lines(path: Path, skipped: Skipped) -> Iterator[tuple[Any, str]]:
    """The JSON value in each line of a file, and the name of the line in messages. Other lines are skipped."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = parse_json(line)
            except ValueError as error:
                skipped(f"{where}: expected JSON, got {error}")
                continue
            yield row, where


def field(row: Any, key: str, where: str, kinds: type | tuple[type, ...] = str) -> Any:
    """row[key], a value of these types; `where` names the row in the ValueError if there is none."""
    if not isinstance(row, dict) or key not in row:
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with {key!r}, got {got!s:.80}")
    value = row[key]
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise ValueError(f"{where}: {key}: expected {expected}, got {value!r:.80}")
    return value


def check_any_exists(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError if every file is missing; single ones are skipped where they are read."""
    names = list(dict.fromkeys(paths))
    if names and not any(path.is_file() for path in names):
        more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise FileNotFoundError(f"images: all missing: {', '.join(map(str, names[:NAMED]))}{more}")
