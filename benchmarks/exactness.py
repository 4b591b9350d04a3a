"""Does nearest_code find the exact winner? A million tokens of many kinds, on every instruction set of this CPU.

    python -m benchmarks.exactness [--tokens 1000000] [--device cuda]      (see cuda/exactness.py)

An id is wrong if it differs from that of the greatest score in exact arithmetic, the lowest index among equal scores
(see exact.py). Random data prove little: even an error bound that is three times too small passes them. Hence data on
which low precision cannot tell the codes apart, many ties, all magnitudes, and tokens that point along the very error
that rounding a code makes.

The columns, a line for each case:

    wrong     wrong ids on each instruction set, and with the fused fp32 first pass for hard tokens ("fp32")
    close     ids, on all of them together, whose score misses the winner's by no more than the rounding of a float64
              sum: no search in float64 can tell them apart
    codes     how many codes a token had scored in float64 on the instruction set in use
    x random  CPU time of the first 4096 tokens over that of normal data of the same shape, median of 3

Exit status 1 if one id is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would count as CPU time

import torch
from torch import Generator, Tensor

from benchmarks.exact import Outcome, count_wrong, exact_winners
from semhitok import _C, ops

TIMED = 4096
REPEATS = 3

# ---- kinds of data: each changes normal tokens [N, D] and codes [K, D], and may draw more from the generator ----

Pair = tuple[Tensor, Tensor]


def normal(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    return z, codebook


def clustered(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Tokens around codes, as in a trained tokenizer."""
    return codebook[torch.randint(len(codebook), (len(z),), generator=g)] + 0.3 * z, codebook


