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

from semhitok.mllm.assistant import DRAWING, Assistant
from semhitok.mllm.benchmarks import geneval, gqa, mjhq, mme, pope, seed, textvqa
from semhitok.mllm.benchmarks.questions import Scores
from semhitok.mllm.benchmarks.run import Benchmark, Drawing, Questions, Settings, fingerprint
from semhitok.mllm.generate import Sampling

__all__ = ["BENCHMARKS", "Benchmark", "Scores", "evaluate", "find", "fingerprint"]

BENCHMARKS: dict[str, Benchmark] = {
    "pope": Questions(pope.load, pope.score),
    "gqa": Questions(gqa.load, gqa.score),
    "mme": Questions(mme.load, mme.score),
    "seed": Questions(seed.load, seed.score),
    "textvqa": Questions(textvqa.load, textvqa.score),
    "mjhq": Drawing(mjhq.run),
    "geneval": Drawing(geneval.run),
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
    model: str = "",
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    sampling: Sampling = DRAWING,
    features: str = "inception",
) -> Scores:
    """Run a benchmark, or resume it, and score it.

    Args:
        name: of `BENCHMARKS`.
        data: the benchmark's folder, or its file of questions or captions.
        assistant: the model. Answers are greedy.
        out: folder of this run's answers or pictures and scores.
        model: identifies the model in OUT/run.json; see `fingerprint`.
        images: folder of the images, if it is not in `data` under the benchmark's own name.
        batch_size: questions or pictures at a time.
        seed: of the first picture; each of the following gets the next number.
        sampling: how pictures are drawn.
        features: for mjhq, see `semhitok.evaluation.frechet.feature_network`; "inception" makes its distance the FID.

    Raises:
        OSError, ValueError: files are missing or malformed, or `out` belongs to another run.
    """
    settings = Settings(model, None if images is None else Path(images), batch_size, seed, sampling, features)
    return find(name).run(name, Path(data), assistant, Path(out), settings)
