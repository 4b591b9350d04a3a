"""The images of a training run, from files or webdataset shards, for one of several processes.

Both kinds give every step the same images however often the run was stopped. The crops from image
files depend on the seed and the step alone. Shards can only be read from their beginning on, so
that every reading process has a stream of its own whose place is saved with the run.
"""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from semhitok.config import DataConfig
from semhitok.data.batch import Batch
from semhitok.data.crops import RandomCrops, crop, generator, to_uint8
from semhitok.data.images import list_images, read_image, resize_crop
from semhitok.data.shards import Sample, expand_shards, is_shard, read_shard


class TrainingImages:
    """Endless, deterministic training crops from image files and folders or from webdataset shards.

    A source is a shard, or a pattern of shards, if it ends in .tar, .tgz, .tar.gz or the like, is a
    URL that webdataset can open (http:, https:, gs:, hf:, pipe: and so on), or has braces and is no
    existing file: "train-{000..123}.tar". A sample's image is its first entry with an image's
    suffix; the other entries are not read.

    Files: sample n of the run is a function of (seed, n), see `RandomCrops`.

    Shards: every reading process (config.workers of each training process, or the training process
    itself) has its own part of the shards in every epoch, in an order of the seed and the epoch, and
    shuffles config.shuffle_buffer samples at a time, which it keeps in memory undecoded.

    What cannot be used is named on stderr, once in a process, and counted in `Batches.skipped`: an
    unreadable file is replaced by the next readable one; of a shard a bad sample, or all of it that
    comes after damage, is left out. A shard that cannot be reached is tried three times more first.

    Args:
        sources: files and folders, or shards.
        size: side of a crop in pixels.
        config: how crops are drawn, workers and shuffling.
        seed: another seed gives another order and other crops.
        rank: number of this training process.
        world_size: training processes.

    Attributes:
        description: what the data are, as JSON: two runs on the same data have the same.

    Raises:
        ValueError: no sources, no images, files and shards mixed, fewer shards than reading
            processes, a URL webdataset cannot open.
        OSError: a file, folder or local shard does not exist or cannot be read.
        ImportError: shards, and webdataset is not installed.
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
    ) -> None:
        self.size, self.config, self.seed = size, config, seed
        self.rank, self.world_size = rank, world_size
        self.paths, self.shards = _find(sources)
        if self.shards:
            streams = world_size * max(1, config.workers)
            if len(self.shards) < streams:
                raise ValueError(
                    f"data: expected at least {streams} shards, one for each of {world_size} processes x "
                    f"{max(1, config.workers)} workers, got {len(self.shards)}: use fewer processes or workers, "
                    "or more shards"
                )
            if config.shuffle_buffer < 1:
                raise ValueError(f"shuffle_buffer: expected at least 1, got {config.shuffle_buffer}")
            self.description = {"shards": len(self.shards), "shards_sha256": _digest(self.shards)}
        else:
            names = [f"{path.name} {path.stat().st_size}" for path in self.paths]
            self.description = {"images": len(names), "images_sha256": _digest(names)}
            # Kept, so that what was decoded for one run through the steps serves the next.
            self._crops = RandomCrops(self.paths, size, config, seed)

    def other(self, seed_offset: int) -> TrainingImages:
        """The same images in another order and with other crops; `seed_offset` is xor-ed into the seed."""
        other = copy.copy(self)
        other.seed = self.seed ^ seed_offset
        if self.paths:
            other._crops = RandomCrops(self.paths, self.size, self.config, other.seed)
        return other

    def batches(
        self, batch_size: int, micro_batch: int, step: int = 0, position: Mapping[str, Any] | None = None
    ) -> Batches:
        """The batches of the steps from `step` on, this process's part of each.

        Args:
            batch_size: images of a step over all processes.
            micro_batch: images of one `Batch`.
            step: steps already done. From it files know where they are.
            position: what `Batches.position` gave after those. From it shards know where they are;
                without one they start from their beginning.

        Raises:
            ValueError: batch_size cannot be divided by processes * micro_batch, or the position is
                of other data or of another number of processes or workers.
        """
        return Batches(self, batch_size, micro_batch, step, position)


class Batches(Iterator[list[Batch]]):
    """Gives for every step the list of this process's micro-batches, without end.

    Attributes:
        skipped: images that could not be used, of the batches given out by this process and of those
            before the position it started from. What is lost by damage to a shard counts as one.

    `next` raises ValueError if no image can be read: none of the files, or none of the samples that
    a reading process finds in a whole epoch. After an error, and after `close`, it has no more.
    """

    def __init__(
        self, data: TrainingImages, batch_size: int, micro_batch: int, step: int, position: Mapping[str, Any] | None
    ) -> None:
        workers, processes = data.config.workers, data.world_size
        divisor = processes * micro_batch
        if batch_size < 1 or micro_batch < 1 or batch_size % divisor:
            raise ValueError(
                f"batch_size: expected a multiple of processes x micro_batch = {processes} x {micro_batch}, "
                f"got {batch_size}"
            )
        share = batch_size // processes
        self._firsts = range(data.rank * share, (data.rank + 1) * share, micro_batch)
        self._total = batch_size
        self._identity: dict[str, Any] = {"data": "shards" if data.shards else "files"}
        if data.shards:
            self._identity |= {"processes": processes, "rank": data.rank, "workers": workers}
        if position:
            self._check(position)
        position = position or {}
        self.skipped: int = position.get("skipped", 0)
        # The stream that the next micro-batch comes from: they take turns.
        self._turn: int = position.get("turn", 0)
        count = max(1, workers)
        self._places: list[dict[str, int]] = []
        streams: list[Iterable[_Item]]
        if data.shards:
            self._places = list(position.get("streams", [_START] * count))
            streams = [
                _ShardStream(data, data.rank * count + n, processes * count, micro_batch, self._places[n])
                for n in range(count)
            ]
        else:
            streams = [
                _FileStream(data._crops, batch_size, self._firsts, step * len(self._firsts) + n, count)
                for n in range(count)
            ]
        readers = _Readers(streams[self._turn :] + streams[: self._turn])
        self._items: Iterator[_Item | Exception]
        if workers:
            self._items = iter(
                DataLoader(
                    readers,
                    batch_size=None,
                    num_workers=workers,
                    collate_fn=_as_it_is,
                    worker_init_fn=_leave_signals_to_the_training_process,
                    generator=torch.Generator(),  # torch's own would be drawn from otherwise
                )
            )
        else:
            self._items = iter(readers)

    def __next__(self) -> list[Batch]:
        items: list[_Item] = []
        for _ in self._firsts:
            item = next(self._items)
            if isinstance(item, Exception):
                self.close()  # by hand: the error's traceback would keep the workers until a collection
                raise item
            items.append(item)
        # From here on nothing can fail: the position is that of a whole batch.
        for item in items:
            self.skipped += item.skipped
            if self._places:
                self._places[self._turn] = item.place
                self._turn = (self._turn + 1) % len(self._places)
        return [Batch(i.images, first, self._total) for i, first in zip(items, self._firsts, strict=True)]

    def position(self) -> dict[str, Any]:
        """Where this process's data stand after the last batch given out: numbers and text, for `batches`."""
        position = {**self._identity, "skipped": self.skipped}
        if self._places:
            position |= {"turn": self._turn, "streams": [dict(place) for place in self._places]}
        return position

    def close(self) -> None:
        """End the worker processes. No more batches come."""
        self._items = iter(())  # a DataLoader's iterator that nobody holds ends its workers

    def _check(self, position: Mapping[str, Any]) -> None:
        if position.get("data") != self._identity["data"]:
            raise ValueError(f"position: expected one in {self._identity['data']}, got one in {position.get('data')}")
        for key, expected in self._identity.items():
            if position.get(key) != expected:
                raise ValueError(
                    f"position: it is of a run with {position.get('processes')} processes and "
                    f"{position.get('workers')} workers, of process {position.get('rank')}; got {expected} as {key}; "
                    "shards can only be gone on with as they were begun"
                )


