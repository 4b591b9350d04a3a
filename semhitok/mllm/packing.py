"""Several samples of text and images in one row, none of which attends to another.

Positions restart with every sample. Given no attention mask and no cache, transformers derives the borders from them
for every attention implementation (a block-diagonal causal mask, or variable lengths for flash attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from semhitok.mllm.loss import IGNORE


class Sample(NamedTuple):
    """Ids [T] int64 and their labels [T]: the id, or -100 for no loss."""

    input_ids: Tensor
    labels: Tensor


class Packed(NamedTuple):
    """Rows of samples, int64 [R, length] each. `_asdict()` gives the arguments of `UnifiedMLLM.forward`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


def join(*parts: tuple[Tensor | Sequence[int], bool]) -> Sample:
    """Concatenate parts (ids, whether they are learnt) to one sample: a question and its answer, say.

    `Vocabulary.image` returns the ids of an image. For generation, begin of image belongs to the prompt.

    Raises:
        ValueError: no ids.
    """
    ids = [torch.as_tensor(part, dtype=torch.int64).flatten() for part, _ in parts]
    labels = [x if learnt else torch.full_like(x, IGNORE) for x, (_, learnt) in zip(ids, parts, strict=True)]
    if not sum(len(x) for x in ids):
        raise ValueError("parts: expected at least one id, got none")
    return Sample(torch.cat(ids), torch.cat(labels))


def pack(samples: Sequence[Sample], length: int, pad_id: int = 0) -> Packed:
    """Pack samples into rows of `length` ids, each sample into the first row with room for it.

    The rest of a row is padding: another sample, without labels. The first id of a sample has no label, as nothing
    predicts it.

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
    packed = Packed(*(torch.full(shape, value, device=device) for value in (pad_id, IGNORE, 0)))
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
