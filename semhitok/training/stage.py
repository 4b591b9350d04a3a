"""What the loop asks of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from semhitok.config import StageConfig
from semhitok.training.parts import Batch, Part


class Stage(Protocol):
    """What the loop asks of a stage. Its parts are trained; the rest of the model stays as it is."""

    name: str
    model: Any  # SemHiTok, or another module that the parts are of
    parts: list[Part]
    codes_from: int  # the first step that quantises; there is nothing to evaluate before

    @property
    def best(self) -> str | None:
        """The evaluation's figure by which the best checkpoint is kept; None keeps none."""

    @property
    def config(self) -> StageConfig:
        """Steps, batch size, optimiser and checkpoint interval of the stage."""

    def prepare(self, step: int, images: Iterator[list[Batch]], seed: int) -> None:
        """Before a step: statistics and codebook initialisation when their time has come."""

    def update(self, step: int, seed: int) -> dict[str, Any]:
        """After the optimiser's step: codebook averages and restarts; figures for the log."""

    def counters(self) -> dict[str, Tensor]:
        """Tensors that are no part of a published model but that the next steps depend on."""

    def codebooks(self) -> dict[str, Tensor]:
        """Tensors that must have the same bits on every process."""

    def evaluate(self, batches: Any) -> tuple[dict[str, float], Tensor | None]:
        """Figures of held-out images, the same on all processes, and pictures [n, 3, H, W] to look at."""
