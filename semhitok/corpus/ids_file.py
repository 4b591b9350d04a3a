"""Ids files: the flat ids of images in one `.safetensors` file, with what is needed to decode them.

Tensors: `codes` [N, h, w], int32 if it holds K * m ids and int64 otherwise; if sub-codebooks have sizes of their own,
also `offsets` int64 [K + 1], the first id of each semantic code, then K * m.
Metadata: `format`, `version`, `shape` (JSON), `num_codes` (K), `num_sub_codes` (m), `codebook_hash` (hex SHA-256) and
`names` (JSON list of N strings, the images' sources).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from semhitok._files import parse_json, write_atomic
from semhitok._messages import printable
from semhitok._optional import require
from semhitok.vocabulary import Vocabulary

_FORMAT = "semhitok-codes"
_VERSION = "1"


@dataclass(frozen=True)
class CodesFile:
    """The content of an ids file.

    Attributes:
        codes: int64 [N, h, w], flat ids in [0, num_codes * num_sub_codes), on the CPU.
        names: N strings, the images' sources, as found in the file: not safe as paths.
        num_codes: K, semantic codes.
        num_sub_codes: m, sub-codes of each; with offsets, their mean number.
        codebook_hash: hex SHA-256 of the codebooks the ids belong to.
        offsets: [K + 1], the first flat id of each semantic code, then K * m; None if all sub-codebooks have m codes.
    """

    codes: torch.Tensor
    names: list[str]
    num_codes: int
    num_sub_codes: int
    codebook_hash: str
    offsets: tuple[int, ...] | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the ids, without text ids."""
        return Vocabulary(self.num_codes, self.num_sub_codes, codebook_hash=self.codebook_hash, offsets=self.offsets)


def save_codes(path: str | os.PathLike[str], codes: torch.Tensor, names: Sequence[str], vocabulary: Vocabulary) -> None:
    """Write an ids file. It appears complete or not at all.

    Args:
        path: file to write, in an existing folder; an existing file is replaced.
        codes: integers [N, h, w] in [0, K * m), on any device.
        names: N strings, the sources of the images.
        vocabulary: K, m, offsets and the codebook hash.

    Raises:
        ValueError: wrong shape, ids out of range, a wrong number of names, or no codebook hash.
        OSError: the file cannot be written.
    """
    if codes.ndim != 3:
        raise ValueError(f"codes: expected [N, h, w], got {list(codes.shape)}")
    if len(names) != len(codes):
        raise ValueError(f"names: expected {len(codes)}, one per image, got {len(names)}")
    if vocabulary.codebook_hash is None:
        raise ValueError("vocabulary: expected a codebook_hash, got None")
    fits = vocabulary.num_flat_codes <= torch.iinfo(torch.int32).max + 1
    stored = vocabulary.check(codes).detach().to("cpu", torch.int32 if fits else torch.int64)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "shape": json.dumps(list(codes.shape)),
        "num_codes": str(vocabulary.num_codes),
        "num_sub_codes": str(vocabulary.num_sub_codes),
        "codebook_hash": vocabulary.codebook_hash,
        "names": json.dumps(list(names)),  # ASCII: keeps names that are not UTF-8
    }
    tensors = {"codes": stored.contiguous()}
    if vocabulary.offsets is not None:
        tensors["offsets"] = torch.tensor(vocabulary.offsets)
    write_atomic(path, _ordered(require("safetensors.torch").save(tensors, metadata)))


def load_codes(path: str | os.PathLike[str]) -> CodesFile:
    """Read an ids file and check all of it.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: not an ids file, of a later version, truncated, damaged, or with ids out of range; one line that
            names the file and the reason.
    """
    safetensors = require("safetensors")
    with open(path, "rb"):  # raises the usual OSError for a missing or unreadable file or a folder
        pass
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            return _parse(file.metadata() or {}, file)
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not an ids file, or damaged: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _ordered(file: bytes) -> bytes:
    """The file with its header sorted, as safetensors shuffles the metadata: the same ids give the same bytes."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps(parse_json(file[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # keeps the data aligned
    return len(header).to_bytes(8, "little") + header + file[end:]


def _parse(metadata: dict[str, str], file) -> CodesFile:
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"not an ids file: no metadata format={_FORMAT}")
    if metadata.get("version") != _VERSION:
        got = _field(metadata, "version")
        raise ValueError(f"version: expected {_VERSION}, got {printable(got)}; update semhitok")
    if sorted(file.keys()) not in (["codes"], ["codes", "offsets"]):
        raise ValueError(f"expected one tensor named codes, and optionally offsets, got {list(file.keys())}")
    codes = file.get_tensor("codes")
    if codes.dtype not in (torch.int32, torch.int64) or codes.ndim != 3:
        raise ValueError(f"codes: expected int32 or int64 [N, h, w], got {codes.dtype} {list(codes.shape)}")
    shape = _json(metadata, "shape")
    if shape != list(codes.shape):
        raise ValueError(f"codes: expected shape {shape} as in the metadata, got {codes.shape}")
    names = _json(metadata, "names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names: expected a list of strings")
    if len(names) != len(codes):
        raise ValueError(f"names: expected {len(codes)}, one per image, got {len(names)}")
    digest = _field(metadata, "codebook_hash")
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"codebook_hash: expected 64 hexadecimal digits, got {digest!r}")
    offsets = None
    if "offsets" in file.keys():  # noqa: SIM118  (not a mapping)
        bounds = file.get_tensor("offsets")
        if bounds.dtype != torch.int64 or bounds.ndim != 1:
            raise ValueError(f"offsets: expected int64 [K + 1], got {bounds.dtype} {list(bounds.shape)}")
        offsets = tuple(bounds.tolist())
    sizes = _count(metadata, "num_codes"), _count(metadata, "num_sub_codes")
    vocabulary = Vocabulary(*sizes, codebook_hash=digest, offsets=offsets)
    return CodesFile(vocabulary.check(codes), names, *sizes, digest, offsets)


def _field(metadata: dict[str, str], key: str) -> str:
    if key not in metadata:
        raise ValueError(f"no {key} in the metadata")
    return metadata[key]


def _count(metadata: dict[str, str], key: str) -> int:
    text = _field(metadata, key)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"{key}: expected a number, got {text!r}")
    return int(text)


def _json(metadata: dict[str, str], key: str):
    try:
        return parse_json(_field(metadata, key))
    except ValueError:
        raise ValueError(f"{key}: expected JSON") from None
