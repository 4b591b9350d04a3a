"""Stage 2: the pixel branch learns to reconstruct, on top of the frozen semantic branch (paper: stage 2).

loss = reconstruction loss (see `reconstruction`) + commitment (z_pix - sg(q_pix))^2

The sub-codes follow their tokens by moving averages, which take the place of a codebook loss; starved ones are
restarted. The first steps run without pixel quantisation. Then k-means inside every semantic group, on the encoder's
own features, sets the sub-codebooks; with `model.adaptive` their sizes are set first. How many sub-codes stay alive is
decided by this initialisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from semhitok.config import PixelStageConfig, TrainConfig
from semhitok.data.batch import Batch, keyed_generator
from semhitok.tokenizer import SemHiTok
from semhitok.training.log import usage_figures, usage_window
from semhitok.training.parallel import gather_tokens
from semhitok.training.parts import Figures
from semhitok.training.reconstruction import Reconstructed, ReconstructionStage


class PixelStage(ReconstructionStage):
    """Trains `encoder`, `decoder` and the pixel sub-codebooks of `model`, and nothing semantic."""

    name = "pixel"
    config: PixelStageConfig
    trained = ("encoder", "decoder")

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        super().__init__(model, run_config)
        self.quantizer = model.quantizer
        self.quantizer.decay = self.config.decay
        self.window = usage_window(model.config.vocabulary_size, self.config.batch_size * model.config.grid_size**2)

    def before_step(self, step: int, spare: Iterator[list[Batch]], seed: int) -> None:
        if step == self.config.continuous_steps and self.config.init_tokens_per_code:
            needed = self.config.init_tokens_per_code * self.model.config.vocabulary_size

            def tokens(batch: Batch) -> tuple[Tensor, Tensor]:
                with self.autocast():
                    _, _, z_pix, codes, _ = self.network(batch.images, self.semantic(batch), False)
                return z_pix.float().flatten(0, 2), codes.flatten()

            z_pix, codes = gather_tokens(spare, needed, tokens)
            generator = keyed_generator(seed, self.name, "kmeans")
            self.quantizer.initialize(z_pix, codes, self.config.kmeans_iterations, generator=generator)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Figures, Reconstructed]:
        quantise = step >= self.config.continuous_steps
        drop = batch.uniform("drop") < self.config.drop
        with self.autocast():
            semantic = self.semantic(batch)
            predicted, maps, z_pix, codes, commitment = self.network(batch.images, semantic, quantise, drop)
        loss, figures = self.reconstruction_loss(predicted, maps, batch, step)
        output = Reconstructed(predicted.detach(), (z_pix.detach(), codes) if quantise else None)
        return loss + self.config.commitment_weight * commitment, {**figures, "commitment": commitment}, output

    @torch.no_grad()
    def after_step(self, outputs: Sequence[Reconstructed], step: int, seed: int) -> Figures:
        super().after_step(outputs, step, seed)
        tokens = [output.tokens for output in outputs if output.tokens is not None]
        if not tokens:
            return {}
        z_pix, codes = (torch.cat(column) for column in zip(*tokens, strict=True))
        self.quantizer.update(z_pix, codes)
        generator = keyed_generator(seed, self.name, step, "restart")
        restarted = self.quantizer.restart(z_pix, codes, self.config.restart_window, generator=generator)
        return {"restarted": restarted, **usage_figures(self.quantizer.usage, step, self.window)}

    def counters(self) -> dict[str, Tensor]:
        quantizer = self.quantizer
        counters = {"misses": quantizer.misses, "weights": quantizer.weights, "usage": quantizer.usage.counts}
        return counters | super().counters()

    def codebooks(self) -> dict[str, Tensor]:
        books = super().codebooks() | {"weights": self.quantizer.weights}
        return books if self.quantizer.offsets is None else books | {"offsets": self.quantizer.offsets}
