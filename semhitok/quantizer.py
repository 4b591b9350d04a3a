"""The semantic-guided hierarchical codebook as modules (paper: SGHC).

`SemanticQuantizer` holds the K semantic codes; `HierarchicalQuantizer` adds the m pixel sub-codes each of them owns.
Both follow their tokens by moving averages, which stand for the codebook loss (VQ-VAE, appendix A.1). `forward` never
changes a codebook: training calls `update`, `initialize` and `restart` by name, so a frozen or evaluated module keeps
its bytes whatever mode its parent is in.

Under torch.distributed those three see the tokens of all processes, and leave the same bits on each. Every process must
call them with the same number of tokens, and with generators in the same state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semhitok import distributed, ops
from semhitok.usage import CodeUsage

_POWER_ITERATIONS, _CUT_ITERATIONS = 4, 3  # of `allocate`, for a cell's longest axis and its two halves


class SemanticOutput(NamedTuple):
    """q [..., Ds] with straight-through gradient, codes [...] int64, commitment loss (scalar)."""

    q: Tensor
    codes: Tensor
    commitment: Tensor


class HierarchicalOutput(NamedTuple):
    """q_sem [..., Ds], q_pix [..., Dp] (straight-through), flat codes [...], commitment loss (scalar)."""

    q_sem: Tensor
    q_pix: Tensor
    codes: Tensor
    commitment: Tensor


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """q in the forward pass, the identity on z in the backward pass (VQ-VAE, section 3.2)."""
    return z + (q - z).detach()


class SemanticQuantizer(nn.Module):
    """K semantic codes on the unit sphere, nearest by cosine, learnt by norm-EMA (BEiT v2).

    Args:
        num_codes: K.
        dim: Ds, dimension of a code.
        decay: weight of the old code in `update`.

    `codebook` [K, Ds] fp32 has unit rows. `misses` [K] int64 counts the tokens since a code's last
    use; `usage` counts the tokens that `update` sees. Neither is part of a checkpoint.
    """

    codebook: Tensor
    misses: Tensor

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook", F.normalize(torch.randn(num_codes, dim), dim=-1))
        self.register_buffer("misses", torch.zeros(num_codes, dtype=torch.int64), persistent=False)
        self.usage = CodeUsage(num_codes, 1)

    def forward(self, z: Tensor) -> SemanticOutput:
        """z [..., Ds], unit vectors -> quantised vectors, ids and sum over Ds of (z - sg(q))^2."""
        _, codes = ops.nearest_code(z, self.codebook, "ip")
        q = F.embedding(codes, self.codebook)
        commitment = (z - q).square().sum(-1).mean()
        return SemanticOutput(straight_through(z, q), codes, commitment)

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 10, *, generator: Generator) -> None:
        """Spherical k-means on z [N, Ds], the same on every process; ValueError with fewer vectors than codes.

        Fitted by the first process alone and sent to the others, which check what they hold.
        """
        if distributed.rank() == 0 or len(z) < len(self.codebook):
            self.codebook.copy_(spherical_kmeans(z.float(), len(self.codebook), iterations, generator=generator))
        distributed.broadcast(self.codebook)
        distributed.check_equal(self.codebook, "codebook")
        self.misses.zero_()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Norm-EMA: w <- normalize(decay w + (1 - decay) mean of the code's tokens).

        The step does not depend on how many tokens a code has; a code without any stays as it is.
        z [..., Ds] unit vectors, codes [...] their ids. Processes exchange one tensor [K, Ds + 1].
        """
        z, codes = z.float().reshape(-1, z.shape[-1]), codes.reshape(-1)
        sums, counts = ops.segment_sum(z, codes, len(self.codebook))
        if distributed.world_size() > 1:
            # Counts are exact in fp32 up to 2**24 tokens of one code in one step.
            both = distributed.all_reduce(torch.cat([sums, counts.unsqueeze(-1).float()], dim=-1))
            sums, counts = both[:, :-1], both[:, -1].long()
        self.usage.add(counts)
        means = sums / counts.clamp_min(1).unsqueeze(-1)
        moved = F.normalize(self.decay * self.codebook + (1 - self.decay) * means, dim=-1)
        used = counts > 0
        self.codebook.copy_(torch.where(used.unsqueeze(-1), moved, self.codebook))
        self.misses.copy_(torch.where(used, 0, self.misses + counts.sum()))

    @torch.no_grad()
    def restart(self, z: Tensor, window: int, *, generator: Generator) -> int:
        """Move every code unused for window * K tokens onto a random token of z [..., Ds], of any process.

        Returns the number of codes moved.
        """
        z = z.float().reshape(-1, z.shape[-1])
        dead = (self.misses >= window * len(self.misses)).nonzero().squeeze(1)
        if len(dead):  # the same on every process
            pick = _randint(len(z) * distributed.world_size(), len(dead), generator, z.device)
            self.codebook[dead] = distributed.pick_rows(z, pick)
            self.misses[dead] = 0
        return len(dead)


