"""Sub-codebooks of different sizes: the ops with `offsets`, on every backend they have."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import FLOATS, METRICS, assert_nearest, randn, same_bits
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from semhitok import ops, reference

# Sizes of sub-codebooks: one of all, single codes, tiles cut short (4 at a time), one beyond what is read at once (64).
SIZES = [[1], [5], [1, 1, 1], [3, 1, 4, 2, 8, 1, 7], [2, 200, 1, 65, 64, 13]]


def offsets_of(sizes: list[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], device=device)


def ids_below(high: int, n: int, seed: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [1, 5, 8, 32, 33])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_nearest_of_the_own_sub_codebook(sizes: list[int], d: int, metric: str, device: torch.device) -> None:
    k, n, offsets = len(sizes), 60, offsets_of(sizes, device)
    table, z = randn(sum(sizes), d, seed=1, device=device), randn(n, d, seed=2, device=device)
    group = ids_below(k, n, 3).to(device)
    scores, ids = ops.nearest_subcode(z, table, group, metric, offsets)
    for i, own in enumerate(table.split(sizes)):
        mine = group == i
        assert_nearest(z[mine], own, metric, scores[mine], ids[mine])
    exact = reference.nearest_subcode(z.double(), table.double(), group, metric, offsets)
    torch.testing.assert_close(scores.double(), exact[0], rtol=1e-5, atol=1e-5)
    wide = ops.nearest_subcode(z.double(), table, group, metric, offsets)
    assert torch.equal(wide[1], exact[1])


@pytest.mark.parametrize("z_dtype,dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_quantize_and_lookup_are_their_parts(z_dtype: torch.dtype, dtype: torch.dtype, device: torch.device) -> None:
    sizes = [3, 1, 4, 2, 70, 1, 7]
    offsets, k, n = offsets_of(sizes, device), len(sizes), 300
    z_sem = randn(n, 9, seed=1, dtype=z_dtype, device=device)
    z_pix = randn(n, 16, seed=2, dtype=z_dtype, device=device)
    sem, pix = randn(k, 9, seed=3, device=device), randn(sum(sizes), 16, seed=4, dtype=dtype, device=device)
    z_sem[5, 0], z_pix[6, 3] = torch.nan, torch.inf
    q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, sem, pix, offsets=offsets)
    wide = torch.float64 in (z_dtype, dtype)
    i = ops.nearest_code(z_sem.double() if wide else z_sem, sem, "ip")[1]
    j = ops.nearest_subcode(z_pix.double() if wide else z_pix, pix, i, "l2", offsets)[1]
    assert torch.equal(codes, offsets[i] + j) and i[5] == 0 and j[6] == 0
    assert q_pix.dtype == dtype and same_bits(q_sem, sem[i]) and same_bits(q_pix, pix[codes])
    expected = reference.hier_quantize(z_sem.double(), z_pix.double(), sem, pix, offsets=offsets)
    assert torch.equal(codes, expected[2])
    # Every id there is, and some that there are not.
    codes = torch.arange(-2, sum(sizes) + 3, device=device)
    codes[0], codes[-1] = -(2**63), 2**63 - 1
    looked_up = ops.hier_lookup(codes, sem, pix, offsets)
    known = (codes >= 0) & (codes < sum(sizes))
    owner = torch.repeat_interleave(torch.tensor(sizes, device=device))
    assert same_bits(looked_up[0][known], sem[owner]) and same_bits(looked_up[1][known], pix)
    assert looked_up[0][~known].isnan().all() and looked_up[1][~known].isnan().all()
    for ours, theirs in zip(looked_up, reference.hier_lookup(codes, sem, pix, offsets), strict=True):
        assert torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_sizes_give_the_bits_of_a_fixed_size(dtype: torch.dtype, device: torch.device) -> None:
    for k, m, d in [(40, 12, 32), (7, 1, 8), (3, 70, 11), (20, 9, 16)]:
        offsets = torch.arange(k + 1, device=device) * m
        z, group = randn(200, d, seed=1, dtype=dtype, device=device), ids_below(k + 1, 200, 2, -1).to(device)
        sem, pix = randn(k, d, seed=3, device=device), randn(k, m, d, seed=4, dtype=dtype, device=device)
        flat, codes = pix.flatten(0, 1), ids_below(k * m + 1, 99, 5, -1).to(device)
        fixed = [*ops.nearest_subcode(z, pix, group), *ops.hier_quantize(z, z, sem, pix)]
        own = [*ops.nearest_subcode(z, flat, group, offsets=offsets),
               *ops.hier_quantize(z, z, sem, flat, offsets=offsets)]  # fmt: skip
        fixed += ops.hier_lookup(codes, sem, pix)
        own += ops.hier_lookup(codes, sem, flat, offsets)
        assert all(same_bits(a, b) for a, b in zip(own, fixed, strict=True))


def test_ties_bad_codes_and_groups_out_of_range(device: torch.device) -> None:
    sizes = [2, 9, 1, 5]
    offsets, one = offsets_of(sizes, device), torch.ones(1, 8, device=device)
    for i, size in enumerate(sizes):
        for pair in itertools.combinations(range(size), 2):
            table = randn(17, 8, seed=1, device=device).clamp(-0.5, 0.5)
            table[int(offsets[i]) + torch.tensor(pair, device=device)] = 1
            group = torch.tensor([i], device=device)
            assert ops.nearest_subcode(one, table, group, "l2", offsets)[1].item() == pair[0]
    table = randn(17, 8, seed=1, device=device)
    table[11] = torch.nan  # the only code of its sub-codebook
    group = torch.tensor([0, 2, 3, -1, 4, 2**62, -(2**63)], device=device)
    for dtype in (torch.float32, torch.float64):
        scores, ids = ops.nearest_subcode(one.to(dtype).expand(7, 8), table, group, "l2", offsets)
        assert scores.isnan().tolist() == [False, True, False, True, True, True, True]
        assert (ids[scores.isnan()] == 0).all()


def test_golden_ids(device: torch.device) -> None:
    """Integers, so that every backend and machine must agree."""
    sizes = [1, 6, 2, 3]
    offsets, n = offsets_of(sizes, device), 16
    t = torch.arange(n * 4, device=device)
    z = ((t * 37 + 11) % 23 - 11).view(n, 4).float()
    pix = ((torch.arange(12 * 4, device=device) * 29 + 5) % 19 - 9).view(12, 4).float()
    sem = ((torch.arange(4 * 4, device=device) * 17 + 3) % 13 - 6).view(4, 4).float()
    codes = ops.hier_quantize(z, z.flip(-1), sem, pix, offsets=offsets)[2]
    assert codes.tolist() == [8, 10, 0, 8, 0, 10, 4, 8, 10, 7, 9, 0, 10, 5, 0, 3]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), n=st.integers(0, 50), d=st.integers(1, 40),
    z=st.sampled_from(FLOATS), pix=st.sampled_from(FLOATS), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_property_round_trip(sizes: list[int], n: int, d: int, z: torch.dtype, pix: torch.dtype, seed: int) -> None:
    """Ids lie in the sub-codebook of their semantic code, and quantising rows by distance gives them back."""
    offsets, k = offsets_of(sizes), len(sizes)
    sem, table = randn(k, 6, seed=seed), randn(sum(sizes), d, seed=seed + 1, dtype=pix)
    z_sem, z_pix = randn(n, 6, seed=seed + 2), randn(n, d, seed=seed + 3, dtype=z)
    q_sem, q_pix, codes = ops.hier_quantize(z_sem, z_pix, sem, table, "l2", "l2", offsets)
    i = torch.searchsorted(offsets, codes, right=True) - 1
    assert ((codes >= 0) & (codes < sum(sizes))).all() and same_bits(q_sem, sem[i])
    looked_up = ops.hier_lookup(codes, sem, table, offsets)
    assert same_bits(looked_up[0], q_sem) and same_bits(looked_up[1], q_pix)
    again = ops.hier_quantize(q_sem, q_pix, sem, table, "l2", "l2", offsets)
    assert ((again[1].double() - q_pix.double()).abs() <= 1e-5 * (1 + q_pix.double().abs())).all()


# ---- inside PyTorch ----


def arguments(name: str, n: int, device: torch.device, dtype: torch.dtype, grad: bool = False) -> tuple[object, ...]:
    def leaf(*shape: int, seed: int) -> Tensor:
        return randn(*shape, seed=seed, dtype=dtype, device=device).requires_grad_(grad)

    offsets, ids = offsets_of([2, 1, 5, 3], device), torch.arange(n, device=device)
    if name == "nearest_subcode":
        return leaf(n, 5, seed=1), leaf(11, 5, seed=2), ids % 4, "l2", offsets
    if name == "hier_quantize":
        return leaf(n, 6, seed=1), leaf(n, 5, seed=2), leaf(4, 6, seed=3), leaf(11, 5, seed=4), "ip", "l2", offsets
    return ids * 5 % 11, leaf(4, 6, seed=3), leaf(11, 5, seed=4), offsets


@pytest.mark.parametrize("name", ["nearest_subcode", "hier_quantize", "hier_lookup"])
def test_opcheck_and_gradcheck(name: str, device: torch.device) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for n, dtype in ((0, torch.float32), (9, torch.bfloat16), (9, torch.float32)):
        opcheck(getattr(torch.ops.semhitok, name).default, arguments(name, n, device, dtype, True), test_utils=checks)
    arguments64 = list(arguments(name, 9, device, torch.float64, True))
    leaves = [i for i, a in enumerate(arguments64) if isinstance(a, Tensor) and a.requires_grad]
    if name == "hier_quantize":
        leaves = leaves[2:]  # constant in z, by contract

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(arguments64)
        for i, tensor in zip(leaves, tensors, strict=True):
            given[i] = tensor
        return tuple(o for o in getattr(ops, name)(*given) if o.is_floating_point())

    inputs = [arguments64[i] for i in leaves]
    assert gradcheck(call, inputs) and gradgradcheck(call, inputs)


def test_autocast_and_compile(device: torch.device) -> None:
    def both(z: Tensor, sem: Tensor, pix: Tensor, offsets: Tensor) -> tuple[Tensor, ...]:
        q_sem, q_pix, codes = ops.hier_quantize(z, z, sem, pix, offsets=offsets)
        r_sem, r_pix = ops.hier_lookup(codes, sem, pix, offsets)
        scores, _ = ops.nearest_subcode(z, pix, codes % 4, "l2", offsets)
        return q_sem + r_sem, q_pix + r_pix, scores, codes

    inputs = [randn(9, 6, seed=1, device=device), randn(4, 6, seed=2, device=device), randn(11, 6, seed=3).to(device)]
    offsets = offsets_of([2, 1, 5, 3], device)
    plain = both(*inputs, offsets)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert all(same_bits(a, b) for a, b in zip(both(*inputs, offsets), plain, strict=True))
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = []
    for function in (both, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        outputs = function(*leaves, offsets)
        assert torch.equal(outputs[3], plain[3])
        sum(o.sum() for o in outputs[:3]).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- errors ----

Z, TABLE, SEM, GROUP = torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64)
MANY = torch.zeros(8, dtype=torch.int64)


def bounds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


ERRORS = [  # the first ones also without data
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", bounds(0, 2, 6).int()), "offsets: expected int64, got int32"),
    (ops.nearest_subcode, (Z, TABLE[None], GROUP, "l2", bounds(0, 6)),
     "sub_codebooks: expected 2 dimensions [T, D] (with offsets), got 3"),
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", bounds(0)),
     "offsets: expected shape [K + 1] with K of at least 1, got [1]"),
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", bounds(0, 2, 6)[None]),
     "offsets: expected shape [K + 1] with K of at least 1, got [1, 3]"),
    (ops.hier_quantize, (Z, Z, SEM, TABLE, "ip", "l2", bounds(0, 2, 6)),
     "offsets: expected shape [4] (sem_codebook.shape[0] + 1), got [3]"),
    (ops.hier_lookup, (GROUP, SEM, TABLE, bounds(0, 2, 3, 4, 6)),
     "offsets: expected shape [4] (sem_codebook.shape[0] + 1), got [5]"),
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", MANY),
     "sub_codebooks: expected at least 7 rows (offsets.shape[0] - 1, one a sub-codebook), got 6"),
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", bounds(1, 2, 6)), "offsets: expected to begin with 0, got 1"),
    (ops.nearest_subcode, (Z, TABLE, GROUP, "l2", bounds(0, 2, 7)),
     "offsets: expected to end with 6 (sub_codebooks.shape[0]), got 7"),
    (ops.hier_lookup, (GROUP, SEM, TABLE, bounds(0, 2, 5, 5)),
     "offsets: expected to end with 6 (pix_codebook.shape[0]), got 5"),
    (ops.hier_quantize, (Z, Z, SEM, TABLE, "ip", "l2", bounds(0, 2, 2, 6)),
     "offsets: expected each greater than the one before, got 2 and 2 at 1 and 2"),
    (ops.hier_lookup, (GROUP, SEM, TABLE, bounds(0, 9, 4, 6)),
     "offsets: expected each greater than the one before, got 9 and 4 at 1 and 2"),
]  # fmt: skip


@pytest.mark.parametrize("op,args,message", ERRORS, ids=[e[2][:60] for e in ERRORS])
def test_bad_offsets_are_named(op, args, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        op(*args)
    assert str(error.value).splitlines()[0] == message


@pytest.mark.parametrize("op,args,message", ERRORS[:6], ids=[e[2][:60] for e in ERRORS[:6]])
def test_fake_tensors_give_the_same_errors(op, args, message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert message in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_offsets_on_another_device_and_bad_ones_on_a_gpu() -> None:
    z, table, sem, group = (x.cuda() for x in (Z, TABLE, SEM, GROUP))
    with pytest.raises(RuntimeError, match=r"offsets: expected device cuda:0 \(that of z\), got cpu"):
        ops.nearest_subcode(z, table, group, "l2", bounds(0, 2, 6))
    for bad in (bounds(5, 2, 2**62, -7), bounds(9, 9, 9, 9), bounds(-1, -1, -1, -1)):
        codes = ops.hier_quantize(z, z, sem, table, offsets=bad.cuda())[2]
        assert ((codes >= 0) & (codes < 6)).all()
        ops.hier_lookup(codes, sem, table, bad.cuda())
        ops.nearest_subcode(z, table.requires_grad_(), group, "l2", bad.cuda())[0].nansum().backward()
        torch.cuda.synchronize()
