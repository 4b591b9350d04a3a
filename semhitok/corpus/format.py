"""Encoded corpora: a folder of parquet shards of ids, with captions and keys, and a manifest that vouches for each.

Parquet because the field reads it as it is (Hugging Face datasets, DuckDB, Polars, Spark), its columns can be read
apart, and its footer holds what the ids belong to.

DIR/manifest.json         settings, totals, usage of the codes; name, counts and SHA-256 of each shard
DIR/shard-000000.parquet  a row an image or crop: key, caption, crop, ids
DIR/shard-000000.json     what the manifest says of it, written when it is finished
DIR/skipped.jsonl         {"key", "reason"} of each image that could not be read

`ids` is list<uint8 | uint16 | uint32>, the smallest that holds K * m ids, row by row from the top left; or packed:
fixed_size_binary, in which id t has the bits t * b ... t * b + b - 1, b = bits of K * m - 1, the lowest bit of a byte
first. The metadata of a shard has under `semhitok` its layout as JSON: K, m, codebook hash, grid, packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from semhitok._files import open_atomic
from semhitok._optional import require
from semhitok.data.crops import generator
from semhitok.usage import CodeUsage
from semhitok.vocabulary import Vocabulary

FORMAT, VERSION = "semhitok-corpus", 1
MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
_ROWS = 1024  # of a row group, the most that a reader or the writer holds
_METADATA = b"semhitok"


@dataclass(frozen=True)
class Layout:
    """What the shards of a corpus have in common.

    Attributes:
        num_codes: K, semantic codes.
        num_sub_codes: m, sub-codes of each.
        codebook_hash: hex SHA-256 of the codebooks the ids belong to.
        grid: (h, w), ids of an image.
        packed: ids are stored in as many bits as they need.
        offsets: the first flat id of every semantic code, and K * m, where sub-codebooks have sizes of their own.
    """

    num_codes: int
    num_sub_codes: int
    codebook_hash: str
    grid: tuple[int, int]
    packed: bool
    offsets: tuple[int, ...] | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the ids, without text ids."""
        return Vocabulary(self.num_codes, self.num_sub_codes, codebook_hash=self.codebook_hash, offsets=self.offsets)

    @property
    def bits(self) -> int:
        """Bits of an id."""
        return max(1, (self.vocabulary.num_flat_codes - 1).bit_length())

    def metadata(self) -> dict[str, Any]:
        values = {"format": FORMAT, "version": VERSION, **asdict(self), "grid": list(self.grid)}
        if values.pop("offsets") is not None:
            values["offsets"] = list(self.offsets or ())
        return values

    @classmethod
    def parse(cls, metadata: Any) -> Layout:
        """The layout that `metadata` gave; ValueError if it is none."""
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        if metadata.get("version") != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {metadata.get('version')}; update semhitok")
        try:
            height, width = map(int, metadata["grid"])
            offsets = metadata.get("offsets")
            layout = cls(
                int(metadata["num_codes"]), int(metadata["num_sub_codes"]), str(metadata["codebook_hash"]),
                (height, width), bool(metadata["packed"]),
                None if offsets is None else tuple(map(int, offsets)),
            )  # fmt: skip
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"layout: expected num_codes, num_sub_codes, codebook_hash, grid, packed: {error}"
            ) from None
        layout.vocabulary  # noqa: B018  (checks K and m)
        return layout

    def schema(self) -> Any:
        """The pyarrow schema of a shard."""
        pa = require("pyarrow", "corpus")
        kind: Any = pa.binary((self.grid[0] * self.grid[1] * self.bits + 7) // 8)
        if not self.packed:
            kind = pa.list_(
                next((t for t in (pa.uint8(), pa.uint16(), pa.uint32()) if t.bit_width >= self.bits), pa.uint64())
            )
        fields = [("key", pa.string()), ("caption", pa.string()), ("crop", pa.uint8()), ("ids", kind)]
        return pa.schema(fields, {_METADATA: json.dumps(self.metadata(), sort_keys=True)})

    def to_arrow(self, ids: Tensor) -> Any:
        """ids [n, h, w] in [0, K * m) -> the column that stores them."""
        pa, numpy = require("pyarrow", "corpus"), require("numpy")
        kind = self.schema().field("ids").type
        flat = self.vocabulary.check(ids).flatten(1).numpy()
        if not self.packed:
            offsets = numpy.arange(len(flat) + 1, dtype=numpy.int32) * flat.shape[1]
            values = pa.array(flat.reshape(-1).astype(kind.value_type.to_pandas_dtype()))
            return pa.ListArray.from_arrays(pa.array(offsets), values, kind)
        bits = numpy.empty((*flat.shape, self.bits), numpy.uint8)
        for bit in range(self.bits):
            bits[..., bit] = (flat >> bit) & 1
        packed = numpy.packbits(bits.reshape(len(flat), flat.shape[1] * self.bits), axis=1, bitorder="little")
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(flat), [None, pa.py_buffer(packed.tobytes())])

    def from_arrow(self, column: Any) -> Any:
        """The column -> ids, an integer NumPy array [n, h, w] that is not checked for their range."""
        numpy = require("numpy")
        count, tokens = len(column), self.grid[0] * self.grid[1]
        if column.null_count:
            raise ValueError("ids: expected some in every row, got null")
        if not self.packed:
            flat = column.flatten().to_numpy()
            if not bool((column.value_lengths().to_numpy() == tokens).all()):
                raise ValueError(f"ids: expected {tokens} in every row")
            return flat.reshape(count, *self.grid)
        width = column.type.byte_width
        rows = numpy.frombuffer(column.buffers()[1], numpy.uint8, count * width, column.offset * width)
        bits = numpy.unpackbits(rows.reshape(count, width), axis=1, count=tokens * self.bits, bitorder="little")
        bits = bits.reshape(count, tokens, self.bits)
        flat = numpy.zeros((count, tokens), numpy.int64)
        for bit in range(self.bits):
            flat |= bits[..., bit].astype(numpy.int64) << bit
        return flat.reshape(count, *self.grid)


