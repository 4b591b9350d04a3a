"""Reading images as they would be shown, cropping, and writing PNGs."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from raw_images import png

from semhitok.data.images import crop_around, decode_image, list_images, read_image, resize_crop, save_png

RGB = (np.random.default_rng(0).random((6, 9, 3)) * 255).round().astype(np.uint8)


def as_float(pixels):
    """uint8 [H, W, 3] to float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def check(image, shape):
    assert image.dtype == torch.float32
    assert image.shape == shape
    assert image.is_contiguous()
    assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_formats(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == "webp" else {}))
    check(read_image(path), (3, 6, 9))
    assert torch.equal(read_image(path), as_float(RGB))


def test_jpeg_and_wrong_suffix(tmp_path):
    path = tmp_path / "image.png"
    smooth = np.full((16, 16, 3), 90, np.uint8)
    Image.fromarray(smooth).save(path, "JPEG", quality=95)
    assert (read_image(path) - as_float(smooth)).abs().max() < 0.02


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_orientation_is_applied(tmp_path, orientation, suffix):
    upright = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: np.rot90,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert torch.equal(read_image(path), as_float(np.ascontiguousarray(upright(RGB))))


def test_16_bit_grey_png(tmp_path):
    grey = np.array([[0, 1, 255, 256], [32768, 40000, 65534, 65535]], np.uint16)
    path = tmp_path / "image.png"
    path.write_bytes(png(0, 16, [row.astype(">u2").tobytes() for row in grey]))
    image = read_image(path)
    check(image, (3, 2, 4))
    expected = torch.from_numpy(grey / 65535).float()
    assert all(torch.equal(channel, expected) for channel in image)


def test_16_bit_rgb_and_rgba_png(tmp_path):
    rgb = np.array([[[0, 65535, 0x8080], [0x1234, 0xABCD, 77]]], np.uint16)
    path = tmp_path / "image.png"
    path.write_bytes(png(2, 16, [row.astype(">u2").tobytes() for row in rgb]))
    expected = torch.from_numpy(rgb / 65535).float().permute(2, 0, 1)
    assert (read_image(path) - expected).abs().max() <= 1 / 255  # Pillow keeps the high byte
    rgba = np.concatenate([rgb, np.full((1, 2, 1), 65535, np.uint16)], axis=2)
    path.write_bytes(png(6, 16, [row.astype(">u2").tobytes() for row in rgba]))
    assert (read_image(path) - expected).abs().max() <= 1 / 255


def test_16_bit_ppm_and_tiff(tmp_path):
    grey = np.array([[0, 300], [40000, 65535]], np.uint16)
    expected = torch.from_numpy(grey / 65535).float().expand(3, 2, 2)
    (tmp_path / "x.pgm").write_bytes(b"P5 2 2 65535\n" + grey.astype(">u2").tobytes())
    Image.fromarray(grey).save(tmp_path / "x.tiff")
    assert torch.equal(read_image(tmp_path / "x.pgm"), expected)
    assert torch.equal(read_image(tmp_path / "x.tiff"), expected)


def test_float_tiff(tmp_path):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.array([[0, 0.25], [0.5, 1]], np.float32)).save(path)
    assert read_image(path)[0].tolist() == [[0, 0.25], [0.5, 1]]
    for bad in (1.5, -0.1, np.nan):
        Image.fromarray(np.array([[0, bad]], np.float32)).save(path)
        with pytest.raises(ValueError, match=r"expected grey values in \[0, 1\]"):
            read_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_kinds_become_rgb(tmp_path, mode):
    pixels = np.repeat(np.array([[0, 255], [255, 0]], np.uint8)[:, :, None], 3, axis=2)
    path = tmp_path / ("x.png" if mode in ("1", "L", "P") else "x.tiff")
    Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    assert (read_image(path) - as_float(pixels)).abs().max() <= 2 / 255


def test_alpha_is_composited_on_white(tmp_path):
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, :3] = (200, 0, 100)
    rgba[0, :, 3] = (0, 51, 255)
    path = tmp_path / "x.png"
    Image.fromarray(rgba).save(path)
    image = read_image(path)
    check(image, (3, 1, 3))
    alpha = torch.tensor([0, 0.2, 1])
    expected = torch.tensor([200 / 255, 0, 100 / 255])[:, None] * alpha + 1 - alpha
    assert torch.allclose(image[:, 0], expected, atol=1e-6)


def test_grey_alpha_and_transparent_palette(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[[50, 0], [50, 255]]], np.uint8)).save(path)
    with Image.open(path) as stored:
        assert stored.mode == "LA"
    assert torch.allclose(read_image(path)[0, 0], torch.tensor([1, 50 / 255]))
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(path, transparency=0)
    expected = torch.tensor([[1, 40 / 255], [1, 50 / 255], [1, 60 / 255]])
    assert torch.allclose(read_image(path)[:, 0], expected)


