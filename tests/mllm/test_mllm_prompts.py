"""One format for training, chat and generation: prompts are the beginnings of samples, and answers alone are learnt."""

import pytest
import torch

pytest.importorskip("transformers")

from semhitok.mllm import join, prompts
from semhitok.vocabulary import Vocabulary

QUESTION, ANSWER = "what colour is it ?", "it is red ."
CHAT = (
    "{% if messages[0]['role'] != 'system' %}<s> kind\n{% endif %}{% for m in messages %}<s> {{ m['role'] }}\n"
    "{{ m['content'] }}<e>\n kind{% endfor %}{% if add_generation_prompt %}<s> assistant\n{% endif %}"
)


def words(template=None):
    texts = ["a red circle", QUESTION, ANSWER, "kind user system assistant"]
    tokenizer = prompts.word_tokenizer(texts)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "<e>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(params=[None, CHAT], ids=["plain", "template"])
def tokenizer(request):
    return words(request.param)


def vocabulary_of(tokenizer, resolutions=()):
    return Vocabulary(5, 3, len(tokenizer), "a", resolutions)


def image_of(vocabulary, first=0):
    pixels = vocabulary.resolutions[0] if vocabulary.resolutions else None
    return vocabulary.image(torch.arange(first, first + 4).view(2, 2), "a", pixels)


def ids(parts, learnt=(True, False)):
    return [i for part, is_learnt in parts if is_learnt in learnt for i in part]


def turn(role, content):
    return {"role": role, "content": content}


def test_plain_format_by_hand():
    tokenizer = words()
    vocabulary = vocabulary_of(tokenizer)
    image, (eos,) = image_of(vocabulary), tokenizer("<eos>")["input_ids"]
    asked, answered = (tokenizer(text)["input_ids"] for text in (QUESTION, ANSWER))
    parts = prompts.understanding_parts(tokenizer, vocabulary, image, QUESTION, ANSWER)
    assert parts == [(image.tolist(), False), (asked, False), (answered, True), ([eos], True)]
    circle = tokenizer("a red circle")["input_ids"]
    assert prompts.generation_parts(tokenizer, vocabulary, "a red circle", image) == [
        (circle, False), (image[:1].tolist(), False), (image[1:].tolist(), True), ([eos], True),
    ]  # fmt: skip
    assert ids(prompts.generation_parts(tokenizer, vocabulary, None, image)) == [*image.tolist(), eos]
    assert prompts.generation(tokenizer, vocabulary, None) == []
    assert prompts.text_parts(tokenizer, vocabulary, "a red <image>")[0][1] is True
    assert ids(prompts.text_parts(tokenizer, vocabulary, "a red"))[-1] == eos
    assert prompts.end_of_answer(tokenizer, vocabulary) == eos


