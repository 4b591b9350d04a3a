"""A module of the benchmarks run in a process of its own, for what only a fresh process shows: memory, crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """For child processes: they find this repository's packages from any folder."""
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}


def printed(module: str, *arguments: str) -> str:
    """What `python -m MODULE ARGUMENTS` prints; memory that it frees goes back to the system at once.

    Raises:
        CalledProcessError: it fails.
    """
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment() | at_once)
    return done.stdout
