"""Critics (discriminators) of reconstructions, their losses, and what they are shown.

Verdicts on an image depend neither on the rest of its batch nor on the process that has it: no batch statistics, and
every random number comes from the caller. All of it runs in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from semhitok._optional import require
from semhitok.config import CriticConfig

AUGMENT_NUMBERS = 8  # uniform numbers that `diff_augment` takes for an image


class PatchCritic(nn.Module):
    """PatchGAN (Isola et al. 2017): images [B, 3, H, W] in [0, 1] -> a logit for every patch, [B, 1, h, w].

    4 x 4 convolutions, the first `layers` of them halving the map, with spectral normalisation (Miyato et al. 2018)
    in place of batch normalisation.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [3] + [width * min(2**n, 8) for n in range(layers + 1)]
        blocks: list[nn.Module] = []
        for n in range(layers + 1):
            stride = 2 if n < layers else 1
            blocks += [spectral_norm(nn.Conv2d(widths[n], widths[n + 1], 4, stride, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*blocks, spectral_norm(nn.Conv2d(widths[-1], 1, 4, 1, 1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images * 2 - 1)


class DinoCritic(nn.Module):
    """Trainable heads on the patch tokens of a frozen Vision Transformer (as in StyleGAN-T, Sauer et al. 2023).

    images [B, 3, H, W] in [0, 1] -> logits [B, heads * tokens].

    Args:
        config: backbone, checkpoint, image_size and blocks of it.
        load: fetch or read the backbone's weights; False leaves them random.

    Raises:
        ValueError: timm has no such model, or no such block.
        OSError: its weights cannot be had.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: CriticConfig, *, load: bool = True) -> None:
        super().__init__()
        timm = require("timm", "models")
        options: dict[str, Any] = {}
        if config.checkpoint is not None:
            options["pretrained_cfg_overlay"] = {"file": config.checkpoint}
        try:
            self.backbone = timm.create_model(
                config.backbone, pretrained=load, img_size=config.image_size, num_classes=0, **options
            )
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"critic.backbone: timm cannot build {config.backbone!r}: {error}") from error
        except Exception as error:  # the hub's client raises many types when it finds no network
            raise OSError(f"critic.backbone: no weights for {config.backbone!r}: {error}") from error
        depth = len(getattr(self.backbone, "blocks", ()))
        for block in config.blocks:
            if not 0 <= block < depth:
                raise ValueError(f"critic.blocks: expected 0..{depth - 1} for {config.backbone!r}, got {block}")
        self.blocks, self.image_size = config.blocks, config.image_size
        width: int = self.backbone.embed_dim
        self.heads = nn.ModuleList(_Head(width) for _ in config.blocks)
        cfg = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.backbone.requires_grad_(False).eval()

    def requires_grad_(self, requires_grad: bool = True) -> DinoCritic:
        self.heads.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> DinoCritic:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        size = (self.image_size, self.image_size)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        tokens = self.backbone.forward_intermediates(
            (images - self.mean) / self.std,
            indices=list(self.blocks),
            norm=False,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return torch.cat([head(x.transpose(1, 2)) for head, x in zip(self.heads, tokens, strict=True)], dim=1)


class _Head(nn.Module):
    """Tokens [B, C, L] -> logits [B, L]: a residual convolution along the tokens between two pointwise ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = spectral_norm(nn.Conv1d(width, width, 1))
        self.mix = spectral_norm(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular"))
        self.norm = nn.GroupNorm(1, width)
        self.out = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.norm(self.project(x)), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) / 2**0.5
        return self.out(x).squeeze(1)


def build_critic(config: CriticConfig, *, load: bool = True) -> nn.Module:
    """The critic that `config` names."""
    return PatchCritic(config.width, config.layers) if config.kind == "patch" else DinoCritic(config, load=load)


def critic_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The critic's loss: low when logits of images are high and those of reconstructions low.

    hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2
    non_saturating: (mean softplus(-real) + mean softplus(fake)) / 2
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def verdict_loss(kind: str, fake: Tensor) -> Tensor:
    """The network's loss: low when the critic takes reconstructions for images.

    hinge: -mean fake; non_saturating: mean softplus(-fake).
    """
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


class LeCam(nn.Module):
    """LeCAM regularisation (Tseng et al. 2021): holds the critic's logits to moving averages of their means."""

    real: Tensor
    fake: Tensor

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def regularizer(self, real: Tensor, fake: Tensor) -> Tensor:
        """mean relu(real - average fake)^2 + mean relu(average real - fake)^2."""
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    @torch.no_grad()
    def update(self, real: Tensor, fake: Tensor) -> None:
        """Take in the mean logits of a step, over all processes."""
        self.real.lerp_(real.to(self.real), 1 - self.decay)
        self.fake.lerp_(fake.to(self.fake), 1 - self.decay)


def diff_augment(images: Tensor, numbers: Tensor) -> Tensor:
    """DiffAugment (Zhao et al. 2020): colour, translation and cutout, differentiable.

    Args:
        images: [B, 3, H, W], [0, 1].
        numbers: uniform in [0, 1), [B, AUGMENT_NUMBERS]; brightness, saturation, contrast, translation down and right
            (.5 is none of each), centre of the cutout down and right, and whether there is one (from .5 on).
    """
    n = numbers.to(images.dtype).view(len(images), AUGMENT_NUMBERS, 1, 1, 1).unbind(1)
    height, width = images.shape[2:]
    # The paper's ranges are those of images in [-1, 1]: brightness is halved.
    x = images + (n[0] - 0.5) / 2
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (n[1] * 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (n[2] + 0.5)
    rows = torch.arange(height, device=x.device).view(1, -1)
    columns = torch.arange(width, device=x.device).view(1, -1)
    n = tuple(v.view(-1, 1) for v in n)
    rows_from = rows + ((n[3] - 0.5) * (height / 4)).round().long()
    columns_from = columns + ((n[4] - 0.5) * (width / 4)).round().long()
    x = x.gather(2, rows_from.clamp(0, height - 1).view(-1, 1, height, 1).expand_as(x))
    x = x.gather(3, columns_from.clamp(0, width - 1).view(-1, 1, 1, width).expand_as(x))
    inside = _outer(_within(rows_from, height), _within(columns_from, width))
    top, left = (n[5] * height).long() - height // 4, (n[6] * width).long() - width // 4
    hole = _outer(_within(rows - top, height // 2), _within(columns - left, width // 2))
    return x * (inside & ~(hole & (n[7] >= 0.5).view(-1, 1, 1, 1)))


def _within(x: Tensor, size: int) -> Tensor:
    return (x >= 0) & (x < size)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.view(len(rows), 1, -1, 1) & columns.view(len(columns), 1, 1, -1)


def window(images: Tensor, numbers: Tensor, shift: int) -> Tensor:
    """A window [B, 3, H - shift, W - shift] of images at a random place, the same for all: numbers [2] in [0, 1).

    Without it the decoder's grid of patches and the critic's coincide, and leave a fixed pattern.
    """
    top, left = (numbers * (shift + 1)).long().tolist()
    height, width = images.shape[2] - shift, images.shape[3] - shift
    return images[:, :, top : top + height, left : left + width]
