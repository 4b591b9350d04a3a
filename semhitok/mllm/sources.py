"""Sources of records for the unified model: JSONL and ids files, webdataset shards, corpora of ids.

A record is one of

    {"messages": [{"role", "content"}, ...], ...}   a conversation, with `<image>` where its images stand
    {"caption": text, ...}                          one image and what it shows
    {"text": text}                                  text alone

with the images as "images": [paths], relative to the file's folder, or as "codes": [ids of an image, row by row, ...]
and the "codebook_hash" they belong to. A JSONL file has a record in each line. In webdataset shards a sample's .txt is
its caption, and its .json such a record. An ids file of `semhitok encode` has its captions in a file beside it, a
corpus has them inside.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from semhitok._messages import message, warn
from semhitok.corpus.format import MANIFEST
from semhitok.corpus.ids_file import load_codes
from semhitok.corpus.reader import Encoded, EncodedCorpus
from semhitok.data.captions import FIELDS, caption_of, first_caption, parse_json, text_caption, value_caption
from semhitok.data.kinds import FOLDER, IDS_FILE, JSONL, SHARDS, kind_of
from semhitok.data.passed_over import PassedOver
from semhitok.data.shards import ShardSample, expand_shards, read_reporting, shards_in
from semhitok.data.skipped import Skipped
from semhitok.data.stream import START, ShuffledShards, epoch_order
from semhitok.mllm import prompts
from semhitok.mllm.config import TASKS, RowsConfig, SourceConfig
from semhitok.mllm.packing import Sample

Record = Mapping[str, Any]


class Source(Protocol):
    """Records of one kind, in any number of streams.

    task, weight, question: see `SourceConfig`.
    description: identifies the records, as JSON: two runs on the same data have the same.
    """

    task: str
    weight: float
    question: str
    description: dict[str, Any]

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        """(record or the ValueError in its stead, place after it) from a place on, endless; None is the beginning."""

    def texts(self, skipped: Skipped) -> Iterator[str]:
        """All texts, once, to make a text tokenizer from; `skipped` is told what cannot be used."""


class Records:
    """Records that can be counted; each comes once an epoch, in an order that follows from the seed and the epoch.

    Args:
        records: see the module, with "codes" as integers or tensors [h, w]; or finished samples made by `join`, from
            which no caption is dropped.
        task, weight, question: see `SourceConfig`.
        codebook_hash: of "codes" in records that do not name theirs.
        folder: that paths of images are relative to.
        description: for records that are not to be hashed.

    Raises:
        ValueError: no records, or no such task.
    """

    def __init__(
        self,
        records: Sequence[Record | Sample],
        task: str,
        *,
        weight: float = 1.0,
        question: str = "",
        codebook_hash: str | None = None,
        folder: str | os.PathLike[str] = ".",
        description: dict[str, Any] | None = None,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
        if not len(records):
            raise ValueError("records: expected at least one, got none")
        self.records, self.task, self.weight, self.question = records, task, weight, question
        self.codebook_hash, self.folder = codebook_hash, Path(folder)
        self.description = description or {"records": len(records), "sha256": _digest(records)}
        self._orders: dict[tuple[int, int], Tensor] = {}

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        drawn = place or 0
        while True:
            epoch, position = divmod(drawn * streams + number, len(self.records))
            drawn += 1
            index = int(self._order(seed, epoch)[position])
            record = self._record(index)
            if isinstance(record, Mapping):
                known = {"name": f"record {index + 1}", "codebook_hash": self.codebook_hash}
                record = {**known, **record, "folder": self.folder}  # a record does not say where its images are
            elif not isinstance(record, (Sample, ValueError)):
                record = ValueError(f"record {index + 1}: expected an object, got {type(record).__name__}")
            yield record, drawn

    def _order(self, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) not in self._orders:
            if len(self._orders) > 3:  # streams are in two epochs at most
                self._orders.clear()
            self._orders[seed, epoch] = epoch_order(len(self.records), seed, epoch)
        return self._orders[seed, epoch]

    def texts(self, skipped: Skipped) -> Iterator[str]:
        return _texts_of((self._record(n) for n in range(len(self.records))), skipped)

    def _record(self, n: int) -> Any:
        """Record n, or the ValueError that says why it cannot be used."""
        try:
            return self.records[n]
        except (ValueError, TypeError) as error:
            return ValueError(str(error))


class Lines(Sequence[Record]):
    """The objects of a JSONL file, each read from the file when it is asked for."""

    def __init__(self, path: str) -> None:
        self.path, self.starts = path, array("Q")
        with open(path, "rb") as file:
            mark = file.read(3)
            if mark[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError(f"{path}: expected UTF-8 text, got UTF-16")
            start = len(mark) if mark == codecs.BOM_UTF8 else 0
            file.seek(start)
            for line in file:
                if not line.isspace():
                    self.starts.append(start)
                start += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, n: Any) -> Any:
        with open(self.path, "rb") as file:
            file.seek(self.starts[n])
            line = file.readline()
        where = f"{self.path}: record {n + 1}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        return {**record, "name": where}


class CaptionedIds(Sequence[Record]):
    """The images of an ids file with the captions of a JSON file {name: caption}."""

    def __init__(self, path: str, captions: str | None) -> None:
        file = load_codes(path)
        self.codes, self.names, self.codebook_hash = file.codes, file.names, file.codebook_hash
        if captions is None:
            raise ValueError(f"captions: expected a JSON file {{name: caption}} for {path}, got none")
        self.captions = parse_json(Path(captions).read_bytes(), captions)
        if not isinstance(self.captions, dict):
            raise ValueError(f"{captions}: expected an object {{name: caption}}, got {type(self.captions).__name__}")
        if self.captions.keys().isdisjoint(self.names):
            raise ValueError(f"{captions}: expected captions of images of {path}, got none")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, n: Any) -> Any:
        name = self.names[n]
        if name not in self.captions:
            raise ValueError(f"{name}: expected a caption, got none")
        caption = caption_of(self.captions[name])
        if caption.text is None:
            raise ValueError(f"{name}: expected a caption, got {self.captions[name]!r:.80}")
        return {"caption": caption.text, "codes": [self.codes[n]], "name": name}


class Shards:
    """The samples of webdataset shards, which the streams share, in the order of `ShuffledShards`.

    With fewer shards than streams, every stream reads all shards and takes its share of the samples.
    """

    def __init__(self, urls: list[str], config: SourceConfig, rows: RowsConfig) -> None:
        self.urls = urls
        self._reported: set[str] = set()  # shards, in this process
        self.task, self.weight, self.question = config.task, config.weight, config.question
        self.shuffle_buffer = rows.shuffle_buffer
        digest = hashlib.sha256("\n".join(self.urls).encode(errors="surrogateescape")).hexdigest()
        self.description = {"shards": len(self.urls), "sha256": digest}

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        read, share_items = partial(read_reporting, self._reported, texts=True), len(self.urls) < streams
        order = ShuffledShards(self.urls, read, self.shuffle_buffer, seed, number, streams, share_items)
        for sample, after in order.endless(place or START):
            yield _record(sample), after

    def texts(self, skipped: Skipped) -> Iterator[str]:
        read = partial(read_reporting, self._reported, texts=True)
        return _texts_of((_record(sample) for url in self.urls for sample in read(url)), skipped)


class Corpus:
    """The rows of a corpus of ids (`semhitok encode`), whose shards the streams share.

    With fewer shards than streams, every stream reads all shards and takes its share of the rows.
    """

    def __init__(self, config: SourceConfig, rows: RowsConfig) -> None:
        self.corpus = EncodedCorpus(config.path, shuffle_buffer=rows.shuffle_buffer)
        if not self.corpus.rows:
            raise ValueError(f"{config.path}: expected at least one image, got none")
        self.task, self.weight, self.question = config.task, config.weight, config.question
        self.description = {"rows": self.corpus.rows, "sha256": self.corpus.identity()["corpus"]}

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        corpus = copy.copy(self.corpus)
        corpus.seed = seed
        share_rows = corpus.num_shards < streams
        for row, after in corpus.endless(place or (0, 0), *((0, 1) if share_rows else (number, streams))):
            if not share_rows or after[1] % streams == number:
                yield self._record(row), after

    def _record(self, row: Encoded) -> Any:
        if not row.caption:
            return ValueError(f"{row.key}: expected a caption, got none")
        codebook_hash = self.corpus.layout.codebook_hash
        return {"caption": row.caption, "codes": [row.ids], "codebook_hash": codebook_hash, "name": row.key}

    def texts(self, skipped: Skipped) -> Iterator[str]:
        return _texts_of(map(self._record, self.corpus.stream(0)), skipped)


def open_source(config: SourceConfig, rows: RowsConfig) -> Source:
    """The source that a configuration names.

    Raises:
        ValueError, OSError: it is of no kind that has records, damaged, or cannot be read.
    """
    path, kind = config.path, kind_of(config.path)
    options: dict[str, Any] = {"weight": config.weight, "question": config.question}
    if kind == JSONL:
        size = {"file": Path(path).name, "bytes": Path(path).stat().st_size}
        lines = Lines(path)
        if not len(lines):
            raise ValueError(f"{path}: expected at least one record, got none")
        return Records(lines, config.task, folder=Path(path).parent, description=size, **options)
    if kind == IDS_FILE:
        images = CaptionedIds(path, config.captions)
        size = {"file": Path(path).name, "images": len(images)}
        return Records(images, config.task, codebook_hash=images.codebook_hash, description=size, **options)
    if kind == SHARDS:
        return Shards(list(dict.fromkeys(expand_shards(path))), config, rows)
    if kind == FOLDER:
        passed_over = PassedOver()
        urls = [] if Path(path, MANIFEST).exists() else shards_in(path, passed_over)
        if not urls:
            return Corpus(config, rows)
        if passed_over.counts:
            warn(f"{path}: {passed_over.summary()}")
        return Shards(urls, config, rows)
    raise ValueError(f"path: expected .jsonl, .safetensors, webdataset shards or a corpus of ids, got {path}")


def _record(sample: ShardSample) -> Any:
    """A shard's sample as a record, or the ValueError that says why it is none."""
    if sample.problem:
        return ValueError(sample.problem)
    record: dict[str, Any] = {}
    captions = [text_caption(content) for suffix, content in sample.texts if suffix.endswith("txt")]
    problems = list(sample.notes)
    for suffix, content in sample.texts:
        if suffix.endswith("json"):
            try:
                found = parse_json(content)
            except ValueError as error:
                problems.append(f"{suffix}: {error}")
                continue
            captions.append(value_caption(found, FIELDS))
            if isinstance(found, dict) and "messages" in found:
                record["messages"] = found["messages"]
    caption = first_caption(captions)
    if caption.text:
        record["caption"] = caption.text
    if not record:
        reasons = "; ".join([*problems, *caption.notes]) or "got none"
        return ValueError(f"{sample.name}: expected a caption or messages in a .txt or .json: {reasons}")
    return {**record, "images": [sample], "name": sample.name}


def _texts_of(records: Iterable[Any], skipped: Skipped) -> Iterator[str]:
    """The texts of records."""
    for record in records:
        if isinstance(record, ValueError):
            skipped(message(record))
        elif isinstance(record, Mapping):
            yield from _texts(record)


def _texts(record: Record) -> Iterator[str]:
    """The texts of a record; what is none of them is left to whoever uses the record, and names it."""
    for key in ("caption", "text"):
        text = caption_of(record.get(key)).text
        if text:
            yield text
    messages = record.get("messages")
    for turn in messages if isinstance(messages, (list, tuple)) else ():
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), str):
            yield turn["content"].replace(prompts.IMAGE, " ")


def _digest(records: Sequence[Record | Sample]) -> str:
    digest = hashlib.sha256()
    for record in records:
        parts = record._asdict() if isinstance(record, Sample) else record
        digest.update(json.dumps(parts, default=_plain, sort_keys=True).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)
