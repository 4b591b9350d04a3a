"""The nearest code by exact arithmetic: what the benchmarks compare every id with.

The score of code c for token z is z.c ("ip") or z.c - |c|^2/2 ("l2"); the winner has the greatest score as a real
number, and the lowest index among equal scores. It is found in three steps:

1. Equal codes are merged into the one of lowest index: a matmul may give duplicates scores that differ.
2. Scores in float64, with a bound on their rounding. Where the best is ahead by more than that, it has won.
3. Elsewhere the few codes within the bound are compared in pairs. Products of fp32 numbers are exact in float64, and
   `math.fsum` rounds the sum of all of them only once, so the sign of the difference is that of the real numbers.

Step 2 costs a float64 matmul and three passes over pieces of N x K, step 3 microseconds for each close code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

PIECE = 2**21  # scores at a time: 16 MiB of float64


@dataclass
class Outcome:
    """What exactness.py prints of one case."""

    wrong: dict[str, int]  # engine -> wrong ids; without those that refused
    close: int
    codes: float  # scored in float64 for a token
    last: float  # the last column
    refused: dict[str, str] = field(default_factory=dict)  # engine -> why


@dataclass
class Codebook:
    """The different codes of a codebook, ready to be scored in float64."""

    ids: Tensor  # [U] int64, ascending: where each code occurs first
    codes: Tensor  # [U, D]
    norms: Tensor  # [U]
    halves: Tensor  # [U]: |c|^2/2 for "l2", 0 for "ip"


def prepare(codebook: Tensor, metric: str) -> Codebook:
    """codebook[K, D] in float32, float16 or bfloat16."""
    if metric not in ("ip", "l2"):
        raise ValueError(f'metric: expected "ip" or "l2", got "{metric}"')
    if codebook.dtype == torch.float64:  # products of float64 numbers are not exact in float64
        raise ValueError("codebook: expected float32, float16 or bfloat16, got float64")
    rows = np.ascontiguousarray(codebook.double().numpy())
    _, first = np.unique(rows.view(f"V{rows[0].nbytes}")[:, 0], return_index=True)
    ids = torch.from_numpy(np.sort(first))
    codes = torch.from_numpy(rows)[ids]
    squares = codes.square().sum(1)
    return Codebook(ids, codes, squares.sqrt(), squares / 2 if metric == "l2" else torch.zeros_like(squares))


def rounding(depth: int) -> float:
    """A float64 score is off by less than this times (|z||c| + |c|^2/2), in whatever order its terms are added."""
    return 2 * (depth + 4) * 2.0**-53


def difference(z: np.ndarray, a: np.ndarray, b: np.ndarray, metric: str) -> float:
    """The score of code a less that of code b for token z, all [D] in float64 with fp32 values, rounded only once."""
    terms = [z * a, z * -b]
    if metric == "l2":
        terms += [a * -a / 2, b * b / 2]
    return math.fsum(np.concatenate(terms).tolist())


def exact_winners(z: Tensor, codebook: Tensor, metric: str = "ip") -> Tensor:
    """z[N, D], codebook[K, D] in float32, float16 or bfloat16, finite, on the CPU -> ids [N] of the winners."""
    known = prepare(codebook, metric)
    factor, largest, half = rounding(z.shape[1]), known.norms.max(), known.halves.max()
    winners = []
    for piece in z.double().split(max(PIECE // len(known.ids), 1)):
        scores = torch.addmm(-known.halves, piece, known.codes.T)
        best, ids = scores.max(1)
        reach = best - 2 * factor * (piece.norm(dim=1) * largest + half)
        for n in ((scores >= reach[:, None]).sum(1) > 1).nonzero()[:, 0].tolist():
            ids[n] = _decide(piece[n], scores[n], known, metric)
        winners.append(known.ids[ids])
    return torch.cat(winners) if winners else torch.empty(0, dtype=torch.int64)


def _decide(z: Tensor, scores: Tensor, known: Codebook, metric: str) -> int:
    """The winner among codes that float64 scores [U] may have rounded together, each code with its own bound."""
    error = rounding(len(z)) * (z.norm() * known.norms + known.halves)
    close = (scores + error >= (scores - error).max()).nonzero()[:, 0].tolist()
    if not error[close].any():  # a token of zeros: every score is exactly 0
        return close[0]
    token, codes = z.numpy(), known.codes.numpy()
    best = close[0]
    for k in close[1:]:
        if difference(token, codes[k], codes[best], metric) > 0:
            best = k
    return best


def count_wrong(z: Tensor, codebook: Tensor, metric: str, ids: Tensor, winners: Tensor) -> tuple[int, int]:
    """How many ids [N] are not the winners [N]: (wrong, within float64 rounding).

    The second are ids whose exact score is less than the winner's, but by no more than float64 sums may be off: no
    search in float64 can tell the two apart. An id other than the lowest among equal scores is wrong.
    """
    wrong = close = 0
    z, codes = z.double(), codebook.double()
    for n in (ids != winners).nonzero()[:, 0].tolist():
        won, got = codes[winners[n]], codes[ids[n]]
        gap = difference(z[n].numpy(), won.numpy(), got.numpy(), metric)
        halves = (won.square().sum() + got.square().sum()) / 2 if metric == "l2" else 0.0
        bound = rounding(z.shape[1]) * (z[n].norm() * (won.norm() + got.norm()) + halves)
        within = 0 < gap <= bound
        close += within
        wrong += not within
    return wrong, close
