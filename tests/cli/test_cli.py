"""The command line on good and bad files: right results, one-line errors, never a traceback."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from semhitok.cli import COMMANDS, main
from semhitok.cli.text import png_names
from semhitok.config import preset, preset_names
from semhitok.corpus.ids_file import load_codes, save_codes
from semhitok.data.images import read_image, resize_crop
from semhitok.evaluation.metrics import psnr, ssim
from semhitok.evaluation.named_images import named_images
from semhitok.tokenizer import SemHiTok
from semhitok.vocabulary import Vocabulary


def save_checkpoint(folder, seed):
    torch.manual_seed(seed)
    SemHiTok(preset("semhitok-tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0)


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return SemHiTok.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """One good image of every awkward kind."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 4), np.uint8)
    rgb = Image.fromarray(noise[..., :3])
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "photo.jpg")
    rgb.convert("L").save(folder / "grey.png")
    rgb.quantize(16).save(folder / "palette.png")
    Image.fromarray(noise).save(folder / "rgba.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "grey16.png")
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.resize((1, 1)).save(folder / "one.png")
    return folder


@pytest.fixture(scope="module")
def ids(checkpoint, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    assert main(["encode", str(checkpoint), str(photos), "--out", str(path)]) == 0
    return path


def assert_refused(result, *words):
    code, out, err = result
    assert code == 2
    assert out == ""
    assert len(err) == 1
    assert re.match(r"semhitok \w+: error: ", err[0])
    assert all(word in err[0] for word in words), err[0]


def test_encode_gives_the_tokenizers_ids(ids, tokenizer, photos):
    file = load_codes(ids)
    assert [os.path.basename(name) for name in file.names] == sorted(os.listdir(photos))
    images = torch.stack([resize_crop(read_image(name), 64) for name in file.names])
    assert torch.equal(file.codes, tokenizer.encode(images))
    assert file.vocabulary == tokenizer.vocabulary


def test_encode_does_not_depend_on_the_batch(run, checkpoint, photos, ids, tmp_path):
    out = tmp_path / "x.safetensors"
    code, text, err = run("encode", checkpoint, photos, "--out", out, "--batch-size", 3)
    assert (code, err) == (0, [])
    assert "8 images, 16 x 16 ids each" in text
    once, again = load_codes(ids), load_codes(out)
    assert again.names == once.names
    # Sums of another order may decide a near tie the other way.
    assert (again.codes == once.codes).double().mean() > 0.99


def test_encode_skips_what_it_cannot_read(run, checkpoint, photos, tmp_path):
    bad = tmp_path / "bad\x1b[31m\n.png"
    bad.write_bytes((photos / "rgb.png").read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("hello")
    out = tmp_path / "x.safetensors"
    sources = [photos / "rgb.png", bad, photos / "one.png", text]
    code, printed, err = run("encode", checkpoint, *sources, "--out", out)
    assert code == 3
    assert len(err) == 2
    assert err[0].startswith(f"semhitok encode: skipped: {tmp_path}/bad\\x1b[31m\\n.png: ")
    assert err[1] == f"semhitok encode: skipped: {text}: not an image of a known format, but text"
    assert "2 images, 16 x 16 ids each, 2 skipped" in printed
    assert load_codes(out).names == [str(photos / "rgb.png"), str(photos / "one.png")]


def test_encode_of_nothing_readable(run, checkpoint, tmp_path):
    (tmp_path / "x.png").write_text("hello")
    out = tmp_path / "x.safetensors"
    code, printed, err = run("encode", checkpoint, tmp_path / "x.png", "--out", out)
    assert (code, printed, len(err)) == (2, "", 2)
    assert err[1] == "semhitok encode: error: none of 1 image could be read"
    assert not out.exists()


def test_encode_refuses(run, checkpoint, photos, tmp_path):
    image, out = photos / "rgb.png", tmp_path / "x.safetensors"
    assert_refused(run("encode", checkpoint, tmp_path / "none", "--out", out), "none: no such file")
    assert_refused(run("encode", checkpoint, tmp_path, "--out", out), "no images found")
    assert_refused(run("encode", checkpoint, image, "--out", tmp_path / "x.png"), ".safetensors")
    missing = tmp_path / "none" / "x.safetensors"
    assert_refused(run("encode", checkpoint, image, "--out", missing), f"no folder {missing.parent}")
    assert_refused(run("encode", photos, image, "--out", out), str(photos), "config.json")
    assert_refused(run("encode", checkpoint, image, "--out", out, "--device", "abacus"), "'abacus'")
    if not torch.cuda.is_available():
        assert_refused(run("encode", checkpoint, image, "--out", out, "--device", "cuda"), "'cuda'")
    assert not out.exists()


def test_damaged_checkpoints_are_refused(run, checkpoint, photos, tmp_path):
    for name in ("model.safetensors", "config.json"):
        damaged = tmp_path / name.partition(".")[0]
        damaged.mkdir()
        for path in checkpoint.iterdir():
            content = path.read_bytes()
            kept = content[: len(content) // 2] if path.name == name else content
            (damaged / path.name).write_bytes(kept)
        for command in ("encode", "reconstruct"):
            out = tmp_path / "x.safetensors"
            assert_refused(run(command, damaged, photos / "rgb.png", "--out", out), name)
        assert_refused(run("info", damaged), name)


def test_decode_gives_the_tokenizers_images(run, checkpoint, ids, tokenizer, photos, tmp_path):
    code, printed, err = run("decode", checkpoint, ids, "--out", tmp_path / "new" / "out")
    assert (code, err) == (0, [])
    assert "8 images" in printed
    names = sorted(name.rpartition(".")[0] + ".png" for name in os.listdir(photos))
    assert sorted(os.listdir(tmp_path / "new" / "out")) == names
    expected = tokenizer.decode(load_codes(ids).codes)
    for name, image in zip(sorted(os.listdir(photos)), expected, strict=True):
        stored = read_image(tmp_path / "new" / "out" / (name.rpartition(".")[0] + ".png"))
        assert (stored - image).abs().max() <= 0.501 / 255


def test_decode_semantic_only(run, checkpoint, ids, tokenizer, tmp_path):
    assert run("decode", checkpoint, ids, "--out", tmp_path, "--semantic-only")[0] == 0
    file = load_codes(ids)
    index = [os.path.basename(name) for name in file.names].index("rgb.png")
    codes = file.codes[index : index + 1]
    stored = read_image(tmp_path / "rgb.png")
    semantic = tokenizer.decode(codes, semantic_only=True)[0]
    assert (stored - semantic).abs().max() <= 0.501 / 255
    assert (stored - tokenizer.decode(codes)[0]).abs().max() > 2 / 255


def test_decode_refuses_ids_of_another_codebook(run, other_checkpoint, ids, tmp_path):
    out = tmp_path / "out"
    assert_refused(run("decode", other_checkpoint, ids, "--out", out), str(ids), "codebook_hash")
    assert not out.exists()


def rewrite(source, target, codes=None, **metadata):
    """A copy of an ids file with other codes or metadata, as no honest writer makes it."""
    with safetensors.safe_open(source, framework="pt") as file:
        fields, stored = file.metadata(), file.get_tensor("codes")
    stored = stored if codes is None else codes
    fields = {**fields, "shape": json.dumps(list(stored.shape)), **metadata}
    target.write_bytes(safetensors.torch.save({"codes": stored}, fields))
    return target


@pytest.mark.parametrize("bad", [-1, 2048, 2**31 - 1])
def test_decode_refuses_ids_out_of_range(run, checkpoint, ids, tmp_path, bad):
    codes = load_codes(ids).codes.int()
    codes[3, 2, 1] = bad
    path = rewrite(ids, tmp_path / "x.safetensors", codes)
    result = run("decode", checkpoint, path, "--out", tmp_path / "out")
    assert_refused(result, str(path), f"codes: expected ids in [0, 2048), got {bad}")


def test_decode_refuses_other_k_m_and_grids(run, checkpoint, ids, tmp_path):
    out = tmp_path / "out"
    larger = rewrite(ids, tmp_path / "a.safetensors", num_codes="512")
    assert_refused(run("decode", checkpoint, larger, "--out", out), "num_codes", "(512, 8)")
    codes = torch.zeros(8, 4, 4, dtype=torch.int32)
    coarse = rewrite(ids, tmp_path / "b.safetensors", codes)
    assert_refused(run("decode", checkpoint, coarse, "--out", out), "[8, 4, 4]")
    assert not out.exists()


def test_decode_refuses_damaged_and_other_files(run, checkpoint, ids, photos, tmp_path):
    out, path = tmp_path / "out", tmp_path / "x.safetensors"
    content = ids.read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert_refused(run("decode", checkpoint, path, "--out", out), str(path))
    path.write_text("hello\n" * 100)
    assert_refused(run("decode", checkpoint, path, "--out", out), "not an ids file")
    weights = checkpoint / "model.safetensors"
    assert_refused(run("decode", checkpoint, weights, "--out", out), "not an ids file")
    assert_refused(run("decode", checkpoint, photos / "rgb.png", "--out", out), "not an ids file")
    assert_refused(run("decode", checkpoint, tmp_path / "none", "--out", out), "No such file")
    assert_refused(run("decode", checkpoint, ids, "--out", path), "expected a folder")
    assert not out.exists()


def test_decode_stays_in_its_folder(run, checkpoint, ids, tmp_path):
    names = ["../../evil.png", "/etc/passwd", "a/x.jpg", "b/X.png", "..", "\0", "c\\d:e.png", ""]
    path = rewrite(ids, tmp_path / "x.safetensors", names=json.dumps(names))
    out = tmp_path / "deep" / "out"
    assert run("decode", checkpoint, path, "--out", out)[0] == 0
    expected = ["X-2.png", "_.png", "d_e.png", "evil.png", "image-2.png", "image.png"]
    assert sorted(os.listdir(out)) == sorted([*expected, "passwd.png", "x.png"])
    assert sorted(os.listdir(tmp_path)) == ["deep", "x.safetensors"]
    assert os.listdir(tmp_path / "deep") == ["out"]


def test_png_names_are_unique_and_fit_a_file_system():
    names = ["a.png", "b/a.jpg", "a-2.png", "a", "é.png", "e\u0301.png", "x" * 999, "日" * 999]
    found = png_names(names)
    assert found[:6] == ["a.png", "a-2.png", "a-2-2.png", "a-3.png", "é.png", "é-2.png"]
    assert len({name.casefold() for name in found}) == len(names)
    assert all(len(name.encode()) < 255 for name in found)
    assert png_names(["x.png"] * 4) == ["x.png", "x-2.png", "x-3.png", "x-4.png"]


def test_reconstruct(run, checkpoint, tokenizer, photos, tmp_path):
    (tmp_path / "bad.png").write_text("hello")
    out = tmp_path / "out"
    sources = [photos / "rgb.png", tmp_path / "bad.png", photos / "grey16.png"]
    code, printed, err = run("reconstruct", checkpoint, *sources, "--out", out)
    assert code == 3
    assert len(err) == 1
    assert "bad.png" in err[0]
    assert sorted(os.listdir(out)) == ["grey16.png", "rgb.png"]
    images = torch.stack([resize_crop(read_image(sources[i]), 64) for i in (0, 2)])
    expected = tokenizer.reconstruct(images)
    scores = psnr(expected, images).tolist(), ssim(expected, images).tolist()
    rows = [line.split() for line in printed.splitlines()]
    assert [row[0] for row in rows[1:4]] == ["rgb.png", "grey16.png", "mean"]
    for column, score in enumerate(scores, start=1):
        figures = [float(row[column]) for row in rows[1:4]]
        assert figures == pytest.approx([*score, sum(score) / 2], abs=6e-3)
    assert "2 images at 0.688 bits per pixel, 1 skipped" in printed


def test_reconstruct_keeps_the_originals(run, checkpoint, photos, tmp_path):
    original = (photos / "rgb.png").read_bytes()
    (tmp_path / "rgb.png").write_bytes(original)
    result = run("reconstruct", checkpoint, tmp_path, "--out", tmp_path)
    assert_refused(result, "one of the originals")
    assert (tmp_path / "rgb.png").read_bytes() == original


def info(run, *subject):
    """The rows that `semhitok info` prints: {name: value}."""
    code, printed, err = run("info", *subject)
    assert (code, err) == (0, [])
    return dict(re.split(r"  +", line, maxsplit=1) for line in printed.splitlines())


def test_info_of_ids(run, ids, tokenizer):
    rows = info(run, ids)
    assert rows["shape"] == "8 images of 16 x 16 ids"
    assert (rows["num_codes K"], rows["num_sub_codes m"]) == ("256", "8")
    assert rows["codebook hash"] == tokenizer.codebook_hash
    used = len(load_codes(ids).codes.unique()) / 2048
    assert float(rows["flat usage"].partition(",")[0]) == pytest.approx(used, abs=6e-4)


def test_info_of_ids_that_claim_a_huge_codebook(run, tmp_path):
    path = tmp_path / "x.safetensors"
    vocabulary = Vocabulary(2**30, 2**20, codebook_hash="0" * 64)
    save_codes(path, torch.full((1, 1, 1), 2**50 - 1), ["x"], vocabulary)
    code, printed, _ = run("info", path)
    assert code == 0
    assert "1,073,741,824" in printed


def test_info_of_a_checkpoint(run, checkpoint, tokenizer):
    rows = info(run, checkpoint)
    assert (rows["image_size"], rows["num_codes"], rows["encoder.width"]) == ("64", "256", "128")
    assert rows["codebook hash"] == tokenizer.codebook_hash
    parameters = sum(parameter.numel() for parameter in tokenizer.decoder.parameters())
    assert rows["parameters decoder"] == f"{parameters:,}"
    assert rows["codebook pixel"] == " x ".join(map(str, tokenizer.quantizer.pix_codebook.shape))


def test_info_of_adaptive_sizes(run, tmp_path):
    torch.manual_seed(0)
    config = preset("semhitok-tiny")
    config.num_codes, config.num_sub_codes, config.adaptive = 5, 3, True
    model = SemHiTok(config)
    model.quantizer.offsets.copy_(torch.tensor([0, 6, 7, 9, 12, 15]))
    model.save_pretrained(tmp_path)
    save_codes(tmp_path / "ids", torch.arange(6).view(1, 2, 3), ["x"], model.vocabulary)
    for subject in (tmp_path, tmp_path / "ids"):
        rows = info(run, subject)
        assert rows["sub-codes of a code"] == "least 1, quartiles 2 3 3, most 6"
    assert rows["group usage"] == "1.000, perplexity 6.0"


def test_info_of_the_installation(run):
    rows = info(run)
    assert rows["torch"] == torch.__version__.partition("+")[0]
    assert any(name.startswith("build ") for name in rows)


def test_info_refuses(run, photos, tmp_path):
    assert_refused(run("info", photos / "rgb.png"), "rgb.png", "not an ids file")
    assert_refused(run("info", tmp_path), "config.json")


def test_unexpected_failures_are_one_line(run, monkeypatch, ids):
    def fail(path):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("semhitok.corpus.ids_file.load_codes", fail)
    assert run("info", ids) == (1, "", ["semhitok info: unexpected RuntimeError: two lines"])
    monkeypatch.setattr("semhitok.corpus.ids_file.load_codes", lambda path: exec("raise KeyboardInterrupt"))
    assert run("info", ids) == (130, "", ["semhitok info: interrupted"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disks_and_closed_pipes(ids):
    command = [sys.executable, "-m", "semhitok", "info", ids]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert result.stderr == "semhitok info: error: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_missing_packages_name_the_extra(run, monkeypatch, ids):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert_refused(run("info", ids), 'safetensors is not installed: pip install "semhitok[models]"')


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert f"semhitok {command}" in capsys.readouterr().out.partition("\n\n")[2]


def test_the_help_names_every_benchmark_and_preset(capsys):
    benchmarks = pytest.importorskip("semhitok.mllm.benchmarks")
    names = {"eval-mllm": benchmarks.BENCHMARKS, "train": preset_names(), "train-mllm": preset_names("mllm")}
    for command, expected in names.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.split()).replace("- ", "-")  # argparse breaks lines after hyphens
        assert expected and all(name in printed for name in expected)


def test_usage_errors(capsys):
    for arguments in ([], ["fly"], ["encode"], ["encode", "a", "b", "--out", "c", "--batch-size", "0"]):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 2
        assert ": error: " in capsys.readouterr().err.splitlines()[-1]


def test_python_m(checkpoint, ids, tmp_path):
    bad = tmp_path / "x.safetensors"
    bad.write_text("hello")
    arguments = [sys.executable, "-m", "semhitok", "decode", checkpoint, bad, "--out", tmp_path]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"semhitok decode: error: {bad}: not an ids file")
    assert result.stderr.count("\n") == 1


def test_interrupted_encode_leaves_no_file(checkpoint, photos, tmp_path):
    many, out = tmp_path / "many", tmp_path / "x.safetensors"
    many.mkdir()
    (many / "0.png").write_text("hello")
    for number in range(1, 5000):
        (many / f"{number}.png").symlink_to(photos / "rgb.png")
    encode = subprocess.Popen(
        [sys.executable, "-m", "semhitok", "encode", checkpoint, many, "--out", out],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores the signal, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert "0.png" in encode.stderr.readline()  # the first image is skipped: it is at work
        time.sleep(0.3)
        encode.send_signal(signal.SIGINT)
        rest = encode.stderr.read()
        assert encode.wait(timeout=60) == 130
    finally:
        encode.kill()
        encode.wait()
        encode.stderr.close()
    assert rest == "semhitok encode: interrupted\n"
    assert os.listdir(tmp_path) == ["many"]


def test_encode_names_what_a_folder_holds_beside_images(run, checkpoint, photos, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(photos, folder)
    (folder / "notes.md").touch()
    (folder / "photo.heic").write_bytes(b"\0\0\0\x24ftypheic")
    os.mkfifo(folder / "queue.png")
    code, printed, err = run("encode", checkpoint, folder, "--out", tmp_path / "x.safetensors")
    assert code == 3
    assert err[0] == ("semhitok encode: passed over 2 files: 1 of no image format (notes.md), 1 not a file (queue.png)")
    assert len(err) == 2 and "photo.heic: not an image of a known format, but HEIC; convert it" in err[1]
    assert "8 images, 16 x 16 ids each, 1 skipped" in printed
    assert_refused(run("encode", checkpoint, folder / "queue.png", "--out", tmp_path / "y.safetensors"), "got a pipe")


def test_a_link_to_itself_is_skipped(run, checkpoint, photos, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "loop.png").symlink_to("loop.png")
    shutil.copy(photos / "rgb.png", tmp_path / "photos" / "good.png")
    code, _, err = run("reconstruct", checkpoint, tmp_path / "photos", "--out", tmp_path / "out")
    assert code == 3 and "loop.png" in "".join(err)
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["good.png"]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["encode", "semhitok-toy", "photos", "--out", ""], "--out"),
        (["encode", "semhitok-toy", "photos", "", "--out", "out"], "SOURCE"),
        (["reconstruct", "", "photos", "--out", "out"], "CHECKPOINT"),
        (["train", "semhitok-tiny", "photos", "--out", ""], "--out"),
        (["train", "semhitok-tiny", "photos", "--out", "out", "--held-out", ""], "--held-out"),
        (["eval", "semhitok-toy", "photos", "--out", ""], "--out"),
    ],
)
def test_empty_names_are_refused(run, tmp_path, monkeypatch, command, flag):
    monkeypatch.chdir(tmp_path)
    assert run(*command) == (2, "", [f"semhitok {command[0]}: error: {flag}: expected a name, got an empty one"])
    assert not list(tmp_path.iterdir())


def test_names_with_dots(run, checkpoint, photos, tmp_path):
    """Images whose names share what stands before the first dot, or have a number in place of a suffix."""
    folder, out = tmp_path / "folder", tmp_path / "out"
    folder.mkdir()
    for name in ("v1.0_cat.png", "v1.0_dog.png", "scan.000", "scan.001", "noext"):
        shutil.copy(photos / "rgb.png", folder / name)
    code, _, err = run("encode", checkpoint, folder, "--out", tmp_path / "x.safetensors")
    assert (code, err) == (0, [])
    names = [os.path.basename(name) for name in load_codes(tmp_path / "x.safetensors").names]
    assert names == ["noext", "scan.000", "scan.001", "v1.0_cat.png", "v1.0_dog.png"]
    assert run("reconstruct", checkpoint, folder, "--out", out)[0] == 0
    pngs = ["noext.png", "scan.000.png", "scan.001.png", "v1.0_cat.png", "v1.0_dog.png"]
    assert sorted(os.listdir(out)) == pngs
    assert list(named_images([folder])) == list(named_images([out])) == [name[:-4] for name in pngs]
    shutil.copy(photos / "rgb.png", folder / "v1.0_cat.JPG")
    for name in ("V1.0_CAT.JPG", "V1.0_cat.jpg"):
        shutil.copy(photos / "rgb.png", folder / name)
    found = {name: path.name for name, path in named_images([folder]).items()}
    assert found == {
        "V1.0_CAT": "V1.0_CAT.JPG", "V1.0_cat.jpg": "V1.0_cat.jpg", "noext": "noext", "scan.000": "scan.000",
        "scan.001": "scan.001", "v1.0_cat.JPG-2": "v1.0_cat.JPG", "v1.0_cat.png": "v1.0_cat.png",
        "v1.0_dog": "v1.0_dog.png",
    }  # fmt: skip
    # What `eval` stores, NAME.png, has the same names again.
    stored = tmp_path / "stored"
    stored.mkdir()
    for name in found:
        shutil.copy(photos / "rgb.png", stored / f"{name}.png")
    assert list(named_images([stored])) == list(found)
    (folder / "b").mkdir()
    shutil.copy(photos / "rgb.png", folder / "b" / "noext")
    with pytest.raises(ValueError, match=r"one image of each name, got .*noext and .*b/noext; give the folder that"):
        named_images([folder / "noext", folder / "b" / "noext"])
    assert "b/noext" in named_images([folder])
