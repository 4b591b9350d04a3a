"""Networks of transformers as teachers: their maps, checkpoints with them, and what is refused."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import small_config

from semhitok.config import TeacherConfig
from semhitok.models.teacher import Teacher
from semhitok.tokenizer import SemHiTok

transformers = pytest.importorskip("transformers")

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Class of the configuration, tokens before those of patches, whether it takes images of other sizes.
VISION_CONFIGS = [
    ("SiglipVisionConfig", 0, True),
    ("CLIPVisionConfig", 1, True),
    ("Aimv2VisionConfig", 0, False),
    ("Dinov2Config", 1, True),
    ("Dinov2WithRegistersConfig", 5, True),
    ("DINOv3ViTConfig", 5, True),
]


def save(folder, config, processor={"image_mean": MEAN, "image_std": STD}):  # noqa: B006
    """A model with random weights, and its image processor, as the Hub would give them."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def vision_config(name):
    registers = {"num_register_tokens": 4} if name in ("Dinov2WithRegistersConfig", "DINOv3ViTConfig") else {}
    return getattr(transformers, name)(**VISION, **registers)


def images(size=32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def maps(model, x, block, prefix, **more):
    """The map [B, h, w, C] of a block, by a direct call."""
    inputs = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    tokens = model(pixel_values=inputs, output_hidden_states=True, **more).hidden_states[1:][block][:, prefix:]
    return tokens.unflatten(1, (x.shape[-1] // 8, x.shape[-1] // 8))


@pytest.mark.parametrize(("name", "prefix", "any_size"), VISION_CONFIGS)
def test_the_map_is_that_of_a_block(name, prefix, any_size, tmp_path):
    model, verbosity = save(tmp_path, vision_config(name)), transformers.utils.logging.get_verbosity()
    for block in (0, -1):
        teacher = Teacher(TeacherConfig(f"transformers:{tmp_path}", image_size=32, block=block), 4)
        assert teacher.width == 24 and not teacher.stored and not any(p.requires_grad for p in teacher.parameters())
        torch.testing.assert_close(teacher(images()), maps(model, images(), block, prefix), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"teacher.block: expected -3\.\.2 for 'transformers:.*, got 3"):
        Teacher(TeacherConfig(f"transformers:{tmp_path}", image_size=32, block=3), 4)
    larger = TeacherConfig(f"transformers:{tmp_path}", image_size=48)
    if any_size:
        more = {"interpolate_pos_encoding": True} if name in ("SiglipVisionConfig", "CLIPVisionConfig") else {}
        torch.testing.assert_close(Teacher(larger, 6)(images(48)), maps(model, images(48), -2, prefix, **more))
    else:
        with pytest.raises(ValueError, match="for images of 48 pixels"):
            Teacher(larger, 6)
    assert transformers.utils.logging.get_verbosity() == verbosity


@pytest.mark.parametrize(("family", "prefix"), [("Siglip", 0), ("CLIP", 1), ("Aimv2", 0)])
def test_of_images_and_text_the_vision_part_is_taken(family, prefix, tmp_path, capfd):
    vision = getattr(transformers, f"{family}VisionConfig")(**VISION).to_dict()
    model = save(tmp_path, getattr(transformers, f"{family}Config")(text_config=TEXT, vision_config=vision))
    capfd.readouterr()
    teacher = Teacher(TeacherConfig(f"transformers:{tmp_path}", image_size=32), 4)
    assert torch.equal(teacher(images()), maps(model.vision_model, images(), -2, prefix))
    assert not any("text" in name for name in teacher.state_dict())
    assert "UNEXPECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_vision_part_saved_alone_may_have_the_prefix_it_has_in_the_whole(prefix, tmp_path):
    model = save(tmp_path, vision_config("SiglipVisionConfig"))
    state = {prefix + k: v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    teacher = Teacher(TeacherConfig(f"transformers:{tmp_path}", image_size=32), 4)
    assert torch.equal(teacher(images()), maps(model, images(), -2, 0))


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_tokenizer_with_it_is_saved_and_loaded(pretrained, tmp_path):
    save(tmp_path / "teacher", vision_config("DINOv3ViTConfig"))
    if not pretrained:
        (tmp_path / "teacher/model.safetensors").unlink()  # the configuration is enough
    config = small_config()
    config.teacher = TeacherConfig(f"transformers:{tmp_path / 'teacher'}", pretrained=pretrained, image_size=32)
    torch.manual_seed(1)
    tokenizer = SemHiTok(config).eval()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    stored = any(k.startswith("teacher.") for k in load_file(tmp_path / "tokenizer/model.safetensors"))
    assert stored is not pretrained
    loaded, x = SemHiTok.from_pretrained(tmp_path / "tokenizer"), images()
    assert torch.equal(loaded.semantic_features(x), tokenizer.semantic_features(x))
    codes = loaded.encode(x)
    assert torch.equal(codes, tokenizer.encode(x)) and codes.shape == (2, 4, 4)
    blind = SemHiTok.from_pretrained(tmp_path / "tokenizer", teacher=False)
    assert torch.equal(blind.decode(codes), tokenizer.decode(codes))


def refused(folder, error, message, **settings):
    with pytest.raises(error, match=message):
        Teacher(TeacherConfig(f"transformers:{folder}", **{"image_size": 32, **settings}), 4)


def test_models_that_are_not_available(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", OSError, "teacher: 'transformers:nobody/nothing' is not available")
    refused(tmp_path / "none", OSError, f"teacher: 'transformers:{tmp_path / 'none'}' is not available")
    refused(tmp_path, ValueError, "teacher: expected a Vision Transformer .* config.json")
    save(tmp_path / "a", vision_config("SiglipVisionConfig"))
    (tmp_path / "a/preprocessor_config.json").unlink()
    refused(tmp_path / "a", OSError, "is not available: .*image processor")
    model = save(tmp_path / "b", vision_config("SiglipVisionConfig"))
    (tmp_path / "b/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "b/pytorch_model.bin")  # never read, as it is a pickle
    refused(tmp_path / "b", OSError, "is not available: .*model.safetensors")
    save(tmp_path / "c", vision_config("SiglipVisionConfig"))
    (tmp_path / "c/model.safetensors").write_bytes((tmp_path / "c/model.safetensors").read_bytes()[:-100])
    refused(tmp_path / "c", OSError, "is not available: ")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: transformers.BertConfig(**TEXT), "expected a Vision Transformer of transformers for images of 32"),
        (lambda: transformers.Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16), "spatial_shapes"),
        (lambda: transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 2],
                                         window_size=4), r"expected \[1, 64 or more, C\] after each block"),
        (lambda: transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2), "expected a Vision"),
    ],
    ids=["text", "packed", "windows", "convolutions"],
)  # fmt: skip
def test_other_networks_are_refused(config, message, tmp_path):
    save(tmp_path, config())
    refused(tmp_path, ValueError, message)


