"""How text and images become ids. Training, chat and generation format all samples and prompts here.

Conversations are lists of {"role": "system" | "user" | "assistant", "content": text}, in which `<image>` stands for the
next image. They are written by the chat template of the text tokenizer, or by `PLAIN` if it has none. The ids of a
prompt are always the first ids of the sample in training: text is tokenised in pieces, which end where an image or an
answer begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from semhitok._optional import require
from semhitok.vocabulary import Vocabulary

IMAGE = "<image>"

# Only the contents: a line each, and the text tokenizer's end of text after an answer.
PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['content'] }}"
    "{{ (eos_token or '') if m['role'] == 'assistant' else '\n' if m['content'] else '' }}{% endfor %}"
)

Message = Mapping[str, Any]
Part = tuple[list[int], bool]  # ids, and whether they are learnt; for `semhitok.mllm.join`


def conversation(
    text_tokenizer: Any,
    vocabulary: Vocabulary,
    messages: Sequence[Message],
    images: Sequence[Tensor] = (),
    given: int = 0,
) -> list[Part]:
    """A conversation as parts (ids, learnt?) for `join`: answers are learnt, with the one id that ends them.

    Args:
        text_tokenizer: a text tokenizer of transformers.
        vocabulary: the model's.
        messages: {"role", "content"} each. Content is text, or a list of {"type": "text", "text"} and
            {"type": "image"}.
        images: int64 [2 + h * w] each, as returned by `Vocabulary.image`, one for every `<image>` in order.
        given: number of first ids of each image that are not learnt.

    Raises:
        ValueError: no answer or an empty one, a wrong number of images, text ids that the model does not have, or a
            chat template that changes earlier text when an answer is added.
    """
    turns = [_message(m) for m in messages]
    if not any(m["role"] == "assistant" for m in turns):
        raise ValueError("messages: expected at least one of the assistant, got none")
    return _parts(_Writer(text_tokenizer, vocabulary, images, given), turns, False)


def prompt(
    text_tokenizer: Any, vocabulary: Vocabulary, messages: Sequence[Message], images: Sequence[Tensor] = ()
) -> list[int]:
    """Ids of a conversation whose next message is an answer. For arguments and errors see `conversation`."""
    turns = [_message(m) for m in messages]
    if turns and turns[-1]["role"] == "assistant":
        raise ValueError("messages: expected a question at the end, got an answer")
    parts = _parts(_Writer(text_tokenizer, vocabulary, images), turns, True)
    return [i for ids, _ in parts for i in ids]


def understanding(text_tokenizer: Any, vocabulary: Vocabulary, image: Tensor, question: str = "") -> list[int]:
    """Ids of an image [2 + h * w] (see `Vocabulary.image`) and a question about it; "" asks for a caption."""
    return prompt(text_tokenizer, vocabulary, _question(question), [image])


def understanding_parts(
    text_tokenizer: Any, vocabulary: Vocabulary, image: Tensor, question: str, answer: str
) -> list[Part]:
    """Parts of `understanding` and an answer, which is learnt."""
    answered = [*_question(question), {"role": "assistant", "content": answer}]
    return conversation(text_tokenizer, vocabulary, answered, [image])


def generation(text_tokenizer: Any, vocabulary: Vocabulary, caption: str | None) -> list[int]:
    """Ids of a prompt for `generate_images`, without begin of image; with caption None its `unconditional`."""
    return prompt(text_tokenizer, vocabulary, [{"role": "user", "content": caption or ""}])


def generation_parts(text_tokenizer: Any, vocabulary: Vocabulary, caption: str | None, image: Tensor) -> list[Part]:
    """Parts of `generation` and its image. Learnt are image ids, end of image and end of the answer."""
    asked = [{"role": "user", "content": caption or ""}, {"role": "assistant", "content": IMAGE}]
    ids = image.tolist()
    given = next((n for n, i in enumerate(ids) if i < vocabulary.begin_of_image), len(ids))
    return conversation(text_tokenizer, vocabulary, asked, [image], given)


def text_parts(text_tokenizer: Any, vocabulary: Vocabulary, text: str) -> list[Part]:
    """Plain text, all of it learnt, with the text tokenizer's begin and end of text if it has them."""
    writer = _Writer(text_tokenizer, vocabulary, ())
    writer.write((text_tokenizer.bos_token or "") + text + (text_tokenizer.eos_token or ""), True, markers=False)
    return writer.finish()


def end_of_answer(text_tokenizer: Any, vocabulary: Vocabulary) -> int | None:
    """The id that ends an answer, the `eos_id` of `generate`; None if the format has none."""
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]
    parts = conversation(text_tokenizer, vocabulary, messages)
    learnt = [i for ids, is_learnt in parts if is_learnt for i in ids]
    alone = _tokenise(text_tokenizer, "a")
    return learnt[-1] if len(learnt) > len(alone) else None


