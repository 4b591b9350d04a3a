"""Real photographs for the demo: the samples that come with scikit-image and scikit-learn."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from semhitok._optional import require
from semhitok.data.images import save_png

# Names in skimage.data. The right image of the stereo pair is left out: it shows what is held out of the left one.
_SKIMAGE = (
    "astronaut", "brick", "camera", "coffee", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
_UNSEEN = "chelsea"


def write_photographs(folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the photographs as PNG into three folders below `folder`.

    train: the left three quarters of 14 photographs. held_out: their right quarters. unseen: one photograph, of a cat,
    no part of which is in train.

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
        cut = image.shape[2] * 3 // 4
        save_png(image[:, :, :cut], folders["train"] / f"{name}.png")
        save_png(image[:, :, cut:], folders["held_out"] / f"{name}.png")
    save_png(_image(getattr(data, _UNSEEN)()), folders["unseen"] / f"{_UNSEEN}.png")
    return folders


def _image(pixels) -> torch.Tensor:
    """[H, W] or [H, W, 3] uint8 array -> [3, H, W] float in [0, 1]."""
    image = torch.tensor(pixels).float() / 255
    return image.expand(3, -1, -1) if image.ndim == 2 else image.permute(2, 0, 1)
