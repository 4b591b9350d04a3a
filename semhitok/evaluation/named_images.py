"""Images by name, so that originals and reconstructions can be paired.

An image's name is its path below the given folder, or its file's name, without suffix: what follows the last dot, if it
is not a number. Where that name is taken, it is the path with its suffix, followed by -2, -3, ... where that is taken,
too; upper and lower case count as equal.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from itertools import chain, count
from pathlib import Path

from semhitok.data.formats import image_stem
from semhitok.data.listing import list_images

_LISTED = 5  # names in a message


def named_images(
    sources: Iterable[str | os.PathLike[str]], passed_over: Callable[[Path, str], None] | None = None
) -> dict[str, Path]:
    """{name: file} of the images behind `sources`, in the order of names. `passed_over`: as in `list_images`.

    Raises:
        ValueError: no images, or two sources with an image of the same path or file name.
        OSError: no such file or folder.
    """
    given = [Path(source) for source in sources]
    folders = [source for source in given if source.is_dir()]
    found: dict[str, Path] = {}
    given_as: dict[str, Path] = {}
    taken: set[str] = set()
    for path in list_images(given, passed_over):
        folder = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        whole = path.relative_to(folder).as_posix()
        other = given_as.setdefault(whole, path)
        if other != path:
            problem = f"expected one image of each name, got {other} and {path}"
            raise ValueError(f"images: {problem}; give the folder that holds both")
        stem = path.relative_to(folder).with_name(image_stem(path.name)).as_posix()
        names = chain([stem, whole], (f"{whole}-{n}" for n in count(2)))
        name = next(name for name in names if _folded(name) not in taken)
        taken.add(_folded(name))
        found[name] = path
    return dict(sorted(found.items()))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def check_same_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Raise ValueError, listing names, unless `found` has the same names as `expected`."""
    expected, found = set(expected), set(found)
    for problem, names in (("missing", expected - found), ("without an original", found - expected)):
        if names:
            listed = ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            raise ValueError(f"{what}: expected one for each of {len(expected)} images, {problem}: {listed}")
