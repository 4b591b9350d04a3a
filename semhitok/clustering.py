"""Clustering that sets codebooks: k-means, alone or inside every group at once, and how many codes each group gets.

Random numbers are drawn on the generator's device, so a CPU generator gives the same ones for tokens on any device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from semhitok import ops
from semhitok.grouping import Grouping

_POWER_ITERATIONS, _CUT_ITERATIONS = 4, 3  # for a cell's longest axis, and for its two halves


def randint(high: int, size: int, generator: Generator, device: torch.device) -> Tensor:
    """`size` random numbers in [0, high), int64."""
    return torch.randint(high, (size,), generator=generator, device=generator.device).to(device)


def randperm(n: int, generator: Generator, device: torch.device) -> Tensor:
    """The numbers 0 to n - 1 in random order, int64."""
    return torch.randperm(n, generator=generator, device=generator.device).to(device)


def segment_means(x: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means [count, D] of the rows of x [N, D] with equal ids [N], 0 where there are none, and their numbers."""
    sums, counts = ops.segment_sum(x, ids, count)
    return sums / counts.clamp_min(1).unsqueeze(-1), counts


def spherical_kmeans(x: Tensor, k: int, iterations: int, *, generator: Generator) -> Tensor:
    """k unit centres [k, D] of unit vectors x [N, D], by cosine.

    Starts from k distinct vectors of x. A centre that loses all its vectors moves onto one of those that fit their own
    centre worst.

    Raises:
        ValueError: fewer vectors than centres.
    """
    if len(x) < k:
        raise ValueError(f"x: expected at least as many vectors as codes ({k}), got {len(x)}")
    centers = F.normalize(x[randperm(len(x), generator, x.device)[:k]], dim=-1)
    for _ in range(iterations):
        scores, ids = ops.nearest_code(x, centers, "ip")
        sums, counts = ops.segment_sum(x, ids, k)
        worst = x[torch.argsort(scores, stable=True)[:k]]
        empty = counts == 0
        rank = (empty.cumsum(0) - 1).clamp_min(0)
        centers = F.normalize(torch.where(empty.unsqueeze(-1), worst[rank], sums), dim=-1)
    return centers


def grouped_kmeans(
    codebook: Tensor, x: Tensor, group: Tensor, iterations: int, offsets: Tensor | None = None
) -> Tensor:
    """Euclidean k-means of x [N, D] inside every group [N] at once; a code without vectors stays.

    It starts from `codebook`, fp32 [K, m, D] or with offsets [T, D], and returns the codes in that shape.
    """
    grouping = Grouping.of(codebook, offsets)
    for _ in range(iterations):
        if grouping.num_groups == 1:  # many times faster with thousands of codes
            _, place = ops.nearest_code(x, codebook.view(-1, x.shape[-1]), "l2")
        else:
            _, place = ops.nearest_subcode(x, codebook, group, "l2", offsets)
        means, counts = segment_means(x, grouping.join(group, place), grouping.num_ids)
        used = (counts > 0).view(*codebook.shape[:-1], 1)
        codebook = torch.where(used, means.view_as(codebook), codebook)
    return codebook


def tokens_of_groups(group: Tensor, counts: Tensor, owner: Tensor, rank: Tensor, generator: Generator) -> Tensor:
    """The index of a random token for each of n sub-codes, from its own group; distinct while the group has enough.

    Tokens are in groups `group` [N], which have `counts` [K] tokens. Sub-codes [n] are in the groups `owner`, at the
    places `rank`. For a group without tokens the result is the index of a token of some other group.
    """
    shuffle = randperm(len(group), generator, group.device)
    order = shuffle[torch.argsort(group[shuffle], stable=True)]
    start = counts.cumsum(0) - counts
    return order[(start[owner] + rank % counts[owner].clamp_min(1)).clamp_max(len(group) - 1)]


class _Cells(NamedTuple):
    """Every cell that `allocate` made, [C] each: groups first, then pairs of halves."""

    group: Tensor
    parent: Tensor  # the cell it was cut from; -1 for a group
    worth: Tensor  # fp64, the least that a cut saves on the way from the group to this cell's own halves
    untried: Tensor  # bool; where it holds, `worth` is that of the way to the cell, an upper bound


