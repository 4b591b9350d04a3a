"""A small Vision Transformer for 64 x 64 pictures, known to timm as `vit_shapes_patch8_64`.

A stem of convolutions with batch normalisation in place of the patch embedding, then two blocks of width 128: it learns
in minutes what a plain transformer of this size does not learn in an hour. `semhitok.demo.teacher` trains it;
`TeacherConfig(name="vit_shapes_patch8_64", checkpoint=...)` uses it. Importing this module registers it.
"""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

NAME = "vit_shapes_patch8_64"

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
    """timm's patch embedding with six 3 x 3 convolutions, three of stride 2, as its projection."""

    def __init__(self, *, embed_dim: int, patch_size: int, **options: Any) -> None:
        super().__init__(embed_dim=embed_dim, patch_size=patch_size, **options)
        if patch_size != 8:
            raise AssertionError(f"patch_size: expected 8, got {patch_size}")  # as timm's own layers do
        layers: list[nn.Module] = []
        channels = 3
        for width, stride in ((32, 2), (32, 1), (64, 2), (64, 1), (embed_dim, 2), (embed_dim, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.proj: Any = nn.Sequential(*layers, nn.Conv2d(channels, embed_dim, 1))


@register_model
def vit_shapes_patch8_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """64 tokens of width 128, no class token."""
    settings: dict[str, Any] = {
        "img_size": 64, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 4, "num_classes": 0,
        "class_token": False, "global_pool": "", "embed_layer": ConvStem,
    }  # fmt: skip
    return build_model_with_cfg(
        VisionTransformer, NAME, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **settings | options
    )
