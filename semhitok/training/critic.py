"""The critic (discriminator) of the reconstruction loss, what it is shown, and the losses of both sides.

A critic gives logits: high for originals, low for reconstructions. Nothing here draws random numbers. The caller passes
them in, so that a step depends on its number and not on how a batch is split over processes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from semhitok.config import CriticConfig
from semhitok.models.teacher import MAPS, vision_transformer

AUGMENT_NUMBERS = 8  # random numbers that `diff_augment` takes for an image
LECAM_DECAY = 0.99


class PatchCritic(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for every patch of an image, by 4 x 4 convolutions.

    `layers` convolutions of stride 2, then two of stride 1, spectrally normalised, with LeakyReLU 0.2 between them.
    There are no batch statistics: the verdict on an image depends on no other image.

    Args:
        width: channels of the first layer; they double with every layer, up to 8 * width.
        layers: number of layers that halve the map; with 3 of them a logit sees 70 x 70 pixels.

    Attributes:
        smallest: side in pixels of the smallest image that gives a logit.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        channels = [3] + [width * min(2**n, 8) for n in range(layers + 1)]
        modules: list[nn.Module] = []
        for n in range(layers + 1):
            stride = 2 if n < layers else 1
            modules.append(spectral_norm(nn.Conv2d(channels[n], channels[n + 1], 4, stride, padding=1)))
            modules.append(nn.LeakyReLU(0.2))
        self.network = nn.Sequential(*modules, spectral_norm(nn.Conv2d(channels[-1], 1, 4, padding=1)))
        self.smallest = 3 * 2**layers

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, 1, h, w], fp32; ValueError for images that are too small.

        Autocast is off in here, because spectral norms do not work in bf16.
        """
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(f"critic: expected images of at least {self.smallest} pixels, got {list(images.shape)}")
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images.float() * 2 - 1)


class DinoCritic(nn.Module):
    """Trainable heads on the patch tokens of a frozen Vision Transformer (StyleGAN-T, Sauer et al. 2023; GigaTok).

    The backbone is always in eval mode and learns nothing, but gradients pass through it to the images.

    Args:
        config: `backbone`, `checkpoint`, `image_size` and `blocks` are used.
        load: download or read the backbone's weights; False leaves them random.

    Raises:
        ValueError: timm has no such model, it is not a Vision Transformer, or it has no such block.
        OSError: its weights are not available.
    """

    smallest = 1  # side in pixels of the smallest image; all are resized
    vit: Any
    mean: Tensor
    std: Tensor

    def __init__(self, config: CriticConfig, *, load: bool = True) -> None:
        super().__init__()
        self.image_size = config.image_size
        name, file = config.backbone, config.checkpoint
        self.vit = vision_transformer("critic", name, load=load, checkpoint=file, image_size=self.image_size)
        depth = len(self.vit.blocks)
        if not config.blocks or not all(-depth <= block < depth for block in config.blocks):
            raise ValueError(f"critic.blocks: expected some of -{depth}..{depth - 1} for {name!r}, got {config.blocks}")
        self.blocks = sorted({block % depth for block in config.blocks})
        cfg = self.vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.vit.requires_grad_(False)
        self.heads = nn.ModuleList(Head(self.vit.embed_dim) for _ in self.blocks)
        self.train()

    def train(self, mode: bool = True) -> DinoCritic:
        super().train(mode)
        self.vit.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [0, 1] -> logits [B, n], fp32: every patch token of every chosen block.

        Autocast is off in here, because spectral norms do not work in bf16.
        """
        with torch.autocast(images.device.type, enabled=False):
            images = resize(images.float(), self.image_size)
            maps = self.vit.forward_intermediates((images - self.mean) / self.std, indices=self.blocks, **MAPS)
            return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)


class Head(nn.Module):
    """Tokens [B, C, h, w] of one block -> logits [B, 1, h, w]: StyleGAN-T's head, but on the plane.

    StyleGAN-T convolves 9 successive tokens, this head 3 x 3. In place of batch normalisation every token is normalised
    by itself, which also evens out the very different scales of the blocks.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = spectral_norm(nn.Conv2d(width, width, 1))
        self.mix = spectral_norm(nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"))
        self.judge = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)
        x = F.leaky_relu(self.project(x), 0.2)
        x = (x + F.leaky_relu(self.mix(x), 0.2)) / 2**0.5
        return self.judge(x)


def build_critic(config: CriticConfig, *, load: bool = True) -> PatchCritic | DinoCritic:
    """The critic that `config.kind` names; `load` and errors as in `DinoCritic`."""
    return DinoCritic(config, load=load) if config.kind == "dino" else PatchCritic(config.width, config.layers)


