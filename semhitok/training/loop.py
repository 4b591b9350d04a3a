"""The loop all stages share: batches, gradients, schedules, codebooks, checkpoints, log, evaluation, interruption.

A step is a pure function of (state, step number): batches and random numbers follow from the seed and the number alone,
and from an image's place in the global batch, not from the process that has it. So a run that was stopped, however
roughly, goes on from its last checkpoint and ends with the bytes it would have had, and one on several processes does
what one process would.

RUN/STAGE/step-00001000.pt   states, the last few; complete: weights, both optimisers, moving averages, data position
RUN/STAGE/best/              the tokenizer of the best evaluation
RUN/STAGE/log.jsonl          figures, the same bytes whatever happened to the run
RUN/tensorboard/STAGE/       the same and more, to look at
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from semhitok import distributed
from semhitok._files import write_atomic
from semhitok.data.training_images import MicroBatch
from semhitok.evaluation.metrics import METRICS
from semhitok.training import checkpoint, log
from semhitok.training.parts import Batch, seed_everything
from semhitok.training.stage import Stage


class Interrupted(Exception):
    """Training stopped by a signal, after saving. `signum` is the signal's number."""

    def __init__(self, stage: str, step: int, steps: int, signum: int) -> None:
        super().__init__(f"stopped after step {step} of {steps} of stage {stage}, all saved")
        self.signum = signum


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into `signum`, to be acted on after a step; a second one stops at once."""

    def __enter__(self) -> StopOnSignal:
        self.signum: int = 0
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        if distributed.rank() == 0:
            print("\nstopping after this step (again to stop at once)", file=sys.stderr)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def put_images(micro: Sequence[MicroBatch], device: torch.device, key: tuple[object, ...]) -> list[Batch]:
    """The micro-batches of a step on their way to `device`; their random numbers follow from `key`."""
    return [Batch(m.images.to(device, non_blocking=True), m.first, m.total, key) for m in micro]


@dataclass
class Run:
    """What a run's stages have in common."""

    config: Any  # TrainConfig, or the like of it
    folder: Path
    data: Any  # TrainingImages, or others that give batches and their position
    held_out: Any  # None, or a function that gives a fresh pass over the held-out batches
    stop: StopOnSignal
    device: torch.device
    put: Callable[[Any, torch.device, tuple[object, ...]], list[Any]] = put_images  # what `data` gives -> batches
    unit: str = "images"  # what a batch's `total` counts


