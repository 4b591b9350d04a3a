"""The trade-off benchmark: its own searches against brute force, its measures on planted data, a whole tiny run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import semhitok
from benchmarks.tradeoff import measures as tradeoff_measures
from benchmarks.tradeoff import run as tradeoff
from benchmarks.tradeoff import shapes
from benchmarks.tradeoff.arms import SIZES, Arm, Codes, Network, fit, nearest_pair
from semhitok.config import TeacherConfig
from semhitok.demo.scenes import cell_of_patches
from semhitok.models.teacher import Teacher

DIM = SIZES.dim


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- designs ----


def test_shared_index_takes_the_least_weighted_sum() -> None:
    z_sem, z_pix, sem, pix = random(2, 30, 6), random(2, 30, 4, seed=1), random(50, 6, seed=2), random(50, 4, seed=3)
    for scale in ((1.0, 1.0), (0.3, 2.0), (2.0, 0.0)):
        a = scale[0] ** 2 * (z_sem[..., None, :] - sem).square().sum(-1)
        b = scale[1] ** 2 * (z_pix[..., None, :] - pix).square().sum(-1)
        assert torch.equal(nearest_pair(z_sem, z_pix, sem, pix, scale), (a + b).argmin(-1))


def test_halves_of_a_pair_move_together_and_stay_normalised() -> None:
    codes = Codes(Arm("shared", 8, 2))
    z_sem, z_pix = F.normalize(random(400, DIM), dim=-1), 5 * random(400, DIM, seed=1)
    draw = torch.Generator().manual_seed(0)
    codes.initialize_pixel(z_sem, z_pix, draw)
    # both halves weigh the same: their variances are one half each
    assert [(z * s).var(0).sum().item() for z, s in zip((z_sem, z_pix), codes.scale, strict=True)] == pytest.approx(
        [0.5, 0.5]
    )
    i, p = codes.search(z_sem, z_pix)
    assert torch.equal(i, p) and torch.equal(codes.ids(i, p), i) and len(i.unique()) > 12
    codes.semantic.misses[3] = 10**6
    away = i != 3  # tokens of which none uses pair 3
    codes.update(z_sem[away], z_pix[away], i[away], i[away], {"semantic", "pixel"}, draw)
    torch.testing.assert_close(codes.semantic.codebook.norm(dim=1), torch.ones(16))
    moved = (z_sem[away] == codes.semantic.codebook[3]).all(1).nonzero()
    assert len(moved) == 1 and torch.equal(z_pix[away][moved[0, 0]], codes.pixel.pix_codebook[0, 3])


def test_ids_tell_both_parts_apart() -> None:
    z_sem, z_pix = F.normalize(random(5, 7, DIM), dim=-1), random(5, 7, DIM, seed=1)
    for kind, owned in (("independent", False), ("joint", True), ("staged", True)):
        torch.manual_seed(0)
        codes = Codes(Arm(kind, 6, 4))
        i, p = codes.search(z_sem, z_pix)
        ids = codes.ids(i, p)
        assert torch.equal(ids // 4, i) and ids.unique().numel() > 6
        for token in range(5):
            book = codes.pixel.pix_codebook[i[token, 0] if owned else 0]
            assert ids[token, 0] % 4 == (book - z_pix[token, 0]).square().sum(1).argmin()
        q_sem, q_pix = codes.vectors(i, p)
        assert torch.equal(q_sem, codes.semantic.codebook[i])
        assert torch.equal(q_pix[0, 0], codes.pixel.pix_codebook[i[0, 0] if owned else 0, ids[0, 0] % 4])


def test_ragged_sizes_add_up_and_go_where_they_help() -> None:
    """Group 0 is a point, group 1 a wide cloud, group 2 a narrow one, group 3 has no tokens."""
    codes = Codes(Arm("ragged", 4, 10))
    codes.semantic.codebook.copy_(torch.eye(4, DIM))
    group = torch.tensor([0, 1, 2]).repeat_interleave(300)
    z_pix = random(900, DIM) * torch.tensor([0.0, 2.0, 1.0])[group, None]
    codes.initialize_pixel(torch.eye(4, DIM)[group], z_pix, torch.Generator().manual_seed(0))
    sizes = codes.pixel.sizes
    assert sizes.sum() == 40 and sizes[0] == sizes[3] == 1 and sizes[1] > 2 * sizes[2] > 4
    i, p = codes.search(torch.eye(4, DIM)[group], z_pix)
    owner = torch.repeat_interleave(sizes)
    assert torch.equal(i, group) and torch.equal(owner[p], group) and torch.equal(codes.ids(i, p), p)
    q_sem, q_pix = codes.vectors(i, p)
    assert torch.equal(q_pix, codes.pixel.pix_codebook[p]) and torch.equal(q_sem, codes.semantic.codebook[i])
    for token in range(0, 900, 50):
        own = (owner == group[token]).nonzero().flatten()
        assert p[token] == own[(codes.pixel.pix_codebook[own] - z_pix[token]).square().sum(1).argmin()]
    assert torch.equal(codes.without_pixels(i, p)[0], codes.pixel.pix_codebook[0])


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    torch.manual_seed(0)
    return Teacher(TeacherConfig("vit_shapes_patch8_64", pretrained=False, image_size=64, block=-1), 8)


def test_a_stage_leaves_the_other_branch_alone(teacher: Teacher) -> None:
    images = shapes.pictures(0, 0, 600).images
    features = torch.cat([teacher(x.float() / 255) for x in images.split(100)])
    torch.manual_seed(1)
    net = Network(Arm("staged", 4, 2), teacher)
    for parts, moving, resting in (
        ({"semantic"}, [net.head, net.codes.semantic], [net.encoder, net.decoder, net.codes.pixel]),
        ({"pixel"}, [net.encoder, net.decoder], [net.head, net.semantic_decoder, net.codes.semantic]),
    ):
        before = [[x.clone() for x in module.state_dict().values()] for module in (*moving, *resting)]
        fit(net, parts, images, features, 4, 8, 0)
        same = [
            all(torch.equal(a, b) for a, b in zip(old, module.state_dict().values(), strict=True))
            for old, module in zip(before, (*moving, *resting), strict=True)
        ]
        assert same == [False] * len(moving) + [True] * len(resting)


def test_the_image_fed_branch_starts_as_the_teacher(teacher: Teacher) -> None:
    net = Network(Arm("joint", 4, 2, "image"), teacher).eval()
    images = shapes.pictures(0, 0, 4).images.float() / 255
    torch.testing.assert_close(net.z_sem(images, torch.zeros(4, 8, 8, 128)), net.head(teacher(images)))
    assert {id(p) for p in net.vit.parameters()} <= {id(p) for p in net.trained({"semantic"})}
    assert not any(p.requires_grad for p in teacher.parameters())


# ---- measures ----


def test_average_precision_by_counting() -> None:
    scores = random(40, 3).round(decimals=6)
    targets = (random(40, 3, seed=1) > 0.7).float()
    targets[:, 2] = 0  # a class that does not occur
    expected = []
    for c in range(2):
        order = scores[:, c].argsort(descending=True).tolist()
        places = [n for n, row in enumerate(order) if targets[row, c]]
        expected.append(sum((k + 1) / (n + 1) for k, n in enumerate(places)) / len(places))
    assert tradeoff_measures.average_precision(scores, targets) == pytest.approx(sum(expected) / 2)


def test_explained_variance_of_planted_groups() -> None:
    centers, ids = 3 * random(5, 192), {n: torch.randint(5, (2000,)) for n in ("probe", "test")}
    pixels = {name: centers[i] + random(2000, 192, seed=len(name)) for name, i in ids.items()}
    spread = centers[ids["test"]].var(0, correction=0).sum().item()
    assert tradeoff_measures.explained(pixels, ids) == pytest.approx(spread / (spread + 192), abs=0.01)
    shuffled = {name: i[torch.randperm(2000)] for name, i in ids.items()}
    assert abs(tradeoff_measures.explained(pixels, shuffled)) < 0.01


def test_probes_see_what_is_there_and_nothing_else() -> None:
    """Vectors that carry the shape and colour in an object's cell give them away; the same of other pictures do not."""
    labels = {"probe": shapes.pictures(1, 0, 600).labels, "test": shapes.pictures(2, 0, 200).labels}
    cell = cell_of_patches(8)
    planted = {name: of[:, cell] for name, of in labels.items()}  # [N, 8, 8, 4]
    vectors = {name: F.one_hot(x[..., :2] + 1, 9).float().flatten(3) for name, x in planted.items()}
    good = tradeoff_measures.understanding(vectors, labels, 0, 150)
    assert good["shape"] == good["colour"] == 1 and good["pair_ap"] > 0.9
    wrong = {name: x.roll(1, 0) for name, x in vectors.items()}
    bad = tradeoff_measures.understanding(wrong, labels, 0, 150)
    assert bad["shape"] < 0.3 and bad["colour"] < 0.3 and bad["pair_ap"] < 0.3
    ids = {name: x[..., 0] + 1 for name, x in planted.items()}
    assert tradeoff_measures.probe_ids(ids, labels, 7) == 1
    assert tradeoff_measures.probe_ids({n: x.roll(1, 0) for n, x in ids.items()}, labels, 7) < 0.3


