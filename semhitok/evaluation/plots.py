"""Plots of what codes know, written as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok._optional import require
from semhitok.data.images import crop_around, untile
from semhitok.tokenizer import SemHiTok


def pyplot() -> Any:
    """matplotlib.pyplot, set up to write files only."""
    require("matplotlib", "eval").use("Agg")
    return require("matplotlib.pyplot", "eval")


def picture(image: Tensor) -> Any:
    """[3, H, W] -> the array [H, W, 3] that matplotlib shows."""
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def save(figure: Any, path: Path) -> None:
    """Write and close a figure. No date or version is stored, so that the same plot has the same bytes."""
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot().close(figure)


def code_colors(codebook: Tensor) -> Tensor:
    """A colour for every code of [K, D]: its place on the three principal axes, as RGB in [0, 1], [K, 3].

    Near codes get near colours.
    """
    centered = codebook - codebook.mean(0)
    colors = centered @ torch.linalg.svd(centered, full_matrices=False)[2][:3].T
    colors = (colors - colors.amin(0)) / (colors.amax(0) - colors.amin(0)).clamp_min(1e-9)
    return F.pad(colors, (0, 3 - colors.shape[1]))  # for fewer than three dimensions or codes


def semantic_map(tokenizer: SemHiTok, rows: Sequence[tuple[Tensor, Tensor, int]], path: Path) -> None:
    """Images beside their semantic ids, in the colours of `code_colors`.

    rows: for each image [3, H, W], the flat ids [T, h, w] of its tiles and the number of tiles in a row.
    """
    codebook, device = tokenizer.quantizer.semantic.codebook.cpu(), tokenizer.quantizer.pix_codebook.device
    colors = code_colors(codebook)
    heights = [5 * image.shape[1] / image.shape[2] for image, _, _ in rows]
    options = {"height_ratios": heights, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(len(rows), 2, figsize=(10, sum(heights) + 0.3), **options)
    for line, (image, codes, columns) in zip(axes, rows, strict=True):
        semantic = tokenizer.quantizer.split(codes.to(device))[0].cpu()
        title = f"semantic ids ({len(semantic.unique())} of {len(codebook)} occur)"
        drawn = untile(colors[semantic].permute(0, 3, 1, 2), columns)
        for axis, name, shown in ((line[0], "image", image), (line[1], title, drawn)):
            axis.imshow(picture(shown), interpolation="nearest")
            axis.set_title(name)
            axis.set_axis_off()
    save(figure, path)


def patches_of_codes(
    tokenizer: SemHiTok,
    images: Tensor,
    codes: Tensor,
    path: Path,
    *,
    fit: Tensor | None = None,
    margin: int = 8,
    names: Mapping[int, str] | None = None,
) -> None:
    """Patches that share a semantic id, in a row for each id; the colour of a frame stands for the sub-code.

    The images [N, 3, side, side], float in [0, 1] or uint8, have flat ids [N, h, w], which may leave out a border of up
    to `margin` pixels. With `fit` [N, h, w], how near each token is to its semantic code, the nearest patches are
    shown; without, random ones. A patch is shown with `margin` pixels around it. `names` are written beside the ids,
    and only ids that have one are shown.
    """
    rows, columns = 10, 24 * 8 // max(margin, 8)
    config = tokenizer.config
    p, device = config.patch_size, tokenizer.quantizer.pix_codebook.device
    semantic, sub = (ids.cpu() for ids in tokenizer.quantizer.split(codes.to(device)))
    counts = torch.bincount(semantic.flatten(), minlength=config.num_codes)
    order = counts.argsort(descending=True, stable=True)
    columns = min(columns, int(counts.max()))
    order = order[counts[order] >= columns]
    if names is not None:
        order = torch.tensor([n for n in order.tolist() if n in names])
    # Evenly spaced by frequency, so that rare ids are shown too.
    chosen = order[torch.linspace(0, len(order) - 1, min(rows, len(order))).long()]
    scale = 1.0 if images.is_floating_point() else 255.0
    border = (images.shape[3] - codes.shape[2] * p) // 2
    generator = torch.Generator().manual_seed(0)
    plt = pyplot()
    size = (12, 0.52 * len(chosen) + 0.4)
    figure, axes = plt.subplots(len(chosen), columns, figsize=size, squeeze=False, layout="constrained")
    palette = plt.get_cmap("tab20")
    for row, code in zip(axes, chosen.tolist(), strict=True):
        found = (semantic == code).nonzero()
        if fit is None:
            pick = torch.randperm(len(found), generator=generator)
        else:
            pick = fit[semantic == code].argsort(descending=True, stable=True)
        places = sorted(found[pick[:columns]].tolist(), key=lambda at: int(sub[tuple(at)]))
        for axis, (n, y, x) in zip(row, places, strict=True):
            image = images[n : n + 1] / scale
            axis.imshow(picture(crop_around(image, y, x, p, margin=margin, border=border)[0]))
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(color=palette(int(sub[n, y, x]) % 20), linewidth=2)
        label = f"{names[code]}  {code}" if names is not None else str(code)
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    which = "that share a semantic id" if fit is None else "nearest to a semantic code"
    figure.suptitle(f"patches (centres) {which}, a row a code; the frame's colour is the sub-code")
    save(figure, path)


def explained_variance(shares: dict[str, dict[str, float]], path: Path) -> None:
    """The shares of `analyze.explained_variance` as bars."""
    figure, axis = pyplot().subplots(figsize=(9, 3.5), layout="constrained")
    for n, kind in enumerate(("pixels", "colour", "texture")):
        values = [max(0.0, share[kind]) for share in shares.values()]
        bars = axis.bar([x + 0.27 * (n - 1) for x in range(len(shares))], values, 0.25, label=kind)
        axis.bar_label(bars, [f"{share[kind]:.2f}" for share in shares.values()], fontsize=7)
    axis.set(ylabel="share of variance explained", ylim=(0, 1.05))
    axis.set_xticks(range(len(shares)), [name.replace("_", "\n") for name in shares])
    figure.legend(loc="outside right upper", fontsize=8)
    save(figure, path)


def sub_code_usage(bins: Sequence[dict[str, float]], path: Path) -> None:
    """Use of sub-codebooks by the frequency of their semantic code: the bins of `analyze.usage_by_frequency`."""
    figure, axis = pyplot().subplots(figsize=(6, 3.5), layout="constrained")
    names = [f"{b['tokens_from']:.0f}-{b['tokens_to']:.0f}\n{b['codes']:.0f} codes" for b in bins]
    axis.bar(range(len(bins)), [b["usage"] for b in bins], 0.6, label="sub-codes that occur")
    axis.plot(range(len(bins)), [b["usage_if_even"] for b in bins], "k_", markersize=30, label="if drawn at random")
    axis.set(xlabel="tokens of a semantic code", ylabel="share of its sub-codebook", ylim=(0, 1.05))
    axis.set_xticks(range(len(bins)), names, fontsize=7)
    axis.legend(fontsize=8, markerscale=0.5, loc="upper left")
    save(figure, path)


def sub_codebook_distances(pairs: Tensor, figures: dict[str, float], path: Path) -> None:
    """Distance of sub-codebooks over the angle between their semantic codes: the pairs of `analyze.distances`."""
    figure, axis = pyplot().subplots(figsize=(6, 3.8), layout="constrained")
    angle, distance = pairs.unbind(1)
    axis.scatter(angle.numpy(), distance.numpy(), s=2, alpha=0.15, rasterized=True)
    axis.axhline(figures["within"], color="k", linewidth=1, label="nearest sub-code in the same sub-codebook")
    axis.set(xlabel="angle between semantic codes, degrees", ylabel="distance of their sub-codebooks")
    axis.set_title(f"Spearman's rank correlation {figures['rank_correlation']:.2f}")
    axis.legend(fontsize=8)
    save(figure, path)
