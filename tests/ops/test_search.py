"""The certified search behind nearest_code on the CPU: exact ids on every instruction set, and the bound behind them.

`nearest_code_probe` names the instruction set and the first pass, `nearest_code_bounds` shows what the first pass saw.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import METRICS, randn, same_bits, scores64, threads
from torch import Tensor, nn

from benchmarks.exact import exact_winners
from semhitok import _C, ops

probe = torch.ops.semhitok.nearest_code_probe
bounds = torch.ops.semhitok.nearest_code_bounds

FOUND = _C.build_info()["cpu"]["found"]
PASSES = [(c, p) for c in FOUND for p in ("int8", "fp32") if (c, p) != ("default", "int8")]
INT8 = [c for c, p in PASSES if p == "int8"]
GROUP = {"int8": 16, "fp32": 128}

each_pass = pytest.mark.parametrize("capability,first_pass", PASSES)
each_metric = pytest.mark.parametrize("metric", METRICS)


# ---- kinds of data: (tokens, codebook) ----


def along(direction: Tensor, x: Tensor, cosine: float) -> Tensor:
    """Unit vectors, any two of which have about this cosine."""
    return math.sqrt(cosine) * F.normalize(direction, dim=-1) + math.sqrt(1 - cosine) * F.normalize(x, dim=-1)


def kinds(n: int, k: int, d: int) -> dict[str, tuple[Tensor, Tensor]]:
    z, c, one = randn(n, d, seed=1), randn(k, d, seed=2), randn(1, d, seed=3)
    pick = torch.randint(k, (n,), generator=torch.Generator().manual_seed(4))
    spectrum = 1 / torch.arange(1, d + 1).float()
    sizes = 10 ** (torch.arange(n) % 37 - 18.0)[:, None]
    dead = torch.where(torch.rand(k, 1, generator=torch.Generator().manual_seed(5)) < 0.7, one, c)
    clusters = randn(2, d, seed=6)[torch.arange(k) % 2]
    return {
        "random": (z, c),
        "clustered": (c[pick] + 0.3 * z, c),
        "common mean": (along(one, z, 0.9), along(one, c, 0.9)),
        "power law": (z * spectrum, c * spectrum),
        "collapsed 1e-2": (z, one + 1e-2 * c),
        "collapsed 1e-5": (z, one + 1e-5 * c),
        "codes twice": (z, c[torch.arange(k) // 2]),
        "dead codes": (z, dead),
        "one code": (z, one.expand(k, d).contiguous()),
        "two clusters": (z, clusters + 1e-6 * c),
        "lattice": (z.mul(2).round(), c.mul(2).round()),
        "zero rows": (torch.where(torch.arange(n)[:, None] % 3 == 0, 0.0, z), c),
        "tiny": (z * 1e-18, c * 1e-18),
        "huge": (z * 1e18, c * 1e18),
        "mixed sizes": (z * sizes, c),
        "outlier dimension": (z, c * torch.where(torch.arange(d) == 0, 30.0, 1.0)),
        "outlier codes": (z, c * torch.where(torch.arange(k) % 101 == 0, 100.0, 1.0)[:, None]),
        "residuals": (residual_rows(c, n, d), c),
    }


def residual_rows(codebook: Tensor, n: int, d: int) -> Tensor:
    """Tokens parallel to a code's error of rounding to 8 bits, where the bound is nearly reached."""
    r = codebook.double() - codebook.double().mean(0)
    scale = r.abs().max() / 127
    lost = r - scale * (r / scale).round()
    return F.normalize(lost[torch.arange(n) % len(codebook)], dim=-1).float()


# ---- ids ----


@each_pass
@each_metric
@pytest.mark.parametrize("kind", list(kinds(2, 2, 2)))
def test_ids_are_those_of_float64(kind: str, metric: str, capability: str, first_pass: str) -> None:
    for n, k, d in ((61, 700, 3), (70, 3001, 8), (65, 1500, 37)):
        z, codebook = kinds(n, k, d)[kind]
        scores, ids, _ = probe(z, codebook, metric, capability, first_pass)
        expected = exact_winners(z, codebook, metric)
        assert torch.equal(ids, expected)
        winners = codebook[expected].double()
        exact = (z.double() * winners).sum(-1) - (winners.square().sum(-1) / 2 if metric == "l2" else 0)
        torch.testing.assert_close(scores.double(), exact, rtol=2e-7, atol=1e-14 * float(exact.abs().max()))


