"""The codebook modules: what they promise about gradients, updates, initialisation and restarts."""

import doctest
import inspect
import math
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from semhitok import clustering, distributed
from semhitok.clustering import allocate, cut_cells, grouped_kmeans, spherical_kmeans
from semhitok.ops import nearest_subcode
from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


def test_semantic_forward_is_the_nearest_code_and_passes_gradient_straight_through():
    quantizer = SemanticQuantizer(32, 8)
    z = unit(3, 5, 8).requires_grad_()
    q, codes, commitment = quantizer(z)
    expected = (z.double() @ quantizer.codebook.double().T).argmax(-1)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(q, quantizer.codebook[codes], atol=1e-6, rtol=0)
    weights = torch.randn(q.shape, generator=generator(1))
    (gradient,) = torch.autograd.grad((q * weights).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    by_hand = (z - quantizer.codebook[codes]).square().mean()
    torch.testing.assert_close(commitment, by_hand)
    assert torch.autograd.grad(commitment, z)[0].abs().sum() > 0


def test_semantic_forward_never_changes_the_codebook():
    quantizer = SemanticQuantizer(16, 4).train()
    before = quantizer.codebook.clone()
    quantizer(unit(100, 4))
    assert torch.equal(quantizer.codebook, before)


def test_norm_ema_is_the_formula():
    quantizer = SemanticQuantizer(3, 4, decay=0.9)
    w = quantizer.codebook.clone()
    z = unit(5, 4, seed=2)
    codes = torch.tensor([0, 0, 2, 0, 2])
    quantizer.update(z, codes)
    for code in (0, 2):
        expected = F.normalize(0.9 * w[code] + 0.1 * z[codes == code].mean(0), dim=-1)
        torch.testing.assert_close(quantizer.codebook[code], expected)
    assert torch.equal(quantizer.codebook[1], w[1])
    assert quantizer.misses.tolist() == [0, 5, 0]


def test_norm_ema_does_not_depend_on_how_many_tokens_a_code_has():
    z = unit(4, 4)
    one, many = SemanticQuantizer(2, 4), SemanticQuantizer(2, 4)
    many.codebook.copy_(one.codebook)
    one.update(z, torch.zeros(4, dtype=torch.int64))
    many.update(z.repeat(10, 1), torch.zeros(40, dtype=torch.int64))
    torch.testing.assert_close(one.codebook, many.codebook)


def test_a_dead_semantic_code_is_restarted_after_its_window_and_not_before():
    quantizer = SemanticQuantizer(4, 8)
    z = unit(40, 8)
    codes = torch.zeros(40, dtype=torch.int64)
    before = quantizer.codebook.clone()
    quantizer.update(z, codes)
    assert int(quantizer.restart(z, 11, generator=generator())) == 0  # 40 < 11 * 4
    assert int(quantizer.restart(z, 10, generator=generator())) == 3
    assert not torch.equal(quantizer.codebook[1:], before[1:])
    for code in quantizer.codebook[1:]:
        assert (z == code).all(-1).any()
    assert quantizer.misses.tolist() == [0, 0, 0, 0]


def test_spherical_kmeans_converges_to_a_fixed_point_better_than_its_start():
    x = unit(600, 6)
    start, found = (spherical_kmeans(x, 12, n, generator=generator(3)) for n in (0, 60))
    assert (x @ found.T).max(-1).values.mean() > (x @ start.T).max(-1).values.mean() + 0.03
    ids = (x @ found.T).argmax(-1)
    means = torch.stack([F.normalize(x[ids == k].mean(0), dim=-1) for k in range(12)])
    torch.testing.assert_close(found, means, atol=1e-4, rtol=0)


def test_spherical_kmeans_of_duplicates_leaves_no_zero_centre():
    x = unit(2, 4).repeat(8, 1)
    found = spherical_kmeans(x, 5, 5, generator=generator())
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5))


def test_kmeans_needs_enough_vectors():
    with pytest.raises(ValueError, match=r"expected at least as many vectors as codes \(9\), got 8"):
        spherical_kmeans(unit(8, 4), 9, 1, generator=generator())


