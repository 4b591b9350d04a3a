"""Both stages: they learn, stage 2 leaves stage 1 alone, and a stopped run ends with the same bytes."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from training_processes import CRITIC, SETTINGS, checkpoint_bytes, losses, small_config, write_pictures

from semhitok.cli import main
from semhitok.config import OptimizerConfig
from semhitok.data.images import save_png
from semhitok.tokenizer import SemHiTok
from semhitok.training import Interrupted, checkpoint, parts, run, train
from semhitok.training.decoder import DecoderStage
from semhitok.training.pixel import PixelStage
from semhitok.training.run import fingerprint, semantic_fingerprint
from semhitok.training.semantic import SemanticStage


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    train(small_config(), [pictures], out)
    return out


def test_losses_fall_and_codes_are_used(finished):
    for stage, key in (("semantic", "cosine"), ("pixel", "l1")):
        lines = (finished / stage / "log.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [r["step"] for r in records] == list(range(10, 10 * len(records) + 1, 10))
        assert records[-1][key] < 0.8 * records[0][key]
    assert records[4]["flat_usage"] > 0.5  # the window that ends at step 50


def test_the_pixel_stage_leaves_everything_semantic_as_it_was(finished):
    state = checkpoint.read_state(finished / "semantic" / "step-00000040.pt")
    torch.manual_seed(0)
    model = SemHiTok(small_config().model)
    SemanticStage(model, small_config()).network.module.load_state_dict(state["parts"]["network"]["weights"])
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
    SemanticStage(model, config)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == semantic
    PixelStage(model, config)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "decoder"}
    DecoderStage(model, config)
    trained = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}


def test_no_weight_decay_on_positions_norms_and_biases():
    config = small_config()
    model = SemHiTok(config.model)
    stage = PixelStage(model, config)
    optimizer = parts.make_optimizer(stage.network.module, config.pixel.optimizer)
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    assert optimizer.param_groups[1]["weight_decay"] == 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.endswith("positions")
            assert (id(parameter) in plain) == exempt, name


def test_learning_rate_by_hand():
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_share=0.1)
    rates = [parts.learning_rate(step, 100, config) for step in range(100)]
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
        assert "the same command resumes" in out and "Traceback" not in err
    process = start(pictures, tmp_path)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def test_a_signal_between_the_stages_is_not_lost(pictures, finished, tmp_path, monkeypatch):
    def stage_with_a_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return PixelStage(*arguments)

    monkeypatch.setitem(run.STAGES, "pixel", stage_with_a_signal)
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
    for deadly in (1, 2, 3, 4, 5, 6, 9, 10, 15, 16):
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


def test_adaptive_sizes_are_set_by_training_and_survive_a_kill(pictures, tmp_path, monkeypatch):
    """Killed before and after the sizes are set, at step 12; the log has the use of the codes."""
    config = small_config("model.adaptive=true", "pixel.steps=50", "semantic.steps=20")
    train(config, [pictures], tmp_path / "whole")
    quantizer = SemHiTok.from_pretrained(tmp_path / "whole" / "checkpoint").quantizer
    assert quantizer.sizes.sum() == 64 and quantizer.sizes.min() >= 1 and len(quantizer.sizes.unique()) > 2
    lines = (tmp_path / "whole" / "pixel" / "log.jsonl").read_text().splitlines()
    used = [record for record in map(json.loads, lines) if "group_usage" in record]
    assert used and all(record["dead_sub_codes"] == pytest.approx(1 - record["group_usage"]) for record in used)
    after_step = PixelStage.after_step
    for last in (11, 30):

        def killed(stage, outputs, step, seed, last=last):
            if step == last:
                raise _Killed
            return after_step(stage, outputs, step, seed)

        out = tmp_path / f"killed-{last}"
        shutil.copytree(tmp_path / "whole" / "semantic", out / "semantic")
        shutil.copy(tmp_path / "whole" / "config.json", out)
        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr(PixelStage, "after_step", killed)
            train(config, [pictures], out)
        train(config, [pictures], out)
        assert checkpoint_bytes(out) == checkpoint_bytes(tmp_path / "whole")
        assert (out / "pixel" / "log.jsonl").read_text().splitlines() == lines


def test_a_run_refuses_other_settings_and_other_images(pictures, finished, tmp_path):
    with pytest.raises(ValueError, match=r"holds another run: train\.pixel\.steps was 60, now 61"):
        train(small_config("pixel.steps=61"), [pictures], finished)
    with pytest.raises(ValueError, match=r"holds another model: train\.model\.num_codes was 16, now 8"):
        train(small_config("model.num_codes=8"), [pictures], finished, accept_changes=True)
    save_png(torch.zeros(3, 40, 40), tmp_path / "one.png")
    with pytest.raises(ValueError, match="holds another run: images was 6, now 1"):
        train(small_config(), [tmp_path], finished)


def test_a_run_from_before_the_squeezenet_distance_resumes(pictures, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    description = json.loads((out / "config.json").read_text())
    for stage in ("pixel", "decoder"):
        del description["train"][stage]["loss"]["squeezenet"]
    (out / "config.json").write_text(json.dumps(description))
    train(small_config(), [pictures], out)
    with pytest.raises(ValueError, match=r"train\.pixel\.loss\.squeezenet was 0\.0, now 0\.5"):
        train(small_config("pixel.loss.squeezenet=0.5"), [pictures], out)


@pytest.mark.parametrize("kind", ["truncated", "text", "other stage", "empty"])
def test_a_damaged_state_is_a_clear_error(pictures, finished, tmp_path, kind):
    (tmp_path / "semantic").mkdir()
    state = tmp_path / "semantic" / "step-00000007.pt"
    good = (finished / "semantic" / "step-00000040.pt").read_bytes()
    if kind == "truncated":
        state.write_bytes(good[: len(good) // 2])
    elif kind == "text":
        state.write_text("hello\n")
    elif kind == "empty":
        state.write_bytes(b"")
    else:
        state.write_bytes((finished / "pixel" / "step-00000060.pt").read_bytes())
    with pytest.raises(ValueError, match=r"step-00000007\.pt: (not a complete training state|expected stage)"):
        train(small_config(), [pictures], tmp_path)


def _without_averages(state):
    del state["parts"]["network"]["optimizer"]["state"]["head.layers.0.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(step=6), "expected step 7, got 6"),
        (lambda s: s.update(seconds="long"), "state.seconds: expected int, got str"),
        (lambda s: s.update(data=[]), "state.data: expected the position of each process"),
        (lambda s: s.update(data=[{"data": "shards"}]), "semantic: position: data: expected files, got shards"),
        (lambda s: s.update(parts={}), "state.parts: expected network in it, got none"),
        (
            lambda s: s["counters"].update(misses=s["counters"]["misses"][1:]),
            r"state.counters.misses: expected torch.int64",
        ),
        (lambda s: s["parts"]["network"].update(weights=[]), "network.weights: expected dict, got list"),
        (
            lambda s: s["parts"]["network"]["weights"].update(extra=torch.zeros(1)),
            "not a complete training state: .*extra",
        ),
        (_without_averages, "network.optimizer.state: expected head.layers.0.weight in it, got none"),
        (
            lambda s: s["parts"]["network"]["optimizer"]["param_groups"][0].update(betas=0.9),
            "network.optimizer.param_groups.0.betas: expected list, got float",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(pictures, finished, tmp_path, change, message):
    state = checkpoint.read_state(finished / "semantic" / "step-00000040.pt") | {"step": 7}
    change(state)
    (tmp_path / "semantic").mkdir()
    torch.save(state, tmp_path / "semantic" / "step-00000007.pt")
    with pytest.raises(ValueError, match=message) as caught:
        train(small_config(), [pictures], tmp_path)
    assert str(tmp_path / "semantic") in str(caught.value) and "\n" not in str(caught.value)


def test_states_of_two_runs_are_not_mixed(pictures, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "semantic" / "step-00000040.pt"
    state = checkpoint.read_state(path)
    state["parts"]["network"]["weights"]["quantizer.codebook"] *= -1
    torch.save(state, path)
    with pytest.raises(ValueError, match="pixel: its states are not of the same run as those of the stages before"):
        train(small_config(), [pictures], tmp_path / "run")


@pytest.mark.parametrize("text", ["[]", '{"train": []}', '{"model": 1}', "[" * 3000])
def test_a_damaged_description_of_a_run_is_refused_by_name(pictures, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    for accept in (False, True):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            train(small_config(), [pictures], tmp_path, accept_changes=accept)


def test_loading_a_state_runs_no_code_from_it(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"stage": "semantic", "step": 1, "model": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="not a complete training state"):
        checkpoint.read_state(tmp_path / "state.pt")
    assert not (tmp_path / "owned").exists()


def test_a_loss_that_is_not_finite_keeps_the_state_and_the_batch_and_goes_on_with_other_settings(pictures, tmp_path):
    hot = small_config()
    hot.semantic.optimizer.lr = hot.semantic.optimizer.grad_clip = 1e30  # refused in files, being out of range
    with pytest.raises(FloatingPointError, match=r"semantic: not finite at step \d+: loss .* --accept-changes"):
        train(hot, [pictures], tmp_path)
    (culprit,) = (tmp_path / "semantic").glob("not-finite-step-*-process-0.pt")
    batch = torch.load(culprit, weights_only=True)
    assert batch["images"].shape == (4, 3, 32, 32)
    saved = checkpoint.states(tmp_path / "semantic")[-1]
    assert saved.name == f"step-{batch['step']:08}.pt"
    state = checkpoint.read_state(saved)
    assert all(x.isfinite().all() for x in state["parts"]["network"]["weights"].values())
    with pytest.raises(ValueError, match="holds another run"):
        train(small_config(), [pictures], tmp_path)
    calm = small_config("semantic.optimizer.lr=1e-6")
    with contextlib.suppress(FloatingPointError):  # Adam's moments may be beyond saving
        train(calm, [pictures], tmp_path, accept_changes=True)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["semantic"]["optimizer"]["lr"] == 1e-6


def test_the_decoder_stage_changes_the_decoder_alone(pictures, finished, tmp_path):
    config = small_config("stages=[decoder]", "decoder.steps=20", "decoder.batch_size=4", "decoder.ema_decay=0.9")
    config.start_from = str(finished / "checkpoint")
    train(config, [pictures], tmp_path)
    before, after = (SemHiTok.from_pretrained(run / "checkpoint") for run in (finished, tmp_path))
    assert before.codebook_hash == after.codebook_hash
    for name in ("encoder", "quantizer", "semantic_head", "semantic_decoder", "teacher"):
        assert fingerprint(getattr(before, name)) == fingerprint(getattr(after, name))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(before.encode(images), after.encode(images))
    assert not torch.equal(before.reconstruct(images), after.reconstruct(images))


def test_a_finished_tokenizer_is_trained_further_from_its_own_codes(pictures, finished, tmp_path):
    """Codes that get no tokens stay as they are; k-means would set all of them."""
    settings = ("stages=[pixel]", "pixel.steps=2", "pixel.continuous_steps=0", "pixel.restart_window=100000")
    book = SemHiTok.from_pretrained(finished / "checkpoint").quantizer.pix_codebook.flatten(0, 1)
    for tokens, share in ((0, 0.0), (1, 0.9)):
        config = small_config(*settings, f"pixel.init_tokens_per_code={tokens}")
        config.start_from = str(finished / "checkpoint")
        train(config, [pictures], tmp_path / str(tokens))
        after = SemHiTok.from_pretrained(tmp_path / str(tokens) / "checkpoint").quantizer.pix_codebook.flatten(0, 1)
        changed = (after != book).any(-1).float().mean().item()
        assert changed > share if share else 0 < changed < 0.9


def test_later_stages_need_earlier_ones(pictures, finished, tmp_path):
    with pytest.raises(ValueError, match="stages: expected semantic first, or start_from"):
        train(small_config("stages=[pixel]"), [pictures], tmp_path / "a")
    with pytest.raises(ValueError, match=r"pixel\.init_tokens_per_code: expected more than 0, or start_from"):
        train(small_config("pixel.init_tokens_per_code=0"), [pictures], tmp_path / "d")
    config = small_config("stages=[pixel]", "model.num_codes=8")
    config.start_from = str(finished / "checkpoint")
    with pytest.raises(ValueError, match=r"start_from: .* is another model: model\.num_codes was 16, now 8"):
        train(config, [pictures], tmp_path / "b")
    with pytest.raises(ValueError, match=r"pixel\.continuous_steps: expected less than pixel\.steps 5, got 12"):
        train(small_config("pixel.steps=5"), [pictures], tmp_path / "c")


def test_the_command_names_a_bad_image_once_and_ends_with_3(pictures, tmp_path, monkeypatch, capfd):
    held_out, out = tmp_path / "held_out", tmp_path / "out"
    shutil.copytree(pictures, held_out)
    (held_out / "no.png").write_text("words")
    (tmp_path / "bad.png").write_text("words")
    settings = [*SETTINGS, "data.workers=2", "evaluation.every=20", "semantic.steps=20", "pixel.steps=40"]
    command = ["train", "semhitok-tiny", str(pictures), str(tmp_path / "bad.png"), "--held-out", str(held_out)]
    command += ["--out", str(out), "--device", "cpu", *(part for setting in settings for part in ("--set", setting))]
    assert main(command) == 3
    printed, err = capfd.readouterr()
    assert "skipped         2 images, named on stderr" in printed
    assert [err.count(name) for name in ("bad.png", "no.png")] == [1, 1] and err.count("skipped: ") == 2
    # A run that is finished knows it from its states.
    assert main(command) == 3
    printed, err = capfd.readouterr()
    assert "2 images, named on stderr" in printed and "bad.png" not in err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # as torchrun sets it
    assert main(command) == 0
    assert "this is 0 in place of 3, as inputs were skipped" in capfd.readouterr().err


def test_evaluation_keeps_the_best_and_the_log_and_pictures_reach_tensorboard(pictures, tmp_path, capsys):
    config = small_config("tracker=tensorboard", "evaluation.every=20", "pixel.ema_decay=0.9")
    train(config, [pictures], tmp_path, held_out=[pictures])
    records = [json.loads(x) for x in (tmp_path / "pixel" / "log.jsonl").read_text().splitlines()]
    held_out = {r["step"]: r["held_out_psnr"] for r in records if "held_out_psnr" in r}
    assert list(held_out) == [20, 40, 60]
    best = json.loads((tmp_path / "pixel" / "best" / "evaluation.json").read_text())
    assert best["psnr"] == max(held_out.values()) and held_out[best["step"]] == best["psnr"]
    tokenizer = SemHiTok.from_pretrained(tmp_path / "pixel" / "best")
    # what is published last is what the last evaluation saw
    from semhitok.data.training_images import HeldOutBatches
    from semhitok.evaluation.metrics import psnr

    last = SemHiTok.from_pretrained(tmp_path / "checkpoint")
    for model, value in ((tokenizer, best["psnr"]), (last, held_out[60])):
        ((images, count),) = HeldOutBatches([pictures], 32, 16)
        found = psnr(model.reconstruct(images[:count]), images[:count]).mean().item()
        assert found == pytest.approx(value, abs=1e-4)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "pixel"))
    events.Reload()
    assert {"loss", "gradient_norm", "flat_usage", "dead_sub_codes", "images_per_second", "data_wait",
            "held_out_psnr"} <= set(events.Tags()["scalars"])  # fmt: skip
    rates = {event.step: event.value for event in events.Scalars("lr_network")}
    optimizer = config.pixel.optimizer
    expected = {step: parts.learning_rate(step - 1, config.pixel.steps, optimizer) for step in range(10, 61, 10)}
    assert rates == pytest.approx(expected, rel=1e-6) and max(rates.values()) > 2 * min(rates.values())
    assert events.Tags()["images"]
    assert "of the time waiting for data" in capsys.readouterr().err


def test_only_the_last_states_are_kept(finished):
    assert [p.name for p in checkpoint.states(finished / "pixel")] == ["step-00000054.pt", "step-00000060.pt"]


def test_a_best_metric_that_is_not_there_is_named(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"evaluation\.best: expected one of psnr, ssim, .*, got 'beauty'"):
        train(small_config("evaluation.best=beauty"), [pictures], tmp_path, held_out=[pictures])


def test_a_collapsing_codebook_raises_the_alarm(pictures, tmp_path, capsys):
    config = small_config("stages=[semantic]")
    config.semantic.collapse_usage = 1.1  # more than there is
    train(config, [pictures], tmp_path)
    assert "warning: the semantic codebook is collapsing: after step" in capsys.readouterr().err


def test_bf16_checkpointing_and_micro_batches_train_like_the_plain_run(pictures, finished, tmp_path):
    def curve(run):
        return [json.loads(x)["loss"] for x in (run / "pixel" / "log.jsonl").read_text().splitlines()]

    train(small_config("gradient_checkpointing=true", "pixel.micro_batch=2"), [pictures], tmp_path / "same")
    assert curve(tmp_path / "same") == pytest.approx(curve(finished), rel=1e-4)
    train(small_config("precision=bf16"), [pictures], tmp_path / "bf16")
    half = curve(tmp_path / "bf16")
    assert half != curve(finished)
    assert half == pytest.approx(curve(finished), rel=0.1)


@pytest.mark.slow
def test_compiled_trunks_train_like_plain_ones(pictures, tmp_path):
    # Without quantisation but for the last step: a code that rounding changes would change what the trunks learn.
    continuous = ("semantic.continuous_steps=39", "pixel.continuous_steps=59")
    for compiled in ("true", "false"):
        train(small_config(f"compile={compiled}", *continuous), [pictures], tmp_path / compiled)
    for stage in ("semantic", "pixel"):
        assert losses(tmp_path / "true", stage) == pytest.approx(losses(tmp_path / "false", stage), rel=1e-5)


def test_a_critic_that_sees_too_little_is_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match="critic: expected to see at least 24 pixels a side, got 16"):
        train(small_config(*CRITIC, "pixel.loss.critic.layers=3", "pixel.loss.critic.shift=16"), [pictures], tmp_path)


def test_a_wrong_held_out_set_is_refused_before_training(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        train(small_config(), [pictures], tmp_path / "run", held_out=[tmp_path / "no-such-folder"])
    assert not (tmp_path / "run").exists()


def test_batches_that_do_not_divide_are_refused(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"expected a multiple of processes x micro_batch = 1 x 3, got 4"):
        train(small_config("semantic.micro_batch=3"), [pictures], tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("more", [[], ["precision=bf16", "compile=true", *CRITIC]])
def test_training_on_a_gpu_follows_the_cpu(pictures, finished, tmp_path, more):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    train(small_config(*more), [pictures], tmp_path, device="cuda")
    for stage in ("semantic", "pixel"):
        cpu, gpu = (
            [json.loads(x)["loss"] for x in (run / stage / "log.jsonl").read_text().splitlines()]
            for run in (finished, tmp_path)
        )
        assert gpu == pytest.approx(cpu, rel=0.3 if more else 0.05)
    model = SemHiTok.from_pretrained(tmp_path / "checkpoint")
    assert model.encode(torch.rand(1, 3, 32, 32)).max() < 64


@pytest.mark.parametrize(("slow", "precision", "warnings"), [(True, "bf16", 1), (True, "fp32", 0), (False, "bf16", 0)])
def test_bf16_where_it_is_slow_is_warned_of_once(pictures, tmp_path, capsys, monkeypatch, slow, precision, warnings):
    monkeypatch.setattr("semhitok.training.stage.bf16_is_slow", lambda device: slow)
    steps = ("semantic.steps=2", "semantic.continuous_steps=1", "pixel.steps=2", "pixel.continuous_steps=1")
    train(small_config(*steps, f"precision={precision}"), [pictures], tmp_path)
    assert capsys.readouterr().err.count("precision=fp32 is many times faster") == warnings
