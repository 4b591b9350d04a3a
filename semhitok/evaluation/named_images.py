"""Images by name, so that originals and reconstructions can be paired.

An image's name is its path below the given folder, or its file's name, without suffix.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from semhitok.data.images import list_images

_LISTED = 5  # names in a message


def named_images(sources: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """{name: file} of the images behind `sources`, in the order of names.

    Raises:
        ValueError: no images, or two of the same name (upper and lower case count as equal).
        OSError: no such file or folder.
    """
    given = [Path(source) for source in sources]
    folders = [source for source in given if source.is_dir()]
    found: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for path in list_images(given):
        folder = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        name = path.relative_to(folder).with_suffix("").as_posix()
        other = taken.setdefault(unicodedata.normalize("NFC", name).casefold(), path)
        if other != path:
            raise ValueError(f"images: expected one image of each name, got {other} and {path}")
        found[name] = path
    return dict(sorted(found.items()))


def check_same_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Raise ValueError, listing names, unless `found` has the same names as `expected`."""
    expected, found = set(expected), set(found)
    for problem, names in (("missing", expected - found), ("without an original", found - expected)):
        if names:
            listed = ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
            raise ValueError(f"{what}: expected one for each of {len(expected)} images, {problem}: {listed}")
