"""The pixel branch: a ViT encoder of patches, and a ViT decoder of quantised vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from semhitok.config import ViTConfig
from semhitok.models.vit import Trunk


class PixelEncoder(nn.Module):
    """Images [B, 3, H, W] in [0, 1], of any float dtype -> pixel features z_pix [B, H/p, W/p, Dp] in the module's."""

    def __init__(self, config: ViTConfig, patch_size: int, grid_size: int, pix_dim: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.width, patch_size, patch_size)
        self.trunk = Trunk(config, grid_size**2)
        self.project_out = nn.Linear(config.width, pix_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed((images * 2 - 1).to(self.patch_embed.weight.dtype))
        grid = x.shape[-2:]
        return self.project_out(self.trunk(x.flatten(2).transpose(1, 2))).unflatten(1, grid)


class PixelDecoder(nn.Module):
    """Quantised vectors (q_sem ++ q_pix) [B, h, w, Ds + Dp] -> images [B, 3, h*p, w*p].

    The last 3 x 3 convolution sees across the borders of patches, which would otherwise stay visible. The output is not
    clamped to [0, 1], since a clamp would cut the gradient. Vectors of any float dtype give images in the module's.
    """

    CHANNELS = 16  # of the full-resolution map before the last convolution

    def __init__(self, config: ViTConfig, patch_size: int, grid_size: int, in_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.project_in = nn.Linear(in_dim, config.width)
        self.trunk = Trunk(config, grid_size**2)
        self.project_out = nn.Linear(config.width, self.CHANNELS * patch_size**2)
        self.to_pixels = nn.Conv2d(self.CHANNELS, 3, 3, padding=1, padding_mode="replicate")

    def forward(self, q: Tensor) -> Tensor:
        return self.pixels(self.maps(q))

    def maps(self, q: Tensor) -> Tensor:
        """All but the last layer: [B, h, w, Ds + Dp] -> [B, CHANNELS, h*p, w*p]."""
        h, w = q.shape[1:3]
        q = q.flatten(1, 2).to(self.project_in.weight.dtype)
        x = self.project_out(self.trunk(self.project_in(q)))
        return torch.pixel_shuffle(x.transpose(1, 2).unflatten(2, (h, w)), self.patch_size)

    def pixels(self, maps: Tensor) -> Tensor:
        """The last layer: [B, CHANNELS, H, W] -> images [B, 3, H, W]."""
        return self.to_pixels(maps) / 2 + 0.5

    def last_layer_gradient(self, maps: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the last layer's weight, from its input `maps` and the `gradient` [B, 3, H, W] at its output.

        Needs no backward pass, and not the weight itself, which may be sharded.
        """
        padded = F.pad(maps.detach().float(), (1, 1, 1, 1), mode="replicate")
        return conv2d_weight(padded, (3, self.CHANNELS, 3, 3), gradient.float() / 2)
