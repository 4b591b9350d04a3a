"""Next-token losses over hundreds of thousands of ids, whose logits never exist at once.

Logits of N tokens and V ids are computed in tiles of at most `TILE` numbers, once for the loss and once more for the
gradients. Beyond the weights and their gradients that takes about three tiles (200 MB in fp32) and N * width numbers,
whatever V is. The gradient of a weight is made once, in place; a weight that needs none costs nothing. (As with every
parameter, a second backward pass before the optimiser's step holds a second gradient while it is added to the first.)

Of groups, the rows that tokens need are copied tile by tile; a group whose rows are more than a tile is copied whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 1 << 24  # logits that exist at once
IGNORE = -100  # a target that has no loss, as in torch and transformers


def linear_cross_entropy(hidden: Tensor, weights: list[Tensor], targets: Tensor) -> Tensor:
    """Cross-entropy of every token over the ids whose logits are hidden @ cat(weights).T.

    Equivalent to: F.cross_entropy((hidden @ torch.cat(weights).T).float(), targets, reduction="none").

    Args:
        hidden: [N, width], floating point. Under autocast it and the weights go into
            the products in autocast's dtype, tile by tile.
        weights: blocks [V_b, width] of one vocabulary of V = sum of V_b ids, with one softmax for all.
        targets: [N] int64 in [0, V), or -100 for no loss.

    Returns:
        [N] fp32 (fp64 for fp64), 0 where there is no loss. Differentiable once, in hidden and weights.

    Raises:
        ValueError: other shapes, or a target out of range.
    """
    _check_hidden(hidden, targets)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
            raise ValueError(f"weights: expected [V, {hidden.shape[1]}], got {list(weight.shape)}")
    _check_range("targets", targets, sum(len(weight) for weight in weights))
    return _LinearCrossEntropy.apply(hidden, targets, _dtype(hidden), *weights)


def group_cross_entropy(
    hidden: Tensor, weight: Tensor, groups: Tensor, targets: Tensor, offsets: Tensor | None = None
) -> Tensor:
    """Cross-entropy of every token over the rows of its own group, whose logits are weight[group] @ hidden.

    Args:
        hidden: [N, width], floating point; dtypes as in `linear_cross_entropy`.
        weight: [K, m, width], or with offsets [T, width].
        groups: [N] int64 in [0, K).
        targets: [N] int64 in [0, m), or in [0, m_i) for group i, or -100 for no loss.
        offsets: [K + 1] int64, where groups have sizes of their own: group i has the rows from offsets[i] to
            offsets[i + 1] - 1.

    Returns:
        [N] fp32 (fp64 for fp64), 0 where there is no loss. Differentiable once, in hidden and weight.

    Raises:
        ValueError: other shapes, a group or a target out of range.
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
    """logsumexp of scores [..., T] within each group: [..., K]. Group i has the places from offsets[i] on, [K + 1]."""
    group = torch.repeat_interleave(offsets.diff(), output_size=scores.shape[-1])
    peak = scores.new_full((*scores.shape[:-1], len(offsets) - 1), -torch.inf)
    peak = peak.scatter_reduce(-1, group.expand_as(scores), scores.detach(), "amax")
    peak = peak.clamp_min(torch.finfo(scores.dtype).min)  # a group of -inf alone has no other differences
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
    """The dtype of the products: autocast's where it is on."""
    device = hidden.device.type
    # fp64 is left alone, as autocast leaves it.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tiles(tokens: int, weights: tuple[Tensor, ...]) -> Iterator[tuple[int, int, int, int]]:
    """(block, start and end of its rows, id of the first) of the ids whose logits are computed together."""
    ids = max(1, TILE // max(1, min(tokens, _TOKENS)))
    offset = 0
    for block, weight in enumerate(weights):
        for start in range(0, len(weight), ids):
            yield block, start, min(start + ids, len(weight)), offset + start
        offset += len(weight)


# Tokens that one tile spans. The weights are read once for each such group of tokens, so it must not be small.
_TOKENS = 4096


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        kept = (targets != IGNORE).nonzero().squeeze(1)
        loss = hidden.new_zeros(len(hidden), dtype=_wide(hidden.dtype))
        normaliser = loss.new_full((len(kept),), -torch.inf)
        chosen = loss.new_zeros(len(kept))
        with torch.autocast(hidden.device.type, enabled=False):
            for block, start, end, first in _tiles(len(kept), weights):
                weight = weights[block][start:end].to(dtype)
                for begin in range(0, len(kept), _TOKENS):
                    part = slice(begin, begin + _TOKENS)
                    logits = (hidden[kept[part]].to(dtype) @ weight.T).to(loss.dtype)
                    column = targets[kept[part]] - first
                    own = ((column >= 0) & (column < end - start)).nonzero().squeeze(1)
                    chosen[begin + own] = logits[own, column[own]]
                    peak = logits.amax(1)  # torch.logsumexp would hold a second tile
                    total = logits.sub_(peak[:, None]).exp_().sum(1).log_().add_(peak)
                    normaliser[part] = torch.logaddexp(normaliser[part], total)
        loss[kept] = normaliser - chosen
        ctx.save_for_backward(hidden, targets, kept, normaliser, *weights)
        ctx.dtype = dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, kept, normaliser, *weights = ctx.saved_tensors
        wants_hidden, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        make = torch.empty_like if len(kept) else torch.zeros_like
        d_weights: list[Any] = [make(w) if want else None for w, want in zip(weights, wants, strict=True)]
        d_kept = hidden.new_zeros(len(kept), hidden.shape[1], dtype=normaliser.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for block, start, end, first in _tiles(len(kept), weights):
                if not wants_hidden and not wants[block]:
                    continue
                weight = weights[block][start:end].to(ctx.dtype)
                d_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if wants[block] else None
                for begin in range(0, len(kept), _TOKENS):
                    part = slice(begin, begin + _TOKENS)
                    rows = kept[part]
                    x = hidden[rows].to(ctx.dtype)
                    gradient = (x @ weight.T).to(normaliser.dtype).sub_(normaliser[part, None]).exp_()
                    column = targets[rows] - first
                    own = ((column >= 0) & (column < end - start)).nonzero().squeeze(1)
                    gradient[own, column[own]] -= 1
                    gradient = gradient.mul_(upstream[rows, None]).to(ctx.dtype)
                    if wants_hidden:
                        d_kept[part] += gradient @ weight
                    if d_weight is not None:
                        d_weight += gradient.T @ x
                if d_weight is not None:
                    d_weights[block][start:end] = d_weight
        d_hidden = torch.zeros_like(hidden).index_copy_(0, kept, d_kept.to(hidden.dtype)) if wants_hidden else None
        return d_hidden, None, None, *d_weights


class _GroupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        groups: Tensor,
        targets: Tensor,
        offsets: Tensor,
        dtype: torch.dtype,
        weight: Tensor,
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


# Tokens of one group that go together: enough for a product of matrices, and few beside a large group's rows.
_TOGETHER = 256


def _group_chunks(
    groups: Tensor, targets: Tensor, offsets: Tensor, width: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Groups whose tokens are computed together: tokens [g, n], rows [g, m], and which of both are no padding.

    Groups with numbers of tokens and rows of the same binary digits are padded to the largest, so less than half of
    either is padding.
    """
    kept = (targets != IGNORE).nonzero().squeeze(1)
    group, order = groups[kept].sort(stable=True)
    kept = kept[order]
    place = torch.arange(len(kept), device=kept.device)
    start = ((place - torch.searchsorted(group, group)) % _TOGETHER == 0).nonzero().squeeze(1)
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
            # In place of padding stands the group's first token or row.
            tokens = kept[start[some, None] + torch.arange(n_tokens, device=kept.device) * taken]
            yield tokens, first[some, None] + torch.arange(n_rows, device=kept.device) * owned, taken, owned


def _group_logits(x: Tensor, own: Tensor, owned: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens [g, n, width] and rows [g, m, width] of groups -> [g, n, m] in `dtype`, -inf where no row is owned."""
    return (x @ own.mT).to(dtype).masked_fill_(~owned.unsqueeze(1), -torch.inf)
