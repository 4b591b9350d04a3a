"""hier_quantize and nearest_code against what one would write in PyTorch, checked against float64 while timed.

    python benchmarks/quantize_bench.py [--device cpu|cuda] [--quick] [--dtype float32] [--threads 2]

Every round times ours, plain `matmul + argmax` (the semantic stage only, "x torch") and the reference of both stages
("x reference") one after the other, so that a busy machine disturbs all alike; the medians of the rounds are printed.
The roofline is the fp32 fused multiply-add rate of the device: on the CPU the best rate seen of a small fully cached
torch matmul, on CUDA that of a large one with TF32 off. Mismatches are ids whose float64 score falls short of the
maximum by more than fp32 rounding explains: 0 is the only good number. Extra memory is the peak beyond inputs and
outputs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import semhitok
from semhitok import _C, ops, reference

SHAPES = [  # N, K, D, m, Dp
    (256, 16384, 32, 12, 32),
    (4096, 16384, 32, 12, 32),
    (4096, 16384, 64, 12, 64),
    (4096, 24576, 32, 8, 32),
    (16384, 16384, 32, 12, 32),
    (65536, 16384, 32, 12, 32),
]
QUICK = SHAPES[:2]
REFERENCE_ROWS = 4096  # the reference runs in pieces of this many tokens, or its N x K matrix would not fit
EPS32 = 2.0**-23
MIB = 2**20


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def roofline(device: torch.device) -> float:
    """Multiply-adds at two operations each, in FLOP/s: the best of many runs of a matmul."""
    n = 4096 if device.type == "cuda" else 512
    a, b = torch.rand(n, n, device=device), torch.rand(n, n, device=device)
    out = torch.empty(n, n, device=device)
    return 2 * n**3 / min(seconds(device, lambda: torch.mm(a, b, out=out)) for _ in range(200))


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def extra_memory(device: torch.device, function: Callable[[], tuple[Tensor, ...]]) -> float:
    """Peak bytes beyond what was there before and what is returned; on the CPU by the peak of the resident size."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(o.nbytes for o in outputs)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not serve this call unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (AttributeError, OSError):
        return float("nan")
    before = resident("VmRSS")
    outputs = function()
    return max(resident("VmHWM") - before - sum(o.nbytes for o in outputs), 0)


def mismatches(z_sem: Tensor, z_pix: Tensor, sem: Tensor, pix: Tensor, codes: Tensor) -> int:
    """How many ids are not the float64 winners ("ip", then "l2"), rounding of fp32 scores allowed for."""
    m, wrong = pix.shape[1], 0
    sem64, largest = sem.double(), sem.double().norm(dim=-1).max()
    for rows in torch.arange(len(codes), device=codes.device).split(512):
        i, j = codes[rows] // m, codes[rows] % m
        z, x = z_sem[rows].double(), z_pix[rows].double()
        scores = z @ sem64.T
        tolerance = 2 * EPS32 * (z.shape[1] + 4) * z.norm(dim=-1) * largest
        bad = scores.gather(1, i[:, None])[:, 0] < scores.amax(1) - tolerance
        sub = pix[i].double()
        sub_scores = torch.einsum("nd,nmd->nm", x, sub) - sub.square().sum(-1) / 2
        size = sub.norm(dim=-1).amax(-1)
        tolerance = 2 * EPS32 * (x.shape[1] + 4) * (x.norm(dim=-1) * size + size.square() / 2)
        bad |= sub_scores.gather(1, j[:, None])[:, 0] < sub_scores.amax(1) - tolerance
        wrong += int(bad.sum())
    return wrong


def in_pieces(function: Callable[..., object], *tensors: Tensor) -> None:
    for piece in zip(*(t.split(REFERENCE_ROWS) for t in tensors), strict=True):
        function(*piece)


def bench(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int, peak: float) -> str:
    n, k, d, m, dp = shape
    torch.manual_seed(0)
    z_sem, z_pix = torch.randn(n, d).to(device, dtype), torch.randn(n, dp).to(device, dtype)
    sem, pix = torch.randn(k, d).to(device, dtype), torch.randn(k, m, dp).to(device, dtype)

    def ours() -> tuple[Tensor, ...]:
        return ops.hier_quantize(z_sem, z_pix, sem, pix)

    def plain() -> None:
        in_pieces(lambda z: (z @ sem.T).argmax(-1), z_sem)

    def whole_reference() -> None:
        in_pieces(lambda a, b: reference.hier_quantize(a, b, sem, pix), z_sem, z_pix)

    wrong = mismatches(z_sem, z_pix, sem, pix, ours()[2])
    memory = extra_memory(device, ours) / MIB
    times: dict[str, list[float]] = {"ours": [], "plain": [], "reference": []}
    for function in (plain, whole_reference):
        function()
    for _ in range(rounds):
        for name, function in (("ours", ours), ("plain", plain), ("reference", whole_reference)):
            times[name].append(seconds(device, function))
    middle = {name: statistics.median(t) for name, t in times.items()}
    rate = 2.0 * n * (k * d + m * dp) / middle["ours"]
    return (
        f"{n:6d} {k:6d} {d:3d} {m:3d} {str(dtype).removeprefix('torch.'):>8} | {middle['ours'] * 1e3:9.3f} | "
        f"{rate / 1e9:8.1f} | {100 * rate / peak:13.1f} | {middle['plain'] / middle['ours']:7.2f} | "
        f"{middle['reference'] / middle['ours']:11.2f} | {wrong:10d} | {memory:9.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads (PyTorch's own choice without it)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(arguments.device)

    info = _C.build_info()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {info['cpu']['used']} kernels"
    peak = roofline(device)
    print(
        f"semhitok {semhitok.__version__}, torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, "
        f"roofline {peak / 1e9:.0f} GFLOP/s (fp32 torch matmul, best of 200)"
    )
    print(
        f"{'N':>6} {'K':>6} {'D':>3} {'m':>3} {'dtype':>8} | {'ms':>9} | {'GFLOP/s':>8} | % of roofline | x torch "
        f"| x reference | mismatches | extra MiB"
    )
    with torch.inference_mode():
        for shape in QUICK if arguments.quick else SHAPES:
            rounds = 5 if arguments.quick else 9 if shape[0] <= 16384 else 3
            print(bench(shape, getattr(torch, arguments.dtype), device, rounds, peak), flush=True)


if __name__ == "__main__":
    main()
