"""Outputs of frozen networks for a fixed set of crops: computed once, kept in the run's folder, looked up by row.

The teacher is by far the largest network, and where crops are fixed (`DataConfig.fixed`) it would give the same in
every epoch. A table is complete before the first step that uses it. It is computed in groups of the same crops however
many processes there are, so it has the same bits whenever it is computed, and a run whose tables are
deleted resumes exactly.

RUN/fixed/NAME.safetensors   one tensor, whose rows are those of the crops; its metadata say what it was made from
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from semhitok import distributed
from semhitok._files import open_atomic
from semhitok._messages import progress
from semhitok._optional import require
from semhitok.config import StageConfig
from semhitok.data.batch import Batch
from semhitok.data.training_images import TrainingImages

GROUP = 32  # crops that pass through a network at once; another number may change last bits
_DTYPES = {torch.float32: "F32", torch.int32: "I32"}


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 over the bytes of the modules' state."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FixedCrops:
    """The tables of a run's fixed crops. All processes must call the same methods in the same order.

    Args:
        folder: of the tables.
        images: of the run, with fixed crops.
        device: where networks compute.
    """

    def __init__(self, folder: Path, images: TrainingImages, device: torch.device) -> None:
        self.folder, self.images, self.device = folder, images, device

    @property
    def count(self) -> int:
        """Number of the crops, and of a table's rows."""
        return self.images.fixed_count

    def worthwhile(self, config: StageConfig) -> bool:
        """Whether a stage sees more crops than there are, so that a table saves work."""
        return config.steps * config.batch_size > self.count

    def find(self, name: str, made_by: object) -> Tensor | None:
        """The table `name` [count, ...] on the CPU, mapped from its file; None without one that can be used.

        Args:
            name: of the table.
            made_by: identifies the networks that it is made by, as JSON.
        """
        path, found = self._path(name), None
        if distributed.rank() == 0 and path.exists():
            try:
                found = self._read(name, made_by)
            except ValueError as error:
                print(f"semhitok: {error}; it is not used", file=sys.stderr)
        # The first process decides, for all must do the same.
        if not distributed.gather_objects(found is not None)[0]:
            return None
        return self._read(name, made_by) if found is None else found

    def make(
        self, name: str, made_by: object, compute: Callable[[Batch], Tensor], check_stop: Callable[[], None]
    ) -> Tensor:
        """Compute and write the table `name`, in place of one that cannot be used; returns it as `find` does.

        Args:
            name, made_by: as in `find`.
            compute: a batch on the device -> its rows, fp32 or int32; called without gradient.
            check_stop: called before every batch; may raise.

        Raises:
            OSError: it cannot be written.
            ValueError: it cannot be read back.
        """
        main = distributed.rank() == 0
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".*.tmp"):  # of killed processes; they may be large
                leftover.unlink()
        rounds = -(-self.count // (GROUP * distributed.world_size()))
        digest, done, header = hashlib.sha256(), 0, b""
        with contextlib.ExitStack() as stack, torch.no_grad():
            file = stack.enter_context(open_atomic(self._path(name))) if main else None
            batches = stack.enter_context(contextlib.closing(self.images.fixed_batches(GROUP)))
            for batch in stack.enter_context(progress(batches, name.replace("_", " "), rounds)):
                check_stop()
                rows = distributed.gather_rows(compute(batch.to(self.device, ())))[: self.count - done].cpu()
                done += len(rows)
                if file is not None:
                    if not header:
                        file.write(header := self._header(name, rows, made_by))
                    data = rows.contiguous().numpy().data
                    digest.update(data)
                    file.write(data)
            if file is not None:
                file.seek(0)
                file.write(header.replace(_UNKNOWN.encode(), digest.hexdigest().encode()))
        if distributed.world_size() > 1:
            torch.distributed.barrier()
        return self._read(name, made_by)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _identity(self, made_by: object) -> str:
        data = [self.images.description, self.images.size, self.images.config.flip]
        return hashlib.sha256(json.dumps([GROUP, data, made_by]).encode()).hexdigest()

    def _header(self, name: str, rows: Tensor, made_by: object) -> bytes:
        """What a safetensors file has before its one tensor, the hash of which is still to be filled in."""
        shape = [self.count, *rows.shape[1:]]
        end = self.count * rows[0].numel() * rows.element_size()
        metadata = {"format": "pt", "identity": self._identity(made_by), "sha256": _UNKNOWN}
        tensor = {"dtype": _DTYPES[rows.dtype], "shape": shape, "data_offsets": [0, end]}
        text = json.dumps({"__metadata__": metadata, name: tensor}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _read(self, name: str, made_by: object) -> Tensor:
        """The table; ValueError if it is damaged, or of other crops or networks."""
        safetensors, path = require("safetensors", "models"), self._path(name)
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata, tensor = file.metadata() or {}, file.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        if metadata.get("identity") != self._identity(made_by):
            raise ValueError(f"{path}: made from other images or by other networks")
        if hashlib.sha256(tensor.numpy().data).hexdigest() != metadata.get("sha256"):
            raise ValueError(f"{path}: damaged: its bytes do not match their SHA-256")
        return tensor


_UNKNOWN = "?" * 64  # as long as a SHA-256
