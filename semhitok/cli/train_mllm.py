"""Train the unified multimodal model on an image tokenizer's ids and text, in stages: adapter, joint, instruct.

A run lives in one folder. Interrupt it as you like (Ctrl-C, a signal, a crash): the same command goes on from the last
checkpoint and ends with the same weights. The finished model and its text tokenizer are in RUN/checkpoint, figures in
RUN/tensorboard. SIGTERM and Ctrl-C save first and exit with 143 and 130.

examples:
  semhitok train-mllm my.yaml --out runs/mllm
  semhitok train-mllm my.yaml joint instruct --out runs/more --set llm=null --set start_from=runs/mllm/checkpoint
  accelerate launch -m semhitok train-mllm my.yaml --out runs/mllm --set joint.micro_batch=4
"""

from __future__ import annotations

import argparse

from semhitok.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="mllm-tiny, mllm-qwen2.5-0.5b, or a YAML file")
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help="adapter, joint, instruct (default: those of the configuration)"
    )
    parser.add_argument("--out", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting by its dotted name, such as joint.batch_size=32; repeatable",
    )
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML and stop")
    parser.add_argument(
        "--accept-changes", action="store_true", help="go on with a run although settings or data have changed"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    from semhitok._optional import require
    from semhitok.config import override
    from semhitok.mllm.config import mllm_config

    config = mllm_config(args.config)
    for assignment in args.set:
        override(config, assignment)
    if args.stages:
        config.stages = args.stages
        config.__post_init__()
    if args.print_config:
        print(require("yaml").safe_dump(common.plain(config.to_dict()), sort_keys=False), end="")
        return common.DONE
    if not args.out:
        raise ValueError("--out: expected, got none")

    from semhitok import distributed
    from semhitok.mllm.training import train
    from semhitok.training import Interrupted

    try:
        seconds = train(config, args.out, device=common.find_device(args.device), accept_changes=args.accept_changes)
    except Interrupted as stop:
        if distributed.rank() == 0:
            print(f"semhitok train-mllm: {stop}; the same command continues")
        return 128 + stop.signum
    if distributed.rank() == 0:
        rows = [(f"stage {name}", f"{spent:.1f} s") for name, spent in seconds.items()]
        print(common.table([*rows, ("checkpoint", f"{args.out}/checkpoint")]))
    return common.DONE
