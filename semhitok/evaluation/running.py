"""Metrics over a set of images, on as many processes as there are.

A metric sees batches, keeps sums, and gives figures in the end. Its sums are tensors that add up over processes, which
makes the result independent of how the set was split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from semhitok import distributed
from semhitok.evaluation.metrics import psnr, ssim
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.usage import CodeUsage

_LOWER_IS_BETTER = {"cosine", "l1", "l2", "lpips", "rfid"}


def lower_is_better(name: str) -> bool:
    """Whether a figure of that name is the better the lower it is."""
    return name in _LOWER_IS_BETTER


class Metric(Protocol):
    """What `evaluate` asks of a metric."""

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        """See images and reconstructions [B, 3, H, W] in [0, 1] and flat ids [B, h, w]."""

    def sums(self) -> list[Tensor]:
        """The tensors kept, which add up over processes."""

    def compute(self) -> dict[str, float]:
        """Figures of everything seen."""


class MeanOverImages:
    """The mean of a figure of each image, such as PSNR."""

    def __init__(self, name: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.name, self.function = name, function
        self.sum = torch.zeros(2, dtype=torch.float64)

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        values = self.function(reconstructions, images).double()
        self.sum = self.sum.to(values.device)
        self.sum += torch.stack([values.sum(), values.new_tensor(len(values))])

    def sums(self) -> list[Tensor]:
        return [self.sum]

    def compute(self) -> dict[str, float]:
        total, count = self.sum.tolist()
        return {self.name: total / max(count, 1)}


class Usage:
    """Usage and perplexity of the ids, by exact counts."""

    def __init__(self, usage: CodeUsage) -> None:
        self.usage = usage

    def update(self, images: Tensor, reconstructions: Tensor, codes: Tensor) -> None:
        self.usage.update(codes)

    def sums(self) -> list[Tensor]:
        return [self.usage.counts]

    def compute(self) -> dict[str, float]:
        return {f"{view}_{key}": v for view, row in self.usage.summary().items() for key, v in row.items()}


def default_metrics(quantizer: HierarchicalQuantizer, device: torch.device | str) -> list[Metric]:
    """PSNR, SSIM, and the use of the codes."""
    usage = CodeUsage(quantizer.num_codes, quantizer.num_sub_codes, device, quantizer.offsets)
    return [MeanOverImages("psnr", psnr), MeanOverImages("ssim", ssim), Usage(usage)]


@torch.no_grad()
def evaluate(
    reconstruct: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Iterable[tuple[Tensor, int]],
    metrics: Sequence[Metric],
    device: torch.device | str = "cpu",
    *,
    pictures: int = 0,
) -> tuple[dict[str, float], Tensor | None]:
    """Reconstruct images and measure.

    Args:
        reconstruct: images [B, 3, H, W] in [0, 1] -> reconstructions, clamped here, and flat ids [B, h, w].
        batches: images [B, 3, H, W] and how many of them count, from the first; this process's part of the set. Every
            process needs the same number of batches.
        metrics: fresh ones.
        device: of the images given to `reconstruct`.
        pictures: number of images returned beside their reconstructions.

    Returns:
        The figures, the same on every process, and [pictures, 3, H, 2 W] of this process, None for 0 pictures.
    """
    kept: list[Tensor] = []
    for images, count in batches:
        images = images.to(device)
        reconstructions, codes = reconstruct(images)
        images, codes = images[:count], codes[:count]
        reconstructions = reconstructions[:count].float().clamp(0, 1)
        if count:
            for metric in metrics:
                metric.update(images, reconstructions, codes)
        missing = pictures - sum(map(len, kept))
        if missing > 0 and count:
            kept.append(torch.cat([images[:missing], reconstructions[:missing]], dim=-1))
    figures: dict[str, float] = {}
    for metric in metrics:
        for tensor in metric.sums():
            distributed.all_reduce(tensor)
        figures |= metric.compute()
    return figures, torch.cat(kept) if kept else None
