"""The tensor-core searches of csrc/cuda on the emulator: ids against float64, and what the certificate promises."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import emulated
import pytest
import torch
from op_checks import assert_nearest, randn, same_bits, scores64
from torch import Tensor

from benchmarks.cuda import floor
from semhitok import _C, ops

METRICS = ["ip", "l2"]
SEARCHES = emulated.SEARCHES
TENSOR_CORES = SEARCHES[1:]
SHAPES = [  # N, K, D: a token, a code, less and more than a tile of each, every number of steps of MMA
    (1, 1, 1), (3, 130, 3), (130, 129, 8), (257, 700, 20), (200, 300, 32), (70, 300, 33), (193, 257, 48), (66, 200, 64),
    (20, 140, 65), (33, 150, 96), (17, 150, 121), (17, 150, 128),
]  # fmt: skip

pytestmark = pytest.mark.skipif(emulated.toolkit_include() is None, reason="no CUDA toolkit")


@pytest.fixture(scope="module")
def library() -> emulated.Kernels:
    include = emulated.toolkit_include()
    assert include is not None
    return emulated.Kernels(emulated.build(include))


@pytest.fixture
def kernels(library: emulated.Kernels) -> emulated.Kernels:
    library.set_device((9, 0), 4)  # few multiprocessors: each goes over several units of work
    library.set_truncating_sums(False)
    library.set_seed(1)
    return library


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def with_norms(z: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return z, codes * torch.linspace(0.1, 3, len(codes))[:, None]


# name -> (z, codes) of standard normal ones
DATA: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "normal": lambda z, c: (z, c),
    "unit": lambda z, c: (unit(z), unit(c)),
    "of many norms": with_norms,
    "long tokens": lambda z, c: (300 * z, with_norms(z, c)[1]),
    "short tokens": lambda z, c: (1e-3 * z, with_norms(z, c)[1]),
    "far from zero": lambda z, c: (unit(z) + 3, unit(c) + 3),
    "clustered": lambda z, c: (c[torch.arange(len(z)) * 3 % len(c)] + 0.1 * z, c),
    "tiny": lambda z, c: (1e-18 * z, 1e-18 * c),
    "huge": lambda z, c: (1e15 * z, 1e15 * c),
    "one large column": lambda z, c: (z * torch.eye(z.shape[1])[0].mul(50).add(1), c),
    "close codes": lambda z, c: (z, c[:1] + 1e-3 * c),
    "repeated codes": lambda z, c: (z, c[: len(c) // 5].repeat(5, 1)),
    "one code": lambda z, c: (z, c[:1].repeat(len(c), 1)),
}


@pytest.mark.parametrize("search", TENSOR_CORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(kernels: emulated.Kernels, shape: tuple[int, int, int], search: str) -> None:
    n, k, d = shape
    for metric, (zt, ct) in zip(
        METRICS, [(torch.float32, torch.float16), (torch.bfloat16, torch.float32)], strict=True
    ):
        z, codes = randn(n, d, seed=1, dtype=zt), randn(k, d, seed=2, dtype=ct)
        scores, ids, _ = kernels.nearest_code_probe(z, codes, metric, search)
        assert_nearest(z, codes, metric, scores, ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [8, 32, 64])
@pytest.mark.parametrize("kind", DATA)
def test_every_kind_of_data(kernels: emulated.Kernels, kind: str, d: int, metric: str) -> None:
    """The certified search, whatever its certificates, also gives the ids of fp64, those of the CPU."""
    z, codes = DATA[kind](randn(130, d, seed=3), randn(1500, d, seed=4))
    for search in TENSOR_CORES:
        scores, ids, rescored = kernels.nearest_code_probe(z, codes, metric, search)
        assert_nearest(z, codes, metric, scores, ids)
        if search == "certified":
            certain = rescored > 0
            assert torch.equal(ids[certain], ops.nearest_code(z, codes, metric)[1][certain])
            assert (certain | (rescored == -1)).all()
        else:
            assert (rescored == 0).all()


def test_nearly_every_token_gets_a_certificate(kernels: emulated.Kernels) -> None:
    for kind, d, metric in itertools.product(["normal", "unit", "far from zero", "clustered"], [8, 32, 64], METRICS):
        z, codes = DATA[kind](randn(256, d, seed=3), randn(4096, d, seed=4))
        rescored = kernels.nearest_code_probe(z, codes, metric, "certified")[2]
        assert (rescored < 0).float().mean() <= 0.06 and rescored.clamp(min=0).float().mean() <= 4, (kind, d, metric)


def test_certificates_do_not_depend_on_scale(kernels: emulated.Kernels) -> None:
    z, codes = randn(200, 32, seed=3), with_norms(randn(1, 1, seed=1), randn(3000, 32, seed=4))[1]
    first = kernels.nearest_code_probe(z, codes, "ip", "certified")[2]
    for scale in (2.0**-60, 2.0**-20, 2.0**60):  # powers of two: nothing else is rounded otherwise
        assert torch.equal(kernels.nearest_code_probe(scale * z, codes, "ip", "certified")[2], first)
        assert torch.equal(kernels.nearest_code_probe(z, scale * codes, "ip", "certified")[2], first)


@pytest.mark.parametrize("metric", METRICS)
def test_a_bound_too_small_gives_wrong_ids(kernels: emulated.Kernels, metric: str) -> None:
    """This shows that these tokens need the bound: with it, none is wrong."""
    wrong = {}
    for scale in (0.0, 1.0):
        wrong[scale] = 0
        for seed, d in itertools.product(range(3), (3, 8)):
            z, codes = randn(400, d, seed=seed), unit(randn(2000, d, seed=seed + 10))
            best = scores64(z, codes, metric).argmax(1)
            wrong[scale] += int((kernels.nearest_code_probe(z, codes, metric, "certified", scale)[1] != best).sum())
    assert wrong[0.0] > 20 and wrong[1.0] == 0


def test_tokens_along_what_rounding_leaves(kernels: emulated.Kernels) -> None:
    """x parallel to a code's residual: the error of the int8 score is as large as the bound allows."""
    codes = unit(randn(600, 8, seed=5))
    centred = codes - codes.mean(0)
    step = centred.abs().max() / 127
    z = (centred - (centred / step).round() * step)[:200] * 100
    for sign in (1, -1):
        scores, ids, _ = kernels.nearest_code_probe(sign * z, codes, "ip", "certified")
        assert_nearest(sign * z, codes, "ip", scores, ids)
        assert torch.equal(ids, ops.nearest_code(sign * z, codes, "ip")[1])


