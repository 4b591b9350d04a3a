"""Rows for the unified model: records of all sources, mixed, formatted and packed, for one of several processes.

Record (a dict, see `semhitok.mllm.sources`) -> `RowSample` -> `MicroRows` of one row -> of a whole micro-batch.

Every row of the global batch has a stream of its own, which draws from a part of each source by the seed and the number
of the draw. So the batches do not depend on how many processes share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semhitok._messages import message, printable
from semhitok.data.captions import caption_of
from semhitok.data.images import read_resized, to_uint8
from semhitok.data.shards import ShardSample
from semhitok.data.skipped import Skipped
from semhitok.data.stream import Batches, Item, generator, share_of
from semhitok.mllm import prompts
from semhitok.mllm.config import TASKS, RowsConfig
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.model import UnifiedMLLMConfig
from semhitok.mllm.packing import Packed, Sample, join, pack
from semhitok.mllm.sources import Record, Source

BAD_IN_A_ROW = 100_000  # records that cannot be used, after which training gives up


class WrongCodebook(ValueError):
    """Stored ids belong to another codebook. This record is not skipped: the run is set up wrongly."""


@dataclass
class RowSample:
    """A sample that waits for a row; the stream that drew it sets the last three."""

    sample: Sample
    task: int  # its place in `TASKS`
    images: list[tuple[Tensor, int]]  # those without ids: pixels uint8 [3, size, size], where their ids go
    number: int = 0  # of the sample in the stream
    first: int = 0  # number of the first sample of the same record
    before: dict[str, Any] = field(default_factory=dict)  # where the stream stood before the record was drawn


class MicroRows(NamedTuple):
    """Rows that go through the model at once, on the CPU."""

    packed: Packed  # [R, length] each; the ids of `images` are not in it yet: see `with_ids`
    tasks: Tensor  # uint8 [R, length], place in `TASKS` of each id's sample
    padding: Tensor  # uint8 [R, length], 1 where there is no sample
    images: Tensor  # uint8 [n, 3, size, size], images without ids
    places: Tensor  # int64 [n, 2], row and column where their ids go

    @classmethod
    def stack(cls, rows: Sequence[MicroRows]) -> MicroRows:
        """Micro-batches of one row each as one."""
        packed, tasks, padding, images, _ = zip(*rows, strict=True)
        merged = Packed(*map(torch.cat, zip(*packed, strict=True)))
        places = [row.places + torch.tensor([n, 0]) for n, row in enumerate(rows)]
        return cls(merged, torch.cat(tasks), torch.cat(padding), torch.cat(images), torch.cat(places))

    def with_ids(self, ids: Tensor) -> Packed:
        """`packed` with the image ids [n, h * w], of the model's vocabulary, in the places of `images`."""
        input_ids, labels = self.packed.input_ids.clone(), self.packed.labels.clone()
        for (row, column), image in zip(self.places.tolist(), ids, strict=True):
            span = slice(column, column + len(image))
            input_ids[row, span] = image
            labels[row, span] = torch.where(labels[row, span] == IGNORE, IGNORE, image)
        return Packed(input_ids, labels, self.packed.position_ids)