def test_intervals_and_checks() -> None:
    assert tradeoff.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert math.isnan(tradeoff.interval([1.0]))
    good = {"shape": 0.9, "pair_ap": 0.8, "psnr": 22.0, "variance_semantic": 0.5, "used": 0.95}
    rows = {arm.title: [dict(good)] for arm in tradeoff.arms(256, 8, True)} | {tradeoff.TEACHER_ROW: [{"shape": 0.97}]}
    rows["semantic only, 256"][0]["psnr"] = rows["two independent, 256 x 8"][0]["psnr"] = 19.9
    rows["flat pixel codebook, 2048"][0]["shape"] = 0.3
    assert all(ok for ok, _ in tradeoff.checks(rows, 256, 8, False))
    staged = rows["hierarchical, staged, 256 x 8"][0]
    for key, bad, word in (
        ("shape", 0.87, "shape: staged"), ("pair_ap", 0.77, "pair AP"), ("psnr", 21.8, "PSNR: staged at least sem"),
        ("variance_semantic", 0.29, "pixel variance"), ("used", 0.89, "ids in use"),
    ):  # fmt: skip
        rows["hierarchical, staged, 256 x 8"] = [{**staged, key: bad}]
        missed = [what for ok, what in tradeoff.checks(rows, 256, 8, False) if not ok]
        assert len(missed) == 1 and missed[0].startswith(word)


