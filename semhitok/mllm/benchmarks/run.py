"""Running a benchmark: questions or pictures in batches, what is done kept in a folder, so that a run can resume."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from semhitok._files import write_atomic
from semhitok._messages import progress
from semhitok.mllm.assistant import Assistant, Job, draw_files
from semhitok.mllm.benchmarks.files import check_files, read_object
from semhitok.mllm.benchmarks.questions import Question, Scores
from semhitok.mllm.generate import Sampling


class Settings(NamedTuple):
    """The arguments of `semhitok.mllm.benchmarks.evaluate` of these names."""

    model: str
    images: Path | None
    batch_size: int
    seed: int
    sampling: Sampling
    features: str


class Questions(NamedTuple):
    """A benchmark of questions about images.

    load: reads the questions from DATA and the folder of images, if one is given.
    score: of the questions and their answers.
    max_new_tokens: the most ids of an answer.
    """

    load: Callable[[Path, Path | None], list[Question]]
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    max_new_tokens: int = 16
    reads_images: bool = True

    def run(self, name: str, data: Path, assistant: Assistant, out: Path, settings: Settings) -> Scores:
        questions = self.load(data, settings.images)
        _check_questions(questions)
        contents = [(q.id, q.image.name, q.text, q.gold) for q in questions]
        _identify(out, name, {"questions": _sha256(contents)}, assistant, settings)
        answers = ask(assistant, questions, out / "answers.jsonl", settings.batch_size, self.max_new_tokens)
        scores = self.score(questions, [answers[q.id] for q in questions])
        write_scores(out, {"questions": len(questions), **scores})
        return scores


class Drawing(NamedTuple):
    """A benchmark of pictures that the model draws; `run` takes what `Questions.run` takes."""

    run: Callable[[str, Path, Assistant, Path, Settings], Scores]
    reads_images: bool = False


Benchmark = Questions | Drawing


def ask(
    assistant: Assistant, questions: Sequence[Question], path: Path, batch_size: int, max_new_tokens: int
) -> dict[str, str]:
    """All answers by id. Questions without an answer in the file are asked, greedily, and added batch by batch.

    The file has a line {"id", "question", "answer"} for each. An incomplete last line, of a killed process, is removed.

    Raises:
        ValueError: the file answers another question, or one twice, or another process is writing it.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: expected no other process to write it, found one") from None
        file.seek(0)
        content = file.read()
        end = content.rfind(b"\n") + 1
        file.truncate(end)
        known = {q.id for q in questions}
        answers: dict[str, str] = {}
        for number, line in enumerate(content[:end].splitlines(), start=1):
            try:
                row = json.loads(line)
                id_, answer = row["id"], row["answer"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}: line {number}: expected an answer, got {line!r:.80}") from None
            if id_ not in known or id_ in answers:
                problem = "answered twice" if id_ in answers else "not of this benchmark"
                raise ValueError(f"{path}: line {number}: question {id_!r} is {problem}")
            answers[id_] = answer
        left = [q for q in questions if q.id not in answers]
        for batch in batches(left, batch_size, "questions"):
            texts = assistant.answer(
                [q.text for q in batch], assistant.read(q.image for q in batch), max_new_tokens=max_new_tokens
            )
            rows = [{"id": q.id, "question": q.text, "answer": t} for q, t in zip(batch, texts, strict=True)]
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            answers |= {row["id"]: row["answer"] for row in rows}
    return answers


def draw(name: str, jobs: Sequence[Job], assistant: Assistant, out: Path, settings: Settings) -> list[Path]:
    """Draw the pictures whose files do not exist yet; the files of all, in order.

    Raises:
        ValueError: no pictures, or `out` belongs to another run.
    """
    if not jobs:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    prompts = _sha256([job.caption for job in jobs])
    _identify(
        out, name, {"prompts": prompts}, assistant, settings, {"seed": settings.seed, **settings.sampling.settings}
    )
    for folder in sorted({job.path.parent for job in jobs}):
        folder.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not job.path.exists()]
    for batch in batches(left, settings.batch_size, "pictures"):
        for _ in draw_files(assistant, batch, settings.batch_size, sampling=settings.sampling):
            pass
    return [job.path for job in jobs]


def batches(items: Sequence[Any], size: int, label: str) -> Iterator[Sequence[Any]]:
    """`items` in batches, under a progress bar."""
    with progress(items, label) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(len(items[start : start + size]))


def write_scores(out: Path, scores: Mapping[str, float]) -> None:
    """Write OUT/scores.json."""
    write_atomic(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of a saved model's config and weights."""
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + b"\n")
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _sha256(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()


def _check_questions(questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("data: expected at least one question, got none")
    ((id_, count),) = collections.Counter(q.id for q in questions).most_common(1)
    if count > 1:
        raise ValueError(f"data: expected every question once, got {id_!r} {count} times")
    check_files(q.image for q in questions)


def _identify(
    out: Path,
    name: str,
    data: Mapping[str, str],
    assistant: Assistant,
    settings: Settings,
    drawing: Mapping[str, Any] | None = None,
) -> None:
    """Write OUT/run.json, or check that it is there with the same content.

    Raises:
        ValueError: `out` belongs to another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    codebooks = assistant.image_tokenizer.codebook_hash
    own = {"benchmark": name, **data, "model": settings.model, "codebooks": codebooks, **(drawing or {})}
    if not path.exists():
        write_atomic(path, (json.dumps(own, indent=2) + "\n").encode())
        return
    found = read_object(path)
    for key in dict.fromkeys([*own, *found]):
        if own.get(key) != found.get(key):
            expected, got = found.get(key), own.get(key)
            raise ValueError(f"--out: {out} is of a run with another {key}: expected {expected!s:.20}, got {got!s:.20}")