@pytest.mark.parametrize("offsets", [None, torch.tensor([0, 12])])
def test_kmeans_of_a_single_group_gives_what_it_gives_beside_another_group(offsets):
    x, group = torch.randn(600, 6, generator=generator()), torch.zeros(600, dtype=torch.int64)
    start = x[None, :12]
    expected = grouped_kmeans(torch.cat([start, start + 1]), x, group, 10)[0]
    found = grouped_kmeans(start if offsets is None else start[0], x, group, 10, offsets)
    torch.testing.assert_close(found.view(12, 6), expected)
    assert (torch.cdist(x, expected).min(-1).values.mean() / torch.cdist(x, start[0]).min(-1).values.mean()) < 0.9


def hierarchical(K=6, m=3, Ds=8, Dp=5):
    torch.manual_seed(0)
    return HierarchicalQuantizer(K, m, Ds, Dp)


def test_hierarchical_ids_are_the_two_nearest_searches():
    quantizer = hierarchical()
    z_sem, z_pix = unit(2, 7, 8), torch.randn(2, 7, 5, generator=generator(1))
    out = quantizer(z_sem, z_pix)
    i = (z_sem.double() @ quantizer.semantic.codebook.double().T).argmax(-1)
    sub = quantizer.pix_codebook[i].double()
    j = (z_pix.double().unsqueeze(-2) - sub).square().sum(-1).argmin(-1)
    assert torch.equal(out.codes, i * 3 + j)
    q_pix = quantizer.pix_codebook[i, j]
    torch.testing.assert_close(out.q_pix, q_pix, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.commitment, (z_pix - q_pix).square().mean())
    q_sem, looked_up = quantizer.lookup(out.codes)
    assert torch.equal(looked_up, q_pix)
    assert torch.equal(q_sem, quantizer.semantic.codebook[i])


@pytest.mark.parametrize("adaptive", [False, True])
def test_known_semantic_codes_give_what_their_search_gives(adaptive):
    quantizer = HierarchicalQuantizer(8, 4, 6, 5, adaptive=adaptive)
    if adaptive:
        quantizer.offsets[1:-1] = torch.tensor([1, 3, 4, 10, 12, 20, 31])
    z_sem, z_pix = unit(2, 7, 6), torch.randn(2, 7, 5, generator=generator(1)).requires_grad_()
    expected = quantizer(z_sem, z_pix)
    codes = quantizer.split(expected.codes)[0]
    found = quantizer.within(codes, z_pix)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    weights = torch.randn(2, 7, 5, generator=generator(2))
    gradients = [torch.autograd.grad((x.q_pix * weights).sum() + x.commitment, z_pix)[0] for x in (found, expected)]
    assert torch.equal(*gradients)


def test_hierarchical_gradients_go_where_they_should():
    quantizer = hierarchical()
    z_sem, z_pix = unit(9, 8), torch.randn(9, 5, generator=generator(1)).requires_grad_()
    out = quantizer(z_sem, z_pix)
    weights = torch.randn(9, 5, generator=generator(2))
    (gradient,) = torch.autograd.grad((out.q_pix * weights).sum(), z_pix, retain_graph=True)
    torch.testing.assert_close(gradient, weights)
    (gradient,) = torch.autograd.grad(out.commitment, z_pix)
    torch.testing.assert_close(gradient, 2 * (z_pix - quantizer.pix_codebook.flatten(0, 1)[out.codes]).detach() / 45)
    assert not any(p.requires_grad for p in quantizer.parameters())


def test_group_means_are_the_means_of_the_sub_codebooks():
    quantizer = hierarchical()
    codes = torch.tensor([[0, 2], [17, 3]])
    expected = torch.stack([quantizer.pix_codebook[i].mean(0) for i in (0, 0, 5, 1)]).view(2, 2, 5)
    torch.testing.assert_close(quantizer.group_means(codes), expected)


