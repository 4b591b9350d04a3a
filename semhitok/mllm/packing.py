"""Samples of text and images, several in one row, each as if it were alone.

Positions restart with every sample. transformers reads the borders off them for every attention implementation (a
block-diagonal causal mask, or variable lengths for flash attention) as long as no attention mask and no cache is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semhitok.mllm.loss import IGNORE


class Sample(NamedTuple):
    """Ids [T] int64 and their labels [T]: the id, or -100 where nothing is learnt."""

    input_ids: Tensor
    labels: Tensor


class Packed(NamedTuple):
    """Rows of samples, each tensor [R, length] int64: the arguments of `UnifiedMLLM.forward` by name (`_asdict()`)."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


def join(*parts: tuple[Tensor | Sequence[int], bool]) -> Sample:
    """One sample of parts (ids, whether they are learnt) in a row: a question and its answer, a caption and its image.

    Image parts are what `Vocabulary.image` gives. Begin of image belongs to the prompt where an image is asked for.

    Raises:
        ValueError: no ids.
    """
    ids = [torch.as_tensor(part, dtype=torch.int64).flatten() for part, _ in parts]
    labels = [x if learnt else torch.full_like(x, IGNORE) for x, (_, learnt) in zip(ids, parts, strict=True)]
    if not sum(len(x) for x in ids):
        raise ValueError("parts: expected at least one id, got none")
    return Sample(torch.cat(ids), torch.cat(labels))


def pack(samples: Sequence[Sample], length: int, pad_id: int = 0) -> Packed:
    """Rows of `length` ids that hold all samples, each whole and in the first row with room for it.

    A row's rest is padding, which is a sample of its own without labels. The first id of a sample has no label: nothing
    before it belongs to it.

    Raises:
        ValueError: no samples, or one longer than `length`.
    """
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    rows: list[list[Sample]] = []
    used: list[int] = []
    for sample in samples:
        size = len(sample.input_ids)
        if size > length:
            raise ValueError(f"length: expected at least {size}, the length of a sample, got {length}")
        row = next((r for r, taken in enumerate(used) if taken + size <= length), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(sample)
        used[row] += size
    device = samples[0].input_ids.device
    shape = (len(rows), length)
    packed = Packed(
        torch.full(shape, pad_id, dtype=torch.int64, device=device),
        torch.full(shape, IGNORE, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
    )
    for row, members in enumerate(rows):
        start = 0
        for sample in members:
            end = start + len(sample.input_ids)
            packed.input_ids[row, start:end] = sample.input_ids
            packed.labels[row, start + 1 : end] = sample.labels[1:]
            packed.position_ids[row, start:end] = torch.arange(end - start, device=device)
            start = end
        packed.position_ids[row, start:] = torch.arange(length - start, device=device)
    return packed