def held_out_batches(
    sources: Sequence[str | os.PathLike[str]], size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, int]]:
    """Batches for evaluation: the `resize_crop` of every image, once, in the order listed.

    Process r takes the images r, r + world_size, ... Every process gets the same number of batches,
    read one at a time. An unreadable image is named on stderr and left out of its batch.

    Args:
        sources: as in `TrainingImages`.
        size: side of an image in pixels.
        batch_size: images of a batch of this process.
        rank: number of this process.
        world_size: processes.

    Returns:
        Iterator over (float32 [batch_size, 3, size, size] in [0, 1], count): the first `count` images
        are real, 0 <= count <= batch_size; the rest repeat one of them, or are black if there is none.

    Raises:
        ValueError, OSError, ImportError: as `TrainingImages` does, when it is called. From the
            iterator ValueError: no images, or a shard that is damaged or cannot be reached, because
            each process would have to leave out the same.
    """
    paths, shards = _find(sources)
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    entries: Iterable[Path | Sample] = paths or _samples_in_order(shards)
    return _held_out(entries, size, batch_size, rank, world_size)


def _held_out(
    entries: Iterable[Path | Sample], size: int, batch_size: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, int]]:
    images: list[Tensor] = []
    seen = 0
    for entry in entries:
        if seen % world_size == rank:
            try:
                image = entry.image() if isinstance(entry, Sample) else read_image(entry)
                images.append(resize_crop(image, size))
            except (ValueError, OSError) as error:
                _name(str(error))
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


