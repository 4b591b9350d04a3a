"""The demo of the unified model: from generated pictures and captions alone to captions of pictures and back, on a CPU.

1. a reader: a small CNN that tells what is in a picture, the judge of what follows
2. a teacher: SigLIP in small, on pictures and captions
3. a tokenizer: SemHiTok with that teacher, the stages that photographs get, too
4. the unified model: a tiny Qwen2 from nothing, on ids and words: captions, questions, text to image
5. figures, on combinations of attributes that training never showed
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok._files import write_atomic, write_json
from semhitok._optional import require
from semhitok.config import TrainConfig, from_dict, override
from semhitok.corpus.ids_file import load_codes, save_codes
from semhitok.demo import scenes
from semhitok.demo.reader import (
    Reader,
    Scores,
    chance,
    evaluate_captions,
    evaluate_questions,
    score,
    train_reader,
)
from semhitok.demo.teacher import ContrastiveConfig, scenes_lesson, train_teacher
from semhitok.mllm import generate, generate_images
from semhitok.mllm.config import MLLMTrainConfig, mllm_config
from semhitok.mllm.model import UnifiedMLLM
from semhitok.mllm.prompts import end_of_answer, generation, understanding
from semhitok.mllm.sources import Records
from semhitok.mllm.training import run
from semhitok.tokenizer import SemHiTok
from semhitok.training import train

SIZE, PATCH = 64, 8  # pixels: 8 x 8 ids
SPLITS = ("random", "comp")
HELD_OUT = 480  # pictures of a split
TEACHER_STEPS, TEACHER_BATCH, READER_STEPS = 400, 64, 400
GUIDANCE = (1.0, 1.5)
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 30}


def tokenizer_config() -> TrainConfig:
    """How the tokenizer is trained, but for its teacher."""
    settings: dict[str, Any] = {
        "model": {
            "adaptive": True,
            "image_size": SIZE, "patch_size": PATCH,
            "num_codes": 32, "num_sub_codes": 128, "sem_dim": 16, "pix_dim": 16,
            "semantic_decoder": {"width": 96, "depth": 1, "heads": 3},
            "encoder": {"width": 128, "depth": 2, "heads": 2},
            "decoder": {"width": 128, "depth": 2, "heads": 2},
        },
        "data": {"crop_scale": None},
        "precision": "bf16",
        "tracker": "none",
        "semantic": {
            "steps": 250, "batch_size": 32, "optimizer": {"lr": 1e-3, "warmup_share": 0.05}, "continuous_steps": 50,
            "checkpoint_every": 100,
        },
        "pixel": {
            "steps": 1500, "batch_size": 32, "optimizer": {"lr": 1e-3, "warmup_share": 0.05, "betas": [0.9, 0.99]},
            "continuous_steps": 150, "decay": 0.97, "ema_decay": 0.0, "drop": 0.0,
            "loss": {"l1": 1.0, "l2": 5.0, "lpips": 0.0, "critic": {"weight": 0.0}}, "checkpoint_every": 100,
        },
        "evaluation": {"every": 100_000},
    }  # fmt: skip
    return from_dict(TrainConfig, settings)


def model_config() -> MLLMTrainConfig:
    """How the unified model is trained."""
    config = mllm_config("mllm-tiny")
    for setting in (
        "data.length=256", "data.caption_drop=0.1", "tracker=none", "joint.steps=1600", "joint.batch_size=16",
        "head=hierarchical", "joint.optimizer.lr=2.0e-3", "joint.optimizer.min_lr=2.0e-5", "joint.checkpoint_every=200",
    ):  # fmt: skip
        override(config, setting)
    return config


def demo(
    out: Path, *, pictures: int = 12_000, tokenizer: TrainConfig | None = None, model: MLLMTrainConfig | None = None
) -> str:
    """Train everything in folder `out`, or go on with it; evaluate, draw; the table as text.

    Args:
        pictures: of the training set.
        tokenizer, model: trainings, in place of `tokenizer_config` and `model_config`.

    Raises:
        semhitok.training.Interrupted: a signal came; the same call continues.
        ValueError, OSError: as the trainings raise them.
    """
    clock = _Clock(out / "seconds.json")
    with clock("reader"):
        reader = _reader(out / "reader.safetensors")
    with clock("teacher"):
        made = scenes.pictures(0, 0, pictures, "train", SIZE)
        teacher = train_teacher(
            ContrastiveConfig("scenes", pictures, TEACHER_STEPS, TEACHER_BATCH), out, lambda: scenes_lesson(made)
        )
    config = tokenizer or tokenizer_config()
    config.model.teacher = teacher
    with clock("tokenizer"):
        images = write_pictures(made.images, out / "pictures")
        train(config, [images], out / "tokenizer")
    tok = SemHiTok.from_pretrained(out / "tokenizer" / "checkpoint")
    held = {split: scenes.pictures(1, 0, HELD_OUT, split, SIZE) for split in SPLITS}
    with clock("ids"):
        codes = {split: encode(tok, x.images) for split, x in held.items()}
        training_codes = _training_codes(tok, made.images, out / "ids.safetensors")
    with clock("model"):
        run(
            model or model_config(),
            out / "model",
            sources={"joint": _sources(tok, training_codes, made)},
            tokenizer=tok,
        )
    with clock("evaluation"):
        both = _Both(out / "model" / "checkpoint", tok)
        metrics: dict[str, Any] = {"tokens": training_codes[0].numel()}
        drawn = {}
        for split, some in held.items():
            metrics[split], drawn[split] = _evaluate(both, reader, some, codes[split])
            _draw(both, some, codes[split], drawn[split], out / f"{split}.png")
    first = metrics[SPLITS[0]]
    best = first["images"][f"guidance {GUIDANCE[-1]:g}"]
    short = {
        "caption_attributes": first["captions"]["right image"]["mean"],
        "caption_exact": first["captions"]["right image"]["all"],
        "image_attributes": best["mean"],
        "image_shape": best["shape"],
        "caption_attributes_wrong_image": first["captions"]["wrong image"]["mean"],
        "chance": chance()["mean"],
        "seconds": sum(clock.seconds.values()),
    }
    metrics = {**short, **metrics, "seconds_of": clock.seconds}
    write_json(out / "metrics.json", metrics)
    return table(metrics)


def table(metrics: dict[str, Any]) -> str:
    """What `metrics.json` holds, for people."""
    names = list(scenes.ATTRIBUTES)
    lines = []
    for split, title in zip(SPLITS, ("unseen combinations", "unseen (shape, colour, background)"), strict=True):
        lines += ["", f"{title}, {HELD_OUT} pictures"]
        lines += [f"{'':34}" + "".join(f"{name:>11}" for name in [*names, "mean", "all right"])]
        rows = [(f"reader on {kind}", scores) for kind, scores in metrics[split]["reader"].items()]
        for part in ("captions", "questions", "images"):
            rows += [(f"{part}, {kind}", scores) for kind, scores in metrics[split][part].items()]
        for title, scores in rows:
            lines += [f"{title:34}" + "".join(f"{scores[name]:>11.3f}" for name in [*names, "mean", "all"])]
    spent = ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["seconds_of"].items())
    return "\n".join([*lines, "", f"{metrics['seconds']:.0f} s: {spent}"])


def encode(tokenizer: SemHiTok, images: Tensor) -> Tensor:
    """uint8 images [N, 3, S, S] -> flat ids [N, h, w]."""
    return torch.cat([tokenizer.encode(x.float() / 255) for x in images.split(100)])


def decode(tokenizer: SemHiTok, codes: Tensor) -> Tensor:
    """Flat ids [N, h, w] -> images [N, 3, S, S] in [0, 1]."""
    return torch.cat([tokenizer.decode(x) for x in codes.split(100)])


def write_pictures(images: Tensor, folder: Path) -> Path:
    """uint8 images [N, 3, S, S] as files in `folder`, which it returns; those that are there stay."""
    pil = require("PIL.Image", "models")
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        path = folder / f"{n:05}.png"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            pil.fromarray(image.permute(1, 2, 0).numpy()).save(partial, format="PNG", compress_level=1)
            partial.replace(path)
    return folder


# ---- the parts ----


class _Clock:
    """Seconds of each part, over all sittings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_bytes()) if path.exists() else {}

    def __call__(self, part: str) -> _Clock:
        self.part = part
        return self

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.began
        if self.part == "evaluation":
            self.seconds[self.part] = spent  # made anew every time
        else:
            self.seconds[self.part] = self.seconds.get(self.part, 0.0) + spent
        write_atomic(self.path, json.dumps(self.seconds).encode())


