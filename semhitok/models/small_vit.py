"""A small Vision Transformer with a convolutional stem, for 64 x 64 images.

The stem replaces the patch embedding (Xiao et al. 2021): a ViT of two blocks and width 128 then learns in minutes what
it does not learn in an hour without. Importing this module registers the model with timm under `NAME`.
"""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

NAME = "vit_shapes_patch8_64"  # written in checkpoints, so it stays

default_cfgs = generate_default_cfgs(
    {
        NAME: {
            "input_size": (3, 64, 64),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "num_classes": 0,
            "first_conv": "patch_embed.proj.0",
            "classifier": "head",
        }
    }
)


class ConvStem(PatchEmbed):
    """timm's patch embedding, projected by six 3 x 3 convolutions, three of them of stride 2: images -> [B, 64, D]."""

    def __init__(self, *, embed_dim: int, patch_size: int, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, patch_size=patch_size, **options)
        if patch_size != 8:
            raise AssertionError(f"patch_size: expected 8, got {patch_size}")  # as timm's own layers raise
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (embed_dim, 2), (embed_dim, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.proj: Any = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))


@register_model
def vit_shapes_patch8_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Images [B, 3, 64, 64] -> tokens [B, 64, 128], without a class token."""
    settings: dict[str, Any] = {
        "img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4, "num_classes": 0,
        "class_token": False, "global_pool": "", "embed_layer": ConvStem,
    }  # fmt: skip
    return build_model_with_cfg(
        VisionTransformer, NAME, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings | options
    )
