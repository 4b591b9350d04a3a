"""Configuration: plain dataclasses, which JSON and YAML fill, strictly.

`SemHiTokConfig` describes a model and travels with every checkpoint; `TrainConfig` adds what the training stages need.
Every default is a choice of this project unless a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from semhitok._settings import (
    Count,
    Decay,
    Index,
    Natural,
    Positive,
    Range,
    Settings,
    Share,
    Size,
    Weight,
    Workers,
    read_yaml,
)
from semhitok._settings import from_dict as from_dict
from semhitok._settings import override as override

T = TypeVar("T")

PRECISIONS = ("fp32", "bf16")  # of networks; bf16 is autocast
Scale = Annotated[float, Range(0, 1, "(]")]
PRESETS = Path(__file__).parent / "presets"


@dataclass
class TeacherConfig(Settings):
    """The frozen vision encoder whose features the semantic codes learn.

    name: a timm model name, `hf-hub:owner/name` or `local-dir:folder`; any network with `forward_intermediates`: Vision
        Transformers, convolutional networks, hybrids. Or `transformers:owner/name` or `transformers:folder`, a Vision
        Transformer of transformers (SigLIP, CLIP, AIMv2, DINOv2, DINOv3), or the vision part of a model of images and
        text.
    pretrained: the weights come from where `name` says, so checkpoints leave them out; False stores them there.
    checkpoint: a local weights file that timm loads instead of the hub's.
    image_size: side in pixels of the teacher's input, to which images are resized.
    block: index of the block, or in networks with stages of the stage, whose features are used; -2 is the last but one.
    options: further keyword arguments of `timm.create_model`; for transformers only `revision`.
    share: weight of this teacher among several; their sum does not matter.

    Raises: ValueError: a number out of its range.
    """

    name: str = "vit_large_patch16_siglip_256.webli"
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: Size = 256
    block: Index = -2
    options: dict[str, Any] = field(default_factory=dict)
    share: Positive = 1.0


@dataclass
class ViTConfig(Settings):
    """A stack of transformer blocks: `width` channels, `depth` blocks (or 0), `heads` attention heads."""

    width: Size
    depth: Annotated[int, Range(0, 1000)]
    heads: Size


@dataclass
class SemHiTokConfig(Settings):
    """An image tokenizer: K = num_codes semantic codes, each owning m = num_sub_codes pixel sub-codes.

    image_size, patch_size: pixels; the ids of an image form a square grid of image_size / patch_size on a side.
    num_codes, num_sub_codes: K and m.
    sem_dim, pix_dim: dimensions of a semantic code and of a pixel sub-code.
    teacher, semantic_decoder, encoder, decoder: the networks; the last two are those of the pixel branch.
    adaptive: sub-codebooks have sizes of their own, K * m in all. The pixel stage sets them when it begins to quantise,
        so that the error falls most.
    more_teachers: teachers besides the first. Their features are joined, each with its share; semantic codes learn all.

    Raises:
        ValueError: a size out of its range, or image_size not a multiple of patch_size.
    """

    image_size: Size = 256
    patch_size: Size = 16
    num_codes: Count = 16384
    num_sub_codes: Count = 12
    sem_dim: Size = 32
    pix_dim: Size = 32
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    semantic_decoder: ViTConfig = field(default_factory=lambda: ViTConfig(768, 3, 12))
    encoder: ViTConfig = field(default_factory=lambda: ViTConfig(768, 12, 12))
    decoder: ViTConfig = field(default_factory=lambda: ViTConfig(1024, 24, 16))
    adaptive: bool = False
    more_teachers: list[TeacherConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {self.patch_size}, got {self.image_size}")

    @property
    def teachers(self) -> list[TeacherConfig]:
        """All teachers, in the order of their features."""
        return [self.teacher, *self.more_teachers]

    @property
    def grid_size(self) -> int:
        """Ids on one side of an image."""
        return self.image_size // self.patch_size

    @property
    def vocabulary_size(self) -> int:
        """Number of flat ids, K * m."""
        return self.num_codes * self.num_sub_codes

    @property
    def bits_per_pixel(self) -> float:
        """Bits of an image's ids, without entropy coding, divided by its pixels."""
        return math.log2(self.vocabulary_size) / self.patch_size**2

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON can store them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SemHiTokConfig:
        """The config that `to_dict` described; ValueError names an unknown key or a value of a wrong type."""
        return from_dict(cls, data)


