"""Which files of a folder are images, and what is passed over for which reason."""

import io
import os
import socket
import struct

import pytest
from PIL import Image

from semhitok.data import listing
from semhitok.data.listing import list_images, walk_images
from semhitok.data.passed_over import PassedOver


def picture(form):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, form)
    return file.getvalue()


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def found(*folders):
    """Names of the images relative to the first folder, and {name: reason} of what is passed over."""
    over = {}
    images = list_images(folders, lambda path, reason: over.setdefault(str(path.relative_to(folders[0])), reason))
    return [str(path.relative_to(folders[0])) for path in images], over


def test_images_by_suffix(tmp_path):
    names = [
        "a.apng",
        "a.avif",
        "a.jfif",
        "a.jpe",
        "a.JPG",
        "a.mpo",
        "a.pfm",
        "a.heic",
        "a.jxl",
        "a.dng",
        "v1.0_dog.png",
    ]
    others = ["a.pdf", "a.svg", "a.eps", "a.psd", "a.py", "png", "a.png~"]
    fill(tmp_path, **{name: b"" for name in (*names, *others)})
    images, over = found(tmp_path)
    assert images == sorted(names)
    assert over == dict.fromkeys(others, listing.NOT_AN_IMAGE)


def test_images_by_content(tmp_path):
    forms = ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"]
    fill(tmp_path, **{f"of {form}": picture(form) for form in forms}, **{"scan.000": picture("PNG")})
    others = {"README": b"words", "Makefile": b"all:\n", "empty": b"", "BMW": b"BMW cars", "x.bin": picture("PNG")}
    fill(tmp_path, **others, core=b"\x7fELF")
    images, over = found(tmp_path)
    assert images == sorted([*(f"of {form}" for form in forms), "scan.000"])
    assert over == dict.fromkeys([*others, "core"], listing.NOT_AN_IMAGE)


def test_captions_beside_images_are_not_passed_over(tmp_path):
    images = {"a.png": b"", "B.JPG": b"", "scan": picture("PNG"), "scan.01": picture("PNG")}
    texts = ["a.txt", "scan.txt", "scan.01.txt", "B.TXT"]
    others = ["a.TXT", "a.png.txt", "c.txt"]  # of a.txt and a.TXT, the first counts
    fill(tmp_path, **images, **dict.fromkeys([*texts, *others], b""))
    assert found(tmp_path) == (sorted(images), dict.fromkeys(others, listing.NOT_AN_IMAGE))


def test_what_systems_leave_behind(tmp_path):
    hidden = [".DS_Store", "._photo.jpg", ".git", "Thumbs.db", "desktop.ini"]
    fill(tmp_path, **{name: b"" for name in (*hidden[:2], ".git/x.png", *hidden[3:], "photo.jpg")})
    assert found(tmp_path) == (["photo.jpg"], dict.fromkeys(hidden, listing.HIDDEN))


def test_linked_folders_are_followed_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    fill(root, **{"own/a.png": b""})
    fill(other, **{"cats/b.png": b"", "cats/deep/c.png": b""})
    (root / "cats").symlink_to(other / "cats")
    (root / "cats again").symlink_to(other / "cats")
    (root / "owned").symlink_to("own")
    (root / "all others").symlink_to(other)  # listed first, with cats
    assert found(root) == (
        ["all others/cats/b.png", "all others/cats/deep/c.png", "own/a.png"],
        {"cats": listing.TWICE, "cats again": listing.TWICE, "owned": listing.TWICE},
    )
    (root / "all others").unlink()
    images, over = found(root)
    assert images == ["cats/b.png", "cats/deep/c.png", "own/a.png"]
    assert over == {"cats again": listing.TWICE, "owned": listing.TWICE}
    assert list_images([tmp_path / "root"]) == [root / name for name in images]
    # A folder that is itself a link, and one that is hidden, which nothing else lists
    (tmp_path / "link").symlink_to(root)
    assert len(list_images([tmp_path / "link"])) == 3
    fill(root, **{".store/dogs/d.png": b""})
    (root / "dogs").symlink_to(".store/dogs")
    assert "dogs/d.png" in found(root)[0]


def test_loops(tmp_path):
    root = tmp_path / "root"
    fill(root, **{"a/b/x.png": b""})
    fill(tmp_path, **{"unrelated.png": b""})
    (root / "a/b/loop").symlink_to(root / "a")
    (root / "a/up").symlink_to(tmp_path)  # would list what was not given
    (root / "me").symlink_to(".")
    (root / "itself.png").symlink_to("itself.png")
    (root / "itself").symlink_to("itself")
    images, over = found(root)
    assert images == ["a/b/x.png", "itself.png"]  # the name of an image: refused when it is read
    loops = dict.fromkeys(["a/b/loop", "a/up", "me"], listing.LOOP)
    assert over == loops | {"itself": listing.BROKEN_LINK}


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "queue")
    os.mkfifo(tmp_path / "queue.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket"))
        (tmp_path / "gone").symlink_to("nowhere")
        (tmp_path / "gone.png").symlink_to("nowhere")
        fill(tmp_path, **{"a.png": b""})
        images, over = found(tmp_path)
    assert images == ["a.png", "gone.png"]
    others = dict.fromkeys(["queue", "queue.png", "zero.png", "socket"], listing.NOT_A_FILE)
    assert over == others | {"gone": listing.BROKEN_LINK}


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(name)
    for file in (b"/\xff.png", b"/\xff.txt", b"/\xfe.md"):
        with open(name + file, "wb"):
            pass
    over = PassedOver()
    assert [os.fsencode(path) for path in list_images([tmp_path], over)] == [name + b"/\xff.png"]
    assert over.summary() == r"passed over 1 file: 1 of no image format (\udcfe.md)"


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    fill(tmp_path, **{"a.png": b"", "b/x.png": b"", "c/y.png": b"", "d": picture("PNG")})
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    over = PassedOver()
    assert [path.name for path in walk_images(tmp_path, over)] == ["a.png", "y.png", "d"]
    assert over.unreadable == 1
    assert over.summary() == "passed over 1 file: 1 not readable (b)"
    with pytest.raises(PermissionError):  # nothing would say that it is passed over
        list(walk_images(tmp_path))
    with pytest.raises(PermissionError):
        list_images([tmp_path / "b"], over)


def test_the_summary_names_a_few(tmp_path):
    over = PassedOver()
    assert over.summary() == ""
    fill(tmp_path, **{name: b"" for name in ("a.png", *(f"{n}.txt" for n in range(4)), "a\nb.md")})
    os.mkfifo(tmp_path / "queue")
    list_images([tmp_path], over)
    assert over.summary() == (
        r"passed over 6 files: 5 of no image format (0.txt, 1.txt, 2.txt, ...), 1 not a file (queue)"
    )


def test_a_damaged_head_is_not_an_image(tmp_path):
    fill(tmp_path, **{"a.png": b"", "riff": b"RIFF" + struct.pack("<I", 9) + b"WAVE", "short": b"\x89P"})
    assert found(tmp_path)[0] == ["a.png"]
