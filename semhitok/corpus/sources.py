"""The sources of a corpus, divided into units of work: blocks of image files, webdataset shards, parquet files.

Each unit becomes one shard of ids. The division depends on the sources alone, not on who encodes them or when.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from semhitok._files import open_atomic
from semhitok.corpus import tables
from semhitok.corpus.units import Unit
from semhitok.data import shards
from semhitok.data.captions import escaped
from semhitok.data.kinds import FOLDER, PARQUET, SHARDS, is_url, kind_of
from semhitok.data.listing import OTHER_KIND, check_file, walk_files, walk_images
from semhitok.data.passed_over import PassedOver

LISTING = "images.jsonl"


class Sources(NamedTuple):
    """What was given, sorted out.

    files: images and folders of images, in the order given.
    tables: parquet files and webdataset shards, as (kind, path or URL).
    """

    files: list[str]
    tables: list[tuple[str, str]]


def sort_out(sources: Sequence[str | os.PathLike[str]], passed_over: PassedOver, *, mixed: bool = False) -> Sources:
    """Image files and folders, and shards and parquet files; a folder of shards or of parquet files stands for them.

    passed_over: counts what else is in folders of shards or of parquet files.
    mixed: of a folder that holds images and others the images are meant; otherwise it is refused.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read.
        ValueError: a source given twice, a URL that cannot be opened, a folder of several kinds.
    """
    names = [os.fspath(source) for source in sources]
    _check_apart(names)
    files: list[str] = []
    found: list[tuple[str, str]] = []
    for name in names:
        kind = kind_of(name)
        if kind == PARQUET:
            found += [(PARQUET, path) for path in tables.parquet_files(name)]
        elif kind == SHARDS:
            found += [(SHARDS, url) for url in shards.expand_shards(name)]
        elif kind == FOLDER and (inside := _tables_of(name, mixed, passed_over)):
            found += inside
        else:
            files.append(name)
    _check_apart([path for _, path in found])
    return Sources(files, found)


def keys_collide(sources: Sources) -> bool:
    """Whether images of different sources could have equal keys, which then have to begin with their source.

    Each folder is a source, and so are shards or parquet files together whose names differ in numbers alone, as those
    of one data set do, unless the first images of two of them have the same key.
    """
    folders = [name for name in sources.files if os.path.isdir(name)]
    series: dict[str, list[tuple[str, str]]] = {}
    for kind, path in sources.tables:
        series.setdefault(re.sub(r"\d+", "#", path), []).append((kind, path))
    if len(folders) + len(series) > 1 or (len(folders) + len(series) == 1 and len(sources.files) > len(folders)):
        return True
    for members in series.values():
        if len(members) < 2:
            continue
        keys = [tables.first_key(path) if kind == PARQUET else _first_of_shard(path) for kind, path in members]
        # Rows without keys have numbers, which begin anew in each file. Of a shard that is not here nothing is known.
        if any(key is None and kind == PARQUET for key, (kind, _) in zip(keys, members, strict=True)):
            return True
        known = [key for key in keys if key is not None]
        if len(set(known)) < len(known):
            return True
    return False


def _first_of_shard(url: str) -> str | None:
    return None if is_url(url) else shards.first_key(url)


def plan(
    sources: Sources,
    images_per_unit: int,
    folder: Path,
    passed_over: PassedOver,
    expected: str | None = None,
    *,
    prefixed: bool = False,
) -> tuple[list[Unit], str]:
    """The units of `sources`, and a SHA-256 of all names of images and shards.

    Image files come first, in the order given, then shards and parquet files. The image files are listed in a file of
    `folder`, one JSON list [path, key] per line, so that no process has to hold their names.

    Args:
        sources: see `sort_out`.
        images_per_unit: image files in a unit.
        folder: existing folder for the listing.
        passed_over: counts what else is in folders of images.
        expected: the SHA-256 of an earlier call; if it differs, nothing is written.
        prefixed: keys begin with the source, as given.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read, or the listing cannot be written.
        ValueError: no images, or sources that have changed.
    """
    digest = hashlib.sha256()
    units: list[Unit] = []
    listing = folder / LISTING
    with open_atomic(listing) as out:
        place = count = 0
        for path, key in _files(sources.files, prefixed, passed_over):
            line = json.dumps([path, key]).encode() + b"\n"
            digest.update(line)
            out.write(line)
            if count % images_per_unit == 0:
                units.append(Unit(len(units), "images", str(listing), place))
            units[-1] = replace(units[-1], count=count % images_per_unit + 1)
            place, count = place + len(line), count + 1
        for kind, path in sources.tables:
            prefix, only = escaped(path) if prefixed else "", len(sources.tables) == 1 and not units
            rows = "" if prefixed or only else escaped(os.path.basename(path))
            units.append(Unit(len(units), "parquet" if kind == PARQUET else "webdataset", path, 0, 0, prefix, rows))
        if not units:
            raise ValueError(f"{', '.join(sources.files) or 'sources'}: no images found")
        described = [(u.number, u.kind, u.source if u.kind != "images" else "", u.start, u.count) for u in units]
        digest.update(json.dumps(described).encode())
        if expected not in (None, digest.hexdigest()):
            raise ValueError(
                f"{folder}: the sources have changed: images or shards were added, removed or renamed; encode into a "
                "new folder, or remove this one"
            )
    if not sources.files:
        listing.unlink(missing_ok=True)
    return units, digest.hexdigest()


def _check_apart(names: Sequence[str]) -> None:
    """Refuse a source that is given twice or lies in another one: its images would be encoded twice."""
    seen: dict[str, str] = {}
    for name in names:
        real = name if kind_of(name) == SHARDS and not os.path.isfile(name) else os.path.realpath(name)
        if real in seen:
            raise ValueError(f"sources: expected each once, got {seen[real]} and {name}")
        seen[real] = name
    for real, name in seen.items():
        for parent in Path(real).parents:
            if str(parent) in seen and kind_of(name) not in (SHARDS, PARQUET):
                raise ValueError(f"sources: expected each once, got {name}, which is in {seen[str(parent)]}")


def _files(names: Sequence[str], prefixed: bool, passed_over: PassedOver) -> Iterator[tuple[str, str]]:
    """(path, key) of image files. The key is the name as given or, in a folder, the path inside it."""
    for name in names:
        path = Path(name)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.is_dir():
            for found in walk_images(path, passed_over):
                yield str(found), (found if prefixed else found.relative_to(path)).as_posix()
        else:
            check_file(path)
            yield name, path.as_posix()


def _tables_of(folder: str, mixed: bool, passed_over: PassedOver) -> list[tuple[str, str]]:
    """The parquet files or the shards of a folder; none if it is one of images."""
    image = next(walk_images(folder, PassedOver()), None)
    if image is not None and mixed:
        return []
    found: dict[str, list[tuple[str, str]]] = {}
    others = PassedOver() if image else passed_over  # of a folder of images, `plan` counts them
    for path in walk_files(folder, lambda name: _table_kind(name) in (PARQUET, SHARDS), OTHER_KIND, others):
        kind = _table_kind(path.name)
        found.setdefault(kind, []).append((kind, str(path)))
    firsts = [kind_files[0][1] for kind_files in found.values()] + ([str(image)] if image is not None else [])
    if found and len(firsts) > 1:
        raise ValueError(
            f"{folder}: expected images, webdataset shards or parquet files, got several kinds ({', '.join(firsts)}); "
            "give the files of one kind, or several sources"
        )
    return next(iter(found.values()), [])


def _table_kind(name: str) -> str:
    return kind_of(name.replace("{", ""))  # in a folder braces are no pattern
