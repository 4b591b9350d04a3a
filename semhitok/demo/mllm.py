"""The demo of the unified model: from generated pictures and captions to a model that translates both ways, on a CPU.

1. a reader: a small CNN that reads the attributes of a picture, to judge what follows
2. a teacher: a small SigLIP, trained on pictures and captions
3. an image tokenizer: SemHiTok with that teacher, in the usual stages
4. the unified model: a tiny Qwen2, trained from scratch on captions, questions and text to image
5. figures, on combinations of attributes that training does not have
"""

from __future__ import annotations

import contextlib
import json
import textwrap
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok._files import write_atomic, write_json
from semhitok._optional import require
from semhitok.config import TrainConfig, from_dict, override
from semhitok.corpus.ids_file import load_codes, save_codes
from semhitok.demo import scenes
from semhitok.demo.reader import Reader, Scores, chance, evaluate_captions, evaluate_questions, score, train_reader
from semhitok.demo.teacher import ContrastiveConfig, scenes_lesson, train_teacher
from semhitok.evaluation import plots
from semhitok.mllm import Sampling
from semhitok.mllm.assistant import Assistant
from semhitok.mllm.config import MLLMTrainConfig, mllm_config
from semhitok.mllm.sources import Records
from semhitok.mllm.training import train as train_mllm
from semhitok.tokenizer import SemHiTok
from semhitok.training import train
from semhitok.training.stage import bf16_is_slow

SIZE, PATCH = 64, 8  # pixels: 8 x 8 ids
SPLITS = ("random", "comp")
HELD_OUT = 480  # pictures of a split
TEACHER_STEPS, TEACHER_BATCH, READER_STEPS = 400, 64, 400
SAMPLINGS = [Sampling(temperature=0.7, top_k=30, guidance=scale) for scale in (1.0, 1.5)]
BATCH = 120  # prompts at a time


def precision() -> str:
    """Of both trainings: bf16, unless it is slow on this CPU."""
    return "fp32" if bf16_is_slow(torch.device("cpu")) else "bf16"


def tokenizer_config() -> TrainConfig:
    """The training of the image tokenizer, without its teacher."""
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
        "precision": precision(),
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
    """The training of the unified model."""
    config = mllm_config("mllm-tiny")
    for setting in (
        "data.length=256", "data.caption_drop=0.1", "tracker=none", "joint.steps=1600", "joint.batch_size=16",
        f"precision={precision()}", "head=hierarchical", "joint.optimizer.lr=2.0e-3", "joint.optimizer.min_lr=2.0e-5",
        "joint.checkpoint_every=200",
    ):  # fmt: skip
        override(config, setting)
    return config


def demo(
    out: Path, *, pictures: int = 12_000, tokenizer: TrainConfig | None = None, model: MLLMTrainConfig | None = None
) -> str:
    """Train everything in folder `out`, or resume; evaluate and draw.

    Args:
        pictures: number of pictures to train with.
        tokenizer: the training of the image tokenizer; by default `tokenizer_config`.
        model: the training of the unified model; by default `model_config`.

    Returns:
        The table of figures.

    Raises:
        semhitok.training.Interrupted: a signal came; the same call resumes.
        ValueError, OSError: see the trainings.
    """
    seconds_of = out / "seconds.json"
    with _timed("reader", seconds_of):
        reader = _reader(out / "reader.safetensors")
    with _timed("teacher", seconds_of):
        made = scenes.pictures(0, 0, pictures, "train", SIZE)
        settings = ContrastiveConfig("scenes", pictures, TEACHER_STEPS, TEACHER_BATCH)
        teacher = train_teacher(settings, out, lambda: scenes_lesson(made))
    config = tokenizer or tokenizer_config()
    config.model.teacher = teacher
    with _timed("tokenizer", seconds_of):
        images = write_pictures(made.images, out / "pictures")
        train(config, [images], out / "tokenizer")
    image_tokenizer = SemHiTok.from_pretrained(out / "tokenizer" / "checkpoint")
    held = {split: scenes.pictures(1, 0, HELD_OUT, split, SIZE) for split in SPLITS}
    with _timed("ids", seconds_of):
        codes = {split: encode(image_tokenizer, x.images) for split, x in held.items()}
        training_codes = _training_codes(image_tokenizer, made.images, out / "ids.safetensors")
    with _timed("model", seconds_of):
        sources = {"joint": _sources(image_tokenizer, training_codes, made)}
        train_mllm(model or model_config(), out / "model", sources=sources, image_tokenizer=image_tokenizer)
    with _timed("evaluation", seconds_of):
        tokenizer_folder = str(out / "tokenizer" / "checkpoint")
        assistant = Assistant.load(out / "model" / "checkpoint", tokenizer_folder, teacher=False)
        metrics: dict[str, Any] = {"tokens": training_codes[0].numel()}
        drawn = {}
        for split, data in held.items():
            metrics[split], drawn[split] = _evaluate(assistant, reader, data, codes[split])
            draw_figure(assistant, data.images, codes[split], data.captions, drawn[split], out / f"{split}.png")
    captions, seconds = metrics[SPLITS[0]]["captions"], _seconds(seconds_of)
    best = metrics[SPLITS[0]]["images"][f"guidance {SAMPLINGS[-1].guidance:g}"]
    short = {
        "caption_attributes": captions["right image"]["mean"], "caption_exact": captions["right image"]["all"],
        "image_attributes": best["mean"], "image_shape": best["shape"],
        "caption_attributes_wrong_image": captions["wrong image"]["mean"],
        "chance": chance()["mean"], "seconds": sum(seconds.values()),
    }  # fmt: skip
    metrics = {**short, **metrics, "seconds_of": seconds}
    write_json(out / "metrics.json", metrics)
    return table(metrics)