# ---- the script ----


@pytest.mark.slow
def test_a_tiny_run_prints_its_table_and_continues(tmp_path: Path) -> None:
    small = {"pictures": 512, "probe": 64, "test": 24, "steps": 5, "batch": 8, "teacher_steps": 2, "teacher_batch": 8}
    small |= {"probe_steps": 3}
    command = [sys.executable, "-m", tradeoff.__name__, "--quick", "--out", tmp_path, "--sizes", "8", "2"]
    command += [word for name, n in small.items() for word in ("--set", f"{name}={n}")]
    environment = {**os.environ, "PYTHONPATH": str(Path(semhitok.__file__).resolve().parents[1])}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], env=environment, capture_output=True, text=True)

    first = run()
    lines = first.stdout.splitlines()
    titles = [tradeoff.TEACHER_ROW, *(arm.title for arm in tradeoff.arms(8, 2, True))]
    assert len(set(titles)) == len(titles) == 10
    table = (tmp_path / "table.txt").read_text()
    assert first.stdout.startswith(table), first.stderr
    assert [line[: max(map(len, titles))].strip() for line in table.splitlines()] == ["", *titles]
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    marks = [line.split()[0] for line in lines[-7:]]
    assert set(marks) <= {"ok", "MISS"} and first.returncode == int("MISS" in marks)
    kept = sorted((tmp_path / "results").iterdir())
    assert len(kept) == 10
    # A result that is missing is computed again, the same; the others are read.
    record = {path: json.loads(path.read_text()) for path in kept}
    (lost,) = [path for path in kept if record[path]["title"] == "hierarchical, staged, 8 x 2"]
    lost.unlink()
    second = run()
    assert f"{record[lost]['title']}, seed 0: " in second.stderr
    assert second.stderr.count(", seed 0: ") == 1
    again = json.loads(lost.read_text())["figures"]
    assert again.pop("seconds") > 0 and again == {k: v for k, v in record[lost]["figures"].items() if k != "seconds"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--set", "step=3"], "--set: expected one of pictures, probe"), (["--sizes", "8", "1"], "--sizes: expected m")],
)
def test_wrong_settings_are_named(
    arguments: list[str], message: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal(tradeoff.main, "--out", tmp_path, *arguments)
