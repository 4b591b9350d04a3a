"""Questions about images, and sums over their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Scores = dict[str, float]  # percentages from 0 to 100, where a benchmark does not define them otherwise

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


class Question(NamedTuple):
    """A question about an image."""

    id: str  # unique in its benchmark
    image: Path
    text: str  # as the model is asked
    gold: Any  # the right answer, as the benchmark's score needs it
    category: str  # of questions that have a score of their own, or ""


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


def accuracies(questions: Sequence[Question], answers: Sequence[str], value: Callable[[str, Any], float]) -> Scores:
    """100 times the mean of value(answer, gold), for all questions and for each category."""
    values: dict[str, list[float]] = {"accuracy": []}
    for q, text in pairs(questions, answers):
        for name in dict.fromkeys(["accuracy", f"{q.category} accuracy".strip()]):
            values.setdefault(name, []).append(value(text, q.gold))
    return {name: 100 * (sum(found) / len(found)) for name, found in values.items()}


def percentage(part: int, whole: int) -> float:
    """100 * part / whole; 0 if `whole` is 0."""
    return 100 * part / whole if whole else 0.0
