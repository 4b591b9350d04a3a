"""Use of the codes: which occur, and how evenly, by exact counts."""

from __future__ import annotations

import torch

from semhitok.vocabulary import Vocabulary


class CodeUsage:
    """Which codes occur and how evenly, from exact int64 counts of every flat id.

    Usage is the share of codes that occur, in [0, 1]. Perplexity is exp(entropy) of the codes'
    frequencies: the number of equally frequent codes that would be as varied. Both are 0 before the
    first id. Three views:

        semantic   of the K semantic codes
        flat       of the K * m flat ids
        group      of the sub-codes inside their groups: the share of the m sub-codes used, over the
                   groups of semantic codes that occur; the perplexity of j given i, in [1, m],
                   averaged over groups by their tokens

    Attributes:
        counts: int64 [K, m], times each flat id occurred. Add those of other processes to merge.
    """

    def __init__(self, num_codes: int, num_sub_codes: int, device: torch.device | str | None = None) -> None:
        self.vocabulary = Vocabulary(num_codes, num_sub_codes)
        self.counts = torch.zeros(num_codes, num_sub_codes, dtype=torch.int64, device=device)

    def update(self, codes: torch.Tensor) -> None:
        """Count flat ids: integers of any shape in [0, K * m), on any device.

        Raises:
            ValueError: not integers, or out of range; nothing is counted then.
        """
        flat = self.vocabulary.check(codes).flatten().to(self.counts.device)
        self.counts += torch.bincount(flat, minlength=self.counts.numel()).view_as(self.counts)

    def add(self, counts: torch.Tensor) -> None:
        """Add int64 counts of the K * m flat ids, of any shape, counted elsewhere."""
        self.counts += counts.to(self.counts.device).view_as(self.counts)

    def reset(self) -> None:
        """Forget all counts."""
        self.counts.zero_()

    def summary(self) -> dict[str, dict[str, float]]:
        """`{"semantic" | "flat" | "group": {"usage", "perplexity"}}` of the ids counted so far."""
        counts = self.counts.double()
        tokens = counts.sum(dim=1)  # of each group
        if not bool(tokens.any()):
            return {view: {"usage": 0.0, "perplexity": 0.0} for view in ("semantic", "flat", "group")}
        used = tokens > 0
        within = _entropy(counts).exp()
        return {
            "semantic": {
                "usage": used.double().mean().item(),
                "perplexity": _entropy(tokens).exp().item(),
            },
            "flat": {
                "usage": (counts > 0).double().mean().item(),
                "perplexity": _entropy(counts.flatten()).exp().item(),
            },
            "group": {
                "usage": (counts[used] > 0).double().mean().item(),
                "perplexity": ((within * tokens).sum() / tokens.sum()).item(),
            },
        }


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    """Entropy in nats over the last dimension of counts; 0 where there are none."""
    p = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    return -torch.xlogy(p, p).sum(dim=-1)
