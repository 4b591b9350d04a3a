"""Bits, scales and signs of samples: the values that are meant, or a refusal that names the format."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from raw_images import png, tiff

from semhitok.data.images import decode_image


def grey(content):
    image = decode_image(content, "x")
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    return image[0]


def packed(values, bits):
    """Values of a row, most significant bits first."""
    text = "".join(f"{value:0{bits}b}" for value in values)
    return bytes(int(text[n : n + 8].ljust(8, "0"), 2) for n in range(0, len(text), 8))


def test_what_pillow_does_not_read_is_refused_by_name():
    with pytest.raises(ValueError, match=r"TIFF of 1 x 12-bit unsigned samples .* is not read; convert it"):
        decode_image(tiff(packed([0, 4095], 12) + b"\0", 2, 1, order=">", bits=[12]), "x")


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_tiff_of_12_bits(white_is_zero, compression):
    values = [0, 1, 2048, 4095, 100]
    data = packed(values, 12) * 2
    data = zlib.compress(data) if compression == 8 else data
    image = grey(tiff(data, 5, 2, bits=[12], photometric=int(not white_is_zero), compression=compression))
    expected = torch.tensor([[4095 - v if white_is_zero else v for v in values]] * 2) / 4095
    assert torch.allclose(image, expected, atol=1e-7)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff_of_16_bits(order, compression):
    values = np.array([0, 1, 300, 65535], np.uint16)
    data = values.astype(order + "u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    expected = torch.tensor([0, 1, 300, 65535]) / 65535
    for photometric in (1, 0):
        image = grey(tiff(data, 4, 1, order=order, bits=[16], photometric=photometric, compression=compression))
        assert torch.allclose(image[0], expected if photometric else 1 - expected, atol=1e-7)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiff_of_few_bits(bits, order):
    values = [0, 1, 2**bits - 1]
    for photometric in (1, 0):
        image = grey(tiff(packed(values, bits), 3, 1, order=order, bits=[bits], photometric=photometric))
        expected = torch.tensor(values) / (2**bits - 1)
        assert torch.allclose(image[0], expected if photometric else 1 - expected, atol=1e-6)


def test_floating_point_tiff_whose_white_is_zero():
    data = np.array([0, 0.25, 1], "<f4").tobytes()
    assert grey(tiff(data, 3, 1, bits=[32], photometric=0, extra=[(339, 3, [3])]))[0].tolist() == [1, 0.75, 0]


@pytest.mark.parametrize("order", ["<", ">"])
def test_rgb_tiff_of_16_bits(order):
    values = np.array([[0, 300, 65535], [40000, 0x80FF, 2]], np.uint16)
    image = decode_image(
        tiff(values.astype(order + "u2").tobytes(), 2, 1, order=order, bits=[16] * 3, photometric=2), "x"
    )
    assert (image[:, 0].T - torch.from_numpy(values / 65535)).abs().max() < 1 / 255


def test_planes_of_a_tiff():
    offsets = [(284, 3, [2]), (273, 4, [8, 10, 12]), (279, 4, [2, 2, 2])]
    image = decode_image(tiff(bytes([1, 2, 11, 12, 21, 22]), 2, 1, bits=[8] * 3, photometric=2, extra=offsets), "x")
    assert (image[:, 0] * 255).round().tolist() == [[1, 2], [11, 12], [21, 22]]


def test_premultiplied_alpha():
    premultiplied = bytes([50, 0, 100, 100])
    image = decode_image(tiff(premultiplied, 1, 1, bits=[8] * 4, photometric=2, extra=[(338, 3, [1])]), "x")
    expected = torch.tensor([50, 0, 100]) / 255 + 1 - 100 / 255
    assert (image[:, 0, 0] - expected).abs().max() < 1.5 / 255


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": [16], "extra": [(339, 3, [2])]}, "1 x 16-bit signed"),
        ({"bits": [8], "extra": [(339, 3, [2])]}, "1 x 8-bit signed"),
        ({"bits": [32], "extra": [(339, 3, [2])]}, "1 x 32-bit signed"),
        ({"bits": [32]}, "1 x 32-bit unsigned"),
        ({"bits": [10]}, "1 x 10-bit unsigned"),
        ({"bits": [64], "extra": [(339, 3, [3])]}, "1 x 64-bit floating-point"),
        ({"bits": [16], "extra": [(339, 3, [3])]}, "1 x 16-bit floating-point"),
        ({"bits": [32] * 3, "photometric": 2, "extra": [(339, 3, [3] * 3)]}, "3 x 32-bit floating-point"),
        ({"bits": [16, 16], "extra": [(338, 3, [2])]}, "2 x 16-bit unsigned"),
        ({"bits": [16] * 3, "photometric": 2, "extra": [(284, 3, [2])]}, "each in a plane of its own"),
        ({"bits": [8] * 3, "photometric": 6}, "YCbCr"),
        ({"bits": [8] * 3, "photometric": 9}, "3 x 8-bit unsigned samples (photometric interpretation 9)"),
        ({"bits": [8], "photometric": 32803}, "camera's raw"),
        ({"bits": [8], "extra": [(50706, 1, [1, 4, 0, 0])]}, "camera's raw"),
    ],
)
def test_tiffs_that_are_refused_say_what_they_are(order, options, words):
    with pytest.raises(ValueError) as error:
        decode_image(tiff(bytes(64), 2, 1, order=order, **options), "x")
    assert words in str(error.value)


def test_damaged_tags_of_a_tiff():
    data = bytes([50, 100, 200])
    expected = torch.tensor([50, 100, 200]) / 255
    tags = [
        (282, 2, b"72 dpi\0"),
        (283, 2, b"\xff\xff"),
        (296, 3, [3]),
        (34675, 7, b"no profile"),
        (34665, 4, [2**32 - 1]),
    ]
    tags += [(700, 7, b"<xmp"), (305, 3, [1]), (532, 2, b"text\0"), (33723, 4, [7])]
    assert torch.equal(grey(tiff(data, 3, 1, extra=tags))[0], expected)
    assert torch.equal(grey(tiff(data, 3, 1, extra=[*tags, (274, 3, [6])]))[:, 0], expected)
    assert torch.equal(grey(tiff(data, 3, 1, extra=[*tags, (274, 2, b"6\0")]))[0], expected)
    xmp = b'<x tiff:Orientation="8"/>'
    assert torch.equal(grey(tiff(data, 3, 1, extra=[(274, 3, [0]), (700, 1, list(xmp))]))[:, 0], expected.flip(0))


def test_big_tiff():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 300, 65535]], np.uint16)).save(file, "TIFF", big_tiff=True)
    content = file.getvalue()
    assert content[2] == 43
    assert torch.allclose(grey(content)[0], torch.tensor([0, 300, 65535]) / 65535)


def test_transparent_grey_of_every_depth():
    for depth in (1, 2, 4, 8, 16):
        most = 2**depth - 1
        values = [0, 1, most]
        row = packed(values, depth)
        for transparent in values:
            content = png(0, depth, [row], (b"tRNS", struct.pack(">H", transparent)))
            # `png` counts whole bytes
            content = content[:16] + struct.pack(">I", 3) + content[20:]
            content = content[:29] + struct.pack(">I", zlib.crc32(content[12:29])) + content[33:]
            expected = [1.0 if value == transparent else value / most for value in values]
            assert torch.allclose(grey(content)[0], torch.tensor(expected), atol=1e-6), (depth, transparent)


def test_transparent_colour_of_16_bits():
    row = np.array([1, 2, 3, 4, 5, 6], ">u2").tobytes()
    with pytest.raises(ValueError, match="16-bit RGB with a transparent colour"):
        decode_image(png(2, 16, [row], (b"tRNS", struct.pack(">HHH", 1, 2, 3))), "x")


def test_grey_and_alpha_of_16_bits():
    row = np.array([40000, 65535, 40000, 0], ">u2").tobytes()
    assert (grey(png(4, 16, [row]))[0] - torch.tensor([40000 / 65535, 1])).abs().max() < 1 / 255


@pytest.mark.parametrize("most", [1, 100, 254, 1000, 4095, 65535])
def test_unusual_maxima_of_pgm_and_ppm(most):
    values = np.array([0, 1, most // 2, most, 0, most], ">u2" if most > 255 else "u1")
    expected = torch.from_numpy(values / most).float()
    assert (grey(b"P5\n# made here\n6 1\n%d\n" % most + values.tobytes())[0] - expected).abs().max() <= 0.5 / 255 + 1e-6
    image = decode_image(b"P6 2 1 %d\n" % most + values.tobytes(), "x")
    assert (image[:, 0].T.flatten() - expected).abs().max() <= 0.5 / 255 + 1e-6
    plain = b"P2 6 1 %d\n" % most + b" ".join(b"%d" % value for value in values)
    assert (grey(plain)[0] - expected).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(ValueError, match="truncated"):
        decode_image(b"P5 9 9 %d\n" % most + values.tobytes(), "x")


def test_a_gif_whose_first_picture_covers_a_part():
    file = io.BytesIO()
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([10, 10, 10, 200, 0, 0])
    picture.save(file, "GIF")
    content = bytearray(file.getvalue())
    content[6:10] = struct.pack("<HH", 4, 3)
    place = content.index(b"\x2c", 13)
    content[place + 1 : place + 5] = struct.pack("<HH", 1, 2)
    image = decode_image(bytes(content), "x")
    expected = torch.ones(3, 3, 4)
    expected[:, 2, 1:3] = (torch.tensor([200, 0, 0]) / 255)[:, None]
    assert torch.equal(image, expected)


def test_avif():
    pytest.importorskip("PIL.AvifImagePlugin")
    file = io.BytesIO()
    Image.new("RGBA", (20, 10), (200, 100, 0, 255)).save(file, "AVIF", quality=100)
    image = decode_image(file.getvalue(), "x")
    assert image.shape == (3, 10, 20)
    assert (image - (torch.tensor([200, 100, 0]) / 255)[:, None, None]).abs().max() < 0.02


def test_avif_with_a_pillow_without_it(monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ValueError, match=r"^x: cannot read image: AVIF needs Pillow 11\.3 .*pip install"):
        decode_image(b"\0\0\0\x20ftypavif\0\0\0\0", "x")
