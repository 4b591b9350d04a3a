"""The loop both stages share: data, optimiser, schedule, checkpoints, log, interruption.

A step is a pure function of (state, step number): batches and random numbers follow from the seed
and the number alone. So a run that was stopped, however roughly, goes on from its last checkpoint
and ends with the bytes it would have had.
"""

from __future__ import annotations

import io
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from semhitok._files import write_atomic
from semhitok._optional import require
from semhitok.config import OptimizerConfig, PixelStageConfig, SemanticStageConfig
from semhitok.data.crops import RandomCrops
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

LOG_EVERY = 10  # steps
USAGE_WINDOW = 50  # steps, a multiple of LOG_EVERY


class Stage(Protocol):
    """What the loop asks of a stage. `modules` are trained; the rest of the model stays as it is."""

    name: str
    model: SemHiTok
    modules: list[nn.Module]

    @property
    def config(self) -> SemanticStageConfig | PixelStageConfig:
        """Steps, batch size, optimiser and checkpoint interval of the stage."""

    def prepare(self, step: int, images: Iterator[Tensor], generator: Generator) -> None:
        """Before a step: statistics and codebook initialisation when their time has come."""

    def loss(self, images: Tensor, step: int, generator: Generator) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch, and figures for the log (numbers or scalar tensors)."""

    def update(self, step: int, generator: Generator) -> dict[str, Any]:
        """After the optimiser's step: codebook averages and restarts; figures for the log."""

    def counters(self) -> dict[str, Tensor]:
        """Tensors that are no part of a published model but that the next steps depend on."""


class Interrupted(Exception):
    """Training stopped by a signal, after saving. `signum` is the signal's number."""

    def __init__(self, stage: str, step: int, steps: int, signum: int) -> None:
        super().__init__(f"stopped after step {step} of {steps} of stage {stage}, all saved")
        self.signum = signum


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into `signum`, to be acted on after a step; a second one stops at once."""

    def __enter__(self) -> StopOnSignal:
        self.signum: int | None = None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise KeyboardInterrupt
        self.signum = signum
        print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def learning_rate(step: int, steps: int, config: OptimizerConfig) -> float:
    """Linear warm-up to lr, then a cosine down to min_lr."""
    warmup = max(1, round(steps * config.warmup_share))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2


def _optimizer(modules: list[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    decayed: list[Tensor] = []
    plain: list[Tensor] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and not name.endswith("positions")
                (decayed if matrix else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def run_stage(stage: Stage, data: RandomCrops, folder: Path, stop: StopOnSignal, *, seed: int) -> float:
    """Train one stage to its end, from its last checkpoint in `folder` where there is one.

    Leaves the trained weights in `stage.model`. Returns the seconds spent training, over all
    sittings.

    Raises:
        Interrupted: SIGINT or SIGTERM came; everything up to that step is saved.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
    """
    model, config = stage.model, stage.config
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    optimizer = _optimizer(stage.modules, config.optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start, seconds = _load(folder / "state.pt", stage, optimizer)
    _cut_log(folder / "log.jsonl", start)
    if start == config.steps:
        return seconds
    # Initialisation draws images of its own, so that the batches of the steps stay what they are.
    spare = RandomCrops(data.paths, data.size, data.config, data.seed ^ 0x5EED)
    progress = require("tqdm", "models").tqdm(
        total=config.steps, initial=start, desc=stage.name, unit="step", disable=None
    )
    begun = time.perf_counter()
    with progress, (folder / "log.jsonl").open("a") as log:
        batches = iter(data.batches(config.batch_size, start, config.steps))
        for step in range(start, config.steps):
            generator = Generator().manual_seed((seed << 32 ^ step << 1 ^ (stage.name == "pixel")) & (2**63 - 1))
            stage.prepare(step, _endless(spare, config.batch_size, device), generator)
            images = next(batches).to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.optimizer)
            loss, figures = stage.loss(images, step, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.optimizer.grad_clip)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(
                    f"{stage.name}: loss {loss.item()}, gradient norm {norm.item()} at step {step}"
                )
            optimizer.step()
            figures |= stage.update(step, generator)
            done = step + 1
            progress.update()
            if done % LOG_EVERY == 0 or done == config.steps:
                figures = {"loss": loss, "gradient_norm": norm, **figures}
                record = {k: float(torch.as_tensor(v).detach()) for k, v in figures.items()}
                log.write(json.dumps({"step": done, **record}) + "\n")
                log.flush()
                progress.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                # Where no terminal shows the bar, a line a tenth of the way.
                if progress.disable and done * 10 // config.steps > (done - LOG_EVERY) * 10 // config.steps:
                    print(f"{stage.name}: step {done} of {config.steps}, loss {record['loss']:.4f}", file=sys.stderr)
            if done % config.checkpoint_every == 0 or done == config.steps or stop.signum:
                spent = seconds + time.perf_counter() - begun
                _save(folder / "state.pt", stage, optimizer, done, spent)
            if stop.signum:
                raise Interrupted(stage.name, done, config.steps, stop.signum)
    return seconds + time.perf_counter() - begun


def _endless(data: RandomCrops, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    number = 0
    while True:
        for images in data.batches(batch_size, number, number + 1):
            yield images.to(device)
        number += 1


def gather(batches: Iterable[Tensor], minimum: int, function: Any) -> tuple[Tensor, ...]:
    """Apply `function` to batches until `minimum` rows are there; its outputs concatenated."""
    rows: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        for images in batches:
            rows.append(function(images))
            if sum(len(row[0]) for row in rows) >= minimum:
                break
    return tuple(torch.cat(column) for column in zip(*rows, strict=True))


def usage_figures(usage: CodeUsage, codes: Tensor, step: int) -> dict[str, float]:
    """Count ids; at the end of every window the usage and perplexity in it, then from nought."""
    usage.update(codes)
    if (step + 1) % USAGE_WINDOW:
        return {}
    summary = usage.summary()
    usage.reset()
    return {f"{view}_{key}": v for view, row in summary.items() for key, v in row.items()}


def _save(path: Path, stage: Stage, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    buffer = io.BytesIO()
    torch.save(
        {
            "stage": stage.name,
            "step": step,
            "seconds": seconds,
            "model": stage.model.stored_state(),
            "counters": stage.counters(),
            "optimizer": optimizer.state_dict(),
        },
        buffer,
    )
    write_atomic(path, buffer.getbuffer())


def read_state(path: Path) -> dict[str, Any]:
    """A stage's state file. It holds tensors and numbers; reading it runs no code of it.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"stage", "step", "model"} <= state.keys():
            raise ValueError("not a state of training")
    except Exception as error:  # torch.load has no one error for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a whole training state: {reason}") from error
    return state


def _load(path: Path, stage: Stage, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore the stage from `path`; (steps done, seconds spent), (0, 0.0) without a file."""
    if not path.exists():
        return 0, 0.0
    state = read_state(path)
    if state["stage"] != stage.name:
        raise ValueError(f"{path}: expected stage {stage.name}, got {state['stage']}")
    stage.model.load_state_dict(state["model"], strict=False)
    for name, tensor in stage.counters().items():
        tensor.copy_(state["counters"][name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _cut_log(path: Path, step: int) -> None:
    """Drop what a stopped run logged after the checkpoint it goes on from."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except ValueError:  # the half line of a killed process
            break
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())
