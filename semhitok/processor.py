"""From pictures of any kind to the tensor that a tokenizer encodes, and back to pictures."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from semhitok._optional import require
from semhitok._settings import Settings, Size, from_dict
from semhitok.data.images import decode_resized, read_resized, resize_crop, to_uint8

ROUNDING = 1 / 510  # by which values of images may leave [0, 1]: half a step of 8 bits, by resizing
_RESAMPLE, _CROP = ("bicubic",), ("centre",)
_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes of Pillow that PNG stores as they are
_TIFF = ("CMYK", "LAB", "F", "I", "I;16B")


@dataclass(frozen=True)
class ImageProcessor(Settings):
    """Makes a batch of what is to be encoded: upright, on white, resized and cropped, values in [0, 1].

    A tokenizer has one, `SemHiTok.processor`, whose settings are in config.json of its checkpoint.

    Attributes:
        size: side of the images in pixels. The shorter side is resized to it, then the centre is cropped.
        resample: "bicubic", with antialiasing.
        crop: "centre".

    Raises:
        ValueError: a value is not one of these.
    """

    size: Size
    resample: str = "bicubic"
    crop: str = "centre"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("resample", _RESAMPLE), ("crop", _CROP)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, settings: Any) -> ImageProcessor:
        """The processor whose `to_dict` this is; ValueError for anything else."""
        return from_dict(cls, settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as JSON has them."""
        return asdict(self)

    def __call__(self, images: Any) -> Tensor:
        """One image, or a list of images of any sizes -> float32 [B, 3, size, size] in [0, 1].

        Args:
            images: an image is a path, a Pillow image, a NumPy array [H, W] or [H, W, C] with C = 1, 3 or 4 (uint8, or
                float in [0, 1]), or a tensor [3, H, W] (uint8, or float in [0, 1]). Arrays and tensors with one more
                dimension in front are batches.

        Returns:
            The images, on the device of the first tensor, or else on the CPU.

        Raises:
            ValueError: another type, shape or dtype, values outside [0, 1], NaN, or an image that cannot be read; the
                message names the image.
            OSError: a file cannot be read.
            ImportError: Pillow or NumPy is not installed.
        """
        found = [self._one(image, name) for name, image in _listed(images)]
        if not found:
            return torch.zeros(0, 3, self.size, self.size)
        return torch.stack([image.to(found[0].device, torch.float32) for image in found])

    def to_pil(self, images: Tensor) -> list[Any]:
        """Images [B, 3, H, W] in [0, 1], which are clamped to it -> Pillow images, RGB.

        Raises:
            ValueError: another shape, or NaN.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected shape [B, 3, H, W], got {list(images.shape)}")
        pillow = require("PIL.Image")
        return [pillow.fromarray(x.numpy()) for x in to_uint8(images).permute(0, 2, 3, 1).contiguous().cpu()]

    def _one(self, image: Any, name: str) -> Tensor:
        """float32 [3, size, size]."""
        if isinstance(image, (str, os.PathLike)):
            return read_resized(image, self.size)
        if isinstance(image, Tensor):
            return resize_crop(_checked(image, name), self.size)
        if type(image).__module__.partition(".")[0] == "numpy" and hasattr(image, "ndim"):
            if image.dtype.kind == "f":
                return resize_crop(_checked(_channels_first(image, name), name), self.size)
            image = _pillow_of(image, name)
        if hasattr(image, "mode") and hasattr(image, "convert"):
            return decode_resized(_stored(image), name, self.size)
        expected = "a path, a Pillow image, a NumPy array or a tensor"
        raise ValueError(f"{name}: expected {expected}, got {type(image).__name__}")


def check_range(images: Tensor, name: str = "images") -> None:
    """ValueError unless floating-point values lie in [0, 1]; they may leave it by `ROUNDING`. Empty tensors pass."""
    if not images.numel():
        return
    low, high = (float(bound) for bound in torch.aminmax(images))  # both NaN if any value is
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):
        got = "NaN" if math.isnan(low) else f"values from {low:g} to {high:g}"
        hint = ""
        if low >= -1 - ROUNDING and high <= 1 + ROUNDING:
            hint = "; for values in [-1, 1] give (x + 1) / 2"
        elif low >= -ROUNDING and high <= 255.5:
            hint = "; for values in [0, 255] give x / 255"
        raise ValueError(f"{name}: expected values in [0, 1], got {got}{hint}")


def _listed(images: Any) -> Iterator[tuple[str, Any]]:
    """Each image with its name in errors."""
    if not isinstance(images, (list, tuple)) and getattr(images, "ndim", 0) < 4:
        yield "images", images
    else:
        for number, image in enumerate(images):
            if getattr(image, "ndim", 0) > 3:
                raise ValueError(f"images[{number}]: expected one image, got shape {list(image.shape)}")
            yield f"images[{number}]", image


def _checked(image: Tensor, name: str) -> Tensor:
    """Floating point in [0, 1] of an image [3, H, W]."""
    if image.ndim != 3 or image.shape[0] != 3 or min(image.shape) < 1:
        raise ValueError(f"{name}: expected shape [3, H, W], got {list(image.shape)}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise ValueError(f"{name}: expected uint8, or floating point in [0, 1], got {image.dtype}")
    check_range(image, name)
    return image.float()


def _channels_first(array: Any, name: str) -> Tensor:
    """A floating-point array [H, W] or [H, W, 1 or 3] as [3, H, W]."""
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"{name}: expected shape [H, W] or [H, W, 3], got {list(array.shape)}")
    values = torch.from_numpy(array.astype("float32"))
    values = values[..., None] if values.ndim == 2 else values
    return values.permute(2, 0, 1).expand(3, -1, -1).contiguous()


def _pillow_of(array: Any, name: str) -> Any:
    """An array of integers as a Pillow image."""
    shape, channels = list(array.shape), array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or min(shape) < 1:
        raise ValueError(f"{name}: expected shape [H, W] or [H, W, C] with C = 1, 3 or 4, got {shape}")
    if array.dtype != "uint8" and not (array.dtype == "uint16" and channels == 1):
        raise ValueError(f"{name}: expected uint8, uint16 grey, or floating point in [0, 1], got {array.dtype}")
    return require("PIL.Image").fromarray(array[..., 0] if channels == 1 and array.ndim == 3 else array)


def _stored(image: Any) -> bytes:
    """A Pillow image as the content of a file that has the same pixels, upright: one set of rules reads everything."""
    try:
        image = require("PIL.ImageOps").exif_transpose(image)
    except Exception:  # damaged metadata costs no pixels
        image.load()
    if image.mode not in _PNG + _TIFF:
        alpha = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
        image = image.convert(alpha.get(image.mode, "RGB"))
    data = io.BytesIO()
    if image.mode in _PNG:
        image.save(data, "PNG", compress_level=0)
    else:
        image.save(data, "TIFF")
    return data.getvalue()
