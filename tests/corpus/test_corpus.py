"""Corpora: the same bytes from every engine and after any interruption, damage named, a reader that loses nothing."""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from semhitok.cli import encode, main
from semhitok.config import preset
from semhitok.corpus import EncodedCorpus, EncodingConfig, encode_corpus, engines, sources, verify
from semhitok.corpus.format import Layout, read_manifest, shard_writer
from semhitok.corpus.units import read_unit
from semhitok.data.captions import FIELDS
from semhitok.data.images import list_images, read_image, resize_crop, save_png, ten_crops
from semhitok.data.passed_over import PassedOver
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("webdataset")

IMAGES = 22
CONFIG = EncodingConfig(batch_size=4, images_per_shard=5)
SETTINGS = ["--batch-size", "4", "--shard-images", "5"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A tokenizer and the same 22 images as a folder, three tar shards and two parquet files, with captions."""
    root = tmp_path_factory.mktemp("corpus")
    torch.manual_seed(0)
    SemHiTok(preset("semhitok-tiny")).save_pretrained(root / "checkpoint")
    generator = torch.Generator().manual_seed(0)
    (root / "photos" / "deep").mkdir(parents=True)
    for n in range(IMAGES):
        coarse = torch.rand(1, 3, 5, 6, generator=generator)
        image = torch.nn.functional.interpolate(coarse, (64 + n, 90), mode="bicubic")[0].clamp(0, 1)
        path = root / "photos" / ("deep" if 5 <= n < 9 else "") / f"{'deep' if n == 9 else ''}{n:03}.png"
        save_png(image, path)
        if n % 4:
            path.with_suffix(".txt").write_text(f"picture {n}\n")
    paths = list_images([root / "photos"])
    rows = []
    for path in paths:
        text = path.with_suffix(".txt")
        rows.append((path.stem, path.read_bytes(), text.read_text().strip() if text.exists() else None))
    for shard, part in enumerate((rows[:6], rows[6:13], rows[13:])):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number, (key, data, caption) in enumerate(part):
                members = [(f"{key}.png", data)]
                if caption:
                    found = (f"{key}.txt", caption) if number % 2 else (f"{key}.json", json.dumps({"caption": caption}))
                    members.append((found[0], found[1].encode()))
                for name, content in members:
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for file, part in enumerate((rows[:10], rows[10:])):
        table = {
            "image": [{"bytes": data, "path": f"{key}.png"} for key, data, _ in part],
            "text": [caption for _, _, caption in part],
            "key": [key for key, _, _ in part],
        }
        pq.write_table(pa.table(table), root / f"{file}.parquet")
    return root


@pytest.fixture(autouse=True)
def at_the_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="module")
def tokenizer(root):
    return SemHiTok.from_pretrained(root / "checkpoint")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """The folder's corpus, made by one process without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(root)
    try:
        encode_corpus("checkpoint", ["photos"], out, CONFIG)
    finally:
        os.chdir(before)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def assert_same(folder, expected):
    got, wanted = contents(folder), contents(expected)
    assert sorted(got) == sorted(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []


def rows_of(folder):
    """key -> (caption, ids int64 [h, w]) of a corpus of one crop an image."""
    corpus = EncodedCorpus(folder)
    rows = [(key, (caption, ids)) for ids, caption, key in corpus]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "flipped" else content[:-7])


# ------------------------------------------------------------------------------------------------
# The same bytes


@pytest.mark.slow
def test_torchrun_with_two_processes_writes_the_same_bytes(whole, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = ["-m", "semhitok", "encode", "checkpoint", "photos", "--out", str(tmp_path), *SETTINGS]
    result = subprocess.run(
        [*launch, *command, "--engine", "torchrun", "--device", "cpu"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("encoded now") == 2
    assert_same(tmp_path, whole)


def kill_one_encoder(folder, name, killed):
    """SIGKILL for one of the processes below this one called so, as soon as there is a shard."""
    while not list(folder.glob("*.parquet")):
        time.sleep(0.01)
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    for pid in parents:
        with contextlib.suppress(OSError):
            above = pid
            while above not in (os.getpid(), 0):
                above = parents.get(above, 0)
            if above and name in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return


@pytest.mark.slow
def test_ray_writes_the_same_bytes_though_a_worker_is_killed(whole, root, tmp_path_factory, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is not installed")
    pytest.importorskip("ray.data", reason="Ray Data is not installed")

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killed = []
    watcher = threading.Thread(target=kill_one_encoder, args=(tmp_path, b"ray::MapWorker", killed), daemon=True)
    watcher.start()
    try:
        encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG, engine="ray", processes=2)
        watcher.join(10)
        assert len(killed) == 1
        assert_same(tmp_path, whole)
        (tmp_path / "shard-000003.parquet").unlink()
        (tmp_path / "shard-000003.parquet").mkdir()
        with pytest.raises(OSError, match=r"shard-000003.parquet: Is a directory"):
            encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG, engine="ray", processes=1)
        # What cannot be read ends as it does with the other engines.
        other = tmp_path_factory.mktemp("ray")
        shutil.copytree(root / "photos" / "deep", other / "photos")
        (other / "photos" / "bad.png").write_text("no image")
        command = ["encode", "checkpoint", str(other / "photos"), *SETTINGS, "--device", "cpu", "--out"]
        assert main([*command, str(other / "ray"), "--engine", "ray"]) == main([*command, str(other / "local")]) == 3
        assert_same(other / "ray", other / "local")
    finally:
        ray.shutdown()


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(whole, tmp_path):
    threads = torch.get_num_threads()
    killed = []
    watcher = threading.Thread(target=kill_one_encoder, args=(tmp_path, b"spawn_main", killed), daemon=True)
    watcher.start()
    with pytest.raises(ChildProcessError, match="run the same command again to resume"):
        encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG, processes=2)
    watcher.join(10)
    assert len(killed) == 1
    encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG, workers=2)
    assert torch.get_num_threads() == threads
    assert_same(tmp_path, whole)


def test_ids_are_the_tokenizers(whole, tokenizer, root):
    rows = rows_of(whole)
    assert len(rows) == IMAGES
    for key in ("000.png", "deep/006.png", "021.png"):
        image = resize_crop(read_image(root / "photos" / key), 64)
        same = rows[key][1] == tokenizer.encode(image[None])[0]
        assert same.double().mean() > 0.99  # sums of another order may decide a near tie the other way
    assert rows["deep/006.png"][0] == "picture 6"
    assert rows["000.png"][0] == ""


def test_folders_shards_and_parquet_give_the_same_ids_captions_and_keys(whole, tmp_path):
    encode_corpus("checkpoint", ["{0..2}.tar"], tmp_path / "tar", CONFIG)
    encode_corpus("checkpoint", ["{0..1}.parquet"], tmp_path / "parquet", CONFIG)
    expected = {Path(key).stem: row for key, row in rows_of(whole).items()}
    for kind, shards in (("tar", 3), ("parquet", 2)):
        manifest = read_manifest(tmp_path / kind)[1]
        assert len(manifest["shards"]) == shards and manifest["totals"]["captions"] == 16
        rows = rows_of(tmp_path / kind)
        assert sorted(rows) == sorted(expected)
        for key, (caption, ids) in rows.items():
            assert caption == expected[key][0]
            assert torch.equal(ids, expected[key][1])


def test_adaptive_sizes_go_with_the_ids(root, tmp_path):
    config = preset("semhitok-tiny")
    config.num_codes, config.num_sub_codes, config.adaptive = 5, 3, True
    torch.manual_seed(1)
    model = SemHiTok(config)
    model.quantizer.offsets.copy_(torch.tensor([0, 6, 7, 9, 12, 15]))
    model.save_pretrained(tmp_path / "checkpoint")
    encode_corpus(str(tmp_path / "checkpoint"), ["photos"], tmp_path / "out", CONFIG)
    layout, manifest = read_manifest(tmp_path / "out")
    assert layout.offsets == (0, 6, 7, 9, 12, 15) and layout.vocabulary == model.vocabulary
    ids = torch.stack([ids for ids, _, _ in EncodedCorpus(tmp_path / "out")])
    usage = CodeUsage(5, 3, offsets=layout.offsets)
    usage.update(ids)
    assert verify(tmp_path / "out").summary() == usage.summary()
    semantic = len({next(i for i in range(5) if h < layout.offsets[i + 1]) for h in ids.unique().tolist()})
    assert manifest["usage"]["semantic"]["usage"] == pytest.approx(semantic / 5)


def test_packed_equals_unpacked(whole, tmp_path):
    encode_corpus("checkpoint", ["photos"], tmp_path, EncodingConfig(packed=True, batch_size=4, images_per_shard=5))
    packed, plain = rows_of(tmp_path), rows_of(whole)
    assert all(torch.equal(packed[key][1], plain[key][1]) for key in plain)
    kinds = [pq.read_schema(folder / "shard-000000.parquet").field("ids").type for folder in (tmp_path, whole)]
    assert kinds == [pa.binary(16 * 16 * 11 // 8), pa.list_(pa.uint16())]


@pytest.mark.parametrize(
    "k, m, kind", [(2, 1, "uint8"), (32, 8, "uint8"), (32, 9, "uint16"), (16384, 12, "uint32"), (2**31, 4, "uint64")]
)
@pytest.mark.parametrize("packed", [False, True])
def test_ids_of_every_size_come_back(tmp_path, k, m, kind, packed):
    layout = Layout(k, m, "0" * 64, (3, 5), packed)
    ids = torch.randint(0, k * m, (1500, 3, 5), generator=torch.Generator().manual_seed(0))
    ids[0], ids[1] = 0, k * m - 1
    with shard_writer(tmp_path / "x.parquet", layout) as writer:
        for n, grid in enumerate(ids):
            writer.add(str(n), None, 0, grid)
    column = pq.read_table(tmp_path / "x.parquet").column("ids").combine_chunks()
    stored = torch.from_numpy(layout.from_arrow(column).astype("int64"))
    assert torch.equal(stored, ids)
    part = layout.from_arrow(column.slice(7, 3)).astype("int64")  # an array that begins inside a buffer
    assert torch.equal(torch.from_numpy(part), ids[7:10])
    if packed:
        number = int.from_bytes(column[2].as_py(), "little")
        expected = sum(int(h) << (t * layout.bits) for t, h in enumerate(ids[2].flatten()))
        assert number == expected
    else:
        assert str(column.type.value_type) == kind


def test_ten_crops(tmp_path):
    image = torch.rand(3, 70, 110, generator=torch.Generator().manual_seed(0))
    crops, square = ten_crops(image, 32), resize_crop(image, 35)
    corners = [square[:, :32, :32], square[:, :32, 3:], square[:, 3:, :32], square[:, 3:, 3:], square[:, 1:33, 1:33]]
    assert torch.equal(crops, torch.stack([*corners, *[crop.flip(2) for crop in corners]]))
    config = EncodingConfig(crop="ten", batch_size=4)
    summary = encode_corpus("checkpoint", ["photos/000.png", "photos/001.png"], tmp_path, config)
    assert (summary.images, summary.rows) == (2, 20)
    table = pq.read_table(tmp_path / "shard-000000.parquet")
    assert table.column("crop").to_pylist() == [*range(10)] * 2
    assert len({str(ids) for ids in table.column("ids").to_pylist()}) == 20


def test_the_share_of_ids_that_bf16_changes_is_reported(whole, tmp_path):
    config = EncodingConfig(batch_size=4, images_per_shard=5, precision="bf16")
    summary = encode_corpus("checkpoint", ["photos"], tmp_path, config)
    assert all(0 < summary.shares[part] < 1 for part in ("waiting", "quantising", "comparing"))
    differ = []
    for shard in sorted(path.name for path in whole.glob("*.parquet")):
        rows = [torch.tensor(pq.read_table(at / shard).column("ids").to_pylist()[:4]) for at in (tmp_path, whole)]
        differ.append((rows[0] != rows[1]).flatten())
    share = torch.cat(differ).double().mean().item()
    assert 0 < share < 0.3 and summary.changed == pytest.approx(share)


def test_an_old_corpus_in_int8_is_read_and_not_resumed(whole, tmp_path):
    """Earlier versions could also encode in int8."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for name in ("manifest.json", "job.json"):
        settings = json.loads((out / name).read_text())
        (out / name).write_text(json.dumps({**settings, "precision": "int8"}))
    assert verify(out).counts.sum() == IMAGES * 256
    assert len(rows_of(out)) == IMAGES
    with pytest.raises(ValueError, match="holds another corpus: precision was 'int8', now 'fp32'"):
        encode_corpus("checkpoint", ["photos"], out, CONFIG)
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, got 'int8'"):
        EncodingConfig(precision="int8")


# What earlier versions wrote. Its order of keys, too, is part of a shard's record, which has the job's hash.
JOB_KEYS = [
    "format", "version", "num_codes", "num_sub_codes", "codebook_hash", "grid", "packed", "encoder_sha256",
    "image_size", "crop", "caption", "batch_size", "images_per_shard", "precision", "device", "sources",
    "sources_sha256", "shards",
]  # fmt: skip


def test_the_job_file_keeps_its_keys(whole):
    assert list(json.loads((whole / "job.json").read_text())) == JOB_KEYS
    assert {field.name for field in dataclasses.fields(EncodingConfig)} <= set(JOB_KEYS)


def test_every_setting_is_an_option_of_the_command():
    parser = argparse.ArgumentParser()
    encode.add_arguments(parser)
    args = parser.parse_args(["checkpoint", "photos", "--out", "x", "--shard-images", "7", "--pack"])
    settings = {field.name for field in dataclasses.fields(EncodingConfig)}
    assert settings <= args.corpus_flags.keys() | vars(args).keys()
    assert (args.images_per_shard, args.packed, args.batch_size) == (7, True, EncodingConfig.batch_size)


def test_a_process_that_does_not_encode_keeps_no_tokenizer(root, tmp_path, monkeypatch):
    """It loads one to identify the job, and leaves encoding to the processes that it starts."""
    loaded = []
    load = SemHiTok.from_pretrained

    def from_pretrained(checkpoint):
        tokenizer = load(checkpoint)
        loaded.append(weakref.ref(tokenizer))
        return tokenizer

    def run(engine, job, units, processes):
        assert (engine, len(units), processes) == ("local", 5, 2)
        gc.collect()
        assert [reference() for reference in loaded] == [None]
        yield engines.UnitResult(None, {"all": 1.0}, "not done")

    monkeypatch.setattr(SemHiTok, "from_pretrained", from_pretrained)
    monkeypatch.setattr(engines, "run", run)
    monkeypatch.setattr(engines, "UnitEncoder", None)
    with pytest.raises(ValueError, match="1 of 5 shards could not be encoded"):
        encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG, processes=2)


def test_the_package_imports_nothing_heavy():
    script = (
        "import sys; "
        "sys.modules['pyarrow'] = None; from semhitok.corpus import EncodedCorpus, encode_corpus, save_codes"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ------------------------------------------------------------------------------------------------
# Interruptions and damage


def in_a_fork(work):
    """Start `work` in a copy of this process; its number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            torch.set_num_threads(1)
            code = work() or 0
        finally:
            os._exit(code)
    return child


def test_kill_9_at_20_random_moments(whole, tmp_path):
    moments, kills, finished = random.Random(0), 0, 0
    while kills < 20:
        child = in_a_fork(lambda: encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG) and 0)
        time.sleep(moments.random() * 0.4)
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kills += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
        if (tmp_path / "manifest.json").exists():
            finished += 1
            encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG)
            assert_same(tmp_path, whole)
            shutil.rmtree(tmp_path)
    encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG)
    assert_same(tmp_path, whole)


