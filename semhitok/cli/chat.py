"""Ask a unified model about images: one question, or a conversation line by line.

Without --question, every line of the standard input is a question, until it ends (Ctrl-D); the model remembers the
conversation. An empty question (--question "") asks for a caption.

examples:
  semhitok chat runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint photo.jpg
  semhitok chat runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint photo.jpg --question "What colour is the car?"
"""

from __future__ import annotations

import argparse
import sys

from semhitok.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_assistant_arguments(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files that the conversation is about")
    parser.add_argument("--question", metavar="TEXT", help="ask this alone")
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=256, metavar="N", help="most ids of an answer (default: 256)"
    )
    common.add_sampling_arguments(parser, temperature=0.0)


def run(args: argparse.Namespace) -> int:
    from semhitok.mllm.assistant import Chat

    options = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": common.sampling(args),
        "seed": args.seed,
        "callback": _print,
    }
    assistant = common.load_assistant(args)
    chat = Chat(assistant, assistant.read(args.images))
    if args.question is not None:
        chat.ask(args.question, **options)
        print()
        return common.DONE
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return common.DONE
        if not line.strip():
            continue
        try:
            chat.ask(line.strip(), **options)
            print(flush=True)
        except ValueError as error:  # a question that is too long, say: the conversation continues
            print(common.printable(f"semhitok chat: {common.message(error)}"), file=sys.stderr)


def _print(text: str) -> None:
    print("\n".join(map(common.printable, text.split("\n"))), end="", flush=True)
