"""segment_sum: the fp64 sum in row order rounded once, to the last bit, however the rows are distributed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import FLOATS, randn, same_bits, threads
from torch import Tensor

from semhitok import ops, reference

LONG_SEGMENT = 1 << 16  # rows beyond which the CPU splits a segment over its columns


def random_ids(n: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed))


def assert_exact(values: Tensor, ids: Tensor, segments: int, device: torch.device) -> None:
    """Against a serial sum in float64, bit for bit; sums of float64 on CUDA, in another order, to within rounding."""
    sums, counts = ops.segment_sum(values.to(device), ids.to(device), segments)
    expected, expected_counts = reference.segment_sum(values, ids, segments)
    assert same_bits(counts.cpu(), expected_counts)
    if device.type == "cuda" and values.dtype == torch.float64:
        sizes = reference.segment_sum(values.abs(), ids, segments)[0]
        assert ((sums.cpu() - expected).abs() <= 2.0**-52 * len(values) * sizes).all()
    else:
        assert same_bits(sums.cpu(), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "n,d,segments",
    [(1, 1, 1), (7, 3, 1), (1000, 7, 13), (999, 32, 40), (500, 33, 2000), (3, 5, 100_000), (70_000, 1, 3)],
)
def test_exact(n: int, d: int, segments: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_exact(randn(n, d, seed=1, dtype=dtype), random_ids(n, -2, segments + 2, 2), segments, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 32, 33, 70])
def test_one_giant_segment(d: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of the greatest length that is not yet long, longer, and longer with rows of another segment in between."""
    for n, giant, stride in [(LONG_SEGMENT, 0, None), (LONG_SEGMENT + 1, 499, None), (LONG_SEGMENT + 7000, 250, 97)]:
        ids = torch.full((n,), giant)
        if stride is not None:
            ids[::stride] = 3
        assert_exact(randn(n, d, seed=1, dtype=dtype), ids, 500, device)


@pytest.mark.parametrize("ids", [[], [5, -1, 7, 2**40, -(2**63), 2**63 - 1]], ids=["no rows", "no valid rows"])
def test_nothing_to_add(ids: list[int], device: torch.device) -> None:
    for segments in (0, 1, 5):
        values, rows = torch.ones(len(ids), 3, device=device), torch.tensor(ids, dtype=torch.int64, device=device)
        sums, counts = ops.segment_sum(values, rows, segments)
        assert sums.shape == (segments, 3) and not sums.any() and counts.shape == (segments,) and not counts.any()


def test_bad_values_stay_in_their_segment(device: torch.device) -> None:
    values = torch.ones(300, 40, device=device)
    values[5, 3], values[7, 39], values[8, 39] = torch.nan, torch.inf, -torch.inf
    ids = torch.arange(300, device=device) // 30
    sums, _ = ops.segment_sum(values, ids, 10)
    assert sums[0, [3, 39]].isnan().all() and (sums[0, [0, 38]] == 30).all() and (sums[1:] == 30).all()


def test_same_bits_with_any_number_of_threads(device: torch.device) -> None:
    """Many rows a segment, few, one giant, none: distributed differently for every number of threads."""
    n = 3 * LONG_SEGMENT
    giant = random_ids(n, 0, 300, 1)
    giant[torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.6] = 77
    cases = [(random_ids(n, -5, 2000, 3), 1900), (random_ids(n, 0, 150_000, 4), 150_000), (giant, 300)]
    values, results = randn(n, 40, seed=5).to(device), []
    for count in range(1, 9):
        with threads(count):
            results.append([t for ids, s in cases for t in ops.segment_sum(values, ids.to(device), s)])
    for outputs in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(outputs, results[0], strict=True))
    for (ids, segments), sums in zip(cases, results[0][::2], strict=True):
        assert same_bits(sums.cpu(), reference.segment_sum(values.cpu(), ids, segments)[0])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 300), d=st.integers(1, 70), segments=st.integers(0, 80), dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_property_exact(n: int, d: int, segments: int, dtype: torch.dtype, seed: int) -> None:
    ids = random_ids(n, -1, segments + 1, seed)
    assert_exact(randn(n, d, seed=seed, dtype=dtype), ids, segments, torch.device("cpu"))
