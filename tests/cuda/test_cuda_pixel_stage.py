"""The CUDA kernels around the search on the emulator: the pixel stage, the gather of rows, segment sums, SIMT search.

Each runs with two orders of its blocks, warps and lanes, which must not change a bit.
"""

from __future__ import annotations

import itertools
from typing import Any

import emulated
import pytest
import torch
from op_checks import assert_nearest, randn, same_bits
from torch import Tensor

from semhitok import reference

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METRICS = ["ip", "l2"]
LARGE_ROW = 8192  # bytes of a sub-codebook beyond which tokens are taken in the order of their groups
CHUNK = 32  # sorted rows that segment_sum adds up in one go, while there are few

pytestmark = pytest.mark.skipif(emulated.toolkit_include() is None, reason="no CUDA toolkit")


@pytest.fixture(scope="module")
def kernels() -> emulated.Kernels:
    include = emulated.toolkit_include()
    assert include is not None
    return emulated.Kernels(emulated.build(include))


def run(kernels: emulated.Kernels, name: str, *arguments: Any) -> tuple[Tensor, ...]:
    results = []
    for seed in (1, 2):
        kernels.set_seed(seed)
        results.append(getattr(kernels, name)(*arguments))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True)), f"{name}: other bits in another order"
    return results[0]


def ints(n: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed))


# ---- the pixel stage ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 3, 4, 5, 8, 12, 16, 20, 24, 31, 32, 40, 48, 64, 65, 96, 128, 136, 160, 256, 264])
def test_every_depth_and_number_of_sub_codes(kernels: emulated.Kernels, d: int, dtype: torch.dtype) -> None:
    """Whole and partial pieces on every number of lanes, and value by value; full and partial batches of codes."""
    for m, metric in [(1, "l2"), (3, "ip"), (4, "l2"), (7, "l2"), (12, "ip"), (13, "l2")]:
        z, codes = randn(37, d, seed=d), randn(6, m, d, seed=m, dtype=dtype)
        group = ints(37, 0, 6, 3)
        assert_nearest(z, codes[group], metric, *run(kernels, "nearest_subcode", z, codes, group, metric))


@pytest.mark.parametrize("z_dtype,code_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_dtypes_of_tokens_and_codes(kernels: emulated.Kernels, z_dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    for d in (11, 32):
        z, codes = randn(40, d, seed=1, dtype=z_dtype), randn(3, 9, d, seed=2, dtype=code_dtype)
        group = ints(40, 0, 3, 4)
        assert_nearest(z, codes[group], "l2", *run(kernels, "nearest_subcode", z, codes, group, "l2"))


@pytest.mark.parametrize("groups", ["random", "one", "skewed"])
@pytest.mark.parametrize("m,d,dtype", [(65, 32, torch.float32), (130, 32, torch.float16), (300, 7, torch.float32),
                                       (67, 17, torch.float64)])  # fmt: skip
def test_large_sub_codebooks(kernels: emulated.Kernels, m: int, d: int, dtype: torch.dtype, groups: str) -> None:
    """Tokens taken by group: the same bits as one at a time, whichever tokens share a group."""
    n, k = 90, 5
    z, codes = randn(n, d, seed=1), randn(k, m, d, seed=2, dtype=dtype)
    assert m * d * dtype.itemsize > LARGE_ROW and n >= k
    group = ints(n, 0, {"random": k, "one": 1, "skewed": 60}[groups], 3).clamp_max(k - 1)
    group[[3, 50]] = torch.tensor([-1, k])
    scores, ids = run(kernels, "nearest_subcode", z, codes, group, "l2")
    bad = (group < 0) | (group >= k)
    assert scores[bad].isnan().all() and (ids[bad] == 0).all()
    assert_nearest(z[~bad], codes[group[~bad]], "l2", scores[~bad], ids[~bad])
    assert kernels.c.launches() > 1
    few = slice(0, k - 1)  # too few tokens to sort
    alone = kernels.nearest_subcode(z[few], codes, group[few], "l2")
    assert same_bits(alone[0], scores[few]) and torch.equal(alone[1], ids[few])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_lowest_of_equal_sub_codes_anywhere(kernels: emulated.Kernels, metric: str, dtype: torch.dtype) -> None:
    for d, m in [(4, 9), (8, 9), (16, 9), (32, 9), (64, 9), (5, 9), (19, 9), (48, 11), (128, 6)]:
        pairs = list(itertools.combinations(range(m), 2))
        codes = randn(1, m, d, seed=1, dtype=dtype).clamp(-0.5, 0.5).repeat(len(pairs), 1, 1)
        for i, pair in enumerate(pairs):
            codes[i, list(pair)] = 1
        z = torch.ones(len(pairs), d, dtype=dtype)
        ids = kernels.nearest_subcode(z, codes, torch.arange(len(pairs)), metric)[1]
        assert ids.tolist() == [first for first, _ in pairs]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [5, 8, 32, 48])