def test_moving_averages_of_sub_codes_are_sums_over_counts():
    """Against the form that keeps both, over steps in which some sub-codes get no token."""
    quantizer = hierarchical(K=3, m=2)
    quantizer.decay = 0.8
    book = quantizer.pix_codebook.double().flatten(0, 1)
    counts, sums = torch.ones(6, dtype=torch.float64), book.clone()
    for step in range(30):
        z = torch.randn(4, 5, generator=generator(step))
        codes = torch.randint(0, 5, (4,), generator=generator(100 + step))  # 5 never occurs
        quantizer.update(z, codes)
        counts = 0.8 * counts + 0.2 * torch.bincount(codes, minlength=6)
        sums = 0.8 * sums + 0.2 * torch.zeros_like(sums).index_add_(0, codes, z.double())
    expected = (sums / counts.unsqueeze(-1)).float().view(3, 2, 5)
    torch.testing.assert_close(quantizer.pix_codebook, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(quantizer.weights.flatten(), counts.float())
    assert torch.equal(quantizer.pix_codebook[2, 1], book[5].float())


def test_a_sub_code_that_starved_for_ages_meets_its_next_token_without_harm():
    quantizer = hierarchical(K=1, m=2)
    z = torch.ones(1, 5)
    for _ in range(12_000):  # .99 ** 12000 is below the least fp32 number
        quantizer.update(z, torch.zeros(1, dtype=torch.int64))
    assert quantizer.weights[0, 1] < 1e-38
    quantizer.update(z, torch.ones(1, dtype=torch.int64))
    torch.testing.assert_close(quantizer.pix_codebook[0, 1], z[0])


def test_group_initialisation_uses_the_tokens_of_each_group():
    quantizer = hierarchical(K=4, m=2)
    # groups 0 and 1 hold two tight clusters each, group 2 one token, group 3 none
    centers = torch.randn(4, 5, generator=generator(5)) * 10
    group = torch.tensor([0] * 40 + [1] * 40 + [2])
    z = torch.cat([centers[:2].repeat(20, 1), centers[2:].repeat(20, 1), torch.full((1, 5), 7.0)])
    z = z + 0.01 * torch.randn(z.shape, generator=generator(6))
    order = torch.randperm(len(z), generator=generator(7))
    # a start that draws both sub-codes from one cluster is a local optimum of k-means: try a few
    errors = []
    for seed in range(6):
        quantizer.initialize(z[order], group[order], generator=generator(seed))
        book = quantizer.pix_codebook
        pairs = [(book[0], centers[:2]), (book[1], centers[2:])]
        errors.append(max(torch.cdist(b, c).min(0).values.max().item() for b, c in pairs))
    assert min(errors) < 0.1
    book = quantizer.pix_codebook
    assert torch.cdist(book[2], z[-1:]).min() < 0.1
    assert torch.isfinite(book).all()
    assert (torch.cdist(book, book) + torch.eye(2) > 1e-3).all(), "sub-codes of a group coincide"


def test_group_initialisation_never_starts_sub_codes_from_one_point():
    quantizer = hierarchical(K=3, m=4)
    z = torch.randn(10, 5, generator=generator())
    quantizer.initialize(z, torch.zeros(10, dtype=torch.int64), 0, generator=generator())
    book = quantizer.pix_codebook
    assert (torch.cdist(book, book) + torch.eye(4) > 1e-3).all()
    for code in book[0]:
        assert (z == code).all(-1).any()


def test_starved_sub_codes_age_only_by_tokens_of_their_own_group():
    quantizer = hierarchical(K=2, m=2)
    z = torch.randn(30, 5, generator=generator())
    in_group_0 = torch.zeros(30, dtype=torch.int64)  # flat id 0: group 0, sub-code 0
    assert int(quantizer.restart(z, in_group_0, 50, generator=generator())) == 0
    assert quantizer.misses.tolist() == [[0, 30], [0, 0]]
    before = quantizer.pix_codebook.clone()
    assert int(quantizer.restart(z, in_group_0, 50, generator=generator())) == 1
    book = quantizer.pix_codebook
    assert (z == book[0, 1]).all(-1).any()
    assert torch.equal(book[0, 0], before[0, 0]) and torch.equal(book[1], before[1])
    assert quantizer.misses.tolist() == [[0, 0], [0, 0]]


def test_semantic_gradients_and_updates_are_those_of_the_semantic_quantizer():
    quantizer, alone = hierarchical(), SemanticQuantizer(6, 8)
    alone.load_state_dict(quantizer.semantic.state_dict())
    z_sem, z_pix = unit(9, 8), torch.randn(9, 5, generator=generator(1))
    frozen, expected = quantizer(z_sem, z_pix), alone(z_sem.requires_grad_())
    out = quantizer(z_sem, z_pix)
    assert not frozen.q_sem.requires_grad and torch.equal(out.codes, frozen.codes)
    assert torch.equal(out.q_sem, expected.q) and torch.equal(out.q_pix, frozen.q_pix)
    torch.testing.assert_close(out.commitment, frozen.commitment + expected.commitment)
    for of_both, of_one in ((out.q_sem.square().sum(), expected.q.square().sum()), (out.commitment, expected[2])):
        gradients = [torch.autograd.grad(loss, z_sem, retain_graph=True)[0] for loss in (of_both, of_one)]
        assert torch.equal(*gradients) and gradients[0].any()
    quantizer.update(z_pix, out.codes)
    assert torch.equal(quantizer.semantic.codebook, alone.codebook)
    quantizer.update(z_pix, out.codes, z_sem=z_sem)
    alone.update(z_sem, expected.codes)
    moved = quantizer.restart(z_pix, out.codes, 10**6, z_sem=z_sem)
    assert moved == alone.restart(z_sem, 10**6) == 0 and torch.equal(quantizer.semantic.misses, alone.misses)
    assert torch.equal(quantizer.semantic.codebook, alone.codebook)
    quantizer.semantic.misses[2] = quantizer.misses[0, 0] = 60  # group 0 has a token, and this sub-code none
    assert quantizer.restart(z_pix, out.codes, 10, z_sem=z_sem, generator=generator(4)) == 2
    assert (quantizer.semantic.codebook != alone.codebook).any(-1).nonzero().tolist() == [[2]]


def test_several_processes_need_a_generator(monkeypatch):
    quantizer, z, codes = hierarchical(), torch.zeros(6, 5), torch.zeros(6, dtype=torch.int64)
    quantizer.restart(z, codes, 10**6)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for call in (
        lambda: quantizer.restart(z, codes, 10**6),
        lambda: quantizer.initialize(z, codes),
        lambda: quantizer.semantic.restart(unit(6, 8), 10**6),
        lambda: quantizer.semantic.initialize(unit(6, 8)),
    ):
        with pytest.raises(ValueError, match="generator: expected one in the same state on every process, got None"):
            call()


class TwoHeads(nn.Sequential):
    def forward(self, images):
        z_sem, z_pix = super().forward(images).movedim(1, -1).chunk(2, -1)
        return F.normalize(z_sem, dim=-1), z_pix


class Joined(nn.Sequential):
    def forward(self, q_sem, q_pix):
        return super().forward(torch.cat([q_sem, q_pix], -1).movedim(-1, 1))


def test_the_example_of_the_docstring_trains_an_autoencoder():
    (code,) = (part for part in inspect.getdoc(HierarchicalQuantizer).split("\n\n") if "loss.backward()" in part)
    assert len(code.splitlines()) == 10
    torch.manual_seed(0)
    encoder = TwoHeads(nn.Conv2d(3, 64, 4, 4), nn.GELU(), nn.Conv2d(64, 32, 1))
    decoder = Joined(nn.Conv2d(32, 64, 1), nn.GELU(), nn.ConvTranspose2d(64, 3, 4, 4))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=3e-3)
    batches = [F.interpolate(torch.rand(16, 3, 8, 8), size=(32, 32), mode="bicubic") for _ in range(300)]
    names = {**globals(), "encoder": encoder, "decoder": decoder, "optimizer": optimizer, "batches": batches}
    exec(textwrap.dedent(code), names)
    quantizer = names["quantizer"]
    with torch.no_grad():
        q_sem, q_pix, codes, _ = quantizer(*encoder(batches[-1]))
        assert F.mse_loss(decoder(q_sem, q_pix), batches[-1]) < 0.3 * batches[-1].var()
    assert len(codes.unique()) > 200
    assert torch.equal(quantizer.lookup(codes)[0], q_sem)


