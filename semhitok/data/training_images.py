"""The images of a training run, from files or webdataset shards, for one of several processes.

Every step has the same images however often the run was stopped. Crops of image files depend on the seed and the step
alone. Shards can only be read from their beginning on: every reading process has a stream of its own, whose place is
saved with the run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok._messages import message, warn
from semhitok.config import DataConfig
from semhitok.data.batch import Batch
from semhitok.data.crops import RandomCrops, crop
from semhitok.data.images import read_resized
from semhitok.data.kinds import FOLDER, IMAGE, SHARDS, kind_of
from semhitok.data.listing import list_images, walk_images
from semhitok.data.passed_over import PassedOver
from semhitok.data.shards import ShardSample, expand_shards, read_reporting, read_shard, shards_in
from semhitok.data.skipped import Skipped
from semhitok.data.stream import EMPTY_EPOCHS, START, Batches, Item, ShuffledShards, check_shards, generator, share_of


class TrainingImages:
    """Endless, deterministic training crops from image files and folders or from webdataset shards.

    `semhitok.data.kinds` says which names are shards: local tar files, URLs that webdataset can open (http:, https:,
    gs:, hf:, pipe: and so on), and patterns of them such as "train-{000..123}.tar". The image of a sample is its first
    entry with an image's suffix; other entries are not read.

    Files: sample n of the run is a function of (seed, n), see `RandomCrops`.

    Shards: every reading process (`workers` of each training process, or the training process itself) reads its
    own part of the shards in every epoch, in an order that follows from the seed and the epoch. It shuffles
    config.shuffle_buffer samples at a time, which it holds in memory undecoded.

    What cannot be used is named and counted by `skipped`: an unreadable file is replaced by the next readable one; in a
    shard, a bad sample is left out, and everything after damage. A shard that cannot be reached is retried three times.

    Args:
        sources: files and folders, or shards.
        size: side of a crop in pixels.
        config: how crops are drawn, workers and shuffling.
        seed: another seed gives another order and other crops.
        rank: number of this training process.
        world_size: training processes.
        skipped: that of the run.

    Attributes:
        workers: reading processes, config.workers; for "auto" 0, unless `use_workers` says another number.
        description: identifies the data, as JSON: two runs on the same data have the same.
        fixed_count: number of the fixed crops; 0 if they are not fixed.

    Raises:
        ValueError: no sources, no images, files mixed with shards, fewer shards than reading processes, a URL that
            webdataset cannot open; fixed crops of shards, or that are to have a random scale.
        OSError: a file, folder or local shard does not exist or cannot be read.
        ImportError: there are shards, and webdataset is not installed.
    """

    description: dict[str, object]

    def __init__(
        self,
        sources: Sequence[str | os.PathLike[str]],
        size: int,
        config: DataConfig,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        skipped: Skipped | None = None,
    ) -> None:
        self.size, self.config, self.seed = size, config, seed
        self.rank, self.world_size = rank, world_size
        self.paths, self.shards = _find(sources, rank)
        self.use_workers(0 if config.workers == "auto" else config.workers)
        self.fixed_count = 0
        self.skipped = Skipped() if skipped is None else skipped
        self._reported: set[str] = set()  # shards, in this process
        if self.shards:
            if config.fixed:
                raise ValueError(f"fixed: expected image files, got shards ({self.shards[0]!r})")
            if config.shuffle_buffer < 1:
                raise ValueError(f"shuffle_buffer: expected at least 1, got {config.shuffle_buffer}")
            self.description = {"shards": len(self.shards), "shards_sha256": _digest(self.shards)}
        else:
            names = [f"{path.name} {_bytes(path)}" for path in self.paths]
            self.description = {"images": len(names), "images_sha256": _digest(names)}
            # Kept, so that the images decoded by one pass over the steps serve the next.
            self._crops = RandomCrops(self.paths, size, config, seed)
            self.fixed_count = self._crops.fixed_count

    def use_workers(self, workers: int) -> None:
        """Read with so many processes from now on; ValueError if there are fewer shards than reading processes."""
        if self.shards:
            check_shards("data", len(self.shards), self.world_size, workers)
        self.workers = workers

    def other(self, seed_offset: int) -> TrainingImages:
        """The same images in another order and with other crops; `seed_offset` is xor-ed into the seed."""
        other = copy.copy(self)
        other.seed = self.seed ^ seed_offset
        if self.paths:
            other._crops = RandomCrops(self.paths, self.size, self.config, other.seed)
        return other

    def batches(
        self, batch_size: int, micro_batch: int, step: int = 0, position: Mapping[str, Any] | None = None
    ) -> Batches[list[Batch]]:
        """The batches of the steps from `step` on, each the list of this process's micro-batches.

        Their `next` raises ValueError if no image can be read: none of the files, or none of the samples that a reading
        process finds in a whole epoch.

        Args:
            batch_size: images of a step over all processes.
            micro_batch: images of one `Batch`.
            step: steps already done; files are resumed from it.
            position: `Batches.position` after those steps; shards are resumed from it, and start from their beginning
                without one.

        Raises:
            ValueError: batch_size cannot be divided by processes * micro_batch, or the position is of other data or of
                another number of processes or workers.
        """
        share = share_of(batch_size, micro_batch, self.world_size)
        firsts = range(self.rank * share, (self.rank + 1) * share, micro_batch)
        workers = self.workers
        start: dict[str, Any] = {"data": "files", "skipped": []}
        open_stream = partial(self._of_files, batch_size, firsts, step * len(firsts))
        if self.shards:
            start = {"data": "shards", "processes": self.world_size, "rank": self.rank, "workers": workers}
            start |= {"skipped": [], "turn": 0, "streams": [START] * max(1, workers)}
            open_stream = partial(self._of_shards, micro_batch)

        def collate(values: list[tuple[Tensor, Tensor | None]]) -> list[Batch]:
            return [
                Batch(images, first, batch_size, crops=crops)
                for (images, crops), first in zip(values, firsts, strict=True)
            ]

        return Batches(
            open_stream, start, len(firsts), collate, workers=workers, position=position, skipped=self.skipped
        )

    def fixed_batches(self, size: int) -> Generator[Batch, None, None]:
        """Every fixed crop once, by number: this process's part of them, in batches of `size`.

        Batch b goes to process b modulo their number. All processes get the same number of full batches, the last of
        which repeat the last crop. The crops of an unreadable image are those of its replacement.
        """
        paths, last = len(self.paths), self.fixed_count - 1

        def read(worker: int, place: None) -> Iterator[Item]:
            for number in itertools.count(worker, max(1, self.workers)):
                first = (number * self.world_size + self.rank) * size
                numbers = [min(n, last) for n in range(first, first + size)]
                found = [self._crops.fixed_crop(n % paths, mirrored=n >= paths) for n in numbers]
                crops = torch.stack([sample.crop for sample in found])
                batch = Batch(crops, first, self.fixed_count, crops=torch.tensor(numbers))
                yield Item(batch, place, [problem for sample in found for problem in sample.skipped])

        rounds = -(-self.fixed_count // (size * self.world_size))
        start = {"data": "fixed crops"}
        batches: Batches[Batch] = Batches(
            read, start, 1, lambda x: x[0], workers=self.workers, position=None, skipped=self.skipped
        )
        with contextlib.closing(batches):
            yield from itertools.islice(batches, rounds)

    def _of_files(self, batch_size: int, firsts: range, done: int, number: int, place: None) -> Iterator[Item]:
        """The micro-batches that reading process `number` makes, after `done`; `firsts` are those of a step."""
        for micro in itertools.count(done + number, max(1, self.workers)):
            step, part = divmod(micro, len(firsts))
            first = step * batch_size + firsts[part]
            samples = [self._crops.sample(n) for n in range(first, first + firsts.step)]
            crops = torch.tensor([s.number for s in samples]) if self.fixed_count else None
            value = torch.stack([s.crop for s in samples]), crops
            yield Item(value, place, [problem for s in samples for problem in s.skipped])

    def _of_shards(self, micro_batch: int, number: int, place: Mapping[str, int]) -> Iterator[Item]:
        """Micro-batches of crops from the samples of reading process `number`, from `place` on."""
        crops = self._crops_of_shards(number, place)
        while True:
            taken = list(itertools.islice(crops, micro_batch))
            value = torch.stack([i.value for i in taken]), None
            yield Item(value, taken[-1].place, [problem for i in taken for problem in i.skipped])

    def _crops_of_shards(self, worker: int, place: Mapping[str, int]) -> Iterator[Item]:
        """Crops [3, size, size], without end."""
        workers = max(1, self.workers)
        stream, streams = self.rank * workers + worker, self.world_size * workers
        read = partial(read_reporting, self._reported)
        order = ShuffledShards(self.shards, read, self.config.shuffle_buffer, self.seed, stream, streams)
        epoch, number, images = (place[k] for k in ("epoch", "number", "images"))
        skipped: dict[str, None] = {}  # each problem once, also in epochs without a good sample
        empty = 0
        for sample, after in order.endless(place):
            if after["epoch"] != epoch:
                empty = empty + 1 if images == 0 else 0
                if empty == EMPTY_EPOCHS:
                    raise order.empty_epoch(epoch, list(skipped))
                epoch, images = after["epoch"], 0
            try:
                image = sample.uint8()
            except ValueError as error:
                skipped[message(error)] = None
                continue
            draws = torch.rand(4, generator=generator(self.seed, stream, number)).tolist()
            number, images = number + 1, images + 1
            counted = {**after, "number": number, "images": images}
            yield Item(crop(image, self.size, self.config, draws), counted, list(skipped))
            skipped.clear()


class HeldOutBatches:
    """Batches for evaluation: the `resize_crop` of every image, once, in the order listed; any number of times.

    Process r takes the images r, r + world_size, ... Every process gets the same number of batches, which are read one
    at a time. An unreadable image is left out of its batch, which `skipped` is told.

    Iterating yields (float32 [batch_size, 3, size, size] in [0, 1], count): the first `count` images are real,
    0 <= count <= batch_size; the rest repeat one of them, or are black if there is none. It raises ValueError if there
    are no images, or if a shard cannot be reached now: every process would have to leave out the same.

    Args:
        sources: as in `TrainingImages`.
        size: side of an image in pixels.
        batch_size: images of a batch of this process.
        rank: number of this process.
        world_size: processes.
        skipped: that of the run.

    Raises:
        ValueError, OSError, ImportError: as `TrainingImages`.
    """

    def __init__(
        self, sources: Sequence[str | os.PathLike[str]], size: int, batch_size: int, rank: int = 0, world_size: int = 1,
        skipped: Skipped | None = None,
    ) -> None:  # fmt: skip
        self.skipped = Skipped() if skipped is None else skipped
        self.paths, self.shards = _find(sources, rank)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.size, self.batch_size, self.rank, self.world_size = size, batch_size, rank, world_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        entries: Iterable[Path | ShardSample] = self.paths or _samples_in_order(self.shards, self.skipped)
        return _held_out(entries, self.size, self.batch_size, self.rank, self.world_size, self.skipped)


def _held_out(
    entries: Iterable[Path | ShardSample], size: int, batch_size: int, rank: int, world_size: int, skipped: Skipped
) -> Iterator[tuple[Tensor, int]]:
    images: list[Tensor] = []
    seen = 0
    for entry in entries:
        if seen % world_size == rank:
            with skipped.errors():
                images.append(entry.resized(size) if isinstance(entry, ShardSample) else read_resized(entry, size))
        seen += 1
        if seen % (world_size * batch_size) == 0:
            yield _padded(images, size, batch_size), len(images)
            images = []
    if seen == 0:
        raise ValueError("data: no images found")
    if seen % (world_size * batch_size):
        yield _padded(images, size, batch_size), len(images)


def _padded(images: list[Tensor], size: int, batch_size: int) -> Tensor:
    padding = images[0] if images else torch.zeros(3, size, size)
    return torch.stack(images + [padding] * (batch_size - len(images)))


def _samples_in_order(shards: Sequence[str], skipped: Skipped) -> Iterator[ShardSample]:
    for url in shards:
        for sample in read_shard(url):
            if sample.transient:
                raise ValueError(sample.problem)
            if sample.ends_shard:
                skipped(sample.problem)
            else:
                yield sample


def _find(sources: Sequence[str | os.PathLike[str]], rank: int) -> tuple[list[Path], list[str]]:
    """Image files, or URLs and paths of shards; one of the two lists is empty.

    A folder without images stands for the shards in it. The first process names what is passed over.
    """
    passed_over = PassedOver()
    files: list[str] = []
    shards: list[str] = []
    for source in sources:
        name = os.fspath(source)
        kind = kind_of(name)
        if kind == SHARDS:
            shards += expand_shards(name)
        elif kind == FOLDER and next(walk_images(name, PassedOver()), None) is None:
            inside = shards_in(name, passed_over)
            shards += inside
            files += [] if inside else [name]
        elif kind in (FOLDER, IMAGE):
            files.append(name)
        else:
            raise ValueError(f"data: expected images, folders or webdataset shards, got the {kind} {name}")
    if files and shards:
        raise ValueError(f"data: expected either image files or shards, got {files[0]!r} beside {shards[0]!r}")
    paths = [] if shards else list_images(files, passed_over)
    if passed_over.counts and rank == 0:
        warn(f"data: {passed_over.summary()}")
    return paths, list(dict.fromkeys(shards))


def _bytes(path: Path) -> int:
    """The size of a file; 0 if it cannot be read, which is said when it is its turn."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
