"""Stage 3, optional: the pixel decoder alone learns on, every code frozen (paper: enhanced decoder).

loss = reconstruction loss (see `reconstruction`)

Ids of images stay what they were, so that a language model trained on them gains from it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from semhitok.config import DecoderStageConfig, TrainConfig
from semhitok.tokenizer import SemHiTok
from semhitok.training.parts import Batch, Part
from semhitok.training.pixel import PixelNetwork, Reconstructing


class DecoderStage(Reconstructing):
    """Trains `decoder` of `model`; encoder, codebooks and everything semantic stay as they are."""

    name = "decoder"
    codes_from = 0

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        config = run_config.decoder
        super().__init__(model, run_config, config.loss)
        self._config = config
        model.requires_grad_(False)
        network = PixelNetwork(model).train()
        model.decoder.requires_grad_(True)
        self.network = Part("network", network, config.optimizer, self.loss, ema_decay=config.ema_decay)
        self.parts = [self.network] + ([self.critic] if self.critic else [])

    @property
    def config(self) -> DecoderStageConfig:
        return self._config

    def prepare(self, step: int, images: Iterator[list[Batch]], seed: int) -> None:
        """Nothing: the codes are there."""

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Any]]:
        with self._autocast():
            predicted, maps, _, _, _ = self.network(batch.images, self._z_sem(batch.images), True)
        return self._reconstruction_loss(predicted, maps, batch, step)

    def update(self, step: int, seed: int) -> dict[str, Any]:
        self.reconstruction.update()
        return {}

    def counters(self) -> dict[str, Tensor]:
        return self.reconstruction.counters()

    def codebooks(self) -> dict[str, Tensor]:
        return {"pix_codebook": self.model.quantizer.pix_codebook}
