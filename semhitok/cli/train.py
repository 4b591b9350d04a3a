"""Train a tokenizer on images, in stages: semantic, then pixel on top of it, frozen; the decoder once more if asked.

A run lives in one folder. Interrupt it as you like (Ctrl-C, a signal, a crash): the same command goes on from the last
checkpoint and ends with the same weights. The finished tokenizer is in RUN/checkpoint, figures in RUN/tensorboard.
SIGTERM and Ctrl-C save first and exit with 143 and 130.

examples:
  semhitok train semhitok-tiny photos/ --out runs/tiny --set pixel.steps=2000
  semhitok train my.yaml 'shards/{00000..01023}.tar' --held-out val/ --out runs/a
  accelerate launch -m semhitok train semhitok-256 'https://host/{00000..01023}.tar' --held-out val/ --out runs/b
"""

from __future__ import annotations

import argparse

from semhitok.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help="semhitok-tiny, semhitok-256, semhitok-256-one-gpu, semhitok-384 (semhitok-256-24k, semhitok-384-24k), "
        "or a YAML file",
    )
    parser.add_argument(
        "sources",
        nargs="*",
        metavar="IMAGES",
        help="image files, folders of them, or webdataset shards (*.tar, {000..123}, URLs)",
    )
    parser.add_argument("--out", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--held-out", nargs="+", default=[], metavar="IMAGES", help="images to evaluate on, not trained on"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting by its dotted name, such as pixel.batch_size=32; repeatable",
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML and stop")
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="go on with a run although settings (but for the model) or images have changed",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    from semhitok._optional import require
    from semhitok.config import override, train_config

    config = train_config(args.config)
    for assignment in args.set:
        override(config, assignment)
    if args.print_config:
        print(require("yaml").safe_dump(common.plain(config.to_dict()), sort_keys=False), end="")
        return common.DONE
    for name, value in (("IMAGES", args.sources), ("--out", args.out)):
        if not value:
            raise ValueError(f"{name}: expected, got none")

    from semhitok import distributed
    from semhitok.training import Interrupted, train

    device = common.find_device(args.device)
    try:
        seconds = train(
            config,
            args.sources,
            args.out,
            held_out=args.held_out,
            device=device,
            accept_changes=args.accept_changes,
        )
    except Interrupted as stop:
        if distributed.rank() == 0:
            print(f"semhitok train: {stop}; the same command continues")
        return 128 + stop.signum
    if distributed.rank() == 0:
        rows = [(f"stage {name}", f"{spent:.1f} s") for name, spent in seconds.items()]
        print(common.table([*rows, ("checkpoint", f"{args.out}/checkpoint")]))
    return common.DONE
