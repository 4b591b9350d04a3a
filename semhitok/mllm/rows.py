"""Samples for the unified model: read from sources, mixed, formatted, packed into rows, for one of several processes.

A record of a source is one of

    {"messages": [{"role", "content"}, ...], ...}   a conversation, with `<image>` where its images stand
    {"caption": text, ...}                          one image and what it shows
    {"text": text}                                  text alone

with the images as "images": [paths], relative to the file's folder, or as "codes": [ids of an image, row by row, ...]
and the "codebook_hash" they belong to. A JSONL file has one in each line; in webdataset shards a sample's .txt is its
caption, its .json such a record; an ids file of `semhitok encode` has captions beside it, a corpus of ids inside.

Every row of the global batch has a stream of samples of its own, that is: a part of each source, drawn from by the
seed and the number of the draw. So the batches do not depend on how many processes share them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from semhitok.corpus.format import Encoded, EncodedCorpus
from semhitok.corpus.ids_file import load_codes
from semhitok.data import training_images as image_data
from semhitok.data.crops import generator, to_uint8
from semhitok.data.images import read_image, resize_crop
from semhitok.data.shards import Sample as ShardSample
from semhitok.data.shards import expand_shards, is_shard, read_shard
from semhitok.mllm import prompts
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.packing import Packed, Sample, join, pack

if TYPE_CHECKING:
    from semhitok.mllm.config import RowsConfig, SourceConfig
    from semhitok.mllm.model import UnifiedMLLMConfig

TASKS = ("understanding", "generation", "text")

_BAD_IN_A_ROW = 1000  # records that cannot be used, after which training gives up

Record = Mapping[str, Any]


class WrongCodebook(ValueError):
    """Stored ids belong to another codebook: nothing to pass over, the run is set up wrongly."""


class Source(Protocol):
    """Records of one kind, in any number of streams.

    task, weight, question: see `SourceConfig`.
    description: what the records are, as JSON: two runs on the same data have the same.
    """

    task: str
    weight: float
    question: str
    description: dict[str, Any]

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        """(record, or an error in its place; the place after it), endless, from a place (None: the beginning)."""

    def texts(self) -> Iterator[str]:
        """All texts, once, for a tokenizer made of them."""


class Records:
    """A source of records that can be counted, each seen once an epoch, in an order of the seed and the epoch.

    Args:
        records: as the module says, with "codes" as integers or tensors [h, w]; or samples that are ready, made by
            `join`, in which case nothing is dropped.
        task, weight, question: see `SourceConfig`.
        codebook_hash: of "codes" that do not say it themselves.
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
            try:
                index = int(self._order(seed, epoch)[position])
                record: Any = self.records[index]
                if not isinstance(record, Sample):
                    known = {"name": f"record {index + 1}", "codebook_hash": self.codebook_hash, "folder": self.folder}
                    record = {**known, **record}
            except (ValueError, TypeError) as error:
                record = ValueError(str(error))
            yield record, drawn

    def _order(self, seed: int, epoch: int) -> Tensor:
        if (seed, epoch) not in self._orders:
            if len(self._orders) > 3:  # streams are in two epochs at most
                self._orders.clear()
            self._orders[seed, epoch] = torch.randperm(len(self.records), generator=generator(seed, ~epoch))
        return self._orders[seed, epoch]

    def texts(self) -> Iterator[str]:
        for n in range(len(self.records)):
            record = self.records[n]
            if not isinstance(record, Sample):
                yield from _texts(record)


class _Lines(Sequence[Record]):
    """The objects of a JSONL file, read when asked for."""

    def __init__(self, path: str) -> None:
        self.path, self.starts = path, array("Q")
        with open(path, "rb") as file:
            start = 0
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
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
        return {**record, "name": where}


