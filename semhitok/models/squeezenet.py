"""A perceptual distance that needs no download: the features of SqueezeNet 1.1, unweighted. It is not LPIPS.

The weights are those of the package `ndf`, a Caffe model by its names and its input. torchvision's SqueezeNet 1.1 is
another network, and LPIPS' published weights of channels belong to that one: on these channels they mean nothing, so
they are not used.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._optional import packaged_file, require

SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"  # of the file of weights in ndf 0.1.4
_MEAN = (123.0, 117.0, 104.0)  # of red, green and blue in 0 ... 255, subtracted from the network's input


class SqueezeNetDistance(nn.Module):
    """Distance of images in the features of SqueezeNet 1.1 (Iandola et al. 2016): two [B, 3, H, W] in [0, 1] -> [B].

    At seven depths, the features of each position are scaled to length 1. Their squared differences are summed over
    channels and depths, and averaged over positions. This is the form of LPIPS without learnt weights, the unweighted
    network of Zhang et al. 2018, for another network: values are not comparable with LPIPS of any backbone. 0 for equal
    images. The network is frozen.

    Raises:
        ImportError: ndf or numpy is not installed.
        OSError: the file of weights cannot be read, or is not that of ndf 0.1.4.
    """

    _mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        weights = _read_weights()
        weights["conv1"][0] = weights["conv1"][0].flip(1)  # Caffe's images are blue, green, red
        self.convolutions = nn.ModuleDict({name: _Convolution(*tensors) for name, tensors in weights.items()})
        self.register_buffer("_mean", torch.tensor(_MEAN).view(3, 1, 1))

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Distances [B] in the precision of the network, fp32 unless changed; with gradient for both.

        Raises:
            ValueError: not [B, 3, H, W] of at least 3 x 3 pixels, or shapes that differ.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 3:
            raise ValueError(f"images: expected [B, 3, H, W] of at least 3 x 3 pixels, got {list(images.shape)}")
        if targets.shape != images.shape:
            raise ValueError(f"targets: expected {list(images.shape)} as images, got {list(targets.shape)}")
        pairs = zip(self.features(images), self.features(targets), strict=True)
        return torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in pairs]).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Of images as for `forward`: unit length, [B, C, h, w] for each depth: conv1, fire3 and fire5 to fire9."""
        run = self.convolutions
        x = run["conv1"](images.to(self._mean.dtype) * 255 - self._mean, stride=2)
        depths = [x]
        for fire in range(2, 10):
            if fire in (2, 4, 6) and min(x.shape[2:]) > 1:  # of images below 17 pixels, one pixel is left by then
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = run[f"fire{fire}/squeeze1x1"](x)
            x = torch.cat([run[f"fire{fire}/expand1x1"](x), run[f"fire{fire}/expand3x3"](x, padding=1)], dim=1)
            if fire not in (2, 4):
                depths.append(x)
        return [F.normalize(x, dim=1, eps=1e-10) for x in depths]  # its gradient is finite at 0, too


class _Convolution(nn.Module):
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, **options: int) -> Tensor:
        return F.relu(F.conv2d(x, self.weight, self.bias, **options))


def _read_weights() -> dict[str, list[Tensor]]:
    """Weight [out, in, h, w] and bias [out] of each convolution but the classifier's, by Caffe's names."""
    data = packaged_file("ndf", "example_models/weights/squeezenet_weights.pkl", SHA256, "demo")
    arrays = _Arrays(io.BytesIO(data)).load()
    # Kernels are [h, w, in, out].
    return {
        name: [torch.from_numpy(kernel).permute(3, 2, 0, 1).contiguous(), torch.from_numpy(bias)]
        for name, (kernel, bias) in arrays.items()
        if name != "conv10"
    }


class _Arrays(pickle.Unpickler):
    """Reads containers and NumPy arrays, and refuses all else; torch.load(weights_only=True) cannot read this file."""

    def find_class(self, module: str, name: str) -> Any:
        numpy = require("numpy", "demo")
        admitted = {
            ("numpy.core.multiarray", "_reconstruct"): numpy.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): numpy.ndarray,
            ("numpy", "dtype"): numpy.dtype,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f"squeezenet: expected arrays only, got {module}.{name}")
        return admitted[module, name]
