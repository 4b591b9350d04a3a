"""The pixel stage and the gather of code rows where their kernels have corners: depths, counts, dtypes, bad values."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_checks import FLOATS, METRICS, assert_nearest, randn, same_bits, threads
from torch import Tensor

from semhitok import ops, reference

READ_CODES = 64  # sub-codes the CPU converts at a time when it cannot read them in place


def random_groups(n: int, groups: int, seed: int, device: torch.device) -> Tensor:
    return torch.randint(groups, (n,), generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [*range(1, 20), 24, 31, 32, 40, 48, 64, 65])
def test_every_depth_and_number_of_sub_codes(d: int, metric: str, device: torch.device) -> None:
    for m in (*range(1, 10), 12, 16):
        z, codes = randn(31, d, seed=d, device=device), randn(6, m, d, seed=m, device=device)
        group = random_groups(31, 6, 3, device)
        assert_nearest(z, codes[group], metric, *ops.nearest_subcode(z, codes, group, metric))


@pytest.mark.parametrize("m", [READ_CODES - 1, READ_CODES, READ_CODES + 1, 3 * READ_CODES + 5])
@pytest.mark.parametrize("d", [8, 11])
@pytest.mark.parametrize("z_dtype,code_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_many_sub_codes_of_every_dtype(
    z_dtype: torch.dtype, code_dtype: torch.dtype, d: int, m: int, device: torch.device
) -> None:
    z, codes = randn(40, d, seed=1, dtype=z_dtype, device=device), randn(3, m, d, seed=2, dtype=code_dtype)
    group = random_groups(40, 3, 4, device)
    scores, ids = ops.nearest_subcode(z, codes.to(device), group)
    assert_nearest(z, codes.to(device)[group], "l2", scores, ids)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_lowest_of_equal_sub_codes_anywhere(metric: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two copies of a code that beats all others, at every pair of places that a tile or a piece could separate."""
    for d, m in itertools.product((8, 5), (7, READ_CODES + 9)):
        z = torch.ones(1, d, dtype=dtype, device=device)
        codes = randn(1, m, d, seed=1, dtype=dtype, device=device).clamp(-0.5, 0.5)
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        for first, second in [(0, 1), (2, 3), (3, 4), (0, m - 1), (1, 6), (m - 2, m - 1), (3, m - 1)]:
            twice = codes.clone()
            twice[0, [first, second]] = 1
            assert ops.nearest_subcode(z, twice, zero, metric)[1].item() == first


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("d", [5, 8, 32])
def test_bad_values_at_every_place(d: int, metric: str, bad: float, dtype: torch.dtype, device: torch.device) -> None:
    """A bad value in a code removes that code, one in a token that token; neither affects its neighbours."""
    z, codes = randn(d, d, seed=1, dtype=dtype, device=device), randn(1, 9, d, seed=2, dtype=dtype, device=device)
    zero, place = torch.zeros(d, dtype=torch.int64, device=device), torch.arange(d, device=device)
    winner = ops.nearest_subcode(z, codes, zero, metric)[1]
    for t in range(d):  # spoil the winner of token t in component t
        spoiled = codes.clone()
        spoiled[0, winner[t], t] = bad
        scores, ids = ops.nearest_subcode(z, spoiled, zero, metric)
        others = winner != winner[t]
        assert not (ids == winner[t]).any() and not scores.isnan().any()
        assert torch.equal(ids[others], winner[others])
    z[place, place] = bad
    z = torch.cat([z, randn(1, d, seed=3, dtype=dtype, device=device)])
    scores, ids = ops.nearest_subcode(z, codes, torch.zeros(d + 1, dtype=torch.int64, device=device), metric)
    assert scores[:d].isnan().all() and (ids[:d] == 0).all() and not scores[d].isnan()


@pytest.mark.parametrize("d", [2, 8])
def test_sub_code_scores_that_overflow(d: int, device: torch.device) -> None:
    """Finite inputs whose fp32 scores are Inf and -Inf: the first Inf wins, -Inf does not."""
    big = 3e38
    codes = torch.zeros(1, 4, d, device=device)
    codes[0, 1:, 0] = torch.tensor([-1.0, big, big])
    z = torch.zeros(3, d, device=device)
    z[:, 0] = torch.tensor([big, -big, 1.0])
    zero = torch.zeros(3, dtype=torch.int64, device=device)
    scores, ids = ops.nearest_subcode(z, codes, zero, "ip")
    assert ids.tolist() == [2, 1, 2] and scores[0] == torch.inf and scores[1] == scores[2] == torch.tensor(big)
    # -|c|^2/2 overflows to -inf: such codes cannot win, and without another there is no winner.
    assert ops.nearest_subcode(z[2:], codes, zero[2:], "l2")[1].item() == 0
    scores, ids = ops.nearest_subcode(z[2:], codes[:, 2:], zero[2:], "l2")
    assert scores.isnan().item() and ids.item() == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_groups_out_of_range_beside_others(dtype: torch.dtype, device: torch.device) -> None:
    z, codes = randn(70, 16, seed=1, dtype=dtype, device=device), randn(9, 5, 16, seed=2, dtype=dtype, device=device)
    group = random_groups(70, 9, 3, device)
    expected = ops.nearest_subcode(z, codes, group)
    bad = torch.zeros(70, dtype=torch.bool, device=device)
    bad[[0, 1, 30, 68, 69]] = True
    group[bad] = torch.tensor([-1, 9, 2**62, -(2**63), 2**31], device=device)
    scores, ids = ops.nearest_subcode(z, codes, group)
    assert scores[bad].isnan().all() and (ids[bad] == 0).all()
    assert same_bits(scores[~bad], expected[0][~bad]) and torch.equal(ids[~bad], expected[1][~bad])


@pytest.mark.parametrize("sem_dtype,pix_dtype", list(itertools.product(FLOATS, FLOATS)), ids=str)
def test_lookup_is_indexing(sem_dtype: torch.dtype, pix_dtype: torch.dtype, device: torch.device) -> None:
    shapes = [(0, 1, 1, 1, 1), (1, 1, 1, 1, 3), (15, 4, 3, 7, 33), (16, 300, 1, 1, 64), (900, 50, 6, 64, 9)]
    for n, k, m, ds, dp in shapes:
        sem = randn(k, ds, seed=1, dtype=sem_dtype, device=device)
        pix = randn(k, m, dp, seed=2, dtype=pix_dtype, device=device)
        codes = torch.randint(-1, k * m + 1, (n,), generator=torch.Generator().manual_seed(3)).to(device)
        for ours, theirs in zip(ops.hier_lookup(codes, sem, pix), reference.hier_lookup(codes, sem, pix), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(9), theirs.nan_to_num(9))


def test_same_bits_with_any_number_of_threads(device: torch.device) -> None:
    """Enough tokens for several blocks, so that threads have something to share."""
    n, k, m = 30_000, 500, 12
    group, results = random_groups(n, k, 1, device), []
    sem = randn(k, 16, seed=2, device=device)
    for count in range(1, 9):
        with threads(count):
            outputs = []
            for d, dtype in [(32, torch.float32), (7, torch.float32), (16, torch.float16), (8, torch.float64)]:
                z, codes = randn(n, d, seed=3, device=device), randn(k, m, d, seed=4, dtype=dtype, device=device)
                scores, ids = ops.nearest_subcode(z, codes, group)
                outputs += [scores, ids, *ops.hier_lookup(group * m + ids, sem, codes)]
            results.append(outputs)
    for outputs in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(outputs, results[0], strict=True))
