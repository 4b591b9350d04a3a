"""`semhitok encode` for corpora: equal shards from every engine, memory, speed, the quantizer's share of the time.

    python -m benchmarks.corpus --images 2000

Generated images, in folders of 1,000, are encoded by each engine with two processes. The SHA-256 of all shards must
agree, and the peak resident memory of the largest process must be within 10 % of that for the first --small images.
Then a full-size `semhitok-256` with random weights encodes some images on one thread, in fp32 and bf16. In fp32 the
quantizer must take less than 2 % of the time. With random weights, the share of ids that bf16 changes says little about
a trained tokenizer: --checkpoint and --photos measure that of yours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from semhitok.config import PRECISIONS, ViTConfig, preset
from semhitok.corpus import EncodedCorpus
from semhitok.tokenizer import SemHiTok

BAR_MEMORY, BAR_SHARE = 1.10, 2.0
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]


class Run(NamedTuple):
    """The figures of a command; waiting and quantising are percentages of the encoding processes' time."""

    seconds: float  # of the whole command
    speed: float  # images/s, without comparing ids with those in fp32; local and ray include starting the processes
    peak: float  # MiB, of the largest process
    waiting: float
    quantising: float
    shards: dict[str, str]  # name -> SHA-256


def make_images(folder: Path, count: int) -> None:
    """Blurred noise with some structure, as small JPEGs; image n is a function of n."""
    for n in range(count):
        path = folder / f"{n // 1000:03}" / f"{n:06}.jpg"
        if n % 1000 == 0:
            path.parent.mkdir(parents=True)
        coarse = torch.rand(4, 6, 3, generator=torch.Generator().manual_seed(n)).mul(255).byte().numpy()
        Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC).save(path, quality=85)


def make_checkpoint(folder: Path, name: str, size: int | None = None) -> None:
    """A tokenizer of that preset with random weights. The decoders, which do not encode, are made small."""
    config = preset(name)
    if size:
        config.image_size = config.teacher.image_size = size
    config.teacher.pretrained = False
    config.decoder = config.semantic_decoder = ViTConfig(64, 1, 1)
    torch.manual_seed(0)
    SemHiTok(config, load_teacher=False).save_pretrained(folder)


def encode(checkpoint: Path | str, sources: list[str], out: Path, *options: str, launcher: tuple[str, ...] = ()) -> Run:
    command = [sys.executable, *launcher, "-m", "semhitok", "encode", str(checkpoint), *sources, "--out", str(out)]
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([*command, *options, "--device", "cpu"], stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        output.seek(0)
        text = output.read().decode()
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}\n{text}")
    speed = sum(float(figure) for figure in re.findall(r"^speed +([\d.]+) images/s$", text, re.M))
    shares = {part: float(figure) for figure, part in re.findall(r"([\d.]+)% (waiting|quantising|comparing)", text)}
    speed /= 1 - shares.get("comparing", 0) / 100
    shards = {shard["name"]: shard["sha256"] for shard in json.loads((out / "manifest.json").read_bytes())["shards"]}
    seconds = time.perf_counter() - begun
    return Run(seconds, speed, used.ru_maxrss / 1024, shares["waiting"], shares["quantising"], shards)


def changed(one: Path, other: Path) -> float:
    """The share of ids, in per cent, that differ between two corpora of the same images."""
    both = zip(EncodedCorpus(one), EncodedCorpus(other), strict=True)
    return 100 * torch.stack([(a.ids != b.ids).double().mean() for a, b in both]).mean().item()


