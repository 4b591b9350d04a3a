"""Metrics against scikit-image and SciPy, code usage against a count by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from semhitok.evaluation.metrics import gmsd, psnr, sliced_wasserstein, ssim
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
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=2
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


@pytest.mark.parametrize("metric", [psnr, ssim, gmsd, lambda a, b: sliced_wasserstein(a, b, torch.Generator())])
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


def blurred(images, sigma):
    return torch.from_numpy(scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def gmsd_by_scipy(a, b):
    """Of two images [3, H, W] with even sides, in the authors' range of 0 to 255."""

    def gradient(image):
        luma = 255 * np.tensordot([0.299, 0.587, 0.114], image.double().numpy(), axes=1)
        luma = (luma[::2, ::2] + luma[1::2, ::2] + luma[::2, 1::2] + luma[1::2, 1::2]) / 4
        across = [scipy.ndimage.prewitt(luma, axis=axis, mode="constant") / 3 for axis in (0, 1)]
        return np.hypot(*across)

    x, y = gradient(a), gradient(b)
    return ((2 * x * y + 170) / (x**2 + y**2 + 170)).std()


def test_gmsd_equals_scipy():
    images, noisy = pair((3, 3, 24, 40), 0.05)
    found = gmsd(noisy, images)
    assert found.dtype == torch.float64 and found.shape == (3,)
    for index in range(3):
        assert found[index].item() == pytest.approx(gmsd_by_scipy(noisy[index], images[index]), rel=1e-9)


def test_gmsd_of_one_edge_by_hand():
    """Half-size luma 0 0 0 1 1 1 against black: gradients 1 beside the edge and at the right border."""
    edge = torch.zeros(1, 3, 12, 12)
    edge[..., 6:] = 1
    gradient = np.array([0, 0, 1, 1, 0, 1] * 6).reshape(6, 6) * np.array([2 / 3, 1, 1, 1, 1, 2 / 3])[:, None]
    down = np.zeros((6, 6))  # the border outside is black
    down[[0, -1]] = np.array([0, 0, 1, 2, 3, 2]) / 3
    similarity = (170 / 255**2) / (gradient**2 + down**2 + 170 / 255**2)
    assert gmsd(edge, torch.zeros_like(edge)).item() == pytest.approx(similarity.std(), rel=1e-6)


def test_gmsd_grows_with_blur_from_zero():
    images, _ = pair((2, 3, 64, 64), 0)
    images = (images + 0.2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert gmsd(images, images).tolist() == [0, 0]
    scores = [gmsd(blurred(images, sigma), images) for sigma in (0.3, 0.5, 0.8)]
    assert scores[0].min() > 0 and bool((scores[0] < scores[1]).all() and (scores[1] < scores[2]).all())
    # images are scored alone
    assert gmsd(blurred(images, 0.5), images)[1].item() == pytest.approx(scores[1][1].item(), rel=1e-12)
    with pytest.raises(ValueError, match="3 channels of at least 2 x 2"):
        gmsd(images[:, :1], images[:, :1])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def swd_by_scipy(a, b, generator):
    """The distance of sets of square images, a power of two on a side, from SciPy's filters and NumPy's sorting."""
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[None, None] / 256

    def pyramid(images):
        levels = [images.double().numpy()]
        while levels[-1].shape[-1] > 16:
            small = scipy.ndimage.convolve(levels[-1], kernel, mode="mirror")[:, :, ::2, ::2]
            large = np.zeros_like(levels[-1])
            large[:, :, ::2, ::2] = small
            levels[-1] = levels[-1] - scipy.ndimage.convolve(large, 4 * kernel, mode="mirror")
            levels.append(small)
        return levels

    def patches(level, places):
        found = [
            level[n, :, y : y + 7, x : x + 7].transpose(1, 2, 0)
            for n in range(len(level))
            for y, x in places[:, n].T.tolist()
        ]
        found = np.stack(found)
        return ((found - found.mean((0, 1, 2))) / found.std((0, 1, 2))).reshape(len(found), -1)

    levels = list(zip(pyramid(a), pyramid(b), strict=True))
    places = [
        torch.stack([torch.randint(x.shape[-1] - 6, (len(a), 128), generator=generator) for _ in range(2)])
        for x, _ in levels
    ]
    result = []
    for (x, y), place in zip(levels, places, strict=True):
        directions = torch.randn(512, 147, generator=generator).double().numpy().T
        directions = directions / np.linalg.norm(directions, axis=0)
        first, second = (np.sort(patches(z, place) @ directions, axis=0) for z in (x, y))
        result.append(1e3 * np.abs(first - second).mean())
    return result


@pytest.mark.parametrize("chunk", [64, 2])
def test_sliced_wasserstein_equals_scipy(chunk, monkeypatch):
    monkeypatch.setattr("semhitok.evaluation.metrics.CHUNK", chunk)
    images, noisy = pair((3, 3, 64, 64), 0.1)
    levels, mean = sliced_wasserstein(noisy, images, seeded())
    assert levels == pytest.approx(swd_by_scipy(noisy, images, seeded()), rel=1e-3)
    assert len(levels) == 3 and mean == pytest.approx(sum(levels) / 3)


def test_sliced_wasserstein_grows_with_blur_from_zero():
    images = torch.rand(16, 3, 32, 48, generator=seeded(1))
    assert sliced_wasserstein(images, images, seeded()) == ([0, 0], 0)
    scores = [sliced_wasserstein(blurred(images, sigma), images, seeded()) for sigma in (0.3, 0.5, 0.8)]
    assert 0 < scores[0][1] < scores[1][1] < scores[2][1]
    assert scores[0][0][0] < scores[1][0][0] < scores[2][0][0]
    assert sliced_wasserstein(blurred(images, 0.5), images, seeded()) == scores[1]


def test_sliced_wasserstein_takes_odd_sides_and_plain_images():
    plain = torch.full((2, 3, 33, 17), 0.3)
    assert sliced_wasserstein(plain, plain + 0.2, seeded())[1] == pytest.approx(0, abs=1)
    levels, mean = sliced_wasserstein(torch.rand(2, 3, 33, 71, generator=seeded()), torch.rand(2, 3, 33, 71), seeded())
    assert len(levels) == 2 and math.isfinite(mean)
    with pytest.raises(ValueError, match="3 channels of at least 16 x 16"):
        sliced_wasserstein(plain[..., :15], plain[..., :15], seeded())


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
