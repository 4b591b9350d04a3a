"""The compiled ops `torch.ops.semhitok.*`: a function for each, and their shape, gradient and autocast rules.

Their contract is the same on every backend (csrc/ops.cpp states and checks it):

- The score of code c for token z is z.c (metric "ip") or z.c - |c|^2/2 ("l2", the same winner as the least distance).
  The lowest index wins among equal scores; NaN never wins.
- float32, float16, bfloat16 and float64; tensors may differ in dtype. The search runs in fp32 whatever the autocast
  state, or in fp64 if any input is float64. Quantised vectors are exact copies of codebook rows, in its dtype.
- On the CPU, with inputs of at most float32, nearest_code's ids are those of fp64 arithmetic; its scores, and those of
  sub-codes before they are compared, are fp64 sums rounded to fp32 once. Both are the same on every instruction set.
  On CUDA ids are those of fp64 wherever fp64 scores differ by more than fp32 rounding.
- A token with NaN or Inf gets id 0 and score NaN, so ids are always in range.
- Any leading dimensions and strides; no tokens gives empty outputs.
- Sub-codebooks are all of one size m in a table [K, m, D], or of sizes m_i of their own in a table [T, D] with
  `offsets` [K + 1] int64: sub-codebook i is rows offsets[i] to offsets[i + 1] - 1, each m_i >= 1, offsets[0] = 0,
  offsets[K] = T. A flat code is offsets[i] + j. Other offsets raise on the CPU; on CUDA, where a check would wait for
  the device, they give meaningless ids, but in range, and nothing outside the table is read.
- Ids out of range do not raise, since a check would wait for the device; each op says what they give.
- Every other mistake (a wrong dtype, shape, device or metric) raises RuntimeError with the argument, what was expected
  and what it got.
- The same input gives the same bits, on every run and with any number of threads.
- Under autocast the floating-point inputs are cast to float32 first, and so are the outputs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from . import _C  # noqa: F401  (registers the ops; after torch, whose symbols it needs)
except ImportError as error:
    raise ImportError(
        f"semhitok's compiled ops could not be loaded ({error}): build them with `pip install -e .` in the repository"
    ) from error

from .grouping import Grouping

__all__ = ["hier_lookup", "hier_quantize", "nearest_code", "nearest_subcode", "segment_sum"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_ops = torch.ops.semhitok


# ---- public functions ----


def nearest_code(z: Tensor, codebook: Tensor, metric: str = "ip") -> tuple[Tensor, Tensor]:
    """The best code of one codebook for every token.

    Args:
        z: tokens [..., D], floating point.
        codebook: [K, D], floating point, K >= 1.
        metric: "ip" or "l2".

    Returns:
        scores [...] (float32, or float64 when an input is), differentiable in z and codebook;
        ids [...] int64 in [0, K).

    Equivalent to: `(z @ codebook.T + bias).max(-1)`.

    On the CPU the packed form of a codebook is cached, and packed again once its values change.
    """
    return _ops.nearest_code(z, codebook, metric)


def nearest_subcode(
    z: Tensor, sub_codebooks: Tensor, group: Tensor, metric: str = "l2", offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best sub-code for every token inside the sub-codebook its group names (SemHiTok's pixel stage).

    Args:
        z: tokens [..., D], floating point.
        sub_codebooks: [K, m, D], floating point, K, m >= 1; with offsets [T, D].
        group: [...] int64; outside [0, K) gives id 0 and score NaN.
        metric: "ip" or "l2".
        offsets: [K + 1] int64, the first row of each sub-codebook, where sizes differ, and T.

    Returns:
        scores [...] (float32, or float64 when an input is), differentiable in z and sub_codebooks;
        ids [...] int64 in [0, m), with offsets in [0, m_i).

    Equivalent to: `(einsum("...d,...md->...m", z, sub_codebooks[group]) + bias).max(-1)`.
    """
    return _ops.nearest_subcode(z, sub_codebooks, group, metric, offsets)


