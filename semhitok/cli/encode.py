"""Encode images to discrete ids: in one .safetensors file, or a corpus in a folder of parquet shards.

Every image is resized to the tokenizer's size (shorter side, then centre crop) and becomes a grid
of ids. The files carry the images' names, K, m and the hash of the codebooks, so that they cannot be
decoded with others. An image that cannot be read is skipped (exit code 3): for a .safetensors file it
is named on stderr, in a corpus in DIR/skipped.jsonl.

A corpus is made from folders, webdataset shards (*.tar, {000..123}, URLs) or parquet files with a column
`image`; captions and keys come along. Stop it as you like: the same command goes on and ends with the same
bytes. `semhitok info DIR` checks a finished one.

examples:
  semhitok encode demo_output/checkpoint photos/ extra.jpg --out ids.safetensors
  semhitok encode CHECKPOINT photos/ --out corpus --processes 8
  semhitok encode CHECKPOINT 'data/train-{00000..00041}.parquet' --out corpus --crop ten --pack
  torchrun --nproc-per-node 8 -m semhitok encode CHECKPOINT 'shards/{0000..1023}.tar' --out corpus \\
      --engine torchrun --workers 12 --batch-size 64
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semhitok._messages import printable, progress
from semhitok.cli import arguments, text

if TYPE_CHECKING:
    from semhitok.corpus.encoder import Summary

# Options of a corpus alone, and what they are without the user's word.
_CORPUS = {
    "crop": "centre", "pack": False, "caption": None, "shard_images": 4096, "engine": "local", "processes": 1,
    "workers": 0, "precision": "fp32",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="images, or folders searched for images in all depths; for a corpus also webdataset shards and parquets",
    )
    parser.add_argument(
        "--out", required=True, metavar="IDS|DIR", help="file ending in .safetensors, or a corpus's folder"
    )
    corpus = parser.add_argument_group("for a corpus")
    corpus.add_argument(
        "--crop", choices=("centre", "ten"), help="ten: corners, centre and their mirror images (default: centre)"
    )
    corpus.add_argument("--pack", action="store_true", default=None, help="store ids in as many bits as they need")
    corpus.add_argument(
        "--caption", metavar="NAME", help="parquet column and JSON field of captions (default: caption or text)"
    )
    corpus.add_argument(
        "--shard-images", type=arguments.positive, metavar="N", help="image files in an output shard (default: 4096)"
    )
    corpus.add_argument(
        "--precision", choices=("fp32", "bf16", "int8"), help="of the networks; int8 on a CPU only (default: fp32)"
    )
    corpus.add_argument(
        "--engine", choices=("local", "torchrun", "ray"), help="who runs the processes (default: local)"
    )
    corpus.add_argument(
        "--processes",
        type=arguments.positive,
        metavar="N",
        help="encoding processes, on a CPU of one thread each (default: 1)",
    )
    corpus.add_argument(
        "--workers", type=arguments.positive, metavar="N", help="decoding processes for each of them (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    suffix = Path(args.out).suffix
    if not suffix or Path(args.out).is_dir():
        return _corpus(args)
    for name in _CORPUS:
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: expected with a folder as --out, got {args.out}")
    return _file(args)


def _file(args: argparse.Namespace) -> int:
    import torch

    from semhitok.corpus.ids_file import save_codes
    from semhitok.data.image_reader import ImageReader
    from semhitok.data.images import list_images

    out = arguments.check_output_file(args.out)
    paths = list_images(args.sources)
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device)
    device = next(tokenizer.parameters()).device
    reader = ImageReader(paths, tokenizer.config.image_size, args.batch_size, "encode")
    names, codes = [], []
    with torch.inference_mode():
        for batch, images in reader:
            codes.append(tokenizer.encode(images.to(device)).cpu())
            names += [path.as_posix() for path in batch]
    reader.check_any_read()
    save_codes(out, torch.cat(codes), names, tokenizer.vocabulary)
    _, height, width = codes[0].shape
    skipped = f", {reader.skipped} skipped" if reader.skipped else ""
    images_written = text.count(len(names), "image")
    print(printable(f"{out}: {images_written}, {height} x {width} ids each{skipped}"))
    return text.exit_code(reader.skipped)


def _corpus(args: argparse.Namespace) -> int:
    from semhitok.corpus.encoder import EncodingConfig, encode_corpus

    given: dict[str, Any] = {**_CORPUS, **{k: v for k, v in vars(args).items() if k in _CORPUS and v is not None}}
    config = EncodingConfig(
        given["crop"], given["pack"], given["caption"], args.batch_size, given["shard_images"], given["precision"]
    )

    def counted(results: Iterable[Any], total: int) -> Iterator[Any]:
        with progress(None, "encode", total) as bar:
            for done in results:
                bar.update()
                yield done

    summary = encode_corpus(
        args.checkpoint,
        args.sources,
        arguments.make_output_folder(args.out),
        config,
        engine=given["engine"],
        processes=given["processes"],
        workers=given["workers"],
        device=arguments.find_device(args.device),
        progress=counted,
    )
    print(text.table(_rows(args.out, config.precision, summary)))
    return text.SKIPPED if summary.skipped else text.DONE


def _rows(out: str, precision: str, summary: Summary) -> Iterator[tuple[str, Any]]:
    yield "corpus", out if not summary.missing else f"{out}, not finished: {summary.missing}"
    yield "encoded now", f"{summary.encoded:,} images in {summary.seconds:.1f} s"
    if summary.encoded:
        yield "speed", f"{summary.encoded / summary.seconds:.1f} images/s"
        yield "time", ", ".join(f"{share:.2%} {part}" for part, share in summary.shares.items())
    if summary.missing:
        return
    yield "images", f"{summary.images:,}" + (f", {summary.rows:,} crops" if summary.rows != summary.images else "")
    if summary.images:
        yield "size", f"{summary.bytes:,} bytes, {summary.bytes / summary.images:.0f} an image"
    if precision != "fp32":
        yield "precision", f"{precision} changed {summary.changed:.2%} of the ids in each shard's first batch"
    if summary.skipped:
        yield "skipped", f"{summary.skipped:,}, listed in {Path(out, 'skipped.jsonl')}"
    for view, figures in summary.usage.items():
        yield f"{view} usage", f"{figures['usage']:.3f}, perplexity {figures['perplexity']:.1f}"
