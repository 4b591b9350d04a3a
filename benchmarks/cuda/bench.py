"""quantize_bench.py --device cuda: every search of nearest_code ("ip", fp32, unit vectors) beside what one would use
instead, on a grid of shapes; then hier_quantize, a training step, and the figures that must be reached.

Times are microseconds on the device, each call by CUDA events with the L2 flushed before it (timing.py), medians
of interleaved rounds; "graph" is a call in a CUDA graph of twenty, with warm caches. Each of our searches (PATHS) has a
column and is forced there; "ours" is the op, which chooses. "x NAME" is the contestant's time over ours:

- torch: `(z @ codebook.T).argmax(1)`, TF32 off; tf32: on; bf16: inputs cast beforehand
- compile: torch.compile of the same expression, TF32 off
- triton, triton1: triton_search.py at three TF32 products a score (about fp32) and at one
- vq: vector-quantize-pytorch's VectorQuantize in eval mode (does more, as for the CPU), where installed

Contestants that build N x K split the tokens into smaller and smaller pieces if the device's memory is too small. The
last four contestants run only where K is 16,384, unless --full. "-": missing, refused the shape, or failed; the reasons
are below the table. A search that crashed or hung on a shape in the trial runs (preflight.py) is skipped there.

"% floor" is the time of floor.py's model of the design in use, from ceilings measured on this card, over ours;
"limit" is what limits that design. "wrong" counts ids whose float64 score is short of the best by more than 1e-6
|z| max|c|, "uncert" is the percentage of tokens that the certified search left to a slower one, "MiB" the peak beyond
inputs and outputs.

Exit status 1 for a wrong id of ours, or when a part of the run failed.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import semhitok
from benchmarks.cuda import ceilings as cuda_ceilings
from benchmarks.cuda import preflight as cuda_preflight
from benchmarks.cuda import sections as cuda_sections
from benchmarks.cuda.floor import PATHS, floor
from benchmarks.cuda.timing import Call, EventTimer, Timer, extra_mib, graph_us, in_chunks, race, reason
from semhitok import _C, ops

Shape = tuple[int, int, int]  # N, K, D
Record = dict[str, Any]

TOKENS, DEPTHS, CODES = (256, 4096, 16384, 65536), (8, 16, 32, 48, 64), (16384, 8192, 24576)  # K: the usual one first
QUICK = [(n, CODES[0], d) for n in (256, 65536) for d in (32, 64)]
RACE_US = 5e5  # for the rounds of one shape
GRAPH_TOKENS = 4096  # at most
IN_GRAPHS = ("ours", "torch", "bf16")
ROUNDING = 1e-6
ALWAYS, SOMETIMES = ("torch", "tf32", "bf16"), ("compile", "triton", "triton1", "vq")


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
    from vector_quantize_pytorch import VectorQuantize

    k, d = codebook.shape
    model = VectorQuantize(dim=d, codebook_size=k, use_cosine_sim=True).to(z.device).eval()
    model.codebook = codebook
    return lambda: in_chunks(lambda piece: model(piece)[1], z)


MAKERS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "torch": make_torch, "tf32": make_tf32, "bf16": make_bf16, "compile": make_compiled,
    "triton": make_triton("tf32x3"), "triton1": make_triton("tf32"), "vq": make_vq,
}  # fmt: skip


def make_path(path: str, z: Tensor, codebook: Tensor) -> Call:
    return lambda: torch.ops.semhitok.nearest_code_probe(z, codebook, "ip", path)[1]


def contestants(
    z: Tensor, codebook: Tensor, ours: list[str], peers: tuple[str, ...]
) -> tuple[dict[str, Call], dict[str, str]]:
    """(name -> what to time, name -> why it cannot be made): ours holds paths, and "op" for the op itself."""
    calls: dict[str, Call] = {path: make_path(path, z, codebook) for path in ours if path != cuda_preflight.OP}
    if cuda_preflight.OP in ours:
        calls["ours"] = lambda: ops.nearest_code(z, codebook)[1]
    failed: dict[str, str] = {}
    for name in peers:
        try:
            calls[name] = MAKERS[name](z, codebook)
        except Exception as error:  # a package that is missing, or does not work here
            failed[name] = reason(error)
    return calls, failed


# ---- checking ----


def wrong_ids(z: Tensor, codebook: Tensor, ids: Tensor, piece: int = 4096) -> int:
    """How many ids [N] have a float64 score that is short of the best by more than rounding."""
    codes = codebook.double()
    largest, wrong = codes.norm(dim=1).max(), 0
    for tokens, chosen in zip(z.double().split(piece), ids.split(piece), strict=True):
        scores = tokens @ codes.T
        short = scores.amax(1) - scores.gather(1, chosen[:, None])[:, 0]
        wrong += int((~(short <= ROUNDING * tokens.norm(dim=1) * largest)).sum())  # NaN is wrong
    return wrong


def uncertified(rescored: Tensor) -> float:
    """Percentage of tokens [N] that the certified search left to another."""
    return 100 * (rescored < 0).double().mean().item()


# ---- one line of the table ----


def unit_vectors(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator("cuda").manual_seed(seed), device="cuda"), dim=1)


def bench(shape: Shape, ran: dict[str, set[Shape]], peers: tuple[str, ...], ceilings: Any, timer: Timer) -> Record:
    n, k, d = shape
    z, codebook = unit_vectors(n, d, 0), unit_vectors(k, d, 1)
    calls, failed = contestants(z, codebook, [path for path, shapes in ran.items() if shape in shapes], peers)
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
        record["wrong ids"] = {
            name: wrong_ids(z, codebook, calls[name]().long())
            for name in ("ours", *PATHS, "triton", "torch") if name in times
        }  # fmt: skip
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


def shown(value: Any, form: str = "", width: int = 0) -> str:
    return ("-" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)).rjust(
        width
    )


def cells(record: Record) -> list[tuple[str, str]]:
    """(title, value) of the columns, of equal width."""
    us, ours, get = record["us"], record["us"].get("ours"), record.get
    columns = [(key, shown(record[key], "", 6 if key in "NK" else 2)) for key in ("N", "K", "D")]
    columns += [("|", "|"), ("ours us", shown(ours, ".1f", 8))]
    columns += [("graph", shown(record["graph us"].get("ours"), ".1f", 6))]
    columns += [("TFLOP/s", shown(get("TFLOP/s"), ".0f", 7)), ("design", shown(get("design"), "", 9))]
    columns += [("% floor", shown(get("percent of floor"), ".0f", 7)), ("limit", shown(get("limit"), "", 7))]
    columns += [("|", "|"), *((path, shown(us.get(path), ".1f", 8)) for path in PATHS), ("|", "|")]
    for name in (*ALWAYS, *SOMETIMES):
        ratio = us[name] / ours if ours and name in us else None
        columns.append((f"x {name}", shown(ratio, ".1f", max(len(name) + 2, 6))))
    columns += [("|", "|"), ("wrong", shown(get("wrong ids", {}).get("ours"), "", 5))]
    columns += [("uncert", shown(get("uncertified percent"), ".2f", 6)), ("MiB", shown(get("extra MiB"), ".1f", 6))]
    return [(title.rjust(len(value)), value.rjust(len(title))) for title, value in columns]


# ---- the run ----


def about(ceilings: Any) -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "missing"

    return {
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "semhitok": semhitok.__version__,
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "device": torch.cuda.get_device_name(),
        "triton": version("triton"),
        "vector-quantize-pytorch": version("vector-quantize-pytorch"),
        "ceilings": json.dumps(ceilings) if ceilings else "not measured: no floors",
    }


class Report:
    """What is printed, and what has been measured so far, in the folder after every part of the run."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.content: dict[str, Any] = {"results": []}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def save(self) -> None:
        if self.folder:
            (self.folder / "table.txt").write_text("\n".join(self.lines) + "\n")
            (self.folder / "results.json").write_text(json.dumps(self.content, indent=1) + "\n")


