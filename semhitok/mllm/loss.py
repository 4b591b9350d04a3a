"""Next-token losses over hundreds of thousands of ids, without computing all logits at once.

Logits of N tokens and V ids are computed in tiles of at most `TILE` elements, once for the loss and again for the
gradients. Besides the weights and their gradients this takes about three tiles (200 MB in fp32) and N * width elements,
whatever V is. The gradient of a weight is allocated once and filled in place; frozen weights cost nothing. (As with
every parameter, a second backward pass before the optimizer step allocates a second gradient to add to the first.)

For groups, the rows that tokens need are copied tile by tile; a group with more rows than a tile is copied at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1 << 24  # logits that exist at a time
IGNORE = -100  # a target without a loss, as in torch and transformers


def linear_cross_entropy(
    hidden: Tensor, weights: list[Tensor], targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Cross-entropy of each token over ids with the logits hidden @ cat(weights).T.

    Equivalent to: F.cross_entropy((hidden @ torch.cat(weights).T).float(), targets, reduction="none").

    Args:
        hidden: [N, width], floating point. Under autocast, hidden and weights are cast tile by tile.
        weights: blocks [V_b, width] of one vocabulary of V = sum of V_b ids, with one softmax over all.
        targets: [N] int64 in [0, V), or -100 for no loss.
        softcap: logits x become softcap * tanh(x / softcap), which takes a fourth tile; None leaves them as they are.

    Returns:
        [N] fp32 (fp64 for fp64), 0 where the target is -100. Differentiable once, in hidden and weights.

    Raises:
        ValueError: wrong shapes, or a target out of range.
    """
    _check_hidden(hidden, targets)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
            raise ValueError(f"weights: expected [V, {hidden.shape[1]}], got {list(weight.shape)}")
    _check_range("targets", targets, sum(len(weight) for weight in weights))
    return _LinearCrossEntropy.apply(hidden, targets, _dtype(hidden), softcap, *weights)


