"""Does nearest_code find the exact winner? On a million tokens of many kinds, on every instruction set of this CPU.

    python -m benchmarks.exactness [--tokens 1000000] [--device cuda]      (see cuda/exactness.py)

A wrong id is one other than that of the greatest score in exact arithmetic, the lowest index among equal scores (see
exact.py). Random data alone would prove little, as a first pass whose error bound is three times too small passes it;
hence data on which low precision cannot tell the codes apart, ties in masses, all magnitudes, and tokens that point
along the very error that rounding a code makes.

A line for each case: wrong ids on each instruction set, and with the fused fp32 first pass that hard tokens fall back
to ("fp32"); "close", ids on all of them together whose score misses the winner's by no more than the rounding of a
float64 sum, which no search in float64 can tell apart; "codes", how many codes a token had scored in float64 on the set
in use; "x random", CPU time of the first 4096 tokens over that of normal data of the same shape, median of 3.

Exit status 1 if one id is wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would count as CPU time

import torch
from torch import Generator, Tensor

from benchmarks.exact import count_wrong, exact_winners
from semhitok import _C, ops

TIMED = 4096
REPEATS = 3

# ---- kinds of data: (generator, N, K, D) -> tokens [N, D] and codebook [K, D] in float32 ----


def normal(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, generator=g), torch.randn(k, d, generator=g)


def clustered(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens around codes, as in a trained tokenizer."""
    z, codebook = normal(g, n, k, d)
    return codebook[torch.randint(k, (n,), generator=g)] + 0.3 * z, codebook