@pytest.mark.parametrize("write", range(1, 14, 2))
def test_kill_9_around_every_rename(whole, tmp_path, write):
    """A process that dies before, or after, the rename of a file it writes: listing, job, shards, records, manifest."""

    def until_killed():
        replace, count = os.replace, 0

        def deadly(source, target):
            nonlocal count
            count += 1
            if count == write:
                if write % 4 == 1:
                    replace(source, target)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = deadly
        encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG)

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_fork(until_killed), 0)[1]) == -signal.SIGKILL
    encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG)
    assert_same(tmp_path, whole)


def test_a_disk_that_takes_no_more_leaves_no_damage_and_a_restart_completes(whole, tmp_path, capfd):
    size = max(path.stat().st_size for path in whole.glob("*.parquet")) - 1
    assert max((whole / name).stat().st_size for name in ("images.jsonl", "job.json")) < size

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return main(["encode", "checkpoint", "photos", "--out", str(tmp_path), *SETTINGS])

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_fork(limited), 0)[1]) == 2
    found = re.search(r"(shard-00000\d).parquet: File too large\n", capfd.readouterr().err)
    assert found and not (tmp_path / "manifest.json").exists()
    assert list(tmp_path.glob(".semhitok-*")) == list(tmp_path.glob(f"{found[1]}*")) == []
    left = 5 * len(list(tmp_path.glob("*.parquet")))
    assert encode_corpus("checkpoint", ["photos"], tmp_path, CONFIG).encoded == IMAGES - left
    assert_same(tmp_path, whole)