def test_codes_that_int8_holds_as_they_are(kernels: emulated.Kernels) -> None:
    """Only the rounding of the tokens is left in the bound."""
    for seed, d in itertools.product(range(3), (2, 3, 6)):
        half = (unit(randn(700, d, seed=seed)) * 127).round() / 127
        half[0] = 0
        half[0, 0] = 1  # the scale is 1 / 127
        codes, z = torch.cat([half, -half]), randn(400, d, seed=seed + 10)  # their mean is zero
        scores, ids, rescored = kernels.nearest_code_probe(z, codes, "ip", "certified")
        assert_nearest(z, codes, "ip", scores, ids)
        assert torch.equal(ids, ops.nearest_code(z, codes, "ip")[1]) and (rescored > 0).any()


def test_tokens_at_the_mean_of_the_codes(kernels: emulated.Kernels) -> None:
    """ "l2": only the rounding of the codes' norms is left in the bound; the shortest code is the nearest."""
    for seed in range(8):
        half = unit(randn(40, 8, seed=seed)) * (
            1 + 1e-4 * torch.rand(40, 1, generator=torch.Generator().manual_seed(seed))
        )
        half[:5] *= 3
        codes, z = torch.cat([half, -half]), torch.zeros(3, 8)
        ids = kernels.nearest_code_probe(z, codes, "l2", "certified")[1]
        assert torch.equal(ids, ops.nearest_code(z, codes, "l2")[1])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_finite(kernels: emulated.Kernels, metric: str, search: str) -> None:
    z, codes = randn(70, 32, seed=6), randn(400, 32, seed=7)
    codes[::7], codes[3::50, 5] = float("nan"), float("inf")
    z[3, 2], z[7, 0], z[9] = float("nan"), -float("inf"), 0
    good = torch.isfinite(codes).all(1)
    scores, ids, _ = kernels.nearest_code_probe(z, codes, metric, search)
    assert (ids[[3, 7]] == 0).all() and scores[[3, 7]].isnan().all()
    rest = torch.isfinite(z).all(1)
    assert good[ids[rest]].all()
    assert_nearest(z[rest], codes[good], metric, scores[rest], (good.cumsum(0) - 1)[ids[rest]])
    scores, ids, _ = kernels.nearest_code_probe(z, torch.full_like(codes, float("nan")), metric, search)
    assert (ids == 0).all() and scores.isnan().all()


@pytest.mark.parametrize("search", SEARCHES)
def test_the_lowest_of_equal_codes_wins(kernels: emulated.Kernels, search: str) -> None:
    base = randn(150, 16, seed=8)
    codes = torch.cat([base.flip(0), base, base])
    ids = kernels.nearest_code_probe(base, codes, "ip", search)[1]
    firsts = {tuple(row): place for place, row in reversed(list(enumerate(codes.tolist())))}
    assert ids.tolist() == [firsts[tuple(codes[i].tolist())] for i in ids]


