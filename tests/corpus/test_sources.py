"""What people give `semhitok encode`: every image with its own key and caption, or left out by name."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from semhitok.cli import main
from semhitok.config import preset
from semhitok.corpus import EncodingConfig, encode_corpus
from semhitok.corpus import lock as lock_module
from semhitok.corpus.lock import LOCK, locked
from semhitok.corpus.sources import keys_collide, sort_out
from semhitok.corpus.units import Unit, read_unit
from semhitok.data.images import save_png
from semhitok.data.passed_over import PassedOver
from semhitok.tokenizer import SemHiTok

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("webdataset")

CONFIG = EncodingConfig(batch_size=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tokenizer and five images."""
    root = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    SemHiTok(preset("semhitok-tiny")).save_pretrained(root / "checkpoint")
    (root / "photos").mkdir()
    for n in range(5):
        save_png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(n)), root / "photos" / f"{n}.png")
    return root


@pytest.fixture(autouse=True)
def at_a_copy(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("checkpoint", "photos"):
        shutil.copytree(root / name, tmp_path / name)


def image(n=0):
    return Path(f"photos/{n}.png").read_bytes()


def write_tar(path, *members):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def encode(*names, out="out", config=CONFIG, **arguments):
    """The summary, and [(key, caption)]."""
    summary = encode_corpus("checkpoint", names, out, config, **arguments)
    return summary, rows(out)


def rows(out="out"):
    tables = [pq.read_table(path) for path in sorted(Path(out).glob("shard-*.parquet"))]
    return [
        pair for table in tables for pair in zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True)
    ]


def lines(name, out="out"):
    return [json.loads(line) for line in Path(out, name).read_text().splitlines()]


def keys(*names, out="out"):
    return [key for key, _ in encode(*names, out=out)[1]]


# ------------------------------------------------------------------------------------------------
# Captions


def test_captions_of_columns(run):
    broken = pa.Array.from_buffers(pa.string(), 4, [None, *pa.array([b"a", b"caf\xe9", b"c", b"d"]).buffers()[1:]])
    pq.write_table(pa.table({"image": [image()] * 4, "caption": broken}), "broken.parquet")
    code, printed, _ = run("encode", "checkpoint", "broken.parquet", "--out", "out")
    assert code == 3 and "captions        3 of 4 images have captions, 1 left out\n" in printed
    assert rows() == [("0", "a"), ("1", None), ("2", "c"), ("3", "d")]
    note = {"key": "1", "note": "caption left out: expected UTF-8 text, got b'caf\\xe9'"}
    assert lines("notes.jsonl") == [note] and lines("skipped.jsonl") == []

    for name, column, expected in (
        ("lists", [["a", "b"], ["c"], [], None], ["a", "c", None, None]),
        ("bytes", [b"a", b"caf\xe9", b"", None], ["a", "caf\ufffd", None, None]),
        ("large", pa.array(["a", "b", "", None], pa.large_string()), ["a", "b", None, None]),
        ("coded", pa.array(["a", "b", "a", None]).dictionary_encode(), ["a", "b", "a", None]),
    ):
        table = {"image": [image()] * 4, "caption": column, "text": ["w", "x", "y", "z"]}
        pq.write_table(pa.table(table), f"{name}.parquet")
        summary, found = encode(f"{name}.parquet", out=name)
        others = [text or "wxyz"[n] for n, text in enumerate(expected)]
        assert [caption for _, caption in found] == others and summary.captions == 4
        assert (summary.captions_listed, summary.captions_repaired) == ((name == "lists"), (name == "bytes"))
    with pytest.raises(
        ValueError, match=r"lists.parquet: expected a column title of captions, got image, caption, text"
    ):
        encode("lists.parquet", out="none", config=EncodingConfig(caption="title"))


@pytest.mark.parametrize("column", ["caption", "id"])
def test_a_bad_byte_in_a_dictionary_costs_a_column_and_no_image(column):
    """A dictionary holds the text of many rows: it is checked as a whole, before any row is read."""
    offsets = pa.array(["a", "cafe", "b"]).buffers()[1]
    words = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"acaf\xe9b")])
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0, 2]), words)
    table = pa.table({"image": [image(n) for n in range(5)], column: texts})
    pq.write_table(table, "bad.parquet", row_group_size=5)
    summary, found = encode("bad.parquet")
    assert (summary.images, summary.skipped) == (5, 0)
    notes = lines("notes.jsonl")
    if column == "caption":
        assert found == [(str(n), None) for n in range(5)] and summary.captions_left_out == 5
        assert len(notes) == 5 and all("cannot read column caption" in json.dumps(note) for note in notes)
    else:
        assert [key for key, _ in found] == [f"bad.parquet/{n}" for n in range(5)]
        assert len(notes) == 1 and "rows 0 to 4 have no key: cannot read column id" in json.dumps(notes[0])


