"""`semhitok analyze` tells a tokenizer whose codes know pixels from one whose codes do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from semhitok.cli import main
from semhitok.config import preset
from semhitok.data.images import list_images, read_image, save_png, tiles, whole_tiles
from semhitok.demo.photographs import write_photographs
from semhitok.evaluation.analyze import (
    Tokens,
    analyze,
    collect,
    distances,
    explained_variance,
    ownership,
    usage_by_frequency,
)
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.tokenizer import SemHiTok
from semhitok.vocabulary import Vocabulary

K, M = 32, 4


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Crops [N, 3, 64, 64] of photographs."""
    folder = write_photographs(tmp_path_factory.mktemp("photographs"))["held_out"]
    images = [whole_tiles(read_image(path), 64) for path in list_images([folder])]
    return torch.cat([tiles(x, 64)[::8] for x in images])


@pytest.fixture(scope="module")
def tokenizer(crops: Tensor) -> SemHiTok:
    """A tokenizer with random networks, the codebooks of which are set from photographs."""
    torch.manual_seed(0)
    config = preset("semhitok-tiny")
    config.num_codes, config.num_sub_codes = K, M
    model = SemHiTok(config).eval()
    with torch.no_grad():
        features = model.semantic_features(crops)
        model.semantic_head.set_statistics(features.flatten(0, 2))
        z_sem, z_pix = model.semantic_head(features).flatten(0, 2), model.encoder(crops).flatten(0, 2)
        quantizer = model.quantizer
        quantizer.semantic.initialize(z_sem, generator=seeded())
        quantizer.initialize(z_pix, quantizer.semantic(z_sem).codes, generator=seeded())
    return model


@pytest.fixture(scope="module")
def tokens(tokenizer: SemHiTok, crops: Tensor) -> Tokens:
    source = torch.arange(len(crops))
    return collect(tokenizer, zip(crops.split(7), source.split(7), strict=True))


def test_tokens_are_those_of_the_tokenizer(tokenizer: SemHiTok, crops: Tensor, tokens: Tokens) -> None:
    codes = tokenizer.encode(crops[3:5])
    per_image = codes[0].numel()
    assert torch.equal(tokens.codes[3 * per_image : 5 * per_image], codes.flatten())
    assert torch.equal(tokens.source, torch.arange(len(crops)).repeat_interleave(per_image))
    row = 4 * per_image + 16 * 5 + 9  # of image 4, row 5, column 9
    patch = crops[4, :, 20:24, 36:40].mul(255).round().to(torch.uint8)
    assert torch.equal(tokens.patches[row].view(3, 4, 4), patch)
    decoded = tokenizer.decode(codes, semantic_only=True)[1, :, 20:24, 36:40].mul(255).round().to(torch.uint8)
    assert torch.equal(tokens.decoded_semantic[row].view(3, 4, 4), decoded)
    with pytest.raises(ValueError, match="batches: expected at least one"):
        collect(tokenizer, [])


def test_even_offsets_are_analysed_as_a_fixed_size(tokenizer: SemHiTok, tokens: Tokens) -> None:
    twin = SemHiTok(dataclasses.replace(tokenizer.config, adaptive=True))
    twin.quantizer.semantic.codebook.copy_(tokenizer.quantizer.semantic.codebook)
    twin.quantizer.pix_codebook.copy_(tokenizer.quantizer.pix_codebook.flatten(0, 1))
    fixed, own = (analyze(model, tokens) for model in (tokenizer, twin))
    pairs = [result.pop("pairs") for result in (fixed, own)]
    torch.testing.assert_close(*pairs)
    for result in (fixed, own):
        for bin_ in result["sub_codes_by_frequency"]:
            bin_["perplexity"] = pytest.approx(bin_["perplexity"])
    assert own == fixed


