"""The sources of the CUDA kernels, compiled for the CPU and run on the emulator: results, races, deadlocks."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from op_checks import assert_nearest, randn, same_bits
from torch import Tensor

from semhitok import reference

HERE = Path(__file__).resolve().parent
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METRICS = ["ip", "l2"]
SHAPES = [  # N, K, D
    (0, 5, 3), (1, 1, 1), (7, 5, 3), (1, 129, 8), (130, 300, 32), (7, 300, 33), (130, 129, 70), (300, 700, 20),
]  # fmt: skip
SUB_SHAPES = [(0, 2, 3, 4), (1, 1, 1, 1), (7, 3, 1, 8), (7, 2, 5, 1), (130, 20, 12, 32), (65, 9, 17, 70)]  # N, K, m, D
DEVICES = [((8, 0), 108), ((9, 0), 132), ((9, 0), 3)]
SEEDS = range(10)  # under which a wrong kernel must be caught at least once, a right one never


@pytest.fixture(scope="session")
def library() -> Path:
    include = emulated.toolkit_include()
    if include is None:
        pytest.skip("no CUDA toolkit, whose headers the kernels include: set CUDA_HOME")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return emulated.build(include)


@pytest.fixture
def kernels(library: Path) -> Any:
    kernels = emulated.Kernels(library)
    kernels.set_device()
    kernels.set_truncating_sums(False)
    return kernels


def group_of(n: int, k: int) -> Tensor:
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(3))


# ---- the searches ----


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nearest_code(
    kernels: Any, shape: tuple[int, int, int], metric: str, device: tuple[tuple[int, int], int]
) -> None:
    n, k, d = shape
    z, codebook = randn(n, d, seed=1), randn(k, d, seed=2)
    kernels.set_device(*device)
    scores, ids = kernels.nearest_code(z, codebook, metric)
    assert_nearest(z, codebook, metric, scores, ids)
    kernels.set_seed(2)
    again = kernels.nearest_code(z, codebook, metric)
    assert same_bits(scores, again[0]) and torch.equal(ids, again[1])


@pytest.mark.parametrize("z_dtype,code_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_dtypes(kernels: Any, z_dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    z, codebook = randn(37, 13, seed=1, dtype=z_dtype), randn(70, 13, seed=2, dtype=code_dtype)
    sub = codebook[:60].reshape(12, 5, 13).clone()
    scores, ids = kernels.nearest_code(z, codebook, "l2")
    assert_nearest(z, codebook, "l2", scores, ids)
    group = ids % 12
    sub_scores, sub_ids = kernels.nearest_subcode(z, sub, group, "ip")
    assert_nearest(z, sub[group], "ip", sub_scores, sub_ids)
    if scores.dtype == torch.float64:
        exact = reference.nearest_code(z.double(), codebook.double(), "l2")
        assert torch.equal(ids, exact[1]) and torch.allclose(scores, exact[0], rtol=1e-13, atol=1e-13)
    q_sem, q_pix, codes = kernels.hier_quantize(z, z, codebook[:12].clone(), sub, "l2", "ip")
    assert torch.equal(q_sem, codebook[codes // 5]) and torch.equal(q_pix, sub.flatten(0, 1)[codes])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SUB_SHAPES, ids=str)
def test_nearest_subcode(kernels: Any, shape: tuple[int, int, int, int], metric: str) -> None:
    n, k, m, d = shape
    z, codes, group = randn(n, d, seed=1), randn(k, m, d, seed=2), group_of(n, k)
    scores, ids = kernels.nearest_subcode(z, codes, group, metric)
    assert_nearest(z, codes[group], metric, scores, ids)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [2, 129, 200])
def test_lowest_id_of_equal_codes(kernels: Any, k: int, metric: str, device: tuple[tuple[int, int], int]) -> None:
    distinct = randn(k, 11, seed=1)
    order = torch.randperm(3 * k, generator=torch.Generator().manual_seed(2))
    codebook, z = distinct.repeat(3, 1)[order], randn(90, 11, seed=3)
    first = (codebook[:, None] == codebook[None]).all(-1).int().argmax(-1)  # the first equal row
    kernels.set_device(*device)
    ids = kernels.nearest_code(z, codebook, metric)[1]
    assert torch.equal(ids, first[ids])
    assert (kernels.nearest_code(torch.zeros_like(z), codebook, "ip")[1] == 0).all()
    sub_ids = kernels.nearest_subcode(z, codebook[None], torch.zeros(90, dtype=torch.int64), metric)[1]
    assert torch.equal(sub_ids, first[sub_ids])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_nan_and_inf(kernels: Any, dtype: torch.dtype, metric: str, device: tuple[tuple[int, int], int]) -> None:
    z, codebook = randn(140, 9, seed=1, dtype=dtype), randn(300, 9, seed=2, dtype=dtype)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        z[5 + 60 * i, i] = value
        codebook[i::7, 8 - i] = value
    kernels.set_device(*device)
    scores, ids = kernels.nearest_code(z, codebook, metric)
    expected = reference.nearest_code(z.double(), codebook.double(), metric)
    bad = ~z.isfinite().all(-1)
    assert scores[bad].isnan().all() and (ids[bad] == 0).all()
    assert not scores[~bad].isnan().any() and (ids == expected[1]).double().mean() > 0.98
    torch.testing.assert_close(scores.double(), expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)

    sub, group = codebook.reshape(20, 15, 9), group_of(140, 20)
    group[3], group[4], group[70] = -1, 20, -(2**62)
    scores, ids = kernels.nearest_subcode(z, sub, group, metric)
    expected = reference.nearest_subcode(z.double(), sub.double(), group, metric)
    assert scores[[3, 4, 70]].isnan().all() and (ids[[3, 4, 70]] == 0).all()
    assert torch.equal(scores.isnan(), expected[0].isnan()) and (ids == expected[1]).double().mean() > 0.98
    torch.testing.assert_close(scores.double(), expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_no_usable_code(kernels: Any) -> None:
    scores, ids = kernels.nearest_code(randn(9, 4, seed=1), torch.full((150, 4), torch.nan), "l2")
    assert scores.isnan().all() and (ids == 0).all()


# ---- hier_quantize, hier_lookup, segment_sum ----


@pytest.mark.parametrize("sem_metric,pix_metric", [("ip", "l2"), ("l2", "ip")])
@pytest.mark.parametrize("n,k,m,ds,dp", [(0, 3, 2, 4, 5), (1, 1, 1, 1, 1), (130, 129, 12, 32, 32), (67, 33, 5, 70, 3)])
def test_hier_quantize_is_its_parts(
    kernels: Any, n: int, k: int, m: int, ds: int, dp: int, sem_metric: str, pix_metric: str
) -> None:
    z_sem, z_pix = randn(n, ds, seed=1), randn(n, dp, seed=2)
    sem, pix = randn(k, ds, seed=3), randn(k, m, dp, seed=4)
    q_sem, q_pix, codes = kernels.hier_quantize(z_sem, z_pix, sem, pix, sem_metric, pix_metric)
    i = kernels.nearest_code(z_sem, sem, sem_metric)[1]
    j = kernels.nearest_subcode(z_pix, pix, i, pix_metric)[1]
    assert torch.equal(codes, i * m + j)
    assert torch.equal(q_sem, sem[i]) and torch.equal(q_pix, pix[i, j])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lookup_out_of_range_is_nan(kernels: Any, dtype: torch.dtype) -> None:
    sem, pix = randn(3, 40, seed=1, dtype=dtype), randn(3, 2, 5, seed=2, dtype=dtype)
    codes = torch.tensor([0, -1, 5, 6, -(2**63), 2**63 - 1])
    q_sem, q_pix = kernels.hier_lookup(codes, sem, pix)
    expected = reference.hier_lookup(codes, sem, pix)
    for got, wanted in zip((q_sem, q_pix), expected, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(9.0), wanted.nan_to_num(9.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n,d,s", [(0, 3, 4), (1, 1, 1), (300, 7, 13), (200, 33, 700), (64, 5, 0)])
def test_segment_sum(kernels: Any, n: int, d: int, s: int, dtype: torch.dtype) -> None:
    values = randn(n, d, seed=1, dtype=dtype)
    ids = torch.randint(-2, s + 2, (n,), generator=torch.Generator().manual_seed(2))
    sums, counts = kernels.segment_sum(values, ids, s)
    expected, expected_counts = reference.segment_sum(values, ids, s)
    assert torch.equal(counts, expected_counts)
    torch.testing.assert_close(sums, expected, rtol=2e-7 if sums.dtype == torch.float32 else 1e-13, atol=1e-7)


# ---- the emulator: right kernels pass, and the mistakes that it is there for are caught ----


def ring(kernels: Any, integer: bool, mistake: int = 0) -> bool:
    """wgmma on tiles that bulk copies load into a ring of two: are the products right?"""
    depth, tiles, chunk = (64, 7, 16) if integer else (32, 7, 8)
    generator = torch.Generator().manual_seed(7)
    if integer:
        rows, codes = (
            torch.randint(-128, 128, (n, depth), generator=generator).to(torch.int8) for n in (64, tiles * 128)
        )
        products = torch.zeros(64, tiles * 128, dtype=torch.int32)
    else:
        rows, codes = (torch.randn(n, depth, generator=generator).half() for n in (64, tiles * 128))
        products = torch.zeros(64, tiles * 128)
    packed = codes.reshape(tiles, 128, -1, chunk).transpose(1, 2).contiguous()
    kernels.call("selftest_ring", integer, rows, packed, products, depth * rows.element_size(), tiles, mistake)
    return torch.allclose(products.double(), rows.double() @ codes.double().T, rtol=0, atol=0 if integer else 1e-4)


def pipeline(kernels: Any, mistake: int = 0) -> bool:
    """mma.sync on stages that cp.async loads: are the products right?"""
    rows, codes = randn(64, 96, seed=1, dtype=torch.float16), randn(8, 96, seed=2, dtype=torch.float16)
    products = torch.zeros(64, 8)
    kernels.call("selftest_pipeline", rows, codes, products, 96, mistake)
    return torch.allclose(products.double(), rows.double() @ codes.double().T, rtol=0, atol=1e-4)


def block_sums(kernels: Any, mistake: int = 0) -> bool:
    values = torch.randint(-1000, 1000, (3, 544), generator=torch.Generator().manual_seed(7), dtype=torch.int32)
    sums = torch.zeros(3, dtype=torch.int64)
    kernels.call("selftest_sum", values, sums, 3, 544, mistake)
    return torch.equal(sums, values.long().sum(1))


def integer_ring(kernels: Any, mistake: int = 0) -> bool:
    return ring(kernels, True, mistake)


def half_ring(kernels: Any, mistake: int = 0) -> bool:
    return ring(kernels, False, mistake)


RIGHT = [integer_ring, half_ring, pipeline, block_sums]
RING_MISTAKES = [  # RingMistake of selftest.cu, from 1 on, and what is said of it if its result is not just wrong
    "", "deadlock", "", "no wgmma_fence", "", "deadlock", "not initialised", "no barrier_init_fence", "deadlock",
    "overwritten", "not aligned", "more arrivals",
]  # fmt: skip
PIPELINE_MISTAKES = [""] * 5
SUM_MISTAKES = ["", "", "has exited", "different collectives", "deadlock", "__trap"]
MISTAKES = [
    (kernel, mistake, said)
    for kernel, mistakes in [(half_ring, RING_MISTAKES), (pipeline, PIPELINE_MISTAKES), (block_sums, SUM_MISTAKES)]
    for mistake, said in enumerate(mistakes, start=1)
]


@pytest.mark.parametrize("truncating", [False, True])
@pytest.mark.parametrize("kernel", RIGHT, ids=lambda k: k.__name__)
def test_right_kernels_pass(kernels: Any, kernel: Callable[..., bool], truncating: bool) -> None:
    kernels.set_truncating_sums(truncating)
    for seed in SEEDS:
        kernels.set_seed(seed)
        assert kernel(kernels)
        if truncating:
            break


@pytest.mark.parametrize("kernel,mistake,said", MISTAKES, ids=[f"{k.__name__}-{m}" for k, m, _ in MISTAKES])
def test_mistakes_are_caught(kernels: Any, kernel: Callable[..., bool], mistake: int, said: str) -> None:
    caught, accounts = 0, []
    for seed in SEEDS:
        kernels.set_seed(seed)
        try:
            caught += not kernel(kernels, mistake)
        except emulated.LaunchError as error:
            accounts.append(str(error))
    assert caught + len(accounts) >= len(SEEDS) // 2
    assert not said or any(said in account for account in accounts), accounts


def test_collectives(kernels: Any) -> None:
    values = torch.randint(-(2**31), 2**31, (32,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    out = torch.zeros(17, 32, dtype=torch.int32)
    kernels.call("selftest_collectives", values, out)
    v, lanes = values.tolist(), range(32)

    def signed(x: int) -> int:
        return (x + 2**31) % 2**32 - 2**31

    third = [x for lane, x in enumerate(v) if lane % 3 == 0]

    def parity(x: int) -> int:  # as C's %, which keeps the sign
        return x % 2 if x >= 0 else -(x % 2)

    expected = [
        [v[5]] * 32,
        [v[lane // 8 * 8 + 1] for lane in lanes],
        [v[lane - 3 if lane >= 3 else lane] for lane in lanes],
        [v[lane - 2 if lane % 4 >= 2 else lane] for lane in lanes],
        [v[lane + 30 if lane < 2 else lane] for lane in lanes],
        [v[lane + 1 if lane % 16 < 15 else lane] for lane in lanes],
        [v[lane ^ 21] for lane in lanes],
        [v[lane ^ 12 if (lane ^ 12) // 8 <= lane // 8 else lane] for lane in lanes],
        [signed(sum((x > 0) << lane for lane, x in enumerate(v)))] * 32,
        [int(all(x > 0 for x in v))] * 32,
        [int(any(x > 0 for x in v))] * 32,
        [max(v)] * 32,
        [min(v)] * 32,
        [signed(sum(v))] * 32,
        [signed(max(x % 2**32 for x in v))] * 32,
        [max(third) if lane % 3 == 0 else -1 for lane in lanes],
        [signed(sum((parity(x) == parity(y)) << lane for lane, y in enumerate(v))) for x in v],
    ]
    assert out.tolist() == expected


def test_a_launch_that_does_not_fit_fails(kernels: Any) -> None:
    with pytest.raises(emulated.LaunchError, match="1056 threads"):
        kernels.call("selftest_sum", torch.zeros(1, 1056, dtype=torch.int32), torch.zeros(1), 1, 1056, 0)