class _Encoded(Sequence[Record]):
    """The images of an ids file with their captions."""

    def __init__(self, path: str, captions: str | None) -> None:
        file = load_codes(path)
        self.codes, self.names, self.codebook_hash = file.codes, file.names, file.codebook_hash
        if captions is None:
            raise ValueError(f"captions: expected a JSON file {{name: caption}} for {path}, got none")
        try:
            self.captions = json.loads(Path(captions).read_bytes())
        except ValueError as error:
            raise ValueError(f"{captions}: not JSON: {error}") from None
        if not isinstance(self.captions, dict) or not all(isinstance(c, str) for c in self.captions.values()):
            raise ValueError(f"{captions}: expected an object {{name: caption}}")
        lacking = [name for name in self.names if name not in self.captions]
        if lacking:
            raise ValueError(f"{captions}: expected a caption for each image of {path}, got none for {lacking[0]!r}")

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, n: Any) -> Any:
        name = self.names[n]
        return {"caption": self.captions[name], "codes": [self.codes[n]], "name": name}


class Shards:
    """A source of webdataset shards, divided over the streams; see `TrainingImages` for their order.

    With fewer shards than streams every stream reads all of them and leaves out the others' samples.
    """

    def __init__(self, config: SourceConfig, rows: RowsConfig) -> None:
        self.urls = list(dict.fromkeys(expand_shards(config.path)))
        self.task, self.weight, self.question, self.rows = config.task, config.weight, config.question, rows
        digest = hashlib.sha256("\n".join(self.urls).encode(errors="surrogateescape")).hexdigest()
        self.description = {"shards": len(self.urls), "sha256": digest}

    def stream(self, number: int, streams: int, seed: int, place: Any) -> Iterator[tuple[Any, Any]]:
        found = dict(place or {**image_data._START})
        for sample, at in _Reader(self, number, streams, seed, found)._samples():
            found |= at
            yield _record(sample), dict(found)

    def texts(self) -> Iterator[str]:
        for url in self.urls:
            for sample in read_shard(url, True):
                record = _record(sample)
                if not isinstance(record, ValueError):
                    yield from _texts(record)


class Corpus:
    """A source of the rows of a corpus of ids (`semhitok encode`), its shards divided over the streams.

    With fewer shards than streams every stream reads all of them and leaves out the others' rows.
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
        shared = len(corpus._order(0, 1, 0)) < streams
        epoch, done = place or (0, 0)
        while True:
            for row in corpus._rows(*((0, 1) if shared else (number, streams)), epoch, done):
                done += 1
                if not shared or done % streams == number:
                    yield self._record(row), [epoch, done]
            epoch, done = epoch + 1, 0

    def _record(self, row: Encoded) -> Any:
        if not row.caption:
            return ValueError(f"{row.key}: expected a caption, got none")
        own = self.corpus.layout.codebook_hash
        return {"caption": row.caption, "codes": [row.ids], "codebook_hash": own, "name": row.key}

    def texts(self) -> Iterator[str]:
        for row in self.corpus._rows(0, 1, 0, 0):
            if row.caption:
                yield row.caption


class _Reader(image_data._ShardStream):
    """The order of shards and samples that training on images has, with their texts."""

    def __init__(self, source: Shards, stream: int, streams: int, seed: int, place: Mapping[str, int]) -> None:
        self.shards, self.seed, self.stream, self.streams = source.urls, seed, stream, streams
        self.place, self.config = dict(place), source.rows  # type: ignore[assignment]

    def _order(self, epoch: int) -> list[str]:
        if len(self.shards) >= self.streams:
            return super()._order(epoch)
        return [self.shards[n] for n in torch.randperm(len(self.shards), generator=generator(self.seed, ~epoch))]

    def _in_order(self, epoch: int, shard: int, offset: int) -> Iterator[tuple[ShardSample, int, int]]:
        shared = len(self.shards) < self.streams
        order = self._order(epoch)
        for number in range(shard, len(order)):
            for count, sample in enumerate(read_shard(order[number], True), 1):
                if count > offset and (not shared or (count + number) % self.streams == self.stream):
                    yield sample, number, count
            offset = 0


def _record(sample: ShardSample) -> Any:
    """A shard's sample as a record, or the error that it is."""
    if sample.problem:
        return ValueError(sample.problem)
    record: dict[str, Any] = {}
    for suffix, content in sample.texts:
        try:
            text = content.decode()
            if suffix.endswith("json"):
                found = json.loads(text)
                if isinstance(found, dict):
                    record = {k: found[k] for k in ("messages", "caption") if k in found} | record
            else:
                record["caption"] = text.strip()
        except ValueError as error:
            return ValueError(f"{sample.name}.{suffix}: {error}")
    if not record:
        return ValueError(f"{sample.name}: expected a caption or messages in a .txt or .json, got none")
    return {**record, "images": [sample], "name": sample.name}


