"""Image files without what their pixels do not need.

Decoders give up at a damaged tag, profile or text beside sound pixels. Here such parts are removed before an image is
decoded; of them, only the orientation is used.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from semhitok._optional import require

_MAX_TEXT = 2**20  # bytes of an inflated text or profile, which may be a bomb


@dataclass
class Stripped:
    """An image file without metadata.

    data: the file.
    what: its format in words, if there is more to say than its name.
    orientation: 1 to 8, as EXIF counts them.
    size: width and height as stored, if they have to be known before decoding.
    transparent: the sample value of grey, or the three of RGB, that is transparent.
    white: the sample value of white, for grey of more than 8 bits.
    inverted: 0 is white, for grey of more than 8 bits and floating point.
    buffered: for JPEG, the decoder holds all coefficients, even if it decodes at reduced size.
    """

    data: bytes
    orientation: int = 1
    what: str = ""
    size: tuple[int, int] | None = None
    transparent: tuple[int, ...] | None = None
    white: int = 65535
    inverted: bool = False
    buffered: bool = False


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in an EXIF block, 1 to 8, whatever its other tags are, or None."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return None
    end = start + 2 + 12 * struct.unpack_from(order + "H", exif, start)[0]
    for place in range(start + 2, min(len(exif) - 11, end), 12):
        tag, kind, count = struct.unpack_from(order + "HHI", exif, place)
        code = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}.get(kind)
        if tag == 274 and count == 1 and code:
            value = struct.unpack_from(order + code, exif, place + 8)[0]
            if 1 <= value <= 8:
                return value
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """The orientation in XMP, 1 to 8, or None."""
    found = re.search(rb"""tiff:Orientation(?:=["']|>)([1-8])["'<]""", xmp)
    return int(found[1]) if found else None


def strip_png(data: bytes) -> Stripped:
    """A PNG of its critical chunks; what is transparent is a chunk only for palettes.

    Raises:
        ValueError: a kind of PNG that is not read.
    """
    chunks: list[bytes] = [data[:8]]
    exif: list[int | None] = []
    xmp: int | None = None
    transparent: tuple[int, ...] | None = None
    depth = color = 0
    pixels = False
    place = 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        critical = kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND")
        if not critical and (end > len(data) or not kind.isalpha()):
            # A length is wrong. The pixels, if they are still to come, are found by name.
            found = -1 if pixels else data.find(b"IDAT", place + 4) - 4
            if found < 0:
                chunks.append(b"\0\0\0\0IEND\xaeB`\x82")
                break
            place = found
            continue
        if end > len(data):  # truncated: for the decoder to find
            chunks.append(data[place:])
            break
        body = data[place + 8 : end - 4] if kind != b"IDAT" else b""
        if kind == b"CgBI":
            raise ValueError("a PNG for iPhones alone (CgBI) is not read; convert it with pngcrush of Apple's Xcode")
        if kind == b"IHDR" and length == 13:
            depth, color = body[8], body[9]
        pixels |= kind == b"IDAT"
        sound = critical or zlib.crc32(body, zlib.crc32(kind)) == int.from_bytes(data[end - 4 : end], "big")
        if kind == b"tRNS" and sound and not pixels:
            if color == 3:
                critical = True
            elif color in (0, 2) and length == (2, 6)[color == 2]:
                transparent = struct.unpack(">H" if color == 0 else ">HHH", body)
        elif kind == b"eXIf":
            exif.append(exif_orientation(body))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, text = body.partition(b"\0")
            if keyword == b"Raw profile type exif" and kind != b"iTXt":
                exif.append(_raw_profile(_inflate(text[1:]) if kind == b"zTXt" else text))
            elif keyword == b"XML:com.adobe.xmp" and kind == b"iTXt":
                packed, (_, _, text) = text[:1] == b"\1", (b"", b"", text[2:].split(b"\0", 2)[-1])
                xmp = xmp or xmp_orientation(_inflate(text) if packed else text)
        if critical:
            chunks.append(data[place:end])
        place = end
        if kind == b"IEND":
            break
    if transparent and depth < 16:
        most = 2**depth - 1 if depth else 255
        transparent = tuple((value & most) * 255 // most for value in transparent)
    elif transparent and color == 2:
        raise ValueError("16-bit RGB with a transparent colour (tRNS) is not read; save it with an alpha channel")
    return Stripped(b"".join(chunks), _first([*exif, xmp]), transparent=transparent)


def _raw_profile(text: bytes) -> int | None:
    """The orientation in an EXIF block as ImageMagick writes it: hexadecimal digits, as far as they are sound."""
    # Three lines stand before the digits.
    digits = re.match(rb"[0-9a-fA-F]*", b"".join(text[:_MAX_TEXT].split(b"\n")[3:]))
    found = digits[0] if digits else b""
    return exif_orientation(bytes.fromhex(found[: len(found) // 2 * 2].decode()))


def _inflate(data: bytes) -> bytes:
    """The first MiB of deflated data, as far as it is sound."""
    try:
        return zlib.decompressobj().decompress(data, _MAX_TEXT)
    except zlib.error:
        return b""


def _first(found: list[int | None]) -> int:
    return next((value for value in found if value), 1)


def strip_jpeg(data: bytes) -> Stripped:
    """A JPEG with no application's segments and comments but those that say how colours are stored."""
    parts = [data[:2]]
    exif: list[int | None] = []
    xmp: int | None = None
    components, buffered = 0, False
    place = 2
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if marker < 2 or 0xD0 <= marker <= 0xD8:
            place += 2
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : end]
        if marker in (0xD9, 0xDA):  # the end, or the pixels
            buffered |= marker == 0xDA and len(body) > 0 and body[0] < components
            break
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) > 5:
                components, buffered = body[5], marker in (0xC2, 0xC6, 0xCA, 0xCE)
            parts.append(data[place:end])
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif.append(exif_orientation(body))
        elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or xmp_orientation(body)
        elif (marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14) or (
            marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
        ):
            parts.append(data[place:end])
        if marker >= 0xE0 and (end < place + 4 or data[end : end + 1] != b"\xff"):
            end = _jpeg_tables(data, place + 4) or max(end, place + 2)  # a wrong length
        place = end
    parts.append(data[place:] if place >= 0 else b"")
    return Stripped(b"".join(parts), _first([*exif, xmp]), buffered=buffered)


def _jpeg_tables(data: bytes, start: int) -> int | None:
    """Where the tables of the largest picture begin, after a segment whose length is wrong; it may hold a thumbnail."""
    found: list[tuple[int, int]] = []
    place = start - 1
    while (place := data.find(b"\xff\xdb", place + 1, start + 2**17)) >= 0 and len(found) < 64:
        at, pixels = place, 0
        while data[at : at + 1] == b"\xff" and at + 9 <= len(data) and data[at + 1] >= 0xC0:
            if data[at + 1] == 0xDA:
                found.append((pixels, -place))
                break
            if data[at + 1] in (0xC0, 0xC1, 0xC2):
                height, width = struct.unpack_from(">HH", data, at + 5)
                pixels = height * width
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return -max(found)[1] if found else None


def scale_ppm(data: bytes) -> Stripped:
    """A PGM or PPM of binary samples up to an unusual maximum, scaled to 8 bits, or 16 of grey; others as they are.

    Pillow does the same with each sample in Python, which takes minutes.
    """
    head = re.match(rb"P([56])" + 3 * rb"(?:\s|#[^\r\n]*[\r\n])+(\d{1,10})" + rb"\s", data)
    if not head:
        return Stripped(data)
    kind, width, height, most = head[1], *(int(number) for number in head.groups()[1:])
    if not 0 < most < 65536 or most == 255 or (most == 65535 and kind == b"5"):
        return Stripped(data)
    numpy = require("numpy")
    count = width * height * (1 if kind == b"5" else 3)
    found = numpy.frombuffer(data, ">u2" if most > 255 else "u1", offset=head.end())
    if len(found) < count:
        raise ValueError(f"the file is truncated: expected {count} samples, got {len(found)}")
    white = 65535 if kind == b"5" and most > 255 else 255
    table = (numpy.arange(65536) / most * white).clip(max=white).round().astype(">u2" if white > 255 else "u1")
    header = f"P{kind.decode()} {width} {height} {white}\n".encode()
    return Stripped(header + table[found[:count]].tobytes())


def strip_webp(data: bytes) -> Stripped:
    """A WebP of its pixels; of an animation, its first picture."""
    parts: list[bytes] = []
    size: tuple[int, int] | None = None
    found: dict[bytes, int | None] = {}
    total, place = 4, 12
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        end = place + 8 + length + length % 2
        chunk = data[place:end]
        if kind in (b"EXIF", b"XMP "):
            found.setdefault(kind, (exif_orientation if kind == b"EXIF" else xmp_orientation)(chunk[8 : 8 + length]))
        elif kind in (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF") and (kind != b"ANMF" or kind not in found):
            size = size or _webp_size(kind, chunk)
            if kind == b"VP8X" and len(chunk) >= 18:
                chunk = chunk[:8] + bytes([chunk[8] & ~0x2C]) + chunk[9:]  # no profile, EXIF, XMP
            found.setdefault(kind, None)
            parts.append(chunk + b"\0" * (length % 2 and place + 8 + length == len(data)))
            total += end - place
        place = end
    orientation = _first([found.get(b"EXIF"), found.get(b"XMP ")])
    return Stripped(b"RIFF" + struct.pack("<I", total % 2**32) + b"WEBP" + b"".join(parts), orientation, size=size)


def _webp_size(kind: bytes, chunk: bytes) -> tuple[int, int] | None:
    """Width and height by the chunk VP8X, VP8 or VP8L."""
    if kind == b"VP8X" and len(chunk) >= 18:
        return 1 + int.from_bytes(chunk[12:15], "little"), 1 + int.from_bytes(chunk[15:18], "little")
    if kind == b"VP8 " and len(chunk) >= 18:
        width, height = struct.unpack_from("<HH", chunk, 14)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and len(chunk) >= 13:
        bits = int.from_bytes(chunk[9:13], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def strip_avif(data: bytes) -> Stripped:
    """An AVIF whose EXIF block has a name that decoders pass over. Its orientation is a property of the image."""
    place = 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"meta":
            meta = data[place : place + length]
            renamed = re.sub(rb"(infe[\x02\x03].{7}(?:..)?)Exif", rb"\1Ex__", meta, flags=re.DOTALL)
            return Stripped(data[:place] + renamed + data[place + len(meta) :])
        if length < 8:
            break
        place += length
    return Stripped(data)
