"""Webdataset shards: tar files, local or behind a URL, whose members of one key make a sample."""

from __future__ import annotations

import os
import re
import tarfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import IO, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from torch import Tensor

from semhitok._optional import require
from semhitok.data.images import SUFFIXES, decode_image

_NAME = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz|tbz2?|txz)$", re.IGNORECASE)
_URL = re.compile(r"(pipe|file):|[a-z][a-z0-9+.-]*://")
_META = re.compile("__[^/]*__($|/)")  # members that are no samples, by webdataset's convention
_TEXTS = (".txt", ".json")
_RETRIES = 3
_PAUSE = 1.0  # seconds before each


def is_shard(name: str) -> bool:
    """Whether `name` is a shard or a pattern of shards, and not an image file or a folder, by its looks."""
    return bool(_URL.match(name) or _NAME.search(name) or ("{" in name and not os.path.exists(name)))


def expand_shards(name: str) -> Iterator[str]:
    """The shards of a pattern, as paths and URLs, checked as far as that can be done without a network.

    Raises:
        FileNotFoundError: a local shard does not exist.
        ValueError: unbalanced braces, or a URL that webdataset cannot open.
        ImportError: webdataset is not installed.
    """
    schemes = require("webdataset.gopen", "train").gopen_schemes
    if not _URL.match(name) and os.path.exists(name):
        urls = [name]  # braces and all
    else:
        urls = list(require("braceexpand", "train").braceexpand(name))
    for url in urls:
        scheme = urlparse(url).scheme if _URL.match(url) else "file"
        if scheme == "file":
            path = url2pathname(urlparse(url).path) if _URL.match(url) else url
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{path}: no such shard")
            yield path
        elif scheme in schemes:
            yield url
        else:
            known = ", ".join(sorted(key for key in schemes if not key.startswith("_")))
            raise ValueError(
                f"{url}: expected a local shard or one of {known} (with pipe:COMMAND any other), got {scheme}"
            )


class Sample(NamedTuple):
    """A sample of a shard, undecoded; or, as a shard's last, what kept it from being read to its end.

    name: the shard and the sample's key, for messages.
    data: an image file's content, or nothing if there is a problem.
    problem: why there is no image; empty if there is one.
    ends_shard: the problem is the shard's.
    passing: another time the shard may be read: a connection broke, say.
    key: what the names of the sample's members begin with.
    texts: (suffix, content) of its .txt and .json members, if they were asked for.
    """

    name: str
    data: bytes
    problem: str = ""
    ends_shard: bool = False
    passing: bool = False
    key: str = ""
    texts: tuple[tuple[str, bytes], ...] = ()

    def image(self) -> Tensor:
        """float32 [3, H, W] in [0, 1]; ValueError if there is none or it cannot be decoded."""
        if self.problem:
            raise ValueError(self.problem)
        return decode_image(self.data, self.name)


@dataclass
class _Fault:
    """What went wrong in reading a shard once, if anything; `passing`: another time it may not."""

    reason: str = ""
    passing: bool = False

    def note(self, error: Exception, passing: bool) -> None:
        self.reason = " ".join(str(error).split()) or type(error).__name__
        self.passing = passing


def read_shard(url: str, texts: bool = False) -> Iterator[Sample]:
    """The samples of a shard, undecoded; the last one says so if it could not be read to its end.

    A shard that cannot be reached, or whose connection breaks, is tried three times more. Only
    images, and with `texts` .txt and .json members, are read; nothing of a shard is run or unpickled.
    """
    given = 0
    fault = _Fault()
    for attempt in range(1 + _RETRIES):
        if attempt:
            time.sleep(_PAUSE)
        fault = _Fault()
        # A connection that broke half-way is taken up where it broke.
        for sample in islice(_read_once(url, fault, texts), given, None):
            given += 1
            yield sample
        if not fault.reason:
            return
        if not fault.passing:
            break
    problem = f"{url}: cannot read the shard after {given} samples: {fault.reason}"
    yield Sample(url, b"", problem, True, fault.passing)


def _read_once(url: str, fault: _Fault, texts: bool) -> Iterator[Sample]:
    try:
        source = (require("webdataset.gopen", "train").gopen if _URL.match(url) else open)(url, "rb")
    except (OSError, ValueError) as error:
        fault.note(error, passing=True)
        return
    # Of a command webdataset asks the status at every read, and so may lose the rest of what one that
    # failed has written, or not, by chance. Here it is asked at the end.
    stream = getattr(source, "stream", source)
    try:
        yield from _group(url, _members(stream, fault, texts), fault)
        while stream.read(2**20):  # to the end: a command that is cut off fails
            pass
    except OSError as error:
        fault.note(error, passing=True)
    finally:
        try:
            source.close()
        except OSError:  # webdataset's words for it repeat the whole command
            fault.note(OSError(f"reading ended with status {getattr(source, 'status', None)}"), passing=True)


class _Member(tarfile.TarInfo):
    """`tarfile` takes a damaged or missing header for the archive's end. Only the end's own mark is it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"truncated or damaged: {error}") from None


def _members(stream: IO[bytes], fault: _Fault, texts: bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a tar's files, in order; only images, and texts if asked for, have their content read."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # it would hold every header to the end
                if not member.isreg() or _META.match(member.name):
                    continue
                wanted = _is_image(member.name) or (texts and member.name.lower().endswith(_TEXTS))
                file = tar.extractfile(member) if wanted else None
                yield member.name, file.read() if file else b""
    except Exception as error:  # decompressors and header fields fail in many ways
        fault.note(error, passing=isinstance(error, OSError))


def _group(url: str, members: Iterable[tuple[str, bytes]], fault: _Fault) -> Iterator[Sample]:
    """Samples from files in a row that share a key, as webdataset forms them."""
    split = require("webdataset.tariterators", "train").base_plus_ext
    key: str | None = None
    entries: dict[str, bytes] = {}
    for name, data in members:
        prefix, suffix = split(name)
        if prefix is None:  # no suffix, or a hidden file
            continue
        suffix = suffix.lower()
        if prefix != key or suffix in entries:
            if key is not None:
                yield _sample(url, key, entries)
            key, entries = prefix, {}
        entries[suffix] = data
    # What was being read when it broke off may have its image already. If not, the fault stands for it.
    if key is not None and (not fault.reason or any(map(_is_image, entries))):
        yield _sample(url, key, entries)


def _sample(url: str, key: str, entries: Mapping[str, bytes]) -> Sample:
    name = f"{url}: {key}"
    images = [suffix for suffix in entries if _is_image(suffix)]
    if not images:
        return Sample(name, b"", f"{name}: no image among {', '.join(entries)}", key=key)
    texts = tuple((suffix, data) for suffix, data in entries.items() if data and f".{suffix}".endswith(_TEXTS))
    # "0001.mask.png" beside "0001.png" is something about the image.
    return Sample(name, entries[min(images, key=lambda suffix: suffix.count("."))], key=key, texts=texts)


def _is_image(name: str) -> bool:
    """Of a file's name, or of a suffix without its dot."""
    return f".{name}".lower().endswith(SUFFIXES)