NAMESPACE = ["unshare", "--mount", "--map-root-user"]
ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from semhitok.cli import main

def mount(*options):
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", "disk"], check=True)

mount("-o", "size=32k")
command = ["encode", "checkpoint", "photos", "--out", "disk/corpus", *sys.argv[1:]]
assert main(command) == 2
print("left:", *sorted(path.name for path in Path("disk/corpus").iterdir()))
mount("-o", "remount,size=1m")
assert main(command) == 0
subprocess.run(["cp", "-r", "disk/corpus", "saved"], check=True)
"""


@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no mounts of one's own here",
)
def test_a_full_disk_is_told_and_a_restart_completes(whole, root, tmp_path, monkeypatch):
    """A tmpfs with room for half of the corpus, then for all of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    for name in ("checkpoint", "photos"):
        (tmp_path / name).symlink_to(root / name)
    command = [*NAMESPACE, sys.executable, "-c", ON_A_SMALL_DISK, *SETTINGS]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "No space left on device" in result.stderr
    left = re.search("^left: (.*)$", result.stdout, re.M)[1].split()
    shards = [name for name in left if name.endswith(".parquet")]
    assert 0 < len(shards) < 5 and "manifest.json" not in left and not [name for name in left if name.startswith(".")]
    # Those that were complete are not encoded again.
    again = result.stdout.count("encoded now") and int(re.search(r"encoded now +(\d+) images", result.stdout)[1])
    assert again == IMAGES - 5 * len(shards)
    assert_same(tmp_path / "saved", whole)


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
def test_damaged_shards_are_named_and_made_again(whole, tmp_path, how, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "shard-000002.parquet"
    path.unlink() if how == "gone" else damage(path, how)
    for check in (lambda: verify(out), lambda: list(EncodedCorpus(out))):
        with pytest.raises(ValueError, match=r"shard-000002.parquet: (no such shard|expected (\d+ bytes|SHA-256))"):
            check()
    assert main(["info", str(out)]) == 2
    assert "shard-000002.parquet" in capsys.readouterr().err
    assert encode_corpus("checkpoint", ["photos"], out, CONFIG).encoded == 5
    assert "encoded again" in (err := capsys.readouterr().err) and "shard-000002.parquet" in err
    assert_same(out, whole)
    assert verify(out).counts.sum() == IMAGES * 256


def test_a_damaged_record_is_no_record(whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    damage(out / "shard-000001.json", "truncated")
    assert encode_corpus("checkpoint", ["photos"], out, CONFIG).encoded == 5
    assert_same(out, whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": "5"}, "images: expected a count, got '5'"), ({"captions": None}, "captions: expected a count"),
        ({"skipped": [1]}, "skipped: expected a list"), ({"skipped": 0}, "skipped: expected a list"),
        ({"bytes": -1}, "shards: expected name, rows"),
        ({"name": "shard-000000.parquet"}, "name: expected shard-000001"),
        ([[]], "expected a JSON object"),
    ],
)  # fmt: skip
def test_a_record_of_wrong_types_is_no_record(whole, tmp_path, capsys, change, says):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    path = out / "shard-000001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change} if isinstance(change, dict) else change))
    assert encode_corpus("checkpoint", ["photos"], out, CONFIG).encoded == 5
    assert "encoded again" in (err := capsys.readouterr().err) and "shard-000001.json" in err and says in err
    assert_same(out, whole)


def test_unreadable_images_are_listed(root, tmp_path, capsys):
    folder, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(root / "photos", folder)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:300])
    os.rename(folder / "004.png", folder / os.fsdecode(b"\xff4.png"))
    (folder / "text.png").write_text("hello")
    assert main(["encode", "checkpoint", str(folder), "--out", str(out), *SETTINGS]) == 3
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["003.png", "text.png"]
    assert "cannot read image" in lines[0]["reason"] and "not an image" in lines[1]["reason"]
    assert f"skipped         2, listed in {out}/skipped.jsonl" in capsys.readouterr().out
    assert read_manifest(out)[1]["totals"]["skipped"] == 2
    rows = rows_of(out)
    assert len(rows) == IMAGES - 1 and "\\xff4.png" in rows