def table(metrics: dict[str, Any]) -> str:
    """The figures of `metrics.json` as a table."""
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


def encode(image_tokenizer: SemHiTok, images: Tensor) -> Tensor:
    """uint8 images [N, 3, S, S] -> flat ids [N, h, w]."""
    return torch.cat([image_tokenizer.encode(x.float() / 255) for x in images.split(100)])


def decode(image_tokenizer: SemHiTok, codes: Tensor) -> Tensor:
    """Flat ids [N, h, w] -> images [N, 3, S, S] in [0, 1]."""
    return torch.cat([image_tokenizer.decode(x) for x in codes.split(100)])


def write_pictures(images: Tensor, folder: Path) -> Path:
    """Write uint8 images [N, 3, S, S] to `folder`, unless they are there, and return it."""
    pil = require("PIL.Image", "models")
    folder.mkdir(parents=True, exist_ok=True)
    for n, image in enumerate(images):
        path = folder / f"{n:05}.png"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            pil.fromarray(image.permute(1, 2, 0).numpy()).save(partial, format="PNG", compress_level=1)
            partial.replace(path)
    return folder


def draw_figure(
    assistant: Assistant,
    images: Tensor,
    codes: Tensor,
    captions: Sequence[str],
    drawn: Tensor,
    path: Path,
    count: int = 8,
) -> None:
    """Draw uint8 pictures [N, 3, S, S] with the model's captions, their reconstructions, and `drawn` from `captions`.

    Args:
        assistant: the model with its image tokenizer.
        images: the pictures, of which the first `count` are drawn.
        codes: their flat ids [N, h, w].
        captions: the captions that the model drew.
        drawn: its pictures [N, 3, S, S] of them, in [0, 1].
        path: the PNG to write.
        count: columns, at most.
    """
    plt = plots.pyplot()
    count = min(count, len(codes))
    written = _describe(assistant, codes[:count])
    figure, axes = plt.subplots(3, count, figsize=(2 * count, 7), layout="constrained")
    rows = (
        ("picture, and the model's caption", images[:count].float() / 255, written),
        ("its reconstruction", decode(assistant.image_tokenizer, codes[:count]), [""] * count),
        ("from this caption", drawn[:count], captions[:count]),
    )
    for line, (name, pictures, texts) in zip(axes, rows, strict=True):
        for axis, image, text in zip(line, pictures, texts, strict=True):
            axis.imshow(plots.picture(image))
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(textwrap.fill(text, 22), fontsize=7)
        line[0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


# ---- the parts ----


@contextlib.contextmanager
def _timed(part: str, path: Path) -> Iterator[None]:
    """Add the seconds that a part takes to the file `path`, {part: seconds over all calls}."""
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds = _seconds(path)
        earlier = 0.0 if part == "evaluation" else seconds.get(part, 0.0)  # every call repeats the evaluation
        seconds[part] = earlier + time.perf_counter() - began
        write_atomic(path, json.dumps(seconds).encode())


def _seconds(path: Path) -> dict[str, float]:
    return json.loads(path.read_bytes()) if path.exists() else {}


def _reader(path: Path) -> Reader:
    safetensors = require("safetensors.torch", "models")
    if path.exists():
        reader = Reader(SIZE)
        reader.load_state_dict(safetensors.load(path.read_bytes()))
        return reader.eval()
    reader = train_reader(SIZE, steps=READER_STEPS)
    write_atomic(path, safetensors.save({k: v.contiguous() for k, v in reader.state_dict().items()}))
    return reader


def _training_codes(image_tokenizer: SemHiTok, images: Tensor, path: Path) -> Tensor:
    if path.exists():
        file = load_codes(path)
        if file.codebook_hash == image_tokenizer.codebook_hash and len(file.codes) == len(images):
            return file.codes
    codes = encode(image_tokenizer, images)
    save_codes(path, codes, [f"{n:05}" for n in range(len(codes))], image_tokenizer.vocabulary)
    return codes


def _sources(image_tokenizer: SemHiTok, codes: Tensor, data: scenes.Pictures) -> list[Records]:
    """Text to image, captions and questions, with weights 3 : 1 : 1."""
    pairs = zip(data.captions, codes, strict=True)
    captioned = [{"caption": text, "codes": [x.flatten().tolist()]} for text, x in pairs]
    asked = []
    for n, (row, labels) in enumerate(zip(captioned, data.labels, strict=True)):
        name, question = list(scenes.QUESTIONS.items())[n % len(scenes.QUESTIONS)]
        answer = {"role": "assistant", "content": scenes.answer(name, labels)}
        messages = [{"role": "user", "content": f"<image>\n{question}"}, answer]
        asked.append({"messages": messages, "codes": row["codes"]})
    given = ((captioned, "generation", 3), (captioned, "understanding", 1), (asked, "understanding", 1))
    codebook_hash = image_tokenizer.codebook_hash
    return [Records(rows, task, weight=weight, codebook_hash=codebook_hash) for rows, task, weight in given]


def _answer(assistant: Assistant, codes: Tensor, questions: list[str]) -> list[str]:
    """Greedy answers to a question about each image's ids [N, h, w]; "" asks for a caption."""
    images, texts = assistant.image_ids(codes), []
    for n in range(0, len(images), BATCH):
        texts += assistant.answer(questions[n : n + BATCH], images[n : n + BATCH], max_new_tokens=24)
    return texts


def _describe(assistant: Assistant, codes: Tensor) -> list[str]:
    return _answer(assistant, codes, [""] * len(codes))


def _draw(assistant: Assistant, captions: list[str], sampling: Sampling) -> Tensor:
    """Images [N, 3, S, S] of captions."""
    generator = torch.Generator().manual_seed(0)
    batches = (captions[n : n + BATCH] for n in range(0, len(captions), BATCH))
    codes = [assistant.draw_codes(batch, generator, sampling=sampling) for batch in batches]
    return decode(assistant.image_tokenizer, torch.cat(codes))


def _evaluate(
    assistant: Assistant, reader: Reader, data: scenes.Pictures, codes: Tensor
) -> tuple[dict[str, dict[str, Scores]], Tensor]:
    """All scores of one split, and the pictures drawn from its captions with the last of `SAMPLINGS`."""
    drawn = {f"guidance {s.guidance:g}": _draw(assistant, data.captions, s) for s in SAMPLINGS}
    read = {"real pictures": data.images, "reconstructions": decode(assistant.image_tokenizer, codes)}
    scores = {
        "reader": {name: score(reader.read(x), data.labels) for name, x in read.items()},
        "captions": evaluate_captions(partial(_describe, assistant), codes, data.labels),
        "questions": evaluate_questions(partial(_answer, assistant), codes, data.labels),
        "images": {name: score(reader.read(x), data.labels) for name, x in drawn.items()},
    }
    return scores, drawn[f"guidance {SAMPLINGS[-1].guidance:g}"]
