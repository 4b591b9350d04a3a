"""Images for training: endless batches from files or webdataset shards, each rank's part of them, resumed exactly.

Of image files, crop n of the run is a function of the seed and n alone, however many processes and workers there are.

Shards are divided into streams, one for every worker of every process: in each epoch the shards are shuffled, and
stream s takes shards s, s + S, s + 2 S, ... of S. A stream shuffles the samples of a block of `shuffle_buffer` and
goes on to the next. So it stands at (epoch, place where the block begins, place in the block), which is all that a
checkpoint has to keep: to go on, at most one block is read again.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from semhitok._optional import require
from semhitok.config import DataConfig
from semhitok.data.crops import RandomCrops, bytes_of, random_crop
from semhitok.data.images import decode_image, list_images, read_image, resize_crop

_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SHARD = re.compile(r"[{}]|^\w+://|^pipe:|\.(tar|tgz|tar\.\w+)$")
_ATTEMPTS, _PAUSE = 3, 1.0  # to open a shard, seconds between them


@dataclass
class MicroBatch:
    """images float32 [b, 3, size, size] in [0, 1], from place `first` of a global batch of `total`."""

    images: Tensor
    first: int
    total: int


class TrainingImages:
    """Where a run's images come from.

    Args:
        sources: image files and folders of them, or webdataset shards: *.tar, patterns such as {0000..0123}, URLs.
        size: side of a crop in pixels.
        config: how crops are drawn and read.
        seed: another seed gives another order and other crops.
        rank, world_size: this process, and how many there are.

    Attributes:
        description: number and hash of files or shards, to tell another run by.

    Raises:
        ValueError: no images, files and shards at once, or fewer shards than streams.
        OSError: a file, folder or local shard cannot be found.
    """

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
        self.paths, self.shards = find_sources(sources)
        if self.shards:
            kind, names = "shards", self.shards
            streams = world_size * max(1, config.workers)
            if len(self.shards) < streams:
                raise ValueError(
                    f"sources: expected at least {streams} shards, one for each worker of each process, got "
                    f"{len(self.shards)}; use fewer workers or processes, or more shards"
                )
        else:
            kind, names = "images", [f"{path.name} {path.stat().st_size}" for path in self.paths]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
        self.description: dict[str, object] = {kind: len(names), f"{kind}_sha256": digest}

    def other(self, offset: int) -> TrainingImages:
        """The same images in another order, other crops."""
        images = object.__new__(TrainingImages)
        images.__dict__ = {**self.__dict__, "seed": self.seed ^ offset}
        return images

    def batches(self, batch_size: int, micro_batch: int, step: int, position: dict[str, Any] | None) -> Batches:
        """The batches of steps `step`, `step` + 1, ...

        Args:
            batch_size: images of a global batch; this process gets its part of it.
            micro_batch: images given out at once.
            step: the first step.
            position: what `Batches.position` said after the step before it, None at the beginning.

        Raises:
            ValueError: the sizes do not divide, or the position is of other processes or workers.
        """
        at_once = self.world_size * micro_batch
        if batch_size % at_once:
            raise ValueError(
                f"batch_size: expected a multiple of processes * micro_batch = {self.world_size} * {micro_batch}, "
                f"got {batch_size}"
            )
        return (_ShardBatches if self.shards else _FileBatches)(self, batch_size, micro_batch, step, position or {})


class Batches:
    """Iterator over steps: for each the list of this process's micro-batches.

    Attributes:
        skipped: images of this process that could not be used so far, in the run's earlier sittings included.
    """

    def __init__(
        self, images: TrainingImages, batch_size: int, micro_batch: int, step: int, position: dict[str, Any]
    ) -> None:
        self.skipped: int = position.get("skipped", 0)
        share = batch_size // images.world_size
        self._places = range(images.rank * share, (images.rank + 1) * share, micro_batch)
        self._total = batch_size
        self._loader: DataLoader[Any] = self._open(images, batch_size, micro_batch, step, position)
        self._items: Iterator[Any] | None = None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> list[MicroBatch]:
        if self._items is None:
            self._items = iter(self._loader)
        return [MicroBatch(self._take(next(self._items)), first, self._total) for first in self._places]

    def close(self) -> None:
        """End the workers."""
        self._items = None

    def position(self) -> dict[str, Any]:
        """Where this process's images stand after the last batch; `TrainingImages.batches` goes on from it."""
        return {"skipped": self.skipped}

    def _open(
        self, images: TrainingImages, batch_size: int, micro_batch: int, step: int, position: dict[str, Any]
    ) -> DataLoader[Any]:
        raise NotImplementedError

    def _take(self, item: Any) -> Tensor:
        raise NotImplementedError


