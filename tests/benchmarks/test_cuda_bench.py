"""What of the GPU benchmark can be tested without a GPU: its floors, tables, timing rules and contestants."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact, exactness, quantize_bench
from benchmarks.cuda import bench as cuda_bench
from benchmarks.cuda import exactness as cuda_exactness
from benchmarks.cuda import floor as cuda_floor
from benchmarks.cuda import preflight as cuda_preflight
from benchmarks.cuda import sections as cuda_sections
from benchmarks.cuda import timing as cuda_timing
from benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[2]
CEILINGS: dict[str, Any] = {  # round numbers, of no card
    "sms": 100,
    "sm_clock_mhz": 2000,
    "issue_per_sm_per_clock": {"VIMNMX3": 64, "VIMNMX": 64, "LOP3": 64, "IMAD": 64, "FMNMX": 64, "FFMA": 128},
    "mma_tflops": {"mma.sync f16 m16n8k16": 500, "wgmma f16 m64n128k16": 800, "wgmma s8 m64n128k32": 1600},
    "l2_read_gb_s": 5000,
    "hbm_read_gb_s": 4000,
}

# ---- floor.py ----


def test_floor_of_each_design() -> None:
    n, k, scores = 2**16, 2**14, 2**30
    alu = 100 * 2e9 * 64  # instructions a second
    certified = cuda_floor.floor("certified", n, k, 33, CEILINGS)
    assert certified == (pytest.approx(1e6 * 2 * scores * 64 / 1600e12), "MMA")
    shallow = cuda_floor.floor("certified", n, k, 8, CEILINGS)
    assert shallow == (pytest.approx(1e6 * scores * (0.5 + 6 / 32) / alu), "max")
    assert cuda_floor.floor("wgmma", n, k, 64, CEILINGS) == (pytest.approx(1e6 * 6 * scores * 64 / 800e12), "MMA")
    assert cuda_floor.floor("mma", n, k, 64, CEILINGS) == (pytest.approx(1e6 * 6 * scores * 64 / 500e12), "MMA")
    assert cuda_floor.floor("simt", n, k, 64, CEILINGS) == (pytest.approx(1e6 * scores * 64 / alu / 2), "FMA")


def test_floor_of_bytes() -> None:
    slow = CEILINGS | {"hbm_read_gb_s": 1}
    floor = cuda_floor.floor("certified", 256, 16384, 32, slow)
    assert floor == (pytest.approx((4 * 32 * (256 + 16384) + 12 * 256) / 1e3), "HBM")
    slow = CEILINGS | {"l2_read_gb_s": 1}
    assert cuda_floor.floor("certified", 257, 1000, 20, slow) == (pytest.approx(2 * 1000 * 32 / 1e3), "L2")


def test_no_floor_without_the_instruction() -> None:
    older = CEILINGS | {"mma_tflops": CEILINGS["mma_tflops"] | {"wgmma s8 m64n128k32": None}}
    assert cuda_floor.floor("certified", 256, 16384, 32, older) is None
    assert cuda_floor.floor("mma", 256, 16384, 32, older) is not None
    assert cuda_floor.floor("other", 256, 16384, 32, CEILINGS) is None


# ---- timing.py ----


class FakeTimer:
    """A call's time is what it returns."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, call: Callable[[], Any]) -> float:
        self.calls += 1
        return float(call())


def test_race_takes_medians_and_survives_a_failing_contestant() -> None:
    times = iter([900.0, 800.0] + [10.0, 30.0, 20.0] * 100)
    left = iter([5.0, 5.0, 5.0])

    def breaks_at_once() -> float:
        raise RuntimeError("no such instruction\nand more")

    def breaks_later() -> float:
        return next(left, None) or breaks_at_once()

    calls = {"good": lambda: next(times), "bad": breaks_at_once, "late": breaks_later}
    us, failed = cuda_timing.race(calls, 1e4, FakeTimer())
    assert us == {"good": 20.0}
    assert failed == {"bad": "RuntimeError: no such instruction", "late": "RuntimeError: no such instruction"}


def test_rounds_follow_the_budget() -> None:
    assert cuda_timing.rounds_within(1e6, [1e6]) == cuda_timing.LEAST_ROUNDS
    assert cuda_timing.rounds_within(1e6, [1.0, 2.0]) == cuda_timing.MOST_ROUNDS
    each = 1e6 / 10 / 2 - cuda_timing.OVERHEAD_US
    assert cuda_timing.rounds_within(1e6 + 1, [each, each]) == 10
    assert cuda_timing.rounds_within(1e6, []) == 0


