"""The GPU memory that training a preset is expected to take, counted without a GPU.

    python -m benchmarks.training.train_memory semhitok-256-one-gpu semhitok-256 semhitok-384

Runs each stage's forward pass and loss on tensors without data and counts the bytes that autograd keeps for the
backward pass (bf16 autocast, LPIPS and the critic included), an image at a time. Adds weights, gradients, moments of
Adam and moving averages of what is trained, the teacher, and LPIPS. What a GPU takes besides is not counted: its
context, workspaces, fragmentation and what lives only inside a layer.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from unittest import mock

import lpips
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from semhitok.config import TrainConfig, preset_names, train_config
from semhitok.data.batch import Batch
from semhitok.models.vit import Trunk
from semhitok.tokenizer import SemHiTok
from semhitok.training.pixel import PixelStage
from semhitok.training.semantic import SemanticStage

GIB = 2**30
LOSS = "semhitok.training.reconstruction"


def size(*modules: nn.Module, trained: bool | None = None) -> int:
    """Bytes of the modules' parameters; with `trained` of those with or without gradient."""
    parameters = {id(p): p for m in modules for p in m.parameters() if trained in (None, p.requires_grad)}
    return sum(p.nbytes for p in parameters.values())


def kept_for_backward(stage: SemanticStage | PixelStage, config: TrainConfig) -> int:
    """Bytes of activations that the loss of one image keeps, weights not counted."""
    weights = {p.untyped_storage()._cdata for part in stage.parts for p in part.module.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            seen[storage._cdata] = storage
        return tensor

    side = config.model.image_size
    batch = Batch(torch.rand(1, 3, side, side), 0, 1, (0,))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stage.loss(batch, stage.config.steps)
    return sum(storage.nbytes() for storage in seen.values())


def measure(name: str, stage_name: str) -> tuple[int, int, int]:
    """Trained parameters, bytes that do not depend on the batch, bytes an image."""
    config = train_config(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weights have nowhere to go
        perceptual = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).requires_grad_(False)
        model = SemHiTok(config.model, load_teacher=False).train()
        with mock.patch(f"{LOSS}.perceptual_loss", lambda: perceptual):
            stage = {"semantic": SemanticStage, "pixel": PixelStage}[stage_name](model, config)
    # The place of the critic's window is a matter of data, which there is none of.
    corner = mock.patch(f"{LOSS}.window", lambda images, numbers, shift: images[:, :, shift:, shift:])
    with FakeTensorMode(allow_non_fake_inputs=True), corner:
        stage.device = torch.device("cpu")
        parts = nn.ModuleList([model, perceptual, *(part.module for part in stage.parts)])
        for module in parts.modules():
            for key, weight in module._parameters.items():
                if weight is not None:
                    module._parameters[key] = nn.Parameter(torch.empty(weight.shape), weight.requires_grad)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
        for module in model.modules():
            if isinstance(module, Trunk):
                module.gradient_checkpointing = config.gradient_checkpointing
        images = kept_for_backward(stage, config)
        fixed = size(model) + model.quantizer.pix_codebook.nbytes + model.quantizer.semantic.codebook.nbytes
        trained = 0
        for part in stage.parts:
            own = size(part.module, trained=True)
            trained += own
            fixed += own * (3 + bool(part.ema_decay))  # gradient, two moments, moving average
            if part.name == "critic":
                fixed += size(part.module)
        if isinstance(stage, PixelStage) and stage.reconstruction.perceptual is not None:
            fixed += size(perceptual)
    return trained // 4, fixed, images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help=", ".join(preset_names()))
    args = parser.parse_args()
    batches = (8, 16, 32, 64, 128)
    print("GiB by count, for images that one process takes at once (micro_batch)")
    heads = "".join(f"{n:>7}" for n in batches)
    print(f"{'preset':22} {'stage':9} {'trained':>9} {'fixed GiB':>10} {'MiB/image':>10} {heads}")
    for name in args.presets or preset_names():
        for stage in ("semantic", "pixel"):
            trained, fixed, image = measure(name, stage)
            totals = "".join(f"{(fixed + n * image) / GIB:7.1f}" for n in batches)
            print(f"{name:22} {stage:9} {trained / 1e6:8.1f}M {fixed / GIB:10.2f} {image / 2**20:10.1f} {totals}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
