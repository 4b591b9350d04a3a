"""A whole training run in one folder: stage 1, stage 2, the finished checkpoint.

RUN/config.json            what the run was started with; a run goes on only with the same
RUN/semantic/state.pt      last state of stage 1, log.jsonl beside it
RUN/pixel/state.pt         last state of stage 2
RUN/checkpoint/            the tokenizer, for `SemHiTok.from_pretrained`
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from semhitok._files import write_atomic
from semhitok.config import TrainConfig
from semhitok.data.crops import RandomCrops
from semhitok.data.images import list_images
from semhitok.tokenizer import SemHiTok
from semhitok.training.loop import StopOnSignal, run_stage
from semhitok.training.pixel import PixelStage, semantic_fingerprint
from semhitok.training.semantic import SemanticStage


def train(
    config: TrainConfig,
    data: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Train a tokenizer on images; go on where an earlier call with the same arguments stopped.

    Args:
        config: see `semhitok.config.train_preset`.
        data: image files and folders.
        out: the run's folder.
        device: where to train.

    Returns:
        Seconds spent in each stage, {"semantic": s, "pixel": s}, over all sittings.

    Raises:
        ValueError: `out` holds a run of another configuration or other images, or a damaged state.
        OSError: images, teacher weights or the folder cannot be read or written.
        Interrupted: a signal came; the same call continues.
    """
    folder = Path(out)
    paths = list_images(data)
    _claim(folder, config, paths)
    torch.manual_seed(config.seed)
    model = SemHiTok(config.model).to(device)
    crops = RandomCrops(paths, config.model.image_size, config.data, config.seed)
    seconds: dict[str, float] = {}
    with StopOnSignal() as stop:
        semantic = SemanticStage(model, config.semantic)
        seconds["semantic"] = run_stage(semantic, crops, folder / "semantic", stop, seed=config.seed)
        # Stage 1's own state is the truth about the frozen branch, whatever state stage 2 goes on from.
        fingerprint = semantic_fingerprint(model)
        pixel = PixelStage(model, config.pixel)
        seconds["pixel"] = run_stage(pixel, crops, folder / "pixel", stop, seed=config.seed)
        if semantic_fingerprint(model) != fingerprint:
            raise RuntimeError(f"{folder}: stage pixel changed the frozen semantic branch")
        model.eval().save_pretrained(folder / "checkpoint")
    return seconds


def _claim(folder: Path, config: TrainConfig, paths: Sequence[Path]) -> None:
    """Write config.json into a new run's folder, or check that an old one's says the same."""
    names = "\n".join(f"{path.name} {path.stat().st_size}" for path in paths)
    description = {
        "train": config.to_dict(),
        "images": len(paths),
        "images_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }
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
    difference = _difference(found, json.loads(text), "")
    if difference:
        raise ValueError(f"{folder}: holds another run: {difference}; choose another folder")


def _difference(old: object, new: object, where: str) -> str:
    """The first place where two JSON values differ, in words; empty if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            found = _difference(old.get(key), new.get(key), f"{where}.{key}".strip("."))
            if found:
                return found
        return ""
    return "" if old == new else f"{where} was {old!r}, now {new!r}"