class _FileBatches(Batches):
    def _open(
        self, images: TrainingImages, batch_size: int, micro_batch: int, step: int, position: dict[str, Any]
    ) -> DataLoader[Any]:
        numbers = (
            range(number * batch_size + first, number * batch_size + first + micro_batch)
            for number in itertools.count(step)
            for first in self._places
        )
        crops = RandomCrops(images.paths, images.size, images.config, images.seed)
        return DataLoader(
            crops,
            batch_sampler=numbers,  # type: ignore[arg-type]
            num_workers=images.config.workers,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )

    def _take(self, item: Any) -> Tensor:
        images, replaced = item
        self.skipped += int(replaced.sum())
        return images


class _ShardBatches(Batches):
    def _open(
        self, images: TrainingImages, batch_size: int, micro_batch: int, step: int, position: dict[str, Any]
    ) -> DataLoader[Any]:
        streams = max(1, images.config.workers)
        layout = {"processes": images.world_size, "streams": streams}
        found = {key: position.get(key, value) for key, value in layout.items()}
        if found != layout:
            raise ValueError(
                f"position: expected one of {layout['processes']} processes with {streams} streams each, got one of "
                f"{found['processes']} with {found['streams']}; shards are continued with the same number of both"
            )
        self._layout = layout
        self._states = [Place(*state) for state in position.get("places", [Place()] * streams)]
        self._turn: int = position.get("turn", 0)
        return DataLoader(
            _ShardStream(images, micro_batch, self._states, self._turn),
            batch_size=None,
            num_workers=images.config.workers,
            worker_init_fn=_ignore_interrupts,
            pin_memory=torch.cuda.is_available(),
        )

    def _take(self, item: Any) -> Tensor:
        images, stream, place, skipped = item
        self._states[stream] = Place(*place)
        self._turn = (stream + 1) % len(self._states)
        self.skipped += skipped
        return images

    def position(self) -> dict[str, Any]:
        places = [list(state) for state in self._states]
        return {"skipped": self.skipped, **self._layout, "turn": self._turn, "places": places}


class Place(NamedTuple):
    """Where a stream stands: in which epoch, at which sample of which of its shards its block begins, which block it
    is, how much of it has been given out, and how many samples of all there were before."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0
    block: int = 0
    given: int = 0
    number: int = 0


class RawSample(NamedTuple):
    """An undecoded sample and where the one after it begins; `data` is None where there is nothing to decode."""

    name: str
    data: bytes | None
    shard: int
    sample: int


class _ShardStream(IterableDataset[Any]):
    """In worker w of a process: micro-batches of the stream whose turn is the w-th, with the place after each."""

    def __init__(self, images: TrainingImages, micro_batch: int, places: Sequence[Place], turn: int) -> None:
        self.images, self.micro_batch, self.places, self.turn = images, micro_batch, list(places), turn

    def __iter__(self) -> Iterator[tuple[Tensor, int, tuple[int, ...], int]]:
        images = self.images
        worker = get_worker_info()
        stream = (self.turn + (worker.id if worker else 0)) % len(self.places)
        everywhere = images.rank * len(self.places) + stream  # its number among the streams of all processes
        count = images.world_size * len(self.places)
        key = (images.seed, count, everywhere)
        crops: list[Tensor] = []
        skipped, last_usable = 0, self.places[stream].epoch
        for raw, place in self._samples(self.places[stream], key):
            try:
                if raw.data is None:
                    raise ValueError(raw.name)
                image = bytes_of(decode_image(raw.data, raw.name))
            except ValueError as error:
                print(f"semhitok: skipped: {error}", file=sys.stderr)
                skipped += 1
                if place.epoch > last_usable + 1:
                    raise ValueError("sources: none of the images of a whole epoch could be read") from error
                continue
            last_usable = place.epoch
            crops.append(random_crop(image, images.size, images.config, _generator(*key, "crop", place.number)))
            if len(crops) == self.micro_batch:
                yield torch.stack(crops), stream, tuple(place), skipped
                crops, skipped = [], 0

    def _samples(self, place: Place, key: tuple[int, int, int]) -> Iterator[tuple[RawSample, Place]]:
        """Samples from `place` on, shuffled, each with the place after it."""
        seed, count, stream = key
        while True:
            order = torch.randperm(len(self.images.shards), generator=_generator(seed, "shards", place.epoch)).tolist()
            shards = [self.images.shards[n] for n in order[stream::count]]
            whole_epoch = place.shard == place.sample == place.given == 0
            seen = False
            raw = read_shards(shards, place.shard, place.sample)
            while block := list(itertools.islice(raw, self.images.config.shuffle_buffer)):
                shuffle = torch.randperm(len(block), generator=_generator(*key, "block", place.epoch, place.block))
                for n in shuffle.tolist()[place.given :]:
                    place = place._replace(given=place.given + 1, number=place.number + 1)
                    if place.given == len(block):
                        place = place._replace(
                            shard=block[-1].shard, sample=block[-1].sample, block=place.block + 1, given=0
                        )
                    seen = True
                    yield block[n], place
            if whole_epoch and not seen:
                raise ValueError(f"sources: no samples in {len(shards)} shards, {shards[0]} among them")
            place = Place(epoch=place.epoch + 1, number=place.number)


def read_shards(shards: Sequence[str], first: int = 0, sample: int = 0) -> Iterator[RawSample]:
    """The samples of shards, from one sample of the shard `first` on. A shard that breaks ends with a sample without
    data, which says why."""
    for number, url in enumerate(shards[first:], first):
        begin = sample if number == first else 0
        last = 0
        try:
            for index, found in enumerate(_read_shard(url)):
                last = index + 1
                if index >= begin:
                    name = f"{url}: {found['__key__']}"
                    suffixes = [s for s in found if f".{s.rpartition('.')[2]}" in _IMAGES]
                    data = found[suffixes[0]] if suffixes else None
                    yield RawSample(name if suffixes else f"{name}: no image", data, number, index + 1)
        except (GeneratorExit, ImportError):
            raise
        except Exception as error:  # readers of tar, gzip and networks meet damage with every kind of exception
            if last >= begin:
                reason = " ".join(str(error).split()) or type(error).__name__
                yield RawSample(f"{url}: the rest cannot be read: {reason}", None, number, last + 1)


def _read_shard(url: str) -> Iterator[dict[str, Any]]:
    """webdataset's samples of a shard, as bytes."""
    wds = require("webdataset", "train")
    iterators = sys.modules[wds.tarfile_to_samples.__module__]
    for attempt in range(_ATTEMPTS):
        try:
            stream = wds.gopen(url)
            break
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(_PAUSE)
    with stream:
        members = ({**member, "__url__": url} for member in iterators.tar_file_iterator(stream))
        yield from iterators.group_by_keys(members)