def open_source(config: SourceConfig, rows: RowsConfig) -> Source:
    """The source that a configuration names.

    Raises:
        ValueError, OSError: it is none, damaged, or cannot be read.
    """
    path, task = config.path, config.task
    if path.endswith(".jsonl"):
        size = {"file": Path(path).name, "bytes": Path(path).stat().st_size}
        options: dict[str, Any] = {"folder": Path(path).parent, "description": size}
        return Records(_Lines(path), task, weight=config.weight, question=config.question, **options)
    if path.endswith(".safetensors"):
        encoded = _Encoded(path, config.captions)
        return Records(
            encoded, task, weight=config.weight, question=config.question, codebook_hash=encoded.codebook_hash,
            description={"file": Path(path).name, "images": len(encoded)},
        )  # fmt: skip
    if is_shard(path):
        return Shards(config, rows)
    if Path(path).is_dir():
        return Corpus(config, rows)
    raise ValueError(f"path: expected .jsonl, .safetensors, webdataset shards or a corpus of ids, got {path}")


@dataclass
class MicroRows:
    """Rows that go through the model at once, on the CPU.

    Attributes:
        packed: see there; the ids of `images` in it are still to be filled in.
        tasks: uint8 [R, length], place in `TASKS` of each id's sample.
        padding: uint8 [R, length], 1 where no sample is.
        images: uint8 [n, 3, size, size], images without ids.
        places: int64 [n, 2], row and column where their ids go.
    """

    packed: Packed
    tasks: Tensor
    padding: Tensor
    images: Tensor
    places: Tensor


class _Row(NamedTuple):
    rows: MicroRows
    skipped: int
    place: dict[str, Any]


