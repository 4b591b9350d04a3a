"""The frozen teacher: features of a network of timm (SigLIP's Vision Transformer in the presets) or transformers."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok._buffers import ExactBuffers
from semhitok._optional import require
from semhitok.config import TeacherConfig

TRANSFORMERS = "transformers:"  # names of networks of transformers begin so

# How `forward_intermediates` is called for the maps of inner blocks, [B, C, h, w] each.
MAPS: dict[str, Any] = {"norm": False, "stop_early": True, "output_fmt": "NCHW", "intermediates_only": True}


class Teacher(ExactBuffers):
    """Images in [0, 1] -> the map of one inner block or stage, resampled to the grid of the image tokenizer.

    The network is any of timm's that has `forward_intermediates`: Vision Transformers, convolutional networks, hybrids;
    or a `TransformersNetwork`. Always in eval mode and without gradient, whatever the parent module's mode.

    Args:
        config: which model, and which of its blocks or stages.
        grid_size: side of the grid of features returned.
        load: fetch or read the weights that `config` names; False leaves them random, for a module whose weights will
            be loaded from a checkpoint.

    Raises:
        ValueError, OSError: as `timm_network` or `TransformersNetwork`, or the model has no such block.
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
        network = TransformersNetwork if config.name.startswith(TRANSFORMERS) else timm_network
        self.vit = network("teacher", config.name, load=load, **file, **config.options)
        if not self.vit.feature_info:
            raise ValueError(f"teacher: expected a network with feature maps, got {config.name!r} without any")
        depth = len(self.vit.feature_info)  # blocks of a transformer, stages of a convolutional network
        if not -depth <= config.block < depth:
            raise ValueError(f"teacher.block: expected -{depth}..{depth - 1} for {config.name!r}, got {config.block}")
        self.block = config.block % depth
        self.width: int = self.vit.feature_info[self.block]["num_chs"]
        # On a CPU, convolutional networks are 1.1 to 1.2 times as fast in this layout; transformers have no use for it.
        transformer = hasattr(self.vit, "patch_embed") or isinstance(self.vit, TransformersNetwork)
        self.layout = torch.contiguous_format if transformer else torch.channels_last
        self.vit.to(memory_format=self.layout)
        # Called as a module the network runs its hooks, such as those of accelerate that load offloaded weights.
        self.vit.forward = partial(self.vit.forward_intermediates, indices=[self.block], **MAPS)
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
        """Images [B, 3, H, W] in [0, 1] -> features [B, grid, grid, width], fp32; the network runs in its own dtype."""
        size, images = self.config.image_size, images.float()
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        inputs = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        maps = self.vit(inputs.to(next(self.vit.parameters()).dtype))[0]
        maps = maps.float()  # on a CPU, bf16 cannot be resampled
        if maps.shape[-1] != self.grid_size:
            maps = F.interpolate(maps, (self.grid_size, self.grid_size), mode="bilinear", antialias=True)
        return maps.permute(0, 2, 3, 1)


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
    for module in ("lite0", "small_vit"):  # they register their networks with timm
        importlib.import_module(f"semhitok.models.{module}")
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
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        # The hub's client raises many types when it finds no network, and timm's layers for options that do not fit.
        if load and not isinstance(error, (RuntimeError, TypeError, AssertionError)):
            raise OSError(f"{role}: no weights for {name!r}: {reason}") from error
        raise ValueError(f"{role}: timm cannot build {name!r}: {reason}") from error
    if not hasattr(network, "forward_intermediates"):
        raise ValueError(f"{role}: expected a timm network with forward_intermediates, got {name!r} without it")
    return network


