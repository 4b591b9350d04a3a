"""A trained unified model in use: answers about images, conversations, pictures from captions.

An `Assistant` is a model with its text tokenizer and the image tokenizer whose ids it was trained on. Prompts are
formatted as in training (`semhitok.mllm.prompts`).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, TextStreamer

from semhitok.data.images import read_resized, save_png, to_uint8
from semhitok.mllm import prompts
from semhitok.mllm.generate import GREEDY, Generators, Sampling, generate, generate_images
from semhitok.mllm.loss import IGNORE
from semhitok.mllm.model import UnifiedMLLM, UnifiedMLLMConfig
from semhitok.tokenizer import SemHiTok

DRAWING = Sampling(guidance=2.0)
Callback = Callable[[str], Any]


class Assistant:
    """A model and its two tokenizers, in eval mode, on the devices they are on.

    Args:
        model: the unified model.
        text_tokenizer: its text tokenizer, of transformers.
        image_tokenizer: the image tokenizer; it needs its teacher to read images.

    Raises:
        ValueError: the model was trained with ids of other codebooks, or of images of another size.
    """

    def __init__(self, model: UnifiedMLLM, text_tokenizer: Any, image_tokenizer: SemHiTok) -> None:
        _check_image_tokenizer(model.config, image_tokenizer)
        self.model, self.text_tokenizer, self.image_tokenizer = model.eval(), text_tokenizer, image_tokenizer.eval()
        self.end = prompts.end_of_answer(text_tokenizer, model.vocabulary)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        checkpoint: str,
        *,
        device: torch.device | str = "cpu",
        teacher: bool = True,
    ) -> Assistant:
        """Load a model and its text tokenizer from `folder`, and the image tokenizer of `checkpoint`.

        Args:
            folder: a saved model and text tokenizer, such as RUN/checkpoint of a training.
            checkpoint: folder or Hub name of the image tokenizer.
            device: of all of them.
            teacher: load the image tokenizer's teacher, which reading images needs.

        Raises:
            OSError: a file is missing or cannot be fetched.
            ValueError: a file is damaged, or the image tokenizer has other codebooks.
        """
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: expected a folder of a saved model, found no config.json")
        image_tokenizer = SemHiTok.from_pretrained(checkpoint, teacher=teacher)
        # Checked before the weights are loaded, which may take minutes.
        _check_image_tokenizer(UnifiedMLLMConfig.from_pretrained(folder, local_files_only=True), image_tokenizer)
        model = UnifiedMLLM.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        text_tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model.to(device), text_tokenizer, image_tokenizer.to(device))

    @property
    def image_size(self) -> int:
        """Side length in pixels of the images that are read and drawn."""
        return self.model.config.image_size

    def read(self, paths: Iterable[str | os.PathLike[str]]) -> list[Tensor]:
        """Image files -> their ids in a prompt, resized and cropped as in training. For errors see `read_resized`."""
        images = [read_resized(path, self.image_size) for path in paths]
        return self.encode(torch.stack(images)) if images else []

    def encode(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, S, S] in [0, 1], rounded to 8 bits -> their ids in a prompt."""
        device = next(self.image_tokenizer.parameters()).device
        return self.image_ids(self.image_tokenizer.encode(to_uint8(images).to(device).float() / 255))

    def image_ids(self, codes: Tensor) -> list[Tensor]:
        """Flat ids [B, h, w] of the image tokenizer -> ids in a prompt, [2 + h * w] an image (3 + h * w with a
        resolution id)."""
        config = self.model.config
        pixels = config.image_size if config.resolution_id else None
        return list(self.model.vocabulary.image(codes.cpu(), self.image_tokenizer.codebook_hash, pixels))

    def answer(
        self,
        questions: Sequence[str],
        images: Sequence[Tensor],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> list[str]:
        """Answer a question about each image, all in one batch.

        Args:
            questions: one for each image; an empty one asks for a caption.
            images: as returned by `read`, `encode` or `image_ids`.
            max_new_tokens: the most ids of an answer; fewer if the model's positions end earlier.
            sampling: how ids are chosen; the likeliest by default.
            seed: of the random numbers.

        Raises:
            ValueError: the number of questions is not that of the images, or a question leaves no room for an answer.
        """
        if len(questions) != len(images):
            raise ValueError(f"images: expected {len(questions)}, one for each question, got {len(images)}")
        rows = [self.question_ids(*pair) for pair in zip(questions, images, strict=True)]
        return self._write(rows, max_new_tokens, sampling, seed)

    def question_ids(self, question: str, image: Tensor) -> list[int]:
        """The prompt for a question about an image; ValueError if it leaves no room for an answer."""
        ids = prompts.understanding(self.text_tokenizer, self.model.vocabulary, image, question)
        self._check_room(len(ids))
        return ids

    def _check_room(self, length: int) -> None:
        positions = self.model.config.positions
        if positions is not None and length >= positions:
            raise ValueError(f"prompt: expected fewer than {positions} ids, the model's positions, got {length}")

    def reply(
        self,
        messages: Sequence[prompts.Message],
        images: Sequence[Tensor] = (),
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        callback: Callback | None = None,
    ) -> str:
        """Continue a conversation with its next answer.

        Args:
            messages: see `prompts.prompt`.
            images: one for each `<image>` in the messages.
            callback: called with each piece of the answer as it is written.

        See `answer` for the other arguments and the errors.
        """
        row = prompts.prompt(self.text_tokenizer, self.model.vocabulary, messages, images)
        return self._write([row], max_new_tokens, sampling, seed, callback)[0]

    @torch.no_grad()
    def log_likelihood(
        self, answers: Sequence[str], images: Sequence[Tensor], *, question: str = "", batch_size: int = 50
    ) -> Tensor:
        """How likely each answer is for each image: fp32 [images, answers], in nats, on the CPU.

        log p(answer | image, question) is the sum over the ids of the answer and the one that ends it, as in training.
        An image goes through the model once; its keys and values are repeated for `batch_size` answers at a time.

        Args:
            answers: texts.
            images: as returned by `read`, `encode` or `image_ids`.
            question: about every image; an empty one asks for a caption.
            batch_size: answers that the model reads at once.

        Raises:
            ValueError: no images, no answers or an empty one, or one that goes beyond the model's positions.
        """
        if not len(images) or not len(answers):
            raise ValueError(f"images, answers: expected one or more of both, got {len(images)} and {len(answers)}")
        own = self.text_tokenizer, self.model.vocabulary
        asked = [torch.tensor(prompts.understanding(*own, image, question)) for image in images]
        learnt = []
        for answer in answers:
            parts = prompts.understanding_parts(*own, images[0], question, answer)
            learnt.append(torch.tensor([i for ids, is_learnt in parts if is_learnt for i in ids]))
        positions = self.model.config.positions
        longest = max(map(len, asked)) + max(map(len, learnt))
        if positions is not None and longest > positions:
            raise ValueError(f"answers: expected at most {positions} ids with the question, got {longest}")
        order = sorted(range(len(answers)), key=lambda n: len(learnt[n]))  # similar lengths together
        found, device = torch.empty(len(images), len(answers)), self.model.device
        for row, ids in enumerate(asked):
            seen = self.model(ids[None, :-1].to(device), use_cache=True, logits_to_keep=1).past_key_values
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                # From the last id of the question on, which predicts the first of the answer.
                labels = pad_sequence([torch.cat([ids[-1:], learnt[n]]) for n in batch], True, IGNORE).to(device)
                cache = copy.deepcopy(seen)
                cache.batch_repeat_interleave(len(batch))
                places = torch.arange(len(ids) - 1, len(ids) - 1 + labels.shape[1], device=device)[None]
                losses = self.model(
                    labels.clamp_min(0), labels=labels, past_key_values=cache, position_ids=places, reduce=False
                ).loss
                found[row, batch] = -losses.view(len(batch), -1).sum(1).float().cpu()
        return found

    def _write(
        self, rows: list[list[int]], limit: int, sampling: Sampling, seed: int, callback: Callback | None = None
    ) -> list[str]:
        """The text that follows the ids of each prompt, at most `limit` ids of it."""
        if not rows:
            return []
        positions, longest = self.model.config.positions, max(map(len, rows))
        self._check_room(longest)
        if positions is not None:
            limit = min(limit, positions - longest)
        answers = generate(
            self.model, rows, max_new_tokens=limit, sampling=sampling, images=False, eos_id=self.end,
            num_text_ids=min(len(self.text_tokenizer), self.model.vocabulary.text_size),
            generator=[_seeded(seed + n) for n in range(len(rows))],
            streamer=None if callback is None else _Streamer(self.text_tokenizer, callback),
        )  # fmt: skip
        return [self.text_tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]

    def draw(self, captions: Sequence[str], seeds: Sequence[int], *, sampling: Sampling = DRAWING) -> Tensor:
        """Draw a picture for each caption and seed: float [B, 3, S, S] in [0, 1], on the image tokenizer's device.

        A picture depends on its own caption and seed only, up to rounding: in a batch of another size, logits may
        differ in their last bits, which in fp32 rarely changes an id.

        Raises:
            ValueError: the number of seeds is not that of the captions; see also `caption_ids`.
        """
        if len(captions) != len(seeds):
            raise ValueError(f"seeds: expected {len(captions)}, one for each caption, got {len(seeds)}")
        codes = self.draw_codes(captions, [_seeded(seed) for seed in seeds], sampling=sampling)
        return self.image_tokenizer.decode(codes.to(next(self.image_tokenizer.parameters()).device))

    def caption_ids(self, caption: str | None) -> list[int]:
        """The prompt for a picture; ValueError if it leaves too few of the model's positions for one."""
        ids, config = prompts.generation(self.text_tokenizer, self.model.vocabulary, caption), self.model.config
        picture = 1 + int(config.resolution_id) + config.grid_size**2
        if config.positions is not None and len(ids) + picture > config.positions:
            why = f"as a picture takes {picture} of {config.positions} positions"
            most = config.positions - picture
            raise ValueError(f"caption: expected at most {most} ids, {why}, got {len(ids)}: {caption or '':.40}")
        return ids

    def draw_codes(self, captions: Sequence[str], generator: Generators, *, sampling: Sampling = DRAWING) -> Tensor:
        """Draw pictures as flat ids [B, h, w] of the image tokenizer, on the model's device.

        Args:
            captions: one for each picture.
            generator: one for all pictures, or one on the CPU for each.
            sampling: how ids are chosen.

        Raises:
            ValueError: see `caption_ids`.
        """
        rows = [self.caption_ids(text) for text in (*captions, None)]
        return generate_images(self.model, rows[:-1], sampling=sampling, unconditional=rows[-1], generator=generator)


class Chat:
    """A conversation about images: the model sees all earlier questions and answers.

    Args:
        assistant: who answers.
        images: as returned by `Assistant.read`; they precede the first question.
    """

    def __init__(self, assistant: Assistant, images: Sequence[Tensor]) -> None:
        self.assistant, self.images = assistant, list(images)
        self.messages: list[prompts.Message] = []

    def ask(self, question: str, **options: Any) -> str:
        """Answer a question and remember both, unless the answer is empty. For options see `Assistant.reply`.

        Raises:
            ValueError: see `Assistant.reply`; the conversation stays as it was.
        """
        if prompts.IMAGE in question:
            raise ValueError(f"question: expected text without {prompts.IMAGE}, got {question!r:.80}")
        images = "" if self.messages else f"{prompts.IMAGE}\n" * len(self.images)
        messages = [*self.messages, {"role": "user", "content": images + question}]
        answer = self.assistant.reply(messages, self.images, **options)
        text = answer.replace(prompts.IMAGE, "").strip()
        if text:
            self.messages = [*messages, {"role": "assistant", "content": text}]
        return answer


class Job(NamedTuple):
    """A picture to draw."""

    path: Path
    caption: str
    seed: int


def draw_files(
    assistant: Assistant, jobs: Sequence[Job], batch_size: int, *, sampling: Sampling = DRAWING
) -> Iterator[tuple[Job, Tensor]]:
    """Draw pictures and write them as PNGs, each with its caption, seed and sampling settings in its metadata.

    Yields each job and its picture [3, S, S] on the CPU, once the file is written.
    """
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        pictures = assistant.draw([job.caption for job in batch], [job.seed for job in batch], sampling=sampling).cpu()
        for job, picture in zip(batch, pictures, strict=True):
            metadata = {"caption": job.caption, "seed": job.seed} | sampling.settings
            save_png(picture, job.path, text={name: str(value) for name, value in metadata.items()})
            yield job, picture


def grid(pictures: Sequence[Tensor], gap: int = 2) -> Tensor:
    """Pictures [3, S, S] on a white sheet, with about as many rows as columns."""
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
    """Passes the answer to a function piece by piece, in whole words."""

    def __init__(self, text_tokenizer: Any, callback: Callback) -> None:
        super().__init__(text_tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.callback = callback

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.callback(text)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check_image_tokenizer(config: UnifiedMLLMConfig, image_tokenizer: SemHiTok) -> None:
    expected, got = config.codebook_hash, image_tokenizer.codebook_hash
    if expected != got:
        codebooks = "unknown ones" if expected is None else f"codebooks {expected[:12]}"
        problem = f"expected the one that the model was trained with, {codebooks}, got {got[:12]}"
        raise ValueError(f"image_tokenizer: {problem}")
    sizes = [f"{c.image_size} pixels as {c.grid_size} x {c.grid_size} ids" for c in (config, image_tokenizer.config)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"image_tokenizer: expected images of {sizes[0]}, got {sizes[1]}")
