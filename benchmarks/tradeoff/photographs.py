"""Understanding against reconstruction on labelled photographs, with a teacher that knows photographs.

    python -m benchmarks.tradeoff.photographs --train TRAIN --test TEST --out DIR --quick    # one seed, short
    python -m benchmarks.tradeoff.photographs --train TRAIN --test TEST --out DIR            # hours

TRAIN and TEST are folders, or tar files (webdataset), of images CLASS/NAME.jpg. They are resized and cropped to 64 x 64
pixels, with 8 x 8 ids. Designs (`arms.py`), networks and training are those of `run.py`, wider. Everything is measured
on TEST; probes learn from TRAIN. Columns that `run.py` does not have:

    lin, knn        accuracy for the label of a linear probe and of k-NN (`image_probes.py`), each from:
      all           the mean code vector of an image, q_sem ++ q_pix as far as the design has them
      sem           the mean of q_sem
      dec           the mean of the semantic decoder's output, which estimates the teacher's features
      ids, sem ids  which ids occur, and how often: the square root of the histogram of the full or the semantic ids
    SqN             the SqueezeNet distance (`semhitok/models/squeezenet.py`); it is not LPIPS
    SqN-FD          the Fréchet distance on SqueezeNet's last features; it is not rFID

The row "continuous teacher" has the probes of the mean of its features under "all". Features are computed once and kept
in DIR in fp16; as in `run.py`, so are results. An interrupted run continues. Exit status: 1 if a check at the end
misses, which is a result; 2 on an error.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import io
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Generator, Tensor

from benchmarks.tradeoff import run
from benchmarks.tradeoff.arms import BATCH, GRID, PATCH, Arm, Sizes
from benchmarks.tradeoff.image_probes import mean_features, measure, probes
from benchmarks.tradeoff.measures import Data
from semhitok._files import write_atomic
from semhitok.config import TeacherConfig
from semhitok.data.images import list_images, read_image, resize_crop, to_uint8
from semhitok.data.kinds import FOLDER, SHARDS, kind_of
from semhitok.data.shards import expand_shards, read_shard
from semhitok.evaluation.probes import check_labels, read_labels
from semhitok.models.squeezenet import SqueezeNetDistance
from semhitok.models.teacher import Teacher

SIZE = PATCH * GRID
DEFAULT_TEACHER = "efficientnet_lite0_packaged"
PROBED = {
    "linear_all": "lin all", "knn_all": "knn all", "linear_semantic": "lin sem", "knn_semantic": "knn sem",
    "linear_decoded": "lin dec", "knn_decoded": "knn dec", "linear_ids": "lin ids", "knn_ids": "knn ids",
    "linear_semantic_ids": "lin sem ids", "knn_semantic_ids": "knn sem ids",
}  # fmt: skip
OF_RUN = {key: title for key, title in run.COLUMNS.items() if key not in ("shape", "colour", "by_id", "pair_ap")}
OTHERS = {"squeezenet": "SqN", "squeezenet_frechet": "SqN-FD"} | OF_RUN
COLUMNS = PROBED | OTHERS


@dataclass
class Settings:
    """What a result depends on besides its arm, seed, data and teacher. Only results of equal settings compare."""

    train: int = 20_000  # photographs, at most
    test: int = 4_000
    steps: int = 1_000  # updates of a branch
    batch: int = 32  # photographs of an update
    dim: int = 64  # of semantic and of pixel codes
    width: int = 128  # of the pixel encoder and decoder and the semantic decoder; a multiple of 32
    depth: int = 2  # blocks of the pixel encoder and decoder
    semantic_depth: int = 0  # blocks of the semantic decoder
    commitment: int = 1  # weight of the semantic codes' commitment


QUICK = Settings(train=8_000, test=2_000, steps=500)


def arms(K: int, m: int, quick: bool) -> list[Arm]:
    """The arms of the table: those of `run.py` that read the frozen teacher; then other K x m of the same product,
    smaller m, a flat codebook of fewer codes, and K * m semantic codes alone."""
    main = [Arm("semantic", K, 1)]
    main += [Arm(kind, K, m) for kind in ("flat", "independent", "shared", "joint", "staged", "ragged")]
    if quick:
        return main
    against = [Arm("staged", K * m // n, n) for n in (4 * m, m // 4) if n and K * m // n > 1]
    fewer = [Arm("staged", K, n) for n in (m // 2, m // 8) if n > 1]
    return [*main, *against, *fewer, Arm("flat", K, max(m // 8, 1)), Arm("semantic", K * m, 1)]


# ---- data ----


def read_photographs(source: str, count: int) -> tuple[Tensor, list[str]]:
    """uint8 images [n, 3, 64, 64] and their labels: of all photographs of a source, or of `count` drawn from them.

    Raises:
        ValueError: no folder or tar file of images, an image or a tar file that cannot be read, an image that is in no
            folder, fewer than two labels, or a label with one image.
    """
    found: list[tuple[str, Callable[[], Tensor]]] = []
    if kind_of(source) == SHARDS:
        for url in expand_shards(source):
            for sample in read_shard(url):
                if sample.ends_shard:
                    raise ValueError(sample.problem)
                found.append((sample.key.removeprefix("./"), sample.image))
    elif kind_of(source) == FOLDER:
        found = [(p.relative_to(source).as_posix(), partial(read_image, p)) for p in list_images([source])]
    else:
        raise ValueError(f"expected a folder or tar files of photographs, got {source}")
    if not found:
        raise ValueError(f"{source}: no images found")
    chosen = torch.randperm(len(found), generator=Generator().manual_seed(0))[:count].sort().values.tolist()
    try:
        labels = read_labels("folders", [found[n][0] for n in chosen])
        check_labels(labels)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    images = torch.empty(len(chosen), 3, SIZE, SIZE, dtype=torch.uint8)
    for row, n in enumerate(chosen):
        images[row] = to_uint8(resize_crop(found[n][1](), SIZE))
    return images, labels


def read_sets(sources: dict[str, str], settings: Settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Images and labels as class numbers [N], by set ("train", "probe", "test"); "probe" is "train".

    Raises:
        ValueError: as `read_photographs`, or a label of the test photographs that no training photograph has.
    """
    began = time.perf_counter()
    found = {name: read_photographs(source, getattr(settings, name)) for name, source in sources.items()}
    classes = sorted(set(found["train"][1]))
    unknown = sorted(set(found["test"][1]) - set(classes))
    if unknown:
        raise ValueError(f"{sources['test']}: expected labels of the training photographs, got also {unknown[0]}")
    images = {name: x for name, (x, _) in found.items()}
    number = {label: n for n, label in enumerate(classes)}
    labels = {name: torch.tensor([number[label] for label in y]) for name, (_, y) in found.items()}
    for sets in (images, labels):
        sets["probe"] = sets["train"]
    counts = f"{len(images['train'])} and {len(images['test'])} photographs of {len(classes)} classes"
    run.say(f"data: {counts}, {time.perf_counter() - began:.0f} s")
    return images, labels