def planted(ids: Tensor, noise: float) -> Tokens:
    """Patches that are the pattern of their id in [0, 8), and noise."""
    patterns = torch.rand(8, 12, generator=seeded()) * 200
    patches = (patterns[ids] + noise * torch.randn(len(ids), 12, generator=seeded())).clamp(0, 255).round().byte()
    nothing = torch.zeros(len(ids), 1)
    return Tokens(patches, patches, torch.zeros_like(patches), nothing, nothing, ids * M, torch.arange(len(ids)))


def test_explained_variance_is_what_was_planted() -> None:
    ids = torch.randint(8, (4000,), generator=seeded())
    tokens = planted(ids, 20)
    shares = explained_variance(tokens, Vocabulary(K, M), seeded())
    x = tokens.patches.double()
    means = torch.stack([x[ids == k].mean(0) for k in range(8)])
    within, total = (x - means[ids]).square().sum(), (x - x.mean(0)).square().sum()
    assert shares["semantic_id"]["pixels"] == pytest.approx(1 - (within / total).item(), abs=0.005)
    colour = x.view(-1, 3, 4).mean(2)
    colour_means = means.view(-1, 3, 4).mean(2)
    expected = 1 - (colour - colour_means[ids]).square().sum() / (colour - colour.mean(0)).square().sum()
    assert shares["semantic_id"]["colour"] == pytest.approx(expected.item(), abs=0.005)
    assert shares["flat_id"] == pytest.approx(shares["semantic_id"], abs=1e-3)  # there is one sub-code
    assert shares["kmeans_pixels"]["pixels"] > 0.6 and shares["decoded"]["pixels"] == 1
    assert shares["decoded_semantic"]["pixels"] < 0  # black is a worse guess than the mean
    assert abs(shares["random_id"]["pixels"]) < 0.02


def test_having_been_seen_explains_nothing() -> None:
    """With two tokens an id, in-sample means would explain half of pure noise."""
    ids = torch.arange(2000) // 2
    tokens = planted(torch.zeros(2000, dtype=torch.int64), 40)._replace(codes=ids * M)
    shares = explained_variance(tokens, Vocabulary(1000, M), seeded())
    assert shares["semantic_id"]["pixels"] < 0.02


def test_a_single_image_is_halved() -> None:
    tokens = planted(torch.randint(8, (1000,), generator=seeded()), 20)
    one = tokens._replace(source=torch.zeros(1000, dtype=torch.int64))
    assert explained_variance(one, Vocabulary(K, M), seeded())["semantic_id"]["pixels"] > 0.7


def test_analysis_tells_shuffled_codes_and_codebooks_from_real_ones(tokenizer: SemHiTok, tokens: Tokens) -> None:
    real = analyze(tokenizer, tokens)
    shares, own = real["explained_variance"], real["ownership"]
    assert shares["semantic_id"]["pixels"] > 0.3 and abs(shares["random_id"]["pixels"]) < 0.05
    assert shares["flat_id"]["pixels"] > shares["semantic_id"]["pixels"]
    assert own["all"] <= own["own"] < own["other"] and own["gain"] > 1
    assert real["distances"]["rank_correlation"] > 0.1

    # Ids dealt anew: they say nothing of their own token.
    dealt = tokens._replace(codes=tokens.codes[torch.randperm(len(tokens.codes), generator=seeded())])
    assert abs(explained_variance(dealt, Vocabulary(K, M), seeded())["semantic_id"]["pixels"]) < 0.05

    # Sub-codebooks dealt anew: the codes are as before, but what they own is another one's.
    quantizer = HierarchicalQuantizer(K, M, 16, 16)
    quantizer.load_state_dict(tokenizer.quantizer.state_dict())
    generator, gains, correlations = seeded(), [], []
    for _ in range(10):
        quantizer.pix_codebook.copy_(quantizer.pix_codebook[torch.randperm(K, generator=generator)])
        gains.append(ownership(quantizer, tokens.z_pix, tokens.codes, seeded())["gain"])
        correlations.append(distances(quantizer, tokens.codes, seeded())[0]["rank_correlation"])
    assert own["gain"] > 2 * max(map(abs, gains)) and abs(sum(gains)) / 10 < 0.5
    assert real["distances"]["rank_correlation"] > 2 * max(map(abs, correlations))


