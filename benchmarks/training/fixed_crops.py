"""Steps of both stages without and with the tables of fixed crops (`semhitok/training/fixed.py`), side by side.

    python -m benchmarks.training.fixed_crops

The tiny preset with EfficientNet-Lite0 (random weights: they do not change its speed) as teacher, for grids of 16 x 16
and 8 x 8 ids, on one thread. In each run every other step looks up what the others compute; rates are medians of these
steps, and leave out reading images, which is the same for both.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from semhitok.config import override, train_config
from semhitok.data.images import save_png
from semhitok.training import train
from semhitok.training.pixel import PixelStage
from semhitok.training.semantic import SemanticStage

PICTURES = 200
WARMUP = 4  # quantised steps that are not counted
SETTINGS = (
    "model.teacher.name=tf_efficientnet_lite0", "model.teacher.image_size=128", "model.teacher.block=-1",
    "model.teacher.options={output_stride: 16}", "data.fixed=true", "tracker=none",
    "semantic.steps=120", "semantic.continuous_steps=20", "semantic.init_tokens_per_code=8",
    "pixel.steps=120", "pixel.continuous_steps=20", "pixel.init_tokens_per_code=2",
)  # fmt: skip


def write_pictures(folder: Path) -> None:
    """Smooth noise of 64 x 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for n in range(PICTURES):
        coarse = torch.rand(1, 3, 8, 8, generator=generator)
        save_png(F.interpolate(coarse, (64, 64), mode="bicubic")[0].clamp(0, 1), folder / f"{n:03}.png")


def alternate(stage: type[SemanticStage] | type[PixelStage], table: str, report: Callable[[str], None]) -> None:
    """Make the stage hide its attribute `table` in every other step, and report rates after its last step."""
    prepare, backward, after_step = stage.prepare, stage.backward, stage.after_step
    seconds: dict[bool, list[float]] = {False: [], True: []}
    state = {}

    def timed_prepare(self, check_stop):
        began = time.perf_counter()
        prepare(self, check_stop)
        state["making"], state["table"] = time.perf_counter() - began, getattr(self, table)

    def timed_backward(self, batches, step):
        setattr(self, table, state["table"] if step % 2 else None)
        state["began"] = time.perf_counter()
        return backward(self, batches, step)

    def timed_after_step(self, outputs, step, seed):
        figures = after_step(self, outputs, step, seed)
        if step >= self.codes_from + WARMUP:
            seconds[bool(step % 2)].append(time.perf_counter() - state["began"])
        if step + 1 == self.config.steps:
            without, looked_up = (1 / median(seconds[known]) for known in (False, True))
            report(f"{self.name:10}  {without:15.1f}  {looked_up:4.1f}  {state['making']:19.1f}")
        return figures

    stage.prepare, stage.backward, stage.after_step = timed_prepare, timed_backward, timed_after_step  # type: ignore


def main() -> int:
    torch.set_num_threads(1)
    lines: list[str] = []
    grid = 0
    for stage, table in ((SemanticStage, "known_features"), (PixelStage, "known_codes")):
        alternate(stage, table, lambda line: lines.append(f"{f'{grid} x {grid}':8}  {line}"))
    with tempfile.TemporaryDirectory() as work:
        write_pictures(Path(work) / "pictures")
        for patch in (4, 8):
            config = train_config("semhitok-tiny")
            for setting in (*SETTINGS, f"model.patch_size={patch}"):
                override(config, setting)
            grid = config.model.grid_size
            train(config, [Path(work) / "pictures"], Path(work) / f"run-{patch}")
    print(f"{'ids':8}  {'stage':10}  {'steps/s without':>15}  {'with':>4}  {'making the table, s':>19}")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
