"""Webdataset shards: tar files, local or behind a URL, whose files make samples as `semhitok.data.samples` says."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

from torch import Tensor

from semhitok._messages import printable, warn
from semhitok._optional import require
from semhitok.data.captions import MAX_TEXT, escaped
from semhitok.data.formats import HEAD, is_image_content, is_image_name
from semhitok.data.images import decode_image, decode_resized, decode_uint8
from semhitok.data.kinds import SHARDS, expand_braces, is_url, kind_of
from semhitok.data.listing import HIDDEN, NOT_A_FILE, NOT_AN_IMAGE, OTHER_KIND, walk_files
from semhitok.data.passed_over import PassedOver
from semhitok.data.samples import Member, Pairing, Sample, is_image, is_text

RETRIES = 3
PAUSE = 1.0  # seconds before each retry
MAX_IMAGE = 2**28  # bytes of an image file
_META = re.compile("__[^/]*__($|/)")  # members that are no samples, by webdataset's convention
_MAX_ZEROS = 2**16  # blocks of 512 bytes
_MAX_HEADER = 2**20  # bytes of a long name or of PAX records


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
                problem = "expected a file, got something else" if os.path.exists(path) else "no such shard"
                raise FileNotFoundError(f"{path}: {problem}")
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
    key: the sample's name, see `semhitok.data.samples`; bytes that are not UTF-8 are \\xNN.
    texts: (suffix, content) of the .txt and .json members, if requested.
    notes: why texts of it are missing.
    """

    name: str
    data: bytes
    problem: str = ""
    ends_shard: bool = False
    transient: bool = False
    key: str = ""
    texts: tuple[tuple[str, bytes], ...] = ()
    notes: tuple[str, ...] = ()

    def image(self) -> Tensor:
        """float32 [3, H, W] in [0, 1]; ValueError if there is none or it cannot be decoded."""
        if self.problem:
            raise ValueError(self.problem)
        return decode_image(self.data, self.name)

    def uint8(self) -> Tensor:
        """`to_uint8(image())` in a quarter of the memory."""
        if self.problem:
            raise ValueError(self.problem)
        return decode_uint8(self.data, self.name)

    def resized(self, size: int) -> Tensor:
        """`resize_crop(image(), size)` without the whole image in floating point."""
        if self.problem:
            raise ValueError(self.problem)
        return decode_resized(self.data, self.name, size)


@dataclass
class _Fault:
    """Why one attempt to read a shard failed, if it did; `transient`: another attempt may succeed."""

    reason: str = ""
    transient: bool = False

    def note(self, error: Exception, transient: bool) -> None:
        self.reason = " ".join(str(error).split()) or type(error).__name__
        self.transient = transient


def read_shard(
    url: str, skip: int = 0, *, texts: bool = False, passed_over: PassedOver | None = None
) -> Iterator[ShardSample]:
    """The samples of a shard after the first `skip`, undecoded; if it cannot be read to its end, the last one says why.

    A shard that cannot be reached, or whose connection breaks, is retried three times. Only images and, with `texts`,
    .txt and .json members are read. Nothing in a shard is run or unpickled. What is no part of a sample is counted in
    `passed_over`. At most some 64 MiB of images and texts are held, see `semhitok.data.samples`.
    """
    given = 0
    fault = _Fault()
    for attempt in range(1 + RETRIES):
        if attempt:
            time.sleep(PAUSE)
        fault = _Fault()
        counted = PassedOver() if passed_over is None else passed_over
        if attempt and passed_over is not None:
            passed_over.clear()
        # A retry gives what comes after the samples already given.
        for sample in islice(_read_once(url, fault, texts, attempt == RETRIES, counted), given, None):
            given += 1
            if given > skip:
                yield _named(url, sample)
        if not fault.reason:
            return
        if not fault.transient:
            break
    if given >= skip:
        problem = f"{url}: cannot read the shard after {given} samples: {fault.reason}"
        yield ShardSample(url, b"", problem, True, fault.transient)


def read_reporting(reported: set[str], url: str, skip: int = 0, *, texts: bool = False) -> Iterator[ShardSample]:
    """`read_shard`; at the end of a shard that is not among `reported` yet, what it passes over is named on stderr."""
    passed_over = PassedOver()
    yield from read_shard(url, skip, texts=texts, passed_over=passed_over)
    if passed_over.counts and url not in reported:
        reported.add(url)
        warn(f"{url}: {passed_over.summary()}")


def shards_in(folder: str, passed_over: PassedOver) -> list[str]:
    """The shards in a folder, in all depths; what else is there is counted in `passed_over`."""
    # In a folder, braces are no pattern.
    found = walk_files(folder, lambda name: kind_of(name.replace("{", "")) == SHARDS, OTHER_KIND, passed_over)
    return [str(path) for path in found]


def first_key(path: str) -> str | None:
    """The key of the first file of a local tar that can be a part of a sample; None if there is none."""
    try:
        with open(path, "rb") as file, _Archive.open(fileobj=_decompressed(file), mode="r|") as tar:
            for member in tar:
                vars(tar)["members"] = []
                found = _member(tar, member, False, PassedOver()) if member.isreg() else None
                if found is not None:
                    return found.key
    except Exception:  # as in `_members`; whoever reads the whole tar reports it
        return None
    return None


def _named(url: str, sample: Sample) -> ShardSample:
    key = escaped(sample.key)
    name = printable(f"{url}: {key}")
    problem = sample.problem and f"{name}: {sample.problem}"
    return ShardSample(name, sample.data, problem, key=key, texts=sample.texts, notes=sample.notes)


