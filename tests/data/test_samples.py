"""Files of a tar become samples: each image with its own texts, whatever the names and the order."""

import gzip
import io
import lzma
import os
import random
import tarfile
import time

import pytest

from semhitok.data import samples, shards
from semhitok.data.passed_over import PassedOver
from semhitok.data.samples import Member, Pairing

pytest.importorskip("webdataset")


def tar_of(*members, form=tarfile.PAX_FORMAT):
    """A tar of (name, content), or of TarInfo, as bytes."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as tar:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = info.size or len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def read(path, *contents, passed=None):
    """{key: (image, texts)} and the problems and notes of the archives in a file."""
    path.write_bytes(b"".join(contents))
    found, problems = [], []
    for sample in shards.read_shard(str(path), texts=True, passed_over=passed):
        problems += [sample.problem] if sample.problem else list(sample.notes)
        if not sample.problem:
            found.append((sample.key, sample.data.decode(), {s: t.decode() for s, t in sample.texts}))
    return found, problems


def files(*names):
    """Files whose content is their name."""
    return [(name, name.encode()) for name in names]


@pytest.mark.parametrize(
    "names, expected",
    [
        (
            ["v1.0_dog.png", "v1.0_dog.txt", "v1.0_cat.png", "v1.0_cat.txt"],
            [("v1.0_dog", "v1.0_dog.png", "v1.0_dog.txt"), ("v1.0_cat", "v1.0_cat.png", "v1.0_cat.txt")],
        ),
        ([f"scan.{n:03}.png" for n in range(6)], [(f"scan.{n:03}", f"scan.{n:03}.png") for n in range(6)]),
        (
            ["dr.smith.png", "dr.smith.txt", "dr.jones.png", "dr.jones.json"],
            [("dr.smith", "dr.smith.png", "dr.smith.txt"), ("dr.jones", "dr.jones.png", "dr.jones.json")],
        ),
        (
            ["dr.smith.png", "dr.smith.caption.txt", "dr.jones.png", "dr.jones.caption.txt"],
            [
                ("dr.smith", "dr.smith.png", "dr.smith.caption.txt"),
                ("dr.jones", "dr.jones.png", "dr.jones.caption.txt"),
            ],
        ),
        # webdataset's several suffixes
        (
            ["0001.cls", "0001.json", "0001.mask.png", "0001.png", "0001.seg.png", "0001.seg.npy", "0001.ocr.txt"],
            [("0001", "0001.png", "0001.json")],
        ),
        (["0001.img.png", "0001.txt", "0001.cls"], [("0001", "0001.img.png", "0001.txt")]),
        (["0001.image.jpg", "0001.caption.txt"], [("0001", "0001.image.jpg", "0001.caption.txt")]),
        (["0001.png", "0001.caption.txt"], [("0001", "0001.png", "0001.caption.txt")]),
        (
            ["v1.0.png", "v1.0.caption.txt", "v1.5.png"],
            [("v1.0", "v1.0.png", "v1.0.caption.txt"), ("v1.5", "v1.5.png")],
        ),
        (["a.png", "a.txt", "a.b.png", "a.b.txt"], [("a", "a.png", "a.txt"), ("a.b", "a.b.png", "a.b.txt")]),
        # order, folders, case
        (
            [*(f"{n}.png" for n in range(9)), *(f"{n}.txt" for n in range(9))],
            [(f"{n}", f"{n}.png", f"{n}.txt") for n in range(9)],
        ),
        (["a.txt", "b.json", "b.png", "a.png"], [("a", "a.png", "a.txt"), ("b", "b.png", "b.json")]),
        (["x/1.png", "y/1.png", "y/1.txt", "x/1.txt"], [("x/1", "x/1.png", "x/1.txt"), ("y/1", "y/1.png", "y/1.txt")]),
        (["/a/1.PNG", "/a/1.Txt", "../b.v/2.png"], [("/a/1", "/a/1.PNG", "/a/1.Txt"), ("../b.v/2", "../b.v/2.png")]),
    ],
)
def test_each_image_has_its_own_text(tmp_path, names, expected):
    found, problems = read(tmp_path / "a.tar", tar_of(*files(*names)))
    assert [(key, image, *texts.values()) for key, image, texts in found] == expected
    assert problems == []


@pytest.mark.parametrize(
    "names, images, problems",
    [
        (["v1.0_dog.png", "v1.0_cat.txt"], {"v1.0_dog": {}}, ["v1.0_cat: no image among txt"]),
        (["dr.smith.png", "dr.jones.png", "dr.txt"], {"dr.smith": {}, "dr.jones": {}}, ["dr: no image among txt"]),
        (["b.txt"], {}, ["b: no image among txt"]),
        (["c.npy", "c.cls"], {}, ["c: no image among npy, cls"]),
        (["v1.png", "v1.0_dog.txt"], {"v1": {}}, ["v1.0_dog: no image among txt"]),
    ],
)
def test_a_text_without_its_image_is_named(tmp_path, names, images, problems):
    found, named = read(tmp_path / "a.tar", tar_of(*files(*names)))
    assert {key: texts for key, _, texts in found} == images
    assert named == [f"{tmp_path}/a.tar: {problem}" for problem in problems]


@pytest.mark.parametrize(
    "order, texts",
    [
        ("iA tA iB tB", ["tA", "tB"]),
        ("tA iA tB iB", ["tA", "tB"]),
        ("iA iB tA tB", [None, None]),
        ("tA tB iA iB", [None, None]),
        ("iA tA iB", [None, None]),
        ("iA iB", [None, None]),
    ],
)
def test_a_name_that_comes_again_never_has_the_text_of_another(tmp_path, order, texts):
    members = [("x.png" if name[0] == "i" else "x.txt", name.encode()) for name in order.split()]
    found, problems = read(tmp_path / "a.tar", tar_of(*members))
    assert [image for _, image, _ in found] == ["iA", "iB"]
    assert [text.get("txt") for _, _, text in found] == texts
    assert bool(problems) == (None in texts and "t" in order)


def test_archives_behind_one_another_do_not_mix(tmp_path):
    first, second = (
        tar_of(*files("1.png", "1.txt", "2.png")),
        tar_of(("1.png", b"other"), ("2.txt", b"?"), ("3.png", b"c")),
    )
    plain = [("1", "1.png", {"txt": "1.txt"}), ("2", "2.png", {}), ("1", "other", {}), ("3", "c", {})]
    for contents in ((first, second), (gzip.compress(first), gzip.compress(second)), (lzma.compress(first + second),)):
        found, problems = read(tmp_path / "a.tar", *contents)
        assert found == plain
        assert problems == [f"{tmp_path}/a.tar: 2: no image among txt"]
    found, problems = read(tmp_path / "a.tar", first, second[:600])
    assert found == plain[:3] and "cannot read the shard after 3 samples" in problems[0]


def test_links_and_devices_are_named_and_nothing_else_is_lost(tmp_path):
    passed = PassedOver()
    huge = tarfile.TarInfo("huge.png")
    huge.size = shards.MAX_IMAGE + 1
    content = tar_of(
        ("a.png", b"a"), special("b.png", tarfile.LNKTYPE, "a.png"), special("c.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("d.jpg", tarfile.CHRTYPE), special("e.png", tarfile.FIFOTYPE), special("folder.png", tarfile.DIRTYPE),
        ("f.png", b""), ("g.png", b"g"), special("g.txt", tarfile.LNKTYPE, "a.txt"), ("README", b"x"), (".h.png", b"x"),
        ("__meta__/x.png", b"x"), ("i.png", b"i"), ("i.jpg", b"also"), ("i.mask.png", b"m"), ("n" * 300 + ".png", b"n"),
    )  # fmt: skip
    found, problems = read(tmp_path / "a.tar", content, passed=passed)
    assert [(key, image) for key, image, _ in found] == [
        ("a", "a"), ("f", ""), ("g", "g"), ("i", "i"), ("n" * 300, "n")
    ]  # fmt: skip
    assert problems.pop() == f"{tmp_path}/a.tar: i: i.jpg: another image of the sample; i.png is used"
    for name, problem in zip("bcdeg", problems, strict=True):
        assert f"{name}." in problem and "which is not read from a tar" in problem
    assert "a link to a.png" in problems[0] and "a device, pipe" in problems[3]
    assert passed.counts == {"of no image format": 1, "hidden or the system's": 1, "more images of samples": 1}
    assert "1 of no image format (README)" in passed.summary()
    assert "1 more images of samples (i.mask.png)" in passed.summary()


def test_images_without_a_suffix_are_known_by_their_content(tmp_path):
    passed = PassedOver()
    heads = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff"}
    content = tar_of(
        ("photo", heads["jpeg"]), ("photo.txt", b"of photo"), ("README", b"about"), ("empty", b""),
        ("scan.000", heads["png"]), ("scan.001", heads["png"] + bytes(9000)), ("scan.001.txt", b"of 1"),
        ("array.000", b"\x93NUMPY"), ("x.jpg", b"x"), ("x", heads["png"]), (".hidden", heads["png"]),
        special("link", tarfile.SYMTYPE, "photo"), special("scan.002", tarfile.LNKTYPE, "scan.000"),
        special("scan.003", tarfile.FIFOTYPE), ("scan.", heads["png"]),
    )  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    found = list(shards.read_shard(str(path), texts=True, passed_over=passed))
    assert [(sample.key, len(sample.data), dict(sample.texts)) for sample in found] == [
        ("photo", 3, {"txt": b"of photo"}), ("scan.000", 8, {}), ("scan.001", 9008, {"txt": b"of 1"}),
        ("array", 0, {}), ("x", 1, {}), ("x", 0, {}), ("scan.", 8, {}),
    ]  # fmt: skip
    assert [sample.problem.partition(": ")[2] for sample in found if sample.problem] == [
        "array: no image among 000", "x: x: another image of the sample; x.jpg is used",
    ]  # fmt: skip
    assert passed.counts == {"of no image format": 2, "hidden or the system's": 1, "not a file": 3}
    assert shards.first_key(str(path)) == "photo"
    path.write_bytes(tar_of(("README", b"about"), (".x.png", b""), ("scan.000", heads["png"])))
    assert shards.first_key(str(path)) == "scan.000"


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    names = [os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"\xff.a.png")]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [(name, b"x") for name in names]
        found, problems = read(tmp_path / "a.tar", tar_of(*members, form=form))
        assert [(key, texts) for key, _, texts in found] == [("caf\\xe9", {"txt": "x"}), ("\\xff.a", {})]
        assert problems == []


def test_a_large_member_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_IMAGE", 1000)
    content = tar_of(("a.png", bytes(1001)), ("b.png", b"b"))
    found, problems = read(tmp_path / "a.tar", content)
    assert [key for key, _, _ in found] == ["b"] and "a.png: expected at most 1000 bytes, got 1001" in problems[0]


def test_a_header_cannot_ask_for_all_memory(tmp_path):
    """A long name of 10 GB, of which the file has little."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 10**10
    found, problems = read(
        tmp_path / "a.tar", tar_of(*files("1.png"))[:1024], info.tobuf(tarfile.GNU_FORMAT), bytes(2048)
    )
    assert [key for key, _, _ in found] == ["1"] and "bytes of a long name" in problems[0]


