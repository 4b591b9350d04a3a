"""Stage 3, optional: the pixel decoder alone keeps learning, with all codes frozen (paper: enhanced decoder).

loss = reconstruction loss (see `reconstruction`)

The ids of images do not change, so a language model trained on them benefits at once.
"""

from __future__ import annotations

from torch import Tensor

from semhitok.config import DecoderStageConfig
from semhitok.data.batch import Batch
from semhitok.training.parts import Figures
from semhitok.training.reconstruction import Reconstructed, ReconstructionStage


class DecoderStage(ReconstructionStage):
    """Trains `decoder` of `model`; encoder, codebooks and everything semantic stay as they are."""

    name = "decoder"
    config: DecoderStageConfig
    trained = ("decoder",)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Figures, Reconstructed]:
        with self.autocast():
            predicted, maps, _, _, _ = self.network(batch.images, self.semantic(batch), True)
        loss, figures = self.reconstruction_loss(predicted, maps, batch, step)
        return loss, figures, Reconstructed(predicted.detach())
