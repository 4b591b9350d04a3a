"""How codes are used: which occur, and how evenly, by exact counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from semhitok import ops
from semhitok.grouping import Grouping
from semhitok.vocabulary import Vocabulary


class GroupUsage(NamedTuple):
    """For every semantic code, [K] float64 each: tokens; sub-codes that occur; all sub-codes; perplexity of these."""

    tokens: torch.Tensor
    used: torch.Tensor
    sizes: torch.Tensor
    perplexity: torch.Tensor


class CodeUsage:
    """Which codes occur and how evenly, from exact counts of every flat id.

    Usage is the share of codes that occur, in [0, 1]. Perplexity is exp(entropy) of the codes' frequencies: the number
    of equally frequent codes that would be as varied. Both are 0 before the first id. There are three views:

        semantic   of the K semantic codes
        flat       of the K * m flat ids
        group      of the sub-codes inside their groups: the share of sub-codes that occur, over the groups of semantic
                   codes that occur; the perplexity of j given i, in [1, m], averaged over groups weighted by tokens

    Args:
        num_codes: K.
        num_sub_codes: m; with offsets, the mean.
        device: of the counts.
        offsets: [K + 1] integers: sub-codebook i has the flat ids from offsets[i] to offsets[i + 1] - 1.

    Attributes:
        counts: [K, m] int64, times each flat id occurred; with offsets in the same shape, but in the order of flat ids.
            Counts of several processes add up.
        offsets: as above, or None; may be replaced.
    """

    def __init__(
        self,
        num_codes: int,
        num_sub_codes: int,
        device: torch.device | str | None = None,
        offsets: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        self.vocabulary = Vocabulary(num_codes, num_sub_codes)
        self.counts = torch.zeros(num_codes, num_sub_codes, dtype=torch.int64, device=device)
        self.offsets = None if offsets is None else torch.as_tensor(offsets)

    def update(self, codes: torch.Tensor) -> None:
        """Count flat ids: integers of any shape in [0, K * m), on any device; if others, ValueError and no count."""
        flat = self.vocabulary.check(codes).flatten().to(self.counts.device)
        self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)

    def add(self, counts: torch.Tensor) -> None:
        """Add int64 counts of the K * m flat ids, of any shape, counted elsewhere."""
        self.counts += counts.to(self.counts.device).view_as(self.counts)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts.zero_()

    def summary(self) -> dict[str, dict[str, float]]:
        """`{"semantic" | "flat" | "group": {"usage", "perplexity"}}` of the ids counted so far."""
        counts = self.counts.double()
        tokens, within_used, sizes, within = self.groups()
        if not bool(tokens.any()):
            return {view: {"usage": 0.0, "perplexity": 0.0} for view in ("semantic", "flat", "group")}
        used = tokens > 0
        views = {
            "semantic": (used.double().mean(), _entropy(tokens).exp()),
            "flat": ((counts > 0).double().mean(), _entropy(counts.flatten()).exp()),
            "group": (within_used[used].sum() / sizes[used].sum(), (within * tokens).sum() / tokens.sum()),
        }
        return {view: {"usage": share.item(), "perplexity": even.item()} for view, (share, even) in views.items()}

    def figures(self) -> dict[str, float]:
        """`summary` as one level: {"semantic_usage", "semantic_perplexity", "flat_usage", ...}."""
        return {f"{view}_{key}": value for view, row in self.summary().items() for key, value in row.items()}

    def groups(self) -> GroupUsage:
        """What was counted, by semantic code."""
        counts = self.counts.double()
        grouping = Grouping(len(counts), counts.numel(), self.offsets)
        sizes = grouping.sizes(counts.device)
        if self.offsets is None:
            return GroupUsage(counts.sum(1), (counts > 0).sum(1).double(), sizes.double(), _entropy(counts).exp())
        flat = counts.flatten()
        columns = torch.stack([flat, (flat > 0).double(), torch.xlogy(flat, flat)], dim=1)
        owner = grouping.group_of(torch.arange(len(flat), device=flat.device))
        tokens, used, c_log_c = ops.segment_sum(columns, owner, len(sizes))[0].unbind(1)
        # The entropy of c_j / n is log n - (sum of c_j log c_j) / n.
        entropy = torch.where(tokens > 0, tokens.clamp_min(1).log() - c_log_c / tokens.clamp_min(1), 0.0)
        return GroupUsage(tokens, used, sizes.double(), entropy.exp())


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension of counts; 0 where there are none."""
    p = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(p, p).sum(dim=-1)
