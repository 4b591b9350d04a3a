"""From images to ids: the images of a unit become a shard of ids.

A shard's bytes depend on the job and the unit alone: its images are encoded in order, in batches that are always full
(the last is padded with black), on a CPU by one thread. The shard appears complete or not at all, then its record.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from semhitok._files import write_atomic
from semhitok._messages import message
from semhitok.corpus.config import EncodingConfig
from semhitok.corpus.format import Layout, shard_writer
from semhitok.corpus.items import Item, Note
from semhitok.corpus.units import Unit, read_unit, source_state
from semhitok.data.captions import FIELDS, Caption
from semhitok.tokenizer import SemHiTok


class CroppedImage(NamedTuple):
    """An image to encode: crops float32 [c, 3, size, size] in [0, 1]; without any, the problem, see `Item`."""

    key: str
    crops: Tensor = torch.empty(0)
    caption: Caption = Caption()
    problem: str = ""
    transient: bool = False


def reason(error: Exception) -> str:
    """What an error says, as text that every file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return message(error).encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class EncodingJob:
    """All that a process needs to encode a unit; it is pickled and sent to other processes.

    settings: all that the bytes depend on; the content of job.json.
    """

    checkpoint: str
    out: Path
    config: EncodingConfig
    layout: Layout
    device: str
    workers: int
    settings: dict[str, Any]

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def record_path(self, unit: Unit) -> Path:
        return self.out / f"shard-{unit.number:06}.json"

    def shard_path(self, unit: Unit) -> Path:
        return self.out / f"shard-{unit.number:06}.parquet"


class UnitResult(NamedTuple):
    """The record of a unit's shard; or None and the problem, if a transient error kept the unit from being read.

    seconds: of wall-clock time, for "all" and for each part; see `Summary.shares`.
    """

    record: dict[str, Any] | None
    seconds: dict[str, float]
    problem: str = ""