def find_sources(sources: Sequence[str | os.PathLike[str]]) -> tuple[list[Path], list[str]]:
    """Image files behind `sources`, or shards; one of the two lists is empty.

    Raises:
        ValueError: none found, or both kinds at once.
        OSError: a file, folder or local shard does not exist.
    """
    names = [os.fspath(source) for source in sources]
    patterns = [name for name in names if _SHARD.search(name) and not Path(name).is_dir()]
    if not patterns:
        return list_images(names), []
    if len(patterns) < len(names):
        other = next(name for name in names if name not in patterns)
        raise ValueError(f"sources: expected image files or shards, got both: {other} and {patterns[0]}")
    require("webdataset", "train")
    expand = require("braceexpand", "train").braceexpand
    shards = [shard for pattern in patterns for shard in expand(pattern)]
    for shard in shards:
        if not re.match(r"\w+:", shard) and not Path(shard).is_file():
            raise FileNotFoundError(f"{shard}: no such shard")
    return [], shards


def held_out_batches(
    sources: Sequence[str | os.PathLike[str]], size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, int]]:
    """Every image of `sources` once, over all processes, resized and cropped at the centre.

    Yields images [batch_size, 3, size, size] and how many of them count, from the first. Every process gets the same
    number of batches; what is missing is filled with black images. Unreadable images are named on stderr and left out.

    Raises:
        ValueError: no images.
    """
    paths, shards = find_sources(sources)
    readers: Iterator[Callable[[], Tensor]]
    if shards:
        readers = (functools.partial(_decode_raw, raw) for raw in read_shards(shards))
    else:
        readers = (functools.partial(read_image, path) for path in paths)
    images: list[Tensor] = []
    given = total = 0
    for total, read in enumerate(readers, 1):
        if (total - 1) % world_size != rank:
            continue
        try:
            images.append(resize_crop(read(), size))
        except (ValueError, OSError) as error:
            print(f"semhitok: skipped: {error}", file=sys.stderr)
        if len(images) == batch_size:
            yield torch.stack(images), batch_size
            images, given = [], given + 1
    if not total:
        raise ValueError(f"held_out: no images in {', '.join(map(str, sources))}")
    for _ in range(given, -(-total // (world_size * batch_size))):
        black = [torch.zeros(3, size, size)] * (batch_size - len(images))
        yield torch.stack(images + black), len(images)
        images = []


def _decode_raw(raw: RawSample) -> Tensor:
    if raw.data is None:
        raise ValueError(raw.name)
    return decode_image(raw.data, raw.name)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C goes to all processes; the training process decides, and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _generator(*key: object) -> Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