def common_mean(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Any two vectors have a cosine of about 0.9."""
    mean = torch.randn(z.shape[1], generator=g)
    mean *= 3 * z.shape[1] ** 0.5 / mean.norm()
    return z + mean, codebook + mean


def power_law(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Dimension j has scale 1/j."""
    scale = 1 / torch.arange(1, z.shape[1] + 1)
    return z * scale, codebook * scale


def outlier(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """One dimension a hundred times as large as the others."""
    for rows in (z, codebook):
        rows[:, rows.shape[1] // 2] *= 100
    return z, codebook


def collapsed(g: Generator, z: Tensor, codebook: Tensor, spread: float) -> Pair:
    return z, torch.randn(z.shape[1], generator=g) + spread * codebook


def two_clusters(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Half the codes within 1e-6 of one vector, half of another: centring the codebook does not help."""
    return z, torch.randn(2, z.shape[1], generator=g)[torch.arange(len(codebook)) % 2] + 1e-6 * codebook


def twice(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Every code occurs twice, anywhere."""
    return z, codebook[torch.randperm(len(codebook), generator=g) // 2]


def dead(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """70 % of the codes are equal."""
    codebook[torch.rand(len(codebook), generator=g) < 0.7] = torch.randn(z.shape[1], generator=g)
    return z, codebook


def identical(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    return z, codebook[:1].repeat(len(codebook), 1)


def lattice(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Small integers, from the generator's start: many codes of equal score."""
    g.manual_seed(g.initial_seed())
    z, codebook = (torch.randint(-3, 4, rows.shape, generator=g).float() for rows in (z, codebook))
    return z, codebook


def zero_rows(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Every third token is zero, and so is one code."""
    z[::3] = 0
    codebook[len(codebook) // 2] = 0
    return z, codebook


def scaled(g: Generator, z: Tensor, codebook: Tensor, factor: float) -> Pair:
    return z * factor, codebook * factor


def mixed_magnitudes(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Tokens from 1e-18 to 1e18, codes from 0.01 to 100."""
    z_power, code_power = (2 * torch.rand(len(rows), 1, generator=g) - 1 for rows in (z, codebook))
    return z * 10 ** (18 * z_power), codebook * 10 ** (2 * code_power)


def adversarial(g: Generator, z: Tensor, codebook: Tensor) -> Pair:
    """Tokens along a code's residual from the codebook's mean, and along what rounding it to 8 bits leaves of it."""
    residual = codebook - codebook.mean(0)
    step = residual.abs().max() / 127
    left = residual - step * (residual / step).round()
    pick = torch.randint(len(codebook), (len(z),), generator=g)
    along = torch.where(torch.arange(len(z))[:, None] % 2 == 0, residual[pick], left[pick])
    return along / along.norm(dim=1, keepdim=True) * (1 + z[:, :1].abs()), codebook


@dataclass
class Case:
    kind: str
    make: Callable[[Generator, Tensor, Tensor], Pair]
    metric: str
    k: int
    d: int
    dtype: torch.dtype = torch.float32

    def data(self, n: int, seed: int = 0) -> Pair:
        """Tokens [n, D] and codebook [K, D]."""
        g = torch.Generator().manual_seed(seed)
        z, codebook = self.make(g, torch.randn(n, self.d, generator=g), torch.randn(self.k, self.d, generator=g))
        return z.to(self.dtype), codebook.to(self.dtype)


HALF, BF16 = torch.float16, torch.bfloat16
KINDS = {  # kind -> what makes it; metric, K, D and dtype of its cases
    "random normal": (
        normal, ("ip", 16384, 32), ("l2", 1000, 3), ("ip", 8191, 8), ("ip", 8192, 48, BF16), ("l2", 4099, 64, HALF)
    ),
    "clustered around codes": (clustered, ("ip", 8192, 32), ("l2", 16384, 16)),
    "common mean, cosine 0.9": (common_mean, ("ip", 16384, 8), ("l2", 4097, 33), ("ip", 2049, 24, HALF)),
    "power-law spectrum 1/j": (power_law, ("ip", 16384, 64), ("l2", 3001, 96)),
    "outlier dimension": (outlier, ("ip", 16383, 17), ("l2", 2000, 48, BF16)),
    "collapsed, spread 1e-2": (partial(collapsed, spread=1e-2), ("ip", 8192, 32), ("l2", 4095, 7)),
    "collapsed, spread 1e-5": (partial(collapsed, spread=1e-5), ("ip", 16384, 32), ("l2", 2048, 11)),
    "two clusters, spread 1e-6": (two_clusters, ("ip", 16384, 32), ("l2", 1025, 13)),
    "every code twice": (twice, ("ip", 8192, 32), ("l2", 4095, 9, BF16)),
    "70 % identical codes": (dead, ("ip", 8192, 16)),
    "all codes identical": (identical, ("ip", 16384, 8), ("l2", 4095, 32)),
    "integer lattice, ties": (lattice, ("ip", 1000, 4), ("l2", 2000, 5)),
    "zero tokens mixed in": (zero_rows, ("ip", 16384, 32), ("l2", 1003, 6)),
    "tiny, 1e-18": (partial(scaled, factor=1e-18), ("ip", 4096, 32), ("l2", 2047, 8)),
    "huge, 1e18": (partial(scaled, factor=1e18), ("ip", 4096, 8), ("l2", 2047, 32)),
    "mixed magnitudes": (mixed_magnitudes, ("ip", 4096, 12), ("l2", 8192, 32)),
    "along rounding errors": (adversarial, ("ip", 16384, 8), ("ip", 4096, 64), ("l2", 8191, 5)),
}  # fmt: skip
CASES = [Case(kind, make, *sizes) for kind, (make, *cases) in KINDS.items() for sizes in cases]


# ---- one case on the CPU ----


def searches() -> dict[str, tuple[str, str]]:
    """title -> (capability, first pass): every instruction set as it works by itself, and the fp32 pass of the best."""
    return {name: (name, "") for name in _C.build_info()["cpu"]["found"]} | {"fp32": ("", "fp32")}


def search(z: Tensor, codebook: Tensor, metric: str, capability: str, first_pass: str) -> Pair:
    """ids [N], and how many codes each token had scored in float64 [N]."""
    return torch.ops.semhitok.nearest_code_probe(z, codebook, metric, capability, first_pass)[1:]


def cpu_time(z: Tensor, codebook: Tensor, metric: str) -> float:
    start = time.process_time()
    ops.nearest_code(z, codebook, metric)
    return time.process_time() - start


def times_random(case: Case, z: Tensor, codebook: Tensor) -> float:
    data = [(z[:TIMED], codebook), replace(case, make=normal).data(len(z[:TIMED]))]
    rounds = [[cpu_time(*pair, case.metric) for pair in data] for _ in range(1 + REPEATS)]
    this, random = (statistics.median(times) for times in zip(*rounds[1:], strict=True))  # the first warms up
    return this / random


def check(case: Case, n: int) -> Outcome:
    z, codebook = case.data(n)
    last = times_random(case, z, codebook)
    winners = exact_winners(z, codebook, case.metric)
    wrong, close, codes = {}, 0, 0.0
    for title, (capability, first_pass) in searches().items():
        ids, scored = search(z, codebook, case.metric, capability, first_pass)
        wrong[title], also_close = count_wrong(z, codebook, case.metric, ids, winners)
        close += also_close
        if title == _C.build_info()["cpu"]["used"]:
            codes = scored.double().mean().item()
    return Outcome(wrong, close, codes, last)


# ---- the table ----


@torch.inference_mode()
def run(
    cases: list[Case], n: int, titles: Iterable[str], last: str, check: Callable[[Case, int], Outcome] = check
) -> int:
    """Check n tokens of each case and print its line: `titles` are the searches, `last` the title of the last column.

    Returns:
        1 if an id was wrong, a case failed or the first search refused one.
    """
    widths = {title: max(len(title), 5) for title in titles}
    start, total, failed, refused = time.perf_counter(), dict.fromkeys(widths, 0), False, {}
    heading = " ".join(title.rjust(width) for title, width in widths.items())
    print(f"{'kind':<25} {'':2} {'dtype':>8} {'N':>6} {'K':>6} {'D':>3} | wrong: {heading} | close    codes {last}")
    for case in cases:
        dtype = str(case.dtype).removeprefix("torch.")
        line = f"{case.kind:<25} {case.metric} {dtype:>8} {n:6d} {case.k:6d} {case.d:3d} |        "
        try:
            outcome = check(case, n)
        except RuntimeError as error:  # on CUDA a kernel has broken the device: nothing more can run
            print(f"{line}{str(error).splitlines()[0]}", flush=True)
            failed = True
            break
        refused = outcome.refused | refused
        failed = failed or next(iter(widths)) not in outcome.wrong
        for title, wrong in outcome.wrong.items():
            total[title] += wrong
        line += " ".join(str(outcome.wrong.get(title, "-")).rjust(width) for title, width in widths.items())
        print(f"{line} | {outcome.close:5d} {outcome.codes:8.1f} {outcome.last:{len(last)}.2f}", flush=True)
    for title, why in refused.items():
        print(f"- {title}: {why}")
    counts = ", ".join(f"{title} {count}" for title, count in total.items())
    print(f"{n * len(cases)} tokens in {time.perf_counter() - start:.0f} s, wrong ids: {counts}")
    return int(failed or any(total.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of all cases together")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.tokens < len(CASES):
        parser.error(f"--tokens: expected at least {len(CASES)}, one a case, got {arguments.tokens}")
    n = -(-arguments.tokens // len(CASES))
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: this PyTorch finds no CUDA device")
        from benchmarks.cuda import exactness as cuda_exactness

        print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
        return run(CASES, n, cuda_exactness.CAPABILITIES, "uncert", cuda_exactness.check)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_C.build_info()['cpu']['used']} in use")
    return run(CASES, n, searches(), "x random")


if __name__ == "__main__":
    sys.exit(main())
