"""The reconstruction loss of the stages that train a decoder.

loss = l1 |x^ - x| + l2 (x^ - x)^2 + lpips LPIPS(x^, x) + weight * verdict(x^)

The verdict is a critic's, which learns at the same time; the loop trains it, with what `critic_inputs` and
`critic_loss` make of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import ReconstructionConfig
from semhitok.models.lpips import perceptual_loss
from semhitok.training.critic import (
    AUGMENT_NUMBERS,
    LeCam,
    build_critic,
    critic_loss,
    diff_augment,
    verdict_loss,
    window,
)


class Numbers(Protocol):
    """Where a step's random numbers come from: uniform in [0, 1), a function of the step and of `purpose`."""

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Numbers [b, *shape] for the b images at hand; rows depend on the images' places in the global batch."""

    def uniform_shared(self, purpose: str, n: int) -> Tensor:
        """Numbers [n], the same on all processes."""


class ReconstructionLoss(nn.Module):
    """Pixel errors, perceptual distance and the critic's verdict; all in fp32, whatever autocast surrounds it.

    No part of the network that is trained: `perceptual` is frozen, and the loop trains `critic.trained` on its own.

    Attributes:
        perceptual: see `perceptual_loss`; None at weight 0.
        critic: None at weight 0.
        lecam: None at weight 0, and without a critic.

    Args:
        config: weights, and the critic.
        patch_size: pixels, of the tokenizer.

    Raises:
        ImportError, OSError, RuntimeError: from `perceptual_loss`.
        ImportError, OSError, ValueError: from `DinoCritic`.
    """

    def __init__(self, config: ReconstructionConfig, patch_size: int) -> None:
        super().__init__()
        self.config = config
        self.shift = patch_size if config.critic.shift is None else config.critic.shift
        self.perceptual = perceptual_loss() if config.lpips else None
        self.critic = build_critic(config.critic) if config.critic.weight else None
        self.lecam = LeCam() if config.critic.weight and config.critic.lecam else None
        self._means: list[Tensor] = []  # of the logits, of this step's micro-batches

    def train(self, mode: bool = True) -> ReconstructionLoss:
        super().train(mode)
        if self.perceptual is not None:
            self.perceptual.eval()  # it has dropout
        return self

    def forward(
        self,
        predicted: Tensor,
        images: Tensor,
        batch: Numbers,
        step: int,
        last_layer: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of reconstructions. It leaves the critic and its gradients as they are.

        Args:
            predicted: reconstructions, float [B, 3, H, W], not clamped; with gradient.
            images: what they should be, float [B, 3, H, W] in [0, 1].
            batch: the step's random numbers.
            step: of the stage, from 0.
            last_layer: turns a gradient at `predicted`, of its shape and dtype, into the gradient of the decoder's last
                weight, averaged over all processes. Called by an adaptive critic only.

        Returns:
            The loss, an fp32 scalar, and figures for the log, without gradient: l1, l2, and where there are such terms
            lpips, verdict and critic_weight, the verdict's weight in the loss.
        """
        config = self.config
        with torch.autocast(predicted.device.type, enabled=False):
            x, target = predicted.float(), images.float()
            terms = {"l1": F.l1_loss(x, target), "l2": F.mse_loss(x, target)}
            loss = config.l1 * terms["l1"] + config.l2 * terms["l2"]
            if self.perceptual is not None:
                terms["lpips"] = self.perceptual(x * 2 - 1, target * 2 - 1).mean()
                loss = loss + config.lpips * terms["lpips"]
            figures: dict[str, Tensor | float] = {}
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
    def critic_inputs(self, predicted: Tensor, images: Tensor, batch: Numbers) -> Tensor:
        """What the critic is to judge: float [B, 3, H, W] twice -> fp32 [2B, 3, h, w], photographs first.

        Both halves are seen through the same window, with augmentations of their own; the second half is what `forward`
        shows the critic. Without gradient.
        """
        return torch.cat([self._view(images, batch, "real"), self._view(predicted, batch, "fake")])

    def critic_loss(self, logits: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss of its logits [2B, ...] on `critic_inputs`.

        LeCAM is left out at the first step, when its averages have not seen anything.

        Returns:
            The loss, an fp32 scalar, and figures without gradient: critic_loss, real_logit and fake_logit.
        """
        config = self.config.critic
        real, fake = logits.float().chunk(2)
        loss = critic_loss(config.loss, real, fake)
        if self.lecam is not None and step > config.train_from:
            loss = loss + config.lecam * self.lecam.regularizer(real, fake)
        means = torch.stack([real.mean(), fake.mean()]).detach()
        self._means.append(means)
        return loss, {"critic_loss": loss.detach(), "real_logit": means[0], "fake_logit": means[1]}

    def update(self) -> None:
        """After a step: LeCAM's averages take in the mean logits of all micro-batches and processes."""
        if self.lecam is not None and self._means:
            real, fake = distributed.mean_over_processes(torch.stack(self._means).mean(0))
            self.lecam.update(real, fake)
        self._means = []

    def counters(self) -> dict[str, Tensor]:
        """What the next steps depend on besides the critic's weights."""
        return {f"lecam.{name}": x for name, x in self.lecam.named_buffers()} if self.lecam is not None else {}

    def _view(self, images: Tensor, batch: Numbers, purpose: str) -> Tensor:
        """Images [B, 3, H, W] as the critic sees them. Not clamped: a clamp would cut the verdict's gradient."""
        images = window(images.float(), batch.uniform_shared("critic window", 2), self.shift)
        if self.config.critic.augment:
            images = diff_augment(images, batch.uniform(f"critic {purpose}", AUGMENT_NUMBERS))
        return images


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode, in which spectral norms keep their vectors, and no gradient for parameters; then as it was."""
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
