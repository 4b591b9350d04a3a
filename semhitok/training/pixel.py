"""Stage 2: the pixel branch learns to reconstruct, the semantic branch frozen (paper: stage 2).

loss = reconstruction loss (see `reconstruction`) + commitment (z_pix - sg(q_pix))^2

The sub-codes follow their tokens by moving averages, which stand for the codebook loss; starved ones are
restarted. The first steps run without pixel quantisation; then k-means inside every semantic group, on the
encoder's own features, sets the sub-codebooks, and before it their sizes, where `model.adaptive` says so. This
initialisation decides how many of them live.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import PixelStageConfig, ReconstructionConfig, TrainConfig
from semhitok.evaluation.held_out import evaluate_held_out
from semhitok.evaluation.metrics import quick_functions
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.tokenizer import SemHiTok
from semhitok.training.critic import PatchCritic
from semhitok.training.log import usage_figures, usage_window
from semhitok.training.parts import Batch, Part, gather, generator
from semhitok.training.reconstruction import ReconstructionLoss
from semhitok.usage import CodeUsage


class PixelNetwork(nn.Module):
    """The pixel branch as one module: images and their semantic ids -> reconstructions."""

    def __init__(self, model: SemHiTok) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quantizer: HierarchicalQuantizer = model.quantizer
        self.decoder = model.decoder

    def forward(
        self, images: Tensor, z_sem: Tensor, quantise: bool, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """images [B, 3, H, W], z_sem [B, h, w, Ds] -> predicted images, decoder's last maps, z_pix, ids, commitment.

        drop: bool [B], images decoded with the mean of its sub-codebook in every sub-code's place.
        Without quantisation the ids are the semantic ones alone.
        """
        z_pix = self.encoder(images)
        if quantise:
            q_sem, q_pix, codes, commitment = self.quantizer(z_sem, z_pix)
            if drop is not None:
                q_pix = torch.where(drop.view(-1, 1, 1, 1), self.quantizer.group_means(codes), q_pix)
        else:
            _, codes, commitment = self.quantizer.semantic(z_sem)
            q_sem, q_pix = F.embedding(codes, self.quantizer.semantic.codebook), z_pix
            commitment = torch.zeros_like(commitment)
        maps = self.decoder.maps(torch.cat([q_sem, q_pix], dim=-1))
        return self.decoder.pixels(maps), maps, z_pix, codes, commitment


class Reconstructing:
    """What the pixel and the decoder stage share: the loss with its critic, and evaluation."""

    name: str
    network: Part

    def __init__(self, model: SemHiTok, run_config: TrainConfig, loss: ReconstructionConfig) -> None:
        self.model, self.run_config = model, run_config
        self.device = next(model.parameters()).device
        self.best = run_config.evaluation.best
        self.reconstruction = ReconstructionLoss(loss, model.config.patch_size).to(self.device)
        self.critic: Part | None = None
        self._critic_step = -1
        critic = self.reconstruction.critic
        if critic is not None:
            seen = model.config.image_size - self.reconstruction.shift
            if isinstance(critic, PatchCritic) and seen < critic.smallest:
                raise ValueError(
                    f"critic.layers: expected fewer, or a smaller shift: the critic sees {seen} pixels a side, and "
                    f"{loss.critic.layers} layers need {critic.smallest}"
                )
            self.critic = Part(
                "critic", critic, loss.critic.optimizer, self.critic_loss, first_step=loss.critic.train_from
            )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run_config.precision == "bf16")

    @torch.no_grad()
    def _z_sem(self, images: Tensor) -> Tensor:
        """z_sem [B, h, w, Ds] of the frozen semantic branch."""
        with self._autocast():
            return self.model.semantic_head(self.model.semantic_features(images))

    def _reconstruction_loss(
        self, predicted: Tensor, maps: Tensor, batch: Batch, step: int
    ) -> tuple[Tensor, dict[str, Any]]:
        batch.predicted = predicted.detach()

        def last_layer(gradient: Tensor) -> Tensor:
            return distributed.mean_over_processes(self.model.decoder.last_layer_gradient(maps, gradient))

        return self.reconstruction(predicted, batch.images, batch, step, last_layer)

    def critic_loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The critic tells the images from what the network made of them in this step."""
        assert self.critic is not None and batch.predicted is not None
        # One step of spectral normalisation's power iteration an update, however many micro-batches that takes.
        self.critic.module.train(step != self._critic_step)
        self._critic_step = step
        inputs = self.reconstruction.critic_inputs(batch.predicted, batch.images, batch)
        return self.reconstruction.critic_loss(self.critic(inputs), step)

    def evaluate(self, batches: Any) -> tuple[dict[str, float], Tensor | None]:
        """Fidelity of reconstructions and use of the codes, on held-out images."""

        def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
            with self._autocast():
                predicted, _, _, codes, _ = self.network(images, self._z_sem(images), True)
            return predicted.float().clamp(0, 1), codes

        quantizer, pictures = self.model.quantizer, self.run_config.evaluation.pictures
        usage = CodeUsage(quantizer.num_codes, quantizer.num_sub_codes, self.device, quantizer.offsets)
        return evaluate_held_out(reconstruct, batches, quick_functions(), usage, self.device, pictures=pictures)