class TransformersNetwork(nn.Module):
    """A Vision Transformer of transformers (SigLIP, CLIP, AIMv2, DINOv2, DINOv3), with what `Teacher` uses of timm's.

    Nothing but the configuration, the means and deviations of its image processor and safetensors are read; no code is.

    Args:
        role: what the model is for; messages of errors begin with it.
        name: "transformers:owner/name" or "transformers:folder"; of a model of images and text, the vision part counts.
        load: load the weights; False leaves them random.
        checkpoint: None; weights are where the configuration is.
        image_size: side in pixels of its input; position embeddings are resampled to it where the model can do that.
        options: `revision` of the repository on the Hub.

    Raises:
        ValueError: not a Vision Transformer, not for images of this size, weights or their normalisation missing, a
            `checkpoint`, another option.
        OSError: there is no such model, or a file of it is not available.
        ImportError: transformers is not installed.
    """

    def __init__(
        self, role: str, name: str, *, load: bool, checkpoint: str | None, image_size: int, **options: Any
    ) -> None:
        super().__init__()
        if checkpoint is not None:
            raise ValueError(f"{role}.checkpoint: expected None for a network of transformers, got {checkpoint!r}")
        if options.keys() - {"revision"}:
            raise ValueError(f"{role}.options: expected only revision for a network of transformers, got {options}")
        transformers = require("transformers", "mllm")
        source = name.removeprefix(TRANSFORMERS)
        logging = transformers.utils.logging
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list the weights of the text part as unexpected
        try:
            self._build(transformers, source, options.get("revision", "main"), load, image_size)
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            expected = f"a Vision Transformer of transformers for images of {image_size} pixels"
            raise ValueError(f"{role}: expected {expected}, got {name!r}: {_first_line(error)}") from error
        except ImportError:
            raise
        except Exception as error:  # OSError, and what the hub's client and safetensors raise
            raise OSError(f"{role}: {name!r} is not available: {_first_line(error)}") from error
        finally:
            logging.set_verbosity(verbosity)

    def _build(self, transformers: Any, source: str, revision: str, load: bool, image_size: int) -> None:
        # Attention is not left to the configuration, which may name kernels to be fetched.
        how = {"trust_remote_code": False, "dtype": torch.float32, "attn_implementation": "sdpa"}
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        config = getattr(config, "vision_config", config)
        build = partial(transformers.AutoModel.from_config, config, **how)
        with torch.device("meta"):
            self.network: Any = build().eval()
            accepted = inspect.signature(self.network.forward).parameters
            # Not where it is not needed: resampling to the same size is not exact.
            resample = "interpolate_pos_encoding" in accepted and image_size != config.image_size
            self.arguments = {"interpolate_pos_encoding": True} if resample else {}
            states = self._states(torch.zeros(1, 3, image_size, image_size))[1:]
        self.grid = image_size // config.patch_size
        shapes = {tuple(state.shape) for state in states}
        if len(shapes) != 1 or any(len(s) != 3 or s[1] < self.grid**2 for s in shapes):
            raise ValueError(f"expected [1, {self.grid**2} or more, C] after each block, got {sorted(shapes)}")
        self.feature_info = [{"num_chs": states[0].shape[-1]} for _ in states]
        processor, _ = transformers.ImageProcessingMixin.get_image_processor_dict(source, revision=revision)
        if not {"image_mean", "image_std"} <= processor.keys():
            raise ValueError(f"expected image_mean and image_std of its image processor, got {', '.join(processor)}")
        self.pretrained_cfg = {"mean": processor["image_mean"], "std": processor["image_std"]}
        if not load:
            self.network = build()
            return
        # Towers that were saved alone, and as a part of a model, differ in this prefix.
        where: dict[str, Any] = {"config": config, "revision": revision, "key_mapping": {r"^vision_model\.": ""}}
        self.network, report = transformers.AutoModel.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, **where, **how
        )
        if report["missing_keys"]:
            raise ValueError(f"no weights for {', '.join(sorted(report['missing_keys'])[:3])}")

    def _states(self, images: Tensor) -> tuple[Tensor, ...]:
        """The embedded tokens and the output of every block, before the last normalisation."""
        states: tuple[Tensor, ...] = self.network(
            pixel_values=images, output_hidden_states=True, **self.arguments
        ).hidden_states
        return states

    def forward_intermediates(self, images: Tensor, indices: list[int], **_: Any) -> list[Tensor]:
        """Normalised images [B, 3, S, S] -> maps [B, C, h, w] of blocks; class and register tokens are left out."""
        states = self._states(images)[1:]
        patches = (states[index][:, -(self.grid**2) :] for index in indices)  # the other tokens come first
        return [tokens.mT.unflatten(2, (self.grid, self.grid)) for tokens in patches]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def vision_transformer(role: str, name: str, **options: Any) -> Any:
    """`timm_network`; also raises ValueError for a network without blocks of tokens."""
    vit = timm_network(role, name, **options)
    if not hasattr(vit, "blocks") or not hasattr(vit, "embed_dim"):
        raise ValueError(f"{role}: {name!r} is not a timm Vision Transformer")
    return vit
