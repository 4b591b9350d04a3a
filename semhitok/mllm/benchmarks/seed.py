"""SEED-Bench: multiple choice; its image questions only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from semhitok.data.skipped import Skipped
from semhitok.mllm.benchmarks.files import data_files, field, image_folder, read_content
from semhitok.mllm.benchmarks.questions import LETTER, Question, Scores, accuracies

CHOICES = ("a", "b", "c", "d")


def load(data: Path, images: Path | None, skipped: Skipped) -> list[Question]:
    """Image questions of {"questions": [{"question_id", "question", "choice_a", ..., "answer", "data_id", ...}]}."""
    folder = image_folder(data, images, "SEED-Bench-image", "images")
    (path,) = data_files(data, "SEED-Bench.json")
    content = read_content(path)
    types = content.get("question_type")
    names = {str(number): name for name, number in types.items()} if isinstance(types, dict) else {}
    questions = []
    for number, row in enumerate(field(content, "questions", list), start=1):
        where = f"{path}: questions, number {number}"
        with skipped.errors(where):
            id_ = str(field(row, "question_id", (int, str)))
            kind = row.get("data_type") or "image"
            if kind == "video":
                continue
            if kind != "image":
                raise ValueError(f"data_type: expected image or video, got {kind!r:.80}")
            choices = {c.upper(): str(field(row, f"choice_{c}", (str, int, float))) for c in CHOICES}
            gold = field(row, "answer")
            if gold not in choices:
                raise ValueError(f"answer: expected one of {', '.join(choices)}, got {gold!r}")
            text = "\n".join([field(row, "question"), *(f"{letter}. {c}" for letter, c in choices.items())])
            category = str(row.get("question_type_id"))
            image = folder / str(field(row, "data_id", (int, str)))
            questions.append(Question(id_, image, text + LETTER, (gold, choices), names.get(category, category)))
    return questions


def answer_of(text: str, choices: Mapping[str, str]) -> str:
    """The letter that an answer is, whose choice it is, or that it begins with (before . : ) or a space); else ""."""
    text = text.strip()
    found = re.match(r"\(?([A-D])(?:[.:)]+|\s|$)", text)
    if found and found[0] == text:
        return found[1]
    # "A dog" is a choice before it is the letter A.
    said = text.removesuffix(".").lower()
    same = [letter for letter, choice in choices.items() if choice.strip().removesuffix(".").lower() == said]
    return same[0] if same else found[1] if found else ""


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Percentage of right letters, of all questions and of each type."""
    return accuracies(questions, answers, lambda text, gold: answer_of(text, gold[1]) == gold[0])
