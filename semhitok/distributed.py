"""What training and evaluation use of torch.distributed. A single process needs no process group."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from semhitok._optional import require


def join(device: torch.device) -> torch.device:
    """Join the processes that a launcher started, if one did; the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    state = require("accelerate", "train").PartialState(cpu=device.type == "cpu")
    return state.device


def launched() -> bool:
    """Whether torchrun, or accelerate launch by it, started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place; `tensor` itself."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """The mean over all processes, a new tensor without gradient."""
    return all_reduce(tensor.detach().clone()) / world_size()


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows [n, ...] of every process, in the order of ranks: [W * n, ...]. n must be the same on all."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(thing: Any) -> list[Any]:
    """The object of every process, in the order of ranks: small, and picklable."""
    if world_size() == 1:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.all_gather_object(things, thing)
    return things


def whole_tensor(tensor: Tensor) -> Tensor:
    """`tensor` itself; if it is sharded (FSDP2), put together, for which all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def pick_rows(tensor: Tensor, picks: Tensor) -> Tensor:
    """Rows `picks` [k] of `gather_rows(tensor)`, without gathering the others: [k, ...]."""
    if world_size() == 1:
        return tensor[picks]
    local = picks - rank() * len(tensor)
    mine = (local >= 0) & (local < len(tensor))
    rows = tensor[local.clamp(0, len(tensor) - 1)]
    # Every row has one owner, so adding the zeros of the others changes no bit of it.
    return all_reduce(torch.where(mine.view(-1, *[1] * (tensor.ndim - 1)), rows, torch.zeros_like(rows)))


def broadcast(tensor: Tensor) -> Tensor:
    """Copy `tensor` of process 0 into that of every process; `tensor` itself."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def check_equal(tensor: Tensor, name: str) -> None:
    """Raise RuntimeError on every process unless `tensor` has the same bits on all of them."""
    if world_size() == 1:
        return
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    digest = torch.frombuffer(bytearray(hashlib.sha256(data).digest()), dtype=torch.uint8).to(tensor.device)
    digests = gather_rows(digest.unsqueeze(0))
    if not bool((digests == digests[0]).all()):
        other = int((digests != digests[0]).any(1).nonzero()[0])
        raise RuntimeError(f"{name}: expected the same bits on every process, got others on process {other}")
