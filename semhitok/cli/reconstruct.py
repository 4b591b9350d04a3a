"""Encode images and decode them again: a PNG each, and how near they come to the originals.

PSNR (dB) and SSIM compare with the original resized and cropped to the tokenizer's size. Unreadable
images are named on stderr and skipped (exit code 3).

example:
  semhitok reconstruct demo_output/checkpoint photos/ --out reconstructed
"""

from __future__ import annotations

import argparse

from semhitok._messages import printable
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    arguments.add_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the PNGs")


def run(args: argparse.Namespace) -> int:
    import torch

    from semhitok.data.image_reader import ImageReader
    from semhitok.data.images import list_images, save_png
    from semhitok.evaluation.metrics import psnr, ssim

    paths = list_images(args.sources)
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device)
    device = next(tokenizer.parameters()).device
    out = arguments.make_output_folder(args.out)
    targets = dict(zip(paths, text.png_names(map(str, paths)), strict=True))
    _check_keeps_originals(out, targets)
    config = tokenizer.config
    reader = ImageReader(paths, config.image_size, args.batch_size, "reconstruct")
    rows: list[tuple[str, float, float]] = []
    with torch.inference_mode():
        for batch, images in reader:
            images = images.to(device)
            reconstructed = tokenizer.reconstruct(images)
            scores = zip(
                batch,
                reconstructed,
                psnr(reconstructed, images).tolist(),
                ssim(reconstructed, images).tolist(),
                strict=True,
            )
            for path, image, image_psnr, image_ssim in scores:
                save_png(image, out / targets[path])
                rows.append((targets[path], image_psnr, image_ssim))
    reader.check_any_read()
    mean = [sum(column) / len(rows) for column in list(zip(*rows, strict=True))[1:]]
    rows.append(("mean", *mean))
    width = max(len(name) for name, _, _ in rows)
    print(f"{'image':{width}}  PSNR dB    SSIM")
    for name, row_psnr, row_ssim in rows:
        print(f"{name:{width}}  {row_psnr:7.2f}  {row_ssim:6.3f}")
    skipped = f", {reader.skipped} skipped" if reader.skipped else ""
    written = text.count(len(rows) - 1, "image")
    print(printable(f"{out}: {written} at {config.bits_per_pixel:.3f} bits per pixel{skipped}"))
    return text.exit_code(reader.skipped)


def _check_keeps_originals(out, targets) -> None:
    originals = {path.resolve() for path in targets}
    for name in targets.values():
        if (out / name).resolve() in originals:
            raise ValueError(f"--out: {out / name} is one of the originals; name another folder")