@pytest.mark.parametrize("search", SEARCHES)
def test_same_bits_in_any_order(kernels: emulated.Kernels, search: str) -> None:
    z, codes = randn(300, 24, seed=9), randn(900, 24, seed=10)
    first = kernels.nearest_code_probe(z, codes, "l2", search)
    for seed in (2, 3, 4):
        kernels.set_seed(seed)
        assert all(
            same_bits(a, b) for a, b in zip(first, kernels.nearest_code_probe(z, codes, "l2", search), strict=True)
        )


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_any_number_of_multiprocessors(kernels: emulated.Kernels, search: str, multiprocessors: int) -> None:
    """One takes all units of work; 132 split the codes of few tokens, down to one tile."""
    kernels.set_device((9, 0), multiprocessors)
    for n, k in [(5, 700), (600, 130)]:
        z, codes = randn(n, 16, seed=11), randn(k, 16, seed=12)
        scores, ids, _ = kernels.nearest_code_probe(z, codes, "ip", search)
        assert_nearest(z, codes, "ip", scores, ids)


def test_sums_that_tensor_cores_cut(kernels: emulated.Kernels) -> None:
    kernels.set_truncating_sums(True)
    for search in ("mma", "wgmma"):
        z, codes = randn(100, 64, seed=13), randn(300, 64, seed=14)
        scores, ids, _ = kernels.nearest_code_probe(z, codes, "ip", search)
        assert_nearest(z, codes, "ip", scores, ids)


def test_the_list_of_searches(kernels: emulated.Kernels) -> None:
    assert kernels.searches == SEARCHES and SEARCHES[0] == "simt"
    assert _C.cuda_searches() == (SEARCHES if _C.build_info()["cuda"] else [])
    assert set(floor.DESIGNS) == set(SEARCHES)


def test_which_search_is_chosen(kernels: emulated.Kernels) -> None:
    def chosen(n: int, k: int, d: int, capability: tuple[int, int] = (9, 0), wide: bool = False) -> str:
        kernels.set_device(capability, 132)
        return kernels.chosen_search(n, k, d, wide)

    assert chosen(65536, 16384, 64) == chosen(4096, 16384, 32) == "certified"
    assert chosen(256, 16384, 32) == chosen(1, 1, 1) == "few"  # packing the codebook would take longer
    assert chosen(256, 16384, 32, (8, 6)) == "few" and chosen(256, 16384, 32, (7, 5)) == "simt"
    assert chosen(65536, 16384, 64, wide=True) == chosen(65536, 16384, 129) == "simt"
    assert chosen(65536, 16384, 64, (8, 0)) == chosen(65536, 16384, 64, (12, 0)) == "mma"
    assert chosen(65536, 16384, 64, (10, 0)) == chosen(65536, 16384, 64, (9, 1)) == "mma"
    assert chosen(65536, 16384, 64, (7, 5)) == "simt"


def test_the_op_takes_the_chosen_search(kernels: emulated.Kernels) -> None:
    kernels.set_device((9, 0), 2)
    z, codes = randn(2100, 32, seed=15), randn(16384, 32, seed=16)
    assert kernels.chosen_search(len(z), len(codes), 32) == "certified"
    ids = kernels.nearest_code(z, codes, "ip")[1]
    assert torch.equal(ids, ops.nearest_code(z, codes, "ip")[1])
    pix = randn(16384, 4, 8, seed=17)
    got = kernels.hier_quantize(z, z[:, :8].contiguous(), codes, pix)[2]
    assert torch.equal(got // 4, ids)


def test_an_op_queries_the_device_once(kernels: emulated.Kernels) -> None:
    def queries(call: Callable[[], object]) -> int:
        before = kernels.c.device_queries()
        call()
        return kernels.c.device_queries() - before

    once = queries(lambda: kernels.chosen_search(1, 1, 1))
    z, sem, pix = randn(40, 16, seed=18), randn(300, 16, seed=19), randn(300, 4, 16, seed=20)
    assert once > 0
    assert queries(lambda: kernels.nearest_code(z, sem)) == once
    assert queries(lambda: kernels.hier_quantize(z, z, sem, pix)) == once


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_memory_is_far_from_tokens_times_codes(kernels: emulated.Kernels, capability: tuple[int, int]) -> None:
    kernels.set_device(capability, 132)
    for tokens in (1, 256, 2048, 4096, 16384, 65536):
        for codes, d in [(8192, 8), (16384, 32), (16384, 64), (24576, 64)]:
            assert kernels.hier_quantize_scratch(tokens, codes, 12, d, 32) < 64 * 2**20
    assert kernels.hier_quantize_scratch(65536, 16384, 64, 64, 64) < 64 * 2**20  # tokens in the order of their groups
