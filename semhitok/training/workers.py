"""How many processes read the data of a training process, where the configuration says "auto".

The machine decides, see `semhitok.data.workers`. A run keeps the number with which it began, wherever it resumes.
"""

from __future__ import annotations

from pathlib import Path

from semhitok import distributed
from semhitok._files import read_object
from semhitok._settings import Workers
from semhitok.data.workers import of_machine


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
