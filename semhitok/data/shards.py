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
from semhitok.data.kinds import expand_braces, is_url

RETRIES = 3
PAUSE = 1.0  # seconds before each retry
_META = re.compile("__[^/]*__($|/)")  # members that are no samples, by webdataset's convention
_TEXTS = (".txt", ".json")


def expand_shards(name: str) -> Iterator[str]:
    """The shards of a pattern, as paths and URLs, checked as far as possible without a network.

    Raises:
        FileNotFoundError: a local shard does not exist.
        ValueError: unbalanced braces, or a URL that webdataset cannot open.
        ImportError: webdataset is not installed.
    """
    schemes = require("webdataset.gopen", "train").gopen_schemes
    for url in expand_braces(name):
        scheme = urlparse(url).scheme if is_url(url) else "file"
        if scheme == "file":
            path = url2pathname(urlparse(url).path) if is_url(url) else url
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


class ShardSample(NamedTuple):
    """An undecoded sample of a shard; or, as the last one, why the shard could not be read to its end.

    name: the shard and the sample's key, for messages.
    data: content of an image file; empty if there is a problem.
    problem: why there is no image; empty if there is one.
    ends_shard: the problem is with the shard, not with one sample.
    transient: reading the shard may succeed another time: a connection broke, for example.
    key: the part of the members' names that they share.
    texts: (suffix, content) of the .txt and .json members, if requested.
    """

    name: str
    data: bytes
    problem: str = ""
    ends_shard: bool = False
    transient: bool = False
    key: str = ""
    texts: tuple[tuple[str, bytes], ...] = ()

    def image(self) -> Tensor:
        """float32 [3, H, W] in [0, 1]; ValueError if there is none or it cannot be decoded."""
        if self.problem:
            raise ValueError(self.problem)
        return decode_image(self.data, self.name)


@dataclass
class _Fault:
    """Why one attempt to read a shard failed, if it did; `transient`: another attempt may succeed."""

    reason: str = ""
    transient: bool = False

    def note(self, error: Exception, transient: bool) -> None:
        self.reason = " ".join(str(error).split()) or type(error).__name__
        self.transient = transient


def read_shard(url: str, skip: int = 0, *, texts: bool = False) -> Iterator[ShardSample]:
    """The samples of a shard after the first `skip`, undecoded; if it cannot be read to its end, the last one says why.

    A shard that cannot be reached, or whose connection breaks, is retried three times. Only images and, with `texts`,
    .txt and .json members are read. Nothing in a shard is run or unpickled.
    """
    given = 0
    fault = _Fault()
    for attempt in range(1 + RETRIES):
        if attempt:
            time.sleep(PAUSE)
        fault = _Fault()
        # A retry gives what comes after the samples already given.
        for sample in islice(_read_once(url, fault, texts), given, None):
            given += 1
            if given > skip:
                yield sample
        if not fault.reason:
            return
        if not fault.transient:
            break
    if given >= skip:
        problem = f"{url}: cannot read the shard after {given} samples: {fault.reason}"
        yield ShardSample(url, b"", problem, True, fault.transient)


def _read_once(url: str, fault: _Fault, texts: bool) -> Iterator[ShardSample]:
    try:
        source = (require("webdataset.gopen", "train").gopen if is_url(url) else open)(url, "rb")
    except (OSError, ValueError) as error:
        fault.note(error, transient=True)
        return
    # webdataset checks a command's exit status at every read, and then loses, by chance, the rest of what a command
    # that fails has written. Read its stream directly; `close` checks the status at the end.
    stream = getattr(source, "stream", source)
    try:
        yield from _group(url, _members(stream, fault, texts), fault)
        while stream.read(2**20):  # to the end: a command whose output is not read fails
            pass
    except OSError as error:
        fault.note(error, transient=True)
    finally:
        try:
            source.close()
        except OSError:  # webdataset's message repeats the whole command
            fault.note(OSError(f"reading ended with status {getattr(source, 'status', None)}"), transient=True)


class _Member(tarfile.TarInfo):
    """A header that is an error if it is damaged or missing; `tarfile` takes that for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"truncated or damaged: {error}") from None


def _members(stream: IO[bytes], fault: _Fault, texts: bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of a tar's files, in order; content is read of images and, if requested, of texts only."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                vars(tar)["members"] = []  # otherwise every header is kept to the end
                if not member.isreg() or _META.match(member.name):
                    continue
                wanted = _is_image(member.name) or (texts and member.name.lower().endswith(_TEXTS))
                file = tar.extractfile(member) if wanted else None
                yield member.name, file.read() if file else b""
    except Exception as error:  # decompressors and header fields fail in many ways
        fault.note(error, transient=isinstance(error, OSError))


def _group(url: str, members: Iterable[tuple[str, bytes]], fault: _Fault) -> Iterator[ShardSample]:
    """Consecutive files that share a key as samples, as webdataset forms them."""
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
    # The sample that was being read at a fault may have its image already. If not, the fault is reported in its place.
    if key is not None and (not fault.reason or any(map(_is_image, entries))):
        yield _sample(url, key, entries)


def _sample(url: str, key: str, entries: Mapping[str, bytes]) -> ShardSample:
    name = f"{url}: {key}"
    images = [suffix for suffix in entries if _is_image(suffix)]
    if not images:
        return ShardSample(name, b"", f"{name}: no image among {', '.join(entries)}", key=key)
    texts = tuple((suffix, data) for suffix, data in entries.items() if data and f".{suffix}".endswith(_TEXTS))
    # "0001.mask.png" beside "0001.png" is not the image, but something about it.
    return ShardSample(name, entries[min(images, key=lambda suffix: suffix.count("."))], key=key, texts=texts)


def _is_image(name: str) -> bool:
    """Whether a file's name, or a suffix without its dot, is that of an image."""
    return f".{name}".lower().endswith(SUFFIXES)
