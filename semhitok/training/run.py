"""A training run in one folder: its stages, one after the other, then the finished checkpoint.

RUN/config.json      what the run was started with; it resumes only with the same, or with changes that are accepted
RUN/STAGE/           states, best tokenizer and log of a stage (see `loop`)
RUN/tensorboard/     figures and pictures
RUN/fixed/           what frozen networks make of fixed crops (see `fixed`)
RUN/checkpoint/      the tokenizer, for `SemHiTok.from_pretrained`

Processes that `accelerate launch` or `torchrun` started train together.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from semhitok import distributed
from semhitok._files import read_object, write_json
from semhitok.config import EngineConfig, TrainConfig, from_dict
from semhitok.data.batch import seed_everything
from semhitok.data.skipped import Skipped
from semhitok.data.training_images import HeldOutBatches, TrainingImages
from semhitok.tokenizer import SemHiTok
from semhitok.training import checkpoint, parallel, workers
from semhitok.training.decoder import DecoderStage
from semhitok.training.fixed import FixedCrops, fingerprint
from semhitok.training.loop import Run, StopOnSignal, run_stage
from semhitok.training.pixel import PixelStage
from semhitok.training.semantic import SemanticStage
from semhitok.training.stage import Evaluation, TokenizerStage

STAGES: dict[str, Callable[[SemHiTok, TrainConfig], TokenizerStage]] = {
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
    skipped: Skipped | None = None,
) -> dict[str, float]:
    """Train a tokenizer on images, or resume where an earlier call with the same arguments stopped.

    Args:
        config: see `semhitok.config.train_config`.
        data: image files and folders, or webdataset shards.
        out: the run's folder.
        held_out: images or shards to evaluate on while training; none leaves evaluation out.
        device: "cpu" or "cuda"; among several processes each takes the GPU of its local rank.
        accept_changes: resume although the configuration (except for the model) or the images have changed.
        skipped: names and counts the images that are left out because they cannot be used.

    Returns:
        Seconds spent in each stage, {"semantic": s, "pixel": s}, including those before interruptions.

    Raises:
        ValueError: `out` holds a run with another configuration or other images, or a damaged state.
        OSError: images, teacher weights or the folder cannot be read or written.
        Interrupted: a signal came; the same call resumes.
        FloatingPointError: a loss is not finite; the state before that step and its images are saved.
    """
    folder = Path(out)
    device = distributed.join(torch.device(device))
    images = TrainingImages(
        data, config.model.image_size, config.data, config.seed,
        rank=distributed.rank(), world_size=distributed.world_size(), skipped=skipped,
    )  # fmt: skip
    batches = None
    if held_out:  # found now: a wrong name must not end a run that has trained a stage
        places = distributed.rank(), distributed.world_size()
        size, batch_size = config.model.image_size, config.evaluation.batch_size
        batches = HeldOutBatches(held_out, size, batch_size, *places, images.skipped)
    number, chosen = workers.choose(config.data.workers, folder, device.type)
    if chosen and images.shards:  # no more than there are shards for
        number = min(number, len(images.shards) // distributed.world_size())
    images.use_workers(number)
    config = replace(config, data=replace(config.data, workers=number))
    if distributed.rank() == 0:
        identify_run(folder, config, images.description, ("train", "model"), accept_changes)
    model = _model(config, device)
    seconds: dict[str, float] = {}
    with StopOnSignal() as stop:
        run = Run(config, folder, images, stop, config.evaluation.every, spare=lambda: images.other(0x5EED))
        for name in config.stages:
            before = _frozen(model, name)
            seed_everything(config.seed, name)  # for new weights, whatever ran before
            stage = STAGES[name](model, config)
            stage.fixed = FixedCrops(folder / "fixed", images, device) if images.fixed_count else None
            resumed = bool(checkpoint.states(folder / name))
            seconds[name] = run_stage(stage, run, _evaluation(stage, batches))
            # A resumed state must not bring back other results of earlier stages than the model now has.
            if _frozen(model, name) != before:
                if resumed:
                    raise ValueError(
                        f"{folder / name}: its states are not of the same run as those of the stages before; remove it "
                        "to train the stage again"
                    )
                raise RuntimeError(f"{folder}: stage {name} changed the results of earlier stages")
            model = _unsharded(model, config, device) if config.shard and distributed.world_size() > 1 else model
        if distributed.rank() == 0:
            model.eval().save_pretrained(folder / "checkpoint")
        images.skipped.gather()
    return seconds


def semantic_fingerprint(model: SemHiTok) -> str:
    """`fingerprint` of everything semantic: equal before and after the later stages."""
    return fingerprint(model.semantic_head, model.semantic_decoder, model.quantizer.semantic)


def _frozen(model: SemHiTok, stage: str) -> str:
    """A hash of everything that `stage` must not change."""
    if stage == "semantic":
        return ""
    return semantic_fingerprint(model) + (fingerprint(model.encoder, model.quantizer) if stage == "decoder" else "")


def _model(config: TrainConfig, device: torch.device) -> SemHiTok:
    torch.manual_seed(config.seed)
    if config.start_from is None:
        if "pixel" in config.stages and not config.pixel.init_tokens_per_code:
            raise ValueError("pixel.init_tokens_per_code: expected more than 0, or start_from a tokenizer, got 0")
        if config.stages[0] != "semantic":
            raise ValueError(f"stages: expected semantic first, or start_from a tokenizer, got {config.stages}")
        return SemHiTok(config.model).to(device).train()
    model = SemHiTok.from_pretrained(config.start_from)
    difference = _difference(model.config.to_dict(), config.model.to_dict(), "model")
    if difference:
        raise ValueError(f"start_from: {config.start_from} is another model: {difference}")
    return model.to(device).train()


def _unsharded(model: SemHiTok, config: TrainConfig, device: torch.device) -> SemHiTok:
    """A model with all weights on every process, from one whose weights are split over the processes."""
    state = parallel.full_state(model.state_dict())
    torch.manual_seed(config.seed)
    unsharded = SemHiTok(config.model, load_teacher=False).to(device).train()
    unsharded.load_state_dict(state)
    return unsharded


def _evaluation(stage: TokenizerStage, batches: HeldOutBatches | None) -> Callable[[], Evaluation] | None:
    """A function that evaluates the stage on all held-out images; None without any."""
    return None if batches is None else lambda: stage.evaluate(iter(batches))


def identify_run(
    folder: Path, config: EngineConfig, more: dict[str, Any], model: Sequence[str], accept_changes: bool
) -> None:
    """Write config.json into the folder of a new run, or check that an existing one says the same.

    Args:
        folder: of the run.
        config: of the run; "train" in config.json.
        more: what else is in config.json.
        model: keys that lead to the part of the description that may never change.
        accept_changes: whether the rest may.

    Raises:
        ValueError: the folder holds another run, or its config.json is not a JSON object.
    """
    path, description = folder / "config.json", {"train": config.to_dict(), **more}
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, description)
        return
    found = read_object(path)
    # A setting that did not exist when the run began has its default; one that exists no longer is a difference.
    with contextlib.suppress(ValueError, TypeError, KeyError):
        found["train"] = from_dict(type(config), found["train"]).to_dict()
    new = json.loads(json.dumps(description))
    difference = _difference(found, new, "")
    if difference and not accept_changes:
        raise ValueError(f"{folder}: holds another run: {difference}; choose another folder, or --accept-changes")
    old_model, new_model = found, new
    for key in model:
        old_model, new_model = old_model.get(key, {}) if isinstance(old_model, dict) else {}, new_model[key]
    model_difference = _difference(old_model, new_model, ".".join(model))
    if model_difference:
        raise ValueError(f"{folder}: holds another model: {model_difference}; choose another folder")
    if difference:
        write_json(path, description)


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
    return "" if old == new else f"{where} was {old!r:.200}, now {new!r:.200}"
