"""The format of encoded corpora: a folder of parquet shards of ids, captions and keys, and a manifest with checksums.

Parquet is read by the common tools (Hugging Face datasets, DuckDB, Polars, Spark), column by column, and its footer
can say which codebooks the ids belong to.

DIR/job.json              settings, by which another job in the folder is refused
DIR/shard-000000.parquet  one row per image or crop: key, caption, crop, ids
DIR/shard-000000.json     its record, written when the shard is complete: counts, SHA-256, images skipped
DIR/skipped.jsonl         {"key", "reason"} of each image that could not be read
DIR/notes.jsonl           {"key", "note"}, if any: captions repaired or left out, files of shards passed over
DIR/manifest.json         settings, totals, usage of the codes; name, counts and SHA-256 of each shard; written last

`ids` is list<uint8 | uint16 | uint32>, the smallest type that holds K * m ids, row by row from the top left. Packed, it
is fixed_size_binary: id t is in bits t * b ... t * b + b - 1, where b is the number of bits of K * m - 1 and the lowest
bit of a byte comes first. The metadata of a shard has, under `semhitok`, its layout as JSON: K, m, codebook hash, grid,
packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from semhitok._files import open_atomic, parse_json, read_object
from semhitok._optional import require
from semhitok.config import from_dict
from semhitok.usage import CodeUsage
from semhitok.vocabulary import Vocabulary

FORMAT, VERSION = "semhitok-corpus", 1
JOB, MANIFEST, SKIPPED, NOTES = "job.json", "manifest.json", "skipped.jsonl", "notes.jsonl"
_ROWS = 1024  # of a row group: readers and the writer hold one in memory
_METADATA = b"semhitok"


@dataclass(frozen=True)
class Layout:
    """How a corpus stores ids; the same for all of its shards.

    Attributes:
        num_codes: K, semantic codes.
        num_sub_codes: m, sub-codes of each; with offsets, their mean number.
        codebook_hash: hex SHA-256 of the codebooks the ids belong to.
        grid: (h, w), ids of an image.
        packed: ids are stored in as few bits as K * m needs.
        offsets: [K + 1], the first flat id of each semantic code, then K * m; None if all sub-codebooks have m codes.
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
        """The layout as JSON has it; see `parse`."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self), "grid": list(self.grid)}
        if values.pop("offsets") is not None:
            values["offsets"] = list(self.offsets or ())
        return values

    @classmethod
    def parse(cls, metadata: Any) -> Layout:
        """The layout of which `metadata` is the description; ValueError if it is not one."""
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        if metadata.get("version") != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {metadata.get('version')!r}; update semhitok")
        names = ("num_codes", "num_sub_codes", "codebook_hash", "grid", "packed")
        for name in names:
            if name not in metadata:
                raise ValueError(f"layout: expected {', '.join(names)}, got no {name}")
        layout = from_dict(cls, {name: metadata[name] for name in names}, "layout")
        if min(layout.grid) < 1:
            raise ValueError(f"layout.grid: expected two positive numbers, got {list(layout.grid)}")
        offsets = metadata.get("offsets")
        if offsets is not None:
            if not isinstance(offsets, list) or not all(type(offset) is int for offset in offsets):
                raise ValueError("layout.offsets: expected a list of integers")
            layout = replace(layout, offsets=tuple(offsets))
        layout.vocabulary  # noqa: B018  (checks K, m and the offsets)
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
        """ids [n, h, w] in [0, K * m) -> the pyarrow column that stores them."""
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
        """The column -> ids, an integer NumPy array [n, h, w]; their range is not checked."""
        numpy = require("numpy")
        count, tokens = len(column), self.grid[0] * self.grid[1]
        if column.null_count:
            raise ValueError(f"ids: expected {tokens} in every row, got null")
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
        rows: number of rows written so far.
        bytes, sha256: size and hex digest of the file, once it is closed.
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
        """Add a row; ids are integers [h, w] on the CPU."""
        self._waiting.append((key, caption, crop, ids))
        if len(self._waiting) == _ROWS:
            self._flush()

    def close(self) -> None:
        """Write the rest and the footer."""
        self._flush()
        self._table.close()
        self.bytes, self.sha256 = self._file.bytes, self._file.digest.hexdigest()

    def abandon(self) -> None:
        """Write nothing more; without this, pyarrow would when it deletes its object."""
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
    """A binary file that counts and hashes the bytes written."""

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
    """A context that writes a shard. The file appears at its end, complete, or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with open_atomic(path) as file:
        writer = ShardWriter(file, layout)
        try:
            yield writer
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def check_shard(path: Path, record: Mapping[str, Any]) -> None:
    """Check a shard against its record or its entry in the manifest.

    Raises:
        ValueError: the shard is missing, truncated or changed; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such shard")
    if (size := path.stat().st_size) != record["bytes"]:
        raise ValueError(f"{path}: expected {record['bytes']} bytes, got {size}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != record["sha256"]:
        raise ValueError(f"{path}: expected SHA-256 {record['sha256'][:12]}, got {digest.hexdigest()[:12]}")


def read_manifest(folder: str | os.PathLike[str]) -> tuple[Layout, dict[str, Any]]:
    """The layout of a finished corpus, and its whole manifest.

    Raises:
        OSError: there is no manifest: the corpus is not finished, for example.
        ValueError: the manifest is damaged, or not one of a corpus.
    """
    path = Path(folder, MANIFEST)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; is {folder} a finished corpus?")
    try:
        manifest = read_object(path)
        layout = Layout.parse(manifest)
        shards = manifest.get("shards")
        if not isinstance(shards, list) or not shards:
            raise ValueError("shards: expected a list of at least one")
        for shard in shards:
            check_entry(shard)
        if len({shard["name"] for shard in shards}) < len(shards):
            raise ValueError("shards: expected each once")
        totals = manifest.get("totals", {})
        if not isinstance(totals, dict) or not all(is_count(total) for total in totals.values()):
            raise ValueError("totals: expected numbers")
    except ValueError as error:
        raise ValueError(f"{path}: not a corpus's manifest, or damaged: {error}") from None
    return layout, manifest


def check_entry(shard: Any) -> None:
    """ValueError unless `shard` names and describes a shard, in the manifest's folder."""
    entry = shard if isinstance(shard, dict) else {}
    name, digest = entry.get("name"), entry.get("sha256")
    named = isinstance(name, str) and name and Path(name).name == name and "\0" not in name
    if not (named and isinstance(digest, str) and is_count(entry.get("rows")) and is_count(entry.get("bytes"))):
        raise ValueError(f"shards: expected name, rows, bytes and sha256 of each, got {reprlib.repr(shard)}")


