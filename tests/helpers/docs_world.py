"""The files that the documentation's commands and programs name, all small: a tokenizer, a language model, images."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from benchmark_files import write_pope
from mllm_runs import small_tokenizer, write_jsonl
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

from semhitok.config import preset
from semhitok.mllm import UnifiedMLLM, prompts
from semhitok.tokenizer import SemHiTok

CAPTIONS = ["a red kite", "a small green cross at top left", "a dog"]


def write_docs_world(folder: Path) -> Path:
    """Fill `folder`, in which every page begins."""
    draw = np.random.default_rng(0)

    def image(path: str, size: int = 70) -> None:
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(_pixels(draw, size)).save(target)

    # What `make demo` leaves: the demo's tokenizer, not trained, and photographs.
    torch.manual_seed(0)
    SemHiTok(preset("semhitok-tiny")).save_pretrained(folder / "demo_output/checkpoint")
    for part, count in (("train", 14), ("held_out", 14), ("unseen", 1)):
        for n in range(count):
            image(f"demo_output/photographs/{part}/{part}-{n}.png", 130)
    # The user's own: images with captions, labelled ones, shards, parquet files, another tokenizer's reconstructions.
    for n in range(4):
        image(f"photos/{n}.jpg")
        (folder / f"photos/{n}.txt").write_text(CAPTIONS[n % 3])
        image(f"val/{'ab'[n % 2]}/{n}.png", 16)
        image(f"theirs/{'ab'[n % 2]}/{n}.png", 16)
        _shard(folder / f"shards/{n:03}.tar", draw)
        _parquet(folder / f"data/train-{n:05}.parquet", draw)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        image(name)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    (folder / "POPE").mkdir()
    write_pope(folder / "POPE")
    (folder / "POPE/val2014").rename(folder / "val2014")
    _unified(folder)
    return folder


def _pixels(draw: np.random.Generator, size: int) -> np.ndarray:
    """Soft random colours, so that patches differ and have structure."""
    coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _jpeg(draw: np.random.Generator) -> bytes:
    file = BytesIO()
    Image.fromarray(_pixels(draw, 70)).save(file, "jpeg")
    return file.getvalue()


def _shard(path: Path, draw: np.random.Generator) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in range(2):
            for suffix, content in (("jpg", _jpeg(draw)), ("txt", CAPTIONS[n].encode())):
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(content)
                tar.addfile(member, BytesIO(content))


def _parquet(path: Path, draw: np.random.Generator) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(exist_ok=True)
    images = [{"bytes": _jpeg(draw), "path": None} for _ in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": CAPTIONS[:2]}), path)


def _unified(folder: Path) -> None:
    """A tokenizer of 2 x 2 ids under the name of a full-size one, an LLM, a unified model of both, its data."""
    image_tokenizer = small_tokenizer()
    image_tokenizer.save_pretrained(folder / "runs/256/checkpoint")
    llm, trained = folder / "Qwen/Qwen2.5-0.5B-Instruct", folder / "runs/mllm/checkpoint"
    text_tokenizer = prompts.word_tokenizer([*CAPTIONS, "what is it ? who differs describe the image ."])
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(text_tokenizer) + 3, hidden_size=18, intermediate_size=20, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(llm)
    UnifiedMLLM.from_parts(str(llm), image_tokenizer).save_pretrained(trained)
    for place in (llm, trained):
        text_tokenizer.save_pretrained(place)
    own = {"codebook_hash": image_tokenizer.codebook_hash, "codes": [[0, 4, 11, 14]]}
    talk = [{"role": "user", "content": "<image> what is it ?"}, {"role": "assistant", "content": "a dog ."}]
    write_jsonl(folder / "captions.jsonl", [{"caption": c, **own} for c in CAPTIONS])
    write_jsonl(folder / "talks.jsonl", [{"messages": talk, **own}] * 3)
    write_jsonl(folder / "books.jsonl", [{"text": "the dog is red ."}] * 3)
