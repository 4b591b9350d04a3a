"""Text and images out of a `UnifiedMLLM`, by transformers' own `generate` with four rules of ours on its logits.

`Guidance` (classifier-free) mixes the rows that know the caption with those that do not, `Grammar` leaves only the ids
that may come next, `Draw` takes one. They are ordinary logits processors: use them with `model.generate`, or call
`generate` and `generate_images` here, which put them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
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


class Grammar(LogitsProcessor):
    """Only ids that may come next: text, or begin of image, (resolution,) exactly grid_size^2 image ids, end of image.

    What may come next is read off the ids since the last begin of image, so prompts may hold images and end within one.

    Args:
        config: of the model.
        images: whether an image may begin; one that has begun is always finished.
        max_length: ids that a row may have; no image begins that would not be whole by then.
        num_text_ids: text ids in use, where the LLM's embedding has more rows than its tokenizer has words.
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
        self.images, self.max_length = images, max_length
        self.num_text_ids = self.vocabulary.text_size if num_text_ids is None else num_text_ids
        if not 0 < self.num_text_ids <= self.vocabulary.text_size:
            raise ValueError(f"num_text_ids: expected 1 to {self.vocabulary.text_size}, got {num_text_ids}")

    def since_begin(self, input_ids: Tensor) -> Tensor:
        """Ids after the last begin of image, [B]; more than an image has where there was none."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(input_ids == self.vocabulary.begin_of_image, places, -self.length - 1).amax(1)
        return input_ids.shape[1] - 1 - last

    @property
    def length(self) -> int:
        """Ids after begin of image that make it whole."""
        return len(self.prefix) + self.tokens + 1

    def in_image(self, input_ids: Tensor) -> Tensor:
        """[B] bool: whether the next id is an image id."""
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
    """Classifier-free guidance of image ids: u + scale * (c - u), of rows [conditional; unconditional] of one batch.

    Both halves get the same scores and so, by `Draw`, the same ids. Text is the conditional rows' alone.
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
    """One id of each row: its score stays, all others become -inf. The last processor, with do_sample=False.

    Args:
        grammar: whose image ids are drawn hierarchically, if `hierarchical`.
        temperature: 0 takes the best id.
        top_k, top_p: as in transformers; 0 and 1 leave all ids.
        hierarchical: in images, draw the semantic code i first (a code's score is the logsumexp of its ids'), then
            the sub-code j of i; temperature, top_k and top_p hold for both draws.
        offsets: int64 [K + 1], for hierarchical draws of a model with adaptive sizes: its `codebooks.offsets`.
        halves: the second half of the rows takes what is drawn for the first (`Guidance`).
        generator: of the random numbers, on any device; or one on the CPU for each row that is drawn, whose ids then
            depend on no other row.

    Raises:
        ValueError: a negative temperature, or adaptive sizes without their offsets; when drawing, generators of another
            number than rows.
    """

    def __init__(
        self,
        grammar: Grammar,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        hierarchical: bool = False,
        offsets: Tensor | None = None,
        halves: bool = False,
        generator: Generators | None = None,
    ) -> None:
        if hierarchical and grammar.adaptive and offsets is None:
            raise ValueError("offsets: expected those of the adaptive sizes for hierarchical draws, got none")
        if temperature < 0:
            raise ValueError(f"temperature: expected at least 0, got {temperature}")
        self.grammar, self.hierarchical, self.offsets = grammar, hierarchical, offsets
        self.halves, self.generator = halves, generator
        self.warpers = LogitsProcessorList()
        self.greedy = temperature == 0
        if not self.greedy:
            if temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(float(temperature)))
            if top_k:
                self.warpers.append(TopKLogitsWarper(top_k))
            if top_p != 1:
                self.warpers.append(TopPLogitsWarper(top_p))

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
        """Scores whose image rows keep the ids of one semantic code."""
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
        """[B, 1] places in scores [B, n], which are those of all rows or of `rows` [B]."""
        if self.greedy:
            return scores.argmax(1, keepdim=True)
        probabilities = self.warpers(input_ids, scores.float()).softmax(-1)
        if self.generator is None or isinstance(self.generator, torch.Generator):
            if self.generator is not None:
                probabilities = probabilities.to(self.generator.device)
            return torch.multinomial(probabilities, 1, generator=self.generator).to(scores.device)
        if rows is None and len(self.generator) != len(scores):
            raise ValueError(f"generator: expected one or {len(scores)}, one for each row, got {len(self.generator)}")
        own = self.generator if rows is None else [self.generator[row] for row in rows.tolist()]
        drawn = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in own]).to(scores.device)
        # The first id at which the sum of the probabilities passes the number drawn.
        sums = probabilities.double().cumsum(-1)
        return torch.searchsorted(sums, drawn[:, None] * sums[:, -1:], right=True).clamp_max(scores.shape[1] - 1)


