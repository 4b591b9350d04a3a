"""Measure what the codes of a tokenizer know: the central observation of SemHiTok in numbers and figures.

How much of the pixels' variance a semantic code explains, compared with chance and with k-means on pixels; how well
sub-codebooks are used under rare and frequent codes; whether a sub-codebook fits the tokens of its own code better than
those of others; and what patches a code stands for. Writes analysis.json and figures. Unreadable images are reported
and skipped (exit code 3).

examples:
  semhitok analyze demo_output/checkpoint demo_output/photographs/held_out --tiles --out analysis
  semhitok analyze runs/256/checkpoint val/ --out analysis
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from semhitok._messages import printable
from semhitok.cli import arguments, text

_MAPS = 4  # images whose semantic ids are plotted
_KINDS = ("pixels", "colour", "texture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    arguments.add_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder for analysis.json and the figures")
    tiles = "cut each image into tiles of the tokenizer's size, instead of resizing and cropping it to that size"
    parser.add_argument("--tiles", action="store_true", help=tiles)


def run(args: argparse.Namespace) -> int:
    import torch

    from semhitok._files import write_json
    from semhitok.data.image_reader import ImageReader
    from semhitok.data.images import tiles
    from semhitok.evaluation import plots
    from semhitok.evaluation.analyze import analyze, collect

    paths, unreadable = arguments.find_images(args.sources, "analyze")
    plots.pyplot()  # a missing matplotlib is reported before the long work
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device)
    config = tokenizer.config
    out = arguments.make_output_folder(args.out)
    size, grid = config.image_size, config.grid_size
    reader = ImageReader(paths, size, 1, "analyze", tiles=args.tiles)
    pictures: list[torch.Tensor] = []  # the first ones

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        images, sources = torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64)
        for number, (_, image) in enumerate(reader):
            parts = tiles(image[0], size)
            images, sources = torch.cat([images, parts]), torch.cat([sources, torch.full((len(parts),), number)])
            if number < _MAPS:
                pictures.append(image[0])
            while len(images) >= args.batch_size:
                yield images[: args.batch_size], sources[: args.batch_size]
                images, sources = images[args.batch_size :], sources[args.batch_size :]
        reader.check_any_read()
        if len(images):
            yield images, sources

    tokens = collect(tokenizer, batches())
    result = {"checkpoint": args.checkpoint, "codebook_sha256": tokenizer.codebook_hash} | analyze(tokenizer, tokens)
    pairs = result.pop("pairs")
    write_json(out / "analysis.json", result)

    codes = tokens.codes.view(-1, grid, grid)
    codebook = tokenizer.quantizer.semantic.codebook.cpu()
    semantic, _ = tokenizer.vocabulary.split(tokens.codes)
    fit = (tokens.z_sem * codebook[semantic]).sum(1).view_as(codes)
    columns = [image.shape[2] // size for image in pictures]
    counts = [image.shape[1] // size * n for image, n in zip(pictures, columns, strict=True)]
    maps = list(zip(pictures, codes[: sum(counts)].split(counts), columns, strict=True))
    plots.semantic_map(tokenizer, maps, out / "semantic_map.png")
    patches = tokens.patches.view(*codes.shape, -1).permute(0, 3, 1, 2)
    crops = torch.nn.functional.pixel_shuffle(patches, config.patch_size)
    plots.patches_of_codes(tokenizer, crops, codes, out / "nearest_patches.png", fit=fit)
    plots.explained_variance(result["explained_variance"], out / "explained_variance.png")
    plots.sub_code_usage(result["sub_codes_by_frequency"], out / "sub_code_usage.png")
    plots.sub_codebook_distances(pairs, result["distances"], out / "sub_codebook_distances.png")
    print(_table(result), end="\n\n")
    print(printable(f"{out}: analysis.json and figures"))
    return text.exit_code(reader.skipped + unreadable)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{text.count(result['images'], 'image')}, {result['tokens']:,} tokens", ""]
    lines.append(f"{'share of variance explained':28}" + "".join(f"{kind:>9}" for kind in _KINDS))
    for name, share in result["explained_variance"].items():
        lines.append(f"  {name.replace('_', ' '):26}" + "".join(f"{share[kind]:9.3f}" for kind in _KINDS))
    heading = f"{'tokens of a semantic code':28}{'codes':>9}{'of all':>9}{'usage':>9}{'if even':>9}{'perplexity':>12}"
    lines += ["", heading]
    row = "{codes:9}{share_of_tokens:9.1%}{usage:9.3f}{usage_if_even:9.3f}{perplexity:12.2f}"
    for b in result["sub_codes_by_frequency"]:
        lines.append(f"  {b['tokens_from']} - {b['tokens_to']}".ljust(28) + row.format_map(b))
    errors, distances = result["ownership"], result["distances"]
    lines += [
        "",
        "quantisation error of pixel features, as a share of their variance",
        f"  own sub-codebook          {errors['own']:9.3f}",
        f"  another code's            {errors['other']:9.3f}  ({errors['gain']:.2f} dB more)",
        f"  any of all sub-codes      {errors['all']:9.3f}",
        "",
        "distances",
        f"  within a sub-codebook     {distances['within']:9.3f}  (to the nearest other sub-code)",
        f"  between sub-codebooks     {distances['between']:9.3f}",
        f"  rank correlation with the angle between semantic codes {distances['rank_correlation']:.3f}",
    ]
    return "\n".join(lines)