@pytest.mark.parametrize("largest", [1, 3, 16, 100])
def test_chunks_shrink_until_they_fit(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def search(z: Tensor) -> Tensor:
        if len(z) > largest:
            raise torch.OutOfMemoryError("too much")
        return z[:, 0] * 2

    z = torch.arange(19)[:, None]
    assert torch.equal(cuda_timing.in_chunks(search, z), z[:, 0] * 2)


def test_what_never_fits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def search(z: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(torch.OutOfMemoryError):
        cuda_timing.in_chunks(search, torch.zeros(5, 1))


# ---- preflight.py ----


def test_preflight_keeps_what_ran() -> None:
    shapes = [(256, 16384, 8), (4096, 16384, 8)]
    named = {cuda_preflight.name_of(shape): shape for shape in shapes}
    assert cuda_preflight.outcome("a warning\n256x16384x8 ok\n4096x16384x8 ok\n", named)[0] == set(shapes)
    ran, why = cuda_preflight.outcome("256x16384x8 ok\n4096x16384x8 D must be 16\n", named)
    assert ran == {shapes[0]} and why == "4096x16384x8 D must be 16"
    ran, why = cuda_preflight.outcome("256x16384x8 ok\nSegmentation fault\n", named)
    assert ran == {shapes[0]} and why == "Segmentation fault"
    assert cuda_preflight.outcome("", named) == (set(), "stopped without output")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_preflight_without_a_device() -> None:
    ran, wrong = cuda_preflight.survivors(["simt"], [(1, 1, 1)])
    assert ran == {"simt": set()} and wrong["simt"]


# ---- bench.py ----


def test_grid_is_the_one_promised() -> None:
    assert len(set(cuda_bench.grid())) == len(cuda_bench.grid()) == 60
    assert set(cuda_bench.QUICK) <= set(cuda_bench.grid())


def record(**changes: Any) -> dict[str, Any]:
    us = {"ours": 100.0, "torch": 2000.0, "bf16": 650.0, "certified": 101.0, "simt": 3000.0}
    shape = (65536, 16384, 64)
    base = {
        "N": shape[0], "K": shape[1], "D": shape[2], "us": us, "failed": {}, "graph us": {}, "wrong ids": {"ours": 0},
        "uncertified percent": 0.25, "extra MiB": 1.5, **cuda_bench.of_design(shape, 100.0, "certified", CEILINGS),
    }  # fmt: skip
    return base | changes


def test_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_bench, "SEARCHES", tuple(cuda_floor.DESIGNS))
    titles, values = zip(*cuda_bench.cells(record()), strict=True)
    assert all(len(t) == len(v) for t, v in zip(titles, values, strict=True))
    line = {title.strip(): value.strip() for title, value in zip(titles, values, strict=True)}
    assert line["ours us"] == "100.0" and line["x torch"] == "20.0" and line["x bf16"] == "6.5"
    assert line["x vq"] == line["wgmma"] == line["graph"] == "-"
    assert line["design"] == "certified" and line["limit"] == "MMA" and line["% floor"] == "86"
    assert line["TFLOP/s"] == f"{2 * 2**36 / 1e8:.0f}" and line["uncert"] == "0.25" and line["wrong"] == "0"


def test_a_line_without_our_own_time() -> None:
    alone = {"N": 256, "K": 8192, "D": 8, "us": {"torch": 30.0}, "failed": {"op": "broken"}, "graph us": {}}
    titles, values = zip(*cuda_bench.cells(alone), strict=True)
    assert [len(t) for t in titles] == [len(t) for t, _ in cuda_bench.cells(record())]
    assert set(" ".join(values).split()) == {"256", "8192", "8", "|", "-"}


def test_uncertified_is_a_percentage() -> None:
    assert cuda_exactness.uncertified(torch.tensor([1, -1, 4, 16])) == 25


def test_wrong_ids_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_exactness, "PIECE", 64)

    def wrong(z: Tensor, codebook: Tensor, ids: Tensor) -> int:
        return cuda_exactness.judge(z, codebook, "ip", {"ours": ids})["ours"][0]

    g = torch.Generator().manual_seed(0)
    z, codebook = (F.normalize(torch.randn(n, 16, generator=g)) for n in (300, 200))
    ids = (z.double() @ codebook.double().T).argmax(1)
    assert wrong(z, codebook, ids) == 0
    ids[[3, 70, 299]] = (ids[[3, 70, 299]] + 1) % 200
    assert wrong(z, codebook, ids) == 3
    close = torch.cat([codebook, codebook + 1e-8])  # within rounding: not wrong
    best = (z.double() @ close.double().T).argmax(1)
    assert wrong(z, close, (best + 200) % 400) == 0


