"""The images of a corpus in fixed units of work: blocks of image files, webdataset shards, parquet files.

A unit is the same whoever works on it and whenever: one unit becomes one shard of ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from semhitok._files import open_atomic
from semhitok._optional import require
from semhitok.data.images import decode_image, read_image, resize_crop, ten_crops, walk_images
from semhitok.data.kinds import PARQUET, SHARDS, expand_braces, kind_of
from semhitok.data.shards import expand_shards, read_shard

LISTING = "images.jsonl"
CROPS = {"centre": 1, "ten": 10}  # images made of one
_CAPTIONS = ("caption", "text")  # names of a caption where none is given
_KEYS = ("__key__", "key", "id")
_ROWS = 16  # of a parquet file, in memory at once


@dataclass(frozen=True)
class Unit:
    """A part of the sources that becomes one shard.

    kind: "images", "webdataset" or "parquet".
    source: path or URL; of image files the listing that names them.
    start: of image files: bytes of the listing before the first one's line.
    count: of image files: how many.
    """

    number: int
    kind: str
    source: str
    start: int = 0
    count: int = 0


class Item(NamedTuple):
    """An image that is not decoded yet, or why there is none.

    key: its name in the corpus.
    name: its name in messages.
    data: content of its file, if it is in memory; otherwise `path` says where it is.
    problem: why there is no image; empty if there is one.
    again: the unit could not be read to its end, but may be another time.
    """

    key: str
    name: str
    data: bytes = b""
    path: str = ""
    caption: str | None = None
    problem: str = ""
    again: bool = False

    def crops(self, size: int, policy: str) -> tuple[Tensor, str | None]:
        """float32 [CROPS[policy], 3, size, size] in [0, 1], and the caption if there is one.

        Raises:
            ValueError, OSError: there is no image, or it cannot be read.
        """
        if self.problem:
            raise ValueError(self.problem)
        image = read_image(self.path) if self.path else decode_image(self.data, self.name)
        caption = _sibling(self.path) if self.path else self.caption
        return ten_crops(image, size) if policy == "ten" else resize_crop(image, size)[None], caption


def plan(
    sources: Sequence[str | os.PathLike[str]], images_per_unit: int, folder: Path, expected: str | None
) -> tuple[list[Unit], str]:
    """The units of `sources`, and a SHA-256 of all that they name.

    Image files come first, in the order given, then shards and parquet files. The files are listed in
    `folder`, a JSON list [path, key] a line, so that no process has to hold their names.

    Args:
        sources: images, folders searched for images in all depths, webdataset shards (see
            `TrainingImages`), parquet files; patterns with braces.
        images_per_unit: image files in a unit.
        folder: existing folder for the listing.
        expected: the SHA-256 that must come out, if known; nothing is written if another one does.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read, or the listing not be written.
        ValueError: no images, a source twice, a URL that cannot be opened, or other sources than expected.
    """
    names = [os.fspath(source) for source in sources]
    _check_apart(names)
    files = [name for name in names if kind_of(name) not in (SHARDS, PARQUET)]
    digest = hashlib.sha256()
    units: list[Unit] = []
    listing = folder / LISTING
    with open_atomic(listing) as out:
        place = count = 0
        for path, key in _files(files):
            line = json.dumps([path, key]).encode() + b"\n"
            digest.update(line)
            out.write(line)
            if count % images_per_unit == 0:
                units.append(Unit(len(units), "images", str(listing), place))
            units[-1] = replace(units[-1], count=count % images_per_unit + 1)
            place, count = place + len(line), count + 1
        for name in names:
            if kind_of(name) == PARQUET:
                units += [Unit(len(units) + n, "parquet", path) for n, path in enumerate(_parquet_files(name))]
            elif kind_of(name) == SHARDS:
                units += [Unit(len(units) + n, "webdataset", url) for n, url in enumerate(expand_shards(name))]
        if not units:
            raise ValueError(f"{', '.join(names)}: no images found")
        described = [replace(unit, source="") if unit.kind == "images" else unit for unit in units]
        digest.update(json.dumps([astuple(unit) for unit in described]).encode())
        if expected not in (None, digest.hexdigest()):
            raise ValueError(f"{folder}: its sources were others: images or shards came, went or changed their names")
    if not files:
        listing.unlink(missing_ok=True)
    return units, digest.hexdigest()


def read_unit(unit: Unit, caption: str | None = None) -> Iterator[Item]:
    """The images of a unit, undecoded, in order. What cannot be read comes as an item with a problem.

    caption: column of parquet files and field of JSON members to take; "caption" or "text" without one. Beside
        that, a sample's .txt member and the .txt file beside an image file are captions.
    """
    fields = (caption,) if caption else _CAPTIONS
    if unit.kind == "images":
        yield from _listed(unit)
    elif unit.kind == "parquet":
        yield from _parquet(unit.source, fields)
    else:
        for sample in read_shard(unit.source, texts=True):
            yield Item(
                "" if sample.ends_shard else sample.key, sample.name, sample.data, "",
                _text_of(dict(sample.texts), fields), sample.problem, sample.transient,
            )  # fmt: skip


def printable_utf8(text: str) -> str:
    """A file's name as text that every file can hold: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _check_apart(names: Sequence[str]) -> None:
    """Refuse a source that is given twice or lies in another one: its images would be doubled."""
    seen: dict[str, str] = {}
    for name in names:
        real = name if kind_of(name) == SHARDS else os.path.realpath(name)
        if real in seen:
            raise ValueError(f"sources: expected each once, got {seen[real]} and {name}")
        seen[real] = name
    for real, name in seen.items():
        for parent in Path(real).parents:
            if str(parent) in seen and kind_of(name) not in (SHARDS, PARQUET):
                raise ValueError(f"sources: expected each once, got {name}, which is in {seen[str(parent)]}")


