"""Encoding a corpus: a unit of the sources becomes a shard of ids, in one process or on a cluster.

The same sources and settings give the same bytes, whatever the engine, the number of processes and the interruptions:
a unit is encoded by one process, in order, in batches that are always full (the last is padded with black), on the CPU
by one thread. A shard appears whole, then its record; a unit with both is done. Engines only choose who does which.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from semhitok._files import open_atomic, write_atomic
from semhitok._optional import require
from semhitok.corpus.format import MANIFEST, SKIPPED, Layout, check_shard, count_usage, shard_writer
from semhitok.corpus.sources import CROPS, Item, Unit, plan, read_unit
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

JOB = "job.json"
ENGINES = ("local", "torchrun", "ray")
PRECISIONS = ("fp32", "bf16", "int8")


@dataclass(frozen=True)
class EncodingConfig:
    """What the bytes of a corpus depend on, beside the tokenizer and the sources.

    Attributes:
        crop: "centre" (`resize_crop`) or "ten" (`ten_crops`).
        pack: store ids in as many bits as they need.
        caption: column of parquet files and field of JSON members; "caption" or "text" without one.
        batch_size: images the networks see at once.
        images_per_shard: of image files; webdataset shards and parquet files become a shard each.
        precision: of the networks: "fp32"; "bf16" (autocast); "int8" (weights of linear layers by output channel, and
            their inputs by batch: torch's dynamic quantisation; CPU only). With the last two the first batch of each
            shard is encoded in fp32 too, to tell the share of ids that differ.
    """

    crop: str = "centre"
    pack: bool = False
    caption: str | None = None
    batch_size: int = 16
    images_per_shard: int = 4096
    precision: str = "fp32"

    def __post_init__(self) -> None:
        for name, known in (("crop", CROPS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "images_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Done(NamedTuple):
    """What became of a unit: its record, or none if it could not be read but may be another time.

    seconds: by the clock, in all and by part; see `Summary.shares`.
    """

    record: dict[str, Any] | None
    seconds: dict[str, float]
    problem: str = ""


@dataclass
class Summary:
    """What `encode_corpus` did.

    Attributes:
        images, rows, skipped, bytes: of the whole corpus; a row is an image or one of its crops.
        encoded: images encoded by this call; on torchrun, by this process.
        seconds: of encoding, by the clock.
        shares: of the encoding processes' time in which they were "waiting" for images, "quantising", or "comparing"
            ids with those in fp32.
        changed: share of ids that are others than in fp32, where that was looked at; see `EncodingConfig`.
        usage: of the codes, see `CodeUsage.summary`.
        missing: what there is no manifest for want of; empty if it is written. Torchrun's other processes may be at it.
    """

    images: int = 0
    rows: int = 0
    skipped: int = 0
    bytes: int = 0
    encoded: int = 0
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    changed: float = 0.0
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Job:
    """All that a process needs to encode a unit; it is sent to processes.

    settings: what the bytes depend on; job.json.
    """

    checkpoint: str
    out: Path
    config: EncodingConfig
    layout: Layout
    image_size: int
    device: str
    workers: int
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


def encode_corpus(
    checkpoint: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    config: EncodingConfig | None = None,
    *,
    engine: str = "local",
    processes: int = 1,
    workers: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[Iterable[Done], int], Iterable[Done]] | None = None,
) -> Summary:
    """Encode `sources` into the corpus `out`, or go on where an earlier call with the same arguments stopped.

    Args:
        checkpoint: as in `SemHiTok.from_pretrained`.
        sources: images and folders, webdataset shards, parquet files; see `semhitok.corpus.sources`.
        out: folder of the corpus, see `semhitok.corpus.format`; on several machines one that all of them see.
        config: what to store.
        engine: "local": `processes` of this machine; "torchrun": this process is one of those that it started and takes
            every WORLD_SIZE-th unit, on the GPU of its LOCAL_RANK; "ray": `processes` actors of a Ray cluster.
        processes: encoding processes, of "local" and "ray".
        workers: processes that decode images, for each encoding process; 0 decodes in that one.
        device: "cpu" or a GPU.
        progress: wraps the units as they are done, their number beside them.

    Raises:
        ValueError: bad arguments or sources; `out` holds another corpus; units that could not be read or were lost,
            which the same call does again.
        OSError: sources or checkpoint cannot be read, or `out` not be written. The same call goes on.
        ImportError: pyarrow, webdataset or ray is not installed.
    """
    config = config or EncodingConfig()
    for module, extra in (("pyarrow.parquet", "corpus"), ("PIL.Image", "models"), ("numpy", "models")):
        require(module, extra)
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    rank, world_size = 0, 1
    if engine == "torchrun":
        if "WORLD_SIZE" not in os.environ:
            raise ValueError(
                "engine: torchrun expects to be started by it: torchrun --nproc-per-node N -m semhitok ..."
            )
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if torch.device(device).type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    if engine == "torchrun" and processes != 1:
        raise ValueError(f"processes: expected none with torchrun, which starts them, got {processes}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    try:
        begun = time.perf_counter()
        encoder, job, units = _prepare(str(checkpoint), sources, folder, config, str(device), workers)
        _sweep(folder, engine)
        todo = [unit for unit in units[rank::world_size] if _finished(job, unit) is None]
        summary = Summary()
        problems = []
        busy: dict[str, float] = defaultdict(float)
        encoding = time.perf_counter()
        results = _run(engine, encoder, job, todo, processes)
        del encoder  # `_run` has it, if anything
        with contextlib.closing(results):
            for done in progress(results, len(todo)) if progress else results:
                if done.record is None:
                    problems.append(done.problem)
                    print(f"semhitok: {_line(done.problem)}", file=sys.stderr)
                else:
                    summary.encoded += done.record["images"]
                for part, seconds in done.seconds.items():
                    busy[part] += seconds
        summary.seconds = time.perf_counter() - (encoding if todo else begun)
        summary.shares = {part: busy[part] / busy["all"] for part in busy if part != "all"}
        if problems and engine != "torchrun":  # which would end the other processes
            raise ValueError(
                f"{out}: {len(problems)} of {len(units)} shards could not be made; the same command tries again"
            )
        _sweep(folder, engine)
        summary.missing = _finish(job, units, summary)
        if summary.missing and engine != "torchrun":
            raise ValueError(f"{summary.missing}; the same command makes it again")
        return summary
    finally:
        torch.set_num_threads(threads)  # an encoder in this process takes one


class Encoder:
    """A tokenizer that encodes units of a job; the map function of every engine."""

    def __init__(self, job: Job, tokenizer: SemHiTok | None = None) -> None:
        if torch.device(job.device).type == "cpu":
            torch.set_num_threads(1)  # sums over threads depend on their number
        self.job = job
        if tokenizer is None:
            tokenizer = SemHiTok.from_pretrained(job.checkpoint)
            if (found := encoder_hash(tokenizer)) != job.settings["encoder_sha256"]:
                raise ValueError(
                    f"{job.checkpoint}: expected encoder {job.settings['encoder_sha256'][:12]}, got {found[:12]}"
                )
        del tokenizer.decoder, tokenizer.semantic_decoder  # half of the memory, for nothing
        self.tokenizer = tokenizer.to(job.device).eval()
        self.fast = _at_precision(self.tokenizer, job.config.precision)
        self.seconds: dict[str, float] = defaultdict(float)  # of a unit
        quantizer = self.fast.quantizer
        quantizer.register_forward_pre_hook(lambda *_: self._clock("quantising", -1))
        quantizer.register_forward_hook(lambda *_: self._clock("quantising", 1))

    def encode(self, unit: Unit) -> Done:
        """Write the shard of a unit and its record."""
        return next(self.units([unit]))

    def units(self, units: Sequence[Unit]) -> Generator[Done, None, None]:
        """Write the shards of units, one after the other; images of the next are read while one is encoded."""
        job, workers = self.job, self.job.workers
        if not units:
            return
        items: Any = _Items(units, job.config.caption)  # to the DataLoader these are indices
        loader: DataLoader[Any] = DataLoader(
            _Decoder(job.image_size, job.config.crop),
            sampler=items,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, 2 * job.config.batch_size // workers) if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_encoding_process,
            generator=torch.Generator(),
        )
        decoded = iter(loader)
        for unit in units:
            yield self._unit(unit, decoded)

    def _unit(self, unit: Unit, decoded: Iterator[_Decoded | None]) -> Done:
        job = self.job
        self.seconds.clear()
        self._clock("all", -1)
        self.compared = self.changed = 0
        skipped: list[dict[str, str]] = []
        images = captions = 0
        try:
            with shard_writer(job.out / _name(unit), job.layout) as writer:
                rows: list[tuple[str, str | None, int]] = []
                pixels: list[Tensor] = []
                while True:
                    self._clock("waiting", -1)
                    one = next(decoded)
                    self._clock("waiting", 1)
                    if one is None:
                        break
                    if one.again:
                        raise _Again(one.problem)
                    if one.crops is None:
                        skipped.append({"key": one.key, "reason": one.problem})
                        continue
                    images += 1
                    captions += one.caption is not None
                    for number, crop in enumerate(one.crops):
                        rows.append((one.key, one.caption, number))
                        pixels.append(crop)
                        if len(rows) == job.config.batch_size:
                            self._write(writer, rows, pixels)
                if rows:
                    self._write(writer, rows, pixels)
        except _Again as problem:
            while next(decoded) is not None:  # the rest of this unit
                pass
            self._clock("all", 1)
            return Done(None, dict(self.seconds), str(problem))
        record = {
            "name": _name(unit), "source": unit.source if unit.kind != "images" else "", "images": images,
            "rows": writer.rows, "captions": captions, "skipped": skipped, "ids_compared": self.compared,
            "ids_changed": self.changed, "bytes": writer.bytes, "sha256": writer.sha256, "job": job.digest,
        }  # fmt: skip
        write_atomic(_record_path(job, unit), (json.dumps(record) + "\n").encode())
        self._clock("all", 1)
        return Done(record, dict(self.seconds))

    def _clock(self, part: str, sign: int) -> None:
        """Begin (-1) or end (1) to count the seconds of a part."""
        if part == "quantising" and self.job.device != "cpu":
            torch.cuda.synchronize(self.job.device)
        self.seconds[part] += sign * time.perf_counter()

    def _write(self, writer: Any, rows: list[tuple[str, str | None, int]], pixels: list[Tensor]) -> None:
        """Encode a batch, padded to its full size, and write it; empties both lists."""
        size = self.job.image_size
        batch = torch.zeros(self.job.config.batch_size, 3, size, size)
        torch.stack(pixels, out=batch[: len(pixels)])
        on_device, bf16 = batch.to(self.job.device), self.job.config.precision == "bf16"
        with torch.inference_mode():
            with torch.autocast(on_device.device.type, torch.bfloat16, enabled=bf16):
                ids = self.fast.encode(on_device).cpu()
            if self.job.config.precision != "fp32" and not self.compared:
                quantising = self.seconds["quantising"]
                self._clock("comparing", -1)
                differ = (self.tokenizer.encode(on_device).cpu() != ids)[: len(rows)]
                self._clock("comparing", 1)
                self.seconds["quantising"] = quantising
                self.changed, self.compared = int(differ.sum()), differ.numel()
        for row, grid in zip(rows, ids, strict=False):
            writer.add(*row, grid)
        rows.clear()
        pixels.clear()


def _at_precision(tokenizer: SemHiTok, precision: str) -> SemHiTok:
    """A tokenizer with encoders of that precision; itself if autocast does it."""
    if precision != "int8":
        return tokenizer
    fast = copy.deepcopy(tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, whose int8 is slower than fp32 on a CPU
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        for name in ("teacher", "encoder"):
            setattr(fast, name, quantize_dynamic(getattr(fast, name), {nn.Linear: per_channel_dynamic_qconfig}))
    return fast


def encoder_hash(tokenizer: SemHiTok) -> str:
    """Hex SHA-256 of all weights that ids depend on, the teacher's included."""
    digest = hashlib.sha256()
    for part in ("teacher", "semantic_head", "encoder", "quantizer"):
        module = getattr(tokenizer, part)
        if module is None:
            raise ValueError("teacher: expected a tokenizer with its teacher, got one without it")
        for name, value in module.state_dict().items():
            digest.update(f"{part}.{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class _Again(Exception):
    """A unit cannot be read now."""


class _Decoded(NamedTuple):
    """An image on its way to the encoder: crops float32 [c, 3, size, size], or none and the problem."""

    key: str
    crops: Tensor | None
    caption: str | None
    problem: str
    again: bool


class _Items:
    """The images of units, undecoded, in order; None after each unit."""

    def __init__(self, units: Sequence[Unit], caption: str | None) -> None:
        self.units, self.caption = units, caption

    def __iter__(self) -> Iterator[Item | None]:
        for unit in self.units:
            yield from read_unit(unit, self.caption)
            yield None


class _Decoder(Dataset[Any]):
    """Decodes and crops an image."""

    def __init__(self, size: int, policy: str) -> None:
        self.size, self.policy = size, policy

    def __getitem__(self, item: Item | None) -> _Decoded | None:
        if item is None:
            return None
        try:
            crops, caption = item.crops(self.size, self.policy)
            return _Decoded(item.key, crops.contiguous(), caption, "", False)
        except (ValueError, OSError) as error:
            return _Decoded(item.key, None, None, _reason(error), item.again)


def _as_it_is(item: Any) -> Any:
    return item


def _leave_signals_to_the_encoding_process(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------------
# The folder


def _prepare(
    checkpoint: str, sources: Sequence[str | os.PathLike[str]], folder: Path, config: EncodingConfig, device: str,
    workers: int,
) -> tuple[Encoder, Job, list[Unit]]:  # fmt: skip
    """The job of a folder, new or begun, an encoder for it, and its units."""
    tokenizer = SemHiTok.from_pretrained(checkpoint)
    if config.precision == "int8" and torch.device(device).type != "cpu":
        raise ValueError(f"precision: int8 expects the CPU, got {device}")
    model, vocabulary = tokenizer.config, tokenizer.vocabulary
    assert vocabulary.codebook_hash is not None
    grid = (model.grid_size, model.grid_size)
    layout = Layout(
        model.num_codes, model.num_sub_codes, vocabulary.codebook_hash, grid, config.pack, vocabulary.offsets
    )
    path = folder / JOB
    old: dict[str, Any] = {}
    if path.exists():
        try:
            old = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
    settings = {
        **layout.metadata(),
        "encoder_sha256": encoder_hash(tokenizer),
        "image_size": model.image_size,
        "crop": config.crop,
        "caption": config.caption,
        "batch_size": config.batch_size,
        "images_per_shard": config.images_per_shard,
        "precision": config.precision,
        "device": torch.device(device).type,
        "sources": [os.fspath(source).encode("utf-8", "backslashreplace").decode() for source in sources],
    }
    for key, value in settings.items():
        if old and old.get(key) != value:
            raise ValueError(f"{folder}: holds another corpus: {key} was {old.get(key)!r}, now {value!r}")
    units, digest = plan(sources, config.images_per_shard, folder, old.get("sources_sha256"))
    settings |= {"sources_sha256": digest, "shards": len(units)}
    if not old:
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())
    job = Job(checkpoint, folder, config, layout, model.image_size, device, workers, settings)
    return Encoder(job, tokenizer), job, units


def _name(unit: Unit) -> str:
    return f"shard-{unit.number:06}.parquet"


def _record_path(job: Job, unit: Unit) -> Path:
    return job.out / f"shard-{unit.number:06}.json"


def _sweep(folder: Path, engine: str) -> None:
    """Remove what killed processes were writing. On torchrun another process may be writing it now."""
    if engine != "torchrun":
        for left in folder.glob(".semhitok-*.tmp"):
            left.unlink(missing_ok=True)


def _finished(job: Job, unit: Unit) -> dict[str, Any] | None:
    """The record of a unit that is done, after a check of its shard; damage is told on stderr."""
    path = _record_path(job, unit)
    try:
        record = json.loads(path.read_bytes())
        if record["job"] != job.digest:
            raise ValueError(f"{path}: of another job")
        check_shard(job.out / _name(unit), record)
        return record
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        print(f"semhitok: made again: {_line(str(error))}", file=sys.stderr)
        path.unlink(missing_ok=True)  # before anyone takes it for finished
        return None


def _finish(job: Job, units: Sequence[Unit], summary: Summary) -> str:
    """Check all shards and write the manifest; or say what is missing for that."""
    if json.loads((job.out / JOB).read_bytes()) != job.settings:
        raise ValueError(f"{job.out}: another corpus was begun in it meanwhile")
    usage = CodeUsage(job.layout.num_codes, job.layout.num_sub_codes, offsets=job.layout.offsets)
    shards = []
    for unit in units:
        try:
            record = json.loads(_record_path(job, unit).read_bytes())
            count_usage(job.out, job.layout, record, usage)
        except FileNotFoundError:
            return f"{job.out}: {_name(unit)} is missing"
        except (ValueError, KeyError, TypeError) as error:
            return str(error)
        shards.append({k: len(v) if k == "skipped" else v for k, v in record.items() if k != "job"})
    counts = ("images", "rows", "captions", "skipped", "ids_compared", "ids_changed", "bytes")
    totals = {key: sum(shard[key] for shard in shards) for key in counts}
    with open_atomic(job.out / SKIPPED) as file:
        for unit in units:
            record = json.loads(_record_path(job, unit).read_bytes())
            file.writelines((json.dumps(entry) + "\n").encode() for entry in record["skipped"])
    rounded = {view: {k: round(v, 6) for k, v in figures.items()} for view, figures in usage.summary().items()}
    manifest = {**job.settings, "shards": shards, "totals": totals, "usage": rounded}
    write_atomic(job.out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    summary.images, summary.rows, summary.skipped = totals["images"], totals["rows"], totals["skipped"]
    summary.bytes, summary.usage = totals["bytes"], rounded
    summary.changed = totals["ids_changed"] / max(1, totals["ids_compared"])
    return ""


def _reason(error: Exception) -> str:
    """What an error says, without the system's numbers, as text that every file can hold."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    return text.encode("utf-8", "backslashreplace").decode()


def _line(text: str) -> str:
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


# ---------------------------------------------------------------------------------------------------------------
# Engines: who does which unit


def _run(engine: str, encoder: Encoder, job: Job, units: Sequence[Unit], processes: int) -> Generator[Done, None, None]:
    if engine == "ray":
        return _ray(job, units, processes)
    if engine == "local" and processes > 1:
        return _local(job, units, processes)
    return encoder.units(units)


_encoder: Encoder | None = None  # of a process of `_local`


def _local(job: Job, units: Sequence[Unit], processes: int) -> Generator[Done, None, None]:
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (job,))
    try:
        for future in as_completed([pool.submit(_encode, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError("a process was killed, for want of memory perhaps; the same command goes on") from None
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(job: Job) -> None:
    global _encoder
    _leave_signals_to_the_encoding_process(0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # the one that hands out the units is gone

    threading.Thread(target=watch, daemon=True).start()
    _encoder = Encoder(job)


def _encode(unit: Unit) -> Done:
    assert _encoder is not None
    return _encoder.encode(unit)


def _ray(job: Job, units: Sequence[Unit], processes: int) -> Generator[Done, None, None]:
    """Ray Data starts the encoders, hands out the units, and those of an encoder that was lost to another one."""
    if not units:
        return
    ray, data = require("ray", "ray"), require("ray.data", "ray")
    if not ray.is_initialized():
        ray.init()  # the cluster of RAY_ADDRESS, or one of this machine
    data.DataContext.get_current().enable_progress_bars = False
    # Not `range`, whose reading takes CPUs that the encoders may hold all of.
    numbers = data.from_items(list(range(len(units))), override_num_blocks=len(units))
    encoders = numbers.map_batches(
        _Away,
        fn_constructor_args=(job, units, os.getcwd()),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(processes, len(units))),
        num_cpus=1 + job.workers,
        num_gpus=1 if torch.device(job.device).type == "cuda" else 0,
    )
    for row in encoders.iter_rows():
        done = json.loads(row["done"])
        if isinstance(done, str):
            raise OSError(done)
        yield Done(*done)


class _Away:
    """Encodes for Ray Data, whose processes start in another folder, where relative names would be others.

    Gives a `Done`, or what went wrong, as JSON: of an exception Ray Data would give no more than its traceback.
    """

    def __init__(self, job: Job, units: Sequence[Unit], folder: str) -> None:
        os.chdir(folder)
        self.job, self.units = job, units
        self.encoder: Encoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            self.encoder = self.encoder or Encoder(self.job)
            return {"done": [json.dumps(self.encoder.encode(self.units[number])) for number in batch["item"]]}
        except (ValueError, OSError, ImportError) as error:
            return {"done": [json.dumps(_reason(error))]}
