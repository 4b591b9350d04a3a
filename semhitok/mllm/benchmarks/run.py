"""Running a benchmark: questions or pictures in batches, what is done kept in a folder, so that a run can resume."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semhitok._files import parse_json, read_object, write_json
from semhitok._messages import progress
from semhitok.data.images import read_resized
from semhitok.data.skipped import Skipped
from semhitok.mllm.assistant import DRAWING, Assistant, Job, draw_files
from semhitok.mllm.benchmarks.files import check_any_exists, field
from semhitok.mllm.benchmarks.questions import Question, Scores
from semhitok.mllm.generate import Sampling

SKIPPED = "skipped"  # among the scores: questions or pictures left out, if there are any
MAX_NEW_TOKENS = 16  # the most ids of an answer


@dataclass(frozen=True)
class Run:
    """A benchmark of one model, with its results in a folder. Answers are greedy.

    features: for mjhq, see `semhitok.evaluation.frechet.feature_network`; "inception" makes its distance the FID.
    """

    name: str  # of the benchmark
    data: Path  # the benchmark's folder, or its file of questions or captions
    assistant: Assistant
    out: Path  # folder of this run's answers or pictures and scores
    model: str = ""  # identifies the model in OUT/run.json; see `fingerprint`
    images: Path | None = None  # their folder, if it is not in `data` under the benchmark's own name
    batch_size: int = 8  # questions or pictures at a time
    seed: int = 0  # of the first picture; each of the following gets the next number
    sampling: Sampling = DRAWING  # of pictures
    features: str = "inception"

    def identify(self, data: Mapping[str, str], **drawing: Any) -> None:
        """Write OUT/run.json, or check that it is there with the same content.

        Raises:
            ValueError: `out` belongs to another run.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / "run.json"
        codebooks = self.assistant.image_tokenizer.codebook_hash
        own = {"benchmark": self.name, **data, "model": self.model, "codebooks": codebooks, **drawing}
        if not path.exists():
            write_json(path, own)
            return
        found = read_object(path)
        for key in dict.fromkeys([*own, *found]):
            if own.get(key) != found.get(key):
                problem = f"expected {found.get(key)!s:.20}, got {own.get(key)!s:.20}"
                raise ValueError(f"--out: {self.out} is of a run with another {key}: {problem}")

    def ask(self, questions: Sequence[Question], skipped: Skipped) -> dict[str, str]:
        """The answers by id, without those to images that cannot be read.

        Questions without an answer in OUT/answers.jsonl are asked and added batch by batch.

        The file has a line {"id", "question", "answer"} for each. An incomplete last line, of a killed process, is
        removed.

        Raises:
            ValueError: the file answers another question, or one twice, or another process is writing it.
        """
        path = self.out / "answers.jsonl"
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
                    row = parse_json(line)
                    id_, answer = field(row, "id"), field(row, "answer")
                except ValueError:
                    raise ValueError(f"{path}: line {number}: expected an answer, got {line!r:.80}") from None
                if id_ not in known or id_ in answers:
                    problem = "answered twice" if id_ in answers else "not of this benchmark"
                    raise ValueError(f"{path}: line {number}: question {id_!r} is {problem}")
                answers[id_] = answer
            left = [q for q in questions if q.id not in answers]
            with progress(left, "questions") as bar:
                for start in range(0, len(left), self.batch_size):
                    asked, images = self._read(left[start : start + self.batch_size], skipped)
                    texts = self.assistant.answer([q.text for q in asked], images, max_new_tokens=MAX_NEW_TOKENS)
                    rows = [{"id": q.id, "question": q.text, "answer": t} for q, t in zip(asked, texts, strict=True)]
                    file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
                    file.flush()
                    os.fsync(file.fileno())
                    answers |= {row["id"]: row["answer"] for row in rows}
                    bar.update(min(self.batch_size, len(left) - start))
        return answers

    def _read(self, questions: Sequence[Question], skipped: Skipped) -> tuple[list[Question], list[Tensor]]:
        """The questions that can be asked about images that can be read, and those."""
        found: list[Question] = []
        pixels: list[Tensor] = []
        for question in questions:
            with skipped.errors(f"question {question.id}"):
                pixels.append(read_resized(question.image, self.assistant.image_size))
                found.append(question)
        asked: list[Question] = []
        images: list[Tensor] = []
        for question, image in zip(found, self.assistant.encode(torch.stack(pixels)) if pixels else [], strict=True):
            with skipped.errors(f"question {question.id}"):
                self.assistant.question_ids(question.text, image)
                asked.append(question)
                images.append(image)
        return asked, images

    def draw(self, jobs: Sequence[Job]) -> None:
        """Draw the pictures whose files do not exist yet.

        Raises:
            ValueError: no pictures, or `out` belongs to another run.
        """
        if not jobs:
            raise ValueError(f"{self.name}: expected at least one prompt, got none")
        captions = [job.caption for job in jobs]
        self.identify({"prompts": _sha256(captions)}, seed=self.seed, **self.sampling.settings)
        for folder in sorted({job.path.parent for job in jobs}):
            folder.mkdir(parents=True, exist_ok=True)
        left = [job for job in jobs if not job.path.exists()]
        with progress(left, "pictures") as bar:
            for _ in draw_files(self.assistant, left, self.batch_size, sampling=self.sampling):
                bar.update()

    def write_scores(self, scores: Mapping[str, float]) -> None:
        """Write OUT/scores.json."""
        write_json(self.out / "scores.json", scores)


class Questions(NamedTuple):
    """A benchmark of questions about images: how they are read from DATA and the folder of images, and scored."""

    load: Callable[[Path, Path | None, Skipped], list[Question]]
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    reads_images: bool = True

    def run(self, run: Run) -> Scores:
        skipped = Skipped()
        questions = _each_once(self.load(run.data, run.images, skipped), skipped)
        total = len(questions) + len(skipped)
        check_any_exists(q.image for q in questions)
        run.identify({"questions": _sha256([(q.id, q.image.name, q.text, q.gold) for q in questions])})
        answers = run.ask(questions, skipped)
        answered = [question for question in questions if question.id in answers]
        if not answered:
            raise ValueError(f"none of {len(questions)} questions could be asked about an image that can be read")
        scores = self.score(answered, [answers[q.id] for q in answered])
        if skipped:
            scores = {**scores, SKIPPED: float(len(skipped))}
        run.write_scores({"questions": total, **scores})
        return scores


class Drawing(NamedTuple):
    """A benchmark of pictures that the model draws."""

    run: Callable[[Run], Scores]
    reads_images: bool = False


Benchmark = Questions | Drawing


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


def _each_once(questions: Sequence[Question], skipped: Skipped) -> list[Question]:
    """The questions, without those whose id came before.

    Raises:
        ValueError: there are none.
    """
    found: dict[str, Question] = {}
    for number, question in enumerate(questions, start=1):
        if question.id in found:
            skipped(f"question {question.id}: expected once, got it again as number {number}")
        else:
            found[question.id] = question
    if not found:
        raise ValueError("data: expected at least one question, got none")
    return list(found.values())
