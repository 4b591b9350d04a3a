"""Understanding against reconstruction: the hierarchical codebook and its rivals at equal networks, updates, codes.

    python -m benchmarks.tradeoff.run --quick --out tradeoff      # one seed, eight minutes on two cores
    python -m benchmarks.tradeoff.run --out tradeoff-full         # three seeds, longer training, all sizes

On generated pictures (`shapes.py`), with a small teacher trained on their captions. `arms.py` describes the designs.
All columns are measured on held-out pictures:

    shape, colour   accuracy of a linear probe on the mean code vector of the cell that an object lies in
    by id           shape again, from learned values of the ids in place of their code vectors
    pair AP         mean average precision of an attention-pool probe: which (shape, colour) pairs a picture has
    PSNR, SSIM      of reconstructions; "sem. PSNR" of those from the semantic id alone
    var sem, var id share of the variance of patches' pixels that the semantic id explains, and the full id
    used, perpl.    share of ids in use, perplexity of the ids; bits = log2 of it, a patch's entropy
    params, codes   weights that the design needs besides the frozen teacher, in millions; numbers in its codebooks
    seconds         of training; stages that arms share are counted in each of them

With several seeds a figure is a mean and half of its 95 % confidence interval (t-distribution) over trainings; data and
teacher stay the same. Results of an arm and seed are kept in OUT and not computed again, so several processes may share
it, each with its own seeds. Exit status 1 if a check at the end misses. --photographs measures reconstruction on crops
of the demo's photographs, without labels and checks.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.tradeoff import shapes
from benchmarks.tradeoff.arms import BATCH, GRID, SIZES, Arm, Network, Sizes, bf16, fit, stages
from benchmarks.tradeoff.measures import Data, measure, understanding
from semhitok._files import write_atomic
from semhitok.config import DataConfig
from semhitok.data.crops import RandomCrops
from semhitok.data.images import list_images
from semhitok.demo.photographs import write_photographs
from semhitok.demo.teacher import ContrastiveConfig, train_teacher
from semhitok.evaluation.plots import pyplot
from semhitok.models.teacher import Teacher

COLUMNS = {
    "shape": "shape", "colour": "colour", "by_id": "by id", "pair_ap": "pair AP", "psnr": "PSNR", "ssim": "SSIM",
    "semantic_psnr": "sem. PSNR", "variance_semantic": "var sem", "variance_id": "var id", "used": "used",
    "perplexity": "perpl.", "bits": "bits", "parameters": "params", "codebook": "codes", "seconds": "seconds",
}  # fmt: skip
TEACHER_ROW = "continuous teacher"


@dataclass
class Settings:
    """What a result depends on besides its arm and seed. Only results of equal settings compare.

    teacher_*: see ContrastiveConfig.
    """

    pictures: int = 16_000  # of training
    probe: int = 4_000  # pictures that the probes learn from
    test: int = 1_000  # pictures that everything is measured on
    steps: int = 500  # updates of a branch
    batch: int = 32  # pictures of an update
    teacher_steps: int = 1_000
    teacher_batch: int = 64
    probe_steps: int = 400  # of the attention-pool probe
    photographs: bool = False


QUICK = Settings(pictures=8_000, probe=2_500, test=750, steps=220, teacher_steps=650, probe_steps=330)


def arms(K: int, m: int, quick: bool) -> list[Arm]:
    """The arms of the table: the main ones, then other K x m of the same product, then large vocabularies."""
    main = [
        Arm("semantic", K, 1), Arm("flat", K, m), Arm("independent", K, m), Arm("shared", K, m),
        Arm("joint", K, m), Arm("joint", K, m, "image"), Arm("staged", K, m), Arm("ragged", K, m),
    ]  # fmt: skip
    if quick:
        return [*main, Arm("staged", 2 * K, m // 2)]
    sizes = [Arm("staged", K * m // n, n) for n in (4 * m, 2 * m, m // 2, m // 4) if n and K * m // n > 1]
    large = [Arm("independent", K, K), Arm("staged", K, 16 * m)]
    return [*main, Arm("staged", K, m, "image"), *sizes, Arm("semantic", K * m, 1), *large]


def load(settings: Settings, out: Path) -> tuple[Data, Teacher]:
    """The data, and the teacher, which is trained unless it is in `out`."""
    config = ContrastiveConfig("shapes", settings.pictures, settings.teacher_steps, settings.teacher_batch)
    began = time.perf_counter()
    sets = {"train": (0, settings.pictures), "probe": (1, settings.probe), "test": (2, settings.test)}
    made = {name: shapes.pictures(seed, 0, count) for name, (seed, count) in sets.items()}
    say(f"data: {sum(count for _, count in sets.values())} pictures, {time.perf_counter() - began:.0f} s")
    teacher = Teacher(train_teacher(config, out, lambda: shapes.lesson(made["train"])), GRID)
    images = {name: pictures.images for name, pictures in made.items()}
    labels = {name: pictures.labels for name, pictures in made.items()}
    if settings.photographs:
        folders = write_photographs(out / "photographs")
        for name, (seed, count) in sets.items():
            paths = list_images([folders["held_out" if name == "test" else "train"]])
            crops = RandomCrops(paths, shapes.SIZE, DataConfig(crop_scale=None), seed)
            images[name] = torch.stack([(crops[n] * 255).round().byte() for n in range(count)])
    features = {}
    with bf16():
        for name, uint8 in images.items():
            features[name] = torch.cat([teacher(x.float() / 255).bfloat16() for x in uint8.split(BATCH)])
    return Data(images, features, None if settings.photographs else labels), teacher


class Trainer:
    """Trains arms; a semantic branch that several arms share is trained once for each seed."""

    def __init__(self, data: Data, teacher: Teacher, steps: int, batch: int, sizes: Sizes = SIZES) -> None:
        self.data, self.teacher, self.steps, self.batch, self.sizes = data, teacher, steps, batch, sizes
        self.shared: dict[tuple[Any, ...], tuple[Network, float]] = {}

    def train(self, arm: Arm, seed: int) -> tuple[Network, float]:
        """The trained network of an arm, and the seconds of its training."""
        torch.manual_seed(seed)
        net, seconds = Network(arm, self.teacher, self.sizes), 0.0
        for parts in stages(arm):
            if parts != {"semantic"}:
                seconds += self._fit(net, parts, seed)
                continue
            key = (arm.K, arm.feed, seed)
            if key not in self.shared:
                torch.manual_seed(seed)
                branch = Network(Arm("semantic", arm.K, 1, arm.feed), self.teacher, self.sizes)
                self.shared[key] = branch, self._fit(branch, parts, seed)
            branch, spent = self.shared[key]
            for name in ("vit", "head", "semantic_decoder"):
                setattr(net, name, copy.deepcopy(getattr(branch, name)))
            net.codes.semantic = copy.deepcopy(branch.codes.semantic)
            seconds += spent
        return net.eval(), seconds

    def _fit(self, net: Network, parts: set[str], seed: int) -> float:
        images, features = self.data.images["train"], self.data.features["train"]
        return fit(net, parts, images, features, self.steps, self.batch, seed)


# ---- the table, its checks and the plot ----


def interval(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean; nan for one value."""
    if len(values) < 2:
        return math.nan
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def _number(key: str, values: list[float]) -> str:
    if not values:
        return "-"
    digits = {"psnr": 2, "semantic_psnr": 2, "bits": 2, "parameters": 2, "perplexity": 0, "codebook": 0, "seconds": 0}
    n = digits.get(key, 3)
    varies = len(values) > 1 and key not in ("parameters", "codebook")
    return f"{mean(values):.{n}f}" + (f"±{interval(values):.{n}f}" if varies else "")