def test_zeros_behind_an_archive_end_it(tmp_path):
    """As of a file of a fixed size; looking for another archive in them would take hours."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(*files("1.png")))
    os.truncate(path, 2**36)
    begun = time.monotonic()
    assert [sample.key for sample in shards.read_shard(str(path))] == ["1"]
    assert time.monotonic() - begun < 60


def test_names_of_one_root_take_no_longer_the_more_there_are():
    members = [Member(f"{kind}.{n}.png") for kind in ("scan", "img.word") for n in range(20_000)]
    members += [Member(f"img.a{n}.png") for n in range(20_000)]
    begun = time.monotonic()
    assert len(paired(members)) == 60_000 and time.monotonic() - begun < 60


def paired(members):
    pairing = Pairing(PassedOver())
    found = [sample for member in members for sample in pairing.add(member)]
    return found + list(pairing.rest())


def test_the_window_is_bounded(monkeypatch):
    """Beyond it a text is not paired, but named; memory does not grow."""
    monkeypatch.setattr(samples, "WINDOW_FILES", 20)
    for names in ([f"{n}" for n in range(100)], [f"scan.{n}" for n in range(100)], [f"img.a{n}" for n in range(100)]):
        pairing, given, most = Pairing(PassedOver()), 0, 0
        for n, name in enumerate(names):
            given += len(list(pairing.add(Member(f"{name}.png", b"x"))))
            most = max(most, n + 1 - given)
        assert most <= 41
        found = paired([*(Member(f"{n}.png", b"x") for n in names), *(Member(f"{n}.txt", b"y") for n in names)])
        assert [sample.key for sample in found if not sample.problem] == names
        orphans = sum(bool(sample.problem) for sample in found)
        assert orphans + sum(bool(sample.texts) for sample in found) == 100 and orphans >= 50
        near = [Member(f"{n}.{suffix}", b"z") for n in names for suffix in ("png", "txt")]
        assert all(sample.texts and not sample.problem for sample in paired(near))


def test_no_image_gets_the_text_of_another():
    """Random names and orders: texts have the name of their image as content."""
    chosen = random.Random(0)
    parts = ["a", "b.c", "v1", "v1.0", "v1.0_x", "v1.x", "d.e.f", "1", "1.mask", "x/1", "x/1.2"]
    for _ in range(2000):
        keys = chosen.sample(parts, chosen.randint(1, 6))
        members = [Member(f"{key}.{suffix}", key.encode()) for key in keys for suffix in ("png", "txt", "json")]
        chosen.shuffle(members)
        found = paired(members)
        assert sorted(sample.key for sample in found) == sorted(keys)
        for sample in found:
            assert sample.data == sample.key.encode()
            assert sorted(sample.texts) == [("json", sample.data), ("txt", sample.data)]
        # With files missing, what is paired is still paired rightly, and every image and text is used or named.
        members = [member for member in members if chosen.random() < 0.6]
        for sample in paired(members):
            roots = {key.decode().partition(".")[0] for _, key in sample.texts}
            whole = {key for _, key in sample.texts} <= {sample.data}
            assert not sample.data or whole or roots == {sample.key}
