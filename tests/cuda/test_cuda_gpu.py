"""What only a GPU shows: graphs, streams, devices, no waiting for the device, same bits, and every forced search."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import assert_nearest, randn, same_bits
from torch import Tensor

from semhitok import _C, ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or _C.build_info()["cuda"] is None, reason="no CUDA device or kernels"
    ),
]

N, K, M, DS, DP = 515, 2049, 6, 33, 16
SEARCHES = [*_C.cuda_searches(), ""]  # "": the one that nearest_code chooses
SHAPES = [(1, 1, 1), (5, 3, 9), (129, 257, 8), (300, 1000, 33), (515, 2049, 64), (1000, 4097, 48), (70, 5000, 100)]
MIB = 2**20

Inputs = tuple[Tensor, ...]


def inputs(seed: int) -> Inputs:
    shapes = [(N, DS), (N, DP), (K, DS), (K, M, DP)]
    return tuple(randn(*shape, seed=seed + place, device="cuda") for place, shape in enumerate(shapes))


def group_of(z: Tensor, count: int) -> Tensor:
    return (z[:, 0].float().abs() * 1000).long() % count


OPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "nearest_code": lambda z_sem, z_pix, sem, pix: ops.nearest_code(z_sem, sem),
    "nearest_subcode": lambda z_sem, z_pix, sem, pix: ops.nearest_subcode(z_pix, pix, group_of(z_pix, K)),
    "hier_quantize": ops.hier_quantize,
    "hier_lookup": lambda z_sem, z_pix, sem, pix: ops.hier_lookup(group_of(z_pix, K * M), sem, pix),
    "segment_sum": lambda z_sem, z_pix, sem, pix: ops.segment_sum(z_sem, group_of(z_sem, 40), 40),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


def assert_same(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(same_bits(a, b) for a, b in zip(outputs, expected, strict=True))


# ---- how they are called ----


@every_op
def test_graph_replays_with_changed_inputs(op: Callable[..., tuple[Tensor, ...]]) -> None:
    static = inputs(1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            op(*static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = op(*static)
    for seed in (1, 50, 90):
        fresh = inputs(seed)
        for held, new in zip(static, fresh, strict=True):
            held.copy_(new)
        graph.replay()
        assert_same(outputs, op(*fresh))


@every_op
def test_works_on_the_current_stream(op: Callable[..., tuple[Tensor, ...]]) -> None:
    given = inputs(1)
    expected = op(*given)
    held = tuple(torch.zeros_like(t) for t in given)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # inputs arrive late on this stream: a launch on another would not see them
        for late, new in zip(held, given, strict=True):
            late.copy_(new)
        outputs = op(*held)
    stream.synchronize()
    assert_same(outputs, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@every_op
def test_works_on_the_device_of_its_inputs(op: Callable[..., tuple[Tensor, ...]]) -> None:
    expected = op(*inputs(1))
    outputs = op(*(t.to("cuda:1") for t in inputs(1)))
    assert all(t.device == torch.device("cuda:1") for t in outputs) and torch.cuda.current_device() == 0
    assert_same(tuple(t.to("cuda:0") for t in outputs), expected)


@every_op
def test_the_host_does_not_wait(op: Callable[..., tuple[Tensor, ...]]) -> None:
    given = inputs(1)
    op(*given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*given)
        if op in (OPS["nearest_code"], OPS["hier_quantize"]):
            learnt = [t.clone().requires_grad_() for t in given]
            sum(t.float().sum() for t in op(*learnt) if t.is_floating_point()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_op
def test_a_call_returns_before_the_device_is_done(op: Callable[..., tuple[Tensor, ...]]) -> None:
    """The sync debug mode does not see a wait inside the op itself."""
    given = inputs(1)
    op(*given)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    done = torch.cuda.Event()
    op(*given)
    done.record()
    assert not done.query()
    torch.cuda.synchronize()


@every_op
def test_same_bits_on_every_run(op: Callable[..., tuple[Tensor, ...]]) -> None:
    given = inputs(1)
    first = op(*given)
    for _ in range(5):
        assert_same(op(*given), first)


@every_op
def test_compiles_whole(op: Callable[..., tuple[Tensor, ...]]) -> None:
    given = inputs(1)
    assert_same(torch.compile(op, fullgraph=True)(*given), op(*given))


@every_op
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_computes_in_float32(op: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    given = tuple(t.to(dtype) for t in inputs(1))
    expected = op(*(t.float() for t in given))
    with torch.autocast("cuda", dtype=dtype):
        assert_same(op(*given), expected)


# ---- every search of nearest_code ----


def probe(z: Tensor, codebook: Tensor, metric: str, search: str) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return torch.ops.semhitok.nearest_code_probe(z, codebook, metric, search)
    except RuntimeError as error:
        refusal = str(error).splitlines()[0]
        if "CUDA" in refusal and "error" in refusal.lower():
            raise
        pytest.skip(refusal)


@pytest.mark.parametrize("search", SEARCHES)
def test_hopper_has_every_search(search: str) -> None:
    """Elsewhere a search that refuses skips its test; on Hopper no test may be skipped for that."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    z, codebook = randn(515, 64, seed=1, device="cuda"), randn(2049, 64, seed=2, device="cuda")
    scores, ids, rescored = torch.ops.semhitok.nearest_code_probe(z, codebook, "ip", search)
    assert_nearest(z, codebook, "ip", scores, ids)
    assert search != "certified" or (rescored > 0).double().mean() > 0.5


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forced_search(shape: tuple[int, int, int], metric: str, search: str) -> None:
    n, k, d = shape
    z, codebook = randn(n, d, seed=1, device="cuda"), randn(k, d, seed=2, device="cuda")
    scores, ids, rescored = probe(z, codebook, metric, search)
    assert_nearest(z, codebook, metric, scores, ids)
    assert rescored.shape == ids.shape and (rescored >= -1).all()
    again = probe(z, codebook, metric, search)
    assert same_bits(scores, again[0]) and torch.equal(ids, again[1])


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e6, 1e18])
def test_forced_search_at_any_scale(scale: float, search: str) -> None:
    """Codes and tokens of very different sizes, which fp16 and int8 cannot hold unscaled."""
    z = randn(200, 32, seed=1, device="cuda") * scale
    codebook = randn(3000, 32, seed=2, device="cuda") * 10 ** (2 * randn(3000, 1, seed=3, device="cuda").clamp(-2, 2))
    scores, ids, _ = probe(z, codebook, "ip", search)
    assert_nearest(z, codebook, "ip", scores, ids)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-2])
