"""The folder of an evaluation, which all processes write together.

OUT/protocol.json     the protocol, with the number of images and the SHA-256 of the references' names and pixels
OUT/reference/        the references; later evaluations in this folder have to have the same
OUT/reconstructions/  of the latest evaluation
OUT/evaluation.json   every figure, those of every image, versions
OUT/index.html        the table and some images
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok import distributed
from semhitok._files import parse_json, write_atomic, write_json
from semhitok._messages import progress
from semhitok.data.images import read_image, read_resized, read_uint8, save_png, to_uint8

_LISTED = 5  # files in a message


class EvaluationFolder:
    """A new or empty folder, or that of an earlier evaluation.

    Raises:
        ValueError: the folder holds other files.
        NotADirectoryError: the path is a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._references, self._reconstructions = path / "reference", path / "reconstructions"
        self._earlier = _read_protocol(path)
        distributed.gather_objects(None)  # nobody writes before everybody has read

    def store_references(
        self, images: dict[str, Path], size: int, protocol: Callable[[list[str]], dict[str, Any]]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Store the centre crops of `images` {name: file}, and protocol.json; remove the results of an earlier run.

        Args:
            protocol: names of the images that can be read -> the protocol.

        Returns:
            the protocol with "reference_sha256"; and {name: why} of the images that cannot be read, which are left out.

        Raises:
            ValueError: fewer than two images that can be read, or an earlier evaluation in this folder had other
                references.
        """
        if distributed.rank() == 0 and not self._earlier:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "protocol.json", b"{}\n")  # marks the folder as an evaluation's

        def make(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
            digest, bad = _store(images, folder, lambda path: read_resized(path, size), "reference")
            if len(images) - len(bad) < 2:
                raise ValueError(f"images: expected at least 2 that can be read; {_named(images, bad)}")
            new = {**protocol([name for name in images if name not in bad]), "reference_sha256": digest}
            for key in ("images", "size", "filter", "rounding", "reference_sha256"):
                if self._earlier and self._earlier.get(key) != new[key]:
                    change = f"{key} was {self._earlier.get(key)}, now {new[key]}; choose another folder"
                    raise ValueError(f"{self.path}: holds an evaluation on other references: {change}")
            return new, bad

        found, bad = _staged(make, self._references)
        if distributed.rank() == 0:
            write_json(self.path / "protocol.json", found)
            for name in ("evaluation.json", "index.html"):
                (self.path / name).unlink(missing_ok=True)
        return found, bad

    def clear_reconstructions(self) -> None:
        """Remove those of an earlier run, for `add_reconstructions`."""
        _replace(None, self._reconstructions)

    def copy_reconstructions(self, images: dict[str, Path], size: int) -> None:
        """Store reconstructions {name: file} in the place of those of an earlier run.

        Raises:
            ValueError: unreadable images, or images of another size.
        """

        def read(path: Path) -> Tensor:
            image = read_image(path)
            if image.shape != (3, size, size):
                found = " x ".join(map(str, image.shape[1:]))
                raise ValueError(f"expected {size} x {size} pixels (the width of the first), got {found}")
            return image

        def make(folder: Path) -> None:
            _, bad = _store(images, folder, read, "copy")
            if bad:
                raise ValueError(f"images: {_named(images, bad)}")

        _staged(make, self._reconstructions)

    def add_reconstructions(self, names: Sequence[str], images: Tensor) -> None:
        """Store uint8 images [B, 3, S, S]. A name may occur more than once, with the same image."""
        for name, image in dict(zip(names, images, strict=True)).items():
            _write(image.float() / 255, self._reconstructions / f"{name}.png")

    def references(self, names: Sequence[str]) -> Tensor:
        """Stored references, uint8 [B, 3, S, S]."""
        return torch.stack([read_uint8(self._references / f"{name}.png") for name in names])

    def reconstructions(self, names: Sequence[str]) -> Tensor:
        """Stored reconstructions, uint8 [B, 3, S, S]."""
        return torch.stack([read_uint8(self._reconstructions / f"{name}.png") for name in names])

    def write_report(self, report: dict[str, Any], page: str) -> None:
        """Write evaluation.json and index.html, on one process."""
        # Neither browsers nor strict parsers read Python's Infinity.
        text = json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
        write_atomic(self.path / "index.html", page.encode())
        write_atomic(self.path / "evaluation.json", text.encode())


def _read_protocol(out: Path) -> dict[str, Any]:
    """protocol.json of an earlier evaluation in this folder, {} if there is none."""
    path = out / "protocol.json"
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, got the file {out}")
    if path.is_file():
        try:
            found = parse_json(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("expected an object")
            return found
        except ValueError as error:
            raise ValueError(f"{path}: not of an evaluation: {error}") from error
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: expected a new folder or that of an evaluation, got {out} with other files")
    return {}


def _store(
    images: dict[str, Path], folder: Path, read: Callable[[Path], Tensor], label: str
) -> tuple[str, dict[str, str]]:
    """Write `read` of every image {name: file} to folder/NAME.png, 8 bits; the processes share the work.

    Returns:
        the SHA-256 of names and pixels (uint8, [3, S, S] each), in order; and {name: why} of images that cannot be
        read, which are left out. The same on every process.
    """
    digests: dict[str, str] = {}
    bad: dict[str, str] = {}
    mine = list(images.items())[distributed.rank() :: distributed.world_size()]
    for name, path in progress(mine, label):
        try:
            image = read(path)
        except (ValueError, OSError) as error:
            text = str(error)
            bad[name] = text if str(path) in text else f"{path}: {text}"
            continue
        _write(image, folder / f"{name}.png")
        pixels = to_uint8(image).cpu().numpy()
        digests[name] = hashlib.sha256(pixels.tobytes()).hexdigest()
    for other, others_bad in distributed.gather_objects((digests, bad)):
        digests |= other
        bad |= others_bad
    lines = (f"{name}\n{digests[name]}\n" for name in images if name in digests)
    return hashlib.sha256("".join(lines).encode()).hexdigest(), {name: bad[name] for name in images if name in bad}


def _named(images: Sized, bad: dict[str, str]) -> str:
    """How many images cannot be used, and why the first of them cannot."""
    more = f", and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return f"{len(bad)} of {len(images)} cannot be used: {'; '.join(list(bad.values())[:_LISTED])}{more}"


def _write(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(image, path)


def _staged(make: Callable[[Path], Any], folder: Path) -> Any:
    """Make a folder's content beside it, then put it in the folder's place, so that no earlier file stays."""
    staging = folder.parent / f".{folder.name}"
    _replace(None, staging)
    try:
        result = make(staging)
    except BaseException:
        if distributed.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    _replace(staging, folder)
    return result


def _replace(source: Path | None, folder: Path) -> None:
    """Put `source`, or an empty folder, in the place of `folder`, for all processes."""
    distributed.gather_objects(None)
    if distributed.rank() == 0:
        if folder.exists():
            shutil.rmtree(folder)
        if source is None:
            folder.mkdir(parents=True)
        else:
            source.rename(folder)
    distributed.gather_objects(None)


def _finite(value: Any) -> Any:
    """Infinite numbers as text, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
