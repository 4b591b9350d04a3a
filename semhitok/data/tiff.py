"""TIFF files without metadata, and what Pillow does not tell of their samples.

Pillow reads 12-bit grey without its scale and 16-bit grey as if 0 were always black, and gives up at a damaged tag of
no use. So the tags are read here, and only sound ones that decoding needs are left to it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from semhitok.data.formats import RAW
from semhitok.data.metadata import Stripped, exif_orientation, xmp_orientation

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
_BITS, _COMPRESSION, _PHOTOMETRIC, _PLANES, _FORMAT = 258, 259, 262, 284, 339
_SAMPLES, _SUBFILE, _SUB_IFDS, _DNG = 277, 254, 330, 50706
# Tags of integers that decoding needs: sizes, strips and tiles, compression, samples, colours.
_NEEDED = {
    *(256, 257, _BITS, _COMPRESSION, _PHOTOMETRIC, 266, 273, _SAMPLES, 278, 279, _PLANES, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 338, _FORMAT, 512, 513, 514, 515, 517, 518, 519, 520, 521, 530, 531),
}
_NEEDED_OTHERS = {347: (1, 7), 529: (5,), 532: (5,)}  # JPEG tables, YCbCr: {tag: types}
_MAX_TAGS = 4096
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}


class _Entry(NamedTuple):
    tag: int
    kind: int
    number: int
    raw: bytes  # as it is in the directory
    value: bytes


def strip_tiff(data: bytes) -> Stripped:
    """The first image of a TIFF.

    Raises:
        ValueError: a kind of TIFF that is not read, or a damaged directory.
    """
    order, big = "<" if data[:2] == b"II" else ">", b"+" in data[2:4]
    if data[8:10] == b"CR":
        raise ValueError(f"{RAW} (CR2)")
    start, entries = _directory(data, order, big)
    numbers = {e.tag: _integers(e, order) for e in entries if e.kind in _INTEGERS and e.number <= 64}

    def first(tag: int, default: int) -> int:
        return (numbers.get(tag) or (default,))[0]

    tags = {entry.tag for entry in entries}
    photometric = first(_PHOTOMETRIC, 1)
    if _DNG in tags or photometric in (32803, 34892) or (first(_SUBFILE, 0) & 1 and _SUB_IFDS in tags):
        raise ValueError(RAW)
    bits, samples = first(_BITS, 1), first(_SAMPLES, 1)
    what = _check(bits, samples, photometric, numbers, order)
    grey = photometric in (0, 1) and bits > 8
    black_is_zero = struct.pack(order + "H", _PHOTOMETRIC), struct.pack(order + "H", 1).ljust(8 if big else 4, b"\0")
    one_short = struct.pack(order + ("HQ" if big else "HI"), 3, 1).join(black_is_zero)
    kept = [one_short if grey and e.tag == _PHOTOMETRIC else e.raw for e in entries if _is_needed(e)]
    magic = struct.pack(order + "H", 43 if big else 42)
    head = struct.pack(order + ("Q" if big else "H"), len(kept))
    directory = head + b"".join(kept) + bytes(8 if big else 4)  # the offset 0: no further directory
    stripped = b"".join([data[:2], magic, data[4:start], directory, data[start + len(directory) :]])
    exif = next((_orientation(e, order) for e in entries if e.tag == 274), None)
    xmp = next((xmp_orientation(e.value) for e in entries if e.tag == 700), None)
    white = 2**bits - 1 if bits < 32 else 1
    return Stripped(stripped, exif or xmp or 1, what=what, white=white, inverted=grey and photometric == 0)


def _is_needed(entry: _Entry) -> bool:
    """Whether decoding needs the tag, and it is of a sound type."""
    return entry.kind in (_INTEGERS if entry.tag in _NEEDED else _NEEDED_OTHERS.get(entry.tag, ()))


def _orientation(entry: _Entry, order: str) -> int | None:
    """As in EXIF, whose blocks are TIFFs of such entries."""
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    count = struct.pack(order + "HHI", entry.tag, entry.kind, entry.number)
    return exif_orientation(block + count + entry.value[:4].ljust(4, b"\0"))


def _directory(data: bytes, order: str, big: bool) -> tuple[int, list[_Entry]]:
    """Where the first directory begins, and its entries whose values are inside the file."""
    place, head, entry, inline = (8, "Q", "HHQ", 8) if big else (4, "H", "HHI", 4)
    try:
        start = struct.unpack_from(order + ("Q" if big else "I"), data, place)[0]
        number = struct.unpack_from(order + head, data, start)[0]
        if number > _MAX_TAGS:
            raise ValueError(f"TIFF: expected at most {_MAX_TAGS} tags, got {number}")
        found: list[_Entry] = []
        size = struct.calcsize("<" + entry) + inline
        for n in range(number):
            at = start + struct.calcsize("<" + head) + n * size
            tag, kind, count = struct.unpack_from(order + entry, data, at)
            value, length = at + size - inline, _SIZES.get(kind, 0) * count
            if length > inline:
                value = struct.unpack_from(order + ("Q" if big else "I"), data, value)[0]
            if at + size <= len(data) and 0 < length <= len(data) - value:
                found.append(_Entry(tag, kind, count, data[at : at + size], data[value : value + length]))
    except (struct.error, OverflowError):
        raise ValueError("TIFF: the directory of tags is outside the file") from None
    return start, found


def _integers(entry: _Entry, order: str) -> tuple[int, ...]:
    return struct.unpack(f"{order}{entry.number}{_INTEGERS[entry.kind]}", entry.value)


def _check(bits: int, samples: int, photometric: int, numbers: dict[int, tuple[int, ...]], order: str) -> str:
    """The samples in words; ValueError if Pillow does not read them, or reads them wrongly."""
    compression = (numbers.get(_COMPRESSION) or (1,))[0]
    planes = (numbers.get(_PLANES) or (1,))[0]
    formats = set(numbers.get(_FORMAT, (1,)))
    kind = _FORMATS.get(min(formats), "other") if len(formats) == 1 else "mixed"
    what = f"TIFF of {samples} x {bits}-bit {kind} samples (photometric interpretation {photometric})"
    advice = "is not read; convert it to 8-bit RGB, or 16-bit unsigned grey"
    if photometric == 6 and compression == 1 and samples > 1:
        raise ValueError(f"uncompressed TIFF of YCbCr colours {advice}")
    deep = samples == 1 or photometric not in (0, 1)
    unsigned = bits in (1, 2, 4, 8) or (bits == 12 and samples == 1 and order == "<") or (bits == 16 and deep)
    floats = kind == "floating-point" and bits == 32 and samples == 1
    mixed = samples > 6 or len(set(numbers.get(_BITS, (1,)))) > 1
    if mixed or not (floats or (kind == "unsigned" and unsigned)):
        raise ValueError(f"{what} {advice}")
    if planes == 2 and samples > 1 and bits != 8 and compression == 1:
        raise ValueError(f"{what}, each in a plane of its own, {advice}")
    return what
