"""The Fréchet distance of two sets of images. On Inception's features it is the rFID; others are named by the network.

d = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2, with means m and covariances C of the features (Heusel et al. 2017).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok._optional import require
from semhitok.evaluation.fixed_batches import BATCH

# The network of published figures, as torch-fidelity converted it from TensorFlow.
INCEPTION_PREFIX = "6726825d"  # of the SHA-256 of its weights, as in the published file's name

Network = Callable[[Tensor], Tensor]  # uint8 images [B, 3, H, W] -> features [B, D], fp32


class FeatureStatistics:
    """Mean and covariance of features, from float64 sums over blocks of fixed size in the order of rows.

    The same rows in the same order give the same bits, whatever the batches. Memory: D x D.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sum = self._products = self._rest = torch.empty(0)

    def update(self, features: Tensor) -> None:
        """Add rows [n, D].

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features: expected [n, D], got {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("features: expected finite values, got NaN or infinity")
        self.count += len(features)
        rows = torch.cat([self._rest, features.detach().cpu().double()])
        full = len(rows) // BATCH * BATCH
        for block in rows[:full].split(BATCH):
            self._add(block)
        self._rest = rows[full:]

    def _add(self, block: Tensor) -> None:
        if not len(block):
            return
        if not len(self._shift):
            # Sums of differences from one feature vector lose fewer digits than sums of features.
            self._shift = block[0]
            self._sum, self._products = torch.zeros_like(self._shift), block.new_zeros(2 * (block.shape[1],))
        block = block - self._shift
        self._sum += block.sum(0)
        self._products += block.T @ block

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] (divided by n - 1), float64. No more rows can be added after it.

        Raises:
            ValueError: fewer than 2 rows.
        """
        if self.count < 2:
            raise ValueError(f"features: expected at least 2 images, got {self.count}")
        self._add(self._rest)
        self._rest = self._rest[:0]
        mean = self._sum / self.count
        covariance = (self._products - self.count * mean.outer(mean)) / (self.count - 1)
        return mean + self._shift, (covariance + covariance.T) / 2


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The squared Fréchet distance of Gaussians with these statistics.

    tr (C1 C2)^1/2 is computed as the sum of the singular values of C1^1/2 C2^1/2, with symmetric roots. Unlike the
    square roots of the eigenvalues of C1 C2, this stays exact for singular covariances.

    Raises:
        ValueError: fewer than 2 images, or features of different dimension.

    Warns:
        UserWarning: not more images than dimensions. The covariances are singular then, and the distance is larger
            than with more images.
    """
    (mean1, cov1), (mean2, cov2) = first.compute(), second.compute()
    if len(mean1) != len(mean2):
        raise ValueError(f"features: expected the same dimension, got {len(mean1)} and {len(mean2)}")
    fewer = min(first.count, second.count)
    if fewer <= len(mean1):
        problem = "the distance depends on the number of images; compare it only with distances on as many images"
        warnings.warn(f"{fewer} images for features of dimension {len(mean1)}: {problem}", stacklevel=2)
    cross = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def _root(covariance: Tensor) -> Tensor:
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        # Divide and conquer may not converge for many equal eigenvalues, as few images have. QR does, more slowly.
        linalg = require("scipy.linalg", "eval")
        values, vectors = map(torch.from_numpy, linalg.eigh(covariance.numpy(), driver="ev"))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def feature_network(features: str, device: torch.device | str = "cpu") -> tuple[str, Network]:
    """The name of the distance on a network's features, and the network.

    Args:
        features: "inception" (the distance is called rfid), the name of a timm model for its published weights,
            "random:NAME" for random weights, or "NAME=FILE" for weights of a file. "inception=FILE" expects the
            published file.
        device: where the network runs.

    Raises:
        ImportError: a package is not installed.
        OSError: the weights are not available.
        ValueError: no such model, or Inception's weights are not the published ones.
    """
    name, _, file = features.partition("=")
    if name == "inception":
        return "rfid", _inception(file, device)
    return f"frechet[{name}, {Path(file).name}]" if file else f"frechet[{name}]", _timm(name, file, device)


def _inception(file: str, device: torch.device | str) -> Network:
    module = require("torch_fidelity.feature_extractor_inceptionv3", "eval")
    path = Path(file)
    if not file:
        url = module.URL_INCEPTION_V3
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(path), hash_prefix=INCEPTION_PREFIX, progress=False)
            except Exception as error:  # downloads raise many types
                raise OSError(f"inception: weights are not available: {error}") from error
    # With other weights the numbers would look plausible, but would not be rFID.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_PREFIX):
        raise ValueError(f"inception: {path}: expected SHA-256 {INCEPTION_PREFIX}..., got {digest[:8]}...")
    network = module.FeatureExtractorInceptionV3("inception", ["2048"], str(path)).to(device)
    return lambda images: network(images.to(device))[0]


def _timm(features: str, file: str, device: torch.device | str) -> Network:
    timm = require("timm", "models")
    name = features.removeprefix("random:")
    random = name != features
    if random and file:
        raise ValueError(f"features: expected random:NAME or NAME=FILE, got {features}={file}")
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=not random, num_classes=0, **options)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"features: timm cannot build {name!r}: {error}") from error
    except Exception as error:  # the hub's client raises many types without a network
        raise OSError(f"features: no weights for {name!r}: {error}") from error
    cfg = timm.data.resolve_model_data_config(model)
    model = model.to(device).eval().requires_grad_(False)
    mean, std = (torch.tensor(cfg[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    size = tuple(cfg["input_size"][1:])

    def network(images: Tensor) -> Tensor:
        x = images.to(device).float() / 255
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        return model((x - mean) / std).float()

    return network
