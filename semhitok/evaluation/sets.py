"""Sets of images to compare: named files, stored as 8-bit PNG at one size.

An image's name is its path below the folder given, or its file's name, without suffix. Sets are in the order of names.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok import distributed
from semhitok._optional import require
from semhitok.data.images import list_images, read_image, save_png

_NAMED = 5  # files a message lists


def named_images(sources: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """{name: file} of the images behind `sources`, in the order of names.

    Raises:
        ValueError: no images, or two of one name (upper and lower case count as the same).
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


def to_uint8(images: Tensor) -> Tensor:
    """Float images in [0, 1], clamped -> uint8, round(255 v), halves to even.

    Raises:
        ValueError: NaN or infinity among the values.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images: expected finite values, got others")
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def read_uint8(path: Path) -> Tensor:
    """uint8 [3, H, W] of a stored PNG."""
    return to_uint8(read_image(path))


def store(images: dict[str, Path], folder: Path, convert: Callable[[Tensor], Tensor], label: str) -> str:
    """Write `convert` of every image to folder/NAME.png, 8 bits; the processes share the work.

    Args:
        images: {name: file}.
        folder: new or empty.
        convert: float [3, H, W] in [0, 1] -> [3, S, S]; a ValueError is told with the file's name.
        label: of the progress bar.

    Returns:
        SHA-256 of names and pixels (uint8, [3, S, S] each), in order; the same on every process.

    Raises:
        ValueError: images that cannot be read or converted, on every process, by name.
    """
    digests: dict[str, str] = {}
    bad: list[str] = []
    mine = list(images.items())[distributed.rank() :: distributed.world_size()]
    for name, path in progress(mine, label):
        try:
            image = convert(read_image(path))
        except (ValueError, OSError) as error:
            text = str(error)
            bad.append(text if str(path) in text else f"{path}: {text}")
            continue
        target = folder / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_png(image, target)
        digests[name] = pixel_digest(to_uint8(image))
    everything = distributed.gather_objects((digests, bad))
    bad = [text for _, texts in everything for text in texts]
    if bad:
        more = f", and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        raise ValueError(f"images: {len(bad)} of {len(images)} cannot be used: {'; '.join(bad[:_NAMED])}{more}")
    for some, _ in everything:
        digests |= some
    return hashlib.sha256("".join(f"{name}\n{digests[name]}\n" for name in images).encode()).hexdigest()


def pixel_digest(image: Tensor) -> str:
    """SHA-256 of the bytes of a uint8 image [3, H, W]."""
    return hashlib.sha256(image.cpu().contiguous().numpy().tobytes()).hexdigest()


def check_same_names(expected: Iterable[str], found: Iterable[str], what: str) -> None:
    """Raise ValueError naming images that are missing from `found`, or too many there."""
    expected, found = set(expected), set(found)
    for problem, names in (("missing", expected - found), ("without an original", found - expected)):
        if names:
            listed = ", ".join(sorted(names)[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            raise ValueError(f"{what}: expected one for each of {len(expected)} images, {problem}: {listed}")


def progress(items: Sequence[Any], label: str) -> Any:
    """tqdm's bar on stderr, on a terminal and of the first process only."""
    return require("tqdm").tqdm(items, desc=label, disable=None if distributed.rank() == 0 else True, leave=False)
