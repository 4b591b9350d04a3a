"""Small unified models with their tokenizers, and what the tests of several files do with them."""

from __future__ import annotations

import re

import torch
from mllm_runs import small_tokenizer
from transformers import AutoConfig

from semhitok.data.images import read_image, resize_crop, save_png
from semhitok.mllm import UnifiedMLLM, join, prompts
from semhitok.mllm.assistant import Assistant

TEXT = 40  # rows of the LLM's embedding
OFFSETS = torch.tensor([0, 1, 5, 7, 13, 15])
TOKENIZER, ADAPTIVE = small_tokenizer(), small_tokenizer(adaptive=True)
ADAPTIVE.quantizer.offsets.copy_(OFFSETS)
HEADS = ["flat", "hierarchical", "hierarchical, adaptive"]
CAPTIONS = ["a red circle", "a small green cross at top left", "blue"]
TEXTS = [*CAPTIONS, "what colour is it ?", "where is it ?", "it is red ."]


def llm_config(kind="qwen2", **overrides):
    sizes = {
        "vocab_size": TEXT, "hidden_size": 18, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 128,
    }  # fmt: skip
    return AutoConfig.for_model(kind, **{**sizes, **overrides})


def build(config, image_tokenizer, seed, **options):
    """A model with weights of a size that makes logits differ."""
    torch.manual_seed(seed)
    model = UnifiedMLLM.from_parts(config, image_tokenizer, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.tie_weights()
    return model.eval()


def small_model(kind="qwen2", head="flat", seed=0, resolution_id=False, **overrides):
    """head: one of `HEADS`; "adaptive" is a tokenizer with adaptive sizes."""
    head, _, adaptive = head.partition(", ")
    config, image_tokenizer = llm_config(kind, **overrides), ADAPTIVE if adaptive else TOKENIZER
    return build(config, image_tokenizer, seed, head=head, resolution_id=resolution_id)


def image_ids(model, count=1, seed=0):
    codes = torch.randint(15, (count, 2, 2), generator=torch.Generator().manual_seed(seed))
    return model.vocabulary.image(codes, model.vocabulary.codebook_hash), codes


def samples(model):
    image, _ = image_ids(model, 3)
    return [
        join((image[0], False), ([5, 6, 7], False), ([8, 9], True)),  # understanding
        join(([3, 4], False), (image[1], True)),  # text to image
        join(([11], True), (image[2], True), ([12, 13], True)),
    ]


def small_assistant(seed=0, **options):
    """A model of the words in `TEXTS`."""
    image_tokenizer, text_tokenizer = small_tokenizer(seed), prompts.word_tokenizer(TEXTS)
    config = llm_config(vocab_size=len(text_tokenizer) + 3, max_position_embeddings=64, tie_word_embeddings=False)
    return Assistant(build(config, image_tokenizer, 1, **options), text_tokenizer, image_tokenizer)


def save(assistant, folder):
    assistant.model.save_pretrained(folder / "model")
    assistant.text_tokenizer.save_pretrained(folder / "model")
    assistant.image_tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "model", folder / "tokenizer"


def write_pictures(folder, count=12):
    """Random pictures in a folder; returns their ids."""
    folder.mkdir(exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    for n in range(count):
        save_png(torch.rand(3, 16 + n, 20, generator=draw), folder / f"{n}.png")
    return torch.cat([TOKENIZER.encode(pixels(folder / f"{n}.png")) for n in range(count)])


def pixels(path):
    """An image file as training reads it: [1, 3, 16, 16] of 8 bits."""
    return (resize_crop(read_image(path), 16).mul(255).round().to(torch.uint8).float() / 255)[None]


def assert_refused(result, *words):
    code, out, err = result
    assert code == 2 and out == "" and len(err) == 1
    assert re.match(r"semhitok [\w-]+: error: ", err[0])
    assert all(word in err[0] for word in words), err[0]
