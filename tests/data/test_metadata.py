"""Damaged metadata costs no pixels, and a sound orientation is used whatever stands beside it."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from raw_images import exif, png, png_chunk

from semhitok.data.images import decode_image
from semhitok.data.metadata import exif_orientation

PIXELS = torch.arange(2 * 3 * 3, dtype=torch.uint8).view(2, 3, 3) * 14  # [H, W, 3]
ROWS = [row.numpy().tobytes() for row in PIXELS]
UPRIGHT = PIXELS.permute(2, 0, 1).float() / 255
TURNED = UPRIGHT.transpose(1, 2).flip(2)  # orientation 6
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
TEXT_AS_RATIONAL = struct.pack("<HHII", 282, 2, 7, 99999)
PROFILE = b"Raw profile type exif\0"


def saved(form, **options):
    file = io.BytesIO()
    Image.fromarray(PIXELS.numpy()).resize((24, 16), Image.Resampling.NEAREST).save(file, form, **options)
    return file.getvalue()


def app(number, body, length=None):
    return bytes([0xFF, 0xE0 + number]) + struct.pack(">H", len(body) + 2 if length is None else length) + body


def in_jpeg(*segments):
    content = saved("JPEG", quality=95)
    return content[:2] + b"".join(segments) + content[2:]


def profile(block):
    """An EXIF block as ImageMagick writes it into a PNG."""
    return b"\nexif\n%8d\n" % len(block) + block.hex().encode() + b"\n"


@pytest.mark.parametrize(
    "chunk",
    [
        (b"eXIf", b"garbage"),
        (b"eXIf", b"II*\0\xff\xff\xff\xff"),
        (b"eXIf", exif(1)[:-9]),
        (b"tEXt", PROFILE + b"\nexif\n 12\nzz not hexadecimal"),
        (b"zTXt", PROFILE + b"\0not deflated"),
        (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)),
        (b"tEXt", b"x" * 3_000_000),
        (b"iCCP", b"name\0\0" + zlib.compress(b"no profile")[:-3]),
        (b"iCCP", b""),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0broken"),
        (b"iTXt", b"x"),
        (b"gAMA", b""),
        (b"cHRM", b"1"),
        (b"pHYs", b"1"),
        (b"sRGB", b""),
        (b"acTL", b"\0"),
        (b"fcTL", b"\0\0\0\1" * 9),
        (b"tIME", bytes(7), 0),
        (b"tRNS", bytes(6), 0),
        (b"tRNS", bytes(5)),
    ],
)
def test_a_damaged_chunk_of_a_png(chunk):
    assert torch.equal(decode_image(png(2, 8, ROWS, png_chunk(*chunk)), "x"), UPRIGHT)
    assert torch.equal(decode_image(png(2, 8, ROWS, after=[png_chunk(*chunk)]), "x"), UPRIGHT)
    # A sound orientation beside it
    assert torch.equal(decode_image(png(2, 8, ROWS, png_chunk(*chunk), (b"eXIf", exif(6))), "x"), TURNED)


@pytest.mark.parametrize("length", [0, 3, 5000, 2**32 - 1])
def test_a_wrong_length_of_a_png_chunk(length):
    chunk = struct.pack(">I", length) + b"tEXtsome text" + bytes(4)
    assert torch.equal(decode_image(png(2, 8, ROWS, chunk), "x"), UPRIGHT)
    assert torch.equal(decode_image(png(2, 8, ROWS, after=[chunk]), "x"), UPRIGHT)


@pytest.mark.parametrize(
    "chunk",
    [
        (b"eXIf", exif(6, order=">")),
        (b"eXIf", b"Exif\0\0" + exif(6)),
        (b"eXIf", exif(6, before=[TEXT_AS_RATIONAL])),
        (b"tEXt", PROFILE + profile(b"Exif\0\0" + exif(6))),
        (b"tEXt", PROFILE + profile(exif(6))[:-9] + b"zz"),
        (b"zTXt", PROFILE + b"\0" + zlib.compress(profile(exif(6)))),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    ],
)
def test_where_a_png_has_its_orientation(chunk):
    assert torch.equal(decode_image(png(2, 8, ROWS, chunk), "x"), TURNED)
    assert torch.equal(decode_image(png(2, 8, ROWS, after=[chunk]), "x"), TURNED)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        *((exif(n), n) for n in range(1, 9)),
        (exif(6, order=">"), 6),
        (exif(struct.pack("<I", 8), kind=4), 8),
        (exif(b"\3", kind=1), 3),
        (exif(6, before=[TEXT_AS_RATIONAL, b"\xff" * 12]), 6),
        (exif(0, before=[exif(6)[10:22]]), 6),
        (exif(0), None),
        (exif(9), None),
        (exif(b"6\0", kind=2), None),
        (exif(b"\6\0\0\0", kind=5), None),
        (exif(6)[:12], None),
        (exif(6)[:4], None),
        (b"", None),
        (b"Exif\0\0" * 3, None),
    ],
)
def test_orientations(block, found):
    assert exif_orientation(block) == found


JPEG_SEGMENTS = [
    app(1, b"Exif\0\0garbage"),
    app(1, b"Exif\0\0" + exif(6)[:15]),
    app(1, b"http://ns.adobe.com/xap/1.0/\0" + b"\xff\xfe broken"),
    app(2, b"ICC_PROFILE\0"),
    app(2, b"ICC_PROFILE\0\1\2no profile"),
    app(2, b"MPF\0II*\0\xff\xff\xff\xff"),
    app(0, b"JFIF"),
    app(0, b"JFIF\0\1"),
    app(14, b"Adobe"),
    app(13, b"Photoshop 3.0\x008BIM\4\4\xff"),
    app(13, b""),
    b"\xff\xfe\0\2",  # an empty comment
    b"\xff\xff\xff",  # fill bytes
]


@pytest.mark.parametrize("segment", JPEG_SEGMENTS)
def test_a_damaged_segment_of_a_jpeg(segment):
    upright = decode_image(saved("JPEG", quality=95), "x")
    assert torch.equal(decode_image(in_jpeg(segment), "x"), upright)
    turned = decode_image(in_jpeg(segment, app(1, b"Exif\0\0" + exif(6, before=[TEXT_AS_RATIONAL]))), "x")
    assert torch.equal(turned, upright.transpose(1, 2).flip(2))


@pytest.mark.parametrize("length", [0, 1, 2, 9, 60, 400, 65535])
def test_a_wrong_length_of_a_jpeg_segment(length):
    upright = decode_image(saved("JPEG", quality=95), "x")
    thumbnail = io.BytesIO()
    Image.new("RGB", (8, 8)).save(thumbnail, "JPEG")
    for body in (b"text without a marker", b"Exif\0\0" + exif(1) + thumbnail.getvalue()):
        assert torch.equal(decode_image(in_jpeg(app(1, body, length)), "x"), upright)


def test_where_a_jpeg_has_its_orientation():
    upright = decode_image(saved("JPEG", quality=95), "x")
    turned = upright.transpose(1, 2).flip(2)
    xmp = app(1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)
    assert torch.equal(decode_image(in_jpeg(xmp), "x"), turned)
    assert torch.equal(decode_image(in_jpeg(app(1, b"Exif\0\0" + exif(9)), xmp), "x"), turned)
    assert torch.equal(decode_image(in_jpeg(xmp, app(1, b"Exif\0\0" + exif(1))), "x"), upright)  # EXIF comes first


def webp_with(*chunks):
    """A lossless WebP in the extended format, with chunks behind its pixels."""
    content = saved("WEBP", lossless=True)
    head = b"VP8X" + struct.pack("<IB3x", 10, 0x2C) + (23).to_bytes(3, "little") + (15).to_bytes(3, "little")
    body = (
        b"WEBP" + head + content[12:] + b"".join(name + struct.pack("<I", size) + data for name, size, data in chunks)
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_metadata_of_webp():
    upright = decode_image(saved("WEBP", lossless=True), "x")
    turned = upright.transpose(1, 2).flip(2)
    block = exif(6, before=[TEXT_AS_RATIONAL])
    assert torch.equal(decode_image(webp_with((b"EXIF", len(block), block)), "x"), turned)
    assert torch.equal(decode_image(webp_with((b"XMP ", len(XMP), XMP)), "x"), turned)
    for chunk in ((b"EXIF", 4, b"junk"), (b"EXIF", 9999, b"junk"), (b"ICCP", 4, b"junk"), (b"EXIF", 0, b"")):
        assert torch.equal(decode_image(webp_with(chunk), "x"), upright)
        assert torch.equal(decode_image(webp_with((b"EXIF", len(block), block), chunk), "x"), turned)


@pytest.mark.filterwarnings("ignore:Truncated File Read")  # when the file is made
def test_metadata_of_avif():
    pytest.importorskip("PIL.AvifImagePlugin")
    upright = decode_image(saved("AVIF", quality=100), "x")
    turned = decode_image(saved("AVIF", quality=100, exif=exif(6)), "x")
    assert torch.equal(turned, upright.transpose(1, 2).flip(2))
    content = saved("AVIF", quality=100, exif=exif(1, before=[TEXT_AS_RATIONAL]))
    assert b"Exif" in content
    assert torch.equal(decode_image(content, "x"), upright)
    damaged = content.replace(exif(1, before=[TEXT_AS_RATIONAL])[:8], b"XX" + b"\xff" * 6)
    assert damaged != content
    assert torch.equal(decode_image(damaged, "x"), upright)


def test_the_first_picture_of_several():
    first, second = Image.new("RGB", (8, 6), "#ff0000"), Image.new("RGB", (8, 6), "#0000ff")
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 6, 8)
    for form, options in (("MPO", {"quality": 100}), ("WEBP", {"lossless": True}), ("PNG", {}), ("GIF", {})):
        file = io.BytesIO()
        first.save(file, form, save_all=True, append_images=[second], **options)
        assert (decode_image(file.getvalue(), form) - red).abs().max() < 0.02


def test_colours_of_cmyk_jpegs():
    """The segment that says how colours are stored is kept: with it, as Photoshop writes them, values are inverted."""
    for color, expected in (((0, 0, 0, 0), 1.0), ((0, 0, 0, 255), 0.0)):
        file = io.BytesIO()
        Image.new("CMYK", (8, 8), color).save(file, "JPEG", quality=100)
        content = file.getvalue()
        assert b"Adobe" in content
        assert (decode_image(content, "x") - expected).abs().max() < 0.02
        # YCCK: the same samples, said to be transformed, have other colours
        other = content.replace(b"Adobe\0d\0\0\0\0\0", b"Adobe\0d\0\0\0\0\2")
        assert other != content
        with Image.open(io.BytesIO(other)) as theirs:
            rgb = np.array(theirs.convert("RGB"))
        assert torch.equal(decode_image(other, "x"), torch.from_numpy(rgb).permute(2, 0, 1) / 255)
