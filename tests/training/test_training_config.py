"""Configurations: YAML fills dataclasses, strictly, and the command line shows and changes them."""

import json
import os
import re
import shutil
import sys
import tarfile
import types
from dataclasses import replace

import pytest
import torch
import yaml
from training_processes import small_config, write_pictures

from semhitok.cli import main
from semhitok.config import PRESETS, TrainConfig, from_dict, override, preset_names, train_config
from semhitok.models.teacher import Teacher
from semhitok.training import train, workers


def test_the_printed_configuration_is_the_configuration(capsys, tmp_path):
    for name in preset_names():
        assert main(["train", name, "--print-config"]) == 0
        printed = capsys.readouterr().out
        path = tmp_path / f"{name}.yaml"
        path.write_text(printed)
        assert train_config(str(path)) == train_config(name)
        assert yaml.safe_load(printed)["model"]["num_codes"] == train_config(name).model.num_codes


def test_the_command_line_changes_what_a_file_says(capsys, tmp_path):
    path = tmp_path / "my.yml"
    path.write_text("pixel:\n  loss:\n    critic: {weight: 0.25}\n  optimizer: {lr: 3e-4}\nstages: [semantic]\n")
    command = ["train", str(path), "--set", "pixel.loss.critic.start=7", "--set", "stages=[semantic, pixel]"]
    assert main([*command, "--print-config"]) == 0
    config = from_dict(TrainConfig, yaml.safe_load(capsys.readouterr().out))
    assert (config.pixel.loss.critic.weight, config.pixel.loss.critic.start) == (0.25, 7)
    assert config.pixel.optimizer.lr == 3e-4 and config.stages == ["semantic", "pixel"]
    # what neither names is as the dataclasses say, the parent's before the child's
    assert config.pixel.optimizer.betas == TrainConfig().pixel.optimizer.betas == (0.9, 0.95)
    assert config.semantic == TrainConfig().semantic


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pixel: {stepps: 1}", "unknown key 'stepps'"),
        ("pixel: [1]", "config.pixel: expected an object"),
        ("pixel: {steps: many}", "config.pixel.steps: expected int, got 'many'"),
        ("pixel: {loss: {squeezenet: much}}", "config.pixel.loss.squeezenet: expected float, got 'much'"),
        ("pixel: {steps: 0}", "config.pixel.steps: expected at least 1, got 0"),
        ("semantic: {init_tokens_per_code: 0}", "config.semantic.init_tokens_per_code: expected at least 1, got 0"),
        ("pixel: {init_tokens_per_code: -1}", "config.pixel.init_tokens_per_code: expected at least 0, got -1"),
        (
            "pixel: {init_tokens_per_code: .nan}",
            r"config.pixel.init_tokens_per_code: expected a number from 0 to 1e\+12, got nan",
        ),
        ("stages: [pixel, semantic]", "stages: expected some of semantic, pixel, decoder, in this order"),
        ("stages: pixel", "config.stages: expected a list"),
        ("precision: fp16", "precision: expected one of fp32, bf16, got 'fp16'"),
        ("tracker: paper", "tracker: expected one of tensorboard, wandb, none"),
        ("pixel: {loss: {critic: {kind: film}}}", "critic.kind: expected patch or dino, got 'film'"),
        ("pixel: {loss: {critic: {blocks: [1, a]}}}", r"config.pixel.loss.critic.blocks\[1\]: expected int"),
        ("model: {teacher: {share: 0}}", "config.model.teacher.share: expected more than 0, got 0.0"),
        (
            "model: {more_teachers: [{share: .nan}]}",
            r"config.model.more_teachers\[0\].share: expected a number from 0 to 1e\+12, got nan",
        ),
        ("model: {more_teachers: [{}, {nam: a}]}", r"config.model.more_teachers\[1\]: unknown key 'nam'"),
        ("a: [", "not YAML"),
        ("a: " + "[" * 600, "not YAML: maximum recursion depth"),
        ("seed: 2001-13-45", "not YAML: month must be in"),
        ("seed: !!int ''", "not YAML"),
        ("seed: " + "9" * 5000, "not YAML: Exceeds the limit"),
        (
            "pixel: {optimizer: {lr: 1" + "0" * 400 + "}}",
            r"config.pixel.optimizer.lr: expected float, got 10+\.\.\.0+$",
        ),
        ("stages: " + "x" * 5000, r"config.stages: expected a list, got 'x+\.\.\.x+'$"),
        ("model: {teacher: {options: &a {a: *a}}}", "expected at most 100000 values, got more"),
        (
            "model: {encoder: {width: 8, depth: -1, heads: 2}}",
            "config.model.encoder.depth: expected at least 0, got -1",
        ),
        ("model: {teacher: {image_size: 0}}", "config.model.teacher.image_size: expected at least 1, got 0"),
    ],
)
def test_wrong_files_are_one_clear_line(text, message, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; libraries of other tests raise it
    try:
        with pytest.raises(ValueError, match=f"my.yaml: .*{message}"):
            train_config(str(path))
    finally:
        sys.setrecursionlimit(limit)


def test_aliases_that_would_fill_the_memory_are_refused(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    path = tmp_path / "my.yaml"
    path.write_text("model:\n  teacher:\n    options:\n      " + "\n      ".join(lines))
    with pytest.raises(ValueError, match=r"my.yaml: expected at most 100000 values, got more"):
        train_config(str(path))


def test_a_file_runs_no_code(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("seed: !!python/object/apply:os.mkdir ['owned']")
    with pytest.raises(ValueError, match="not YAML"):
        train_config(str(path))


def test_presets_state_batch_and_steps():
    for name in preset_names():
        config = train_config(name)
        text = (PRESETS / f"{name}.yaml").read_text()
        comment = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
        assert f"Global batch {config.semantic.batch_size}" in comment, name
        for number in (config.semantic.steps, config.pixel.steps):
            assert f"{number:,}" in comment or str(number) in comment, name


@pytest.mark.parametrize("name", [n for n in preset_names() if n not in ("semhitok-tiny", "semhitok-toy")])
def test_presets_name_other_teachers_that_fit(name):
    timm = pytest.importorskip("timm")
    model = train_config(name).model
    others = re.findall(r"\bvit_\w+\.\w+", "".join(re.findall("#.*", (PRESETS / f"{name}.yaml").read_text())))
    assert any("siglip" in other for other in others) and any("dinov3" in other for other in others)
    for other in others:
        assert timm.models.is_model_pretrained(other), other
        with torch.device("meta"):
            teacher = Teacher(replace(model.teacher, name=other), model.grid_size, load=False)
            maps = teacher(torch.zeros(1, 3, model.image_size, model.image_size))
        assert maps.shape == (1, model.grid_size, model.grid_size, teacher.width)


def restated(stated, default, where=""):
    """Settings of a file that are the defaults of their dataclass."""
    for key, value in stated.items():
        if isinstance(value, dict) and isinstance(default[key], dict) and default[key]:
            yield from restated(value, default[key], f"{where}{key}.")
        elif value == (list(default[key]) if isinstance(default[key], tuple) else default[key]):
            yield where + key


@pytest.mark.parametrize(("family", "module", "name"), [
    ("semhitok", "semhitok.config", "TrainConfig"), ("mllm", "semhitok.mllm.config", "MLLMTrainConfig"),
])  # fmt: skip
def test_presets_state_only_what_differs_from_the_defaults(family, module, name):
    default = getattr(pytest.importorskip(module), name)().to_dict()
    for preset in preset_names(family):
        stated = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text())
        assert list(restated(stated, default)) == [], preset


@pytest.mark.parametrize(
    ("name", "model", "teacher", "semantic", "pixel", "engine"),
    [
        ("semhitok-256", (256, 16384, 12), ("vit_large_patch16_siglip_256.webli", 256), (100_000, 512), (200_000, 256),
         ("bf16", True, False)),
        ("semhitok-256-24k", (256, 24576, 8), ("vit_large_patch16_siglip_256.webli", 256), (100_000, 512),
         (200_000, 256), ("bf16", True, False)),
        ("semhitok-256-one-gpu", (256, 16384, 12), ("vit_base_patch16_siglip_256.webli", 256), (50_000, 256),
         (100_000, 128), ("bf16", True, False)),
        ("semhitok-384", (384, 16384, 12), ("vit_so400m_patch14_siglip_384.webli", 384), (100_000, 512),
         (200_000, 256), ("bf16", True, True)),
        ("semhitok-384-24k", (384, 24576, 8), ("vit_so400m_patch14_siglip_384.webli", 384), (100_000, 512),
         (200_000, 256), ("bf16", True, True)),
        ("semhitok-tiny", (64, 256, 8), ("vit_tiny_patch16_224", 64), (200, 8), (1000, 8), ("fp32", False, False)),
    ],
)  # fmt: skip
def test_presets_are_what_their_names_say(name, model, teacher, semantic, pixel, engine):
    config = train_config(name)
    assert (config.model.image_size, config.model.num_codes, config.model.num_sub_codes) == model
    assert (config.model.teacher.name, config.model.teacher.image_size) == teacher
    assert (config.semantic.steps, config.semantic.batch_size) == semantic
    assert (config.pixel.steps, config.pixel.batch_size) == pixel
    assert (config.precision, config.compile, config.gradient_checkpointing) == engine
    critic = config.pixel.loss.critic
    assert (critic.train_from, critic.start, critic.ramp) == (16_000, 20_000, 4_000)


def test_train_says_what_is_missing(capsys, tmp_path):
    assert main(["train", "semhitok-tiny", "--out", str(tmp_path)]) == 2
    assert "IMAGES: expected, got none" in capsys.readouterr().err
    assert main(["train", "semhitok-tiny", str(tmp_path)]) == 2
    assert "--out: expected, got none" in capsys.readouterr().err
    assert main(["train", "semhitok-huge", str(tmp_path), "--out", "x"]) == 2
    assert "expected one of semhitok-256, " in capsys.readouterr().err


def test_weights_and_biases_gets_the_figures(tmp_path, monkeypatch):
    """The tracker as accelerate drives it, with a stand-in for the service's client."""
    pytest.importorskip("accelerate.tracking")  # looks for the client when it is imported
    said = []

    class Client(types.ModuleType):
        def init(self, **options):
            said.append(options)
            return types.SimpleNamespace(
                log=lambda values, step=None, **kw: said.append((step, values)), finish=lambda: said.append("finished")
            )

    monkeypatch.setitem(sys.modules, "wandb", Client("wandb"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    write_pictures(pictures)
    config = small_config("stages=[semantic]")
    override(config, "tracker=wandb")
    train(config, [pictures], tmp_path / "run")
    assert said[0]["project"] == "semhitok" and said[0]["resume"] == "allow" and said[0]["id"]
    steps = [step for step, values in (x for x in said[1:-1]) if "loss" in values]
    assert steps == [10, 20, 30, 40] and said[-1] == "finished"


SHORT = ("semantic.steps=4", "semantic.continuous_steps=2", "semantic.init_tokens_per_code=2")


def machine(monkeypatch, cores, processes=1):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("device", "cores", "processes", "expected"),
    [("cuda", 16, 1, 8), ("cuda", 8, 1, 7), ("cuda", 64, 8, 7), ("cuda", 256, 8, 8), ("cuda", 24, 8, 2),
     ("cuda", 8, 8, 1), ("cuda", 1, 1, 1), ("cpu", 64, 1, 0)],
)  # fmt: skip
def test_the_machine_decides_how_many_processes_read(monkeypatch, device, cores, processes, expected):
    machine(monkeypatch, cores, processes)
    assert workers.of_machine(device) == expected
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers.of_machine(device, processes) == expected  # as `semhitok encode` starts them


def test_full_size_presets_leave_it_to_the_machine():
    assert {train_config(name).data.workers for name in preset_names()} == {"auto"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("many", "config.data.workers: expected int or auto, got 'many'"),
        ("-1", "config.data.workers: expected at least 0, got -1"),
        ("2.5", "config.data.workers: expected int, got 2.5"),
        ("true", "config.data.workers: expected int, got True"),
        ("null", "config.data.workers: expected int, got None"),
    ],
)
def test_wrong_numbers_of_workers_are_one_clear_line(given, message, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    path.write_text(f"data: {{workers: {given}}}\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {message}")):
        train_config(str(path))
    assert main(["train", "semhitok-tiny", "--set", f"data.workers={given}", "--print-config"]) == 2
    assert message.removeprefix("config.") in capsys.readouterr().err


def test_the_printed_configuration_says_the_number(monkeypatch, tmp_path, capsys):
    def printed(*more):
        assert main(["train", "semhitok-256", "--print-config", *more]) == 0
        (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("  workers:"))
        return line

    machine(monkeypatch, 6)
    assert printed("--device", "cuda").startswith("  workers: auto  # 5 on this machine")
    assert printed("--device", "cpu").startswith("  workers: auto  # 0 on this machine")
    assert printed("--set", "data.workers=3") == "  workers: 3"
    (tmp_path / "config.json").write_text('{"train": {"data": {"workers": 2}}}')
    assert printed("--device", "cuda", "--out", str(tmp_path)) == "  workers: auto  # 2, with which the run began"


def test_a_run_keeps_the_number_it_began_with(monkeypatch, tmp_path):
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    config = small_config("stages=[semantic]", *SHORT, "semantic.checkpoint_every=2")
    data, out = [tmp_path / "pictures"], tmp_path / "run"

    def kept():
        return json.loads((out / "config.json").read_text())["train"]["data"]["workers"]

    monkeypatch.setattr(workers, "of_machine", lambda device: {"cpu": 2}[device])
    train(config, data, out)
    assert kept() == 2 and config.data.workers == "auto"
    monkeypatch.setattr(workers, "of_machine", lambda device: 5)  # on another machine
    shutil.rmtree(out / "checkpoint")
    train(config, data, out)
    assert kept() == 2 and (out / "checkpoint").is_dir()
    with pytest.raises(ValueError, match=r"holds another run: train.data.workers was 2, now 3"):
        train(replace(config, data=replace(config.data, workers=3)), data, out)
    # a run from before "auto", whose preset said 0
    saved = json.loads((out / "config.json").read_text())
    saved["train"]["data"]["workers"] = 0
    (out / "config.json").write_text(json.dumps(saved))
    train(config, data, out)
    assert kept() == 0


def test_the_machine_uses_no_more_processes_than_there_are_shards(monkeypatch, tmp_path):
    pytest.importorskip("webdataset")
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    for n in range(3):
        with tarfile.open(tmp_path / f"{n}.tar", "w") as tar:
            for path in sorted((tmp_path / "pictures").iterdir())[n::3]:
                tar.add(path, path.name)
    config = small_config("stages=[semantic]", *SHORT)
    monkeypatch.setattr(workers, "of_machine", lambda device: 8)
    train(config, [str(tmp_path / "{0..2}.tar")], tmp_path / "run")
    saved = json.loads((tmp_path / "run/config.json").read_text())
    assert saved["train"]["data"]["workers"] == 3
    with pytest.raises(ValueError, match="at least 4 shards"):
        train(replace(config, data=replace(config.data, workers=4)), [str(tmp_path / "{0..2}.tar")], tmp_path / "new")
