"""The sources of a corpus, divided into units of work: blocks of image files, webdataset shards, parquet files.

Each unit becomes one shard of ids. The division depends on the sources alone, not on who encodes them or when.
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
_CAPTIONS = ("caption", "text")  # columns or fields that are captions, if no name is given
_KEYS = ("__key__", "key", "id")  # columns that are keys
_ROWS = 16  # of a parquet file, read at once


@dataclass(frozen=True)
class Unit:
    """A part of the sources that becomes one shard.

    number: of the unit and its shard, from 0.
    kind: "images", "webdataset" or "parquet".
    source: path or URL; for image files, the listing that names them.
    start: for image files, the offset in bytes of the first one's line in the listing.
    count: for image files, their number.
    """

    number: int
    kind: str
    source: str
    start: int = 0
    count: int = 0


class Item(NamedTuple):
    """An image that is not decoded yet, or the reason why there is none.

    key: its name in the corpus.
    name: its name in messages.
    data: content of its file; or empty, and `path` is the file.
    caption: its caption, or None.
    problem: why there is no image; empty if there is one.
    transient: the problem is that the unit could not be read to its end now, but may be later.
    caption_path: a text file that holds the caption in place of `caption`, if the file exists; or empty.
    """

    key: str
    name: str
    data: bytes = b""
    path: str = ""
    caption: str | None = None
    problem: str = ""
    transient: bool = False
    caption_path: str = ""

    def crops(self, size: int, policy: str) -> Tensor:
        """The image as float32 [c, 3, size, size] in [0, 1]: c = 1 with the policy "centre", 10 with "ten".

        ValueError or OSError if there is no image, or it cannot be read.
        """
        if self.problem:
            raise ValueError(self.problem)
        image = read_image(self.path) if self.path else decode_image(self.data, self.name)
        return ten_crops(image, size) if policy == "ten" else resize_crop(image, size)[None]

    def read_caption(self) -> str | None:
        """The caption, or None; OSError if its file cannot be read."""
        if not self.caption_path:
            return self.caption
        try:
            return Path(self.caption_path).read_bytes().decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return None


def plan(
    sources: Sequence[str | os.PathLike[str]], images_per_unit: int, folder: Path, expected: str | None
) -> tuple[list[Unit], str]:
    """The units of `sources`, and a SHA-256 of all names of images and shards.

    Image files come first, in the order given, then shards and parquet files. The image files are listed in a file of
    `folder`, one JSON list [path, key] per line, so that no process has to hold their names.

    Args:
        sources: images, folders searched for images in all depths, webdataset shards (see
            `TrainingImages`), parquet files; patterns with braces.
        images_per_unit: image files in a unit.
        folder: existing folder for the listing.
        expected: the SHA-256 of an earlier call; if it differs, nothing is written.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read, or the listing cannot be written.
        ValueError: no images, a source given twice, a URL that cannot be opened, or sources that have changed.
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
            raise ValueError(f"{folder}: the sources have changed: images or shards were added, removed or renamed")
    if not files:
        listing.unlink(missing_ok=True)
    return units, digest.hexdigest()


def read_unit(unit: Unit, caption: str | None = None) -> Iterator[Item]:
    """The images of a unit, undecoded, in order; an image that cannot be read is an item with a problem.

    caption: column of parquet files and field of JSON members that holds the caption; None takes "caption" or "text".
        A sample's .txt member and the .txt file beside an image file are captions too.
    """
    fields = (caption,) if caption else _CAPTIONS
    if unit.kind == "images":
        yield from _listed(unit)
    elif unit.kind == "parquet":
        yield from _parquet(unit.source, fields)
    else:
        for sample in read_shard(unit.source, texts=True):
            key, text = "" if sample.ends_shard else sample.key, _text_of(dict(sample.texts), fields)
            yield Item(key, sample.name, sample.data, "", text, sample.problem, sample.transient)


def _check_apart(names: Sequence[str]) -> None:
    """Refuse a source that is given twice or lies in another one: its images would be encoded twice."""
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
    """(path, key) of image files. The key is the name as given or, in a folder, the path inside it."""
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
            path, name = json.loads(listing.readline())
            key = os.fsencode(name).decode("utf-8", "backslashreplace")  # bytes that are not UTF-8 become \\xNN
            yield Item(key, path, path=path, caption_path=str(Path(path).with_suffix(".txt")))


def _text_of(texts: Mapping[str, bytes], fields: Sequence[str]) -> str | None:
    """The caption among a sample's members: the first of `fields` that its JSON has, or else its text."""
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
    """Rows of a file as Hugging Face datasets writes them: `image` is struct{bytes, path} or the bytes."""
    pq = require("pyarrow.parquet", "corpus")
    count = 0
    try:
        # Without a buffer, a whole row group would be in memory, often hundreds of MB.
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
