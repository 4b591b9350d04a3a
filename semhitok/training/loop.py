"""The loop that all stages share: batches, gradients, schedules, codebooks, checkpoints, log, evaluation, interruption.

A step is a pure function of (state, step number): batches and random numbers follow from the seed, the step number and
an image's place in the global batch, not from the process that has it. So a run that was stopped in any way resumes
from its last checkpoint and ends with the bytes it would have had, and several processes compute what one would.

RUN/STAGE/step-00001000.pt   the last few states: weights, optimisers, moving averages, data position
RUN/STAGE/best/              the tokenizer of the best evaluation
RUN/STAGE/log.jsonl          figures, the same bytes whether or not the run was interrupted
RUN/tensorboard/STAGE/       the same and more, for TensorBoard
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Generic, Protocol

import torch

from semhitok import distributed
from semhitok._files import write_json
from semhitok.config import EngineConfig
from semhitok.data.batch import seed_everything
from semhitok.data.skipped import Skipped
from semhitok.data.stream import Batches
from semhitok.evaluation.metrics import METRICS
from semhitok.training import checkpoint, log
from semhitok.training.parts import Figures
from semhitok.training.stage import Evaluation, Loaded, OnDevice, Output, Stage


class Interrupted(Exception):
    """Training stopped by a signal, after saving. `signum` is the signal's number."""

    def __init__(self, stage: str, step: int, steps: int, signum: int) -> None:
        super().__init__(f"stopped after step {step} of {steps} of stage {stage}, all saved")
        self.signum = signum


class StopOnSignal:
    """Keeps the first SIGINT or SIGTERM as `signum`, to be acted on after a step; a second one stops at once."""

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


class Data(Protocol[Loaded]):
    """What a run trains on."""

    skipped: Skipped

    def batches(
        self, batch_size: int, micro_batch: int, step: int, position: Mapping[str, Any] | None
    ) -> Batches[list[Loaded]]:
        """The batches after `step` steps, which ended at `position`."""


@dataclass
class Run(Generic[Loaded]):
    """What the stages of a run share."""

    config: EngineConfig
    folder: Path
    data: Data[Loaded]  # what it trains on
    stop: StopOnSignal  # tells whether a signal came
    evaluate_every: int  # steps between two evaluations
    spare: Callable[[], Data[Loaded]] | None = None  # data for initialisation, other than the batches of the steps
    unit: str = "images"  # what the `total` of a batch counts


def run_stage(
    stage: Stage[Loaded, OnDevice, Output], run: Run[Loaded], evaluate: Callable[[], Evaluation] | None = None
) -> float:
    """Train one stage to its end, from its last checkpoint if there is one.

    Leaves the trained weights (or their moving average, if there is one) in the model. `evaluate` evaluates the stage
    on held-out data; None leaves evaluation out.

    Returns:
        The seconds spent training, including those before the run was interrupted.

    Raises:
        Interrupted: SIGINT or SIGTERM came to any process; everything up to that step is saved.
        FloatingPointError: the loss is not finite; the state before the step and the batch are saved.
    """
    config, folder, steps, seed = stage.config, run.folder / stage.name, stage.config.steps, run.config.seed
    main, keep = distributed.rank() == 0, run.config.keep_checkpoints
    micro_batch = config.micro_batch or max(1, config.batch_size // distributed.world_size())
    stage.setup()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
    start, state = checkpoint.load(folder, stage)
    seconds, best, position = state.get("seconds", 0.0), state.get("best"), state.get("data")
    for of_process in position or ():
        if Skipped.is_state(found := of_process.get("skipped")):
            run.data.skipped.know(found)
    if position is not None:
        position = position[distributed.rank()] if len(position) == distributed.world_size() else position[0]
    if start < steps:
        if main:
            log.cut_log(folder / "log.jsonl", start)
        begun = time.perf_counter()
        stage.prepare(lambda: _check_stop(stage, run, start))
        try:
            batches = run.data.batches(config.batch_size, micro_batch, start, position)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}" if start else str(error)) from None
        logger = log.Log(run.folder, run.config.tracker, stage.name, start, steps, run.unit) if main else None
        try:
            for step in range(start, steps):
                seed_everything(seed, stage.name, step)
                stage.before_step(step, _spare_batches(stage, run, micro_batch), seed)
                clock, position = time.perf_counter(), batches.position()
                loaded = next(batches)
                waited = time.perf_counter() - clock
                batch = stage.to_device(loaded, (seed, stage.name, step))
                figures, outputs = stage.backward(batch, step)
                signum = _agree(figures, run.stop.signum, stage.device)
                if signum < 0:
                    spent = seconds + time.perf_counter() - begun
                    checkpoint.save(folder, stage, step, seconds=spent, best=best, position=position, keep=keep)
                    raise FloatingPointError(checkpoint.save_debug_dump(folder, stage, step, batch, figures))
                for part in stage.parts:
                    part.step(step, steps)
                figures |= stage.after_step(outputs, step, seed)
                done = step + 1
                if logger is not None:
                    logger.waited += waited
                    logger.units += batch[0].total
                    logger.bar.update()
                if done % log.LOG_EVERY == 0 or done == steps:
                    record = _means(figures, stage.device)
                    if logger is not None:
                        logger.write(done, record, len(batches.skipped), {part.name: part.lr for part in stage.parts})
                last = done == steps or signum != 0
                due = done % run.evaluate_every == 0 and done > stage.codes_from
                if evaluate is not None and (due or done == steps):
                    best = _evaluate(stage, evaluate, folder, done, best, logger)
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


