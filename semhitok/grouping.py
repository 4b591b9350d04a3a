"""The arithmetic of flat ids: which group an id lies in, its place there, and back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grouping:
    """T flat ids, shared out among K groups, each of which has consecutive ids and at least one.

    A group is the sub-codebook of a semantic code. All have T / K ids, or, with offsets, sizes of their own.

    Methods take and return int64 tensors on any device and check nothing, so they never wait for a GPU. They work under
    `torch.compile` and `torch.export`.

    Args:
        num_groups: K.
        num_ids: T; without offsets a multiple of K.
        offsets: int64 [K + 1], the first id of every group, and T.
    """

    num_groups: int
    num_ids: int
    offsets: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, offsets: Tensor | None = None) -> Grouping:
        """The grouping of sub-codebooks [K, m, D], or with offsets [T, D]."""
        if offsets is None:
            return cls(rows.shape[0], rows.shape[0] * rows.shape[1])
        return cls(offsets.shape[0] - 1, rows.shape[0], offsets)

    @property
    def size(self) -> int:
        """T // K: the ids of a group, or with offsets the mean."""
        return self.num_ids // self.num_groups

    def first(self, group: Tensor) -> Tensor:
        """The first id of each group [...]; T for group K."""
        return group * self.size if self.offsets is None else self.offsets.to(group.device)[group]

    def group_of(self, ids: Tensor) -> Tensor:
        """The group of each id [...]; a negative number for negative ids, K or more for ids from T on."""
        if self.offsets is None:
            return torch.div(ids, self.size, rounding_mode="floor")
        return torch.searchsorted(self.offsets.to(ids.device), ids, right=True) - 1

    def split(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The group of each id [...], and its place in the group, from 0."""
        group = self.group_of(ids)
        return group, ids - self.first(group)

    def join(self, group: Tensor, place: Tensor) -> Tensor:
        """The id [...] of each place in a group; the inverse of `split`."""
        return self.first(group) + place

    def bounds(self, device: torch.device | str | None = None) -> Tensor:
        """The first id of every group, and T: [K + 1]. Group i has the ids from bounds[i] to bounds[i + 1] - 1."""
        return self.first(torch.arange(self.num_groups + 1, device=device))

    def sizes(self, device: torch.device | str | None = None) -> Tensor:
        """The number of ids of every group: [K]."""
        return self.bounds(device).diff()

    def repeat(self, values: Tensor) -> Tensor:
        """Values of groups [..., K], once for each of their ids: [..., T], of any dtype."""
        repeats = self.size if self.offsets is None else self.sizes(values.device)
        # Given the length of the result, this does not wait for the device.
        return values.repeat_interleave(repeats, -1, output_size=self.num_ids)


def check_offsets(offsets: Sequence[int], num_groups: int, num_ids: int) -> None:
    """Raise ValueError unless `offsets` share out `num_ids` ids among `num_groups` groups, at least one each."""
    if len(offsets) != num_groups + 1:
        raise ValueError(f"offsets: expected {num_groups + 1}, one a semantic code and the end, got {len(offsets)}")
    if offsets[0] != 0 or offsets[-1] != num_ids:
        raise ValueError(f"offsets: expected from 0 to {num_ids}, got from {offsets[0]} to {offsets[-1]}")
    if not all(a < b for a, b in itertools.pairwise(offsets)):
        raise ValueError("offsets: expected each greater than the one before")
