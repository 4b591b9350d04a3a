"""Training of the small teacher on pictures and their captions: SigLIP (Zhai et al. 2023) in small, in minutes.

loss = sigmoid contrastive loss of images and captions
     + 10 (which words the caption has, from the image: binary cross-entropy)
     + what is said of each cell and of the background, from the mean of the cell's tokens: cross-entropy, shape
       counting three times, the background three tenths

The last two are taken from the captions' words too, a phrase's position words naming its cell. The contrastive loss
alone asks for so little at this size that shapes are not learnt in the time; and without the words for backgrounds the
teacher would be blind to most pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._files import write_atomic
from semhitok._optional import require
from semhitok.config import TeacherConfig
from semhitok.data import shapes
from semhitok.models.teacher import vision_transformer

NAME = "vit_shapes_patch8_64"

_OBJECT_WORDS = [*(w for words in shapes.ATTRIBUTES.values() for w in words), *shapes.ROWS, *shapes.COLUMNS]
_BACKGROUND_WORDS = [w for words in shapes.SURROUNDINGS.values() for w in words]
# A word of an object and the same word of a background would be two.
_OBJECT = {word: n for n, word in enumerate(_OBJECT_WORDS)}
_BACKGROUND = {word: n + len(_OBJECT) for n, word in enumerate(_BACKGROUND_WORDS)}
VOCABULARY = len(_OBJECT) + len(_BACKGROUND)
# Logits of a cell: its object's attributes with "empty", then the background's.
CELL_SIZES = [
    *(1 + len(words) for words in shapes.ATTRIBUTES.values()),
    *(len(words) for words in shapes.SURROUNDINGS.values()),
]
PHRASES = 4  # at most in a caption: three objects and the background


@dataclass
class ContrastiveConfig:
    """Training of the small teacher.

    pictures: size of the training set, `shapes.pictures(seed, 0, pictures)`.
    steps, batch_size, lr: of AdamW; warm-up over the first tenth, then cosine decay to nothing.
    words_weight, cell_weight: of the second and third term of the loss.
    """

    pictures: int = 16_000
    steps: int = 1500
    batch_size: int = 96
    lr: float = 1.5e-3
    words_weight: float = 10.0
    cell_weight: float = 1.0
    seed: int = 0


def phrase_words(captions: list[str]) -> Tensor:
    """Captions of `shapes` -> for each of their phrases the words in it, as ones: float32 [N, 4, VOCABULARY]."""
    found = torch.zeros(len(captions), PHRASES, VOCABULARY)
    for caption, rows in zip(captions, found, strict=True):
        for phrase, row in zip(caption.split(", "), rows, strict=False):
            words = _BACKGROUND if phrase.endswith(" light") else _OBJECT
            row[[words[w] for w in phrase.split() if w in words]] = 1
    return found


class TextEncoder(nn.Module):
    """Phrases as ones [N, 4, VOCABULARY] -> unit vectors [N, width]: each phrase through one MLP, summed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.phrase = nn.Sequential(nn.Linear(VOCABULARY, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.project = nn.Linear(width, width)

    def forward(self, words: Tensor) -> Tensor:
        present = words.amax(-1, keepdim=True)
        return F.normalize(self.project((self.phrase(words) * present).sum(1)), dim=-1)


class ImageHead(nn.Module):
    """What training reads off the teacher's tokens [B, 64, width], and nobody needs afterwards.

    Returns unit vectors [B, width]; logits [B, VOCABULARY] of the caption's words; logits [B, 9, sum of (1 + number of
    words)] for each cell's shape, colour, texture and size, "empty" first, then for the background behind it.
    """

    mean: Tensor

    def __init__(self, width: int, grid_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pool = nn.MultiheadAttention(width, 4, batch_first=True)
        self.project = nn.Linear(width, width)
        self.words = nn.Linear(9 * width, VOCABULARY)
        self.cells = nn.Linear(width, sum(CELL_SIZES))
        one_hot = F.one_hot(shapes.cell_of_patches(grid_size).flatten(), 9).float()
        self.register_buffer("mean", (one_hot / one_hot.sum(0)).T.contiguous())  # [9, tokens]

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.norm(tokens)
        pooled, _ = self.pool(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        of_cells = self.mean.to(tokens.dtype) @ tokens
        embedding = F.normalize(self.project(pooled[:, 0]).float(), dim=-1)
        return embedding, self.words(of_cells.flatten(1)), self.cells(of_cells)


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of unit vectors [B, D]: every pair of an image and a text is a match or none."""
    logits = images @ texts.T * log_scale.exp() + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def cell_loss(logits: Tensor, labels: Tensor, background: Tensor) -> Tensor:
    """Cross-entropy of ImageHead's cell logits [B, 9, .] with labels [B, 9, 4] and background [B, 3].

    -1 stands for an empty cell; such cells, most of them, count a tenth in the objects' terms.
    """
    total = logits.new_zeros(())
    parts = logits.float().split(CELL_SIZES, dim=-1)
    for n, (name, part) in enumerate(zip(shapes.ATTRIBUTES, parts, strict=False)):
        target = labels[..., n].flatten() + 1
        each = F.cross_entropy(part.flatten(0, 1), target, reduction="none")
        weight = torch.where(target > 0, 1.0, 0.1)
        total = total + (3 if name == "shape" else 1) * (each * weight).sum() / weight.sum()
    for n, part in enumerate(parts[len(shapes.ATTRIBUTES) :]):
        total = total + 0.3 * F.cross_entropy(part.transpose(1, 2), background[:, n, None].expand(-1, part.shape[1]))
    return total


def train_shapes_teacher(
    config: ContrastiveConfig, folder: str | os.PathLike[str], data: shapes.Pictures | None = None
) -> TeacherConfig:
    """Train the teacher, or find it trained with the same settings in `folder`.

    Args:
        data: the training pictures that `config` describes, where the caller has them already.

    Returns:
        The configuration with which `Teacher` loads its weights, a safetensors file in `folder` named after the
        settings.

    Raises:
        OSError: the folder cannot be written.
    """
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    path = Path(folder) / f"{NAME}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors = require("safetensors.torch", "models")
        weights = _train(config, data or shapes.pictures(config.seed, 0, config.pictures))
        write_atomic(path, safetensors.save(weights, metadata={"format": "pt", "settings": settings}))
    return TeacherConfig(NAME, pretrained=False, checkpoint=str(path), image_size=shapes.SIZE, block=-1)


def _train(config: ContrastiveConfig, data: shapes.Pictures) -> dict[str, Tensor]:
    torch.manual_seed(config.seed)
    vit: Any = vision_transformer("teacher", NAME, load=False, checkpoint=None, image_size=shapes.SIZE)
    width, grid = vit.embed_dim, vit.patch_embed.grid_size[0]
    text, head = TextEncoder(width), ImageHead(width, grid)
    scale = nn.Parameter(torch.tensor([2.3, -10.0]))  # SigLIP's log of the temperature, and its bias
    parameters: list[nn.Parameter] = [*vit.parameters(), *text.parameters(), *head.parameters()]
    groups: list[dict[str, Any]] = [{"params": parameters}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, config.steps, pct_start=0.1, cycle_momentum=False, final_div_factor=1e3
    )
    words = phrase_words(data.captions)
    cfg = vit.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    draw = torch.Generator().manual_seed(config.seed)
    started = time.perf_counter()
    bar = require("tqdm", "models").tqdm(total=config.steps, desc="teacher", unit="step", disable=None)
    vit.train()
    for step in range(config.steps):
        if step * config.batch_size // len(words) != (step - 1) * config.batch_size // len(words) or step == 0:
            order = torch.randperm(len(words), generator=draw)
        pick = order[(step * config.batch_size + torch.arange(config.batch_size)) % len(words)]
        images = (data.images[pick].float() / 255 - mean) / std
        with torch.autocast("cpu", torch.bfloat16):
            embedding, of_words, of_cells = head(
                vit.forward_features(images.contiguous(memory_format=torch.channels_last))
            )
            texts = text(words[pick])
        loss = (
            sigmoid_loss(embedding, texts.float(), scale[0], scale[1])
            + config.words_weight * F.binary_cross_entropy_with_logits(of_words.float(), words[pick].amax(1))
            + config.cell_weight * cell_loss(of_cells, data.labels[pick], data.background[pick])
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.update()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        if bar.disable and (step + 1) % max(config.steps // 5, 1) == 0:
            spent = time.perf_counter() - started
            print(
                f"teacher: step {step + 1} of {config.steps}, loss {loss.item():.3f}, {spent:.0f} s",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    bar.close()
    return {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in vit.state_dict().items()}
