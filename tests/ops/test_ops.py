"""Every line of the ops' contract (csrc/ops.cpp), on every backend."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import FLOATS, METRICS, assert_nearest, randn, same_bits, threads

from semhitok import ops, reference

SHAPES = [  # N, K, D
    (0, 5, 4), (1, 1, 1), (3, 1, 7), (1, 129, 1), (65, 127, 33), (64, 128, 32),
    (130, 257, 5), (513, 1000, 48), (9, 4097, 8), (33, 300, 100),
]  # fmt: skip
SUB_SHAPES = [  # N, K, m, D
    (0, 2, 3, 4), (1, 1, 1, 1), (5, 3, 1, 8), (7, 2, 5, 1), (200, 50, 12, 32), (65, 9, 17, 9), (40, 4, 64, 70),
]  # fmt: skip


# ---- the searches against float64 ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest_code(shape: tuple[int, int, int], metric: str, device: torch.device) -> None:
    n, k, d = shape
    z, codebook = randn(n, d, seed=1, device=device), randn(k, d, seed=2, device=device)
    scores, ids = ops.nearest_code(z, codebook, metric)
    assert scores.dtype == torch.float32 and scores.device == ids.device == z.device
    assert_nearest(z, codebook, metric, scores, ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SUB_SHAPES, ids=str)
def test_nearest_subcode(shape: tuple[int, int, int, int], metric: str, device: torch.device) -> None:
    n, k, m, d = shape
    z, codes = randn(n, d, seed=1, device=device), randn(k, m, d, seed=2, device=device)
    group = torch.randint(k, (n,), generator=torch.Generator().manual_seed(3)).to(device)
    scores, ids = ops.nearest_subcode(z, codes, group, metric)
    assert scores.dtype == torch.float32
    assert_nearest(z, codes[group], metric, scores, ids)


@pytest.mark.parametrize("z_dtype,code_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_dtypes(z_dtype: torch.dtype, code_dtype: torch.dtype, device: torch.device) -> None:
    z, codebook = randn(37, 13, seed=1, dtype=z_dtype), randn(70, 13, seed=2, dtype=code_dtype)
    z, codebook, sub = z.to(device), codebook.to(device), codebook[:60].reshape(12, 5, 13).to(device)
    wide = torch.float64 in (z_dtype, code_dtype)
    scores, ids = ops.nearest_code(z, codebook, "l2")
    assert scores.dtype == (torch.float64 if wide else torch.float32)
    assert_nearest(z, codebook, "l2", scores, ids)
    group = ids % 12
    sub_scores, sub_ids = ops.nearest_subcode(z, sub, group, "ip")
    assert sub_scores.dtype == scores.dtype
    assert_nearest(z, sub[group], "ip", sub_scores, sub_ids)
    if wide:
        exact = reference.nearest_code(z.double(), codebook.double(), "l2")
        assert torch.equal(ids, exact[1]) and torch.allclose(scores, exact[0], rtol=1e-13, atol=1e-13)
    q_sem, q_pix, codes = ops.hier_quantize(z, z, codebook[:12], sub, "l2", "ip")
    assert q_sem.dtype == q_pix.dtype == code_dtype
    assert torch.equal(q_sem, codebook[codes // 5]) and torch.equal(q_pix, sub.flatten(0, 1)[codes])


@pytest.mark.parametrize("bits", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_read_exactly(bits: torch.dtype, device: torch.device) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(bits).to(device)
    sums, counts = ops.segment_sum(values[:, None], torch.arange(len(values), device=device), len(values))
    assert torch.equal(sums[:, 0].nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0)) and (counts == 1).all()


# ---- hier_quantize, hier_lookup ----


@pytest.mark.parametrize("sem_metric,pix_metric", list(itertools.product(METRICS, METRICS)))
@pytest.mark.parametrize("n,k,m,ds,dp", [(0, 3, 2, 4, 5), (1, 1, 1, 1, 1), (300, 200, 12, 32, 32), (67, 33, 5, 9, 3)])
def test_hier_quantize_is_its_parts(
    n: int, k: int, m: int, ds: int, dp: int, sem_metric: str, pix_metric: str, device: torch.device
) -> None:
    z_sem, z_pix = randn(n, ds, seed=1, device=device), randn(n, dp, seed=2, device=device)
    sem, pix = randn(k, ds, seed=3, device=device), randn(k, m, dp, seed=4, device=device)
    q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, sem, pix, sem_metric, pix_metric)
    i = ops.nearest_code(z_sem, sem, sem_metric)[1]
    j = ops.nearest_subcode(z_pix, pix, i, pix_metric)[1]
    assert torch.equal(codes, i * m + j)
    assert torch.equal(q_sem, sem[i]) and torch.equal(q_pix, pix[i, j])
    looked_up = ops.hier_lookup(codes, sem, pix)
    assert torch.equal(looked_up[0], q_sem) and torch.equal(looked_up[1], q_pix)
    expected = reference.hier_quantize(z_sem.double(), z_pix.double(), sem, pix, sem_metric, pix_metric)
    assert (codes == expected[2]).double().mean() >= 0.99 if n else codes.numel() == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lookup_out_of_range_is_nan(dtype: torch.dtype, device: torch.device) -> None:
    sem, pix = randn(3, 4, seed=1, dtype=dtype, device=device), randn(3, 2, 5, seed=2, dtype=dtype, device=device)
    codes = torch.tensor([0, -1, 5, 6, -(2**63), 2**63 - 1], device=device)
    q_sem, q_pix = ops.hier_lookup(codes, sem, pix)
    bad = torch.tensor([False, True, False, True, True, True], device=device)
    assert q_sem[bad].isnan().all() and q_pix[bad].isnan().all()
    assert torch.equal(q_sem[~bad], sem[[0, 2]]) and torch.equal(q_pix[~bad], pix.flatten(0, 1)[[0, 5]])
    expected = reference.hier_lookup(codes, sem, pix)
    assert torch.equal(q_sem.nan_to_num(9.0), expected[0].nan_to_num(9.0))


# ---- segment_sum ----


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n,d,s", [(0, 3, 4), (1, 1, 1), (1000, 7, 13), (500, 33, 2000), (64, 5, 0)])
def test_segment_sum(n: int, d: int, s: int, dtype: torch.dtype, device: torch.device) -> None:
    values = randn(n, d, seed=1, dtype=dtype, device=device)
    ids = torch.randint(-2, s + 2, (n,), generator=torch.Generator().manual_seed(2)).to(device)
    sums, counts = ops.segment_sum(values, ids, s)
    expected, expected_counts = reference.segment_sum(values, ids, s)
    assert sums.dtype == expected.dtype and sums.shape == (s, d) and counts.dtype == torch.int64
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected, rtol=2e-7 if sums.dtype == torch.float32 else 1e-13, atol=1e-7)


def test_segment_sum_is_rounded_once(device: torch.device) -> None:
    values = torch.tensor([[1.0]] + [[2.0**-25]] * 2**10, device=device)
    sums, _ = ops.segment_sum(values, torch.zeros(len(values), dtype=torch.int64, device=device), 1)
    assert sums.item() == 1 + 2.0**-15  # a sum kept in fp32 stays at 1


# ---- ties, NaN and Inf, ids out of range ----


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [2, 40, 129, 700])
def test_lowest_id_of_equal_codes(k: int, metric: str, device: torch.device) -> None:
    distinct = randn(k, 11, seed=1)
    order = torch.randperm(3 * k, generator=torch.Generator().manual_seed(2))
    codebook = distinct.repeat(3, 1)[order]
    first = (codebook[:, None] == codebook[None]).all(-1).int().argmax(-1)  # the first equal row
    z = randn(90, 11, seed=3)
    ids = ops.nearest_code(z.to(device), codebook.to(device), metric)[1].cpu()
    assert torch.equal(ids, first[ids])
    sub_ids = ops.nearest_subcode(
        z.to(device), codebook[None].to(device), torch.zeros(90, dtype=torch.int64, device=device), metric
    )[1].cpu()
    assert torch.equal(sub_ids, first[sub_ids])


def test_zero_token_ties_everywhere(device: torch.device) -> None:
    scores, ids = ops.nearest_code(torch.zeros(20, 6, device=device), randn(500, 6, seed=1, device=device))
    assert (ids == 0).all() and (scores == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", METRICS)
def test_bad_tokens(metric: str, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    z = randn(40, 6, seed=1, dtype=dtype, device=device)
    codebook = randn(300, 6, seed=2, dtype=dtype, device=device)
    clean = ops.nearest_code(z, codebook, metric)
    rows = [0, 7, 8, 39]
    z[rows, torch.arange(4, device=device)] = bad
    scores, ids = ops.nearest_code(z, codebook, metric)
    assert scores[rows].isnan().all() and (ids[rows] == 0).all()
    good = torch.ones(40, dtype=torch.bool, device=device)
    good[rows] = False
    assert same_bits(scores[good], clean[0][good]) and torch.equal(ids[good], clean[1][good])

    sub = codebook.view(50, 6, 6)
    scores, sub_ids = ops.nearest_subcode(z, sub, torch.full((40,), 3, device=device), metric)
    assert scores[rows].isnan().all() and (sub_ids[rows] == 0).all() and not scores[good].isnan().any()
    codes = ops.hier_quantize(z, z, codebook[:50], sub, metric, metric)[2]
    assert (codes[rows] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", METRICS)
def test_bad_codes_never_win(metric: str, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    z, codebook = randn(60, 5, seed=1, dtype=dtype, device=device), randn(200, 5, seed=2, dtype=dtype, device=device)
    before = ops.nearest_code(z, codebook, metric)[1]
    spoiled = before.unique()[:20]
    codebook[spoiled, 2] = bad
    scores, ids = ops.nearest_code(z, codebook, metric)
    assert not scores.isnan().any() and not torch.isin(ids, spoiled).any()
    expected = reference.nearest_code(z.double(), codebook.double(), metric)[1]
    kept = ~torch.isin(before, spoiled)
    assert torch.equal(ids[kept], before[kept]) and (ids == expected).double().mean() > 0.9
    sub_scores, sub_ids = ops.nearest_subcode(z, codebook[None], torch.zeros_like(ids), metric)
    assert not sub_scores.isnan().any() and not torch.isin(sub_ids, spoiled).any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_usable_code(dtype: torch.dtype, device: torch.device) -> None:
    z, codebook = randn(5, 3, seed=1, dtype=dtype, device=device), torch.full((4, 3), torch.nan, device=device)
    scores, ids = ops.nearest_code(z, codebook.to(dtype))
    assert scores.isnan().all() and (ids == 0).all()
    scores, ids = ops.nearest_subcode(z, codebook.to(dtype)[None], torch.zeros_like(ids))
    assert scores.isnan().all() and (ids == 0).all()


def test_scores_that_overflow(device: torch.device) -> None:
    """Finite inputs whose fp32 scores are Inf, -Inf and NaN: +Inf wins, NaN and -Inf do not."""
    big = 3e38
    codebook = torch.tensor([[big, big], [big, -big], [-1.0, 0.0], [1.0, 0.0], [big, big]], device=device)
    scores, ids = ops.nearest_code(torch.tensor([[big, big], [-big, -big], [1.0, 0.0]], device=device), codebook)
    assert ids.tolist() == [0, 2, 0] and scores[0] == torch.inf and scores[1] == big
    # -|c|^2/2 overflows to -inf: such codes cannot win.
    assert ops.nearest_code(torch.ones(1, 2, device=device), codebook, "l2")[1].item() == 3


def test_a_winner_among_scores_that_overflow(device: torch.device) -> None:
    """big * big - big * big is Inf where multiplication and addition are fused, and wins; NaN where they are not."""
    big = 3e38
    for winner in (500, 507, 519, 999):
        codebook = torch.tensor([[big, -big]], device=device).repeat(1000, 1)
        codebook[3], codebook[winner] = torch.tensor([0.5 / big, 0]), torch.tensor([1 / big, 0])
        scores, ids = ops.nearest_code(torch.full((9, 2), big, device=device), codebook)
        if scores[0].isinf():
            assert (ids == 0).all() and (scores == torch.inf).all()
        else:
            assert (ids == winner).all() and torch.allclose(scores, torch.ones_like(scores))


def test_group_out_of_range(device: torch.device) -> None:
    z, codes = randn(5, 4, seed=1, device=device), randn(3, 6, 4, seed=2, device=device)
    group = torch.tensor([0, -1, 2, 3, -(2**63)], device=device)
    for dtype in (torch.float32, torch.float64):
        scores, ids = ops.nearest_subcode(z.to(dtype), codes, group)
        assert scores.isnan().tolist() == [False, True, False, True, True]
        assert (ids[[1, 3, 4]] == 0).all()


# ---- shapes and strides ----


def test_leading_dimensions(device: torch.device) -> None:
    z, codebook, sub = randn(24, 4, seed=1, device=device), randn(9, 4, seed=2, device=device), randn(9, 3, 4, seed=3)
    sub = sub.to(device)
    scores, ids = ops.nearest_code(z, codebook)
    for shape in [(2, 3, 4), (24, 1), (1, 24)]:
        shaped = ops.nearest_code(z.view(*shape, 4), codebook)
        assert shaped[0].shape == shaped[1].shape == shape and torch.equal(shaped[1].flatten(), ids)
        q_sem, q_pix, codes = ops.hier_quantize(z.view(*shape, 4), z.view(*shape, 4), codebook, sub)
        assert q_sem.shape == q_pix.shape == (*shape, 4) and codes.shape == shape
        assert ops.hier_lookup(codes, codebook, sub)[0].shape == (*shape, 4)
    score, one = ops.nearest_code(z[5], codebook)
    assert score.shape == one.shape == () and one == ids[5] and score == scores[5]
    assert ops.nearest_subcode(z[5], sub, one)[1].shape == ()
    assert ops.hier_quantize(z[5], z[5], codebook, sub)[0].shape == (4,)
    assert ops.nearest_code(z.new_empty(3, 0, 4), codebook)[1].shape == (3, 0)


def test_any_strides(device: torch.device) -> None:
    z, codebook = randn(8, 50, seed=1, device=device).T, randn(7, 60, 2, seed=2, device=device)[..., 0].T[:, :7]
    z = z[::2, :7]
    sub = randn(7, 5, 60, seed=3, device=device).permute(2, 1, 0)
    group = torch.tensor(4, device=device).expand(25)
    assert not (z.is_contiguous() or codebook.is_contiguous() or sub.is_contiguous())

    def outputs(z: torch.Tensor, codebook: torch.Tensor, sub: torch.Tensor, group: torch.Tensor) -> list[torch.Tensor]:
        searches = *ops.nearest_code(z, codebook), *ops.nearest_subcode(z, sub, group)
        return [*searches, *ops.hier_quantize(z, z, codebook, sub)]

    same = outputs(*(x.contiguous() for x in (z, codebook, sub, group)))
    assert all(torch.equal(a, b) for a, b in zip(outputs(z, codebook, sub, group), same, strict=True))
    sums = ops.segment_sum(z, group, 5)[0]
    torch.testing.assert_close(sums[4], z.sum(0))
    expanded = ops.nearest_code(z[:1].expand(30, 7), codebook)[1]
    assert (expanded == expanded[0]).all()


# ---- the same bits ----


def all_ops(device: torch.device) -> list[torch.Tensor]:
    z_sem, z_pix = randn(700, 24, seed=1, device=device), randn(700, 16, seed=2, device=device)
    sem, pix = randn(3000, 24, seed=3, device=device), randn(3000, 6, 16, seed=4, device=device)
    outputs = [*ops.hier_quantize(z_sem, z_pix, sem, pix), *ops.nearest_code(z_sem, sem, "l2")]
    outputs += ops.nearest_subcode(z_pix, pix, outputs[4], "ip")
    outputs += ops.hier_lookup(outputs[2], sem, pix)
    outputs += ops.segment_sum(randn(40000, 24, seed=5, device=device), torch.arange(40000, device=device) % 511, 511)
    outputs += ops.nearest_code(z_sem.double(), sem)
    return outputs


def test_same_bits_every_run_and_thread_count(device: torch.device) -> None:
    expected = all_ops(device)
    for count in (1, 2, 3, 7):
        with threads(count):
            assert all(same_bits(a, b) for a, b in zip(all_ops(device), expected, strict=True))


def test_a_token_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    z, codebook = randn(150, 20, seed=1, device=device), randn(333, 20, seed=2, device=device)
    scores, ids = ops.nearest_code(z, codebook)
    for t in (0, 63, 64, 149):
        alone = ops.nearest_code(z[t : t + 1], codebook)
        assert same_bits(alone[0], scores[t : t + 1]) and alone[1] == ids[t]


# ---- properties ----

sizes = st.integers(1, 40)
dtypes = st.sampled_from(FLOATS)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 70), k=st.integers(1, 300), d=sizes, scale=st.sampled_from([1e-18, 1e-3, 1.0, 1e3, 1e15]),
    metric=st.sampled_from(METRICS), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_property_nearest_code(n: int, k: int, d: int, scale: float, metric: str, seed: int) -> None:
    z, codebook = randn(n, d, seed=seed) * scale, randn(k, d, seed=seed + 1)
    assert_nearest(z, codebook, metric, *ops.nearest_code(z, codebook, metric))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 50), k=st.integers(1, 20), m=sizes, ds=sizes, dp=sizes, z=dtypes, sem=dtypes, pix=dtypes,
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_property_round_trip(
    n: int, k: int, m: int, ds: int, dp: int, z: torch.dtype, sem: torch.dtype, pix: torch.dtype, seed: int
) -> None:
    """Quantising a codebook's own rows by distance returns them, and ids survive a lookup and quantising again."""
    sem_codebook, pix_codebook = randn(k, ds, seed=seed, dtype=sem), randn(k, m, dp, seed=seed + 1, dtype=pix)
    z_sem, z_pix = randn(n, ds, seed=seed + 2, dtype=z), randn(n, dp, seed=seed + 3)
    q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, sem_codebook, pix_codebook, "l2", "l2")
    assert ((codes >= 0) & (codes < k * m)).all()
    looked_up = ops.hier_lookup(codes, sem_codebook, pix_codebook)
    assert same_bits(looked_up[0], q_sem) and same_bits(looked_up[1], q_pix)
    again = ops.hier_quantize(q_sem, q_pix, sem_codebook, pix_codebook, "l2", "l2")
    near = 1e-5 * (1 + q_sem.double().abs())
    assert ((again[0].double() - q_sem.double()).abs() <= near).all()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 200), d=sizes, s=st.integers(1, 60), seed=st.integers(0, 10**6))
