"""What a run reports: the progress bar, log.jsonl and the tracker; and figures of codebook usage."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from semhitok._files import parse_json, write_atomic
from semhitok._optional import require
from semhitok.usage import CodeUsage

LOG_EVERY = 10  # steps
USAGE_TOKENS = 50  # tokens per flat code in a window of the usage figures


class Log:
    """The progress bar, log.jsonl and the tracker. Only the first process has one."""

    def __init__(self, folder: Path, tracker: str, name: str, start: int, steps: int, unit: str) -> None:
        self.name, self.steps, self.unit = name, steps, unit
        self.skipped = "images" if unit == "images" else "samples"
        self.bar = require("tqdm", "models").tqdm(total=self.steps, initial=start, desc=name, unit="step", disable=None)
        self.file = (folder / name / "log.jsonl").open("a", buffering=1)  # every line is written at once
        self.tracker = _tracker(folder, tracker, name, start)
        self.start, self.begun = start, time.perf_counter()
        self.clock, self.waited, self.units = self.begun, 0.0, 0

    def write(self, step: int, record: dict[str, float], skipped: int, lr: dict[str, float]) -> None:
        """Log a step. lr: the learning rate of each part, which the configuration decides: for the tracker alone."""
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        now = time.perf_counter()
        elapsed = max(now - self.clock, 1e-9)
        # What depends on the machine goes to the tracker alone.
        rate, waited = self.units / elapsed, self.waited / elapsed
        speed = {f"{self.unit}_per_second": rate, "data_wait": waited, f"{self.skipped}_skipped": float(skipped)}
        self.clock, self.waited, self.units = now, 0.0, 0
        if self.tracker is not None:
            rates = {f"lr_{name}": value for name, value in lr.items()}
            self.tracker.log({**record, **speed, **rates}, step=step)
        text = f"loss {record['loss']:.4f}, {rate:.1f} {self.unit}/s, {waited:.0%} of the time waiting for data"
        text += f", {skipped} {self.skipped} skipped" if skipped else ""
        self.bar.set_postfix_str(text, refresh=False)
        # Without a terminal to show the bar, print a line at every tenth of the way.
        tenth, before = (n * 10 // self.steps for n in (step, step - LOG_EVERY))
        if self.bar.disable and (tenth > before or step == self.steps):
            left = (now - self.begun) / (step - self.start) * (self.steps - step)
            print(f"{self.name}: step {step} of {self.steps}, {text}, {_duration(left)} left", file=sys.stderr)

    def evaluation(self, step: int, figures: dict[str, float], pictures: Tensor | None) -> None:
        record = {f"held_out_{k}": v for k, v in figures.items()}
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        text = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
        self.bar.write(f"{self.name}: held-out {self.skipped} after step {step}: {text}", file=sys.stderr)
        if self.tracker is not None:
            self.tracker.log(record, step=step)
            if pictures is not None:
                images = {"original_and_reconstruction": pictures.clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()}
                layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
                self.tracker.log_images(images, step=step, **layout)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.tracker is not None:
            self.tracker.finish()


def _tracker(folder: Path, kind: str, stage: str, start: int) -> Any:
    """Accelerate's tracker of this kind; None for "none"."""
    if kind == "none":
        return None
    tracking = require("accelerate.tracking", "train")
    require("accelerate", "train").PartialState()  # the trackers need it
    if kind == "wandb":
        require("wandb", "wandb")
        name = f"{folder.resolve().name}-{stage}"
        # A resumed run has the same identity.
        identity = hashlib.sha256(f"{folder.resolve()}/{stage}".encode()).hexdigest()[:16]
        tracker = tracking.WandBTracker("semhitok", dir=str(folder), name=name, id=identity, resume="allow")
    else:
        require("tensorboard", "train")
        # purge_step hides what a killed run wrote after its last checkpoint.
        tracker = tracking.TensorBoardTracker(stage, str(folder / "tensorboard"), purge_step=start)
    tracker.start()
    return tracker


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def cut_log(path: Path, step: int) -> None:
    """Drop what a stopped run logged after the checkpoint from which it resumes."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if parse_json(line)["step"] > step:
                break
        except ValueError:  # the half line of a killed process
            break
        kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())


def usage_window(num_codes: int, tokens_per_step: int) -> int:
    """Steps between two usage figures: enough for USAGE_TOKENS tokens a code, rounded up to a multiple of LOG_EVERY."""
    return math.ceil(num_codes * USAGE_TOKENS / tokens_per_step / LOG_EVERY) * LOG_EVERY


def usage_figures(usage: CodeUsage, step: int, window: int) -> dict[str, float]:
    """At the end of every window the usage and perplexity of its tokens, after which the counts restart at zero."""
    if (step + 1) % window:
        return {}
    groups = usage.groups()
    figures = usage.figures()
    if usage.counts.shape[1] > 1:
        figures["dead_sub_codes"] = 1 - figures["group_usage"]
        lacking = (groups.used < groups.sizes)[groups.tokens > 0].double()
        figures["groups_with_dead_sub_codes"] = lacking.mean().item() if len(lacking) else 0.0
    usage.reset()
    return figures