def group_cross_entropy(
    hidden: Tensor, weight: Tensor, groups: Tensor, targets: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each token over the ids of its own group, with the logits weight[group] @ hidden.

    Args:
        hidden: [N, width], floating point; dtypes as in `linear_cross_entropy`.
        weight: [K, m, width], or with offsets [T, width].
        groups: [N] int64 in [0, K).
        targets: [N] int64 in [0, m), or in [0, m_i) for group i, or -100 for no loss.
        offsets: [K + 1] int64, if groups differ in size: group i has the rows offsets[i] to offsets[i + 1] - 1.

    Returns:
        [N] fp32 (fp64 for fp64), 0 where the target is -100. Differentiable once, in hidden and weight.

    Raises:
        ValueError: wrong shapes, or a group or target out of range.
    """
    _check_hidden(hidden, targets)
    expected = f"[K, m, {hidden.shape[1]}]" if offsets is None else f"[T, {hidden.shape[1]}] (with offsets)"
    if weight.ndim != (3 if offsets is None else 2) or weight.shape[-1] != hidden.shape[1]:
        raise ValueError(f"weight: expected {expected}, got {list(weight.shape)}")
    if groups.shape != targets.shape:
        raise ValueError(f"groups: expected {list(targets.shape)}, got {list(groups.shape)}")
    if offsets is None:
        offsets = torch.arange(len(weight) + 1, device=weight.device) * weight.shape[1]
        weight = weight.flatten(0, 1)
    groups = torch.where(targets == IGNORE, 0, groups)
    _check_range("groups", groups, len(offsets) - 1)
    _check_range("targets", targets, offsets.diff()[groups])
    return _GroupCrossEntropy.apply(hidden, groups, targets, offsets, _dtype(hidden), weight)


def group_logsumexp(scores: Tensor, offsets: Tensor) -> Tensor:
    """logsumexp of scores [..., T] within each group, [..., K]. Group i begins at offsets[i]; offsets is [K + 1]."""
    group = torch.repeat_interleave(offsets.diff(), output_size=scores.shape[-1])
    peak = scores.new_full((*scores.shape[:-1], len(offsets) - 1), -torch.inf)
    peak = peak.scatter_reduce(-1, group.expand_as(scores), scores.detach(), "amax")
    peak = peak.clamp_min(torch.finfo(scores.dtype).min)  # so that a group of -inf gives -inf, not nan
    return peak + torch.zeros_like(peak).index_add(-1, group, (scores - peak[..., group]).exp()).log()


def _check_hidden(hidden: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected [N, width] of floats, got {list(hidden.shape)} of {hidden.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        got = f"{list(targets.shape)} of {targets.dtype}"
        raise ValueError(f"targets: expected [{len(hidden)}] of int64, got {got}")


def _check_range(name: str, ids: Tensor, stop: int | Tensor) -> None:
    if ids.numel() and not torch.compiler.is_compiling():
        wrong = (ids >= stop) | ((ids < 0) & (ids != IGNORE))
        if wrong.any():
            stop = stop if isinstance(stop, int) else int(stop[wrong][0])
            raise ValueError(f"{name}: expected ids in [0, {stop}), got {int(ids[wrong][0])}")


def _dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the products: that of autocast if it is enabled."""
    device = hidden.device.type
    # Autocast does not change fp64.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(tokens: int, weights: tuple[Tensor, ...]) -> Iterator[tuple[int, int, int, int]]:
    """Tiles of the weights: (block, start and end of its rows, id of the first)."""
    ids = max(1, TILE // max(1, min(tokens, TILE_TOKENS)))
    offset = 0
    for block, weight in enumerate(weights):
        for start in range(0, len(weight), ids):
            yield block, start, min(start + ids, len(weight)), offset + start
        offset += len(weight)


# Tokens of a tile. The weights are read again for every so many tokens, so it must not be small.
TILE_TOKENS = 4096


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, dtype: torch.dtype, softcap: float | None, *weights: Tensor
    ) -> Tensor:
        kept = (targets != IGNORE).nonzero().squeeze(1)
        loss = hidden.new_zeros(len(hidden), dtype=_wide(hidden.dtype))
        normaliser = loss.new_full((len(kept),), -torch.inf)
        chosen = loss.new_zeros(len(kept))
        with torch.autocast(hidden.device.type, enabled=False):
            for block, start, end, first in _tiles(len(kept), weights):
                weight = weights[block][start:end].to(dtype)
                for begin in range(0, len(kept), TILE_TOKENS):
                    part = slice(begin, begin + TILE_TOKENS)
                    logits = (hidden[kept[part]].to(dtype) @ weight.T).to(loss.dtype)
                    if softcap is not None:
                        logits.div_(softcap).tanh_().mul_(softcap)
                    column = targets[kept[part]] - first
                    own = ((column >= 0) & (column < end - start)).nonzero().squeeze(1)
                    chosen[begin + own] = logits[own, column[own]]
                    peak = logits.amax(1)  # torch.logsumexp would hold a second tile
                    total = logits.sub_(peak[:, None]).exp_().sum(1).log_().add_(peak)
                    normaliser[part] = torch.logaddexp(normaliser[part], total)
        loss[kept] = normaliser - chosen
        ctx.save_for_backward(hidden, targets, kept, normaliser, *weights)
        ctx.dtype, ctx.softcap = dtype, softcap
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, kept, normaliser, *weights = ctx.saved_tensors
        wants_hidden, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        make = torch.empty_like if len(kept) else torch.zeros_like
        d_weights: list[Any] = [make(w) if want else None for w, want in zip(weights, wants, strict=True)]
        d_kept = hidden.new_zeros(len(kept), hidden.shape[1], dtype=normaliser.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for block, start, end, first in _tiles(len(kept), weights):
                if not wants_hidden and not wants[block]:
                    continue
                weight = weights[block][start:end].to(ctx.dtype)
                d_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if wants[block] else None
                for begin in range(0, len(kept), TILE_TOKENS):
                    part = slice(begin, begin + TILE_TOKENS)
                    rows = kept[part]
                    x = hidden[rows].to(ctx.dtype)
                    logits, slope = (x @ weight.T).to(normaliser.dtype), None
                    if ctx.softcap is not None:
                        slope = 1 - logits.div_(ctx.softcap).tanh_().square()
                        logits.mul_(ctx.softcap)
                    gradient = logits.sub_(normaliser[part, None]).exp_()
                    column = targets[rows] - first
                    own = ((column >= 0) & (column < end - start)).nonzero().squeeze(1)
                    gradient[own, column[own]] -= 1
                    if slope is not None:
                        gradient.mul_(slope)
                    gradient = gradient.mul_(upstream[rows, None]).to(ctx.dtype)
                    if wants_hidden:
                        d_kept[part] += gradient @ weight
                    if d_weight is not None:
                        d_weight += gradient.T @ x
                if d_weight is not None:
                    d_weights[block][start:end] = d_weight
        d_hidden = torch.zeros_like(hidden).index_copy_(0, kept, d_kept.to(hidden.dtype)) if wants_hidden else None
        return d_hidden, None, None, None, *d_weights


class _GroupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, groups: Tensor, targets: Tensor, offsets: Tensor, dtype: torch.dtype, weight: Tensor
    ) -> Tensor:
        loss = hidden.new_zeros(len(hidden), dtype=_wide(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens, rows, taken, owned in _group_chunks(groups, targets, offsets, hidden.shape[1]):
                logits = _group_logits(hidden[tokens].to(dtype), weight[rows].to(dtype), owned, loss.dtype)
                chosen = logits.gather(2, targets[tokens].unsqueeze(2)).squeeze(2)
                loss[tokens[taken]] = (logits.logsumexp(2) - chosen)[taken]
        ctx.save_for_backward(hidden, groups, targets, offsets, weight)
        ctx.dtype = dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, groups, targets, offsets, weight = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[5] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for tokens, rows, taken, owned in _group_chunks(groups, targets, offsets, hidden.shape[1]):
                x, own = hidden[tokens].to(ctx.dtype), weight[rows].to(ctx.dtype)
                gradient = _group_logits(x, own, owned, upstream.dtype).softmax(2)
                target = targets[tokens].unsqueeze(2)
                gradient.scatter_add_(2, target, gradient.new_full((), -1).expand(target.shape))
                gradient = gradient.mul_((upstream[tokens] * taken).unsqueeze(2)).to(ctx.dtype)
                if d_hidden is not None:
                    d_hidden[tokens[taken]] = (gradient @ own)[taken].to(d_hidden.dtype)
                if d_weight is not None:
                    of_rows = (gradient.mT @ x).to(d_weight.dtype)
                    d_weight.index_add_(0, rows.flatten(), of_rows.flatten(0, 1))
        return d_hidden, None, None, None, None, d_weight


# The most tokens of one group in a chunk: enough for a matrix product, and few beside the rows of a large group.
CHUNK_TOKENS = 256


def _group_chunks(
    groups: Tensor, targets: Tensor, offsets: Tensor, width: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Chunks of g groups that are computed together: tokens [g, n], rows [g, m], and masks of both, False for padding.

    Groups whose numbers of tokens and of rows round up to the same powers of two share a chunk and are padded to the
    largest, so less than half of either is padding.
    """
    kept = (targets != IGNORE).nonzero().squeeze(1)
    group, order = groups[kept].sort(stable=True)
    kept = kept[order]
    place = torch.arange(len(kept), device=kept.device)
    start = ((place - torch.searchsorted(group, group)) % CHUNK_TOKENS == 0).nonzero().squeeze(1)
    counts = start.diff(append=start.new_tensor([len(kept)]))
    first, sizes = offsets[group[start]], offsets.diff()[group[start]]
    digits = torch.frexp(torch.stack([counts, sizes]).double()).exponent
    kinds, kind = digits.unique(dim=1, return_inverse=True)
    for n in range(kinds.shape[1]):
        like = (kind == n).nonzero().squeeze(1)
        n_tokens, n_rows = int(counts[like].max()), int(sizes[like].max())
        numbers = max(n_tokens * n_rows, (n_tokens + n_rows) * width)
        for some in like.split(max(1, TILE // numbers)):
            taken = torch.arange(n_tokens, device=kept.device) < counts[some, None]
            owned = torch.arange(n_rows, device=kept.device) < sizes[some, None]
            # Padding repeats the group's first token or row.
            tokens = kept[start[some, None] + torch.arange(n_tokens, device=kept.device) * taken]
            yield tokens, first[some, None] + torch.arange(n_rows, device=kept.device) * owned, taken, owned


def _group_logits(x: Tensor, own: Tensor, owned: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens [g, n, width] and rows [g, m, width] of groups -> logits [g, n, m] in `dtype`, -inf for padding rows."""
    return (x @ own.mT).to(dtype).masked_fill_(~owned.unsqueeze(1), -torch.inf)
