"""What the stages that train a decoder share: the network, the reconstruction loss and the training of its critic.

loss = l1 |x^ - x| + l2 (x^ - x)^2 + lpips LPIPS(x^, x) + squeezenet SqueezeNetDistance(x^, x) + weight * verdict(x^)

The verdict is that of a critic, which learns in the same steps: in each, the network first, then the critic on what the
network predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import DecoderStageConfig, PixelStageConfig, ReconstructionConfig, TrainConfig
from semhitok.data.batch import Batch
from semhitok.evaluation.held_out import evaluate_held_out
from semhitok.evaluation.metrics import quick_functions
from semhitok.models.lpips import perceptual_loss
from semhitok.models.squeezenet import SqueezeNetDistance
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.tokenizer import SemHiTok
from semhitok.training.critic import (
    AUGMENT_NUMBERS,
    LeCam,
    build_critic,
    critic_loss,
    diff_augment,
    verdict_loss,
    window,
)
from semhitok.training.fixed import fingerprint
from semhitok.training.parts import Figures, Part
from semhitok.training.stage import Evaluation, TokenizerStage
from semhitok.usage import CodeUsage


class ReconstructionLoss(nn.Module):
    """Pixel errors, perceptual distance and the critic's verdict; all in fp32, whatever autocast surrounds it.

    `perceptual` (see `perceptual_loss`) and `squeezenet` are frozen. `critic` is not trained by this loss, but by
    `critic_objective`. Each is None at weight 0, and so is `lecam`, also without a critic.

    Args:
        config: weights, and the critic.
        patch_size: pixels, of the tokenizer.

    Raises:
        ImportError, OSError, RuntimeError: from `perceptual_loss` and `SqueezeNetDistance`.
        ImportError, OSError, ValueError: from `DinoCritic`.
    """

    def __init__(self, config: ReconstructionConfig, patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.shift = patch_size if config.critic.shift is None else config.critic.shift
        self.perceptual = perceptual_loss() if config.lpips else None
        self.squeezenet = SqueezeNetDistance() if config.squeezenet else None
        self.critic = build_critic(config.critic) if config.critic.weight else None
        self.lecam = LeCam() if config.critic.weight and config.critic.lecam else None

    def train(self, mode: bool = True) -> ReconstructionLoss:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # because it has dropout
        return self

    def forward(
        self, predicted: Tensor, images: Tensor, batch: Batch, step: int, last_layer: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Figures]:
        """The loss of reconstructions. The critic and its gradients stay as they are.

        Args:
            predicted: reconstructions, float [B, 3, H, W], not clamped; with gradient.
            images: the originals, float [B, 3, H, W] in [0, 1].
            batch: gives the step's random numbers.
            step: of the stage, from 0.
            last_layer: turns a gradient at `predicted`, of its shape and dtype, into the gradient of the decoder's last
                weight, averaged over all processes. Called for an adaptive weight only.

        Returns:
            The loss, an fp32 scalar, and figures for the log, without gradient: l1, l2, and if there are such terms
            lpips, squeezenet, verdict and critic_weight, the verdict's weight in the loss.
        """
        config = self.config
        with torch.autocast(predicted.device.type, enabled=False):
            x, target = predicted.float(), images.float()
            terms = {"l1": F.l1_loss(x, target), "l2": F.mse_loss(x, target)}
            loss = config.l1 * terms["l1"] + config.l2 * terms["l2"]
            if self.perceptual is not None:
                terms["lpips"] = self.perceptual(x * 2 - 1, target * 2 - 1).mean()
                loss = loss + config.lpips * terms["lpips"]
            if self.squeezenet is not None:
                terms["squeezenet"] = self.squeezenet(x, target).mean()
                loss = loss + config.squeezenet * terms["squeezenet"]
            figures: Figures = {}
            critic = config.critic
            if self.critic is not None and step >= critic.start:
                with _frozen(self.critic):
                    logits = self.critic(self._view(x, batch, "fake"))
                terms["verdict"] = verdict_loss(critic.loss, logits)
                weight: Tensor | float = critic.weight
                if critic.ramp > 0:
                    weight *= min(1.0, (step - critic.start + 1) / critic.ramp)
                if critic.adaptive:
                    rest, verdict = (
                        last_layer(torch.autograd.grad(term, predicted, retain_graph=True)[0]).detach().float().norm()
                        for term in (loss, terms["verdict"])
                    )
                    weight = weight * (rest / (verdict + 1e-6)).clamp(*critic.adaptive_range)
                figures["critic_weight"] = weight
                loss = loss + weight * terms["verdict"]
        return loss, {name: term.detach() for name, term in terms.items()} | figures

    @torch.no_grad()
    def critic_inputs(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """What the critic judges: float [B, 3, H, W] twice -> fp32 [2B, 3, h, w], the originals first.

        Both halves are seen through the same window but augmented independently; the second half is what `forward`
        shows the critic. Without gradient.
        """
        return torch.cat([self._view(images, batch, "real"), self._view(predicted, batch, "fake")])

    def critic_objective(self, logits: Tensor, step: int) -> tuple[Tensor, Figures, Tensor]:
        """What the critic minimises, from its logits [2B, ...] on `critic_inputs`: `critic_loss` and LeCAM's term.

        LeCAM is left out in the critic's first step, when its averages have not seen anything.

        Returns:
            The loss, an fp32 scalar, and without gradient figures for the log (real_logit and fake_logit) and these two
            mean logits as one tensor [2], for `update`.
        """
        config = self.config.critic
        real, fake = logits.float().chunk(2)
        loss = critic_loss(config.loss, real, fake)
        if self.lecam is not None and step > config.train_from:
            loss = loss + config.lecam * self.lecam.regularizer(real, fake)
        means = torch.stack([real.mean(), fake.mean()]).detach()
        return loss, {"real_logit": means[0], "fake_logit": means[1]}, means

    def update(self, mean_logits: Sequence[Tensor]) -> None:
        """After a step: LeCAM's averages take in the mean logits of its micro-batches, on all processes."""
        if self.lecam is not None and mean_logits:
            real, fake = distributed.mean_over_processes(torch.stack(list(mean_logits)).mean(0))
            self.lecam.update(real, fake)

    def counters(self) -> dict[str, Tensor]:
        """What the next steps depend on in addition to the critic's weights."""
        return {f"lecam.{name}": x for name, x in self.lecam.named_buffers()} if self.lecam is not None else {}

    def _view(self, images: Tensor, batch: Batch, purpose: str) -> Tensor:
        """Images [B, 3, H, W] as the critic sees them. Not clamped: a clamp would cut the verdict's gradient."""
        images = window(images.float(), batch.uniform_shared("critic window", 2), self.shift)
        if self.config.critic.augment:
            images = diff_augment(images, batch.uniform(f"critic {purpose}", AUGMENT_NUMBERS))
        return images