def engines(work: Path, args: argparse.Namespace) -> bool:
    # A small tokenizer, so that reading images, handing them out and writing shards is what is measured.
    make_checkpoint(work / "tiny", "semhitok-tiny", 32)
    everything, first = [str(work / "images")], [str(work / "images" / f"{n:03}") for n in range(args.small // 1000)]
    size, two = ("--shard-images", str(args.shard_images)), ("--processes", "2")
    arms = [
        (f"local, {args.small:,}", first, two, ()),
        ("local", everything, two, ()),
        ("torchrun", everything, ("--engine", "torchrun"), tuple(TORCHRUN)),
        ("ray", everything, ("--engine", "ray", *two), ()),
    ]
    print(f"semhitok-tiny at 32 x 32, random weights, {args.images:,} images, two processes of one thread each\n")
    titles = f"{'command s':>9} {'images/s':>9} {'% waiting':>9} {'% quantizer':>11} {'peak MiB':>9}"
    print(f"{'engine':12} {titles}  shards")
    runs: dict[str, Run] = {}
    equal = True
    for number, (name, sources, options, launcher) in enumerate(arms):
        run = runs[name] = encode(work / "tiny", sources, work / str(number), *size, *options, launcher=launcher)
        same = run.shards == runs.get("local", run).shards
        equal &= same
        verdict = ("as local's" if same else "DIFFER from local's") if number > 1 else ""
        peak = "-" if name == "ray" else f"{run.peak:.0f}"  # Ray's processes are not this one's children
        figures = f"{run.seconds:9.1f} {run.speed:9.1f} {run.waiting:9.1f} {run.quantising:11.2f} {peak:>9}"
        print(f"{name:12} {figures}  {len(run.shards)} {verdict}", flush=True)
    growth = runs["local"].peak / runs[arms[0][0]].peak
    grown = growth > BAR_MEMORY
    print(f"\npeak memory, {args.images:,} against {args.small:,} images: x {growth:.3f} {'MISS' if grown else 'ok'}")
    return equal and not grown


def precisions(checkpoint: Path | str, photos: list[str], work: Path, batch: int) -> bool:
    print(f"{'precision':9} {'images/s':>9} {'% quantizer':>11} {'% of ids changed':>16}")
    runs = {}
    for precision in PRECISIONS:
        options = ("--batch-size", str(batch), "--precision", precision)
        run = runs[precision] = encode(checkpoint, photos, work / precision, *options)
        share = changed(work / "fp32", work / precision)
        print(f"{precision:9} {run.speed:9.2f} {run.quantising:11.2f} {share:16.2f}", flush=True)
    return runs["fp32"].quantising < BAR_SHARE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000, help="0 leaves the engines out (default: %(default)s)")
    parser.add_argument("--small", type=int, default=2000, help="whole thousands (default: %(default)s)")
    parser.add_argument("--shard-images", type=int, default=500, help="(default: %(default)s)")
    parser.add_argument("--full-size", type=int, default=32, help="images for semhitok-256, at most 1000 (default: 32)")
    parser.add_argument("--checkpoint", help="a trained tokenizer, in place of all that")
    parser.add_argument("--photos", nargs="+", help="its images")
    args = parser.parse_args()
    if args.images and not (args.small >= 1000 and args.small % 1000 == 0 and args.small <= args.images):
        parser.error("--small: expected whole thousands, no more than --images")
    if bool(args.checkpoint) != bool(args.photos):
        parser.error("--checkpoint and --photos: expected both or none")
    print(f"torch {torch.__version__}, CPU\n")
    with tempfile.TemporaryDirectory(prefix="semhitok-corpus-") as folder:
        work = Path(folder)
        if args.checkpoint:
            precisions(args.checkpoint, args.photos, work, 16)
            return 0
        make_images(work / "images", max(args.images, args.full_size))
        good = engines(work, args) if args.images else True
        if args.full_size:
            print(f"\nsemhitok-256, random weights, {args.full_size} images, batches of 8, one thread\n")
            make_checkpoint(work / "full", "semhitok-256")
            images = sorted(str(path) for path in (work / "images" / "000").iterdir())[: args.full_size]
            small = precisions(work / "full", images, work / "precisions", 8)
            print(f"\nquantizer's share in fp32 below {BAR_SHARE:g} %: {'ok' if small else 'MISS'}")
            good &= small
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