def word_tokenizer(texts: Iterable[str], size: int = 10_000) -> Any:
    """A text tokenizer of transformers whose ids are the most frequent lower-case words and punctuation marks.

    For small models that are trained from scratch. Ids 0, 1, 2 are padding, end of text and unknown words.
    """
    tokenizers, transformers = require("tokenizers", "mllm"), require("transformers", "mllm")
    special = ["<pad>", "<eos>", "<unk>"]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<unk>"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    model.train_from_iterator(texts, trainer)
    tokens = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **tokens)


class _Writer:
    """Collects parts: text is tokenised piece by piece between its images."""

    def __init__(self, text_tokenizer: Any, vocabulary: Vocabulary, images: Sequence[Tensor], given: int = 0) -> None:
        self.text_tokenizer, self.vocabulary, self.images, self.given = text_tokenizer, vocabulary, list(images), given
        self.used = 0
        self.parts: list[Part] = []

    def render(self, messages: Sequence[Message], ask: bool) -> str:
        template = self.text_tokenizer.chat_template or PLAIN
        options = {"tokenize": False, "add_generation_prompt": ask, "chat_template": template}
        try:
            return self.text_tokenizer.apply_chat_template(list(messages), **options)
        except require("jinja2", "mllm").TemplateError as error:  # such as two questions without an answer between
            raise ValueError(f"chat_template: {error}") from None

    def write(self, text: str, learnt: bool, *, first_only: bool = False, markers: bool = True) -> None:
        """Add `text`. `first_only`: only its first id is learnt. `markers`: `<image>` stands for an image."""
        for number, piece in enumerate(text.split(IMAGE) if markers else [text]):
            if number:
                if self.used < len(self.images):
                    ids = self.images[self.used].tolist()
                    self._add(ids[: self.given], False)
                    self._add(ids[self.given :], learnt)
                self.used += 1
            ids = _tokenise(self.text_tokenizer, piece)
            if ids and max(ids) >= self.vocabulary.text_size:
                problem = f"expected text ids below {self.vocabulary.text_size}, the model's, got {max(ids)}"
                raise ValueError(f"text_tokenizer: {problem}")
            split = 1 if first_only else len(ids)
            self._add(ids[:split], learnt)
            self._add(ids[split:], False)

    def _add(self, ids: list[int], learnt: bool) -> None:
        if ids:
            self.parts.append((ids, learnt))

    def finish(self) -> list[Part]:
        if self.used != len(self.images):
            raise ValueError(f"images: expected {self.used}, one for each {IMAGE}, got {len(self.images)}")
        return self.parts


def _parts(writer: _Writer, turns: Sequence[Message], asks: bool) -> list[Part]:
    """The turns up to the last answer, or with `asks` all of them and the beginning of the next answer."""
    template_error = ValueError("chat_template: expected one that leaves earlier text and answers as they are")
    done = ""
    for n in (n for n, m in enumerate(turns) if m["role"] == "assistant"):
        asked, answered = writer.render(turns[:n], True), writer.render(turns[: n + 1], False)
        content = turns[n]["content"]
        place = answered.rfind(content)
        if not content:
            raise ValueError("messages: expected an answer with content, got an empty one")
        if not asked.startswith(done) or not answered.startswith(asked) or place < len(asked):
            raise template_error
        writer.write(asked[len(done) :], False)
        writer.write(answered[len(asked) : place + len(content)], True)
        writer.write(answered[place + len(content) :], True, first_only=True)
        done = answered
    if asks:
        asked = writer.render(turns, True)
        if not asked.startswith(done):
            raise template_error
        writer.write(asked[len(done) :], False)
    return writer.finish()


def _tokenise(text_tokenizer: Any, text: str) -> list[int]:
    return text_tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _question(question: str) -> list[Message]:
    return [{"role": "user", "content": f"{IMAGE}\n{question}" if question else IMAGE}]


def _message(message: Message) -> dict[str, str]:
    """A message whose content is text, stripped, as templates would strip it."""
    try:
        role, content = message["role"], message["content"]
    except (KeyError, TypeError):
        raise ValueError(f"messages: expected objects with role and content, got {message!r:.80}") from None
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"messages: expected role system, user or assistant, got {role!r}")
    if isinstance(content, list):
        kinds = {"text": lambda part: part["text"], "image": lambda part: IMAGE}
        try:
            content = "".join(kinds[part["type"]](part) for part in content)
        except (KeyError, TypeError):
            raise ValueError(f"messages: expected content of text and image parts, got {content!r:.80}") from None
    if not isinstance(content, str):
        raise ValueError(f"messages: expected content to be text, got {content!r:.80}")
    return {"role": role, "content": content.strip()}
