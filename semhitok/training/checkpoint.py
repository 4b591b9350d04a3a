"""Saved states of a stage: written whole or not at all, read without running code from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from semhitok import distributed
from semhitok._files import open_atomic
from semhitok.training.stage import Stage


def save(
    folder: Path,
    stage: Stage,
    step: int,
    *,
    seconds: float,
    best: float | None,
    position: dict[str, Any],
    keep: int,
) -> None:
    for name, tensor in stage.codebooks().items():
        distributed.check_equal(tensor, f"{stage.name}: {name} after step {step}")
    parts = {part.name: part.state() for part in stage.parts}
    positions: list[Any] = [position] * distributed.world_size()
    if distributed.world_size() > 1:
        torch.distributed.all_gather_object(positions, position)
    if distributed.rank() == 0:
        with open_atomic(folder / f"step-{step:08}.pt") as file:
            torch.save(
                {
                    "stage": stage.name,
                    "step": step,
                    "seconds": seconds,
                    "best": best,
                    "data": positions,
                    "parts": parts,
                    "counters": {k: v.cpu() for k, v in stage.counters().items()},
                },
                file,
            )
        for old in states(folder)[:-keep]:
            old.unlink()
    if distributed.world_size() > 1:
        torch.distributed.barrier()  # no process is ahead of a checkpoint that another may still fail to write


def states(folder: Path) -> list[Path]:
    """The saved states of a stage, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def read_state(path: Path) -> dict[str, Any]:
    """A stage's state file. It holds tensors and numbers; reading it runs no code of it.

    Raises:
        ValueError: the file is damaged or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"stage", "step", "parts", "counters"} <= state.keys():
            raise ValueError("not a state of training")
    except Exception as error:  # torch.load has no one error for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a whole training state: {reason}") from error
    return state


def load(folder: Path, stage: Stage) -> tuple[int, dict[str, Any]]:
    """Restore the stage from its last state; (steps done, the state), (0, {}) where there is none."""
    found = states(folder)
    step = torch.tensor(int(found[-1].stem.removeprefix("step-")) if found else 0)
    if distributed.world_size() > 1:
        # The first process says where the run stands; a file system may show it to the others later.
        step = step.to(next(stage.model.parameters()).device)
        distributed.broadcast(step)
    if not int(step):
        return 0, {}
    path = folder / f"step-{int(step):08}.pt"
    state = read_state(path)
    if state["stage"] != stage.name:
        raise ValueError(f"{path}: expected stage {stage.name}, got {state['stage']}")
    for part in stage.parts:
        part.load_state(state["parts"][part.name])
    for name, tensor in stage.counters().items():
        tensor.copy_(state["counters"][name])
    return state["step"], state


def save_culprit(folder: Path, stage: Stage, step: int, batches: Sequence[Any], figures: dict[str, Any]) -> str:
    """Keep the batch that gave a loss or gradient that is not finite; the message that says so."""
    path = folder / f"not-finite-step-{step}-process-{distributed.rank()}.pt"
    with open_atomic(path) as file:
        torch.save({"step": step, **batches[0].evidence(batches)}, file)
    text = ", ".join(f"{k} {float(v):.6g}" for k, v in figures.items() if k.endswith(("loss", "gradient_norm")))
    return (
        f"{stage.name}: not finite at step {step}: {text}; its data are in {path}, the state before it in "
        f"step-{step:08}.pt (go on with other settings: --accept-changes)"
    )
