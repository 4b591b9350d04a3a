"""Other programs, and modules of the benchmarks in processes of their own, which show memory and crashes."""

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


def resident(key: str) -> float:
    """A line of this process's memory status, VmRSS or VmHWM (the peak), in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def tool_output(command: list[str], seconds: float | None = None) -> str:
    """What a program prints.

    Raises:
        RuntimeError: it cannot be started, fails, or still runs after so many seconds; the message names it.
    """
    line = " ".join(command)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{line}: still running after {seconds} s") from error
    except OSError as error:
        raise RuntimeError(f"{line}: {error.strerror}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{line}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