def _check_stop(stage: Stage[Loaded, OnDevice, Output], run: Run[Loaded], step: int) -> None:
    """Raise Interrupted on all processes if a signal came to any of them."""
    signum = max(distributed.gather_objects(run.stop.signum))
    if signum:
        raise Interrupted(stage.name, step, stage.config.steps, signum)


def _spare_batches(
    stage: Stage[Loaded, OnDevice, Output], run: Run[Loaded], micro_batch: int
) -> Iterator[list[OnDevice]]:
    """Batches for initialisation, always the same, so that the batches of the steps do not depend on them."""
    if run.spare is not None:
        with contextlib.closing(run.spare().batches(stage.config.batch_size, micro_batch, 0, None)) as batches:
            yield from map(stage.to_device, batches)


def _agree(figures: Figures, signum: int, device: torch.device) -> int:
    """The signal that any process got, 0 for none; -1 if a loss or a gradient is not finite in any process."""
    names = [k for k in figures if k.endswith(("loss", "gradient_norm"))]
    finite = torch.stack([torch.as_tensor(figures[k], device=device).float().isfinite() for k in names]).all()
    if distributed.world_size() == 1:
        return signum if finite else -1
    status = torch.stack([(~finite).float(), torch.tensor(float(signum), device=device)])
    torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX)
    broken, signum = (int(x) for x in status.tolist())
    return -1 if broken else signum


def _means(figures: Figures, device: torch.device) -> dict[str, float]:
    """Figures as numbers, averaged over the processes."""
    values = torch.stack([torch.as_tensor(v, device=device).detach().double() for v in figures.values()])
    return dict(zip(figures, distributed.mean_over_processes(values).tolist(), strict=True))


@torch.no_grad()
def _evaluate(
    stage: Stage,
    evaluate: Callable[[], Evaluation],
    folder: Path,
    step: int,
    best: float | None,
    logger: log.Log | None,
) -> float | None:
    """Evaluate the model, and save it if it is the best so far; returns the best figure so far.

    The model is evaluated as it would be published: in eval mode, with moving averages in place of the weights.
    """
    for part in stage.parts:
        part.exchange_ema()
        part.wrapped.eval()
    try:
        figures, pictures = evaluate()
        if stage.best is not None:
            name, save_model = stage.best
            if name not in figures:
                raise ValueError(f"evaluation.best: expected one of {', '.join(figures)}, got {name!r}")
            value, sign = figures[name], -1 if METRICS[name].lower_is_better else 1
            no_better = best is not None and sign * value <= sign * best  # False where either is NaN
            if not no_better:
                best = value
                save_model(folder / "best")
                if distributed.rank() == 0:
                    write_json(folder / "best" / "evaluation.json", {"step": step, **figures})
    finally:
        for part in stage.parts:
            part.wrapped.train()
            part.exchange_ema()
    if logger is not None:
        logger.evaluation(step, figures, pictures)
    return best
