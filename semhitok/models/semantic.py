"""The semantic branch (paper: semantic branch, after VQ-KD of BEiT v2).

teacher features -> head -> unit vector -> semantic code -> decoder -> teacher features
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok.config import ViTConfig
from semhitok.models.vit import Trunk


class SemanticHead(nn.Module):
    """Standardise, Linear-Tanh-Linear, normalise: features [..., C] -> z_sem [..., Ds], fp32.

    The raw tokens of a Vision Transformer share a strong mean direction, so their cosines hardly differ. Features are
    therefore standardised per channel, with statistics that are set once from data.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, in_dim: int, sem_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(in_dim))
        self.register_buffer("std", torch.ones(in_dim))
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
            return F.normalize(self.layers(self.standardize(features)), dim=-1)


class SemanticDecoder(nn.Module):
    """Quantised semantic vectors [B, h, w, Ds] -> standardised teacher features [B, h, w, C]."""

    def __init__(self, config: ViTConfig, sem_dim: int, out_dim: int, num_tokens: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(sem_dim, config.width)
        self.trunk = Trunk(config, num_tokens)
        self.project_out = nn.Linear(config.width, out_dim)

    def forward(self, q_sem: Tensor) -> Tensor:
        x = self.trunk(self.project_in(q_sem.flatten(1, 2)))
        return self.project_out(x).unflatten(1, q_sem.shape[1:3])