Results = dict[str, list[dict[str, float]]]  # title of a row -> its figures by seed


def table(results: Results, columns: dict[str, str] = COLUMNS) -> str:
    """A line for each arm that has some of the columns: means over its seeds, and half of the confidence intervals."""
    results = {title: rows for title, rows in results.items() if any(k in r for r in rows for k in columns)}
    keys = [k for k in columns if any(k in r for rows in results.values() for r in rows)]
    lines = [["", *(columns[k] for k in keys)]]
    lines += [[title, *(_number(k, [r[k] for r in rows if k in r]) for k in keys)] for title, rows in results.items()]
    first, *widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [[title.ljust(first), *map(str.rjust, cells, widths)] for title, *cells in lines]
    return "\n".join("  ".join(cells) for cells in aligned)


def mean_of(results: Results, row: Arm | str, key: str) -> float:
    return mean(r[key] for r in results[row.title if isinstance(row, Arm) else row])


def checks(results: Results, K: int, m: int, quick: bool) -> list[tuple[bool, str]]:
    """What the hierarchical codebook promises, compared with the means: whether it holds, and the figures."""
    of = partial(mean_of, results)
    staged, semantic = Arm("staged", K, m), Arm("semantic", K, 1)
    gain = 1.5 if quick else 2.0
    asked = [
        ("shape: staged at least semantic only - .02", of(staged, "shape"), of(semantic, "shape") - 0.02),
        ("pair AP: staged at least semantic only - .02", of(staged, "pair_ap"), of(semantic, "pair_ap") - 0.02),
        (f"PSNR: staged at least semantic only + {gain}", of(staged, "psnr"), of(semantic, "psnr") + gain),
        ("PSNR: staged at least two independent + .5", of(staged, "psnr"), of(Arm("independent", K, m), "psnr") + 0.5),
        ("shape: staged at least flat + .4", of(staged, "shape"), of(Arm("flat", K, m), "shape") + 0.4),
        ("pixel variance explained by the semantic id", of(staged, "variance_semantic"), 0.3),
        ("ids in use", of(staged, "used"), 0.9),
    ]
    if not quick:
        asked.append(("shape: continuous teacher", of(TEACHER_ROW, "shape"), 0.95))
    return [(got >= bar, f"{what}: {got:.3f}, asked {bar:.3f}") for what, got, bar in asked]


