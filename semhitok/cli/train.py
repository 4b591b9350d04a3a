"""Train a tokenizer on images, in stages: the semantic branch, then the pixel branch on top of it; on request the
decoder once more.

A run lives in one folder. It may be interrupted at any time (Ctrl-C, a signal, a crash): the same command resumes from
the last checkpoint and ends with the same weights. The finished tokenizer is in RUN/checkpoint, curves are in
RUN/tensorboard. SIGTERM and Ctrl-C save first and exit with 143 and 130.

examples:
  semhitok train semhitok-tiny photos/ --out runs/tiny --set pixel.steps=2000
  semhitok train my.yaml 'shards/{00000..01023}.tar' --held-out val/ --out runs/a
  accelerate launch -m semhitok train semhitok-256 'https://host/{00000..01023}.tar' --held-out val/ --out runs/b
"""

from __future__ import annotations

import argparse

from semhitok.cli import training
from semhitok.config import preset_names, train_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, images = parser.add_argument, "image files, folders of them, or webdataset shards (*.tar, {000..123}, URLs)"
    add("config", metavar="CONFIG", help=f"{', '.join(preset_names())}, or a YAML file")
    add("sources", nargs="*", metavar="IMAGES", help=images)
    training.add_training_arguments(parser, "pixel.batch_size=32")
    add("--held-out", nargs="+", default=[], metavar="IMAGES", help="images to evaluate on, not trained on")


def run(args: argparse.Namespace) -> int:
    from semhitok.training import train

    config = train_config(args.config)
    if not args.sources and not args.print_config:
        raise ValueError("IMAGES: expected, got none")
    options = {"held_out": args.held_out, "accept_changes": args.accept_changes}
    return training.run_training(
        args,
        config,
        "image",
        lambda device, skipped: train(config, args.sources, args.out, device=device, skipped=skipped, **options),
    )