class PixelNetwork(nn.Module):
    """The pixel branch as one module: images, and their z_sem or semantic codes -> reconstructions."""

    def __init__(self, model: SemHiTok) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.quantizer: HierarchicalQuantizer = model.quantizer
        self.decoder = model.decoder

    def forward(
        self, images: Tensor, semantic: Tensor, quantise: bool, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """images [B, 3, H, W], semantic -> predicted images, decoder's last maps, z_pix, ids, commitment.

        semantic: z_sem [B, h, w, Ds] or semantic codes [B, h, w] int64.
        drop: bool [B], images that are decoded with the mean of its sub-codebook in place of every sub-code.
        Without quantisation the ids are those of the semantic codes.
        """
        z_pix = self.encoder(images)
        known = not semantic.is_floating_point()
        if quantise:
            quantizer = self.quantizer.within if known else self.quantizer
            q_sem, q_pix, codes, commitment = quantizer(semantic, z_pix)
            if drop is not None:
                q_pix = torch.where(drop.view(-1, 1, 1, 1), self.quantizer.group_means(codes), q_pix)
        else:
            codes = semantic if known else self.quantizer.semantic(semantic).codes
            q_sem, q_pix = F.embedding(codes, self.quantizer.semantic.codebook), z_pix
            commitment = z_pix.new_zeros((), dtype=torch.float32)
        maps = self.decoder.maps(torch.cat([q_sem, q_pix], dim=-1))
        return self.decoder.pixels(maps), maps, z_pix, codes, commitment


class Reconstructed(NamedTuple):
    """What a step needs later of a micro-batch, without gradient."""

    predicted: Tensor  # reconstructions, float [B, 3, H, W]
    tokens: tuple[Tensor, Tensor] | None = None  # z_pix [B, h, w, Dp] and ids [B, h, w], if the codebook learns
    mean_logits: Tensor | None = None  # fp32 [2], the critic's of images and of reconstructions, if the critic learnt


class ReconstructionStage(TokenizerStage[Reconstructed]):
    """What the stages share that train a decoder: the loss, the critic beside it, and the evaluation.

    A step trains the network first, then the critic on what the network predicted in that step.

    Attributes:
        trained: names of the model's modules whose parameters are trained.
        known_codes: the semantic codes of all fixed crops, int32 [count, h, w].
    """

    config: PixelStageConfig | DecoderStageConfig
    trained: tuple[str, ...]
    known_codes: Tensor | None = None

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        super().__init__(model, run_config)
        config, self.best = self.config, (run_config.evaluation.best, self.save_model)
        self.reconstruction = ReconstructionLoss(config.loss, model.config.patch_size).to(self.device)
        for name in self.trained:
            model.get_submodule(name).requires_grad_(True)
        self.network = Part("network", PixelNetwork(model).train(), config.optimizer, ema_decay=config.ema_decay)
        self.parts = [self.network]
        self.critic: Part | None = None
        critic, settings = self.reconstruction.critic, config.loss.critic
        if critic is not None:
            side = model.config.image_size - self.reconstruction.shift
            if side < critic.smallest:
                seen = f"expected to see at least {critic.smallest} pixels a side, got {side}"
                raise ValueError(f"critic: {seen}: use fewer layers or a smaller shift")
            self.critic = Part("critic", critic, settings.optimizer, first_step=settings.train_from)
            self.parts.append(self.critic)

    @torch.no_grad()
    def semantic(self, batch: Batch) -> Tensor:
        """Of the frozen semantic branch: codes [B, h, w] int64 where they are known, otherwise z_sem [B, h, w, Ds]."""
        if self.known_codes is not None and batch.crops is not None:
            return self.known_codes[batch.crops].to(self.device, torch.int64)
        features = self.features(batch)
        with self.autocast():
            return self.model.semantic_head(features)

    @torch.no_grad()
    def prepare(self, check_stop: Callable[[], None]) -> None:
        """Compute the semantic codes of all fixed crops, from the features if the semantic stage has kept them."""
        if self.fixed is None or not self.fixed.worthwhile(self.config):
            return
        teacher, quantizer = self.teacher_identity(), self.model.quantizer.semantic
        made_by = [teacher, fingerprint(self.model.semantic_head, quantizer)]

        def codes(batch: Batch) -> Tensor:
            return quantizer(self.semantic(batch)).codes.int()

        self.known_codes = self.fixed.find("semantic_codes", made_by)
        if self.known_codes is None:
            self.known_features = self.fixed.find("features", teacher)
            self.known_codes = self.fixed.make("semantic_codes", made_by, codes, check_stop)
            self.known_features = None

    def reconstruction_loss(self, predicted: Tensor, maps: Tensor, batch: Batch, step: int) -> tuple[Tensor, Figures]:
        """`ReconstructionLoss` of predicted images, which the decoder's last layer computed from `maps`."""

        def last_layer(gradient: Tensor) -> Tensor:
            return distributed.mean_over_processes(self.model.decoder.last_layer_gradient(maps, gradient))

        return self.reconstruction(predicted, batch.images, batch, step, last_layer)

    def backward(self, batches: Sequence[Batch], step: int) -> tuple[Figures, list[Reconstructed]]:
        figures, outputs = super().backward(batches, step)
        critic = self.critic
        if critic is None or step < critic.first_step:
            return figures, outputs

        def loss(item: tuple[Batch, Reconstructed]) -> tuple[Tensor, Figures, Tensor]:
            """The critic learns to tell images from this step's reconstructions."""
            batch, output = item
            # One step of spectral normalisation's power iteration an update, however many micro-batches it has.
            critic.module.train(batch is batches[0])
            inputs = self.reconstruction.critic_inputs(output.predicted, batch.images, batch)
            return self.reconstruction.critic_objective(critic(inputs), step)

        of_critic, logits = critic.accumulate(list(zip(batches, outputs, strict=True)), loss)
        figures |= {f"critic_{name}": figure for name, figure in of_critic.items()}
        return figures, [output._replace(mean_logits=x) for output, x in zip(outputs, logits, strict=True)]

    def after_step(self, outputs: Sequence[Reconstructed], step: int, seed: int) -> Figures:
        self.reconstruction.update([x.mean_logits for x in outputs if x.mean_logits is not None])
        return {}

    def counters(self) -> dict[str, Tensor]:
        return self.reconstruction.counters()

    def codebooks(self) -> dict[str, Tensor]:
        return {"pix_codebook": self.model.quantizer.pix_codebook}

    def evaluate(self, batches: Iterator[tuple[Tensor, int]]) -> Evaluation:
        """Fidelity of the reconstructions and usage of the codes, on held-out images."""

        def reconstruct(images: Tensor) -> tuple[Tensor, Tensor]:
            with self.autocast():
                semantic = self.semantic(Batch(images, 0, len(images)))
                predicted, _, _, codes, _ = self.network(images, semantic, True)
            return predicted.float().clamp(0, 1), codes

        quantizer, pictures = self.model.quantizer, self.run_config.evaluation.pictures
        usage = CodeUsage(quantizer.num_codes, quantizer.num_sub_codes, self.device, quantizer.offsets)
        return evaluate_held_out(reconstruct, batches, quick_functions(), usage, self.device, pictures=pictures)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, in which spectral norms keep their vectors, and its parameters out of autograd."""
    mode, parameters = module.training, [p for p in module.parameters() if p.requires_grad]
    module.eval()
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        module.train(mode)
        for parameter in parameters:
            parameter.requires_grad_(True)
