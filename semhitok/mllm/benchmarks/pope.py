"""POPE: whether an object is in the image, in three sets of questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from semhitok.data.skipped import Skipped
from semhitok.mllm.benchmarks.files import data_files, field, image_folder, read_lines
from semhitok.mllm.benchmarks.questions import SHORT, Question, Scores, by_category, percentage


def load(data: Path, images: Path | None, skipped: Skipped) -> list[Question]:
    """Lines {"question_id", "image", "text", "label"} of coco_pope_{random,popular,adversarial}.json."""
    folder = image_folder(data, images, "val2014", "images")
    questions = []
    for path in data_files(data, "coco_pope_*.json", "coco/coco_pope_*.json"):
        category = path.stem.removeprefix("coco_pope_")
        for _, row, where in read_lines(path, skipped):
            with skipped.errors(where):
                label = field(row, "label")
                if label not in ("yes", "no"):
                    raise ValueError(f"label: expected yes or no, got {label!r}")
                id_ = f"{category}/{field(row, 'question_id', (int, str))}"
                image = folder / field(row, "image")
                questions.append(Question(id_, image, field(row, "text") + SHORT, label, category))
    return questions


def answer_of(text: str) -> str:
    """no if the first sentence has one of the words No, no and not, otherwise yes: the benchmark's own rule."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Accuracy, precision, recall, F1 and share of yes, of each of the three sets, and their means over the sets."""
    scores: Scores = {}
    rows = by_category(questions, answers)
    for category, pairs in rows.items():
        said = [(answer_of(text) == "yes", q.gold == "yes") for q, text in pairs]
        true, false = sum(s and g for s, g in said), sum(s and not g for s, g in said)
        missed = sum(g and not s for s, g in said)
        figures = {
            "accuracy": percentage(sum(s == g for s, g in said), len(said)),
            "precision": percentage(true, true + false),
            "recall": percentage(true, true + missed),
            "f1": percentage(2 * true, 2 * true + false + missed),
            "yes": percentage(true + false, len(said)),
        }
        scores |= {f"{category} {name}": value for name, value in figures.items()}
    for name in ("accuracy", "precision", "recall", "f1", "yes"):
        scores[name] = sum(scores[f"{category} {name}"] for category in rows) / len(rows)
    return scores
