"""Metrics: the formulas, and at the end `METRICS`, the table of all figures that evaluations report.

The formulas take `images` and `targets`, both float [B, C, H, W] in [0, 1], and raise ValueError for wrong or different
shapes, too few pixels, or values that are not floating point.

A new metric is a function of image pairs and a row of the table. `semhitok eval`, its page, evaluation during training
and `semhitok reconstruct` all read the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok.models.lpips import perceptual_loss
from semhitok.models.squeezenet import SqueezeNetDistance

PairFunction = Callable[[Tensor, Tensor], Tensor]

_WINDOW = 11  # of SSIM, pixels a side
_SIGMA = 1.5  # of its Gaussian weights, pixels
_K1, _K2 = 0.01, 0.03  # its constants, for values in [0, 1]

_LUMA = (0.299, 0.587, 0.114)  # of red, green and blue
_GMSD_C = 170 / 255**2  # constant of GMSD, for values in [0, 1]

SMALLEST = 16  # pixels a side of an image: the coarsest level of the sliced Wasserstein distance
_PATCH = 7  # pixels a side of its patches
_PATCHES = 128  # of an image and level
_DIRECTIONS = 512  # that patches are projected to
CHUNK = 16  # images, or directions, at once


def psnr(images: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB: -10 log10 of the mean squared error.

    Returns float64 [B]; infinite for equal images.
    """
    _check_pair(images, targets)
    error = (images.double() - targets.double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error)


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5.

    Computed per channel and averaged over all positions where the whole window lies inside the image. Equal to
    scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)`.

    H and W are at least 11. Returns float64 [B], at most 1; 1 for equal images.
    """
    _check_pair(images, targets)
    if min(images.shape[2:]) < _WINDOW:
        raise ValueError(f"images: expected at least {_WINDOW} x {_WINDOW} pixels, got {list(images.shape)}")
    x, y = images.double(), targets.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x * mean_x, _blur(y * y) - mean_y * mean_y
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    common = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = common / ((mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2))
    return similarity.mean(dim=(1, 2, 3))


def gmsd(images: Tensor, targets: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of each image's luma (Xue et al. 2014): how unevenly edges are kept.

    Prewitt gradients of the means of 2 x 2 pixels, zero-padded as in the authors' code; c = 170 / 255^2.

    C is 3, H and W are at least 2; an odd last row or column is left out. Returns float64 [B], at least 0; 0 for equal
    images.
    """
    _check_pair(images, targets)
    if images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise ValueError(f"images: expected 3 channels of at least 2 x 2 pixels, got {list(images.shape)}")
    x, y = _gradient_magnitude(images), _gradient_magnitude(targets)
    similarity = (2 * x * y + _GMSD_C) / (x * x + y * y + _GMSD_C)
    return similarity.std(dim=(1, 2, 3), correction=0)


def sliced_wasserstein(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[list[float], float]:
    """Sliced Wasserstein distance of two sets of images: textures at several scales (Karras et al. 2018, section 5).

    Each image gives 128 patches of 7 x 7 pixels from every level of its Laplacian pyramid, down to 16 pixels. Patches
    are normalised to mean 0 and deviation 1 for each set and channel, and projected to 512 random directions. The
    distance is the mean absolute difference of the sorted projections, times 1000. Unlike in the paper, the patches of
    both sets are taken at the same places, so the distance of a set to itself is 0.

    Memory besides the sets: the patches, 0.15 MB for a pair of images and level, and some temporary copies.

    Args:
        images, targets: C is 3, H and W are at least 16. The order of images affects only the places.
        generator: on the CPU; decides places and directions.

    Returns:
        The distance for each level, finest first, and their mean.
    """
    _check_pair(images, targets)
    count, channels, *sides = images.shape
    if channels != 3 or min(sides) < SMALLEST:
        expected = f"3 channels of at least {SMALLEST} x {SMALLEST} pixels"
        raise ValueError(f"images: expected {expected}, got {list(images.shape)}")
    places: list[Tensor] = []  # for each level: rows and columns of the patches' top left corners, [2, N, patches]
    while min(sides) >= SMALLEST:
        shape = (count, _PATCHES)
        places.append(torch.stack([torch.randint(side - _PATCH + 1, shape, generator=generator) for side in sides]))
        sides = [(side + 1) // 2 for side in sides]
    first, second = _patches(images, places), _patches(targets, places)
    levels = []
    for a, b in zip(first, second, strict=True):
        directions = torch.randn(_DIRECTIONS, a.shape[1], generator=generator).to(a.device)
        total = 0.0
        for part in (directions / directions.norm(dim=1, keepdim=True)).split(CHUNK):
            total += float(((part @ a.T).sort().values - (part @ b.T).sort().values).abs().mean(1).sum())
        levels.append(total / _DIRECTIONS * 1e3)
    return levels, sum(levels) / len(levels)


def _check_pair(images: Tensor, targets: Tensor) -> None:
    if images.ndim != 4 or min(images.shape[1:]) < 1:
        raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
    if targets.shape != images.shape:
        raise ValueError(f"targets: expected {list(images.shape)} as images, got {list(targets.shape)}")
    for name, values in (("images", images), ("targets", targets)):
        if not values.is_floating_point():
            raise ValueError(f"{name}: expected floating point in [0, 1], got {values.dtype}")


def _blur(images: Tensor) -> Tensor:
    """Gaussian mean of every whole window: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offset = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-offset.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    planes = images.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(F.conv2d(planes, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))
    return planes.squeeze(1).unflatten(0, images.shape[:2])


def _gradient_magnitude(images: Tensor) -> Tensor:
    """Magnitude of the luma's Prewitt gradients at half the size: [B, 3, H, W] -> float64 [B, 1, H // 2, W // 2]."""
    weights = torch.tensor(_LUMA, dtype=torch.float64, device=images.device).view(1, 3, 1, 1)
    luma = F.avg_pool2d((images.double() * weights).sum(1, keepdim=True), 2)
    right = torch.tensor([1, 0, -1], dtype=torch.float64, device=images.device).expand(3, 3) / 3
    dx, dy = F.conv2d(luma, torch.stack([right, right.T]).unsqueeze(1), padding=1).unbind(1)
    return (dx * dx + dy * dy).sqrt().unsqueeze(1)


def _patches(images: Tensor, places: list[Tensor]) -> list[Tensor]:
    """Normalised patches at `places` in each level of Laplacian pyramids: fp32 [N * 128, 3 * 49] for each level."""
    offset = torch.arange(_PATCH, device=images.device)
    levels: list[list[Tensor]] = [[] for _ in places]
    for start in range(0, len(images), CHUNK):
        coarse = images[start : start + CHUNK].float()
        number = torch.arange(len(coarse), device=images.device).view(-1, 1, 1, 1)
        for n, place in enumerate(places):
            level = coarse
            if n + 1 < len(places):
                coarse = _binomial(level)[:, :, ::2, ::2]
                spread = torch.zeros_like(level)
                spread[:, :, ::2, ::2] = coarse
                level = level - 4 * _binomial(spread)
            top, left = place[:, start : start + CHUNK, :, None, None].to(images.device)
            # [n, patches, 7, 7, 3]: with index tensors on both sides of the slice, the channels come last
            found = level[number, :, top + offset[:, None], left + offset]
            levels[n].append(found.flatten(0, 1))
    result = []
    for parts in levels:
        patches = torch.cat(parts)
        parts.clear()  # frees memory
        std, mean = torch.std_mean(patches, dim=(0, 1, 2), correction=0)
        result.append(patches.sub_(mean).div_(std.clamp_min(1e-4)).flatten(1))  # a uniform set must not become noise
    return result


def _binomial(images: Tensor) -> Tensor:
    """Blur with (1, 4, 6, 4, 1) / 16 in both directions, borders mirrored: [B, C, H, W] -> the same shape."""
    x = F.pad(images, (2, 2, 2, 2), mode="reflect")
    for dim in (2, 3):
        # On a CPU, sums of shifted images are several times as fast as a convolution of single planes.
        parts = [x.narrow(dim, n, x.shape[dim] - 4) for n in range(5)]
        x = (parts[0] + parts[4] + 4 * (parts[1] + parts[3]) + 6 * parts[2]) / 16
    return x


def load_lpips(device: torch.device | str) -> PairFunction:
    """LPIPS of each image pair in [0, 1], float64 [B]; errors as `perceptual_loss`."""
    network = perceptual_loss().to(device)
    return lambda images, targets: network(images * 2 - 1, targets * 2 - 1).flatten().double()


def load_squeezenet(device: torch.device | str) -> PairFunction:
    """`SqueezeNetDistance` of each image pair, float64 [B]; errors as there."""
    network = SqueezeNetDistance().to(device)
    return lambda images, targets: network(images, targets).double()


@dataclass(frozen=True)
class Metric:
    """A figure that evaluations report: one row of `METRICS`.

    Attributes:
        name: key in reports, logs and `evaluation.best`.
        function: reconstructions and originals, float [B, 3, H, W] in [0, 1] -> a value for each image [B], of which
            the mean is reported. None: it is loaded by `load`, or the figure is computed elsewhere.
        heading: name and unit in tables.
        digits: after the decimal point in tables.
        lower_is_better: whether the best checkpoint is the one with the lowest figure.
        quick: also measured while training, and printed by `semhitok reconstruct`.
        load: for a function that needs weights: device -> function. Where the package or the weights are missing
            (ImportError, OSError or RuntimeError), the figure is reported as absent.
    """

    name: str
    function: PairFunction | None
    heading: str
    digits: int
    lower_is_better: bool = False
    quick: bool = False
    load: Callable[[torch.device | str], PairFunction] | None = None


# In the order of tables.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("rfid", None, "rFID", 4, lower_is_better=True),
        Metric("psnr", psnr, "PSNR dB", 3, quick=True),
        Metric("ssim", ssim, "SSIM", 4, quick=True),
        Metric("lpips", None, "LPIPS", 4, lower_is_better=True, load=load_lpips),
        Metric("squeezenet", None, "SqueezeNet distance", 4, lower_is_better=True, load=load_squeezenet),
        Metric("gmsd", gmsd, "GMSD", 4, lower_is_better=True),
        Metric("sliced_wasserstein", None, "sliced Wasserstein", 3, lower_is_better=True),
        Metric("bits_per_pixel", None, "bits per pixel", 4, lower_is_better=True),
        Metric("semantic_usage", None, "semantic usage", 4),
        Metric("semantic_perplexity", None, "semantic perplexity", 1),
        Metric("flat_usage", None, "flat usage", 4),
        Metric("flat_perplexity", None, "flat perplexity", 1),
        Metric("group_usage", None, "group usage", 4),
        Metric("group_perplexity", None, "group perplexity", 2),
        Metric("flat_ids_kept", None, "flat ids kept", 4),
        Metric("semantic_ids_kept", None, "semantic ids kept", 4),
        Metric("semantic_cosine", None, "semantic cosine", 4),
        Metric("cosine", None, "cosine distance", 4, lower_is_better=True),  # of the semantic stage, while training
    )
}


def quick_functions() -> dict[str, PairFunction]:
    """Functions of the quick metrics, by name."""
    return {name: metric.function for name, metric in METRICS.items() if metric.quick and metric.function is not None}
