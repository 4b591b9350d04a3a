"""The demo of the unified model: from generated pictures and captions alone to pictures from captions and captions
from pictures, on a CPU.

1. a reader: a small CNN that tells what is in a picture, the judge of all that follows
2. a teacher: SigLIP in small, on pictures and captions
3. a tokenizer: SemHiTok with that teacher, its stages as for photographs
4. the unified model: a tiny LLM from nothing, on ids and words, both directions and questions
5. figures, on combinations of attributes that training never showed
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from semhitok.config import TrainConfig, from_dict
from semhitok.data import scenes
from semhitok.training.contrastive import ContrastiveConfig, scenes_lesson, train_teacher

SIZE, PATCH = 64, 8


def tokenizer_config(folder: Path, pictures: int) -> TrainConfig:
    """The teacher, trained or found in `folder`, and the training of the tokenizer that distils it."""
    config = ContrastiveConfig("scenes", pictures, 400, 64)
    teacher = train_teacher(config, folder, lambda: scenes_lesson(scenes.pictures(0, 0, pictures, "train", SIZE)))
    settings: dict[str, Any] = {
        "model": {
            "image_size": SIZE, "patch_size": PATCH, "num_codes": 32, "num_sub_codes": 128, "sem_dim": 16, "pix_dim": 16,
            "semantic_decoder": {"width": 96, "depth": 1, "heads": 3},
            "encoder": {"width": 128, "depth": 2, "heads": 2},
            "decoder": {"width": 128, "depth": 2, "heads": 2},
        },
        "data": {"crop_scale": None},
        "precision": "bf16",
        "tracker": "none",
        "semantic": {
            "steps": 250, "batch_size": 32, "optimizer": {"lr": 1e-3, "warmup_share": 0.05}, "continuous_steps": 50,
            "checkpoint_every": 100,
        },
        "pixel": {
            "steps": 1500, "batch_size": 32, "optimizer": {"lr": 1e-3, "warmup_share": 0.05, "betas": [0.9, 0.99]},
            "continuous_steps": 150, "decay": 0.97, "ema_decay": 0, "drop": 0.0,
            "loss": {"l1": 1.0, "l2": 5.0, "lpips": 0.0, "critic": {"weight": 0.0}}, "checkpoint_every": 100,
        },
        "evaluation": {"every": 10000},
    }  # fmt: skip
    made = from_dict(TrainConfig, settings)
    made.model.teacher = teacher
    return made


def write_pictures(images: Tensor, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        path = folder / f"{n:05}.png"
        if not path.exists():
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder
