"""Encode images and decode them again, to PNGs, and compare them with the originals.

PSNR (dB) and SSIM are against the originals resized and cropped to the tokenizer's size. Images that cannot be read
are named on stderr and skipped (exit code 3).

example:
  semhitok reconstruct demo_output/checkpoint photos/ --out reconstructed
"""

from __future__ import annotations

import argparse
import os

from semhitok._messages import printable
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    arguments.add_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the PNGs")


def run(args: argparse.Namespace) -> int:
    import torch

    from semhitok.data.image_reader import ImageReader
    from semhitok.data.images import save_png
    from semhitok.evaluation.metrics import METRICS, quick_functions

    paths, unreadable = arguments.find_images(args.sources, "reconstruct")
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device)
    device = next(tokenizer.parameters()).device
    out = arguments.make_output_folder(args.out)
    targets = dict(zip(paths, text.png_names(map(str, paths)), strict=True))
    originals = {os.path.realpath(path) for path in paths}  # a link to itself is no error here
    for name in targets.values():
        if os.path.realpath(out / name) in originals:
            raise ValueError(f"--out: {out / name} is one of the originals; name another folder")
    config = tokenizer.config
    reader = ImageReader(paths, config.image_size, args.batch_size, "reconstruct")
    functions = quick_functions()
    rows: list[tuple[str, list[float]]] = []
    with torch.inference_mode():
        for batch, images in reader:
            images = images.to(device)
            reconstructed = tokenizer.reconstruct(images)
            scores = torch.stack([function(reconstructed, images) for function in functions.values()], dim=1)
            for path, image, row in zip(batch, reconstructed, scores.tolist(), strict=True):
                save_png(image, out / targets[path])
                rows.append((targets[path], row))
    reader.check_any_read()
    columns = zip(*(row for _, row in rows), strict=True)
    rows.append(("mean", [sum(column) / len(column) for column in columns]))
    width = max(len(name) for name, _ in rows)
    # One digit less than means over large sets get.
    table = [(METRICS[name].heading, METRICS[name].digits - 1) for name in functions]
    print(f"{'image':{width}}", *(f"{heading:>6}" for heading, _ in table), sep="  ")
    for name, row in rows:
        cells = zip(table, row, strict=True)
        print(f"{name:{width}}", *(f"{value:{max(6, len(h))}.{digits}f}" for (h, digits), value in cells), sep="  ")
    skipped = reader.skipped + unreadable
    note = f", {skipped} skipped" if skipped else ""
    written = text.count(len(rows) - 1, "image")
    print(printable(f"{out}: {written} at {config.bits_per_pixel:.3f} bits per pixel{note}"))
    return text.exit_code(skipped)