def is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def verify(folder: str | os.PathLike[str]) -> CodeUsage:
    """Read a whole finished corpus and check it against its manifest.

    Returns:
        The usage of its codes.

    Raises:
        OSError: the corpus is not finished or cannot be read.
        ValueError: a shard is missing, truncated, changed, of another codebook, or has ids out of range; the message
            names the first such shard and says how many more there are.
    """
    layout, manifest = read_manifest(folder)
    usage = None
    problems = []
    for shard in manifest["shards"]:
        try:
            if usage is None:  # which takes memory by the manifest's K and m: a shard must agree first
                open_shard(Path(folder, shard["name"]), layout)
                usage = CodeUsage(layout.num_codes, layout.num_sub_codes, offsets=layout.offsets)
            count_usage(Path(folder), layout, shard, usage)
        except ValueError as error:
            problems.append(str(error))
    if problems or usage is None:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return usage


def count_usage(folder: Path, layout: Layout, record: Mapping[str, Any], usage: CodeUsage) -> None:
    """Check a shard and count its ids in `usage`; raises the ValueErrors of `verify`."""
    path = folder / record["name"]
    check_shard(path, record)
    try:
        file = open_shard(path, layout)
        if file.metadata.num_rows != record["rows"]:
            raise ValueError(f"expected {record['rows']} rows, got {file.metadata.num_rows}")
        for batch in file.iter_batches(_ROWS, columns=["ids"], use_threads=False):
            usage.update(torch.from_numpy(layout.from_arrow(batch.column("ids")).astype("int64")))
    except ValueError as error:
        raise ValueError(error if str(error).startswith(str(path)) else f"{path}: {error}") from None


def open_shard(path: Path, layout: Layout) -> Any:
    """A shard as a pyarrow file.

    Raises:
        ValueError: it is not a shard, or of another layout; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such shard")
    try:
        file = require("pyarrow.parquet", "corpus").ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        found = Layout.parse(parse_json((file.schema_arrow.metadata or {}).get(_METADATA, b"{}")))
    except (ValueError, OSError) as error:  # pyarrow's are of these kinds
        raise ValueError(f"{path}: not a shard of a corpus: {' '.join(str(error).split())}") from None
    if found != layout:
        pairs = zip(asdict(layout).items(), asdict(found).values(), strict=True)
        name, expected, got = next((name, a, b) for (name, a), b in pairs if a != b)
        raise ValueError(f"{path}: {name}: expected {expected}, got {got}")
    return file