def test_captions_of_shards(run):
    half = b'{"caption": "nice \\ud83d", "title": "t"}'
    write_tar("a.tar", ("0.png", image()), ("0.json", half), ("1.png", image(1)), ("1.json", b"{"), ("2.txt", b"x"))
    code, printed, _ = run("encode", "checkpoint", "a.tar", "--out", "out")
    assert code == 3 and "1 of 2 images have captions, 1 repaired, 1 left out\n" in printed
    assert "skipped         1, listed in out/skipped.jsonl\nnotes           2, listed in out/notes.jsonl\n" in printed
    assert rows() == [("0", "nice \ufffd"), ("1", None)]
    assert [note["key"] for note in lines("notes.jsonl")] == ["0", "1"]
    assert lines("skipped.jsonl") == [{"key": "2", "reason": "a.tar: 2: no image among txt"}]
    write_tar("b.tar", ("0.png", image()), ("0.json", half), ("1.png", image(1)), ("1.json", b"{}"))
    code, printed, _ = run("encode", "checkpoint", "b.tar", "--out", "b", "--caption", "title")
    assert code == 0 and "captions        1 of 2 images have captions, 1 with JSON without title\n" in printed


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_beside_image_files(workers):
    Path("photos/0.txt").write_bytes(b"\xff\xfea\0")
    Path("photos/1.txt").write_bytes(b"caf\xe9")
    Path("photos/2.txt").mkdir()
    os.mkfifo("photos/3.txt")
    summary, found = encode("photos", workers=workers)
    assert found == [("0.png", "a"), ("1.png", "caf\ufffd"), ("2.png", None), ("3.png", None), ("4.png", None)]
    assert (summary.images, summary.skipped, summary.captions_left_out, summary.captions_repaired) == (5, 0, 2, 1)
    assert [note["key"] for note in lines("notes.jsonl")] == ["1.png", "2.png", "3.png"]


def test_captions_beside_images_without_a_suffix():
    folder = Path("scans")
    folder.mkdir()
    for name in ("scan.000", "scan.001", "photo", "IMG_1.JPG"):
        (folder / name).write_bytes(image())
    for name, text in {
        "scan.txt": "of none",
        "scan.001.txt": "of 1",
        "photo.txt": "a photo",
        "IMG_1.TXT": "one",
    }.items():
        (folder / name).write_text(text)
    assert encode("scans")[1] == [("IMG_1.JPG", "one"), ("photo", "a photo"), ("scan.000", None), ("scan.001", "of 1")]


# ------------------------------------------------------------------------------------------------
# Keys


def test_keys_of_rows():
    pq.write_table(pa.table({"image": [image(n) for n in range(3)], "key": [None, "", "z"]}), "null.parquet")
    assert keys("null.parquet", out="1") == ["null.parquet/0", "null.parquet/1", "z"]
    for n in range(2):
        pq.write_table(pa.table({"image": [image(n), image(2 + n)]}), f"part-{n}.parquet")
    assert keys("part-0.parquet", out="2") == ["0", "1"]
    assert keys("part-{0..1}.parquet", out="3") == [f"part-{n}.parquet/{row}" for n in range(2) for row in range(2)]
    pq.write_table(
        pa.table({"image": [image(n) for n in range(4)], "id": [b"a", b"\xff", b"a", b"a"]}), "bytes.parquet"
    )
    assert keys("bytes.parquet", out="4") == ["a", "\\xff", "a#2", "a#3"]


def test_keys_of_several_sources():
    write_tar("x-0.tar", ("1.png", image(0)), ("2.png", image(1)))
    write_tar("x-1.tar", ("3.png", image(2)))
    write_tar("x-2.tar", ("1.png", image(3)))
    write_tar("y.tar", ("1.png", image(3)))
    assert keys("x-{0..1}.tar", out="1") == ["1", "2", "3"]
    assert keys("x-0.tar", "x-2.tar", out="2") == ["x-0.tar/1", "x-0.tar/2", "x-2.tar/1"]
    assert keys("x-0.tar", "y.tar", out="3") == ["x-0.tar/1", "x-0.tar/2", "y.tar/1"]
    shutil.copytree("photos", "more")
    for found in (keys("photos", "more", out="4"), keys("photos", "more/0.png", out="5")):
        assert found[0] == "photos/0.png" and "more/0.png" in found and len(set(found)) == len(found)
    assert keys("photos/0.png", "more/0.png", out="6") == ["photos/0.png", "more/0.png"]
    same = pa.table({"image": [image()] * 3000, "id": ["a"] * 1500 + ["a#7"] * 1500})
    pq.write_table(same, "same.parquet")
    found = [item.key for item in read_unit(Unit(0, "parquet", "same.parquet"), ())]
    assert len(set(found)) == 3000 and found[:2] == ["a", "a#2"]
    write_tar("twice.tar", ("1.png", image(0)), ("1.png", image(1)))
    assert keys("twice.tar", out="7") == ["1", "1#2"]