def test_search_stays_fp32_under_autocast():
    quantizer = hierarchical(K=512, m=4, Ds=32, Dp=16)
    z_sem, z_pix = unit(256, 32), torch.randn(256, 16, generator=generator(1))
    plain = quantizer(z_sem, z_pix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(z_sem, z_pix)
    assert torch.equal(plain.codes, cast.codes)
    assert cast.q_pix.dtype == torch.float32


def test_a_step_allocates_nothing_of_size_n_by_k():
    # 4096 x 8192 scores in fp32 would be 128 MiB; the whole step stays below a tenth of it
    from torch.profiler import ProfilerActivity, profile

    quantizer = hierarchical(K=8192, m=4, Ds=16, Dp=8)
    z_sem, z_pix = unit(4096, 16), torch.randn(4096, 8, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = quantizer(z_sem, z_pix)
        (out.q_pix.sum() + out.commitment).backward()
        quantizer.update(z_pix, out.codes)
        quantizer.semantic.update(z_sem, out.codes // 4)
    largest = max(abs(event.cpu_memory_usage) for event in record.events())
    assert 0 < largest < 13 * 2**20
    assert math.isfinite(out.commitment.item())


# ---- adaptive sizes ----


def uneven(n=4000, K=16, D=6, seed=0):
    """Tokens of groups that differ in how many they are and in how far they spread; and their groups."""
    group = (torch.rand(n, generator=generator(seed)) ** 2 * K).long()
    spread = torch.rand(K, generator=generator(seed + 1)) ** 2 * 3
    return torch.randn(n, D, generator=generator(seed + 2)) * spread[group, None], group


def distortion(quantizer, z, group):
    _, sub = nearest_subcode(z, quantizer.pix_codebook, group, "l2", quantizer.offsets)
    return (z - quantizer.pix_codebook.flatten(0, -2)[quantizer.join(group, sub)]).square().sum(1).mean().item()


def adaptive(K=16, m=4, Ds=8, Dp=6, seed=0):
    torch.manual_seed(seed)
    return HierarchicalQuantizer(K, m, Ds, Dp, adaptive=True)


def test_adaptive_sizes_beat_equal_ones_at_the_same_total():
    z, group = uneven()
    errors = {}
    for kind in (False, True):
        quantizer = HierarchicalQuantizer(16, 4, 8, 6, adaptive=kind)
        quantizer.initialize(z, group, generator=generator(3))
        errors[kind] = distortion(quantizer, z, group)
    sizes = quantizer.sizes
    assert sizes.sum() == 64 and sizes.min() >= 1 and sizes.max() > 8
    assert errors[True] < 0.85 * errors[False]  # .7 dB


def allocate_one_by_one(z, group, num_groups, total):
    """`allocate` as its docstring says: always make the best cut, one at a time. The codes [n, D] of every group."""

    def cell(i, tokens):
        gain, half = cut_cells(z[tokens], torch.zeros_like(tokens), 1)
        return gain.item(), i, tokens, tokens[half == 0], tokens[half == 1]

    cells = [cell(i, (group == i).nonzero().squeeze(1)) for i in range(num_groups)]
    while len(cells) < total:
        best = max(cells, key=lambda cell: cell[0])
        gain, i, _, *halves = best
        if gain == 0:
            break
        cells = [c for c in cells if c is not best] + [cell(i, tokens) for tokens in halves]
    codes = [(i, z[tokens].mean(0) if len(tokens) else z.mean(0)) for _, i, tokens, _, _ in cells]
    return [torch.stack([code for owner, code in codes if owner == i]) for i in range(num_groups)]


def check_allocation(z, group, num_groups, total):
    sizes, codes = allocate(z, group, num_groups, total)
    expected = allocate_one_by_one(z, group, num_groups, total)
    assert sizes.tolist() == list(map(len, expected))
    for book, means in zip(codes.split(sizes.tolist()), expected, strict=True):
        torch.testing.assert_close(book[book[:, 0].argsort()], means[means[:, 0].argsort()], atol=1e-5, rtol=1e-5)


def test_allocation_is_greedy():
    check_allocation(*uneven(n=600, K=6, D=3), 6, 40)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 40), st.integers(1, 3), st.integers(0, 2**31))
def test_allocation_of_few_tokens_is_greedy(n, num_groups, more, dim, seed):
    """Also with groups that have no token, and with more codes than tokens."""
    draw = generator(seed)
    z = torch.randn(n, dim, generator=draw)
    check_allocation(z, torch.randint(num_groups, (n,), generator=draw), num_groups, num_groups + more)


def test_the_example_of_allocate_is_true():
    assert doctest.testmod(clustering).failed == 0 < doctest.testmod(clustering).attempted


def test_allocation_where_there_is_little_to_allocate():
    z = torch.tensor([[1.0], [2.0], [5.0], [5.0]])
    sizes, codes = allocate(z, torch.tensor([0, 0, 2, 2]), 4, 9)
    assert sizes.tolist() == [2, 1, 1, 1] and codes.flatten().tolist() == [1, 2, z.mean(), 5, z.mean()]
    assert allocate(z, torch.tensor([0, 0, 2, 2]), 4, 4)[0].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"total: expected at least num_groups 4, got 3"):
        allocate(z, torch.zeros(4, dtype=torch.int64), 4, 3)
    with pytest.raises(ValueError, match=r"z: expected at least one token"):
        allocate(z[:0], torch.zeros(0, dtype=torch.int64), 1, 3)
    quantizer = adaptive(K=4, m=5, Dp=1)  # far more codes than tokens: the rest is shared, none twice in a group
    quantizer.initialize(z + 0.1 * torch.arange(4)[:, None], torch.tensor([0, 0, 2, 2]), 0, generator=generator())
    assert quantizer.sizes.sum() == 20 and quantizer.sizes.min() >= 4 and quantizer.pix_codebook.isfinite().all()


