"""A contestant of the benchmark: the nearest code by inner product, as a fused Triton kernel.

A program holds a tile of tokens and goes through tiles of codes: `tl.dot`, then the tile's best score and its lowest
id, then the running best of each token. No N x K. Few tokens leave SMs idle, so the codes are split over programs as
well and a second, small reduction picks the best split. Sizes are tuned for each depth and number of tokens.

precision: "tf32x3" gives scores to about fp32, "tf32", Triton's default, to about 1e-3; "ieee" is fp32 without the
tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264  # at least: two for each SM of an H200
MOST_SPLITS = 64
SMALLEST_TILE = 64  # of tokens

CONFIGS = [
    triton.Config({"TOKENS": 128, "CODES": 128}, num_warps=8, num_stages=3),
    triton.Config({"TOKENS": 64, "CODES": 256}, num_warps=8, num_stages=2),
    triton.Config({"TOKENS": 64, "CODES": 128}, num_warps=4, num_stages=3),
]


@triton.autotune(CONFIGS, key=["SIZE_CLASS", "DEPTH_PADDED", "PRECISION"])
@triton.jit
def search_kernel(
    z, codebook, best_scores, best_ids, n, k, codes_per_split,
    DEPTH: tl.constexpr, DEPTH_PADDED: tl.constexpr, PRECISION: tl.constexpr, SIZE_CLASS: tl.constexpr,
    TOKENS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    split = tl.program_id(1)
    d = tl.arange(0, DEPTH_PADDED)
    tile = tl.load(z + rows[:, None] * DEPTH + d[None, :], mask=(rows[:, None] < n) & (d[None, :] < DEPTH), other=0.0)
    best = tl.full([TOKENS], -float("inf"), tl.float32)
    ids = tl.zeros([TOKENS], tl.int32)
    first = split * codes_per_split
    last = tl.minimum(first + codes_per_split, k)
    for start in range(first, last, CODES):
        codes = start + tl.arange(0, CODES)
        block = tl.load(
            codebook + codes[None, :] * DEPTH + d[:, None],
            mask=(codes[None, :] < last) & (d[:, None] < DEPTH),
            other=0.0,
        )
        scores = tl.dot(tile, block, input_precision=PRECISION)
        scores = tl.where(codes[None, :] < last, scores, -float("inf"))
        score, place = tl.max(scores, 1, return_indices=True)  # ties: the lowest
        better = score > best
        best = tl.where(better, score, best)
        ids = tl.where(better, start + place, ids)
    out = split * n + rows
    tl.store(best_scores + out, best, mask=rows < n)
    tl.store(best_ids + out, ids, mask=rows < n)


def splits_for(n: int) -> int:
    return min(max(PROGRAMS // -(-n // SMALLEST_TILE), 1), MOST_SPLITS)


def codes_per_split(k: int, splits: int) -> int:
    """A multiple of every tile of codes, so that no tile crosses a split."""
    largest = max(config.kwargs["CODES"] for config in CONFIGS)
    return -(-k // (splits * largest)) * largest


def nearest_code(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    """z[N, D], codebook[K, D], contiguous fp32 on CUDA -> ids [N] int64."""
    (n, d), k = z.shape, len(codebook)
    each = codes_per_split(k, splits_for(n))
    splits = -(-k // each)
    scores = z.new_empty(splits, n)
    ids = torch.empty(splits, n, dtype=torch.int32, device=z.device)
    search_kernel[lambda meta: (triton.cdiv(n, meta["TOKENS"]), splits)](
        z, codebook, scores, ids, n, k, each,
        DEPTH=d, DEPTH_PADDED=max(triton.next_power_of_2(d), 16), PRECISION=precision, SIZE_CLASS=min(splits, 2),
    )  # fmt: skip
    if splits == 1:
        return ids[0].long()
    return ids.gather(0, scores.argmax(0, keepdim=True))[0].long()
