"""Train a tiny tokenizer and a tiny unified model on generated pictures; show captions and pictures of captions.

Everything is trained from scratch: a teacher learns from pictures and their captions, the tokenizer distils it, and a
language model of 3 layers learns to translate ids to words and back. All figures are of combinations of attributes that
training does not have. Needs the extras `demo` and `mllm`.

Writes pictures, checkpoints and metrics.json to the output folder, and prints a table. If it is interrupted, the same
command resumes.

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