@each_pass
@each_metric
@pytest.mark.parametrize(
    "n,k,d",
    [(1, 1, 1), (1, 17, 2), (7, 16, 5), (9, 255, 4), (64, 257, 7), (65, 513, 8), (129, 40, 96), (8, 300, 255),
     (5, 130, 512), (5, 130, 513), (3, 20000, 6)],
)  # fmt: skip
def test_odd_shapes(n: int, k: int, d: int, metric: str, capability: str, first_pass: str) -> None:
    if first_pass == "int8" and d > 512:
        with pytest.raises(
            RuntimeError, match='first_pass: expected "fp32", as there is no int8 pass here, got "int8"'
        ):
            probe(randn(n, d, seed=1), randn(k, d, seed=2), metric, capability, first_pass)
        return
    z, codebook = randn(n, d, seed=1), randn(k, d, seed=2)
    assert torch.equal(probe(z, codebook, metric, capability, first_pass)[1], exact_winners(z, codebook, metric))


@each_pass
@each_metric
@pytest.mark.parametrize("z_dtype,dtype", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_half_precision_inputs(
    z_dtype: torch.dtype, dtype: torch.dtype, metric: str, capability: str, first_pass: str
) -> None:
    z, codebook = randn(70, 24, seed=1, dtype=z_dtype), randn(900, 24, seed=2, dtype=dtype)
    assert torch.equal(probe(z, codebook, metric, capability, first_pass)[1], exact_winners(z, codebook, metric))


@each_pass
@each_metric
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 400), st.integers(1, 20), st.integers(1, 3), st.integers(0, 2**31))
def test_exact_ties_on_a_lattice(
    metric: str, capability: str, first_pass: str, n: int, k: int, d: int, levels: int, seed: int
) -> None:
    """Small integers: every score is exact in float64 and many are equal, so the lowest id is the only answer."""
    z, codebook = randn(n, d, seed=seed).mul(levels).round(), randn(k, d, seed=seed + 1).mul(levels).round()
    ids = probe(z, codebook, metric, capability, first_pass)[1]
    assert torch.equal(
        ids, scores64(z, codebook, metric).eq(scores64(z, codebook, metric).amax(1, True)).int().argmax(1)
    )


@each_pass
@each_metric
def test_unusable_codes_and_tokens(metric: str, capability: str, first_pass: str) -> None:
    z, codebook = randn(80, 9, seed=1), randn(600, 9, seed=2)
    bad = torch.arange(600) % 4 == 1
    codebook[bad, torch.arange(600)[bad] % 9] = float("inf")
    codebook[::8, 3] = float("nan")
    usable = codebook.isfinite().all(-1).nonzero()[:, 0]
    z[5, 2], z[6, 0], z[7] = float("nan"), -float("inf"), 0.0
    scores, ids, _ = probe(z, codebook, metric, capability, first_pass)
    fine = z.isfinite().all(-1)
    assert torch.equal(ids[fine], usable[exact_winners(z[fine], codebook[usable], metric)])
    assert (ids[~fine] == 0).all() and scores[~fine].isnan().all()
    scores, ids, _ = probe(z, torch.full_like(codebook, float("nan")), metric, capability, first_pass)
    assert (ids == 0).all() and scores.isnan().all()


@each_pass
def test_scores_beyond_fp32(capability: str, first_pass: str) -> None:
    """Scores that overflow fp32 are infinite, and the ids are still right."""
    z, codebook = 1e30 * randn(40, 6, seed=1), 1e30 * randn(500, 6, seed=2)
    scores, ids, _ = probe(z, codebook, "l2", capability, first_pass)
    assert torch.equal(ids, exact_winners(z, codebook, "l2")) and scores.isinf().all()


