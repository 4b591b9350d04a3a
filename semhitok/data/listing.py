"""The images among files and folders, and what a listing passes over."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from semhitok.data.formats import HEAD, image_stem, is_image_content, is_image_name
from semhitok.data.passed_over import UNREADABLE

# Reasons for which something in a folder is passed over.
NOT_AN_IMAGE = "of no image format"
OTHER_KIND = "of another kind"
HIDDEN = "hidden or the system's"
NOT_A_FILE = "not a file"
BROKEN_LINK = "a link to nothing"
LOOP = "a link to a folder around it"
TWICE = "a folder that is listed elsewhere"
CAPTIONS = (".txt", ".TXT")  # suffixes of the text file beside an image
_SYSTEM = ("thumbs.db", "desktop.ini")


def list_images(
    paths: Iterable[str | os.PathLike[str]], passed_over: Callable[[Path, str], None] | None = None
) -> list[Path]:
    """Image files among `paths`, each once, in the order given; those of a folder sorted by name.

    A file that is given counts as an image whatever its name. Folders are searched as `walk_images` does.

    Args:
        paths: files and folders.
        passed_over: as in `walk_images`.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read.
        ValueError: no image found at all, or a path is a pipe, a socket or a device.
    """
    given = [Path(path) for path in paths]
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir():
            found += walk_images(path, passed_over)
        else:
            check_file(path)
            found.append(path)
    if not found:
        raise ValueError(f"{', '.join(map(str, given)) or 'paths'}: no images found")
    return list(dict.fromkeys(found))


def check_file(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of a file or folder; ValueError for a pipe, socket or device, whose reader may wait for ever."""
    found = os.stat(path)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        kind = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(found.st_mode), "device")
        raise ValueError(f"{os.fspath(path)}: expected a file, got a {kind}")
    return found


def walk_images(
    folder: str | os.PathLike[str], passed_over: Callable[[Path, str], None] | None = None
) -> Iterator[Path]:
    """The images of a folder, in all depths, sorted by name, with the names of one branch in memory at a time.

    Images are the files with a suffix of `SUFFIXES`, and those without a suffix, or with a number for one, whose
    content is an image's. Hidden files and folders are passed over. A link to a folder is followed, but every folder is
    listed once: a link that leads to a folder around it, or to one that is listed elsewhere, is passed over. Pipes,
    sockets and devices are passed over unopened.

    Args:
        folder: a folder, or a link to one.
        passed_over: called with the path of what is passed over, and one of the reasons of this module; a `PassedOver`,
            for example. Captions, NAME.txt beside an image of that name, do not count. With it, what cannot be read
            inside `folder` is passed over, too.

    Raises:
        OSError: `folder` cannot be read; without `passed_over`, anything inside it that cannot be read.
    """
    return walk_files(folder, is_image_name, NOT_AN_IMAGE, passed_over)


def walk_files(
    folder: str | os.PathLike[str],
    suits: Callable[[str], bool | None],
    other: str,
    passed_over: Callable[[Path, str], None] | None = None,
) -> Iterator[Path]:
    """The files of a folder that suit, as `walk_images` finds them.

    Args:
        folder, passed_over: as in `walk_images`.
        suits: a file's name -> whether it suits; None if its content has to be that of an image.
        other: the reason for which those that do not suit are passed over.
    """
    seen = {_identity(folder)}
    branch = [(iter(_entries(folder)), os.path.realpath(folder))]
    while branch:
        found = next(branch[-1][0], None)
        if found is None:
            branch.pop()
            continue
        entry, is_caption = found
        path = Path(entry.path)
        try:
            reason = HIDDEN if _is_hidden(entry.name) else _reason(entry, branch, seen, suits(entry.name), other)
            if reason is None and _is_folder(entry):
                below = _entries(path)
                seen.add(_identity(path))
                real = os.path.realpath(path) if entry.is_symlink() else os.path.join(branch[-1][1], entry.name)
                branch.append((iter(below), real))
                continue
        except OSError:
            if passed_over is None:
                raise
            reason = UNREADABLE
        if reason is None:
            yield path
        elif passed_over is not None and not (is_caption and reason == other):
            passed_over(path, reason)


def _entries(folder: str | os.PathLike[str]) -> list[tuple[os.DirEntry[str], bool]]:
    """The entries of a folder, sorted by name, each with whether it would be an image's caption."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    stems = {image_stem(entry.name) for entry in entries if is_image_name(entry.name) is not False}
    texts = {entry.name for entry in entries if entry.name.endswith(CAPTIONS)}
    captions = {next(filter(texts.__contains__, (stem + suffix for suffix in CAPTIONS)), "") for stem in stems}
    return [(entry, entry.name in captions) for entry in entries]


def caption_file(path: str) -> str:
    """The text file beside an image file that holds its caption, if it exists."""
    folder, name = os.path.split(path)
    found = [os.path.join(folder, image_stem(name) + suffix) for suffix in CAPTIONS]
    return next(filter(os.path.exists, found), found[0])


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _reason(
    entry: os.DirEntry[str],
    branch: Sequence[tuple[Any, str]],
    seen: set[tuple[int, int]],
    named: bool | None,
    other: str,
) -> str | None:
    """Why an entry is passed over; None for files and folders to list. `branch`: the folders around, real paths."""
    try:
        if entry.is_dir():
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                root = branch[0][1]
                if any(_is_inside(around, real) for _, around in branch):
                    return LOOP
                inside = os.path.relpath(real, root).split(os.sep)
                if _is_inside(real, root) and not any(map(_is_hidden, inside)):
                    return TWICE  # it is listed where it is
            return TWICE if _identity(entry.path) in seen else None
        if not entry.is_file():
            os.stat(entry.path)
            return NOT_A_FILE
    except OSError:
        if not entry.is_symlink():
            raise
        return None if named else BROKEN_LINK  # the name of an image: an error when it is read
    if named is None:
        with open(entry.path, "rb") as file:
            named = is_image_content(file.read(HEAD))
    return None if named else other


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