def test_what_an_earlier_version_began_is_resumed_with_its_keys():
    shutil.copytree("photos", "more")
    encode("photos", "more")
    job = json.loads(Path("out/job.json").read_text())
    assert job.pop("keys") == "source and key" and not keys_collide(sort_out(["photos"], PassedOver()))
    # As it was written before keys had a source, after an interruption before the first shard.
    listing = [json.loads(line) for line in Path("out/images.jsonl").read_text().splitlines()]
    old = [[path, os.path.basename(path)] for path, _ in listing]
    digest = hashlib.sha256("".join(json.dumps(pair) + "\n" for pair in old).encode())
    digest.update(json.dumps([[0, "images", "", 0, 10]]).encode())
    shutil.rmtree("out")
    Path("out").mkdir()
    Path("out/job.json").write_text(json.dumps({**job, "sources_sha256": digest.hexdigest()}))
    assert keys("photos", "more") == [f"{n}.png" for n in range(5)] * 2


def test_records_of_an_earlier_version_are_finished():
    encode("photos")
    record = json.loads(Path("out/shard-000000.json").read_text())
    names = (
        "name",
        "source",
        "images",
        "rows",
        "captions",
        "skipped",
        "ids_compared",
        "ids_changed",
        "bytes",
        "sha256",
        "job",
    )
    Path("out/shard-000000.json").write_text(json.dumps({name: record[name] for name in names}))
    os.utime("photos/0.png", (1, 1))
    summary, _ = encode("photos")
    assert (summary.encoded, summary.images, summary.captions_left_out) == (0, 5, 0)


# ------------------------------------------------------------------------------------------------
# Sources that change


def test_a_source_that_changed_is_encoded_again(capsys):
    write_tar("a.tar", ("0.png", image(0)), ("1.png", image(1)))
    write_tar("b.tar", ("2.png", image(2)))
    whole = Path("a.tar").read_bytes()
    Path("a.tar").write_bytes(whole[:1000])
    summary, _ = encode("a.tar", "b.tar")
    assert (summary.images, summary.skipped) == (1, 1)
    assert encode("a.tar", "b.tar")[0].encoded == 0
    Path("a.tar").write_bytes(whole)
    summary, _ = encode("a.tar", "b.tar")
    assert (summary.encoded, summary.images, summary.skipped) == (2, 3, 0)
    assert "encoded again: a.tar: changed after shard-000000 was encoded" in capsys.readouterr().err
    pq.write_table(pa.table({"image": [image(0)]}), "a.parquet")
    encode("a.parquet", out="table")
    pq.write_table(pa.table({"image": [image(0), image(1)]}), "a.parquet")
    assert encode("a.parquet", out="table")[0].encoded == 2


@pytest.mark.parametrize("change", ["image", "caption"])
def test_image_files_that_changed_are_encoded_again(change):
    config = EncodingConfig(batch_size=4, images_per_shard=2)
    encode("photos", config=config)
    if change == "image":
        shutil.copy("photos/0.png", "photos/3.png")
    else:
        Path("photos/3.txt").write_text("new")
    summary, found = encode("photos", config=config)
    assert (summary.encoded, summary.images) == (2, 5)
    assert dict(found)["3.png"] == (None if change == "image" else "new")


# ------------------------------------------------------------------------------------------------
# One run at a time


