"""The same figures however a set of images is split: into batches of any size, over any number of processes.

What a network makes of an image depends, in the last bits, on how many images it sees at once. So networks see groups
of GROUP images, by their places in the set, the last group filled up; processes take turns at whole groups; and rows
are handed on in the order of images, to be summed in that order. On a CPU the last bits depend on the number of
threads, too, which is the caller's to set.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from semhitok import distributed

GROUP = 16  # images a network sees at once


def regroup(batches: Iterable[Tensor], size: int = GROUP) -> Iterator[Tensor]:
    """Batches [b, ...] of any sizes -> the same rows in groups [size, ...]; the last may be smaller."""
    kept: list[Tensor] = []
    for batch in batches:
        kept.append(batch)
        if sum(map(len, kept)) >= size:
            rows = torch.cat(kept)
            whole = len(rows) // size * size
            yield from rows[:whole].split(size)
            kept = [rows[whole:]]
    if sum(map(len, kept)):
        yield torch.cat(kept)


def rows_in_order(
    batches: Iterable[Tensor], compute: Callable[[Tensor], dict[str, Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Apply `compute` to groups, on all processes; its rows for all images, in their order, on every process.

    Args:
        batches: what `compute` is to see, in batches [b, ...] of any sizes, such as images, or numbers of images to
            read; the same on every process.
        compute: a group [GROUP, ...] -> rows [GROUP, ...] by name. The last group repeats the last image.

    Returns:
        Iterator over rows [n, ...] by name, for the next n images; n says nothing.
    """
    world, rank = distributed.world_size(), distributed.rank()
    for turn in regroup(batches, GROUP * world):
        mine = torch.arange(rank * GROUP, (rank + 1) * GROUP).clamp_max(len(turn) - 1)
        rows = compute(turn[mine.to(turn.device)])
        yield {name: distributed.gather_rows(row)[: len(turn)] for name, row in rows.items()}


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """fp32 without TF32, deterministic convolutions, no gradient; then the settings as they were."""
    backends = torch.backends
    old = (backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu"))
    backends.cuda.matmul.allow_tf32 = False
    torch.set_autocast_enabled("cuda", False)
    torch.set_autocast_enabled("cpu", False)
    try:
        with (
            torch.no_grad(),
            backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        backends.cuda.matmul.allow_tf32 = old[0]
        torch.set_autocast_enabled("cuda", old[1])
        torch.set_autocast_enabled("cpu", old[2])
