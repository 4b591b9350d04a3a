"""Stage 1: the semantic branch learns the teacher's features (paper: VQ-KD, after BEiT v2).

loss = cosine_weight (1 - cos(decoder(q), t)) + l1_weight |decoder(q) - t| + commitment

with t the teacher's standardised features and q the nearest of K unit codes. The codes follow
their tokens by a moving average; unused ones are restarted. The first steps run without
quantisation, then k-means sets the codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from semhitok.config import SemanticStageConfig
from semhitok.tokenizer import SemHiTok
from semhitok.training.loop import gather, usage_figures


class SemanticStage:
    """Trains `semantic_head`, `semantic_decoder` and the semantic codebook of `model`."""

    name = "semantic"

    def __init__(self, model: SemHiTok, config: SemanticStageConfig) -> None:
        self.model, self.config = model, config
        self.quantizer = model.quantizer.semantic
        self.quantizer.decay = config.decay
        self.modules: list[nn.Module] = [model.semantic_head, model.semantic_decoder]
        model.requires_grad_(False)
        for module in self.modules:
            module.requires_grad_(True)
        self._last: tuple[Tensor, Tensor] | None = None

    def prepare(self, step: int, images: Iterator[Tensor], generator: Generator) -> None:
        needed = self.config.init_tokens_per_code * self.model.config.num_codes
        if step == 0:
            (features,) = gather(images, needed, lambda x: (self.model.semantic_features(x).flatten(0, 2),))
            self.model.semantic_head.set_statistics(features)
        if step == self.config.continuous_steps:
            (z,) = gather(images, needed, lambda x: (self._z(x).flatten(0, 2),))
            self.quantizer.initialize(z, self.config.kmeans_iterations, generator=generator)

    def _z(self, images: Tensor) -> Tensor:
        return self.model.semantic_head(self.model.semantic_features(images))

    def loss(self, images: Tensor, step: int, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
        config = self.config
        features = self.model.semantic_features(images)
        target = self.model.semantic_head.standardize(features)
        z = self.model.semantic_head(features)
        if step < config.continuous_steps:
            q, commitment, self._last = z, z.new_zeros(()), None
        else:
            q, codes, commitment = self.quantizer(z)
            self._last = (z.detach(), codes)
        predicted = self.model.semantic_decoder(q)
        cosine = 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
        l1 = F.l1_loss(predicted, target)
        loss = config.cosine_weight * cosine + config.l1_weight * l1 + config.commitment_weight * commitment
        return loss, {"cosine": cosine, "l1": l1, "commitment": commitment}

    @torch.no_grad()
    def update(self, step: int, generator: Generator) -> dict[str, Any]:
        if self._last is None:
            return {}
        z, codes = self._last
        self.quantizer.update(z, codes)
        restarted = self.quantizer.restart(z, self.config.restart_window, generator=generator)
        return {"restarted": restarted, **usage_figures(self.quantizer.usage, codes, step)}

    def counters(self) -> dict[str, Tensor]:
        return {"misses": self.quantizer.misses, "usage": self.quantizer.usage.counts}
