"""The ops in plain PyTorch, with the contract of `semhitok.ops`: what one would write without compiled ops.

The tests' oracle (in float64) and the benchmarks' baseline. They build the N x K matrix of scores. Sub-codebooks are
[K, m, D], or [T, D] with offsets [K + 1].
"""

from __future__ import annotations

import torch
from torch import Tensor


def _scorable(codes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """codes[..., D] -> codes, bias[...]: 0 or -|c|^2/2. A code with NaN or Inf gets bias -inf: it never wins."""
    usable = codes.isfinite().all(-1)
    codes = codes.masked_fill(~usable[..., None], 0)
    bias = torch.zeros_like(codes[..., 0]) if metric == "ip" else codes.square().sum(-1) * -0.5
    return codes, bias.masked_fill(~usable, -torch.inf)


def _winner(scores: Tensor, usable: Tensor) -> tuple[Tensor, Tensor]:
    """scores[..., K], usable[...] -> the first greatest score that is not NaN and its id; NaN and 0 if none."""
    best, ids = scores.max(-1)
    if best.isnan().any():
        best, ids = scores.masked_fill(scores.isnan(), -torch.inf).max(-1)
    found = usable & (best > -torch.inf)
    return best.masked_fill(~found, torch.nan), ids.masked_fill(~found, 0)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def nearest_code(z: Tensor, codebook: Tensor, metric: str = "ip") -> tuple[Tensor, Tensor]:
    """z[..., D], codebook[K, D] -> scores[...], ids[...]."""
    dtype = _compute_dtype(z, codebook)
    z, (codes, bias) = z.to(dtype), _scorable(codebook.to(dtype), metric)
    return _winner(z @ codes.T + bias, z.isfinite().all(-1))


def _padded(table: Tensor, offsets: Tensor) -> Tensor:
    """Sub-codebooks of different sizes, table[T, D] -> [K, largest, D], padded with codes of NaN, which never win."""
    sizes = offsets.diff()
    owner = torch.repeat_interleave(sizes)
    padding = table.new_full((len(sizes), int(sizes.max()), table.shape[1]), torch.nan)
    return padding.index_put((owner, torch.arange(len(table), device=table.device) - offsets[owner]), table)


def nearest_subcode(
    z: Tensor, sub_codebooks: Tensor, group: Tensor, metric: str = "l2", offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z[..., D], sub_codebooks[K, m, D], group[...] -> scores[...], ids[...] in [0, m)."""
    if offsets is not None:
        sub_codebooks = _padded(sub_codebooks, offsets)
    dtype = _compute_dtype(z, sub_codebooks)
    known = (group >= 0) & (group < len(sub_codebooks))
    z = z.to(dtype)
    codes, bias = _scorable(sub_codebooks[group.masked_fill(~known, 0)].to(dtype), metric)
    scores = torch.einsum("...d,...md->...m", z, codes) + bias
    return _winner(scores, known & z.isfinite().all(-1))


def hier_quantize(
    z_sem: Tensor,
    z_pix: Tensor,
    sem_codebook: Tensor,
    pix_codebook: Tensor,
    sem_metric: str = "ip",
    pix_metric: str = "l2",
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """z_sem[..., Ds], z_pix[..., Dp], sem_codebook[K, Ds], pix_codebook[K, m, Dp] -> q_sem, q_pix, codes[...]."""
    dtype = _compute_dtype(z_sem, z_pix, sem_codebook, pix_codebook)
    i = nearest_code(z_sem.to(dtype), sem_codebook, sem_metric)[1]
    j = nearest_subcode(z_pix.to(dtype), pix_codebook, i, pix_metric, offsets)[1]
    codes = i * pix_codebook.shape[1] + j if offsets is None else offsets[i] + j
    return sem_codebook[i], pix_codebook.flatten(0, -2)[codes], codes


def hier_lookup(
    codes: Tensor, sem_codebook: Tensor, pix_codebook: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """codes[...], sem_codebook[K, Ds], pix_codebook[K, m, Dp] -> q_sem[..., Ds], q_pix[..., Dp]."""
    flat = pix_codebook.flatten(0, -2)
    unknown = ((codes < 0) | (codes >= len(flat)))[..., None]
    codes = codes.masked_fill(unknown[..., 0], 0)
    i = codes // pix_codebook.shape[1] if offsets is None else torch.searchsorted(offsets, codes, right=True) - 1
    q_sem = sem_codebook[i]
    return q_sem.masked_fill(unknown, torch.nan), flat[codes].masked_fill(unknown, torch.nan)


def segment_sum(values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """values[N, D], ids[N] -> sums[S, D], counts[S]."""
    known = (ids >= 0) & (ids < num_segments)
    values, ids = values[known], ids[known]
    sums = torch.zeros(num_segments, values.shape[1], dtype=torch.float64, device=values.device)
    sums.index_add_(0, ids, values.double())
    return sums.to(_compute_dtype(values)), torch.bincount(ids, minlength=num_segments)
