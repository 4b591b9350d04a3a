"""How many processes read data for a process that trains or encodes, where the number is left to the machine.

A GPU that waits for pictures to be decoded is idle, so there it is up to `MOST` processes, as the cores allow. On a CPU
it is none: the networks use the cores themselves.
"""

from __future__ import annotations

import os

MOST = 8


def of_machine(device: str, processes: int | None = None) -> int:
    """The number for one of the processes of this machine: a share of the cores, less one for itself.

    Args:
        device: the type of the process's device, "cpu" or "cuda".
        processes: that train or encode here; None is what torchrun or accelerate launch says, or else 1.
    """
    if device == "cpu":
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    count = processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST, cores // count - 1))