@pytest.mark.parametrize("count", range(1, 9))
@each_metric
def test_any_number_of_threads(count: int, metric: str) -> None:
    z, codebook = randn(1000, 16, seed=1), randn(2000, 16, seed=2)
    expected = probe(z, codebook, metric, FOUND[-1], "fp32")
    with threads(count):
        for capability in FOUND:
            codes = codebook + 0.0  # a new tensor, so that packing is threaded too
            scores, ids, _ = probe(z, codes, metric, capability, "")
            assert same_bits(scores, expected[0]) and torch.equal(ids, expected[1])


# ---- the bound ----


def worst_use_of_bound(z: Tensor, codebook: Tensor, metric: str, capability: str, first_pass: str) -> float:
    """The greatest |approximate - exact| / bound over all tokens and blocks of codes. Distinct finite codes only.

    Tokens that skip the first passes because their fp32 scores could overflow have an infinite bound.
    """
    approximate, bound, codes = bounds(z, codebook, metric, capability, first_pass)
    assert codes.shape[1] == GROUP[first_pass]
    assert torch.equal(codes.unique(), torch.arange(len(codebook)))  # every code is in some block
    exact = scores64(z, codebook, metric)[:, codes].amax(-1)
    assert (bound > 0).all()
    return float(((approximate - exact).abs() / bound).max())


@each_pass
@each_metric
@pytest.mark.parametrize(
    "kind",
    ["random", "clustered", "common mean", "power law", "collapsed 1e-2", "collapsed 1e-5", "two clusters", "tiny",
     "huge", "mixed sizes", "outlier dimension", "outlier codes", "residuals"],
)  # fmt: skip
def test_the_bound_holds(kind: str, metric: str, capability: str, first_pass: str) -> None:
    for n, k, d in ((33, 700, 1), (50, 1200, 3), (40, 900, 8), (30, 600, 40), (20, 300, 200)):
        z, codebook = kinds(n, k, d)[kind]
        codebook = codebook.unique(dim=0)
        assert worst_use_of_bound(z, codebook, metric, capability, first_pass) <= 1.0


@pytest.mark.parametrize("capability", INT8)
def test_the_bound_is_reached(capability: str) -> None:
    """It must not be so wide that a wrong one would hold, too: rows along a code's rounding error come close to it."""
    codebook = randn(1500, 2, seed=2)
    z = residual_rows(codebook, 400, 2)
    assert worst_use_of_bound(z, codebook, "ip", capability, "int8") > 0.6


@pytest.mark.parametrize("capability", INT8)
def test_a_smaller_bound_is_wrong(capability: str) -> None:
    """With three tenths of the bound, ids are wrong on these data, so tests on them would notice."""
    wrong = {0.3: 0, 1.0: 0}
    for d in (2, 3, 4):
        codebook = randn(16000, d, seed=d)
        z = torch.cat([residual_rows(codebook, 2000, d), randn(2000, d, seed=1)])
        expected = exact_winners(z, codebook, "ip")
        for scale in wrong:
            wrong[scale] += int((probe(z, codebook, "ip", capability, "int8", scale)[1] != expected).sum())
    assert wrong[1.0] == 0 and wrong[0.3] > 0


def test_a_smaller_fp32_bound_is_wrong() -> None:
    codebook = torch.cat([randn(1, 8, seed=s) + 1e-6 * randn(2000, 8, seed=s + 9) for s in range(3)])
    z = randn(500, 8, seed=1)
    expected = exact_winners(z, codebook, "ip")
    for capability in FOUND:
        assert torch.equal(probe(z, codebook, "ip", capability, "fp32")[1], expected)
        assert (probe(z, codebook, "ip", capability, "fp32", 0.0)[1] != expected).any()


@pytest.mark.parametrize("capability", INT8)
@each_metric
def test_few_codes_are_scored_exactly(metric: str, capability: str) -> None:
    """This keeps the search fast on data that defeat a plain 8-bit rounding."""
    for kind in ("random", "clustered", "common mean", "collapsed 1e-2", "collapsed 1e-5", "codes twice", "dead codes",
                 "one code", "two clusters", "outlier codes", "tiny", "huge"):  # fmt: skip
        z, codebook = kinds(200, 8192, 32)[kind]
        rescored = probe(z, codebook, metric, capability, "int8")[2].float().mean()
        assert rescored < 0.03 * 8192, f"{kind}: {rescored}"


