"""Fine-tune the toy tokenizer on real photographs and show what it does.

The photographs are samples that come with scikit-image and scikit-learn. Four of them, and the right third of
each of the others, are held out of training. The semantic codes are those of `semhitok-toy`, which learnt from
an ImageNet classifier (EfficientNet-Lite0); the pixel branch is trained further.

Writes pictures, ids, the checkpoint and metrics.json to the output folder, and prints a table. If it is
interrupted, the same command resumes. Takes some minutes on two cores.

example:
  semhitok demo --out demo_output
"""

from __future__ import annotations

import argparse

from semhitok.cli import arguments
from semhitok.cli.training import run_resumable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo_output", metavar="FOLDER", help="default: %(default)s")
    arguments.add_set_argument(parser, "pixel.steps=200")


def run(args: argparse.Namespace) -> int:
    from semhitok.config import override
    from semhitok.demo.tokenizer import demo, demo_config

    config = demo_config()
    for assignment in args.set:
        override(config, assignment)
    return run_resumable(args.command, lambda: demo(config, arguments.make_output_folder(args.out)))
