"""A trained unified model in use: answers about images, conversations, pictures from captions.

An `Assistant` is a model, its text tokenizer and the image tokenizer whose ids the model was trained with. Prompts are
those of the training (`semhitok.mllm.prompts`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, TextStreamer

from semhitok.data.images import read_image, resize_crop, save_png, to_uint8
from semhitok.mllm import prompts
from semhitok.mllm.generate import generate, generate_images
from semhitok.mllm.model import UnifiedMLLM, UnifiedMLLMConfig
from semhitok.tokenizer import SemHiTok

Tell = Callable[[str], Any]  # takes an answer piece by piece


class Assistant:
    """What answers and draws; all in eval mode, on the devices they are on.

    Args:
        model: of transformers, loaded.
        words: its text tokenizer.
        tokenizer: the image tokenizer; to read images it needs its teacher.

    Raises:
        ValueError: the model was trained with ids of other codebooks, or of images of another size.
    """

    def __init__(self, model: UnifiedMLLM, words: Any, tokenizer: SemHiTok) -> None:
        _check_tokenizer(model.config, tokenizer)
        self.model, self.words, self.tokenizer = model.eval(), words, tokenizer.eval()
        self.end = prompts.end_of_answer(words, model.vocabulary)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        checkpoint: str,
        *,
        device: torch.device | str = "cpu",
        teacher: bool = True,
    ) -> Assistant:
        """The model and text tokenizer saved in `folder`, and the image tokenizer of a checkpoint or its hub name.

        Args:
            teacher: whether images are to be read.

        Raises:
            OSError: something is missing, or cannot be fetched.
            ValueError: damaged files, or a tokenizer of other codebooks.
        """
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a folder of a saved model, found no config.json")
        tokenizer = SemHiTok.from_pretrained(checkpoint, teacher=teacher)
        # Told before the weights are read, which may take minutes.
        _check_tokenizer(UnifiedMLLMConfig.from_pretrained(folder, local_files_only=True), tokenizer)
        model = UnifiedMLLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        words = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model.to(device), words, tokenizer.to(device))

    @property
    def image_size(self) -> int:
        """Pixels on a side of the images that are read and drawn."""
        return self.model.config.image_size

    def read(self, paths: Iterable[str | os.PathLike[str]]) -> list[Tensor]:
        """Image files -> what stands for each in a prompt, resized and cropped as in training; errors: `read_image`."""
        images = [resize_crop(read_image(path), self.image_size) for path in paths]
        return self.encode(torch.stack(images)) if images else []

    def encode(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, S, S] in [0, 1], rounded to 8 bits -> what stands for each in a prompt."""
        device = next(self.tokenizer.parameters()).device
        return self.spell(self.tokenizer.encode(to_uint8(images).to(device).float() / 255))

    def spell(self, codes: Tensor) -> list[Tensor]:
        """Flat ids [B, h, w] of the tokenizer -> what stands for each image in a prompt, [2 + h * w] and more."""
        config = self.model.config
        pixels = config.image_size if config.resolution_id else None
        return list(self.model.vocabulary.image(codes.cpu(), self.tokenizer.codebook_hash, pixels))

    def answer(
        self,
        questions: Sequence[str],
        images: Sequence[Tensor],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """One answer to each question about its image; an empty question asks for a caption.

        Args:
            questions: one for each image.
            images: as `read` or `encode` gives them.
            max_new_tokens: ids an answer may have, less where the model's positions end.
            temperature: of the draw; 0 takes the likeliest id.
            top_p: draw from the likeliest ids of this share.
            seed: of the draw.

        Raises:
            ValueError: other numbers, or a question that leaves no room for an answer.
        """
        if len(questions) != len(images):
            raise ValueError(f"images: expected {len(questions)}, one for each question, got {len(images)}")
        pairs = zip(images, questions, strict=True)
        asked = [prompts.understanding(self.words, self.model.vocabulary, *pair) for pair in pairs]
        return self._write(asked, max_new_tokens, temperature, top_p, seed)

    def reply(
        self,
        messages: Sequence[prompts.Message],
        images: Sequence[Tensor] = (),
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        tell: Tell | None = None,
    ) -> str:
        """The answer to a conversation. Arguments as in `prompts.prompt` and `answer`.

        tell: is given the answer piece by piece, as it comes.
        """
        asked = prompts.prompt(self.words, self.model.vocabulary, messages, images)
        return self._write([asked], max_new_tokens, temperature, top_p, seed, tell)[0]

    def _write(
        self, asked: list[list[int]], most: int, temperature: float, top_p: float, seed: int, tell: Tell | None = None
    ) -> list[str]:
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None)
        longest = max(map(len, asked))
        if limit is not None:
            if longest >= limit:
                raise ValueError(f"prompt: expected fewer than {limit} ids, the model's positions, got {longest}")
            most = min(most, limit - longest)
        rows = generate(
            self.model,
            asked,
            max_new_tokens=most,
            images=False,
            num_text_ids=min(len(self.words), self.model.vocabulary.text_size),
            temperature=temperature,
            top_p=top_p,
            generator=[_seeded(seed + n) for n in range(len(asked))],
            eos_id=self.end,
            streamer=None if tell is None else _Streamer(self.words, tell),
        )
        return [self.words.decode(row, skip_special_tokens=True).strip() for row in rows]

    def draw(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance: float = 2.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """A picture for each caption and its seed: float [B, 3, S, S] in [0, 1], on the tokenizer's device.

        A picture depends on its caption and seed and not on the others, up to rounding: logits of another batch may
        differ in their last bits, which in fp32 rarely changes an id.

        Raises:
            ValueError: other numbers of captions and seeds, or a value out of range.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"seeds: expected {len(captions)}, one for each caption, got {len(seeds)}")
        vocabulary = self.model.vocabulary
        codes = generate_images(
            self.model,
            [prompts.generation(self.words, vocabulary, caption) for caption in captions],
            guidance=guidance,
            unconditional=prompts.generation(self.words, vocabulary, None),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=[_seeded(seed) for seed in seeds],
        )
        return self.tokenizer.decode(codes.to(next(self.tokenizer.parameters()).device))


class Chat:
    """A conversation about images: every question sees all earlier ones and their answers.

    Args:
        assistant: who answers.
        images: as `Assistant.read` gives them; the first question stands behind them.
    """

    def __init__(self, assistant: Assistant, images: Sequence[Tensor]) -> None:
        self.assistant, self.images = assistant, list(images)
        self.messages: list[prompts.Message] = []

    def ask(self, question: str, **options: Any) -> str:
        """The answer, also remembered; an empty one is forgotten with its question. Options: see `Assistant.reply`.

        Raises:
            ValueError: see `Assistant.reply`; the conversation stays as it was.
        """
        if prompts.IMAGE in question:
            raise ValueError(f"question: expected text without {prompts.IMAGE}, got {question!r:.80}")
        shown = "" if self.messages else f"{prompts.IMAGE}\n" * len(self.images)
        asked = [*self.messages, {"role": "user", "content": shown + question}]
        answer = self.assistant.reply(asked, self.images, **options)
        kept = answer.replace(prompts.IMAGE, "").strip()
        if kept:
            self.messages = [*asked, {"role": "assistant", "content": kept}]
        return answer


class Job(NamedTuple):
    """A picture to draw: the file it becomes, its caption and its seed."""

    path: Path
    caption: str
    seed: int


def paint(assistant: Assistant, jobs: Sequence[Job], batch_size: int, **options: Any) -> Iterator[tuple[Job, Tensor]]:
    """Draw and write PNGs, each with its caption, seed and `options` (of `Assistant.draw`) in its metadata.

    Yields each job with its picture [3, S, S], on the CPU, once its file is there.
    """
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        pictures = assistant.draw([job.caption for job in batch], [job.seed for job in batch], **options).cpu()
        for job, picture in zip(batch, pictures, strict=True):
            told = {"caption": job.caption, "seed": job.seed} | options
            save_png(picture, job.path, text={name: str(value) for name, value in told.items()})
            yield job, picture


def grid(pictures: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Pictures [3, S, S] side by side, in rows, on white: about as many rows as columns."""
    columns = next(n for n in range(1, len(pictures) + 1) if n * n >= len(pictures))
    size = pictures[0].shape[-1]
    rows = -(-len(pictures) // columns)
    sheet = torch.ones(3, rows * (size + gap) - gap, columns * (size + gap) - gap)
    for n, picture in enumerate(pictures):
        top, left = (place * (size + gap) for place in divmod(n, columns))
        sheet[:, top : top + size, left : left + size] = picture
    return sheet


def file_stem(caption: str, number: int) -> str:
    """A file name for a caption, number first: "003-a_red_circle"."""
    return f"{number:03}-{re.sub(r'[^a-zA-Z0-9]+', '_', caption).strip('_')[:60] or 'picture'}"


class _Streamer(TextStreamer):
    """Hands pieces of the answer, whole words, to a function."""

    def __init__(self, words: Any, tell: Tell) -> None:
        super().__init__(words, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.tell(text)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_tokenizer(config: UnifiedMLLMConfig, tokenizer: SemHiTok) -> None:
    theirs, ours = config.codebook_hash, tokenizer.codebook_hash
    if theirs != ours:
        known = "unknown ones" if theirs is None else f"codebooks {theirs[:12]}"
        raise ValueError(f"tokenizer: expected the one that the model was trained with, {known}, got {ours[:12]}")
    sizes = [(c.image_size, c.grid_size) for c in (config, tokenizer.config)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "tokenizer: expected images of {} pixels as {} x {} ids, got {} and {} x {}".format(
                *(x for size, grid in sizes for x in (size, grid, grid))
            )
        )
