"""The demo of the unified model, in little: all of its parts run, go on when called again, and leave their figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from semhitok.demo import scenes
from semhitok.demo.teacher import logit_sizes, scenes_lesson

demo = pytest.importorskip("semhitok.demo.mllm", reason="needs transformers")


def test_a_lesson_of_scenes() -> None:
    some = scenes.pictures(0, 0, 40, "train", 64)
    lesson = scenes_lesson(some)
    assert torch.equal(lesson.words.sum((1, 2)), torch.full((40,), 5.0)) and lesson.words[:, 1].sum(1).eq(1).all()
    torch.testing.assert_close(lesson.regions.sum(-1), torch.ones(40, 2))
    assert (lesson.regions.prod(1) == 0).all()  # a token lies in one region
    assert torch.equal(lesson.labels[:, 0], some.labels[:, :3]) and lesson.labels[:, 1].eq(-1).all()
    assert logit_sizes(lesson) == [7, 9, 4, 5]
    # The object's colour covers its region: there pixels differ from the background's, and hardly elsewhere.
    patches = torch.nn.functional.avg_pool2d(some.images.float(), 8).flatten(2)
    corner = patches[..., [0, 7, 56, 63]].median(-1, keepdim=True).values
    away = (patches - corner).abs().sum(1)
    near, far = (away * lesson.regions[:, 0]).sum(1), (away * lesson.regions[:, 1]).sum(1)
    assert (near > far).float().mean() > 0.95


def test_the_demo_in_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HELD_OUT", 4)
    monkeypatch.setattr(demo, "TEACHER_STEPS", 12)
    monkeypatch.setattr(demo, "TEACHER_BATCH", 4)
    monkeypatch.setattr(demo, "READER_STEPS", 4)
    tokenizer, model = demo.tokenizer_config(), demo.model_config()
    tokenizer.model.num_codes = tokenizer.model.num_sub_codes = 4
    tokenizer.semantic.steps, tokenizer.semantic.continuous_steps = 4, 2
    tokenizer.pixel.steps, tokenizer.pixel.continuous_steps = 4, 2
    tokenizer.semantic.batch_size = tokenizer.pixel.batch_size = 8
    model.joint.steps, model.joint.batch_size = 3, 2
    text = demo.demo(tmp_path, pictures=64, tokenizer=tokenizer, model=model)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert all(0 <= metrics[key] <= 1 for key in (
        "caption_attributes", "caption_exact", "image_attributes", "image_shape", "caption_attributes_wrong_image",
        "chance",
    ))  # fmt: skip
    assert metrics["seconds"] == pytest.approx(sum(metrics["seconds_of"].values()))
    assert {"random", "comp"} <= metrics.keys() and "guidance 1.5" in metrics["comp"]["images"]
    assert f"{metrics['random']['captions']['right image']['mean']:.3f}" in text
    assert {p.name for p in tmp_path.glob("*.png")} == {"random.png", "comp.png"}
    # Called again, it has nothing to train, and says the same.
    weights = (tmp_path / "model" / "checkpoint" / "model.safetensors").stat().st_mtime_ns
    demo.demo(tmp_path, pictures=64, tokenizer=tokenizer, model=model)
    assert (tmp_path / "model" / "checkpoint" / "model.safetensors").stat().st_mtime_ns >= weights
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert {k: v for k, v in again.items() if "seconds" not in k} == {
        k: v for k, v in metrics.items() if "seconds" not in k
    }