@contextlib.contextmanager
def holder(group=None):
    """Another process that holds the lock, and is killed in the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with locked(Path(), group):
            os.write(writing, b"held")
            time.sleep(60)
        os._exit(1)
    try:
        assert os.read(reading, 4) == b"held"
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(monkeypatch, run):
    monkeypatch.setattr(lock_module, "WAIT", 0.2)
    with holder():
        for group in (None, "a"):
            with pytest.raises(ValueError, match=r"^\.: another run is encoding"), locked(Path(), group):
                pass
        code, _, err = run("encode", "checkpoint", "photos", "--out", "./", "--device", "cpu")
        assert code == 2 and len(err) == 1 and "another run is encoding" in err[0]
    assert Path(LOCK).exists()
    with locked(Path()):
        assert Path(LOCK).exists()
    assert not Path(LOCK).exists()


def test_the_processes_of_one_torchrun_share_the_lock(monkeypatch):
    monkeypatch.setattr(lock_module, "WAIT", 0.2)
    with holder("a"):
        with holder("a"), locked(Path(), "a"):
            for group in (None, "b"):
                with pytest.raises(ValueError, match="another run"), locked(Path(), group):
                    pass
        assert Path(LOCK).exists()
        with pytest.raises(ValueError, match="another run"), locked(Path(), "b"):
            pass
    with locked(Path(), "b"):
        pass
    assert not Path(LOCK).exists()


def test_a_forked_process_does_not_keep_the_lock():
    """As the processes that read images do, which outlive a killed one for a moment."""
    with locked(Path()):
        child = os.fork()
        if not child:
            time.sleep(30)
            os._exit(0)
    try:
        with locked(Path()):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_there_is_a_warning(monkeypatch, capsys):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(Path()):
        assert "no locks on this file system (Function not implemented)" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Folders and messages


def test_folders_of_shards_and_of_parquet_files(run):
    for n in range(2):
        Path("data/deep").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [image(n)], "id": [n]}), f"data/deep/train-0000{n}-of-00002.parquet")
        write_tar(f"tars/{n}.tar", (f"{n}.png", image(n)))
    Path("data/README.md").write_text("x")
    assert keys("data", out="1") == ["0", "1"] and keys("tars", out="2") == ["0", "1"]
    shutil.copy("photos/0.png", "data/logo.png")
    code, _, err = run("encode", "checkpoint", "data", "--out", "3")
    assert code == 2 and "data: expected images, webdataset shards or parquet files, got several kinds" in err[0]
    code, _, err = run("encode", "checkpoint", "tars", "tars/0.tar", "--out", "4")
    assert code == 2 and "expected each once" in err[0]


def test_messages(run):
    write_tar("a.tar", ("0.txt", b"x"))
    pq.write_table(pa.table({"a": [1], "image": ["0.png"]}), "names.parquet")
    for arguments, words in (
        (("a.tar", "--out", "x.safetensors"), "--out: expected a folder for a.tar (webdataset shards), got the file"),
        (("photos", "--out", "out.v1"), "or a folder, which ends in / if its name has a dot: out.v1/"),
        (
            ("names.parquet", "--out", "b"),
            "names.parquet: expected column image as a struct with bytes, or binary, got str",
        ),
        (("a.tar", "--out", "c"), "c: not one image could be encoded, see c/skipped.jsonl"),
    ):
        code, _, err = run("encode", "checkpoint", *arguments)
        assert code == 2 and len(err) == 1 and words in err[0], err
    assert not Path("c/manifest.json").exists() and not Path("out.v1").exists()
    assert run("encode", "checkpoint", "photos", "--out", "out.v1/")[0] == 0
    assert run("encode", "checkpoint", "photos", "--out", "out.v1")[0] == 0


def test_a_row_group_that_is_damaged_costs_no_other():
    table = pa.table({"image": [image(n) for n in range(4)], "id": list("abcd")})
    pq.write_table(table, "a.parquet", row_group_size=1, compression="zstd", use_dictionary=False)
    content = bytearray(Path("a.parquet").read_bytes())
    column = pq.ParquetFile("a.parquet").metadata.row_group(1).column(0)
    content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    Path("a.parquet").write_bytes(content)
    summary, found = encode("a.parquet")
    assert [key for key, _ in found] == ["a", "c", "d"] and summary.skipped == 1
    assert "a.parquet: cannot read rows 1 to 1" in lines("skipped.jsonl")[0]["reason"]


# ------------------------------------------------------------------------------------------------
# Engines


def same(out, expected):
    contents = [{path.name: path.read_bytes() for path in Path(folder).iterdir()} for folder in (out, expected)]
    assert contents[0] == contents[1]


def bad_sources():
    Path("photos/bad.png").write_text("no image")
    write_tar("a.tar", ("0.png", image(0)), ("0.txt", b"caf\xe9"), ("1.txt", b"x"))
    pq.write_table(pa.table({"image": [image(1), b"no"], "caption": ["a", "b"]}), "a.parquet")
    return ["photos", "a.tar", "a.parquet"]


@pytest.mark.slow
def test_engines_agree_on_what_is_skipped(run, capsys):
    sources = bad_sources()
    command = ["encode", "checkpoint", *sources, "--device", "cpu", "--shard-images", "2", "--out"]
    assert run(*command, "local")[0] == 3
    assert len(lines("skipped.jsonl", "local")) == 3
    assert main([*command, "two", "--processes", "2", "--workers", "1"]) == 3
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    result = subprocess.run(
        [*launch, "-m", "semhitok", *command, "torchrun", "--engine", "torchrun"], capture_output=True, text=True
    )
    assert result.returncode == 0 and "Traceback" not in result.stderr and "ChildFailed" not in result.stderr
    assert "this is 0 in place of 3" in result.stderr
    same("two", "local")
    same("torchrun", "local")
    assert run(*command, "torchrun")[0] == 3  # without torchrun it is told again, and nothing is encoded
