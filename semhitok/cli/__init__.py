"""The command line: `semhitok COMMAND`. Each command is a module of this package.

A command module has a docstring (its help), `add_arguments(parser)` and `run(args) -> exit code`,
and imports what is heavy inside `run`, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from semhitok.cli.common import DONE, FAILED, INTERRUPTED, UNUSABLE, message, printable

_COMMANDS = {
    "demo": "train a tiny tokenizer on real photographs, show what it does",
    "demo-mllm": "train a tiny unified model on generated pictures, captions and pictures of captions",
    "train": "train a tokenizer in two stages",
    "train-mllm": "train the unified multimodal model on a tokenizer's ids and text",
    "chat": "ask a unified model about images",
    "generate": "draw pictures from captions with a unified model",
    "eval-mllm": "a unified model on public benchmarks of understanding and generation",
    "encode": "images to an ids file, or a corpus to parquet shards of ids",
    "decode": "an ids file to PNGs",
    "reconstruct": "images to ids and back to PNGs, with PSNR and SSIM",
    "eval": "rFID, PSNR, SSIM, LPIPS, use of the codes and more, under a fixed protocol",
    "analyze": "what the codes know of pixels, in numbers and figures",
    "explore": "what the ids mean, patch by patch, on a local page",
    "info": "what is in a checkpoint, an ids file, a corpus or this installation",
}
_EXIT_CODES = """exit codes:
  0  all done
  1  unexpected failure (a bug, or no memory); SEMHITOK_TRACEBACK=1 shows where
  2  bad input or usage, nothing done
  3  done, but some inputs were skipped (each is named on stderr, or in skipped.jsonl)
  130  interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on stderr.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Raises:
        SystemExit: from argparse, after `--help` (code 0) or bad usage (code 2).
    """
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is an error like others
        return code
    except KeyboardInterrupt:
        return _complain(args.command, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output left (`| head`): not an error, and nothing more to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (ValueError, OSError, ImportError) as error:
        _trace(error)
        return _complain(args.command, f"error: {message(error)}", UNUSABLE)
    except Exception as error:
        _trace(error)
        text = f"unexpected {type(error).__name__}: {message(error)}"
        return _complain(args.command, text, FAILED)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="semhitok",
        description="Images to discrete ids and back: a unified image tokenizer.",
        epilog=f"semhitok COMMAND --help tells more.\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        module = import_module(f"semhitok.cli.{name.replace('-', '_')}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked for it."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        print(f"semhitok {metadata.version('semhitok')}")
        parser.exit()


def _complain(command: str, text: str, code: int) -> int:
    print(printable(f"semhitok {command}: {' '.join(text.split())}"), file=sys.stderr)
    return code


def _trace(error: BaseException) -> None:
    if os.environ.get("SEMHITOK_TRACEBACK"):
        import traceback

        traceback.print_exception(error)
