"""What an image's ids mean to a tokenizer, patch by patch; independent of the page that shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from semhitok.data.images import crop_around, resize_crop, to_uint8
from semhitok.evaluation.metrics import psnr
from semhitok.evaluation.plots import code_colors
from semhitok.tokenizer import SemHiTok

MAX_SUB_CODES = 64  # shown for a patch; adaptive sub-codebooks may have more
DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class View:
    """One image under one tokenizer, with the chosen patch and swapped sub-codes; tensors on the CPU."""

    image: Tensor  # fp32 [3, S, S] in [0, 1], as the tokenizer saw it
    z_sem: Tensor  # fp32 [h, w, Ds], before quantisation
    z_pix: Tensor  # fp32 [h, w, Dp], before quantisation
    encoded: Tensor  # int64 [h, w], flat ids as the tokenizer encoded them
    codes: Tensor  # int64 [h, w], flat ids with sub-codes swapped
    place: tuple[int, int] | None = None  # row and column of the chosen patch

    @property
    def num_swapped(self) -> int:
        """Number of patches whose sub-code differs from the encoded one."""
        return int((self.codes != self.encoded).sum())


class Patch(NamedTuple):
    """Ids of the chosen patch."""

    i: int  # its semantic code
    j: int  # its present sub-code
    encoded_j: int  # the sub-code that the tokenizer encoded
    flat: int  # the flat id of (i, j)
    size: int  # m_i, the number of sub-codes that i owns
    cosine: float  # of z_sem to code i


class SubCodes(NamedTuple):
    """Sub-codes for the chosen patch, in the order of j."""

    sub: Tensor  # int64 [n], j
    distances: Tensor  # fp32 [n], |z_pix - sub-code|^2


class Album(NamedTuple):
    """Images of a folder and their ids under one tokenizer; on the CPU."""

    names: list[str]  # file name of each image
    images: Tensor  # uint8 [N, 3, S, S]
    codes: Tensor  # int64 [N, h, w], flat ids


class Sharing(NamedTuple):
    """Patches of an album that share a semantic code."""

    crops: Tensor  # fp32 [n, 3, 3p, 3p] in [0, 1], n of the patches with their neighbours
    names: list[str]  # file names of their images
    sub: Tensor  # int64 [n], their sub-codes
    num_patches: int  # of all such patches in the album
    num_images: int  # with such patches


class Explorer:
    """A tokenizer with its teacher, and what the page shows of it.

    Args:
        tokenizer: in eval mode, on any device.
        name: shown as a heading, such as the checkpoint's folder.
    """

    def __init__(self, tokenizer: SemHiTok, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.album: Album | None = None
        self.vocabulary = tokenizer.vocabulary
        self.device = tokenizer.quantizer.pix_codebook.device
        self.colors = code_colors(tokenizer.quantizer.semantic.codebook.cpu())

    @torch.inference_mode()
    def collect(self, batches: Iterable[tuple[list[Path], Tensor]]) -> None:
        """Encode the images for `sharing`: batches of paths and fp32 [B, 3, S, S], as `ImageReader` yields them."""
        config = self.tokenizer.config
        names: list[str] = []
        images = [torch.empty(0, 3, config.image_size, config.image_size, dtype=torch.uint8)]
        codes = [torch.empty(0, config.grid_size, config.grid_size, dtype=torch.int64)]
        for paths, batch in batches:
            names += [path.name for path in paths]
            images.append(to_uint8(batch))
            codes.append(self.tokenizer.encode(batch.to(self.device)).cpu())
        self.album = Album(names, torch.cat(images), torch.cat(codes))

    @torch.inference_mode()
    def open(self, image: Tensor) -> View:
        """Encode the centre crop of an image [3, H, W] in [0, 1] of any size."""
        tokenizer = self.tokenizer
        image = resize_crop(image, tokenizer.config.image_size)
        batch = image[None].to(self.device)
        z_sem = tokenizer.semantic_head(tokenizer.semantic_features(batch))
        z_pix = tokenizer.encoder(batch)
        codes = tokenizer.quantizer(z_sem, z_pix).codes[0].cpu()
        return View(image, z_sem[0].float().cpu(), z_pix[0].float().cpu(), codes, codes)

    def choose(self, view: View, x: float, y: float) -> View:
        """Choose the patch at x, y in [0, 1], as shares of the image's width and height."""
        grid = self.tokenizer.config.grid_size
        row, column = (min(grid - 1, max(0, int(share * grid))) for share in (y, x))
        return replace(view, place=(row, column))

    def swap(self, view: View, j: int) -> View:
        """Swap in sub-code j of the chosen patch's semantic code.

        Raises:
            ValueError: there is no such sub-code, or no patch is chosen.
        """
        patch = self.patch(view)
        if not 0 <= j < patch.size:
            raise ValueError(f"j: expected a sub-code in [0, {patch.size}), got {j}")
        codes = view.codes.clone()
        codes[_place(view)] = self.vocabulary.flat(patch.i, j)
        return replace(view, codes=codes)

    def reset(self, view: View) -> View:
        """Take back all swaps."""
        return replace(view, codes=view.encoded)

    def patch(self, view: View) -> Patch:
        """Ids of the chosen patch.

        Raises:
            ValueError: no patch is chosen.
        """
        place, quantizer = _place(view), self.tokenizer.quantizer
        flat = int(view.codes[place])
        i, j = self.vocabulary.split(flat)
        _, encoded_j = self.vocabulary.split(int(view.encoded[place]))
        cosine = float(view.z_sem[place] @ quantizer.semantic.codebook[i].cpu())
        return Patch(i, j, encoded_j, flat, int(quantizer.sizes[i]), cosine)

    def semantic_map(self, view: View) -> Tensor:
        """Every patch in the colour of its semantic code: fp32 [3, S, S]."""
        colors = self.colors[self.vocabulary.split(view.codes)[0]].permute(2, 0, 1)
        p = self.tokenizer.config.patch_size
        return colors.repeat_interleave(p, 1).repeat_interleave(p, 2)

    def semantic_counts(self, view: View) -> list[tuple[int, int]]:
        """The semantic codes that occur and their numbers of patches, most frequent first."""
        codes, counts = self.vocabulary.split(view.codes)[0].unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        return list(zip(codes[order].tolist(), counts[order].tolist(), strict=True))

    @torch.inference_mode()
    def decode(self, view: View) -> tuple[Tensor, float]:
        """The decoded image, fp32 [3, S, S], and its PSNR in dB."""
        image = self.tokenizer.decode(view.codes[None].to(self.device)).float().cpu()
        return image[0], float(psnr(image, view.image[None]))

    def sub_codes(self, view: View) -> SubCodes:
        """The sub-codes of the chosen patch's semantic code, at most the MAX_SUB_CODES nearest to z_pix."""
        patch = self.patch(view)
        first = self.vocabulary.flat(patch.i, 0)
        codebook = self.tokenizer.quantizer.pix_codebook.flatten(0, -2)[first : first + patch.size].cpu()
        distances = (view.z_pix[_place(view)] - codebook).square().sum(-1)
        sub = distances.argsort(stable=True)[:MAX_SUB_CODES].sort().values
        return SubCodes(sub, distances[sub])

    @torch.inference_mode()
    def alternatives(self, view: View) -> Tensor:
        """The chosen patch and its neighbours, decoded with each of `sub_codes`: fp32 [n, 3, 3p, 3p]."""
        row, column = _place(view)
        sub = self.sub_codes(view).sub
        codes = view.codes.repeat(len(sub), 1, 1)
        codes[:, row, column] = self.vocabulary.flat(self.patch(view).i, 0) + sub
        p = self.tokenizer.config.patch_size
        parts = [self.tokenizer.decode(part.to(self.device)) for part in codes.split(DECODED_AT_ONCE)]
        return crop_around(torch.cat(parts).float().cpu(), row, column, p, margin=p)

    def sharing(self, view: View, limit: int) -> Sharing:
        """At most `limit` patches of the album with the chosen patch's semantic code.

        Patches with the same sub-code come first. The order is random otherwise, but always the same, so that the
        patches come from many images.

        Raises:
            ValueError: no patch is chosen, or nothing was collected.
        """
        if self.album is None:
            raise ValueError("album: expected images, by `collect`, got none")
        patch, p = self.patch(view), self.tokenizer.config.patch_size
        semantic, sub = self.vocabulary.split(self.album.codes)
        found = (semantic == patch.i).nonzero()
        images = found[:, 0].unique()
        found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
        other = sub[tuple(found.T)] != patch.j
        found = found[other.byte().argsort(stable=True)[:limit]]
        crops = [crop_around(self.album.images[n, None] / 255, y, x, p, margin=p) for n, y, x in found.tolist()]
        names = [self.album.names[n] for n in found[:, 0].tolist()]
        shown = torch.cat([torch.empty(0, 3, 3 * p, 3 * p), *crops])
        return Sharing(shown, names, sub[tuple(found.T)], len(other), len(images))


def _place(view: View) -> tuple[int, int]:
    if view.place is None:
        raise ValueError("view: expected one with a chosen patch, got one without")
    return view.place
