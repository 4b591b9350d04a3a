"""Decoding with Pillow, in bounded memory: a picture is held once, in 8 bits, and becomes floating point in parts."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok._optional import require
from semhitok.data.formats import HEAD, sniff
from semhitok.data.metadata import Stripped, exif_orientation, scale_ppm, strip_avif, strip_jpeg, strip_png, strip_webp
from semhitok.data.tiff import strip_tiff

MAX_PIXELS = 2**27  # 134 million, by default
VARIABLE = "SEMHITOK_MAX_PIXELS"
PART = 2**20  # pixels that become floating point at once
_CLASSES = {
    "AVIF": ("AvifImagePlugin", "AvifImageFile"),
    "BMP": ("BmpImagePlugin", "BmpImageFile"),
    "GIF": ("GifImagePlugin", "GifImageFile"),
    "JPEG": ("JpegImagePlugin", "JpegImageFile"),
    "PNG": ("PngImagePlugin", "PngImageFile"),
    "PPM": ("PpmImagePlugin", "PpmImageFile"),
    "TIFF": ("TiffImagePlugin", "TiffImageFile"),
    "WEBP": ("WebPImagePlugin", "WebPImageFile"),
}
_STRIP: dict[str, Callable[[bytes], Stripped]] = {
    "AVIF": strip_avif,
    "JPEG": strip_jpeg,
    "PNG": strip_png,
    "PPM": scale_ppm,
    "TIFF": strip_tiff,
    "WEBP": strip_webp,
}


def max_pixels() -> int:
    """The most pixels of an image that is read: the environment variable SEMHITOK_MAX_PIXELS, 2**27 without it.

    Raises:
        ValueError: the variable is no positive number.
    """
    found = os.environ.get(VARIABLE, str(MAX_PIXELS))
    if not (found.isascii() and found.isdecimal() and int(found[:18]) >= 1 and len(found) <= 18):
        raise ValueError(f"{VARIABLE}: expected a number of pixels, got {found!r}")
    return int(found)


class Picture:
    """A decoded image, upright.

    Args:
        data: content of its file.
        reduce_to: if given, a JPEG that is too large may be decoded at a half, a quarter or an eighth of its size, if
            its shorter side keeps that many pixels.

    Attributes:
        height, width: of the image, upright.

    Raises:
        ValueError and others: not an image, damaged, too large; see `naming`.
    """

    def __init__(self, data: bytes, reduce_to: int | None = None) -> None:
        name = sniff(data[:HEAD])
        limit = max_pixels()
        self._file = _STRIP.get(name, Stripped)(data)
        del data
        if self._file.size:
            _check_size(self._file.size, limit)
        image = _open(name, self._file)
        self._box = (0, 0, *image.size)
        if name == "GIF" and image.tile:
            self._box = image.tile[0][1]  # the first picture may cover a part
        if name == "JPEG" and reduce_to and not self._file.buffered:
            _reduce(image, limit, reduce_to)
        _check_size(image.size, limit)
        image.load()
        if name == "AVIF":
            self._file.orientation = exif_orientation(image.info.get("exif", b"")) or 1
        self._file.data = b""
        self._image = image
        self.width, self.height = image.size
        if self._file.orientation >= 5:
            self.width, self.height = self.height, self.width

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """float32 [3, height, width] in [0, 1], on white."""
        orientation = self._file.orientation
        across, down, turned = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8), orientation >= 5
        if across:
            left = self.width - left - width
        if down:
            top = self.height - top - height
        if turned:
            top, left, height, width = left, top, width, height
        box = (left, top, left + width, top + height)
        values = self._values(self._image.crop(box))
        x0, y0, x1, y1 = (near - at for near, at in zip(self._box, (left, top) * 2, strict=True))
        if x0 > 0 or y0 > 0 or x1 < width or y1 < height:  # beyond the first picture of a GIF nothing is drawn
            drawn = torch.zeros(height, width, dtype=torch.bool)
            drawn[max(0, y0) : max(0, y1), max(0, x0) : max(0, x1)] = True
            values = values.masked_fill(~drawn, 1)
        if turned:
            values = values.transpose(1, 2)
        flipped = [dim for dim, flip in ((1, down), (2, across)) if flip]
        return values.flip(flipped) if flipped else values

    def _values(self, image: Any) -> Tensor:
        """A part as stored, in any of Pillow's modes -> float32 [3, h, w] in [0, 1]."""
        numpy = require("numpy")
        transparent = self._file.transparent
        if image.mode[0] in "FI":  # I;16 in either byte order, and I for 16-bit PPM
            kind, limit = (numpy.float32, 1) if image.mode == "F" else (numpy.int64, self._file.white)
            grey = torch.from_numpy(numpy.array(image, dtype=kind))
            if not bool(((grey >= 0) & (grey <= limit)).all()):
                raise ValueError(f"expected grey values in [0, {limit}]")
            values = ((limit - grey if self._file.inverted else grey) / limit).float()
            if transparent:
                values = values.masked_fill(grey == transparent[0], 1)
            return values.expand(3, -1, -1)
        has_alpha = image.has_transparency_data
        pixels = torch.from_numpy(numpy.array(image.convert("RGBA" if has_alpha else "RGB"))).permute(2, 0, 1)
        values = pixels.float().div_(255)
        if has_alpha:
            alpha = values[3:]
            values = values[:3] * alpha + (1 - alpha)
        if transparent:
            colour = torch.tensor(transparent).expand(3)[:, None, None]
            values = values.masked_fill((pixels == colour).all(0), 1)
        return values

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The image, [3, H, W]: float32 in [0, 1], or uint8, round(255 v), halves to even."""
        image = torch.empty(3, self.height, self.width, dtype=dtype)
        rows = max(1, PART // self.width)
        for top in range(0, self.height, rows):
            part = self.part(top, 0, min(rows, self.height - top), self.width)
            image[:, top : top + rows] = part if dtype == torch.float32 else part.mul(255).round().to(dtype)
        return image

    def narrowed(self, length: int, width: int) -> Tensor:
        """The middle of the image, at most `length` pixels high and wide, resized to `width` columns.

        Antialiased bicubic, which is separable: resizing the result to another height gives, bit for bit, what resizing
        both sides at once would, and costs no more memory than the columns.

        Returns:
            float32 [3, H or length, width], not clamped.
        """
        high, wide = min(self.height, length), min(self.width, length)
        top, left = (self.height - high) // 2, (self.width - wide) // 2
        narrow = torch.empty(3, high, width)
        rows = max(1, PART // wide)
        for row in range(0, high, rows):
            part = self.part(top + row, left, min(rows, high - row), wide)
            size = (part.shape[1], width)
            narrow[:, row : row + rows] = F.interpolate(part[None], size, mode="bicubic", antialias=True)[0]
        return narrow


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn whatever decoders raise into a ValueError of one line that names the image; keep ImportError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they do not prevent reading the pixels
            yield
    except ImportError:
        raise
    except MemoryError:
        raise ValueError(f"{name}: cannot read image: not enough memory") from None
    except Exception as error:
        # Decoders raise exceptions of every kind on damaged files.
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, LookupError):
            reason = f"{type(error).__name__}: {reason}"
        known = reason.startswith("not an image of a known format")
        raise ValueError(f"{name}: {reason}" if known else f"{name}: cannot read image: {reason}") from None


def _open(name: str, file: Stripped) -> Any:
    """Pillow's image, not decoded yet. Its own limit of pixels, which warns or is too low, is not asked."""
    if name == "AVIF" and not require("PIL.features").check("avif"):
        raise ValueError("AVIF needs Pillow 11.3 or later, built with it: pip install 'pillow>=11.3'")
    module, cls = _CLASSES[name]
    if name == "TIFF":
        _silence_libtiff()
    make = getattr(require(f"PIL.{module}"), cls)
    try:
        return make(io.BytesIO(file.data))
    except (SyntaxError, LookupError, TypeError, struct.error) as error:  # as Pillow finds out that it is none
        raise ValueError(f"not an image of a known format, or a damaged {file.what or name}") from error


@functools.cache
def _silence_libtiff() -> None:
    """libtiff prints errors to stderr by itself; the exception that Pillow raises is enough."""
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without it, or that has it inside
        ctypes.CDLL(require("PIL._imaging").__file__).TIFFSetErrorHandler(None)


def _check_size(size: tuple[int, int], limit: int) -> None:
    width, height = size
    if width * height > limit:
        raise ValueError(f"expected at most {limit} pixels, got {width} x {height} ({VARIABLE} raises the limit)")
    if width < 1 or height < 1:
        raise ValueError(f"expected at least 1 x 1 pixels, got {width} x {height}")


def _reduce(image: Any, limit: int, shortest: int) -> None:
    """Have a JPEG that is too large decoded at reduced size."""
    width, height = image.size
    if width * height <= limit:
        return
    for factor in (2, 4, 8):
        fits = -(-width // factor) * -(-height // factor) <= limit
        if fits and min(width, height) // factor >= shortest:
            image.draft(None, (width // factor, height // factor))
            return
