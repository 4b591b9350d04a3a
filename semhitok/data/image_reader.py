"""Image files read in batches for one pass, in order: what the commands `encode`, `reconstruct` and the like do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from semhitok._messages import message, printable, progress
from semhitok.data.images import read_image, read_resized, whole_tiles


class ImageReader:
    """Images of `paths`, resized and cropped to `size`, in batches; unreadable images are skipped.

    With `tiles`, images are instead cut at the right and bottom to multiples of `size`; batches then hold one image,
    and images smaller than `size` are skipped.

    Iterating yields (paths of the batch, float32 [B, 3, size, size] in [0, 1] on the CPU). Each skipped image is
    reported on stderr in the name of `command` and counted in `skipped`.
    """

    def __init__(self, paths: list[Path], size: int, batch_size: int, command: str, *, tiles: bool = False) -> None:
        self.paths, self.size, self.batch_size, self.command, self.tiles = paths, size, batch_size, command, tiles
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[list[Path], torch.Tensor]]:
        names: list[Path] = []
        images: list[torch.Tensor] = []
        with progress(self.paths, self.command) as bar:
            for path in bar:
                try:
                    images.append(self._read(path))
                except (ValueError, OSError) as error:
                    self.skipped += 1
                    line = printable(f"semhitok {self.command}: skipped: {message(error)}")
                    bar.write(line, file=sys.stderr)
                    continue
                names.append(path)
                if len(images) == self.batch_size:
                    yield names, torch.stack(images)
                    names, images = [], []
            if images:
                yield names, torch.stack(images)

    def _read(self, path: Path) -> torch.Tensor:
        if not self.tiles:
            return read_resized(path, self.size)
        image = read_image(path)
        if min(image.shape[1:]) < self.size:
            found = " x ".join(map(str, reversed(image.shape[1:])))
            raise ValueError(f"{path}: expected at least {self.size} pixels a side, got {found}")
        return whole_tiles(image, self.size)

    def check_any_read(self) -> None:
        """Raise ValueError if every image was skipped."""
        if self.skipped == len(self.paths):
            images = "1 image" if self.skipped == 1 else f"{self.skipped} images"
            raise ValueError(f"none of {images} could be read")
