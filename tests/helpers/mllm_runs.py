"""Training runs of the unified model that take a second, in one process or several, for its tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path

import torch

from semhitok.config import SemHiTokConfig, TeacherConfig, ViTConfig, override
from semhitok.tokenizer import SemHiTok

SETTINGS = [
    "llm_config={model_type: qwen2, vocab_size: 64, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128, tie_word_embeddings: true}",
    "data.length=64", "data.look_ahead=4", "data.shuffle_buffer=4", "precision=fp32", "tracker=none",
    "joint.batch_size=4", "joint.steps=12", "joint.checkpoint_every=5", "joint.optimizer.lr=5e-3",
]  # fmt: skip


def small_tokenizer(seed=0, **more):
    torch.manual_seed(seed)
    teacher = TeacherConfig("vit_tiny_patch16_224", pretrained=False, image_size=16, options={
        "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 1,
    })  # fmt: skip
    vit = ViTConfig(8, 1, 1)
    config = SemHiTokConfig(
        image_size=16, patch_size=8, num_codes=5, num_sub_codes=3, sem_dim=6, pix_dim=4,
        teacher=teacher, semantic_decoder=vit, encoder=vit, decoder=vit, **more,
    )  # fmt: skip
    return SemHiTok(config).eval()


def write_jsonl(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_world(folder: Path) -> Path:
    """A tokenizer and three sources, of captioned images, conversations and text, all small."""
    folder.mkdir(exist_ok=True)
    tokenizer = small_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    draw = torch.Generator().manual_seed(0)
    colours = ("red", "green", "blue", "white")

    def codes():
        return torch.randint(15, (4,), generator=draw).tolist()

    captioned = [{"caption": f"a {colours[n % 4]} thing number {n % 7}", "codes": [codes()]} for n in range(30)]
    talks = [
        {"messages": [{"role": "user", "content": f"<image> what colour is it {'please ' * (n % 5)}?"},
                      {"role": "assistant", "content": f"it is {colours[n % 4]}"}], "codes": [codes()]}
        for n in range(20)
    ]  # fmt: skip
    texts = [{"text": "a red thing is not a green thing " * (1 + n % 3)} for n in range(10)]
    own = {"codebook_hash": tokenizer.codebook_hash}
    write_jsonl(folder / "captioned.jsonl", [{**r, **own} for r in captioned])
    write_jsonl(folder / "talks.jsonl", [{**r, **own} for r in talks])
    write_jsonl(folder / "texts.jsonl", texts)
    return folder


def small_config(world: Path, *more: str):
    from semhitok.mllm.config import mllm_config

    config = mllm_config("mllm-tiny")
    sources = (
        f"[{{path: {world}/captioned.jsonl, task: generation, weight: 2}}, "
        f"{{path: {world}/talks.jsonl, task: understanding}}, {{path: {world}/texts.jsonl, task: text}}]"
    )
    stages = [f"{stage}.sources={sources}" for stage in ("adapter", "joint", "instruct")]
    for assignment in [*SETTINGS, *stages, f"tokenizer={world}/tokenizer", *more]:
        override(config, assignment)
    return config


def losses(run: Path, stage: str = "joint", key: str = "loss") -> list[float]:
    records = map(json.loads, (run / stage / "log.jsonl").read_text().splitlines())
    return [r[key] for r in records if key in r]


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["mllm_runs", "semhitok.mllm.training", "timm", "accelerate"])


def start(world_size: int, world: Path, out: Path, settings) -> list:
    """`world_size` processes that train together, as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _context.Process(target=_work, args=(rank, world_size, port, world, out, settings))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes, timeout: float = 120) -> list[int]:
    multiprocessing.connection.wait([p.sentinel for p in processes], timeout)
    for process in processes:
        if any(p.exitcode not in (0, None) for p in processes):
            process.join(2)
            process.kill()
        process.join(timeout)
    return [p.exitcode for p in processes]


def _work(rank, world_size, port, world, out, settings):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    from semhitok.mllm.training import train
    from semhitok.training import log

    log.LOG_EVERY = 1
    try:
        train(small_config(world, *settings), out)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
