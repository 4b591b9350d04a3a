"""Random training crops, each a pure function of (seed, sample number): no order to lose on resume."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from semhitok.config import DataConfig
from semhitok.data.images import read_image, resize_crop

_CACHE_BYTES = 2**29


class RandomCrops(Dataset[tuple[Tensor, bool]]):
    """Sample n is a random crop of one image; every len(paths) samples see each image once.

    Args:
        paths: image files.
        size: side of a crop in pixels.
        config: how crops are drawn.
        seed: another seed gives another order and other crops.

    An unreadable image is named on stderr once and its samples are drawn from the next readable
    one, so a folder with a bad file trains on, the same way every time.

    Raises:
        ValueError: no paths, or (when a sample is drawn) none of them readable.
    """

    def __init__(self, paths: Sequence[Path], size: int, config: DataConfig, seed: int) -> None:
        if not paths:
            raise ValueError("paths: expected at least one image, got none")
        self.paths = list(paths)
        self.size = size
        self.config = config
        self.seed = seed
        self.unreadable: set[int] = set()
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> tuple[Tensor, bool]:
        """Crop [3, size, size], float32 in [0, 1], and whether it is of another image, its own being unreadable."""
        epoch, position = divmod(number, len(self.paths))
        if self._order[0] != epoch:
            shuffle = torch.randperm(len(self.paths), generator=_generator(self.seed, ~epoch))
            self._order = (epoch, shuffle.tolist())
        index = self._order[1][position]
        crop = random_crop(self._load(index), self.size, self.config, _generator(self.seed, number))
        return crop, index in self.unreadable

    def _load(self, index: int) -> Tensor:
        """The image at `index`, or the next readable one, as uint8 [3, H, W]."""
        for candidate in range(index, index + len(self.paths)):
            candidate %= len(self.paths)
            if candidate in self._cache:
                return self._cache[candidate]
            if candidate in self.unreadable:
                continue
            try:
                image = bytes_of(read_image(self.paths[candidate]))
            except (ValueError, OSError) as error:
                self.unreadable.add(candidate)
                print(f"semhitok: skipped: {error}", file=sys.stderr)
                continue
            if self._cached_bytes + image.numel() <= _CACHE_BYTES:
                self._cache[candidate] = image
                self._cached_bytes += image.numel()
            return image
        raise ValueError(f"none of the {len(self.paths)} images can be read")


def bytes_of(image: Tensor) -> Tensor:
    """An image in [0, 1] as uint8: a quarter of the memory, and what files hold."""
    return image.mul(255).round().to(torch.uint8)


def random_crop(image: Tensor, size: int, config: DataConfig, generator: torch.Generator) -> Tensor:
    """A random crop of uint8 [3, H, W], resized and mirrored as `config` says: float32 [3, size, size] in [0, 1]."""
    draw = torch.rand(4, generator=generator).tolist()
    side = min(image.shape[1:])
    if config.crop_scale is None:
        if side < size:
            image = resize_crop(image / 255, size) * 255
        side = size
    else:
        low, high = config.crop_scale
        side = max(1, round(side * (low + (high - low) * draw[0])))
    top = int(draw[1] * (image.shape[1] - side + 1))
    left = int(draw[2] * (image.shape[2] - side + 1))
    crop = image[:, top : top + side, left : left + side].float() / 255
    if side != size:
        crop = F.interpolate(crop[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return crop.flip(-1) if config.flip and draw[3] < 0.5 else crop


def _generator(seed: int, number: int) -> torch.Generator:
    # An odd constant spreads neighbouring seeds; the product keeps 63 bits.
    mixed = (seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03) & (2**63 - 1)
    return torch.Generator().manual_seed(mixed)