def test_adaptive_ids_means_and_averages():
    quantizer = adaptive()
    z, group = uneven()
    quantizer.initialize(z, group, generator=generator(3))
    offsets, owner = quantizer.offsets, torch.repeat_interleave(quantizer.sizes)
    assert offsets[0] == 0 and offsets[-1] == 64 and len(quantizer.sizes.unique()) > 2
    z_sem, z_pix = unit(2, 70, 8), torch.randn(2, 70, 6, generator=generator(1))
    out = quantizer(z_sem, z_pix)
    i = (z_sem.double() @ quantizer.semantic.codebook.double().T).argmax(-1)
    far = torch.cdist(z_pix.view(-1, 6).double(), quantizer.pix_codebook.double())
    far = far.masked_fill(owner != i.view(-1, 1), math.inf)
    assert torch.equal(out.codes.flatten(), far.argmin(1))
    semantic, sub = quantizer.split(out.codes)
    assert torch.equal(semantic, i) and torch.equal(offsets[i] + sub, out.codes)
    assert torch.equal(quantizer.lookup(out.codes)[1], quantizer.pix_codebook[out.codes])
    means = torch.stack([book.mean(0) for book in quantizer.pix_codebook.split(quantizer.sizes.tolist())])
    torch.testing.assert_close(quantizer.group_means(out.codes), means[i])
    # The averages are those of a quantizer with one group that owns all.
    one = HierarchicalQuantizer(1, 64, 8, 6)
    one.pix_codebook.copy_(quantizer.pix_codebook[None])
    for step in range(3):
        z_pix = torch.randn(70, 6, generator=generator(step))
        for q in (quantizer, one):
            q.update(z_pix, out.codes[0])
    assert torch.equal(one.pix_codebook[0], quantizer.pix_codebook) and torch.equal(one.weights[0], quantizer.weights)
    tokens, used, sizes, perplexity = quantizer.usage.groups()
    assert torch.equal(tokens, 3 * torch.bincount(i[0], minlength=16).double())
    for n, book in enumerate(quantizer.usage.counts.flatten().double().split(quantizer.sizes.tolist())):
        p = book / book.sum().clamp_min(1)
        assert used[n] == (book > 0).sum() and sizes[n] == len(book)
        torch.testing.assert_close(perplexity[n], (-torch.xlogy(p, p)).sum().exp())


