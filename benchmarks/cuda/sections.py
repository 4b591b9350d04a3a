"""What bench.py measures besides the grid: hier_quantize, a training step of the quantizers, and whether the required
figures were reached."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda.timing import Timer, extra_mib, race, reason
from benchmarks.report import Report, shown
from semhitok import ops, reference
from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer, straight_through

CODES, SUB_CODES, PIX_DIM = 16384, 12, 32
HIER_SHAPES = [(n, d) for n in (65536, 4096) for d in (32, 64)]  # N, Ds
HIER_US = 1e6  # for the rounds of one shape
TRAINING_TOKENS = 16384
STEPS, TURNS = 10, 5
DECAY = 0.99

# ---- the quantizers in plain PyTorch, with an N x K and an N x m x Dp matrix ----


class PlainSemantic:
    """A plain SemanticQuantizer: forward and norm-EMA."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.clone()

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = (z @ self.codebook.T).argmax(-1)
        q = self.codebook[codes]
        return straight_through(z, q), codes, F.mse_loss(z, q)

    @torch.no_grad()
    def update(self, z: Tensor, codes: Tensor) -> None:
        sums = torch.zeros_like(self.codebook).index_add_(0, codes, z)
        counts = torch.bincount(codes, minlength=len(self.codebook))[:, None]
        moved = F.normalize(DECAY * self.codebook + (1 - DECAY) * sums / counts.clamp_min(1), dim=-1)
        self.codebook.copy_(torch.where(counts > 0, moved, self.codebook))