def test_damaged_and_unreachable_shards(root, tmp_path, capsys, monkeypatch):
    shutil.copy("0.tar", tmp_path / "0.tar")
    with open("1.tar", "rb") as whole_tar:
        (tmp_path / "1.tar").write_bytes(whole_tar.read()[:30000])
    out = tmp_path / "out"
    summary = encode_corpus("checkpoint", [f"{tmp_path}/{{0..1}}.tar"], out, CONFIG)
    reasons = [json.loads(line)["reason"] for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert 6 <= summary.images < 13
    assert len(reasons) == summary.skipped == 1 and "1.tar: cannot read the shard" in reasons[0]

    monkeypatch.setattr("semhitok.data.shards.PAUSE", 0)
    names = ["0.tar", "pipe:cat nothing.tar", "2.tar"]
    with pytest.raises(ValueError, match="1 of 3 shards could not be encoded; run the same command again to retry"):
        encode_corpus("checkpoint", names, tmp_path / "b", CONFIG)
    assert "pipe:cat nothing.tar" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "b").glob("*.parquet")) == [
        "shard-000000.parquet",
        "shard-000002.parquet",
    ]
    assert not (tmp_path / "b" / "manifest.json").exists()
    shutil.copy("1.tar", "nothing.tar")
    try:
        assert encode_corpus("checkpoint", names, tmp_path / "b", CONFIG).images == IMAGES
    finally:
        os.unlink("nothing.tar")


