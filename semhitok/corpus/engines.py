"""Engines: which process encodes which unit. The results are the same with each."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from semhitok._optional import require
from semhitok.corpus.config import ENGINES
from semhitok.corpus.encoder import EncodingJob, UnitEncoder, UnitResult, ignore_interrupts, reason
from semhitok.corpus.units import Unit


def place(engine: str, processes: int, device: str) -> tuple[int, int, str]:
    """(rank, world_size, device): this process encodes units[rank::world_size] on the device, or starts who does.

    Raises:
        ValueError: no such engine, or torchrun did not start this process or is to start others.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if engine != "torchrun":
        return 0, 1, device
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "engine: torchrun expects a process that it started: torchrun --nproc-per-node N -m semhitok ..."
        )
    if processes != 1:
        raise ValueError(f"processes: expected 1 with torchrun, which starts the processes itself, got {processes}")
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), device


def encodes_here(engine: str, processes: int) -> bool:
    """Whether this process encodes its units itself, and does not start others with `run`."""
    return engine == "torchrun" or (engine == "local" and processes == 1)


def run(engine: str, job: EncodingJob, units: Sequence[Unit], processes: int) -> Generator[UnitResult, None, None]:
    """Encode units in other processes. The results come in any order."""
    return (_run_ray if engine == "ray" else _run_local)(job, units, processes)


# ---------------------------------------------------------------------------------------------------------------
# Processes of this machine

_encoder: UnitEncoder | None = None  # of a process of the pool


def _run_local(job: EncodingJob, units: Sequence[Unit], processes: int) -> Generator[UnitResult, None, None]:
    before = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start, (job,))
    try:
        for future in as_completed([pool.submit(_encode, unit) for unit in units]):
            yield future.result()
    except BrokenProcessPool:
        raise ChildProcessError(
            "an encoding process was killed, perhaps because memory ran out; run the same command again to resume"
        ) from None
    except BaseException:
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(job: EncodingJob) -> None:
    global _encoder
    ignore_interrupts()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # the process that hands out the units is gone

    threading.Thread(target=watch, daemon=True).start()
    _encoder = UnitEncoder(job)


def _encode(unit: Unit) -> UnitResult:
    assert _encoder is not None
    return _encoder.encode(unit)


# ---------------------------------------------------------------------------------------------------------------
# Ray


def _run_ray(job: EncodingJob, units: Sequence[Unit], processes: int) -> Generator[UnitResult, None, None]:
    """Ray Data starts the encoders, hands out the units, and gives the units of a lost encoder to another one."""
    if not units:
        return
    ray, data = require("ray", "ray"), require("ray.data", "ray")
    if not ray.is_initialized():
        ray.init()  # the cluster of RAY_ADDRESS, or one on this machine
    data.DataContext.get_current().enable_progress_bars = False
    # Not `data.range`: the tasks that read it need CPUs, all of which the encoders may hold.
    numbers = data.from_items(list(range(len(units))), override_num_blocks=len(units))
    encoders = numbers.map_batches(
        RayWorker,
        fn_constructor_args=(job, units, os.getcwd()),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(processes, len(units))),
        num_cpus=1 + job.workers,
        num_gpus=1 if torch.device(job.device).type == "cuda" else 0,
    )
    for row in encoders.iter_rows():
        result = json.loads(row["result"])
        if isinstance(result, str):
            raise OSError(result)
        yield UnitResult(*result)


class RayWorker:
    """Encodes units in a process of Ray, which starts in another folder: `folder` makes relative names valid again.

    Returns a `UnitResult`, or the text of an error, as JSON: of an exception, Ray Data would keep only the traceback.
    """

    def __init__(self, job: EncodingJob, units: Sequence[Unit], folder: str) -> None:
        os.chdir(folder)
        self.job, self.units = job, units
        self.encoder: UnitEncoder | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            self.encoder = self.encoder or UnitEncoder(self.job)
            return {"result": [json.dumps(self.encoder.encode(self.units[number])) for number in batch["item"]]}
        except (ValueError, OSError, ImportError) as error:
            return {"result": [json.dumps(reason(error))]}