def test_contestants_find_the_same_codes() -> None:
    g = torch.Generator().manual_seed(0)
    codebook = F.normalize(torch.randn(50, 16, generator=g))
    winners = torch.randint(50, (130,), generator=g)
    calls, failed = cuda_bench.contestants(codebook[winners], codebook, ["op"], ("torch", "tf32", "bf16", "vq"))
    assert {"ours", "torch", "tf32", "bf16"} <= set(calls) and set(failed) <= {"vq"}
    with torch.no_grad():
        for name, call in calls.items():
            assert torch.equal(call().long(), winners), name
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_contestant_that_cannot_be_made_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(z: Tensor, codebook: Tensor) -> Any:
        raise ModuleNotFoundError("No module named 'vq'")

    monkeypatch.setitem(cuda_bench.MAKERS, "vq", missing)
    calls, failed = cuda_bench.contestants(torch.ones(1, 1), torch.ones(1, 1), ["simt"], ("torch", "vq"))
    assert set(calls) == {"simt", "torch"} and failed == {"vq": "ModuleNotFoundError: No module named 'vq'"}


def test_report_and_plot_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "out")
    report.content["results"] += [record(), record(N=256)]
    report.say("a line")
    report.save()
    assert (tmp_path / "out/table.txt").read_text() == capsys.readouterr().out == "a line\n"
    assert len(json.loads((tmp_path / "out/results.json").read_text())["results"]) == 2
    cuda_bench.plot(report.content["results"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_shape_does_not_end_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(shape: tuple[int, int, int], *rest: Any) -> dict[str, Any]:
        if shape[0] == 2:
            raise RuntimeError("odd")
        return record(N=shape[0], K=shape[1], D=shape[2])

    monkeypatch.setattr(cuda_bench, "bench", bench)
    monkeypatch.setattr(cuda_bench, "EventTimer", FakeTimer)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = Report(None)
    cuda_bench.run_grid(report, [(1, 8, 4), (2, 8, 4), (3, 9, 4)], {}, False, CEILINGS, float("inf"))
    assert [r["N"] for r in report.content["results"]] == [1, 3] and "2x8x4: RuntimeError: odd" in report.lines
    cuda_bench.run_grid(report, [(4, 8, 4)], {}, False, CEILINGS, 0)
    assert report.lines[-1] == "1 shapes skipped: the time limit was reached"

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(cuda_bench.DeviceLost, match="illegal memory access"):
        cuda_bench.run_grid(report, [(2, 8, 4)], {}, False, CEILINGS, float("inf"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "--device cuda: this PyTorch finds no CUDA device"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--budget", "long"], "--budget: invalid float value: 'long'"),
    ],
)
def test_arguments_that_are_wrong(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for main in (quantize_bench.main, exactness.main) if arguments[0] == "--device" else (quantize_bench.main,):
        monkeypatch.setattr(sys, "argv", ["x", *arguments])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err


def test_cuda_takes_float32(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cuda", "--dtype", "float16"])
    with pytest.raises(SystemExit):
        quantize_bench.main()
    assert "--dtype: expected float32 with --device cuda, got float16" in capsys.readouterr().err


# ---- sections.py ----


def test_plain_quantizers_take_the_same_step() -> None:
    for kind, (ours, plain) in cuda_sections.training_pairs(300, 40, 5, 8, "cpu").items():
        for _ in range(3):
            ours(), plain()
        a, b = tensors_of(ours), tensors_of(plain)
        for name in ("codebook",) if kind == "semantic" else ("pix_codebook", "weights"):
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a["grad"], b["grad"])


def tensors_of(step: cuda_sections.Step) -> dict[str, Tensor]:
    held = step.quantizer
    names = [name for name in ("codebook", "pix_codebook", "weights") if hasattr(held, name)]
    return {name: getattr(held, name) for name in names} | {"grad": step.z.grad}


def test_acceptance_of_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {"results": [record(), record(N=256, D=32, **{"graph us": {"ours": 9.0, "torch": 7.0}})]}
    content["hier"] = [{"N": 65536, "Ds": 32, "over nearest": 1.2, "extra MiB": 70.0}]
    lines = {what: (figure, reached) for what, figure, _, reached in cuda_sections.acceptance(content)}
    assert lines["wrong ids on 2 shapes"] == (0, True)
    assert lines["N 65536, D 64: x bf16"] == (6.5, True)
    assert lines["N 65536, D 64: over the floor of its design"] == (pytest.approx(100 / 85.9, rel=1e-3), True)
    assert lines["N 256, D 32, in a graph: x torch"] == (pytest.approx(7 / 9), False)
    assert lines["hier_quantize: extra MiB"] == (70.0, False)
    report = Report(None)
    report.content = {"results": []}
    cuda_sections.say_acceptance(report)
    printed = capsys.readouterr().out.splitlines()[2:]
    assert len(printed) == len(cuda_sections.acceptance({})) and not any(line.endswith("ok") for line in printed)


# ---- exactness.py ----


def test_judge_counts_wrong_and_close_ids() -> None:
    codebook = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1 + 2.0**-23, 0]])
    z = torch.tensor([[1.0, 0], [0, 1], [-1, -1]]).repeat(2, 1)
    assert cuda_exactness.first_of_equals(codebook).tolist() == [0, 1, 0, 3]
    # Right, right, one of two equal scores; then within rounding, far off, not the first of equal codes.
    ids = torch.tensor([3, 1, 0, 0, 0, 2])
    assert cuda_exactness.judge(z, codebook, "ip", {"a": ids}) == {"a": (2, 1)}
    assert cuda_exactness.judge(z[:0], codebook, "l2", {"a": ids[:0]}) == {"a": (0, 0)}