def allocate(z: Tensor, group: Tensor, num_groups: int, total: int) -> tuple[Tensor, Tensor]:
    """How many of `total` codes each group gets, and the codes: put where they lower the squared error most.

    Greedy: every group starts as one cell, with the mean of its tokens as its code. Then the cell whose cut in two
    (2-means, starting across the longest axis) lowers the squared error most is cut, until there are `total` cells.

    In this example, cutting group 0 into {0, 1} and {8, 9} lowers its error from 65 to 1, and cutting group 1 saves 2.
    A third cut would save only 0.5.

    >>> z = torch.tensor([[0.0], [1.0], [8.0], [9.0], [4.0], [6.0]])
    >>> sizes, codes = allocate(z, torch.tensor([0, 0, 0, 0, 1, 1]), num_groups=2, total=4)
    >>> sizes.tolist(), codes.flatten().tolist()
    ([2, 2], [0.5, 8.5, 4.0, 6.0])

    Args:
        z: tokens [N, D] fp32.
        group: [N] int64 in [0, num_groups).
        num_groups: K.
        total: codes, at least K.

    Returns:
        sizes [K] int64, each at least 1, and codes [sum of sizes, D], group by group. The sum is `total`, or less where
        there are fewer different tokens. A group without tokens gets one code, the mean of all tokens.

    Raises:
        ValueError: `total` is less than `num_groups`, or there are no tokens.
    """
    if total < num_groups:
        raise ValueError(f"total: expected at least num_groups {num_groups}, got {total}")
    if not len(z):
        raise ValueError("z: expected at least one token, got none")
    cuts = total - num_groups
    cells, cell = _cut_in_rounds(z, group, num_groups, cuts)
    # Make the best cuts. No cell is worth more than the one it was cut from, nor sorted before it.
    worth = torch.where(cells.untried, 0.0, cells.worth)
    best = worth.sort(descending=True, stable=True).indices[:cuts]
    made = torch.zeros_like(cells.untried).index_put_((best,), worth[best] > 0)
    # The halves of a cell whose cut is not made belong to that cell, and so do theirs.
    dropped = (cells.parent >= 0) & ~made[cells.parent]
    kept = torch.where(dropped, cells.parent, torch.arange(len(made), device=z.device))
    while not torch.equal(kept, up := kept[kept]):
        kept = up
    final = (~made & ~dropped).nonzero().squeeze(1)
    final = final[cells.group[final].argsort(stable=True)]
    place = torch.zeros_like(kept).index_put_((final,), torch.arange(len(final), device=z.device))
    means, counts = segment_means(z, place[kept[cell]], len(final))
    codes = torch.where(counts.unsqueeze(-1) > 0, means, z.mean(0))
    return torch.bincount(cells.group[final], minlength=num_groups), codes


def _cut_in_rounds(z: Tensor, group: Tensor, num_groups: int, cuts: int) -> tuple[_Cells, Tensor]:
    """Try every cut that may be among the best `cuts`: the cells, and the smallest cell [N] that each token is in.

    A cell's turn comes no sooner than that of the worst cell on the way to it, and never once `cuts` better ones are
    known. So all cells that may still count are cut at once, in about as many rounds as the most often cut group has
    levels, without a loop over cells.
    """
    cell, groups = group.clone(), torch.arange(num_groups, device=z.device)
    endless = torch.full_like(groups, torch.inf, dtype=torch.float64)
    cells = _Cells(groups, torch.full_like(groups, -1), endless, torch.ones_like(groups, dtype=torch.bool))
    while cuts:
        known = cells.worth[~cells.untried]
        least = known.topk(cuts).values[-1] if len(known) >= cuts else known.new_zeros(())
        tried = cells.untried & (cells.worth > 0) & (cells.worth >= least)
        if not bool(tried.any()):
            break
        number = tried.cumsum(0) - 1
        tokens = tried[cell].nonzero().squeeze(1)
        gain, half = cut_cells(z[tokens], number[cell[tokens]], int(tried.sum()))
        cut = tried.nonzero().squeeze(1)
        cells.worth[cut] = torch.minimum(cells.worth[cut], gain)
        cells.untried[cut] = False
        divided = gain > 0
        parents = cut[divided].repeat_interleave(2)
        first = torch.full_like(cut, -1)
        first[divided] = len(cells.group) + torch.arange(0, len(parents), 2, device=z.device)
        halves = first[number[cell[tokens]]]
        cell[tokens] = torch.where(halves >= 0, halves + half, cell[tokens])
        new = _Cells(cells.group[parents], parents, cells.worth[parents], torch.ones_like(parents, dtype=torch.bool))
        cells = _Cells(*map(torch.cat, zip(cells, new, strict=True)))
    return cells, cell


def cut_cells(x: Tensor, cell: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut every cell of points x [n, D] in two by 2-means; cell [n] int64 in [0, count).

    Returns:
        gain [count] fp64, by how much the squared error falls, 0 where there is nothing to cut; and half [n] int64, 0
        or 1, the side of every point.
    """
    away = x - segment_means(x, cell, count)[0][cell]
    # The longest axis by power iteration, from the coordinate that varies most.
    spread = ops.segment_sum(away.square(), cell, count)[0]
    axis = F.one_hot(spread.argmax(-1), x.shape[1]).to(x.dtype)
    for _ in range(_POWER_ITERATIONS):
        along = (away * axis[cell]).sum(-1, keepdim=True)
        axis = F.normalize(ops.segment_sum(away * along, cell, count)[0], dim=-1)
    half = ((away * axis[cell]).sum(-1) > 0).long()
    for _ in range(_CUT_ITERATIONS):
        means = _half_means(away, cell, half, count)[0]
        direction, middle = means[:, 1] - means[:, 0], means.sum(1) / 2
        half = (((away - middle[cell]) * direction[cell]).sum(-1) > 0).long()
    means, counts = _half_means(away, cell, half, count)
    gain = (means.double().square().sum(-1) * counts).sum(-1)
    return torch.where((counts > 0).all(-1), gain, 0.0), half


def _half_means(x: Tensor, cell: Tensor, half: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means [count, 2, D] and numbers [count, 2] of the points in both halves of every cell."""
    means, counts = segment_means(x, 2 * cell + half, 2 * count)
    return means.view(count, 2, -1), counts.view(count, 2)