@dataclass
class DataConfig(Settings):
    """Images for training: files and folders, or webdataset shards.

    crop_scale: range of the side of a random square crop, as a share of the image's shorter side, before it is resized;
        None takes crops of exactly image_size pixels, not resized.
    flip: mirror half of the crops.
    fixed: every image gives the same crop each time, mirrored or not: resized and cropped at the centre, as evaluation
        does. Needs image files and crop_scale None. The outputs of a stage's frozen networks are then computed once,
        before its first step, and kept in the run's folder.
    workers: processes that read, for each training process; 0 reads in it; "auto" leaves the number to the machine.
    shuffle_buffer: samples of a shard stream that are shuffled together; image files are all shuffled together.
    """

    crop_scale: tuple[Scale, Scale] | None = (0.6, 1.0)
    flip: bool = True
    fixed: bool = False
    workers: Workers = "auto"
    shuffle_buffer: Annotated[int, Range(1, 10**7)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop_scale is not None and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError(f"crop_scale: expected the smaller value first, got {list(self.crop_scale)}")


@dataclass
class OptimizerConfig(Settings):
    """AdamW with linear warm-up and cosine decay; there is no weight decay on vectors and positions."""

    lr: Annotated[float, Range(0, 1000, "(]")] = 2e-4
    min_lr: Annotated[float, Range(0, 1000)] = 1e-5
    warmup_share: Share = 0.1
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: Weight = 1e-4
    grad_clip: Positive = 1.0


_pixel_optimizer = functools.partial(OptimizerConfig, lr=1e-4, betas=(0.9, 0.95))


@dataclass
class StageConfig(Settings):
    """What all stages have.

    steps: updates of the weights.
    batch_size: images in an update, over all processes and accumulated gradients.
    micro_batch: images that a process passes through the network at once; None is its whole share of the batch.
        Gradients are accumulated over batch_size / (processes * micro_batch) passes.
    checkpoint_every: steps between two saved states.
    """

    steps: Count = 100_000
    batch_size: Count = 512
    micro_batch: Count | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint_every: Count = 1000


@dataclass
class SemanticStageConfig(StageConfig):
    """Stage 1: distil the teacher into the semantic codebook.

    continuous_steps: number of first steps without quantisation, after which k-means sets the codebook.
    init_tokens_per_code: tokens gathered for that k-means, per code.
    decay: of the moving average that a code is (norm-EMA): the weight of its old value.
    restart_window: a code is restarted after this many tokens *per code* without being used.
    collapse_usage: warn when the share of codes used in a window of tokens falls below this.
    """

    continuous_steps: Natural = 1000
    init_tokens_per_code: Count = 64
    kmeans_iterations: Natural = 10
    decay: Decay = 0.99
    restart_window: Count = 100
    cosine_weight: Weight = 1.0
    l1_weight: Weight = 1.0
    commitment_weight: Weight = 1.0
    collapse_usage: Share = 0.25


@dataclass
class CriticConfig(Settings):
    """The critic (discriminator) of the reconstruction loss; `weight` 0 leaves it out.

    kind: "patch", a PatchGAN trained from scratch; "dino", trainable heads on a frozen timm backbone.
    loss: "hinge" or "non_saturating".
    weight: of the critic's verdict in the reconstruction loss.
    adaptive: multiply the weight by |gradient of the other terms| / |gradient of the critic's term|, both at the
        decoder's last layer (VQGAN, equation 7), clamped to `adaptive_range`.
    train_from: step from which the critic learns.
    start: step from which its verdict is in the reconstruction loss; the weight ramps up over `ramp` steps.
    lecam: weight of the LeCAM regulariser (Tseng et al. 2021); 0 leaves it out.
    augment: DiffAugment (Zhao et al. 2020) of what the critic sees: colour, translation and cutout.
    shift: the critic sees a random window this many pixels smaller than the image, so that the decoder's grid of
        patches and its own do not coincide; None takes the patch size.
    width, layers: of "patch": channels of its first layer, number of layers that halve the map.
    backbone, checkpoint, image_size, blocks: of "dino": the timm model, a local weights file instead of the hub's, the
        side in pixels it sees, and the blocks whose tokens the heads judge.
    """

    kind: str = "patch"
    loss: str = "hinge"
    weight: Weight = 0.5
    adaptive: bool = False
    adaptive_range: tuple[Weight, Weight] = (0.015, 1e4)
    train_from: Natural = 16_000
    start: Natural = 20_000
    ramp: Natural = 4_000
    lecam: Weight = 0.0
    augment: bool = False
    shift: Natural | None = None
    width: Size = 64
    layers: Annotated[int, Range(1, 16)] = 3
    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    checkpoint: str | None = None
    image_size: Size = 224
    blocks: list[Index] = field(default_factory=lambda: [2, 5, 8, 11])
    optimizer: OptimizerConfig = field(default_factory=_pixel_optimizer)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("kind", ("patch", "dino")), ("loss", ("hinge", "non_saturating"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected {' or '.join(choices)}, got {getattr(self, name)!r}")
        if self.adaptive_range[0] > self.adaptive_range[1]:
            raise ValueError(f"adaptive_range: expected the smaller value first, got {list(self.adaptive_range)}")


@dataclass
class ReconstructionConfig(Settings):
    """Weights of the terms of the reconstruction loss; a term of weight 0 is left out.

    l1, l2: mean absolute and mean squared error of pixels in [0, 1].
    lpips: the learnt perceptual distance (extra `train`), with VGG backbone.
    squeezenet: `SqueezeNetDistance`, another perceptual distance, whose weights are installed with the extra `demo`.
    """

    l1: Weight = 1.0
    l2: Weight = 1.0
    lpips: Weight = 1.0
    squeezenet: Weight = 0.0
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass
class PixelStageConfig(StageConfig):
    """Stage 2: the pixel branch on top of the frozen semantic branch.

    continuous_steps: number of first steps without pixel quantisation, after which k-means inside each semantic group
        sets the sub-codebooks.
    init_tokens_per_code: tokens gathered for that k-means, per sub-code; 0 keeps the sub-codebooks of `start_from`.
    restart_window: a sub-code is restarted after its group received this many tokens without using it; with adaptive
        sizes, this many for each sub-code of the group.
    decay: of the moving averages that the sub-codes are.
    drop: share of images decoded with the mean of its sub-codebook in place of every sub-code, so that the semantic
        part can be decoded alone.
    ema_decay: of the moving average of the weights, which is evaluated and published; 0 publishes the weights.
    """

    steps: Count = 200_000
    batch_size: Count = 256
    optimizer: OptimizerConfig = field(default_factory=_pixel_optimizer)
    continuous_steps: Natural = 2000
    init_tokens_per_code: Weight = 16
    kmeans_iterations: Natural = 10
    decay: Decay = 0.99
    restart_window: Count = 100
    drop: Share = 0.1
    commitment_weight: Weight = 0.25
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    ema_decay: Decay = 0.999


@dataclass
class DecoderStageConfig(StageConfig):
    """Stage 3, optional: the pixel decoder alone keeps learning, with all codes frozen (paper: enhanced decoder).

    ema_decay: as in the pixel stage.
    """

    steps: Count = 50_000
    batch_size: Count = 256
    optimizer: OptimizerConfig = field(default_factory=_pixel_optimizer)
    loss: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    ema_decay: Decay = 0.999


@dataclass
class EvaluationConfig(Settings):
    """Evaluation on held-out images while training.

    every: steps between two evaluations; there is also one at the end of every stage.
    batch_size: images that a process passes through the network at once.
    pictures: held-out images shown with their reconstructions.
    best: metric by which the best checkpoint is kept, one of those that the evaluation prints.
    """

    every: Count = 5000
    batch_size: Count = 16
    pictures: Annotated[int, Range(0, 1000)] = 8
    best: str = "psnr"


@dataclass
class EngineConfig(Settings, ABC):
    """What the training loop reads from the configuration of a run.

    stages: the stages that run, in order.
    precision: "bf16" runs the networks under bf16 autocast; weights, optimiser, quantisation and losses stay in fp32.
    gradient_checkpointing: recompute the activations of transformer blocks instead of keeping them.
    shard: split weights, gradients and optimiser state over the processes (FSDP2) instead of copying them (DDP).
    keep_checkpoints: states kept for each stage.
    tracker: "tensorboard", "wandb" or "none".
    """

    stages: list[str] = field(default_factory=list)
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    shard: bool = False
    keep_checkpoints: Count = 2
    tracker: str = "tensorboard"
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("precision", PRECISIONS), ("tracker", ("tensorboard", "wandb", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        order = list(self.stage_configs)
        if not self.stages or [s for s in order if s in self.stages] != self.stages:
            raise ValueError(f"stages: expected some of {', '.join(order)}, in this order, got {self.stages}")

    @property
    @abstractmethod
    def stage_configs(self) -> Mapping[str, StageConfig]:
        """The configurations of all stages there are, in the order in which they run."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class TrainConfig(EngineConfig):
    """Everything that the training of a tokenizer depends on besides its images.

    start_from: a finished tokenizer (folder, or name on the Hub) to start from; None starts from scratch.
    compile: torch.compile the transformer trunks.
    """

    stages: list[str] = field(default_factory=lambda: ["semantic", "pixel"])
    start_from: str | None = None
    model: SemHiTokConfig = field(default_factory=SemHiTokConfig)
    data: DataConfig = field(default_factory=DataConfig)
    semantic: SemanticStageConfig = field(default_factory=SemanticStageConfig)
    pixel: PixelStageConfig = field(default_factory=PixelStageConfig)
    decoder: DecoderStageConfig = field(default_factory=DecoderStageConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compile: bool = False

    @property
    def stage_configs(self) -> dict[str, StageConfig]:
        return {"semantic": self.semantic, "pixel": self.pixel, "decoder": self.decoder}


def preset_names(family: str = "semhitok") -> list[str]:
    """The names of a family's presets, which are the files FAMILY-*.yaml in semhitok/presets."""
    return sorted(path.stem for path in PRESETS.glob(f"{family}-*.yaml"))


def train_config(source: str) -> TrainConfig:
    """A training configuration: a preset by name, or a YAML file (a name ending in .yaml or .yml).

    Settings that the file leaves out have the defaults of the dataclasses here.

    Raises:
        ValueError: no such preset (the message lists them), not YAML, an unknown setting or a value of a wrong type.
        OSError: the file cannot be read.
    """
    return read_config(TrainConfig, source, "semhitok")


def read_config(cls: type[T], source: str, family: str) -> T:
    """A configuration from a YAML file or a preset of `family`; raises what `train_config` raises."""
    if source.endswith((".yaml", ".yml")):
        path = Path(source)
    else:
        path, names = PRESETS / f"{source}.yaml", preset_names(family)
        if source not in names:
            raise ValueError(f"preset: expected one of {', '.join(names)}, or a .yaml file, got {source!r}")
    data = read_yaml(path)
    try:
        return from_dict(cls, {} if data is None else data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def preset(name: str) -> SemHiTokConfig:
    """A preset's model configuration, a new one at every call; ValueError lists the presets."""
    return train_config(name).model
