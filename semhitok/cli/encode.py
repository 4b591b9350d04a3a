"""Encode images to discrete ids: to one .safetensors file, or to a corpus, a folder of parquet shards.

Each image is resized to the tokenizer's size (shorter side, then centre crop) and becomes a grid of ids. The files
also hold the images' names, K, m and the hash of the codebooks, so that the ids are not decoded with others. An image
that cannot be read is skipped (exit code 3): for a .safetensors file it is named on stderr, for a corpus in
DIR/skipped.jsonl. A caption that cannot be used is left out (exit code 3), and named in DIR/notes.jsonl.

A corpus is encoded from folders, webdataset shards (*.tar, {000..123}, URLs) or parquet files with a column `image`, or
from folders of them, with their captions and keys. It can be interrupted at any time: the same command resumes it and
gives the same bytes.
`semhitok info DIR` checks a finished corpus.

examples:
  semhitok encode demo_output/checkpoint photos/ extra.jpg --out ids.safetensors
  semhitok encode CHECKPOINT photos/ --out corpus --processes 8
  semhitok encode CHECKPOINT 'data/train-{00000..00041}.parquet' --out corpus --crop ten --pack
  torchrun --nproc-per-node 8 -m semhitok encode CHECKPOINT 'shards/{0000..1023}.tar' --out corpus \\
      --engine torchrun --workers 12 --batch-size 64
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semhitok._messages import printable, progress
from semhitok.cli import arguments, text
from semhitok.config import PRECISIONS
from semhitok.corpus.config import CROPS, ENGINES, EncodingConfig

if TYPE_CHECKING:
    from semhitok.corpus.encode import Summary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_model_arguments(parser)
    sources = "images, or folders searched recursively; for a corpus also webdataset shards and parquet files"
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help=sources)
    out = "file ending in .safetensors, or a corpus's folder"
    parser.add_argument("--out", required=True, metavar="IDS|DIR", help=out)
    # Named after the settings of `EncodingConfig` and the arguments of `encode_corpus`; absent unless given.
    add = parser.add_argument_group("for a corpus", argument_default=argparse.SUPPRESS).add_argument
    default, positive = EncodingConfig(), arguments.positive
    processes = "encoding processes, each of one thread on a CPU (default: 1)"
    workers = "decoding processes for each (default: none on a CPU and with ray, else a share of the cores)"
    in_shard = f"image files in an output shard (default: {default.images_per_shard})"
    options = [
        add("--crop", choices=CROPS, help=f"ten: corners, centre and their mirror images (default: {default.crop})"),
        add("--pack", dest="packed", action="store_true", help="store each id in as few bits as the vocabulary needs"),
        add("--caption", metavar="NAME", help="parquet column and JSON field of captions (default: caption or text)"),
        add("--shard-images", dest="images_per_shard", type=positive, metavar="N", help=in_shard),
        add("--precision", choices=PRECISIONS, help=f"of the networks (default: {default.precision})"),
        add("--engine", choices=ENGINES, help="who runs the processes (default: local)"),
        add("--processes", type=positive, metavar="N", help=processes),
        add("--workers", type=arguments.natural, metavar="N", help=workers),
    ]
    parser.set_defaults(corpus_flags={option.dest: option.option_strings[0] for option in options})


def run(args: argparse.Namespace) -> int:
    given = {name: getattr(args, name) for name in args.corpus_flags if hasattr(args, name)}
    if not Path(args.out).suffix or args.out.endswith("/") or Path(args.out).is_dir():
        return _corpus(args, given)
    if Path(args.out).suffix != ".safetensors":
        raise ValueError(
            f"--out: expected a file ending in .safetensors, or a folder, which ends in / if its name has a dot: "
            f"{args.out}/"
        )
    for name in given:
        raise ValueError(f"{args.corpus_flags[name]}: expected with a folder as --out, got {args.out}")
    return _file(args)


def _file(args: argparse.Namespace) -> int:
    import torch

    from semhitok.corpus.ids_file import save_codes
    from semhitok.data.image_reader import ImageReader
    from semhitok.data.kinds import PARQUET, SHARDS, kind_of

    out = arguments.check_output_file(args.out)
    for name in args.sources:
        if kind_of(name) in (SHARDS, PARQUET):
            raise ValueError(f"--out: expected a folder for {name} ({kind_of(name)}), got the file {args.out}")
    paths, unreadable = arguments.find_images(args.sources, "encode")
    tokenizer = arguments.load_tokenizer(args.checkpoint, args.device)
    device = next(tokenizer.parameters()).device
    reader = ImageReader(paths, tokenizer.config.image_size, args.batch_size, "encode")
    names: list[str] = []
    codes: list[torch.Tensor] = []
    with torch.inference_mode():
        for batch, images in reader:
            names += [path.as_posix() for path in batch]
            codes.append(tokenizer.encode(images.to(device)).cpu())
    reader.check_any_read()
    ids = torch.cat(codes)
    save_codes(out, ids, names, tokenizer.vocabulary)
    count, height, width = ids.shape
    skipped = reader.skipped + unreadable
    note = f", {skipped} skipped" if skipped else ""
    print(printable(f"{out}: {text.count(count, 'image')}, {height} x {width} ids each{note}"))
    return text.exit_code(skipped)


def _corpus(args: argparse.Namespace, given: dict[str, Any]) -> int:
    from semhitok.corpus.encode import encode_corpus

    settings = {field.name for field in dataclasses.fields(EncodingConfig)} & given.keys()
    config = EncodingConfig(batch_size=args.batch_size, **{name: given.pop(name) for name in settings})

    def counted(results: Iterable[Any], total: int) -> Iterator[Any]:
        with progress(None, "encode", total) as bar:
            for result in results:
                bar.update()
                yield result

    out, device = arguments.make_output_folder(args.out), arguments.find_device(args.device)
    summary = encode_corpus(args.checkpoint, args.sources, out, config, device=device, progress=counted, **given)
    if summary.passed_over:
        print(f"semhitok encode: {summary.passed_over}", file=sys.stderr)
    print(text.table(_rows(args.out, config, summary)))
    return text.exit_code_of_process("encode", summary.skipped + summary.unreadable + summary.captions_left_out)


def _rows(out: str, config: EncodingConfig, summary: Summary) -> Iterator[tuple[str, Any]]:
    yield "corpus", out if not summary.missing else f"{out}, not finished: {summary.missing}"
    yield "encoded now", f"{summary.encoded:,} images in {summary.seconds:.1f} s"
    if summary.encoded:
        yield "speed", f"{summary.encoded / summary.seconds:.1f} images/s"
        yield "time", ", ".join(f"{share:.2%} {part}" for part, share in summary.shares.items())
    if summary.missing:
        return
    yield "images", f"{summary.images:,}" + (f", {summary.rows:,} crops" if summary.rows != summary.images else "")
    yield "captions", f"{summary.captions:,} of {summary.images:,} images have captions" + _captions(config, summary)
    if summary.images:
        yield "size", f"{summary.bytes:,} bytes, {summary.bytes / summary.images:.0f} an image"
    if config.precision != "fp32":
        yield "precision", f"{config.precision} changed {summary.changed:.2%} of the ids in each shard's first batch"
    if summary.skipped:
        yield "skipped", f"{summary.skipped:,}, listed in {Path(out, 'skipped.jsonl')}"
    if summary.notes:
        yield "notes", f"{summary.notes:,}, listed in {Path(out, 'notes.jsonl')}"
    yield from text.usage_rows(summary.usage)


def _captions(config: EncodingConfig, summary: Summary) -> str:
    counts = {
        "the first of several": summary.captions_listed,
        "repaired": summary.captions_repaired,
        "left out": summary.captions_left_out,
        f"with JSON without {config.caption}": summary.captions_lacking if config.caption else 0,
    }
    return "".join(f", {number:,} {what}" for what, number in counts.items() if number)