class ShardWriter:
    """Writes the rows of a shard; see `shard_writer`.

    Attributes:
        rows: written so far.
        bytes, sha256: of the file, when it is finished.
    """

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self.layout, self.rows, self.bytes, self.sha256 = layout, 0, 0, ""
        self._file: _Hashed = _Hashed(file)
        self._table = require("pyarrow.parquet", "corpus").ParquetWriter(
            self._file, layout.schema(), compression="zstd", use_dictionary=["crop"], write_statistics=False,
            store_schema=True,
        )  # fmt: skip
        self._waiting: list[tuple[str, str | None, int, Tensor]] = []

    def add(self, key: str, caption: str | None, crop: int, ids: Tensor) -> None:
        """A row: ids are integers [h, w] on the CPU."""
        self._waiting.append((key, caption, crop, ids))
        if len(self._waiting) == _ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._table.close()
        self.bytes, self.sha256 = self._file.bytes, self._file.digest.hexdigest()

    def abandon(self) -> None:
        """Write nothing more: pyarrow would try to when the object goes."""
        self._file.abandoned = True
        with contextlib.suppress(Exception):
            self._table.close()

    def _flush(self) -> None:
        if self._waiting:
            pa = require("pyarrow", "corpus")
            keys, captions, crops, ids = zip(*self._waiting, strict=True)
            columns = [pa.array(keys, pa.string()), pa.array(captions, pa.string()), pa.array(crops, pa.uint8())]
            columns.append(self.layout.to_arrow(torch.stack(ids)))
            self._table.write_table(pa.Table.from_arrays(columns, schema=self.layout.schema()), _ROWS)
            self.rows += len(keys)
            self._waiting = []


