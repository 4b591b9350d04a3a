"""nearest_code and hier_quantize beside what one would use instead; every id is checked against exact arithmetic.

    python benchmarks/quantize_bench.py [--quick] [--threads 1] [--dtype float32] [--out DIR]
    python benchmarks/quantize_bench.py --device cuda [--quick | --full] [--out DIR]      (see cuda/bench.py)

In every round ours and each contestant take a turn in this process, in random order, so that a busy machine disturbs
all alike. Medians of the rounds are printed. "x NAME" is the contestant's time over ours: CPU time with one thread,
wall time otherwise; results.json has both. The contestants of nearest_code ("ip"):

- own fp32: ours with a fused fp32 first pass in place of the low-precision one
- torch: `(z @ codebook.T).argmax(1)`, 4096 tokens at a time
- chunked: matmul and argmax or max into preallocated buffers, with the fastest of a few chunk sizes
- cdist: `torch.cdist(z, codebook).argmin(1)`, 4096 tokens at a time: solves "l2"
- faiss: IndexFlatIP with k=1, with the index built beforehand
- sklearn: pairwise_distances_argmin or KMeans.predict, whichever is faster: both solve "l2"
- vq: vector-quantize-pytorch's VectorQuantize (cosine, so "ip") in eval mode, 4096 tokens at a time; does more: it also
  normalises the tokens, gathers their codes and makes a one-hot matrix

Those of hier_quantize: ours without the pixel stage ("hier/nearest" is the cost of that stage), and
semhitok.reference, 4096 tokens at a time. The packages in peers.txt are optional: "-" stands for a contestant whose
package is missing. In float16 and bfloat16 PyTorch rounds its scores to that dtype; all others here search in fp32.

GOP/s counts the multiplications and additions of the plain search, over the same time as the ratios. The roofline is
the fp32 rate of the device (best of 200 torch matmuls), which a low-precision first pass may exceed. "codes" is how
many codes a token had scored in float64. "wrong" counts ids that differ from the float64 winner of lowest index; for
sub-codes, ids whose score is short of the best by more than fp32 rounding. "MiB" is the peak beyond inputs and outputs.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or one contestant's idle threads spin during the next one's turn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python benchmarks/quantize_bench.py`

import torch
from torch import Tensor

from benchmarks.exact import count_wrong, exact_winners
from benchmarks.processes import resident
from benchmarks.report import Report, aligned, chart, shown, vector_quantizer, version
from semhitok import _C, ops, reference

Shape = tuple[int, int, int]  # N, K, D
Call = Callable[[], Any]
Record = dict[str, Any]

SHAPES: dict[str, list[Shape]] = {  # the first two of each are the quick ones
    "nearest_code": [(256, 16384, 32), (4096, 16384, 32), (4096, 16384, 8), (4096, 16384, 16), (4096, 16384, 64),
                     (4096, 8192, 32), (4096, 24576, 32), (65536, 16384, 32)],
    "hier_quantize": [(256, 16384, 32), (4096, 16384, 32), (32768, 16384, 32)],
}  # fmt: skip
SUB_CODES = 12
PIECE = 4096  # tokens at a time for what builds N x K
CHUNKS = (64, 256, 1024, 4096)
TURN = 0.02  # seconds: what takes less is called several times in its turn
EPS32 = 2.0**-23
MIB = 2**20


# ---- contestants: a maker takes (z[N, D], codebook[K, D]) and returns the call to be timed, which returns the ids ----


def in_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    return torch.cat([function(*piece) for piece in zip(*(t.split(PIECE) for t in tensors), strict=True)])


def make_ours(z: Tensor, codebook: Tensor) -> Call:
    return lambda: ops.nearest_code(z, codebook)[1]


def make_own_fp32(z: Tensor, codebook: Tensor) -> Call:
    return lambda: torch.ops.semhitok.nearest_code_probe(z, codebook, first_pass="fp32")[1]


def make_torch(z: Tensor, codebook: Tensor) -> Call:
    return lambda: in_pieces(lambda piece: (piece @ codebook.T).argmax(1), z)


def make_cdist(z: Tensor, codebook: Tensor) -> Call:
    return lambda: in_pieces(lambda piece: torch.cdist(piece, codebook).argmin(1), z)


def make_chunked(z: Tensor, codebook: Tensor) -> Call:
    best, ids = z.new_empty(len(z)), z.new_empty(len(z), dtype=torch.int64)

    def search(tokens: Tensor, scores: Tensor, with_values: bool) -> Tensor:
        for start in range(0, len(tokens), len(scores)):
            part = slice(start, min(start + len(scores), len(tokens)))
            out = torch.mm(tokens[part], codebook.T, out=scores[: part.stop - start])
            if with_values:
                torch.max(out, 1, out=(best[part], ids[part]))
            else:
                torch.argmax(out, 1, out=ids[part])
        return ids

    def call(tokens: Tensor, rows: int, with_values: bool) -> Call:
        scores = z.new_empty(min(rows, len(z)), len(codebook))
        return lambda: search(tokens, scores, with_values)

    trials = [(rows, with_values) for rows in CHUNKS for with_values in (False, True)]
    return call(z, *min(trials, key=lambda trial: trial_time(call(z[:PIECE], *trial))))


def make_faiss(z: Tensor, codebook: Tensor) -> Call:
    import faiss

    index = faiss.IndexFlatIP(codebook.shape[1])
    index.add(codebook.float().numpy())
    tokens = z.float().numpy()
    return lambda: torch.from_numpy(index.search(tokens, 1)[1][:, 0])


def make_sklearn(z: Tensor, codebook: Tensor) -> Call:
    from sklearn.cluster import KMeans
    from sklearn.metrics import pairwise_distances_argmin

    tokens, codes = z.float().numpy(), codebook.float().numpy()
    model = KMeans(1, n_init=1).fit(codes[:1])
    model.cluster_centers_ = codes  # all that predict looks at: fitting K clusters would take long
    calls: list[Call] = [lambda: pairwise_distances_argmin(tokens, codes), lambda: model.predict(tokens)]
    return min(calls, key=trial_time)


def make_vq(z: Tensor, codebook: Tensor) -> Call:
    search = vector_quantizer(codebook)
    return lambda: in_pieces(search, z)


MAKERS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "own fp32": make_own_fp32, "torch": make_torch, "chunked": make_chunked, "cdist": make_cdist, "vq": make_vq,
    "faiss": make_faiss, "sklearn": make_sklearn,
}  # fmt: skip
PACKAGES = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "vq": "vector-quantize-pytorch"}


def nearest_contestants(z: Tensor, codebook: Tensor) -> dict[str, Call | None]:
    """name -> what to time, None where a package is missing."""
    missing = {name for name, package in PACKAGES.items() if version(package) is None}
    calls = {name: None if name in missing else maker(z, codebook) for name, maker in MAKERS.items()}
    return {"ours": make_ours(z, codebook), **calls}


def hier_contestants(z_sem: Tensor, z_pix: Tensor, sem: Tensor, pix: Tensor) -> dict[str, Call | None]:
    return {
        "ours": lambda: ops.hier_quantize(z_sem, z_pix, sem, pix)[2],
        "nearest": make_ours(z_sem, sem),
        "reference": lambda: in_pieces(lambda a, b: reference.hier_quantize(a, b, sem, pix)[2], z_sem, z_pix),
    }


# ---- measuring ----


def seconds(call: Call, times: int = 1) -> tuple[float, float]:
    """(wall, CPU) seconds a call; the second counts all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def trial_time(call: Call) -> float:
    call()
    return min(seconds(call)[0] for _ in range(2))


