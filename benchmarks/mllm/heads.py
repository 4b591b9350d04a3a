"""The two heads of the unified model on the same ids: what they learn, how fast, in how much memory.

    python -m benchmarks.mllm.heads --out runs/heads

Two small tokenizers are trained as in `semhitok.demo.mllm`, with sub-codebooks of one size and of adaptive sizes, and
kept in --out. On the ids of each the demo's tiny Qwen2 learns text to image with either head: the same seed, the same
batches, in turns. "nats an id" is the mean -log p(h) of image ids in pictures of combinations that training never
showed. It compares heads, not tokenizers, whose ids hold different things; the steps' seconds are medians.

"loss" is the loss and its gradients alone, in fp32, for image ids drawn evenly, in a process of its own as in
loss_memory.py: seconds, MiB besides the gradients of the heads, and MiB of those gradients. The last rows have
24,576 x 8 image ids behind Qwen2.5's 152,064 text ids, width 896, 4,096 tokens. Adaptive sizes are drawn here,
log-normal, about as uneven as the small tokenizer's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2Config

from benchmarks.mllm.loss_memory import cost
from benchmarks.processes import printed
from semhitok.demo import mllm as demo
from semhitok.demo import scenes
from semhitok.demo.teacher import ContrastiveConfig, scenes_lesson, train_teacher
from semhitok.mllm import UnifiedMLLM, UnifiedMLLMConfig, join, pack
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.model import HEADS
from semhitok.mllm.packing import Packed, Sample
from semhitok.mllm.prompts import generation_parts, word_tokenizer
from semhitok.tokenizer import SemHiTok
from semhitok.training import train
from semhitok.training.parts import learning_rate, make_optimizer
from semhitok.vocabulary import Vocabulary

PICTURES, HELD_OUT = 4000, 160
LENGTH, SAMPLES = 256, 24  # ids of a row, pictures of a step: 8 rows
POINTS = 4  # evaluations on the way
SIZES = {False: "fixed", True: "adaptive"}  # of sub-codebooks


class Sizes(NamedTuple):
    """Sizes of a loss that is measured alone."""

    num_codes: int
    num_sub_codes: int
    text_ids: int
    width: int
    tokens: int


TINY, FULL = Sizes(32, 128, 512, 128, LENGTH * 8), Sizes(24576, 8, 152064, 896, 4096)


# ---- training ----


def tokenizers(out: Path) -> dict[bool, SemHiTok]:
    """Tokenizers without and with adaptive sizes, trained in `out` or read from there."""
    images = scenes.pictures(0, 0, PICTURES, "train", demo.SIZE)
    lesson = ContrastiveConfig("scenes", PICTURES, 150, demo.TEACHER_BATCH)
    teacher = train_teacher(lesson, out, lambda: scenes_lesson(images))
    folder = demo.write_pictures(images.images, out / "pictures")
    for adaptive in (False, True):
        config = demo.tokenizer_config()
        config.model.teacher, config.model.adaptive = teacher, adaptive
        config.semantic.steps, config.pixel.steps = 100, 300
        train(config, [folder], out / SIZES[adaptive])
    return {adaptive: SemHiTok.from_pretrained(out / name / "checkpoint") for adaptive, name in SIZES.items()}


def samples(vocabulary: Vocabulary, codes: Tensor, captions: Sequence[str], words: Any) -> list[Sample]:
    pairs = zip(captions, vocabulary.image(codes, vocabulary.codebook_hash), strict=True)
    return [join(*generation_parts(words, vocabulary, caption, image)) for caption, image in pairs]


@torch.no_grad()
def nats(model: Any, held: Sequence[Packed]) -> float:
    """Mean loss of the image ids, fp32."""
    total, count = 0.0, 0
    first, end = model.vocabulary.text_size, model.vocabulary.begin_of_image
    for packed in held:
        labels = packed.labels.masked_fill((packed.labels < first) | (packed.labels >= end), IGNORE)
        number = int((labels != IGNORE).sum())
        total += float(model(**packed._replace(labels=labels)._asdict()).loss) * number
        count += number
    return total / count


def compare(
    tokenizer: SemHiTok, codes: Tensor, captions: Sequence[str], held: tuple[Tensor, Sequence[str]], steps: int
) -> dict[str, tuple[list[float], float]]:
    """For each head the held-out losses on the way, and the median seconds of a step."""
    config = demo.model_config()
    words = word_tokenizer(captions, 512)
    models: dict[str, Any] = {}
    for head in HEADS:
        torch.manual_seed(0)
        llm = AutoConfig.for_model(**(config.llm_config or {}))
        models[head] = UnifiedMLLM.from_parts(llm, tokenizer, head=head, dtype=torch.float32).train()
    given, unseen = (samples(models["flat"].vocabulary, *pairs, words) for pairs in ((codes, captions), held))
    unseen_rows = [pack(unseen[n : n + SAMPLES], LENGTH) for n in range(0, len(unseen), SAMPLES)]
    optimizers = {head: make_optimizer(model, config.joint.optimizer) for head, model in models.items()}
    losses: dict[str, list[float]] = {head: [] for head in models}
    seconds: dict[str, list[float]] = {head: [] for head in models}
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        packed = pack([given[n] for n in torch.randint(len(given), (SAMPLES,), generator=draw)], LENGTH)
        for head, model in models.items():
            optimizer = optimizers[head]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, config.joint.optimizer)
            begun = perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**packed._asdict()).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[head].append(perf_counter() - begun)
            if (step + 1) * POINTS // steps > step * POINTS // steps:
                losses[head].append(nats(model, unseen_rows))
    return {head: (losses[head], median(seconds[head])) for head in models}


# ---- the loss alone ----


def uneven(K: int, m: int) -> Tensor:
    """Offsets [K + 1] of K sub-codebooks of log-normal sizes, at least 1, K * m in all."""
    share = torch.randn(K, generator=torch.Generator().manual_seed(0)).exp()
    sizes = 1 + (share / share.sum() * (K * m - K)).long()
    sizes[: K * m - int(sizes.sum())] += 1  # what rounding left
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def measure(head: str, adaptive: bool, sizes: Sizes) -> dict[str, float]:
    """In this process: what loss and gradients cost."""
    torch.manual_seed(0)
    llm = Qwen2Config(
        vocab_size=sizes.text_ids, hidden_size=sizes.width, intermediate_size=sizes.width, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config = UnifiedMLLMConfig(llm, sizes.num_codes, sizes.num_sub_codes, 1, 1, head=head, adaptive=adaptive)
    model: Any = UnifiedMLLM(config)
    if adaptive:
        model.codebooks.offsets.copy_(uneven(sizes.num_codes, sizes.num_sub_codes))
    hidden = torch.randn(sizes.tokens, sizes.width).requires_grad_()
    targets = torch.randint(model.vocabulary.num_flat_codes, (sizes.tokens,)) + sizes.text_ids
    model.token_losses(hidden[:8], targets[:8]).mean().backward()  # what is taken once
    model.zero_grad()
    hidden.grad = None
    return cost(lambda: model.token_losses(hidden, targets).mean().backward(), model.parameters())


# ---- the table ----


def table(rows: Sequence[tuple[Sizes, bool, str, Sequence[float], float | None, dict[str, float]]], steps: int) -> str:
    points = [steps * (n + 1) // POINTS for n in range(POINTS)]
    lines = [
        f"{'':34}{'nats an id, after steps':>{8 * POINTS}}  {'step':>7}  {'loss':>7}  {'loss':>7}  {'gradients':>9}",
        f"{'ids':11} {'sizes':9} {'head':12}" + "".join(f"{n:8}" for n in points)
        + f"  {'s':>7}  {'s':>7}  {'MiB':>7}  {'MiB':>9}",
    ]  # fmt: skip
    for sizes, adaptive, head, losses, step, of_loss in rows:
        found = "".join(f"{x:8.3f}" for x in losses) if losses else f"{'-':>8}" * POINTS
        lines.append(
            f"{f'{sizes.num_codes} x {sizes.num_sub_codes}':11} {SIZES[adaptive]:9} {head:12}"
            f"{found}  {'-' if step is None else f'{step:.3f}':>7}"
            f"  {of_loss['s']:7.2f}  {of_loss['MiB']:7.1f}  {of_loss['gradients']:9.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/heads"), help="where tokenizers stay")
    parser.add_argument("--steps", type=int, default=300, help="of each LLM (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        head, adaptive, sizes = json.loads(args.measure)
        print(json.dumps(measure(head, adaptive, Sizes(*sizes))))
        return 0
    if args.steps < POINTS:
        parser.error(f"--steps: expected at least {POINTS}, got {args.steps}")

    def alone(head: str, adaptive: bool, sizes: Sizes) -> dict[str, float]:
        task = json.dumps([head, adaptive, sizes])
        return json.loads(printed(__spec__.name, "--measure", task, "--threads", str(args.threads)))

    rows: list[Any] = []
    given = scenes.pictures(0, 0, PICTURES, "train", demo.SIZE)
    held = scenes.pictures(1, 0, HELD_OUT, "random", demo.SIZE)
    for adaptive, tokenizer in tokenizers(args.out).items():
        codes = [demo.encode(tokenizer, x.images) for x in (given, held)]
        results = compare(tokenizer, codes[0], given.captions, (codes[1], held.captions), args.steps)
        rows += [(TINY, adaptive, head, *results[head], alone(head, adaptive, TINY)) for head in HEADS]
    for head, adaptive in (("flat", False), ("hierarchical", False), ("hierarchical", True)):
        rows.append((FULL, adaptive, head, [], None, alone(head, adaptive, FULL)))
    print(f"torch {torch.__version__}, CPU, {args.threads} threads\n")
    print(table(rows, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
