"""Reading, resizing and writing images: whatever a camera or editor writes becomes float32 RGB in [0, 1]."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F

from semhitok._files import write_atomic
from semhitok._optional import require

# Formats that are read, whatever a file is called. Pillow reads more, some by running other programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# File names that count as images inside a folder or a shard.
SUFFIXES = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm"),
    *(".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
MAX_PIXELS = 2**27  # 134 million, 1.5 GiB as float32 RGB
_MAX_ASPECT = 4  # of the part that `resize_crop` resizes: the crop keeps only the middle anyway


def list_images(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Image files among `paths`, each once, in the order given; those of a folder sorted by name.

    A file that is given counts as an image whatever its name. Folders are searched recursively for names of common
    image formats; hidden files and folders are ignored, and links to folders are not followed.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a folder cannot be read.
        ValueError: no image found at all.
    """
    given = [Path(path) for path in paths]
    found: list[Path] = []
    for path in given:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        found += walk_images(path) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{', '.join(map(str, given)) or 'paths'}: no images found")
    return list(dict.fromkeys(found))


def walk_images(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The images of a folder as `list_images` finds and orders them, with the names of one folder in memory at a time.

    Raises:
        OSError: a folder cannot be read.
    """
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        if not entry.is_dir():
            if entry.name.lower().endswith(SUFFIXES):
                yield Path(entry.path)
        elif not entry.is_symlink():
            yield from walk_images(entry.path)


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read an image file as it would be displayed, with its orientation applied and on a white background.

    Formats are PNG, JPEG, WebP, TIFF, BMP, GIF and PPM. Grey and palette images become RGB; transparency is
    composited on white; 16-bit grey is divided by 65535, 8-bit by 255; floating-point TIFF must lie in [0, 1]. Of an
    animation or a multi-page file the first image is read. Colour profiles are not applied.

    Returns:
        float32 [3, H, W] in [0, 1], RGB.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: not an image, corrupt, truncated, of an unknown format, or of more than 2**27 pixels; one line that
            names the file and the reason.
        ImportError: Pillow or NumPy is not installed.
    """
    with open(path, "rb") as file:
        return _decode(file, os.fspath(path))


def decode_image(data: bytes, name: str) -> torch.Tensor:
    """Decode the content of an image file as `read_image` does; errors name it `name`.

    Returns:
        float32 [3, H, W] in [0, 1], RGB.

    Raises:
        ValueError, ImportError: as `read_image` does.
    """
    return _decode(io.BytesIO(data), name)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Float images in [0, 1], clamped -> uint8, round(255 v), halves to even: a quarter of the memory.

    Raises:
        ValueError: NaN or infinity among the values.
    """
    if not bool(images.isfinite().all()):
        raise ValueError("images: expected finite values, got others")
    return images.float().clamp(0, 1).mul(255).round().to(torch.uint8)


def resize_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize so that the shorter side is `size` (bicubic, antialiased), then crop the centre.

    Of an image longer than 4:1 only the middle 4:1 is resized. A square image of `size` is returned unchanged.

    Args:
        image: float [3, H, W] in [0, 1], H and W at least 1.
        size: pixels, at least 1.

    Returns:
        float [3, size, size] in [0, 1], dtype and device of `image`.

    Raises:
        ValueError: another shape or dtype, or a size below 1.
    """
    _check(image)
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    shorter = min(image.shape[1:])
    image = _centre(image, _MAX_ASPECT * shorter)
    if shorter != size:
        height, width = (max(size, round(side * size / shorter)) for side in image.shape[1:])
        exact = image.to(torch.promote_types(image.dtype, torch.float32))  # no fp16 on the CPU
        resized = F.interpolate(exact[None], (height, width), mode="bicubic", antialias=True)[0]
        image = resized.clamp(0, 1).to(image.dtype)  # bicubic overshoots at edges
    return _centre(image, size)


def ten_crops(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize and crop to 1.1 times `size`, then take the four corners, the centre, and the mirror images of these five.

    The order is top left, top right, bottom left, bottom right, centre, then the mirror images in that order.

    Args:
        image: float [3, H, W] in [0, 1], H and W at least 1.
        size: side of a crop in pixels.

    Returns:
        float [10, 3, size, size] in [0, 1], dtype and device of `image`.

    Raises:
        ValueError: as `resize_crop` does.
    """
    image = resize_crop(image, size * 11 // 10)
    far = image.shape[1] - size
    corners = [image[:, y : y + size, x : x + size] for y in (0, far) for x in (0, far)]
    five = torch.stack([*corners, _centre(image, size)])
    return torch.cat([five, five.flip(-1)])


def tiles(image: torch.Tensor, size: int) -> torch.Tensor:
    """[C, H, W], H and W multiples of size -> its tiles [T, C, size, size], row by row."""
    return image.unflatten(2, (-1, size)).unflatten(1, (-1, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def untile(parts: torch.Tensor, columns: int) -> torch.Tensor:
    """Tiles [T, C, s, s], row by row, `columns` in a row -> [C, H, W]."""
    return parts.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def crop_around(
    images: torch.Tensor, row: int, column: int, patch: int, *, margin: int, border: int = 0
) -> torch.Tensor:
    """A patch with `margin` pixels around it: [B, C, H, W] -> [B, C, patch + 2 * margin, patch + 2 * margin].

    row, column: of the patch, in patches of `patch` pixels; the first ones lie `border` pixels inside the images, at
    most `margin`. Beyond the image its outermost pixels are repeated.
    """
    side, y, x = patch + 2 * margin, row * patch, column * patch
    return F.pad(images, [margin - border] * 4, mode="replicate")[:, :, y : y + side, x : x + side]


def whole_tiles(image: torch.Tensor, size: int) -> torch.Tensor:
    """The top left part of [C, H, W] that whole tiles cover; empty for an image smaller than a tile."""
    return image[:, : image.shape[1] // size * size, : image.shape[2] // size * size]


def save_png(image: torch.Tensor, path: str | os.PathLike[str], *, text: Mapping[str, str] | None = None) -> None:
    """Write an 8-bit RGB PNG; the file appears whole or not at all.

    A value v is stored as round(255 * v), halves to even, after clamping v to [0, 1].

    Args:
        image: float [3, H, W] in [0, 1], on any device.
        path: file to write, in an existing folder; an old file is replaced.
        text: metadata by name, for the PNG's text chunks.

    Raises:
        ValueError: another shape or dtype, or NaN among the values.
        OSError: the file cannot be written.
    """
    _check(image)
    values = image.detach().float()
    if torch.isnan(values).any():
        raise ValueError("image: expected values in [0, 1], got NaN")
    pixels = values.clamp(0, 1).mul(255).round().to("cpu", torch.uint8)
    png = io.BytesIO()
    info = require("PIL.PngImagePlugin").PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    require("PIL.Image").fromarray(array).save(png, "PNG", pnginfo=info)
    write_atomic(path, png.getvalue())


def _check(image: torch.Tensor) -> None:
    """ValueError unless `image` is [3, H, W] in floating point."""
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
        raise ValueError(f"image: expected [3, H, W], got {list(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"image: expected floating point in [0, 1], got {image.dtype}")


def _decode(file: IO[bytes], name: str) -> torch.Tensor:
    pil = require("PIL.Image")
    try:
        with warnings.catch_warnings():
            # The limit below replaces Pillow's warning about pixels; its other warnings, about a bad tag for example,
            # do not prevent reading the pixels.
            warnings.simplefilter("ignore")
            with pil.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {width} x {height}")
                return _to_tensor(require("PIL.ImageOps").exif_transpose(image))
    except (ImportError, MemoryError):
        raise
    except pil.UnidentifiedImageError:
        raise ValueError(f"{name}: not an image of a known format") from None
    except pil.DecompressionBombError:  # Pillow's own limit, which is higher; it does not say the size
        raise ValueError(f"{name}: cannot read image: expected at most {MAX_PIXELS} pixels, got more") from None
    except Exception as error:
        # Decoders raise exceptions of every kind on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: cannot read image: {reason}") from None


def _to_tensor(image: Any) -> torch.Tensor:
    """Pillow image of any mode to float32 [3, H, W] in [0, 1]."""
    numpy = require("numpy")
    if image.mode[0] in "FI":  # I;16 in either byte order, and I for 16-bit PPM
        kind, limit = (numpy.float32, 1) if image.mode == "F" else (numpy.int64, 65535)
        grey = torch.from_numpy(numpy.array(image, dtype=kind))
        if not bool(((grey >= 0) & (grey <= limit)).all()):
            raise ValueError(f"expected grey values in [0, {limit}]")
        return (grey / limit).float().expand(3, -1, -1).contiguous()
    has_alpha = image.has_transparency_data
    pixels = numpy.array(image.convert("RGBA" if has_alpha else "RGB"))
    values = torch.from_numpy(pixels).permute(2, 0, 1).float().div_(255)
    if has_alpha:
        alpha = values[3:]
        values = values[:3] * alpha + (1 - alpha)
    return values.contiguous()


def _centre(image: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of `image` [3, H, W], at most `size` pixels high and wide."""
    height, width = (min(side, size) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
