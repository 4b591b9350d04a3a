"""Training runs of a few seconds, in one process or several, for the tests of training."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import traceback
from pathlib import Path

import torch

from semhitok.config import TrainConfig, override, train_config
from semhitok.data.images import save_png

# A run of some seconds that still passes through every phase: continuous steps, k-means, restarts.
SETTINGS = [
    "model.image_size=32", "model.patch_size=8", "model.num_codes=16", "model.num_sub_codes=4",
    "model.teacher.image_size=32", "model.semantic_decoder.width=24",
    "model.teacher.options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=1",
    "model.decoder.depth=1", "semantic.steps=40", "semantic.continuous_steps=10",
    "semantic.restart_window=10", "semantic.checkpoint_every=7", "semantic.batch_size=4",
    "pixel.steps=60", "pixel.continuous_steps=12", "pixel.restart_window=20",
    "pixel.checkpoint_every=9", "pixel.batch_size=4", "tracker=none",
]  # fmt: skip
CRITIC = [
    "pixel.loss.critic.weight=0.1", "pixel.loss.critic.train_from=5", "pixel.loss.critic.start=15",
    "pixel.loss.critic.ramp=10", "pixel.loss.critic.adaptive=true", "pixel.loss.critic.lecam=0.01",
    "pixel.loss.critic.augment=true", "pixel.loss.critic.width=8", "pixel.loss.critic.layers=2",
    "pixel.ema_decay=0.9",
]  # fmt: skip


def small_config(*more: str) -> TrainConfig:
    config = train_config("semhitok-tiny")
    for assignment in [*SETTINGS, *more]:
        override(config, assignment)
    return config


def write_pictures(folder: Path) -> None:
    """Six smooth coloured pictures of different sizes."""
    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (48 + 4 * n, 70), mode="bicubic")
        save_png(image[0].clamp(0, 1), folder / f"{n}.png")


def checkpoint_bytes(run: Path) -> dict[str, bytes]:
    folder = run / "checkpoint"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}


def losses(run: Path, stage: str) -> list[float]:
    records = map(json.loads, (run / stage / "log.jsonl").read_text().splitlines())
    return [r["loss"] for r in records if "loss" in r]


# A server that has everything imported and forks workers: a start takes a fraction of a second.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["training_processes", "semhitok.training", "timm", "accelerate", "webdataset"])


class Workers:
    """`world_size` processes that train together, as a launcher would start them.

    Args:
        out, pictures, settings, arguments: of `train`.
        log: folder for the hashes of codebooks and critic that every process writes at every step.
        deadly_write: process 0 kills itself around the rename of that file it writes; odd: before, even: after.
        unwrapped_critic: leave DDP out for the critic, which must be noticed.
    """

    def __init__(self, world_size, out, pictures, settings, *, log=None, deadly_write=0, unwrapped_critic=False, **kw):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            context.Process(
                target=_work,
                args=(rank, world_size, port, out, pictures, settings, log, deadly_write, unwrapped_critic, kw),
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit codes. When one process fails the others are killed, as a launcher does."""
        multiprocessing.connection.wait([p.sentinel for p in self.processes], timeout)
        for process in self.processes:
            if any(p.exitcode not in (0, None) for p in self.processes):
                process.join(2)
                process.kill()
            process.join(timeout)
        return [p.exitcode for p in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _work(rank, world_size, port, out, pictures, settings, log, deadly_write, unwrapped_critic, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    from semhitok.training import Interrupted, parts, train
    from semhitok.training import log as training_log
    from semhitok.training.pixel import PixelStage
    from semhitok.training.semantic import SemanticStage

    training_log.LOG_EVERY = 1
    if log is not None:
        for stage in (SemanticStage, PixelStage):
            stage.after_step = _hashing(stage.after_step, Path(log) / f"{stage.name}-{rank}.txt")
    if deadly_write and rank == 0:
        _die_at(deadly_write)
    if unwrapped_critic:
        setup = parts.Part.setup

        def unwrapped(part, shard):
            setup(part, shard)
            if part.name == "critic":
                part.wrapped = part.module

        parts.Part.setup = unwrapped
    try:
        train(small_config(*settings), [pictures], out, **arguments)
    except Interrupted as stop:
        os._exit(128 + stop.signum)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _hashing(after_step, path):
    """`after_step`, writing a line with the hashes of the stage's codebooks and critic after it."""

    def wrapped(stage, outputs, step, seed):
        figures = after_step(stage, outputs, step, seed)
        tensors = list(stage.codebooks().values())
        for part in stage.parts:
            tensors += part.module.state_dict().values()
        digest = hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
        with path.open("a") as file:
            file.write(f"{step} {digest}\n")
        return figures

    return wrapped


def _die_at(deadly: int) -> None:
    real, writes = os.replace, 0

    def replace(source, target):
        nonlocal writes
        writes += 1
        if writes == deadly and deadly % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if writes == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
