"""Generate text and images with a `UnifiedMLLM`: the `generate` of transformers with three logits processors of ours.

`Guidance` (classifier-free) mixes the rows with the caption and those without, `Grammar` allows only the ids that may
come next, `Draw` picks one of them. Pass them to `model.generate` yourself, or call `generate` and `generate_images`,
which combine them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from semhitok.grouping import Grouping
from semhitok.mllm.loss import group_logsumexp
from semhitok.mllm.model import UnifiedMLLM, UnifiedMLLMConfig

Prompt = Tensor | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class Sampling:
    """How the next id is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: sample from the k likeliest ids; 0 for all.
        top_p: sample from the likeliest ids that have this probability together; 1 for all.
        guidance: scale of classifier-free guidance of image ids; 1 for none.
        hierarchical: sample image ids in two steps: the semantic code i first (its score is the logsumexp of its ids'
            scores), then the sub-code j of i. Temperature, top_k and top_p apply to both steps.

    Raises:
        ValueError: a temperature or guidance that is negative or not finite, a negative top_k, a top_p not in (0, 1].
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    hierarchical: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "guidance"):
            if not math.isfinite(value := getattr(self, name)):
                raise ValueError(f"{name}: expected a finite number, got {value}")
            if value < 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if self.top_k < 0:
            raise ValueError(f"top_k: expected at least 1, or 0 for all, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected more than 0 and at most 1, got {self.top_p}")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings by name, as records of generated pictures keep them; `hierarchical` only if it is on."""
        names = ("guidance", "temperature", "top_k", "top_p", *(["hierarchical"] if self.hierarchical else []))
        return {name: getattr(self, name) for name in names}


DEFAULT, GREEDY = Sampling(), Sampling(temperature=0.0)
# Whatever the LLM's generation config says, `Draw` alone chooses.
NEUTRAL = dict(do_sample=False, num_beams=1, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0)


class Grammar(LogitsProcessor):
    """Allow only ids that may come next: text, or begin of image, (resolution,) grid_size^2 image ids, end of image.

    What may come next follows from the ids since the last begin of image, so prompts may contain images and end within
    one.

    Args:
        config: the model's configuration.
        images: whether an image may begin. An image that has begun is always completed.
        max_length: the most ids a row may have. No image begins that would not be complete by then.
        num_text_ids: number of text ids in use, if the LLM's embedding has more rows than its tokenizer has words.
    """

    def __init__(
        self,
        config: UnifiedMLLMConfig,
        *,
        images: bool = True,
        max_length: int | None = None,
        num_text_ids: int | None = None,
    ) -> None:
        self.vocabulary, self.adaptive = config.vocabulary, config.adaptive
        self.prefix = [self.vocabulary.resolution(config.image_size)] if config.resolution_id else []
        self.tokens = config.grid_size**2
        self.length = len(self.prefix) + self.tokens + 1  # ids after begin of image that complete it
        self.images, self.max_length = images, max_length
        self.num_text_ids = self.vocabulary.text_size if num_text_ids is None else num_text_ids
        if not 0 < self.num_text_ids <= self.vocabulary.text_size:
            raise ValueError(f"num_text_ids: expected 1 to {self.vocabulary.text_size}, got {num_text_ids}")

    def since_begin(self, input_ids: Tensor) -> Tensor:
        """Number of ids after the last begin of image, [B]; more than an image has if there was none."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(input_ids == self.vocabulary.begin_of_image, places, -self.length - 1).amax(1)
        return input_ids.shape[1] - 1 - last

    def in_image(self, input_ids: Tensor) -> Tensor:
        """Whether the next id is an image id, [B] bool."""
        done = self.since_begin(input_ids)
        return (done >= len(self.prefix)) & (done < len(self.prefix) + self.tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary = self.vocabulary
        done, ids = self.since_begin(input_ids), torch.arange(scores.shape[1], device=scores.device)
        fits = self.max_length is None or input_ids.shape[1] + 1 + self.length <= self.max_length
        text = ids < self.num_text_ids
        if self.images and fits:
            text = text | (ids == vocabulary.begin_of_image)
        image = (ids >= vocabulary.text_size) & (ids < vocabulary.begin_of_image)
        allowed = torch.where(self.in_image(input_ids)[:, None], image, text)
        for place, special in enumerate(self.prefix):
            allowed = torch.where((done == place)[:, None], ids == special, allowed)
        allowed = torch.where((done == self.length - 1)[:, None], ids == vocabulary.end_of_image, allowed)
        return scores.masked_fill(~allowed, -torch.inf)


class Guidance(LogitsProcessor):
    """Classifier-free guidance of image ids: u + scale * (c - u), for a batch of rows [conditional; unconditional].

    Both halves get the same scores, and so the same ids from `Draw`. Text scores are those of the conditional rows.
    """

    def __init__(self, scale: float, grammar: Grammar) -> None:
        self.scale, self.grammar = scale, grammar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) % 2:
            raise ValueError(f"scores: expected an even number of rows, half of them unconditional, got {len(scores)}")
        given, free = scores.float().chunk(2)
        guided = self.grammar.in_image(input_ids[: len(given)])[:, None]
        given = torch.where(guided, free + self.scale * (given - free), given)
        return torch.cat([given, given])


