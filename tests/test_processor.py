"""From any kind of picture to what a tokenizer encodes: the same pixels, whichever way they come."""

import io
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from small_tokenizers import small_config

from semhitok.data.images import read_resized, resize_crop, save_png, to_uint8
from semhitok.processor import ImageProcessor
from semhitok.tokenizer import SemHiTok


def picture(height=20, width=30, seed=0):
    """uint8 [height, width, 3]."""
    return numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8)


def test_every_way_gives_the_same_pixels(tmp_path):
    array = picture()
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = read_resized(path, 16)
    ways = [
        path, str(path), Image.open(path), Image.fromarray(array), array, tensor, tensor.float() / 255,
        tensor.double() / 255, (array / 255).astype(numpy.float32), [path], (array,), array[None], tensor[None],
    ]  # fmt: skip
    for way in ways:
        got = ImageProcessor(16)(way)
        assert got.dtype == torch.float32 and got.shape == (1, 3, 16, 16)
        assert torch.equal(got[0], expected)


def test_images_of_mixed_sizes_and_kinds_make_a_batch(tmp_path):
    small, large = picture(5, 9, 1), picture(60, 40, 2)
    Image.fromarray(large).save(tmp_path / "large.bmp")
    got = ImageProcessor(16)([small, tmp_path / "large.bmp", torch.from_numpy(large).permute(2, 0, 1)])
    for n, array in enumerate((small, large, large)):
        assert torch.equal(got[n], resize_crop(torch.from_numpy(array).permute(2, 0, 1).float() / 255, 16))
    assert ImageProcessor(16)([]).shape == (0, 3, 16, 16)


MODES = {  # how an image of each mode is made of RGBA, and as which image a file can hold it
    "1": (["1"], []), "L": (["L"], []), "LA": (["LA"], []), "P": (["RGB", "P"], []), "PA": (["PA"], ["RGBA"]),
    "RGB": (["RGB"], []), "RGBA": ([], []), "RGBa": (["RGBa"], ["RGBA"]), "La": (["LA", "La"], ["LA"]),
    "CMYK": (["CMYK"], []), "YCbCr": (["RGB", "YCbCr"], ["RGB"]), "HSV": (["RGB", "HSV"], ["RGB"]),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_pillow_images_of_every_mode_are_read_as_their_files_are(mode, tmp_path):
    image = Image.fromarray(numpy.dstack([picture(), picture(seed=3)[..., 0]]))
    made, stored = MODES[mode]
    for step in made:
        image = image.convert(step)
    assert image.mode == mode
    file = image
    for step in stored:
        file = file.convert(step)
    file.save(tmp_path / "a", "TIFF" if mode == "CMYK" else "PNG")
    assert torch.equal(ImageProcessor(16)(image)[0], read_resized(tmp_path / "a", 16))


def test_deep_grey_keeps_its_values():
    grey = numpy.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(numpy.uint16)
    got = ImageProcessor(16)(grey)[0]
    assert torch.equal(got, torch.from_numpy(grey.astype(numpy.float64) / 65535).float().expand(3, -1, -1))
    assert torch.equal(ImageProcessor(16)(Image.fromarray(grey))[0], got)
    floats = Image.fromarray((grey / 65535).astype(numpy.float32))
    assert (ImageProcessor(16)(floats)[0] - got).abs().max() < 1e-6


def test_orientation_is_applied_and_damaged_metadata_does_not_matter():
    array = picture()
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(array).save(data, "PNG", exif=exif)
    got = ImageProcessor(16)(Image.open(io.BytesIO(data.getvalue())))
    assert torch.equal(got, ImageProcessor(16)(numpy.ascontiguousarray(numpy.rot90(array, -1))))
    image = Image.fromarray(array)
    image.info["exif"] = b"Exif\0\0garbage"
    assert torch.equal(ImageProcessor(16)(image), ImageProcessor(16)(array))


def test_transparency_becomes_white():
    array = numpy.dstack([picture(16, 16), numpy.zeros((16, 16), numpy.uint8)])
    assert bool((ImageProcessor(16)(array) == 1).all())


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (torch.full((3, 4, 4), -1.0), r"images: expected values in \[0, 1\], got values from -1 to -1; for values"),
        (torch.full((3, 4, 4), 255.0), r"got values from 255 to 255; for values in \[0, 255\] give x / 255"),
        (torch.full((3, 4, 4), 1e4), r"got values from 10000 to 10000$"),
        (torch.full((3, 4, 4), float("nan")), r"got NaN$"),
        (numpy.full((4, 4, 3), -0.5), r"images: expected values in \[0, 1\], got values from -0\.5"),
        (torch.zeros(4, 4, 3), r"images: expected shape \[3, H, W\], got \[4, 4, 3\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "images: expected uint8, or floating point in"),
        (torch.zeros(2, 2, 3, 4, 4), r"images\[0\]: expected one image, got shape \[2, 3, 4, 4\]"),
        (torch.zeros(3, 0, 4), r"expected shape \[3, H, W\], got \[3, 0, 4\]"),
        (numpy.zeros((4, 4, 3), numpy.int32), "images: expected uint8, uint16 grey, or floating point in"),
        (numpy.zeros((4, 4, 2), numpy.uint8), r"with C = 1, 3 or 4, got \[4, 4, 2\]"),
        (numpy.zeros((4, 4, 4)), r"images: expected shape \[H, W\] or \[H, W, 3\], got \[4, 4, 4\]"),
        ([torch.zeros(3, 4, 4), 7], r"images\[1\]: expected a path, a Pillow image, .*, got int"),
        (None, "images: expected a path, a Pillow image, .*, got NoneType"),
        ([["a"]], r"images\[0\]: expected a path, a Pillow image, .*, got list"),
        (Image.new("I", (4, 4), 70_000), "images: cannot read image: .*32-bit signed samples"),
    ],
)  # fmt: skip
def test_other_images_are_refused_by_name(image, problem):
    with pytest.raises(ValueError, match=problem):
        ImageProcessor(16)(image)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ValueError, match=r"words\.png: not an image of a known format, but text"):
        ImageProcessor(16)([tmp_path / "words.png"])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        ImageProcessor(16)(tmp_path / "none.png")