class HierarchicalQuantizer(nn.Module):
    """Semantic code first, then the nearest sub-code inside the sub-codebook it owns (SGHC).

    Args:
        num_codes: K semantic codes.
        num_sub_codes: m pixel sub-codes under each.
        sem_dim: Ds.
        pix_dim: Dp.
        decay: of the moving averages in `update`.
        adaptive: every semantic code owns m_i >= 1 sub-codes, K * m in all. The sizes are even at first; `initialize`
            sets them. After that they stay.

    `semantic` is the separately trained `SemanticQuantizer`. `pix_codebook` [K, m, Dp] fp32 holds the sub-codes,
    compared by Euclidean distance. `weights` [K, m] is the moving count of each one's tokens a step; it, `misses`
    [K, m] and `usage` are no part of a checkpoint. An adaptive quantizer has them flat, [K * m, Dp] and [K * m], and
    `offsets` [K + 1] int64, which is part of a checkpoint: sub-codebook i is rows offsets[i] to offsets[i + 1] - 1.
    """

    pix_codebook: Tensor
    offsets: Tensor | None
    weights: Tensor
    misses: Tensor

    def __init__(
        self,
        num_codes: int,
        num_sub_codes: int,
        sem_dim: int,
        pix_dim: int,
        *,
        decay: float = 0.99,
        adaptive: bool = False,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.semantic = SemanticQuantizer(num_codes, sem_dim)
        shape = (num_codes * num_sub_codes,) if adaptive else (num_codes, num_sub_codes)
        self.register_buffer("pix_codebook", torch.randn(*shape, pix_dim))
        self.register_buffer("offsets", torch.arange(num_codes + 1) * num_sub_codes if adaptive else None)
        self.register_buffer("weights", torch.ones(shape), persistent=False)
        self.register_buffer("misses", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.usage = CodeUsage(num_codes, num_sub_codes)

    @property
    def num_codes(self) -> int:
        return self.semantic.codebook.shape[0]

    @property
    def num_sub_codes(self) -> int:
        """m; the mean of the sizes, where they are adaptive."""
        return self.weights.numel() // self.num_codes

    @property
    def sizes(self) -> Tensor:
        """m_i, the number of sub-codes of every semantic code, [K] int64."""
        if self.offsets is None:
            return torch.full_like(self.semantic.misses, self.num_sub_codes)
        return self.offsets.diff()

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Flat ids [...] -> semantic codes i and sub-codes j; nothing is checked."""
        if self.offsets is None:
            return codes // self.num_sub_codes, codes % self.num_sub_codes
        i = torch.searchsorted(self.offsets, codes, right=True) - 1
        return i, codes - self.offsets[i]

    def join(self, i: Tensor, j: Tensor) -> Tensor:
        """Flat ids [...] of semantic codes i and sub-codes j; nothing is checked."""
        return (i * self.num_sub_codes if self.offsets is None else self.offsets[i]) + j

    def _for_each(self, values: Tensor) -> Tensor:
        """values [K] of semantic codes, for each of their sub-codes: like `weights`."""
        if self.offsets is None:
            return values.unsqueeze(1).expand_as(self.weights)
        # told how many there will be, it does not wait for the device
        return torch.repeat_interleave(values, self.offsets.diff(), output_size=len(self.weights))

    def _places(self) -> tuple[Tensor, Tensor]:
        """Of every flat id [K * m] its semantic code and its sub-code."""
        owner = self._for_each(torch.arange(self.num_codes, device=self.weights.device)).reshape(-1)
        return owner, torch.arange(len(owner), device=owner.device) - self.join(owner, torch.zeros_like(owner))

    def forward(self, z_sem: Tensor, z_pix: Tensor) -> HierarchicalOutput:
        """z_sem [..., Ds] unit vectors, z_pix [..., Dp] -> quantised vectors, flat ids and the commitment loss.

        commitment = mean over tokens and dimensions of (z_pix - sg(q_pix))^2.
        """
        books = self.semantic.codebook, self.pix_codebook
        q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, *books, "ip", "l2", self.offsets)
        z_pix = z_pix.float()
        return HierarchicalOutput(q_sem, straight_through(z_pix, q_pix), codes, F.mse_loss(z_pix, q_pix))

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Flat ids [...] -> q_sem [..., Ds], q_pix [..., Dp]; rows of NaN for ids out of range."""
        return ops.hier_lookup(codes, self.semantic.codebook, self.pix_codebook, self.offsets)

    def group_means(self, codes: Tensor) -> Tensor:
        """The mean of the sub-codebook that each flat id lies in, [..., Dp]: what the semantic code knows of pixels."""
        if self.offsets is None:
            means = self.pix_codebook.mean(1)
        else:
            sums, sizes = ops.segment_sum(self.pix_codebook, self._places()[0], self.num_codes)
            means = sums / sizes.unsqueeze(-1)
        return F.embedding(self.split(codes)[0], means)

    @torch.no_grad()
    def initialize(self, z_pix: Tensor, sem_codes: Tensor, iterations: int = 10, *, generator: Generator) -> None:
        """k-means inside every semantic group at once, on z_pix [N, Dp] with ids sem_codes [N], by the first process.

        Adaptive sizes are set first, by `allocate`, and k-means starts from its codes. Else a group starts from m of
        its own tokens. Codes for which a group has no tokens are filled up from global statistics: its mean plus what
        random tokens differ by from their own group's mean. (From one common starting point the sub-codes of a group
        would tie and stay together.)
        """
        if distributed.rank() == 0:
            z = z_pix.float()
            start = self._start(z, sem_codes, generator)
            self.pix_codebook.copy_(self._fit(start, z, sem_codes, iterations))
        for name in ("pix_codebook", "offsets"):
            if (tensor := getattr(self, name)) is not None:
                distributed.broadcast(tensor)
                distributed.check_equal(tensor, name)
        self.weights.fill_(1)
        self.misses.zero_()

    def _start(self, z: Tensor, sem_codes: Tensor, generator: Generator) -> Tensor:
        """Where k-means starts, as `pix_codebook`. Sets adaptive sizes."""
        total, K = self.weights.numel(), self.num_codes
        sums, counts = ops.segment_sum(z, sem_codes, K)
        centers = sums / counts.clamp_min(1).unsqueeze(-1)
        centers = torch.where(counts.unsqueeze(-1) > 0, centers, z.mean(0))
        shuffle = torch.randperm(len(z), generator=generator, device=generator.device).to(z.device)
        strangers = _randint(len(z), K, generator, z.device)
        if self.offsets is None:
            owner, rank = self._places()
            own, have = z[_tokens_of_groups(sem_codes, counts, owner, rank, generator)], counts
        else:
            have, found = allocate(z, sem_codes, K, total)
            lacking = total - len(found)
            sizes = have + lacking // K + (torch.arange(K, device=z.device) < lacking % K)
            self.offsets[1:] = sizes.cumsum(0)
            owner, rank = self._places()
            own = found[((have.cumsum(0) - have)[owner] + rank).clamp_max(len(found) - 1)]
        others = shuffle[(strangers[owner] + rank) % len(z)]
        filled = centers[owner] + (z[others] - centers[sem_codes[others]])
        return torch.where((rank < have[owner]).unsqueeze(-1), own, filled).view_as(self.pix_codebook)

    def _fit(self, codebook: Tensor, z: Tensor, sem_codes: Tensor, iterations: int) -> Tensor:
        for _ in range(iterations):
            _, sub = ops.nearest_subcode(z, codebook, sem_codes, "l2", self.offsets)
            sums, used = ops.segment_sum(z, self.join(sem_codes, sub), self.weights.numel())
            means = (sums / used.clamp_min(1).unsqueeze(-1)).view_as(codebook)
            codebook = torch.where(used.view(self.weights.shape).unsqueeze(-1) > 0, means, codebook)
        return codebook

    @torch.no_grad()
    def update(self, z_pix: Tensor, codes: Tensor) -> None:
        """Moving averages: w <- decay w + (1 - decay) n, then c <- c + (1 - decay) n / w (mean of its n tokens - c).

        This is the quotient of a moving sum and a moving count, without keeping the sum. A sub-code without tokens
        stays where it is while its weight fades, so that it follows the next ones the faster.
        z_pix [..., Dp], codes [...] the flat ids of the same step.
        """
        total, dim = self.weights.numel(), self.pix_codebook.shape[-1]
        # Whole tokens are exchanged: fewer bytes than sums of all K * m sub-codes, and the same bits as one process.
        z = distributed.gather_rows(z_pix.float().reshape(-1, dim))
        codes = distributed.gather_rows(codes.reshape(-1))
        # A row for every sub-code that has tokens: there are far fewer of those than K * m.
        present, place = codes.unique(return_inverse=True)
        sums, counts = ops.segment_sum(z, place, len(present))
        all_counts = torch.zeros(total, dtype=torch.int64, device=codes.device)
        all_counts[present] = counts
        self.usage.offsets = self.offsets  # loading or moving the module may have put others there
        self.usage.add(all_counts)
        self.weights.lerp_(all_counts.view_as(self.weights).float(), 1 - self.decay)
        rate = (1 - self.decay) / self.weights.view(-1)[present].clamp_min(torch.finfo(torch.float32).tiny)
        book = self.pix_codebook.view(total, dim)
        old = book[present]
        book[present] = old + rate.unsqueeze(-1) * (sums - counts.unsqueeze(-1) * old)

    @torch.no_grad()
    def restart(self, z_pix: Tensor, codes: Tensor, window: int, *, generator: Generator) -> int:
        """Move every starved sub-code onto a random token of its own group.

        A sub-code ages by the tokens its group receives while none of them chooses it, so the
        sub-codes of an absent semantic code do not age. At `window` tokens it is moved. z_pix
        [..., Dp], codes [...] flat ids of the same step. Returns the number moved.

        Where sizes are adaptive, `window` * m_i tokens: sub-codes went where errors are large, not where tokens are
        many, so that rare ones have their use.
        """
        dim = self.pix_codebook.shape[-1]
        z = distributed.gather_rows(z_pix.float().reshape(-1, dim))
        codes = distributed.gather_rows(codes.reshape(-1))
        semantic, _ = self.split(codes)
        counts = torch.zeros_like(self.semantic.misses).scatter_add_(0, semantic, torch.ones_like(codes))
        self.misses += self._for_each(counts)
        self.misses.view(-1)[codes] = 0
        limit = window if self.offsets is None else window * self._for_each(self.sizes)
        dead = ((self.misses >= limit) & (self._for_each(counts) > 0)).view(-1).nonzero().squeeze(1)
        if len(dead):
            pick = _tokens_of_groups(semantic, counts, *self.split(dead), generator)
            self.pix_codebook.view(-1, dim)[dead] = z[pick]
            self.weights.view(-1)[dead] = 1
            self.misses.view(-1)[dead] = 0
        return len(dead)


def _randint(high: int, size: int, generator: Generator, device: torch.device) -> Tensor:
    # drawn on the generator's device, so that a CPU generator gives every device the same numbers
    return torch.randint(high, (size,), generator=generator, device=generator.device).to(device)


def _tokens_of_groups(group: Tensor, counts: Tensor, owner: Tensor, rank: Tensor, generator: Generator) -> Tensor:
    """For some sub-codes a token of their group each, different ones while there are.

    group [N], counts [K]: of the tokens. owner, rank [n]: of each sub-code its group, and its number there. A group
    without tokens gets some index in [0, N).
    """
    shuffle = torch.randperm(len(group), generator=generator, device=generator.device).to(group.device)
    order = shuffle[torch.argsort(group[shuffle], stable=True)]
    start = counts.cumsum(0) - counts
    return order[(start[owner] + rank % counts[owner].clamp_min(1)).clamp_max(len(group) - 1)]


def allocate(z: Tensor, group: Tensor, num_groups: int, total: int) -> tuple[Tensor, Tensor]:
    """How many of `total` codes each group of tokens gets, and the codes: where they lower the distortion most.

    Every group starts as one cell, with the mean of its tokens as its code. Then always that cell is cut in two whose
    cut lowers the squared error most (2-means, from a cut across the longest axis), until there are `total` cells.

    Here cells are cut in rounds, all of them at once that may still be among those to cut: a cell's turn comes no
    sooner than that of the worst cell on the way to it, and once `total` - `num_groups` better ones are known, never.
    So there are about as many rounds as the most often cut group has levels, and no loop over cells.

    Args:
        z: tokens [N, D] fp32.
        group: [N] int64 in [0, num_groups).
        total: codes, at least num_groups.
    Returns:
        sizes [num_groups] int64, at least 1 each, and codes [sum of sizes, D], those of the first group first. The sum
        is `total`, but where there are not that many different tokens.
    Raises:
        ValueError: `total` is less than `num_groups`, or there are no tokens.
    """
    if total < num_groups:
        raise ValueError(f"total: expected at least num_groups {num_groups}, got {total}")
    if not len(z):
        raise ValueError("z: expected at least one token, got none")
    device, cuts = z.device, total - num_groups
    cell = group.clone()  # of every token, the smallest cell it is in
    # Of every cell: its group, the cell it was cut from, whether it was tried, and the least that a cut saves on the
    # way from its group to its own halves (untried: to itself).
    owner = torch.arange(num_groups, device=device)
    parent = torch.full_like(owner, -1)
    untried = torch.ones_like(owner, dtype=torch.bool)
    worth = torch.full((num_groups,), torch.inf, dtype=torch.float64, device=device)
    while cuts:
        known = worth[~untried]
        least = known.topk(cuts).values[-1] if len(known) >= cuts else worth.new_zeros(())
        tried = untried & (worth > 0) & (worth >= least)
        if not bool(tried.any()):
            break
        number = tried.cumsum(0) - 1
        tokens = tried[cell].nonzero().squeeze(1)
        gain, upper = _cut(z[tokens], number[cell[tokens]], int(tried.sum()))
        cells = tried.nonzero().squeeze(1)
        worth[cells] = torch.minimum(worth[cells], gain)
        untried[cells] = False
        split = gain > 0
        both = cells[split].repeat_interleave(2)
        first = torch.full_like(cells, -1)
        first[split] = len(owner) + torch.arange(0, len(both), 2, device=device)
        halves = first[number[cell[tokens]]]
        cell[tokens] = torch.where(halves >= 0, halves + upper, cell[tokens])
        owner, parent = torch.cat([owner, owner[both]]), torch.cat([parent, both])
        worth, untried = torch.cat([worth, worth[both]]), torch.cat([untried, torch.ones_like(both, dtype=torch.bool)])
    # The best cuts are made. No cell is worth more than the one it was cut from, nor comes before it.
    worth = torch.where(untried, 0.0, worth)
    best = worth.sort(descending=True, stable=True).indices[:cuts]
    made = torch.zeros_like(untried).index_put_((best,), worth[best] > 0)
    # What was cut from a cell that stays whole belongs to that cell.
    inside = (parent >= 0) & ~made[parent]
    whole = torch.where(inside, parent, torch.arange(len(owner), device=device))
    while not torch.equal(whole, up := whole[whole]):
        whole = up
    cells = (~made & ~inside).nonzero().squeeze(1)
    cells = cells[owner[cells].argsort(stable=True)]
    place = torch.zeros_like(owner).index_put_((cells,), torch.arange(len(cells), device=device))
    sums, counts = ops.segment_sum(z, place[whole[cell]], len(cells))
    codes = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp_min(1).unsqueeze(-1), z.mean(0))
    return torch.bincount(owner[cells], minlength=num_groups), codes


def _cut(x: Tensor, cell: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut every cell of points x [n, D] in two by 2-means; cell [n] in [0, count).

    Returns:
        gain [count] float64, by how much the squared error falls, 0 where there is nothing to cut; and half [n] int64,
        0 or 1, the side of every point.
    """
    sums, counts = ops.segment_sum(x, cell, count)
    away = x - (sums / counts.clamp_min(1).unsqueeze(-1))[cell]
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
    sums, counts = ops.segment_sum(x, 2 * cell + half, 2 * count)
    means = sums / counts.clamp_min(1).unsqueeze(-1)
    return means.view(count, 2, -1), counts.view(count, 2)


def spherical_kmeans(x: Tensor, k: int, iterations: int, *, generator: Generator) -> Tensor:
    """k unit centres of the unit vectors x [N, D] by cosine: [k, D].

    Starts from k distinct vectors of x; a centre that loses all its vectors moves onto one of the
    vectors that fit their own centre worst.
    """
    if len(x) < k:
        raise ValueError(f"x: expected at least as many vectors as codes ({k}), got {len(x)}")
    start = torch.randperm(len(x), generator=generator, device=generator.device)[:k]
    centers = F.normalize(x[start.to(x.device)], dim=-1)
    for _ in range(iterations):
        scores, ids = ops.nearest_code(x, centers, "ip")
        sums, counts = ops.segment_sum(x, ids, k)
        worst = x[torch.argsort(scores, stable=True)[:k]]
        empty = counts == 0
        rank = (empty.cumsum(0) - 1).clamp_min(0)
        centers = F.normalize(torch.where(empty.unsqueeze(-1), worst[rank], sums), dim=-1)
    return centers
