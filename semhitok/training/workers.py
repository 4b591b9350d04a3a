"""How many processes read the data of a training process, where the configuration says "auto".

A GPU that waits for pictures to be decoded is idle, so there it is up to `MOST` processes, as the cores allow. On a CPU
it is none: training uses the cores itself. A run keeps the number with which it began, wherever it resumes.
"""

from __future__ import annotations

import os
from pathlib import Path

from semhitok import distributed
from semhitok._files import read_object
from semhitok._settings import Workers

MOST = 8


def of_machine(device: str) -> int:
    """The number for a training process on a device of this type: a share of the cores, less one for itself."""
    if device == "cpu":
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    return max(1, min(MOST, cores // processes - 1))


def of_run(folder: Path) -> int | None:
    """The number that the run in a folder began with; None if there is no run, or none that can be read."""
    try:
        number = read_object(folder / "config.json")["train"]["data"]["workers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # what is wrong with the folder, `identify_run` says
    return number if isinstance(number, int) and number >= 0 else None


def choose(workers: Workers, folder: Path, device: str) -> tuple[int, bool]:
    """The number for a run in `folder`, the same on all processes, and whether the machine chose it. A collective call.

    Args:
        workers: of the configuration; "auto" is the number of the run, or of the machine of the first process.
        folder: of the run.
        device: the type of the training device, "cpu" or "cuda".
    """
    if workers != "auto":
        return workers, False
    kept = of_run(folder)
    return distributed.gather_objects((of_machine(device), True) if kept is None else (kept, False))[0]
