"""What a critic costs and gives: the tiny preset with one and without, on the demo's held-out photographs.

    python -m benchmarks.training.critic_ablation --out critic_ablation

Trains the semantic stage once, then the pixel stage for every row, with the same batches, steps and moving average of
the weights. Distances are between whole held-out photographs and their reconstructions from 64 x 64 tiles: PSNR and
SSIM (higher is better), GMSD and the sliced Wasserstein distance of patches (lower is better; the latter compares
textures, finest scale first). Finished rows are not trained again. Writes table.txt and curves.png beside the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from semhitok.config import override, train_config
from semhitok.data.images import list_images, read_image, tiles, whole_tiles
from semhitok.demo.photographs import write_photographs
from semhitok.demo.tokenizer import decode, encode, fidelity
from semhitok.evaluation.metrics import gmsd, sliced_wasserstein
from semhitok.evaluation.plots import pyplot
from semhitok.tokenizer import SemHiTok
from semhitok.training import train

CRITIC = [
    "train_from=100", "start=300", "ramp=200", "width=32", "layers=2", "augment=true",
    "optimizer={lr: 1.0e-3, betas: [0.5, 0.9]}",
]  # fmt: skip
ROWS = {"without": []} | {f"PatchGAN, weight {w}": [f"weight={w}", *CRITIC] for w in ("0.03", "0.04")}


def evaluate(tokenizer: SemHiTok, photographs: list[torch.Tensor]) -> dict[str, float]:
    size = tokenizer.config.image_size
    pictures = [decode(tokenizer, encode(tokenizer, x), x) for x in photographs]
    of_edges = [gmsd(x[None], y[None]).item() for x, y in zip(pictures, photographs, strict=True)]
    figures = fidelity(pictures, photographs) | {"gmsd": sum(of_edges) / len(of_edges)}
    parts = [torch.cat([tiles(x, size) for x in images]) for images in (pictures, photographs)]
    levels, mean = sliced_wasserstein(*parts, torch.Generator().manual_seed(0))
    return figures | {"swd": mean} | {f"swd_{size >> n}": v for n, v in enumerate(levels)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("critic_ablation"))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="as `semhitok train`")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    args = parser.parse_args()
    folders = write_photographs(args.out / "photographs")
    held_out = [folders["held_out"]]

    def config(*settings: str):
        made = train_config("semhitok-tiny")
        for setting in [*settings, *args.set]:
            override(made, setting)
        return made

    train(config("stages=[semantic]"), [folders["train"]], args.out / "semantic", held_out=held_out)
    start = f"start_from={args.out / 'semantic' / 'checkpoint'}"
    rows = {}
    for name in args.rows:
        run = args.out / name.replace(", ", "-").replace(" ", "-")
        critic = [f"pixel.loss.critic.{setting}" for setting in ROWS[name]]
        made = config("stages=[pixel]", start, "pixel.ema_decay=0.99", *critic)
        seconds = train(made, [folders["train"]], run, held_out=held_out)["pixel"]
        tokenizer = SemHiTok.from_pretrained(run / "checkpoint")
        rows[name] = {"seconds": seconds, "run": run}
        for part in ("held_out", "unseen"):
            size = tokenizer.config.image_size
            images = [whole_tiles(read_image(path), size) for path in list_images([folders[part]])]
            rows[name][part] = evaluate(tokenizer, images)
    lines = []
    for part, title in (("held_out", "held-out parts of 14 photographs"), ("unseen", "an unseen photograph")):
        names = list(rows[args.rows[0]][part])
        lines.append(f"{title:36}" + "".join(f"{n:>8}" for n in names) + f"{'seconds':>9}")
        for name, row in rows.items():
            figures = "".join(f"{v:8.2f}" if n == "psnr" or "swd" in n else f"{v:8.3f}" for n, v in row[part].items())
            lines.append(f"  {name:34}{figures}{row['seconds']:9.0f}")
        lines.append("")
    table = "\n".join(lines)
    (args.out / "table.txt").write_text(table)
    print(table)
    draw(rows, args.out / "curves.png")
    return 0


def draw(rows: dict, path: Path) -> None:
    """PSNR and SSIM of the held-out images on the way, and the critic's logits."""
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    plotted = ["l1"], ["held_out_psnr"], ["critic_real_logit", "critic_fake_logit"]
    for name, row in rows.items():
        records = [json.loads(line) for line in (row["run"] / "pixel" / "log.jsonl").read_text().splitlines()]
        for axis, keys in zip(axes, plotted, strict=True):
            for key in keys:
                points = [(r["step"], r[key]) for r in records if key in r]
                if points:
                    label = f"{name}: {key.split('_')[1]}" if len(keys) > 1 else name
                    axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
    for axis, title in zip(axes, ("L1", "held-out PSNR, dB", "critic's mean logits"), strict=True):
        axis.set(xlabel="step of the pixel stage", title=title)
        axis.legend(fontsize=7)
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
