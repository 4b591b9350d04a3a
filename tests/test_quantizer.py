"""The codebook modules: what they promise about gradients, updates, initialisation and restarts."""

import math

import pytest
import torch
import torch.nn.functional as F

from semhitok.quantizer import HierarchicalQuantizer, SemanticQuantizer, spherical_kmeans


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
    by_hand = (z - quantizer.codebook[codes]).square().sum(-1).mean()
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
