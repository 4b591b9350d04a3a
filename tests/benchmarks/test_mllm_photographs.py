"""The unified model on captioned photographs: ranks by hand, the pairing against a plain one, sources, a tiny run."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("sklearn")

from mllm_runs import small_tokenizer

from benchmarks.mllm import pairing, photographs
from semhitok.data.images import save_png

COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.1), "blue": (0.1, 0.2, 1.0), "white": (1.0, 1.0, 1.0)}


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_set(folder: Path, count: int = 24) -> Path:
    """Pictures of one colour with noise, 20 x 26 pixels, and two captions of each."""
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for n in range(count):
        name, colour = list(COLOURS.items())[n % 4]
        noise = 0.2 * torch.rand(3, 20, 26, generator=draw(n))
        save_png(0.8 * torch.tensor(colour)[:, None, None] + noise, folder / f"images/{n:02}.png")
        lines += [f"{n:02}.png,A {name} thing .", f'{n:02}.png,"The thing, number {n}, is {name}"']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def as_tar(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as tar:
        tar.add(folder, ".")
    return path


# ---- ranks and the pairing ----


def test_recalls_of_known_scores() -> None:
    scores = torch.zeros(20, 20)
    for n in range(20):
        scores[n] = -torch.arange(20.0).roll(n)  # the own caption is the best
        scores[n, [n, (n + n) % 20]] = scores[n, [(n + n) % 20, n]]  # now n others are better
    expected = {"R@1": 1 / 20, "R@5": 5 / 20, "R@10": 10 / 20, "median rank": 10.5}
    assert pairing.recalls(scores) == pytest.approx(expected)
    # Equal scores count as order by chance would on average: own caption 0 shares the places 1 to 3 with two others.
    scores = torch.tensor([[1.0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [9, 9, 9, 1]])
    found = pairing.recalls(scores)
    assert found == pytest.approx({"R@1": (1 / 3 + 2) / 4, "R@5": 1, "R@10": 1, "median rank": 1.5})
    chance = pairing.recalls(torch.zeros(200, 200))
    assert chance == pytest.approx({"R@1": 0.005, "R@5": 0.025, "R@10": 0.05, "median rank": 100.5})
    for wrong in (torch.zeros(3, 4), torch.zeros(0, 0), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match="scores: expected"):
            pairing.recalls(wrong)


def test_mutual_information_is_the_ratio_to_the_mean() -> None:
    scores, others = -20 * torch.rand(4, 7, generator=draw(0)), -20 * torch.rand(5, 7, generator=draw(1))
    found = photographs.mutual_information(scores, others)
    torch.testing.assert_close(found, (scores.exp() / others.exp().mean(0)).log(), rtol=1e-4, atol=1e-4)
    # Captions that are likely for whatever photograph win by likelihood, and gain nothing here.
    own, dull = torch.eye(6), torch.arange(6) * 10.0
    assert pairing.recalls(own + dull)["R@1"] == pytest.approx(1 / 6)
    assert pairing.recalls(photographs.mutual_information(own + dull, torch.zeros(3, 6) + dull))["R@1"] == 1
    assert photographs.mutual_information(scores - 2000, others - 2000).isfinite().all()


def linked(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [N, 5] and texts [N, 8] that share three directions, in fp64."""
    z = torch.randn(count, 3, generator=draw(seed), dtype=torch.float64)
    mixes = [torch.randn(3, width, generator=draw(width), dtype=torch.float64) for width in (5, 8)]
    noise = [0.1 * torch.randn(count, width, generator=draw(seed + width), dtype=torch.float64) for width in (5, 8)]
    return z @ mixes[0] + noise[0] + 3, z @ mixes[1] + noise[1] - 1


