"""The semantic-guided hierarchical codebook as modules (paper: SGHC).

`SemanticQuantizer` holds the K semantic codes; `HierarchicalQuantizer` adds the m pixel sub-codes that each of them
owns. Codes are moving averages of their tokens, in place of a codebook loss (VQ-VAE, appendix A.1). `forward` never
changes a codebook: training calls `update`, `restart` and `initialize` by name, so a frozen or evaluated module keeps
its values whatever mode its parent is in. Codebooks and statistics stay in fp32 when a module is cast (`half()`,
`to(dtype)`), and z of any dtype is quantised in fp32.

Under torch.distributed these three see the tokens of all processes and leave the same bits on each. Every process must
call them with the same number of tokens, and with a generator in the same state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from semhitok import clustering, distributed, ops
from semhitok._buffers import ExactBuffers
from semhitok.grouping import Grouping
from semhitok.usage import CodeUsage


class SemanticOutput(NamedTuple):
    """q [..., Ds] with straight-through gradient, codes [...] int64, commitment loss (scalar)."""

    q: Tensor
    codes: Tensor
    commitment: Tensor


class HierarchicalOutput(NamedTuple):
    """q_sem [..., Ds] and q_pix [..., Dp] with straight-through gradient, flat codes [...] int64, commitment loss."""

    q_sem: Tensor
    q_pix: Tensor
    codes: Tensor
    commitment: Tensor


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """q in the forward pass, the identity on z in the backward pass (VQ-VAE, section 3.2)."""
    return z + (q - z).detach()


class SemanticQuantizer(ExactBuffers):
    """K semantic codes on the unit sphere, nearest by cosine, learnt by norm-EMA (BEiT v2).

    Args:
        num_codes: K.
        dim: Ds, dimension of a code.
        decay: weight of the old code in `update`.

    `codebook` [K, Ds] fp32 has unit rows. `misses` [K] int64 counts the tokens since a code was last used; `usage`
    counts the tokens that `update` sees. Neither is part of a checkpoint.
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
        """Unit vectors z [..., Ds] -> quantised vectors, codes, and the mean over all elements of (z - sg(q))^2."""
        z = z.float()
        _, codes = ops.nearest_code(z, self.codebook, "ip")
        q = F.embedding(codes, self.codebook)
        return SemanticOutput(straight_through(z, q), codes, _commitment(z, q))

    @torch.no_grad()
    def initialize(self, z: Tensor, iterations: int = 10, *, generator: Generator | None = None) -> None:
        """Set the codes by spherical k-means on z [N, Ds].

        The first process fits and sends the codes to the others; all check that they hold the same.

        Raises:
            ValueError: fewer vectors than codes, or no generator where there are several processes.
        """
        generator = _generator(generator)
        k = len(self.codebook)
        if distributed.rank() == 0 or len(z) < k:
            self.codebook.copy_(clustering.spherical_kmeans(z.float(), k, iterations, generator=generator))
        distributed.broadcast(self.codebook)
        distributed.check_equal(self.codebook, "codebook")
        self.misses.zero_()

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        """Norm-EMA by unit vectors z [..., Ds] and the codes [...] that `forward` gave for them.

        w <- normalize(decay w + (1 - decay) mean of the code's tokens). The step does not depend on how many tokens a
        code has; a code without tokens stays as it is. Processes exchange one tensor [K, Ds + 1].
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
    def restart(self, z: Tensor, window: int, *, generator: Generator | None = None) -> int:
        """Move every code unused for window * K tokens onto a random token of z [..., Ds], of any process.

        Returns the number of codes moved. Without a generator torch's default one draws, where there is one process.

        Raises:
            ValueError: no generator where there are several processes.
        """
        generator = _generator(generator)
        z = z.float().reshape(-1, z.shape[-1])
        dead = (self.misses >= window * len(self.misses)).nonzero().squeeze(1)
        if len(dead):  # the same on every process
            pick = clustering.randint(len(z) * distributed.world_size(), len(dead), generator, z.device)
            self.codebook[dead] = distributed.pick_rows(z, pick)
            self.misses[dead] = 0
        return len(dead)


class HierarchicalQuantizer(ExactBuffers):
    """Semantic code first, then the nearest sub-code inside the sub-codebook it owns (SGHC).

    In an autoencoder of your own, with an encoder that gives z_sem [..., 16] of norm 1 and z_pix [..., 16]:

        quantizer = HierarchicalQuantizer(num_codes=64, num_sub_codes=8, sem_dim=16, pix_dim=16)
        for images in batches:
            z_sem, z_pix = encoder(images)
            q_sem, q_pix, codes, commitment = quantizer(z_sem, z_pix)
            loss = F.mse_loss(decoder(q_sem, q_pix), images) + 0.25 * commitment
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            quantizer.update(z_pix, codes, z_sem=z_sem)
            quantizer.restart(z_pix, codes, window=100, z_sem=z_sem)

    SemHiTok trains `semantic` alone first and then freezes it: it leaves out `z_sem=`, and z_sem has no gradient.

    Args:
        num_codes: K semantic codes.
        num_sub_codes: m pixel sub-codes of each.
        sem_dim: Ds, the values of a semantic code.
        pix_dim: Dp, those of a sub-code.
        decay: of the moving averages in `update`.
        adaptive: every semantic code owns m_i >= 1 sub-codes, K * m in all. The sizes are even until `initialize` sets
            them, and stay the same afterwards.

    `semantic` is a `SemanticQuantizer`. `pix_codebook` [K, m, Dp] fp32 holds the sub-codes, compared by Euclidean
    distance. `weights` [K, m] fp32 is the moving count of each one's tokens a step. `weights`, `misses` [K, m] int64
    and `usage` are not part of a checkpoint. With `adaptive` they are flat, [K * m, Dp] and [K * m], and `offsets`
    [K + 1] int64, which is part of a checkpoint, says that sub-codebook i is rows offsets[i] to offsets[i + 1] - 1.
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
    def grouping(self) -> Grouping:
        """Which flat codes belong to which semantic code."""
        return Grouping.of(self.pix_codebook, self.offsets)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.grouping.num_groups

    @property
    def num_sub_codes(self) -> int:
        """m; the mean of the sizes, where they are adaptive."""
        return self.grouping.size

    @property
    def sizes(self) -> Tensor:
        """m_i, the number of sub-codes of every semantic code, [K] int64."""
        return self.grouping.sizes(self.pix_codebook.device)

    def split(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Flat codes [...] -> semantic codes i and sub-codes j, without checks."""
        return self.grouping.split(codes)

    def join(self, i: Tensor, j: Tensor) -> Tensor:
        """Semantic codes i and sub-codes j -> flat codes [...], without checks."""
        return self.grouping.join(i, j)

    def forward(self, z_sem: Tensor, z_pix: Tensor) -> HierarchicalOutput:
        """Unit vectors z_sem [..., Ds] and z_pix [..., Dp] -> quantised vectors, flat codes and the commitment loss.

        The commitment loss is the mean over tokens and dimensions of (z_pix - sg(q_pix))^2. Where z_sem requires a
        gradient, that of `SemanticQuantizer` is added and q_sem passes its gradient to z_sem.
        """
        z_sem, z_pix = z_sem.float(), z_pix.float()
        books = self.semantic.codebook, self.pix_codebook
        q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, *books, "ip", "l2", self.offsets)
        commitment = _commitment(z_pix, q_pix)
        if z_sem.requires_grad:
            commitment = commitment + _commitment(z_sem, q_sem)
            q_sem = straight_through(z_sem, q_sem)
        return HierarchicalOutput(q_sem, straight_through(z_pix, q_pix), codes, commitment)

    def within(self, sem_codes: Tensor, z_pix: Tensor) -> HierarchicalOutput:
        """What `forward` returns for tokens whose semantic codes [...] int64 are known."""
        z_pix = z_pix.float()
        _, sub = ops.nearest_subcode(z_pix, self.pix_codebook, sem_codes, "l2", self.offsets)
        codes = self.join(sem_codes, sub)
        q_sem, q_pix = self.lookup(codes)
        return HierarchicalOutput(q_sem, straight_through(z_pix, q_pix), codes, _commitment(z_pix, q_pix))

    def lookup(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Flat codes [...] -> q_sem [..., Ds], q_pix [..., Dp]; rows of NaN for codes out of range."""
        return ops.hier_lookup(codes, self.semantic.codebook, self.pix_codebook, self.offsets)

    def group_means(self, codes: Tensor) -> Tensor:
        """The mean of the sub-codebook that each flat code is in, [..., Dp]: what its semantic code says of pixels."""
        if self.offsets is None:
            means = self.pix_codebook.mean(1)
        else:
            means, _ = clustering.segment_means(self.pix_codebook, self._places()[0], self.num_codes)
        return F.embedding(self.split(codes)[0], means)

    @torch.no_grad()
    def initialize(
        self, z_pix: Tensor, sem_codes: Tensor, iterations: int = 10, *, generator: Generator | None = None
    ) -> None:
        """Set the sub-codes by k-means inside every semantic group, fitted by the first process.

        Tokens are z_pix [N, Dp], in the groups sem_codes [N] int64. `generator` is as in `SemanticQuantizer.restart`.
        A group starts from m of its own tokens. Adaptive sizes are set first, by `clustering.allocate`, and k-means
        starts from its codes. Codes for which a group has no tokens start at the group's mean plus the difference of a
        random token from the mean of its own group: sub-codes that started from one point would tie and stay together.
        """
        generator = _generator(generator)
        if distributed.rank() == 0:
            z = z_pix.float()
            start = self._start(z, sem_codes, generator)
            self.pix_codebook.copy_(clustering.grouped_kmeans(start, z, sem_codes, iterations, self.offsets))
        for name in ("pix_codebook", "offsets"):
            if (tensor := getattr(self, name)) is not None:
                distributed.broadcast(tensor)
                distributed.check_equal(tensor, name)
        self.weights.fill_(1)
        self.misses.zero_()

    def _start(self, z: Tensor, sem_codes: Tensor, generator: Generator) -> Tensor:
        """Where k-means starts, in the shape of `pix_codebook`. Sets adaptive sizes."""
        total, K = self.weights.numel(), self.num_codes
        centers, counts = clustering.segment_means(z, sem_codes, K)
        centers = torch.where(counts.unsqueeze(-1) > 0, centers, z.mean(0))
        shuffle = clustering.randperm(len(z), generator, z.device)
        strangers = clustering.randint(len(z), K, generator, z.device)
        if self.offsets is None:
            owner, rank = self._places()
            own, have = z[clustering.tokens_of_groups(sem_codes, counts, owner, rank, generator)], counts
        else:
            have, found = clustering.allocate(z, sem_codes, K, total)
            lacking = total - len(found)
            sizes = have + lacking // K + (torch.arange(K, device=z.device) < lacking % K)
            self.offsets[1:] = sizes.cumsum(0)
            owner, rank = self._places()
            own = found[((have.cumsum(0) - have)[owner] + rank).clamp_max(len(found) - 1)]
        others = shuffle[(strangers[owner] + rank) % len(z)]
        filled = centers[owner] + (z[others] - centers[sem_codes[others]])
        return torch.where((rank < have[owner]).unsqueeze(-1), own, filled).view_as(self.pix_codebook)

    def _places(self) -> tuple[Tensor, Tensor]:
        """The semantic code and the sub-code of every flat code, [K * m] each."""
        return self.split(torch.arange(self.weights.numel(), device=self.weights.device))

    def _repeat(self, values: Tensor) -> Tensor:
        """Values [K] of semantic codes, for each of their sub-codes: in the shape of `weights`."""
        return self.grouping.repeat(values).view_as(self.weights)

    @torch.no_grad()
    def update(self, z_pix: Tensor, codes: Tensor, *, z_sem: Tensor | None = None) -> None:
        """Moving averages, by z_pix [..., Dp] and the codes [...] that `forward` gave for them.

        w <- decay w + (1 - decay) n, then c <- c + (1 - decay) n / w (mean of its n tokens - c). This is the quotient
        of a moving sum and a moving count, without keeping the sum. A sub-code without tokens stays where it is while
        its weight fades, so that it follows the next ones faster. z_sem [..., Ds] updates the semantic codes too.
        """
        if z_sem is not None:
            self.semantic.update(z_sem, self.split(codes)[0])
        z, codes = _gathered(z_pix, codes)
        # One row for every sub-code that has tokens: there are far fewer of those than K * m.
        present, place = codes.unique(return_inverse=True)
        sums, counts = ops.segment_sum(z, place, len(present))
        all_counts = torch.zeros_like(self.misses).flatten()
        all_counts[present] = counts
        self.usage.offsets = self.offsets  # loading or moving the module may have replaced them
        self.usage.add(all_counts)
        self.weights.lerp_(all_counts.view_as(self.weights).float(), 1 - self.decay)
        rate = (1 - self.decay) / self.weights.view(-1)[present].clamp_min(torch.finfo(torch.float32).tiny)
        book = self.pix_codebook.view(-1, z.shape[-1])
        old = book[present]
        book[present] = old + rate.unsqueeze(-1) * (sums - counts.unsqueeze(-1) * old)

    @torch.no_grad()
    def restart(
        self,
        z_pix: Tensor,
        codes: Tensor,
        window: int,
        *,
        z_sem: Tensor | None = None,
        generator: Generator | None = None,
    ) -> int:
        """Move every starved sub-code onto a random token of its own group.

        A sub-code ages by the tokens that its group receives while none of them chooses it, so the sub-codes of an
        absent semantic code do not age. It is moved at the age of `window` tokens; where sizes are adaptive, of
        `window` * m_i: there sub-codes are where errors are large, not where tokens are many, and rare ones matter.

        Arguments are as in `update`; generators, the result and errors as in `SemanticQuantizer.restart`.
        """
        generator = _generator(generator)
        z, codes = _gathered(z_pix, codes)
        semantic, _ = self.split(codes)
        counts = torch.zeros_like(self.semantic.misses).scatter_add_(0, semantic, torch.ones_like(codes))
        self.misses += self._repeat(counts)
        self.misses.view(-1)[codes] = 0
        limit = window if self.offsets is None else window * self._repeat(self.sizes)
        dead = ((self.misses >= limit) & (self._repeat(counts) > 0)).view(-1).nonzero().squeeze(1)
        if len(dead):
            pick = clustering.tokens_of_groups(semantic, counts, *self.split(dead), generator)
            self.pix_codebook.view(-1, z.shape[-1])[dead] = z[pick]
            self.weights.view(-1)[dead] = 1
            self.misses.view(-1)[dead] = 0
        return len(dead) + (0 if z_sem is None else self.semantic.restart(z_sem, window, generator=generator))


def _commitment(z: Tensor, q: Tensor) -> Tensor:
    """The mean of (z - sg(q))^2; 0 where there are no tokens, of which a mean would be NaN."""
    return F.mse_loss(z, q) if z.numel() else z.sum()


def _gathered(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [N, D] fp32 and codes [N] of all processes.

    Whole tokens are exchanged: fewer bytes than sums of all K * m sub-codes, and the same bits as one process.
    """
    z, codes = z.float().reshape(-1, z.shape[-1]), codes.reshape(-1)
    return distributed.gather_rows(z), distributed.gather_rows(codes)


def _generator(generator: Generator | None) -> Generator:
    if generator is None and distributed.world_size() > 1:
        raise ValueError("generator: expected one in the same state on every process, got None")
    return torch.default_generator if generator is None else generator
