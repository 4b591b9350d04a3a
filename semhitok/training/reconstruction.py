"""The reconstruction loss of the pixel and decoder stages.

loss = l1 |x^ - x| + l2 (x^ - x)^2 + lpips LPIPS(x^, x) + critic verdict(x^)

In fp32 whatever the network runs in: half precision in LPIPS and the critic is where others met NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok._optional import require
from semhitok.config import ReconstructionConfig
from semhitok.training.critic import (
    AUGMENT_NUMBERS,
    LeCam,
    build_critic,
    critic_loss,
    diff_augment,
    verdict_loss,
    window,
)
from semhitok.training.parts import Batch


class ReconstructionLoss(nn.Module):
    """The loss of reconstructions, and that of their critic.

    Args:
        config: weights of the terms; one of weight 0 is not built.
        patch_size: of the decoder, the default shift of the critic's window.

    `perceptual`, `critic` and `lecam` are None where their weight is 0. The critic is trained by its own optimiser. The
    adaptive weight is that of a micro-batch.
    """

    def __init__(self, config: ReconstructionConfig, patch_size: int) -> None:
        super().__init__()
        self.config = config
        critic = config.critic
        self.perceptual = perceptual_loss() if config.lpips else None
        self.critic = build_critic(critic) if critic.weight else None
        self.lecam = LeCam() if critic.weight and critic.lecam else None
        self._means: list[Tensor] = []
        self.shift = patch_size if critic.shift is None else critic.shift

    def forward(
        self, predicted: Tensor, images: Tensor, batch: Batch, step: int, last_layer: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss of predicted images [B, 3, H, W] (not clamped), and its terms for the log.

        last_layer: makes of a gradient at `predicted` that of the decoder's last weight, averaged over processes.
        """
        config, critic = self.config, self.config.critic
        with torch.autocast(predicted.device.type, enabled=False):
            predicted, images = predicted.float(), images.float()
            l1, l2 = F.l1_loss(predicted, images), F.mse_loss(predicted, images)
            loss = config.l1 * l1 + config.l2 * l2
            figures: dict[str, Any] = {"l1": l1, "l2": l2}
            if self.perceptual is not None:
                figures["lpips"] = self.perceptual(predicted * 2 - 1, images * 2 - 1).mean()
                loss = loss + config.lpips * figures["lpips"]
            if self.critic is not None and step >= critic.start:
                verdict = self._verdict(predicted, batch)
                weight = torch.tensor(critic.weight, device=loss.device)
                if critic.ramp:
                    weight = weight * min(1.0, (step - critic.start + 1) / critic.ramp)
                if critic.adaptive:
                    of_rest, of_verdict = (
                        last_layer(torch.autograd.grad(term, predicted, retain_graph=True)[0]).norm()
                        for term in (loss, verdict)
                    )
                    weight = weight * (of_rest / (of_verdict + 1e-6)).clamp(*critic.adaptive_range)
                loss = loss + weight * verdict
                figures |= {"verdict": verdict, "critic_weight": weight}
        return loss, figures

    def _verdict(self, predicted: Tensor, batch: Batch) -> Tensor:
        """What the critic thinks of reconstructions; the critic itself learns nothing from it."""
        assert self.critic is not None
        trained = [p for p in self.critic.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        self.critic.eval()  # spectral normalisation's estimates stay as they are, too
        try:
            logits = self.critic(self._shown(predicted, batch, "fake"))
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return verdict_loss(self.config.critic.loss, logits)

    def _shown(self, images: Tensor, batch: Batch, purpose: str) -> Tensor:
        images = window(images, batch.uniform_shared("window", 2), self.shift)
        if self.config.critic.augment:
            images = diff_augment(images, batch.uniform(f"augment {purpose}", AUGMENT_NUMBERS))
        return images

    def critic_inputs(self, predicted: Tensor, images: Tensor, batch: Batch) -> Tensor:
        """What the critic learns from: images, then reconstructions (without gradient), [2 B, 3, h, w]."""
        real = self._shown(images.float(), batch, "real")
        return torch.cat([real, self._shown(predicted.detach().float(), batch, "fake")])

    def critic_loss(self, logits: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The critic's loss of its logits for `critic_inputs`, and figures for the log."""
        real, fake = logits.float().chunk(2)
        loss = critic_loss(self.config.critic.loss, real, fake)
        means = torch.stack([real.mean(), fake.mean()]).detach()
        if self.lecam is not None:
            loss = loss + self.config.critic.lecam * self.lecam.regularizer(real, fake)
            self._means.append(means)
        return loss, {"real_logit": means[0], "fake_logit": means[1]}

    def update(self) -> None:
        """After a step: LeCAM's averages take in the step's mean logits, of all micro-batches and processes."""
        if self.lecam is not None and self._means:
            self.lecam.update(*distributed.mean_over_processes(torch.stack(self._means).mean(0)))
            self._means = []

    def counters(self) -> dict[str, Tensor]:
        """What the next steps depend on besides the critic's weights."""
        return {f"lecam.{name}": x for name, x in self.lecam.named_buffers()} if self.lecam is not None else {}


def perceptual_loss() -> nn.Module:
    """LPIPS (VGG) of image pairs in [-1, 1], frozen, in fp32.

    Raises:
        ImportError: the package is not installed.
        OSError: its backbone's weights cannot be fetched.
        RuntimeError: the network does not hold the published weights.
    """
    lpips = require("lpips", "train")
    models = require("torchvision.models", "train")
    try:
        # Fetched once, by a name that carries its hash, which is checked.
        published = models.VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
        network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
    except Exception as error:  # torchvision's download raises many types
        raise OSError(f"loss.lpips: LPIPS weights cannot be had: {error}") from error
    check_perceptual_weights(network, published)
    return network


def check_perceptual_weights(network: nn.Module, published: dict[str, Tensor]) -> None:
    """Check that LPIPS' backbone holds `published` VGG weights, and its heads are those of a trained LPIPS.

    Raises:
        RuntimeError: it does not; the message names the tensor.
    """
    held = {name: x for name, x in network.named_parameters() if name.startswith("net.")}
    if not held:
        raise RuntimeError("LPIPS: expected a backbone named net, got none")
    for name, tensor in held.items():
        # net.slice1.0.weight -> features.0.weight: slices keep the numbers of torchvision's layers.
        original = f"features.{'.'.join(name.split('.')[2:])}"
        if original not in published or not torch.equal(tensor.cpu(), published[original]):
            raise RuntimeError(f"LPIPS: {name}: expected the published weights {original}, got others")
    for name, tensor in network.named_parameters():
        # Trained heads are weights of a mean of squares, at least 0; fresh ones are not.
        if name.startswith("lin") and bool((tensor < 0).any()):
            raise RuntimeError(f"LPIPS: {name}: expected weights of at least 0, got random ones")