def test_rows_without_an_image_are_listed(root, tmp_path):
    data = (root / "photos" / "000.png").read_bytes()
    pq.write_table(pa.table({"image": [data, None, b"no"], "id": [7, 8, 9]}), tmp_path / "x.parquet")
    summary = encode_corpus("checkpoint", [tmp_path / "x.parquet"], tmp_path / "out", CONFIG)
    assert (summary.images, summary.skipped) == (1, 2)
    assert list(rows_of(tmp_path / "out")) == ["7"]
    pq.write_table(pa.table({"picture": [data]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match=r"y.parquet: expected a column image \(struct .* binary\), got picture"):
        encode_corpus("checkpoint", [tmp_path / "y.parquet"], tmp_path / "out2", CONFIG)


def test_another_job_in_the_folder_is_refused(root, whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)

    def refused(*arguments):
        assert main([*map(str, arguments), "--out", str(out)]) == 2
        return capsys.readouterr().err

    assert "batch_size was 4, now 3" in refused(
        "encode", "checkpoint", "photos", "--batch-size", 3, "--shard-images", 5
    )
    assert "sources was" in refused("encode", "checkpoint", "0.tar", *SETTINGS)
    assert "packed was False" in refused("encode", "checkpoint", "photos", *SETTINGS, "--pack")
    torch.manual_seed(1)
    SemHiTok(preset("semhitok-tiny")).save_pretrained(tmp_path / "other")
    assert "codebook_hash was" in refused("encode", tmp_path / "other", "photos", *SETTINGS)
    other = SemHiTok.from_pretrained("checkpoint")
    with torch.no_grad():
        next(other.encoder.parameters()).add_(1)
    other.save_pretrained(tmp_path / "same codebooks")
    assert "encoder_sha256 was" in refused("encode", tmp_path / "same codebooks", "photos", *SETTINGS)
    shutil.copy("photos/000.png", "photos/new.png")
    try:
        assert "the sources have changed" in refused("encode", "checkpoint", "photos", *SETTINGS)
    finally:
        os.unlink("photos/new.png")
    assert_same(out, whole)


def test_sources_are_refused(tmp_path, capsys):
    for names, message in (
        (["none"], "none: no such file"),
        (["none.tar"], "none.tar: no such shard"),
        (["none.parquet"], "none.parquet: no such parquet file"),
        (["photos", "photos/deep"], "photos/deep, which is in photos"),
        (["photos", "./photos"], "expected each once"),
        ([str(tmp_path)], "no images found"),
    ):
        assert main(["encode", "checkpoint", *names, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert main(["encode", "checkpoint", "photos", "--out", str(tmp_path / "x.safetensors"), "--pack"]) == 2
    assert "--pack: expected with a folder as --out" in capsys.readouterr().err
    assert main(["encode", "checkpoint", "photos", "--out", str(tmp_path / "out"), "--engine", "torchrun"]) == 2
    assert "torchrun expects a process that it started" in capsys.readouterr().err


def test_units_do_not_hold_names(root, tmp_path):
    """A unit of image files is a place in a listing, so that memory does not grow with the folder."""
    over = PassedOver()
    units, _ = sources.plan(sources.sort_out(["photos"], over), 5, tmp_path, over)
    assert [(unit.kind, unit.count) for unit in units] == [("images", 5)] * 4 + [("images", 2)]
    keys = [item.key for unit in units for item in read_unit(unit, FIELDS)]
    assert keys == [path.relative_to("photos").as_posix() for path in list_images(["photos"])]
    assert keys == sorted(keys, key=lambda key: Path(key).parts)


# ------------------------------------------------------------------------------------------------
# Reader


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Nine shards of 0 to 40 rows; the ids tell the row."""
    out = tmp_path_factory.mktemp("large")
    layout = Layout(256, 8, "ab" * 32, (2, 2), False)
    shards, number = [], 0
    for shard, count in enumerate((30, 7, 40, 1, 25, 25, 0, 13, 1100)):
        with shard_writer(out / f"s{shard}.parquet", layout) as writer:
            for _ in range(count):
                writer.add(f"key {number}", f"caption {number}", 0, torch.full((2, 2), number))
                number += 1
        shards.append({"name": f"s{shard}.parquet", "rows": count, "bytes": writer.bytes, "sha256": writer.sha256})
    (out / "manifest.json").write_text(json.dumps({**layout.metadata(), "shards": shards}))
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_comes_once_in_an_epoch(large, workers):
    orders = []
    for epoch in (0, 1):
        numbers = []
        for rank in range(2):
            corpus = EncodedCorpus(large, seed=3, shuffle_buffer=16, rank=rank, world_size=2)
            corpus.epoch = epoch
            for ids, captions, keys in DataLoader(corpus, batch_size=7, num_workers=workers):
                assert ids.dtype == torch.int64 and ids.shape[1:] == (2, 2)
                found = ids[:, 0, 0].tolist()
                assert list(captions) == [f"caption {n}" for n in found] and list(keys) == [f"key {n}" for n in found]
                numbers += found
        assert sorted(numbers) == list(range(corpus.rows)) and corpus.rows == 1241
        orders.append(numbers)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_exactly_where_they_were(large, workers):
    corpus = EncodedCorpus(large, seed=1, shuffle_buffer=8, rank=1, world_size=2)
    whole = corpus.batches(5, workers=workers)
    expected = [next(whole) for _ in range(400)]  # some epochs of the smaller streams
    whole.close()
    for stop in (1, 6, 7, 133):
        first = corpus.batches(5, workers=workers)
        for _ in range(stop):
            next(first)
        position = json.loads(json.dumps(first.position()))
        first.close()
        rest = corpus.batches(5, workers=workers, position=position)
        for want in expected[stop : stop + 30]:
            got = next(rest)
            assert torch.equal(got.ids, want.ids) and (got.caption, got.key) == (want.caption, want.key)
        rest.close()


def test_an_old_position_gives_the_rows_it_always_gave(large):
    """Positions saved with a run stay readable, and the same seed keeps its order."""
    corpus = EncodedCorpus(large, seed=1, shuffle_buffer=8, rank=1, world_size=2)
    batches = corpus.batches(5)
    seen = [next(batches).ids[:, 0, 0].tolist() for _ in range(7)]
    assert seen[0] == [109, 105, 106, 104, 103]
    position = {
        "corpus": corpus.identity()["corpus"], "seed": 1, "shuffle_buffer": 8, "processes": 2, "rank": 1, "workers": 0,
        "turn": 0, "streams": [[0, 35]],
    }  # fmt: skip
    assert batches.position() == position and list(batches.position()) == list(position)
    batches = corpus.batches(5, position=position)
    assert [next(batches).ids[:, 0, 0].tolist() for _ in range(2)] == [[36, 3, 5, 0, 1], [14, 10, 13, 11, 12]]


def test_an_epoch_of_batches_has_each_row_once(large):
    corpus = EncodedCorpus(large, shuffle_buffer=100)
    batches = corpus.batches(17)
    numbers = [n for _ in range(corpus.rows // 17) for n in next(batches).ids[:, 0, 0].tolist()]
    assert corpus.rows % 17 == 0 and sorted(numbers) == list(range(corpus.rows))


def test_other_codebooks_and_shards_are_refused(large, whole, tokenizer, tmp_path):
    assert EncodedCorpus(whole, tokenizer.vocabulary).rows == IMAGES
    with pytest.raises(ValueError, match="codebook_hash: expected ids of codebook"):
        EncodedCorpus(large, tokenizer.vocabulary)
    # A shard of other codebooks under a manifest that vouches for it.
    out = tmp_path / "out"
    shutil.copytree(large, out)
    manifest = json.loads((out / "manifest.json").read_text())
    other = Layout(256, 8, "cd" * 32, (2, 2), False)
    with shard_writer(out / "s1.parquet", other) as writer:
        for n in range(7):
            writer.add(str(n), None, 0, torch.full((2, 2), n))
    manifest["shards"][1] |= {"bytes": writer.bytes, "sha256": writer.sha256}
    (out / "manifest.json").write_text(json.dumps(manifest))
    for workers in (0, 1):
        batches = EncodedCorpus(out).batches(4, workers=workers)
        with pytest.raises(ValueError, match=r"s1.parquet: codebook_hash: expected abab"):
            for _ in range(1000):
                next(batches)
    damaged = [
        ({"shards": []}, "shards: expected a list of at least one"), ({"shards": "ab"}, "shards: expected a list"),
        ({"shards": [7]}, "shards: expected name, rows, bytes and sha256"),
        ({"shards": manifest["shards"][:1] * 2}, "shards: expected each once"),
        ({"shards": [manifest["shards"][0] | {"name": "../a"}]}, "shards: expected name"),
        ({"shards": [manifest["shards"][0] | {"rows": -1}]}, "shards: expected name"),
        ({"num_codes": "256"}, "layout.num_codes: expected int"), ({"num_codes": float("inf")}, "layout.num_codes"),
        ({"grid": [0, 2]}, "layout.grid: expected two positive"), ({"packed": "no"}, "layout.packed: expected bool"),
        ({"offsets": [0, 1.5]}, "layout.offsets: expected a list of integers"), ({"totals": {"rows": "7"}}, "totals"),
        ({"version": "a\nb"}, r"version: expected 1, got 'a\\nb'"),
    ]  # fmt: skip
    for change, message in damaged:
        (out / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=f"manifest.json: not a corpus's manifest, or damaged: {message}"):
            EncodedCorpus(out)
    for text in ("{", "[" * 3000):
        (out / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: not a corpus's manifest"):
            EncodedCorpus(out)
    with pytest.raises(FileNotFoundError, match="finished corpus"):
        EncodedCorpus(tmp_path)


def test_a_manifest_cannot_ask_for_memory_that_its_shards_do_not_need(large, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(large, out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"num_codes": 2**50}))
    with pytest.raises(ValueError, match=r"num_codes: expected 1125899906842624, got 256 \(and 8 more\)"):
        verify(out)
    manifest["shards"][0]["rows"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\.parquet: expected \d+ rows, got \d+$"):
        verify(out)


@pytest.mark.parametrize(
    "change",
    [{"turn": 1}, {"turn": "0"}, {"skipped": -1}, {"streams": [[0, -1]]}, {"streams": [[0]]}, {"streams": "ab"}],
)
def test_damaged_positions_are_refused(large, change):
    corpus = EncodedCorpus(large)
    position = corpus.batches(5).position()
    with pytest.raises(ValueError, match="position: expected one of 1 streams, got"):
        corpus.batches(5, position=position | change)


def test_positions_of_others_are_refused(large):
    position = EncodedCorpus(large, seed=1).batches(5).position()
    for corpus, workers, key in (
        (EncodedCorpus(large, seed=2), 0, "seed"),
        (EncodedCorpus(large, seed=1, shuffle_buffer=9), 0, "shuffle_buffer"),
        (EncodedCorpus(large, seed=1, world_size=2), 0, "processes"),
        (EncodedCorpus(large, seed=1), 2, "workers"),
    ):
        with pytest.raises(ValueError, match=f"position: {key}: expected"):
            corpus.batches(5, workers=workers, position=position)
    with pytest.raises(ValueError, match="expected at least 9 shards, one for each of 3 processes x 3 workers, got 8"):
        EncodedCorpus(large, world_size=3).batches(1, workers=3)