def test_property_segment_sum_keeps_the_total(n: int, d: int, s: int, seed: int) -> None:
    values = randn(n, d, seed=seed)
    ids = torch.randint(s, (n,), generator=torch.Generator().manual_seed(seed))
    sums, counts = ops.segment_sum(values, ids, s)
    assert counts.sum() == n
    torch.testing.assert_close(sums.double().sum(0), values.double().sum(0), rtol=1e-5, atol=1e-5)


# ---- errors ----

F, L = torch.float32, torch.int64


def t(*shape: int, dtype: torch.dtype = F) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


ERRORS = [
    (ops.nearest_code, (t(2, 4), t(3, 4), "cos"), 'metric: expected "ip" or "l2", got "cos"'),
    (ops.nearest_code, (t(2, 4, dtype=L), t(3, 4)), "z: expected float32, float16, bfloat16 or float64, got int64"),
    (ops.nearest_code, (t(2, 4), t(3, 4, dtype=torch.complex64)),
     "codebook: expected float32, float16, bfloat16 or float64, got complex64"),
    (ops.nearest_code, (t(2, 4), t(3, 4, 1)), "codebook: expected 2 dimensions [K, D], got 3"),
    (ops.nearest_code, (t(2, 4), t(0, 4)),
     "codebook: expected every dimension of [K, D] to be at least 1, got [0, 4]"),
    (ops.nearest_code, (t(2, 0), t(3, 0)),
     "codebook: expected every dimension of [K, D] to be at least 1, got [3, 0]"),
    (ops.nearest_code, (t(2, 5), t(3, 4)), "z: expected last dimension 4 (codebook.shape[-1]), got 5"),
    (ops.nearest_code, (t(), t(3, 4)), "z: expected at least 1 dimension [..., D], got a scalar"),
    (ops.nearest_code, (t(2, 1), t(1, 1).expand(2**31, 1)),
     "codebook: expected at most 2147483646 codes, got 2147483648"),
    (ops.nearest_subcode, (t(2, 4), t(3, 5, 4), t(2, dtype=L), "L2"), 'metric: expected "ip" or "l2", got "L2"'),
    (ops.nearest_subcode, (t(2, 4), t(3, 5, 4), t(2, dtype=torch.int32)), "group: expected int64, got int32"),
    (ops.nearest_subcode, (t(2, 4), t(3, 5, 4), t(3, dtype=L)),
     "group: expected leading dimensions [2] (those of z), got [3]"),
    (ops.nearest_subcode, (t(2, 4), t(3, 5, 4), t(2, 1, dtype=L)),
     "group: expected leading dimensions [2] (those of z), got [2, 1]"),
    (ops.nearest_subcode, (t(2, 4), t(3, 4), t(2, dtype=L)),
     "sub_codebooks: expected 3 dimensions [K, m, D], got 2"),
    (ops.nearest_subcode, (t(2, 4), t(3, 0, 4), t(2, dtype=L)),
     "sub_codebooks: expected every dimension of [K, m, D] to be at least 1, got [3, 0, 4]"),
    (ops.nearest_subcode, (t(2, 6), t(3, 5, 4), t(2, dtype=L)),
     "z: expected last dimension 4 (sub_codebooks.shape[-1]), got 6"),
    (ops.hier_quantize, (t(2, 48), t(2, 8), t(3, 32), t(3, 5, 8)),
     "z_sem: expected last dimension 32 (sem_codebook.shape[-1]), got 48"),
    (ops.hier_quantize, (t(2, 4), t(2, 9), t(3, 4), t(3, 5, 8)),
     "z_pix: expected last dimension 8 (pix_codebook.shape[-1]), got 9"),
    (ops.hier_quantize, (t(2, 4), t(5, 8), t(3, 4), t(3, 5, 8)),
     "z_pix: expected leading dimensions [2] (those of z_sem), got [5]"),
    (ops.hier_quantize, (t(2, 4), t(2, 8), t(3, 4), t(2, 5, 8)),
     "pix_codebook: expected first dimension 3 (sem_codebook.shape[0]), got 2"),
    (ops.hier_quantize, (t(2, 4), t(2, 8), t(3, 4), t(3, 5, 8), "dot"),
     'sem_metric: expected "ip" or "l2", got "dot"'),
    (ops.hier_quantize, (t(2, 4), t(2, 8), t(3, 4), t(3, 5, 8), "ip", "dot"),
     'pix_metric: expected "ip" or "l2", got "dot"'),
    (ops.hier_quantize, (t(2, 4), t(2, 8, dtype=torch.uint8), t(3, 4), t(3, 5, 8)),
     "z_pix: expected float32, float16, bfloat16 or float64, got uint8"),
    (ops.hier_lookup, (t(2), t(3, 4), t(3, 5, 8)), "codes: expected int64, got float32"),
    (ops.hier_lookup, (t(2, dtype=L), t(4), t(3, 5, 8)), "sem_codebook: expected 2 dimensions [K, Ds], got 1"),
    (ops.hier_lookup, (t(2, dtype=L), t(3, 4), t(4, 5, 8)),
     "pix_codebook: expected first dimension 3 (sem_codebook.shape[0]), got 4"),
    (ops.segment_sum, (t(2, 3, 1), t(2, dtype=L), 4), "values: expected 2 dimensions [N, D], got 3"),
    (ops.segment_sum, (t(2, 0), t(2, dtype=L), 4), "values: expected last dimension of at least 1, got 0"),
    (ops.segment_sum, (t(2, 3), t(3, dtype=L), 4), "ids: expected shape [2] (values.shape[0]), got [3]"),
    (ops.segment_sum, (t(2, 3), t(2, 1, dtype=L), 4), "ids: expected shape [2] (values.shape[0]), got [2, 1]"),
    (ops.segment_sum, (t(2, 3), t(2), 4), "ids: expected int64, got float32"),
    (ops.segment_sum, (t(2, 3, dtype=torch.bool), t(2, dtype=L), 4),
     "values: expected float32, float16, bfloat16 or float64, got bool"),
    (ops.segment_sum, (t(2, 3), t(2, dtype=L), -1), "num_segments: expected at least 0, got -1"),
    (ops.segment_sum, (t(2, 3), t(2, dtype=L), 2**31),
     "num_segments: expected at most 2147483646 segments, got 2147483648"),
]  # fmt: skip