def test_wrong_settings_and_missing_parts(tmp_path):
    save(tmp_path, vision_config("SiglipVisionConfig"), {"image_mean": MEAN})
    refused(tmp_path, ValueError, "expected image_mean and image_std of its image processor, got .*image_mean")
    save(tmp_path, vision_config("SiglipVisionConfig"))
    refused(tmp_path, ValueError, r"teacher.checkpoint: expected None .*, got 'a.pth'", checkpoint="a.pth")
    refused(tmp_path, ValueError, "teacher.options: expected only revision .*'trust_remote_code': True",
            options={"trust_remote_code": True})  # fmt: skip
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.layers.1.mlp.fc1.bias"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, ValueError, "no weights for encoder.layers.1.mlp.fc1.bias")


def test_no_code_of_a_folder_is_run(tmp_path):
    save(tmp_path, vision_config("SiglipVisionConfig"))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    for model_type in ("evil", config["model_type"]):
        remote = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}}
        (tmp_path / "config.json").write_text(json.dumps({**config, **remote, "model_type": model_type}))
        if model_type == "evil":
            refused(tmp_path, ValueError, "expected a Vision Transformer of transformers")
        else:
            Teacher(TeacherConfig(f"transformers:{tmp_path}", image_size=32), 4)
    assert not (tmp_path / "owned").exists()


def test_without_transformers_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(tmp_path, ImportError, r"transformers is not installed: pip install \"semhitok\[mllm\]\"")
