"""Next-token losses over hundreds of thousands of ids, whose logits never exist at once.

Logits of N tokens and V ids are computed in tiles of at most `TILE` numbers, once for the loss and once more for the
gradients. Beyond the weights and their gradients that takes about three tiles (200 MB in fp32) and N * width numbers,
whatever V is. The gradient of a weight is made once, in place; a weight that needs none costs nothing. (As with every
parameter, a second backward pass before the optimiser's step holds a second gradient while it is added to the first.)
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


def group_cross_entropy(hidden: Tensor, weight: Tensor, groups: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token over the rows of its own group, whose logits are weight[group] @ hidden.

    Args:
        hidden: [N, width], floating point; dtypes as in `linear_cross_entropy`.
        weight: [K, m, width].
        groups: [N] int64 in [0, K).
        targets: [N] int64 in [0, m), or -100 for no loss.

    Returns:
        [N] fp32 (fp64 for fp64), 0 where there is no loss. Differentiable once, in hidden and weight.

    Raises:
        ValueError: other shapes, a group or a target out of range.
    """
    _check_hidden(hidden, targets)
    if weight.ndim != 3 or weight.shape[2] != hidden.shape[1]:
        raise ValueError(f"weight: expected [K, m, {hidden.shape[1]}], got {list(weight.shape)}")
    if groups.shape != targets.shape:
        raise ValueError(f"groups: expected {list(targets.shape)}, got {list(groups.shape)}")
    _check_range("targets", targets, weight.shape[1])
    groups = torch.where(targets == IGNORE, 0, groups)
    _check_range("groups", groups, weight.shape[0])
    return _GroupCrossEntropy.apply(hidden, groups, targets, _dtype(hidden), weight)


def _check_hidden(hidden: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected [N, width] of floats, got {list(hidden.shape)} of {hidden.dtype}")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        got = f"{list(targets.shape)} of {targets.dtype}"
        raise ValueError(f"targets: expected [{len(hidden)}] of int64, got {got}")


def _check_range(name: str, ids: Tensor, stop: int) -> None:
    if ids.numel() and not torch.compiler.is_compiling():
        wrong = (ids >= stop) | ((ids < 0) & (ids != IGNORE))
        if wrong.any():
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
        ctx: Any, hidden: Tensor, groups: Tensor, targets: Tensor, dtype: torch.dtype, weight: Tensor
    ) -> Tensor:
        loss = hidden.new_zeros(len(hidden), dtype=_wide(hidden.dtype))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _group_chunks(targets, weight):
                logits = _group_logits(hidden[rows].to(dtype), weight[groups[rows]].to(dtype)).to(loss.dtype)
                loss[rows] = torch.nn.functional.cross_entropy(logits, targets[rows], reduction="none")
        ctx.save_for_backward(hidden, groups, targets, weight)
        ctx.dtype = dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, groups, targets, weight = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[4] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _group_chunks(targets, weight):
                x, own = hidden[rows].to(ctx.dtype), weight[groups[rows]].to(ctx.dtype)
                gradient = _group_logits(x, own).to(upstream.dtype).softmax(-1)
                gradient[torch.arange(len(rows), device=rows.device), targets[rows]] -= 1
                gradient = gradient.mul_(upstream[rows, None]).to(ctx.dtype)
                if d_hidden is not None:
                    d_hidden[rows] = torch.einsum("nm,nmw->nw", gradient, own).to(d_hidden.dtype)
                if d_weight is not None:
                    d_weight.index_add_(0, groups[rows], (gradient[:, :, None] * x[:, None, :]).to(d_weight.dtype))
        return d_hidden, None, None, None, d_weight


def _group_chunks(targets: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Indices of tokens with a loss, so many together that their groups' rows fill a tile."""
    return (targets != IGNORE).nonzero().squeeze(1).split(max(1, TILE // weight[0].numel()))


def _group_logits(x: Tensor, own: Tensor) -> Tensor:
    """x [n, width] and the rows [n, m, width] of each token's group -> [n, m]."""
    return torch.einsum("nmw,nw->nm", own, x)
