"""Encoding a corpus: the sources become a folder of shards, and what was interrupted is resumed.

The same sources and settings give the same bytes, whatever the engine, the number of processes and the interruptions.
Each unit of the sources becomes a shard. It is done when it has a shard and a record that agree; when all units are
done, the manifest is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from semhitok._files import open_atomic, read_object, write_atomic, write_json
from semhitok._messages import printable
from semhitok._optional import require
from semhitok._settings import Workers
from semhitok.corpus import engines
from semhitok.corpus.config import EncodingConfig
from semhitok.corpus.encoder import EncodingJob, UnitEncoder, UnitResult, encoder_hash
from semhitok.corpus.format import (
    JOB,
    MANIFEST,
    NOTES,
    SKIPPED,
    Layout,
    check_entry,
    check_shard,
    count_usage,
    is_count,
)
from semhitok.corpus.lock import locked, torchrun_group
from semhitok.corpus.sources import keys_collide, plan, sort_out
from semhitok.corpus.tables import check_columns
from semhitok.corpus.units import Unit, source_state
from semhitok.data.kinds import PARQUET
from semhitok.data.passed_over import PassedOver
from semhitok.data.workers import of_machine
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

# What a record counts; of the lists, the length counts. Earlier versions did not have the new ones.
_NEW_COUNTS = ("captions_listed", "captions_repaired", "captions_left_out", "captions_lacking", "notes")
_COUNTS = ("images", "rows", "captions", "skipped", "ids_compared", "ids_changed", "bytes", *_NEW_COUNTS)
_LISTS = ("skipped", "notes")
_PREFIXED = "source and key"  # the setting "keys" of a corpus whose keys begin with their source


@dataclass
class Summary:
    """What `encode_corpus` did.

    Attributes:
        images, rows, skipped, bytes: of the whole corpus; a row is an image or one of its crops.
        captions: images that have a caption; of `captions_listed` it is the first of several, of `captions_repaired` it
            has U+FFFD in place of invalid text.
        captions_left_out, captions_lacking: images with a caption that could not be used, and with JSON that has none
            of the fields it could be in.
        passed_over: what the folders hold beside the sources, in one line; empty if there is nothing.
        unreadable: files and folders among these that could not be read.
        notes: lines of notes.jsonl, which names captions that were repaired or left out, and files passed over.
        encoded: images encoded by this call; on torchrun, by this process.
        seconds: of wall-clock time, for encoding.
        shares: of the encoding processes' time that was spent "waiting" for images, "quantising", or "comparing" ids
            with those in fp32.
        changed: share of the ids compared that differ from those in fp32; see `EncodingConfig`.
        usage: of the codes, see `CodeUsage.summary`.
        missing: why there is no manifest yet; empty if it is written. On torchrun, another process may still be
            encoding a shard.
    """

    images: int = 0
    rows: int = 0
    skipped: int = 0
    bytes: int = 0
    captions: int = 0
    captions_listed: int = 0
    captions_repaired: int = 0
    captions_left_out: int = 0
    captions_lacking: int = 0
    passed_over: str = ""
    unreadable: int = 0
    notes: int = 0
    encoded: int = 0
    seconds: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    changed: float = 0.0
    usage: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: str = ""


def encode_corpus(
    checkpoint: str | os.PathLike[str],
    sources: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    config: EncodingConfig | None = None,
    *,
    engine: str = "local",
    processes: int = 1,
    workers: Workers = "auto",
    device: str | torch.device = "cpu",
    progress: Callable[[Iterable[UnitResult], int], Iterable[UnitResult]] | None = None,
) -> Summary:
    """Encode `sources` into the corpus `out`, or resume where an earlier call with the same arguments stopped.

    Args:
        checkpoint: as in `SemHiTok.from_pretrained`.
        sources: images and folders, webdataset shards, parquet files; see `semhitok.corpus.sources`.
        out: folder of the corpus, see `semhitok.corpus.format`; all machines must see the same folder.
        config: the settings.
        engine: "local": `processes` on this machine; "torchrun": this process, one of those that torchrun started,
            takes every WORLD_SIZE-th unit, on the GPU of its LOCAL_RANK; "ray": `processes` actors of a Ray cluster.
        processes: encoding processes of "local" and "ray".
        workers: processes that decode images, for each encoding process; 0 decodes in the encoding process. "auto" is
            0 with "ray" and on a CPU, and otherwise what `semhitok.data.workers` says.
        device: "cpu" or a GPU.
        progress: wraps the iterable of the units' results; its second argument is their number.

    Raises:
        ValueError: bad arguments or sources; `out` holds another corpus, or another run is encoding into it; units
            could not be read or were lost, and the same call encodes those again; not one image could be encoded.
        OSError: sources or checkpoint cannot be read, or `out` cannot be written. The same call resumes.
        ImportError: pyarrow, webdataset or ray is not installed.
    """
    config = config or EncodingConfig()
    for module, extra in (("pyarrow.parquet", "corpus"), ("PIL.Image", "models"), ("numpy", "models")):
        require(module, extra)
    rank, world_size, device = engines.place(engine, processes, str(device))
    if workers == "auto":
        kind = torch.device(device).type
        workers = 0 if engine == "ray" else of_machine(kind, processes if engine == "local" else None)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())  # an encoder in this process sets it to one
        stack.enter_context(locked(folder, torchrun_group() if engine == "torchrun" else None))
        tokenizer = SemHiTok.from_pretrained(checkpoint)
        job, units, passed_over = _open_job(str(checkpoint), tokenizer, sources, folder, config, device, workers)
        encoder = UnitEncoder(job, tokenizer) if engines.encodes_here(engine, processes) else None
        del tokenizer  # other processes load their own
        _remove_temporary_files(folder, engine)
        todo = [unit for unit in units[rank::world_size] if _finished(job, unit) is None]
        summary = Summary(passed_over=passed_over.summary(), unreadable=passed_over.unreadable)
        problems = 0
        busy: dict[str, float] = defaultdict(float)
        encoding = time.perf_counter()
        results = encoder.units(todo) if encoder else engines.run(engine, job, todo, processes)
        with contextlib.closing(results):
            for result in progress(results, len(todo)) if progress else results:
                if result.record is None:
                    problems += 1
                    print(f"semhitok: {printable(result.problem)}", file=sys.stderr)
                else:
                    summary.encoded += result.record["images"]
                for part, seconds in result.seconds.items():
                    busy[part] += seconds
        summary.seconds = time.perf_counter() - (encoding if todo else begun)
        summary.shares = {part: busy[part] / busy["all"] for part in busy if part != "all"}
        if problems and engine != "torchrun":  # which would end the other processes
            raise ValueError(
                f"{out}: {problems} of {len(units)} shards could not be encoded; run the same command again to retry"
            )
        _remove_temporary_files(folder, engine)
        summary.missing = _finish(job, units, summary)
        if summary.missing and engine != "torchrun":
            raise ValueError(f"{summary.missing}; run the same command again to encode it")
        return summary


def _open_job(
    checkpoint: str,
    tokenizer: SemHiTok,
    sources: Sequence[str | os.PathLike[str]],
    folder: Path,
    config: EncodingConfig,
    device: str,
    workers: int,
) -> tuple[EncodingJob, list[Unit], PassedOver]:
    """The job of a folder, new or to be resumed, its units, and what the listing passes over.

    ValueError if the folder holds another job.
    """
    model, vocabulary = tokenizer.config, tokenizer.vocabulary
    assert vocabulary.codebook_hash is not None
    grid = (model.grid_size, model.grid_size)
    layout = Layout(
        model.num_codes, model.num_sub_codes, vocabulary.codebook_hash, grid, config.packed, vocabulary.offsets
    )
    path = folder / JOB
    old = read_object(path) if path.exists() else {}
    settings = {
        **layout.metadata(),
        "encoder_sha256": encoder_hash(tokenizer),
        "image_size": model.image_size,
        **asdict(config),
        "device": torch.device(device).type,
        "sources": [os.fspath(source).encode("utf-8", "backslashreplace").decode() for source in sources],
    }
    for key, value in settings.items():
        if old and old.get(key) != value:
            raise ValueError(f"{folder}: holds another corpus: {key} was {old.get(key)!r}, now {value!r}")
    passed_over = PassedOver()
    found = sort_out(sources, passed_over, mixed=bool(old))
    # What an earlier version began, it ends with the keys of that version.
    prefixed = old.get("keys") == _PREFIXED if old else keys_collide(found)
    if not old:
        for kind, name in found.tables:
            if kind == PARQUET:
                check_columns(name, config.caption)
    units, digest = plan(
        found, config.images_per_shard, folder, passed_over, old.get("sources_sha256"), prefixed=prefixed
    )
    settings |= {"sources_sha256": digest, "shards": len(units)}
    if prefixed:
        settings["keys"] = _PREFIXED
    if not old:
        write_json(path, settings)
    return EncodingJob(checkpoint, folder, config, layout, device, workers, settings), units, passed_over


def _remove_temporary_files(folder: Path, engine: str) -> None:
    """Remove what killed processes left behind; not on torchrun, where other processes may be writing."""
    if engine != "torchrun":
        for left in folder.glob(".semhitok-*.tmp"):
            left.unlink(missing_ok=True)


def _finished(job: EncodingJob, unit: Unit) -> dict[str, Any] | None:
    """The record of a unit that is done, after a check of its shard; damage is reported on stderr."""
    path = job.record_path(unit)
    try:
        record = _read_record(job, unit)
        if record.get("source_state") not in (None, source_state(unit)):  # None: not known
            source = f"image files of {path.stem}" if unit.kind == "images" else unit.source
            raise ValueError(f"{source}: changed after {path.stem} was encoded")
        check_shard(job.shard_path(unit), record)
        return record
    except FileNotFoundError:
        return None
    except ValueError as error:
        print(f"semhitok: encoded again: {printable(str(error))}", file=sys.stderr)
        path.unlink(missing_ok=True)  # before any process takes the unit for done
        return None


def _read_record(job: EncodingJob, unit: Unit) -> dict[str, Any]:
    """The record of a unit; FileNotFoundError if there is none, ValueError if it is damaged or of another job."""
    path = job.record_path(unit)
    record = read_object(path)
    if record.get("job") != job.digest:
        raise ValueError(f"{path}: belongs to another job")
    try:
        check_entry(record)
        if record["name"] != job.shard_path(unit).name:
            raise ValueError(f"name: expected {job.shard_path(unit).name}, got {record['name']}")
        for key in _COUNTS:
            value = record.get(key, 0 if key in _NEW_COUNTS else None)
            listed = isinstance(value, list) and all(isinstance(entry, dict) for entry in value)
            if not (listed if key in _LISTS and key in record else is_count(value)):
                raise ValueError(f"{key}: expected a {'list' if key in _LISTS else 'count'}, got {value!r:.80}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return record


def _finish(job: EncodingJob, units: Sequence[Unit], summary: Summary) -> str:
    """Check all shards and write the manifest; if a shard is missing or damaged, return why instead."""
    if read_object(job.out / JOB) != job.settings:
        raise ValueError(f"{job.out}: another corpus was started in this folder in the meantime")
    usage = CodeUsage(job.layout.num_codes, job.layout.num_sub_codes, offsets=job.layout.offsets)
    shards = []
    for unit in units:
        try:
            record = _read_record(job, unit)
            count_usage(job.out, job.layout, record, usage)
        except FileNotFoundError:
            return f"{job.shard_path(unit)}: no such shard"
        except ValueError as error:
            return str(error)
        hidden = ("job", "source_state")
        shards.append({k: len(v) if isinstance(v, list) else v for k, v in record.items() if k not in hidden})
    totals = {key: sum(shard.get(key, 0) for shard in shards) for key in _COUNTS}
    for name, key in ((SKIPPED, "skipped"), (NOTES, "notes")):
        if key == "notes" and not totals["notes"]:
            (job.out / name).unlink(missing_ok=True)
            continue
        with open_atomic(job.out / name) as file:
            for unit in units:
                record = _read_record(job, unit)
                file.writelines((json.dumps(entry) + "\n").encode() for entry in record.get(key, ()))
    if not totals["images"]:
        where = f"see {job.out / SKIPPED}" if totals["skipped"] else "the sources hold none"
        raise ValueError(f"{job.out}: not one image could be encoded, {where}")
    rounded = {view: {k: round(v, 6) for k, v in figures.items()} for view, figures in usage.summary().items()}
    manifest = {**job.settings, "shards": shards, "totals": totals, "usage": rounded}
    write_atomic(job.out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    summary.images, summary.rows, summary.skipped = totals["images"], totals["rows"], totals["skipped"]
    summary.bytes, summary.usage = totals["bytes"], rounded
    for key in ("captions", *_NEW_COUNTS):
        setattr(summary, key, totals[key])
    summary.changed = totals["ids_changed"] / max(1, totals["ids_compared"])
    return ""
