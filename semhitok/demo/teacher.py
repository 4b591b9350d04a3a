"""Training of a small teacher on pictures and their captions: a small SigLIP (Zhai et al. 2023), in minutes.

loss = sigmoid contrastive loss of images and captions
     + 10 * binary cross-entropy of the caption's words, predicted from the image
     + cross-entropy of the attributes of each region, predicted from the mean of its tokens

The targets of the last two come from the captions too. With the contrastive loss alone, shapes are not learnt in this
time; without the attributes of the background, the teacher would ignore most pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._files import write_atomic
from semhitok._optional import require
from semhitok.config import TeacherConfig
from semhitok.demo import scenes
from semhitok.models.teacher import vision_transformer
from semhitok.training.stage import bf16_is_slow

NAME = "vit_shapes_patch8_64"  # see `semhitok.models.small_vit`
SIZE = 64  # side length of pictures in pixels
GRID = 8  # tokens along a side
CELLS = len(scenes.ROWS) * len(scenes.COLUMNS)
# Shape is the hardest to learn, and a few hundred codes have room for no more than shapes, colours and backgrounds.
WEIGHTS = {"shape": 3.0, "colour": 2.0}
OTHER_WEIGHT = 0.1  # of the other attributes
BACKGROUND_WEIGHT = 1.0
SCALE = 20.0  # of the cosines that are the logits of regions


class Lesson(NamedTuple):
    """N pictures and the content of their captions as tensors."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    words: Tensor  # float32 [N, P, V], 1 for the words of each of a caption's phrases
    regions: Tensor  # float32 [N, R, 64], weights of the 8 x 8 tokens in each region; they sum to one
    labels: Tensor  # int64 [N, R, A], attributes of the object in each region; -1 if there is none
    background: Tensor  # int64 [N, B], attributes of the background
    attributes: dict[str, int]  # name -> number of values, of each column of `labels`
    surroundings: dict[str, int]  # name -> number of values, of each column of `background`


@dataclass
class ContrastiveConfig:
    """Training of the small teacher, by AdamW."""

    data: str  # name of the training set
    pictures: int = 16_000
    steps: int = 1500
    batch_size: int = 96
    lr: float = 1.5e-3  # warm-up over the first tenth, then cosine decay to zero
    words_weight: float = 10.0  # of the second term of the loss
    region_weight: float = 1.0  # of the third term
    seed: int = 0


def scenes_lesson(data: scenes.Pictures) -> Lesson:
    """The captions of `semhitok.demo.scenes` as a lesson: the regions are the object's surroundings and the rest."""
    names = list(scenes.ATTRIBUTES)
    firsts = torch.tensor([0, *scenes.COUNTS[:-1]]).cumsum(0)
    found = torch.zeros(len(data.labels), 2, sum(scenes.COUNTS))  # the object, the background
    found[:, 0].scatter_(1, (firsts + data.labels)[:, :4], 1.0)
    found[:, 1].scatter_(1, (firsts + data.labels)[:, 4:], 1.0)
    near = torch.stack([scenes.surroundings(position, GRID).flatten() for position in range(CELLS)])
    regions = torch.stack([near, ~near], 1)[data.labels[:, names.index("position")]].float()
    objects = data.labels[:, :3, None].transpose(1, 2)
    labels = torch.cat([objects, torch.full_like(objects, -1)], 1)
    sizes = ({name: len(scenes.ATTRIBUTES[name]) for name in some} for some in (names[:3], names[4:]))
    return Lesson(data.images, found, regions / regions.sum(-1, keepdim=True), labels, data.labels[:, 4:], *sizes)


def cell_means(grid_size: int = GRID) -> Tensor:
    """Weights [9, grid_size^2] of the tokens in each of the 3 x 3 cells; they sum to one."""
    one_hot = F.one_hot(scenes.cell_of_patches(grid_size).flatten(), CELLS).float()
    return (one_hot / one_hot.sum(0)).T.contiguous()


class TextEncoder(nn.Module):
    """Words of phrases [N, P, V], 0 or 1 -> unit vectors [N, width]: one MLP on each phrase, summed."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.phrase = nn.Sequential(nn.Linear(vocabulary, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.project = nn.Linear(width, width)

    def forward(self, words: Tensor) -> Tensor:
        present = words.amax(-1, keepdim=True)
        return F.normalize(self.project((self.phrase(words) * present).sum(1)), dim=-1)


class ImageHead(nn.Module):
    """The teacher's tokens [B, 64, width] -> what the losses need; used in training only.

    Returns unit vectors [B, width], logits [B, V] of the caption's words, and logits [B, R, logits] of each region for
    `region_loss`.
    """

    mean: Tensor

    def __init__(self, width: int, vocabulary: int, logits: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pool = nn.MultiheadAttention(width, 4, batch_first=True)
        self.project = nn.Linear(width, width)
        self.words = nn.Linear(CELLS * width, vocabulary)
        self.regions = nn.Parameter(torch.randn(logits, width) * width**-0.5)
        self.register_buffer("mean", cell_means())

    def forward(self, tokens: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self.norm(tokens)
        pooled, _ = self.pool(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        of_cells = self.mean.to(tokens.dtype) @ tokens
        embedding = F.normalize(self.project(pooled[:, 0]).float(), dim=-1)
        # Cosines of a fixed scale. With free logits, an attribute that is easy to learn would take up less and less of
        # the features, and codes would not represent it.
        means = F.normalize((regions.to(tokens.dtype) @ tokens).float(), dim=-1)
        cosines = F.linear(means, F.normalize(self.regions, dim=-1))
        return embedding, self.words(of_cells.flatten(1)), SCALE * cosines


def sigmoid_loss(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss of unit vectors [B, D]: each pair of an image and a text either matches or does not."""
    logits = images @ texts.T * log_scale.exp() + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()