def plot(records: list[Record], path: Path) -> None:
    """Time over ours of each contestant, on the usual codebook."""
    from matplotlib.figure import Figure

    shapes = [r for r in records if r["K"] == CODES[0] and r["us"].get("ours")]
    figure = Figure(figsize=(max(6, 0.8 * len(shapes) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    for name in (*ALWAYS, *SOMETIMES):
        at = [place for place, r in enumerate(shapes) if name in r["us"]]
        axes.plot(at, [shapes[place]["us"][name] / shapes[place]["us"]["ours"] for place in at], "o", label=name)
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("device time, in multiples of semhitok's")
    axes.set_xticks(range(len(shapes)), [f"{r['N']}\n{r['D']}" for r in shapes])
    axes.set_xlabel("tokens N above, depth D below")
    axes.set_title(f"Exact nearest code, K = {CODES[0]}, fp32")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def measured_ceilings(path: Path | None, report: Report) -> Any:
    try:
        return json.loads(path.read_text()) if path else cuda_ceilings.measure()
    except (RuntimeError, OSError, ValueError) as error:
        report.say(f"ceilings: {reason(error)}")
        return None


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
            peers = (*ALWAYS, *SOMETIMES) if full or shape[1] == CODES[0] else ALWAYS
            record = bench(shape, ran, peers, ceilings, timer)
        except Exception as error:
            report.say(f"{cuda_preflight.name_of(shape)}: {reason(error)}")
            raise_if_lost(error)
            continue
        titles, values = zip(*cells(record), strict=True)
        if not records or records[-1]["K"] != record["K"]:
            report.say("\nnearest_code\n" + " ".join(titles))
        records.append(record)
        report.say(" ".join(values))
    whys = {name: why for record in reversed(records) for name, why in record["failed"].items()}
    for name, why in whys.items():
        report.say(f"- {name}: {why}")
    if late:
        report.say(f"{late} shapes skipped: the time limit was reached")


def run(shapes: list[Shape], full: bool, budget: float, ceilings_file: Path | None, out: Path | None) -> int:
    """The whole benchmark; the usual codebook and the sections first, then the other codebooks while time is left."""
    torch.backends.cuda.matmul.allow_tf32 = False
    report, deadline = Report(out), time.monotonic() + budget
    ceilings = measured_ceilings(ceilings_file, report)
    report.content["about"] = about(ceilings)
    for name, value in report.content["about"].items():
        report.say(f"{name:24} {value}")
    ran, refused = cuda_preflight.survivors((*PATHS, cuda_preflight.OP), shapes)
    for path, message in refused.items():
        report.say(f"{path:24} runs on {len(ran[path])} of {len(shapes)} shapes: {message}")
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
            report.save()
        except Exception as error:
            failures += 1
            report.say(f"\nstopped: {reason(error)}")
            report.save()
            try:
                raise_if_lost(error)
            except DeviceLost:
                report.say("the device is lost to this process: what follows was not measured")
                break
    cuda_sections.say_acceptance(report)
    report.save()
    if out:
        try:
            plot(report.content["results"], out / "plot.png")
        except Exception as error:  # the figures are there without their picture
            report.say(f"plot.png: {reason(error)}")
    results = report.content["results"]
    wrong = sum(record.get("wrong ids", {}).get(name, 0) for record in results for name in ("ours", *PATHS))
    return int(failures > 0 or wrong > 0 or not any("ours" in record["us"] for record in results))
