"""Image files from raw parts, for kinds that Pillow does not write."""

import struct
import zlib


def png_chunk(name, data, crc=None):
    return (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) if crc is None else crc)
    )


def png(color_type, depth, rows, *chunks, after=()):
    """A PNG of raw rows; `chunks` (bytes, or name and data) come before the pixels, `after` behind them."""
    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type]
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", body), *after, (b"IEND", b"")]
    joined = b"".join(part if isinstance(part, bytes) else png_chunk(*part) for part in parts)
    return b"\x89PNG\r\n\x1a\n" + joined


def tiff(data, width, height, *, order="<", bits=(8,), photometric=1, compression=1, extra=()):
    """A TIFF of one strip; `extra` are (tag, type, values), which replace others; bytes are values of types 2 and 7."""
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, bits), 259: (3, [compression]), 262: (3, [photometric])}
    tags |= {273: (4, [8]), 277: (3, [len(bits)]), 278: (4, [height]), 279: (4, [len(data)])}
    tags |= {tag: (kind, values) for tag, kind, values in extra}
    data += b"\0" * (len(data) % 2)
    start = 8 + len(data)
    entries, values = b"", b""
    for tag, (kind, value) in sorted(tags.items()):
        code = {1: "B", 3: "H", 4: "I"}.get(kind)
        raw = struct.pack(f"{order}{len(value)}{code}", *value) if code else value
        if len(raw) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(values)
            values += raw + b"\0" * (len(raw) % 2)
            raw = struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, kind, len(value)) + raw.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4) + values


def exif(orientation, *, order="<", kind=3, before=()):
    """An EXIF block of the entries `before`, of 12 bytes each, and an orientation; bytes are put in as they are."""
    value = orientation if isinstance(orientation, bytes) else struct.pack(order + "H", orientation)
    entry = struct.pack(order + "HHI", 274, kind, 1 if kind != 2 else len(value)) + value.ljust(4, b"\0")
    entries = [*before, entry]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(entries) + bytes(4)
