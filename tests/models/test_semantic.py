"""The semantic head with features of several teachers, and tokenizers that have several."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_tokenizers import small_config

from semhitok.cli import main
from semhitok.config import TeacherConfig
from semhitok.corpus.encoder import encoder_hash
from semhitok.evaluation.measure import tokenizer_rows
from semhitok.models.semantic import SemanticHead
from semhitok.tokenizer import SemHiTok

# Another width than that of the first teacher, and another grid, 8 x 8.
SECOND = TeacherConfig("test_convnext", pretrained=False, image_size=64, block=1)


def tokenizer(*more, share=1.0, seed=0):
    config = small_config(more_teachers=list(more))
    config.teacher.share = share
    torch.manual_seed(seed)
    return SemHiTok(config).eval()


def images(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shares", [(1, 1), (3, 1), (0.2, 0.05, 0.75)])
def test_each_teacher_has_its_share_of_the_squared_norm(shares):
    torch.manual_seed(0)
    widths = [5, 12, 3][: len(shares)]
    head = SemanticHead(widths, 4, shares)
    features = torch.randn(4000, sum(widths)) * torch.rand(sum(widths)) * 9 + 2
    head.set_statistics(features)
    seen = []
    head.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    z = head(features)
    norms = torch.stack([part.square().sum(-1).mean() for part in seen[0].split(widths, dim=-1)])
    expected = torch.tensor(shares) / sum(shares) * sum(widths)
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=0)
    # The whole head in fp64, by the formula.
    t = (features.double() - features.double().mean(0)) / features.double().std(0)
    factors = [(s / sum(shares) * sum(widths) / w) ** 0.5 for s, w in zip(shares, widths, strict=True)]
    t = torch.cat([part * f for part, f in zip(t.split(widths, -1), factors, strict=True)], -1)
    reference = torch.nn.functional.normalize(head.layers.double()(t), dim=-1)
    torch.testing.assert_close(z.double(), reference, rtol=0, atol=1e-5)


def test_one_teacher_is_as_it_always_was():
    head = SemanticHead([5], 4, [0.3])
    assert head.shares == [1] and torch.equal(head.scale, torch.ones(5))
    assert "scale" not in head.state_dict()
    model = tokenizer()
    assert model.semantic_features(images()).stride() == model.teacher(images()).stride()  # sums depend on it
    keys = model.state_dict().keys()
    assert not any("more_teachers" in key or "scale" in key for key in keys)


def test_features_are_joined_in_order_on_one_grid():
    model, x = tokenizer(SECOND, SECOND), images()
    assert model.teacher.width == 24 and [t.width for t in model.more_teachers] == [32, 32]
    features = model.semantic_features(x)
    assert features.shape == (3, 4, 4, 24 + 32 + 32)
    parts = [model.teacher(x), *(t(x) for t in model.more_teachers)]
    assert all(torch.equal(a, b) for a, b in zip(features.split([24, 32, 32], -1), parts, strict=True))
    assert model.encode(x).shape == (3, 4, 4)
    model.train()
    assert not any(m.training for t in (model.teacher, *model.more_teachers) for m in t.modules())


def test_shares_change_the_ids_and_their_hash_but_their_sum_does_not():
    x = images()
    model, same, other = (tokenizer(replace(SECOND, share=b), share=a) for a, b in ((1, 3), (0.5, 1.5), (9, 1)))
    assert torch.equal(model.encode(x), same.encode(x)) and encoder_hash(model) == encoder_hash(same)
    assert not torch.equal(model.encode(x), other.encode(x)) and encoder_hash(model) != encoder_hash(other)
    before = encoder_hash(model)
    next(model.more_teachers.parameters()).data.add_(1)
    assert encoder_hash(model) != before


def test_the_evaluations_cosine_is_the_weighted_mean_of_the_teachers_own():
    model = tokenizer(replace(SECOND, share=3))
    uint8 = (images() * 255).round().byte()
    x = uint8.float() / 255
    _, rows = tokenizer_rows(model, uint8, pool=True)
    assert rows["pooled teacher"].shape == (3, 56)
    features = model.semantic_features(x)
    q = model.features(model.encode(x)).semantic
    pairs = [y.double().split([24, 32], -1) for y in (model.semantic_decoder(q), features)]
    first, second = (torch.cosine_similarity(p, t, dim=-1).mean((1, 2)) for p, t in zip(*pairs, strict=True))
    torch.testing.assert_close(rows["semantic_cosine"], (first + 3 * second) / 4, rtol=0, atol=1e-6)


@pytest.fixture
def fetched(tmp_path):
    """A teacher whose weights a checkpoint leaves out."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(7)
    network = timm.create_model("test_vit", img_size=32, num_classes=0, global_pool="")
    timm.models.save_for_hf(network, tmp_path / "hub", safe_serialization=True)
    return TeacherConfig(f"local-dir:{tmp_path / 'hub'}", image_size=32)


@pytest.mark.parametrize("turn", [False, True])
def test_checkpoints_hold_the_weights_of_those_teachers_that_come_from_nowhere_else(turn, fetched, tmp_path):
    model = tokenizer(*([SECOND, fetched] if turn else [fetched, SECOND]))
    model.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a/model.safetensors")
    held = {key.rpartition(".vit.")[0] for key in state if ".vit." in key}
    assert held == {"teacher", f"more_teachers.{0 if turn else 1}"}
    loaded, x = SemHiTok.from_pretrained(tmp_path / "a"), images()
    assert torch.equal(loaded.semantic_features(x), model.semantic_features(x))
    codes = loaded.encode(x)
    assert torch.equal(codes, model.encode(x))
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    blind = SemHiTok.from_pretrained(tmp_path / "a", teacher=False)
    assert torch.equal(blind.decode(codes), model.decode(codes))
    with pytest.raises(ValueError, match="teacher: expected a tokenizer with its teacher"):
        blind.encode(x)
    with pytest.raises(ValueError, match="teacher: its weights belong to the checkpoint"):
        blind.save_pretrained(tmp_path / "blind")
    lost = next(key for key in state if key.startswith("more_teachers."))
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "a/model.safetensors")
    with pytest.raises(ValueError, match=f"{lost}: expected shape .*, got no such tensor"):
        SemHiTok.from_pretrained(tmp_path / "a")


def test_a_later_teacher_alone_can_forbid_to_save_without_it(fetched, tmp_path):
    config = small_config(teacher=fetched, more_teachers=[SECOND])
    with pytest.raises(ValueError, match="teacher: its weights belong to the checkpoint"):
        SemHiTok(config, teacher=False).save_pretrained(tmp_path / "blind")


def test_a_checkpoint_from_before_there_could_be_several(tmp_path):
    model = tokenizer()
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["model"].pop("more_teachers") == [] and description["model"]["teacher"].pop("share") == 1
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert torch.equal(SemHiTok.from_pretrained(tmp_path).encode(images()), model.encode(images()))


def test_info_shows_every_teacher(tmp_path, capsys):
    tokenizer(replace(SECOND, share=3)).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["teacher.share", "1.0"] in lines
    assert ["more_teachers.0.name", "test_convnext"] in lines and ["more_teachers.0.share", "3.0"] in lines