def logit_sizes(lesson: Lesson) -> list[int]:
    """Number of logits of each attribute of a region: the object's, "none" included, then the background's."""
    return [*(1 + count for count in lesson.attributes.values()), *lesson.surroundings.values()]


def region_loss(logits: Tensor, lesson: Lesson, pick: Tensor) -> Tensor:
    """Weighted cross-entropy of the logits [B, R, .] of regions from ImageHead, for the pictures `pick` [B].

    In the terms of the objects, regions without an object, which are most, count a tenth. The terms of the background
    have only these: if an object's tokens had to represent it too, codes would be needed for every pair of both.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    labels, background = lesson.labels[pick], lesson.background[pick]
    parts = logits.float().split(logit_sizes(lesson), dim=-1)
    for n, (name, part) in enumerate(zip(lesson.attributes, parts, strict=False)):
        target = labels[..., n].flatten() + 1
        each = F.cross_entropy(part.flatten(0, 1), target, reduction="none")
        weight = torch.where(target > 0, 1.0, 0.1)
        total = total + WEIGHTS.get(name, OTHER_WEIGHT) * (each * weight).sum() / weight.sum()
    empty = labels[..., 0] < 0
    for n, part in enumerate(parts[len(lesson.attributes) :]):
        target = background[:, n, None].expand(-1, part.shape[1])
        total = total + BACKGROUND_WEIGHT * F.cross_entropy(part[empty], target[empty])
    return total


def train_teacher(
    config: ContrastiveConfig, folder: str | os.PathLike[str], lesson: Callable[[], Lesson]
) -> TeacherConfig:
    """Train the teacher, unless `folder` has one that was trained with the same settings.

    Args:
        lesson: returns the data that `config.data` and `config.pictures` name; called only for training.

    Returns:
        The configuration with which `Teacher` loads the weights from `folder`.

    Raises:
        OSError: the folder cannot be written.
    """
    settings = json.dumps(dataclasses.asdict(config), sort_keys=True)
    path = Path(folder) / f"{NAME}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors = require("safetensors.torch", "models")
        weights = _train(config, lesson())
        write_atomic(path, safetensors.save(weights, metadata={"format": "pt", "settings": settings}))
    return TeacherConfig(NAME, pretrained=False, checkpoint=str(path), image_size=SIZE, block=-1)


def _train(config: ContrastiveConfig, data: Lesson) -> dict[str, Tensor]:
    torch.manual_seed(config.seed)
    vit: Any = vision_transformer("teacher", NAME, load=False, checkpoint=None, image_size=SIZE)
    words, width = data.words, vit.embed_dim
    text, head = TextEncoder(words.shape[-1], width), ImageHead(width, words.shape[-1], sum(logit_sizes(data)))
    scale = nn.Parameter(torch.tensor([2.3, -10.0]))  # SigLIP's log of the temperature, and its bias
    parameters: list[nn.Parameter] = [*vit.parameters(), *text.parameters(), *head.parameters()]
    groups: list[dict[str, Any]] = [{"params": parameters}, {"params": [scale], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.02)
    options: dict[str, Any] = {"pct_start": 0.1, "cycle_momentum": False, "final_div_factor": 1e3}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, **options)
    cfg = vit.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    draw = torch.Generator().manual_seed(config.seed)
    started = time.perf_counter()
    bar = require("tqdm", "models").tqdm(total=config.steps, desc="teacher", unit="step", disable=None)
    use_bf16 = not bf16_is_slow(torch.device("cpu"))
    vit.train()
    for step in range(config.steps):
        if step * config.batch_size // len(words) != (step - 1) * config.batch_size // len(words) or step == 0:
            order = torch.randperm(len(words), generator=draw)
        pick = order[(step * config.batch_size + torch.arange(config.batch_size)) % len(words)]
        images = (data.images[pick].float() / 255 - mean) / std
        with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):
            tokens = vit.forward_features(images.contiguous(memory_format=torch.channels_last))
            embedding, of_words, of_regions = head(tokens, data.regions[pick])
            texts = text(words[pick])
        loss = (
            sigmoid_loss(embedding, texts.float(), scale[0], scale[1])
            + config.words_weight * F.binary_cross_entropy_with_logits(of_words.float(), words[pick].amax(1))
            + config.region_weight * region_loss(of_regions, data, pick)
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
            progress = f"step {step + 1} of {config.steps}, loss {loss.item():.3f}, {spent:.0f} s"
            print(f"teacher: {progress}", file=sys.stderr, flush=True)
    bar.close()
    return {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in vit.state_dict().items()}