def _samples_in_order(shards: Sequence[str]) -> Iterator[Sample]:
    for url in shards:
        for sample in read_shard(url):
            if sample.ends_shard:
                raise ValueError(sample.problem)
            yield sample


class _Item(NamedTuple):
    """A micro-batch on its way from the process that read it.

    images: float32 [micro_batch, 3, size, size].
    skipped: images that could not be used since the micro-batch before.
    place: where the stream stands after it.
    """

    images: Tensor
    skipped: int
    place: dict[str, int]


class _Readers(IterableDataset[Any]):
    """One stream for each worker; without workers the only one. An error comes as the last item."""

    def __init__(self, streams: Sequence[Iterable[Any]]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            yield from self.streams[worker.id if worker else 0]
        except (ValueError, OSError, ImportError) as error:
            yield error  # raised by a worker it would come with that worker's traceback as its text


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_training_process(worker: int) -> None:
    """A signal to the whole process group lets the training process end its step and save.

    For that it needs its workers. SIGTERM is also what ends a worker that hangs: a second one does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@dataclass
class _FileStream:
    """Every `stride`-th of this process's micro-batches from number `start` on; `firsts` are those of a step."""

    crops: RandomCrops
    batch_size: int
    firsts: range
    start: int
    stride: int

    def __iter__(self) -> Iterator[_Item]:
        number = self.start
        while True:
            step, part = divmod(number, len(self.firsts))
            first = step * self.batch_size + self.firsts[part]
            samples = [self.crops.sample(n) for n in range(first, first + self.firsts.step)]
            yield _Item(torch.stack([image for image, _ in samples]), sum(replaced for _, replaced in samples), {})
            number += self.stride


# Where a stream of shards stands. In `epoch`, the present block of samples begins in the stream's
# shard number `shard`, after `offset` samples of it; it is the epoch's block number `block`, and
# `inside` of its samples are done. `number` images came since the beginning, `images` in this epoch.
_START = {"epoch": 0, "shard": 0, "offset": 0, "block": 0, "inside": 0, "number": 0, "images": 0}


class _ShardStream:
    """Crops from stream `stream` of `streams` over the shards, from `place` on."""

    def __init__(
        self, data: TrainingImages, stream: int, streams: int, micro_batch: int, place: Mapping[str, int]
    ) -> None:
        self.shards, self.size, self.config, self.seed = data.shards, data.size, data.config, data.seed
        self.stream, self.streams, self.micro_batch = stream, streams, micro_batch
        self.place = dict(place)

    def __iter__(self) -> Iterator[_Item]:
        crops = self._crops()
        while True:
            taken = list(islice(crops, self.micro_batch))
            images = torch.stack([image for image, _, _ in taken])
            yield _Item(images, sum(skipped for _, skipped, _ in taken), taken[-1][2])

    def _crops(self) -> Iterator[tuple[Tensor, int, dict[str, int]]]:
        """(crop [3, size, size], what was skipped since the one before, place after it), without end."""
        place = dict(self.place)
        named: set[str] = set()
        skipped = 0
        for sample, at in self._samples():
            if at["epoch"] != place["epoch"]:
                self._check_epoch(place)
                place["images"] = 0
            place |= at
            try:
                image = to_uint8(sample.image())
            except ValueError as error:
                skipped += 1
                if sample.name not in named:
                    named.add(sample.name)
                    _name(str(error))
                continue
            draws = torch.rand(4, generator=generator(self.seed, self.stream, place["number"])).tolist()
            place["number"] += 1
            place["images"] += 1
            yield crop(image, self.size, self.config, draws), skipped, dict(place)
            skipped = 0

    def _check_epoch(self, place: Mapping[str, int]) -> None:
        if place["images"] == 0:
            shards = ", ".join(self._order(place["epoch"])[:3])
            raise ValueError(f"data: no image of a whole epoch can be used; its shards: {shards}, ...")

    def _order(self, epoch: int) -> list[str]:
        """The stream's shards in an epoch."""
        order = torch.randperm(len(self.shards), generator=generator(self.seed, ~epoch)).tolist()
        return [self.shards[n] for n in order[self.stream :: self.streams]]

    def _samples(self) -> Iterator[tuple[Sample, dict[str, int]]]:
        """Samples in the order of training, each with the place after it, without end."""
        epoch, shard, offset, block, inside = (self.place[k] for k in ("epoch", "shard", "offset", "block", "inside"))
        while True:
            found = False
            samples = self._in_order(epoch, shard, offset)
            while buffer := list(islice(samples, self.config.shuffle_buffer)):
                found = True
                after = buffer[-1][1:]
                order = torch.randperm(len(buffer), generator=generator(self.seed, self.stream, epoch, block))
                for done, n in enumerate(order.tolist()[inside:], inside + 1):
                    at = {"epoch": epoch, "shard": shard, "offset": offset, "block": block, "inside": done}
                    yield buffer[n][0], at
                (shard, offset), block, inside = after, block + 1, 0
                buffer.clear()  # before the next one is filled: two do not fit where one does
            if not found and block == 0:  # shards without a single member: the next epoch has none either
                self._check_epoch({"epoch": epoch, "images": 0})
            epoch, shard, offset, block, inside = epoch + 1, 0, 0, 0, 0

    def _in_order(self, epoch: int, shard: int, offset: int) -> Iterator[tuple[Sample, int, int]]:
        """(sample, its shard's number, samples of that shard up to it), to the epoch's end."""
        order = self._order(epoch)
        for number in range(shard, len(order)):
            for count, sample in enumerate(read_shard(order[number]), 1):
                if count > offset:
                    yield sample, number, count
            offset = 0


def _find(sources: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[str]]:
    """Image files, or URLs and paths of shards; of one of the two there is none."""
    names = [os.fspath(source) for source in sources]
    shards = [name for name in names if is_shard(name)]
    if not shards:
        return list_images(names), []
    files = [name for name in names if name not in shards]
    if files:
        raise ValueError(f"data: expected either image files or shards, got {files[0]!r} beside {shards[0]!r}")
    found = [url for name in shards for url in expand_shards(name)]
    return [], list(dict.fromkeys(found))


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _name(problem: str) -> None:
    """Tell on stderr of what is skipped; names come from archives and may hold anything."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in problem)
    print(f"semhitok: skipped: {text}", file=sys.stderr)
