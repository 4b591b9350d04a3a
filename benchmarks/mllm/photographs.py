"""The unified model on captioned photographs: which caption belongs to which photograph, and pictures of captions.

    python -m benchmarks.mllm.photographs --data DATA --tokenizer CHECKPOINT --out DIR --quick    # a trial
    python -m benchmarks.mllm.photographs --data DATA --tokenizer CHECKPOINT --out DIR            # an hour

DATA is laid out like Flickr8k: a folder, or a tar file of it, with images and captions.txt, whose first line is
`image,caption` and whose other lines are the name of an image and one of its captions. Photographs are resized and
cropped in the centre to the tokenizer's size. A fifth of them, at most 200, are held out.

The preset mllm-tiny learns from the others from scratch, in both directions; from their mirror images, too, unless the
caption says left or right. Then for each photograph that was held out the captions of all of them are ranked, one of
each (its first), by

    log p(c | x)        the model's log-likelihood of caption c after the ids of photograph x
    PMI                 pointwise mutual information, log p(c | x) - log p(c). p(c) is the mean of p(c | x') over as
                        many training photographs x'; so a caption gains nothing from being likely for any photograph
    linear pairing of   words and a vector of the photograph (`pairing.py`), learnt from the same captions: the mean of
                        the frozen teacher's features; the mean of the semantic code vectors; the square root of the
                        histogram of semantic ids

R@k is the share of photographs whose own caption is among the best k. text-to-image.png has the first eight held-out
photographs with captions that the model wrote, reconstructions, and what it drew from their captions, one try each;
drawn.png has what it drew alone.

Everything is kept in DIR, and an interrupted run continues. Exit status: 2 on an error.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from benchmarks.mllm.pairing import RECALLS, Words, pair, recalls
from benchmarks.tradeoff.photographs import digest
from benchmarks.tradeoff.run import say, spent
from semhitok._files import write_atomic, write_json
from semhitok._optional import require
from semhitok.config import override
from semhitok.data.images import SUFFIXES, decode_image, list_images, resize_crop, save_png, to_uint8
from semhitok.demo import mllm as demo
from semhitok.evaluation.probes import histograms
from semhitok.mllm.assistant import Assistant
from semhitok.mllm.config import MLLMTrainConfig, mllm_config
from semhitok.mllm.sources import Records
from semhitok.mllm.training import train
from semhitok.tokenizer import SemHiTok
from semhitok.training import Interrupted

CAPTIONS, HEADER = "captions.txt", ["image", "caption"]
FEWEST = 10  # photographs
BATCH = 50  # photographs that the tokenizer encodes at once
DRAWN = 8
WORD = re.compile(r"\w+|[^\w\s]+")  # as the tokenizer of words splits a text
SIDES = {"left", "right"}
PAIRED = {
    "features": "the teacher's mean features", "vectors": "mean semantic code vectors",
    "histogram": "histogram of semantic ids",
}  # fmt: skip


@dataclass
class Settings:
    """What a run depends on besides photographs and tokenizer.

    understanding: samples from photograph to caption, for each from caption to photograph.
    """

    test: int = 200  # photographs held out, at most; never more than a fifth
    steps: int = 3_000
    batch: int = 16  # samples of a step
    words: int = 2_000  # the most frequent ones, which the model and the pairings know
    understanding: int = 4
    seed: int = 0  # of the training; the photographs held out stay the same


QUICK = Settings(steps=200)
LEAST = {"test": 2, "steps": 1, "batch": 1, "words": 10}


# ---- data ----


class Photographs(NamedTuple):
    """In the order of their names: uint8 images [N, 3, S, S] and the captions of each."""

    images: Tensor
    captions: list[list[str]]

    def some(self, chosen: Tensor) -> Photographs:
        return Photographs(self.images[chosen], [self.captions[n] for n in chosen.tolist()])


def read_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the captions and of all images in a folder or tar file; names without folders.

    Raises:
        ValueError: neither a folder nor a tar file that can be read. OSError: a file cannot be read.
    """
    if source.is_dir():
        for path in (source / CAPTIONS, *list_images([source])):
            yield path.name, path.read_bytes()
        return
    try:
        with tarfile.open(source) as tar:
            for member in tar:
                name = Path(member.name).name
                content = tar.extractfile(member) if member.isreg() else None
                if content and (name == CAPTIONS or name.lower().endswith(SUFFIXES)) and not name.startswith("."):
                    yield name, content.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{source}: expected a folder or a tar file of photographs: {error}") from error


