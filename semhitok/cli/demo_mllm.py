"""Train a tiny tokenizer and a tiny unified model on generated pictures, show captions and pictures of captions.

Everything starts from nothing: a teacher learns from pictures and their captions, the tokenizer distils it, and a
language model of 3 layers learns the ids and words of both directions. What is shown and measured are combinations of
attributes that training never had. Needs the extra `demo` and `mllm`.

Leaves pictures, checkpoints and metrics.json in the output folder, and prints a table. Interrupted, the same command
goes on.

example:
  semhitok demo-mllm --out demo_mllm_output
"""

from __future__ import annotations

import argparse

from semhitok.cli import arguments
from semhitok.cli.training import run_resumable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo_mllm_output", metavar="FOLDER", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from semhitok.demo.mllm import demo

    return run_resumable(args.command, lambda: demo(arguments.make_output_folder(args.out)))