class TrainingRows:
    """Endless, deterministic rows of packed samples from sources, mixed by weight.

    Args:
        sources: at least one.
        config: how rows are made.
        model: sizes and vocabulary; ids of other codebooks are refused.
        tokenizer: a text tokenizer of transformers.
        seed: another seed gives another order.
        rank: number of this training process.
        world_size: training processes.

    What cannot be used is named on stderr and counted in `RowBatches.skipped`.

    Attributes:
        description: what the data are, as JSON.

    Raises:
        ValueError: no sources, or a tokenizer with more ids than the model has for text.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: RowsConfig,
        model: UnifiedMLLMConfig,
        tokenizer: Any,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        self.sources, self.config, self.model, self.tokenizer = list(sources), config, model, tokenizer
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.vocabulary = model.vocabulary
        self.prefix = 1 + int(model.resolution_id)  # ids before those of an image
        self.pad_id = tokenizer.pad_token_id or 0
        self.named: set[str] = set()
        self.description = {"sources": [{"task": s.task, "weight": s.weight, **s.description} for s in sources]}

    def batches(
        self, batch_size: int, micro_batch: int, step: int = 0, position: Mapping[str, Any] | None = None
    ) -> RowBatches:
        """The batches of the steps after `position`, this process's part of each, which `RowBatches.position` gave.

        Args:
            batch_size: rows of a step over all processes.
            micro_batch: rows of one `MicroRows`.
            step: not needed: the position says all.

        Raises:
            ValueError: batch_size cannot be divided by processes x micro_batch, or the rows of a process by its
                workers; or the position is of other sources or another number of processes.
        """
        return RowBatches(self, batch_size, micro_batch, position)

    def samples(self, source: Source, record: Any, drop: bool) -> list[_Made]:
        """What is made of a record: one sample; several of a text that is longer than a row.

        Raises:
            ValueError: it cannot be used. OSError: an image cannot be read. WrongCodebook: ids of another codebook.
        """
        if isinstance(record, ValueError):
            raise record
        task = TASKS.index(source.task)
        if isinstance(record, Sample):
            return [self._made(record, task, [])]
        try:
            return self._formatted(source, record, task, drop)
        except (ValueError, KeyError, TypeError) as error:
            name = f"{record['name']}: " if "name" in record else ""
            words = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise (WrongCodebook if isinstance(error, WrongCodebook) else ValueError)(f"{name}{words}") from None

    def _formatted(self, source: Source, record: Record, task: int, drop: bool) -> list[_Made]:
        arguments = (self.tokenizer, self.vocabulary)
        images, pixels = self._images(record)
        if "messages" in record:
            parts = prompts.conversation(*arguments, record["messages"], images)
        elif "caption" in record:
            if len(images) != 1:
                raise ValueError(f"images: expected one beside a caption, got {len(images)}")
            caption = _text(record, "caption")
            if source.task == "generation":
                parts = prompts.generation_parts(*arguments, None if drop else caption, images[0])
            elif source.task == "understanding":
                parts = prompts.understanding_parts(*arguments, images[0], source.question, caption)
            else:
                raise ValueError("task: expected understanding or generation for images with captions, got text")
        elif "text" in record:
            parts = prompts.text_parts(*arguments, _text(record, "text"))
        else:
            raise ValueError(f"expected messages, caption or text, got {', '.join(record)}")
        sample = join(*parts)
        length = self.config.length
        if not images and "text" in record:
            return [
                self._made(Sample(*piece), task, []) for piece in zip(*(x.split(length) for x in sample), strict=True)
            ]
        return [self._made(sample, task, pixels)]

    def _made(self, sample: Sample, task: int, pixels: list[Tensor | None]) -> _Made:
        size = len(sample.input_ids)
        if size > self.config.length:
            raise ValueError(f"data.length: expected at least {size} for this sample, got {self.config.length}")
        begins = (sample.input_ids == self.vocabulary.begin_of_image).nonzero().flatten().tolist()
        images = [(p, begin + self.prefix) for p, begin in zip(pixels, begins, strict=False) if p is not None]
        return _Made(sample, task, images)

    def _images(self, record: Record) -> tuple[list[Tensor], list[Tensor | None]]:
        """The ids of a record's images in the vocabulary; and the pixels of those that have no ids yet."""
        grid, resolution = self.model.grid_size, self.model.image_size if self.model.resolution_id else None
        made: list[Tensor] = []
        pixels: list[Tensor | None] = []
        if "codes" in record:
            try:
                self.vocabulary.check_hash(record.get("codebook_hash"))
            except ValueError as error:
                raise WrongCodebook(str(error)) from None
            for codes in record["codes"]:
                ids = torch.as_tensor(codes)
                if ids.numel() != grid**2:
                    raise ValueError(f"codes: expected {grid**2} ids an image, got {ids.numel()}")
                made.append(self.vocabulary.image(ids.reshape(grid, grid), self.vocabulary.codebook_hash, resolution))
                pixels.append(None)
            return made, pixels
        for image in record.get("images", ()):
            found = image.image() if isinstance(image, ShardSample) else read_image(Path(record["folder"], image))
            pixels.append(to_uint8(resize_crop(found, self.model.image_size)))
            blank = torch.zeros(grid, grid, dtype=torch.int64)
            made.append(self.vocabulary.image(blank, self.vocabulary.codebook_hash, resolution))
        return made, pixels


class _Made(NamedTuple):
    """A sample, its task's number, and (pixels, where their ids go) of images without ids."""

    sample: Sample
    task: int
    images: list[tuple[Tensor, int]]


