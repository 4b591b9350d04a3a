"""Decode an ids file to PNGs, each named after the image that the ids came from.

Ids of other codebooks are refused, as they would decode to noise. --semantic-only leaves out the sub-codes and shows
what the semantic codes alone know.

example:
  semhitok decode demo_output/checkpoint ids.safetensors --out decoded
"""

from __future__ import annotations

import argparse

from semhitok._messages import printable, progress
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    parser.add_argument("ids", metavar="IDS", help="ids file written by semhitok encode")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for the PNGs")
    parser.add_argument("--semantic-only", action="store_true", help="decode the semantic codes without sub-codes")


def run(args: argparse.Namespace) -> int:
    import torch

    from semhitok.corpus.ids_file import load_codes
    from semhitok.data.images import save_png

    file = load_codes(args.ids)
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device, teacher=False)
    device, config = next(tokenizer.parameters()).device, tokenizer.config
    sizes, grid = (config.num_codes, config.num_sub_codes), [config.grid_size] * 2
    try:
        tokenizer.vocabulary.check_hash(file.codebook_hash)
        if (got := (file.num_codes, file.num_sub_codes)) != sizes:
            raise ValueError(f"num_codes, num_sub_codes: expected {sizes}, got {got}")
        if list(file.codes.shape[1:]) != grid:
            raise ValueError(f"codes: expected [N, h, w] of h, w {grid}, got {list(file.codes.shape)}")
    except ValueError as error:
        raise ValueError(f"{args.ids}: {error}") from None
    out = arguments.make_output_folder(args.out)
    names = text.png_names(file.names)
    with torch.inference_mode(), progress(None, "decode", len(names)) as bar:
        for start in range(0, len(names), args.batch_size):
            codes = file.codes[start : start + args.batch_size].to(device)
            images = tokenizer.decode(codes, semantic_only=args.semantic_only)
            for image, name in zip(images, names[start : start + args.batch_size], strict=True):
                save_png(image, out / name)
                bar.update()
    print(printable(f"{out}: {text.count(len(names), 'image')}"))
    return text.DONE