class _Hashed:
    """A binary file that counts and hashes what is written."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.bytes, self.abandoned = file, hashlib.sha256(), 0, False

    def write(self, data: Any) -> int:
        if not self.abandoned:
            self.file.write(data)
            self.digest.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def shard_writer(path: str | os.PathLike[str], layout: Layout) -> Iterator[ShardWriter]:
    """A shard to write: it appears at the end, whole, or not at all.

    Raises:
        OSError: it cannot be written.
    """
    with open_atomic(path) as file:
        writer = ShardWriter(file, layout)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def check_shard(path: Path, record: Mapping[str, Any]) -> None:
    """Check that a shard is the one that its record, or the manifest, tells of.

    Raises:
        ValueError: it is missing, truncated or changed; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such shard")
    if (size := path.stat().st_size) != record["bytes"]:
        raise ValueError(f"{path}: expected {record['bytes']} bytes, got {size}")
    if (digest := sha256_of(path)) != record["sha256"]:
        raise ValueError(f"{path}: expected SHA-256 {record['sha256'][:12]}, got {digest[:12]}")


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Layout, dict[str, Any]]:
    """The layout and all the rest that a finished corpus says of itself.

    Raises:
        OSError: there is no manifest, because the corpus is not finished, say.
        ValueError: it is damaged or something else.
    """
    path = Path(folder, MANIFEST)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; is {folder} a finished corpus?")
    try:
        manifest = json.loads(path.read_bytes())
        layout = Layout.parse(manifest)
        for shard in manifest["shards"]:
            name, rows, size, digest = (shard[key] for key in ("name", "rows", "bytes", "sha256"))
            if Path(name).name != name or not isinstance(rows + size, int) or not isinstance(digest, str):
                raise ValueError(f"shards: expected name, rows, bytes and sha256, got {shard}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a corpus's manifest, or damaged: {error}") from None
    return layout, manifest


def verify(folder: str | os.PathLike[str]) -> CodeUsage:
    """Read all of a finished corpus and check it against its manifest.

    Returns:
        The use of its codes.

    Raises:
        OSError: the corpus is not finished or cannot be read.
        ValueError: a shard is missing, truncated, changed, of another codebook or with ids out of range; the
            message names the first such shard and tells how many there are.
    """
    layout, manifest = read_manifest(folder)
    usage = CodeUsage(layout.num_codes, layout.num_sub_codes, offsets=layout.offsets)
    problems = []
    for shard in manifest["shards"]:
        try:
            count_usage(Path(folder), layout, shard, usage)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return usage


def count_usage(folder: Path, layout: Layout, record: Mapping[str, Any], usage: CodeUsage) -> None:
    """Check a shard and add the use of its codes to `usage`; ValueError as `verify` does."""
    path = folder / record["name"]
    check_shard(path, record)
    try:
        for batch in _open(path, layout).iter_batches(_ROWS, columns=["ids"], use_threads=False):
            usage.update(torch.from_numpy(layout.from_arrow(batch.column("ids")).astype("int64")))
    except ValueError as error:
        raise ValueError(error if str(error).startswith(str(path)) else f"{path}: {error}") from None


def _open(path: Path, layout: Layout) -> Any:
    """A shard as a pyarrow file, if it is of that layout."""
    file = require("pyarrow.parquet", "corpus").ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    metadata = (file.schema_arrow.metadata or {}).get(_METADATA, b"{}")
    try:
        found = Layout.parse(json.loads(metadata))
    except ValueError as error:
        raise ValueError(f"{path}: not a shard of a corpus: {error}") from None
    if found != layout:
        pairs = zip(asdict(layout).items(), asdict(found).values(), strict=True)
        name, expected, got = next((name, a, b) for (name, a), b in pairs if a != b)
        raise ValueError(f"{path}: {name}: expected {expected}, got {got}")
    return file