def digest(*parts: Tensor | str) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part.contiguous().numpy().data)
    return found.hexdigest()[:16]


def stored_features(images: Tensor, teacher: Teacher, folder: Path, name: str) -> Tensor:
    """The teacher's features of uint8 images, fp16 [N, 8, 8, C], mapped from a file that is made or completed first.

    The file belongs to these images and this teacher by its name, and how far it got is its size. Processes that
    need it at the same time wait for the first.

    Raises:
        ValueError: a feature that fp16 cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{digest(json.dumps(asdict(teacher.config)), images)}.f16"
    numbers = GRID**2 * teacher.width  # of an image
    began = time.perf_counter()
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        rows = path.stat().st_size // (2 * numbers)
        done = rows if rows == len(images) else rows // BATCH * BATCH
        file.truncate(done * 2 * numbers)
        for first in range(done, len(images), BATCH):
            features = teacher(images[first : first + BATCH].float() / 255).half()
            if not bool(features.isfinite().all()):
                raise ValueError(f"teacher: expected features that fp16 can hold, got others in {name}")
            file.write(features.contiguous().numpy().data)
            file.flush()
            if first // BATCH % 10 == 9 or first + BATCH >= len(images):
                last = min(first + BATCH, len(images))
                run.say(f"features: {name}, {last} of {len(images)}, {time.perf_counter() - began:.0f} s")
    mapped = torch.from_file(str(path), shared=False, size=len(images) * numbers, dtype=torch.float16)
    return mapped.view(len(images), GRID, GRID, teacher.width)


def load_teacher(config: TeacherConfig) -> Teacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of random weights
        return Teacher(config, GRID)


# ---- the script ----


def checks(results: run.Results, K: int, m: int) -> list[tuple[bool, str]]:
    """What the hierarchical codebook promises on photographs: whether it holds, and the figures."""
    of = partial(run.mean_of, results)
    staged, semantic, flat = Arm("staged", K, m), Arm("semantic", K, 1), Arm("flat", K, m)
    teacher, probe = of(run.TEACHER_ROW, "linear_all"), "linear probe"
    asked = [
        (f"{probe}: semantic part of staged at least half the teacher's", of(staged, "linear_semantic"), teacher / 2),
        (f"{probe}: staged at least semantic only - .02", of(staged, "linear_all"), of(semantic, "linear_all") - 0.02),
        ("PSNR: staged at least semantic only + 1.5", of(staged, "psnr"), of(semantic, "psnr") + 1.5),
    ]
    found = [(got >= bar, f"{what}: {got:.3f}, asked {bar:.3f}") for what, got, bar in asked]
    got, bar = of(flat, "linear_all"), teacher / 3
    return [*found, (got < bar, f"{probe}: flat below a third of the teacher's: {got:.3f}, asked below {bar:.3f}")]


def write_csv(results: run.Results, seeds: list[int], path: Path) -> None:
    """A row for each arm and seed, with the figures under their keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["title", "seed", *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for title, rows in results.items():
        writer.writerows({"title": title, "seed": seed, **row} for seed, row in zip(seeds, rows, strict=True))
    write_atomic(path, text.getvalue().encode())


def main() -> int:
    parser = run.parser_of(__doc__, (1024, 16))
    images = "folder or tar files of images CLASS/NAME.jpg"
    parser.add_argument("--train", required=True, help=images)
    parser.add_argument("--test", required=True, help=images)
    parser.add_argument("--out", type=Path, required=True)
    name = f"a timm network, with random weights as random:NAME (default: {DEFAULT_TEACHER})"
    parser.add_argument("--teacher", default=DEFAULT_TEACHER, metavar="NAME", help=name)
    size = "side in pixels to which the teacher's images are resized (default: 128)"
    parser.add_argument("--teacher-size", type=int, default=128, metavar="N", help=size)
    block = "block or stage of the teacher whose features count (default: -1)"
    parser.add_argument("--block", type=int, default=-1, metavar="N", help=block)
    args = parser.parse_args()
    settings = Settings(**asdict(QUICK if args.quick else Settings()))
    run.prepare(parser, args, settings)
    if settings.width % 32 or not settings.width:
        parser.error(f"--set: expected width to be a multiple of 32, got {settings.width}")
    try:
        return compare(args, settings)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def compare(args: argparse.Namespace, settings: Settings) -> int:
    """Train and measure all arms, and write the table and the plot."""
    (K, m), began = args.sizes, time.perf_counter()
    name = args.teacher.removeprefix("random:")
    options = {"output_stride": 16} if name == DEFAULT_TEACHER else {}  # 8 x 8 of 128 pixels
    config = TeacherConfig(name, name == args.teacher, None, args.teacher_size, args.block, options)
    images, labels = read_sets({"train": args.train, "test": args.test}, settings)
    of_data = digest(*images.values(), *labels.values())
    inputs: list[tuple[Data, run.Trainer, SqueezeNetDistance]] = []  # made when the first result is missing

    def compute(arm: Arm | None, seed: int) -> dict[str, float]:
        if not inputs:
            squeezenet, teacher = SqueezeNetDistance(), load_teacher(config)
            stored = partial(stored_features, teacher=teacher, folder=args.out / "features")
            features = {part: stored(images[part], name=part) for part in ("train", "test")}
            data = Data(images, features | {"probe": features["train"]}, labels)
            sizes = Sizes(settings.dim, settings.width, settings.depth, settings.semantic_depth, settings.commitment)
            inputs.append((data, run.Trainer(data, teacher, settings.steps, settings.batch, sizes), squeezenet))
        data, trainer, squeezenet = inputs[0]
        if arm is None:
            return probes("all", *(mean_features(data.features[part]).numpy() for part in ("probe", "test")), labels)
        net, seconds = trainer.train(arm, seed)
        return {**measure(net, data, squeezenet), "seconds": seconds}

    results: run.Results = {}
    for seed in args.seeds:
        for arm in (None, *arms(K, m, args.quick)):
            title = run.TEACHER_ROW if arm is None else arm.title
            key = {"title": title, "seed": seed, **asdict(settings), "teacher": asdict(config), "data": of_data}
            results.setdefault(title, []).append(run.kept(args.out, key, partial(compute, arm, seed)))
    text = f"{run.table(results, PROBED)}\n\n{run.table(results, OTHERS)}"
    (args.out / "table.txt").write_text(text + "\n")
    write_csv(results, args.seeds, args.out / "table.csv")
    measures = {"linear_all": "linear probe of mean code vectors", "linear_ids": "linear probe of which ids occur"}
    run.draw(results, args.out / "tradeoff.png", measures)
    print(f"{text}\n\n{run.spent(began)}")
    return run.conclude(checks(results, K, m))


if __name__ == "__main__":
    sys.exit(main())
