"""Train a tokenizer on images, in two stages: semantic, then pixel on top of it, frozen.

A run lives in one folder. Interrupt it as you like (Ctrl-C, a signal, a crash): the same command goes
on from the last checkpoint and ends with the same weights. The finished tokenizer is in RUN/checkpoint.

example:
  semhitok train semhitok-tiny photos/ --out runs/tiny --set pixel.steps=2000
"""

from __future__ import annotations

import argparse

from semhitok.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "preset",
        metavar="PRESET",
        help="semhitok-tiny, semhitok-256, semhitok-384, semhitok-256-24k or semhitok-384-24k",
    )
    common.add_source_arguments(parser)
    parser.add_argument("--out", required=True, metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting by its dotted name, such as pixel.batch_size=32; repeatable",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    from semhitok.config import override, train_preset
    from semhitok.training import Interrupted, train

    config = train_preset(args.preset)
    for assignment in args.set:
        override(config, assignment)
    device = common.find_device(args.device)
    try:
        seconds = train(config, args.sources, args.out, device=device)
    except Interrupted as stop:
        print(f"semhitok train: {stop}; the same command continues")
        return 128 + stop.signum
    rows = [(f"stage {name}", f"{spent:.1f} s") for name, spent in seconds.items()]
    print(common.table([*rows, ("checkpoint", f"{args.out}/checkpoint")]))
    return common.DONE
