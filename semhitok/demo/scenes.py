"""Generated pictures for a tiny unified model: one object, five attributes, a caption, held-out combinations.

An object has a shape, colour, size and position, and a background: 6 * 8 * 3 * 9 * 5 = 6,480 combinations. Pictures of
one combination differ in place, size, angle, hue, light and noise. Shapes are easy to tell apart, even for a tokenizer
that keeps only coarse outlines: the intersection of two is at most .6 of their union. A picture is a function of (seed,
index, split, size) and takes less than a millisecond.

Splits, the same for every seed:

    comp     48 of the 240 (shape, colour, background) triples, which the others do not have; they have all pairs
    random   about every eighth of the other combinations
    train    the rest
    all      all combinations, to train a judge of pictures that knows all of them equally well
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semhitok._optional import require

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
COLOUR_RGB = (
    (0.85, 0.1, 0.1), (0.95, 0.5, 0.05), (0.92, 0.88, 0.1), (0.1, 0.65, 0.15),
    (0.1, 0.85, 0.85), (0.12, 0.2, 0.9), (0.6, 0.12, 0.75), (0.95, 0.95, 0.95),
)  # fmt: skip
SIZES = ("small", "medium", "large")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
ATTRIBUTES = {  # the columns of labels
    "shape": ("square", "triangle", "cross", "ring", "bar", "moon"),
    "colour": COLOURS,
    "size": SIZES,
    "position": tuple(f"{row} {column}" for row in ROWS for column in COLUMNS),
    "background": ("black", "grey", "brown", "navy", "pink"),
}
QUESTIONS = {
    "shape": "what shape is it?",
    "colour": "what colour is it?",
    "size": "what size is it?",
    "position": "where is it?",
    "background": "what colour is the background?",
}
SPLITS = ("train", "random", "comp", "all")
COUNTS = tuple(len(words) for words in ATTRIBUTES.values())

BACKGROUND_RGB = ((0.06, 0.06, 0.06), (0.5, 0.5, 0.5), (0.42, 0.25, 0.12), (0.1, 0.13, 0.36), (0.85, 0.55, 0.65))
# In units of the picture's side: at 48 pixels objects are about 14, 18 and 23 pixels across.
RADII = (0.148, 0.19, 0.24)
PLACES = (0.265, 0.5, 0.735)
HELD_OUT = 8  # one of so many combinations


class Pictures(NamedTuple):
    """N pictures: images uint8 [N, 3, S, S], RGB; labels int64 [N, 5], indices into `ATTRIBUTES`; N captions."""

    images: Tensor
    labels: Tensor
    captions: list[str]


@functools.cache
def combinations(split: str = "train") -> Tensor:
    """The labels of all combinations of a split, int64 [n, 5].

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    everything = torch.cartesian_prod(*(torch.arange(count) for count in COUNTS))
    shape, colour, background = everything[:, 0], everything[:, 1], everything[:, 4]
    # One background for each shape and colour, spread over all backgrounds.
    comp = (2 * shape + colour + background) % COUNTS[4] == 0
    drawn = [hashlib.sha256(repr(row).encode()).digest()[0] % HELD_OUT == 0 for row in everything.tolist()]
    random = torch.tensor(drawn) & ~comp
    chosen = {"train": ~comp & ~random, "random": random, "comp": comp, "all": torch.ones_like(comp)}
    return everything[chosen[split]]


