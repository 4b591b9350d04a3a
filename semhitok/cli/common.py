"""What the commands share: exit codes, reading images in batches, names of output files."""

from __future__ import annotations

import argparse
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DONE, FAILED, UNUSABLE, SKIPPED, INTERRUPTED = 0, 1, 2, 3, 130

_MAX_NAME_BYTES = 200  # file systems take 255, and a number and suffix are added


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that runs a tokenizer."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a saved tokenizer, or its name on a hub")
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=16,
        metavar="N",
        help="images at once (default: %(default)s)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is)")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """The images a command reads."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="+",
        help="images, or folders searched for images in all depths",
    )


def add_assistant_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that runs a unified model."""
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model and its text tokenizer")
    parser.add_argument(
        "--tokenizer", required=True, metavar="CHECKPOINT", help="the image tokenizer that it was trained with"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is)")


def add_batch_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """How much goes through a unified model at once."""
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help=f"{what} at once (default: %(default)s)"
    )


def add_sampling_arguments(parser: argparse._ActionsContainer, temperature: float) -> None:
    """How ids are chosen; see `sampling`."""
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help=f"of the draw; 0 takes the likeliest id (default: {temperature:g})",
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest ids of this share (default: all)"
    )
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="(default: %(default)s)")


def add_drawing_arguments(parser: argparse._ActionsContainer) -> None:
    """How pictures are drawn."""
    parser.add_argument(
        "--guidance", type=float, default=2.0, metavar="SCALE", help="by the caption; 1 is without (default: 2)"
    )
    add_sampling_arguments(parser, temperature=1.0)
    parser.add_argument(
        "--top-k", type=natural, default=0, metavar="K", help="draw from the K likeliest ids (default: all)"
    )


def sampling(args: argparse.Namespace) -> Any:
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


def load_tokenizer(checkpoint: str, device: str, *, teacher: bool = True) -> Any:
    """`SemHiTok.from_pretrained` in eval mode on a device; only `encode` needs the teacher.

    Raises:
        OSError, ValueError: no such checkpoint or device, or a damaged checkpoint.
    """
    from semhitok.tokenizer import SemHiTok

    target = find_device(device)
    return SemHiTok.from_pretrained(checkpoint, teacher=teacher).to(target).eval()


def load_assistant(args: argparse.Namespace, *, teacher: bool = True) -> Any:
    """`Assistant.load` of the arguments of `add_assistant_arguments`; only images that are read need the teacher.

    Raises:
        OSError, ValueError: see there; no such device.
    """
    from semhitok._optional import require

    # Its bars are drawn wherever stderr goes.
    require("transformers.utils.logging", "mllm").disable_progress_bar()
    from semhitok.mllm.assistant import Assistant

    return Assistant.load(args.model, args.tokenizer, device=find_device(args.device), teacher=teacher)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: torch knows no such device, or the machine has none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device: expected one torch can use here, got {name!r}") from None
    return device


class ImageReader:
    """Images of `paths`, resized and cropped to `size`, in batches; unreadable ones are skipped.

    With `tiles` they are cut at the right and bottom to whole multiples of `size` instead (batches of one then), and
    those smaller than `size` are skipped.

    Iterating yields (paths of the batch, float32 [B, 3, size, size] in [0, 1] on the CPU). What is
    skipped is told on stderr, a line each, and counted in `skipped`.
    """

    def __init__(self, paths: list[Path], size: int, batch_size: int, command: str, *, tiles: bool = False) -> None:
        self.paths, self.size, self.batch_size, self.command, self.tiles = paths, size, batch_size, command, tiles
        self.skipped = 0

    def __iter__(self) -> Iterator[tuple[list[Path], torch.Tensor]]:
        import torch

        from semhitok.data.images import read_image, resize_crop, whole_tiles

        names: list[Path] = []
        images: list[torch.Tensor] = []
        with progress(self.paths, self.command) as bar:
            for path in bar:
                try:
                    image = read_image(path)
                    if self.tiles and min(image.shape[1:]) < self.size:
                        found = " x ".join(map(str, reversed(image.shape[1:])))
                        raise ValueError(f"{path}: expected at least {self.size} pixels a side, got {found}")
                    image = (whole_tiles if self.tiles else resize_crop)(image, self.size)
                except (ValueError, OSError) as error:
                    self.skipped += 1
                    line = printable(f"semhitok {self.command}: skipped: {message(error)}")
                    bar.write(line, file=sys.stderr)
                    continue
                names.append(path)
                images.append(image)
                if len(images) == self.batch_size:
                    yield names, torch.stack(images)
                    names, images = [], []
            if images:
                yield names, torch.stack(images)

    def check_any_read(self) -> None:
        """Raise ValueError if every image was skipped."""
        if self.skipped == len(self.paths):
            raise ValueError(f"none of {count(self.skipped, 'image')} could be read")

    @property
    def exit_code(self) -> int:
        return SKIPPED if self.skipped else DONE


def progress(items: Iterable[Any] | None, label: str, total: int | None = None) -> Any:
    """tqdm's bar on stderr, which shows on a terminal only: over `items`, or updated by hand."""
    from semhitok._optional import require

    return require("tqdm").tqdm(items, desc=label, total=total, disable=None, leave=False)


def check_output_file(path: str) -> Path:
    """`path` for an ids file that can be written, told before the long work and not after.

    Raises:
        ValueError: the name does not end in .safetensors.
        OSError: a folder is in its place, or its own folder is missing.
    """
    out = Path(path)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out: expected a name ending in .safetensors, got {path}")
    if out.is_dir():
        raise IsADirectoryError(f"--out: expected a file, got the folder {path}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out: no folder {out.parent}")
    return out


def make_output_folder(path: str) -> Path:
    """The folder `path`, made if it is missing.

    Raises:
        OSError: it cannot be made, a file of that name for one.
    """
    out = Path(path)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {path}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def png_names(names: Iterable[str]) -> list[str]:
    """A file name for each source name: its last part with .png, safe and unique.

    The names may come from a file that anybody wrote: folders, leading dots and all that is not a
    letter, digit, space or one of `-_.()` go. Names that meet get -2, -3, ... in order; upper and
    lower case count as the same.
    """
    taken: set[str] = set()
    last: dict[str, int] = {}
    result = []
    for name in names:
        base = unicodedata.normalize("NFC", re.split(r"[/\\]", name)[-1])
        stem = base.rpartition(".")[0] or base
        stem = re.sub(r"[^\w\-. ()]", "_", stem).lstrip(".").strip()
        stem = stem.encode("utf-8", "ignore")[:_MAX_NAME_BYTES].decode("utf-8", "ignore")
        stem = stem.strip() or "image"
        key = stem.casefold()
        unique = stem
        while unique.casefold() in taken:
            last[key] = last.get(key, 1) + 1
            unique = f"{stem}-{last[key]}"
        taken.add(unique.casefold())
        result.append(f"{unique}.png")
    return result


def message(error: BaseException) -> str:
    """What went wrong, without Python's and the system's numbers for it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def printable(text: str) -> str:
    """`text` with control characters, line ends and broken Unicode escaped: one line, no tricks."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def count(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Aligned lines of two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {printable(str(value))}" for name, value in rows)


def plain(value: Any) -> Any:
    """A configuration as YAML has it: tuples as lists."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