def _reader(path: Path) -> Reader:
    safetensors = require("safetensors.torch", "models")
    if path.exists():
        reader = Reader(SIZE)
        reader.load_state_dict(safetensors.load(path.read_bytes()))
        return reader.eval()
    reader = train_reader(SIZE, steps=READER_STEPS)
    write_atomic(path, safetensors.save({k: v.contiguous() for k, v in reader.state_dict().items()}))
    return reader


def _training_codes(tokenizer: SemHiTok, images: Tensor, path: Path) -> Tensor:
    if path.exists():
        file = load_codes(path)
        if file.codebook_hash == tokenizer.codebook_hash and len(file.codes) == len(images):
            return file.codes
    codes = encode(tokenizer, images)
    save_codes(path, codes, [f"{n:05}" for n in range(len(codes))], tokenizer.vocabulary)
    return codes


def _sources(tokenizer: SemHiTok, codes: Tensor, data: scenes.Pictures) -> list[Records]:
    """Text to image, captions, questions, by weights 3 : 1 : 1."""
    own = tokenizer.codebook_hash
    captioned = [
        {"caption": text, "codes": [x.flatten().tolist()]} for text, x in zip(data.captions, codes, strict=True)
    ]
    asked = []
    for n, (row, labels) in enumerate(zip(captioned, data.labels, strict=True)):
        name, question = list(scenes.QUESTIONS.items())[n % len(scenes.QUESTIONS)]
        messages = [
            {"role": "user", "content": f"<image>\n{question}"},
            {"role": "assistant", "content": scenes.answer(name, labels)},
        ]
        asked.append({"messages": messages, "codes": row["codes"]})
    return [
        Records(captioned, "generation", weight=3, codebook_hash=own),
        Records(captioned, "understanding", codebook_hash=own),
        Records(asked, "understanding", codebook_hash=own),
    ]


