"""Both stages: they learn, stage 2 leaves stage 1 alone, and a stopped run ends with the same bytes."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from semhitok.config import DataConfig, OptimizerConfig, train_preset
from semhitok.data.crops import RandomCrops
from semhitok.data.images import save_png
from semhitok.tokenizer import SemHiTok
from semhitok.training import Interrupted, loop, train
from semhitok.training.pixel import PixelStage, semantic_fingerprint
from semhitok.training.semantic import SemanticStage

# A run of some seconds that still passes through every phase: continuous steps, k-means, restarts.
SETTINGS = [
    "model.image_size=32", "model.patch_size=8", "model.num_codes=16", "model.num_sub_codes=4",
    "model.teacher.image_size=32", "model.semantic_decoder.width=24",
    "model.teacher.options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "model.encoder.width=32", "model.decoder.width=32", "model.encoder.depth=1",
    "model.decoder.depth=1", "semantic.steps=40", "semantic.continuous_steps=10",
    "semantic.restart_window=10", "semantic.checkpoint_every=7", "semantic.batch_size=4",
    "pixel.steps=60", "pixel.continuous_steps=12", "pixel.restart_window=20",
    "pixel.checkpoint_every=9", "pixel.batch_size=4",
]  # fmt: skip


def small_config(*more):
    from semhitok.config import override

    config = train_preset("semhitok-tiny")
    for assignment in [*SETTINGS, *more]:
        override(config, assignment)
    return config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six smooth coloured pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for n in range(6):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (48 + 4 * n, 70), mode="bicubic")
        save_png(image[0].clamp(0, 1), folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    train(small_config(), [pictures], out)
    return out


def checkpoint_bytes(run):
    folder = run / "checkpoint"
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json")}


def test_losses_fall_and_codes_are_used(finished):
    for stage, key in (("semantic", "cosine"), ("pixel", "l1")):
        lines = (finished / stage / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == list(range(10, 10 * len(records) + 1, 10))
        assert records[-1][key] < 0.8 * records[0][key]
    assert records[4]["flat_usage"] > 0.5  # the window that ends at step 50


def test_the_pixel_stage_leaves_everything_semantic_as_it_was(finished):
    state = loop.read_state(finished / "semantic" / "state.pt")
    model = SemHiTok(small_config().model)
    model.load_state_dict(state["model"], strict=False)
    trained = SemHiTok.from_pretrained(finished / "checkpoint")
    assert semantic_fingerprint(trained) == semantic_fingerprint(model)
    for name, tensor in model.teacher.state_dict().items():
        assert torch.equal(tensor, trained.teacher.state_dict()[name])
    assert not torch.equal(trained.quantizer.pix_codebook, model.quantizer.pix_codebook)


def test_the_fingerprint_sees_a_changed_bit(finished):
    model = SemHiTok.from_pretrained(finished / "checkpoint")
    before = semantic_fingerprint(model)
    codebook = model.quantizer.semantic.codebook
    codebook.view(torch.int32)[3, 2] ^= 1
    assert semantic_fingerprint(model) != before


def test_each_stage_trains_its_own_parameters_only():
    torch.manual_seed(0)
    config = small_config()
    model = SemHiTok(config.model)
    semantic = {"semantic_head", "semantic_decoder"}
    SemanticStage(model, config.semantic)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == semantic
    PixelStage(model, config.pixel)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "decoder"}


def test_no_weight_decay_on_positions_norms_and_biases():
    config = small_config()
    model = SemHiTok(config.model)
    stage = PixelStage(model, config.pixel)
    optimizer = loop._optimizer(stage.modules, config.pixel.optimizer)
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert optimizer.param_groups[1]["weight_decay"] == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith("positions")
            assert (id(parameter) in plain) == exempt, name


def test_learning_rate_by_hand():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_share=0.1)
    rates = [loop.learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[55] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.1, abs=1e-3)


COMMAND = [sys.executable, "-m", "semhitok", "train", "semhitok-tiny"]


def start(pictures, out):
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [*COMMAND, str(pictures), "--out", str(out), "--device", "cpu", *settings]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigint_saves_and_the_same_command_ends_with_the_same_bytes(pictures, finished, tmp_path):
    for signum in (signal.SIGINT, signal.SIGTERM):
        process = start(pictures, tmp_path)
        _wait_for_steps(tmp_path, process)
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
        if process.returncode == 0:
            continue  # it was faster than the signal; the bytes below still count
        assert process.returncode == 128 + signum, err
        assert "the same command continues" in out and "Traceback" not in err
    process = start(pictures, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def test_a_signal_between_the_stages_is_not_lost(pictures, finished, tmp_path, monkeypatch):
    def stage_with_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return PixelStage(*arguments)

    monkeypatch.setattr("semhitok.training.run.PixelStage", stage_with_a_signal)
    with pytest.raises(Interrupted, match="stopped after step 1 of 60 of stage pixel") as stop:
        train(small_config(), [pictures], tmp_path)
    assert stop.value.signum == signal.SIGTERM
    monkeypatch.undo()
    train(small_config(), [pictures], tmp_path)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def _wait_for_steps(run, process):
    """Until the run has logged something new, in whatever stage it is."""
    before = _log_bytes(run)
    while _log_bytes(run) <= before and process.poll() is None:
        time.sleep(0.01)


def _log_bytes(run):
    return sum(path.stat().st_size for path in run.glob("*/log.jsonl"))


def test_sigkill_at_any_moment_ends_with_the_same_bytes(pictures, finished, tmp_path):
    moments = random.Random(0)
    kills = 0
    for _ in range(4):
        process = start(pictures, tmp_path)
        _wait_for_steps(tmp_path, process)
        time.sleep(moments.random() * 0.5)
        kills += process.poll() is None
        process.kill()
        process.communicate()
    assert kills > 0
    process = start(pictures, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)
    for stage in ("semantic", "pixel"):
        assert (tmp_path / stage / "log.jsonl").read_bytes() == (finished / stage / "log.jsonl").read_bytes()


class _Killed(BaseException):
    pass


def test_a_kill_while_the_state_is_written_loses_nothing(pictures, finished, tmp_path, monkeypatch):
    """Die at every write in turn, before and after the rename that makes it real."""
    real_replace = os.replace
    for deadly in range(1, 9):
        writes = 0

        def replace(source, target, deadly=deadly):
            nonlocal writes
            writes += 1
            if writes == deadly and deadly % 2:
                raise _Killed
            real_replace(source, target)
            if writes == deadly:
                raise _Killed

        monkeypatch.setattr(os, "replace", replace)
        with contextlib.suppress(_Killed):
            train(small_config(), [pictures], tmp_path)
        monkeypatch.setattr(os, "replace", real_replace)
    train(small_config(), [pictures], tmp_path)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def test_a_run_refuses_other_settings_and_other_images(pictures, finished, tmp_path):
    with pytest.raises(ValueError, match=r"holds another run: train\.pixel\.steps was 60, now 61"):
        train(small_config("pixel.steps=61"), [pictures], finished)
    save_png(torch.zeros(3, 40, 40), tmp_path / "one.png")
    with pytest.raises(ValueError, match="holds another run: images was 6, now 1"):
        train(small_config(), [tmp_path], finished)


@pytest.mark.parametrize("kind", ["truncated", "text", "other stage", "empty"])
def test_a_damaged_state_is_a_clear_error(pictures, finished, tmp_path, kind):
    (tmp_path / "semantic").mkdir()
    state = tmp_path / "semantic" / "state.pt"
    good = (finished / "semantic" / "state.pt").read_bytes()
    if kind == "truncated":
        state.write_bytes(good[: len(good) // 2])
    elif kind == "text":
        state.write_text("hello\n")
    elif kind == "empty":
        state.write_bytes(b"")
    else:
        state.write_bytes((finished / "pixel" / "state.pt").read_bytes())
    with pytest.raises(ValueError, match=r"state\.pt: (not a whole training state|expected stage)"):
        train(small_config(), [pictures], tmp_path)


def test_loading_a_state_runs_no_code_from_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"stage": "semantic", "step": 1, "model": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a whole training state"):
        loop.read_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_stops_with_the_step(pictures, tmp_path):
    config = small_config("semantic.optimizer.lr=1e30", "semantic.optimizer.grad_clip=1e30")
    with pytest.raises(FloatingPointError, match=r"semantic: loss .* at step"):
        train(config, [pictures], tmp_path)


def test_crops_are_a_function_of_seed_and_number(pictures):
    paths = sorted(pictures.iterdir())
    config = DataConfig(crop_scale=(0.5, 1.0))
    first, second = RandomCrops(paths, 24, config, 3), RandomCrops(paths, 24, config, 3)
    order = [11, 2, 40, 0]
    crops = {n: first[n] for n in order}
    for n in sorted(order):
        assert torch.equal(second[n], crops[n])
        assert crops[n].shape == (3, 24, 24) and 0 <= crops[n].min() <= crops[n].max() <= 1
    other = RandomCrops(paths, 24, config, 4)
    assert not torch.equal(other[11], crops[11])


def test_every_epoch_sees_each_image_once(pictures):
    paths = sorted(pictures.iterdir())
    data = RandomCrops(paths, 16, DataConfig(), 0)
    seen = []
    original = data._load
    data._load = lambda index: (seen.append(index), original(index))[1]
    for n in range(18):
        data[n]
    assert [sorted(seen[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
    assert seen[:6] != seen[6:12] or seen[6:12] != seen[12:]


def test_unreadable_training_images_are_named_and_skipped(pictures, tmp_path, capsys):
    good = sorted(pictures.iterdir())[0]
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    data = RandomCrops([bad, good], 16, DataConfig(), 0)
    assert torch.stack([data[n] for n in range(4)]).shape == (4, 3, 16, 16)
    assert capsys.readouterr().err.count("bad.png") == 1
    with pytest.raises(ValueError, match="none of the 1 images can be read"):
        RandomCrops([bad], 16, DataConfig(), 0)[0]


def test_small_images_are_enlarged_to_a_crop(tmp_path):
    save_png(torch.full((3, 1, 1), 0.5), tmp_path / "dot.png")
    data = RandomCrops([tmp_path / "dot.png"], 16, DataConfig(crop_scale=None), 0)
    assert (data[0] - 0.5).abs().max() < 0.01


def test_perceptual_loss_without_weights_or_package_says_so():
    code = (
        "from semhitok.training.pixel import perceptual_loss\n"
        "try: perceptual_loss()\n"
        "except (ImportError, OSError) as error: print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "TORCH_HOME": "/nonexistent"}
    )
    assert 'pip install "semhitok[train]"' in done.stdout or "LPIPS weights cannot be had" in done.stdout, done


def test_the_perceptual_loss_joins_the_pixel_loss_and_is_not_trained(pictures, monkeypatch):
    lpips = pytest.importorskip("lpips")
    # the real network with random weights: its own cannot be counted on to be here
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr("semhitok.training.pixel.perceptual_loss", lambda: network)
    config = small_config("pixel.perceptual_weight=0.5", "pixel.drop=0")
    torch.manual_seed(0)
    model = SemHiTok(config.model)
    stage = PixelStage(model, config.pixel)
    images = torch.rand(2, 3, 32, 32)
    loss, figures = stage.loss(images, 1000, torch.Generator())
    parts = config.pixel
    by_hand = (
        parts.l1_weight * figures["l1"]
        + parts.l2_weight * figures["l2"]
        + parts.commitment_weight * figures["commitment"]
        + 0.5 * figures["perceptual"]
    )
    torch.testing.assert_close(loss, by_hand)
    assert figures["perceptual"] > 0
    (gradient,) = torch.autograd.grad(figures["perceptual"], model.decoder.to_pixels.weight)
    assert gradient.abs().sum() > 0
    assert not any(p.requires_grad for p in network.parameters())
