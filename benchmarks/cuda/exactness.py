"""exactness.py --device cuda: the same kinds of data through every search of the GPU.

An id is wrong if its float64 score is short of the best by more than 1e-6 (|z| max|c| + max|c|^2/2 for "l2"), more
than fp32 sums explain, or if its code equals an earlier one. "close" counts the op's ids that differ from float64's but
are not wrong; "codes" is how many codes of a token were scored exactly, "uncert" the percentage of tokens that the
certified search left to another. "op" is what nearest_code chooses; "-": the search refuses the shape or the dtype.

Exit status 1 if an id is wrong, or the op failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.cuda.floor import SEARCHES
from benchmarks.exact import Outcome

if TYPE_CHECKING:
    from benchmarks.exactness import Case

ROUNDING = 1e-6
PIECE = 8192  # tokens at a time: about 1 GiB of float64 scores
CAPABILITIES = {"op": "", **{name: name for name in SEARCHES}}  # title -> capability


def first_of_equals(codebook: Tensor) -> Tensor:
    """[K]: the lowest index of a code equal to each."""
    kind = codebook.float().unique(dim=0, return_inverse=True)[1]
    places = torch.arange(len(codebook), device=codebook.device)
    return torch.full_like(places, len(codebook)).scatter_reduce_(0, kind, places, "amin")[kind]


def judge(z: Tensor, codebook: Tensor, metric: str, ids: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """search -> (wrong, close) of its ids [N]."""
    codes, first = codebook.double(), first_of_equals(codebook)
    halves = codes.square().sum(1) / 2 if metric == "l2" else torch.zeros_like(codes[:, 0])
    largest = codes.norm(dim=1).max()
    counts = dict.fromkeys(ids, (0, 0))
    for start in range(0, len(z), PIECE):
        tokens = z[start : start + PIECE].double()
        scores = torch.addmm(-halves, tokens, codes.T)
        best, winners = scores.max(1)
        allowed = ROUNDING * (tokens.norm(dim=1) * largest + halves.max())
        for name, all_ids in ids.items():
            chosen = all_ids[start : start + PIECE]
            near = best - scores.gather(1, chosen[:, None])[:, 0] <= allowed  # NaN is not
            right = near & (first[chosen] == chosen)
            wrong, close = counts[name]
            other = right & (chosen != first[winners])
            counts[name] = wrong + int((~right).sum()), close + int(other.sum())
    return counts


def uncertified(rescored: Tensor) -> float:
    """Percentage of tokens [N] that the certified search left to another."""
    return 100 * (rescored < 0).double().mean().item()


def check(case: Case, n: int, device: str = "cuda") -> Outcome:
    z, codebook = (t.to(device) for t in case.data(n))
    ids, refused, rescored = {}, {}, torch.zeros(1, device=device)
    for title, capability in CAPABILITIES.items():
        try:
            _, ids[title], scored = torch.ops.semhitok.nearest_code_probe(z, codebook, case.metric, capability)
            if title == "op":
                ids[title], rescored = torch.ops.semhitok.nearest_code(z, codebook, case.metric)[1], scored
        except RuntimeError as error:
            refused[title] = str(error).splitlines()[0]
            ids.pop(title, None)
    done = rescored[rescored >= 0].double()
    codes = done.mean().item() if len(done) else 0.0
    counts = judge(z, codebook, case.metric, ids)
    wrong = {title: count for title, (count, _) in counts.items()}
    return Outcome(wrong, counts.get("op", (0, 0))[1], codes, uncertified(rescored), refused)
