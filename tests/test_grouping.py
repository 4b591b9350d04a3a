"""Flat ids and their groups: against a list of (group, place) pairs, for even and for uneven sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semhitok.grouping import Grouping


@st.composite
def groupings(draw):
    """A grouping, and the size of each of its groups."""
    if draw(st.booleans()):
        K, m = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        return Grouping(K, K * m), [m] * K
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return Grouping(len(sizes), sum(sizes), offsets), sizes


@settings(deadline=None)
@given(groupings())
def test_ids_are_numbered_group_by_group(case):
    grouping, sizes = case
    pairs = [(i, j) for i, size in enumerate(sizes) for j in range(size)]
    ids = torch.arange(len(pairs))
    group, place = grouping.split(ids)
    assert list(zip(group.tolist(), place.tolist(), strict=True)) == pairs
    assert torch.equal(grouping.join(group, place), ids) and torch.equal(grouping.group_of(ids), group)
    assert grouping.num_ids == len(pairs) and grouping.size == len(pairs) // len(sizes)
    assert grouping.sizes().tolist() == sizes
    assert grouping.bounds().tolist() == [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    assert grouping.first(torch.arange(len(sizes))).tolist() == grouping.bounds()[:-1].tolist()


@settings(deadline=None)
@given(groupings(), st.lists(st.integers(0, 2), max_size=3), st.integers(0, 2**31))
def test_ids_of_any_shape_split_and_join(case, shape, seed):
    grouping, sizes = case
    ids = torch.randint(grouping.num_ids, shape, generator=torch.Generator().manual_seed(seed))
    group, place = grouping.split(ids)
    assert group.shape == place.shape == ids.shape and group.dtype == place.dtype == torch.int64
    assert ((place >= 0) & (place < torch.tensor(sizes)[group])).all()
    assert torch.equal(grouping.join(group, place), ids)


@settings(deadline=None)
@given(groupings())
def test_ids_out_of_range_have_groups_out_of_range(case):
    grouping, sizes = case
    assert (grouping.group_of(torch.tensor([-1, -100])) < 0).all()
    assert (grouping.group_of(torch.tensor([0, 100]) + grouping.num_ids) >= len(sizes)).all()


@settings(deadline=None)
@given(groupings(), st.sampled_from([torch.int64, torch.float32, torch.bool]))
def test_values_of_groups_are_repeated_for_their_ids(case, dtype):
    grouping, sizes = case
    values = torch.arange(2 * len(sizes)).view(2, -1).to(dtype)
    expected = [[value for value, size in zip(row, sizes, strict=True) for _ in range(size)] for row in values.tolist()]
    assert grouping.repeat(values).tolist() == expected and grouping.repeat(values).dtype == dtype


UNEVEN = Grouping(3, 7, torch.tensor([0, 1, 5, 7]))


def use(ids, offsets):
    grouping = Grouping(3, 7 if offsets is not None else 6, offsets)
    group, place = grouping.split(ids)
    return group, place, grouping.join(group, place), grouping.repeat(grouping.sizes(ids.device))


class Used(torch.nn.Module):
    def __init__(self, offsets):
        super().__init__()
        self.register_buffer("offsets", offsets)

    def forward(self, ids):
        return use(ids, self.offsets)


@pytest.mark.parametrize("offsets", [None, UNEVEN.offsets])
def test_graphs_have_no_break(offsets):
    ids = torch.tensor([[0, 3], [5, 4]])
    expected = use(ids, offsets)
    compiled = torch.compile(use, fullgraph=True, backend="eager")
    assert all(map(torch.equal, compiled(ids, offsets), expected))
    exported = torch.export.export(Used(offsets), (ids,)).module()
    assert all(map(torch.equal, exported(ids), expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grouping", [Grouping(3, 6), UNEVEN])
def test_ids_on_a_gpu(grouping):
    ids = torch.arange(grouping.num_ids, device="cuda")
    for found, expected in zip(grouping.split(ids), grouping.split(ids.cpu()), strict=True):
        assert found.is_cuda and torch.equal(found.cpu(), expected)
    assert torch.equal(grouping.join(*grouping.split(ids)), ids)
    assert torch.equal(grouping.repeat(grouping.sizes("cuda")).cpu(), grouping.repeat(grouping.sizes()))