@pytest.mark.parametrize("op,args,message", ERRORS, ids=[e[2][:50] for e in ERRORS])
def test_errors_name_the_argument(op, args, message: str, device: torch.device) -> None:
    if "2147483646 codes" in message and device.type != "cpu":
        args = (args[0], t(1, 1).to(device).expand(2**31, 1))
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError) as error:
        op(*args)
    assert str(error.value).splitlines()[0] == message


# The fake implementations leave empty codebooks and the limits of the kernels to the real ones.
FAKE_ERRORS = [
    e for e in ERRORS if "at least" not in e[2].replace("at least 1 dimension", "") and "at most" not in e[2]
]


@pytest.mark.parametrize("op,args,message", FAKE_ERRORS, ids=[e[2][:50] for e in FAKE_ERRORS])
def test_fake_tensors_give_the_same_errors(op, args, message: str) -> None:
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(RuntimeError) as error:
        op(*args)
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_devices_must_agree() -> None:
    with pytest.raises(RuntimeError, match=r"codebook: expected device cuda:0 \(that of z\), got cpu"):
        ops.nearest_code(t(2, 4).cuda(), t(3, 4))
    with pytest.raises(RuntimeError, match=r"codebook: expected device cpu \(that of z\), got cuda:0"):
        ops.nearest_code(t(2, 4), t(3, 4).cuda())