class PixelStage(Reconstructing):
    """Trains `encoder`, `decoder` and the pixel sub-codebooks of `model`; nothing semantic."""

    name = "pixel"

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        config = run_config.pixel
        if config.continuous_steps >= config.steps:
            raise ValueError(
                f"pixel.continuous_steps: expected less than pixel.steps {config.steps}, got {config.continuous_steps}"
            )
        super().__init__(model, run_config, config.loss)
        self._config = config
        self.quantizer = model.quantizer
        self.quantizer.decay = config.decay
        model.requires_grad_(False)
        network = PixelNetwork(model).train()
        network.requires_grad_(True)
        self.network = Part("network", network, config.optimizer, self.loss, ema_decay=config.ema_decay)
        self.parts = [self.network] + ([self.critic] if self.critic else [])
        self.codes_from = config.continuous_steps
        self.window = usage_window(model.config.vocabulary_size, config.batch_size * model.config.grid_size**2)
        self._seen: list[tuple[Tensor, Tensor]] = []

    @property
    def config(self) -> PixelStageConfig:
        return self._config

    def prepare(self, step: int, images: Iterator[list[Batch]], seed: int) -> None:
        if step == self.config.continuous_steps:
            needed = self.config.init_tokens_per_code * self.model.config.vocabulary_size

            def tokens(x: Tensor) -> tuple[Tensor, Tensor]:
                with self._autocast():
                    _, _, z_pix, codes, _ = self.network(x, self._z_sem(x), False)
                return z_pix.float().flatten(0, 2), codes.flatten()

            z_pix, codes = gather(images, needed, tokens)
            draw = generator(seed, self.name, "kmeans")
            self.quantizer.initialize(z_pix, codes, self.config.kmeans_iterations, generator=draw)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Any]]:
        quantise = step >= self.config.continuous_steps
        drop = batch.uniform("drop") < self.config.drop
        with self._autocast():
            predicted, maps, z_pix, codes, commitment = self.network(
                batch.images, self._z_sem(batch.images), quantise, drop
            )
        if quantise:
            self._seen.append((z_pix.detach(), codes))
        loss, figures = self._reconstruction_loss(predicted, maps, batch, step)
        return loss + self.config.commitment_weight * commitment, {**figures, "commitment": commitment}

    @torch.no_grad()
    def update(self, step: int, seed: int) -> dict[str, Any]:
        self.reconstruction.update()
        if not self._seen:
            return {}
        z_pix, codes = (torch.cat(column) for column in zip(*self._seen, strict=True))
        self._seen = []
        self.quantizer.update(z_pix, codes)
        draw = generator(seed, self.name, step, "restart")
        restarted = self.quantizer.restart(z_pix, codes, self.config.restart_window, generator=draw)
        return {"restarted": restarted, **usage_figures(self.quantizer.usage, step, self.window)}

    def counters(self) -> dict[str, Tensor]:
        quantizer = self.quantizer
        counters = {"misses": quantizer.misses, "weights": quantizer.weights, "usage": quantizer.usage.counts}
        return counters | self.reconstruction.counters()

    def codebooks(self) -> dict[str, Tensor]:
        books = {"pix_codebook": self.quantizer.pix_codebook, "weights": self.quantizer.weights}
        return books if self.quantizer.offsets is None else books | {"offsets": self.quantizer.offsets}


def semantic_fingerprint(model: SemHiTok) -> str:
    """SHA-256 over the bytes of everything semantic: equal before and after the later stages."""
    return fingerprint(model.semantic_head, model.semantic_decoder, model.quantizer.semantic)


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 over the bytes of the modules' state."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