def hier_quantize(
    z_sem: Tensor,
    z_pix: Tensor,
    sem_codebook: Tensor,
    pix_codebook: Tensor,
    sem_metric: str = "ip",
    pix_metric: str = "l2",
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both stages of the semantic-guided hierarchical codebook: semantic code i, then sub-code j of sub-codebook i.

    Args:
        z_sem: [..., Ds], floating point.
        z_pix: [..., Dp], floating point, the leading dimensions of z_sem.
        sem_codebook: [K, Ds], floating point.
        pix_codebook: [K, m, Dp], floating point; with offsets [T, Dp].
        sem_metric: "ip" or "l2".
        pix_metric: "ip" or "l2".
        offsets: [K + 1] int64, the first row of each sub-codebook, where sizes differ, and T.

    Returns:
        q_sem [..., Ds] = sem_codebook[i] and q_pix [..., Dp] = pix_codebook[i, j], differentiable in the codebooks and
        constant in z (straight-through estimation is the quantizer module's);
        codes [...] int64 = i * m + j, with offsets offsets[i] + j.

    Equivalent to: nearest_code, nearest_subcode with group = i, and two gathers, without an N x K or N x m x Dp
    intermediate.
    """
    return _ops.hier_quantize(z_sem, z_pix, sem_codebook, pix_codebook, sem_metric, pix_metric, offsets)


def hier_lookup(
    codes: Tensor, sem_codebook: Tensor, pix_codebook: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The quantised vectors of flat codes.

    Args:
        codes: [...] int64 = i * m + j, with offsets offsets[i] + j; outside [0, K * m) or [0, T) gives rows of NaN.
        sem_codebook: [K, Ds], floating point.
        pix_codebook: [K, m, Dp], floating point; with offsets [T, Dp].
        offsets: [K + 1] int64, the first row of each sub-codebook, where sizes differ, and T.

    Returns:
        q_sem [..., Ds] and q_pix [..., Dp], in their codebook's dtype and differentiable in it.

    Equivalent to: `sem_codebook[codes // m], pix_codebook.flatten(0, 1)[codes]`.
    """
    return _ops.hier_lookup(codes, sem_codebook, pix_codebook, offsets)


def segment_sum(values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Deterministic sums of rows by id: the EMA statistics and the codebooks' gradient.

    Args:
        values: [N, D], floating point, D >= 1.
        ids: [N] int64; rows with an id outside [0, num_segments) are left out.
        num_segments: S >= 0.

    Returns:
        sums [S, D] (float32, or float64 for float64 values), added in fp64 in a fixed order (on the CPU that
        of the rows) and rounded once, differentiable in values; counts [S] int64.

    Equivalent to: `zeros(S, D).index_add_(0, ids, values), bincount(ids, minlength=S)`.
    """
    return _ops.segment_sum(values, ids, num_segments)


# ---- shapes without data (fake tensors): the checks of csrc/ops.cpp that need no values, with the same messages ----


def _check(condition: Any, message: str) -> None:
    """RuntimeError unless `condition` holds; it may compare symbolic sizes."""
    torch._check(condition, lambda: message)


def _check_floats(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        got = str(t.dtype).removeprefix("torch.")
        _check(t.dtype in _FLOATS, f"{name}: expected float32, float16, bfloat16 or float64, got {got}")


def _check_ids(name: str, t: Tensor) -> None:
    _check(t.dtype == torch.int64, f"{name}: expected int64, got {str(t.dtype).removeprefix('torch.')}")


def _check_dims(name: str, t: Tensor, dims: int, layout: str) -> None:
    _check(t.dim() == dims, f"{name}: expected {dims} dimensions {layout}, got {t.dim()}")


def _check_devices(name: str, first: Tensor, **tensors: Tensor | None) -> None:
    """The kernels here also run when only some tensors are on the meta device, and would return memory as it is."""
    for other, t in tensors.items():
        same = t is None or t.device == first.device
        _check(same, f"{other}: expected device {first.device} (that of {name}), got {None if t is None else t.device}")


def _check_metrics(**metrics: str) -> None:
    for name, metric in metrics.items():
        _check(metric in ("ip", "l2"), f'{name}: expected "ip" or "l2", got "{metric}"')


def _check_tokens(name: str, z: Tensor, codebook_name: str, codebook: Tensor) -> None:
    _check(z.dim() >= 1, f"{name}: expected at least 1 dimension [..., D], got a scalar")
    expected, got = codebook.shape[-1], z.shape[-1]
    _check(got == expected, f"{name}: expected last dimension {expected} ({codebook_name}.shape[-1]), got {got}")


def _check_leading(name: str, got: torch.Size, other: str, expected: torch.Size) -> None:
    message = f"{name}: expected leading dimensions {list(expected)} (those of {other}), got {list(got)}"
    _check(len(got) == len(expected), message)
    for a, b in zip(got, expected, strict=True):
        _check(a == b, message)


def _score_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@torch.library.register_fake("semhitok::nearest_code")
def _(z: Tensor, codebook: Tensor, metric: str = "ip") -> tuple[Tensor, Tensor]:
    _check_metrics(metric=metric)
    _check_floats(z=z, codebook=codebook)
    _check_dims("codebook", codebook, 2, "[K, D]")
    _check_tokens("z", z, "codebook", codebook)
    _check_devices("z", z, codebook=codebook)
    return z.new_empty(z.shape[:-1], dtype=_score_dtype(z, codebook)), z.new_empty(z.shape[:-1], dtype=torch.int64)


def _check_sub_codebooks(
    name: str, table: Tensor, depth: str, offsets: Tensor | None, sem_codebook: Tensor | None = None
) -> None:
    num_codes = None if sem_codebook is None else sem_codebook.shape[0]
    if offsets is None:
        _check_dims(name, table, 3, f"[K, m, {depth}]")
        message = f"{name}: expected first dimension {num_codes} (sem_codebook.shape[0]), got {table.shape[0]}"
        _check(num_codes is None or table.shape[0] == num_codes, message)
        return
    _check_dims(name, table, 2, f"[T, {depth}] (with offsets)")
    _check_ids("offsets", offsets)
    if num_codes is None:
        expected, fits = "[K + 1] with K of at least 1", offsets.dim() == 1 and offsets.shape[0] >= 2
    else:
        expected = f"[{num_codes + 1}] (sem_codebook.shape[0] + 1)"
        fits = offsets.dim() == 1 and offsets.shape[0] == num_codes + 1
    _check(fits, f"offsets: expected shape {expected}, got {list(offsets.shape)}")


@torch.library.register_fake("semhitok::nearest_subcode")
def _(
    z: Tensor, sub_codebooks: Tensor, group: Tensor, metric: str = "l2", offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_metrics(metric=metric)
    _check_floats(z=z, sub_codebooks=sub_codebooks)
    _check_ids("group", group)
    _check_sub_codebooks("sub_codebooks", sub_codebooks, "D", offsets)
    _check_tokens("z", z, "sub_codebooks", sub_codebooks)
    _check_leading("group", group.shape, "z", z.shape[:-1])
    _check_devices("z", z, sub_codebooks=sub_codebooks, group=group, offsets=offsets)
    return z.new_empty(z.shape[:-1], dtype=_score_dtype(z, sub_codebooks)), z.new_empty(z.shape[:-1], dtype=torch.int64)


def _check_codebooks(sem_codebook: Tensor, pix_codebook: Tensor, offsets: Tensor | None) -> None:
    _check_floats(sem_codebook=sem_codebook, pix_codebook=pix_codebook)
    _check_dims("sem_codebook", sem_codebook, 2, "[K, Ds]")
    _check_sub_codebooks("pix_codebook", pix_codebook, "Dp", offsets, sem_codebook)


@torch.library.register_fake("semhitok::hier_quantize")
def _(
    z_sem: Tensor,
    z_pix: Tensor,
    sem_codebook: Tensor,
    pix_codebook: Tensor,
    sem_metric: str = "ip",
    pix_metric: str = "l2",
    offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_metrics(sem_metric=sem_metric, pix_metric=pix_metric)
    _check_floats(z_sem=z_sem, z_pix=z_pix)
    _check_codebooks(sem_codebook, pix_codebook, offsets)
    _check_tokens("z_sem", z_sem, "sem_codebook", sem_codebook)
    _check_tokens("z_pix", z_pix, "pix_codebook", pix_codebook)
    _check_leading("z_pix", z_pix.shape[:-1], "z_sem", z_sem.shape[:-1])
    tables = {"sem_codebook": sem_codebook, "pix_codebook": pix_codebook, "offsets": offsets}
    _check_devices("z_sem", z_sem, z_pix=z_pix, **tables)
    leading = z_sem.shape[:-1]
    return (
        z_sem.new_empty((*leading, sem_codebook.shape[1]), dtype=sem_codebook.dtype),
        z_sem.new_empty((*leading, pix_codebook.shape[-1]), dtype=pix_codebook.dtype),
        z_sem.new_empty(leading, dtype=torch.int64),
    )


@torch.library.register_fake("semhitok::hier_lookup")
def _(
    codes: Tensor, sem_codebook: Tensor, pix_codebook: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_ids("codes", codes)
    _check_codebooks(sem_codebook, pix_codebook, offsets)
    _check_devices("codes", codes, sem_codebook=sem_codebook, pix_codebook=pix_codebook, offsets=offsets)
    return (
        sem_codebook.new_empty((*codes.shape, sem_codebook.shape[1])),
        pix_codebook.new_empty((*codes.shape, pix_codebook.shape[-1])),
    )


@torch.library.register_fake("semhitok::segment_sum")
def _(values: Tensor, ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    _check_floats(values=values)
    _check_ids("ids", ids)
    _check_dims("values", values, 2, "[N, D]")
    fits = ids.dim() == 1 and ids.shape[0] == values.shape[0]
    _check(fits, f"ids: expected shape [{values.shape[0]}] (values.shape[0]), got {list(ids.shape)}")
    _check_devices("values", values, ids=ids)
    return (
        values.new_empty((num_segments, values.shape[1]), dtype=_score_dtype(values)),
        values.new_empty((num_segments,), dtype=torch.int64),
    )


# ---- gradients: all are gathers and segment sums by the ids of the forward pass ----


def _rows_gradient(grad: Tensor, ids: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The gradient of codebook rows [num_rows, D] taken at ids [...]: the sum of grad [..., D] over equal ids."""
    sums, _ = _ops.segment_sum(grad.reshape(-1, grad.shape[-1]), ids.reshape(-1), num_rows)
    return sums.to(dtype)


def _nearest_code_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, codebook, metric = inputs
    _nearest_subcode_setup(ctx, (z, codebook, None, metric, None), output)


def _nearest_subcode_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, codebook, group, ctx.metric, offsets = inputs
    scores, ids = output
    ctx.mark_non_differentiable(ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, codebook, group, ids, ~scores.detach().isnan(), offsets)


def _nearest_code_backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    return _nearest_subcode_backward(ctx, grad, _)[:3]


def _nearest_subcode_backward(ctx: Any, grad: Tensor | None, _: None) -> Any:
    if grad is None:
        return None, None, None, None, None
    z, codebook, group, ids, found, offsets = ctx.saved_tensors
    rows = codebook.reshape(-1, codebook.shape[-1])
    if group is not None:
        flat = Grouping.of(codebook, offsets).join(torch.where(found, group, 0), ids)
        # Offsets on a GPU may hold anything: no row outside the table is read.
        ids = torch.where(found, flat, 0).clamp(0, rows.shape[0] - 1)
    weight = torch.where(found, grad, 0.0).to(_score_dtype(z, rows))[..., None]
    # Where nothing was found the row may hold NaN, which a weight of zero would keep.
    won = torch.where(found[..., None], rows[ids].to(weight.dtype), 0.0)
    token = torch.where(found[..., None], z.to(weight.dtype), 0.0)
    grad_z = (weight * won).to(z.dtype) if ctx.needs_input_grad[0] else None
    grad_codebook = None
    if ctx.needs_input_grad[1]:
        pull = token - won if ctx.metric == "l2" else token
        grad_codebook = _rows_gradient(weight * pull, ids, rows.shape[0], rows.dtype).view(codebook.shape)
    return grad_z, grad_codebook, None, None, None


def _codebook_gradients(ctx: Any, grad_sem: Tensor | None, grad_pix: Tensor | None, sem: bool, pix: bool) -> Any:
    """Gradients of sem_codebook and pix_codebook from those of q_sem and q_pix."""
    codes, offsets = ctx.saved_tensors
    grouping = Grouping(ctx.num_groups, math.prod(ctx.pix_shape[:-1]), offsets)
    to_sem = to_pix = None
    # Codes out of range gave constant rows, and have groups out of range, which segment_sum leaves out.
    if sem and grad_sem is not None:
        to_sem = _rows_gradient(grad_sem, grouping.group_of(codes), grouping.num_groups, ctx.sem_dtype)
    if pix and grad_pix is not None:
        to_pix = _rows_gradient(grad_pix, codes, grouping.num_ids, ctx.pix_dtype).view(ctx.pix_shape)
    return to_sem, to_pix


def _hier_quantize_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[2])
    _hier_lookup_setup(ctx, (output[2], inputs[2], inputs[3], inputs[6]), output)


def _hier_lookup_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    codes, sem_codebook, pix_codebook, offsets = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(codes, offsets)
    ctx.num_groups, ctx.pix_shape = sem_codebook.shape[0], pix_codebook.shape
    ctx.sem_dtype, ctx.pix_dtype = sem_codebook.dtype, pix_codebook.dtype


def _hier_quantize_backward(ctx: Any, grad_sem: Tensor | None, grad_pix: Tensor | None, _: None) -> Any:
    gradients = _codebook_gradients(ctx, grad_sem, grad_pix, *ctx.needs_input_grad[2:4])
    return None, None, *gradients, None, None, None


def _hier_lookup_backward(ctx: Any, grad_sem: Tensor | None, grad_pix: Tensor | None) -> Any:
    return None, *_codebook_gradients(ctx, grad_sem, grad_pix, *ctx.needs_input_grad[1:3]), None


def _segment_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, ids, ctx.num_segments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(ids)
    ctx.dtype = values.dtype


def _segment_sum_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    (ids,) = ctx.saved_tensors
    known = (ids >= 0) & (ids < ctx.num_segments)
    # Ids out of range take the row of zeros behind those of the segments.
    rows = F.pad(grad, (0, 0, 0, 1))[torch.where(known, ids, ctx.num_segments)]
    return rows.to(ctx.dtype), None, None


for _name, _backward, _setup in (
    ("nearest_code", _nearest_code_backward, _nearest_code_setup),
    ("nearest_subcode", _nearest_subcode_backward, _nearest_subcode_setup),
    ("hier_quantize", _hier_quantize_backward, _hier_quantize_setup),
    ("hier_lookup", _hier_lookup_backward, _hier_lookup_setup),
    ("segment_sum", _segment_sum_backward, _segment_sum_setup),
):
    torch.library.register_autograd(f"semhitok::{_name}", _backward, setup_context=_setup)
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(f"semhitok::{_name}", _device, torch.float32)
