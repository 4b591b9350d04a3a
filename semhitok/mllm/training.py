"""Training of the unified model in one folder: its stages, one after the other, then the finished checkpoint.

adapter   adapter, embeddings and heads of image ids learn; the LLM is frozen
joint     everything learns, from a mixture of text, understanding and generation
instruct  the same from conversations

The loop is that of the tokenizer (`semhitok.training.loop`): runs that were stopped in any way resume and end with the
bits they would have had, and several processes compute what one would.

RUN/config.json      what the run was started with
RUN/STAGE/           states and log of a stage
RUN/text_tokenizer/  if it was made from the words of the sources
RUN/checkpoint/      model and text tokenizer, for `UnifiedMLLM.from_pretrained` and `AutoTokenizer`
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from semhitok import distributed
from semhitok._optional import require
from semhitok.data.batch import seed_everything
from semhitok.data.skipped import Skipped
from semhitok.mllm.config import TASKS, MLLMStageConfig, MLLMTrainConfig, RowsConfig, SourceConfig
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.model import UnifiedMLLM
from semhitok.mllm.packing import Packed
from semhitok.mllm.prompts import word_tokenizer
from semhitok.mllm.rows import MicroRows, TrainingRows
from semhitok.mllm.sources import Source, open_source
from semhitok.tokenizer import SemHiTok
from semhitok.training import parallel, workers
from semhitok.training.loop import Run, StopOnSignal, run_stage
from semhitok.training.parts import Figures, Part
from semhitok.training.run import identify_run
from semhitok.training.stage import Evaluation, Stage

_ENCODE = 64  # images that the image tokenizer encodes at once


def train(
    config: MLLMTrainConfig,
    out: str | os.PathLike[str],
    *,
    sources: Mapping[str, Sequence[Source]] | None = None,
    held_out: Sequence[Source] | None = None,
    image_tokenizer: SemHiTok | None = None,
    text_tokenizer: Any = None,
    device: str | torch.device = "cpu",
    accept_changes: bool = False,
    skipped: Skipped | None = None,
) -> dict[str, float]:
    """Train a unified model, or resume where an earlier call with the same arguments stopped.

    Args:
        config: see `semhitok.mllm.config`.
        out: the run's folder.
        sources: of each stage, such as `semhitok.mllm.sources.Records`; replaces those of the configuration.
        held_out: sources to evaluate on while training; replaces those of the configuration.
        image_tokenizer: replaces `config.tokenizer`.
        text_tokenizer: a tokenizer of transformers; replaces `config.text_tokenizer`.
        device: "cpu" or "cuda"; among several processes each takes the GPU of its local rank.
        accept_changes: resume although the configuration or the data have changed.
        skipped: names and counts the records that are left out because they cannot be used.

    Returns:
        Seconds spent in each stage, including those before interruptions.

    Raises:
        ValueError: `out` holds a run with another configuration or other data, or a damaged state; ids were made with
            another codebook than the image tokenizer's; settings contradict each other.
        OSError: data, weights or the folder cannot be read or written.
        semhitok.training.Interrupted: a signal came; the same call resumes.
        FloatingPointError: a loss is not finite; the state before that step and its rows are saved.
    """
    folder = Path(out)
    skipped = Skipped() if skipped is None else skipped
    device = distributed.join(torch.device(device))
    opened: dict[str, list[Source]] = {}
    for name in config.stages:
        opened[name] = _open(config.stage_configs[name].sources, config, (sources or {}).get(name))
        if not opened[name]:
            raise ValueError(f"{name}.sources: expected at least one, got none")
    held_out_sources = _open(config.evaluation.sources, config, held_out)
    images = ImageEncoder(config.tokenizer, image_tokenizer, device)
    all_sources = [*opened.values(), held_out_sources]
    text_tokenizer = _text_tokenizer(config, folder, all_sources, text_tokenizer, skipped)
    model: Any = _model(config, images.image_tokenizer)
    model.to(device)
    places: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}

    def rows(sources: Sequence[Source], settings: RowsConfig) -> TrainingRows:
        return TrainingRows(sources, settings, model.config, text_tokenizer, config.seed, **places, skipped=skipped)

    number, chosen = workers.choose(config.data.workers, folder, device.type)
    if chosen:  # one that divides the rows of a process, in every stage
        share = math.gcd(*(config.stage_configs[name].batch_size for name in config.stages)) // distributed.world_size()
        number = next((n for n in range(number, 0, -1) if share % n == 0), 0)
    config = replace(config, data=replace(config.data, workers=number))
    data = {name: rows(found, config.data) for name, found in opened.items()}
    if distributed.rank() == 0:
        sizes = {name: getattr(model.config, name) for name in ("codebook_hash", "head", "resolution_id")}
        described = {"data": {name: stage_rows.description for name, stage_rows in data.items()}}
        of_model = {"model": {**sizes, "llm": model.config.text_config.to_diff_dict()}}
        identify_run(folder, config, {**of_model, **described}, ("model",), accept_changes)
    settings = replace(config.data, caption_drop=0.0, workers=0)
    held_out_rows = rows(held_out_sources, settings) if held_out_sources else None
    seconds: dict[str, float] = {}
    with StopOnSignal() as stop:
        for name in config.stages:
            seed_everything(config.seed, name)  # for the weights of LoRA, whatever ran before
            stage = MLLMStage(name, model, config, images)
            run = Run(config, folder, data[name], stop, config.evaluation.every, unit="tokens")
            evaluate = partial(stage.evaluate, held_out_rows, config.evaluation.batches) if held_out_rows else None
            seconds[name] = run_stage(stage, run, evaluate)
            model = stage.finish()
        if distributed.rank() == 0:
            _save(folder / "checkpoint", model.eval(), text_tokenizer)
        skipped.gather()
    return seconds


@dataclass
class RowBatch:
    """A micro-batch on its device; the last four are of the global batch."""

    packed: Packed  # rows of ids, labels and positions, [R, length] each
    tasks: Tensor  # int64 [R, length], for each id the index in `TASKS` of its sample's task
    counts: list[int]  # ids with a loss, for each task
    num_micro: int  # micro-batches
    total: int  # ids without padding
    padding: float  # share of padding


class Network(nn.Module):
    """What is trained, as one module: rows -> the sum of losses for each task, fp32 [len(TASKS)]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, tasks: Tensor) -> Tensor:
        losses = self.model(input_ids, position_ids=position_ids, labels=labels, reduce=False).loss
        return losses.new_zeros(len(TASKS)).index_add(0, tasks[:, 1:].flatten(), losses)


