"""The frozen teacher: features of a timm network (SigLIP's Vision Transformer in the presets)."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._optional import require
from semhitok.config import TeacherConfig

# How `forward_intermediates` is called for the maps of inner blocks, [B, C, h, w] each.
MAPS: dict[str, Any] = {"norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}


class Teacher(nn.Module):
    """Images in [0, 1] -> the map of one inner block or stage, resampled to the grid of the image tokenizer.

    The network is any of timm's that has `forward_intermediates`: Vision Transformers, convolutional networks, hybrids.
    Always in eval mode and without gradient, whatever the parent module's mode.

    Args:
        config: which timm model, and which of its blocks or stages.
        grid_size: side of the grid of features returned.
        load: fetch or read the weights that `config` names; False leaves them random, for a module whose weights will
            be loaded from a checkpoint.

    Raises:
        ValueError, OSError: as `timm_network`, or the model has no such block.
    """

    vit: Any  # also where it is another network: checkpoints hold its weights under this name
    mean: Tensor
    std: Tensor

    def __init__(self, config: TeacherConfig, grid_size: int, *, load: bool = True) -> None:
        super().__init__()
        self.config = config
        self.grid_size = grid_size
        load = load and (config.pretrained or config.checkpoint is not None)
        file: dict[str, Any] = {"checkpoint": config.checkpoint, "image_size": config.image_size}
        self.vit = timm_network("teacher", config.name, load=load, **file, **config.options)
        if not self.vit.feature_info:
            raise ValueError(f"teacher: expected a network with feature maps, got {config.name!r} without any")
        depth = len(self.vit.feature_info)  # blocks of a transformer, stages of a convolutional network
        if not -depth <= config.block < depth:
            raise ValueError(f"teacher.block: expected -{depth}..{depth - 1} for {config.name!r}, got {config.block}")
        self.block = config.block % depth
        self.width: int = self.vit.feature_info[self.block]["num_chs"]
        # On a CPU, convolutional networks are 1.1 to 1.2 times as fast in this layout; transformers have no use for it.
        self.layout = torch.contiguous_format if hasattr(self.vit, "patch_embed") else torch.channels_last
        self.vit.to(memory_format=self.layout)
        cfg = self.vit.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def stored(self) -> bool:
        """Whether a checkpoint must hold the weights, because they come from nowhere else."""
        return not self.config.pretrained

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] -> features [B, grid, grid, width], fp32."""
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        inputs = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        maps = self.vit.forward_intermediates(inputs, indices=[self.block], **MAPS)[0]
        if maps.shape[-1] != self.grid_size:
            maps = F.interpolate(maps, (self.grid_size, self.grid_size), mode="bilinear", antialias=True)
        return maps.permute(0, 2, 3, 1).float()


def timm_network(role: str, name: str, *, load: bool, checkpoint: str | None, image_size: int, **options: Any) -> Any:
    """timm's network `name`, without pooling and classifier.

    Args:
        role: what the model is for; messages of errors begin with it.
        name: a timm model name.
        load: load weights, those of the hub entry or of `checkpoint`; False leaves them random.
        checkpoint: a local weights file in place of the hub's.
        image_size: side in pixels of its input, for networks that are built for a size.
        options: further arguments of `timm.create_model`.

    Raises:
        ValueError: timm has no such model, or it has no `forward_intermediates`.
        OSError: its weights are not available.
    """
    timm = require("timm", "models")
    importlib.import_module("semhitok.models.small_vit")  # registers its model with timm
    if checkpoint is not None:
        options["pretrained_cfg_overlay"] = {"file": checkpoint}
    create = partial(timm.create_model, name, pretrained=load, num_classes=0, global_pool="", **options)
    try:
        try:
            network: Any = create(img_size=image_size)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            network = create()  # convolutional networks take images of any size
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"{role}: timm cannot build {name!r}: {error}") from error
    except Exception as error:  # the hub's client raises many types when it finds no network
        raise OSError(f"{role}: no weights for {name!r}: {error}") from error
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{role}: expected a timm network with forward_intermediates, got {name!r} without it")
    return network


def vision_transformer(role: str, name: str, **options: Any) -> Any:
    """`timm_network`; also raises ValueError for a network without blocks of tokens."""
    vit = timm_network(role, name, **options)
    if not hasattr(vit, "blocks") or not hasattr(vit, "embed_dim"):
        raise ValueError(f"{role}: {name!r} is not a timm Vision Transformer")
    return vit