def race(calls: dict[str, Call], rounds: int) -> dict[str, dict[str, float]]:
    """name -> medians of wall_ms and cpu_ms."""
    turns = {name: math.ceil(TURN / trial_time(call)) for name, call in calls.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()
    order = random.Random(0)  # or ours would always find the caches as the same contestant left them
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], turns[name]))
    gc.enable()
    medians = {name: [1e3 * statistics.median(clock) for clock in zip(*t, strict=True)] for name, t in times.items()}
    return {name: {"wall_ms": wall, "cpu_ms": cpu} for name, (wall, cpu) in medians.items()}


def roofline() -> float:
    """Multiply-adds at two operations each, in operations per second: the best of many runs of a matmul."""
    n = 512
    a, b, out = (torch.rand(n, n) for _ in range(3))
    return 2 * n**3 / min(seconds(lambda: torch.mm(a, b, out=out))[0] for _ in range(200))


def extra_mib(call: Callable[[], tuple[Tensor, ...]]) -> float:
    """Peak MiB beyond what was there before and what is returned, by the peak of the resident size."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not serve this call unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except (AttributeError, OSError):
        return math.nan
    before = resident("VmRSS")
    outputs = call()
    return max(resident("VmHWM") - before - sum(o.nbytes for o in outputs) / MIB, 0.0)


# ---- checking ----


def wrong_codes(z: Tensor, codebook: Tensor, ids: Tensor) -> int:
    """How many of nearest_code's ids [N] ("ip") are wrong."""
    return count_wrong(z, codebook, "ip", ids, exact_winners(z, codebook))[0]


