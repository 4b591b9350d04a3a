"""Generated 64 x 64 pictures of one to three objects, with labels and captions.

Meaning and pixels compete: an object has a shape, colour, texture and size and is in one of 3 x 3 cells, while most
pixels belong to a patterned background in changing light, and all colours are jittered. A picture is a function of
(seed, index) and takes about a millisecond.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from semhitok._optional import require
from semhitok.demo import scenes
from semhitok.demo.scenes import COLOUR_RGB, COLOURS, COLUMNS, ROWS, SIZES
from semhitok.demo.teacher import Lesson, cell_means

SIZE = 64  # side length in pixels
CELLS = 3  # cells along a side

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
TEXTURES = ("plain", "striped", "dotted", "checked")
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}  # the columns of `labels`

PATTERNS = ("even", "shaded", "barred", "tiled", "cloudy")
GROUNDS = ("grey", "brown", "navy", "olive", "teal", "pink")
LIGHTS = ("dim", "normal", "bright")
SURROUNDINGS = {"pattern": PATTERNS, "ground": GROUNDS, "light": LIGHTS}  # the columns of `background`

GROUND_RGB = (
    (0.5, 0.5, 0.5), (0.45, 0.28, 0.15), (0.12, 0.14, 0.35), (0.4, 0.42, 0.15), (0.12, 0.4, 0.4), (0.8, 0.55, 0.6),
)  # fmt: skip
GAINS = (0.6, 0.85, 1.1)  # of the lights
RADII = (6.5, 8.2, 10.0)  # pixels, of the sizes


class Picture(NamedTuple):
    """One picture and its labels.

    labels: for each cell, row by row, the shape, colour, texture and size as indices into `ATTRIBUTES`; -1 where the
        cell is empty.
    caption: the same in words: "a small striped red circle at the top left, ..., on a barred olive background in dim
        light"; phrases are separated by ", ", objects in the order of their cells, the background last.
    """

    image: Tensor  # uint8 [3, 64, 64], RGB
    labels: Tensor  # int64 [9, 4]
    background: Tensor  # int64 [3], pattern, ground colour and light as indices into `SURROUNDINGS`
    caption: str


class Pictures(NamedTuple):
    """N pictures: images uint8 [N, 3, 64, 64], labels int64 [N, 9, 4], background int64 [N, 3] and N captions."""

    images: Tensor
    labels: Tensor
    background: Tensor
    captions: list[str]


def picture(seed: int, index: int) -> Picture:
    """Picture number `index` of the set `seed`; both at least 0.

    Raises:
        ValueError: a negative seed or index.
        ImportError: NumPy is not installed.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}")
    np = require("numpy")
    random = np.random.default_rng((seed, index))
    labels = np.full((CELLS**2, len(ATTRIBUTES)), -1)
    cells = random.permutation(CELLS**2)[: random.integers(1, 4)]
    for cell in sorted(cells):
        labels[cell] = [random.integers(len(words)) for words in ATTRIBUTES.values()]
    background = np.array([random.integers(len(words)) for words in SURROUNDINGS.values()])
    pixels = _background(np, random, background)
    for cell in sorted(cells):
        _draw(np, random, pixels, cell, labels[cell])
    # light: the gain that the label names, and a slope across the picture that no label names
    across, down = random.uniform(-0.12, 0.12, 2)
    slope = np.linspace(-1, 1, SIZE, dtype=np.float32)
    gain = GAINS[background[2]] * random.uniform(0.93, 1.07)
    pixels *= (gain * (1 + across * slope[:, None] + down * slope[:, None, None])).astype(np.float32)
    pixels += random.normal(0, 0.015, pixels.shape).astype(np.float32)
    image = (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(2, 0, 1)
    kept = torch.from_numpy(labels), torch.from_numpy(background)
    return Picture(torch.from_numpy(np.ascontiguousarray(image)), *kept, caption(*kept))


def pictures(seed: int, first: int, count: int) -> Pictures:
    """Pictures first to first + count - 1 of the set `seed`, stacked. For errors see `picture`."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    found = [picture(seed, first + n) for n in range(count)]
    images, labels, background = (torch.stack([getattr(p, name) for p in found]) for name in Picture._fields[:3])
    return Pictures(images, labels, background, [p.caption for p in found])


def caption(labels: Tensor, background: Tensor) -> str:
    """The caption for labels [9, 4] and background [3], as in `Picture`."""
    phrases = []
    for cell, (shape, colour, texture, size) in enumerate(labels.tolist()):
        if shape >= 0:
            article = f"a {SIZES[size]} {TEXTURES[texture]} {COLOURS[colour]} {SHAPES[shape]}"
            phrases.append(f"{article} at the {ROWS[cell // CELLS]} {COLUMNS[cell % CELLS]}")
    pattern, ground, light = background.tolist()
    article = "an" if PATTERNS[pattern][0] in "aeiou" else "a"
    phrases.append(f"on {article} {PATTERNS[pattern]} {GROUNDS[ground]} background in {LIGHTS[light]} light")
    return ", ".join(phrases)


def _background(np: Any, random: Any, labels: Any) -> Any:
    """float32 [64, 64, 3]: two tones of the ground colour, mixed by the pattern."""
    base = np.array(GROUND_RGB[labels[1]]) + random.uniform(-0.05, 0.05, 3)
    contrast = random.uniform(0.15, 0.3) * random.choice((-1, 1))
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    angle, period, phase = random.uniform(0, np.pi), random.uniform(8, 16), random.uniform(0, 16)
    along = np.cos(angle) * x + np.sin(angle) * y
    pattern = PATTERNS[labels[0]]
    if pattern == "even":
        mix = np.zeros_like(x)
    elif pattern == "shaded":
        mix = (along - along.min()) / np.ptp(along) * 2 - 0.5
    elif pattern == "barred":
        mix = ((along + phase) % period < period / 2).astype(np.float32)
    elif pattern == "tiled":
        mix = (((x + phase) // (period / 2) + (y + phase) // (period / 2)) % 2).astype(np.float32)
    else:  # cloudy: coarse noise, linearly interpolated
        coarse = random.uniform(-0.3, 1.3, (9, 9)).astype(np.float32)
        place = np.arange(SIZE) / 8
        low = place.astype(int)
        part = (place - low).astype(np.float32)
        rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
        mix = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    return (base + contrast * mix[..., None]).astype(np.float32)


def _draw(np: Any, random: Any, pixels: Any, cell: int, labels: Any) -> None:
    """Draw the object with these labels into a cell of pixels [64, 64, 3], with soft edges."""
    shape, colour, texture, size = labels
    radius = RADII[size] * random.uniform(0.93, 1.05)
    side = SIZE / CELLS
    room = max(side / 2 - radius, 0) + 0.5
    row, column = (np.array(divmod(int(cell), CELLS)) + 0.5) * side + random.uniform(-room, room, 2)
    top, left = int(max(row - radius - 2, 0)), int(max(column - radius - 2, 0))
    window = pixels[top : int(row + radius + 3), left : int(column + radius + 3)]
    y, x = np.mgrid[top : top + window.shape[0], left : left + window.shape[1]].astype(np.float32)
    angle = random.uniform(-0.25, 0.25)
    y, x = y + 0.5 - row, x + 0.5 - column
    x, y = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    cover = (0.5 - distance(np, SHAPES[shape], x, y, radius)).clip(0, 1)[..., None]
    paint = np.array(COLOUR_RGB[colour]) + random.uniform(-0.05, 0.05, 3)
    period, phase = random.uniform(4, 5), random.uniform(0, 5)
    kind = TEXTURES[texture]
    if kind == "plain":
        dark = np.zeros_like(x)
    elif kind == "striped":
        dark = (x + y + phase) % period < period / 2
    elif kind == "dotted":
        dark = ((x + phase) % period - period / 2) ** 2 + ((y + phase) % period - period / 2) ** 2 < (period / 3.4) ** 2
    else:
        dark = ((x + phase) // (period * 0.6) + (y + phase) // (period * 0.6)) % 2
    window += cover * (paint * (1 - 0.5 * dark[..., None]) - window)


def distance(np: Any, shape: str, x: Any, y: Any, radius: float) -> Any:
    """About the signed distance of points from the outline of a shape, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius * 0.95
    if shape == "star":  # of five points
        angle = (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
        return np.hypot(x, y) * (np.cos(angle) + 1.7 * abs(np.sin(angle))) - radius * 1.05
    return scenes.square(np, x, y, radius) if shape == "square" else scenes.distance(np, shape, x, y, radius)


def lesson(data: Pictures) -> Lesson:
    """The captions as a lesson for the teacher: regions are the 3 x 3 cells, phrases the objects and the background."""
    objects = [w for words in ATTRIBUTES.values() for w in words] + [*ROWS, *COLUMNS]
    of_object = {word: n for n, word in enumerate(objects)}
    # A word of an object is another one than the same word of a background.
    behind = [w for words in SURROUNDINGS.values() for w in words]
    of_background = {word: n + len(objects) for n, word in enumerate(behind)}
    found = torch.zeros(len(data.captions), 4, len(objects) + len(behind))  # three objects at most and the background
    for caption, rows in zip(data.captions, found, strict=True):
        for phrase, row in zip(caption.split(", "), rows, strict=False):
            words = of_background if phrase.endswith(" light") else of_object
            row[[words[w] for w in phrase.split() if w in words]] = 1
    regions = cell_means().expand(len(found), -1, -1)
    sizes = ({name: len(words) for name, words in table.items()} for table in (ATTRIBUTES, SURROUNDINGS))
    return Lesson(data.images, found, regions, data.labels, data.background, *sizes)
