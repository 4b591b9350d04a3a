"""Two training steps of every stage at a preset's full size, on the CPU, and the memory they take.

    python -m benchmarks.training.full_size_steps semhitok-256 semhitok-384

The teacher and K x m have the preset's sizes; its weights are random ones, the images generated, the batch one image.
The first step of a stage runs without quantisation, then k-means sets the codebook from few tokens, then the second
step quantises. LPIPS is left out (its weights would have to be fetched), the critic takes part in both steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from semhitok.config import train_config
from semhitok.data.images import save_png

SETTINGS = [
    "model.teacher.pretrained=false", "compile=false", "precision=fp32", "tracker=none", "keep_checkpoints=1",
    "semantic.steps=2", "semantic.batch_size=1", "semantic.continuous_steps=1", "semantic.init_tokens_per_code=1",
    "semantic.kmeans_iterations=1", "pixel.steps=2", "pixel.batch_size=1", "pixel.continuous_steps=1",
    "pixel.init_tokens_per_code=0.05", "pixel.kmeans_iterations=1", "pixel.loss.lpips=0",
    "pixel.loss.critic.train_from=0", "pixel.loss.critic.start=0", "pixel.loss.critic.ramp=0",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["semhitok-256", "semhitok-384"], metavar="PRESET")
    parser.add_argument("--limit", type=float, default=24, help="GiB a preset may take (default: %(default)s)")
    args = parser.parse_args()
    print(f"{'preset':22} {'K':>6} {'m':>3} {'teacher':40} {'seconds':>8} {'peak GiB':>9}")
    missed = False
    for preset in args.presets:
        model = train_config(preset).model
        with tempfile.TemporaryDirectory() as folder:
            pictures = Path(folder, "pictures")
            pictures.mkdir()
            generator = torch.Generator().manual_seed(0)
            for n in range(4):
                save_png(torch.rand(3, 400, 420, generator=generator), pictures / f"{n}.png")
            command = [sys.executable, "-m", "semhitok", "train", preset, str(pictures)]
            command += ["--out", f"{folder}/run", "--device", "cpu"]
            command += [part for setting in SETTINGS for part in ("--set", setting)]
            begun = time.perf_counter()
            process = subprocess.Popen(command, env={**os.environ, "OMP_WAIT_POLICY": "passive"}, stdout=sys.stderr)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command)
            seconds = time.perf_counter() - begun
        peak = usage.ru_maxrss / 2**20
        verdict = "ok" if peak < args.limit else "MISS"
        missed |= verdict != "ok"
        sizes = f"{model.num_codes:6} {model.num_sub_codes:3} {model.teacher.name:40}"
        print(f"{preset:22} {sizes} {seconds:8.0f} {peak:9.1f} {verdict} (limit {args.limit:g})", flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