def test_bad_values_at_every_place(
    kernels: emulated.Kernels, d: int, metric: str, bad: float, dtype: torch.dtype
) -> None:
    z, codes, place = randn(d, d, seed=1, dtype=dtype), randn(1, 9, d, seed=2, dtype=dtype), torch.arange(d)
    winner = kernels.nearest_subcode(z, codes, torch.zeros_like(place), metric)[1]
    spoiled = codes.repeat(d, 1, 1)
    spoiled[place, winner, place] = bad
    scores, ids = kernels.nearest_subcode(z, spoiled, place, metric)
    kept = reference.nearest_subcode(z.double(), spoiled.double(), place, metric)[1]
    assert not scores.isnan().any() and (ids != winner).all() and torch.equal(ids, kept)
    z[place, place] = bad
    z = torch.cat([z, randn(1, d, seed=3, dtype=dtype)])
    scores, ids = kernels.nearest_subcode(z, codes, torch.zeros(d + 1, dtype=torch.int64), metric)
    assert scores[:d].isnan().all() and (ids[:d] == 0).all() and not scores[d].isnan()


def test_scores_that_overflow(kernels: emulated.Kernels) -> None:
    big = 3e38
    for d in (2, 8):
        codes, z = torch.zeros(1, 4, d), torch.zeros(3, d)
        codes[0, 1:, 0], z[:, 0] = torch.tensor([-1.0, big, big]), torch.tensor([big, -big, 1.0])
        zero = torch.zeros(3, dtype=torch.int64)
        scores, ids = kernels.nearest_subcode(z, codes, zero, "ip")
        assert ids.tolist() == [2, 1, 2] and scores[0] == torch.inf
        assert kernels.nearest_subcode(z[2:], codes, zero[2:], "l2")[1].item() == 0
        scores, ids = kernels.nearest_subcode(z[2:], codes[:, 2:].contiguous(), zero[2:], "l2")
        assert scores.isnan().item() and ids.item() == 0


