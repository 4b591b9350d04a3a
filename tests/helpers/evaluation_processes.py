"""Evaluations in several processes, for the tests of evaluation."""

import json
import multiprocessing
import os
import socket

import torch

from semhitok import distributed
from semhitok.data.images import to_uint8
from semhitok.evaluation import evaluate_tokenizer, metrics
from semhitok.evaluation.measure import PairMetrics, measure
from semhitok.tokenizer import SemHiTok

# As for training: the server has everything imported, so that a start takes a fraction of a second.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["evaluation_processes", "timm", "accelerate"])


def smooth(count, size=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def pairs(count=70):
    """Images and noisy copies, uint8 [count, 2, 3, 32, 32]."""
    images = smooth(count)
    noisy = images + 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return torch.stack([to_uint8(images), to_uint8(noisy)], 1)


def figures_of_pairs(batch):
    rows = PairMetrics("random:test_vit", "cpu").rows
    figures, images, _ = measure(pairs().split(batch), lambda both: rows(*both.unbind(1)))
    return {"figures": figures, "images": images}


def fail(*args, **kwargs):
    raise OSError("no network")


def in_processes(world_size, function, *arguments):
    """Run function(*arguments) in processes that a launcher would have started; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        CONTEXT.Process(target=work, args=(rank, world_size, port, function, arguments)) for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
        worker.kill()
    return [worker.exitcode for worker in workers]


def work(rank, world_size, port, function, arguments):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    torch.set_num_threads(1)
    metrics.perceptual_loss = torch.hub.download_url_to_file = fail
    distributed.join(torch.device("cpu"))
    assert distributed.world_size() == world_size
    function(*arguments)


def write_figures(path):
    figures = figures_of_pairs(7)
    if figures["figures"]:
        path.write_text(json.dumps(figures))


def evaluate_checkpoint(checkpoint, photos, out):
    tokenizer = SemHiTok.from_pretrained(checkpoint)
    report = evaluate_tokenizer(tokenizer, [photos], out, labels="folders", features="random:test_vit")
    assert report["figures"]["psnr"] > 0  # on every process
