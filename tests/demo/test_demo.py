"""The demo end to end, with so few steps that only the machinery is judged, not the pictures."""

import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image

from semhitok.corpus.ids_file import load_codes
from semhitok.data.images import list_images, read_image, tiles, untile
from semhitok.demo.photographs import write_photographs
from semhitok.demo.tokenizer import fidelity
from semhitok.tokenizer import SemHiTok

SETTINGS = ("semantic.steps=20", "semantic.continuous_steps=5", "pixel.steps=20", "pixel.continuous_steps=5")


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
    for view, size in (("semantic", 256), ("flat", 2048), ("group", 8)):
        assert 0 < metrics[view]["usage"] <= 1 and 1 <= metrics[view]["perplexity"] <= size
    assert metrics["seconds"]["semantic"] > 0 and metrics["seconds"]["pixel"] > 0
    assert metrics["bits_per_pixel"] == 11 / 16
    assert "random weights" in metrics["teacher"]


def test_the_table_prints_the_figures_of_the_file(demo):
    out, table, _ = demo
    metrics = json.loads((out / "metrics.json").read_text())
    for part in ("held_out", "unseen"):
        assert f"{metrics[part]['psnr']:.2f}" in table and f"{metrics[part]['ssim']:.3f}" in table
    for view in ("semantic", "flat", "group"):
        assert f"{metrics[view]['usage']:.3f}" in table
    assert "stand-in" in table


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
    assert torch.equal(unseen.codes[:4], tokenizer.encode(tiles(photograph[:, :256, :448], 64)[:4]))


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


def test_held_out_pixels_are_not_in_training(tmp_path):
    folders = write_photographs(tmp_path)
    train = {p.name: read_image(p) for p in list_images([folders["train"]])}
    held_out = {p.name: read_image(p) for p in list_images([folders["held_out"]])}
    assert len(train) == 14 and train.keys() == held_out.keys()
    assert "chelsea.png" not in train and "motorcycle_right.png" not in train
    for name, image in train.items():
        rest = held_out[name]
        assert image.shape[1] == rest.shape[1]
        assert abs(image.shape[2] / (image.shape[2] + rest.shape[2]) - 0.75) < 0.01


def test_tiles_and_back():
    image = torch.rand(3, 12, 20)
    parts = tiles(image, 4)
    assert parts.shape == (15, 3, 4, 4) and torch.equal(parts[6], image[:, 4:8, 4:8])
    assert torch.equal(untile(parts, 5), image)


def test_fidelity_counts_each_photograph_once():
    large, small = torch.zeros(3, 64, 64), torch.zeros(3, 16, 16)
    row = fidelity([large + 0.1, small + 0.01], [large, small])
    assert math.isclose(row["psnr"], (20 + 40) / 2, abs_tol=1e-3)
