"""The ops inside PyTorch: gradients, opcheck, autocast, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_checks import randn, same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from semhitok import ops, reference

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
NAMES = ["nearest_code", "nearest_subcode", "hier_quantize", "hier_lookup", "segment_sum"]


def arguments(
    name: str, n: int, device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False
) -> tuple[object, ...]:
    """Small inputs of an op, with codes so far apart that a step of a numerical gradient changes no winner."""

    def leaf(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, dtype=dtype, device=device).requires_grad_(grad)

    ids = torch.arange(n, device=device)
    if name == "nearest_code":
        return leaf(n, 6, seed=1), leaf(7, 6, seed=2), "l2"
    if name == "nearest_subcode":
        return leaf(n, 5, seed=1), leaf(4, 3, 5, seed=2), ids % 4, "ip"
    if name == "hier_quantize":
        return leaf(n, 6, seed=1), leaf(n, 5, seed=2), leaf(4, 6, seed=3), leaf(4, 3, 5, seed=4), "ip", "l2"
    if name == "hier_lookup":
        return ids * 5 % 12, leaf(4, 6, seed=3), leaf(4, 3, 5, seed=4)
    return leaf(n, 5, seed=1), ids % 3, 4


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("n", [0, 9])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, n: int, grad: bool, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(name, n, device, dtype, grad)
        opcheck(getattr(torch.ops.semhitok, name).default, args, test_utils=OPCHECKS)


def floats_of(name: str) -> Callable[..., object]:
    """The op as a function of its differentiable inputs only, its differentiable outputs only."""

    def call(*tensors: Tensor) -> object:
        if name == "hier_quantize":
            z = [randn(6, 6, seed=1, dtype=torch.float64), randn(6, 5, seed=2, dtype=torch.float64)]
            z = [t.to(tensors[0].device) for t in z]
            return ops.hier_quantize(*z, *tensors)[:2]
        args = list(arguments(name, 6, tensors[0].device, torch.float64))
        floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
        for i, tensor in zip(floats, tensors, strict=True):
            args[i] = tensor
        outputs = getattr(ops, name)(*args)
        return tuple(o for o in outputs if o.is_floating_point())

    return call


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str, device: torch.device) -> None:
    inputs = [a for a in arguments(name, 6, device, torch.float64, True) if isinstance(a, Tensor) and a.requires_grad]
    if name == "hier_quantize":
        inputs = inputs[2:]  # constant in z, by contract: tested below
    assert gradcheck(floats_of(name), inputs)
    assert gradgradcheck(floats_of(name), inputs)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_score_gradients_are_those_of_the_reference(metric: str, device: torch.device) -> None:
    def leaves() -> tuple[Tensor, Tensor]:
        z, codebook = randn(50, 8, seed=1, device=device), randn(30, 8, seed=2, device=device)
        return z.requires_grad_(), codebook.requires_grad_()

    weight = randn(50, seed=3, device=device)
    ours, theirs = leaves(), leaves()
    (ops.nearest_code(*ours, metric)[0] * weight).sum().backward()
    (reference.nearest_code(*theirs, metric)[0] * weight).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_quantize_is_constant_in_z(device: torch.device) -> None:
    z_sem, z_pix, sem, pix, *metrics = arguments("hier_quantize", 6, device, grad=True)
    q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, sem, pix, *metrics)
    assert not codes.requires_grad
    (q_sem.sum() + q_pix.sum()).backward()
    assert z_sem.grad is None and z_pix.grad is None
    assert torch.equal(sem.grad[:, 0], torch.bincount(codes // 3, minlength=4).float())
    assert torch.equal(pix.grad.flatten(0, 1)[:, 0], torch.bincount(codes, minlength=12).float())


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_rows_without_a_winner_have_no_gradient(metric: str, device: torch.device) -> None:
    z, codebook = randn(4, 3, seed=1, device=device), randn(5, 3, seed=2, device=device)
    z[1, 0], codebook[0, 1] = torch.nan, torch.inf
    z.requires_grad_(), codebook.requires_grad_()
    scores, _ = ops.nearest_code(z, codebook, metric)
    scores.backward(torch.ones_like(scores))
    assert (z.grad[1] == 0).all() and z.grad.isfinite().all()
    assert (codebook.grad[0] == 0).all() and codebook.grad.isfinite().all()
    sub = randn(2, 3, 3, seed=3, device=device).requires_grad_()
    scores, _ = ops.nearest_subcode(z, sub, torch.tensor([0, 0, 5, -1], device=device), metric)
    scores.backward(torch.ones_like(scores))
    assert sub.grad.isfinite().all() and (sub.grad[1] == 0).all()


def test_ids_out_of_range_have_no_gradient(device: torch.device) -> None:
    sem, pix = randn(2, 3, seed=1, device=device), randn(2, 2, 3, seed=2, device=device)
    sem.requires_grad_(), pix.requires_grad_()
    q_sem, q_pix = ops.hier_lookup(torch.tensor([3, -1, 4], device=device), sem, pix)
    (q_sem[0].sum() + q_pix[0].sum() + 0 * q_sem.nan_to_num().sum() + 0 * q_pix.nan_to_num().sum()).backward()
    assert sem.grad.tolist() == [[0.0] * 3, [1.0] * 3]
    assert pix.grad.flatten(0, 1)[:, 0].tolist() == [0, 0, 0, 1]
    q_sem, q_pix = ops.hier_lookup(torch.tensor([-1, 4], device=device), sem, pix)
    for gradient in torch.autograd.grad((q_sem, q_pix), (sem, pix), (torch.ones_like(q_sem), torch.ones_like(q_pix))):
        assert (gradient == 0).all()
    values = randn(3, 2, seed=3, device=device).requires_grad_()
    ops.segment_sum(values, torch.tensor([1, -1, 2], device=device), 2)[0].sum().backward()
    assert values.grad.tolist() == [[1, 1], [0, 0], [0, 0]]
    values.grad = None
    ops.segment_sum(values, torch.tensor([0, 0, 0], device=device), 0)[0].sum().backward()
    assert (values.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_have_the_dtype_of_their_input(name: str, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments(name, 9, device, dtype, grad=True)
    outputs = getattr(ops, name)(*args)
    sum(o.float().sum() for o in outputs if o.requires_grad).backward()
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    assert any(leaf.grad is not None for leaf in leaves)
    assert all(leaf.grad is None or leaf.grad.dtype == dtype for leaf in leaves)


def test_one_of_two_inputs_needs_a_gradient(device: torch.device) -> None:
    for wanted in (0, 1):
        inputs = [randn(5, 3, seed=1, device=device), randn(4, 3, seed=2, device=device)]
        inputs[wanted].requires_grad_()
        ops.nearest_code(*inputs)[0].sum().backward()
        assert inputs[wanted].grad is not None and inputs[1 - wanted].grad is None


@pytest.mark.parametrize("name", NAMES)
def test_autocast_searches_in_fp32(name: str, device: torch.device) -> None:
    args = arguments(name, 9, device)
    expected = getattr(ops, name)(*args)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert all(same_bits(a, b) for a, b in zip(getattr(ops, name)(*args), expected, strict=True))
        low = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        assert all(o.dtype in (torch.float32, torch.int64) for o in getattr(ops, name)(*low))


def every_op(z: Tensor, sem: Tensor, pix: Tensor) -> tuple[Tensor, ...]:
    scores, ids = ops.nearest_code(z, sem, "l2")
    sub_scores, _ = ops.nearest_subcode(z, pix, ids)
    q_sem, q_pix, codes = ops.hier_quantize(z, z, sem, pix)
    r_sem, r_pix = ops.hier_lookup(codes, sem, pix)
    sums, counts = ops.segment_sum(z, ids, sem.shape[0])
    return scores + sub_scores, q_sem * 2 + r_sem, q_pix + r_pix, sums, counts, codes


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend: str, dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(every_op, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (11, 23) if dynamic else (11,):
        inputs = [randn(n, 6, seed=1, device=device), randn(9, 6, seed=2, device=device)]
        inputs.append(randn(9, 4, 6, seed=3, device=device))
        ours = [t.clone().requires_grad_() for t in inputs]
        eager = [t.clone().requires_grad_() for t in inputs]
        a, b = compiled(*ours), every_op(*eager)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)
        for outputs in (a, b):
            sum(o.sum() for o in outputs[:4]).backward()
        for x, y in zip(ours, eager, strict=True):
            torch.testing.assert_close(x.grad, y.grad)


def test_export_with_dynamic_tokens(device: torch.device) -> None:
    class Module(torch.nn.Module):
        def forward(self, z: Tensor, sem: Tensor, pix: Tensor) -> tuple[Tensor, ...]:
            return every_op(z, sem, pix)

    codebooks = randn(9, 6, seed=2, device=device), randn(9, 4, 6, seed=3, device=device)
    tokens = torch.export.Dim("tokens", min=2)
    exported = torch.export.export(
        Module(), (randn(11, 6, seed=1, device=device), *codebooks), dynamic_shapes=({0: tokens}, None, None)
    )
    for n in (11, 40):
        z = randn(n, 6, seed=4, device=device)
        for a, b in zip(exported.module()(z, *codebooks), every_op(z, *codebooks), strict=True):
            torch.testing.assert_close(a, b)
