"""GenEval: four pictures of each prompt, in the folders that its own evaluator reads."""

from __future__ import annotations

import json
from pathlib import Path

from semhitok._files import write_atomic
from semhitok.mllm.assistant import Assistant, Job
from semhitok.mllm.benchmarks.files import data_files, field, read_lines
from semhitok.mllm.benchmarks.questions import Scores
from semhitok.mllm.benchmarks.run import Settings, draw

SAMPLES = 4  # pictures of a prompt


def run(name: str, data: Path, assistant: Assistant, out: Path, settings: Settings) -> Scores:
    """Draw the prompts; there is nothing to score.

    DATA, or evaluation_metadata.jsonl in it, has lines {"tag", "include", "prompt", ...}. Line n becomes
    OUT/images/0000n/metadata.jsonl and samples/0000k.png, drawn with the seeds seed + 4 n + k.
    """
    path, *_ = data_files(data, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    jobs, rows = [], []
    for n, (row, where) in enumerate(read_lines(path)):
        caption, folder = str(field(row, "prompt", where)), out / "images" / f"{n:05}"
        for k in range(SAMPLES):
            jobs.append(Job(folder / "samples" / f"{k:05}.png", caption, settings.seed + SAMPLES * n + k))
        rows.append((folder, row))
    drawn = draw(name, jobs, assistant, out, settings)
    for folder, row in rows:
        write_atomic(folder / "metadata.jsonl", (json.dumps(row) + "\n").encode())
    return {"prompts": float(len(rows)), "pictures": float(len(drawn))}