def wrong_sub_codes(z: Tensor, sub_codebooks: Tensor, group: Tensor, ids: Tensor) -> int:
    """How many of nearest_subcode's ids [N] ("l2") are wrong: group[N] names the sub-codebooks [K, m, D]."""
    wrong = 0
    for rows in torch.arange(len(z)).split(512):
        x, sub = z[rows].double(), sub_codebooks[group[rows]].double()
        scores = torch.einsum("nd,nmd->nm", x, sub) - sub.square().sum(-1) / 2
        largest = sub.norm(dim=-1).amax(-1)
        wrong += short_of_best(scores, ids[rows], x.norm(dim=-1) * largest + largest.square() / 2, z.shape[1])
    return wrong


def short_of_best(scores: Tensor, ids: Tensor, size: Tensor, depth: int) -> int:
    """How many of ids [N] miss the best of scores [N, C] by more than fp32 sums of depth terms of size [N] explain."""
    tolerance = 2 * EPS32 * (depth + 4) * size
    return int((scores.gather(1, ids[:, None])[:, 0] < scores.amax(1) - tolerance).sum())


# ---- one line of a table ----


def bench(op: str, shape: Shape, dtype: torch.dtype, clock: str, peak: float) -> Record:
    (n, k, d), m = shape, SUB_CODES
    torch.manual_seed(0)
    z, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    if op == "nearest_code":
        calls, operations = nearest_contestants(z, codebook), 2.0 * n * k * d
        wrong = wrong_codes(z, codebook, ops.nearest_code(z, codebook)[1])
        memory = extra_mib(lambda: ops.nearest_code(z, codebook))
    else:
        z_pix, pix = torch.randn(n, d).to(dtype), torch.randn(k, m, d).to(dtype)
        calls, operations = hier_contestants(z, z_pix, codebook, pix), 2.0 * n * (k + m) * d
        codes = ops.hier_quantize(z, z_pix, codebook, pix)[2]
        wrong = wrong_codes(z, codebook, codes // m) + wrong_sub_codes(z_pix, pix, codes // m, codes % m)
        memory = extra_mib(lambda: ops.hier_quantize(z, z_pix, codebook, pix))
    times = race({name: call for name, call in calls.items() if call}, 3 if n * k > 2**28 else 5)
    ours = times["ours"][clock]
    ratios = {name: times[name][clock] / ours if name in times else None for name in calls if name != "ours"}
    scored = torch.ops.semhitok.nearest_code_probe(z, codebook)[2].double().mean().item()
    return {
        "op": op, "N": n, "K": k, "D": d, **({} if op == "nearest_code" else {"m": m, "Dp": d}),
        "dtype": str(dtype).removeprefix("torch."), "times": times, "x": ratios,
        "GOP/s": operations / ours / 1e6, "percent of fp32 roofline": 100 * operations / ours * 1e3 / peak,
        "codes scored in float64 per token": scored, "wrong ids": wrong, "extra MiB": memory,
    }  # fmt: skip


def cells(record: Record) -> list[tuple[str, str]]:
    """(title, value) of the columns, of equal width."""
    ours, ratios, bar = record["times"]["ours"], dict(record["x"]), ("|", "|", 1)
    sizes = [key for key in ("N", "K", "D", "m", "Dp") if key in record]
    columns = [(key, str(record[key]), 6 if key in "NK" else 3) for key in sizes]
    columns += [("dtype", record["dtype"], 8), bar]
    columns += [("wall ms", f"{ours['wall_ms']:.2f}", 8), ("CPU ms", f"{ours['cpu_ms']:.2f}", 8), bar]
    columns += [("GOP/s", f"{record['GOP/s']:.0f}", 6), ("% fp32", f"{record['percent of fp32 roofline']:.0f}", 6), bar]
    if record["op"] == "hier_quantize":
        columns += [("hier/nearest", f"{1 / ratios.pop('nearest'):.2f}", 12)]
    columns += [(f"x {name}", shown(x, ".1f"), 0) for name, x in ratios.items()]
    columns += [bar, ("codes", f"{record['codes scored in float64 per token']:.1f}", 5)]
    columns += [("wrong", str(record["wrong ids"]), 5), ("MiB", f"{record['extra MiB']:.1f}", 5)]
    return aligned(columns)


# ---- the run ----


def limit_threads(threads: int) -> None:
    """Ours and PyTorch's, and those of the peers that are installed."""
    torch.set_num_threads(threads)
    if version("faiss-cpu"):
        import faiss

        faiss.omp_set_num_threads(threads)
    if version("scikit-learn"):
        import sklearn.cluster  # noqa: F401  (its OpenMP must be there before it can be limited)
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)