def _files(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(path, key) of image files: a key is the name as given, or the path inside the folder given."""
    for name in names:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir():
            yield from ((str(found), found.relative_to(path).as_posix()) for found in walk_images(path))
        else:
            yield name, path.as_posix()


def _listed(unit: Unit) -> Iterator[Item]:
    with open(unit.source, "rb") as listing:
        listing.seek(unit.start)
        for _ in range(unit.count):
            path, key = json.loads(listing.readline())
            yield Item(printable_utf8(key), path, path=path)


def _sibling(path: str) -> str | None:
    try:
        return Path(path).with_suffix(".txt").read_bytes().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return None


def _text_of(texts: Mapping[str, bytes], fields: Sequence[str]) -> str | None:
    """The caption among a sample's members: that of its JSON if a field of it is one, else its text."""
    for suffix in sorted(texts, key=lambda suffix: (not suffix.endswith("json"), suffix.count("."), suffix)):
        text = texts[suffix].decode("utf-8", "replace")
        if suffix.endswith("txt"):
            return text.strip()
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            continue
        found = [content[f] for f in fields if isinstance(content, dict) and isinstance(content.get(f), str)]
        if found:
            return found[0]
    return None


def _parquet_files(name: str) -> list[str]:
    found = expand_braces(name)
    for path in found:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such parquet file (URLs of parquet files are not read)")
    return found


def _parquet(path: str, fields: Sequence[str]) -> Iterator[Item]:
    """Rows of a file in the layout of Hugging Face datasets: `image` is struct{bytes, path} or the bytes."""
    pq = require("pyarrow.parquet", "corpus")
    count = 0
    try:
        # Unbuffered, a whole row group, often hundreds of MB, would be in memory.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if "image" not in names:
                raise ValueError(f"expected a column image, got {', '.join(names)}")
            key = next((name for name in _KEYS if name in names), None)
            text = next((name for name in fields if name in names), None)
            columns = [name for name in ("image", key, text) if name]
            for batch in file.iter_batches(_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    yield _row(path, count, row, key, text)
                    count += 1
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        reason = " ".join(str(error).split())
        yield Item("", path, problem=f"{path}: cannot read the file after {count} rows: {reason}")


def _row(path: str, number: int, row: dict[str, Any], key: str | None, text: str | None) -> Item:
    image = row["image"]
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    found = str(row[key]) if key else name or str(number)
    problem = "" if isinstance(data, bytes) and data else f"{path}: row {number}: no image in it"
    caption = row[text] if text and isinstance(row[text], str) else None
    return Item(found, f"{path}: row {number}", data or b"", "", caption, problem)