class RowBatches(Iterator[list[MicroRows]]):
    """Gives for every step the list of this process's `MicroRows`, without end.

    Attributes:
        skipped: records that could not be used, in this process.
    """

    def __init__(
        self, data: TrainingRows, batch_size: int, micro_batch: int, position: Mapping[str, Any] | None
    ) -> None:
        processes, workers = data.world_size, data.config.workers
        if batch_size % (processes * micro_batch):
            raise ValueError(
                f"batch_size: expected a multiple of processes x micro_batch = {processes} x {micro_batch}, "
                f"got {batch_size}"
            )
        share, count = batch_size // processes, max(1, workers)
        if share % count:
            raise ValueError(f"data.workers: expected a divisor of the {share} rows of a process, got {workers}")
        self.micro_batch, self._share = micro_batch, share
        self._identity = {"streams": batch_size, "processes": processes, "rank": data.rank}
        if position:
            for key, expected in self._identity.items():
                if position.get(key) != expected:
                    words = f"{position.get(key)} {key}; rows can only be gone on with as they were begun"
                    raise ValueError(f"position: expected one of {expected} {key}, got {words}")
        self.skipped: int = position["skipped"] if position else 0
        self._places: list[Any] = list(position["rows"]) if position else [None] * share
        streams = [_Stream(data, data.rank * share + n, batch_size, self._places[n]) for n in range(share)]
        # Worker w has the rows w, w + workers, ...: those that it is asked for in its turns.
        readers = image_data._Readers([_Turns(streams[n::count]) for n in range(count)])
        self._items: Iterator[Any] = iter(readers)
        if workers:
            self._items = iter(
                DataLoader(
                    readers,
                    batch_size=None,
                    num_workers=workers,
                    collate_fn=image_data._as_it_is,
                    worker_init_fn=image_data._leave_signals_to_the_training_process,
                    generator=torch.Generator(),
                )
            )

    def __next__(self) -> list[MicroRows]:
        rows: list[MicroRows] = []
        places, skipped = [], 0
        for _ in range(self._share):
            item = next(self._items)
            if isinstance(item, Exception):
                self.close()
                raise item
            rows.append(item.rows)
            places.append(item.place)
            skipped += item.skipped
        self._places, self.skipped = places, self.skipped + skipped
        return [_stack(rows[n : n + self.micro_batch]) for n in range(0, self._share, self.micro_batch)]

    def position(self) -> dict[str, Any]:
        """Where this process's rows stand after the last batch given out, for `batches`."""
        return {**self._identity, "skipped": self.skipped, "rows": list(self._places)}

    def close(self) -> None:
        """End the worker processes. No more batches come."""
        self._items = iter(())


def _stack(rows: Sequence[MicroRows]) -> MicroRows:
    places = [torch.stack([torch.full_like(r.places[:, 0], n), r.places[:, 1]], 1) for n, r in enumerate(rows)]
    packed = Packed(*(torch.cat(column) for column in zip(*(r.packed for r in rows), strict=True)))
    tasks, padding, images = (torch.cat([getattr(r, name) for r in rows]) for name in ("tasks", "padding", "images"))
    return MicroRows(packed, tasks, padding, images, torch.cat(places))


@dataclass
class _Turns:
    """A row of each stream in turn."""

    streams: list[_Stream]

    def __iter__(self) -> Iterator[_Row]:
        running = [iter(stream) for stream in self.streams]
        while True:
            for stream in running:
                yield next(stream)


class _Waiting(NamedTuple):
    """A sample that waits for a row: its number, and that of its record's first sample and the place before that."""

    number: int
    first: int
    before: dict[str, Any]
    made: _Made


