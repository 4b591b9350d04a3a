"""TextVQA: questions about text in images, with ten human answers each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from semhitok.data.skipped import Skipped
from semhitok.mllm.benchmarks.files import data_files, field, image_folder, read_content
from semhitok.mllm.benchmarks.questions import SHORT, Question, Scores, accuracies


def load(data: Path, images: Path | None, skipped: Skipped) -> list[Question]:
    """{"data": [{"question_id", "image_id", "question", "answers": ten texts}]} of TextVQA_0.5.1_val.json."""
    folder = image_folder(data, images, "train_images", "images")
    (path,) = data_files(data, "TextVQA_0.5.1_val.json")
    questions = []
    for number, row in enumerate(field(read_content(path), "data", list), start=1):
        where = f"{path}: data, number {number}"
        with skipped.errors(where):
            id_ = str(field(row, "question_id", (int, str)))
            gold = field(row, "answers", list)
            if len(gold) != 10 or not all(isinstance(answer, str) for answer in gold):
                raise ValueError(f"answers: expected ten texts, got {gold!r:.80}")
            image = folder / f"{field(row, 'image_id')}.jpg"
            questions.append(Question(id_, image, field(row, "question") + SHORT, gold, ""))
    return questions


def vqa_accuracy(text: str, gold: Sequence[str]) -> float:
    """min(1, equal answers / 3), averaged over all choices of nine of the ten human answers."""
    said, given = normalise(text), [normalise(answer) for answer in gold]
    same = sum(answer == said for answer in given)
    return sum(min(1.0, (same - (answer == said)) / 3) for answer in given) / len(given)


def score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Mean VQA accuracy."""
    return accuracies(questions, answers, vqa_accuracy)


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {name: str(n) for n, name in enumerate(NAMES)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each is also recognised without one of its apostrophes; the rule has the last one the other way round.
CONTRACTIONS = {
    word[:n] + word[n + 1 :]: word for word in CONTRACTED.split() for n, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(text: str) -> str:
    """An answer as VQA compares it: lower case, no articles, no punctuation, numbers as digits, apostrophes restored.

    Source: the evaluation of VQA (Antol et al. 2015) as TextVQA uses it, peculiarities included.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in PUNCTUATION:
        # Beside a space it goes; between letters it becomes one.
        cleaned = cleaned.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", cleaned).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))
