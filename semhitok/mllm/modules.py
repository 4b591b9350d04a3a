"""The parts of a `UnifiedMLLM` that an LLM does not have: codebooks, the adapter of their vectors, rows of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from semhitok._buffers import ExactBuffers
from semhitok.grouping import Grouping
from semhitok.tokenizer import Features


class Codebooks(ExactBuffers):
    """The frozen codebooks: sem [K, Ds] and pix [K, m, Dp], in fp32 whatever the model is cast to.

    With adaptive sizes, pix is [K * m, Dp] and sub-codebook i has the rows offsets[i] to offsets[i + 1] - 1; offsets is
    int64 [K + 1].
    """

    sem: Tensor
    pix: Tensor
    offsets: Tensor | None

    def __init__(self, config: Any) -> None:
        super().__init__()
        K, m = config.num_codes, config.num_sub_codes
        self.register_buffer("sem", torch.zeros(K, config.sem_dim, dtype=torch.float32))
        shape = (K * m,) if config.adaptive else (K, m)
        self.register_buffer("pix", torch.zeros(*shape, config.pix_dim, dtype=torch.float32))
        self.register_buffer("offsets", torch.arange(K + 1) * m if config.adaptive else None)

    def forward(self, codes: Tensor) -> Features:
        """Flat ids [n] -> code vectors [n, Ds], [n, Dp]."""
        return Features(self.sem[self.grouping.group_of(codes)], self.pix.flatten(0, -2)[codes])

    @property
    def grouping(self) -> Grouping:
        """Which flat ids belong to which semantic code."""
        return Grouping.of(self.pix, self.offsets)


class DualAdapter(nn.Module):
    """Code vectors of image ids -> the LLM's input: one MLP for each, concatenated (paper: dual-MLP adapter)."""

    def __init__(self, sem_dim: int, pix_dim: int, width: int) -> None:
        super().__init__()
        self.semantic = _mlp(sem_dim, width, width - width // 2)
        self.pixel = _mlp(pix_dim, width, width // 2)

    def forward(self, semantic: Tensor, pixel: Tensor) -> Tensor:
        """[..., Ds], [..., Dp] -> [..., width]."""
        dtype = next(self.parameters()).dtype
        return torch.cat([self.semantic(semantic.to(dtype)), self.pixel(pixel.to(dtype))], dim=-1)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class Rows(nn.Module):
    """Rows of an output head: `weight` [*shape]. Not an nn.Linear, as the losses take the rows, not the logits."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
