"""Training of the unified model in one folder: its stages, one after the other, then the finished checkpoint.

adapter   adapter, embeddings and heads of image ids learn; the LLM stays as it is
joint     everything learns, from text, understanding and generation in one mixture
instruct  the same from conversations

The engine is that of the tokenizer (`semhitok.training.loop`): runs that were stopped, however roughly, end with the
bits they would have had, and several processes do what one would.

RUN/config.json      what the run was started with
RUN/STAGE/           states and log of a stage
RUN/text_tokenizer/  where it was made of the sources' words
RUN/checkpoint/      model and text tokenizer, for `UnifiedMLLM.from_pretrained` and `AutoTokenizer`
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from semhitok import distributed
from semhitok._optional import require
from semhitok.mllm.config import TASKS, MLLMStageConfig, MLLMTrainConfig, SourceConfig
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.model import UnifiedMLLM
from semhitok.mllm.packing import Packed
from semhitok.mllm.prompts import word_tokenizer
from semhitok.mllm.rows import MicroRows, TrainingRows
from semhitok.mllm.sources import Source, open_source
from semhitok.tokenizer import SemHiTok
from semhitok.training.loop import Run, StopOnSignal, run_stage
from semhitok.training.parts import Part, seed_everything
from semhitok.training.run import claim

_ENCODE = 64  # images that the image tokenizer takes at once


def run(
    config: MLLMTrainConfig,
    out: str | os.PathLike[str],
    *,
    sources: Mapping[str, Sequence[Source]] | None = None,
    held_out: Sequence[Source] | None = None,
    tokenizer: SemHiTok | None = None,
    text_tokenizer: Any = None,
    device: str | torch.device = "cpu",
    accept_changes: bool = False,
) -> dict[str, float]:
    """Train a unified model; go on where an earlier call with the same arguments stopped.

    Args:
        config: see `semhitok.mllm.config`.
        out: the run's folder.
        sources: of each stage, in place of those that the configuration names: `semhitok.mllm.sources.Records`, say.
        held_out: likewise, for evaluations on the way.
        tokenizer: the image tokenizer, in place of `config.tokenizer`.
        text_tokenizer: of transformers, in place of `config.text_tokenizer`.
        device: "cpu" or "cuda"; among several processes each takes the GPU of its local rank.
        accept_changes: go on although the configuration or the data have changed.

    Returns:
        Seconds spent in each stage, over all sittings.

    Raises:
        ValueError: `out` holds a run of another configuration or other data, or a damaged state; ids of another
            codebook than the image tokenizer's; settings that contradict each other.
        OSError: data, weights or the folder cannot be read or written.
        semhitok.training.Interrupted: a signal came; the same call continues.
        FloatingPointError: a loss is not finite; the state before that step and its rows are saved.
    """
    folder = Path(out)
    device = distributed.join(torch.device(device))
    opened = {name: _open(config.stage(name).sources, config, (sources or {}).get(name)) for name in config.stages}
    for name, found in opened.items():
        if not found:
            raise ValueError(f"{name}.sources: expected at least one, got none")
    held = _open(config.evaluation.sources, config, held_out)
    images = _Images(config, tokenizer, device)
    words = _text_tokenizer(config, folder, [*opened.values(), held], text_tokenizer)
    model: Any = _model(config, images.tokenizer)
    model.to(device)
    images.text_size = model.vocabulary.text_size
    places: dict[str, int] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    data = {
        n: TrainingRows(found, config.data, model.config, words, config.seed, **places) for n, found in opened.items()
    }
    if distributed.rank() == 0:
        sizes = {name: getattr(model.config, name) for name in ("codebook_hash", "head", "resolution_id")}
        own = {"model": {**sizes, "llm": model.config.text_config.to_diff_dict()}}
        described = {"data": {name: rows.description for name, rows in data.items()}}
        claim(folder, {"train": config.to_dict(), **own, **described}, ("model",), accept_changes)
    seconds: dict[str, float] = {}
    with StopOnSignal() as stop:
        for name in config.stages:
            seed_everything(config.seed, name)  # for the weights of LoRA, whatever ran before
            stage = MLLMStage(name, model, config)
            evaluation = _held_out(held, config, data[name], stage.config, images, device)
            this = Run(config, folder, data[name], evaluation, stop, device, images.put, "tokens")
            seconds[name] = run_stage(stage, this)
            model = stage.finish()
        if distributed.rank() == 0:
            _save(model, words, folder / "checkpoint")
        if distributed.world_size() > 1:
            torch.distributed.barrier()
    return seconds


@dataclass
class RowBatch:
    """A micro-batch on its device.

    Attributes:
        packed: rows of ids, labels and positions, [R, length] each.
        tasks: int64 [R, length], place in `TASKS` of each id's sample.
        counts: ids with a loss of each task, in the global batch.
        share: the global batch over this micro-batch, in micro-batches.
        total: ids of the global batch, without padding.
        padding: share of padding in the global batch.
    """

    packed: Packed
    tasks: Tensor
    counts: list[int]
    share: int
    total: int
    padding: float

    @staticmethod
    def evidence(batches: Sequence[RowBatch]) -> dict[str, Any]:
        """What to keep of a step whose loss is not finite."""
        columns = zip(Packed._fields, zip(*(b.packed for b in batches), strict=True), strict=True)
        return {name: torch.cat(column).cpu() for name, column in columns}


class Network(nn.Module):
    """What is trained, as one module: rows -> the sum of the losses of each task, fp32 [len(TASKS)]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor, tasks: Tensor) -> Tensor:
        wrapped: Any = self.model
        model: UnifiedMLLM = wrapped if isinstance(wrapped, UnifiedMLLM) else wrapped.get_base_model()
        trunk: Any = model.model
        hidden = trunk(
            inputs_embeds=model.embed(input_ids), position_ids=position_ids, use_cache=False
        ).last_hidden_state
        losses = model.token_losses(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return losses.new_zeros(len(TASKS)).index_add(0, tasks[:, 1:].flatten(), losses)


class MLLMStage:
    """Trains what stage `name` trains of `model`, which is then in `finish()`."""

    codes_from = 0
    best = None

    def __init__(self, name: str, model: UnifiedMLLM, run_config: MLLMTrainConfig) -> None:
        self.name, self.run_config = name, run_config
        self._config = run_config.stage(name)
        self.device = next(model.parameters()).device
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
        self.network = Part("network", Network(model).train(), self._config.optimizer, self.loss)
        self.parts = [self.network]

    @property
    def config(self) -> MLLMStageConfig:
        return self._config

    def loss(self, batch: RowBatch, step: int) -> tuple[Tensor, dict[str, Any]]:
        """The mean over all ids with a loss in the global batch, of this micro-batch's; and of each task that is in it.

        Averaged over micro-batches and processes, which the engine does, it is exact however samples are spread.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run_config.precision == "bf16"):
            sums = self.network(*batch.packed, batch.tasks) * batch.share
        figures = {f"{t}_loss": s / n for t, s, n in zip(TASKS, sums, batch.counts, strict=True) if n}
        return sums.sum() / max(1, sum(batch.counts)), {**figures, "padding": batch.padding}

    def prepare(self, step: int, images: Any, seed: int) -> None: ...

    def update(self, step: int, seed: int) -> dict[str, Any]:
        return {}

    def counters(self) -> dict[str, Tensor]:
        return {}

    def codebooks(self) -> dict[str, Tensor]:
        return {}

    def evaluate(self, batches: Iterator[list[RowBatch]]) -> tuple[dict[str, float], None]:
        """Losses of each task on held-out samples, the same on all processes."""
        totals = torch.zeros(2, len(TASKS), dtype=torch.float64, device=self.device)
        for batch in batches:
            for micro in batch:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run_config.precision == "bf16"):
                    totals[0] += self.network(*micro.packed, micro.tasks)
            totals[1] += torch.tensor(batch[0].counts, device=self.device) / distributed.world_size()
        sums, counts = distributed.all_reduce(totals).tolist()
        figures = {f"{t}_loss": s / n for t, s, n in zip(TASKS, sums, counts, strict=True) if n}
        return {"loss": sum(sums) / max(1, sum(counts)), **figures}, None

    def finish(self) -> UnifiedMLLM:
        """The trained model, whole: LoRA merged into its weights, and on every process all of them."""
        model = self.model if self.lora is None else self.model.merge_and_unload()
        if not (self.run_config.shard and distributed.world_size() > 1):
            return model
        state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in model.state_dict().items()}
        whole: Any = UnifiedMLLM(model.config)
        whole.to(self.device)
        whole.load_state_dict(state)
        whole.tie_weights()
        whole.generation_config = model.generation_config
        return whole


class _Images:
    """The image tokenizer: its codebooks at once, its teacher when the first image without ids comes."""

    def __init__(self, config: MLLMTrainConfig, tokenizer: SemHiTok | None, device: torch.device) -> None:
        if tokenizer is None and not config.tokenizer:
            raise ValueError("tokenizer: expected a tokenizer's folder or Hub name, got none")
        self.name, self.device = config.tokenizer, device
        self.tokenizer = tokenizer or SemHiTok.from_pretrained(config.tokenizer, teacher=False)
        self.encodes = False
        self.text_size = 0  # of the model's vocabulary

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [n, 3, H, W] -> flat ids [n, h * w] on the CPU."""
        if not self.encodes:
            if self.tokenizer.teacher is None:
                if not self.name:
                    raise ValueError("tokenizer: expected one with its teacher to encode images, got one without")
                self.tokenizer = SemHiTok.from_pretrained(self.name)
            self.tokenizer.to(self.device).eval()
            self.encodes = True
        made = [self.tokenizer.encode(part.to(self.device).float() / 255) for part in images.split(_ENCODE)]
        return torch.cat(made).flatten(1).cpu()

    def put(self, micro: Sequence[MicroRows], device: torch.device, key: object = None) -> list[RowBatch]:
        """The micro-batches of a step on their way to `device`, with the ids of all images."""
        pixels = torch.cat([m.images for m in micro])
        codes = self.encode(pixels) if len(pixels) else pixels.new_zeros(0, 1, dtype=torch.int64)
        codes += self.text_size
        filled = [m.with_ids(own) for m, own in zip(micro, codes.split([len(m.images) for m in micro]), strict=True)]
        counts = torch.zeros(len(TASKS) + 2, dtype=torch.float64)
        for packed, m in zip(filled, micro, strict=True):
            counts[:-2] += torch.bincount(m.tasks[packed.labels != IGNORE].int(), minlength=len(TASKS))
            counts[-2:] += torch.tensor([(m.padding == 0).sum(), m.padding.numel()])
        *learnt, total, room = (int(n) for n in distributed.all_reduce(counts.to(device)).tolist())
        share = distributed.world_size() * len(micro)
        return [
            RowBatch(
                Packed(*(x.to(device, non_blocking=True) for x in packed)),
                m.tasks.to(device).long(), learnt, share, total, 1 - total / room,
            )
            for packed, m in zip(filled, micro, strict=True)
        ]  # fmt: skip


def _open(configs: Sequence[SourceConfig], config: MLLMTrainConfig, given: Sequence[Source] | None) -> list[Source]:
    return list(given) if given is not None else [open_source(source, config.data) for source in configs]


def _text_tokenizer(config: MLLMTrainConfig, folder: Path, sources: Sequence[Sequence[Source]], given: Any) -> Any:
    if given is not None:
        return given
    name = config.start_from or config.text_tokenizer or config.llm
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    own = folder / "text_tokenizer"
    if distributed.rank() == 0 and not own.exists():
        size = AutoConfig.for_model(**(config.llm_config or {})).vocab_size
        texts = (text for stage in sources for source in stage for text in source.texts())
        _write(own, word_tokenizer(texts, size).save_pretrained)
    if distributed.world_size() > 1:
        torch.distributed.barrier()
    return AutoTokenizer.from_pretrained(own)


def _model(config: MLLMTrainConfig, tokenizer: SemHiTok) -> UnifiedMLLM:
    """The model that the first stage starts from, in fp32."""
    torch.manual_seed(config.seed)
    given = [name for name in ("start_from", "llm", "llm_config") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(f"llm: expected one of start_from, llm and llm_config, got {' and '.join(given) or 'none'}")
    if config.start_from is not None:
        model = UnifiedMLLM.from_pretrained(config.start_from, dtype=torch.float32)
        model.vocabulary.check_hash(tokenizer.codebook_hash)
        return model
    llm = config.llm or AutoConfig.for_model(**(config.llm_config or {}))
    options: Any = {"head": config.head, "resolution_id": config.resolution_id, "dtype": torch.float32}
    return UnifiedMLLM.from_parts(llm, tokenizer, **options)


def _held_out(
    sources: list[Source],
    config: MLLMTrainConfig,
    data: TrainingRows,
    stage: MLLMStageConfig,
    images: _Images,
    device: torch.device,
) -> Callable[[], Iterator[list[RowBatch]]] | None:
    if not sources:
        return None
    places = {"rank": data.rank, "world_size": data.world_size}
    settings = replace(config.data, caption_drop=0.0, workers=0)
    rows = TrainingRows(sources, settings, data.model, data.text_tokenizer, config.seed, **places)

    def batches() -> Iterator[list[RowBatch]]:
        micro_batch = stage.micro_batch or max(1, stage.batch_size // data.world_size)
        found = rows.batches(stage.batch_size, micro_batch)
        try:
            for _ in range(config.evaluation.batches):
                yield images.put(next(found), device)
        finally:
            found.close()

    return batches


def _save(model: UnifiedMLLM, words: Any, folder: Path) -> None:
    def write(place: Path) -> None:
        model.eval().save_pretrained(place)
        words.save_pretrained(place)

    _write(folder, write)


def _write(folder: Path, write: Callable[[Path], Any]) -> None:
    """Make a folder that is there whole or not at all."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
