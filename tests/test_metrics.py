"""PSNR and SSIM against scikit-image, code usage against a count by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from semhitok.evaluation.metrics import psnr, ssim
from semhitok.usage import CodeUsage


def pair(shape, noise, seed=0):
    """Smooth images with texture, and noisy copies, float32 in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic").clamp(0, 1)
    noisy = images + noise * torch.randn(shape, generator=generator)
    return images, noisy.clamp(0, 1)


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 11, 11), (3, 3, 17, 40), (1, 1, 33, 12)])
@pytest.mark.parametrize("noise", [0.005, 0.1, 0.5])
def test_equal_to_scikit_image(shape, noise):
    images, noisy = pair(shape, noise)
    ours_psnr, ours_ssim = psnr(noisy, images), ssim(noisy, images)
    assert ours_psnr.dtype == ours_ssim.dtype == torch.float64
    assert ours_psnr.shape == ours_ssim.shape == shape[:1]
    for index in range(shape[0]):
        a, b = (x[index].permute(1, 2, 0).double().numpy() for x in (images, noisy))
        assert ours_psnr[index] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
        expected = structural_similarity(
            a,
            b,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        assert ours_ssim[index] == pytest.approx(expected, abs=1e-6)


def test_images_are_scored_alone():
    images, noisy = pair((3, 3, 32, 32), 0.1)
    noisy[1] = images[1]
    assert psnr(noisy, images)[1] == math.inf
    assert ssim(noisy, images)[1] == pytest.approx(1, abs=1e-12)
    for index in (0, 2):
        one = slice(index, index + 1)
        assert psnr(noisy, images)[index] == psnr(noisy[one], images[one])[0] < 40
        assert ssim(noisy, images)[index] == pytest.approx(ssim(noisy[one], images[one]).item())


def test_known_psnr():
    black, grey = torch.zeros(1, 3, 5, 5), torch.full((1, 3, 5, 5), 0.1)
    assert psnr(black, grey).item() == pytest.approx(20, abs=1e-5)
    assert psnr(black.half(), black.half() + 1).item() == 0


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bad_images_are_refused(metric):
    good = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"images: expected \[B, C, H, W\], got \[3, 16, 16\]"):
        metric(good[0], good[0])
    with pytest.raises(ValueError, match=r"targets: expected \[2, 3, 16, 16\]"):
        metric(good, good[:1])
    with pytest.raises(ValueError, match="floating point"):
        metric((good * 255).byte(), (good * 255).byte())


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(torch.rand(1, 3, 10, 64), torch.rand(1, 3, 10, 64))


def perplexity(counts):
    total = sum(counts)
    return math.exp(-sum(n / total * math.log(n / total) for n in counts))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.lists(st.integers(0, 1000), min_size=1))
def test_usage_equals_a_count_by_hand(num_codes, num_sub_codes, numbers):
    codes = [number % (num_codes * num_sub_codes) for number in numbers]
    usage = CodeUsage(num_codes, num_sub_codes)
    half = len(codes) // 2
    usage.update(torch.tensor(codes[:half], dtype=torch.int64))
    usage.update(torch.tensor([codes[half:]], dtype=torch.int32))
    flat = Counter(codes)
    semantic = Counter(code // num_sub_codes for code in codes)
    groups = {i: [n for code, n in flat.items() if code // num_sub_codes == i] for i in sorted(semantic)}
    found = usage.summary()
    expected = {
        "semantic": (len(semantic) / num_codes, perplexity(semantic.values())),
        "flat": (len(flat) / (num_codes * num_sub_codes), perplexity(flat.values())),
        "group": (
            sum(map(len, groups.values())) / (len(groups) * num_sub_codes),
            sum(semantic[i] * perplexity(counts) for i, counts in groups.items()) / len(codes),
        ),
    }
    for view, (share, evenness) in expected.items():
        assert found[view]["usage"] == pytest.approx(share)
        assert found[view]["perplexity"] == pytest.approx(evenness)


def test_counts_are_exact_beyond_float32():
    usage = CodeUsage(2, 2)
    usage.counts[0, 0] = 2**40
    usage.update(torch.tensor([0, 3]))
    assert usage.counts.tolist() == [[2**40 + 1, 0], [0, 1]]
    usage.reset()
    assert usage.counts.tolist() == [[0, 0], [0, 0]]


def test_no_ids_no_usage():
    usage = CodeUsage(4, 2)
    usage.update(torch.empty(0, 4, 4, dtype=torch.int64))
    assert {figure for view in usage.summary().values() for figure in view.values()} == {0.0}


@pytest.mark.parametrize("code", [-1, 8])
def test_ids_out_of_range_are_refused_and_not_counted(code):
    usage = CodeUsage(4, 2)
    with pytest.raises(ValueError, match=r"codes: expected ids in \[0, 8\)"):
        usage.update(torch.tensor([0, code]))
    assert int(usage.counts.sum()) == 0


def test_every_id_equally_often_is_full_use():
    usage = CodeUsage(16, 4)
    usage.update(torch.from_numpy(np.arange(64).repeat(3)))
    full = {"semantic": 16, "flat": 64, "group": 4}
    for view, figures in usage.summary().items():
        assert figures == {"usage": 1, "perplexity": pytest.approx(full[view])}