class MLLMStage(Stage[MicroRows, RowBatch, None]):
    """A stage of training the unified model. `finish` returns the trained model.

    Args:
        name: "adapter", "joint" or "instruct".
        model: what is trained.
        run_config: of the run.
        images: encodes images in the rows.
    """

    config: MLLMStageConfig

    def __init__(self, name: str, model: UnifiedMLLM, run_config: MLLMTrainConfig, images: ImageEncoder) -> None:
        super().__init__(model, run_config.stage_configs[name], run_config)
        self.name, self.images, self.text_size = name, images, model.vocabulary.text_size
        if run_config.gradient_checkpointing:
            # The name changed in transformers 5.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        new = UnifiedMLLM.new_modules(model.config)
        lora = run_config.lora if name != "adapter" else None
        model.requires_grad_(name != "adapter")
        if name == "adapter":
            for module in new:
                model.get_submodule(module).requires_grad_(True)
        if lora is not None:
            peft = require("peft", "mllm")
            options = peft.LoraConfig(
                r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets,
                modules_to_save=new, task_type="CAUSAL_LM",
            )  # fmt: skip
            model = peft.get_peft_model(model, options)
        self.lora = lora
        self.model: Any = model
        self.network = Part("network", Network(model).train(), self.config.optimizer)
        self.parts = [self.network]

    def to_device(self, loaded: Sequence[MicroRows], key: tuple[object, ...] = ()) -> list[RowBatch]:
        """Move the micro-batches of a step to the device, with ids in place of all images. A collective call."""
        pixels = torch.cat([m.images for m in loaded])
        codes = self.images.encode(pixels) if len(pixels) else pixels.new_zeros(0, 1, dtype=torch.int64)
        codes += self.text_size
        filled = [m.with_ids(ids) for m, ids in zip(loaded, codes.split([len(m.images) for m in loaded]), strict=True)]
        counts = torch.zeros(len(TASKS) + 2, dtype=torch.float64)
        for packed, m in zip(filled, loaded, strict=True):
            counts[:-2] += torch.bincount(m.tasks[packed.labels != IGNORE].int(), minlength=len(TASKS))
            counts[-2:] += torch.tensor([(m.padding == 0).sum(), m.padding.numel()])
        *learnt, total, room = (int(n) for n in distributed.all_reduce(counts.to(self.device)).tolist())
        num_micro = distributed.world_size() * len(loaded)
        return [
            RowBatch(
                Packed(*(x.to(self.device, non_blocking=True) for x in packed)),
                m.tasks.to(self.device).long(), learnt, num_micro, total, 1 - total / room,
            )
            for packed, m in zip(filled, loaded, strict=True)
        ]  # fmt: skip

    def loss(self, batch: RowBatch, step: int) -> tuple[Tensor, Figures, None]:
        """This micro-batch's part of the mean loss over all ids of the global batch, and of each of its tasks.

        Their mean over micro-batches and processes, which the loop takes, is exact however samples are distributed.
        """
        with self.autocast():
            sums = self.network(*batch.packed, batch.tasks) * batch.num_micro
        figures = {f"{t}_loss": s / n for t, s, n in zip(TASKS, sums, batch.counts, strict=True) if n}
        return sums.sum() / max(1, sum(batch.counts)), {**figures, "padding": batch.padding}, None

    def evaluate(self, rows: TrainingRows, count: int) -> Evaluation:
        """The loss of each task on the first `count` batches of held-out rows, the same on all processes."""
        totals = torch.zeros(2, len(TASKS), dtype=torch.float64, device=self.device)
        size = self.config.batch_size
        with closing(rows.batches(size, self.config.micro_batch or max(1, size // rows.world_size))) as batches:
            for loaded in islice(batches, count):
                batch = self.to_device(loaded)
                for micro in batch:
                    with self.autocast():
                        totals[0] += self.network(*micro.packed, micro.tasks)
                totals[1] += torch.tensor(batch[0].counts, device=self.device) / distributed.world_size()
        sums, counts = distributed.all_reduce(totals).tolist()
        figures = {f"{t}_loss": s / n for t, s, n in zip(TASKS, sums, counts, strict=True) if n}
        return {"loss": sum(sums) / max(1, sum(counts)), **figures}, None

    def debug_dump(self, batches: Sequence[RowBatch]) -> dict[str, Any]:
        columns = zip(Packed._fields, zip(*(batch.packed for batch in batches), strict=True), strict=True)
        return {name: torch.cat(column).cpu() for name, column in columns}

    def finish(self) -> UnifiedMLLM:
        """The trained model: LoRA merged into its weights, all of them on every process."""
        model = self.model if self.lora is None else self.model.merge_and_unload()
        if not (self.run_config.shard and distributed.world_size() > 1):
            return model
        state = parallel.full_state(model.state_dict())
        unsharded: Any = UnifiedMLLM(model.config)
        unsharded.to(self.device)
        unsharded.load_state_dict(state)
        unsharded.tie_weights()
        unsharded.generation_config = model.generation_config
        return unsharded


class ImageEncoder:
    """Encodes images with the image tokenizer, whose teacher is loaded when the first image comes.

    Args:
        name: folder or Hub name of the image tokenizer.
        image_tokenizer: the tokenizer itself, in place of `name`.
        device: to encode on.
    """

    def __init__(self, name: str, image_tokenizer: SemHiTok | None, device: torch.device) -> None:
        if image_tokenizer is None and not name:
            raise ValueError("tokenizer: expected the folder or Hub name of an image tokenizer, got none")
        self.name, self.device, self.ready = name, device, False
        self.image_tokenizer = image_tokenizer or SemHiTok.from_pretrained(name, teacher=False)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] -> flat ids [n, h * w] on the CPU."""
        if not self.ready:
            if self.image_tokenizer.teacher is None:
                if not self.name:
                    raise ValueError("image_tokenizer: expected one with its teacher to encode images, got one without")
                self.image_tokenizer = SemHiTok.from_pretrained(self.name)
            self.image_tokenizer.to(self.device).eval()
            self.ready = True
        codes = [self.image_tokenizer.encode(part.to(self.device).float() / 255) for part in images.split(_ENCODE)]
        return torch.cat(codes).flatten(1).cpu()


def _open(configs: Sequence[SourceConfig], config: MLLMTrainConfig, given: Sequence[Source] | None) -> list[Source]:
    return list(given) if given is not None else [open_source(source, config.data) for source in configs]


def _text_tokenizer(
    config: MLLMTrainConfig, folder: Path, sources: Sequence[Sequence[Source]], given: Any, skipped: Skipped
) -> Any:
    if given is not None:
        return given
    name = config.start_from or config.text_tokenizer or config.llm
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    saved = folder / "text_tokenizer"
    if distributed.rank() == 0 and not saved.exists():
        size = AutoConfig.for_model(**(config.llm_config or {})).vocab_size
        texts = (text for stage in sources for source in stage for text in source.texts(skipped))
        _save(saved, word_tokenizer(texts, size))
    if distributed.world_size() > 1:
        torch.distributed.barrier()
    return AutoTokenizer.from_pretrained(saved)


def _model(config: MLLMTrainConfig, image_tokenizer: SemHiTok) -> UnifiedMLLM:
    """The model from which the first stage starts, in fp32."""
    torch.manual_seed(config.seed)
    given = [name for name in ("start_from", "llm", "llm_config") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(f"llm: expected one of start_from, llm and llm_config, got {' and '.join(given) or 'none'}")
    if config.start_from is not None:
        model = UnifiedMLLM.from_pretrained(config.start_from, dtype=torch.float32)
        model.vocabulary.check_hash(image_tokenizer.codebook_hash)
        return model
    llm = config.llm or AutoConfig.for_model(**(config.llm_config or {}))
    options: Any = {"head": config.head, "resolution_id": config.resolution_id, "dtype": torch.float32}
    return UnifiedMLLM.from_parts(llm, image_tokenizer, **options)


def _save(folder: Path, *saved: Any) -> None:
    """Save models and tokenizers of transformers in a folder, which exists complete or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for thing in saved:
        thing.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
