"""Endless streams of training data that resume exactly where they stopped: the engine under images, corpora and rows.

A process has one or more *streams* and takes an item from each in turn, itself or through worker processes. With every
item a stream gives its *place*, from which it can be opened again; `Batches` collects the places in a *position*, which
is saved with the run. Nothing depends on timing: the same seed and position give the same batches.
"""

from __future__ import annotations

import reprlib
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from semhitok.data.skipped import Skipped

T = TypeVar("T")
Place = Any  # numbers, text, lists and dicts, as JSON has them


# ---------------------------------------------------------------------------------------------------------------
# Random order


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A generator whose random numbers are a function of the seed and `numbers`, in their order."""
    mixed = seed
    for number in numbers:
        # Odd constants spread neighbouring seeds and numbers; the sum keeps 63 bits.
        mixed = (mixed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The numbers 0 to count - 1, int64 [count], in the order of an epoch."""
    return torch.randperm(count, generator=generator(seed, ~epoch))


# Where a stream of `ShuffledShards` stands: in `epoch`, inside the block of shuffled items number `block`, after
# `inside` of its items. The block begins in shard `shard` of the stream's order, after `offset` items of that shard.
# `number` and `images` count the images used, in all and in this epoch, where the user of the stream counts them.
EMPTY_EPOCHS = 10  # in a row; other epochs give a stream other shards
START: dict[str, int] = {"epoch": 0, "shard": 0, "offset": 0, "block": 0, "inside": 0, "number": 0, "images": 0}


@dataclass
class ShuffledShards(Generic[T]):
    """The items of shards in random order, as one of several streams reads them.

    Every epoch has its own order of the shards, of which stream i of n takes the shards i, i + n, ... Items are
    shuffled in blocks of `buffer`; one block is held in memory.

    Attributes:
        shards: names, or whatever `read` takes.
        read: (shard, n) -> the items of the shard after the first n.
        buffer: items of a block.
        seed: another seed gives another order.
        stream, streams: number of this stream, and how many there are.
        share_items: every stream reads all shards and takes every n-th item. Needed for fewer shards than streams.
    """

    shards: Sequence[Any]
    read: Callable[[Any, int], Iterator[T]]
    buffer: int
    seed: int
    stream: int = 0
    streams: int = 1
    share_items: bool = False

    def order(self, epoch: int) -> list[Any]:
        """This stream's shards in an epoch."""
        order = epoch_order(len(self.shards), self.seed, epoch).tolist()
        return [self.shards[n] for n in (order if self.share_items else order[self.stream :: self.streams])]

    def epoch(self, place: Mapping[str, int]) -> Iterator[tuple[T, dict[str, int]]]:
        """(item, the place after it) from `place` to the end of its epoch."""
        epoch, shard, offset, block, inside = (place[k] for k in ("epoch", "shard", "offset", "block", "inside"))
        items = self._in_order(epoch, shard, offset)
        while buffer := list(islice(items, self.buffer)):
            end = buffer[-1][1:]
            order = torch.randperm(len(buffer), generator=generator(self.seed, self.stream, epoch, block)).tolist()
            for done, n in enumerate(order[inside:], inside + 1):
                yield buffer[n][0], {**place, "shard": shard, "offset": offset, "block": block, "inside": done}
            (shard, offset), block, inside = end, block + 1, 0
            buffer.clear()  # before the next block is read: there may be no memory for two

    def endless(self, place: Mapping[str, int]) -> Iterator[tuple[T, dict[str, int]]]:
        """(item, the place after it) from `place` on, epoch after epoch.

        Raises:
            ValueError: an epoch without items.
        """
        empty = 0
        while True:
            found = place["block"] > 0 or place["inside"] > 0
            for item, after in self.epoch(place):
                found = True
                yield item, after
            empty = 0 if found else empty + 1
            if empty == EMPTY_EPOCHS:
                raise self.empty_epoch(place["epoch"])
            place = {**place, "epoch": place["epoch"] + 1, "shard": 0, "offset": 0, "block": 0, "inside": 0}

    def empty_epoch(self, epoch: int, skipped: Sequence[str] = ()) -> ValueError:
        """The error of epochs in which nothing can be used."""
        shards = ", ".join(map(str, self.order(epoch)[:3]))
        first = f"; the first: {skipped[0]}" if skipped else ""
        problem = (
            f"expected a sample that can be used, got none in {EMPTY_EPOCHS} epochs of shards {shards}, ...{first}"
        )
        return ValueError(f"data: {problem}")

    def _in_order(self, epoch: int, shard: int, offset: int) -> Iterator[tuple[T, int, int]]:
        """(item, its shard's number, items of that shard up to it) to the end of the epoch."""
        begins, mine, last = shard == offset == 0, False, None
        for number, found in islice(enumerate(self.order(epoch)), shard, None):
            for count, item in enumerate(self.read(found, offset), offset + 1):
                last = item, number, count
                if not self.share_items or (count + number) % self.streams == self.stream:
                    mine = True
                    yield last
            offset = 0
        if begins and not mine and last is not None:  # fewer items than streams: those without one share the last
            yield last


# ---------------------------------------------------------------------------------------------------------------
# Batches


class Item(NamedTuple):
    """What a stream gives.

    value: data of a batch; it may come from a worker process.
    place: where the stream stands after it. A stream opened there gives the items that follow.
    skipped: what was left out since the item before because it cannot be used, each with the reason.
    """

    value: Any
    place: Place
    skipped: Sequence[str] = ()


OpenStream = Callable[[int, Place], Iterable[Item]]


