"""Stage 2: the pixel branch learns to reconstruct, the semantic branch frozen (paper: stage 2).

loss = l1 |x^ - x| + l2 (x^ - x)^2 + perceptual LPIPS(x^, x)
       + commitment (z_pix - sg(q_pix))^2

The sub-codes follow their tokens by moving averages, which stand for the codebook loss; starved ones are
restarted. The first steps run without pixel quantisation; then k-means inside every semantic group, on the
encoder's own features, sets the sub-codebooks. This initialisation decides how many of them live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semhitok._optional import require
from semhitok.config import PixelStageConfig
from semhitok.tokenizer import SemHiTok
from semhitok.training.loop import gather, usage_figures


class PixelStage:
    """Trains `encoder`, `decoder` and the pixel sub-codebooks of `model`; nothing semantic."""

    name = "pixel"

    def __init__(self, model: SemHiTok, config: PixelStageConfig) -> None:
        self.model, self.config = model, config
        self.quantizer = model.quantizer
        self.quantizer.decay = config.decay
        self.modules: list[nn.Module] = [model.encoder, model.decoder]
        model.requires_grad_(False)
        for module in self.modules:
            module.requires_grad_(True)
        self.perceptual = perceptual_loss() if config.perceptual_weight else None
        self._last: tuple[Tensor, Tensor] | None = None

    def prepare(self, step: int, images: Iterator[Tensor], generator: Generator) -> None:
        if step == self.config.continuous_steps:
            needed = self.config.init_tokens_per_code * self.model.config.vocabulary_size
            z_pix, codes = gather(
                images,
                needed,
                lambda x: (self.model.encoder(x).flatten(0, 2), self._semantic(x)[1].flatten()),
            )
            self.quantizer.initialize(z_pix, codes, self.config.kmeans_iterations, generator=generator)

    @torch.no_grad()
    def _semantic(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """z_sem [B, h, w, Ds] and the semantic ids [B, h, w]."""
        z = self.model.semantic_head(self.model.semantic_features(images))
        return z, self.quantizer.semantic(z).codes

    def loss(self, images: Tensor, step: int, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
        config = self.config
        z_sem, sem_codes = self._semantic(images)
        z_pix = self.model.encoder(images)
        if step < config.continuous_steps:
            q_sem, q_pix = F.embedding(sem_codes, self.quantizer.semantic.codebook), z_pix
            commitment = z_pix.new_zeros(())
            self._last = None
        else:
            q_sem, q_pix, codes, commitment = self.quantizer(z_sem, z_pix)
            self._last = (z_pix.detach(), codes)
            drop = torch.rand(len(images), generator=generator).to(images.device) < config.drop
            q_pix = torch.where(drop.view(-1, 1, 1, 1), self.quantizer.group_means(codes), q_pix)
        predicted = self.model.decode_features(q_sem, q_pix)
        l1, l2 = F.l1_loss(predicted, images), F.mse_loss(predicted, images)
        loss = config.l1_weight * l1 + config.l2_weight * l2 + config.commitment_weight * commitment
        figures = {"l1": l1, "l2": l2, "commitment": commitment}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(predicted * 2 - 1, images * 2 - 1).mean()
            loss = loss + config.perceptual_weight * figures["perceptual"]
        return loss, figures

    @torch.no_grad()
    def update(self, step: int, generator: Generator) -> dict[str, Any]:
        if self._last is None:
            return {}
        z_pix, codes = self._last
        self.quantizer.update(z_pix, codes)
        restarted = self.quantizer.restart(z_pix, codes, self.config.restart_window, generator=generator)
        return {"restarted": restarted, **usage_figures(self.quantizer.usage, codes, step)}

    def counters(self) -> dict[str, Tensor]:
        quantizer = self.quantizer
        return {"misses": quantizer.misses, "weights": quantizer.weights, "usage": quantizer.usage.counts}


def semantic_fingerprint(model: SemHiTok) -> str:
    """SHA-256 over the bytes of everything semantic: equal before and after this stage."""
    digest = hashlib.sha256()
    for module in (model.semantic_head, model.semantic_decoder, model.quantizer.semantic):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def perceptual_loss() -> nn.Module:
    """LPIPS (VGG) of image pairs in [-1, 1], frozen, in fp32.

    Raises:
        ImportError: the package is not installed.
        OSError: its backbone's weights cannot be fetched.
    """
    lpips = require("lpips", "train")
    try:
        return lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except Exception as error:  # torchvision's download raises many types
        raise OSError(f"perceptual_weight: LPIPS weights cannot be had: {error}") from error
