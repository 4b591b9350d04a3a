"""Fidelity of reconstructed images, by formulas without learnt weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from semhitok.usage import CodeUsage

__all__ = ["CodeUsage", "gmsd", "psnr", "sliced_wasserstein", "ssim"]

_WINDOW = 11  # of SSIM, pixels a side
_SIGMA = 1.5  # of its Gaussian weights, pixels
_K1, _K2 = 0.01, 0.03  # its constants, for values in [0, 1]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue
_GMSD_C = 170 / 255**2  # constant of GMSD, for values in [0, 1]

_SMALLEST = 16  # pixels a side of the coarsest level of the sliced Wasserstein distance
_PATCH = 7  # pixels a side of its patches
_PATCHES = 128  # of an image and level
_DIRECTIONS = 512  # that patches are projected to
_CHUNK = 16  # images, or directions, at once


def psnr(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each image in dB: -10 log10 of the mean squared error.

    Args:
        images: float [B, C, H, W] in [0, 1].
        targets: float [B, C, H, W] in [0, 1].

    Returns:
        float64 [B]; infinite for equal images.

    Raises:
        ValueError: other or different shapes, or not floating point.
    """
    _check_pair(images, targets)
    error = (images.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error)


def ssim(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each image: Gaussian window of 11 pixels, sigma 1.5.

    Wang et al. 2004, per channel, averaged over all positions where the whole window lies inside
    the image. Equal to scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, data_range=1)`.

    Args:
        images: float [B, C, H, W] in [0, 1], H and W at least 11.
        targets: float [B, C, H, W] in [0, 1].

    Returns:
        float64 [B], at most 1; 1 for equal images.

    Raises:
        ValueError: other or different shapes, smaller images, or not floating point.
    """
    _check_pair(images, targets)
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(f"images: expected at least {_WINDOW} x {_WINDOW} pixels, got {list(images.shape)}")
    x, y = images.double(), targets.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x * mean_x, _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def gmsd(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude similarity deviation of each image's luma (Xue et al. 2014): how unevenly edges are kept.

    Means of 2 x 2 pixels; Prewitt gradients, outside of the image 0 as in the authors' code; c = 170 / 255^2.

    Args:
        images: float [B, 3, H, W] in [0, 1], H and W at least 2; an odd last row or column is left out.
        targets: float [B, 3, H, W] in [0, 1].

    Returns:
        float64 [B], at least 0; 0 for equal images.

    Raises:
        ValueError: other or different shapes, smaller images, or not floating point.
    """
    _check_pair(images, targets)
    if images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise ValueError(f"images: expected 3 channels of at least 2 x 2 pixels, got {list(images.shape)}")
    x, y = _gradient_magnitude(images), _gradient_magnitude(targets)
    similarity = (2 * x * y + _GMSD_C) / (x * x + y * y + _GMSD_C)
    return similarity.std(dim=(1, 2, 3), correction=0)


def sliced_wasserstein(
    images: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> tuple[list[float], float]:
    """Sliced Wasserstein distance of two sets of images, by texture at several scales (Karras et al. 2018, section 5).

    Every level of a Laplacian pyramid, down to 16 pixels, gives 128 patches of 7 x 7 pixels for an image. They are
    normalised for each set and channel to mean 0 and deviation 1 and projected to 512 random directions; the distance
    is the mean absolute difference of the sorted projections, times 1000. Unlike in the paper both sets' patches are
    from the same places, so that a set is at distance 0 from itself.

    Memory besides the sets: the patches, 0.15 MB for a pair of images and level, and some more on the way.

    Args:
        images: float [N, 3, H, W] in [0, 1], H and W at least 16.
        targets: float [N, 3, H, W] in [0, 1]; which image is where does not matter but for the places of patches.
        generator: on the CPU; its state decides places and directions.

    Returns:
        The distance for each level, finest first, and their mean.

    Raises:
        ValueError: other or different shapes, smaller images, or not floating point.
    """
    _check_pair(images, targets)
    count, channels, *sides = images.shape
    if channels != 3 or min(sides) < _SMALLEST:
        raise ValueError(
            f"images: expected 3 channels of at least {_SMALLEST} x {_SMALLEST} pixels, got {list(images.shape)}"
        )
    places: list[torch.Tensor] = []  # of patches, for each level: row and column of the upper left, [2, N, patches]
    while min(sides) >= _SMALLEST:
        shape = (count, _PATCHES)
        places.append(torch.stack([torch.randint(side - _PATCH + 1, shape, generator=generator) for side in sides]))
        sides = [(side + 1) // 2 for side in sides]
    first, second = _patches(images, places), _patches(targets, places)
    levels = []
    for a, b in zip(first, second, strict=True):
        directions = torch.randn(_DIRECTIONS, a.shape[1], generator=generator).to(a.device)
        total = 0.0
        for some in (directions / directions.norm(dim=1, keepdim=True)).split(_CHUNK):
            total += float(((some @ a.T).sort().values - (some @ b.T).sort().values).abs().mean(1).sum())
        levels.append(total / _DIRECTIONS * 1e3)
    return levels, sum(levels) / len(levels)


def _check_pair(images: torch.Tensor, targets: torch.Tensor) -> None:
    if images.ndim != 4 or min(images.shape[1:]) < 1:
        raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
    if targets.shape != images.shape:
        raise ValueError(f"targets: expected {list(images.shape)} as images, got {list(targets.shape)}")
    for name, values in (("images", images), ("targets", targets)):
        if not values.is_floating_point():
            raise ValueError(f"{name}: expected floating point in [0, 1], got {values.dtype}")


def _blur(images: torch.Tensor) -> torch.Tensor:
    """Gaussian mean of every whole window: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offset = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-offset.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    planes = images.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.squeeze(1).unflatten(0, images.shape[:2])


def _gradient_magnitude(images: torch.Tensor) -> torch.Tensor:
    """Prewitt gradients' magnitude of the luma at half the size: [B, 3, H, W] -> float64 [B, 1, H // 2, W // 2]."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
    luma = F.avg_pool2d((images.double() * weights).sum(1, keepdim=True), 2)
    right = torch.tensor([1, 0, -1], dtype=torch.float64, device=images.device).expand(3, 3) / 3
    dx, dy = F.conv2d(luma, torch.stack([right, right.T]).unsqueeze(1), padding=1).unbind(1)
    return (dx * dx + dy * dy).sqrt().unsqueeze(1)


def _patches(images: torch.Tensor, places: list[torch.Tensor]) -> list[torch.Tensor]:
    """The patches at `places` of the levels of images' Laplacian pyramids, normalised: each [N * 128, 3 * 49], fp32."""
    offset = torch.arange(_PATCH, device=images.device)
    levels: list[list[torch.Tensor]] = [[] for _ in places]
    for start in range(0, len(images), _CHUNK):
        coarse = images[start : start + _CHUNK].float()
        number = torch.arange(len(coarse), device=images.device).view(-1, 1, 1, 1)
        for n, place in enumerate(places):
            level = coarse
            if n + 1 < len(places):
                coarse = _binomial(level)[:, :, ::2, ::2]
                spread = torch.zeros_like(level)
                spread[:, :, ::2, ::2] = coarse
                level = level - 4 * _binomial(spread)
            top, left = place[:, start : start + _CHUNK, :, None, None].to(images.device)
            # [n, patches, 7, 7, 3]: the indices before and after the channels put these last
            found = level[number, :, top + offset[:, None], left + offset]
            levels[n].append(found.flatten(0, 1))
    result = []
    for parts in levels:
        patches = torch.cat(parts)
        parts.clear()  # memory
        std, mean = torch.std_mean(patches, dim=(0, 1, 2), correction=0)
        result.append(patches.sub_(mean).div_(std.clamp_min(1e-4)).flatten(1))  # a plain set is no noise
    return result


def _binomial(images: torch.Tensor) -> torch.Tensor:
    """Means with the weights (1, 4, 6, 4, 1) / 16 down and right, borders mirrored: [B, C, H, W] of the same shape."""
    x = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for dim in (2, 3):
        # sums of shifted images: several times as fast as a convolution of single planes on a CPU
        parts = [x.narrow(dim, n, x.shape[dim] - 4) for n in range(5)]
        x = (parts[0] + parts[4] + 4 * (parts[1] + parts[3]) + 6 * parts[2]) / 16
    return x