class Encoded(NamedTuple):
    """An image, or a batch of them: ids int64 [h, w] or [b, h, w]; caption ("" for none) and key, or lists of b."""

    ids: Tensor
    caption: Any
    key: Any


class EncodedCorpus(IterableDataset[Encoded]):
    """A corpus to read in a shuffled stream.

    Iterating gives epoch `epoch`, once: over all processes and workers of a DataLoader each row comes once. A shard
    goes to one of them as a whole, so that some may get more rows than others. `batches` never ends, and goes on
    exactly where it was.

    The order is a function of the seed and the epoch: of the shards, and of `shuffle_buffer` rows at a time, which
    are kept in memory. A shard is checked against its SHA-256 when a process first reads it.

    Args:
        folder: a finished corpus.
        vocabulary: that the ids are meant for; another codebook's are refused. Without one they are not.
        seed: another seed gives another order.
        shuffle_buffer: rows shuffled at once.
        rank: number of this training process.
        world_size: training processes.

    Attributes:
        layout: K, m, codebook hash, grid.
        epoch: that iterating gives; assign another one before it.

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
        self._checked: set[int] = set()

    @property
    def rows(self) -> int:
        """Rows of the corpus, over all processes."""
        return sum(shard["rows"] for shard in self._shards)

    def __iter__(self) -> Iterator[Encoded]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self._rows(self.rank * count + number, self.world_size * count, self.epoch, 0)

    def batches(
        self, batch_size: int, *, workers: int = 0, position: Mapping[str, Any] | None = None
    ) -> EncodedBatches:
        """Batches without end, epoch after epoch, for this process.

        Args:
            batch_size: rows of a batch of this process.
            workers: reading processes; 0 reads in this one.
            position: what `EncodedBatches.position` gave; from the beginning without one.

        Raises:
            ValueError: fewer shards with rows than processes x workers, or a position of another corpus, seed, buffer
                or number of processes or workers.
        """
        return EncodedBatches(self, batch_size, workers, position)

    def identity(self) -> dict[str, Any]:
        """What the order of the rows depends on."""
        digest = hashlib.sha256(json.dumps(self._shards, sort_keys=True).encode()).hexdigest()
        return {
            "corpus": digest, "seed": self.seed, "shuffle_buffer": self.shuffle_buffer,
            "processes": self.world_size, "rank": self.rank,
        }  # fmt: skip

    def _order(self, stream: int, streams: int, epoch: int) -> list[int]:
        """The shards of a stream in an epoch; those without rows are left out."""
        full = [n for n, shard in enumerate(self._shards) if shard["rows"]]
        order = torch.randperm(len(full), generator=generator(self.seed, ~epoch)).tolist()
        return [full[n] for n in order[stream::streams]]

    def _rows(self, stream: int, streams: int, epoch: int, done: int) -> Iterator[Encoded]:
        """The rows of a stream in an epoch after the first `done`."""
        block, inside = divmod(done, self.shuffle_buffer)
        rows = self._in_order(self._order(stream, streams, epoch), block * self.shuffle_buffer)
        while buffer := list(islice(rows, self.shuffle_buffer)):
            order = torch.randperm(len(buffer), generator=generator(self.seed, stream, epoch, block)).tolist()
            for n in order[inside:]:
                ids, caption, key = buffer[n]
                yield Encoded(torch.from_numpy(ids.astype("int64")), caption, key)
            block, inside = block + 1, 0
            buffer.clear()  # before the next one is filled

    def _in_order(self, shards: Sequence[int], skip: int) -> Iterator[tuple[Any, str, str]]:
        """(ids, caption, key) of all rows of some shards, but for the first `skip`."""
        for number in shards:
            shard = self._shards[number]
            if skip >= shard["rows"]:
                skip -= shard["rows"]
                continue
            path = self.folder / shard["name"]
            if number not in self._checked:
                check_shard(path, shard)
                self._checked.add(number)
            file = _open(path, self.layout)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if skip >= rows:
                    skip -= rows
                    continue
                table = file.read_row_group(group, columns=["key", "caption", "ids"], use_threads=False)
                for batch in table.to_batches():
                    ids = self.layout.from_arrow(batch.column("ids"))
                    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.layout.vocabulary.num_flat_codes:
                        raise ValueError(f"{path}: ids: expected them in [0, {self.layout.vocabulary.num_flat_codes})")
                    texts = zip(batch.column("caption").to_pylist(), batch.column("key").to_pylist(), strict=True)
                    for n, (caption, key) in islice(enumerate(texts), skip, None):
                        yield ids[n].copy(), caption or "", key  # a copy: a view would hold the whole group
                    skip = max(0, skip - batch.num_rows)


class EncodedBatches(Iterator[Encoded]):
    """Batches of an `EncodedCorpus`, without end; `position` tells where they stand, for `EncodedCorpus.batches`."""

    def __init__(
        self, corpus: EncodedCorpus, batch_size: int, workers: int, position: Mapping[str, Any] | None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self._identity = {**corpus.identity(), "workers": workers}
        self._turn = 0
        count = max(1, workers)
        streams = corpus.world_size * count
        if (full := len(corpus._order(0, 1, 0))) < streams:
            raise ValueError(
                f"{corpus.folder}: expected at least {streams} shards, one for each of {corpus.world_size} processes x "
                f"{count} workers, got {full}"
            )
        self._places = [(corpus.epoch, 0)] * count
        if position:
            for key, expected in self._identity.items():
                if position.get(key) != expected:
                    raise ValueError(f"position: expected one with {key} {expected}, got {position.get(key)}")
            self._turn = position["turn"]
            self._places = [(place[0], place[1]) for place in position["streams"]]
        own = [_Endless(corpus, corpus.rank * count + n, streams, batch_size, self._places[n]) for n in range(count)]
        readers = _Readers(own[self._turn :] + own[: self._turn])  # streams take turns
        self._items = iter(readers)
        if workers:
            loader = DataLoader(
                readers, batch_size=None, num_workers=workers, collate_fn=_as_it_is, generator=torch.Generator()
            )
            self._items = iter(loader)

    def __next__(self) -> Encoded:
        batch, place = next(self._items)
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self._places[self._turn] = place
        self._turn = (self._turn + 1) % len(self._places)
        return batch

    def position(self) -> dict[str, Any]:
        """Where the batches stand after the last one given out: numbers and text, as JSON has them."""
        return {**self._identity, "turn": self._turn, "streams": [list(place) for place in self._places]}

    def close(self) -> None:
        """End the reading processes. No more batches come."""
        self._items = iter(())


@dataclass
class _Endless:
    """(batch, (epoch, rows of it done)) of a stream from a place on."""

    corpus: EncodedCorpus
    stream: int
    streams: int
    batch_size: int
    place: tuple[int, int]

    def __iter__(self) -> Iterator[tuple[Any, tuple[int, int]]]:
        epoch, done = self.place
        waiting: list[Encoded] = []
        while True:
            for row in self.corpus._rows(self.stream, self.streams, epoch, done):
                waiting.append(row)
                done += 1
                if len(waiting) == self.batch_size:
                    ids, captions, keys = zip(*waiting, strict=True)
                    yield Encoded(torch.stack(ids), list(captions), list(keys)), (epoch, done)
                    waiting = []
            epoch, done = epoch + 1, 0


class _Readers(IterableDataset[Any]):
    """A stream for each worker; without workers the only one. An error comes as the last item."""

    def __init__(self, streams: Sequence[_Endless]) -> None:
        self.streams = streams

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        try:
            yield from self.streams[worker.id if worker else 0]
        except (ValueError, OSError, ImportError) as error:
            yield error, (0, 0)


def _as_it_is(item: Any) -> Any:
    return item