def test_without_cuda_kernels_the_error_says_how_to_get_them() -> None:
    """The CUDA key is always registered. More than that can be tested only with a GPU and a build without CUDA."""
    for name in ("nearest_code", "nearest_subcode", "hier_quantize", "hier_lookup", "segment_sum"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"semhitok::{name}", "CUDA")
    from semhitok import _C

    if torch.cuda.is_available() and _C.build_info()["cuda"] is None:
        with pytest.raises(RuntimeError, match=r"SEMHITOK_CUDA=1 pip install -e \."):
            ops.nearest_code(t(2, 4).cuda(), t(3, 4).cuda())


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("nearest_code", {"z": (3, 4), "codebook": (5, 4)}),
        ("nearest_subcode", {"z": (3, 4), "sub_codebooks": (5, 2, 4), "group": (3,)}),
        ("nearest_subcode", {"z": (3, 4), "sub_codebooks": (5, 4), "group": (3,), "offsets": (3,)}),
        ("hier_quantize", {"z_sem": (3, 4), "z_pix": (3, 6), "sem_codebook": (5, 4), "pix_codebook": (5, 2, 6)}),
        ("hier_lookup", {"codes": (3,), "sem_codebook": (2, 4), "pix_codebook": (5, 6), "offsets": (3,)}),
        ("segment_sum", {"values": (3, 4), "ids": (3,)}),
    ],
)
def test_tensors_on_the_meta_device_beside_others_are_refused(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    integers = ("group", "codes", "ids", "offsets")
    made = {key: torch.zeros(shape, dtype=torch.int64 if key in integers else None) for key, shape in shapes.items()}
    more = {"num_segments": 2} if name == "segment_sum" else {}
    op, first = getattr(ops, name), next(iter(made))
    for key in list(made)[1:]:
        with pytest.raises(RuntimeError, match=rf"{key}: expected device cpu \(that of {first}\), got meta"):
            op(**{**made, key: made[key].to("meta")}, **more)
    with pytest.raises(RuntimeError, match=r"expected device meta \(that of .*, got cpu"):
        op(**{**made, first: made[first].to("meta")}, **more)
    found = op(**{key: t.to("meta") for key, t in made.items()}, **more)
    assert all(t.is_meta for t in found)
