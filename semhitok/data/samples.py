"""Which files of a tar make a sample: an image with its texts.

Files that are called the same up to their last suffix make a sample: `v1.0_dog.png` and `v1.0_dog.txt`. What they share
is its *key*. webdataset's convention of several suffixes is followed where it is clear: what stands between the first
dot of the base name and the last suffix has to be a word, as in `0001.mask.png`, not `0_dog`. What stands before the
first dot is the *root*.

- Beside `0001.png`, an image `0001.mask.png` without a text of its own is about that image, and is passed over. So are
  `0001.ocr.txt` and `0001.seg.npy`.
- If `0001.img.png` is the only such image and there is no `0001.png`, then `0001.txt`, `0001.json`, ... belong to it,
  and the key is `0001`.
- `0001.caption.txt` and `0001.text.json` are texts of either.

An image whose name has no suffix, or a number for one as in `scan.000`, is called as a whole: its text is
`scan.000.txt`. Of two images of one sample, as `a.jpg` and `a.png`, the first counts; the other is a problem.

Files of a sample need not be neighbours, but must lie within a window of 64 MiB and 16,384 files. A text without an
image is a sample with a problem. If a name comes again, a new sample begins. The texts of both are used only if both
have the same suffixes in the same order: otherwise nobody could say which text belongs to which image.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from semhitok.data.captions import FIELDS
from semhitok.data.images import SUFFIXES
from semhitok.data.passed_over import PassedOver

TEXTS = (".txt", ".json")
WINDOW_BYTES, WINDOW_FILES = 2**26, 2**14
_MAX_FAMILY = 32  # keys of one root; names that share more, such as img.a.png, img.b.png, ..., are their own samples
_WORDS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_AMBIGUOUS = "the name comes more than once, and it is unclear which text belongs to which image"


class Member(NamedTuple):
    """A file of a tar: its name, its content where it was read, and why it cannot be, if so."""

    name: str
    data: bytes = b""
    problem: str = ""
    bare: bool = False  # an image whose name has no suffix

    @property
    def key(self) -> str:
        return self.name if self.bare else self.name.rpartition(".")[0]


class Sample(NamedTuple):
    """An image with its texts; or, without an image, the problem.

    texts: (suffix, content) of its .txt and .json files.
    notes: why texts of it are missing.
    """

    key: str
    data: bytes = b""
    problem: str = ""
    texts: tuple[tuple[str, bytes], ...] = ()
    notes: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Whether a file's name, or a suffix without its dot, is that of an image."""
    return f".{name}".lower().endswith(SUFFIXES)


def is_text(name: str) -> bool:
    """Whether a file's name, or a suffix without its dot, is that of a text that may be a caption."""
    return f".{name}".lower().endswith(TEXTS)


@dataclass(eq=False)
class _Entry:
    """The files of one key.

    relatives: entries that left the window before this one, to which they belong.
    doubtful: not the only image of its root: another one left the window before it.
    again, after: the entry that a repeated name began, and the one before it.
    """

    key: str
    root: str
    members: dict[str, Member] = field(default_factory=dict)  # by suffix
    relatives: list[_Entry] = field(default_factory=list)
    files: int = 0
    size: int = 0
    used: bool = False
    doubtful: bool = False
    again: _Entry | None = None
    after: _Entry | None = None

    @property
    def is_plain(self) -> bool:
        return self.key == self.root

    @property
    def word(self) -> str:
        """What stands between the root and the suffix if it looks like a word, or words; or empty."""
        between = self.key[len(self.root) + 1 :]
        return between if _WORDS.fullmatch(between) else ""

    @property
    def named(self) -> str:
        """The key whose caption this is, by its last word; or empty."""
        key, _, last = self.key.rpartition(".")
        return key if last in FIELDS and not self.is_plain else ""

    @property
    def images(self) -> list[str]:
        return [suffix for suffix, member in self.members.items() if member.bare or is_image(suffix)]

    @property
    def has_text(self) -> bool:
        return any(map(is_text, self.members))

    def texts(self, prefix: str = "") -> list[tuple[str, Member]]:
        return [(prefix + suffix, member) for suffix, member in self.members.items() if is_text(suffix)]

    def is_clear(self) -> bool:
        """Whether the texts are this image's without a doubt."""
        return all(other is None or list(other.members) == list(self.members) for other in (self.again, self.after))


