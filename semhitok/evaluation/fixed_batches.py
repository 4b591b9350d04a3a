"""The same figures however a set of images is split: into batches of any size, over any number of processes.

The last bits of a network's outputs depend on how many images it sees at once. So networks always see `BATCH` images,
in their order in the set; the last batch is filled up. Processes take turns at these batches, and rows are returned in
the order of images, to be summed in that order. On a CPU the last bits also depend on the number of threads, which the
caller sets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from semhitok import distributed

BATCH = 16  # images a network sees at once


def rebatch(batches: Iterable[Tensor], size: int = BATCH) -> Iterator[Tensor]:
    """Batches [b, ...] of any sizes -> the same rows in batches [size, ...]; the last may be smaller."""
    kept: list[Tensor] = []
    for batch in batches:
        kept.append(batch)
        if sum(map(len, kept)) >= size:
            rows = torch.cat(kept)
            full = len(rows) // size * size
            yield from rows[:full].split(size)
            kept = [rows[full:]]
    if sum(map(len, kept)):
        yield torch.cat(kept)


def rows_in_order(
    batches: Iterable[Tensor], compute: Callable[[Tensor], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Apply `compute` to batches of `BATCH`, shared by the processes; every process gets all rows, in order.

    Args:
        batches: arguments of `compute`, such as images or their numbers, in batches [b, ...] of any sizes; the same on
            every process.
        compute: a batch [BATCH, ...] -> rows [BATCH, ...] by name. The last batch repeats the last image.

    Returns:
        Iterator over rows [n, ...] by name, for the next n images; n varies with the number of processes.
    """
    world, rank = distributed.world_size(), distributed.rank()
    for turn in rebatch(batches, BATCH * world):
        mine = torch.arange(rank * BATCH, (rank + 1) * BATCH).clamp_max(len(turn) - 1)
        rows = compute(turn[mine.to(turn.device)])
        yield {name: distributed.gather_rows(row)[: len(turn)] for name, row in rows.items()}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """fp32 without TF32, deterministic convolutions, no gradients; restores the settings at exit."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    allowed, matmul.allow_tf32 = matmul.allow_tf32, False
    convolutions = cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), convolutions:
            yield
    finally:
        matmul.allow_tf32 = allowed