def draw(results: Results, path: Path, measures: dict[str, str]) -> None:
    """PSNR against two other columns; `measures`: their keys and labels."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, key in zip(axes, measures, strict=True):
        for n, (title, rows) in enumerate((t, r) for t, r in results.items() if "psnr" in r[0]):
            x, y = ([row[k] for row in rows] for k in ("psnr", key))
            error = [None if len(rows) < 2 else interval(values) for values in (x, y)]
            marker = "os^Dv<>P"[n % 8]
            axis.errorbar(mean(x), mean(y), error[1], error[0], marker=marker, linestyle="", label=title)
        if key in results.get(TEACHER_ROW, [{}])[0]:
            axis.axhline(results[TEACHER_ROW][0][key], linestyle="--", color="grey", label=TEACHER_ROW)
        axis.set(xlabel="reconstruction: PSNR, dB", ylabel=f"understanding: {measures[key]}")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def conclude(found: list[tuple[bool, str]]) -> int:
    """Print checks and return the exit status: 1 if one misses."""
    for good, what in found:
        print(f"{'ok  ' if good else 'MISS'}  {what}")
    return 0 if all(good for good, _ in found) else 1


def spent(began: float) -> str:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return f"{time.perf_counter() - began:.0f} s, peak memory {peak:.0f} MiB, {torch.get_num_threads()} threads"


def kept(out: Path, key: dict[str, Any], compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The figures that belong to a key in the results of `out`; computed and kept there if they are missing."""
    path = out / "results" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    if path.exists():
        return json.loads(path.read_text())["figures"]
    figures = compute()
    write_atomic(path, json.dumps({**key, "figures": figures}, indent=1).encode())
    say(f"{key['title']}, seed {key['seed']}: {', '.join(f'{k} {v:.4g}' for k, v in figures.items())}")
    return figures


def parser_of(description: str | None, sizes: tuple[int, int]) -> argparse.ArgumentParser:
    """The options that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, short training, fewer sizes")
    seeds = "seeds of the trainings of each arm (default: 0 1 2; with --quick 0)"
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help=seeds)
    parser.add_argument("--sizes", type=int, nargs=2, default=sizes, metavar=("K", "m"))
    parser.add_argument("--threads", type=int, help="threads of PyTorch (default: its choice)")
    field = "another value of a field of Settings; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="NAME=N", help=field)
    return parser


def prepare(parser: argparse.ArgumentParser, args: argparse.Namespace, settings: Any) -> None:
    """Check and apply the options of `parser_of`; `settings` is changed."""
    if args.threads:
        torch.set_num_threads(args.threads)
    for assignment in args.set:
        name, _, value = assignment.partition("=")
        if name not in asdict(settings) or not value.isdigit():
            parser.error(f"--set: expected one of {', '.join(asdict(settings))} = a number, got {assignment}")
        setattr(settings, name, int(value))
    if args.sizes[1] < 2:
        parser.error(f"--sizes: expected m of at least 2, got {args.sizes[1]}")
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    (args.out / "results").mkdir(parents=True, exist_ok=True)


def main() -> int:
    parser = parser_of(__doc__, (256, 8))
    parser.add_argument("--out", type=Path, default=Path("tradeoff"))
    parser.add_argument("--photographs", action="store_true", help="measure reconstruction of photographs instead")
    args = parser.parse_args()
    settings = Settings(**asdict(QUICK if args.quick else Settings()) | {"photographs": args.photographs})
    prepare(parser, args, settings)
    (K, m), began = args.sizes, time.perf_counter()
    inputs: list[tuple[Data, Trainer]] = []  # made when the first result is missing

    def result(title: str, seed: int, arm: Arm | None) -> dict[str, float]:
        def compute() -> dict[str, float]:
            if not inputs:
                data, teacher = load(settings, args.out)
                inputs.append((data, Trainer(data, teacher, settings.steps, settings.batch)))
            data, trainer = inputs[0]
            if arm is None:
                return understanding(data.features, data.labels, seed, settings.probe_steps)
            net, seconds = trainer.train(arm, seed)
            return {**measure(net, data, seed, settings.probe_steps), "seconds": seconds}

        return kept(args.out, {"title": title, "seed": seed, **asdict(settings)}, compute)

    results: Results = {}
    for seed in args.seeds:
        rows = [(arm.title, arm) for arm in arms(K, m, args.quick)]
        for title, arm in rows if args.photographs else [(TEACHER_ROW, None), *rows]:
            results.setdefault(title, []).append(result(title, seed, arm))
    text = table(results)
    (args.out / "table.txt").write_text(text + "\n")
    print(text)
    print(f"\n{spent(began)}")
    rates = []
    for name, kind in (("ragged", "ragged"), ("fixed", "staged")):
        bits, psnr = (mean_of(results, Arm(kind, K, m), key) for key in ("bits", "psnr"))
        rates.append(f"{name} m {bits:.2f} bits, {psnr:.2f} dB")
    print(f"rate and distortion: {'; '.join(rates)}")
    if args.photographs:
        return 0
    draw(results, args.out / "tradeoff.png", {key: COLUMNS[key] for key in ("shape", "pair_ap")})
    return conclude(checks(results, K, m, args.quick))


if __name__ == "__main__":
    sys.exit(main())