def test_the_pairing_is_canonical_correlation_analysis() -> None:
    (x, y), (test_x, test_y) = linked(300, 0), linked(40, 50)
    photograph = torch.arange(300)
    fitted = pairing.Pairing(x, y, photograph, 1e-6)
    found = fitted.scores(test_x, test_y)
    assert pairing.recalls(found)["R@5"] > 0.9
    # The plain way: whiten both sides, and decompose what is left of their covariance.
    a, b = (x - x.mean(0)) / x.std(0, correction=0), y - y.mean(0)
    white_a, white_b = (torch.linalg.inv(torch.linalg.cholesky(m.T @ m / 300)).T for m in (a, b))
    u, s, vt = torch.linalg.svd(white_a.T @ (a.T @ b / 300) @ white_b, full_matrices=False)
    images = (test_x - x.mean(0)) / x.std(0, correction=0) @ white_a @ u * s
    texts = (test_y - y.mean(0)) @ white_b @ vt.T * s
    torch.testing.assert_close(found, F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T, atol=1e-3, rtol=1e-3)
    # Two captions of a photograph are two rows with the same features.
    twice = pairing.Pairing(x, torch.cat([y, y]), torch.cat([photograph, photograph]), 0.3)
    torch.testing.assert_close(
        twice.scores(test_x, test_y), pairing.Pairing(x, y, photograph, 0.3).scores(test_x, test_y)
    )
    constant = pairing.Pairing(torch.cat([x, torch.ones(300, 1)], 1), y, photograph, 0.3)
    assert constant.scores(torch.ones(2, 6, dtype=torch.float64), test_y).isfinite().all()
    more = torch.cat([x, x @ torch.randn(5, 400, generator=draw(9), dtype=torch.float64)], 1)  # more than photographs
    assert pairing.Pairing(more, y, photograph, 0.3).scores(more, y).isfinite().all()


def test_pairs_are_found_by_words_and_not_by_chance() -> None:
    nouns, count = ["dog", "car", "lake", "girl", "ball"], 120
    kinds = torch.randint(5, (count, 2), generator=draw(0))
    captions = [[f"A {nouns[a]} near a {nouns[b]}", f"The {nouns[b]} and one {nouns[a]}"] for a, b in kinds.tolist()]
    features = F.one_hot(kinds, 5).sum(1) + 0.1 * torch.randn(count, 5, generator=draw(1))
    train, test = captions[:100], [several[0] for several in captions[100:]]
    words = pairing.Words(train, 9)
    assert words(["A dog", "nothing known"]).norm(dim=1).tolist() == pytest.approx([1, 0])
    found = pairing.pair((features[:100], features[100:]), (train, test), words)
    assert found["R@5"] > 0.9 and found["penalty"] in pairing.PENALTIES
    noise = torch.randn(count, 5, generator=draw(2))
    assert pairing.pair((noise[:100], noise[100:]), (train, test), words)["R@5"] < 0.6


# ---- data ----


