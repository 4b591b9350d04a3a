"""Several processes: a module under DDP or FSDP2, whole tensors from split ones, and tokens gathered from all.

Models and stages know nothing of it.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from semhitok import distributed
from semhitok.data.batch import Batch
from semhitok.models.vit import Trunk


def wrap(module: nn.Module, split: bool) -> nn.Module:
    """`module` for the processes there are: its weights split over them, or copied; as it is in a single process.

    FSDP2 splits it in place: every transformer block is a unit of its own, the rest another.
    """
    if distributed.world_size() == 1:
        return module
    if not split:
        device = next(module.parameters()).device
        ids = [device] if device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        # Buffers are not broadcast: codebooks stay equal by their own updates, which is checked.
        new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # the name changed in PyTorch 2.14
        options: Any = {"forward_sync_buffers" if new else "broadcast_buffers": False}
        return ddp(module, ids, gradient_as_bucket_view=True, **options)
    # Outputs that are views are never changed in place here.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Models of transformers name the classes of their blocks.
    names = {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    for child in list(module.modules()):
        for block in child.blocks if isinstance(child, Trunk) else [child] if type(child).__name__ in names else []:
            fully_shard(block)
    fully_shard(module)
    return module


@contextlib.contextmanager
def gradient_sync(wrapped: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether a backward pass in here exchanges gradients: that of the last micro-batch does."""
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not enabled:
        with wrapped.no_sync():
            yield
        return
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(enabled)
    yield


def full_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all of every tensor on every process; a collective call if FSDP has split them."""
    return {name: distributed.whole_tensor(tensor) for name, tensor in state.items()}


def gather_tokens(
    batches: Iterator[list[Batch]], minimum: float, tokens: Callable[[Batch], tuple[Tensor, ...]]
) -> list[Tensor]:
    """The rows that `tokens` computes from batches, of global batch after global batch, at least `minimum` of them.

    The same rows in the same order on every process.
    """
    columns: list[list[Tensor]] = []
    count = 0
    with torch.no_grad():
        while count < minimum:
            rows = [tokens(batch) for batch in next(batches)]
            gathered = [distributed.gather_rows(torch.cat(column)) for column in zip(*rows, strict=True)]
            columns = columns or [[] for _ in gathered]
            for column, part in zip(columns, gathered, strict=True):
                column.append(part)
            count += len(gathered[0])
    return [torch.cat(column) for column in columns]
