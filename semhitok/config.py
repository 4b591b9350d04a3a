"""Configuration: plain dataclasses, the named presets, and strict reading of JSON.

`SemHiTokConfig` describes a model and travels with every checkpoint; `TrainConfig` adds what the
two training stages need. Every default is a choice of this project unless a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class TeacherConfig:
    """The frozen vision encoder whose features the semantic codes learn.

    name: a timm model name; any Vision Transformer with `forward_intermediates`.
    pretrained: weights come from timm's hub entry and are not stored in checkpoints of ours;
        otherwise the weights are stored, so that the codes can be reproduced.
    checkpoint: a local weights file that timm loads instead of the hub's.
    image_size: side in pixels the teacher sees; images are resized to it.
    block: index of the block whose patch tokens are used; -2 is the last but one.
    options: further keyword arguments of `timm.create_model`.
    """

    name: str = "vit_large_patch16_siglip_256.webli"
    pretrained: bool = True
    checkpoint: str | None = None
    image_size: int = 256
    block: int = -2
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ViTConfig:
    """A stack of transformer blocks: width in channels, depth in blocks, number of heads."""

    width: int
    depth: int
    heads: int


@dataclass
class SemHiTokConfig:
    """A tokenizer: K = num_codes semantic codes, each owning m = num_sub_codes pixel sub-codes.

    image_size, patch_size: pixels; the ids of an image form a square grid of
        image_size / patch_size on a side.
    sem_dim, pix_dim: dimensions of a semantic code and of a pixel sub-code.
    """

    image_size: int = 256
    patch_size: int = 16
    num_codes: int = 16384
    num_sub_codes: int = 12
    sem_dim: int = 32
    pix_dim: int = 32
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    semantic_decoder: ViTConfig = field(default_factory=lambda: ViTConfig(768, 3, 12))
    encoder: ViTConfig = field(default_factory=lambda: ViTConfig(768, 12, 12))
    decoder: ViTConfig = field(default_factory=lambda: ViTConfig(1024, 24, 16))

    def __post_init__(self) -> None:
        for name in (
            "image_size", "patch_size", "num_codes", "num_sub_codes", "sem_dim", "pix_dim",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of patch_size {self.patch_size}, got {self.image_size}")

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
        """Bits an image's ids take, without entropy coding, over its pixels."""
        return math.log2(self.vocabulary_size) / self.patch_size**2

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SemHiTokConfig:
        """The config a `to_dict` described; ValueError names a key that is unknown or ill-typed."""
        return from_dict(cls, data)