def left_pad(prompts: Sequence[Prompt], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts [T_b] -> ids [B, T], padded on the left, and mask [B, T] int64, 0 where padded.

    Raises:
        ValueError: no prompts, or an empty one.
    """
    rows = [torch.as_tensor(prompt, dtype=torch.int64).flatten() for prompt in prompts]
    if not rows or not all(len(row) for row in rows):
        raise ValueError(f"prompts: expected one or more, none of them empty, got lengths {[len(r) for r in rows]}")
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=pad_id) for row in rows])
    size = torch.tensor([len(row) for row in rows], device=ids.device)
    return ids, (torch.arange(length, device=ids.device) >= length - size[:, None]).long()


@torch.no_grad()
def generate(
    model: UnifiedMLLM,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    images: bool = True,
    num_text_ids: int | None = None,
    guidance: float = 1.0,
    unconditional: Sequence[Prompt] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    hierarchical: bool = False,
    generator: Generators | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    use_cache: bool = True,
    streamer: Any = None,
) -> list[Tensor]:
    """What follows each prompt: text, and images if `images` (`Vocabulary.images` finds them).

    Args:
        prompts: ids of each, of any lengths.
        max_new_tokens: at most so many ids each; an image that would not be whole by then is not begun.
        guidance: scale of classifier-free guidance of image ids; 1 is without.
        unconditional: for guidance, a prompt each without the caption; where guidance is 1 it is not looked at.
        eos_id: a text id, which ends a row; None never ends before `max_new_tokens`.
        pad_id: a text id, hidden by a mask.
        num_text_ids: see `Grammar`.
        temperature: see `Draw`.
        top_k: see `Draw`.
        top_p: see `Draw`.
        hierarchical: see `Draw`.
        generator: see `Draw`.
        streamer: of transformers, such as `TextIteratorStreamer`: gets the prompt and then every id. One prompt only.

    Returns:
        new ids of each prompt, [n] int64, the end of text included.

    Raises:
        ValueError: empty prompts, guidance without as many unconditional prompts, a value out of range, or a streamer
            for more than one row.
    """
    prompts = list(prompts)
    count, guided = len(prompts), guidance != 1
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
    max_length = ids.shape[1] + max_new_tokens
    grammar = Grammar(model.config, images=images, max_length=max_length, num_text_ids=num_text_ids)
    processors = LogitsProcessorList([Guidance(guidance, grammar)] if guided else [])
    processors.append(grammar)
    processors.append(
        Draw(
            grammar, temperature=temperature, top_k=top_k, top_p=top_p, hierarchical=hierarchical,
            offsets=model.codebooks.offsets, halves=guided, generator=generator,
        )
    )  # fmt: skip
    # An id that never comes: None would be filled in from the LLM's own generation config.
    transformers_model: Any = model
    out = transformers_model.generate(
        ids,
        attention_mask=mask,
        logits_processor=processors,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=model.vocabulary.size if eos_id is None else eos_id,
        pad_token_id=pad_id,
        use_cache=use_cache,
        streamer=streamer,
    )
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
    guidance: float = 1.0,
    unconditional: Prompt = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    hierarchical: bool = False,
    generator: Generators | None = None,
    use_cache: bool = True,
) -> Tensor:
    """One image for each prompt (a caption's ids, begin of image not included): flat ids [B, h, w] for a tokenizer.

    unconditional: what stands in the prompt's place for guidance; nothing by default.
    Other arguments, errors: see `generate`.
    """
    vocabulary, grid = model.vocabulary, model.config.grid_size
    begin = [vocabulary.begin_of_image]
    free = [*torch.as_tensor(unconditional, dtype=torch.int64).tolist(), *begin]
    prefix = int(model.config.resolution_id)
    rows = generate(
        model,
        [[*torch.as_tensor(prompt, dtype=torch.int64).tolist(), *begin] for prompt in prompts],
        max_new_tokens=prefix + grid**2,
        guidance=guidance, unconditional=[free] * len(prompts),
        temperature=temperature, top_k=top_k, top_p=top_p,
        hierarchical=hierarchical, generator=generator, use_cache=use_cache,
    )  # fmt: skip
    return vocabulary.from_text(torch.stack(rows)[:, prefix:]).unflatten(1, (grid, grid))