def _read_once(url: str, fault: _Fault, texts: bool, last: bool, passed_over: PassedOver) -> Iterator[Sample]:
    """last: there is no other attempt."""
    try:
        source = (require("webdataset.gopen", "train").gopen if is_url(url) else open)(url, "rb")
    except (OSError, ValueError) as error:
        fault.note(error, transient=True)
        return
    # webdataset checks a command's exit status at every read, and then loses, by chance, the rest of what a command
    # that fails has written. Read its stream directly; `close` checks the status at the end.
    stream = _Watched(getattr(source, "stream", source))
    pairing = Pairing(passed_over)
    try:
        for member in _members(stream, fault, texts, passed_over):
            # The end of an archive that another one follows: their files do not belong together.
            yield from pairing.rest() if member is None else pairing.add(member)
        while is_url(url) and stream.stream.read(2**20):  # to the end: a command whose output is not read fails
            pass
    except OSError as error:
        fault.note(error, transient=True)
    finally:
        try:
            source.close()
        except OSError:  # webdataset's message repeats the whole command
            fault.note(OSError(f"reading ended with status {getattr(source, 'status', None)}"), transient=True)
    # Another attempt may find the rest of the samples that are incomplete.
    if last or not fault.transient:
        yield from pairing.rest(cut=bool(fault.reason))


class _Watched(io.RawIOBase):
    """A stream that remembers whether reading it failed: then the content need not be damaged."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.head, self.failed = stream, b"", False

    def readable(self) -> bool:
        return True

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, or those up to the end, which are still to be read."""
        while len(self.head) < size and (more := self._read(size - len(self.head))):
            self.head += more
        return self.head[:size]

    def readinto(self, buffer: Any) -> int:
        data, self.head = (self.head[: len(buffer)], self.head[len(buffer) :]) if self.head else (None, b"")
        data = self._read(len(buffer)) if data is None else data
        buffer[: len(data)] = data
        return len(data)

    def _read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except OSError:
            self.failed = True
            raise


def _decompressed(stream: _Watched | IO[bytes]) -> Any:
    """The content of a stream that may be compressed, in one piece or several."""
    raw = stream if isinstance(stream, _Watched) else _Watched(stream)
    head = raw.peek(6)
    buffered = io.BufferedReader(raw)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=buffered, mode="rb")
    if head.startswith(b"BZh"):
        return bz2.BZ2File(buffered)
    if head.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
        return lzma.LZMAFile(buffered)
    return buffered


class _Header(tarfile.TarInfo):
    """A header that is an error if it is damaged or missing; `tarfile` takes that for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        meta = (*"xgX", "L", "K")  # PAX records, long names and link names: tarfile reads them as a whole
        if header.type.decode("latin-1") in meta and header.size > _MAX_HEADER:
            raise tarfile.ReadError(f"expected at most {_MAX_HEADER} bytes of a long name, got {header.size}")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        assert isinstance(tar, _Archive)
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                tar.ended, tar.zeros = True, tar.zeros + 1
                if tar.zeros > _MAX_ZEROS:  # the rest of a file of a fixed size, and no other archive
                    raise tarfile.EmptyHeaderError("zeros") from None  # type: ignore[attr-defined]
                raise
            if tar.ended and isinstance(error, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"truncated or damaged: {error}") from None


class _Archive(tarfile.TarFile):
    """A tar, or several behind one another, as `cat` and `tar -A` make them.

    ended: an end mark was read, and no file after it.
    zeros: blocks of end marks and of zeros behind them, since the last file.
    """

    tarinfo = _Header
    ignore_zeros = True  # goes on after an end mark; `_Header` still refuses what is no header
    ended = False
    zeros = 0


def _members(stream: _Watched, fault: _Fault, texts: bool, passed_over: PassedOver) -> Iterator[Member | None]:
    """A tar's files that can be parts of samples, in order; None stands between two archives.

    Content is read of images and, if requested, of texts only.
    """
    try:
        with _Archive.open(fileobj=_decompressed(stream), mode="r|") as tar:
            while (header := tar.next()) is not None:
                vars(tar)["members"] = []  # otherwise every header is kept to the end
                if tar.ended:
                    tar.ended, tar.zeros = False, 0
                    yield None
                member = _member(tar, header, texts, passed_over)
                if member is not None:
                    yield member
    except Exception as error:  # decompressors and header fields fail in many ways
        fault.note(error, transient=stream.failed)


def _member(tar: tarfile.TarFile, header: tarfile.TarInfo, texts: bool, passed_over: PassedOver) -> Member | None:
    name = header.name
    if header.isdir() or _META.match(name):
        return None
    base = name.rpartition("/")[2]
    if base.startswith("."):
        passed_over(name, HIDDEN)
        return None
    file, head, bare = None, b"", False
    if is_image_name(base) is None:  # its content tells
        file = tar.extractfile(header) if header.isreg() else None
        head = file.read(HEAD) if file else b""
        bare = is_image_content(head)
        if not header.isreg():
            passed_over(name, NOT_A_FILE)
            return None
        if not bare and "." not in base:
            passed_over(name, NOT_AN_IMAGE)
            return None
    image = bare or is_image(name)
    if not image and not is_text(name):
        return Member(name) if header.isreg() else None
    limit = MAX_IMAGE if image else MAX_TEXT
    if not header.isreg():
        kind = "link" if header.islnk() or header.issym() else "device, pipe or file of an unknown kind"
        target = f" to {header.linkname}" if kind == "link" else ""
        return Member(name, problem=f"{name}: a {kind}{target}, which is not read from a tar")
    if header.size > limit:
        return Member(name, problem=f"{name}: expected at most {limit} bytes, got {header.size}", bare=bare)
    if file is None and (image or texts):
        file = tar.extractfile(header)
    return Member(name, head + file.read() if file else b"", bare=bare)
