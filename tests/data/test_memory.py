"""Large images: the same pixels as of small ones, in bounded memory."""

import io
import subprocess
import sys

import pytest
import torch
from PIL import Image
from raw_images import exif

from semhitok.data import images as module
from semhitok.data.images import (
    decode_image,
    decode_resized,
    decode_uint8,
    read_resized,
    resize_crop,
    ten_crops,
    to_uint8,
)


def encoded(width, height, form="PNG", mode="RGB", **options):
    noise = Image.effect_noise((width // 4 + 1, height // 4 + 1), 90).resize((width, height))
    image = Image.merge("RGB", [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda x: 255 - x)])
    file = io.BytesIO()
    image.convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (64, 64), (97, 300), (1500, 90), (640, 481)])
@pytest.mark.parametrize("size", [1, 64, 100])
def test_parts_give_what_the_whole_gives(shape, size, monkeypatch):
    """Bit for bit, whichever way the image is decoded."""
    content = encoded(*shape)
    expected = resize_crop(decode_image(content, "x"), size)
    assert torch.equal(decode_resized(content, "x", size), expected)
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr("semhitok.data.decode.PART", 1000)
    resized = decode_resized(content, "x", size)
    assert torch.equal(resized, expected) and resized.is_contiguous()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("form", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("TIFF", "CMYK"), ("JPEG", "L")])
def test_parts_of_turned_images(orientation, form, mode, monkeypatch):
    content = encoded(90, 70, form, mode, exif=b"Exif\0\0" + exif(orientation))
    expected = decode_image(content, "x")
    assert expected.shape == ((3, 70, 90) if orientation < 5 else (3, 90, 70))
    assert torch.equal(decode_uint8(content, "x"), to_uint8(expected))
    monkeypatch.setattr(module, "SMALL", 0)
    monkeypatch.setattr("semhitok.data.decode.PART", 500)
    assert torch.equal(decode_image(content, "x"), expected)
    assert torch.equal(decode_uint8(content, "x"), to_uint8(expected))
    assert torch.equal(decode_resized(content, "x", 32), resize_crop(expected, 32))


def test_ten_crops_of_a_resized_image(monkeypatch):
    content = encoded(200, 150)
    monkeypatch.setattr(module, "SMALL", 0)
    resized = decode_resized(content, "x", 64 * 11 // 10)
    assert torch.equal(ten_crops(resized, 64), ten_crops(decode_image(content, "x"), 64))


def test_a_jpeg_above_the_limit_is_decoded_at_reduced_size(monkeypatch):
    for options in ({}, {"subsampling": 0}):
        content = encoded(800, 600, "JPEG", quality=95, **options)
        expected = decode_resized(content, "x", 64)
        monkeypatch.setenv("SEMHITOK_MAX_PIXELS", "40000")
        reduced = decode_resized(content, "x", 64)
        assert not torch.equal(reduced, expected)
        assert (reduced - expected).abs().mean() < 0.02
        with pytest.raises(ValueError, match="x: cannot read image: expected at most 40000 pixels, got 800 x 600"):
            decode_image(content, "x")
        with pytest.raises(ValueError, match="SEMHITOK_MAX_PIXELS raises the limit"):
            decode_resized(content, "x", 400)  # would have to be enlarged
        monkeypatch.delenv("SEMHITOK_MAX_PIXELS")
    # The decoder of a progressive JPEG holds all of it, whatever the size it decodes at
    monkeypatch.setenv("SEMHITOK_MAX_PIXELS", "40000")
    for content in (encoded(800, 600, "JPEG", progressive=True), encoded(800, 600), encoded(800, 600, "WEBP")):
        with pytest.raises(ValueError, match="expected at most 40000 pixels, got 800 x 600"):
            decode_resized(content, "x", 64)


@pytest.mark.parametrize("limit", ["", "0", "-5", "many", "1e6", "9" * 30])
def test_a_limit_that_is_no_number(limit, monkeypatch):
    content = encoded(4, 4)
    monkeypatch.setenv("SEMHITOK_MAX_PIXELS", limit)
    with pytest.raises(ValueError, match="SEMHITOK_MAX_PIXELS: expected a number of pixels"):
        decode_image(content, "x")


def test_a_file_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setenv("SEMHITOK_MAX_PIXELS", "100")
    path = tmp_path / "x.png"
    with open(path, "wb") as file:
        file.truncate(1601)
    with pytest.raises(ValueError, match="expected at most 1600 bytes, got 1601"):
        read_resized(path, 8)


MEASURE = """
import resource, sys
from semhitok.data.images import read_resized
path, small, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
read_resized(small, size)
before = used()
read_resized(path, size)
print(used() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "side", "options", "bytes_a_pixel"),
    [
        ("PNG", 5000, {"compress_level": 1}, 6),
        ("JPEG", 5000, {}, 6),
        ("JPEG", 4000, {"progressive": True, "subsampling": 0}, 12),
        ("WEBP", 3000, {"method": 0, "quality": 10}, 18),
    ],
)
def test_memory_of_a_large_image(tmp_path, form, side, options, bytes_a_pixel):
    """The bounds of docs/images.md: the pixels as the decoder holds them, no copy in floating point (12 bytes)."""
    paths = tmp_path / "large", tmp_path / "small"
    for path, length in zip(paths, (side, 300), strict=True):
        Image.new("RGB", (length, length), (10, 20, 30)).save(path, form, **options)
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, paths), "64"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < bytes_a_pixel * side**2 + 2**25


def test_a_very_long_image():
    """Only the middle is resized, and 100,000 columns are no more than they are."""
    file = io.BytesIO()
    Image.new("L", (100_000, 1), 128).save(file, "PNG")
    assert torch.allclose(decode_resized(file.getvalue(), "x", 16), torch.full((3, 16, 16), 128 / 255))
    file = io.BytesIO()
    Image.new("L", (1, 100_000), 128).save(file, "PNG")
    assert torch.allclose(decode_resized(file.getvalue(), "x", 16), torch.full((3, 16, 16), 128 / 255))
