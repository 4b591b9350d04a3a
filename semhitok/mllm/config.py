"""Configuration of the unified model's training: dataclasses, filled strictly from YAML as in `semhitok.config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from semhitok._settings import Count, Decay, Positive, Range, Settings, Share, Size, Workers
from semhitok.config import EngineConfig, OptimizerConfig, StageConfig, read_config

TASKS = ("understanding", "generation", "text")


@dataclass
class SourceConfig(Settings):
    """Samples of one kind.

    path: a .jsonl file, webdataset shards (a pattern of .tar), or what `semhitok encode` wrote: an ids file
        (.safetensors), or a corpus (a folder). See `semhitok.mllm.sources` for what is in them.
    task: "understanding" (images to text), "generation" (captions to images) or "text". Its loss is logged under this
        name, and it decides which sample is made from an image with a caption.
    weight: samples are drawn from the sources of a stage in proportion to their weights.
    question: the question about an image with a caption, in "understanding".
    captions: for an ids file, a JSON file {name: caption}.
    """

    path: str = ""
    task: str = ""
    weight: Positive = 1.0
    question: str = ""
    captions: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task not in TASKS:
            raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {self.task!r}")
        if not self.path:
            raise ValueError("path: expected one, got none")


@dataclass
class RowsConfig(Settings):
    """How samples become rows.

    length: ids in a row. Longer texts are cut into several samples; longer samples with images are skipped.
    caption_drop: share of captions left out in "generation", which guidance needs.
    look_ahead: samples from which a row is filled, in order; more samples leave less padding.
    shuffle_buffer: samples of a stream of shards that are shuffled together, for each row of a batch.
    workers: processes that read and decode, for each training process; see `semhitok.config.DataConfig`.
    """

    length: Annotated[int, Range(2, 2**24)] = 2048
    caption_drop: Share = 0.1
    look_ahead: Annotated[int, Range(1, 10**6)] = 32
    shuffle_buffer: Annotated[int, Range(1, 10**7)] = 64
    workers: Workers = "auto"


def _optimizer(lr: float) -> OptimizerConfig:
    return OptimizerConfig(lr, lr / 10, 0.03, (0.9, 0.95), 0.0)


@dataclass
class MLLMStageConfig(StageConfig):
    """A stage; `batch_size` and `micro_batch` count rows of `data.length` ids.

    sources: what the stage learns from.
    """

    steps: Count = 5000
    batch_size: Count = 64
    optimizer: OptimizerConfig = field(default_factory=lambda: _optimizer(2e-5))
    sources: list[SourceConfig] = field(default_factory=list)


@dataclass
class LoRAConfig(Settings):
    """Low-rank updates of the LLM in "joint" and "instruct" (PEFT) in place of its weights; new parts learn fully.

    r, alpha, dropout, targets: `lora_r`, `lora_alpha`, `lora_dropout`, `target_modules` of PEFT.
    """

    r: Size = 16
    alpha: Size = 32
    dropout: Decay = 0.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class HeldOutConfig(Settings):
    """Losses on samples that are not trained on.

    sources: where the samples are; an empty list leaves the evaluation out.
    every: steps between two evaluations; there is also one at the end of every stage.
    batches: batches in an evaluation, always the same.
    """

    sources: list[SourceConfig] = field(default_factory=list)
    every: Count = 500
    batches: Count = 8


@dataclass
class MLLMTrainConfig(EngineConfig):
    """Everything that the training of the unified model depends on.

    tokenizer: the image tokenizer, folder or name on the Hub.
    llm: folder or Hub name of a causal LM.
    llm_config: in place of `llm`, a config of transformers ({"model_type": "qwen2", ...}): an LLM with random weights.
    text_tokenizer: folder or Hub name. None takes that of `llm`; for an `llm_config` it makes one of whole words from
        the texts of all sources, as many as its `vocab_size`.
    head, resolution_id: see `UnifiedMLLMConfig`.
    start_from: a finished model of an earlier run, folder or Hub name, in place of llm, llm_config and head.
    """

    stages: list[str] = field(default_factory=lambda: ["adapter", "joint", "instruct"])
    precision: str = "bf16"
    tokenizer: str = ""
    llm: str | None = None
    llm_config: dict[str, Any] | None = None
    text_tokenizer: str | None = None
    head: str = "hierarchical"
    resolution_id: bool = False
    start_from: str | None = None
    data: RowsConfig = field(default_factory=RowsConfig)
    adapter: MLLMStageConfig = field(default_factory=lambda: MLLMStageConfig(optimizer=_optimizer(1e-3)))
    joint: MLLMStageConfig = field(default_factory=MLLMStageConfig)
    instruct: MLLMStageConfig = field(default_factory=MLLMStageConfig)
    lora: LoRAConfig | None = None
    evaluation: HeldOutConfig = field(default_factory=HeldOutConfig)

    @property
    def stage_configs(self) -> dict[str, MLLMStageConfig]:
        return {"adapter": self.adapter, "joint": self.joint, "instruct": self.instruct}


def mllm_config(source: str | Path) -> MLLMTrainConfig:
    """A training configuration: a preset by name ("mllm-tiny"), or a YAML file.

    Raises:
        ValueError, OSError: as `semhitok.config.train_config`.
    """
    return read_config(MLLMTrainConfig, str(source), "mllm")