def run_stage(stage: Stage, run: Run) -> float:
    """Train one stage to its end, from its last checkpoint where there is one.

    Leaves the trained weights (their moving average, where there is one) in `stage.model`. Returns the seconds spent
    training, over all sittings.

    Raises:
        Interrupted: SIGINT or SIGTERM came to any process; everything up to that step is saved.
        FloatingPointError: the loss is not finite; the state before the step and the batch are saved.
    """
    config, folder, steps = stage.config, run.folder / stage.name, stage.config.steps
    main, keep = distributed.rank() == 0, run.config.keep_checkpoints
    micro_batch = config.micro_batch or max(1, config.batch_size // distributed.world_size())
    for part in stage.parts:
        part.prepare(run.config)
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    start, state = checkpoint.load(folder, stage)
    seconds, best, position = state.get("seconds", 0.0), state.get("best"), state.get("data")
    if position is not None:
        position = position[distributed.rank()] if len(position) == distributed.world_size() else position[0]
    if start < steps:
        if main:
            log.cut_log(folder / "log.jsonl", start)
        batches = run.data.batches(config.batch_size, micro_batch, start, position)
        logger = log.Log(run.folder, run.config.tracker, stage.name, start, steps, run.unit) if main else None
        begun = time.perf_counter()
        try:
            for step in range(start, steps):
                seed_everything(run.config.seed, stage.name, step)
                stage.prepare(step, _spare_images(run, stage, micro_batch), run.config.seed)
                clock, position = time.perf_counter(), batches.position()
                micro = next(batches)
                waited = time.perf_counter() - clock
                batch = run.put(micro, run.device, (run.config.seed, stage.name, step))
                active = [part for part in stage.parts if step >= part.first_step]
                figures: dict[str, Any] = {}
                for part in active:
                    own = part.accumulate(batch, step)
                    prefix = "" if part is active[0] else f"{part.name}_"
                    figures |= {k if k.startswith(prefix) else prefix + k: v for k, v in own.items()}
                signum = _agree(figures, run.stop.signum, run.device)
                if signum < 0:
                    spent = seconds + time.perf_counter() - begun
                    checkpoint.save(folder, stage, step, seconds=spent, best=best, position=position, keep=keep)
                    raise FloatingPointError(checkpoint.save_culprit(folder, stage, step, batch, figures))
                for part in active:
                    part.step(step, steps)
                figures |= stage.update(step, run.config.seed)
                done = step + 1
                if logger is not None:
                    logger.waited += waited
                    logger.units += batch[0].total
                    logger.bar.update()
                if done % log.LOG_EVERY == 0 or done == steps:
                    record = _means(figures, run.device)
                    if logger is not None:
                        logger.write(done, record, batches.skipped)
                last = done == steps or signum != 0
                due = done % run.config.evaluation.every == 0 and done > stage.codes_from
                if run.held_out is not None and (due or done == steps):
                    best = _evaluate(stage, run, folder, done, best, logger)
                if done % config.checkpoint_every == 0 or last:
                    spent, position = seconds + time.perf_counter() - begun, batches.position()
                    checkpoint.save(folder, stage, done, seconds=spent, best=best, position=position, keep=keep)
                if signum:
                    raise Interrupted(stage.name, done, steps, signum)
        finally:
            batches.close()
            if logger is not None:
                logger.close()
        seconds += time.perf_counter() - begun
    for part in stage.parts:
        part.exchange_ema()  # for good: the average is what is published
    return seconds


def _spare_images(run: Run, stage: Stage, micro_batch: int) -> Iterator[list[Batch]]:
    """Images for initialisation, always the same ones, so that the batches of the steps stay what they are."""
    batches = run.data.other(0x5EED).batches(stage.config.batch_size, micro_batch, 0, None)
    try:
        for micro in batches:
            yield run.put(micro, run.device, (run.config.seed, stage.name, "spare"))
    finally:
        batches.close()


def _agree(figures: dict[str, Any], signum: int, device: torch.device) -> int:
    """The signal any process got, 0 for none; -1 where a loss or a gradient of any process is not finite."""
    names = [k for k in figures if k.endswith(("loss", "gradient_norm"))]
    finite = torch.stack([torch.as_tensor(figures[k], device=device).float().isfinite() for k in names]).all()
    if distributed.world_size() == 1:
        return signum if finite else -1
    status = torch.stack([(~finite).float(), torch.tensor(float(signum), device=device)])
    torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX)
    broken, signum = (int(x) for x in status.tolist())
    return -1 if broken else signum


def _means(figures: dict[str, Any], device: torch.device) -> dict[str, float]:
    """Figures as numbers, averaged over processes."""
    values = torch.stack([torch.as_tensor(v, device=device).detach().double() for v in figures.values()])
    return dict(zip(figures, distributed.mean_over_processes(values).tolist(), strict=True))


@contextlib.contextmanager
def published_weights(stage: Stage) -> Iterator[None]:
    """The model as it would be published: moving averages in the weights' place, in eval mode."""
    for part in stage.parts:
        part.exchange_ema()
        part.wrapped.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in stage.parts:
            part.wrapped.train()
            part.exchange_ema()


def _evaluate(
    stage: Stage, run: Run, folder: Path, step: int, best: float | None, logger: log.Log | None
) -> float | None:
    """Evaluate, and keep the tokenizer if it is the best so far; the best figure so far."""
    with published_weights(stage):
        figures, pictures = stage.evaluate(run.held_out())
        if stage.best is not None:
            best = _keep_best(stage, stage.best, figures, folder, step, best, logger is not None)
    if logger is not None:
        logger.evaluation(step, figures, pictures)
    return best


def _keep_best(
    stage: Stage, name: str, figures: dict[str, float], folder: Path, step: int, best: float | None, main: bool
) -> float:
    if name not in figures:
        raise ValueError(f"evaluation.best: expected one of {', '.join(figures)}, got {name!r}")
    value = figures[name]
    sign = -1 if METRICS[name].lower_is_better else 1
    if best is not None and sign * value <= sign * best:
        return best
    state = published_state(stage)
    if main:
        stage.model.save_pretrained(folder / "best", state=state)
        description = json.dumps({"step": step, **figures}, indent=2) + "\n"
        write_atomic(folder / "best" / "evaluation.json", description.encode())
    return value


def published_state(stage: Stage) -> dict[str, Tensor]:
    """The model's state dict, whole whatever process holds what; a collective call under FSDP."""
    state = stage.model.stored_state()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
