"""A whole training run in one folder: its stages, one after the other, then the finished checkpoint.

RUN/config.json      what the run was started with; a run goes on only with the same, or with changes that are meant
RUN/STAGE/           states, best tokenizer and log of a stage (see `loop`)
RUN/tensorboard/     figures and pictures
RUN/checkpoint/      the tokenizer, for `SemHiTok.from_pretrained`

Started by `accelerate launch` or `torchrun`, the processes train together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from semhitok import distributed
from semhitok._files import write_atomic
from semhitok.config import TrainConfig
from semhitok.data.training_images import TrainingImages, held_out_batches
from semhitok.tokenizer import SemHiTok
from semhitok.training.decoder import DecoderStage
from semhitok.training.loop import Run, StopOnSignal, run_stage
from semhitok.training.parts import seed_everything
from semhitok.training.pixel import PixelStage, fingerprint, semantic_fingerprint
from semhitok.training.semantic import SemanticStage
from semhitok.training.stage import Stage

_STAGES: dict[str, Callable[[SemHiTok, TrainConfig], Stage]] = {
    "semantic": SemanticStage,
    "pixel": PixelStage,
    "decoder": DecoderStage,
}


def train(
    config: TrainConfig,
    data: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    held_out: Sequence[str | os.PathLike[str]] = (),
    device: str | torch.device = "cpu",
    accept_changes: bool = False,
) -> dict[str, float]:
    """Train a tokenizer on images; go on where an earlier call with the same arguments stopped.

    Args:
        config: see `semhitok.config.train_config`.
        data: image files and folders, or webdataset shards.
        out: the run's folder.
        held_out: images or shards that are not trained on, for evaluations on the way; none without them.
        device: "cpu" or "cuda"; among several processes each takes the GPU of its local rank.
        accept_changes: go on although the configuration (but for the model) or the images have changed.

    Returns:
        Seconds spent in each stage, {"semantic": s, "pixel": s}, over all sittings.

    Raises:
        ValueError: `out` holds a run of another configuration or other images, or a damaged state.
        OSError: images, teacher weights or the folder cannot be read or written.
        Interrupted: a signal came; the same call continues.
        FloatingPointError: a loss is not finite; the state before that step and its images are saved.
    """
    folder = Path(out)
    device = distributed.join(torch.device(device))
    images = TrainingImages(
        data, config.model.image_size, config.data, config.seed,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    if distributed.rank() == 0:
        claim(folder, {"train": config.to_dict(), **images.description}, ("train", "model"), accept_changes)
    model = _model(config, device)
    seconds: dict[str, float] = {}
    with StopOnSignal() as stop:
        run = Run(config, folder, images, _held_out(config, held_out), stop, device)
        for name in config.stages:
            before = _frozen(model, name)
            seed_everything(config.seed, name)  # for weights that the stage makes, whatever ran before it
            seconds[name] = run_stage(_STAGES[name](model, config), run)
            # What earlier stages made is the truth about it, whatever state this one went on from.
            if _frozen(model, name) != before:
                raise RuntimeError(f"{folder}: stage {name} changed what earlier stages made")
            model = _unsharded(model, config, device) if config.shard and distributed.world_size() > 1 else model
        if distributed.rank() == 0:
            model.eval().save_pretrained(folder / "checkpoint")
        if distributed.world_size() > 1:
            torch.distributed.barrier()
    return seconds


def _frozen(model: SemHiTok, stage: str) -> str:
    """A hash of all that `stage` must leave as it is."""
    if stage == "semantic":
        return ""
    return semantic_fingerprint(model) + (fingerprint(model.encoder, model.quantizer) if stage == "decoder" else "")


def _model(config: TrainConfig, device: torch.device) -> SemHiTok:
    torch.manual_seed(config.seed)
    if config.start_from is None:
        if config.stages[0] != "semantic":
            raise ValueError(f"stages: expected semantic first, or start_from a tokenizer, got {config.stages}")
        return SemHiTok(config.model).to(device).train()
    model = SemHiTok.from_pretrained(config.start_from)
    difference = _difference(model.config.to_dict(), config.model.to_dict(), "model")
    if difference:
        raise ValueError(f"start_from: {config.start_from} is another model: {difference}")
    return model.to(device).train()


def _unsharded(model: SemHiTok, config: TrainConfig, device: torch.device) -> SemHiTok:
    """A model with whole weights from one whose weights are split over the processes."""
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
    torch.manual_seed(config.seed)
    whole = SemHiTok(config.model, load_teacher=False).to(device).train()
    whole.load_state_dict(state)
    return whole


def _held_out(config: TrainConfig, sources: Sequence[str | os.PathLike[str]]) -> Any:
    if not sources:
        return None
    return lambda: held_out_batches(
        sources, config.model.image_size, config.evaluation.batch_size, distributed.rank(), distributed.world_size()
    )


def claim(folder: Path, description: dict[str, Any], model: Sequence[str], accept_changes: bool) -> None:
    """Write config.json into a new run's folder, or check that an old one's says the same.

    model: keys that lead to the part of the description which cannot change, whatever is accepted.
    """
    text = json.dumps(description, indent=2) + "\n"
    path = folder / "config.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    new = json.loads(text)
    difference = _difference(found, new, "")
    if difference and not accept_changes:
        raise ValueError(f"{folder}: holds another run: {difference}; choose another folder, or --accept-changes")
    old_model, new_model = found, new
    for key in model:
        old_model, new_model = old_model.get(key, {}), new_model[key]
    of_model = _difference(old_model, new_model, ".".join(model))
    if of_model:
        raise ValueError(f"{folder}: holds another model: {of_model}; choose another folder")
    if difference:
        write_atomic(path, text.encode())


def _difference(old: object, new: object, where: str) -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}".strip("."))
            if found:
                return found
        return ""
    # JSON has no tuples.
    old, new = (list(x) if isinstance(x, tuple) else x for x in (old, new))
    return "" if old == new else f"{where} was {old!r}, now {new!r}"