class Batches(Iterator[T]):
    """Batches without end, made of items from streams that take turns.

    Args:
        open_stream: (number, place) -> the items of stream `number` of this process from a place on, without end. It is
            called, and its items are made, in the reading process.
        start: the position before the first batch. Of its entries, "skipped", "turn" (the stream that is next) and the
            places, "rows" or else "streams", change from batch to batch; a run resumes only if the others are equal.
            Without places there is a stream for each reading process, whose place is not saved.
        size: items of a batch.
        collate: the values of `size` items -> a batch.
        workers: reading processes, a divisor of the number of streams; 0 reads in this process.
        position: `position` to resume from; None begins at `start`.
        skipped: is told what the streams leave out, and what they left out before the position.

    `next` raises the ValueError, OSError or ImportError of a stream. After an error, and after `close`, there are no
    more batches.

    Raises:
        ValueError: the position is of another run.
    """

    def __init__(
        self, open_stream: OpenStream, start: Mapping[str, Any], size: int, collate: Callable[[list[Any]], T], *,
        workers: int, position: Mapping[str, Any] | None, skipped: Skipped | None = None,
    ) -> None:  # fmt: skip
        position = position or start
        self._start, self._size, self._collate = start, size, collate
        self._key = "rows" if "rows" in start else "streams"
        for key, expected in start.items():
            got = position.get(key)
            if key not in ("skipped", "turn", self._key) and got != expected:
                raise ValueError(f"position: {key}: expected {expected}, got {got}; a run resumes only as it began")
        begun = start.get(self._key) or [None] * max(1, workers)
        self.skipped = Skipped() if skipped is None else skipped
        known = position.get("skipped", [])
        self._turn: int = position.get("turn", 0)
        self._places: list[Place] = list(position.get(self._key) or begun)
        # Older positions have a number in place of the state.
        counts = Skipped.is_state(known) or _is_count(known), _is_count(self._turn) and self._turn < len(begun)
        if not all(counts) or len(self._places) != len(begun) or not all(map(_is_place, self._places, begun)):
            raise ValueError(f"position: expected one of {len(begun)} streams, got {reprlib.repr(position)}")
        self.skipped.know(known if isinstance(known, list) else [])
        streams = list(enumerate(self._places))
        turns = _Turns(open_stream, streams[self._turn :] + streams[: self._turn])
        self._items: Iterator[Item | Exception] = iter(turns)
        if workers:
            loader: DataLoader[Any] = DataLoader(
                turns,
                batch_size=None,
                num_workers=workers,
                collate_fn=_unchanged,
                worker_init_fn=_leave_signals_to_parent,
                generator=torch.Generator(),  # the default one would be drawn from
            )
            self._items = iter(loader)

    def __next__(self) -> T:
        items: list[Item] = []
        for _ in range(self._size):
            item = next(self._items)
            if isinstance(item, Exception):
                self.close()  # or the error's traceback would keep the workers until a garbage collection
                raise item
            items.append(item)
        batch = self._collate([item.value for item in items])
        # Nothing can fail from here on: the position is that of a complete batch.
        for item in items:
            for problem in item.skipped:
                self.skipped(problem)
            self._places[self._turn] = item.place
            self._turn = (self._turn + 1) % len(self._places)
        return batch

    def position(self) -> dict[str, Any]:
        """Where the streams stand after the last batch: numbers and text, as JSON has them."""
        now = {"skipped": self.skipped.state(), "turn": self._turn, self._key: list(self._places)}
        return {key: now.get(key, value) for key, value in self._start.items()}

    def close(self) -> None:
        """End the worker processes. There are no more batches."""
        self._items = iter(())  # a DataLoader's iterator ends its workers when nothing refers to it


def check_shards(name: str, shards: int, processes: int, workers: int) -> None:
    """ValueError unless there is a shard for each reading process."""
    if shards < processes * max(1, workers):
        raise ValueError(
            f"{name}: expected at least {processes * max(1, workers)} shards, one for each of {processes} processes x "
            f"{max(1, workers)} workers, got {shards}: use fewer processes or workers, or more shards"
        )


def share_of(batch_size: int, micro_batch: int, processes: int) -> int:
    """How many items of a batch each process takes.

    Raises:
        ValueError: the batch cannot be divided into micro-batches for all processes.
    """
    if batch_size < 1 or micro_batch < 1 or batch_size % (processes * micro_batch):
        product = f"{processes} x {micro_batch}"
        raise ValueError(f"batch_size: expected a multiple of processes x micro_batch = {product}, got {batch_size}")
    return batch_size // processes


class _Turns(IterableDataset[Any]):
    """An item of each stream in turn; worker w of n has the streams w, w + n, ... An error is the last item."""

    def __init__(self, open_stream: OpenStream, streams: Sequence[tuple[int, Place]]) -> None:
        self.open_stream, self.streams = open_stream, streams

    def __iter__(self) -> Iterator[Item | Exception]:
        worker = get_worker_info()
        mine = self.streams[worker.id :: worker.num_workers] if worker else self.streams
        try:
            running = [iter(self.open_stream(number, place)) for number, place in mine]
            while True:
                for stream in running:
                    yield next(stream)
        except (ValueError, OSError, ImportError) as error:
            yield error  # raised in a worker, it would have the worker's traceback as its message


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_place(place: Place, begun: Place) -> bool:
    """Whether a place has the numbers that the one its stream began at has."""
    if isinstance(begun, dict):
        return isinstance(place, dict) and all(_is_count(place.get(key)) for key in begun)
    if isinstance(begun, (list, tuple)):
        return isinstance(place, (list, tuple)) and len(place) == len(begun) and all(map(_is_count, place))
    return True


def _unchanged(item: Any) -> Any:
    """A `collate_fn` that leaves items as they are."""
    return item


def _leave_signals_to_parent(worker: int) -> None:
    """A `worker_init_fn`: workers survive a signal to the process group, so that the parent can finish its step.

    The second SIGTERM ends a worker, for one that hangs.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
