"""The benchmarks run and count what is wrong; the winners they count against are those of rational arithmetic."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

import semhitok.quantizer
import semhitok.reference
from benchmarks import exact, exactness, quantize_bench
from benchmarks.training import fixed_crops, quantizer_share, train_memory
from semhitok import _C

ROOT = Path(quantize_bench.__file__).parents[1]
BIG = 2.0**60


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *([ROOT / name] if name.endswith(".py") else ["-m", name]), *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


# ---- exact.py ----


def fraction_winner(z: Tensor, codebook: Tensor, metric: str) -> int:
    token, scores = [Fraction(x) for x in z.tolist()], []
    for code in codebook.tolist():
        terms = [(x, Fraction(c)) for x, c in zip(token, code, strict=True)]
        scores.append(sum(x * c - (c * c / 2 if metric == "l2" else 0) for x, c in terms))
    return scores.index(max(scores))


@pytest.mark.parametrize(
    ("metric", "z", "codebook", "winner"),
    [
        ("ip", [1, 1], [[1, 1], [1, 2], [2, 1], [3, 0]], 1),  # three equal scores
        ("ip", [1, 1, 1], [[0, 0.5, 0], [BIG, 1, -BIG]], 1),  # added in order, float64 loses the 1
        ("ip", [1, 1, 1], [[BIG, 1, -BIG], [0, 1, 0]], 0),  # an exact tie that float64 may not see ...
        ("ip", [1, 1, 1], [[0, 1, 0], [BIG, 1, -BIG]], 0),  # ... in either order
        ("ip", [1, 1, 1], [[0, 1, 0], [BIG, 2, -BIG], [BIG, 1, -BIG]], 1),
        ("ip", [1, 2], [[0, 0], [1, 2], [0.5, 0], [1, 2]], 1),  # a code that occurs twice
        ("ip", [1, 0], [[0.0, 1], [-0.0, 1]], 0),  # equal but for the sign of zero
        ("ip", [0, 0], [[-1, 5], [3, 3], [9, 9]], 0),  # a token of zeros
        ("ip", [-0.0, 0], [[-1, 5], [3, 3]], 0),
        ("l2", [0, 0], [[3, 0], [0, 1], [1, 0]], 1),
        ("l2", [0, 0], [[1, 2.0**-40], [1, 0]], 1),  # squares that are equal in float64
        ("l2", [0, 0], [[1, 0], [1, 2.0**-40]], 0),
        ("l2", [1, 1], [[1, 3], [3, 1], [2, 2], [1, 1 + 2.0**-20], [1, 1]], 4),
        ("l2", [1e18, 1], [[1e18, 0], [1e18, 1], [1e-18, 1]], 1),
    ],
)
def test_exact_winner(metric: str, z: list[float], codebook: list[list[float]], winner: int) -> None:
    tokens, codes = torch.tensor([z], dtype=torch.float32), torch.tensor(codebook, dtype=torch.float32)
    assert fraction_winner(tokens[0], codes, metric) == winner
    assert exact.exact_winners(tokens, codes, metric).tolist() == [winner]


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("kind", list(dict.fromkeys(case.kind for case in exactness.CASES)))
def test_exact_winners_are_those_of_fractions(kind: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "PIECE", 64)  # several pieces
    case = next(case for case in exactness.CASES if case.kind == kind)
    z, codebook = dataclasses.replace(case, k=30, d=3).data(9, seed=1)
    expected = [fraction_winner(token, codebook, metric) for token in z]
    assert exact.exact_winners(z, codebook, metric).tolist() == expected


def test_no_tokens() -> None:
    assert exact.exact_winners(torch.empty(0, 2), torch.ones(3, 2)).tolist() == []


def test_counts_wrong_ids_and_those_within_rounding() -> None:
    codebook = torch.tensor([[1, 2.0**-40], [1, 0], [2, 0], [1, 0]])
    z = torch.zeros(5, 2)
    winners = exact.exact_winners(z, codebook, "l2")
    assert winners.tolist() == [1] * 5
    # Right; off by 2^-81, which float64 cannot see; far off; the duplicate that is not the lowest; right.
    assert exact.count_wrong(z, codebook, "l2", torch.tensor([1, 0, 2, 3, 1]), winners) == (2, 1)


def test_exact_winners_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match='metric: expected "ip" or "l2", got "cosine"'):
        exact.exact_winners(torch.ones(1, 2), torch.ones(3, 2), "cosine")
    with pytest.raises(ValueError, match="codebook: expected float32, float16 or bfloat16, got float64"):
        exact.exact_winners(torch.ones(1, 2), torch.ones(3, 2).double())


# ---- exactness.py ----


def test_exactness_finds_no_wrong_id() -> None:
    done = script("benchmarks.exactness", "--tokens", "2000")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(exactness.CASES) + 3
    for name in _C.build_info()["cpu"]["found"]:
        assert f"{name} 0" in lines[-1]


def test_exactness_finds_an_error_bound_that_is_too_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def mutated(z: Tensor, codebook: Tensor, metric: str, capability: str, first_pass: str) -> tuple[Tensor, Tensor]:
        return torch.ops.semhitok.nearest_code_probe(z, codebook, metric, capability, first_pass, 0.0)[1:]

    monkeypatch.setattr(exactness, "search", mutated)
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--tokens", "2000"])
    assert exactness.main() == 1
    wrong = capsys.readouterr().out.splitlines()[-1].partition("wrong ids: ")[2]
    for name, _, count in (part.rpartition(" ") for part in wrong.split(", ")):
        assert int(count) > 0, f"{name}: no wrong id without an error bound"


def test_kinds_of_data_are_what_they_say() -> None:
    def data(make: Callable[..., tuple[Tensor, Tensor]], n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
        return exactness.Case("", make, "ip", k, d).data(n)

    _, codes = data(exactness.twice, 1, 1000, 8)
    assert (codes.unique(dim=0, return_counts=True)[1] == 2).all()
    _, codes = data(exactness.dead, 1, 1000, 8)
    assert 600 < codes.unique(dim=0, return_counts=True)[1].max() < 800
    z, codes = data(exactness.common_mean, 500, 500, 16)
    assert 0.85 < torch.nn.functional.cosine_similarity(z, codes).mean() < 0.95
    z, codes = data(exactness.lattice, 1, 2000, 3)
    scores = codes @ z[0]
    assert (scores == scores.max()).sum() > 1
    for case in exactness.CASES:
        assert all(t.isfinite().all() for t in case.data(10)), case


# ---- quantize_bench.py ----


def test_quantize_bench_writes_what_it_prints(tmp_path: Path) -> None:
    done = script(
        "benchmarks/quantize_bench.py", "--shapes", "300x1000x8", "70x33x5", "--out", str(tmp_path / "results")
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "results/table.txt").read_text()
    assert done.stdout.startswith(table)
    assert (tmp_path / "results/plot.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "results/results.json").read_text())
    assert written["about"]["semhitok"] == semhitok.__version__
    records = written["results"]
    assert [(r["op"], r["N"], r["K"], r["D"]) for r in records] == [
        (op, *shape) for op in ("nearest_code", "hier_quantize") for shape in ((300, 1000, 8), (70, 33, 5))
    ]
    for record in records:
        assert record["wrong ids"] == 0
        assert record["codes scored in float64 per token"] >= 1
        times, ratios = record["times"], record["x"]
        assert {"torch", "chunked", "cdist", "own fp32"} <= set(times) or {"nearest", "reference"} <= set(times)
        for name, ratio in ratios.items():
            assert (ratio is None) == (name not in times)
            assert ratio is None or ratio == pytest.approx(times[name]["cpu_ms"] / times["ours"]["cpu_ms"])


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(quantize_bench, "version", lambda package: None)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_without_peers_and_without_out(
    without_peers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--shapes", "16x40x4", "--dtype", "bfloat16", "--threads", "2"]
    monkeypatch.setattr(sys, "argv", ["quantize_bench.py", *arguments])
    quantize_bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(text.split()) for text in lines if "faiss-cpu" in text or "ratios" in text] == [
        "ratios wall time",
        "faiss-cpu missing: pip install faiss-cpu",
    ]
    values = lines[lines.index("nearest_code") + 2].split("|")[3].split()
    assert values.count("-") == 3 and len(values) == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8x8"], "expected NxKxD, as in 4096x16384x32, got 8x8"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--out", "results"], "plot.png needs matplotlib; pip install matplotlib"),
    ],
)
def test_quantize_bench_names_what_is_wrong(
    without_peers: None,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["quantize_bench.py", *arguments])
    with pytest.raises(SystemExit):
        quantize_bench.main()
    assert message in capsys.readouterr().err


def test_contestants_agree() -> None:
    """On data without close scores every contestant of "ip" finds the same ids, so each searches what it should."""
    g = torch.Generator().manual_seed(0)
    codebook = torch.nn.functional.normalize(torch.randn(50, 16, generator=g))
    winners = torch.randint(50, (300,), generator=g)
    z = codebook[winners] * torch.rand(300, 1, generator=g).add(0.5)
    with torch.inference_mode():
        for name, call in quantize_bench.nearest_contestants(z, codebook).items():
            assert call is None or torch.equal(torch.as_tensor(call()).long(), winners) or name in ("cdist", "sklearn")
        # Of unit length too, the tokens of "l2" have the same winners.
        z = codebook[winners]
        for name, call in quantize_bench.nearest_contestants(z, codebook).items():
            assert call is None or torch.equal(torch.as_tensor(call()).long(), winners), name


def test_planted_mistakes_are_counted() -> None:
    g = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(20, 8, generator=g), torch.randn(30, 8, generator=g)
    ids = exact.exact_winners(z, codebook)
    assert quantize_bench.wrong_codes(z, codebook, ids) == 0
    ids[[3, 7]] = (ids[[3, 7]] + 1) % 30
    assert quantize_bench.wrong_codes(z, codebook, ids) == 2
    assert quantize_bench.short_of_best(z @ codebook.T, ids, z.norm(dim=1) * codebook.norm(dim=1).max(), 8) == 2
    sub = torch.randn(30, 6, 8, generator=g)
    distances = (z[:, None] - sub[ids]).square().sum(-1)
    best, worst = distances.argmin(1), distances.argmax(1)
    assert quantize_bench.wrong_sub_codes(z, sub, ids, best) == 0
    assert quantize_bench.wrong_sub_codes(z, sub, ids, torch.where(torch.arange(20) < 5, worst, best)) == 5


def test_quantizer_share_counts_what_each_implementation_does(capsys: pytest.CaptureFixture[str]) -> None:
    done = script("benchmarks.training.quantizer_share", "--K", "512", "--images", "4", "--rounds", "1")
    lines = done.stdout.splitlines()
    profiles = [line.split() for line in lines if line.startswith("profile")]
    assert [p[1:3] for p in profiles] == [[s, n] for s in ("semantic", "pixel") for n in ("ours", "reference")]
    for row in profiles:
        shares = [int(x.rstrip("%")) for x in row if x.endswith("%")]
        assert len(shares) == 3 and 98 <= sum(shares) <= 102
    rows = [line.split() for line in lines if line.startswith(("semantic", "pixel"))]
    for row in rows:
        assert float(row[3].rstrip("x")) == pytest.approx(float(row[2]) / float(row[1]), rel=0.1)
        assert row[-3:] == ["0", "of", "1024"]


def test_quantizer_share_swaps_the_ops_and_sees_memory() -> None:
    ours = semhitok.quantizer.ops
    with quantizer_share.implementation("reference"):
        assert semhitok.quantizer.ops.nearest_code is semhitok.reference.nearest_code
    assert semhitok.quantizer.ops is ours
    assert quantizer_share.peak(lambda: torch.ones(2**24).sum(), "cpu") >= 60  # 64 MiB


def test_train_memory_counts_the_tiny_preset() -> None:
    trained, fixed, image = train_memory.measure("semhitok-tiny", "pixel")
    from semhitok.config import preset
    from semhitok.tokenizer import SemHiTok

    model = SemHiTok(preset("semhitok-tiny"))
    assert trained == sum(p.numel() for m in (model.encoder, model.decoder) for p in m.parameters())
    everything = sum(p.numel() for p in model.parameters()) + 256 * 16 + 2048 * 16
    assert fixed == 4 * (everything + 3 * trained)  # weights and codebooks; gradients and two moments
    # at least what every block's two norms, attention and four-fold MLP keep of 256 tokens of width 128
    assert image > 4 * 256 * 128 * 4 * (2 + 1 + 4)


def test_mllm_heads_compares_both_on_the_same_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from mllm_runs import small_tokenizer

    from benchmarks.mllm import heads as mllm_heads

    monkeypatch.setattr(mllm_heads, "LENGTH", 64)
    monkeypatch.setattr(mllm_heads, "SAMPLES", 8)
    captions = [f"a {colour} thing" for colour in ("red", "green", "blue") for _ in range(8)]
    codes = torch.arange(24).div(8, rounding_mode="floor").view(-1, 1, 1) * 5 + torch.tensor([[0, 1], [2, 3]])
    results = mllm_heads.compare(small_tokenizer(), codes, captions, (codes, captions), 12)
    assert list(results) == ["flat", "hierarchical"]
    for losses, seconds in results.values():
        assert len(losses) == mllm_heads.POINTS and losses[-1] < losses[0] - 1 and seconds > 0

    sizes = mllm_heads.Sizes(8, 4, 16, 8, 32)
    rows = []
    for head, more in (("flat", 0), ("hierarchical", 8)):
        for adaptive in (False, True):
            cost = mllm_heads.measure(head, adaptive, sizes)
            assert cost["gradients"] == (16 + 32 + 2 + more) * 8 * 4 / 2**20 and cost["s"] > 0
            rows.append((sizes, adaptive, head, *results[head], cost))
    lines = mllm_heads.table([*rows, (sizes, True, "flat", [], None, cost)], 12).splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1
    assert lines[2].split()[:6] == ["8", "x", "4", "fixed", "flat", f"{results['flat'][0][0]:.3f}"]


def test_mllm_heads_counts_image_ids_alone() -> None:
    pytest.importorskip("transformers")
    from mllm_small import samples, small_model

    from benchmarks.mllm import heads as mllm_heads
    from semhitok.mllm import pack

    model = small_model(head="hierarchical, adaptive")
    packed = [pack(samples(model)[:2], 24), pack(samples(model)[2:], 24)]
    logs = [model(input_ids=p.input_ids, position_ids=p.position_ids).logits.log_softmax(-1).detach() for p in packed]
    first, end = model.vocabulary.text_size, model.vocabulary.begin_of_image
    found = [
        float(log[row, place - 1, p.labels[row, place]])
        for log, p in zip(logs, packed, strict=True)
        for row, place in ((p.labels >= first) & (p.labels < end)).nonzero().tolist()
    ]
    assert len(found) == 8 and mllm_heads.nats(model, packed) == pytest.approx(-sum(found) / 8, rel=1e-5)
    offsets = mllm_heads.uneven(1000, 8)
    assert offsets[-1] == 8000 and offsets.diff().min() == 1 and offsets.diff().max() > 50


@pytest.mark.slow
def test_train_bench_times_what_the_loop_does() -> None:
    settings = [
        "pixel.loss.critic.weight=0.05", "pixel.loss.critic.layers=2", "pixel.loss.lpips=1", "pixel.ema_decay=0.9",
        "data.workers=1", "precision=bf16",
    ]  # fmt: skip
    arguments = ["--preset", "semhitok-tiny", "--device", "cpu", "--minutes", "0.02", "--images", "4"]
    done = script("benchmarks.training.train_bench", *arguments, *(part for s in settings for part in ("--set", s)))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {}
    for line in lines:
        if line[:1] in (["semantic"], ["pixel"]) and line[1].isdigit():
            rows[line[0]] = [float(x.rstrip("%")) for x in line[1:] if x != "-"]
    assert list(rows) == ["semantic", "pixel"]
    for images, micro, steps, milliseconds, rate, _, of_matmul, gib, waiting in rows.values():
        assert images == micro == 8 and steps >= 2 and gib > 0.1
        assert rate == pytest.approx(8e3 / milliseconds, rel=0.01)
        assert 0 < of_matmul < 100 and 0 <= waiting <= 100
    # Two blocks of width 128 and 256 tokens each, forward and twice that backward: 24 n d^2 + 4 n^2 d a block; LPIPS,
    # the critic and the teacher come on top.
    blocks = 4 * 3 * (24 * 256 * 128**2 + 4 * 256**2 * 128) / 1e12
    assert blocks < rows["pixel"][5] < 0.1
    shares = [float(line[-1].rstrip("%")) for line in lines if "ms" in line and line[-1].endswith("%")]
    assert sum(shares) == pytest.approx(200, abs=2)
    for section in ("teacher", "quantizer", "LPIPS", "critic's backward", "codebook updates", "data"):
        assert any(line[: len(section.split())] == section.split() for line in lines), section


def test_fixed_crops_prints_both_stages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in (fixed_crops.SemanticStage, fixed_crops.PixelStage):
        for name in ("prepare", "backward", "after_step"):
            monkeypatch.setattr(stage, name, getattr(stage, name))  # restored afterwards
    monkeypatch.setattr(fixed_crops, "PICTURES", 8)
    small = ("data.fixed=true", "tracker=none", "model.num_codes=8", "semantic.steps=12", "semantic.continuous_steps=2")
    small += ("pixel.steps=12", "pixel.continuous_steps=2", "semantic.init_tokens_per_code=8")
    monkeypatch.setattr(fixed_crops, "SETTINGS", small)
    threads = torch.get_num_threads()
    try:
        assert fixed_crops.main() == 0
    finally:
        torch.set_num_threads(threads)
    _, *rows = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\d+) x \1 +(semantic|pixel)((?: +\d+\.\d){3})", row) for row in rows]
    assert [m and (m[1], m[2]) for m in found] == [(g, s) for g in ("16", "8") for s in ("semantic", "pixel")]
    assert all(m is not None and float(rate) > 0 for m in found for rate in m[3].split()[:2])
