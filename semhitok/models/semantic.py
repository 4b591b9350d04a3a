"""The semantic branch (paper: semantic branch, after VQ-KD of BEiT v2).

teacher features -> head -> unit vector -> semantic code -> decoder -> teacher features

Features of several teachers are joined: [..., C] is [..., C_1 + ... + C_n].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._buffers import ExactBuffers
from semhitok.config import ViTConfig
from semhitok.models.vit import Trunk


class SemanticHead(ExactBuffers):
    """Standardise, Linear-Tanh-Linear, normalise: features [..., C] -> z_sem [..., Ds], fp32.

    The raw tokens of a Vision Transformer share a strong mean direction, so their cosines hardly differ. Features are
    therefore standardised per channel, with statistics that are set once from data. The part of teacher i is then
    multiplied by sqrt(share_i C / C_i), so that it has that share of the expected squared norm, which stays C. The
    statistics stay in fp32 when the module is cast; the layers run in the module's dtype.

    Args:
        widths: channels of each teacher.
        sem_dim: Ds.
        shares: of each teacher; normalised to a sum of 1.
    """

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int], sem_dim: int, shares: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        in_dim, self.widths, self.shares = sum(widths), list(widths), [share / sum(shares) for share in shares]
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
        parts = zip(self.widths, self.shares, strict=True)
        scale = torch.cat([torch.full((width,), math.sqrt(share * in_dim / width)) for width, share in parts])
        # Checkpoints with one teacher do not have it; with several, ids depend on it.
        self.register_buffer("scale", scale, persistent=len(self.widths) > 1)
        self.layers = nn.Sequential(nn.Linear(in_dim, in_dim), nn.Tanh(), nn.Linear(in_dim, sem_dim))

    @torch.no_grad()
    def set_statistics(self, features: Tensor) -> None:
        """Set the mean and standard deviation of each channel from features [N, C]."""
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0).clamp_min(1e-6))

    def standardize(self, features: Tensor) -> Tensor:
        """Features [..., C] -> the same with mean 0 and deviation 1, fp32."""
        return (features.float() - self.mean) / self.std

    def forward(self, features: Tensor) -> Tensor:
        # fp16 would change 0.3-0.5 % of the ids and bf16 3-6 %, so autocast is disabled.
        with torch.autocast(features.device.type, enabled=False):
            x = (self.standardize(features) * self.scale).to(next(self.layers.parameters()).dtype)
            return F.normalize(self.layers(x).float(), dim=-1)

    def average(self, values: Sequence[Tensor]) -> Tensor:
        """The mean of a value for each teacher, weighted with their shares."""
        return torch.stack([share * value for share, value in zip(self.shares, values, strict=True)]).sum(0)

    def pairs(self, predicted: Tensor, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Predicted and standardised features [..., C], fp32, of each teacher: [..., C_i] both."""
        parts = (x.float().split(self.widths, dim=-1) for x in (predicted, target))
        return list(zip(*parts, strict=True))


class SemanticDecoder(nn.Module):
    """Quantised semantic vectors [B, h, w, Ds] -> standardised teacher features [B, h, w, C]."""

    def __init__(self, config: ViTConfig, sem_dim: int, out_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(sem_dim, config.width)
        self.trunk = Trunk(config, num_tokens)
        self.project_out = nn.Linear(config.width, out_dim)

    def forward(self, q_sem: Tensor) -> Tensor:
        x = self.trunk(self.project_in(q_sem.flatten(1, 2).to(self.project_in.weight.dtype)))
        return self.project_out(x).unflatten(1, q_sem.shape[1:3])
