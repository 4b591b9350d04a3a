"""The demo end to end, with so few steps that only the machinery is judged, not the pictures."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from semhitok.corpus.ids_file import load_codes
from semhitok.data.images import list_images, read_image, tiles, untile, whole_tiles
from semhitok.demo.photographs import write_photographs
from semhitok.demo.tokenizer import SIDE, UNSEEN, fidelity, seamless
from semhitok.tokenizer import SemHiTok

SETTINGS = ("pixel.steps=20",)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "-m", "semhitok", "demo", "--out", str(out), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, command


def test_metrics_have_the_promised_keys_and_sane_values(demo):
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    for part in ("held_out", "unseen"):
        row = metrics[part]
        assert 5 < row["semantic_only_psnr"] < 60 and 5 < row["psnr"] < 60 and 0 < row["ssim"] < 1
        for reference in ("block_mean", "kmeans_patches"):
            other = metrics["references"][reference][part]
            assert 15 < other["psnr"] < 60 and 0.3 < other["ssim"] < 1
    for view, size in (("semantic", 2048), ("flat", 196_608), ("group", 96)):
        assert 0 < metrics[view]["usage"] <= 1 and 1 <= metrics[view]["perplexity"] <= size
    assert metrics["seconds"]["pixel"] > 0
    assert metrics["bits_per_pixel"] == pytest.approx(math.log2(196_608) / 16)


def test_the_table_prints_the_figures_of_the_file(demo):
    out, table, _ = demo
    metrics = json.loads((out / "metrics.json").read_text())
    for part in ("held_out", "unseen"):
        assert f"{metrics[part]['psnr']:.2f}" in table and f"{metrics[part]['ssim']:.3f}" in table
    for view in ("semantic", "flat", "group"):
        assert f"{metrics[view]['usage']:.3f}" in table
    for code, shares in metrics["code_classes"].items():
        assert f"  {code} " in table and all(f"{name} {share:.0%}" in table for name, share in shares.items())


def test_frequent_codes_have_the_classes_of_their_photographs(demo):
    out = demo[0]
    tokenizer = SemHiTok.from_pretrained(out / "checkpoint")
    photographs = {
        part: [whole_tiles(read_image(p), 64) for p in list_images([out / "photographs" / part])]
        for part in ("unseen", "train", "held_out")
    }
    whole = [*photographs["unseen"], *map(lambda *x: torch.cat(x, 2), photographs["train"], photographs["held_out"])]
    counts = torch.bincount(torch.cat([tokenizer.quantizer.split(seamless(tokenizer, x))[0].flatten() for x in whole]))
    listed = json.loads((out / "metrics.json").read_text())["code_classes"]
    assert [counts[int(code)].item() for code in listed] == counts.sort(descending=True).values[:12].tolist()
    for shares in listed.values():
        assert 1 <= len(shares) <= 3 and list(shares.values()) == sorted(shares.values(), reverse=True)
        assert 0 < sum(shares.values()) < 1 + 1e-9
    assert any("cat" in name for shares in listed.values() for name in shares)


def test_seamless_ids_come_from_the_tile_in_whose_middle_they_lie():
    class Places:
        """Encodes each patch of 4 pixels as its place in the tile, for tiles of 16 pixels."""

        config = SimpleNamespace(image_size=16, grid_size=4)

        @staticmethod
        def encode(images):
            return torch.arange(16).view(1, 4, 4).expand(len(images), 4, 4)

    rows = torch.tensor([0, 1, 2, 1, 2, 1, 2, 3])  # 32 pixels, three tiles: all of the first but its last quarter, ...
    assert torch.equal(seamless(Places, torch.rand(3, 32, 16)), 4 * rows[:, None] + torch.arange(4))
    assert torch.equal(seamless(Places, torch.rand(3, 16, 32)), 4 * torch.arange(4)[:, None] + rows)


def test_the_semantic_branch_is_that_of_the_toy(demo):
    toy, tuned = SemHiTok.from_pretrained("semhitok-toy"), SemHiTok.from_pretrained(demo[0] / "checkpoint")
    for part in ("semantic_head", "semantic_decoder", "quantizer.semantic"):
        for (name, a), b in zip(
            toy.get_submodule(part).state_dict().items(), tuned.get_submodule(part).state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), f"{part}.{name}"
    assert not torch.equal(toy.quantizer.pix_codebook, tuned.quantizer.pix_codebook)


def test_pictures_ids_and_checkpoint_are_there(demo):
    out = demo[0]
    for name in ("reconstructions", "semantic_map", "shared_codes", "curves"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 200
            assert image.convert("L").getextrema()[0] < 100, "an empty picture"
    tokenizer = SemHiTok.from_pretrained(out / "checkpoint")
    unseen = load_codes(out / "unseen_ids.safetensors")
    tokenizer.vocabulary.check_hash(unseen.codebook_hash)
    photograph = read_image(out / "photographs" / "unseen" / "chelsea.png")
    assert torch.equal(unseen.codes[:4], tokenizer.encode(tiles(photograph[:, :192, :256], 64)[:4]))


def test_running_it_again_goes_on_and_changes_no_result(demo):
    out, _, command = demo
    before = {p.name: p.read_bytes() for p in (out / "checkpoint").iterdir()}
    metrics = json.loads((out / "metrics.json").read_text())
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert {p.name: p.read_bytes() for p in (out / "checkpoint").iterdir()} == before
    again = json.loads((out / "metrics.json").read_text())
    for volatile in ("tokens_per_second", "seconds"):
        metrics.pop(volatile), again.pop(volatile)
    assert again == metrics


@pytest.mark.parametrize("options, unseen, share", [
    ({}, {"chelsea"}, 0.25),
    ({"side": SIDE, "held_out": 1 / 3, "unseen": UNSEEN}, set(UNSEEN), 1 / 3),
])  # fmt: skip
def test_held_out_pixels_are_not_in_training(tmp_path, options, unseen, share):
    folders = write_photographs(tmp_path, **options)
    train, held_out, whole = (
        {p.name: read_image(p) for p in list_images([folders[part]])} for part in ("train", "held_out", "unseen")
    )
    assert "motorcycle_right.png" not in train
    assert len(train) == 15 - len(unseen) and train.keys() == held_out.keys()
    assert {Path(name).stem for name in whole} == unseen and not train.keys() & whole.keys()
    for name, image in train.items():
        rest = held_out[name]
        assert image.shape[1] == rest.shape[1]
        assert abs(rest.shape[2] / (image.shape[2] + rest.shape[2]) - share) < 0.01
    if "side" in options:
        assert all(min(image.shape[1:]) == SIDE for image in whole.values())


def test_tiles_and_back():
    image = torch.rand(3, 12, 20)
    parts = tiles(image, 4)
    assert parts.shape == (15, 3, 4, 4) and torch.equal(parts[6], image[:, 4:8, 4:8])
    assert torch.equal(untile(parts, 5), image)


def test_fidelity_counts_each_photograph_once():
    large, small = torch.zeros(3, 64, 64), torch.zeros(3, 16, 16)
    row = fidelity([large + 0.1, small + 0.01], [large, small])
    assert math.isclose(row["psnr"], (20 + 40) / 2, abs_tol=1e-3)