def common_mean(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Any two vectors have a cosine of about 0.9."""
    z, codebook = normal(g, n, k, d)
    mean = torch.randn(d, generator=g)
    mean *= 3 * d**0.5 / mean.norm()
    return z + mean, codebook + mean


def power_law(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Dimension j has scale 1/j."""
    z, codebook = normal(g, n, k, d)
    scale = 1 / torch.arange(1, d + 1)
    return z * scale, codebook * scale


def outlier(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """One dimension a hundred times as large as the others."""
    z, codebook = normal(g, n, k, d)
    z[:, d // 2] *= 100
    codebook[:, d // 2] *= 100
    return z, codebook


def collapsed(spread: float) -> Callable[[Generator, int, int, int], tuple[Tensor, Tensor]]:
    def make(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
        z, codebook = normal(g, n, k, d)
        return z, torch.randn(d, generator=g) + spread * codebook

    return make


def two_clusters(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Half the codes within 1e-6 of one vector, half of another: centring the codebook does not help."""
    z, codebook = normal(g, n, k, d)
    return z, torch.randn(2, d, generator=g)[torch.arange(k) % 2] + 1e-6 * codebook


def twice(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Every code occurs twice, anywhere."""
    z, codebook = normal(g, n, k, d)
    return z, codebook[torch.randperm(k, generator=g) // 2]


def dead(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """70 % of the codes are one and the same."""
    z, codebook = normal(g, n, k, d)
    codebook[torch.rand(k, generator=g) < 0.7] = torch.randn(d, generator=g)
    return z, codebook


def identical(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    z, codebook = normal(g, n, k, d)
    return z, codebook[:1].repeat(k, 1)


def lattice(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Small integers: many codes of equal score."""
    z, codebook = (torch.randint(-3, 4, (rows, d), generator=g).float() for rows in (n, k))
    return z, codebook


def zero_rows(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Every third token is zero, and so is one code."""
    z, codebook = normal(g, n, k, d)
    z[::3] = 0
    codebook[k // 2] = 0
    return z, codebook


def scaled(factor: float) -> Callable[[Generator, int, int, int], tuple[Tensor, Tensor]]:
    def make(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
        z, codebook = normal(g, n, k, d)
        return z * factor, codebook * factor

    return make


def mixed_magnitudes(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens from 1e-18 to 1e18, codes from 0.01 to 100."""
    z, codebook = normal(g, n, k, d)
    powers = (size * (2 * torch.rand(rows, 1, generator=g) - 1) for rows, size in ((n, 18), (k, 2)))
    return z * 10 ** next(powers), codebook * 10 ** next(powers)


def adversarial(g: Generator, n: int, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Tokens along a code's residual from the codebook's mean, and along what rounding it to 8 bits leaves of it."""
    z, codebook = normal(g, n, k, d)
    residual = codebook - codebook.mean(0)
    step = residual.abs().max() / 127
    left = residual - step * (residual / step).round()
    pick = torch.randint(k, (n,), generator=g)
    along = torch.where(torch.arange(n)[:, None] % 2 == 0, residual[pick], left[pick])
    return along / along.norm(dim=1, keepdim=True) * (1 + z[:, :1].abs()), codebook


@dataclass
class Case:
    kind: str
    make: Callable[[Generator, int, int, int], tuple[Tensor, Tensor]]
    metric: str
    k: int
    d: int
    dtype: torch.dtype = torch.float32

    def data(self, n: int, make: Callable[[Generator, int, int, int], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        z, codebook = make(torch.Generator().manual_seed(0), n, self.k, self.d)
        return z.to(self.dtype), codebook.to(self.dtype)


CASES = [
    Case("random normal", normal, "ip", 16384, 32),
    Case("random normal", normal, "l2", 1000, 3),
    Case("random normal", normal, "ip", 8191, 8),
    Case("random normal", normal, "ip", 8192, 48, torch.bfloat16),
    Case("random normal", normal, "l2", 4099, 64, torch.float16),
    Case("clustered around codes", clustered, "ip", 8192, 32),
    Case("clustered around codes", clustered, "l2", 16384, 16),
    Case("common mean, cosine 0.9", common_mean, "ip", 16384, 8),
    Case("common mean, cosine 0.9", common_mean, "l2", 4097, 33),
    Case("common mean, cosine 0.9", common_mean, "ip", 2049, 24, torch.float16),
    Case("power-law spectrum 1/j", power_law, "ip", 16384, 64),
    Case("power-law spectrum 1/j", power_law, "l2", 3001, 96),
    Case("outlier dimension", outlier, "ip", 16383, 17),
    Case("outlier dimension", outlier, "l2", 2000, 48, torch.bfloat16),
    Case("collapsed, spread 1e-2", collapsed(1e-2), "ip", 8192, 32),
    Case("collapsed, spread 1e-2", collapsed(1e-2), "l2", 4095, 7),
    Case("collapsed, spread 1e-5", collapsed(1e-5), "ip", 16384, 32),
    Case("collapsed, spread 1e-5", collapsed(1e-5), "l2", 2048, 11),
    Case("two clusters, spread 1e-6", two_clusters, "ip", 16384, 32),
    Case("two clusters, spread 1e-6", two_clusters, "l2", 1025, 13),
    Case("every code twice", twice, "ip", 8192, 32),
    Case("every code twice", twice, "l2", 4095, 9, torch.bfloat16),
    Case("70 % identical codes", dead, "ip", 8192, 16),
    Case("all codes identical", identical, "ip", 16384, 8),
    Case("all codes identical", identical, "l2", 4095, 32),
    Case("integer lattice, ties", lattice, "ip", 1000, 4),
    Case("integer lattice, ties", lattice, "l2", 2000, 5),
    Case("zero tokens mixed in", zero_rows, "ip", 16384, 32),
    Case("zero tokens mixed in", zero_rows, "l2", 1003, 6),
    Case("tiny, 1e-18", scaled(1e-18), "ip", 4096, 32),
    Case("tiny, 1e-18", scaled(1e-18), "l2", 2047, 8),
    Case("huge, 1e18", scaled(1e18), "ip", 4096, 8),
    Case("huge, 1e18", scaled(1e18), "l2", 2047, 32),
    Case("mixed magnitudes", mixed_magnitudes, "ip", 4096, 12),
    Case("mixed magnitudes", mixed_magnitudes, "l2", 8192, 32),
    Case("along rounding errors", adversarial, "ip", 16384, 8),
    Case("along rounding errors", adversarial, "ip", 4096, 64),
    Case("along rounding errors", adversarial, "l2", 8191, 5),
]


# ---- one case ----


def engines() -> dict[str, tuple[str, str]]:
    """title -> (capability, first pass): every instruction set as it works by itself, and the fp32 pass of the best."""
    return {name: (name, "") for name in _C.build_info()["cpu"]["found"]} | {"fp32": ("", "fp32")}


def search(z: Tensor, codebook: Tensor, metric: str, capability: str, first_pass: str) -> tuple[Tensor, Tensor]:
    """ids [N], and how many codes each token had scored in float64 [N]."""
    return torch.ops.semhitok.nearest_code_probe(z, codebook, metric, capability, first_pass)[1:]


def cpu_time(z: Tensor, codebook: Tensor, metric: str) -> float:
    start = time.process_time()
    ops.nearest_code(z, codebook, metric)
    return time.process_time() - start


def times_random(case: Case, z: Tensor, codebook: Tensor) -> float:
    data = [(z[:TIMED], codebook), case.data(len(z[:TIMED]), normal)]
    rounds = [[cpu_time(*pair, case.metric) for pair in data] for _ in range(1 + REPEATS)]
    this, random = (statistics.median(times) for times in zip(*rounds[1:], strict=True))  # the first warms up
    return this / random


@dataclass
class Outcome:
    wrong: dict[str, int]  # by engine
    close: int
    codes: float
    times_random: float


def check(case: Case, n: int) -> Outcome:
    z, codebook = case.data(n, case.make)
    winners = exact_winners(z, codebook, case.metric)
    outcome = Outcome({}, 0, 0.0, times_random(case, z, codebook))
    for title, (capability, first_pass) in engines().items():
        ids, scored = search(z, codebook, case.metric, capability, first_pass)
        outcome.wrong[title], close = count_wrong(z, codebook, case.metric, ids, winners)
        outcome.close += close
        if title == _C.build_info()["cpu"]["used"]:
            outcome.codes = scored.double().mean().item()
    return outcome


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

        return cuda_exactness.run(CASES, n)
    titles = list(engines())
    widths = {title: max(len(title), 5) for title in titles}
    start, total = time.perf_counter(), dict.fromkeys(titles, 0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_C.build_info()['cpu']['used']} in use")
    print(
        f"{'kind':<25} {'':2} {'dtype':>8} {'N':>6} {'K':>6} {'D':>3} | wrong: "
        + " ".join(f"{title:>{widths[title]}}" for title in titles)
        + " | close    codes x random",
        flush=True,
    )
    with torch.inference_mode():
        for case in CASES:
            outcome = check(case, n)
            total = {title: total[title] + outcome.wrong[title] for title in titles}
            print(
                f"{case.kind:<25} {case.metric} {str(case.dtype).removeprefix('torch.'):>8} {n:6d} {case.k:6d} "
                f"{case.d:3d} |        "
                + " ".join(f"{outcome.wrong[title]:{widths[title]}d}" for title in titles)
                + f" | {outcome.close:5d} {outcome.codes:8.1f} {outcome.times_random:8.2f}",
                flush=True,
            )
    wrong = ", ".join(f"{title} {count}" for title, count in total.items())
    print(f"{n * len(CASES)} tokens in {time.perf_counter() - start:.0f} s, wrong ids: {wrong}")
    return int(any(total.values()))


if __name__ == "__main__":
    sys.exit(main())