def test_every_kind_passes_and_a_wrong_search_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_exactness, "CAPABILITIES", {"op": "", "simt": "simt", "default": "default"})
    monkeypatch.setattr(cuda_exactness, "PIECE", 16)
    check = functools.partial(cuda_exactness.check, device="cpu")
    assert exactness.run(exactness.CASES, 20, cuda_exactness.CAPABILITIES, "uncert", check) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(exactness.CASES) + 3 and printed[-2].startswith("- simt: ")
    assert printed[-1].endswith("wrong ids: op 0, simt 0, default 0")
    judged = cuda_exactness.judge

    def mutated(z: Tensor, codebook: Tensor, metric: str, ids: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
        return judged(z, codebook, metric, {name: (i + 1) % len(codebook) for name, i in ids.items()})

    monkeypatch.setattr(cuda_exactness, "judge", mutated)
    assert exactness.run(exactness.CASES[:2], 20, cuda_exactness.CAPABILITIES, "uncert", check) == 1


def test_the_op_must_not_refuse_and_what_breaks_ends_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    def refuses(case: exactness.Case, n: int) -> exact.Outcome:
        return exact.Outcome({"simt": 0}, 0, 1.0, 2.5, {"op": "no such device"})

    assert exactness.run(exactness.CASES[:1], 20, ["op", "simt"], "uncert", refuses) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].split()[-7:] == ["|", "-", "0", "|", "0", "1.0", "2.50"]
    assert printed[2] == "- op: no such device"

    def breaks(case: exactness.Case, n: int) -> exact.Outcome:
        raise RuntimeError("an illegal memory access\nand more")

    assert exactness.run(exactness.CASES[:2], 20, ["op"], "uncert", breaks) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and printed[1].endswith("|        an illegal memory access")


# ---- tests/helpers/cuda_small.py, what compute-sanitizer watches ----


def test_small_shapes_of_every_op(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import cuda_small

    monkeypatch.setattr(cuda_small, "DEVICE", "cpu")
    monkeypatch.setattr(cuda_small, "SEARCHES", ("default", "simt"))
    monkeypatch.setattr(sys, "argv", ["cuda_small.py"])
    assert cuda_small.main() == 0
    printed = capsys.readouterr().out
    assert "op: ok\ndefault: ok\n" in printed and "simt 1x1x1: capability: expected" in printed
    monkeypatch.setattr(cuda_small, "assert_nearest", lambda *rest: 1 / 0)
    assert cuda_small.main() == 1
    assert "default: ZeroDivisionError" in capsys.readouterr().out


# ---- triton_search.py ----

TRITON = """
import sys
import torch
from benchmarks.cuda import triton_search
kernel = triton_search.search_kernel.fn
class Untuned:
    def __init__(self, sizes): self.sizes = sizes
    def __getitem__(self, grid): return lambda *a, **k: kernel[grid(self.sizes)](*a, **k, **self.sizes)
g = torch.Generator().manual_seed(0)
for config in triton_search.CONFIGS:
    triton_search.search_kernel = Untuned(config.kwargs)
    for n, k, d in [(5, 3, 1), (300, 1000, 33), (130, 520, 8), (20000, 40, 4)]:
        codes, z = torch.randn(k, d, generator=g), torch.randn(n, d, generator=g)
        for exact in (False, True):
            if exact:  # eighths: no sum is rounded, in whatever order the interpreter's BLAS adds, so that copies tie
                codes, z = (codes * 8).round() / 8, (z * 8).round() / 8
                codes = torch.cat([codes, codes])  # the lower id wins
            ids = triton_search.nearest_code(z, codes, "ieee")
            scores = z.double() @ codes.double().T
            short = scores.amax(1) - scores.gather(1, ids[:, None])[:, 0]
            assert ids.max() < k and (short <= (0 if exact else 1e-5)).all(), (config, n, k, d, exact)
print("fine")
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_search_finds_the_codes() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", TRITON], env=environment, capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr[-3000:]