def test_transparent_colour_of_rgb_and_grey_png(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(2, 8, [bytes([9, 8, 7, 1, 2, 3])], (b"tRNS", bytes([0, 9, 0, 8, 0, 7]))))
    assert torch.allclose(read_image(path)[:, 0], torch.tensor([[255, 1], [255, 2], [255, 3]]) / 255)
    path.write_bytes(png(0, 8, [bytes([9, 3])], (b"tRNS", bytes([0, 9]))))
    assert torch.allclose(read_image(path)[0, 0], torch.tensor([1, 3 / 255]))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_image_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 6), color) for color in ("#ff0000", "#00ff00")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 6, 8)
    assert (read_image(path) - red).abs().max() < 0.02


def assert_refused(path):
    with pytest.raises(ValueError) as error:
        read_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"not an image\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 99])
def test_not_an_image(tmp_path, content):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    assert "not an image of a known format" in assert_refused(path)


def test_truncations(tmp_path):
    good = np.asarray(Image.fromarray(RGB).resize((64, 64)))
    path = tmp_path / "x.image"
    for suffix in ("png", "jpeg", "tiff", "webp", "gif", "ppm", "bmp"):
        Image.fromarray(good).save(path, suffix)
        content = path.read_bytes()
        for share in (0.1, 0.3, 0.5, 0.8):
            path.write_bytes(content[: int(share * len(content))])
            assert_refused(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (bytes(99), "begins with zeros"),
        (b"just words\n" * 9, "but text"),
        (b"<!DOCTYPE html><html><body>404 Not Found", "but an HTML page"),
        (b"\n<html>", "but an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"but PostScript \(EPS\); render it to PNG"),
        (b"\xc5\xd0\xd3\xc6....", "but PostScript"),
        (b"%PDF-1.7", "but PDF; render its pages"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg xmlns="">', "but SVG; render it to PNG"),
        (b"8BPS\0\1", "Photoshop"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "but HEIC; convert it to JPEG or PNG, for example with heif-convert"),
        (b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic", "but HEIC"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0", "camera's raw file; develop it"),
        (b"FUJIFILMCCD-RAW 0201", "camera's raw file"),
        (b"\xff\x0a\xfa\x7f", "but JPEG XL; convert it to PNG, for example with djxl"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "but JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "but JPEG 2000; convert it"),
        (b"\0\0\0\x18ftypmp42", "but a video"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\0\x05\x16\x07\0\2", "AppleDouble"),
        (b"\x89PNG\r\n\x1a\n", "damaged PNG"),
        (b"\xff\xd8\xff\xe0", "damaged JPEG"),
    ],
)
def test_what_is_no_image_says_what_it_is(content, words):
    with pytest.raises(ValueError, match=f"^photo.jpg: not an image of a known format.*{words}"):
        decode_image(content, "photo.jpg")


def test_bit_flips_never_crash(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "x.image"
    refused = 0
    for suffix in ("png", "jpeg", "tiff", "webp", "gif"):
        Image.fromarray(RGB).save(path, suffix)
        content = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                assert read_image(path).shape[0] == 3
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_too_many_pixels(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    monkeypatch.setenv("SEMHITOK_MAX_PIXELS", "53")
    Image.fromarray(RGB).save(path)
    assert "expected at most 53 pixels, got 9 x 6" in assert_refused(path)
    monkeypatch.setenv("SEMHITOK_MAX_PIXELS", "54")
    check(read_image(path), (3, 6, 9))


def test_decompression_bomb(tmp_path):
    # 4 gigapixels claimed by a hundred bytes.
    path = tmp_path / "x.png"
    content = bytearray(png(0, 8, [b"\0" * 4]))
    content[16:24] = struct.pack(">II", 65536, 65536)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    assert f"expected at most {2**27} pixels, got 65536 x 65536" in assert_refused(path)


def test_a_patch_with_its_surroundings():
    image = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(crop_around(image, 1, 1, 2, margin=1), image[..., 1:5, 1:5])
    assert torch.equal(crop_around(image, 1, 2, 2, margin=0), image[..., 2:4, 4:6])
    assert torch.equal(crop_around(image, 0, 1, 2, margin=1, border=1), image[..., 0:4, 2:6])
    corner = crop_around(image, 0, 0, 2, margin=2)[0, 0]
    assert corner.shape == (6, 6) and torch.equal(corner[2:, 2:], image[0, 0, :4, :4])
    assert (corner[:3, :3] == 0).all() and torch.equal(corner[0, 2:], image[0, 0, 0, :4])


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, kind in ((tmp_path / "pipe.png", "pipe"), ("/dev/zero", "device")):
        for read in (read_image, lambda path: list_images([path])):
            with pytest.raises(ValueError, match=f"{path}: expected a file, got a {kind}"):
                read(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a/z.jpg", "a/c.webp", ".hidden.png", ".git/x.png", "notes.txt", "A.bmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = ["A.bmp", "a/c.webp", "a/z.jpg", "b.PNG"]
    assert list_images([tmp_path]) == [tmp_path / name for name in names]
    # Files count whatever they are called, and the order of the arguments is kept.
    explicit = [tmp_path / "notes.txt", tmp_path / "a"]
    expected = [explicit[0], tmp_path / "a/c.webp", tmp_path / "a/z.jpg"]
    assert list_images(explicit) == expected
    assert list_images([*explicit, tmp_path / "a/c.webp"]) == expected


def test_list_images_finds_nothing(tmp_path):
    with pytest.raises(ValueError, match="no images found"):
        list_images([tmp_path])
    with pytest.raises(ValueError, match="no images found"):
        list_images([])
    with pytest.raises(FileNotFoundError, match="none: no such file or folder"):
        list_images([tmp_path / "none"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 64), (64, 65), (300, 200)])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_resize_crop_shapes(shape, size):
    image = resize_crop(torch.rand(3, *shape), size)
    assert image.shape == (3, size, size)
    assert image.min() >= 0 and image.max() <= 1


def test_resize_crop_of_one_pixel_is_its_colour():
    pixel = torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    assert torch.allclose(resize_crop(pixel, 64), pixel.expand(3, 64, 64), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_resize_crop_keeps_the_dtype(dtype):
    image = torch.rand(3, 30, 20)
    resized = resize_crop(image.to(dtype), 16)
    assert resized.dtype == dtype
    assert (resized.float() - resize_crop(image, 16)).abs().max() < 0.02


def test_resize_crop_keeps_an_image_of_that_size():
    image = torch.rand(3, 64, 64)
    assert torch.equal(resize_crop(image, 64), image)


def test_resize_crop_takes_the_centre():
    wide = torch.rand(3, 64, 100)
    assert torch.equal(resize_crop(wide, 64), wide[:, :, 18:82])
    assert torch.equal(resize_crop(wide.transpose(1, 2), 64), wide[:, :, 18:82].transpose(1, 2))
    # Beyond 4:1 only the middle counts, which costs what 4:1 costs.
    band = torch.zeros(3, 8, 100_000)
    band[:, :, 49_996:50_004] = 1
    assert resize_crop(band, 16).mean() > 0.95


def test_resize_crop_is_pillows_bicubic(tmp_path):
    pixels = np.asarray(Image.fromarray(RGB).resize((150, 120), Image.Resampling.BICUBIC))
    expected = Image.fromarray(pixels).resize((80, 64), Image.Resampling.BICUBIC)
    ours = resize_crop(as_float(pixels), 64)
    theirs = as_float(np.asarray(expected))[:, :, 8:72]
    assert (ours - theirs).abs().max() < 1.5 / 255


@pytest.mark.parametrize(
    ("image", "size", "words"),
    [
        (torch.rand(1, 4, 4), 8, "image: expected"),
        (torch.rand(3, 0, 4), 8, "image: expected"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), 8, "floating point"),
        (torch.rand(3, 4, 4), 0, "size: expected"),
    ],
)
def test_resize_crop_refuses(image, size, words):
    with pytest.raises(ValueError, match=words):
        resize_crop(image, size)


def test_save_png_round_trip_and_rounding(tmp_path):
    path = tmp_path / "x.png"
    every = (torch.arange(256) / 255).view(1, 16, 16).expand(3, -1, -1)
    save_png(every, path)
    assert torch.equal(read_image(path), every)
    values = torch.tensor([-1, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 2])
    save_png(values.expand(3, 1, 6).double(), path)
    stored = (read_image(path)[0, 0] * 255).round().int().tolist()
    assert stored == [0, 0, 1, 254, 255, 255]
    assert os.listdir(tmp_path) == ["x.png"]


def test_save_png_refuses_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    image = torch.rand(3, 4, 4)
    save_png(image, path)
    old = path.read_bytes()
    for bad in (image * torch.nan, image[:1], image.mul(255).byte(), image[None]):
        with pytest.raises(ValueError, match="image: expected"):
            save_png(bad, path)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_png(image / 2, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["x.png"]
    with pytest.raises(FileNotFoundError):
        save_png(image, tmp_path / "none" / "x.png")