def test_usage_by_frequency_by_hand() -> None:
    # Code 0: one token. Code 1: four tokens of sub-codes 0, 0, 1, 1. Code 3: 16, all of sub-code 2.
    codes = torch.tensor([0] + [M, M, M + 1, M + 1] + [3 * M + 2] * 16)
    bins = usage_by_frequency(codes, Vocabulary(5, M))
    assert [(b["tokens_from"], b["tokens_to"], b["codes"]) for b in bins] == [(1, 3, 1), (4, 15, 1), (16, 63, 1)]
    assert [b["usage"] for b in bins] == [0.25, 0.5, 0.25]
    assert [b["perplexity"] for b in bins] == pytest.approx([1, 2, 1])
    assert [b["usage_if_even"] for b in bins] == pytest.approx([0.25, 1 - 0.75**4, 1 - 0.75**16])
    assert [b["share_of_tokens"] for b in bins] == pytest.approx([1 / 21, 4 / 21, 16 / 21])


def test_distances_by_hand() -> None:
    quantizer = HierarchicalQuantizer(4, 2, 2, 1)
    quantizer.semantic.codebook.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    quantizer.pix_codebook.copy_(torch.tensor([[[0.0], [1]], [[3], [4]], [[9], [11]], [[50], [60]]]))
    figures, pairs = distances(quantizer, torch.tensor([0, 2, 4]), seeded())  # code 3 does not occur
    assert figures["within"] == pytest.approx((1 + 1 + 2) / 3)
    # 0 and 1: (3, 2) and (2, 3); 0 and 2: (9, 8), (8, 10); 1 and 2: (6, 5), (5, 7)
    assert pairs[:, 1].tolist() == pytest.approx([2.5, 8.75, 5.75])
    assert pairs[:, 0].tolist() == pytest.approx([90, 180, 90], abs=0.1)
    assert figures["between"] == pytest.approx((2.5 + 8.75 + 5.75) / 3)
    assert figures["rank_correlation"] == pytest.approx(0.866, abs=0.001)
    assert distances(quantizer, torch.tensor([0, 2]), seeded())[1].shape == (0, 2)


def test_command_line(tokenizer: SemHiTok, crops: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "images").mkdir()
    for n in range(3):
        save_png(torch.cat([crops[2 * n], crops[2 * n + 1]], dim=2), tmp_path / f"images/{n}.png")
    (tmp_path / "images/broken.png").write_bytes(b"PNG")
    save_png(crops[0, :, :63], tmp_path / "images/small.png")
    command = ["analyze", str(tmp_path / "checkpoint"), str(tmp_path / "images"), "--device", "cpu", "--out"]
    assert main([*command, str(tmp_path / "tiled"), "--tiles", "--batch-size", "4"]) == 3
    out, err = capsys.readouterr()
    assert "broken.png" in err and "small.png: expected at least 64 pixels a side, got 64 x 63" in err
    assert out.startswith("3 images, 1,536 tokens")
    figures = json.loads((tmp_path / "tiled/analysis.json").read_text())
    assert figures["tokens"] == 1536 and figures["codebook_sha256"] == tokenizer.codebook_hash
    assert f"{figures['explained_variance']['semantic_id']['pixels']:.3f}" in out
    drawn = {path.name for path in (tmp_path / "tiled").glob("*.png")}
    assert drawn == {
        "semantic_map.png", "nearest_patches.png", "explained_variance.png", "sub_code_usage.png",
        "sub_codebook_distances.png",
    }  # fmt: skip
    assert main([*command, str(tmp_path / "cropped")]) == 3
    assert json.loads((tmp_path / "cropped/analysis.json").read_text())["tokens"] == 4 * 256
    assert main([*command[:2], str(tmp_path / "images/broken.png"), *command[3:], str(tmp_path / "none")]) == 2
    assert "none of 1 image could be read" in capsys.readouterr().err
