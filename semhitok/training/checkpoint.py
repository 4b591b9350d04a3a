"""Saved states of a stage. Writing is atomic; reading runs no code from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from semhitok import distributed
from semhitok._files import open_atomic
from semhitok.training.parts import Figures, check_like
from semhitok.training.stage import Stage


def save(
    folder: Path, stage: Stage, step: int, *, seconds: float, best: float | None, position: dict[str, Any], keep: int
) -> None:
    """Save the state after `step` steps, and delete all but the last `keep` states; a collective call.

    Raises:
        RuntimeError: the codebooks differ between processes.
    """
    for name, tensor in stage.codebooks().items():
        distributed.check_equal(tensor, f"{stage.name}: {name} after step {step}")
    parts = {part.name: part.state() for part in stage.parts}
    positions = distributed.gather_objects(position)
    if distributed.rank() == 0:
        state = {"stage": stage.name, "step": step, "seconds": seconds, "best": best, "data": positions, "parts": parts}
        state["counters"] = {k: v.cpu() for k, v in stage.counters().items()}
        with open_atomic(folder / f"step-{step:08}.pt") as file:
            torch.save(state, file)
        for old in states(folder)[:-keep]:
            old.unlink()
    if distributed.world_size() > 1:
        torch.distributed.barrier()  # no process continues while another may still fail to write


def states(folder: Path) -> list[Path]:
    """The saved states of a stage, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def read_state(path: Path) -> dict[str, Any]:
    """A stage's state file, which holds tensors and numbers; no code from it is run.

    Raises:
        ValueError: the file is damaged, or is not a state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"stage", "step", "parts", "counters"} <= state.keys():
            raise ValueError("expected the state of a stage")
    except Exception as error:  # torch.load raises many types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a complete training state: {reason}") from error
    return state


def load(folder: Path, stage: Stage) -> tuple[int, dict[str, Any]]:
    """Restore the stage from its last state; returns (steps done, state), (0, {}) if there is none."""
    found = states(folder)
    step = torch.tensor(int(found[-1].stem.removeprefix("step-")) if found else 0)
    if distributed.world_size() > 1:
        # The first process decides; a shared file system may show the newest file to the others later.
        step = distributed.broadcast(step.to(stage.device))
    if not int(step):
        return 0, {}
    path = folder / f"step-{int(step):08}.pt"
    state = read_state(path)
    if state["stage"] != stage.name:
        raise ValueError(f"{path}: expected stage {stage.name}, got {state['stage']!r}")
    if state["step"] != int(step):
        raise ValueError(f"{path}: expected step {int(step)}, got {state['step']!r}")
    try:
        check_like(state, {"step": 0, "parts": {part.name: {} for part in stage.parts}}, "state")
        numbers = {key: 0.0 for key in ("seconds", "best") if state.get(key) is not None}
        check_like(state, {**numbers, "counters": dict(stage.counters())}, "state")
        positions = state.get("data", [{}])
        if not isinstance(positions, list) or not positions or not all(isinstance(p, dict) for p in positions):
            raise ValueError("state.data: expected the position of each process")
        for part in stage.parts:
            check_like(state["parts"][part.name], part.outline(), part.name)
        for part in stage.parts:
            part.load_state(state["parts"][part.name])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # loading raises many types for what does not fit
        raise ValueError(f"{path}: not a complete training state: {' '.join(str(error).split())}") from error
    for name, tensor in stage.counters().items():
        tensor.copy_(state["counters"][name])
    return int(step), state


def save_debug_dump(folder: Path, stage: Stage, step: int, batches: Sequence[Any], figures: Figures) -> str:
    """Save the batch whose loss or gradient is not finite; returns a message that says where."""
    path = folder / f"not-finite-step-{step}-process-{distributed.rank()}.pt"
    with open_atomic(path) as file:
        torch.save({"step": step, **stage.debug_dump(batches)}, file)
    text = ", ".join(f"{k} {float(v):.6g}" for k, v in figures.items() if k.endswith(("loss", "gradient_norm")))
    text += f"; its data are in {path}, the state before it in step-{step:08}.pt"
    return f"{stage.name}: not finite at step {step}: {text} (to continue with other settings: --accept-changes)"
