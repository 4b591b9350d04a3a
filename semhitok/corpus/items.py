"""The images of a unit of the sources, one after the other, with their keys and captions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from torch import Tensor

from semhitok._messages import message
from semhitok.data.captions import MAX_TEXT, Caption, escaped, left_out, sample_caption, text_caption
from semhitok.data.images import decode_image, read_image, resize_crop, ten_crops
from semhitok.data.kinds import is_url
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


class Note(NamedTuple):
    """What the user should know about a unit, beside its images."""

    text: str


class Item(NamedTuple):
    """An image that is not decoded yet, or the reason why there is none.

    key: its name in the corpus.
    name: its name in messages.
    data: content of its file; or empty, and `path` is the file.
    caption: its caption.
    problem: why there is no image; empty if there is one.
    transient: the problem is that the unit could not be read to its end now, but may be later.
    caption_path: a text file that holds the caption in place of `caption`, if the file exists; or empty.
    """

    key: str
    name: str
    data: bytes = b""
    path: str = ""
    caption: Caption = Caption()
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

    def read_caption(self) -> Caption:
        """The caption; one that cannot be read is none, with a note."""
        if not self.caption_path:
            return self.caption
        try:
            if not stat.S_ISREG(os.stat(self.caption_path).st_mode):  # a pipe would be waited for
                return left_out(f"{self.caption_path}: expected a file, got something else")
            with open(self.caption_path, "rb") as file:
                return text_caption(file.read(MAX_TEXT + 1))
        except FileNotFoundError:
            return Caption()
        except OSError as error:
            return left_out(message(error))


def read_unit(unit: Unit, fields: Sequence[str]) -> Iterator[Item | Note]:
    """The images of a unit, undecoded, in order; an image that cannot be read is an item with a problem.

    fields: columns of parquet files and fields of JSON members that hold the caption; the first that has one counts.
        A sample's .txt member and the .txt file beside an image file are captions too.
    """
    from semhitok.corpus.tables import read_table  # which makes items

    if unit.kind == "images":
        yield from _listed(unit)
    elif unit.kind == "parquet":
        yield from _unique(read_table(unit.source, fields, unit.rows), unit.prefix)
    else:
        passed_over = PassedOver()
        yield from _unique(_samples(unit, fields, passed_over), unit.prefix)
        yield from (Note(f"{unit.source}: passed over {line}") for line in passed_over.lines())


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


def _unique(items: Iterable[Item], prefix: str) -> Iterator[Item]:
    """Items whose keys have the prefix, and #2, #3, ... where a key comes again."""
    seen: set[int] = set()  # hashes: a shard may have a million keys
    for item in items:
        key = f"{prefix}/{item.key}" if prefix and item.key else item.key
        number, unique = 1, key
        while key and _hash(unique) in seen:
            number += 1
            unique = f"{key}#{number}"
        seen.add(_hash(unique))
        yield item._replace(key=unique)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little")


def _listed(unit: Unit) -> Iterator[Item]:
    with open(unit.source, "rb") as listing:
        listing.seek(unit.start)
        for _ in range(unit.count):
            path, name = json.loads(listing.readline())
            yield Item(escaped(name), path, path=path, caption_path=str(Path(path).with_suffix(".txt")))