@pytest.mark.parametrize("sem_dtype,pix_dtype", [*zip(FLOATS, FLOATS, strict=True), (torch.float16, torch.float32)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("ds,dp,m", [(32, 32, 12), (48, 8, 5), (7, 32, 3), (16, 9, 1), (8, 64, 140), (200, 16, 2)])
def test_hier_quantize_is_its_parts(
    kernels: emulated.Kernels, ds: int, dp: int, m: int, sem_dtype: torch.dtype, pix_dtype: torch.dtype
) -> None:
    """The same bits as the ops one after another, bad tokens included."""
    n, k = 75, 40
    sem, pix = randn(k, ds, seed=1, dtype=sem_dtype), randn(k, m, dp, seed=2, dtype=pix_dtype)
    z_sem, z_pix = randn(n, ds, seed=3), randn(n, dp, seed=4)
    z_sem[5, 0], z_pix[6, dp - 1], z_pix[74, 0] = torch.nan, torch.inf, torch.nan
    q_sem, q_pix, codes = run(kernels, "hier_quantize", z_sem, z_pix, sem, pix, "ip", "l2")
    wide = torch.float64 in (sem_dtype, pix_dtype)
    first, second = (z_sem.double(), z_pix.double()) if wide else (z_sem, z_pix)
    groups = kernels.nearest_code(first, sem, "ip")[1]
    ids = kernels.nearest_subcode(second, pix, groups, "l2")[1]
    assert torch.equal(codes, groups * m + ids) and groups[5] == 0 and ids[6] == ids[74] == 0
    assert same_bits(q_sem, sem[groups]) and same_bits(q_pix, pix[groups, ids])


def test_tables_that_are_not_aligned(kernels: emulated.Kernels) -> None:
    """Rows of whole pieces at an address that is not a multiple of a piece."""
    n, k, m, d = 20, 6, 5, 32
    z, codes, group = randn(n, d, seed=1), randn(k, m, d, seed=2), ints(n, 0, k, 3)
    expected = kernels.nearest_subcode(z, codes, group, "l2")
    moved = [torch.cat([torch.zeros(1), t.reshape(-1)])[1:].view(t.shape) for t in (z, codes)]
    for a, b in [(moved[0], codes), (z, moved[1]), (moved[0], moved[1])]:
        scores, ids = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
        kernels.call("nearest_subcode", n, k, m, d, 1, 0, a.data_ptr(), 0, b.data_ptr(), 0, group, scores, ids, 0, 0)
        assert torch.equal(ids, expected[1]) and torch.allclose(scores, expected[0], rtol=1e-5, atol=1e-5)
        kernels.call("nearest_code", n, k * m, d, 1, 0, a.data_ptr(), 0, b.data_ptr(), 0, scores, ids)
        assert_nearest(z, codes.view(-1, d), "l2", scores, ids)
    q_sem, q_pix, flat = torch.zeros(n, d), torch.zeros(n, d), ints(n, 0, k * m, 5)
    rows = (moved[0].data_ptr(), 0, d, moved[1].data_ptr(), 0, d)
    kernels.call("hier_lookup", n, k, m, *rows, flat, q_sem, q_pix, 0, 0)
    assert same_bits(q_sem, z[flat // m]) and same_bits(q_pix, codes.view(-1, d)[flat])


@pytest.mark.parametrize("sem_dtype,pix_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_lookup_is_indexing(kernels: emulated.Kernels, sem_dtype: torch.dtype, pix_dtype: torch.dtype) -> None:
    shapes = [(1, 1, 1, 1, 3), (15, 4, 3, 7, 33), (16, 30, 1, 1, 64), (90, 50, 6, 64, 8), (9, 3, 3, 160, 16)]
    for n, k, m, ds, dp in shapes:
        sem, pix = randn(k, ds, seed=1, dtype=sem_dtype), randn(k, m, dp, seed=2, dtype=pix_dtype)
        codes = ints(n, -1, k * m + 1, 3)
        codes[0] = 2**62 if n > 1 else codes[0]
        for ours, theirs in zip(
            run(kernels, "hier_lookup", codes, sem, pix), reference.hier_lookup(codes, sem, pix), strict=True
        ):
            assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


# ---- sub-codebooks of different sizes ----

SIZES = [3, 1, 4, 2, 130, 1, 7, 65, 12]


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("d", [1, 4, 8, 12, 16, 31, 32, 48, 64, 128, 136])
def test_sizes_of_their_own(kernels: emulated.Kernels, d: int, dtype: torch.dtype) -> None:
    """Tokens of long and of short sub-codebooks in one warp; each finds what it finds alone."""
    n, k, offsets = 61, len(SIZES), offsets_of(SIZES)
    z, table, group = randn(n, d, seed=1), randn(sum(SIZES), d, seed=2, dtype=dtype), ints(n, -1, k + 1, 3)
    for metric in METRICS:
        scores, ids = run(kernels, "nearest_subcode", z, table, group, metric, offsets)
        for i, own in enumerate(table.split(SIZES)):
            mine = group == i
            assert_nearest(z[mine], own, metric, scores[mine], ids[mine])
            alone = kernels.nearest_subcode(z[mine], own[None], torch.zeros_like(group[mine]), metric)
            assert same_bits(alone[0], scores[mine]) and torch.equal(alone[1], ids[mine])
        bad = (group < 0) | (group >= k)
        assert bad.any() and scores[bad].isnan().all() and (ids[bad] == 0).all()
    sem, z_sem = randn(k, 9, seed=4), randn(n, 9, seed=5)
    z_sem[3, 0], z[4, d - 1] = torch.nan, torch.nan
    q_sem, q_pix, codes = run(kernels, "hier_quantize", z_sem, z, sem, table, "ip", "l2", offsets)
    wide = dtype == torch.float64
    i = kernels.nearest_code(z_sem.double() if wide else z_sem, sem, "ip")[1]
    j = kernels.nearest_subcode(z, table, i, "l2", offsets)[1]
    assert torch.equal(codes, offsets[i] + j) and same_bits(q_sem, sem[i]) and same_bits(q_pix, table[codes])
    codes = torch.arange(-1, sum(SIZES) + 1)
    expected = reference.hier_lookup(codes, sem, table, offsets)
    for ours, theirs in zip(run(kernels, "hier_lookup", codes, sem, table, offsets), expected, strict=True):
        assert torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


def test_large_sub_codebooks_of_their_own(kernels: emulated.Kernels) -> None:
    """The mean is beyond LARGE_ROW: tokens are taken by group."""
    sizes, d, n = [200, 1, 90, 3, 120], 32, 70
    offsets, k = offsets_of(sizes), len(sizes)
    z, table, group = randn(n, d, seed=1), randn(sum(sizes), d, seed=2), ints(n, -1, k + 1, 3)
    scores, ids = run(kernels, "nearest_subcode", z, table, group, "l2", offsets)
    assert sum(sizes) / k * d * 4 > LARGE_ROW and kernels.c.launches() > 1
    for i, own in enumerate(table.split(sizes)):
        assert_nearest(z[group == i], own, "l2", scores[group == i], ids[group == i])


@pytest.mark.parametrize("d", [5, 32])
def test_equal_sizes_give_the_bits_of_a_fixed_size(kernels: emulated.Kernels, d: int) -> None:
    n, k, m = 45, 12, 9
    z, sem, pix = randn(n, d, seed=1), randn(k, d, seed=2), randn(k, m, d, seed=3)
    offsets, flat, group = torch.arange(k + 1) * m, pix.flatten(0, 1), ints(n, 0, k, 4)
    fixed = [*kernels.nearest_subcode(z, pix, group), *kernels.hier_quantize(z, z, sem, pix)]
    own = [*kernels.nearest_subcode(z, flat, group, "l2", offsets),
           *kernels.hier_quantize(z, z, sem, flat, "ip", "l2", offsets)]  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(own, fixed, strict=True))


@pytest.mark.parametrize("d", [5, 32])
@pytest.mark.parametrize("bad", [[0, 0, 0, 0, 0], [20, 20, 20, 20, 20], [-5, -1, 3, 2, 99], [7, 2**62, -(2**63), 9, 1],
                                 [0, 5, 5, 12, 20], [19, 19, 0, 20, 0]], ids=str)  # fmt: skip
def test_offsets_that_nobody_checked(kernels: emulated.Kernels, bad: list[int], d: int) -> None:
    """On a GPU they may hold anything. The table is between guards: a read outside of it would give NaN."""
    n, k, total, offsets = 40, 4, 20, torch.tensor(bad)
    z, sem, table, group = randn(n, d, seed=1), randn(k, d, seed=2), randn(total, d, seed=3), ints(n, 0, k, 4)
    scores, ids = run(kernels, "nearest_subcode", z, table, group, "l2", offsets)
    first = offsets.clamp(0, total - 1)[group]
    count = (offsets[1:].clamp(0, total)[group] - first).clamp_min(0)
    assert torch.equal(scores.isnan(), count == 0) and (ids < count.clamp_min(1)).all() and (ids >= 0).all()
    some = count > 0
    won = table[first + ids]
    torch.testing.assert_close(scores[some], ((z * won).sum(1) - won.square().sum(1) / 2)[some])
    q_sem, q_pix, codes = run(kernels, "hier_quantize", z, z, sem, table, "ip", "l2", offsets)
    assert ((codes >= 0) & (codes < total)).all() and same_bits(q_pix, table[codes]) and q_sem.isfinite().all()
    looked_up = run(kernels, "hier_lookup", torch.arange(total), sem, table, offsets)
    assert same_bits(looked_up[1], table) and (looked_up[0][:, None] == sem).all(-1).any(1).all()


# ---- sums of segments ----


def assert_sums(kernels: emulated.Kernels, values: Tensor, ids: Tensor, segments: int) -> None:
    """To the last bit, except for float64 values, whose sums in another order may differ in the last bits."""
    sums, counts = run(kernels, "segment_sum", values, ids, segments)
    expected, expected_counts = reference.segment_sum(values, ids, segments)
    assert same_bits(counts, expected_counts)
    if values.dtype != torch.float64:
        assert same_bits(sums, expected)
    else:
        sizes = reference.segment_sum(values.abs(), ids, segments)[0]
        assert ((sums - expected).abs() <= 2.0**-52 * len(values) * sizes).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n,d,segments", [(1, 1, 1), (7, 3, 1), (CHUNK, 2, 3), (CHUNK + 1, 4, 1), (1000, 7, 13),
                                          (999, 32, 40), (500, 33, 2000), (3, 5, 20_000), (3000, 1, 3)])  # fmt: skip
def test_segment_sums(kernels: emulated.Kernels, n: int, d: int, segments: int, dtype: torch.dtype) -> None:
    assert_sums(kernels, randn(n, d, seed=1, dtype=dtype), ints(n, -2, segments + 2, 2), segments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 32, 40])
def test_one_giant_segment(kernels: emulated.Kernels, d: int, dtype: torch.dtype) -> None:
    """Runs that begin and end with a chunk or within one, over several chunks, and the last segment of all."""
    n = 17 * CHUNK * CHUNK  # just beyond the rows that chunks of CHUNK are for
    for stride in (None, 97):
        ids = torch.full((n,), 250)
        if stride is not None:
            ids[::stride], ids[1 :: 4 * stride] = 3, 499
        assert_sums(kernels, randn(n, d, seed=1, dtype=dtype), ids, 500)
    runs = torch.tensor([CHUNK, CHUNK, 2 * CHUNK, CHUNK - 1, 1, 3 * CHUNK + 1, CHUNK - 1, 5, 2 * CHUNK])
    ids = torch.repeat_interleave(torch.arange(len(runs)), runs)
    assert_sums(kernels, randn(len(ids), d, seed=2, dtype=dtype), ids, len(runs))


def test_segments_without_rows(kernels: emulated.Kernels) -> None:
    bad = torch.tensor([5, -1, 7, 2**40, -(2**63), 2**63 - 1])
    for segments in (0, 1, 5):
        for ids in (bad[:0], bad, bad.repeat(20)):
            sums, counts = run(kernels, "segment_sum", torch.ones(len(ids), 3), ids, segments)
            assert sums.shape == (segments, 3) and not sums.any() and not counts.any()


def test_bad_values_stay_in_their_segment(kernels: emulated.Kernels) -> None:
    values, ids = torch.ones(300, 40), torch.arange(300) // 30
    values[5, 3], values[7, 39], values[8, 39] = torch.nan, torch.inf, -torch.inf
    sums, _ = run(kernels, "segment_sum", values, ids, 10)
    assert sums[0, [3, 39]].isnan().all() and (sums[0, [0, 38]] == 30).all() and (sums[1:] == 30).all()


# ---- the SIMT search ----


@pytest.mark.parametrize("z_dtype,code_dtype", [*zip(FLOATS, FLOATS, strict=True), (torch.float16, torch.float32)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("n,k,d", [(1, 1, 1), (3, 130, 5), (129, 257, 32), (65, 600, 8), (30, 300, 48), (20, 129, 72),
                                   (10, 200, 33)])  # fmt: skip
def test_simt_search(
    kernels: emulated.Kernels, n: int, k: int, d: int, z_dtype: torch.dtype, code_dtype: torch.dtype
) -> None:
    for metric in METRICS:
        z, codes = randn(n, d, seed=1, dtype=z_dtype), randn(k, d, seed=2, dtype=code_dtype)
        if k > 100:
            codes[6] = codes[k - 3] = codes[5]  # of the same thread, and in another split
            z[n - 1] = 4 * codes[5].to(z_dtype)
            codes[9, d - 1], codes[k - 1, 0], codes[64, d // 2] = torch.nan, torch.inf, -torch.inf
        usable = codes.isfinite().all(-1)
        scores, ids = run(kernels, "nearest_code", z, codes, metric)
        assert usable[ids].all() and (k <= 100 or not ((ids == 6) | (ids == k - 3)).any())
        assert_nearest(z, codes.where(usable[:, None], codes[5:6] if k > 5 else codes), metric, scores, ids)
        z[0, d - 1] = -torch.inf
        scores, ids = kernels.nearest_code(z, codes, metric)
        assert scores[0].isnan() and ids[0] == 0 and not scores[1:].isnan().any()


@pytest.mark.parametrize("d", [8, 40])
def test_simt_search_of_several_tiles_a_block(kernels: emulated.Kernels, d: int) -> None:
    """More tiles of codes than blocks on the device; equal codes of one thread in two tiles."""
    k = 34_000
    z, codes = randn(20, d, seed=1), randn(k, d, seed=2)
    first = torch.arange(300, 20_300, 1000)
    codes[first] = z
    codes[first + 128] = z
    codes[first + 10_500] = z
    scores, ids = run(kernels, "nearest_code", z, codes, "l2")
    assert torch.equal(ids, first)
    assert_nearest(z, codes, "l2", scores, ids)


def test_simt_search_without_a_code_that_can_win(kernels: emulated.Kernels) -> None:
    codes = torch.full((200, 8), torch.nan)
    scores, ids = kernels.nearest_code(randn(5, 8, seed=1), codes, "ip")
    assert scores.isnan().all() and not ids.any()
