"""Images by name, so that originals and reconstructions can be paired.

An image's name is its path below the given folder, or its file's name, without suffix: what follows the last dot, if it
is not a number.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from semhitok.data.formats import is_image_name
from semhitok.data.listing import list_images

_LISTED = 5  # names in a message


def named_images(
    sources: Iterable[str | os.PathLike[str]], passed_over: Callable[[Path, str], None] | None = None
) -> dict[str, Path]:
    """{name: file} of the images behind `sources`, in the order of names. `passed_over`: as in `list_images`.

    Raises:
        ValueError: no images, or two of the same name (upper and lower case count as equal).
        OSError: no such file or folder.
    """
    given = [Path(source) for source in sources]
    folders = [source for source in given if source.is_dir()]
    found: dict[str, Path] = {}
    taken: dict[str, Path] = {}
    for path in list_images(given, passed_over):
        folder = next((folder for folder in folders if path.is_relative_to(folder)), path.parent)
        name = path.relative_to(folder).as_posix()
        if is_image_name(path.name) is not None:
            name = name.rpartition(".")[0]
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
