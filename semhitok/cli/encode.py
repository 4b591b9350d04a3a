"""Encode images to discrete ids, in one .safetensors file.

Every image is resized to the tokenizer's size (shorter side, then centre crop) and becomes a grid
of ids. The file carries the images' names, K, m and the hash of the codebooks, so that it cannot be
decoded with others. An image that cannot be read is named on stderr and skipped (exit code 3).

example:
  semhitok encode demo_output/checkpoint photos/ extra.jpg --out ids.safetensors
"""

from __future__ import annotations

import argparse

from semhitok.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser)
    common.add_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="IDS", help="file to write, ending in .safetensors")


def run(args: argparse.Namespace) -> int:
    import torch

    from semhitok.data.codes import save_codes
    from semhitok.data.images import list_images

    out = common.check_output_file(args.out)
    paths = list_images(args.sources)
    tokenizer = common.load_tokenizer(args.checkpoint, args.device)
    device = next(tokenizer.parameters()).device
    reader = common.ImageReader(paths, tokenizer.config.image_size, args.batch_size, "encode")
    names, codes = [], []
    with torch.inference_mode():
        for batch, images in reader:
            codes.append(tokenizer.encode(images.to(device)).cpu())
            names += [path.as_posix() for path in batch]
    reader.check_any_read()
    save_codes(out, torch.cat(codes), names, tokenizer.vocabulary)
    _, height, width = codes[0].shape
    skipped = f", {reader.skipped} skipped" if reader.skipped else ""
    images_written = common.count(len(names), "image")
    print(common.printable(f"{out}: {images_written}, {height} x {width} ids each{skipped}"))
    return reader.exit_code
