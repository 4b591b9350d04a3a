"""Tables of fixed crops: the same training without the teacher's time, whatever happens to the files."""

import json
import os
import shutil
import signal

import pytest
import safetensors.torch
import torch
from training_processes import Workers, checkpoint_bytes, losses, small_config

from semhitok.data.images import save_png
from semhitok.data.training_images import TrainingImages
from semhitok.models.teacher import Teacher
from semhitok.tokenizer import SemHiTok
from semhitok.training import Interrupted, semantic, train
from semhitok.training.fixed import GROUP, FixedCrops, fingerprint
from semhitok.training.pixel import PixelStage
from semhitok.training.semantic import SemanticStage

FIXED = ("data.fixed=true", "pixel.steps=40")
TABLES = ("features", "semantic_codes")
COUNT = 40  # crops: two groups, the second of which is not full


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty pictures, some of another size than a crop."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for n in range(COUNT // 2):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (32, 32 + n % 3), mode="bicubic")
        save_png(image[0].clamp(0, 1), folder / f"{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("finished")
    train(small_config(*FIXED), [pictures], out)
    return out


def tables(run):
    return {name: (run / "fixed" / f"{name}.safetensors").read_bytes() for name in TABLES}


def table(run, name):
    return safetensors.torch.load_file(run / "fixed" / f"{name}.safetensors")[name]


def logs(run):
    return [(run / stage / "log.jsonl").read_bytes() for stage in ("semantic", "pixel")]


@pytest.fixture
def seen(monkeypatch):
    """The number of images in every call of a teacher."""
    calls, forward = [], Teacher.forward

    def counted(teacher, images):
        calls.append(len(images))
        return forward(teacher, images)

    monkeypatch.setattr(Teacher, "forward", counted)
    return calls


def test_the_teacher_sees_every_crop_once(pictures, finished, tmp_path, seen):
    train(small_config(*FIXED), [pictures], tmp_path)
    assert seen == [GROUP, GROUP]  # in the semantic stage; the pixel stage takes the features from there
    assert table(tmp_path, "features").shape == (COUNT, 4, 4, 24)
    seen.clear()
    train(small_config(*FIXED), [pictures], tmp_path)
    assert seen == []
    assert tables(tmp_path) == tables(finished)


def test_the_tables_hold_what_the_networks_say(pictures, finished):
    model = SemHiTok.from_pretrained(finished / "checkpoint")
    config = small_config(*FIXED)
    (whole,) = next(TrainingImages([pictures], 32, config.data, 0).batches(200, 200))
    features, codes = (table(finished, name)[whole.crops] for name in TABLES)
    assert len(whole.crops.unique()) == COUNT
    torch.testing.assert_close(features, model.semantic_features(whole.images), rtol=1e-4, atol=1e-5)
    expected = model.quantizer.split(model.encode(whole.images))[0]
    assert codes.dtype == torch.int32 and torch.equal(codes, expected.int())


def test_later_stages_train_the_same_bits_with_and_without(pictures, finished, tmp_path, seen, monkeypatch):
    config = small_config(*FIXED, "stages=[pixel, decoder]", "decoder.steps=20", "decoder.batch_size=4")
    config.start_from = str(finished / "checkpoint")
    train(config, [pictures], tmp_path / "with")
    assert seen == [GROUP, GROUP]  # the decoder stage reads the codes that the pixel stage has written
    monkeypatch.setattr(FixedCrops, "worthwhile", lambda self, config: False)
    train(config, [pictures], tmp_path / "without")
    assert not (tmp_path / "without" / "fixed").exists()
    assert checkpoint_bytes(tmp_path / "with") == checkpoint_bytes(tmp_path / "without")


def test_the_semantic_stage_learns_the_same_with_and_without(pictures, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(FixedCrops, "worthwhile", lambda self, config: False)
    train(small_config(*FIXED, "stages=[semantic]"), [pictures], tmp_path)
    assert losses(finished, "semantic") == pytest.approx(losses(tmp_path, "semantic"), rel=1e-4)


class _Killed(BaseException):
    pass


def _damage(path, how, other):
    if how == "deleted":
        path.unlink(missing_ok=True)
    elif how == "stale":
        shutil.copy(other / path.name, path)
    elif how != "there" and path.exists():
        data = bytearray(path.read_bytes())
        if how == "cut":
            del data[-9:]
        elif how == "text":
            data = b"hello\n"
        else:
            data[-3] ^= 1
        path.write_bytes(data)


@pytest.fixture(scope="module")
def other(pictures, tmp_path_factory):
    """Tables of a run with another teacher."""
    out = tmp_path_factory.mktemp("other")
    train(small_config(*FIXED, "seed=1"), [pictures], out)
    return out / "fixed"


@pytest.mark.parametrize("how", ["there", "deleted", "stale", "cut", "text", "a bit"])
def test_a_killed_run_ends_with_the_same_bytes_whatever_became_of_its_tables(
    how, pictures, finished, other, tmp_path, monkeypatch, capsys
):
    for kind, last in ((SemanticStage, 20), (PixelStage, 5), (PixelStage, 25)):
        after_step = kind.after_step

        def killed(stage, outputs, step, seed, after_step=after_step, last=last):
            if step == last:
                raise _Killed
            return after_step(stage, outputs, step, seed)

        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr(kind, "after_step", killed)
            train(small_config(*FIXED), [pictures], tmp_path)
        for name in TABLES:
            _damage(tmp_path / "fixed" / f"{name}.safetensors", how, other)
    (tmp_path / "fixed" / ".semhitok-0.tmp").touch()  # of a process that was killed while it wrote
    train(small_config(*FIXED), [pictures], tmp_path)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)
    assert logs(tmp_path) == logs(finished)
    assert table(tmp_path, "semantic_codes").equal(table(finished, "semantic_codes"))
    complaint = {
        "stale": "made from other images or by other networks", "cut": "not a whole safetensors file",
        "text": "not a whole safetensors file", "a bit": "do not match their SHA-256",
    }  # fmt: skip
    err = capsys.readouterr().err
    assert complaint.get(how, "") in err
    assert how not in ("there", "deleted") or "not used" not in err
    assert (tmp_path / "fixed" / ".semhitok-0.tmp").exists() == (how == "there")


def test_workers_read_the_same(pictures, finished, tmp_path):
    train(small_config(*FIXED, "data.workers=2"), [pictures], tmp_path)
    assert tables(tmp_path) == tables(finished)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def test_two_processes_make_the_tables_of_one(pictures, tmp_path):
    for world_size in (1, 2):
        assert Workers(world_size, tmp_path / str(world_size), pictures, FIXED).wait() == [0] * world_size
    # As one, the teacher sees the crops in the same groups.
    assert tables(tmp_path / "1")["features"] == tables(tmp_path / "2")["features"]
    for stage in ("semantic", "pixel"):
        one, many = (losses(tmp_path / run, stage) for run in "12")
        assert many == pytest.approx(one, rel=1e-4, abs=1e-5)
    before = checkpoint_bytes(tmp_path / "2")
    shutil.rmtree(tmp_path / "2" / "pixel")
    (tmp_path / "2" / "fixed" / "semantic_codes.safetensors").write_bytes(b"damaged")
    assert Workers(2, tmp_path / "2", pictures, FIXED).wait() == [0, 0]
    assert checkpoint_bytes(tmp_path / "2") == before


def test_a_signal_stops_while_a_table_is_made(pictures, finished, tmp_path, monkeypatch):
    batches = TrainingImages.fixed_batches

    def signalled(images, size):
        for batch in batches(images, size):
            yield batch
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 0 of 40 of stage semantic"):
        patch.setattr(TrainingImages, "fixed_batches", signalled)
        train(small_config(*FIXED), [pictures], tmp_path)
    assert list((tmp_path / "fixed").iterdir()) == []
    train(small_config(*FIXED), [pictures], tmp_path)
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(finished)


def test_features_that_are_too_many_are_computed_in_every_step(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(semantic, "MAX_FEATURES", COUNT * 16 * 24 * 4 - 1)
    train(small_config(*FIXED), [pictures], tmp_path)
    assert capsys.readouterr().err.count("the teacher's features of 40 fixed crops would take 0.0 GiB") == 1
    assert [path.name for path in (tmp_path / "fixed").iterdir()] == ["semantic_codes.safetensors"]


def test_a_short_stage_makes_no_table(pictures, tmp_path):
    short = ("semantic.steps=11", "semantic.continuous_steps=5", "pixel.steps=9", "pixel.continuous_steps=2")
    train(small_config(*FIXED, *short, "semantic.batch_size=4"), [pictures], tmp_path)
    assert [path.name for path in (tmp_path / "fixed").iterdir()] == ["features.safetensors"]


def test_a_run_from_before_the_setting_resumes(pictures, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "config.json"
    description = json.loads(path.read_text())
    del description["train"]["data"]["fixed"]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"train\.data\.fixed was False, now True"):
        train(small_config(*FIXED), [pictures], tmp_path)
    with pytest.raises(ValueError, match=r"train\.pixel\.steps was 40, now 41"):  # but nothing about the setting
        train(small_config("pixel.steps=41"), [pictures], tmp_path)


def test_the_fingerprint_sees_scalars_and_other_layouts():
    norm = torch.nn.BatchNorm2d(4)
    before = fingerprint(norm)
    norm.num_batches_tracked += 1
    assert fingerprint(norm) != before
    convolution = torch.nn.Conv2d(3, 4, 3)
    before = fingerprint(convolution)
    assert fingerprint(convolution.to(memory_format=torch.channels_last)) == before
