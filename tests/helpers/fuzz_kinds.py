"""What the fuzz run reads: for each kind of file, valid ones, how they are damaged, how they are read, and what is
checked of what comes out.

Every picture is of one colour that says its number, and its caption says the number with a checksum: damage to either
is seen, and cannot be taken for a picture with the caption of another.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import mutations
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, features

from semhitok.corpus.items import Note
from semhitok.corpus.sources import plan, sort_out
from semhitok.corpus.units import read_unit
from semhitok.data import shards
from semhitok.data.captions import FIELDS
from semhitok.data.images import decode_image
from semhitok.data.passed_over import PassedOver
from semhitok.data.skipped import Skipped
from semhitok.mllm.config import RowsConfig, SourceConfig
from semhitok.mllm.sources import open_source

shards.PAUSE = 0.0  # damage to a compressed tar looks like a broken connection, which is retried
SIZE, COUNT = 16, 8  # of a picture in pixels; pictures in a file


class Wrong(Exception):
    """What was read is wrong: neither what the file holds nor refused."""


class WrongPairing(Wrong):
    """A caption, key or ids of another image."""


# ---------------------------------------------------------------------------------------------------------------
# Pictures and captions that know their number


def picture(number: int, side: int = SIZE) -> Image.Image:
    return Image.new("RGB", (side, side), (number, 255 - number, number ^ 0x55))


def number_of(image: torch.Tensor) -> int | None:
    """The number of a picture; None if it is damaged."""
    check_image(image)
    red, green, blue = image.flatten(1).mul(255).round().int()
    number = int(red[0])
    sound = bool((red == number).all() and (green == 255 - number).all() and (blue == number ^ 0x55).all())
    return number if sound else None


def check_image(image: torch.Tensor) -> None:
    if image.dtype != torch.float32 or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise Wrong(f"image: {image.dtype} {list(image.shape)}")
    if not bool(((image >= 0) & (image <= 1)).all()):
        raise Wrong("image: values outside [0, 1]")


def caption(number: int) -> str:
    text = f"picture {number}"
    return f"{text} {zlib.crc32(text.encode()):08x}"


def check_pair(number: int | None, text: Any) -> None:
    """WrongPairing if a sound caption is that of another picture than the one it comes with."""
    found = re.search(r"picture (\d{1,3}) [0-9a-f]{8}", text) if isinstance(text, str) else None
    if number is not None and found and found[0] == caption(int(found[1])) != caption(number):
        raise WrongPairing(f"picture {number} has the caption {found[0]!r}")


def content(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


PICTURES = [content(picture(n)) for n in range(COUNT)]


def check_problem(problem: str, path: Path) -> None:
    """What is left out is named, in one line: the file, or the folder it belongs to."""
    if not problem.strip() or "\n" in problem or not (path.name in problem or str(path.parent) in problem):
        raise Wrong(f"a problem that does not name its file in one line: {problem!r}")


# ---------------------------------------------------------------------------------------------------------------
# Kinds


class Kind(ABC):
    """Files of one kind in `folder`, an empty one. `make` writes the damaged input number so-and-so, `read` reads it.

    read: ends, if the input could be read, wholly or in part; ValueError or OSError if it was refused.
    """

    weight = 1.0  # share of the inputs

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def intact(self) -> Iterator[Callable[[], None]]:
        """Reads each of the valid inputs."""

    @abstractmethod
    def make(self, random: Random) -> Path:
        """Writes a damaged input."""

    @abstractmethod
    def read(self) -> None:
        """Reads the damaged input."""


class Images(Kind):
    weight = 6.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "image"
        base = Image.radial_gradient("L").resize((40, 24))
        rgb = Image.merge("RGB", [base, base.rotate(90).resize(base.size), base.point(lambda v: 255 - v)])
        sixteen = Image.new("I;16", (20, 12))
        sixteen.putdata(range(0, 240 * 273, 273))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", 72.0
        self.files = [content(image, "PNG", exif=exif) for image in (base, rgb, rgb.convert("RGBA"), sixteen)]
        self.files += [content(rgb.quantize(16), "PNG", transparency=3), content(rgb.convert("1"), "PNG")]
        self.files += [content(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)])]
        for image in (rgb, base, rgb.convert("CMYK"), rgb.convert("YCbCr")):
            self.files.append(content(image, "JPEG", exif=exif, quality=70, progressive=image is rgb))
        for image in (rgb, base, rgb.convert("RGBA"), rgb.convert("CMYK"), rgb.convert("1"), base.convert("F")):
            for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
                tags = {} if image.mode == "F" else {"tiffinfo": exif}
                scaled = image.point(lambda v: v / 255) if image.mode == "F" else image
                self.files.append(content(scaled, "TIFF", compression=compression, **tags))
        self.files += [content(sixteen, "TIFF"), content(rgb, "TIFF", save_all=True, append_images=[base])]
        self.files.append(content(rgb, "TIFF", compression="jpeg"))
        self.files += [content(rgb, "WEBP", lossless=n, exif=exif) for n in (False, True)]
        self.files += [content(image, f) for image in (rgb, base, rgb.quantize(8)) for f in ("BMP", "GIF")]
        self.files += [content(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])]
        self.files += [content(image, "PPM") for image in (rgb, base, rgb.convert("1"), sixteen.convert("I"))]
        if features.check("avif"):
            self.files += [content(rgb, "AVIF")]

    def intact(self) -> Iterator[Callable[[], None]]:
        for data in self.files:
            if data[4:12] != b"ftypavif":  # not every version reads AVIF
                yield lambda data=data: (self.path.write_bytes(data), self.read())

    def make(self, random: Random) -> Path:
        data, other = random.choice(self.files), random.choice(self.files)
        self.path.write_bytes(mutations.damage(data, other, random).data)
        return self.path

    def read(self) -> None:
        check_image(decode_image(self.path.read_bytes(), str(self.path)))


class Pairs(Kind):
    """Files of pictures with captions.

    Attributes:
        path: of the damaged file.
        paired: whether what belongs together can be known.
        images: numbers of the pictures that must come out, unless something is said to be left out.
    """

    path: Path
    paired = True
    images: set[int] = frozenset()  # type: ignore[assignment]

    def read(self) -> None:
        self.read_corpus()

    def check(self, found: set[int | None], said: bool) -> None:
        if not said and not self.images <= found:
            raise Wrong(f"lost without a word: pictures {sorted(self.images - found)}")

    def pair(self, number: int | None, text: Any) -> None:
        if self.paired:
            check_pair(number, text)

    def read_corpus(self) -> None:
        """As `semhitok encode` reads it."""
        passed_over = PassedOver()
        units, _ = plan(sort_out([self.path], passed_over), COUNT, self.folder, passed_over)
        found: set[int | None] = set()
        keys: list[str] = []
        said = False
        for unit in units:
            for item in read_unit(unit, FIELDS):
                if isinstance(item, Note):
                    said = True
                    continue
                try:
                    number = number_of(item.crops(SIZE, "centre")[0])
                    text = item.read_caption().text
                    keys.append(item.key)
                except (ValueError, OSError) as error:
                    check_problem(str(error), self.path)
                    said = True
                    continue
                found.add(number)
                self.pair(number, text)
        if not all(isinstance(key, str) and key for key in keys):
            raise Wrong(f"keys: expected texts, got {keys}")
        json.dumps(keys).encode(), "".join(keys).encode()  # what a parquet file can store
        self.check(found, said)


class Tars(Pairs):
    weight = 4.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.samples: dict[int, list[mutations.Member]] = {}
        for n, data in enumerate(PICTURES):
            record = {"caption": caption(n), "width": SIZE, "text": caption(n)}
            text = (".json", json.dumps(record).encode()) if n % 4 == 3 else (".txt", caption(n).encode())
            self.samples[n] = [(".png", data), text]
        self.path = folder / "shard.tar"

    def intact(self) -> Iterator[Callable[[], None]]:
        members = [(f"{n:03}{suffix}", data) for n, parts in self.samples.items() for suffix, data in parts]
        for compression in ("", "gz", "bz2", "xz"):
            self.path = self.folder / f"intact.tar{'.' + compression if compression else ''}"
            self.path.write_bytes(mutations.compress(mutations.plain_tar(members), compression))
            self.images = set(self.samples)
            yield self.read

    def make(self, random: Random) -> Path:
        made = mutations.tar(self.samples, random)
        compression = random.choice(("", "", "", "gz", "bz2", "xz"))
        data = mutations.compress(made.data, compression)
        self.paired, self.images = True, made.images
        if random.random() < 0.6:
            data, moved = mutations.damage(data, mutations.tar(self.samples, random).data, random)
            self.paired, self.images = not (moved or compression), set()
        self.path = self.folder / f"shard.tar{'.' + compression if compression else ''}"
        self.path.write_bytes(data)
        return self.path

    def read(self) -> None:
        self.read_corpus()
        self.read_training()
        self.read_rows()

    def read_training(self) -> None:
        """As `semhitok train` reads it."""
        found: set[int | None] = set()
        said = False
        for sample in shards.read_shard(str(self.path), texts=True):
            try:
                number = number_of(sample.image())
            except (ValueError, OSError) as error:
                check_problem(str(error), self.path)
                said = True
                continue
            found.add(number)
            for _, text in sample.texts:
                self.pair(number, text.decode("utf-8", "replace"))
        self.check(found, said)

    def read_rows(self) -> None:
        """As `semhitok train-mllm` reads it."""
        source = open_source(SourceConfig(str(self.path), "understanding"), RowsConfig())
        found: set[int | None] = set()
        said = False
        for record, after in source.stream(0, 1, 0, None):
            if after["epoch"]:
                break
            try:
                if isinstance(record, ValueError):
                    raise record
                number = number_of(record["images"][0].image())
            except (ValueError, OSError) as error:
                check_problem(str(error), self.path)
                said = True
                continue
            found.add(number)
            self.pair(number, record.get("caption"))
        self.check(found, said)
        list(source.texts(Skipped()))


class Parquets(Pairs):
    weight = 3.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "rows.parquet"

    def intact(self) -> Iterator[Callable[[], None]]:
        for kind in range(3):
            self.images = set(range(COUNT))
            self.path.write_bytes(self.table(Random(kind), plain=True))
            yield self.read

    def table(self, random: Random, plain: bool = False) -> bytes:
        """A parquet file; unless `plain`, with one of the things that real ones have."""
        numbers = list(range(COUNT))
        odd = "" if plain else random.choice(("", "", "order", "again", "null image", "caption", "key", "columns"))
        if odd == "order":
            random.shuffle(numbers)
        elif odd == "again":
            numbers += numbers[:3]
        images: list[Any] = [PICTURES[n] for n in numbers]
        captions: list[Any] = [caption(n) for n in numbers]
        keys: list[Any] = [f"{place:03}" for place in range(len(numbers))]
        if odd == "null image":
            images[random.randrange(COUNT)] = random.choice((None, b"", b"no image"))
            self.images = set()
        image: Any = pa.array(images, random.choice((pa.binary(), pa.large_binary())))
        if random.random() < 0.5:
            image = pa.array([{"bytes": i, "path": random.choice((None, f"{n}.png"))} for n, i in enumerate(images)])
        text: Any = pa.array(captions)
        if odd == "caption":
            text = random.choice((
                pa.array([[c, "another"] for c in captions]), pa.array([c.encode() for c in captions]),
                pa.array([None, *captions[1:]]), pa.array(numbers), text.dictionary_encode(),
                pa.array(captions, pa.large_string()), pa.array([{"en": c} for c in captions]), pa.nulls(len(captions)),
                _bad_strings(captions),
            ))  # fmt: skip
        key: Any = pa.array(keys)
        if odd == "key":
            key = random.choice((
                pa.nulls(len(keys)), pa.array([None, *keys[1:]]), pa.array([k.encode() for k in keys]),
                _bad_strings(keys), pa.array([k.encode() for k in keys], pa.binary(3)),
                pa.array(range(len(keys))), pa.array([keys[0]] * len(keys)), pa.array([[k] for k in keys]),
                pa.array([float(n) for n in range(len(keys))]),
            ))  # fmt: skip
        columns = {"image": image, random.choice(("caption", "text")): text}
        columns |= {random.choice(("__key__", "key", "id")): key} if random.random() < 0.7 else {}
        if odd == "columns":
            columns = random.choice((
                {"picture": image, "caption": text}, {"image": text}, {"image": pa.array(numbers)}, {"image": image},
                {**columns, "caption": pa.nulls(len(numbers)), "text": text},
            ))  # fmt: skip
            self.images = set()
        out = io.BytesIO()
        options = {
            "compression": random.choice(("none", "snappy", "zstd", "gzip")),
            "use_dictionary": random.random() < 0.5,
        }
        pq.write_table(
            pa.table(columns), out, row_group_size=random.choice((3, 100)), write_page_checksum=True, **options
        )
        return out.getvalue()

    def make(self, random: Random) -> Path:
        self.paired, self.images = True, set(range(COUNT))
        data = self.table(random)
        if random.random() < 0.6:
            data, moved = mutations.damage(data, self.table(random), random)
            self.paired, self.images = not moved, set()
        self.path.write_bytes(data)
        return self.path


def _bad_strings(texts: list[str]) -> Any:
    """A column of strings of which one is not UTF-8."""
    column = pa.array([text.encode() if n != 2 else b"\xff\xfe" + text.encode() for n, text in enumerate(texts)])
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())
