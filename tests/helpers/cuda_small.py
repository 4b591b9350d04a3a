"""Every op and every search of nearest_code once, on small odd shapes, against float64: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python tests/helpers/cuda_small.py [op | a search's name ...]

The references run on the CPU, so that nearly all kernels seen are ours. Exit status 1 when a result is off; a search
that refuses a shape says so and does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from op_checks import assert_nearest, randn

from semhitok import _C, ops, reference

SEARCHES = tuple(_C.cuda_searches())
SHAPES = [(1, 1, 1), (3, 129, 7), (65, 300, 33), (130, 513, 16), (257, 1025, 48), (40, 200, 100)]  # N, K, D
DEVICE = "cuda"


def run_search(name: str) -> None:
    for place, (n, k, d) in enumerate(SHAPES):
        metric = ("ip", "l2")[place % 2]
        z, codebook = randn(n, d, seed=1, device=DEVICE), randn(k, d, seed=2, device=DEVICE)
        try:
            scores, ids, _ = torch.ops.semhitok.nearest_code_probe(z, codebook, metric, name)
        except RuntimeError as error:
            print(f"{name} {n}x{k}x{d}: {str(error).splitlines()[0]}")
            continue
        assert_nearest(z, codebook, metric, scores, ids)


def every_op() -> None:
    for n, k, m, ds, dp in [(1, 1, 1, 1, 1), (67, 33, 5, 9, 3), (300, 200, 12, 32, 32)]:
        z_sem, z_pix, sem, pix = (
            randn(n, ds, seed=1),
            randn(n, dp, seed=2),
            randn(k, ds, seed=3),
            randn(k, m, dp, seed=4),
        )
        on_device = [t.to(DEVICE) for t in (z_sem, z_pix, sem, pix)]
        scores, i = ops.nearest_code(on_device[0], on_device[2])
        assert_nearest(z_sem, sem, "ip", scores, i)
        sub_scores, j = ops.nearest_subcode(on_device[1], on_device[3], i)
        assert_nearest(z_pix, pix[i.cpu()], "l2", sub_scores, j)
        q_sem, q_pix, codes = (t.cpu() for t in ops.hier_quantize(*on_device))
        assert torch.equal(codes, (i * m + j).cpu())
        looked_up = [t.cpu() for t in ops.hier_lookup(codes.to(DEVICE), *on_device[2:])]
        assert torch.equal(looked_up[0], q_sem) and torch.equal(looked_up[1], q_pix)
        assert torch.equal(q_sem, sem[i.cpu()]) and torch.equal(q_pix, pix.flatten(0, 1)[codes])
        # The same table cut into sub-codebooks of different sizes: of the first group all that others can spare.
        offsets = torch.arange(k + 1) + (m - 1) * k * (torch.arange(k + 1) > 0)
        table = pix.flatten(0, 1)
        own = [*on_device[:3], table.to(DEVICE)]
        codes = ops.hier_quantize(*own, offsets=offsets.to(DEVICE))[2]
        expected_codes = reference.hier_quantize(z_sem.double(), z_pix.double(), sem, table, offsets=offsets)[2]
        assert (codes.cpu() == expected_codes).double().mean() > 0.98
        looked_up = ops.hier_lookup(codes, *own[2:], offsets.to(DEVICE))
        assert torch.equal(looked_up[1].cpu(), table[codes.cpu()])
        sums, counts = (t.cpu() for t in ops.segment_sum(on_device[0], i, k))
        expected, expected_counts = reference.segment_sum(z_sem, i.cpu(), k)
        assert torch.equal(counts, expected_counts)
        torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)


def main() -> int:
    parts: dict[str, Callable[[], None]] = {"op": every_op}
    parts |= {name: lambda name=name: run_search(name) for name in SEARCHES}
    failed = 0
    for name in sys.argv[1:] or parts:
        try:
            parts[name]()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            print(f"{name}: ok", flush=True)
        except Exception as error:  # the other parts are worth a look too
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
