"""Train the unified multimodal model on an image tokenizer's ids and text, in stages: adapter, joint, instruct.

A run lives in one folder. It may be interrupted at any time (Ctrl-C, a signal, a crash): the same command resumes from
the last checkpoint and ends with the same weights. The finished model and its text tokenizer are in RUN/checkpoint,
curves are in RUN/tensorboard. SIGTERM and Ctrl-C save first and exit with 143 and 130.

examples:
  semhitok train-mllm my.yaml --out runs/mllm
  semhitok train-mllm my.yaml joint instruct --out runs/more --set llm=null --set start_from=runs/mllm/checkpoint
  accelerate launch -m semhitok train-mllm my.yaml --out runs/mllm --set joint.micro_batch=4
"""

from __future__ import annotations

import argparse
import json

from semhitok.cli import training
from semhitok.config import preset_names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help=f"{', '.join(preset_names('mllm'))}, or a YAML file")
    stages = "adapter, joint, instruct (default: those of the configuration)"
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=stages)
    training.add_training_arguments(parser, "joint.batch_size=32")


def run(args: argparse.Namespace) -> int:
    from semhitok.mllm.config import mllm_config
    from semhitok.mllm.training import train

    config = mllm_config(args.config)
    if args.stages:
        args.set.append(f"stages={json.dumps(args.stages)}")
    return training.run_training(
        args,
        config,
        "record",
        lambda device, skipped: train(
            config, args.out, device=device, accept_changes=args.accept_changes, skipped=skipped
        ),
    )
