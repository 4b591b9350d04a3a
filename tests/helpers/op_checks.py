"""How an op's result is judged against float64, and inputs of any shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

EPS32 = 2.0**-23
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METRICS = ["ip", "l2"]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch works with `count` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scores64(z: Tensor, codes: Tensor, metric: str) -> Tensor:
    """z[N, D], codes[K, D] or [N, m, D] -> scores [N, K or m] in float64, on the CPU."""
    z, codes = z.detach().double().cpu(), codes.detach().double().cpu()
    products = z @ codes.T if codes.dim() == 2 else torch.einsum("nd,nmd->nm", z, codes)
    return products if metric == "ip" else products - codes.square().sum(-1) / 2


def tolerance(z: Tensor, codes: Tensor) -> Tensor:
    """[N]: a bound on the rounding of an fp32 score, from the sizes of what is summed."""
    z, codes = z.detach().double().cpu(), codes.detach().double().cpu()
    depth, largest = z.shape[-1], codes.norm(dim=-1).amax(-1)
    return EPS32 * (depth + 4) * (z.norm(dim=-1) * largest + largest.square() / 2)


def assert_nearest(z: Tensor, codes: Tensor, metric: str, scores: Tensor, ids: Tensor) -> None:
    """The rule of the kernels: the score reached is the maximum but for rounding, and so is the id where none is close.

    z[N, D], codes[K, D] or per token [N, m, D], scores[N], ids[N].
    """
    assert ids.dtype == torch.int64 and ids.shape == scores.shape == z.shape[:-1]
    if len(z) == 0:
        return
    exact, scores, ids = scores64(z, codes, metric), scores.detach().double().cpu(), ids.cpu()
    tol = tolerance(z, codes)
    best, winner = exact.max(-1)
    reached = exact.gather(-1, ids[:, None])[:, 0]
    assert (reached >= best - 2 * tol).all()
    assert ((scores - reached).abs() <= tol).all()
    if exact.shape[-1] > 1:
        clear = best - exact.topk(2, -1).values[:, 1] > 2 * tol
        assert (ids == winner)[clear].all()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