class TrainingRows:
    """Endless, deterministic rows of packed samples from sources, mixed by weight.

    Records that cannot be used are named and counted by `skipped`.

    Args:
        sources: at least one.
        config: how rows are made.
        model: sizes and vocabulary; ids of other codebooks are refused.
        text_tokenizer: of transformers.
        seed: another seed gives another order.
        rank, world_size: number of this training process, and how many there are.
        skipped: that of the run.

    Attributes:
        description: identifies the data, as JSON.

    Raises:
        ValueError: no sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: RowsConfig,
        model: UnifiedMLLMConfig,
        text_tokenizer: Any,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        skipped: Skipped | None = None,
    ) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        self.sources, self.config, self.model, self.text_tokenizer = list(sources), config, model, text_tokenizer
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.vocabulary = model.vocabulary
        self.prefix = 1 + int(model.resolution_id)  # ids before those of an image
        self.pad_id = text_tokenizer.pad_token_id or 0
        self.skipped = Skipped() if skipped is None else skipped
        self.description = {"sources": [{"task": s.task, "weight": s.weight, **s.description} for s in sources]}

    def batches(
        self, batch_size: int, micro_batch: int, step: int = 0, position: Mapping[str, Any] | None = None
    ) -> Batches[list[MicroRows]]:
        """The batches of the steps after `position`, each the list of this process's `MicroRows`.

        Args:
            batch_size: rows of a step over all processes.
            micro_batch: rows of one `MicroRows`.
            step: not needed, because the position says it all.
            position: `Batches.position` to resume from.

        Raises:
            ValueError: batch_size cannot be divided by processes x micro_batch, or the rows of a process by its
                workers; or the position is of other sources or another number of processes.
        """
        share = share_of(batch_size, micro_batch, self.world_size)
        workers = 0 if self.config.workers == "auto" else self.config.workers  # `train` puts a number in its place
        if share % max(1, workers):
            raise ValueError(f"data.workers: expected a divisor of the {share} rows of a process, got {workers}")
        for place in filter(None, (position or {}).get("rows", ())):
            if (found := len(place["sources"])) != len(self.sources):
                raise ValueError(f"position: expected one of {len(self.sources)} sources, got {found}")
        start = {"streams": batch_size, "processes": self.world_size, "rank": self.rank}
        return Batches(
            partial(_RowStream, self, batch_size, self.rank * share),
            {**start, "skipped": [], "rows": [None] * share},
            share,
            lambda rows: [MicroRows.stack(rows[n : n + micro_batch]) for n in range(0, share, micro_batch)],
            workers=workers,
            position=position,
            skipped=self.skipped,
        )

    def samples(self, source: Source, record: Any, drop_caption: bool) -> list[RowSample]:
        """The sample that a record gives; several of a text that is longer than a row.

        Raises:
            ValueError: it cannot be used. WrongCodebook: ids of another codebook.
        """
        if isinstance(record, ValueError):
            raise record
        task = TASKS.index(source.task)
        if isinstance(record, Sample):
            return [self._row_sample(record, task, [])]
        try:
            images = self._images(record)
            sample = join(*self._parts(source, record, [ids for ids, _ in images], drop_caption))
            if not images and "text" in record:
                pieces = zip(*(x.split(self.config.length) for x in sample), strict=True)
                return [self._row_sample(Sample(*piece), task, []) for piece in pieces]
            return [self._row_sample(sample, task, [pixels for _, pixels in images])]
        except (ValueError, KeyError, TypeError, OSError) as error:
            name = f"{record['name']}: " if "name" in record else ""
            reason = printable(f"no {error}" if isinstance(error, KeyError) else message(error))
            raise (WrongCodebook if isinstance(error, WrongCodebook) else ValueError)(f"{name}{reason}") from None

    def row(self, samples: Sequence[RowSample]) -> MicroRows:
        """A row of samples that fit in it."""
        length, size = self.config.length, self.model.image_size
        tasks, padding = (torch.zeros(1, length, dtype=torch.uint8) for _ in range(2))
        images = [torch.empty(0, 3, size, size, dtype=torch.uint8)]
        places: list[tuple[int, int]] = []
        start = 0
        for sample in samples:
            end = start + len(sample.sample.input_ids)
            tasks[0, start:end] = sample.task
            images += [pixels[None] for pixels, _ in sample.images]
            places += [(0, start + offset) for _, offset in sample.images]
            start = end
        padding[0, start:] = 1
        packed = pack([s.sample for s in samples], length, self.pad_id)
        columns = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
        return MicroRows(packed, tasks, padding, torch.cat(images), columns)

    def _parts(
        self, source: Source, record: Record, images: Sequence[Tensor], drop_caption: bool
    ) -> list[prompts.Part]:
        """(ids, learnt?) parts of a record."""
        arguments = (self.text_tokenizer, self.vocabulary)
        if "messages" in record:
            return prompts.conversation(*arguments, record["messages"], images)
        if "caption" in record:
            if len(images) != 1:
                raise ValueError(f"images: expected one beside a caption, got {len(images)}")
            caption = _text(record, "caption")
            if source.task == "generation":
                return prompts.generation_parts(*arguments, None if drop_caption else caption, images[0])
            if source.task == "understanding":
                return prompts.understanding_parts(*arguments, images[0], source.question, caption)
            raise ValueError("task: expected understanding or generation for images with captions, got text")
        if "text" in record:
            return prompts.text_parts(*arguments, _text(record, "text"))
        raise ValueError(f"expected messages, caption or text, got {', '.join(record)}")

    def _row_sample(self, sample: Sample, task: int, pixels: Sequence[Tensor | None]) -> RowSample:
        size = len(sample.input_ids)
        if size > self.config.length:
            raise ValueError(f"data.length: expected at least {size} for this sample, got {self.config.length}")
        begins = (sample.input_ids == self.vocabulary.begin_of_image).nonzero().flatten().tolist()
        images = [(p, begin + self.prefix) for p, begin in zip(pixels, begins, strict=False) if p is not None]
        return RowSample(sample, task, images)

    def _images(self, record: Record) -> list[tuple[Tensor, Tensor | None]]:
        """The ids of each image in the vocabulary, and its pixels if it has no ids yet."""
        if "codes" in record:
            own = record.get("codebook_hash")
            if not isinstance(own, (str, type(None))):
                raise ValueError(f"codebook_hash: expected text, got {own!r:.80}")
            try:
                self.vocabulary.check_hash(own)
            except ValueError as error:
                raise WrongCodebook(str(error)) from None
            return [(self._image(codes), None) for codes in record["codes"]]
        images: list[tuple[Tensor, Tensor | None]] = []
        given = record.get("images", ())
        if not isinstance(given, (list, tuple)) or not all(isinstance(i, (str, Path, ShardSample)) for i in given):
            raise ValueError(f"images: expected a list of paths, got {given!r:.80}")
        for image in given:
            size = self.model.image_size
            shard = isinstance(image, ShardSample)
            pixels = image.resized(size) if shard else read_resized(Path(record["folder"], image), size)
            blank = self._image(torch.zeros(self.model.grid_size**2, dtype=torch.int64))
            images.append((blank, to_uint8(pixels)))
        return images

    def _image(self, codes: Any) -> Tensor:
        try:
            codes = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"codes: expected ids of an image, got {codes!r:.80}") from error
        grid, resolution = self.model.grid_size, self.model.image_size if self.model.resolution_id else None
        if codes.numel() != grid**2:
            raise ValueError(f"codes: expected {grid**2} ids an image, got {codes.numel()}")
        return self.vocabulary.image(codes.reshape(grid, grid), self.vocabulary.codebook_hash, resolution)


class _RowStream:
    """Row `number` of every batch, of this process's rows from `first` on, from `place` on; None is the beginning.

    A place is where the stream stood before the record of the oldest waiting sample was drawn, and which samples from
    that record on are in rows already ("taken", counted from the record's first).
    """

    def __init__(self, data: TrainingRows, streams: int, first: int, number: int, place: Any) -> None:
        self.data, self.number, self.streams = data, first + number, streams
        self.place = place or {"draw": 0, "sources": [None] * len(data.sources), "taken": []}
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Item]:
        config = self.data.config
        samples = self._samples()
        taken = set(self.place["taken"])
        waiting = [next(samples)]
        while True:
            while len(waiting) < config.look_ahead:
                waiting.append(next(samples))
            room = config.length
            row: list[RowSample] = []
            rest: list[RowSample] = []
            for sample in waiting:
                size = len(sample.sample.input_ids)
                (row if size <= room else rest).append(sample)
                room -= size if size <= room else 0
            waiting = rest or [next(samples)]
            oldest = waiting[0]
            taken = {n for n in taken.union(s.number for s in row) if n >= oldest.first}
            place = {**oldest.before, "taken": sorted(n - oldest.first for n in taken)}
            yield Item(self.data.row(row), place, self.skipped)
            self.skipped = []

    def _samples(self) -> Iterator[RowSample]:
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
                samples = data.samples(data.sources[chosen], record, drop < data.config.caption_drop)
            except WrongCodebook:
                raise
            except (ValueError, OSError) as error:
                self.skipped.append(message(error))
                bad += 1
                if bad == BAD_IN_A_ROW:
                    raise ValueError(f"data: {bad} records in a row cannot be used; the last: {error}") from None
                continue
            bad, first = 0, number
            for sample in samples:
                sample.number, sample.first, sample.before = number, first, before
                number += 1
                if sample.number not in taken:
                    yield sample


def _text(record: Record, key: str) -> str:
    """The text of a record, or the first one of a list, as in other sources."""
    found = caption_of(record[key]).text
    if found is None:
        raise ValueError(f"{key}: expected text, got {record[key]!r:.80}")
    return found
