"""What the loop drives: a stage, and what all stages have in common."""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from semhitok import distributed
from semhitok.config import EngineConfig, StageConfig, TrainConfig
from semhitok.data.batch import Batch
from semhitok.models.vit import Trunk
from semhitok.tokenizer import SemHiTok
from semhitok.training import parallel
from semhitok.training.fixed import FixedCrops, fingerprint
from semhitok.training.parts import Figures, Part


class Counted(Protocol):
    """A micro-batch that says how large its global batch is, in the unit that throughput is logged in."""

    total: int


Loaded = TypeVar("Loaded")  # a micro-batch as the data give it
OnDevice = TypeVar("OnDevice", bound=Counted)  # the same, ready for `loss`
Output = TypeVar("Output")  # what the step needs later of a micro-batch's forward pass
Evaluation = tuple[dict[str, float], Tensor | None]  # held-out figures, equal on all processes; pictures [n, 3, H, W]


def bf16_is_slow(device: torch.device) -> bool:
    """Whether bf16 takes many times as long as fp32: on CPUs for which oneDNN has no bf16 kernels, such as AVX2's."""
    if device.type != "cpu":
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Stage(ABC, Generic[Loaded, OnDevice, Output]):
    """A stage of training: its parts are trained, the rest of the model stays as it is.

    In every step the loop calls `before_step`, `to_device`, `backward`, the optimisers of the parts, and `after_step`.

    Attributes:
        name: also that of the stage's folder.
        network: the part that `loss` trains.
        parts: all parts, the network first.
        codes_from: the first step that quantises; there is nothing to evaluate before it.
        best: the held-out figure by which the best model is kept, and the call that saves the model in a folder; None
            keeps none.
        config: steps, batch size, optimiser and checkpoint interval.
        device: of the model.
    """

    name: str
    network: Part
    parts: list[Part]
    codes_from = 0
    best: tuple[str, Callable[[Path], None]] | None = None

    def __init__(self, model: nn.Module, config: StageConfig, run_config: EngineConfig) -> None:
        self.config, self.run_config = config, run_config
        self.device = next(model.parameters()).device

    def setup(self) -> None:
        """Get ready to train: wrap the parts for the processes there are, and create their optimisers."""
        config = self.run_config
        first = self.name == config.stages[0] and distributed.rank() == 0
        if first and config.precision == "bf16" and bf16_is_slow(self.device):
            print("semhitok: warning: on this CPU, precision=fp32 is many times faster than bf16", file=sys.stderr)
        for part in self.parts:
            part.setup(self.run_config.shard)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.run_config.precision == "bf16")

    def prepare(self, check_stop: Callable[[], None]) -> None:
        """Compute what the steps look up, once, after a state was loaded. `check_stop` raises if a signal came."""

    def before_step(self, step: int, spare: Iterator[list[OnDevice]], seed: int) -> None:
        """Initialise from spare batches what has to be initialised before this step."""

    @abstractmethod
    def to_device(self, loaded: Sequence[Loaded], key: tuple[object, ...] = ()) -> list[OnDevice]:
        """Move a step's micro-batches to the device. Their random numbers follow from `key`."""

    @abstractmethod
    def loss(self, batch: OnDevice, step: int) -> tuple[Tensor, Figures, Output]:
        """The network's loss, figures for the log, and what the step needs later."""

    def backward(self, batches: Sequence[OnDevice], step: int) -> tuple[Figures, list[Output]]:
        """Compute the gradients of all parts; figures for the log, and the output of every micro-batch."""
        return self.network.accumulate(batches, lambda batch: self.loss(batch, step))

    def after_step(self, outputs: Sequence[Output], step: int, seed: int) -> Figures:
        """After the optimisers: update codebooks and averages from the step's outputs; figures for the log."""
        return {}

    def counters(self) -> dict[str, Tensor]:
        """Tensors that are not published with a model but that the next steps depend on."""
        return {}

    def codebooks(self) -> dict[str, Tensor]:
        """Tensors that must have the same bits on every process."""
        return {}

    @abstractmethod
    def debug_dump(self, batches: Sequence[OnDevice]) -> dict[str, Any]:
        """What to keep of a step whose loss is not finite."""


class TokenizerStage(Stage[Batch, Batch, Output]):
    """A stage that trains a part of a tokenizer on images. The rest has no gradients.

    Attributes:
        fixed: tables of the run's fixed crops; None where crops are not fixed.
        known_features: the table of the teacher's features, fp32 [count, h, w, C], while there is one.

    Raises:
        ValueError: `continuous_steps` of the stage's configuration are not less than its steps.
    """

    run_config: TrainConfig
    fixed: FixedCrops | None = None
    known_features: Tensor | None = None

    def __init__(self, model: SemHiTok, run_config: TrainConfig) -> None:
        config = run_config.stage_configs[self.name]
        super().__init__(model, config, run_config)
        self.model = model.requires_grad_(False)
        self.codes_from = getattr(config, "continuous_steps", 0)
        if self.codes_from >= config.steps:
            expected = f"less than {self.name}.steps {config.steps}"
            raise ValueError(f"{self.name}.continuous_steps: expected {expected}, got {self.codes_from}")

    def setup(self) -> None:
        for module in self.network.module.modules():
            if isinstance(module, Trunk):
                module.gradient_checkpointing = self.run_config.gradient_checkpointing
                if self.run_config.compile:
                    module.compile()
        super().setup()

    def to_device(self, loaded: Sequence[Batch], key: tuple[object, ...] = ()) -> list[Batch]:
        return [batch.to(self.device, key) for batch in loaded]

    def features(self, batch: Batch) -> Tensor:
        """The frozen teachers' features [B, h, w, C] of images, looked up where they are known."""
        if self.known_features is not None and batch.crops is not None:
            return self.known_features[batch.crops].to(self.device)
        with self.autocast():
            return self.model.semantic_features(batch.images)

    def teacher_identity(self) -> list[Any]:
        """What the features depend on besides the images, as JSON."""
        config, model = self.model.config, self.model
        settings = [dataclasses.asdict(teacher) for teacher in config.teachers]
        teachers = [teacher for teacher in (model.teacher, *model.more_teachers) if teacher is not None]
        return [settings, config.grid_size, self.run_config.precision, fingerprint(*teachers)]

    @abstractmethod
    def evaluate(self, batches: Iterator[tuple[Tensor, int]]) -> Evaluation:
        """Figures of held-out images: of the first `count` of each batch of (images [B, 3, H, W], count)."""

    def debug_dump(self, batches: Sequence[Batch]) -> dict[str, Any]:
        images = torch.cat([batch.images for batch in batches]).cpu()
        return {"images": images, "first": batches[0].first, "total": batches[0].total}

    def save_model(self, folder: Path) -> None:
        """Save the tokenizer as it is published; a collective call."""
        state = parallel.full_state(self.model.stored_state())
        if distributed.rank() == 0:
            self.model.save_pretrained(folder, state=state)
