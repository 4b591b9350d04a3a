"""Damage for the fuzz run: of bytes, of JSON values and of the members of tars. All randomness comes from `random`."""

from __future__ import annotations

import bz2
import copy
import gzip
import io
import json
import lzma
import struct
import tarfile
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import torch
import yaml

DEEP, DEPTH = "@@deep@@", 1200  # stands in a JSON value for a list nested so deep
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, 1e-300),
    *(float("nan"), float("inf"), "", " ", "x" * 5000, "\ud800", "a\udc80b", "\0", "1e400", "nan", "../../x", "a\nb"),
    *([], [[]], {}, [None], {"": None}, DEEP),
]
INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)


class Damaged(NamedTuple):
    data: bytes
    moved: bool  # content stands in another place than before: what belongs together can no longer be known


def damage(data: bytes, other: bytes, random: Random) -> Damaged:
    """One to four changes of bytes; `other` is another valid file of the kind."""
    moved = False
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        changed = bytearray(data)
        if not changed:
            break
        change = random.choice((_flip, _flip, _fill, _integer, _truncate, _move, _splice))
        data = bytes(change(changed, other, random))
        moved |= change in (_move, _splice)
    return Damaged(data, moved)


def _flip(data: bytearray, other: bytes, random: Random) -> bytearray:
    for _ in range(random.choice((1, 1, 3, 20))):
        data[_place(data, random)] ^= 1 << random.randrange(8)
    return data


def _fill(data: bytearray, other: bytes, random: Random) -> bytearray:
    start, length = _place(data, random), random.choice((1, 2, 8, 100))
    value = random.choice((0, 255, None))
    for place in range(start, min(start + length, len(data))):
        data[place] = random.randrange(256) if value is None else value
    return data


def _integer(data: bytearray, other: bytes, random: Random) -> bytearray:
    code = random.choice("BHIQ")
    size = struct.calcsize(code)
    start = min(_place(data, random), max(0, len(data) - size))
    value = random.choice(INTEGERS) & (2 ** (8 * size) - 1)
    data[start : start + size] = struct.pack(random.choice("<>") + code, value)
    return data


def _truncate(data: bytearray, other: bytes, random: Random) -> bytearray:
    return data[: random.randrange(len(data))]


def _move(data: bytearray, other: bytes, random: Random) -> bytearray:
    """A span removed, repeated, swapped with another, or inserted at random."""
    unit = random.choice((1, 1, 4, 512))
    start, length = _place(data, random) // unit * unit, unit * random.choice((1, 2, 7, 64))
    place = _place(data, random) // unit * unit
    span = data[start : start + length]
    kind = random.randrange(4)
    if kind == 0:
        del data[start : start + length]
    elif kind == 1:
        data[place:place] = span
    elif kind == 2:
        data[start : start + length], data[place : place + length] = data[place : place + length], span
    else:
        data[place:place] = random.randbytes(length)
    return data


def _splice(data: bytearray, other: bytes, random: Random) -> bytearray:
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _place(data: bytearray, random: Random) -> int:
    """A place; half of them in the first or last 64 bytes, where headers and footers are."""
    size = len(data)
    near = min(64, size)
    return random.choice((random.randrange(near), size - 1 - random.randrange(near), *(random.randrange(size),) * 2))


def damage_value(value: Any, random: Random) -> Any:
    """A copy of a JSON value with one to three places changed: other values, keys removed, added or swapped."""
    root = [copy.deepcopy(value)]
    for _ in range(random.choice((1, 1, 2, 3))):
        places = list(_places(root))
        parent, key = random.choice(places)
        kind = random.randrange(6)
        if kind < 3:
            parent[key] = random.choice(VALUES)
        elif kind == 3 and parent is not root:
            del parent[key]
        elif kind == 4:
            parent[key] = random.choice(([parent[key]], {"a": parent[key]}, str(parent[key])))
        elif isinstance(parent, dict):
            parent[random.choice((key, "extra", "", "\ud800"))] = copy.deepcopy(parent[key])
        else:
            parent[key] = copy.deepcopy(value)
    return root[0]


def _places(parent: Any) -> Any:
    """(container, key) of all values in a tree."""
    for key in list(parent if isinstance(parent, dict) else range(len(parent))):
        yield parent, key
        if isinstance(parent[key], (dict, list)):
            yield from _places(parent[key])