def critic_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """The GAN loss of the critic, a scalar: originals should get high logits, reconstructions low ones.

    Args:
        kind: "hinge", or "non_saturating" for the logistic loss.
        real: logits of originals, any shape.
        fake: logits of reconstructions, any shape.
    """
    if kind == "hinge":
        return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def verdict_loss(kind: str, fake: Tensor) -> Tensor:
    """The GAN loss of the tokenizer, a scalar: reconstructions should get high logits. Arguments as `critic_loss`."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


class LeCam(nn.Module):
    """LeCAM regulariser of a critic (Tseng et al. 2021): pulls logits to the moving average of the other side.

    Buffers: `real` and `fake`, moving averages of the mean logits, which start at 0.
    """

    real: Tensor
    fake: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("real", torch.zeros(()))
        self.register_buffer("fake", torch.zeros(()))

    def regularizer(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """mean(relu(real - average fake)^2) + mean(relu(average real - fake)^2), a scalar; any shapes."""
        return F.relu(real_logits - self.fake).square().mean() + F.relu(self.real - fake_logits).square().mean()

    @torch.no_grad()
    def update(self, real_mean: Tensor | float, fake_mean: Tensor | float) -> None:
        """After a step: take in its mean logits, scalars that the caller has averaged over all processes."""
        for average, value in ((self.real, real_mean), (self.fake, fake_mean)):
            average.mul_(LECAM_DECAY).add_(value, alpha=1 - LECAM_DECAY)


def diff_augment(images: Tensor, numbers: Tensor) -> Tensor:
    """Differentiable augmentation (Zhao et al. 2020): colour, translation and cutout.

    As in the paper: brightness changes by up to 0.25 (0.5 in the paper, whose images are in [-1, 1]); saturation is
    scaled by 0 to 2 and contrast by 0.5 to 1.5; the image moves by up to an eighth of each side; a rectangle of half
    its sides, centred anywhere, is cut out. Uncovered and cut pixels become mid-grey (0 in the paper). Unlike in the
    paper, half of the images are not cut. Images are not clamped.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        numbers: float [B, 8], uniform in [0, 1), on any device, for: brightness, saturation, contrast, movement down
            and right, the cut's centre down and right, and whether there is a cut (below 0.5). All 0.5 changes nothing.

    Returns:
        Same shape and dtype as `images`; a row depends on its own numbers only.
    """
    numbers = numbers.to(images.device)
    brightness, saturation, contrast = numbers[:, :3].to(images.dtype).view(-1, 3, 1, 1, 1).unbind(1)
    x = images * 2 - 1 + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (2 * saturation) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (contrast + 0.5) + mean
    kept: list[Tensor] = []
    outside: list[Tensor] = []
    for axis, side in enumerate(images.shape[2:]):
        places = torch.arange(side, device=images.device)
        reach = (side + 4) // 8
        source = places - (_choose(numbers[:, 3 + axis], 2 * reach + 1) - reach)[:, None]
        # Every pixel is read once: the backward pass sums nothing and is the same in every run.
        index = (source % side).unsqueeze(1).unsqueeze(3 - axis)
        x = x.gather(2 + axis, index.expand_as(x))
        kept.append((source >= 0) & (source < side))
        cut = (side + 1) // 2
        first = (_choose(numbers[:, 5 + axis], side + 1 - cut % 2) - cut // 2)[:, None]
        outside.append((places < first) | (places >= first + cut))
    spared = (numbers[:, 7] >= 0.5).view(-1, 1, 1)
    covered = kept[0][:, :, None] & kept[1][:, None] & (outside[0][:, :, None] | outside[1][:, None] | spared)
    return x * covered.unsqueeze(1) / 2 + 0.5


def window(images: Tensor, numbers: Tensor, shift: int) -> Tensor:
    """Crop images to a window `shift` pixels smaller, at the same random place for the whole batch.

    Args:
        images: [B, 3, H, W].
        numbers: float [2], uniform in [0, 1): how far down and right the window is.
        shift: at least 0, less than H and W.

    Returns:
        A view [B, 3, H - shift, W - shift].

    Raises:
        ValueError: `shift` leaves no image.
    """
    sides = list(images.shape[2:])
    height, width = (side - shift for side in sides)
    if shift < 0 or min(height, width) < 1:
        raise ValueError(f"critic.shift: expected 0 to less than the image's sides {sides}, got {shift}")
    top, left = _choose(numbers, shift + 1).tolist()
    return images[:, :, top : top + height, left : left + width]


def _choose(numbers: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) -> integers 0..count - 1, int64. No product rounds up to `count`."""
    return (numbers * count).long()


def resize(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size], bicubic with antialias, and not clamped: a clamp would cut gradients.

    Equal to `F.interpolate`, but computed as two matrix products, because the backward pass of `F.interpolate` sums in
    another order every time on CUDA.
    """
    if images.shape[2:] == (size, size):
        return images
    down, right = (
        F.interpolate(torch.eye(side, device=images.device)[None, None], (size, side), mode="bicubic", antialias=True)
        for side in images.shape[2:]
    )
    return down @ images @ right.mT
