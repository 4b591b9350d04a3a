"""What a tokenizer's codes know: the central observation of SemHiTok (section 3.2) in numbers.

Patches that share a semantic code look alike. So the code explains part of the pixels' variance, and a small codebook
for each code suffices for the rest. Measured here: how much of the variance is explained, how well sub-codebooks are
used under rare and frequent codes, whether a sub-codebook fits the tokens of its own code better than those of other
codes, and whether similar codes own similar sub-codebooks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok import ops
from semhitok._optional import require
from semhitok.data.images import to_uint8
from semhitok.quantizer import HierarchicalQuantizer
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage
from semhitok.vocabulary import Vocabulary

_CHUNK = 65536  # tokens at once
_KMEANS_ITERATIONS = 10
_PAIRS = 20000  # random pairs of sub-codebooks whose distance is measured
_FLAT_TOKENS = 16384  # tokens compared with all K * m sub-codes


class Tokens(NamedTuple):
    """A set of images as N tokens, in the order of images and rows; on the CPU."""

    patches: Tensor  # uint8 [N, 3 * p * p], pixels of the images
    decoded: Tensor  # uint8 [N, 3 * p * p], pixels of the reconstructions
    decoded_semantic: Tensor  # uint8 [N, 3 * p * p], pixels of the reconstructions from the semantic codes alone
    z_sem: Tensor  # fp32 [N, Ds], before quantisation
    z_pix: Tensor  # fp32 [N, Dp], before quantisation
    codes: Tensor  # int64 [N], flat ids
    source: Tensor  # int64 [N], the number of the image that a token is from


@torch.no_grad()
def collect(tokenizer: SemHiTok, batches: Iterable[tuple[Tensor, Tensor]]) -> Tokens:
    """Tokens of batches of images [B, 3, H, W] in [0, 1] and their sources [B]: the number of the image each is from.

    Takes about 3 KB for a token at patch size 16.

    Raises:
        ValueError: no batches, or images of another shape or dtype than the tokenizer's.
    """
    device = tokenizer.quantizer.pix_codebook.device
    p = tokenizer.config.patch_size

    def patches(images: Tensor) -> Tensor:
        return F.pixel_unshuffle(to_uint8(images), p).permute(0, 2, 3, 1).flatten(0, 2).cpu()

    columns: list[tuple[Tensor, ...]] = []
    for images, source in batches:
        images = images.to(device)
        tokenizer.check_images(images)
        z_sem = tokenizer.semantic_head(tokenizer.semantic_features(images))
        z_pix = tokenizer.encoder(images)
        codes = tokenizer.quantizer(z_sem, z_pix).codes
        decoded, semantic = tokenizer.decode(codes), tokenizer.decode(codes, semantic_only=True)
        tokens = (z_sem.float().flatten(0, 2), z_pix.float().flatten(0, 2), codes.flatten())
        sources = source.repeat_interleave(codes[0].numel())
        pixels = (patches(x) for x in (images, decoded, semantic))
        columns.append((*pixels, *(x.cpu() for x in tokens), sources.cpu()))
    if not columns:
        raise ValueError("batches: expected at least one, got none")
    return Tokens(*(torch.cat(column) for column in zip(*columns, strict=True)))


def analyze(tokenizer: SemHiTok, tokens: Tokens, seed: int = 0) -> dict[str, Any]:
    """All figures of the functions below, ready for JSON, but for "pairs", the tensor of `distances`."""
    quantizer, vocabulary = copy.deepcopy(tokenizer.quantizer).cpu(), tokenizer.vocabulary
    generator = torch.Generator().manual_seed(seed)
    apart, pairs = distances(quantizer, tokens.codes, generator)
    return {
        "images": int(tokens.source.unique().numel()),
        "tokens": len(tokens.codes),
        "explained_variance": explained_variance(tokens, vocabulary, generator),
        "sub_codes_by_frequency": usage_by_frequency(tokens.codes, vocabulary),
        "ownership": ownership(quantizer, tokens.z_pix, tokens.codes, generator),
        "distances": apart,
        "pairs": pairs,
    }


def explained_variance(
    tokens: Tokens, vocabulary: Vocabulary, generator: torch.Generator
) -> dict[str, dict[str, float]]:
    """Share of the patches' variance that ids, k-means and the decoder explain, at most 1.

    The share is 1 - squared error / squared error of the mean of all patches. An id predicts the mean of its patches
    (plus one: the mean of all patches for a semantic id, of the semantic id's for a flat id). K-means predicts the
    nearest centre. Means and centres are always those of the other half of the images, so chance explains nothing. The
    decoder also sees the neighbours.

    Returns:
        For semantic_id, random_id (the same ids, shuffled), kmeans_pixels (as many centres as semantic codes occur),
        flat_id, decoded_semantic and decoded: the share of the whole variance, `pixels`, of the variance of the
        patches' mean colours, `colour`, and of the rest, `texture`.
    """
    half = tokens.source % 2
    if bool((half == half[0]).all()):  # a single image
        half = (torch.arange(len(half)) * 2 // len(half)).to(half)
    semantic, _ = vocabulary.split(tokens.codes)
    shuffled = semantic[torch.randperm(len(semantic), generator=generator)]
    errors: dict[str, Tensor] = {}
    zero = torch.zeros(3, dtype=torch.float64)
    for fold in (0, 1):
        fit, test = (half != fold).nonzero().squeeze(1), (half == fold).nonzero().squeeze(1)
        x = tokens.patches[fit]
        mean = _sums(x, torch.zeros_like(fit), 1)[0] / len(fit)
        parents, parent = _by_id(x, semantic[fit], vocabulary.split(tokens.codes[test].unique())[0], mean)
        centres = patch_centres(x, int(semantic[fit].unique().numel()), _KMEANS_ITERATIONS, generator)
        guesses = {  # a table of patches, and a row of it for each patch of `test`
            "total": (mean, torch.zeros_like(test)),
            "semantic_id": _by_id(x, semantic[fit], semantic[test], mean),
            "random_id": _by_id(x, shuffled[fit], shuffled[test], mean),
            "kmeans_pixels": (centres, _nearest(tokens.patches[test], centres)),
            "flat_id": _by_id(x, tokens.codes[fit], tokens.codes[test], parents[parent]),
            "decoded_semantic": (tokens.decoded_semantic, test),
            "decoded": (tokens.decoded, test),
        }
        for name, guess in guesses.items():
            errors[name] = errors.get(name, zero) + _squared_errors(tokens.patches, test, *guess)
    total = errors.pop("total").clamp_min(1e-9)
    shares = {name: (1 - error / total).tolist() for name, error in errors.items()}
    return {name: dict(zip(("pixels", "colour", "texture"), share, strict=True)) for name, share in shares.items()}


def _squared_errors(patches: Tensor, rows: Tensor, table: Tensor, guess: Tensor) -> Tensor:
    """Summed squared errors of table[guess] for patches[rows]: of pixels, of mean colours, of the rest; float64 [3]."""
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        error = (patches[rows[part]].float() - table[guess[part]].float()).unflatten(1, (3, -1)).double()
        colour = error.mean(2).square().sum() * error.shape[2]
        sums += torch.stack([error.square().sum(), colour])
    return torch.stack([sums[0], sums[1], sums[0] - sums[1]])


def _sums(patches: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sums [count, P] and numbers [count] of the patches with each id in [0, count)."""
    sums, counts = torch.zeros(count, patches.shape[1]), torch.zeros(count, dtype=torch.int64)
    for x, part in zip(patches.split(_CHUNK), ids.split(_CHUNK), strict=True):
        part_sums, part_counts = ops.segment_sum(x.float(), part, count)
        sums += part_sums
        counts += part_counts
    return sums, counts


def _by_id(patches: Tensor, ids: Tensor, wanted: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Mean patches of the wanted ids, as a table and each wanted id's row in it.

    prior: added to each mean as one more patch; one row, or a row for each distinct wanted id in ascending order.
    """
    present, row = wanted.unique(return_inverse=True)
    place = torch.searchsorted(present, ids).clamp_max(len(present) - 1)
    seen = present[place] == ids
    sums, counts = _sums(patches[seen], place[seen], len(present))
    return (sums + prior) / (counts + 1).unsqueeze(1), row


def _nearest(patches: Tensor, centres: Tensor) -> Tensor:
    return torch.cat([ops.nearest_code(x.float() / 255, centres / 255, "l2")[1] for x in patches.split(_CHUNK)])


def patch_centres(patches: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """k-means of uint8 patches [N, P], which starts from k of them: fp32 [k, P]. A centre without patches stays."""
    centres = patches[torch.randperm(len(patches), generator=generator)[:k]].float()
    for _ in range(iterations):
        ids = _nearest(patches, centres)
        sums, counts = _sums(patches, ids, k)
        centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp_min(1).unsqueeze(1), centres)
    return centres


def usage_by_frequency(codes: Tensor, vocabulary: Vocabulary) -> list[dict[str, float]]:
    """Use of the sub-codebooks under rare and frequent semantic codes.

    Codes that occur are binned by their number of tokens, with a bin for every power of four.

    Returns:
        For each bin: tokens_from and tokens_to, the tokens of a code (both included); codes, how many; share_of_tokens;
        usage, the mean share of a code's sub-codes that occur; usage_if_even, its expectation for sub-codes drawn
        uniformly; and perplexity, the mean of the sub-codes' under a code, from 1 to their number.
    """
    usage = CodeUsage(vocabulary.num_codes, vocabulary.num_sub_codes, offsets=vocabulary.offsets)
    usage.update(codes)
    tokens, occurring, sizes, perplexity = usage.groups()
    used, even = occurring / sizes, 1 - (1 - 1 / sizes) ** tokens
    bins: list[dict[str, float]] = []
    low = 1
    while low <= int(tokens.max()):
        inside = (tokens >= low) & (tokens < 4 * low)
        if bool(inside.any()):
            figures = {"tokens_from": low, "tokens_to": 4 * low - 1, "codes": int(inside.sum())}
            means = {"usage": used, "usage_if_even": even, "perplexity": perplexity}
            share = {"share_of_tokens": (tokens[inside].sum() / tokens.sum()).item()}
            bins.append(figures | share | {name: x[inside].mean().item() for name, x in means.items()})
        low *= 4
    return bins


def ownership(
    quantizer: HierarchicalQuantizer, z_pix: Tensor, codes: Tensor, generator: torch.Generator
) -> dict[str, float]:
    """Whether a sub-codebook fits the tokens of the semantic code that owns it.

    Squared quantisation error of z_pix [N, Dp], as a share of its variance, with three sets of sub-codes: those of the
    token's own code, those of another code (drawn by its frequency), and, for a sample of tokens, all K * m.

    Returns:
        own, other, all: the three errors. gain: decibels by which own is below other; about 0 if sub-codebooks are
        unrelated to their semantic codes.
    """
    book, flat = quantizer.pix_codebook, quantizer.pix_codebook.flatten(0, -2)
    semantic, _ = quantizer.split(codes)
    variance = (z_pix - z_pix.mean(0)).square().sum(1).mean()
    other = semantic[torch.randperm(len(semantic), generator=generator)]
    differ = other != semantic

    def error(z: Tensor, ids: Tensor) -> float:
        total = 0.0
        for rows, group in zip(z.split(_CHUNK), ids.split(_CHUNK), strict=True):
            _, sub = ops.nearest_subcode(rows, book, group, "l2", quantizer.offsets)
            total += (rows - flat[quantizer.join(group, sub)]).square().sum(1).double().sum().item()
        return total / max(len(z), 1) / variance.item()

    sample = z_pix[torch.randperm(len(z_pix), generator=generator)[:_FLAT_TOKENS]]
    _, nearest = ops.nearest_code(sample, flat, "l2")
    figures = {"own": error(z_pix, semantic), "other": error(z_pix[differ], other[differ])}
    figures["all"] = (sample - flat[nearest]).square().sum(1).mean().item() / variance.item()
    own_where_other = error(z_pix[differ], semantic[differ])
    ratio = torch.tensor(figures["other"] / max(own_where_other, 1e-12), dtype=torch.float64)
    return figures | {"gain": 10 * ratio.log10().item() if bool(differ.any()) else 0.0}


def distances(
    quantizer: HierarchicalQuantizer, codes: Tensor, generator: torch.Generator
) -> tuple[dict[str, float], Tensor]:
    """Distances between sub-codebooks, and whether similar semantic codes own similar sub-codebooks.

    The distance of two sub-codebooks is the mean distance from a sub-code of either to the nearest one of the other. It
    is measured for random pairs of the semantic codes that occur in `codes`.

    Returns:
        Figures and the pairs, [n, 2]: angle between the semantic codes in degrees, distance of their sub-codebooks.
        within: mean distance from a sub-code to the nearest other one of its sub-codebook. between: mean distance of
        two sub-codebooks. rank_correlation: Spearman's, of angle and distance; 0 if fewer than three codes occur.
    """
    books = quantizer.pix_codebook.flatten(0, -2).split(quantizer.sizes.tolist())
    present = quantizer.split(codes)[0].unique()
    figures = {"within": 0.0, "between": 0.0, "rank_correlation": 0.0}
    own = [books[i] for i in present.tolist()]
    inner = [_apart(book, book).fill_diagonal_(torch.inf).amin(1) for book in own if len(book) > 1]
    if inner:
        figures["within"] = torch.cat(inner).mean().item()
    if len(present) < 3:
        return figures, torch.zeros(0, 2)
    if len(present) <= 200:
        pairs = torch.combinations(torch.arange(len(present)))
    else:
        first = torch.randint(len(present), (_PAIRS,), generator=generator)
        step = torch.randint(1, len(present), (_PAIRS,), generator=generator)
        pairs = torch.stack([first, (first + step) % len(present)], dim=1)
    apart = (_apart(own[a], own[b]) for a, b in pairs.tolist())
    distance = torch.stack([(between.amin(0).mean() + between.amin(1).mean()) / 2 for between in apart])
    semantic = quantizer.semantic.codebook[present]
    cosine = (semantic[pairs[:, 0]] * semantic[pairs[:, 1]]).sum(1).clamp(-1, 1)
    angle = torch.rad2deg(torch.acos(cosine))
    correlation = require("scipy.stats", "eval").spearmanr(angle.numpy(), distance.numpy()).statistic
    figures["between"] = distance.mean().item()
    figures["rank_correlation"] = 0.0 if correlation != correlation else float(correlation)
    return figures, torch.stack([angle, distance], dim=1)


def _apart(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
