"""LPIPS, the learnt perceptual distance: a term of the reconstruction loss and a figure of the evaluation."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn

from semhitok._optional import require


def perceptual_loss() -> nn.Module:
    """LPIPS (Zhang et al. 2018) with its VGG backbone: image pairs [B, 3, H, W] in [-1, 1] -> [B, 1, 1, 1].

    The network is frozen and in eval mode. Wrong weights would give plausible numbers too, so every tensor is compared
    with torchvision's VGG weights, whose hash is checked when they are fetched, or with the file that lpips ships.

    Raises:
        ImportError: lpips or torchvision is not installed.
        OSError: the backbone's weights are not available.
        RuntimeError: a tensor of the network differs from the published one.
    """
    lpips = require("lpips", "train")
    vgg16 = require("torchvision.models", "train").VGG16_Weights.IMAGENET1K_V1
    try:
        with redirect_stdout(sys.stderr):  # torch reports downloads there
            network: nn.Module = lpips.LPIPS(net="vgg", verbose=False)
            vgg = vgg16.get_state_dict(progress=False, check_hash=True)
        heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    except Exception as error:  # torchvision's download raises many types
        raise OSError(f"lpips: LPIPS weights are not available: {error}") from error
    state = network.state_dict()
    # net.slice3.14.weight is torchvision's features.14.weight
    parts = [name.split(".") for name in state if name.startswith("net.slice")]
    backbone = {".".join(["features", *rest]): state[".".join([net, part, *rest])] for net, part, *rest in parts}
    _check_equal(backbone, {name: tensor for name, tensor in vgg.items() if name.startswith("features.")})
    _check_equal(state, heads)
    return network.eval().requires_grad_(False)


def _check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """RuntimeError naming the first tensor of `expected` that is missing from `found` or differs there."""
    for name, tensor in expected.items():
        if name not in found or not torch.equal(found[name], tensor):
            raise RuntimeError(f"lpips: {name} is not as published")
