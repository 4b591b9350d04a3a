"""The quantizer's part of a training step, against the same step through plain PyTorch, in one run.

    python -m benchmarks.training.quantizer_share

A step is what training does with a quantizer: forward, backward (straight-through and commitment), codebook update,
restarts and usage counts. "reference" is the same module with `semhitok.reference`, which builds the N x K matrix, in
place of the fused ops. The semantic step is that of stage 1, the pixel step that of stage 2. Times are medians of runs
that take turns; memory is the growth of the process's peak resident size over one step, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import semhitok.quantizer
from benchmarks.processes import printed, resident
from semhitok import reference
from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer

BAR_TIME, BAR_MEMORY = 10, 50
PHASES = ("forward", "backward", "update")


@contextlib.contextmanager
def implementation(name: str) -> Iterator[None]:
    """The ops that the quantizer modules use: "ours" or "reference"."""
    ours = semhitok.quantizer.ops
    if name == "reference":
        functions = ("nearest_code", "nearest_subcode", "hier_quantize", "hier_lookup", "segment_sum")
        semhitok.quantizer.ops = types.SimpleNamespace(**{f: getattr(reference, f) for f in functions})  # type: ignore
    try:
        yield
    finally:
        semhitok.quantizer.ops = ours


def make_step(stage: str, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A function that takes one training step and returns the ids it quantised to."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(args.device)

    tokens = args.images * args.tokens
    z_sem = torch.nn.functional.normalize(random(args.images, args.tokens, args.dim), dim=-1).requires_grad_()
    z_pix = random(args.images, args.tokens, args.dim).requires_grad_()
    torch.manual_seed(0)
    quantizer = HierarchicalQuantizer(args.K, args.m, args.dim, args.dim).to(args.device)
    semantic: SemanticQuantizer = quantizer.semantic
    gradient = random(args.images, args.tokens, args.dim) / tokens
    draw = torch.Generator().manual_seed(1)

    def step() -> Tensor:
        z_sem.grad = z_pix.grad = None
        with record_function("forward"):
            if stage == "semantic":
                q, codes, commitment = semantic(z_sem)
            else:
                _, q, codes, commitment = quantizer(z_sem.detach(), z_pix)
            loss = (q * gradient).sum() + commitment
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            if stage == "semantic":
                semantic.update(z_sem.detach(), codes)
                semantic.restart(z_sem.detach(), 100, generator=draw)
            else:
                quantizer.update(z_pix.detach(), codes)
                quantizer.restart(z_pix.detach(), codes, 100, generator=draw)
        if args.device != "cpu":
            torch.cuda.synchronize()
        return codes

    return step


def peak(step: Callable[[], object], device: str) -> float:
    """MiB that a step takes beyond what is there before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def peak_in_a_process(name: str, stage: str, args: argparse.Namespace) -> float:
    keys = ("K", "m", "dim", "images", "tokens", "device", "threads")
    sizes = [f"--{key}={getattr(args, key)}" for key in keys]
    return float(printed(__spec__.name, "--peak", name, stage, *sizes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--K", type=int, default=16384, help="semantic codes (default: %(default)s)")
    parser.add_argument("--m", type=int, default=12, help="sub-codes of each (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=32, help="of codes and sub-codes (default: %(default)s)")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of an image (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        name, stage = args.peak
        with implementation(name):
            small = argparse.Namespace(**{**vars(args), "K": 64, "images": 1})
            make_step(stage, small)()  # what a library takes once is not the step's
            step = make_step(stage, args)
            print(peak(step, args.device))
        return 0

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"torch {torch.__version__}, {device}; K {args.K}, m {args.m}, dimensions {args.dim}")
    print(f"{args.images} images of {args.tokens} tokens; medians of {args.rounds}\n")
    missed = False
    rows = []
    for stage in ("semantic", "pixel"):
        times: dict[str, list[float]] = {"ours": [], "reference": []}
        codes = {}
        steps = {name: make_step(stage, args) for name in times}
        for name, step in steps.items():
            with implementation(name):
                codes[name] = step()  # the first one, before the codebooks can part
        for _ in range(args.rounds):
            for name, step in steps.items():
                with implementation(name):
                    begun = perf_counter()
                    step()
                    times[name].append((perf_counter() - begun) * 1e3)
        for name, step in steps.items():
            with implementation(name), profile(activities=[ProfilerActivity.CPU]) as profiler:
                step()
            spent = {e.key: e.cpu_time_total / 1e3 for e in profiler.key_averages() if e.key in PHASES}
            total = sum(spent.values())
            shares = "  ".join(f"{phase} {spent[phase]:8.1f} ms {spent[phase] / total:4.0%}" for phase in PHASES)
            print(f"profile  {stage:9} {name:10} {shares}")
        differing = int((codes["ours"] != codes["reference"]).sum())
        memory = {name: peak_in_a_process(name, stage, args) for name in times}
        rows.append((stage, {n: median(t) for n, t in times.items()}, memory, differing, codes["ours"].numel()))
    heads = [f"ours {unit:3} {'ref ' + unit:>9} {'ratio':>7}     " for unit in ("ms", "MiB")]
    print(f"\n{'stage':9}  {heads[0]}   {heads[1]}  ids that differ")
    for stage, time, memory, differing, count in rows:
        faster, smaller = time["reference"] / time["ours"], memory["reference"] / max(memory["ours"], 1)
        verdicts = ["ok" if a >= b else "MISS" for a, b in ((faster, BAR_TIME), (smaller, BAR_MEMORY))]
        missed |= "MISS" in verdicts
        print(
            f"{stage:9} {time['ours']:9.1f} {time['reference']:9.1f} {faster:6.1f}x {verdicts[0]:4}  "
            f"{memory['ours']:9.1f} {memory['reference']:9.1f} {smaller:6.0f}x {verdicts[1]:4}  {differing} of {count}"
        )
    print(f"bars: {BAR_TIME}x less time, {BAR_MEMORY}x less memory")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
