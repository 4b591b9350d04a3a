"""The transformer trunk that the semantic decoder, the pixel encoder and the pixel decoder share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semhitok._optional import require
from semhitok.config import ViTConfig


class Trunk(nn.Module):
    """Learned positions, timm transformer blocks, a final norm: [B, L, width] -> [B, L, width].

    The number of tokens L is fixed, as an image tokenizer works at one resolution. With `gradient_checkpointing` the
    backward pass recomputes the activations of the blocks instead of keeping them.

    Raises:
        ValueError: the width is not a multiple of the number of heads.
    """

    gradient_checkpointing = False

    def __init__(self, config: ViTConfig, num_tokens: int) -> None:
        super().__init__()
        vit = require("timm.models.vision_transformer", "models")
        if config.width % config.heads:
            raise ValueError(f"width: expected a multiple of heads {config.heads}, got {config.width}")
        self.positions = nn.Parameter(torch.zeros(1, num_tokens, config.width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(vit.Block(config.width, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)
