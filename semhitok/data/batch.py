"""A micro-batch of training images, and random numbers that do not depend on how a batch is split.

Everything random about an image follows from a key (the seed, the stage and the step) and from the image's place in the
global batch, never from the process that has it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


def keyed_generator(*key: object) -> Generator:
    """A generator whose numbers follow from the key alone, on every process and machine."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_everything(*key: object) -> None:
    """Seed torch's global generators as well, so that what draws from them needs no place in a checkpoint."""
    torch.manual_seed(keyed_generator(*key).initial_seed())


@dataclass
class Batch:
    """Images that pass through the network at once.

    Attributes:
        images: float32 [b, 3, size, size] in [0, 1].
        first: place of the first of them in the global batch.
        total: images of the global batch.
        key: from which the random numbers follow; set by `to`.
        crops: int64 [b] on the CPU, the numbers of the crops where they are fixed (see `RandomCrops`); None elsewhere.
    """

    images: Tensor
    first: int
    total: int
    key: tuple[object, ...] = ()
    crops: Tensor | None = None

    def to(self, device: torch.device, key: tuple[object, ...]) -> Batch:
        """The batch on `device`, with random numbers that follow from `key`."""
        return Batch(self.images.to(device, non_blocking=True), self.first, self.total, key, self.crops)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Random numbers in [0, 1), [b, *shape]; those of an image depend on its place in the global batch only."""
        numbers = torch.rand(self.total, *shape, generator=keyed_generator(*self.key, purpose))
        return numbers[self.first : self.first + len(self.images)].to(self.images.device)

    def uniform_shared(self, purpose: str, n: int) -> Tensor:
        """Random numbers in [0, 1), [n], the same for all images of the global batch."""
        return torch.rand(n, generator=keyed_generator(*self.key, purpose)).to(self.images.device)
