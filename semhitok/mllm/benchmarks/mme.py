"""MME: two yes-or-no questions an image, in subtasks of perception and cognition."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path

from semhitok._files import read_text
from semhitok._messages import warn
from semhitok.data.formats import is_image_name
from semhitok.data.skipped import Skipped
from semhitok.mllm.benchmarks.questions import SHORT, Question, Scores, by_category, percentage

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = (*PERCEPTION, *COGNITION)


def load(data: Path, images: Path | None, skipped: Skipped) -> list[Question]:
    """A folder for each subtask, with NAME.txt of two lines "question<TAB>Yes" each, and images of these names.

    Both are in the subtask's folder itself, or in questions_answers_YN and images in it; `images` must be None.
    """
    if images is not None:
        raise ValueError(f"--images: expected none, as they lie beside the questions, got {images}")
    questions = []
    for folder in sorted(path for path in data.iterdir() if path.is_dir() and path.name not in SUBTASKS):
        warn(f"{folder}: passed over, as it is no subtask")
    for subtask in SUBTASKS:
        folder = data / subtask
        if not folder.is_dir():
            continue
        inner = (folder / "questions_answers_YN").is_dir()
        texts, pictures = (folder / "questions_answers_YN", folder / "images") if inner else (folder, folder)
        files: dict[str, Path] = {}
        for path in sorted(pictures.iterdir()) if pictures.is_dir() else []:
            if is_image_name(path.name) and files.setdefault(path.stem, path) != path:
                skipped(f"{path}: expected one image of a name, used is {files[path.stem].name}")
        for path in sorted(path for path in texts.iterdir() if path.suffix.lower() == ".txt"):
            with skipped.errors():
                image = files.get(path.stem, pictures / f"{path.stem}.jpg")
                for n, (text, gold) in enumerate(_two_questions(path)):
                    questions.append(Question(f"{subtask}/{path.stem}/{n}", image, text + SHORT, gold, subtask))
    if not questions:
        raise ValueError(f"{data}: expected folders of subtasks such as existence, with questions, found none")
    return questions


def _two_questions(path: Path) -> list[tuple[str, str]]:
    """The questions in a file, and yes or no for each. Accuracy+ needs both, so an error costs both."""
    lines = [line for line in read_text(path).removeprefix("\ufeff").splitlines() if line.strip()]
    if len(lines) != 2:
        raise ValueError(f"{path}: expected two questions, got {len(lines)}")
    found = []
    for line in lines:
        text, tab, gold = line.strip().partition("\t")
        gold = gold.strip().lower()
        if not tab or gold not in ("yes", "no"):
            raise ValueError(f"{path}: expected a question, a tab, and Yes or No, got {line!r:.80}")
        found.append((text, gold))
    return found


def answer_of(text: str) -> str:
    """yes, no or other, by the first four letters: the benchmark's own rule."""
    begin = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in begin), "other")


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Accuracy and accuracy+ (both questions of an image right) of each subtask, and the sums of both over subtasks."""
    scores: Scores = {}
    sums = {}
    for subtask, pairs in by_category(questions, answers).items():
        images = collections.defaultdict(list)
        for q, text in pairs:
            images[q.id.rpartition("/")[0]].append(answer_of(text) == q.gold)
        accuracy = percentage(sum(map(sum, images.values())), len(pairs))
        plus = percentage(sum(map(all, images.values())), len(images))
        scores |= {f"{subtask} accuracy": accuracy, f"{subtask} accuracy+": plus}
        sums[subtask] = accuracy + plus
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [sums[subtask] for subtask in subtasks if subtask in sums]
        if found:
            scores[f"{name}, sum of {len(found)}"] = sum(found)
    return scores