def read_captions(content: bytes, name: str) -> dict[str, list[str]]:
    """The captions of each image, in the order of the file.

    Raises:
        ValueError: not UTF-8, or a line that is not the name of an image and a caption.
    """
    found: dict[str, list[str]] = {}
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8: {error}") from error
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in lines:
            if not row:
                continue
            if lines.line_num == 1 and row != HEADER:
                raise ValueError(f"expected the first line {','.join(HEADER)}, got {','.join(row):.80}")
            if len(row) != 2 or not all(cell.strip() for cell in row):
                raise ValueError(f"expected the name of an image and a caption, got {','.join(row)!r:.80}")
            if lines.line_num > 1:
                found.setdefault(row[0].strip(), []).append(row[1].strip())
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{name}: line {lines.line_num}: {error}") from error
    return found


def read_photographs(source: Path, size: int) -> Photographs:
    """The photographs of `source` that have captions.

    Raises:
        ValueError: no captions.txt, or a wrong one; an image that cannot be read, of a name that another has, or that
            is missing; fewer than ten photographs. OSError: a file cannot be read.
    """
    captions: dict[str, list[str]] | None = None
    images: dict[str, Tensor] = {}
    for name, content in read_files(source):
        if name == CAPTIONS:
            captions = read_captions(content, f"{source}: {CAPTIONS}")
        elif name in images:
            raise ValueError(f"{source}: expected a name for each image, got {name} twice")
        else:
            images[name] = to_uint8(resize_crop(decode_image(content, f"{source}: {name}"), size))
    if captions is None:
        raise ValueError(f"{source}: expected {CAPTIONS}, found none")
    missing = sorted(captions.keys() - images.keys())
    if missing:
        raise ValueError(f"{source}: {CAPTIONS}: expected names of images that are there, got {missing[0]}")
    names = sorted(captions)
    if len(names) < FEWEST:
        raise ValueError(f"{source}: expected at least {FEWEST} photographs with captions, got {len(names)}")
    return Photographs(torch.stack([images[name] for name in names]), [captions[name] for name in names])


