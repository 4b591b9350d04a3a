"""Evaluation during training: figures of held-out images, on as many processes as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from semhitok import distributed
from semhitok.evaluation.metrics import PairFunction
from semhitok.usage import CodeUsage


@torch.no_grad()
def evaluate_held_out(
    run: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[tuple[Tensor, int]],
    functions: Mapping[str, PairFunction],
    usage: CodeUsage,
    device: torch.device | str = "cpu",
    *,
    pictures: int = 0,
) -> tuple[dict[str, float], Tensor | None]:
    """Means of `functions` over all images, and usage and perplexity of their ids.

    Only sums are kept, and added up over processes, so the result does not depend on how the set was split.

    Args:
        run: images [B, 3, H, W] in [0, 1] -> outputs [B, ...], such as reconstructions, and flat ids [B, h, w].
        batches: images [B, 3, H, W], and how many of them count, from the first; this process's part of the set. Every
            process needs the same number of batches.
        functions: {name: function of outputs and images -> a value for each image [B]}.
        usage: counts the ids; expected empty.
        device: of the images given to `run`.
        pictures: number of images returned beside their outputs, which have to be images then.

    Returns:
        The figures, the same on every process, and [pictures, 3, H, 2 W] of this process, None for 0 pictures.
    """
    kept: list[Tensor] = []
    sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in functions}
    for images, count in batches:
        images = images.to(device)
        outputs, codes = run(images)
        images, outputs, codes = images[:count], outputs[:count], codes[:count]
        if not count:
            continue
        for name, function in functions.items():
            values = function(outputs, images).double()
            sums[name] += torch.stack([values.sum(), values.new_tensor(count)])
        usage.update(codes)
        missing = pictures - sum(map(len, kept))
        if missing > 0:
            kept.append(torch.cat([images[:missing], outputs[:missing]], dim=-1))
    totals = {name: distributed.all_reduce(tensor).tolist() for name, tensor in sums.items()}
    figures = {name: total / max(number, 1) for name, (total, number) in totals.items()}
    distributed.all_reduce(usage.counts)
    return figures | usage.figures(), torch.cat(kept) if kept else None