class Pairing:
    """Makes samples of a tar's files, in the order in which their first files come.

    Args:
        passed_over: counts the files that are no part of a sample.
    """

    def __init__(self, passed_over: PassedOver) -> None:
        self.passed_over = passed_over
        self._waiting: deque[_Entry] = deque()
        self._keys: dict[str, _Entry] = {}  # the entry of each key that files can be added to
        self._families: dict[str, dict[_Entry, None]] = {}  # by root, in order
        self._files = self._bytes = 0
        self._last: _Entry | None = None  # the entry that got a file last

    def add(self, member: Member) -> Iterator[Sample]:
        """Add the next file; gives the samples that need not wait any longer."""
        key = member.key
        folder, slash, base = key.rpartition("/")
        root, suffix = folder + slash + base.partition(".")[0], member.name[len(key) + 1 :].lower()
        entry = self._keys.get(key)
        if entry is None or suffix in entry.members:
            new = _Entry(key, root, after=entry)
            if entry is not None:
                entry.again = new
            self._keys[key] = entry = new
            self._waiting.append(new)
            self._families.setdefault(root, {})[new] = None
        entry.members[suffix] = member
        self._count(entry, 1, len(member.data))
        self._last = entry
        # The files that are being read belong together: only a window twice as large divides them.
        while self._is_over(1) and (self._waiting[0].root != root or self._is_over(2)):
            yield from self._oldest()

    def rest(self, cut: bool = False) -> Iterator[Sample]:
        """The samples that are still waiting. cut: more files should have come; the last sample may lack its image."""
        while self._waiting:
            yield from self._oldest(cut)

    def _is_over(self, times: int) -> bool:
        full = self._bytes > times * WINDOW_BYTES or self._files > times * WINDOW_FILES
        return full and len(self._waiting) > 1

    def _oldest(self, cut: bool = False) -> Iterator[Sample]:
        """Take the oldest entry out of the window; gives its sample, if it is one."""
        entry = self._waiting.popleft()
        keys = self._families[entry.root]
        family = list(keys) if len(keys) <= _MAX_FAMILY else [entry]
        owner = self._owner(entry, family)
        if entry.used:
            pass
        elif owner is entry:
            yield self._sample(entry, family)
            first, *more = (entry.members[suffix].name.rpartition("/")[2] for suffix in entry.images)
            for name in more:
                yield Sample(entry.key, problem=f"{name}: another image of the sample; {first} is used")
        elif owner is not None:
            owner.relatives.append(entry)
            self._count(owner, entry.files, entry.size)
        elif not (cut and entry is self._last):
            yield Sample(entry.key, problem=f"no image among {', '.join(entry.members)}")
        self._close(entry)
        del keys[entry]
        if not keys:
            del self._families[entry.root]
        self._files, self._bytes = self._files - entry.files, self._bytes - entry.size
        if entry.after:
            entry.after.again = None
        if entry.again:
            entry.again.after = _Entry(entry.key, entry.root, dict.fromkeys(entry.members, Member("")))

    def _count(self, entry: _Entry, files: int, size: int) -> None:
        entry.files, self._files = entry.files + files, self._files + files
        entry.size, self._bytes = entry.size + size, self._bytes + size

    def _close(self, entry: _Entry) -> None:
        """Files of this key that still come belong to another sample."""
        if self._keys.get(entry.key) is entry:
            del self._keys[entry.key]

    @staticmethod
    def _owner(entry: _Entry, family: list[_Entry]) -> _Entry | None:
        """The entry whose image the files of `entry` belong to, often itself; None if there is none, or more than one.

        family: the entries of its root in the window, with itself; it alone if they are many.
        """
        if not (entry.is_plain or entry.word or entry.named):
            return entry if entry.images else None
        family = [other for other in family if not other.used]
        plain = [other for other in family if other.is_plain and other.images]
        if entry.images:
            about = entry.word and plain and not entry.has_text
            return plain[0] if about else entry
        worded = [other for other in family if other.word and other.images and not other.has_text]
        single = worded[0] if len(worded) == 1 and not plain and not worded[0].doubtful else None
        if entry.is_plain:
            return single
        if not entry.named:  # about the image, but no caption
            return plain[0] if plain else None if entry.has_text else single
        images = [other for other in family if other.key == entry.named and other.images]
        if images:
            repeated = images[0].again or images[0].after
            return None if repeated else images[0]
        return single if entry.word else None

    def _sample(self, entry: _Entry, family: list[_Entry]) -> Sample:
        relatives = list(entry.relatives)
        for other in family:
            if other is not entry and not other.used:
                if self._owner(other, family) is entry:
                    relatives.append(other)
                elif entry.word and other.word:
                    other.doubtful = True
        texts = entry.texts()
        for other in relatives:
            other.used = True
            self._close(other)
            word = other.key[len(entry.key) + 1 :]
            if other.is_plain or other.named:
                texts += other.texts(f"{word}." if word and not other.is_plain else "")
            else:
                for suffix in other.members:
                    self._pass_over(other, suffix)
        key = entry.root if entry.word and any(other.named != entry.key for other in relatives) else entry.key
        image = entry.images[0]
        problem = entry.members[image].problem
        notes = [member.problem for _, member in texts if member.problem]
        if texts and not entry.is_clear():
            texts, notes = [], [_AMBIGUOUS]
        contents = tuple((suffix, member.data) for suffix, member in texts if member.data)
        return Sample(key, entry.members[image].data, problem, contents, tuple(notes))

    def _pass_over(self, entry: _Entry, suffix: str) -> None:
        if is_image(suffix) or is_text(suffix):
            kind = "more images of samples" if is_image(suffix) else "more texts of samples"
            self.passed_over(entry.members[suffix].name, kind)