def dump(value: Any, random: Random) -> bytes:
    """JSON of a damaged value, sometimes with a key twice, in UTF-8 with half surrogates, UTF-16 or with a BOM."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH)
    if random.random() < 0.1 and isinstance(value, dict) and value:
        key = random.choice(list(value))
        text = "{" + f"{json.dumps(key)}: {json.dumps(random.choice(VALUES[:24]))}, " + text[1:]
    encoding = random.choice(("utf-8",) * 12 + ("utf-8-sig", "utf-16", "latin-1"))
    return text.encode(encoding, "backslashreplace" if encoding == "latin-1" else "surrogatepass")


# ---------------------------------------------------------------------------------------------------------------
# Tars

Member = tuple[str, bytes]
_PLAIN = "{:03}"
_NAMES = (
    "v1.0_{}",
    "scan.{:03}",
    "a.b.c.{}",
    "deep/er/{}",
    "./{:03}",
    "x y {}",
    "ÄÖ{}",
    "{:03}.large",
    "IMG_{}.v2.final",
)
_JUNK = ("README", "._003.png", ".hidden.png", "a.mask.json", "__meta__", "x/", "003", "noext", "a.cls", "\n.txt")


class Tar(NamedTuple):
    data: bytes
    images: set[int]  # numbers of the images in it


def tar(samples: dict[int, list[Member]], random: Random) -> Tar:
    """A well-formed tar of samples {number: [(suffix, content)]}, arranged in some way that real ones are."""
    pattern = random.choice((_PLAIN, *_NAMES))
    members: list[Member] = []
    numbers = list(samples)
    if random.random() < 0.3:
        random.shuffle(numbers)
    for number in numbers:
        parts = list(samples[number])
        if random.random() < 0.2:
            random.shuffle(parts)
        if random.random() < 0.15:
            parts.pop(random.randrange(len(parts)))
        if random.random() < 0.1:
            parts = [(suffix.upper(), content) for suffix, content in parts]
        members += [(pattern.format(number) + suffix, content) for suffix, content in parts]
    if random.random() < 0.2:  # members of a sample that do not follow each other
        random.shuffle(members)
    elif random.random() < 0.2:  # the same samples once more
        members += members
    contents = {content for _, content in members}
    present = {number for number, parts in samples.items() if dict(parts)[".png"] in contents}
    if random.random() < 0.3:
        for _ in range(3):
            members.insert(random.randrange(len(members) + 1), (random.choice(_JUNK), b"{}"))
    return Tar(_write(members, random), present)


def _write(members: Sequence[Member], random: Random) -> bytes:
    out = io.BytesIO()
    format_ = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    encoding = random.choice(("utf-8", "utf-8", "latin-1"))
    cut = random.choice((None, None, None, len(members) // 2))  # two archives, one after the other
    for part in [members] if cut is None else [members[:cut], members[cut:]]:
        with tarfile.open(fileobj=out, mode="w", format=format_, encoding=encoding, errors="surrogateescape") as file:
            for name, content in part:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
                if random.random() < 0.03:
                    info = tarfile.TarInfo(random.choice(("link.png", "link.txt", "d", "fifo", name)))
                    info.type = random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE))
                    info.linkname = random.choice((name, "/etc/passwd", "nowhere"))
                    file.addfile(info)
    return out.getvalue()


def compress(data: bytes, suffix: str) -> bytes:
    """`data` as a file that ends in `suffix` holds it: "gz", "bz2", "xz", or "" for no compression."""
    return {"": lambda d: d, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[suffix](data)


def plain_tar(members: Sequence[Member]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# YAML and training states

_SNIPPETS = (
    "\t", "- ", ": ", "? [a, b] : c\n", "--- 1\n", "...\n", "&a [*a]", "*nowhere", "!!python/object/apply:os.getcwd []",
    "!!binary x", "!!set {a, b}", "2001-13-45", "2001-01-01", "1e400", ".nan", "-.inf", "0x" + "f" * 300, "1_0:59:59",
    "<<: 1\n", "<<: {stages: [pixel]}\n", "%YAML 9.9\n", "\x85", "\x00", "{", "[" * 600, "{a: " * 600, "'", '"\\ud800"',
    "| \n", "9" * 5000, "precision: 7\nprecision: fp32\n",
    "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ) + "seed: *i\n",
)  # fmt: skip


def insert_yaml(data: bytes, random: Random) -> bytes:
    """A preset with one thing that YAML has and settings do not, at a line's beginning, its value or its end."""
    lines = data.decode().splitlines(keepends=True)
    place, snippet = random.randrange(len(lines)), random.choice(_SNIPPETS)
    line = lines[place]
    name, colon, _ = line.partition(":")
    lines[place] = random.choice((snippet + line, f"{name}{colon} {snippet}\n", line.rstrip("\n") + snippet + "\n"))
    return "".join(lines).encode("utf-8", "surrogatepass")


def dump_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass")


def damage_state(state: Any, random: Random) -> Any:
    """A training state with one to three changes: as `damage_value`, or a tensor of another shape, dtype or content."""
    root = [state]
    for _ in range(random.choice((1, 1, 2, 3))):
        # Going down by chance reaches the few numbers near the top as often as the many tensors.
        parent, key = root, 0
        while isinstance(parent[key], (dict, list)) and parent[key] and random.random() < 0.8:
            parent = parent[key]
            key = random.choice(list(parent if isinstance(parent, dict) else range(len(parent))))
        value = parent[key]
        if isinstance(value, torch.Tensor) and random.random() < 0.7:
            changes = (lambda v: v[None], lambda v: v.double(), lambda v: v.to(torch.int8), lambda v: v * float("nan"))
            parent[key] = random.choice(changes)(value)
        elif random.random() < 0.3 and parent is not root:
            del parent[key]
        else:
            parent[key] = random.choice(VALUES)
    return root[0]
