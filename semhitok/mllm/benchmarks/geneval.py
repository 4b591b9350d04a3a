"""GenEval: four pictures of each prompt, in the folders that its own evaluator reads."""

from __future__ import annotations

import json

from semhitok._files import write_atomic
from semhitok.data.skipped import Skipped
from semhitok.mllm.assistant import Job
from semhitok.mllm.benchmarks.files import data_files, field, read_lines
from semhitok.mllm.benchmarks.questions import Scores
from semhitok.mllm.benchmarks.run import SKIPPED, Run

SAMPLES = 4  # pictures of a prompt


def draw(run: Run) -> Scores:
    """Draw the prompts; there is nothing to score.

    DATA, or evaluation_metadata.jsonl in it, has lines {"tag", "include", "prompt", ...}. Line n becomes
    OUT/images/0000n/metadata.jsonl and samples/0000k.png, drawn with the seeds seed + 4 n + k.
    """
    path, *_ = data_files(run.data, "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    jobs, rows, skipped = [], [], Skipped()
    for number, row, where in read_lines(path, skipped):
        with skipped.errors(where):
            n, caption = number - 1, field(row, "prompt")
            run.assistant.caption_ids(caption)
            folder = run.out / "images" / f"{n:05}"
            for k in range(SAMPLES):
                jobs.append(Job(folder / "samples" / f"{k:05}.png", caption, run.seed + SAMPLES * n + k))
            rows.append((folder, row))
    run.draw(jobs)
    for folder, row in rows:
        write_atomic(folder / "metadata.jsonl", (json.dumps(row) + "\n").encode())
    scores: Scores = {"prompts": float(len(rows)), "pictures": float(len(jobs))}
    return scores | ({SKIPPED: float(len(skipped))} if skipped else {})