def test_folders_and_tars_hold_the_same(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    found = photographs.read_photographs(folder, 16)
    assert found.images.shape == (24, 3, 16, 16) and found.images.dtype == torch.uint8
    assert found.captions[2] == ["A blue thing .", "The thing, number 2, is blue"]
    assert found.images[2].float().mean((1, 2)).argmax() == 2
    again = photographs.read_photographs(as_tar(folder), 16)
    assert torch.equal(again.images, found.images) and again.captions == found.captions
    save_png(torch.rand(3, 8, 8), folder / "images/no_caption.png")
    assert len(photographs.read_photographs(folder, 16).images) == 24


def test_a_fifth_is_held_out() -> None:
    for count, asked, test in ((1000, 200, 200), (24, 200, 4), (10, 200, 2), (1000, 50, 50)):
        train, held = photographs.split(count, asked)
        assert len(held) == test and torch.equal(torch.cat([train, held]).sort().values, torch.arange(count))
    assert torch.equal(photographs.split(1000, 200)[1], photographs.split(1000, 200)[1])


def test_bad_sources_are_named(tmp_path: Path) -> None:
    def refused(source: Path, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            photographs.read_photographs(source, 16)

    folder = write_set(tmp_path / "set", 12)
    captions = folder / "captions.txt"
    good = captions.read_text()
    for line, message in (
        ("99.png,A dog", r"set: captions.txt: expected names of images that are there, got 99.png"),
        ("no comma", "captions.txt: line 26: expected the name of an image and a caption, got 'no comma'"),
        ("01.png,", "captions.txt: line 26: expected the name of an image and a caption, got '01.png,'"),
        ("01.png,a,b", "captions.txt: line 26: expected the name of an image and a caption, got '01.png,a,b'"),
        ('01.png,"not closed', "captions.txt: line 26: unexpected end of data"),
    ):
        captions.write_text(f"{good}{line}\n")
        refused(folder, message)
    captions.write_text(good.partition("\n")[2])
    refused(folder, "captions.txt: line 1: expected the first line image,caption, got 00.png,A red thing .")
    captions.write_bytes(b"image,caption\n01.png,\xff\n")
    refused(folder, "captions.txt: expected UTF-8")
    captions.write_text("\n".join(good.splitlines()[:15]))
    refused(folder, "expected at least 10 photographs with captions, got 7")
    captions.unlink()
    refused(folder, "captions.txt", FileNotFoundError)
    refused(as_tar(folder), "set.tar: expected captions.txt, found none")
    captions.write_text(good)
    (folder / "more").mkdir()
    (folder / "more/03.png").write_bytes((folder / "images/03.png").read_bytes())
    refused(folder, "expected a name for each image, got 03.png twice")
    (folder / "more/03.png").unlink()
    (folder / "images/03.png").write_bytes(b"no image")
    refused(folder, "set: 03.png: not an image")
    refused(captions, "captions.txt: expected a folder or a tar file of photographs")
    whole = as_tar(write_set(tmp_path / "other", 12))
    whole.write_bytes(whole.read_bytes()[:-14_000])
    refused(whole, "other.tar")
    refused(tmp_path / "missing", "missing", FileNotFoundError)


def test_mirror_images_are_learnt_unless_sides_are_named() -> None:
    data = photographs.Photographs(torch.zeros(2, 3, 16, 16), [["a dog", "a dog on the Left"], ["left-over"]])
    ids, mirrored = torch.zeros(2, 2, 2, dtype=torch.int64), torch.ones(2, 2, 2, dtype=torch.int64)
    made = photographs.sources(data, ids, mirrored, photographs.Settings(), "hash")
    assert [(s.task, s.weight) for s in made] == [("understanding", 4), ("generation", 1)]
    found = [(record["caption"], int(record["codes"][0].sum())) for record in made[0].records]
    assert found == [("a dog", 0), ("a dog", 4), ("a dog on the Left", 0), ("left-over", 0)]
    (one,) = photographs.sources(data, ids, mirrored, photographs.Settings(understanding=0), "hash")
    assert one.task == "generation"


def test_tensors_are_kept_by_their_key(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Tensor]:
        calls.append(1)
        return {"x": torch.arange(3) * len(calls)}

    path = tmp_path / "x.safetensors"
    assert [photographs.kept(path, key, compute)["x"][1].item() for key in "aab"] == [1, 1, 2]
    path.write_bytes(path.read_bytes()[:-1])  # damaged
    assert photographs.kept(path, "b", compute)["x"][1].item() == 3


# ---- the script ----


def test_a_tiny_run_prints_its_table_and_continues(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    call: Callable[..., int],
    refusal: Callable[..., str],
) -> None:
    pytest.importorskip("matplotlib")
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = ["--data", as_tar(write_set(tmp_path / "set")), "--tokenizer", tmp_path / "tokenizer", "--out", out]
    command += ["--quick", "--set", "batch=8", "--set", "words=60"]
    assert call(photographs.main, *command, "--set", "steps=6") == 0
    first = capsys.readouterr()
    assert first.out.startswith((out / "table.txt").read_text())
    assert "skip" not in first.err and "20 photographs to learn from, 4 held out" in first.err
    metrics = json.loads((out / "metrics.json").read_text())
    titles = [f"linear pairing, {title}" for title in photographs.PAIRED.values()]
    assert list(metrics["rows"]) == ["chance", "unified model, log p(c | x)", "unified model, PMI", *titles]
    assert metrics["rows"]["chance"] == pytest.approx({"R@1": 1 / 4, "R@5": 1, "R@10": 1, "median rank": 2.5})
    assert metrics["photographs"] == {"train": 20, "test": 4} and 0 < metrics["nats_right"] < 100
    assert (out / "text-to-image.png").read_bytes().startswith(b"\x89PNG")
    # Called again it has nothing to encode, to train or to score, and finds the same.
    calls: list[str] = []
    monkeypatch.setattr(photographs, "encode", lambda *_: calls.append("encode"))
    monkeypatch.setattr(photographs, "log_likelihoods", lambda *_: calls.append("score"))
    (out / "table.txt").unlink()
    call(photographs.main, *command, "--set", "steps=6")
    again = capsys.readouterr()
    assert calls == [] and "joint: step" not in again.err
    assert again.out.splitlines()[:-1] == first.out.splitlines()[:-1]
    assert json.loads((out / "metrics.json").read_text())["rows"] == metrics["rows"]
    # The folder belongs to these settings.
    refused = refusal(photographs.main, *command, "--set", "steps=7")
    assert "holds another run: train.joint.steps" in refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "step=3"], "--set: expected one of test, steps"),
        (["--set", "test=1"], "--set: expected test of at least 2, got 1"),
        (["--set", "words=9"], "--set: expected words of at least 10, got 9"),
        (["--tokenizer", "missing"], "missing/config.json: no such file"),
        ([], "no_photographs"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    small_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = ["--data", "no_photographs", "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out"]
    assert message in refusal(photographs.main, *given, *arguments)