@dataclass
class DataConfig:
    """Crops for training.

    crop_scale: range of a random square crop's side, as a share of the image's shorter side,
        before it is resized; None takes crops of exactly image_size pixels, not resized.
    flip: mirror half of the crops.
    """

    crop_scale: tuple[float, float] | None = (0.6, 1.0)
    flip: bool = True
    workers: int = 0


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay; no weight decay on vectors and positions."""

    lr: float = 2e-4
    min_lr: float = 1e-5
    warmup_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    grad_clip: float = 1.0


@dataclass
class SemanticStageConfig:
    """Stage 1: distil the teacher into the semantic codebook.

    continuous_steps: first steps without quantisation, after which k-means sets the codebook.
    init_tokens_per_code: tokens gathered for that k-means, per code.
    restart_window: a code is restarted after this many tokens *per code* without a use.
    """

    steps: int = 100_000
    batch_size: int = 512
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    continuous_steps: int = 1000
    init_tokens_per_code: int = 64
    kmeans_iterations: int = 10
    decay: float = 0.99
    restart_window: int = 100
    cosine_weight: float = 1.0
    l1_weight: float = 1.0
    commitment_weight: float = 1.0
    checkpoint_every: int = 1000


@dataclass
class PixelStageConfig:
    """Stage 2: pixel branch on top of the frozen semantic branch.

    continuous_steps: first steps without pixel quantisation, after which k-means inside each
        semantic group sets the sub-codebooks.
    restart_window: a sub-code is restarted after its group received this many tokens without it.
    decay: of the moving averages that the sub-codes are.
    drop: share of images decoded with the mean of its sub-codebook in every sub-code's place, so that the semantic part
        alone stays decodable.
    perceptual_weight: weight of LPIPS (extra `train`); 0 leaves it out.
    """

    steps: int = 200_000
    batch_size: int = 256
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(1e-4, 1e-5))
    continuous_steps: int = 2000
    init_tokens_per_code: int = 16
    kmeans_iterations: int = 10
    decay: float = 0.99
    restart_window: int = 100
    drop: float = 0.1
    l1_weight: float = 1.0
    l2_weight: float = 1.0
    perceptual_weight: float = 1.0
    commitment_weight: float = 0.25
    checkpoint_every: int = 1000


@dataclass
class TrainConfig:
    """Everything a training run depends on besides its images."""

    model: SemHiTokConfig = field(default_factory=SemHiTokConfig)
    data: DataConfig = field(default_factory=DataConfig)
    semantic: SemanticStageConfig = field(default_factory=SemanticStageConfig)
    pixel: PixelStageConfig = field(default_factory=PixelStageConfig)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _siglip_256(**overrides: Any) -> TrainConfig:
    return TrainConfig(model=SemHiTokConfig(**overrides))


def _siglip_384(**overrides: Any) -> TrainConfig:
    # The teacher's 27 x 27 patches are resampled to the tokenizer's 24 x 24.
    teacher = TeacherConfig("vit_so400m_patch14_siglip_384.webli", image_size=384)
    return TrainConfig(model=SemHiTokConfig(image_size=384, teacher=teacher, **overrides))


def _tiny() -> TrainConfig:
    # The teacher is a stand-in: a fixed Vision Transformer with random weights. It knows nothing
    # of meaning; it only lets the whole pipeline run where no weights can be fetched.
    teacher = TeacherConfig(
        "vit_tiny_patch16_224",
        pretrained=False,
        image_size=64,
        options={"patch_size": 4, "embed_dim": 96, "depth": 3, "num_heads": 3},
    )
    model = SemHiTokConfig(
        image_size=64,
        patch_size=4,
        num_codes=256,
        num_sub_codes=8,
        sem_dim=16,
        pix_dim=16,
        teacher=teacher,
        semantic_decoder=ViTConfig(96, 1, 3),
        encoder=ViTConfig(128, 2, 2),
        decoder=ViTConfig(128, 2, 2),
    )
    optimizer = OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_share=0.05)
    return TrainConfig(
        model=model,
        data=DataConfig(crop_scale=None),
        semantic=SemanticStageConfig(
            steps=200,
            batch_size=8,
            optimizer=optimizer,
            continuous_steps=50,
            checkpoint_every=100,
        ),
        pixel=PixelStageConfig(
            steps=1000,
            batch_size=8,
            optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-5, warmup_share=0.05),
            continuous_steps=100,
            decay=0.97,
            l2_weight=5.0,
            perceptual_weight=0.0,
            checkpoint_every=100,
        ),
    )


PRESETS: dict[str, typing.Callable[[], TrainConfig]] = {
    "semhitok-tiny": _tiny,
    "semhitok-256": _siglip_256,
    "semhitok-384": _siglip_384,
    "semhitok-256-24k": lambda: _siglip_256(num_codes=24576, num_sub_codes=8),
    "semhitok-384-24k": lambda: _siglip_384(num_codes=24576, num_sub_codes=8),
}


def train_preset(name: str) -> TrainConfig:
    """A fresh training configuration by name; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]()


def preset(name: str) -> SemHiTokConfig:
    """A fresh model configuration by name; ValueError lists the names there are."""
    return train_preset(name).model


def override(config: Any, assignment: str) -> None:
    """Set one field by a dotted path, such as `pixel.optimizer.lr=1e-3`; the value is YAML."""
    import yaml

    path, separator, text = assignment.partition("=")
    if not separator:
        raise ValueError(f"override: expected name=value, got {assignment!r}")
    *parents, name = path.strip().split(".")
    target = config
    for parent in parents:
        target = getattr(target, parent, None)
    hints = typing.get_type_hints(type(target)) if dataclasses.is_dataclass(target) else {}
    if name not in hints:
        raise ValueError(f"override: no such setting {path.strip()!r}")
    setattr(target, name, _convert(hints[name], yaml.safe_load(text), path.strip()))
    if hasattr(target, "__post_init__"):
        target.__post_init__()


def from_dict(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Build a dataclass from nested dicts, refusing unknown keys and wrong types."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; expected {', '.join(hints)}")
    return cls(**{k: _convert(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or ValueError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        return None if value is None else _convert(arguments[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {value!r}")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads "1e-3" (no dot) as text.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    expected = origin or hint
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value
