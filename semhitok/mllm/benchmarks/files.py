"""Reading the files of the benchmarks; errors name the file and the place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from semhitok._files import parse_json, read_text

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


def read_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """The JSON value in each line of a file, and the name of the line in messages."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = parse_json(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected JSON, got {error}") from None
            yield row, where


def field(row: Any, key: str, where: str) -> Any:
    """row[key]; `where` names the row in the error if it is missing."""
    if not isinstance(row, dict) or key not in row:
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with {key!r}, got {got!s:.80}")
    return row[key]


def check_files(paths: Iterable[Path]) -> None:
    """Raise FileNotFoundError if a file is missing."""
    missing = [str(path) for path in dict.fromkeys(paths) if not path.is_file()]
    if missing:
        more = f", and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise FileNotFoundError(f"images: {len(missing)} missing: {', '.join(missing[:NAMED])}{more}")
