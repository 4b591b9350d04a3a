"""Reading, resizing and writing images: whatever a camera or editor writes becomes float32 RGB in [0, 1]."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping

import torch
import torch.nn.functional as F

from semhitok._files import write_atomic
from semhitok._optional import require
from semhitok.data.decode import Picture, max_pixels, naming
from semhitok.data.formats import SUFFIXES as SUFFIXES
from semhitok.data.listing import check_file
from semhitok.data.listing import list_images as list_images
from semhitok.data.listing import walk_images as walk_images

SMALL = 2**22  # pixels of an image that is resized at once
_MAX_BYTES = 16  # of a file, for each pixel that is allowed
_MAX_ASPECT = 4  # of the part that `resize_crop` resizes: the crop keeps only the middle anyway


def read_image(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read an image file as it would be displayed, with its orientation applied and on a white background.

    Formats are PNG, JPEG, WebP, AVIF, TIFF, BMP, GIF and PPM, by the file's content. Grey and palette images become
    RGB; transparency is composited on white; 16-bit grey is divided by 65535, 8-bit by 255; floating-point TIFF must
    lie in [0, 1]. Of an animation or a multi-page file the first image is read. Colour profiles are not applied, and
    damaged metadata does not matter.

    Returns:
        float32 [3, H, W] in [0, 1], RGB.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: not an image, corrupt, truncated, of a format that is not read, or of more than `max_pixels()`
            pixels; one line that names the file and the reason.
        ImportError: Pillow or NumPy is not installed.
    """
    return decode_image(_content(path), os.fspath(path))


def decode_image(data: bytes, name: str) -> torch.Tensor:
    """Decode the content of an image file as `read_image` does; errors name it `name`.

    Returns:
        float32 [3, H, W] in [0, 1], RGB.

    Raises:
        ValueError, ImportError: as `read_image` does.
    """
    with naming(name):
        return Picture(data).whole()


def read_uint8(path: str | os.PathLike[str]) -> torch.Tensor:
    """`to_uint8(read_image(path))` in a quarter of the memory: uint8 [3, H, W]. Raises what `read_image` does."""
    return decode_uint8(_content(path), os.fspath(path))


def decode_uint8(data: bytes, name: str) -> torch.Tensor:
    """`to_uint8(decode_image(data, name))` in a quarter of the memory: uint8 [3, H, W]."""
    with naming(name):
        return Picture(data).whole(torch.uint8)


def read_resized(path: str | os.PathLike[str], size: int) -> torch.Tensor:
    """`resize_crop(read_image(path), size)`, bit for bit, with no copy of the whole image in floating point.

    A JPEG of more than `max_pixels()` pixels, which `read_image` refuses, is decoded at a half, a quarter or an eighth
    of its size where that fits.

    Returns:
        float32 [3, size, size] in [0, 1].

    Raises:
        OSError, ValueError, ImportError: as `read_image` and `resize_crop` do.
    """
    return decode_resized(_content(path), os.fspath(path), size)


def decode_resized(data: bytes, name: str, size: int) -> torch.Tensor:
    """`resize_crop(decode_image(data, name), size)` as `read_resized` does it; errors name the image `name`.

    `ten_crops` takes its result of size * 11 // 10 as it would take the whole image.
    """
    _check_side(size)
    with naming(name):
        picture = Picture(data, reduce_to=size)
        shorter = min(picture.height, picture.width)
        if shorter == size or picture.height * picture.width <= SMALL:
            return resize_crop(picture.whole(), size).contiguous()
        length = _MAX_ASPECT * shorter
        height, width = _resized(min(picture.height, length), min(picture.width, length), size)
        narrow = picture.narrowed(length, width)
        del picture
        resized = F.interpolate(narrow[None], (height, width), mode="bicubic", antialias=True)[0]
        return _centre(resized.clamp(0, 1), size).contiguous()


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
    _check_side(size)
    shorter = min(image.shape[1:])
    image = _centre(image, _MAX_ASPECT * shorter)
    if shorter != size:
        height, width = _resized(image.shape[1], image.shape[2], size)
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


def _content(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file, in bounded memory."""
    size, most = check_file(path).st_size, _MAX_BYTES * max_pixels()
    if size > most:
        raise ValueError(f"{os.fspath(path)}: cannot read image: expected at most {most} bytes, got {size}")
    with open(path, "rb") as file:
        return file.read()


def _resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width after resizing the shorter side to `size`."""
    shorter = min(height, width)
    return max(size, round(height * size / shorter)), max(size, round(width * size / shorter))


def _check_side(size: int) -> None:
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")


def _centre(image: torch.Tensor, size: int) -> torch.Tensor:
    """The middle of `image` [3, H, W], at most `size` pixels high and wide."""
    height, width = (min(side, size) for side in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]