def test_settings_are_checked():
    assert ImageProcessor.from_dict(ImageProcessor(24).to_dict()) == ImageProcessor(24)
    for settings, problem in (
        ({"size": 0}, "config.size: expected at least 1, got 0"),
        ({"size": True}, "size: "),
        ({}, "config: expected size, got none"),
        ({"size": 8, "resample": "nearest"}, "resample: expected one of bicubic, got 'nearest'"),
        ({"size": 8, "crop": "random"}, "crop: expected one of centre, got 'random'"),
        ({"size": 8, "mean": 0.5}, "mean"),
        ([], "expected"),
    ):
        with pytest.raises(ValueError, match=problem):
            ImageProcessor.from_dict(settings)


def test_a_tokenizer_takes_and_gives_pictures(tmp_path):
    torch.manual_seed(0)
    tokenizer = SemHiTok(small_config()).eval()
    side = tokenizer.config.image_size
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for n, path in enumerate(paths):
        Image.fromarray(picture(40 + n, 50, n)).save(path)
    batch = torch.stack([read_resized(path, side) for path in paths])
    ids = tokenizer.encode(batch)
    for way in (paths, [Image.open(path) for path in paths], [numpy.array(Image.open(path)) for path in paths]):
        assert torch.equal(tokenizer.encode(way), ids)
    assert torch.equal(tokenizer.encode(paths[0]), ids[:1])
    assert torch.equal(tokenizer.encode(to_uint8(batch)), tokenizer.encode(to_uint8(batch) / 255))
    assert torch.equal(tokenizer(paths), tokenizer.reconstruct(batch))
    assert (tokenizer.device, tokenizer.dtype) == (torch.device("cpu"), torch.float32)
    pictures = tokenizer.decode(ids, output="pil")
    assert [(p.size, p.mode) for p in pictures] == [((side, side), "RGB")] * 2
    save_png(tokenizer.decode(ids)[0], tmp_path / "c.png")
    assert numpy.array_equal(numpy.array(pictures[0]), numpy.array(Image.open(tmp_path / "c.png")))
    with pytest.raises(ValueError, match="output: expected tensor or pil, got 'jpg'"):
        tokenizer.decode(ids, output="jpg")
    with pytest.raises(ValueError, match=r"images: expected shape .*; `processor` resizes images"):
        tokenizer.encode(torch.zeros(1, 3, side, side + 8))
    with pytest.raises(ValueError, match=r"images: expected shape \[B, 3, H, W\], got \[3, 4, 4\]"):
        tokenizer.processor.to_pil(torch.zeros(3, 4, 4))


def test_the_settings_travel_with_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    tokenizer = SemHiTok(small_config()).eval()
    tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert SemHiTok.from_pretrained(tmp_path).processor == tokenizer.processor
    loaded = SemHiTok.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert loaded.dtype == torch.float64 and loaded.quantizer.semantic.codebook.dtype == torch.float32
    config.write_text(text.replace('"crop": "centre"', '"crop": "five"'))
    with pytest.raises(ValueError, match=r"config\.json: not a SemHiTok config: config.crop: expected one of centre"):
        SemHiTok.from_pretrained(tmp_path)
    config.write_text(text.replace('"processor": {\n    "size": 32', '"processor": {\n    "size": 31'))
    with pytest.raises(ValueError, match=r"processor\.size: expected 32, got 31"):
        SemHiTok.from_pretrained(tmp_path)


def test_packaged_and_older_checkpoints_have_one():
    packaged = Path(__file__).parents[1] / "semhitok" / "pretrained" / "semhitok-toy" / "config.json"
    assert '"processor"' not in packaged.read_text()  # from before there was one
    assert SemHiTok.from_pretrained("semhitok-toy", teacher=False).processor == ImageProcessor(64)
