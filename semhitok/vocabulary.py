"""The ids of image tokens, and the special ids around them, among the ids of a language model.

A patch has a semantic code i in [0, K) and a sub-code j in [0, m) of the sub-codebook that i owns.
One flat id stands for both, and the flat ids follow the text ids of a language model:

    flat id   h = i * m + j, or offsets[i] + j where sub-codebooks have sizes m_i of their own (see `grouping`)
    ids       | text: text_size | image: K * m | begin, end of image | one per resolution |

Layout: SemHiTok (arXiv 2503.06764), one flat id per patch in one vocabulary with the text.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import operator
import sys
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from semhitok._messages import printable
from semhitok.grouping import Grouping, check_offsets

Ids = TypeVar("Ids", int, torch.Tensor)

_MAX_SIZE = 2**63 - 1  # ids are int64


@dataclass(frozen=True)
class Vocabulary:
    """Ids of a hierarchical codebook, alone or after the text ids of a language model.

    Methods take ids as an `int` or as an integer tensor of any shape on any device, and return an `int`, or an int64
    tensor of that shape on that device.

    Args:
        num_codes: K, semantic codes, at least 1.
        num_sub_codes: m, sub-codes of each semantic code, at least 1; with offsets, the mean.
        text_size: number of ids before the first image id: the rows of the language model's embedding, of which there
            may be more than its text tokenizer has tokens.
        codebook_hash: hex SHA-256 of the codebooks the ids belong to, see `codebook_hash`.
        resolutions: image sizes in pixels that get a special id each, none by default.
        offsets: K + 1 ints, where sub-codebooks differ in size: the first flat id of every semantic code, and K * m.

    Raises:
        ValueError: an argument out of range.
    """

    num_codes: int
    num_sub_codes: int
    text_size: int = 0
    codebook_hash: str | None = None
    resolutions: tuple[int, ...] = ()
    offsets: tuple[int, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _checked("num_codes", self.num_codes, 1, _MAX_SIZE)
        _checked("num_sub_codes", self.num_sub_codes, 1, _MAX_SIZE)
        _checked("text_size", self.text_size, 0, _MAX_SIZE)
        object.__setattr__(self, "resolutions", tuple(self.resolutions))
        if len(set(self.resolutions)) != len(self.resolutions):
            raise ValueError(f"resolutions: expected each size once, got {self.resolutions}")
        if self.size > _MAX_SIZE:
            raise ValueError(f"num_codes * num_sub_codes: expected int64 ids, got {self.size} ids")
        if self.offsets is not None:
            object.__setattr__(self, "offsets", tuple(map(operator.index, self.offsets)))
            check_offsets(self.offsets, self.num_codes, self.num_flat_codes)

    @property
    def num_flat_codes(self) -> int:
        """K * m, the number of flat ids."""
        return self.num_codes * self.num_sub_codes

    @functools.cached_property
    def grouping(self) -> Grouping:
        """Which flat ids belong to which semantic code, without checks."""
        offsets = None if self.offsets is None else torch.tensor(self.offsets)
        return Grouping(self.num_codes, self.num_flat_codes, offsets)

    @property
    def begin_of_image(self) -> int:
        """The special id before an image's ids."""
        return self.text_size + self.num_flat_codes

    @property
    def end_of_image(self) -> int:
        """The special id after an image's ids."""
        return self.begin_of_image + 1

    @property
    def num_special(self) -> int:
        """The number of special ids: begin and end of image, and the resolutions."""
        return 2 + len(self.resolutions)

    @property
    def size(self) -> int:
        """The number of all ids, text, image and special: the rows that a model's embedding needs."""
        return self.begin_of_image + self.num_special

    def resolution(self, pixels: int) -> int:
        """The special id of images of `pixels` x `pixels`; ValueError if it is not one of `resolutions`."""
        if pixels not in self.resolutions:
            raise ValueError(f"pixels: expected one of {self.resolutions}, got {pixels}")
        return self.end_of_image + 1 + self.resolutions.index(pixels)

    def flat(self, semantic: Ids, sub: Ids) -> Ids:
        """Flat ids i * m + j, or offsets[i] + j, of semantic codes i in [0, K) and sub-codes j in [0, m) or [0, m_i).

        Raises:
            ValueError: not integers, or out of range.
        """
        i = torch.as_tensor(_checked("semantic", semantic, 0, self.num_codes))
        limit = self.num_sub_codes if self.offsets is None else self.num_flat_codes
        codes = self.grouping.join(i, torch.as_tensor(_checked("sub", sub, 0, limit)))
        if bool((self.grouping.group_of(codes) != i).any()):
            raise ValueError("sub: expected ids below the size of their semantic code's sub-codebook, got more")
        return codes if isinstance(semantic, torch.Tensor) or isinstance(sub, torch.Tensor) else int(codes)

    def split(self, codes: Ids) -> tuple[Ids, Ids]:
        """Semantic codes and sub-codes (i, j) of flat ids h: (h // m, h % m), or by the offsets; errors as `check`."""
        semantic, sub = self.grouping.split(torch.as_tensor(self.check(codes)))
        return (semantic, sub) if isinstance(codes, torch.Tensor) else (int(semantic), int(sub))

    def to_text(self, codes: Ids) -> Ids:
        """Flat ids -> ids of the language model: adds `text_size`; errors as `check`."""
        return self.check(codes) + self.text_size

    def from_text(self, ids: Ids) -> Ids:
        """Ids of the language model -> flat ids: subtracts `text_size`.

        Raises:
            ValueError: not integers, or not image ids: text and special ids are refused.
        """
        return _checked("ids", ids, self.text_size, self.begin_of_image) - self.text_size

    def image(self, codes: torch.Tensor, codebook_hash: str | None, pixels: int | None = None) -> torch.Tensor:
        """Images as a language model's input: begin of image, (resolution,) image ids row by row, end of image.

        Args:
            codes: integers [..., h, w], flat ids.
            codebook_hash: that of the image tokenizer that encoded them.
            pixels: the images' size, to insert the id of that resolution.

        Returns:
            int64 [..., 2 + h * w], one more with a resolution.

        Raises:
            ValueError: ids of another codebook or out of range, or `pixels` not one of `resolutions`.
        """
        self.check_hash(codebook_hash)
        if codes.ndim < 2:
            raise ValueError(f"codes: expected shape [..., h, w], got {list(codes.shape)}")
        ids = self.to_text(codes).flatten(-2)
        first = [self.begin_of_image] + ([] if pixels is None else [self.resolution(pixels)])
        ends = [ids.new_tensor(end).expand(*ids.shape[:-1], -1) for end in (first, [self.end_of_image])]
        return torch.cat([ends[0], ids, ends[1]], dim=-1)

    def images(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """The flat ids [n] of every complete image in a language model's output, ids [T].

        Raises:
            ValueError: not one row of integers in this vocabulary, or ids within an image that are not image ids.
        """
        if ids.ndim != 1:
            raise ValueError(f"ids: expected shape [T], got {list(ids.shape)}")
        ids = _checked("ids", ids, 0, self.size)
        found = []
        begins = (ids == self.begin_of_image).nonzero().flatten().tolist()
        for begin, limit in itertools.pairwise([*begins, len(ids)]):
            ends = (ids[begin:limit] == self.end_of_image).nonzero().flatten().tolist()
            if ends:
                inside = ids[begin + 1 : begin + ends[0]]
                found.append(self.from_text(inside[1:] if len(inside) and inside[0] > self.end_of_image else inside))
        return found

    def check(self, codes: Ids) -> Ids:
        """`codes` as int64, once checked to be flat ids of this vocabulary.

        Raises:
            ValueError: not integers, or out of [0, K * m).
        """
        return _checked("codes", codes, 0, self.num_flat_codes)

    def check_hash(self, other: str | None) -> None:
        """Raise ValueError unless `other` is the codebook hash of this vocabulary, and neither is unknown."""
        if self.codebook_hash is None or self.codebook_hash != other:
            both = (self.codebook_hash, other)
            expected, got = ("unknown" if digest is None else printable(str(digest))[:12] for digest in both)
            raise ValueError(f"codebook_hash: expected ids of codebook {expected}, got ids of codebook {got}")


def codebook_hash(sem_codebook: torch.Tensor, pix_codebook: torch.Tensor, offsets: torch.Tensor | None = None) -> str:
    """SHA-256 of a pair of codebooks, in 64 hexadecimal digits: of their shapes, fp32 values and offsets.

    The same on every device and machine. Codebooks in fp16 and bf16 are hashed as fp32.

    Args:
        sem_codebook: [K, Ds], floating point.
        pix_codebook: [K, m, Dp], floating point; with offsets [T, Dp].
        offsets: [K + 1] int64, the first rows of sub-codebooks of different sizes, and T.

    Raises:
        ValueError: other shapes.
    """
    if sem_codebook.ndim != 2:
        raise ValueError(f"sem_codebook: expected [K, Ds], got {list(sem_codebook.shape)}")
    digest = hashlib.sha256(b"semhitok codebooks 1")
    if offsets is None:
        if pix_codebook.ndim != 3 or pix_codebook.shape[0] != sem_codebook.shape[0]:
            raise ValueError(f"pix_codebook: expected [{sem_codebook.shape[0]}, m, Dp], got {list(pix_codebook.shape)}")
    else:
        if pix_codebook.ndim != 2:
            raise ValueError(f"pix_codebook: expected [T, Dp] (with offsets), got {list(pix_codebook.shape)}")
        digest.update(f"offsets {offsets.tolist()}".encode())
    for codebook in (sem_codebook, pix_codebook):
        digest.update(str(list(codebook.shape)).encode())
        values = codebook.detach().to("cpu", torch.float32).contiguous()
        if sys.byteorder == "big":
            values = values.view(torch.uint8).unflatten(-1, (-1, 4)).flip(-1).contiguous()
        # Without NumPy, which torch does not require.
        if values.numel():
            digest.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
    return digest.hexdigest()


def _checked(name: str, ids: Ids, start: int, stop: int) -> Ids:
    """`ids` as int64 or int if all lie in [start, stop), else ValueError with the worst of them."""
    if isinstance(ids, torch.Tensor):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{name}: expected integers, got {ids.dtype}")
        ids = ids.long()
        if ids.numel() == 0:
            return ids
        low, high = (int(bound) for bound in torch.aminmax(ids))
    else:
        try:
            low = high = ids = operator.index(ids)
        except TypeError:
            raise ValueError(f"{name}: expected an int or integer tensor, got {type(ids).__name__}") from None
    if low < start or high >= stop:
        raise ValueError(f"{name}: expected ids in [{start}, {stop}), got {low if low < start else high}")
    return ids
