"""Memory and time of the next-token loss over a unified vocabulary, against logits that exist at once.

    python -m benchmarks.mllm.loss_memory

A step is loss and gradients of 4,096 tokens over 152,064 text ids and 196,608 image ids. Memory is the growth of the
process's peak resident size over the step, in a process of its own. What counts: everything but the head's weights,
which are there before, and their gradients, which have their size whatever way they are made in. "frozen" is the same
with heads that need no gradient. The plain computation holds logits several times; it runs at --plain ids only, where
its loss and gradients are compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from time import perf_counter

import torch

from benchmarks.processes import printed
from benchmarks.training.quantizer_share import peak
from semhitok.mllm.loss import linear_cross_entropy

BAR_MEMORY, BAR_ERROR = 1024, 1e-5  # MiB; largest difference to the plain computation


def plain(hidden: torch.Tensor, weights: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden @ torch.cat(weights).T, targets, reduction="none")


def inputs(args: argparse.Namespace, image_ids: int, frozen: bool) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.width, generator=generator).requires_grad_()
    # Logits of standard deviation 1, as those of a model that has learnt little.
    sizes = (args.text_ids if image_ids == args.image_ids else image_ids, image_ids)
    weights = [torch.randn(n, args.width, generator=generator).div_(args.width**0.5) for n in sizes]
    targets = torch.randint(sum(sizes), (args.tokens,), generator=generator)
    return hidden, [w.requires_grad_(not frozen) for w in weights], targets


def measure(name: str, image_ids: int, args: argparse.Namespace) -> dict[str, float]:
    hidden, weights, targets = inputs(args, image_ids, name == "frozen")
    loss = plain if name == "plain" else linear_cross_entropy
    loss(hidden[:8], [w[:64] for w in weights], targets[:8] % 128).mean().backward()  # what is taken once
    for leaf in [hidden, *weights]:
        leaf.grad = None
    return cost(lambda: loss(hidden, weights, targets).mean().backward(), weights)


def cost(step: Callable[[], None], weights: Iterable[torch.Tensor]) -> dict[str, float]:
    """In this process: MiB of a step beyond the weights' gradients, MiB of these, and seconds."""
    begun = perf_counter()
    grown = peak(step, "cpu")
    seconds = perf_counter() - begun
    gradients = sum(w.grad.numel() * 4 for w in weights if w.grad is not None) / 2**20
    return {"MiB": grown - gradients, "gradients": gradients, "s": seconds}


def difference(args: argparse.Namespace) -> float:
    """Largest of: loss, and gradients over their largest number, ours against plain."""
    results = []
    for loss in (linear_cross_entropy, plain):
        hidden, weights, targets = inputs(args, args.plain, False)
        value = loss(hidden, weights, targets).mean()
        value.backward()
        results.append([value.detach(), hidden.grad, *(w.grad for w in weights)])
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*results, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=896, help="of the LLM (default: %(default)s)")
    parser.add_argument("--text-ids", type=int, default=152064)
    parser.add_argument("--image-ids", type=int, default=196608)
    parser.add_argument("--plain", type=int, default=8192, help="ids of each head for the plain computation")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        print(json.dumps(measure(args.measure[0], int(args.measure[1]), args)))
        return 0
    print(f"torch {torch.__version__}, CPU, {args.threads} threads; {args.tokens} tokens, width {args.width}\n")
    print(f"{'loss':8} {'ids':>8}  {'MiB':>8}  {'gradients of heads, MiB':>24}  {'s':>7}")
    missed = False
    rows = [(name, args.plain) for name in ("plain", "ours")] + [(name, args.image_ids) for name in ("ours", "frozen")]
    for name, image_ids in rows:
        keys = ("tokens", "width", "text_ids", "image_ids", "threads")
        sizes = [f"--{key.replace('_', '-')}={getattr(args, key)}" for key in keys]
        got = json.loads(printed(__spec__.name, "--measure", name, str(image_ids), *sizes))
        total = image_ids + (args.text_ids if image_ids == args.image_ids else image_ids)
        verdict = "" if image_ids == args.plain else ("ok" if got["MiB"] <= BAR_MEMORY else "MISS")
        missed |= verdict == "MISS"
        print(f"{name:8} {total:8}  {got['MiB']:8.1f}  {got['gradients']:24.1f}  {got['s']:7.1f}  {verdict}")
    error = difference(args)
    missed |= not error <= BAR_ERROR
    print(f"\nlargest difference to the plain computation, loss and gradients: {error:.1e}")
    print(f"bars: {BAR_MEMORY} MiB, {BAR_ERROR:.0e}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
