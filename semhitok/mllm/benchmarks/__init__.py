"""Public benchmarks of a unified model, on data that you have: questions about images, and pictures from captions.

    pope     whether an object is in the image        coco_pope_*.json, images
    gqa      compositional questions                  testdev_balanced_questions.json, images
    mme      yes or no, two questions an image        a folder for each subtask
    seed     multiple choice                          SEED-Bench.json, SEED-Bench-image
    textvqa  text in images                           TextVQA_0.5.1_val.json, train_images
    mjhq     Fréchet distance to 30,000 pictures      meta_data.json, mjhq30k_imgs
    geneval  pictures for that benchmark's evaluator  evaluation_metadata.jsonl

Questions get the suffixes that models of the LLaVA family are asked with. File formats and scores are those of the
benchmarks. Answers are written to OUT/answers.jsonl and pictures to OUT/images as they come. A run that was stopped
resumes; OUT/run.json makes sure that it has the same model, data and settings.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from semhitok.mllm.assistant import Assistant
from semhitok.mllm.benchmarks import geneval, gqa, mjhq, mme, pope, seed, textvqa
from semhitok.mllm.benchmarks.questions import Scores
from semhitok.mllm.benchmarks.run import SKIPPED as SKIPPED
from semhitok.mllm.benchmarks.run import Benchmark, Drawing, Questions, Run, fingerprint

__all__ = ["BENCHMARKS", "Benchmark", "Run", "Scores", "evaluate", "find", "fingerprint"]

BENCHMARKS: dict[str, Benchmark] = {
    "pope": Questions(pope.load, pope.score),
    "gqa": Questions(gqa.load, gqa.score),
    "mme": Questions(mme.load, mme.score),
    "seed": Questions(seed.load, seed.score),
    "textvqa": Questions(textvqa.load, textvqa.score),
    "mjhq": Drawing(mjhq.draw),
    "geneval": Drawing(geneval.draw),
}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"BENCHMARK: expected one of {', '.join(BENCHMARKS)}, got {name!r}")
    return BENCHMARKS[name]


def evaluate(
    name: str,
    data: str | os.PathLike[str],
    assistant: Assistant,
    out: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] | None = None,
    **settings: Any,
) -> Scores:
    """Run a benchmark, or resume it, and score it. For the arguments see `Run`.

    Raises:
        OSError, ValueError: files are missing or malformed, or `out` belongs to another run.
    """
    folder = None if images is None else Path(images)
    return find(name).run(Run(name, Path(data), assistant, Path(out), images=folder, **settings))
