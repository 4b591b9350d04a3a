"""Several processes train as one would: equal codebooks, equal losses, and the same bytes after any kill."""

import functools
import random
import signal
import time

import pytest
import safetensors.torch
import timm
import torch
from training_processes import CRITIC, SETTINGS, Workers, checkpoint_bytes, losses, write_pictures

LONG = ["semantic.steps=50", "pixel.steps=50", *CRITIC]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def backbone(tmp_path_factory):
    """Weights for the frozen critic's backbone, random ones, as a local file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("backbone") / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    """The run of one process with given settings."""

    @functools.cache
    def run(settings):
        out = tmp_path_factory.mktemp("alone")
        assert Workers(1, out, pictures, settings).wait() == [0]
        return out

    return run


DINO = (
    "pixel.loss.critic.kind=dino", "pixel.loss.critic.loss=non_saturating", "pixel.loss.critic.blocks=[0]",
    "pixel.loss.critic.image_size=32", "pixel.loss.critic.backbone=test_vit",
)  # fmt: skip
# The adaptive weight is that of a micro-batch.
MICRO = ("pixel.micro_batch=1", "semantic.micro_batch=1", "pixel.loss.critic.adaptive=false")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (2, ()),
        (4, ()),
        (2, MICRO),
        (2, ("data.workers=1",)),
        (2, ("shard=true",)),
        (2, DINO),
        (2, ("model.adaptive=true",)),
    ],
)
def test_processes_hold_equal_codebooks_and_lose_what_one_process_loses(
    world_size, more, pictures, backbone, alone, tmp_path
):
    if more is DINO:
        more = (*more, f"pixel.loss.critic.checkpoint={backbone}")
    same = tuple(x for x in more if not x.endswith(("micro_batch=1", "workers=1", "shard=true")))
    log = tmp_path / "hashes"
    log.mkdir()
    whole = "shard=true" not in more
    workers = Workers(world_size, tmp_path / "run", pictures, [*LONG, *more], log=log if whole else None)
    assert workers.wait() == [0] * world_size
    for stage in ("semantic", "pixel"):
        one = losses(alone((*LONG, *same)), stage)
        many = losses(tmp_path / "run", stage)
        assert len(one) == len(many) == 50
        assert many == pytest.approx(one, rel=1e-5, abs=1e-5)
        if whole:
            hashes = [(log / f"{stage}-{rank}.txt").read_text() for rank in range(world_size)]
            assert len(hashes[0].splitlines()) == 50
            assert len(set(hashes)) == 1


def test_a_critic_that_is_not_wrapped_is_noticed(pictures, tmp_path):
    workers = Workers(2, tmp_path / "run", pictures, LONG, log=tmp_path, unwrapped_critic=True)
    workers.wait()
    pixel = [(tmp_path / f"pixel-{rank}.txt").read_text().splitlines() for rank in range(2)]
    assert pixel[0][:5] == pixel[1][:5]  # before the critic learns
    assert pixel[0][6] != pixel[1][6]


@pytest.mark.slow
def test_kill_9_at_twenty_moments_of_a_two_process_run_changes_no_bit(pictures, tmp_path):
    settings = [*CRITIC, "semantic.steps=150", "pixel.steps=400"]
    assert Workers(2, tmp_path / "whole", pictures, settings).wait() == [0, 0]
    moments = random.Random(0)
    run, kills = tmp_path / "killed", 0
    for number in range(20):
        # Six of them while a file is written, before or after the rename that makes it real.
        deadly = moments.randint(1, 4) if number % 3 == 2 else 0
        workers = Workers(2, run, pictures, settings, deadly_write=deadly)
        if deadly:
            codes = workers.wait()
            kills += codes[0] == -signal.SIGKILL
        else:
            time.sleep(moments.random() * 2)
            kills += any(p.exitcode is None for p in workers.processes)
            workers.kill()
    assert kills == 20
    assert Workers(2, run, pictures, settings).wait() == [0, 0]
    assert checkpoint_bytes(run) == checkpoint_bytes(tmp_path / "whole")
    for stage in ("semantic", "pixel"):
        assert (run / stage / "log.jsonl").read_bytes() == (tmp_path / "whole" / stage / "log.jsonl").read_bytes()


def test_sigterm_to_one_process_stops_all_after_the_same_step(pictures, tmp_path):
    assert len(SETTINGS) > 0
    workers = Workers(2, tmp_path / "run", pictures, ["semantic.steps=4000"])
    log = tmp_path / "run" / "semantic" / "log.jsonl"
    while not log.exists() or not log.stat().st_size:
        time.sleep(0.02)
    workers.processes[1].terminate()
    assert workers.wait() == [128 + signal.SIGTERM] * 2
    assert len(list((tmp_path / "run" / "semantic").glob("step-*.pt"))) in (1, 2)
