"""quantize_bench.py --device cuda: every search of nearest_code ("ip", fp32, unit vectors) beside what one would use
instead, on a grid of shapes; then hier_quantize, a training step, and the figures that must be reached.

Times are microseconds on the device, each call timed by CUDA events with the L2 flushed before it (timing.py), medians
of interleaved rounds; "graph" is a call in a CUDA graph of twenty, with warm caches. Each of our searches has a
column in which it is forced; "ours" is the op, which chooses. "x NAME" is the contestant's time over ours:

- torch: `(z @ codebook.T).argmax(1)`, TF32 off; tf32: on; bf16: inputs cast beforehand
- compile: torch.compile of the same expression, TF32 off
- triton, triton1: triton_search.py with three TF32 products for a score (about fp32), and with one
- vq: vector-quantize-pytorch's VectorQuantize in eval mode (does more, as on the CPU), where installed

Contestants that build N x K split the tokens into smaller and smaller pieces if the device's memory is too small. The
last four contestants run only where K is 16,384, unless --full. "-": missing, refused the shape, or failed; the reasons
are below the table. A search that crashed or hung on a shape in a trial run (preflight.py) is skipped there.

"% floor" is the time that floor.py computes for the design in use, from ceilings measured on this card, over ours;
"limit" is what limits that design. "wrong" counts ids whose float64 score is short of the best by more than 1e-6
|z| max|c|, "uncert" is the percentage of tokens that the certified search left to a slower one, "MiB" the peak beyond
inputs and outputs.

Exit status 1 for a wrong id of ours, or when a part of the run failed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda import ceilings as cuda_ceilings
from benchmarks.cuda import preflight as cuda_preflight
from benchmarks.cuda import sections as cuda_sections
from benchmarks.cuda.exactness import judge, uncertified
from benchmarks.cuda.floor import SEARCHES, floor
from benchmarks.cuda.timing import Call, EventTimer, Timer, extra_mib, graph_us, in_chunks, race, reason
from benchmarks.report import Report, aligned, chart, shown, vector_quantizer, version
from semhitok import _C, ops

Shape = tuple[int, int, int]  # N, K, D
Record = dict[str, Any]

TOKENS, DEPTHS, CODES = (256, 4096, 16384, 65536), (8, 16, 32, 48, 64), (16384, 8192, 24576)  # K: the usual one first
QUICK = [(n, CODES[0], d) for n in (256, 65536) for d in (32, 64)]
RACE_US = 5e5  # for the rounds of one shape
GRAPH_TOKENS = 4096  # at most
IN_GRAPHS = ("ours", "torch", "bf16")
ALWAYS = ("torch", "tf32", "bf16")
PEERS = (*ALWAYS, "compile", "triton", "triton1", "vq")


def grid() -> list[Shape]:
    return [(n, k, d) for k in CODES for n in TOKENS for d in DEPTHS]


# ---- contestants: a maker takes (z[N, D], codebook[K, D]) and returns the call to be timed, which returns the ids ----


def plain_search(z: Tensor, codebook: Tensor) -> Tensor:
    return (z @ codebook.T).argmax(1)


def make_torch(z: Tensor, codebook: Tensor) -> Call:
    return lambda: in_chunks(lambda piece: plain_search(piece, codebook), z)


def make_tf32(z: Tensor, codebook: Tensor) -> Call:
    search = make_torch(z, codebook)

    def call() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return search()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return call


def make_bf16(z: Tensor, codebook: Tensor) -> Call:
    return make_torch(z.bfloat16(), codebook.bfloat16())


def make_compiled(z: Tensor, codebook: Tensor) -> Call:
    torch._dynamo.config.recompile_limit = 64  # for all shapes of the grid
    search = torch.compile(plain_search, fullgraph=True)
    return lambda: in_chunks(lambda piece: search(piece, codebook), z)


def make_triton(precision: str) -> Callable[[Tensor, Tensor], Call]:
    def make(z: Tensor, codebook: Tensor) -> Call:
        from benchmarks.cuda import triton_search  # Triton comes with PyTorch for CUDA, not with every build

        return lambda: triton_search.nearest_code(z, codebook, precision)

    return make


def make_vq(z: Tensor, codebook: Tensor) -> Call:
    search = vector_quantizer(codebook)
    return lambda: in_chunks(search, z)


MAKERS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "torch": make_torch, "tf32": make_tf32, "bf16": make_bf16, "compile": make_compiled,
    "triton": make_triton("tf32x3"), "triton1": make_triton("tf32"), "vq": make_vq,
}  # fmt: skip


def contestants(
    z: Tensor, codebook: Tensor, ours: list[str], peers: tuple[str, ...]
) -> tuple[dict[str, Call], dict[str, str]]:
    """(name -> what to time, name -> why it cannot be made): ours holds paths, and "op" for the op itself."""
    probe = torch.ops.semhitok.nearest_code_probe
    calls: dict[str, Call] = {search: lambda search=search: probe(z, codebook, "ip", search)[1] for search in ours}
    if calls.pop(cuda_preflight.OP, None):
        calls["ours"] = lambda: ops.nearest_code(z, codebook)[1]
    failed: dict[str, str] = {}
    for name in peers:
        try:
            calls[name] = MAKERS[name](z, codebook)
        except Exception as error:  # a package that is missing, or does not work here
            failed[name] = reason(error)
    return calls, failed


# ---- one line of the table ----


def unit_vectors(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"), dim=1)


def bench(shape: Shape, ran: dict[str, set[Shape]], peers: tuple[str, ...], ceilings: Any, timer: Timer) -> Record:
    n, k, d = shape
    z, codebook = unit_vectors(n, d, 0), unit_vectors(k, d, 1)
    calls, failed = contestants(z, codebook, [search for search, shapes in ran.items() if shape in shapes], peers)
    times, failed_later = race(calls, RACE_US, timer)
    failed |= failed_later
    record: Record = {"N": n, "K": k, "D": d, "us": times, "failed": failed, "graph us": {}}
    for name in [name for name in IN_GRAPHS if name in times and n <= GRAPH_TOKENS]:
        try:
            record["graph us"][name] = graph_us(calls[name])
        except Exception as error:
            failed[f"{name} in a graph"] = reason(error)
    torch.cuda.synchronize()  # raises where a kernel has broken the device for this process
    if "ours" in times:
        record |= of_design(shape, times["ours"], _C.cuda_search(n, k, d), ceilings)
        record["uncertified percent"] = uncertified(torch.ops.semhitok.nearest_code_probe(z, codebook)[2])
        ids = {name: calls[name]().long() for name in ("ours", *SEARCHES, "triton", "torch") if name in times}
        record["wrong ids"] = {name: wrong for name, (wrong, _) in judge(z, codebook, "ip", ids).items()}
        record["extra MiB"] = extra_mib(lambda: ops.nearest_code(z, codebook))
    return record


def of_design(shape: Shape, ours_us: float, design: str, ceilings: Any) -> Record:
    n, k, d = shape
    least = floor(design, n, k, d, ceilings) if ceilings else None
    return {
        "TFLOP/s": 2 * n * k * d / ours_us / 1e6, "design": design,
        "floor us": least and least.us, "limit": least and least.limit,
        "percent of floor": least and 100 * least.us / ours_us,
    }  # fmt: skip


def cells(record: Record) -> list[tuple[str, str]]:
    """(title, value) of the columns, of equal width."""
    us, get, bar = record["us"], record.get, ("|", "|", 1)
    columns = [(key, str(record[key]), 6 if key in "NK" else 2) for key in ("N", "K", "D")]
    columns += [bar, ("ours us", shown(us.get("ours"), ".1f"), 8)]
    columns += [("graph", shown(record["graph us"].get("ours"), ".1f"), 6)]
    columns += [("TFLOP/s", shown(get("TFLOP/s"), ".0f"), 7), ("design", shown(get("design")), 9)]
    columns += [("% floor", shown(get("percent of floor"), ".0f"), 7), ("limit", shown(get("limit")), 7)]
    columns += [bar, *((search, shown(us.get(search), ".1f"), 8) for search in SEARCHES), bar]
    columns += [(f"x {name}", shown(cuda_sections.ratio(us, name), ".1f"), 6) for name in PEERS]
    columns += [bar, ("wrong", shown(get("wrong ids", {}).get("ours")), 5)]
    columns += [("uncert", shown(get("uncertified percent"), ".2f"), 6), ("MiB", shown(get("extra MiB"), ".1f"), 6)]
    return aligned(columns)


# ---- the run ----


def plot(records: list[Record], path: Path) -> None:
    """Time over ours of each contestant, on the usual codebook."""
    records = [r for r in records if r["K"] == CODES[0] and r["us"].get("ours")]
    ticks = [f"{r['N']}\n{r['D']}" for r in records]
    with chart(path, f"Exact nearest code, K = {CODES[0]}, fp32", "device", ticks, 0.8) as axes:
        for name in PEERS:
            at = [place for place, r in enumerate(records) if name in r["us"]]
            axes.plot(at, [cuda_sections.ratio(records[place]["us"], name) for place in at], "o", label=name)
        axes.set_xlabel("tokens N above, depth D below")


class DeviceLost(Exception):
    """A kernel has broken the device for this process: nothing more can run."""


def raise_if_lost(error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as broken:
        raise DeviceLost(reason(broken)) from error


@torch.no_grad()
def run_grid(report: Report, shapes: list[Shape], ran: dict[str, set[Shape]], full: bool, ceilings: Any,
             deadline: float) -> None:  # fmt: skip
    timer, records, late = EventTimer(), report.content["results"], 0
    for shape in shapes:
        if time.monotonic() > deadline:
            late += 1
            continue
        try:
            record = bench(shape, ran, PEERS if full or shape[1] == CODES[0] else ALWAYS, ceilings, timer)
        except Exception as error:
            report.say(f"{cuda_preflight.name_of(shape)}: {reason(error)}")
            raise_if_lost(error)
            continue
        new = not records or records[-1]["K"] != record["K"]
        report.row(cells(record), "nearest_code" if new else None)
        records.append(record)
    whys = {name: why for record in reversed(records) for name, why in record["failed"].items()}
    for name, why in whys.items():
        report.say(f"- {name}: {why}")
    if late:
        report.say(f"{late} shapes skipped: the time limit was reached")


def run(report: Report, shapes: list[Shape], full: bool, budget: float, ceilings_file: Path | None) -> int:
    """The whole benchmark; the usual codebook and the sections first, then the other codebooks while time is left."""
    torch.backends.cuda.matmul.allow_tf32 = False
    deadline, ceilings = time.monotonic() + budget, None
    try:
        ceilings = json.loads(ceilings_file.read_text()) if ceilings_file else cuda_ceilings.measure()
    except (RuntimeError, OSError, ValueError) as error:
        report.say(f"ceilings: {reason(error)}")
    packages = {name: version(name) or "missing" for name in ("triton", "vector-quantize-pytorch")}
    report.introduce({
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}", "device": torch.cuda.get_device_name(),
        **packages, "ceilings": json.dumps(ceilings) if ceilings else "not measured: no floors",
    })  # fmt: skip
    ran, refused = cuda_preflight.survivors((*SEARCHES, cuda_preflight.OP), shapes)
    for search, message in refused.items():
        report.say(f"{search:24} runs on {len(ran[search])} of {len(shapes)} shapes: {message}")
    first = [shape for shape in shapes if shape[1] == CODES[0]]
    rest = [shape for shape in shapes if shape not in first]
    parts: list[Callable[[], None]] = [
        lambda: run_grid(report, first, ran, full, ceilings, deadline),
        lambda: cuda_sections.run_hier(report, EventTimer()),
        lambda: cuda_sections.run_training(report),
        lambda: run_grid(report, rest, ran, full, ceilings, deadline),
    ]
    failures = 0
    for part in parts:
        try:
            part()
        except Exception as error:
            failures += 1
            report.say(f"\nstopped: {reason(error)}")
            try:
                raise_if_lost(error)
            except DeviceLost:
                report.say("the device is lost to this process: what follows was not measured")
                break
        finally:
            report.save()
    cuda_sections.say_acceptance(report)
    report.save()
    results = report.content["results"]
    if report.folder:
        try:
            plot(results, report.folder / "plot.png")
        except Exception as error:  # the figures are there without their picture
            report.say(f"plot.png: {reason(error)}")
    wrong = sum(record.get("wrong ids", {}).get(name, 0) for record in results for name in ("ours", *SEARCHES))
    return int(failures > 0 or wrong > 0 or not any("ours" in record["us"] for record in results))
