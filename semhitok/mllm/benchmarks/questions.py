"""Questions about images, and sums over their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Scores = dict[str, float]  # percentages from 0 to 100, where a benchmark does not define them otherwise

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class Question(NamedTuple):
    """One question.

    id: unique in its benchmark.
    image: its file.
    text: as the model is asked.
    gold: the right answer, as the benchmark's score needs it.
    category: of the questions that get a score of their own, or "".
    """

    id: str
    image: Path
    text: str
    gold: Any
    category: str


def pairs(questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[Question, str]]:
    """Each question with its answer.

    Raises:
        ValueError: no answers, or a wrong number of them.
    """
    if len(questions) != len(answers) or not answers:
        raise ValueError(f"answers: expected {len(questions)}, one for each question, got {len(answers)}")
    return list(zip(questions, answers, strict=True))


def by_category(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[tuple[Question, str]]]:
    """`pairs` of each category."""
    categories: dict[str, list[tuple[Question, str]]] = {}
    for pair in pairs(questions, answers):
        categories.setdefault(pair[0].category, []).append(pair)
    return categories


def accuracies(questions: Sequence[Question], right: Sequence[bool]) -> Scores:
    """Percentage of right answers, of all questions and of each category."""
    scores = {"accuracy": 100 * mean(right)}
    for category in dict.fromkeys(q.category for q in questions):
        if category:
            of_category = [r for q, r in zip(questions, right, strict=True) if q.category == category]
            scores[f"{category} accuracy"] = 100 * mean(of_category)
    return scores


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def percentage(part: int, whole: int) -> float:
    """100 * part / whole; 0 if `whole` is 0."""
    return 100 * part / whole if whole else 0.0
