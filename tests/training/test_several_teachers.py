"""The semantic stage with several teachers: its loss, its log, resuming; and runs from before there were several."""

import json
import shutil

import pytest
import torch
from training_processes import checkpoint_bytes, losses, small_config, write_pictures

from semhitok.data.batch import Batch
from semhitok.tokenizer import SemHiTok
from semhitok.training import log, train
from semhitok.training.semantic import SemanticStage

SECOND = "{name: test_convnext, pretrained: false, image_size: 64, block: 1, share: %s}"


def config(*more, shares=(1, 3)):
    first, second = f"model.teacher.share={shares[0]}", f"model.more_teachers=[{SECOND % shares[1]}]"
    return small_config(first, second, "semantic.steps=20", "stages=[semantic]", *more)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


def start(settings):
    """The semantic stage, images and their features, from which its statistics are."""
    torch.manual_seed(0)
    stage = SemanticStage(SemHiTok(settings.model), settings)
    images = torch.rand(4, 3, 32, 32)
    features = stage.model.semantic_features(images)
    stage.head.set_statistics(features.flatten(0, 2))
    return stage, images, features


@pytest.mark.parametrize("shares", [(1, 3), (7, 1)])
def test_loss_and_gradient_are_those_of_a_reference_in_fp64(shares):
    settings = config("semantic.cosine_weight=0.7", "semantic.l1_weight=0.4", shares=shares)
    stage, images, features = start(settings)
    predicted = torch.randn(features.shape, requires_grad=True)
    z = torch.zeros(4, 4, 4, 16)
    stage.network = lambda *_: (predicted, z, None, z.new_zeros(()))
    loss, figures, _ = stage.loss(Batch(images, 0, 4), 0)
    loss.backward()

    reference = predicted.detach().double().requires_grad_(True)
    x = features.double().flatten(0, 2)
    target = ((x - x.mean(0)) / x.std(0)).view(features.shape)
    expected, weights = [], [s / sum(shares) for s in shares]
    for n, part in enumerate((slice(0, 24), slice(24, None))):
        p, t = reference[..., part], target[..., part]
        cosine = 1 - ((p * t).sum(-1) / (p.norm(dim=-1) * t.norm(dim=-1))).mean()
        assert figures[f"cosine_{n + 1}"].item() == pytest.approx(cosine.item(), abs=1e-6)
        expected.append((cosine, (p - t).abs().mean()))
    cosine, l1 = (sum(w * e[k] for w, e in zip(weights, expected, strict=True)) for k in (0, 1))
    assert figures["cosine"].item() == pytest.approx(cosine.item(), abs=1e-6)
    assert figures["l1"].item() == pytest.approx(l1.item(), abs=1e-6)
    (0.7 * cosine + 0.4 * l1).backward()
    torch.testing.assert_close(predicted.grad.double(), reference.grad, rtol=1e-4, atol=1e-9)


def test_tables_of_features_belong_to_all_teachers():
    stage, _, _ = start(config())
    before = stage.teacher_identity()
    assert before == stage.teacher_identity()
    next(stage.model.more_teachers[0].parameters()).data += 1
    assert stage.teacher_identity() != before


def test_one_teacher_gives_the_plain_loss_to_the_bit():
    settings = small_config("model.teacher.share=0.3")
    stage, images, features = start(settings)
    predicted = torch.randn(4, 4, 4, 24, requires_grad=True)
    z = torch.zeros(4, 4, 4, 16)
    stage.network = lambda *_: (predicted, z, None, z.new_zeros(()))
    loss, figures, _ = stage.loss(Batch(images, 0, 4), 0)
    assert list(figures) == ["cosine", "l1", "commitment"]
    (gradient,) = torch.autograd.grad(loss, predicted)
    target = stage.head.standardize(features)
    cosine = 1 - torch.nn.functional.cosine_similarity(predicted, target, dim=-1).mean()
    plain = cosine + torch.nn.functional.l1_loss(predicted, target)
    assert torch.equal(loss, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain, predicted)[0])


class _Killed(BaseException):
    pass


def test_a_stopped_run_ends_with_the_same_bytes(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "LOG_EVERY", 1)
    settings = config("evaluation.every=20")
    train(settings, [pictures], tmp_path / "whole", held_out=[pictures])
    lines = (tmp_path / "whole/semantic/log.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    trained = [r for r in records if "loss" in r]
    assert trained[-1]["cosine_2"] < 0.9 * trained[0]["cosine_2"]
    for record in trained:
        assert record["cosine"] == pytest.approx((record["cosine_1"] + 3 * record["cosine_2"]) / 4, rel=1e-5)
    (held_out,) = [r for r in records if "held_out_cosine" in r]
    mean = (held_out["held_out_cosine_1"] + 3 * held_out["held_out_cosine_2"]) / 4
    assert held_out["held_out_cosine"] == pytest.approx(mean, rel=1e-5)
    after_step = SemanticStage.after_step
    for last in (5, 15):

        def killed(stage, outputs, step, seed, last=last):
            if step == last:
                raise _Killed
            return after_step(stage, outputs, step, seed)

        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr(SemanticStage, "after_step", killed)
            train(settings, [pictures], tmp_path / "killed", held_out=[pictures])
    train(settings, [pictures], tmp_path / "killed", held_out=[pictures])
    assert checkpoint_bytes(tmp_path / "killed") == checkpoint_bytes(tmp_path / "whole")
    assert (tmp_path / "killed/semantic/log.jsonl").read_text() == lines
    # The pixel stage begins from it.
    more = config("stages=[pixel]", "pixel.steps=14")
    more.start_from = str(tmp_path / "whole/checkpoint")
    train(more, [pictures], tmp_path / "pixel")
    assert losses(tmp_path / "pixel", "pixel")
    with pytest.raises(ValueError, match=r"holds another model: train\.model\.teacher\.share was 1\.0, now 2\.0"):
        train(config("evaluation.every=20", shares=(2, 3)), [pictures], tmp_path / "whole", accept_changes=True)


def test_a_run_from_before_there_could_be_several_resumes(pictures, tmp_path):
    settings = small_config("stages=[semantic]", "semantic.steps=12")
    train(settings, [pictures], tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "old")
    description = json.loads((tmp_path / "old/config.json").read_text())
    model = description["train"]["model"]
    assert model.pop("more_teachers") == [] and model["teacher"].pop("share") == 1
    (tmp_path / "old/config.json").write_text(json.dumps(description))
    for state in sorted((tmp_path / "old/semantic").glob("step-*.pt"))[1:]:
        state.unlink()
    shutil.rmtree(tmp_path / "old/checkpoint")
    train(settings, [pictures], tmp_path / "old")
    assert checkpoint_bytes(tmp_path / "old") == checkpoint_bytes(tmp_path / "whole")
    # A setting that is no longer there is another matter.
    description["train"]["model"]["colour"] = True
    (tmp_path / "old/config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="holds another run"):
        train(settings, [pictures], tmp_path / "old")