def test_sub_codes_of_large_groups_starve_later():
    quantizer = adaptive(K=2, m=4, Dp=5)
    quantizer.offsets.copy_(torch.tensor([0, 2, 8]))
    z = torch.randn(40, 5, generator=generator())
    codes = torch.tensor([0, 2]).repeat(20)  # 20 tokens for each group, one sub-code of each
    before = quantizer.pix_codebook.clone()
    moved = [quantizer.restart(z, codes, 20, generator=generator()) for _ in range(5)]
    assert moved == [0, 1, 0, 1, 0]  # at 40 tokens of the first group; the second has 100
    assert quantizer.misses.tolist() == [0, 20] + [0] + [100] * 5
    assert (z[::2] == quantizer.pix_codebook[1]).all(1).any()
    assert torch.equal(quantizer.pix_codebook[2:], before[2:])
    assert quantizer.restart(z, codes, 20, generator=generator()) == 6  # at 120 of the second
    assert not quantizer.misses.any() and torch.equal(quantizer.pix_codebook[[0, 2]], before[[0, 2]])
    for code in quantizer.pix_codebook[3:]:
        assert (z[1::2] == code).all(1).any()


def test_fixed_sizes_keep_their_state_and_adaptive_ones_save_theirs():
    assert "offsets" not in hierarchical().state_dict()
    quantizer, other = adaptive(), adaptive(seed=1)
    quantizer.initialize(*uneven(), generator=generator(3))
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other.offsets, quantizer.offsets) and torch.equal(other.sizes, quantizer.sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_codebooks_and_statistics_stay_as_they_are_when_a_quantizer_is_cast(dtype):
    quantizer = HierarchicalQuantizer(6, 4, 8, 5)
    z_sem, z_pix = unit(30, 8), torch.randn(30, 5, generator=generator(1))
    expected = quantizer(z_sem.to(dtype), z_pix.to(dtype))
    before = {name: b.clone() for name, b in quantizer.named_buffers()}
    after = dict(quantizer.to(dtype).named_buffers())
    assert all(after[name].dtype == b.dtype and torch.equal(after[name], b) for name, b in before.items())
    found = quantizer(z_sem.to(dtype), z_pix.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert {x.dtype for x in found} == {torch.float32, torch.int64}
    # the search does not widen with z
    plain = quantizer(z_sem.to(dtype).float(), z_pix.to(dtype).float())
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
    semantic = quantizer.semantic(z_sem.to(dtype))
    assert semantic.q.dtype == torch.float32 and torch.equal(semantic.codes, quantizer.split(found.codes)[0])
    within = quantizer.within(semantic.codes, z_pix.to(dtype))
    assert torch.equal(within.codes, found.codes)
    quantizer.update(z_pix.to(dtype), found.codes, z_sem=z_sem.to(dtype))
    assert quantizer.weights.dtype == torch.float32
    assert quantizer.to("meta").pix_codebook.is_meta and quantizer.half().pix_codebook.dtype == torch.float32


def test_no_tokens_have_no_commitment_loss():
    quantizer = HierarchicalQuantizer(6, 4, 8, 5)
    z_sem, z_pix = (torch.zeros(0, 3, dim, requires_grad=True) for dim in (8, 5))
    for q_pix, codes, commitment in (
        quantizer(z_sem, z_pix)[1:],
        quantizer.within(torch.zeros(0, 3).long(), z_pix)[1:],
    ):
        assert q_pix.shape == (0, 3, 5) and codes.shape == (0, 3) and commitment == 0
        commitment.backward()
    assert quantizer.semantic(z_sem).commitment == 0 and z_pix.grad.shape == z_pix.shape