def test_forced_search_of_a_collapsed_codebook(spread: float, search: str) -> None:
    codebook = randn(1, 24, seed=1, device="cuda") + spread * randn(2500, 24, seed=2, device="cuda")
    codebook = codebook.repeat(2, 1)  # every code twice: the lower id wins
    z = randn(300, 24, seed=3, device="cuda")
    scores, ids, _ = probe(z, codebook, "l2", search)
    assert_nearest(z, codebook, "l2", scores, ids)
    assert (ids < 2500).all() and (spread > 0 or (ids == 0).all())


@pytest.mark.parametrize("search", SEARCHES)
def test_forced_search_of_bad_tokens_and_codes(search: str) -> None:
    z, codebook = randn(300, 32, seed=1, device="cuda"), randn(2000, 32, seed=2, device="cuda")
    z[7, 3], z[131, 0] = torch.nan, torch.inf
    before = probe(z, codebook, "ip", search)[1].unique()[:10]
    codebook[before[before > 0], 5] = torch.nan
    scores, ids, _ = probe(z, codebook, "ip", search)
    assert scores[[7, 131]].isnan().all() and (ids[[7, 131]] == 0).all()
    good = torch.ones(300, dtype=torch.bool, device="cuda")
    good[[7, 131]] = False
    assert not scores[good].isnan().any() and not torch.isin(ids[good], before[before > 0]).any()


# ---- memory ----


def test_hier_quantize_of_many_tokens_needs_little_memory() -> None:
    shapes = [(65536, 32), (65536, 32), (16384, 32), (16384, 12, 32)]
    given = [torch.rand(s, device="cuda") for s in shapes]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = ops.hier_quantize(*given)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before - sum(o.nbytes for o in outputs) < 64 * MIB