class UnitEncoder:
    """Encodes units of a job: the map function of every engine.

    Args:
        job: the job.
        tokenizer: the job's, if it is loaded already; its decoders are deleted.

    Raises:
        OSError, ValueError: the checkpoint cannot be loaded, or holds other weights than those of the job.
    """

    def __init__(self, job: EncodingJob, tokenizer: SemHiTok | None = None) -> None:
        if torch.device(job.device).type == "cpu":
            torch.set_num_threads(1)  # the order of sums depends on the number of threads
        self.job = job
        if tokenizer is None:
            tokenizer = SemHiTok.from_pretrained(job.checkpoint)
            expected, found = job.settings["encoder_sha256"], encoder_hash(tokenizer)
            if found != expected:
                raise ValueError(f"{job.checkpoint}: expected encoder {expected[:12]}, got {found[:12]}")
        del tokenizer.decoder, tokenizer.semantic_decoder  # half of the memory, and not needed
        self.tokenizer = tokenizer.to(job.device).eval()
        self.seconds: dict[str, float] = defaultdict(float)  # of the current unit
        self._states: dict[int, Any] = {}  # of the sources of units, from before they were read
        tokenizer.quantizer.register_forward_pre_hook(lambda *_: self._clock("quantising", -1))
        tokenizer.quantizer.register_forward_hook(lambda *_: self._clock("quantising", 1))

    def encode(self, unit: Unit) -> UnitResult:
        """Write the shard of a unit and its record."""
        return next(self.units([unit]))

    def units(self, units: Sequence[Unit]) -> Generator[UnitResult, None, None]:
        """Write the shards of units, one after the other; workers read the images of the next one meanwhile."""
        if not units:
            return
        config, workers = self.job.config, self.job.workers
        items: Any = self._items(units)  # to the DataLoader, the indices of the dataset
        loader: DataLoader[Any] = DataLoader(
            _CropDataset(self.tokenizer.config.image_size, config.crop),
            sampler=items,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(2, 2 * config.batch_size // workers) if workers else None,
            worker_init_fn=ignore_interrupts,
            generator=torch.Generator(),
        )
        images = iter(loader)
        for unit in units:
            yield self._unit(unit, images)

    def _unit(self, unit: Unit, loaded: Iterator[CroppedImage | Note | None]) -> UnitResult:
        job = self.job
        self.seconds.clear()
        self._clock("all", -1)
        self.compared = self.changed = 0
        images = captions = 0
        about = dict.fromkeys(("listed", "repaired", "left_out", "lacking"), 0)  # of captions
        skipped: list[dict[str, str]] = []
        notes: list[dict[str, str]] = []
        rows = self._rows(loaded, skipped, notes)
        try:
            with shard_writer(job.shard_path(unit), job.layout) as writer:
                while batch := list(islice(rows, job.config.batch_size)):
                    grids = self._encode([image.crops[crop] for image, crop in batch])
                    for (image, crop), ids in zip(batch, grids, strict=True):
                        writer.add(image.key, image.caption.text, crop, ids)
                        if crop == 0:
                            images += 1
                            captions += image.caption.text is not None
                            for name in about:
                                about[name] += getattr(image.caption, name)
        except _TransientError as problem:
            deque(self._images(loaded, notes), maxlen=0)  # skip the rest of this unit
            self._clock("all", 1)
            return UnitResult(None, dict(self.seconds), str(problem))
        record = {
            "name": job.shard_path(unit).name, "source": unit.source if unit.kind != "images" else "",
            "images": images, "rows": writer.rows, "captions": captions, "skipped": skipped,
            **{f"captions_{name}": number for name, number in about.items()}, "notes": notes,
            "source_state": self._states.pop(unit.number),
            "ids_compared": self.compared, "ids_changed": self.changed, "bytes": writer.bytes,
            "sha256": writer.sha256, "job": job.digest,
        }  # fmt: skip
        write_atomic(job.record_path(unit), (json.dumps(record) + "\n").encode())
        self._clock("all", 1)
        return UnitResult(record, dict(self.seconds))

    def _rows(
        self, loaded: Iterator[CroppedImage | Note | None], skipped: list[dict[str, str]], notes: list[dict[str, str]]
    ) -> Iterator[tuple[CroppedImage, int]]:
        """(image, number of the crop) of the crops up to the end of the unit; unreadable images go to `skipped`."""
        for image in self._images(loaded, notes):
            if image.transient:
                raise _TransientError(image.problem)
            if image.problem:
                skipped.append({"key": image.key, "reason": image.problem})
            else:
                notes.extend({"key": image.key, "note": note} for note in image.caption.notes)
            yield from ((image, crop) for crop in range(len(image.crops)))

    def _images(
        self, loaded: Iterator[CroppedImage | Note | None], notes: list[dict[str, str]]
    ) -> Iterator[CroppedImage]:
        """The images up to the end of the unit; its notes go to `notes`."""
        while True:
            self._clock("waiting", -1)
            image = next(loaded)
            self._clock("waiting", 1)
            if image is None:
                return
            if isinstance(image, Note):
                notes.append({"key": "", "note": image.text})
            else:
                yield image

    def _items(self, units: Sequence[Unit]) -> Iterator[Item | Note | None]:
        """The items of units, in order, and None after each unit."""
        caption = self.job.config.caption
        for unit in units:
            self._states[unit.number] = source_state(unit)
            yield from read_unit(unit, (caption,) if caption else FIELDS)
            yield None

    def _encode(self, crops: Sequence[Tensor]) -> Tensor:
        """ids [n, h, w] of n crops [3, size, size], encoded as a batch that is padded to its full size."""
        config, size = self.job.config, self.tokenizer.config.image_size
        images = torch.zeros(config.batch_size, 3, size, size)
        torch.stack(list(crops), out=images[: len(crops)])
        images = images.to(self.job.device)
        with torch.inference_mode():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                ids = self.tokenizer.encode(images).cpu()[: len(crops)]
            if config.precision != "fp32" and not self.compared:
                self._compare(images, ids)
        return ids

    def _compare(self, images: Tensor, ids: Tensor) -> None:
        """Count the ids of the first images that differ from those in fp32."""
        quantising = self.seconds["quantising"]
        self._clock("comparing", -1)
        differ = self.tokenizer.encode(images).cpu()[: len(ids)] != ids
        self._clock("comparing", 1)
        self.seconds["quantising"] = quantising  # without that of the comparison
        self.changed, self.compared = int(differ.sum()), differ.numel()

    def _clock(self, part: str, sign: int) -> None:
        """Start (-1) or stop (1) the clock of a part of the time."""
        if part == "quantising" and self.job.device != "cpu":
            torch.cuda.synchronize(self.job.device)
        self.seconds[part] += sign * time.perf_counter()


def encoder_hash(tokenizer: SemHiTok) -> str:
    """Hex SHA-256 of all weights that ids depend on, the teachers' included."""
    digest = hashlib.sha256()
    for part in ("teacher", "more_teachers", "semantic_head", "encoder", "quantizer"):
        module = getattr(tokenizer, part)
        if module is None:
            raise ValueError("teacher: expected a tokenizer with its teacher, got one without it")
        for name, value in module.state_dict().items():
            digest.update(f"{part}.{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def ignore_interrupts(worker: int = 0) -> None:
    """Leave Ctrl-C, which the terminal sends to all processes, to the one that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _TransientError(Exception):
    """A unit cannot be read to its end now, but may be later."""


class _CropDataset(Dataset[Any]):
    """The crops of items, in place of indices; notes and None stay what they are."""

    def __init__(self, size: int, policy: str) -> None:
        self.size, self.policy = size, policy

    def __getitem__(self, item: Item | Note | None) -> CroppedImage | Note | None:
        if item is None or isinstance(item, Note):
            return item
        try:
            return CroppedImage(item.key, item.crops(self.size, self.policy).contiguous(), item.read_caption())
        except (ValueError, OSError) as error:
            return CroppedImage(item.key, problem=reason(error), transient=item.transient)
