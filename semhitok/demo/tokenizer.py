"""The demo of the tokenizer: fine-tune the toy on photographs, encode and decode them; figures and a table."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok import ops
from semhitok._files import write_json
from semhitok._optional import require
from semhitok.config import TrainConfig, override, train_config
from semhitok.corpus.ids_file import save_codes
from semhitok.data.images import list_images, read_image, resize_crop, tiles, untile, whole_tiles
from semhitok.demo.photographs import write_photographs
from semhitok.evaluation import plots
from semhitok.evaluation.analyze import patch_centres
from semhitok.evaluation.metrics import psnr, ssim
from semhitok.models import lite0
from semhitok.tokenizer import SemHiTok
from semhitok.training import train
from semhitok.usage import CodeUsage

BATCH = 32
SIDE = 192  # of the shorter side of photographs in pixels: a crop of 64 shows a part of a thing, not of its surface
UNSEEN = ("chelsea", "coffee", "flower", "motorcycle")
CLASSIFIED = 224  # side in pixels at which photographs are classified
MARGIN = 14  # pixels shown around a patch
KMEANS_ITERATIONS = 1  # there are not many more patches than centres


def demo_config() -> TrainConfig:
    """The toy's pixel branch is trained further on the demo's photographs; its semantic branch stays as it is."""
    config = train_config("semhitok-toy")
    for setting in (
        "start_from=semhitok-toy", "stages=[pixel]", "data.fixed=false", "data.flip=true",
        "pixel.steps=300", "pixel.continuous_steps=0", "pixel.init_tokens_per_code=0", "pixel.optimizer.lr=3.0e-4",
        "pixel.ema_decay=0.99", "pixel.checkpoint_every=100", "evaluation.every=100",
    ):  # fmt: skip
        override(config, setting)
    return config


def demo(config: TrainConfig, out: Path) -> str:
    """Train on the demo's photographs, or resume, evaluate and draw. Returns the table of figures."""
    folders = write_photographs(out / "photographs", side=SIDE, held_out=1 / 3, unseen=UNSEEN)
    seconds = train(config, [folders["train"]], out, held_out=[folders["held_out"]])
    image_tokenizer = SemHiTok.from_pretrained(out / "checkpoint")
    size = config.model.image_size
    # part -> its photographs, cut at the right and bottom to whole crops of the tokenizer's size
    photographs = {}
    for part, folder in folders.items():
        photographs[part] = [whole_tiles(read_image(path), size) for path in list_images([folder])]
    began = time.perf_counter()
    codes = {part: [encode(image_tokenizer, x) for x in images] for part, images in photographs.items()}
    seconds_encoding = time.perf_counter() - began
    everything = torch.cat([c for part in codes.values() for c in part])
    metrics: dict[str, Any] = {}
    pictures: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for part in ("held_out", "unseen"):
        images = photographs[part]
        names = [f"{n:02}-{t:03}" for n, c in enumerate(codes[part]) for t in range(len(c))]
        save_codes(out / f"{part}_ids.safetensors", torch.cat(codes[part]), names, image_tokenizer.vocabulary)
        full = [decode(image_tokenizer, c, x) for c, x in zip(codes[part], images, strict=True)]
        semantic = [decode(image_tokenizer, c, x, semantic_only=True) for c, x in zip(codes[part], images, strict=True)]
        metrics[part] = fidelity(full, images)
        metrics[part]["semantic_only_psnr"] = fidelity(semantic, images)["psnr"]
        metrics[part]["codes"] = _usage(config, torch.cat(codes[part]))
        pictures[part] = list(zip(images, semantic, full, strict=True))
    metrics |= _usage(config, everything)
    metrics["tokens"] = everything.numel()
    metrics["references"] = _references(photographs, config)
    metrics["bits_per_pixel"] = config.model.bits_per_pixel
    metrics["tokens_per_second"] = everything.numel() / seconds_encoding
    metrics["seconds"] = seconds | {"total": sum(seconds.values())}
    whole = _whole(photographs)
    ids = [seamless(image_tokenizer, x) for x in whole]
    classes = code_classes(image_tokenizer, whole, ids)
    metrics["code_classes"] = {str(code): shares for code, shares in classes.items()}
    write_json(out / "metrics.json", metrics)

    _draw_reconstructions(pictures["unseen"] + pictures["held_out"][3::4], out)
    rows = [(x, i[None], 1) for x, i in zip(photographs["unseen"], ids, strict=False)]
    plots.semantic_map(image_tokenizer, rows, out / "semantic_map.png")
    labels = {code: next(iter(shares)) for code, shares in classes.items()}
    # Each tile with the pixels around it that its patches are shown with.
    padded = [F.pad(x[None], [MARGIN] * 4, mode="replicate")[0] for x in whole]
    crops = torch.cat([_windows(x, size + 2 * MARGIN, size) for x in padded])
    grid = torch.cat([tiles(i[None], config.model.grid_size)[:, 0] for i in ids])
    plots.patches_of_codes(image_tokenizer, crops, grid, out / "shared_codes.png", margin=MARGIN, names=labels)
    _draw_curves(config, out)
    return _table(metrics, config, out)