class PlainHierarchical:
    """A plain HierarchicalQuantizer: forward and EMA of the sub-codes."""

    def __init__(self, codebook: Tensor, pix_codebook: Tensor) -> None:
        self.codebook, self.pix_codebook = codebook.clone(), pix_codebook.clone()
        self.weights = torch.ones_like(pix_codebook[..., 0])

    def __call__(self, z_sem: Tensor, z_pix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i = (z_sem @ self.codebook.T).argmax(-1)
        j = (z_pix[:, None] - self.pix_codebook[i]).square().sum(-1).argmin(-1)
        q_pix = self.pix_codebook[i, j]
        codes = i * self.pix_codebook.shape[1] + j
        return self.codebook[i], straight_through(z_pix, q_pix), codes, F.mse_loss(z_pix, q_pix)

    @torch.no_grad()
    def update(self, z_pix: Tensor, codes: Tensor) -> None:
        book = self.pix_codebook.flatten(0, 1)
        sums = torch.zeros_like(book).index_add_(0, codes, z_pix)
        counts = torch.bincount(codes, minlength=len(book)).float()[:, None]
        self.weights.lerp_(counts.view_as(self.weights), 1 - DECAY)
        rate = (1 - DECAY) / self.weights.view(-1, 1).clamp_min(torch.finfo(torch.float32).tiny)
        self.pix_codebook.copy_((book + rate * (sums - counts * book)).view_as(self.pix_codebook))


class Step:
    """A training step of a quantizer: forward, backward to a copy of the last of its tokens, EMA."""

    def __init__(self, quantizer: Any, *tokens: Tensor) -> None:
        self.quantizer, self.fixed, self.z = quantizer, tokens[:-1], tokens[-1].clone().requires_grad_()

    def __call__(self) -> None:
        self.z.grad = None
        *_, q, codes, commitment = self.quantizer(*self.fixed, self.z)
        (q.square().mean() + commitment).backward()
        self.quantizer.update(self.z.detach(), codes)


def training_pairs(n: int, k: int, m: int, d: int, device: str) -> dict[str, tuple[Step, Step]]:
    """kind of quantizer -> a step of ours, and one of the plain module with the same codes and tokens."""
    torch.manual_seed(0)
    semantic = SemanticQuantizer(k, d, decay=DECAY).to(device)
    hierarchical = HierarchicalQuantizer(k, m, d, d, decay=DECAY).to(device)
    plain = PlainHierarchical(hierarchical.semantic.codebook, hierarchical.pix_codebook)
    z_sem = F.normalize(torch.randn(n, d, device=device), dim=1)
    z_pix = torch.randn(n, d, device=device)
    return {
        "semantic": (Step(semantic, z_sem), Step(PlainSemantic(semantic.codebook), z_sem)),
        "hierarchical": (Step(hierarchical, z_sem, z_pix), Step(plain, z_sem, z_pix)),
    }


def step_ms(steps: tuple[Step, ...]) -> list[float]:
    """Wall-clock milliseconds of a step of each, as in a training loop: the host's work counts. Medians over turns."""
    times: list[list[float]] = [[] for _ in steps]
    gc.collect()
    for _ in range(1 + TURNS):
        for step, taken in zip(steps, times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
            taken.append(1e3 * (time.perf_counter() - start) / STEPS)
    return [statistics.median(taken[1:]) for taken in times]  # the first warms up


def run_training(report: Report) -> None:
    report.say(f"\ntraining step, wall ms: forward, backward, EMA; N {TRAINING_TOKENS}, K {CODES}, m {SUB_CODES}, D 32")
    report.say(f"{'quantizer':12} {'ours':>7} {'plain':>7} {'x plain':>7} | {'MiB':>7} {'plain':>7}")
    results = report.content["training"] = {}
    for kind, steps in training_pairs(TRAINING_TOKENS, CODES, SUB_CODES, 32, "cuda").items():
        try:
            ours, plain = step_ms(steps)
            mib = [extra_mib(lambda step=step: step() or ()) for step in steps]
        except Exception as error:
            report.say(f"{kind:12} {reason(error)}")
            continue
        results[kind] = {"ours ms": ours, "plain ms": plain, "x plain": plain / ours, "MiB": mib}
        report.say(f"{kind:12} {ours:7.3f} {plain:7.3f} {plain / ours:7.1f} | {mib[0]:7.1f} {mib[1]:7.1f}")


# ---- hier_quantize ----


@torch.no_grad()
def run_hier(report: Report, timer: Timer) -> None:
    report.say(f"\nhier_quantize, us: K {CODES}, m {SUB_CODES}, Dp {PIX_DIM}")
    report.say(f"{'N':>6} {'Ds':>3} | {'ours':>8} {'nearest':>8} {'over nearest':>12} {'x reference':>11} | {'MiB':>6}")
    results = report.content["hier"] = []
    for n, d in HIER_SHAPES:
        torch.manual_seed(0)
        z_sem, sem = (F.normalize(torch.randn(rows, d, device="cuda"), dim=1) for rows in (n, CODES))
        z_pix, pix = torch.randn(n, PIX_DIM, device="cuda"), torch.randn(CODES, SUB_CODES, PIX_DIM, device="cuda")
        inputs = z_sem, z_pix, sem, pix
        calls = {
            "ours": lambda inputs=inputs: ops.hier_quantize(*inputs),
            "nearest": lambda z=z_sem, codes=sem: ops.nearest_code(z, codes),
            "reference": lambda inputs=inputs: reference.hier_quantize(*inputs),
        }
        us, failed = race(calls, HIER_US, timer)
        for name, why in failed.items():
            report.say(f"{name}: {why}")
        if "ours" not in us or "nearest" not in us:
            continue
        mib = extra_mib(calls["ours"])
        over, times = us["ours"] / us["nearest"], ratio(us, "reference")
        results.append({"N": n, "Ds": d, "us": us, "over nearest": over, "extra MiB": mib, "x reference": times})
        figures = f"{us['ours']:8.1f} {us['nearest']:8.1f} {over:12.3f} {shown(times, '.1f'):>11}"
        report.say(f"{n:6d} {d:3d} | {figures} | {mib:6.1f}")


# ---- required figures ----

Line = tuple[str, Any, str, bool]  # what, figure, bar, whether it is reached


def acceptance(content: dict[str, Any]) -> list[Line]:
    """From the content of bench.py's results.json; a figure that was not measured is None."""
    records = {(r["N"], r["K"], r["D"]): r for r in content.get("results", [])}
    lines: list[Line] = []

    def add(what: str, figure: Any, sign: str, bar: float) -> None:
        reached = figure is not None and (figure <= bar if sign == "<=" else figure >= bar)
        lines.append((what, figure, f"{sign} {bar:g}", reached))

    wrong = [r["wrong ids"]["ours"] for r in records.values() if "wrong ids" in r]
    add(f"wrong ids on {len(wrong)} shapes", sum(wrong) if wrong else None, "<=", 0)
    for d, most_us in ((64, 300), (32, 200)):
        record = records.get((65536, CODES, d), {"us": {}})
        us, where = record["us"], f"N 65536, D {d}"
        add(f"{where}: us", us.get("ours"), "<=", most_us)
        if d == 64:
            add(f"{where}: x torch", ratio(us, "torch"), ">=", 12)
            add(f"{where}: x bf16", ratio(us, "bf16"), ">=", 4)
        percent = record.get("percent of floor")
        add(f"{where}: over the floor of its design", 100 / percent if percent else None, "<=", 2)
    for d in (32, 64):
        record = records.get((256, CODES, d), {"graph us": {}})
        add(f"N 256, D {d}, in a graph: us", record["graph us"].get("ours"), "<=", 25)
        add(f"N 256, D {d}, in a graph: x torch", ratio(record["graph us"], "torch"), ">=", 5)
    whole = next((h for h in content.get("hier", []) if (h["N"], h["Ds"]) == (65536, 32)), {})
    add("hier_quantize over nearest_code, N 65536, Ds 32", whole.get("over nearest"), "<=", 1.35)
    add("hier_quantize: extra MiB", whole.get("extra MiB"), "<=", 64)
    for kind in ("semantic", "hierarchical"):
        step = content.get("training", {}).get(kind, {})
        add(f"training step, {kind}: x plain", step.get("x plain"), ">=", 5)
    return lines


def ratio(times: dict[str, float], peer: str) -> float | None:
    return times[peer] / times["ours"] if peer in times and "ours" in times else None


def say_acceptance(report: Report) -> None:
    report.say("\nwhat is promised (K 16384)")
    for what, figure, bar, reached in acceptance(report.content):
        text = shown(figure, "d" if isinstance(figure, int) else ".2f")
        report.say(f"{what:50} {text:>10}  {bar:7} {'ok' if reached else 'MISS'}")
