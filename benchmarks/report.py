"""What quantize_bench.py and cuda/bench.py print, write and draw."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

import semhitok


class Report:
    """What is printed and what was measured; `save` writes both into the folder, if there is one."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.content: dict[str, Any] = {"about": {}, "results": []}
        if folder:
            folder.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        self.lines.append(text)
        print(text, flush=True)

    def introduce(self, about: dict[str, str]) -> None:
        """Print date, versions and `about`."""
        now = datetime.datetime.now().isoformat(" ", "minutes")
        self.content["about"] = {"date": now, "semhitok": semhitok.__version__, **about}
        for name, value in self.content["about"].items():
            self.say(f"{name:24} {value}")

    def row(self, cells: list[tuple[str, str]], heading: str | None) -> None:
        """Print the values of a line of a table; before the first line, its heading and the titles."""
        titles, values = zip(*cells, strict=True)
        if heading is not None:
            self.say(f"\n{heading}\n{' '.join(titles)}")
        self.say(" ".join(values))

    def save(self) -> None:
        if self.folder:
            (self.folder / "table.txt").write_text("\n".join(self.lines) + "\n")
            (self.folder / "results.json").write_text(json.dumps(self.content, indent=1) + "\n")


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown(value: Any, form: str = "") -> str:
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)


def aligned(columns: Iterable[tuple[str, str, int]]) -> list[tuple[str, str]]:
    """(title, value, least width) of columns -> title and value of equal width."""
    wide = [(title, value, max(width, len(title), len(value))) for title, value, width in columns]
    return [(title.rjust(width), value.rjust(width)) for title, value, width in wide]


@contextlib.contextmanager
def chart(path: Path, title: str, clock: str, ticks: list[str], width: float) -> Iterator[Any]:
    """Axes for times over ours, one tick for each shape, `width` inches apart; written to `path` at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, width * len(ticks) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    yield axes
    axes.axhline(1, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel(f"{clock} time, in multiples of semhitok's")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_title(title)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def vector_quantizer(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """The search of vector-quantize-pytorch: tokens [N, D] -> ids [N]."""
    from vector_quantize_pytorch import VectorQuantize

    k, d = codebook.shape
    model = VectorQuantize(dim=d, codebook_size=k, use_cosine_sim=True).to(codebook.device, codebook.dtype).eval()
    model.codebook = codebook
    return lambda z: model(z)[1]
