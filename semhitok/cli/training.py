"""What the commands that train share: their options, `--print-config`, and what is printed at the end."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semhitok._optional import require
from semhitok.cli import arguments, text

if TYPE_CHECKING:
    import torch

    from semhitok.data.skipped import Skipped


def add_training_arguments(parser: argparse.ArgumentParser, example: str) -> None:
    """The arguments that `run_training` reads; `example` is a setting for the help."""
    parser.add_argument("--out", metavar="RUN", help="the run's folder")
    arguments.add_set_argument(parser, example)
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML and exit")
    accept = "resume although the data have changed, or settings other than the model's"
    parser.add_argument("--accept-changes", action="store_true", help=accept)
    arguments.add_device_argument(parser)


def run_training(
    args: argparse.Namespace, config: Any, unit: str, train: Callable[[torch.device, Skipped], dict[str, float]]
) -> int:
    """Apply `--set` to `config`; then print it, or call `train`, which returns the seconds of each stage.

    unit: what training leaves out if it cannot be used: image or record.
    """
    from semhitok.config import override
    from semhitok.data.skipped import Skipped

    for assignment in args.set:
        override(config, assignment)
    if args.print_config:
        print(_described(args, config), end="")
        return text.DONE

    skipped = Skipped()

    def work() -> str:
        if not args.out:
            raise ValueError("--out: expected, got none")
        seconds = train(arguments.find_device(args.device), skipped)
        rows = [(f"stage {name}", f"{spent:.1f} s") for name, spent in seconds.items()]
        left_out = [("skipped", f"{text.count(len(skipped), unit)}, named on stderr")] if skipped else []
        return text.table([*rows, *left_out, ("checkpoint", f"{args.out}/checkpoint")])

    return run_resumable(args.command, work) or text.exit_code_of_process(args.command, len(skipped))


def _described(args: argparse.Namespace, config: Any) -> str:
    """The configuration as YAML; a comment says what "auto" stands for."""
    lines = require("yaml").safe_dump(config.to_dict(), sort_keys=False)
    if config.data.workers != "auto":
        return lines
    from semhitok.training import workers

    number = workers.of_run(Path(args.out)) if args.out else None
    comment = f"{number}, with which the run began"
    if number is None:
        device = arguments.find_device("auto").type if args.device == "auto" else args.device.partition(":")[0]
        comment = f"{workers.of_machine(device)} on this machine, or fewer where the data have fewer shards or rows"
    return lines.replace("  workers: auto\n", f"  workers: auto  # {comment}\n")


def run_resumable(command: str, work: Callable[[], str]) -> int:
    """Print what `work` returns, in the first process; after a signal, say how to resume. Returns the exit code."""
    from semhitok import distributed
    from semhitok.training import Interrupted

    code = text.DONE
    try:
        result = work()
    except Interrupted as stop:
        result = f"semhitok {command}: {stop}; the same command resumes"
        code = 128 + stop.signum
    if distributed.rank() == 0:
        print(result)
    return code
