"""The command line: `semhitok COMMAND`. Each command is a module of this package.

A command module has a docstring (its help), `add_arguments(parser)` and `run(args) -> exit code`. `--help` must answer
at once, so a command imports torch, and every module that imports torch, inside `run`.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from semhitok import __version__
from semhitok._messages import message, printable
from semhitok.cli import text

COMMANDS = {
    "demo": "train a tiny tokenizer on real photographs and show what it does",
    "demo-mllm": "train a tiny unified model on generated pictures; show captions and drawings",
    "train": "train a tokenizer, stage by stage",
    "train-mllm": "train the unified multimodal model on a tokenizer's ids and text",
    "chat": "ask a unified model about images",
    "generate": "draw pictures from captions with a unified model",
    "eval-mllm": "evaluate a unified model on public benchmarks",
    "encode": "encode images to an ids file, or a corpus to parquet shards of ids",
    "decode": "decode an ids file to PNGs",
    "reconstruct": "encode images and decode them to PNGs, with PSNR and SSIM",
    "eval": "evaluate reconstructions and codes under a fixed protocol: rFID, PSNR, SSIM, LPIPS, ...",
    "analyze": "measure what the codes know about pixels, in numbers and figures",
    "explore": "see what the ids mean, patch by patch, on a local page",
    "info": "show what is in a checkpoint, an ids file, a corpus or this installation",
}
_EXIT_CODES = """exit codes:
  0  all done
  1  failure while working (out of memory, a loss that is not finite, a bug); SEMHITOK_TRACEBACK=1 prints the traceback
  2  bad input or usage; nothing was done
  3  done, but some inputs were skipped (each is named on stderr or in skipped.jsonl)
  130, 143  interrupted (Ctrl-C, SIGTERM); training can be resumed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on stderr.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: from argparse, after `--help` (code 0) or bad usage (code 2).
    """
    if "torch" not in sys.modules:
        # Threads that spin while they wait slow each other down several times where other programs use the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        _check_names(args)
        code = args.run(args)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is an error like any other
        return code
    except KeyboardInterrupt:
        return _complain(args.command, "interrupted", text.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has left (`| head`): not an error, and there is nobody to report to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return text.DONE
    except (ValueError, OSError, ImportError) as error:
        _trace(error)
        return _complain(args.command, f"error: {message(error)}", text.UNUSABLE)
    except Exception as error:
        _trace(error)
        return _complain(args.command, f"unexpected {type(error).__name__}: {message(error)}", text.FAILED)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, with `command` and the command's `run`; exits as `main` does."""
    parser = argparse.ArgumentParser(
        prog="semhitok",
        description="Images to discrete ids and back: a unified image tokenizer.",
        epilog=f"`semhitok COMMAND --help` describes a command.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"semhitok {__version__}", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == asked:  # the others are only listed
            module = import_module(f"semhitok.cli.{name.replace('-', '_')}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser.parse_args(argv)


def _check_names(args: argparse.Namespace) -> None:
    """ValueError if a file or folder has an empty name, which would be the current folder: an unset shell variable."""
    for name, flag in (
        ("out", "--out"),
        ("held_out", "--held-out"),
        ("sources", "SOURCE"),
        ("checkpoint", "CHECKPOINT"),
    ):
        given = getattr(args, name, None)
        if "" in (given if isinstance(given, list) else [given]):
            raise ValueError(f"{flag}: expected a name, got an empty one")


def _complain(command: str, problem: str, code: int) -> int:
    print(printable(f"semhitok {command}: {' '.join(problem.split())}"), file=sys.stderr)
    return code


def _trace(error: BaseException) -> None:
    if os.environ.get("SEMHITOK_TRACEBACK"):
        traceback.print_exception(error)
