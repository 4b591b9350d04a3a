"""Ask a unified model about images: one question, or a conversation line by line.

Without --question, every line of standard input is a question, until end of file (Ctrl-D); the model remembers the
conversation. An empty question (--question "") asks for a caption.

examples:
  semhitok chat runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint photo.jpg
  semhitok chat runs/mllm/checkpoint --tokenizer runs/tiny/checkpoint photo.jpg --question "What colour is the car?"
"""

from __future__ import annotations

import argparse
import sys

from semhitok._messages import message, printable
from semhitok.cli import arguments, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_assistant_arguments(parser)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files that the conversation is about")
    add("--question", metavar="TEXT", help="ask this one question")
    add("--max-new-tokens", type=arguments.positive, default=256, metavar="N", help="most new ids (default: 256)")
    arguments.add_sampling_arguments(parser, temperature=0.0)


def run(args: argparse.Namespace) -> int:
    from semhitok.mllm.assistant import Chat

    options = {"max_new_tokens": args.max_new_tokens, "sampling": arguments.sampling(args), "seed": args.seed}
    options["callback"] = _print
    assistant = arguments.load_assistant(args)
    chat = Chat(assistant, assistant.read(args.images))
    if args.question is not None:
        chat.ask(args.question, **options)
        print()
        return text.DONE
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return text.DONE
        if not line.strip():
            continue
        try:
            chat.ask(line.strip(), **options)
            print(flush=True)
        except ValueError as error:  # a question that is too long, say: the conversation continues
            print(printable(f"semhitok chat: {message(error)}"), file=sys.stderr)


def _print(text: str) -> None:
    print("\n".join(map(printable, text.split("\n"))), end="", flush=True)
