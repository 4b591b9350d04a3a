"""Random training crops, each a pure function of (seed, sample number): no order to lose on resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok._messages import message
from semhitok.config import DataConfig
from semhitok.data.images import read_uint8, resize_crop
from semhitok.data.stream import epoch_order, generator

_CACHE_BYTES = 2**29


class Sample(NamedTuple):
    """A crop [3, size, size], float32 in [0, 1].

    number: that of a fixed crop, otherwise meaningless.
    skipped: why images cannot be read that were tried for the first time, and whose place its image takes.
    """

    crop: Tensor
    number: int
    skipped: tuple[str, ...] = ()


class RandomCrops:
    """Sample n is a random crop of one image; every len(paths) samples see each image once.

    With config.fixed the crops are numbered: that of image i is number i, and its mirror image i + len(paths).

    Args:
        paths: image files.
        size: side of a crop in pixels.
        config: how crops are drawn.
        seed: another seed gives another order and other crops.

    The next readable image takes the place of an unreadable one, the same one every time.

    Attributes:
        fixed_count: number of the fixed crops; 0 if they are not fixed.

    Raises:
        ValueError: no paths, fixed crops that are to have a random scale, or (when a sample is drawn) none of the
            images readable.
    """

    def __init__(self, paths: Sequence[Path], size: int, config: DataConfig, seed: int) -> None:
        if not paths:
            raise ValueError("paths: expected at least one image, got none")
        if config.fixed and config.crop_scale is not None:
            raise ValueError(f"crop_scale: expected null with fixed crops, got {list(config.crop_scale)}")
        self.paths = list(paths)
        self.size = size
        self.config = config
        self.seed = seed
        self.fixed_count = (2 if config.flip else 1) * len(self.paths) if config.fixed else 0
        self.unreadable: set[int] = set()
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, number: int) -> Tensor:
        """Crop [3, size, size], float32 in [0, 1]."""
        return self.sample(number).crop

    def sample(self, number: int) -> Sample:
        """Sample `number` of the run."""
        epoch, position = divmod(number, len(self.paths))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self.paths), self.seed, epoch).tolist())
        index = self._order[1][position]
        draws = torch.rand(4, generator=generator(self.seed, number)).tolist()
        if self.config.fixed:
            return self.fixed_crop(index, mirrored=self.config.flip and draws[3] < 0.5)
        image, found, skipped = self._load(index)
        return Sample(crop(image, self.size, self.config, draws), found, skipped)

    def fixed_crop(self, index: int, mirrored: bool) -> Sample:
        """The fixed crop of an image, or of the readable one that takes its place."""
        image, found, skipped = self._load(index)
        part = resize_crop(image / 255, self.size)
        number = found + len(self.paths) * mirrored
        return Sample(part.flip(-1) if mirrored else part, number, skipped)

    def _load(self, index: int) -> tuple[Tensor, int, tuple[str, ...]]:
        """The image at `index`, or the next readable one, as uint8 [3, H, W]; its index; why others cannot be read."""
        skipped: list[str] = []  # a process says it once: a folder may have thousands in a row
        for place in range(index, index + len(self.paths)):
            candidate = place % len(self.paths)
            if candidate in self._cache:
                return self._cache[candidate], candidate, tuple(skipped)
            if candidate in self.unreadable:
                continue
            try:
                image = read_uint8(self.paths[candidate])
            except (ValueError, OSError) as error:
                self.unreadable.add(candidate)
                skipped.append(message(error))
                continue
            if self._cached_bytes + image.numel() <= _CACHE_BYTES:
                self._cache[candidate] = image
                self._cached_bytes += image.numel()
            return image, candidate, tuple(skipped)
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise ValueError(f"none of the {len(self.paths)} images can be read{first}")


def crop(image: Tensor, size: int, config: DataConfig, draws: Sequence[float]) -> Tensor:
    """The training crop that four random numbers choose.

    Args:
        image: uint8 [3, H, W].
        size: side of the crop in pixels. An image smaller than that is enlarged.
        config: how crops are drawn.
        draws: in [0, 1): scale, top, left, mirroring.

    Returns:
        float32 [3, size, size] in [0, 1].
    """
    side = min(image.shape[1:])
    if config.crop_scale is None:
        if side < size:
            image = resize_crop(image / 255, size) * 255
        side = size
    else:
        low, high = config.crop_scale
        side = max(1, round(side * (low + (high - low) * draws[0])))
    top = int(draws[1] * (image.shape[1] - side + 1))
    left = int(draws[2] * (image.shape[2] - side + 1))
    part = image[:, top : top + side, left : left + side].float() / 255
    if side != size:
        part = F.interpolate(part[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    return part.flip(-1) if config.flip and draws[3] < 0.5 else part