def split(count: int, test: int) -> tuple[Tensor, Tensor]:
    """Places of training and of test photographs."""
    test = min(test, count // 5)
    order = torch.randperm(count, generator=Generator().manual_seed(0))
    return order[test:], order[:test]


def kept(path: Path, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file of this key; computed and kept there if it is missing, damaged or of another key."""
    safetensors = require("safetensors", "models")
    with suppress(FileNotFoundError, safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
        if file.metadata() == {"key": key}:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {name: x.contiguous() for name, x in compute().items()}
    write_atomic(path, require("safetensors.torch", "models").save(found, {"key": key}))
    return found


def encode(images: Tensor, image_tokenizer: SemHiTok) -> dict[str, Tensor]:
    """Flat ids [N, h, w] of images and of their "mirrored" ones, and means [N, D] of features and code vectors."""
    began, parts = time.perf_counter(), []
    for some in images.split(BATCH):
        x = some.float() / 255
        ids = image_tokenizer.encode(x)
        parts.append({
            "ids": ids,
            "mirrored": image_tokenizer.encode(x.flip(-1)),
            "features": image_tokenizer.semantic_features(x).float().mean((1, 2)),
            "vectors": image_tokenizer.features(ids).semantic.mean((1, 2)),
        })  # fmt: skip
    say(f"ids: {len(images)} photographs, {time.perf_counter() - began:.0f} s")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- the model ----


def sources(data: Photographs, ids: Tensor, mirrored: Tensor, settings: Settings, codebook_hash: str) -> list[Records]:
    records = []
    for captions, codes, flipped in zip(data.captions, ids, mirrored, strict=True):
        for caption in captions:
            records.append({"caption": caption, "codes": [codes]})
            if not SIDES & set(WORD.findall(caption.lower())):
                records.append({"caption": caption, "codes": [flipped]})
    weights = {"understanding": settings.understanding, "generation": 1}
    return [Records(records, task, weight=w, codebook_hash=codebook_hash) for task, w in weights.items() if w]


def model_config(settings: Settings, longest: int) -> MLLMTrainConfig:
    """The training of the unified model, with a sample of at most `longest` ids in each row."""
    config = mllm_config("mllm-tiny")
    assert config.llm_config is not None
    config.llm_config["vocab_size"] = settings.words
    for setting in (
        f"data.length={longest}", "data.look_ahead=1", "data.caption_drop=0.1", "head=hierarchical", "tracker=none",
        f"precision={demo.precision()}", f"seed={settings.seed}",
        f"joint.steps={settings.steps}", f"joint.batch_size={settings.batch}", "joint.checkpoint_every=200",
        "joint.optimizer.lr=2.0e-3", "joint.optimizer.min_lr=2.0e-5",
    ):  # fmt: skip
        override(config, setting)
    return config


def log_likelihoods(assistant: Assistant, captions: list[str], ids: Tensor, name: str) -> Tensor:
    """log p(caption | photograph), fp32 [N, captions], of photographs' flat ids [N, h, w]."""
    began, rows = time.perf_counter(), []
    for n, image in enumerate(assistant.image_ids(ids), 1):
        rows.append(assistant.log_likelihood(captions, [image]))
        if n % 50 == 0 or n == len(ids):
            say(f"likelihoods: {name}, {n} of {len(ids)} photographs, {time.perf_counter() - began:.0f} s")
    return torch.cat(rows)


def mutual_information(scores: Tensor, others: Tensor) -> Tensor:
    """log p(c | x) [N, C] -> log p(c | x) - log p(c), with p(c) the mean of p(c | x') over `others` [M, C]."""
    return scores - (others.double().logsumexp(0) - torch.tensor(len(others)).log()).float()


# ---- the script ----


def table(rows: dict[str, dict[str, float]], title: str) -> str:
    columns = [f"R@{k}" for k in RECALLS]
    first = max(map(len, [title, *rows]))
    lines = [f"{title:{first}}" + "".join(f"{name:>8}" for name in columns) + f"{'median rank':>14}"]
    for name, found in rows.items():
        lines.append(f"{name:{first}}" + "".join(f"{found[c]:8.3f}" for c in columns) + f"{found['median rank']:14.1f}")
    return "\n".join(lines)


def compare(args: argparse.Namespace, settings: Settings) -> None:
    """Train the model, rank captions, and write table, figures and pictures."""
    began, out = time.perf_counter(), args.out
    out.mkdir(parents=True, exist_ok=True)
    image_tokenizer = SemHiTok.from_pretrained(args.tokenizer)
    data = read_photographs(args.data, image_tokenizer.config.image_size)
    own = image_tokenizer.codebook_hash
    key = digest(own, json.dumps(data.captions), data.images)
    encoded = kept(out / "ids.safetensors", key, partial(encode, data.images, image_tokenizer))
    train_rows, test_rows = split(len(data.images), settings.test)
    training, test = data.some(train_rows), data.some(test_rows)
    captions, test_ids = [several[0] for several in test.captions], encoded["ids"][test_rows]
    say(f"data: {len(training.images)} photographs to learn from, {len(captions)} held out")

    given = sources(training, encoded["ids"][train_rows], encoded["mirrored"][train_rows], settings, own)
    words = max(len(WORD.findall(text)) for several in training.captions for text in several)
    # Begin and end of image, and the end of the answer.
    config = model_config(settings, image_tokenizer.config.grid_size**2 + words + 3)
    seconds = train(config, out / "model", sources={"joint": given}, image_tokenizer=image_tokenizer)
    assistant = Assistant.load(out / "model" / "checkpoint", args.tokenizer, teacher=False)

    def likelihoods() -> dict[str, Tensor]:
        chosen = train_rows[: len(test_rows)]
        ids = {"test": test_ids, "train": encoded["ids"][chosen]}
        return {name: log_likelihoods(assistant, captions, x, name) for name, x in ids.items()}

    scores = kept(out / "likelihoods.safetensors", digest(key, json.dumps(asdict(settings))), likelihoods)
    count = len(captions)
    rows = {"chance": recalls(torch.zeros(count, count)), "unified model, log p(c | x)": recalls(scores["test"])}
    rows["unified model, PMI"] = recalls(mutual_information(scores["test"], scores["train"]))
    vectors = {name: encoded[name] for name in ("features", "vectors")}
    semantic = image_tokenizer.vocabulary.split(encoded["ids"].flatten(1))[0]
    vectors["histogram"] = torch.from_numpy(histograms(semantic).toarray())
    known = Words(training.captions, settings.words)
    for name, title in PAIRED.items():
        both = vectors[name][train_rows], vectors[name][test_rows]
        rows[f"linear pairing, {title}"] = pair(both, (training.captions, captions), known)

    right = float(scores["test"].diagonal().mean())
    wrong = float((scores["test"].sum() - scores["test"].diagonal().sum()) / (count * (count - 1)))
    text = table(rows, f"captions of {count} photographs; {len(training.images)} to learn from")
    text += f"\n\nnats a caption: {-right:.2f} after its own photograph, {-wrong:.2f} after another"
    write_atomic(out / "table.txt", (text + "\n").encode())
    figures: dict[str, Any] = {"rows": rows, "nats_right": -right, "nats_wrong": -wrong, "settings": asdict(settings)}
    counts = {"train": len(training.images), "test": count}
    write_json(out / "metrics.json", {**figures, "photographs": counts, "training_seconds": sum(seconds.values())})
    drawn = assistant.draw(captions[:DRAWN], list(range(len(captions[:DRAWN]))), sampling=demo.SAMPLINGS[-1])
    save_png(torch.cat(list(drawn), dim=-1).repeat_interleave(2, 1).repeat_interleave(2, 2), out / "drawn.png")
    demo.draw_figure(assistant, test.images, test_ids, captions, drawn, out / "text-to-image.png", DRAWN)
    print(f"{text}\n\ntraining {sum(seconds.values()):.0f} s; this call {spent(began)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder or tar file of images and {CAPTIONS}")
    parser.add_argument("--tokenizer", required=True, metavar="CHECKPOINT", help="the image tokenizer, with teacher")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK.steps} steps")
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its choice)")
    field = f"another value of {', '.join(asdict(QUICK))}; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=N", help=field)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = Settings(**asdict(QUICK if args.quick else Settings()))
    for assignment in args.set:
        name, _, value = assignment.partition("=")
        if name not in asdict(settings) or not value.isdigit():
            parser.error(f"--set: expected one of {', '.join(asdict(settings))} = a number, got {assignment}")
        setattr(settings, name, int(value))
    for name, least in LEAST.items():
        if getattr(settings, name) < least:
            parser.error(f"--set: expected {name} of at least {least}, got {getattr(settings, name)}")
    try:
        compare(args, settings)
    except Interrupted as stop:
        parser.exit(128 + stop.signum, f"{parser.prog}: {stop}; the same command resumes\n")
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
