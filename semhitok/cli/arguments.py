"""Options that commands share, and what their values stand for: devices, models, output files.

Commands import this module to build their parsers, so what is heavy is imported inside the functions.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from semhitok._optional import require

if TYPE_CHECKING:
    import torch

    from semhitok.mllm import Sampling
    from semhitok.mllm.assistant import Assistant
    from semhitok.tokenizer import SemHiTok


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that runs an image tokenizer."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a saved tokenizer, or its name on a hub")
    add_batch_argument(parser, "images", 16)
    add_device_argument(parser)


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The images a command reads."""
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="images, or folders searched at all depths")


def find_images(sources: Iterable[str], command: str) -> tuple[list[Path], int]:
    """The images among `sources`, and how many files and folders inside them could not be read.

    What is passed over is counted and named on stderr.
    """
    from semhitok.data.listing import list_images
    from semhitok.data.passed_over import PassedOver

    passed_over = PassedOver()
    try:
        return list_images(sources, passed_over), passed_over.unreadable
    finally:
        if passed_over.counts:
            print(f"semhitok {command}: {passed_over.summary()}", file=sys.stderr)


def add_assistant_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that runs a unified model."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a trained model and its text tokenizer")
    add("--tokenizer", required=True, metavar="CHECKPOINT", help="the image tokenizer the model was trained with")
    add_device_argument(parser)


def add_set_argument(parser: argparse.ArgumentParser, example: str) -> None:
    """Changes to a configuration."""
    change = f"change a setting by its dotted name, such as {example}; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=change)


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Where the networks run."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is one)")


def add_batch_argument(parser: argparse.ArgumentParser, what: str, default: int = 8) -> None:
    """How much goes through a network at once."""
    what += " at once (default: %(default)s)"
    parser.add_argument("--batch-size", type=positive, default=default, metavar="N", help=what)


def add_sampling_arguments(parser: argparse._ActionsContainer, temperature: float) -> None:
    """How ids are sampled."""
    add = parser.add_argument
    scale = f"sampling temperature; 0 takes the most likely id (default: {temperature:g})"
    share = "sample from the most likely ids that make up this share of the probability (default: all)"
    add("--temperature", type=float, default=temperature, metavar="T", help=scale)
    add("--top-p", type=float, default=1.0, metavar="P", help=share)
    add("--seed", type=natural, default=0, metavar="N", help="(default: %(default)s)")


def add_drawing_arguments(parser: argparse._ActionsContainer) -> None:
    """How pictures are sampled."""
    add, scale = parser.add_argument, "scale of classifier-free guidance; 1 is none (default: 2)"
    add("--guidance", type=float, default=2.0, metavar="SCALE", help=scale)
    add_sampling_arguments(parser, temperature=1.0)
    add("--top-k", type=natural, default=0, metavar="K", help="sample from the K most likely ids (default: all)")


def sampling(args: argparse.Namespace) -> Sampling:
    """The `Sampling` of these arguments."""
    from semhitok.mllm import Sampling

    names = ("temperature", "top_k", "top_p", "guidance")
    return Sampling(**{name: getattr(args, name) for name in names if name in args})


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not re.fullmatch("[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def find_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one. ValueError if torch cannot use it here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected one torch can use here, got {name!r}") from None
    return device


def load_tokenizer(checkpoint: str, device: str, *, teacher: bool = True) -> SemHiTok:
    """`SemHiTok.from_pretrained` on a device; only `encode` needs the teacher."""
    from semhitok.tokenizer import SemHiTok

    target = find_device(device)  # a wrong name fails before the weights are read
    return SemHiTok.from_pretrained(checkpoint, teacher=teacher).to(target)


def load_assistant(args: argparse.Namespace, *, teacher: bool = True) -> Assistant:
    """`Assistant.load` of the arguments of `add_assistant_arguments`; only reading images needs the teacher."""
    # transformers draws progress bars even where stderr is no terminal.
    require("transformers.utils.logging", "mllm").disable_progress_bar()
    from semhitok.mllm.assistant import Assistant

    return Assistant.load(args.model, args.tokenizer, device=find_device(args.device), teacher=teacher)


def check_output_file(path: str) -> Path:
    """`path` of an ids file to be written: ValueError or OSError before the work starts if that cannot succeed."""
    out = Path(path)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {path}")
    if out.is_dir():
        raise IsADirectoryError(f"--out: expected a file, got the folder {path}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: no folder {out.parent}")
    return out


def make_output_folder(path: str) -> Path:
    """The folder `path`, created if it does not exist; OSError if that fails or a file has its name."""
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {path}")
    out.mkdir(parents=True, exist_ok=True)
    return out