def pictures(seed: int, start: int, count: int, split: str = "train", size: int = 48) -> Pictures:
    """Pictures start to start + count - 1 of the set `seed`, each of a random combination of the split.

    Args:
        size: S, side length in pixels, at least 32.

    Raises:
        ValueError: an argument out of range.
        ImportError: NumPy is not installed.
    """
    for name, value, least in (("seed", seed, 0), ("start", start, 0), ("count", count, 1), ("size", size, 32)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    np = require("numpy")
    allowed = combinations(split)
    images = np.empty((count, 3, size, size), np.uint8)
    rows = torch.empty(count, dtype=torch.int64)
    for n in range(count):
        random = np.random.default_rng((seed, SPLITS.index(split), start + n))
        rows[n] = int(random.integers(len(allowed)))
        images[n] = _picture(np, random, allowed[rows[n]].tolist(), size)
    labels = allowed[rows]
    return Pictures(torch.from_numpy(images), labels, [caption(row) for row in labels])


def caption(labels: Tensor | Sequence[int]) -> str:
    """The caption of labels [5]: "a small red ring at top left on a navy background"."""
    columns = zip(ATTRIBUTES.values(), labels, strict=True)
    shape, colour, size, position, background = (words[int(place)] for words, place in columns)
    return f"a {size} {colour} {shape} at {position} on a {background} background"


def cell_of_patches(grid_size: int) -> Tensor:
    """The cell of ATTRIBUTES["position"] that has the centre of each patch: int64 [grid_size, grid_size]."""
    place = ((torch.arange(grid_size) + 0.5) * len(ROWS) / grid_size).long()
    return place[:, None] * len(COLUMNS) + place


def surroundings(position: int, grid_size: int) -> Tensor:
    """Which patches contain or touch an object at an index of ATTRIBUTES["position"]: bool [grid_size, grid_size]."""
    centres = (torch.arange(grid_size) + 0.5) / grid_size
    row, column = divmod(position, 3)
    return ((centres - PLACES[row]).abs() < 0.23)[:, None] & ((centres - PLACES[column]).abs() < 0.23)


def parse(text: str) -> Tensor:
    """The labels [5] int64 in a text of any wording; -1 for an attribute without a value, or with several.

    No word belongs to two attributes. A position is a row and a column next to each other.
    """
    words = "".join(c if c.isalpha() else " " for c in text.lower()).split()
    said = set(words) | {f"{a} {b}" for a, b in itertools.pairwise(words)}
    labels = []
    for values in ATTRIBUTES.values():
        found = [place for place, value in enumerate(values) if value in said]
        labels.append(found[0] if len(found) == 1 else -1)
    return torch.tensor(labels)


def answer(attribute: str, labels: Tensor | Sequence[int]) -> str:
    """The answer to `QUESTIONS[attribute]` for labels [5]."""
    place = list(ATTRIBUTES).index(attribute)
    return ATTRIBUTES[attribute][int(labels[place])]


def _picture(np: Any, random: Any, labels: list[int], size: int) -> Any:
    """uint8 [3, S, S]."""
    shape, colour, large, position, background = labels
    row, column = divmod(position, 3)
    radius = size * RADII[large] * random.uniform(0.97, 1.03)
    down, across = size * (np.array((PLACES[row], PLACES[column])) + random.uniform(-0.02, 0.02, 2))
    slope = np.linspace(-1, 1, size, dtype=np.float32)
    y, x = (np.arange(size, dtype=np.float32) + 0.5 - middle for middle in (down, across))
    angle = random.uniform(-0.12, 0.12)
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = cos * x + sin * y[:, None], cos * y[:, None] - sin * x
    cover = (0.5 - distance(np, ATTRIBUTES["shape"][shape], x, y, radius)).clip(0, 1)
    colours = (BACKGROUND_RGB[background], COLOUR_RGB[colour])
    ground, paint = (np.array(rgb) + random.uniform(-0.035, 0.035, 3) for rgb in colours)
    pixels = ground[:, None, None] + cover * (paint - ground)[:, None, None]
    tilt = random.uniform(-0.08, 0.08, 2)
    pixels *= random.uniform(0.94, 1.06) * (1 + tilt[0] * slope + tilt[1] * slope[:, None])
    pixels += random.normal(0, 0.012, pixels.shape)
    return (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def distance(np: Any, shape: str, x: Any, y: Any, radius: float) -> Any:
    """About the signed distance of points from the outline of a shape, negative inside."""
    if shape == "bar":
        return np.maximum(abs(x) - radius * 0.98, abs(y) - radius * 0.42)
    if shape == "moon":
        return np.maximum(np.hypot(x, y) - radius * 0.95, radius * 0.75 - np.hypot(x - radius * 0.45, y))
    if shape == "square":
        return square(np, x, y, radius * 1.1)
    if shape == "triangle":
        return np.maximum(y - radius * 0.7, 0.85 * abs(x) - 0.5 * y - radius * 0.42)
    if shape == "cross":
        a, b = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
        return np.maximum(a - radius * 0.95, b - radius * 0.3)
    return abs(np.hypot(x, y) - radius * 0.72) - radius * 0.23  # ring


def square(np: Any, x: Any, y: Any, radius: float) -> Any:
    """`distance` of the square whose sides are 0.8 * radius from its centre."""
    return np.maximum(abs(x), abs(y)) - radius * 0.8