def test_prompts_are_what_samples_begin_with(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    images = [image_of(vocabulary, n) for n in (0, 3)]
    messages = [
        turn("system", "kind"), turn("user", f"<image> {QUESTION}"), turn("assistant", ANSWER),
        turn("user", [{"type": "text", "text": "it ?"}, {"type": "image"}]), turn("assistant", "red"),
    ]  # fmt: skip
    whole = prompts.conversation(tokenizer, vocabulary, messages, images)
    for asked, shown in ((2, images[:1]), (4, images)):
        begun = prompts.prompt(tokenizer, vocabulary, messages[:asked], shown)
        assert ids(whole)[: len(begun)] == begun
        answer = tokenizer(messages[asked]["content"])["input_ids"]
        assert ids(whole)[len(begun) : len(begun) + len(answer)] == answer
    end = prompts.end_of_answer(tokenizer, vocabulary)
    learnt = [*tokenizer(ANSWER)["input_ids"], end, *tokenizer("red")["input_ids"], end]
    assert ids(whole, (True,)) == learnt
    assert end == tokenizer.convert_tokens_to_ids("<eos>" if tokenizer.chat_template is None else "<e>")
    parts = prompts.understanding_parts(tokenizer, vocabulary, images[0], QUESTION, ANSWER)
    begun = prompts.understanding(tokenizer, vocabulary, images[0], QUESTION)
    assert ids(parts, (False,))[: len(begun)] == begun and ids(parts)[len(begun)] == learnt[0]


@pytest.mark.parametrize("caption", ["a red circle", None])
@pytest.mark.parametrize("resolutions", [(), (16,)])
def test_generation_learns_the_image_and_its_end_but_not_its_begin(tokenizer, caption, resolutions):
    vocabulary = vocabulary_of(tokenizer, resolutions)
    image = image_of(vocabulary).tolist()
    given = 1 + len(resolutions)
    parts = prompts.generation_parts(tokenizer, vocabulary, caption, torch.tensor(image))
    begun = prompts.generation(tokenizer, vocabulary, caption)
    assert ids(parts)[: len(begun) + len(image)] == [*begun, *image]
    assert ids(parts, (True,)) == [*image[given:], prompts.end_of_answer(tokenizer, vocabulary)]
    red = tokenizer.convert_tokens_to_ids("red")
    assert (red in begun) == (caption is not None)


def test_a_conversation_learns_to_begin_images_too(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    image = image_of(vocabulary)
    messages = [turn("user", "a red circle"), turn("assistant", "it is <image> red")]
    learnt = ids(prompts.conversation(tokenizer, vocabulary, messages, [image]), (True,))
    assert learnt[2 : 2 + len(image)] == image.tolist()


def test_bad_conversations_are_refused(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    image = image_of(vocabulary)
    asked, answered = turn("user", "<image>"), turn("assistant", "red")

    def conversation(messages, images=(image,), of=vocabulary):
        return prompts.conversation(tokenizer, of, messages, images)

    for images in ([], [image, image]):
        with pytest.raises(ValueError, match=f"images: expected 1, one for each <image>, got {len(images)}"):
            conversation([asked, answered], images)
    with pytest.raises(ValueError, match="expected at least one of the assistant"):
        conversation([asked])
    with pytest.raises(ValueError, match="expected an answer with content"):
        conversation([asked, turn("assistant", " ")])
    with pytest.raises(ValueError, match="expected role system, user or assistant, got 'tool'"):
        conversation([turn("tool", "a"), answered])
    with pytest.raises(ValueError, match="expected content of text and image parts"):
        conversation([turn("user", [{"type": "audio"}]), answered])
    with pytest.raises(ValueError, match="expected objects with role and content"):
        conversation([{"from": "human"}, answered])
    with pytest.raises(ValueError, match="expected text ids below 3, the model's, got"):
        conversation([asked, answered], of=Vocabulary(5, 3, 3, "a"))
    with pytest.raises(ValueError, match="expected a question at the end, got an answer"):
        prompts.prompt(tokenizer, vocabulary, [asked, answered], [image])
    assert join(*conversation([asked, answered])).labels.ge(0).sum() == 2


def test_a_template_that_rewrites_the_past_is_refused():
    tokenizer = words("{% for m in messages %}{% if loop.last %}{{ m['content'] }} kind{% endif %}{% endfor %}")
    messages = [turn("user", QUESTION), turn("assistant", ANSWER), turn("user", QUESTION), turn("assistant", ANSWER)]
    with pytest.raises(ValueError, match="chat_template: expected one that leaves earlier text"):
        prompts.conversation(tokenizer, vocabulary_of(tokenizer), messages)


def test_word_tokenizer_knows_words_and_marks(tmp_path):
    tokenizer = prompts.word_tokenizer(["A red circle, a blue one.", "red"], size=7)
    assert len(tokenizer) == 7 and tokenizer.pad_token_id == 0
    assert tokenizer("Red a unseen")["input_ids"][2] == tokenizer.unk_token_id
    assert tokenizer.decode(tokenizer("RED a")["input_ids"]) == "red a"
    tokenizer.save_pretrained(tmp_path)
    import transformers

    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("red a x <eos>")["input_ids"] == tokenizer("red a x <eos>")["input_ids"]