def encode(image_tokenizer: SemHiTok, photograph: Tensor) -> Tensor:
    """A photograph [3, H, W], whole tiles of the tokenizer's size -> the ids [T, h, w] of its tiles."""
    parts = tiles(photograph, image_tokenizer.config.image_size).split(BATCH)
    return torch.cat([image_tokenizer.encode(x) for x in parts])


def decode(image_tokenizer: SemHiTok, codes: Tensor, like: Tensor, *, semantic_only: bool = False) -> Tensor:
    """The ids [T, h, w] of tiles -> their picture [3, H, W], as wide as the photograph `like`."""
    parts = torch.cat([image_tokenizer.decode(c, semantic_only=semantic_only) for c in codes.split(BATCH)])
    return untile(parts, like.shape[2] // image_tokenizer.config.image_size)


def fidelity(pictures: list[Tensor], originals: list[Tensor]) -> dict[str, float]:
    """Mean PSNR and SSIM of photographs; each counts the same, whatever its size."""
    pairs = list(zip(pictures, originals, strict=True))
    return {f.__name__: sum(f(x[None], y[None]).item() for x, y in pairs) / len(pairs) for f in (psnr, ssim)}


def seamless(image_tokenizer: SemHiTok, photograph: Tensor) -> Tensor:
    """A photograph [3, H, W], whole tiles -> the ids [H / p, W / p], each from the tile in whose middle it lies.

    The tiles overlap by half, so that there are no seams.
    """
    size, grid = image_tokenizer.config.image_size, image_tokenizer.config.grid_size
    ids = torch.empty([length * grid // size for length in photograph.shape[1:]], dtype=torch.int64)
    parts, columns = _windows(photograph, size, size // 2), photograph.shape[2] * 2 // size - 1
    for n, codes in enumerate(torch.cat([image_tokenizer.encode(x) for x in parts.split(BATCH)])):
        row, column = divmod(n, columns)
        # The next tiles overwrite the lower and the right quarter.
        top, left = (0 if place == 0 else grid // 4 for place in (row, column))
        y, x = row * grid // 2, column * grid // 2
        ids[y + top : y + grid, x + left : x + grid] = codes[top:, left:]
    return ids


def _windows(photograph: Tensor, size: int, step: int) -> Tensor:
    """All windows [T, 3, size, size] of a photograph [3, H, W], one every `step` pixels, row by row."""
    return photograph.unfold(1, size, step).unfold(2, size, step).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _whole(photographs: dict[str, list[Tensor]]) -> list[Tensor]:
    """All photographs, the unseen ones first; the others put together from their parts."""
    pairs = zip(photographs["train"], photographs["held_out"], strict=True)
    return [*photographs["unseen"], *(torch.cat(pair, dim=2) for pair in pairs)]


def code_classes(
    image_tokenizer: SemHiTok, photographs: list[Tensor], ids: list[Tensor], count: int = 12
) -> dict[int, dict[str, float]]:
    """What the photographs show that the most frequent semantic codes come from.

    A photograph's class is the one of ImageNet-1k that EfficientNet-Lite0, the demo's teacher, finds most likely.

    Args:
        photographs: each [3, H, W] in [0, 1].
        ids: of each, [h, w].
        count: of semantic codes.

    Returns:
        For each of these codes, the most frequent first, up to three classes and the share of its patches in each;
        shares below a hundredth are left out.
    """
    timm = require("timm", "models")
    classifier = timm.create_model(lite0.NAME, pretrained=True).eval()
    info = require("timm.data", "models").ImageNetInfo()
    classes, semantic = [], []
    for photograph, codes in zip(photographs, ids, strict=True):
        with torch.inference_mode():
            found = int(classifier((resize_crop(photograph, CLASSIFIED)[None] - 0.5) / 0.5).argmax())
        semantic.append(image_tokenizer.quantizer.split(codes)[0].flatten())
        classes.append(torch.full_like(semantic[-1], found))
    code_of, class_of = torch.cat(semantic), torch.cat(classes)
    classes_of: dict[int, dict[str, float]] = {}
    for code in torch.bincount(code_of).argsort(descending=True, stable=True)[:count].tolist():
        shares = torch.bincount(class_of[code_of == code]).double()
        shares /= shares.sum()
        best = [n for n in shares.argsort(descending=True, stable=True)[:3].tolist() if shares[n] >= 0.01]
        classes_of[code] = {info.index_to_description(n).split(",")[0]: shares[n].item() for n in best}
    return classes_of


def _usage(config: TrainConfig, codes: Tensor) -> dict[str, dict[str, float]]:
    usage = CodeUsage(config.model.num_codes, config.model.num_sub_codes)
    usage.update(codes)
    return usage.summary()


def _references(photographs: dict[str, list[Tensor]], config: TrainConfig) -> dict[str, Any]:
    """The fidelity of trivial codings of the same patches of the same photographs.

    block_mean: every patch becomes its mean colour, in full precision. kmeans_patches: every patch becomes the nearest
    of K * m patches, a k-means codebook of raw pixels, with the same number of bits as the tokenizer. Its centres are
    fitted to patches at all places of the photographs to train on, as the tokenizer sees them in random crops.
    """
    p, total = config.model.patch_size, config.model.vocabulary_size

    def patches(image: Tensor) -> Tensor:
        return F.pixel_unshuffle(image, p).permute(1, 2, 0)

    train = torch.cat([F.unfold(x[None] * 255, p)[0].T.round().byte() for x in photographs["train"]])
    generator = torch.Generator().manual_seed(config.seed)
    codebook = patch_centres(train, total, KMEANS_ITERATIONS, generator) / 255

    def block_mean(image: Tensor) -> Tensor:
        return F.avg_pool2d(image, p).repeat_interleave(p, 1).repeat_interleave(p, 2)

    def kmeans_patches(image: Tensor) -> Tensor:
        _, ids = ops.nearest_code(patches(image), codebook, "l2")
        return F.pixel_shuffle(codebook[ids].permute(2, 0, 1), p)

    figures: dict[str, Any] = {}
    for reference in (block_mean, kmeans_patches):
        parts = {part: photographs[part] for part in ("held_out", "unseen")}
        figures[reference.__name__] = {p: fidelity([reference(x) for x in xs], xs) for p, xs in parts.items()}
    return figures


def _table(metrics: dict[str, Any], config: TrainConfig, out: Path) -> str:
    references = metrics["references"]
    lines = ["", f"{'':34}  PSNR dB   SSIM  semantic part only, dB"]
    for part, label in (("held_out", "held-out parts of photographs"), ("unseen", "unseen photographs")):
        row = metrics[part]
        lines.append(f"{label:34}  {row['psnr']:7.2f}  {row['ssim']:5.3f}  {row['semantic_only_psnr']:22.2f}")
        for name, title in (("block_mean", "block mean"), ("kmeans_patches", "k-means patch codebook")):
            other = references[name][part]
            lines.append(f"{'  trivial: ' + title:34}  {other['psnr']:7.2f}  {other['ssim']:5.3f}")
    m = config.model
    sizes = {"semantic": m.num_codes, "flat": m.vocabulary_size, "group": m.num_sub_codes}
    all_codes = f"codes of all {metrics['tokens']:,} patches"
    for title, codes in ((all_codes, metrics), ("codes of the held-out parts alone", metrics["held_out"]["codes"])):
        lines += ["", f"{title:34}  {'usage':>7}  perplexity  of"]
        for view, size in sizes.items():
            row = codes[view]
            lines.append(f"{'  ' + view:34}  {row['usage']:7.3f}  {row['perplexity']:10.1f}  {size}")
    lines += ["", f"{'frequent semantic codes':34}  ImageNet classes of the photographs they come from"]
    for code, shares in metrics["code_classes"].items():
        lines.append(f"  {code:32}  {', '.join(f'{name} {share:.0%}' for name, share in shares.items())}")
    lines += [
        "",
        f"{'bits per pixel':34}  {metrics['bits_per_pixel']:7.3f}",
        f"{'tokens per second, encoding':34}  {metrics['tokens_per_second']:7.0f}",
        *(f"{f'seconds, {stage} stage':34}  {metrics['seconds'][stage]:7.1f}" for stage in config.stages),
        "",
        f"pictures, ids, checkpoint and metrics.json: {out}/",
    ]
    return "\n".join(lines)


def _draw_reconstructions(rows: list[tuple[Tensor, Tensor, Tensor]], out: Path) -> None:
    """Original | semantic part only | full reconstruction, a row for each photograph; of a tall one the lower end."""
    plt = plots.pyplot()
    cut = [min(x.shape[1:]) for x, _, _ in rows]
    rows = [(x[:, -n:], y[:, -n:], z[:, -n:]) for n, (x, y, z) in zip(cut, rows, strict=True)]
    heights = [3 * row[0].shape[1] / row[0].shape[2] for row in rows]
    options = {"height_ratios": heights, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(len(rows), 3, figsize=(9, sum(heights) + 0.3), **options)
    for line, row in zip(axes, rows, strict=True):
        for axis, picture in zip(line, row, strict=True):
            axis.imshow(plots.picture(picture), interpolation="nearest")
            axis.set_axis_off()
    for axis, title in zip(axes[0], ("original", "semantic part only", "full reconstruction"), strict=True):
        axis.set_title(title)
    plots.save(figure, out / "reconstructions.png")


def _draw_curves(config: TrainConfig, out: Path) -> None:
    """Losses and usage of the codes in all stages."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(len(config.stages), 2, figsize=(10, 3 * len(config.stages)), squeeze=False)
    for row, stage in zip(axes, config.stages, strict=True):
        records = [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]
        for axis, keys in (
            (row[0], ("cosine", "l1", "l2", "codebook", "commitment")),
            (row[1], ("semantic_usage", "flat_usage", "group_usage")),
        ):
            for key in keys:
                points = [(r["step"], r[key]) for r in records if r.get(key)]  # no commitment before the codes
                if points and not (stage == "semantic" and key in ("flat_usage", "group_usage")):
                    axis.plot(*zip(*points, strict=True), label=key.replace("_", " "))
            axis.set(xlabel=f"step, {stage} stage")
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        row[0].set_yscale("log")
        row[1].set_ylim(0, 1.05)
    figure.tight_layout()
    plots.save(figure, out / "curves.png")