def about(threads: int, clock: str, peak: float) -> dict[str, str]:
    peers = [PACKAGES[name] for name in MAKERS if name in PACKAGES]
    return {
        "torch": torch.__version__,
        "device": "CPU",
        "CPU instruction set": _C.build_info()["cpu"]["used"],
        "threads": str(threads),
        "fp32 roofline": f"{peak / 1e9:.0f} GFLOP/s",
        "ratios": "CPU time" if clock == "cpu_ms" else "wall time",
        **{package: version(package) or f"missing: pip install {package}" for package in peers},
    }


def plot(records: list[Record], clock: str, path: Path) -> None:
    """A group of bars for each shape of nearest_code: the time of each contestant over ours."""
    records = [record for record in records if record["op"] == "nearest_code"]
    names, ticks = list(records[0]["x"]), [f"N {r['N']}\nK {r['K']}\nD {r['D']}" for r in records]
    with chart(path, "Exact nearest code", "CPU" if clock == "cpu_ms" else "wall", ticks, 1.6) as axes:
        for place, name in enumerate(names):
            at = [group + (place + 0.5) * 0.8 / len(names) - 0.4 for group in range(len(records))]
            axes.bar(at, [record["x"][name] or 0 for record in records], 0.8 / len(names), label=name)


def shape_of(text: str) -> Shape:
    sizes = [int(size) if size.isdecimal() else 0 for size in text.split("x")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected NxKxD, as in 4096x16384x32, got {text}")
    return sizes[0], sizes[1], sizes[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of ours and of the contestants")
    parser.add_argument("--quick", action="store_true", help="few shapes: under a minute")
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="NxKxD", help="these shapes, in both tables")
    parser.add_argument("--full", action="store_true", help="CUDA: every contestant on every shape")
    parser.add_argument("--budget", type=float, default=170, metavar="SECONDS", help="CUDA: no new shape after these")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="CUDA: what ceilings.py --out wrote")
    parser.add_argument("--out", type=Path, help="folder for results.json, table.txt and plot.png")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    if arguments.out and not version("matplotlib"):
        parser.error("--out: plot.png needs matplotlib; pip install matplotlib")
    if arguments.device == "cuda":
        from benchmarks.cuda import bench as cuda_bench

        if arguments.dtype != "float32":
            parser.error(f"--dtype: expected float32 with --device cuda, got {arguments.dtype}")
        shapes = arguments.shapes or (cuda_bench.QUICK if arguments.quick else cuda_bench.grid())
        report = Report(arguments.out)
        sys.exit(cuda_bench.run(report, shapes, arguments.full, arguments.budget, arguments.ceilings))
    limit_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    clock = "cpu_ms" if arguments.threads == 1 else "wall_ms"
    peak = roofline()
    report = Report(arguments.out)
    report.introduce(about(arguments.threads, clock, peak))
    records = report.content["results"]
    with torch.inference_mode():
        for op, shapes in SHAPES.items():
            for place, shape in enumerate(arguments.shapes or shapes[: 2 if arguments.quick else None]):
                records.append(bench(op, shape, dtype, clock, peak))
                report.row(cells(records[-1]), op if place == 0 else None)
    if arguments.out:
        report.save()
        plot(records, clock, arguments.out / "plot.png")
        print(f"\nwritten: table.txt, results.json and plot.png in {arguments.out}")


if __name__ == "__main__":
    main()
