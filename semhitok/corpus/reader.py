"""Reading encoded corpora: a shuffled stream of ids and captions that resumes exactly where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from semhitok.corpus.format import check_shard, open_shard, read_manifest
from semhitok.data.stream import START, Batches, Item, ShuffledShards, check_shards
from semhitok.vocabulary import Vocabulary


class Encoded(NamedTuple):
    """An image, or a batch of them: ids int64 [h, w] or [b, h, w]; caption ("" for none) and key, or lists of b."""

    ids: Tensor
    caption: Any
    key: Any


class EncodedCorpus(IterableDataset[Encoded]):
    """A corpus, read as a shuffled stream.

    Iterating gives epoch `epoch` once: over all processes and workers of a DataLoader each row comes once. A shard goes
    to one of them as a whole, so some may get more rows than others. `batches` never ends and can be resumed.

    The order is a function of the seed and the epoch: of the shards, and of `shuffle_buffer` rows at a time, which are
    held in memory. A shard is checked against its SHA-256 when a process first reads it.

    Args:
        folder: a finished corpus.
        vocabulary: the vocabulary that the ids are used with; ids of another codebook are refused. None accepts any.
        seed: another seed gives another order.
        shuffle_buffer: rows shuffled at once.
        rank: number of this training process.
        world_size: training processes.

    Attributes:
        layout: K, m, codebook hash, grid.
        epoch: the epoch that iterating gives; set it before.

    Raises:
        OSError: the corpus is not finished or cannot be read.
        ValueError: a damaged manifest, another codebook or arguments out of range. When a shard is read: it is
            missing, truncated, changed or of another codebook; the message names it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], vocabulary: Vocabulary | None = None, *, seed: int = 0,
        shuffle_buffer: int = 4096, rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        self.folder = Path(folder)
        self.layout, manifest = read_manifest(folder)
        if vocabulary is not None:
            try:
                vocabulary.check_hash(self.layout.codebook_hash)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer: expected at least 1, got {shuffle_buffer}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected one in [0, {world_size}), got {rank}")
        self.seed, self.shuffle_buffer, self.rank, self.world_size = seed, shuffle_buffer, rank, world_size
        self.epoch = 0
        self._shards = [
            {key: shard[key] for key in ("name", "rows", "bytes", "sha256")} for shard in manifest["shards"]
        ]
        self._checked: set[str] = set()

    @property
    def rows(self) -> int:
        """Rows of the corpus, over all processes."""
        return sum(shard["rows"] for shard in self._shards)

    @property
    def num_shards(self) -> int:
        """Shards with rows."""
        return sum(shard["rows"] > 0 for shard in self._shards)

    def __iter__(self) -> Iterator[Encoded]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.stream(self.epoch, self.rank * count + number, self.world_size * count)

    def batches(
        self, batch_size: int, *, workers: int = 0, position: Mapping[str, Any] | None = None
    ) -> Batches[Encoded]:
        """Batches without end, epoch after epoch, for this process.

        Args:
            batch_size: rows of a batch of this process.
            workers: reading processes; 0 reads in this one.
            position: `Batches.position` to resume from; None starts at the beginning of `epoch`.

        Raises:
            ValueError: fewer shards with rows than processes x workers, or a position of another corpus, seed, buffer
                or number of processes or workers.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        check_shards(str(self.folder), self.num_shards, self.world_size, workers)
        count = max(1, workers)
        start = {**self.identity(), "workers": workers, "turn": 0, "streams": [[self.epoch, 0]] * count}
        open_stream = partial(self._batches_of, batch_size, count)
        return Batches(open_stream, start, 1, lambda batches: batches[0], workers=workers, position=position)

    def _batches_of(self, batch_size: int, count: int, worker: int, place: list[int]) -> Iterator[Item]:
        """The batches that one of this process's `count` reading processes makes."""
        rows = self.endless(place, self.rank * count + worker, self.world_size * count)
        while True:
            taken, places = zip(*islice(rows, batch_size), strict=True)
            ids, captions, keys = zip(*taken, strict=True)
            yield Item(Encoded(torch.stack(ids), list(captions), list(keys)), places[-1])

    def identity(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        digest = hashlib.sha256(json.dumps(self._shards, sort_keys=True).encode()).hexdigest()
        order = {"corpus": digest, "seed": self.seed, "shuffle_buffer": self.shuffle_buffer}
        return order | {"processes": self.world_size, "rank": self.rank}

    def stream(self, epoch: int, number: int = 0, streams: int = 1, done: int = 0) -> Iterator[Encoded]:
        """The rows of stream `number` of `streams` in an epoch, without the first `done`."""
        full = [shard for shard in self._shards if shard["rows"]]
        order = ShuffledShards(full, self._read, self.shuffle_buffer, self.seed, stream=number, streams=streams)
        block, inside = divmod(done, self.shuffle_buffer)
        shard, offset = 0, block * self.shuffle_buffer
        for found in order.order(epoch):
            if offset < found["rows"]:
                break
            shard, offset = shard + 1, offset - found["rows"]
        place = {**START, "epoch": epoch, "shard": shard, "offset": offset, "block": block, "inside": inside}
        for (ids, caption, key), _ in order.epoch(place):
            yield Encoded(torch.from_numpy(ids.astype("int64")), caption, key)

    def endless(self, place: Sequence[int], number: int = 0, streams: int = 1) -> Iterator[tuple[Encoded, list[int]]]:
        """(row, the place after it) of stream `number` from a place on: an epoch, and rows of it that are done."""
        epoch, done = place
        while True:
            for row in self.stream(epoch, number, streams, done):
                done += 1
                yield row, [epoch, done]
            epoch, done = epoch + 1, 0

    def _read(self, shard: Mapping[str, Any], skip: int) -> Iterator[tuple[Any, str, str]]:
        """(ids, caption, key) of the rows of a shard, without the first `skip`."""
        path, end = self.folder / shard["name"], self.layout.vocabulary.num_flat_codes
        if shard["name"] not in self._checked:
            check_shard(path, shard)
            self._checked.add(shard["name"])
        file = open_shard(path, self.layout)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            table = file.read_row_group(group, columns=["key", "caption", "ids"], use_threads=False)
            for batch in table.to_batches():
                ids = self.layout.from_arrow(batch.column("ids"))
                if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < end:
                    raise ValueError(f"{path}: ids: expected them in [0, {end})")
                texts = zip(batch.column("caption").to_pylist(), batch.column("key").to_pylist(), strict=True)
                for n, (caption, key) in islice(enumerate(texts), skip, None):
                    yield ids[n].copy(), caption or "", key  # a copy: a view would keep the whole group in memory
                skip = max(0, skip - batch.num_rows)
