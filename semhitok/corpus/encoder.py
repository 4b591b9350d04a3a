"""From images to ids: the images of a unit become a shard of ids; image files become the content of an ids file.

A shard's bytes depend on the job and the unit alone: its images are encoded in order, in batches that are always full
(the last is padded with black), on a CPU by one thread. The shard appears complete or not at all, then its record.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
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
from semhitok.corpus.sources import Item, Unit, read_unit
from semhitok.tokenizer import SemHiTok

# ---------------------------------------------------------------------------------------------------------------
# Images, decoded and cropped, in batches


class CroppedImage(NamedTuple):
    """An image to encode: crops float32 [c, 3, size, size] in [0, 1], or None and the problem, see `Item`."""

    key: str
    crops: Tensor | None
    caption: str | None = None
    problem: str = ""
    transient: bool = False


class Row(NamedTuple):
    """A crop to encode, float32 [3, size, size], and what is stored beside its ids."""

    key: str
    caption: str | None
    crop: int
    pixels: Tensor


def crop_image(item: Item, size: int, policy: str) -> CroppedImage:
    """Decode an item's image and crop it; an image that cannot be read gives the reason."""
    try:
        return CroppedImage(item.key, item.crops(size, policy).contiguous(), item.read_caption())
    except (ValueError, OSError) as error:
        return CroppedImage(item.key, None, problem=reason(error), transient=item.transient)


def row_batches(
    images: Iterable[CroppedImage], batch_size: int, skip: Callable[[CroppedImage], None]
) -> Iterator[list[Row]]:
    """The crops of all images in batches, the last of which may be smaller; `skip` is called with unreadable images."""

    def rows() -> Iterator[Row]:
        for image in images:
            if image.crops is None:
                skip(image)
                continue
            for number, crop in enumerate(image.crops):
                yield Row(image.key, image.caption, number, crop)

    stream = rows()
    while batch := list(islice(stream, batch_size)):
        yield batch


def encode_images(
    tokenizer: SemHiTok, paths: Iterable[Path], batch_size: int, skip: Callable[[CroppedImage], None]
) -> tuple[list[str], Tensor]:
    """Encode image files, resized and cropped to the centre.

    Args:
        tokenizer: on the device to use.
        paths: image files.
        batch_size: images encoded at once.
        skip: called with each image that cannot be read, when it is met.

    Returns:
        The names of the N images that can be read, and their ids int64 [N, h, w] on the CPU.
    """
    size, grid, device = tokenizer.config.image_size, tokenizer.config.grid_size, next(tokenizer.parameters()).device
    items = (Item(path.as_posix(), str(path), path=str(path)) for path in paths)
    names: list[str] = []
    codes = [torch.empty(0, grid, grid, dtype=torch.int64)]
    with torch.inference_mode():
        for rows in row_batches((crop_image(item, size, "centre") for item in items), batch_size, skip):
            codes.append(tokenizer.encode(torch.stack([row.pixels for row in rows]).to(device)).cpu())
            names += [row.key for row in rows]
    return names, torch.cat(codes)


def reason(error: Exception) -> str:
    """What an error says, as text that every file can hold: bytes of a name that are not UTF-8 become \\xNN."""
    return message(error).encode("utf-8", "backslashreplace").decode()


# ---------------------------------------------------------------------------------------------------------------
# Units


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
        items: Any = _items(units, config.caption)  # to the DataLoader, the indices of the dataset
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

    def _unit(self, unit: Unit, loaded: Iterator[CroppedImage | None]) -> UnitResult:
        job = self.job
        self.seconds.clear()
        self._clock("all", -1)
        self.compared = self.changed = 0
        images = captions = 0
        skipped: list[dict[str, str]] = []

        def skip(image: CroppedImage) -> None:
            if image.transient:
                raise _TransientError(image.problem)
            skipped.append({"key": image.key, "reason": image.problem})

        try:
            with shard_writer(job.shard_path(unit), job.layout) as writer:
                for rows in row_batches(self._images(loaded), job.config.batch_size, skip):
                    for row, ids in zip(rows, self._encode(rows), strict=True):
                        writer.add(row.key, row.caption, row.crop, ids)
                        images += row.crop == 0
                        captions += row.crop == 0 and row.caption is not None
        except _TransientError as problem:
            for _ in self._images(loaded):  # skip the rest of this unit
                pass
            self._clock("all", 1)
            return UnitResult(None, dict(self.seconds), str(problem))
        record = {
            "name": job.shard_path(unit).name, "source": unit.source if unit.kind != "images" else "",
            "images": images, "rows": writer.rows, "captions": captions, "skipped": skipped,
            "ids_compared": self.compared, "ids_changed": self.changed, "bytes": writer.bytes,
            "sha256": writer.sha256, "job": job.digest,
        }  # fmt: skip
        write_atomic(job.record_path(unit), (json.dumps(record) + "\n").encode())
        self._clock("all", 1)
        return UnitResult(record, dict(self.seconds))

    def _images(self, loaded: Iterator[CroppedImage | None]) -> Iterator[CroppedImage]:
        """The images up to the end of the unit."""
        while True:
            self._clock("waiting", -1)
            image = next(loaded)
            self._clock("waiting", 1)
            if image is None:
                return
            yield image

    def _encode(self, rows: Sequence[Row]) -> Tensor:
        """ids [n, h, w] of n rows, encoded as a batch that is padded to its full size."""
        config, size = self.job.config, self.tokenizer.config.image_size
        images = torch.zeros(config.batch_size, 3, size, size)
        torch.stack([row.pixels for row in rows], out=images[: len(rows)])
        images = images.to(self.job.device)
        with torch.inference_mode():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                ids = self.tokenizer.encode(images).cpu()[: len(rows)]
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


def ignore_interrupts(worker: int = 0) -> None:
    """Leave Ctrl-C, which the terminal sends to all processes, to the one that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _TransientError(Exception):
    """A unit cannot be read to its end now, but may be later."""


def _items(units: Sequence[Unit], caption: str | None) -> Iterator[Item | None]:
    """The items of units, in order, and None after each unit."""
    for unit in units:
        yield from read_unit(unit, caption)
        yield None


class _CropDataset(Dataset[Any]):
    """`crop_image` of items, in place of indices; None stays None."""

    def __init__(self, size: int, policy: str) -> None:
        self.size, self.policy = size, policy

    def __getitem__(self, item: Item | None) -> CroppedImage | None:
        return None if item is None else crop_image(item, self.size, self.policy)