class _Stream:
    """Row `number` of every batch, from `place` on.

    A place is that of the oldest sample that waits for a row, with the numbers, from it on, of those that were taken.
    """

    def __init__(self, data: TrainingRows, number: int, streams: int, place: Mapping[str, Any] | None) -> None:
        self.data, self.number, self.streams = data, number, streams
        self.place = dict(place or {"draw": 0, "sources": [None] * len(data.sources), "taken": []})
        if len(self.place["sources"]) != len(data.sources):
            raise ValueError(f"position: expected one of {len(data.sources)} sources, got {len(self.place['sources'])}")
        self.skipped = 0

    def __iter__(self) -> Iterator[_Row]:
        config = self.data.config
        samples = self._samples()
        taken = set(self.place["taken"])
        waiting = [next(samples)]
        while True:
            while len(waiting) < config.look_ahead:
                waiting.append(next(samples))
            room = config.length
            row: list[_Waiting] = []
            rest: list[_Waiting] = []
            for sample in waiting:
                size = len(sample.made.sample.input_ids)
                (row if size <= room else rest).append(sample)
                room -= size if size <= room else 0
            waiting = rest or [next(samples)]
            oldest = waiting[0]
            taken = {n for n in taken.union(w.number for w in row) if n >= oldest.first}
            place = {**oldest.before, "taken": sorted(n - oldest.first for n in taken)}
            yield _Row(self._row([w.made for w in row]), self.skipped, place)
            self.skipped = 0

    def _samples(self) -> Iterator[_Waiting]:
        """Samples in the order drawn, without those taken before the place that the stream started from."""
        data, draw, places = self.data, self.place["draw"], list(self.place["sources"])
        taken = set(self.place["taken"])
        running = [
            source.stream(self.number, self.streams, data.seed + n, places[n]) for n, source in enumerate(data.sources)
        ]
        bounds = list(accumulate(source.weight for source in data.sources))
        number, bad = 0, 0
        while True:
            before = {"draw": draw, "sources": list(places)}
            which, drop = torch.rand(2, generator=generator(data.seed, self.number, draw), dtype=torch.float64).tolist()
            chosen = next((n for n, bound in enumerate(bounds) if which * bounds[-1] < bound), len(bounds) - 1)
            record, places[chosen] = next(running[chosen])
            draw += 1
            try:
                made = data.samples(data.sources[chosen], record, drop < data.config.caption_drop)
            except WrongCodebook:
                raise
            except (ValueError, OSError) as error:
                if str(error) not in data.named:  # once in a process, not in every epoch
                    data.named.add(str(error))
                    image_data._name(str(error))
                self.skipped, bad = self.skipped + 1, bad + 1
                if bad == _BAD_IN_A_ROW:
                    raise ValueError(f"data: {bad} records in a row cannot be used; the last: {error}") from None
                continue
            bad, first = 0, number
            for sample in made:
                if number not in taken:
                    yield _Waiting(number, first, before, sample)
                number += 1

    def _row(self, members: list[_Made]) -> MicroRows:
        length = self.data.config.length
        packed = pack([m.sample for m in members], length, self.data.pad_id)
        tasks, padding = (torch.zeros(1, length, dtype=torch.uint8) for _ in range(2))
        images: list[Tensor] = []
        places: list[int] = []
        start = 0
        for member in members:
            end = start + len(member.sample.input_ids)
            tasks[0, start:end] = member.task
            for image, place in member.images:
                images.append(image)
                places.append(start + place)
            start = end
        padding[0, start:] = 1
        size = self.data.model.image_size
        pixels = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
        columns = torch.tensor(places, dtype=torch.int64)
        return MicroRows(packed, tasks, padding, pixels, torch.stack([torch.zeros_like(columns), columns], 1))


def fill(rows: MicroRows, ids: Tensor) -> Packed:
    """The rows with image ids [n, h * w] (of the model's vocabulary) in the places of `rows.images`."""
    input_ids, labels = rows.packed.input_ids.clone(), rows.packed.labels.clone()
    for (row, column), own in zip(rows.places.tolist(), ids, strict=True):
        span = slice(column, column + len(own))
        input_ids[row, span] = own
        labels[row, span] = torch.where(labels[row, span] == IGNORE, IGNORE, own)
    return Packed(input_ids, labels, rows.packed.position_ids)


def _texts(record: Record) -> Iterator[str]:
    for key in ("caption", "text"):
        if isinstance(record.get(key), str):
            yield record[key]
    for message in record.get("messages", ()):
        if isinstance(message.get("content"), str):
            yield message["content"].replace(prompts.IMAGE, " ")


def _text(record: Record, key: str) -> str:
    if not isinstance(record[key], str):
        raise ValueError(f"{key}: expected text, got {record[key]!r:.80}")
    return record[key]


def _digest(records: Sequence[Record | Sample]) -> str:
    digest = hashlib.sha256()
    for record in records:
        parts = record._asdict() if isinstance(record, Sample) else record
        digest.update(json.dumps(parts, default=_plain, sort_keys=True).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)