# ---- codebooks are kept by what they hold ----


def renewed(change: Callable[[nn.Parameter], None]) -> None:
    """After change(codebook), nearest_code must answer as for a codebook that it has never seen."""
    z = randn(300, 12, seed=1)
    codebook = nn.Parameter(randn(1000, 12, seed=2))
    with torch.no_grad():
        ops.nearest_code(z, codebook)
        before = exact_winners(z, codebook.detach(), "ip")
        change(codebook)
        ids = ops.nearest_code(z, codebook)[1]
    assert torch.equal(ids, exact_winners(z, codebook.detach(), "ip")) and not torch.equal(ids, before)


def test_in_place_updates_are_seen() -> None:
    new = randn(1000, 12, seed=3)
    renewed(lambda c: c.copy_(new))
    renewed(lambda c: c.data.copy_(new))
    renewed(lambda c: c.detach().numpy().__setitem__(slice(None), new.numpy()))
    renewed(lambda c: c.detach()[::7].mul_(2.0))
    renewed(lambda c: c.set_(new.clone()))
    renewed(lambda c: setattr(c, "data", new))
    renewed(lambda c: nn.ParameterDict({"c": c}).load_state_dict({"c": new}) and None)
    with torch.inference_mode():
        renewed(lambda c: c.neg_())


def test_an_optimiser_step_is_seen() -> None:
    def step(codebook: nn.Parameter) -> None:
        codebook.grad = randn(1000, 12, seed=4)
        torch.optim.SGD([codebook], lr=1.0).step()

    renewed(step)


def test_one_bit_is_seen() -> None:
    """The smallest change of any one code, at every place of a row and of the codebook."""
    z = torch.eye(5)
    for row, column in ((0, 0), (1, 4), (500, 2), (998, 3), (999, 1)):
        codebook = torch.zeros(1000, 5)
        codebook[:, column] = 1.0
        ops.nearest_code(z, codebook)
        codebook[row, column] = 1.0 + 2.0**-23
        assert int(ops.nearest_code(z, codebook)[1][column]) == row


def test_two_metrics_and_dtypes_of_one_codebook() -> None:
    z, codebook = randn(200, 8, seed=1), randn(700, 8, seed=2)
    for metric in ("ip", "l2", "ip"):
        for codes in (codebook, codebook.half(), codebook):
            assert torch.equal(ops.nearest_code(z, codes, metric)[1], exact_winners(z, codes, metric))


def test_many_codebooks_in_many_threads() -> None:
    """More codebooks than are kept, changing while several threads search: each answer is for its own codebook."""
    z, wrong = randn(64, 6, seed=1), []

    def work(seed: int) -> None:
        for turn in range(30):
            codebook = randn(400, 6, seed=1000 * seed + turn % 12)
            if not torch.equal(ops.nearest_code(z, codebook)[1], scores64(z, codebook, "ip").argmax(1)):
                wrong.append((seed, turn))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork() -> None:
    """A worker process (of a data loader) forked from one that has searched can search, too."""
    z, codebook = randn(8, 6, seed=1), randn(100, 6, seed=2)
    expected = ops.nearest_code(z, codebook)[1]
    child = os.fork()
    if child == 0:
        same = torch.equal(ops.nearest_code(z, codebook)[1], expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- the probe itself ----


def test_probe_errors() -> None:
    z, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    with pytest.raises(RuntimeError, match=r"capability: expected one of .*default.*, got sse9"):
        probe(z, codebook, "ip", "sse9")
    with pytest.raises(RuntimeError, match='first_pass: expected "int8", "fp32" or "", got "int4"'):
        probe(z, codebook, "ip", "", "int4")
    with pytest.raises(RuntimeError, match="z: expected 2 dimensions"):
        probe(z[0], codebook)
    with pytest.raises(RuntimeError, match="z: expected float32, float16 or bfloat16, got float64"):
        probe(z.double(), codebook)
