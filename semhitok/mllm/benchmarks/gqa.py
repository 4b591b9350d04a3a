"""GQA: compositional questions with answers of a word or two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from semhitok.data.skipped import Skipped
from semhitok.mllm.benchmarks.files import data_files, field, image_folder, read_items
from semhitok.mllm.benchmarks.questions import SHORT, Question, Scores, accuracies


def load(data: Path, images: Path | None, skipped: Skipped) -> list[Question]:
    """{id: {"imageId", "question", "answer", "types": {"structural"}}} of testdev_balanced_questions.json."""
    folder = image_folder(data, images, "images")
    (path,) = data_files(data, "testdev_balanced_questions.json")
    questions = []
    for id_, row in read_items(path, skipped):
        where = f"{path}: {id_}"
        with skipped.errors(where):
            image = folder / f"{field(row, 'imageId')}.jpg"
            types = row.get("types")
            category = types.get("structural", "") if isinstance(types, dict) else ""
            gold = field(row, "answer")
            questions.append(Question(id_, image, field(row, "question") + SHORT, gold, str(category)))
    return questions


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Percentage of right answers, ignoring case and a full stop at the end; also of each structural type."""
    return accuracies(questions, answers, lambda text, gold: text.strip().removesuffix(".").strip().lower() == gold)
