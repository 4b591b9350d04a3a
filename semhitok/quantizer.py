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
        sem_dim, pix_dim: Ds, Dp.
        decay: of the moving averages in `update`.

    `semantic` is the separately trained `SemanticQuantizer`. `pix_codebook` [K, m, Dp] fp32 holds the sub-codes,
    compared by Euclidean distance. `weights` [K, m] is the moving count of each one's tokens a step; it, `misses`
    [K, m] and `usage` are no part of a checkpoint.
    """

    pix_codebook: Tensor
    weights: Tensor
    misses: Tensor

    def __init__(self, num_codes: int, num_sub_codes: int, sem_dim: int, pix_dim: int, *, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.semantic = SemanticQuantizer(num_codes, sem_dim)
        shape = (num_codes, num_sub_codes)
        self.register_buffer("pix_codebook", torch.randn(*shape, pix_dim))
        self.register_buffer("weights", torch.ones(shape), persistent=False)
        self.register_buffer("misses", torch.zeros(shape, dtype=torch.int64), persistent=False)
        self.usage = CodeUsage(num_codes, num_sub_codes)

    @property
    def num_codes(self) -> int:
        return self.pix_codebook.shape[0]

    @property
    def num_sub_codes(self) -> int:
        return self.pix_codebook.shape[1]

    def forward(self, z_sem: Tensor, z_pix: Tensor) -> HierarchicalOutput:
        """z_sem [..., Ds] unit vectors, z_pix [..., Dp] -> quantised vectors, flat ids and the commitment loss.

        commitment = mean over tokens and dimensions of (z_pix - sg(q_pix))^2.
        """
        q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, self.semantic.codebook, self.pix_codebook, "ip", "l2")
        z_pix = z_pix.float()
        return HierarchicalOutput(q_sem, straight_through(z_pix, q_pix), codes, F.mse_loss(z_pix, q_pix))

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Flat ids [...] -> q_sem [..., Ds], q_pix [..., Dp]; rows of NaN for ids out of range."""
        return ops.hier_lookup(codes, self.semantic.codebook, self.pix_codebook)

    def group_means(self, codes: Tensor) -> Tensor:
        """The mean of the sub-codebook that each flat id lies in, [..., Dp]: what the semantic code knows of pixels."""
        return F.embedding(codes // self.num_sub_codes, self.pix_codebook.mean(1))

    @torch.no_grad()
    def initialize(self, z_pix: Tensor, sem_codes: Tensor, iterations: int = 10, *, generator: Generator) -> None:
        """k-means inside every semantic group at once, on z_pix [N, Dp] with ids sem_codes [N], by the first process.

        A group starts from m of its own tokens. One with fewer than m is filled up from global
        statistics: its mean plus what random tokens differ by from their own group's mean. (From
        one common starting point the sub-codes of a group would tie and stay together.)
        """
        if distributed.rank() == 0:
            self.pix_codebook.copy_(self._fit(z_pix.float(), sem_codes, iterations, generator))
        distributed.broadcast(self.pix_codebook)
        distributed.check_equal(self.pix_codebook, "pix_codebook")
        self.weights.fill_(1)
        self.misses.zero_()

    def _fit(self, z: Tensor, sem_codes: Tensor, iterations: int, generator: Generator) -> Tensor:
        K, m, dim = self.pix_codebook.shape
        sums, counts = ops.segment_sum(z, sem_codes, K)
        centers = sums / counts.clamp_min(1).unsqueeze(-1)
        centers = torch.where(counts.unsqueeze(-1) > 0, centers, z.mean(0))
        shuffle = torch.randperm(len(z), generator=generator, device=generator.device).to(z.device)
        rank = torch.arange(m, device=z.device)
        strangers = shuffle[(_randint(len(z), K, generator, z.device).unsqueeze(1) + rank) % len(z)]
        filled = centers.unsqueeze(1) + (z - centers[sem_codes])[strangers]
        own = z[_tokens_of_groups(sem_codes, counts, m, generator)]
        codebook = torch.where((rank < counts.unsqueeze(1)).unsqueeze(-1), own, filled)
        for _ in range(iterations):
            _, sub = ops.nearest_subcode(z, codebook, sem_codes, "l2")
            sums, used = ops.segment_sum(z, sem_codes * m + sub, K * m)
            means = (sums / used.clamp_min(1).unsqueeze(-1)).view(K, m, dim)
            codebook = torch.where(used.view(K, m, 1) > 0, means, codebook)
        return codebook

    @torch.no_grad()
    def update(self, z_pix: Tensor, codes: Tensor) -> None:
        """Moving averages: w <- decay w + (1 - decay) n, then c <- c + (1 - decay) n / w (mean of its n tokens - c).

        This is the quotient of a moving sum and a moving count, without keeping the sum. A sub-code without tokens
        stays where it is while its weight fades, so that it follows the next ones the faster.
        z_pix [..., Dp], codes [...] the flat ids of the same step.
        """
        K, m, dim = self.pix_codebook.shape
        # Whole tokens are exchanged: fewer bytes than sums of all K * m sub-codes, and the same bits as one process.
        z = distributed.gather_rows(z_pix.float().reshape(-1, dim))
        codes = distributed.gather_rows(codes.reshape(-1))
        # A row for every sub-code that has tokens: there are far fewer of those than K * m.
        present, place = codes.unique(return_inverse=True)
        sums, counts = ops.segment_sum(z, place, len(present))
        all_counts = torch.zeros(K * m, dtype=torch.int64, device=codes.device)
        all_counts[present] = counts
        self.usage.add(all_counts)
        self.weights.lerp_(all_counts.view(K, m).float(), 1 - self.decay)
        rate = (1 - self.decay) / self.weights.view(-1)[present].clamp_min(torch.finfo(torch.float32).tiny)
        book = self.pix_codebook.view(K * m, dim)
        old = book[present]
        book[present] = old + rate.unsqueeze(-1) * (sums - counts.unsqueeze(-1) * old)

    @torch.no_grad()
    def restart(self, z_pix: Tensor, codes: Tensor, window: int, *, generator: Generator) -> int:
        """Move every starved sub-code onto a random token of its own group.

        A sub-code ages by the tokens its group receives while none of them chooses it, so the
        sub-codes of an absent semantic code do not age. At `window` tokens it is moved. z_pix
        [..., Dp], codes [...] flat ids of the same step. Returns the number moved.
        """
        K, m, dim = self.pix_codebook.shape
        z = distributed.gather_rows(z_pix.float().reshape(-1, dim))
        codes = distributed.gather_rows(codes.reshape(-1))
        used = torch.zeros(K * m, dtype=torch.int64, device=codes.device)
        used = used.scatter_add_(0, codes, torch.ones_like(codes)).view(K, m)
        group = used.sum(1, keepdim=True)
        self.misses.copy_(torch.where(used > 0, 0, self.misses + group))
        dead = ((self.misses >= window) & (group > 0)).nonzero(as_tuple=True)
        if len(dead[0]):
            pick = _tokens_of_groups(codes // m, group.squeeze(1), m, generator)
            self.pix_codebook[dead] = z[pick[dead]]
            self.weights[dead] = 1
            self.misses[dead] = 0
        return len(dead[0])


def _randint(high: int, size: int, generator: Generator, device: torch.device) -> Tensor:
    # drawn on the generator's device, so that a CPU generator gives every device the same numbers
    return torch.randint(high, (size,), generator=generator, device=generator.device).to(device)


def _tokens_of_groups(group: Tensor, counts: Tensor, m: int, generator: Generator) -> Tensor:
    """For every group, m of its tokens in random order, repeating when it has fewer: [K, m].

    Rows of absent groups hold some valid index.
    """
    shuffle = torch.randperm(len(group), generator=generator, device=generator.device).to(group.device)
    order = shuffle[torch.argsort(group[shuffle], stable=True)]
    start = counts.cumsum(0) - counts
    rank = torch.arange(m, device=group.device) % counts.clamp_min(1).unsqueeze(1)
    return order[(start.unsqueeze(1) + rank).clamp_max(len(group) - 1)]


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
