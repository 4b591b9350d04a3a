"""Real photographs for the demo: the samples that come with scikit-image and scikit-learn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from semhitok._optional import require
from semhitok.data.images import save_png

# Names in skimage.data. The right image of the stereo pair is left out: it shows what is held out of the left one.
_SKIMAGE = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")


def write_photographs(
    folder: str | os.PathLike[str],
    *,
    side: int | None = None,
    held_out: float = 0.25,
    unseen: Sequence[str] = ("chelsea",),
) -> dict[str, Path]:
    """Write the photographs as PNG into three folders below `folder`.

    train: the left parts of photographs. held_out: their right parts. unseen: whole photographs, no part of which is
    in train.

    Args:
        folder: created if it does not exist.
        side: of the shorter side in pixels, to which photographs are resized; None leaves them as they are.
        held_out: share of the width that the right parts have.
        unseen: names of the photographs that are kept whole.

    Returns:
        {"train" | "held_out" | "unseen": folder}.
    """
    data = require("skimage.data", "demo")
    datasets = require("sklearn.datasets", "demo")
    photographs = {name: getattr(data, name)() for name in _SKIMAGE}
    photographs["motorcycle"] = data.stereo_motorcycle()[0]
    for name in _SKLEARN:
        photographs[Path(name).stem] = datasets.load_sample_image(name)
    folders = {name: Path(folder) / name for name in ("train", "held_out", "unseen")}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    for name, pixels in photographs.items():
        image = _image(pixels)
        if side is not None:
            scale = side / min(image.shape[1:])
            size = [round(scale * length) for length in image.shape[1:]]
            image = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        if name in unseen:
            save_png(image, folders["unseen"] / f"{name}.png")
            continue
        cut = int(image.shape[2] * (1 - held_out))
        save_png(image[:, :, :cut], folders["train"] / f"{name}.png")
        save_png(image[:, :, cut:], folders["held_out"] / f"{name}.png")
    return folders


def _image(pixels) -> torch.Tensor:
    """[H, W] or [H, W, 3] uint8 array -> [3, H, W] float in [0, 1]."""
    image = torch.tensor(pixels).float() / 255
    return image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1)
