"""Small image tokenizers with random weights."""

from __future__ import annotations

import torch

from semhitok.config import SemHiTokConfig, TeacherConfig, ViTConfig
from semhitok.tokenizer import SemHiTok


def small_config(**overrides):
    teacher = TeacherConfig(
        "vit_tiny_patch16_224",
        pretrained=False,
        image_size=32,
        options={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
    )
    sizes = {
        "image_size": 32, "patch_size": 8, "num_codes": 12, "num_sub_codes": 3,
        "sem_dim": 6, "pix_dim": 5, "teacher": teacher,
        "semantic_decoder": ViTConfig(16, 1, 2), "encoder": ViTConfig(16, 1, 2),
        "decoder": ViTConfig(16, 1, 2),
    }  # fmt: skip
    return SemHiTokConfig(**{**sizes, **overrides})


def adaptive_tokenizer():
    """One whose sub-codebooks differ in size."""
    torch.manual_seed(0)
    model = SemHiTok(small_config(adaptive=True)).eval()
    z, group = torch.randn(600, 5), torch.rand(600).square().mul(12).long()
    model.quantizer.initialize(z * group[:, None], group, generator=torch.Generator().manual_seed(0))
    return model
