"""exactness.py --device cuda: the same kinds of data through every search of the GPU.

A wrong id is one whose float64 score is short of the best by more than 1e-6 (|z| max|c| + max|c|^2/2 for "l2"), more
than fp32 sums explain, or that of a code equal to an earlier one. "close" counts the op's ids that differ from
float64's but are not wrong; "codes" is how many codes of a token were scored exactly, "uncert" the percentage of tokens
that the certified search left to another. "op" is what nearest_code chooses; "-": the search refuses the shape or the
dtype.

Exit status 1 if one id is wrong, or the op failed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.cuda.floor import PATHS

ROUNDING = 1e-6
PIECE = 8192  # tokens at a time: about 1 GiB of float64 scores
ENGINES = {"op": "", **{path: path for path in PATHS}}  # title -> capability


class Case(Protocol):
    """exactness.Case."""

    kind: str
    make: object
    metric: str
    k: int
    d: int
    dtype: torch.dtype

    def data(self, n: int, make: object) -> tuple[Tensor, Tensor]: ...


def first_of_equals(codebook: Tensor) -> Tensor:
    """[K]: the lowest index of a code equal to each."""
    kind = codebook.float().unique(dim=0, return_inverse=True)[1]
    places = torch.arange(len(codebook), device=codebook.device)
    return torch.full_like(places, len(codebook)).scatter_reduce_(0, kind, places, "amin")[kind]


def judge(z: Tensor, codebook: Tensor, metric: str, ids: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """engine -> (wrong, close) of its ids [N]."""
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


@dataclass
class Outcome:
    counts: dict[str, tuple[int, int]]  # engine -> wrong, close; without those that refused
    refused: dict[str, str]
    codes: float
    uncertified: float


def check(case: Case, n: int, device: str) -> Outcome:
    z, codebook = (t.to(device) for t in case.data(n, case.make))
    ids, refused, rescored = {}, {}, torch.zeros(1, device=device)
    for title, capability in ENGINES.items():
        try:
            if title == "op":
                ids[title] = torch.ops.semhitok.nearest_code(z, codebook, case.metric)[1]
            probe = torch.ops.semhitok.nearest_code_probe(z, codebook, case.metric, capability)
        except RuntimeError as error:
            refused[title] = str(error).splitlines()[0]
            continue
        if title == "op":
            rescored = probe[2]
        else:
            ids[title] = probe[1]
    done = rescored[rescored >= 0].double()
    codes = done.mean().item() if len(done) else 0.0
    return Outcome(judge(z, codebook, case.metric, ids), refused, codes, 100 * (rescored < 0).double().mean().item())


def run(cases: Sequence[Case], n: int, device: str = "cuda") -> int:
    widths = {title: max(len(title), 5) for title in ENGINES}
    start, total, failed, refused = time.perf_counter(), dict.fromkeys(ENGINES, 0), False, {}
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if device == 'cuda' else device}")
    titles = " ".join(f"{title:>{widths[title]}}" for title in ENGINES)
    print(f"{'kind':<25} {'':2} {'dtype':>8} {'N':>6} {'K':>6} {'D':>3} | wrong: {titles} | close    codes uncert")
    with torch.inference_mode():
        for case in cases:
            dtype = str(case.dtype).removeprefix("torch.")
            line = f"{case.kind:<25} {case.metric} {dtype:>8} {n:6d} {case.k:6d} {case.d:3d} |        "
            try:
                outcome = check(case, n, device)
            except RuntimeError as error:  # a kernel has broken the device: nothing more can run
                print(f"{line}{str(error).splitlines()[0]}", flush=True)
                failed = True
                break
            refused = outcome.refused | refused
            failed = failed or "op" not in outcome.counts
            for title, (wrong, _) in outcome.counts.items():
                total[title] += wrong
            shown = [str(outcome.counts[t][0]) if t in outcome.counts else "-" for t in ENGINES]
            line += " ".join(text.rjust(width) for text, width in zip(shown, widths.values(), strict=True))
            close = outcome.counts.get("op", (0, 0))[1]
            print(f"{line} | {close:5d} {outcome.codes:8.1f} {outcome.uncertified:6.2f}", flush=True)
    for title, why in refused.items():
        print(f"- {title}: {why}")
    counts = ", ".join(f"{title} {count}" for title, count in total.items())
    print(f"{n * len(cases)} tokens in {time.perf_counter() - start:.0f} s, wrong ids: {counts}")
    return int(failed or any(total.values()))