class Draw(LogitsProcessor):
    """Choose one id of each row: its score stays, all others become -inf. The last processor, with do_sample=False.

    Args:
        grammar: tells which ids are image ids.
        sampling: how the id is chosen; `guidance` is left to `Guidance`.
        offsets: int64 [K + 1], the model's `codebooks.offsets`, for hierarchical sampling with adaptive sizes.
        halves: the second half of the rows takes the ids of the first (see `Guidance`).
        generator: one for all rows, on any device; or one on the CPU for each row, whose ids then do not depend on the
            other rows.

    Raises:
        ValueError: adaptive sizes without their offsets. When called: the number of generators is not that of the rows.
    """

    def __init__(
        self,
        grammar: Grammar,
        sampling: Sampling = DEFAULT,
        *,
        offsets: Tensor | None = None,
        halves: bool = False,
        generator: Generators | None = None,
    ) -> None:
        if sampling.hierarchical and grammar.adaptive and offsets is None:
            raise ValueError("offsets: expected those of the adaptive sizes for hierarchical sampling, got none")
        self.grammar, self.hierarchical, self.offsets = grammar, sampling.hierarchical, offsets
        self.halves, self.generator = halves, generator
        self.warpers = LogitsProcessorList()
        self.greedy = sampling.temperature == 0
        if sampling.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k and not self.greedy:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p != 1 and not self.greedy:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(scores) // 2 if self.halves else len(scores)
        ids, live = input_ids[:rows], scores[:rows]
        if self.hierarchical:
            live = self._one_code(ids, live)
        picked = self._pick(ids, live)
        if self.halves:
            picked = torch.cat([picked, picked])
        return torch.full_like(scores, -torch.inf).scatter(1, picked, scores.gather(1, picked))

    def _one_code(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Choose a semantic code in every row whose next id is an image id; only ids of that code keep their scores."""
        vocabulary = self.grammar.vocabulary
        rows = self.grammar.in_image(input_ids).nonzero().squeeze(1)
        if not len(rows):
            return scores
        span = slice(vocabulary.text_size, vocabulary.begin_of_image)
        of_image = scores[rows, span]
        if self.offsets is None:
            of_codes = of_image.float().unflatten(1, (vocabulary.num_codes, -1)).logsumexp(-1)
        else:
            of_codes = group_logsumexp(of_image.float(), self.offsets)
        grouping = Grouping(vocabulary.num_codes, vocabulary.num_flat_codes, self.offsets)
        owners = grouping.group_of(torch.arange(grouping.num_ids, device=scores.device))
        code = self._pick(input_ids[rows], of_codes, rows)
        scores = scores.clone()
        scores[rows, span] = of_image.masked_fill(owners != code, -torch.inf)
        return scores

    def _pick(self, input_ids: Any, scores: Tensor, rows: Tensor | None = None) -> Tensor:
        """One column of scores [B, n] for each row, [B, 1]. The scores are those of all rows, or of `rows` [B]."""
        if self.greedy:
            return scores.argmax(1, keepdim=True)
        probabilities = self.warpers(input_ids, scores.float()).softmax(-1)
        if self.generator is None or isinstance(self.generator, torch.Generator):
            if self.generator is not None:
                probabilities = probabilities.to(self.generator.device)
            return torch.multinomial(probabilities, 1, generator=self.generator).to(scores.device)
        if rows is None and len(self.generator) != len(scores):
            raise ValueError(f"generator: expected one or {len(scores)}, one for each row, got {len(self.generator)}")
        generators = self.generator if rows is None else [self.generator[row] for row in rows.tolist()]
        drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in generators]).to(scores.device)
        # The first id at which the cumulative probability exceeds the random number.
        sums = probabilities.double().cumsum(-1)
        return torch.searchsorted(sums, drawn[:, None] * sums[:, -1:], right=True).clamp_max(scores.shape[1] - 1)


def left_pad(prompts: Sequence[Prompt], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts [T_b] -> ids [B, T], padded on the left, and a mask [B, T] int64, 0 where padded.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.int64).flatten() for prompt in prompts]
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"prompts: expected one or more, none of them empty, got lengths {[len(r) for r in rows]}")
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")


@torch.no_grad()
def generate(
    model: UnifiedMLLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling = DEFAULT,
    images: bool = True,
    num_text_ids: int | None = None,
    unconditional: Sequence[Prompt] | None = None,
    generator: Generators | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    use_cache: bool = True,
    streamer: Any = None,
) -> list[Tensor]:
    """Continue each prompt with text and, if `images`, images (`Vocabulary.images` extracts them).

    Args:
        prompts: the ids of each, of any length.
        max_new_tokens: the most new ids of each row. No image begins that would not be complete by then.
        sampling: how ids are chosen.
        images: see `Grammar`.
        num_text_ids: see `Grammar`.
        unconditional: for guidance, each prompt without its caption; ignored if `sampling.guidance` is 1.
        generator: see `Draw`.
        eos_id: the text id that ends a row; with None every row has `max_new_tokens` new ids.
        pad_id: a text id; padding is masked.
        streamer: of transformers, such as `TextIteratorStreamer`; gets the prompt and then every id. One prompt only.

    Returns:
        the new ids of each prompt, [n] int64, `eos_id` included.

    Raises:
        ValueError: empty prompts, guidance without as many unconditional prompts, an id out of range, a streamer with
            more than one row, or prompts that leave too few of the model's positions for the new ids.
    """
    prompts = list(prompts)
    count, guided = len(prompts), sampling.guidance != 1
    if guided:
        if unconditional is None or len(unconditional) != count:
            got = "none" if unconditional is None else len(unconditional)
            raise ValueError(f"unconditional: expected {count} prompts for guidance, got {got}")
        prompts += list(unconditional)
    for name, value in (("eos_id", eos_id), ("pad_id", pad_id)):
        if value is not None and not 0 <= value < model.vocabulary.text_size:
            raise ValueError(f"{name}: expected a text id in [0, {model.vocabulary.text_size}), got {value}")
    if streamer is not None and len(prompts) != 1:
        raise ValueError(f"streamer: expected one prompt without guidance, got {len(prompts)} rows")
    ids, mask = (x.to(model.device) for x in left_pad(prompts, pad_id))
    max_length, positions = ids.shape[1] + max_new_tokens, model.config.positions
    if positions is not None and max_length > positions:
        raise ValueError(
            f"prompts: expected at most {max(0, positions - max_new_tokens)} ids, which leave {max_new_tokens} of the "
            f"model's {positions} positions for new ones, got {ids.shape[1]}"
        )
    grammar = Grammar(model.config, images=images, max_length=max_length, num_text_ids=num_text_ids)
    processors = LogitsProcessorList([Guidance(sampling.guidance, grammar)] if guided else [])
    processors.append(grammar)
    processors.append(Draw(grammar, sampling, offsets=model.codebooks.offsets, halves=guided, generator=generator))
    # Without eos_id, an id that never occurs: None would be replaced by that of the LLM's generation config.
    ends_with = model.vocabulary.size if eos_id is None else eos_id
    transformers_model: Any = model
    out = transformers_model.generate(
        ids, attention_mask=mask, logits_processor=processors, max_new_tokens=max_new_tokens, **NEUTRAL,
        eos_token_id=ends_with, pad_token_id=pad_id, use_cache=use_cache, streamer=streamer,
    )  # fmt: skip
    new = out[:count, ids.shape[1] :]
    if eos_id is None:
        return list(new)
    ends = (new == eos_id).int()
    sizes = torch.where(ends.any(1), ends.argmax(1) + 1, new.shape[1]).tolist()
    return [row[:size] for row, size in zip(new, sizes, strict=True)]


def generate_images(
    model: UnifiedMLLM,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling = DEFAULT,
    unconditional: Prompt = (),
    generator: Generators | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Generate one image for each prompt: flat ids [B, h, w], which the image tokenizer decodes.

    Args:
        prompts: the ids of each caption, without begin of image.
        unconditional: the prompt without a caption, for guidance; empty by default.

    See `generate` for the other arguments and the errors.
    """
    vocabulary, grid = model.vocabulary, model.config.grid_size
    asked = [*prompts, unconditional]
    begun = [[*torch.as_tensor(x, dtype=torch.int64).tolist(), vocabulary.begin_of_image] for x in asked]
    prefix = int(model.config.resolution_id)
    rows = generate(
        model, begun[:-1], max_new_tokens=prefix + grid**2, sampling=sampling,
        unconditional=begun[-1:] * len(prompts), generator=generator, use_cache=use_cache,
    )  # fmt: skip
    return vocabulary.from_text(torch.stack(rows)[:, prefix:]).unflatten(1, (grid, grid))
