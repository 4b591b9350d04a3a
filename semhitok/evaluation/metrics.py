"""Fidelity of reconstructed images: PSNR and SSIM."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from semhitok.usage import CodeUsage

__all__ = ["CodeUsage", "psnr", "ssim"]

_WINDOW = 11  # of SSIM, pixels a side
_SIGMA = 1.5  # of its Gaussian weights, pixels
_K1, _K2 = 0.01, 0.03  # its constants, for values in [0, 1]


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
