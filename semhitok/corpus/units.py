"""Units of work: parts of the sources that become one shard each, and the images in them, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from semhitok.corpus.items import Item, Note
from semhitok.corpus.tables import read_table
from semhitok.data.captions import escaped, left_out, sample_caption
from semhitok.data.kinds import is_url
from semhitok.data.listing import caption_file
from semhitok.data.passed_over import PassedOver
from semhitok.data.shards import read_shard


@dataclass(frozen=True)
class Unit:
    """A part of the sources that becomes one shard.

    number: of the unit and its shard, from 0.
    kind: "images", "webdataset" or "parquet".
    source: path or URL; for image files, the listing that names them.
    start: for image files, the offset in bytes of the first one's line in the listing.
    count: for image files, their number.
    prefix: what is put before the keys of a shard or file, or empty; the keys in a listing have theirs already.
    rows: what is put before the number of a row that has no key.
    """

    number: int
    kind: str
    source: str
    start: int = 0
    count: int = 0
    prefix: str = ""
    rows: str = ""


def read_unit(unit: Unit, fields: Sequence[str]) -> Iterator[Item | Note]:
    """The images of a unit, undecoded, in order; an image that cannot be read is an item with a problem.

    fields: columns of parquet files and fields of JSON members that hold the caption; the first that has one counts.
        A sample's .txt member and the .txt file beside an image file are captions too.
    """
    if unit.kind == "images":
        yield from _listed(unit)
    elif unit.kind == "parquet":
        yield from _unique(read_table(unit.source, fields, unit.rows), unit.prefix)
    else:
        passed_over = PassedOver()
        yield from _unique(_samples(unit, fields, passed_over), unit.prefix)
        if passed_over.counts:
            yield Note(f"{unit.source}: {passed_over.summary()}")


def source_state(unit: Unit) -> Any:
    """Size and time of change of what a unit is read from, as JSON has it; None if only its name is known, as of a URL.

    For image files this is a digest over the files and the text files beside them.
    """
    if unit.kind == "images":
        digest = hashlib.sha256()
        for item in _listed(unit):
            digest.update(json.dumps([_state(item.path), _state(item.caption_path)]).encode())
        return digest.hexdigest()
    path = unit.source
    if is_url(path):
        parsed = urlparse(path)
        if parsed.scheme != "file":
            return None
        path = url2pathname(parsed.path)
    return _state(path)


def _state(path: str) -> list[int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return [found.st_size, found.st_mtime_ns]
    return None


def _samples(unit: Unit, fields: Sequence[str], passed_over: PassedOver) -> Iterator[Item]:
    for sample in read_shard(unit.source, texts=True, passed_over=passed_over):
        key = "" if sample.ends_shard else sample.key
        caption = sample_caption(sample.texts, fields).but(*map(left_out, sample.notes))
        yield Item(key, sample.name, sample.data, "", caption, sample.problem, sample.transient)


def _unique(items: Iterable[Item | Note], prefix: str) -> Iterator[Item | Note]:
    """Items whose keys have the prefix, and #2, #3, ... where a key comes again."""
    seen: dict[int, int] = {}  # how often a key came, by its hash: a shard may have a million keys
    for item in items:
        if isinstance(item, Note):
            yield item
            continue
        key = unique = f"{prefix}/{item.key}" if prefix and item.key else item.key
        number = seen.get(_hash(key), 0)
        while key and _hash(unique) in seen:
            number += 1
            unique = f"{key}#{number}"
        seen[_hash(key)] = number or 1
        seen.setdefault(_hash(unique), 1)
        yield item._replace(key=unique)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little")


def _listed(unit: Unit) -> Iterator[Item]:
    with open(unit.source, "rb") as listing:
        listing.seek(unit.start)
        for _ in range(unit.count):
            path, name = json.loads(listing.readline())
            yield Item(escaped(name), path, path=path, caption_path=caption_file(path))