class _Both:
    """The trained model with its two tokenizers."""

    def __init__(self, folder: Path, tokenizer: SemHiTok) -> None:
        transformers = require("transformers", "mllm")
        self.tokenizer = tokenizer
        self.model: Any = UnifiedMLLM.from_pretrained(folder).eval()
        self.words = transformers.AutoTokenizer.from_pretrained(folder)
        self.eos = end_of_answer(self.words, self.model.vocabulary)

    def answer(self, codes: Tensor, questions: list[str]) -> list[str]:
        """Greedy answers to a question about each image's ids [N, h, w]; "" asks for a caption."""
        images = self.model.vocabulary.image(codes, self.tokenizer.codebook_hash)
        prompts = [
            understanding(self.words, self.model.vocabulary, image, question)
            for image, question in zip(images, questions, strict=True)
        ]
        said = []
        for start in range(0, len(prompts), 120):
            rows = generate(
                self.model, prompts[start : start + 120], max_new_tokens=24, images=False, temperature=0.0,
                num_text_ids=len(self.words), eos_id=self.eos,
            )  # fmt: skip
            said += [self.words.decode(row, skip_special_tokens=True) for row in rows]
        return said

    def describe(self, codes: Tensor) -> list[str]:
        return self.answer(codes, [""] * len(codes))

    def paint(self, captions: list[str], guidance: float) -> Tensor:
        """Flat ids [N, h, w] of images for captions."""
        draw = torch.Generator().manual_seed(0)
        vocabulary = self.model.vocabulary
        prompts = [generation(self.words, vocabulary, text) for text in captions]
        return torch.cat([
            generate_images(
                self.model, prompts[start : start + 120], guidance=guidance, generator=draw,
                unconditional=generation(self.words, vocabulary, None), **SAMPLING,
            )
            for start in range(0, len(prompts), 120)
        ])  # fmt: skip


def _evaluate(
    both: _Both, reader: Reader, data: scenes.Pictures, codes: Tensor
) -> tuple[dict[str, dict[str, Scores]], Tensor]:
    """All scores on one split, and its pictures from captions at the last guidance."""
    painted = {scale: decode(both.tokenizer, both.paint(data.captions, scale)) for scale in GUIDANCE}
    scores = {
        "reader": {
            "real pictures": score(reader.read(data.images), data.labels),
            "reconstructions": score(reader.read(decode(both.tokenizer, codes)), data.labels),
        },
        "captions": evaluate_captions(both.describe, codes, data.labels),
        "questions": evaluate_questions(both.answer, codes, data.labels),
        "images": {f"guidance {scale:g}": score(reader.read(x), data.labels) for scale, x in painted.items()},
    }
    return scores, painted[GUIDANCE[-1]]


def _draw(both: _Both, data: scenes.Pictures, codes: Tensor, painted: Tensor, path: Path, count: int = 8) -> None:
    """Pictures with the model's captions, and pictures that it made of captions."""
    matplotlib: Callable[..., Any] = require("matplotlib", "demo")
    matplotlib.use("Agg")  # type: ignore[attr-defined]
    import matplotlib.pyplot as plt

    count = min(count, len(codes))
    said = both.describe(codes[:count])
    figure, axes = plt.subplots(3, count, figsize=(2 * count, 7), layout="constrained")
    rows = (
        ("picture, and the model's caption", data.images[:count].float() / 255, said),
        ("its reconstruction", decode(both.tokenizer, codes[:count]), [""] * count),
        ("from this caption", painted[:count], data.captions[:count]),
    )
    for line, (name, images, texts) in zip(axes, rows, strict=True):
        for n, (axis, image, text) in enumerate(zip(line, images, texts, strict=True)):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set_xticks([]), axis.set_yticks([])
            axis.set_xlabel(textwrap.fill(text, 22), fontsize=7)
            if n == 0:
                axis.set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
