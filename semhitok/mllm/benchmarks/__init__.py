"""Public benchmarks of a unified model, on data that the user has: questions about images, and pictures from captions.

    pope     objects that are there or not            coco_pope_*.json, images
    gqa      compositional questions                  testdev_balanced_questions.json, images
    mme      yes or no, two questions an image        a folder for each subtask
    seed     multiple choice                          SEED-Bench.json, SEED-Bench-image
    textvqa  text in images                           TextVQA_0.5.1_val.json, train_images
    mjhq     Fréchet distance to 30,000 pictures      meta_data.json, mjhq30k_imgs
    geneval  pictures for that benchmark's evaluator  evaluation_metadata.jsonl

Questions get the suffixes that models of the LLaVA family are asked with. Files have the benchmarks' own formats, and
scores their own definitions. Answers go to OUT/answers.jsonl and pictures to OUT/images as they come; a run that was
stopped goes on where it was, and OUT/run.json keeps out another model or other data.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from semhitok._files import write_atomic
from semhitok._messages import progress
from semhitok.data.images import read_image, resize_crop, to_uint8
from semhitok.evaluation.fixed_batches import exact, rows_in_order
from semhitok.evaluation.frechet import FeatureStatistics, feature_network, frechet_distance
from semhitok.mllm.assistant import Assistant, Job, paint

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
SAMPLES = 4  # pictures of a prompt of GenEval
_NAMED = 3  # files a message lists

Scores = dict[str, float]


class Question(NamedTuple):
    """One question: id unique in its benchmark, image file, text as the model is asked it, and what scoring needs."""

    id: str
    image: Path
    text: str
    gold: Any
    group: str


class Benchmark(NamedTuple):
    """How a benchmark is read (from DATA, and the folder of images or None) and scored (texts in order of questions).

    Percentages are 0 to 100.
    """

    load: Callable[[Path, Path | None], list[Question]]
    score: Callable[[Sequence[Question], Sequence[str]], Scores]
    max_new_tokens: int = 16


# ---- POPE ----


def load_pope(data: Path, images: Path | None = None) -> list[Question]:
    """Lines {"question_id", "image", "text", "label"} of coco_pope_{random,popular,adversarial}.json."""
    folder = _images(data, images, "val2014", "images")
    questions = []
    for path in _annotations(data, "coco_pope_*.json", "coco/coco_pope_*.json", several=True):
        group = path.stem.removeprefix("coco_pope_")
        for row, where in _lines(path):
            label = _of(row, "label", where)
            if label not in ("yes", "no"):
                raise ValueError(f"{where}: label: expected yes or no, got {label!r}")
            id_ = f"{group}/{_of(row, 'question_id', where)}"
            image = folder / _of(row, "image", where)
            questions.append(Question(id_, image, _of(row, "text", where) + SHORT, label, group))
    return questions


def pope_answer(text: str) -> str:
    """ "yes" unless the first sentence has one of the words No, no, not: the benchmark's own rule."""
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Accuracy, precision, recall, F1 and share of yes, of each of the three sets, and their means over the sets."""
    scores: Scores = {}
    rows = _grouped(questions, answers)
    for group, pairs in rows.items():
        said = [(pope_answer(text) == "yes", q.gold == "yes") for q, text in pairs]
        true, false = sum(s and g for s, g in said), sum(s and not g for s, g in said)
        missed = sum(g and not s for s, g in said)
        figures = {
            "accuracy": _share(sum(s == g for s, g in said), len(said)),
            "precision": _share(true, true + false),
            "recall": _share(true, true + missed),
            "f1": _share(2 * true, 2 * true + false + missed),
            "yes": _share(true + false, len(said)),
        }
        scores |= {f"{group} {name}": value for name, value in figures.items()}
    for name in ("accuracy", "precision", "recall", "f1", "yes"):
        scores[name] = sum(scores[f"{group} {name}"] for group in rows) / len(rows)
    return scores


# ---- GQA ----


def load_gqa(data: Path, images: Path | None = None) -> list[Question]:
    """{id: {"imageId", "question", "answer", "types": {"structural"}}} of testdev_balanced_questions.json."""
    folder = _images(data, images, "images")
    (path,) = _annotations(data, "testdev_balanced_questions.json")
    questions = []
    for id_, row in _json(path, dict).items():
        where = f"{path}: {id_}"
        image = folder / f"{_of(row, 'imageId', where)}.jpg"
        group = row.get("types", {}).get("structural", "")
        gold = _of(row, "answer", where)
        questions.append(Question(id_, image, _of(row, "question", where) + SHORT, gold, group))
    return questions


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Share of answers that are the right one, but for case and a full stop; also of each structural type."""
    right = [text.strip().removesuffix(".").strip().lower() == q.gold for q, text in _pairs(questions, answers)]
    return _accuracies([q.group for q in questions], right)


# ---- MME ----

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def load_mme(data: Path, images: Path | None = None) -> list[Question]:
    """Subtasks' folders of NAME.txt, two lines "question<TAB>Yes" each, and images of these names.

    Both lie in the subtask's folder itself, or in questions_answers_YN and images below it; `images` is None.
    """
    if images is not None:
        raise ValueError(f"--images: expected none, as they lie beside the questions, got {images}")
    questions = []
    for subtask in (*PERCEPTION, *COGNITION):
        folder = data / subtask
        if not folder.is_dir():
            continue
        inner = (folder / "questions_answers_YN").is_dir()
        texts, pictures = (folder / "questions_answers_YN", folder / "images") if inner else (folder, folder)
        files = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix in (".jpg", ".png", ".jpeg")}
        for path in sorted(texts.glob("*.txt")):
            lines = [line for line in _text(path).splitlines() if line.strip()]
            if len(lines) != 2:
                raise ValueError(f"{path}: expected two questions, got {len(lines)}")
            for n, line in enumerate(lines):
                text, tab, gold = line.strip().partition("\t")
                gold = gold.strip().lower()
                if not tab or gold not in ("yes", "no"):
                    raise ValueError(f"{path}: expected a question, a tab, and Yes or No, got {line!r:.80}")
                image = files.get(path.stem, pictures / f"{path.stem}.jpg")
                questions.append(Question(f"{subtask}/{path.stem}/{n}", image, text + SHORT, gold, subtask))
    if not questions:
        raise ValueError(f"{data}: expected folders of subtasks such as existence, with questions, found none")
    return questions


def mme_answer(text: str) -> str:
    """yes, no or other, by the first four letters: the benchmark's own rule."""
    begin = text.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in begin), "other")


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Accuracy and accuracy+ (both questions of an image right) of each subtask, and the sums of both over subtasks."""
    scores: Scores = {}
    sums = {}
    for subtask, pairs in _grouped(questions, answers).items():
        images = collections.defaultdict(list)
        for q, text in pairs:
            images[q.id.rpartition("/")[0]].append(mme_answer(text) == q.gold)
        accuracy = _share(sum(map(sum, images.values())), len(pairs))
        plus = _share(sum(map(all, images.values())), len(images))
        scores |= {f"{subtask} accuracy": accuracy, f"{subtask} accuracy+": plus}
        sums[subtask] = accuracy + plus
    for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
        found = [sums[subtask] for subtask in subtasks if subtask in sums]
        if found:
            scores[f"{name}, sum of {len(found)}"] = sum(found)
    return scores


# ---- SEED-Bench ----

_CHOICES = ("a", "b", "c", "d")


def load_seed(data: Path, images: Path | None = None) -> list[Question]:
    """Image questions of {"questions": [{"question_id", "question", "choice_a", ..., "answer", "data_id", ...}]}."""
    folder = _images(data, images, "SEED-Bench-image", "images")
    (path,) = _annotations(data, "SEED-Bench.json")
    content = _json(path, dict)
    names = {number: name for name, number in content.get("question_type", {}).items()}
    questions = []
    for row in _of(content, "questions", str(path)):
        where = f"{path}: question {_of(row, 'question_id', str(path))}"
        if row.get("data_type", "image") != "image":
            continue
        choices = {c.upper(): str(_of(row, f"choice_{c}", where)) for c in _CHOICES}
        gold = _of(row, "answer", where)
        if gold not in choices:
            raise ValueError(f"{where}: answer: expected one of {', '.join(choices)}, got {gold!r}")
        text = "\n".join([_of(row, "question", where), *(f"{letter}. {c}" for letter, c in choices.items())])
        kind = row.get("question_type_id")
        group = names.get(kind, str(kind))
        image = folder / str(_of(row, "data_id", where))
        questions.append(Question(str(row["question_id"]), image, text + LETTER, (gold, choices), group))
    return questions


def seed_answer(text: str, choices: Mapping[str, str]) -> str:
    """The letter that an answer is, or whose choice it is, or that it begins with, before . : ) or a space; or ""."""
    text = text.strip()
    found = re.match(r"\(?([A-D])(?:[.:)]+|\s|$)", text)
    if found and found[0] == text:
        return found[1]
    # "A dog" is a choice before it is the letter A.
    said = text.removesuffix(".").lower()
    same = [letter for letter, choice in choices.items() if choice.strip().removesuffix(".").lower() == said]
    return same[0] if same else found[1] if found else ""


def score_seed(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Share of right letters, over all questions and of each type."""
    right = [seed_answer(text, q.gold[1]) == q.gold[0] for q, text in _pairs(questions, answers)]
    return _accuracies([q.group for q in questions], right)


# ---- TextVQA ----


def load_textvqa(data: Path, images: Path | None = None) -> list[Question]:
    """{"data": [{"question_id", "image_id", "question", "answers": ten texts}]} of TextVQA_0.5.1_val.json."""
    folder = _images(data, images, "train_images", "images")
    (path,) = _annotations(data, "TextVQA_0.5.1_val.json")
    questions = []
    for row in _of(_json(path, dict), "data", str(path)):
        where = f"{path}: question {_of(row, 'question_id', str(path))}"
        gold = _of(row, "answers", where)
        if not isinstance(gold, list) or len(gold) != 10:
            raise ValueError(f"{where}: answers: expected ten, got {gold!r:.80}")
        image = folder / f"{_of(row, 'image_id', where)}.jpg"
        text = _of(row, "question", where)
        questions.append(Question(str(row["question_id"]), image, text + SHORT, gold, ""))
    return questions


def vqa_accuracy(text: str, gold: Sequence[str]) -> float:
    """Mean over all choices of nine of the ten human answers of min(1, those that are the same / 3)."""
    said, given = normalise(text), [normalise(answer) for answer in gold]
    same = sum(answer == said for answer in given)
    return sum(min(1.0, (same - (answer == said)) / 3) for answer in given) / len(given)


def score_textvqa(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    """Mean VQA accuracy."""
    return {"accuracy": 100 * _mean([vqa_accuracy(text, q.gold) for q, text in _pairs(questions, answers)])}


_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"} | {
    "seven": "7", "eight": "8", "nine": "9", "ten": "10"
}  # fmt: skip
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Without any one of its apostrophes each is still meant; and one that the rule has the other way round.
_CONTRACTIONS = {
    word[:n] + word[n + 1 :]: word for word in _CONTRACTED.split() for n, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(text: str) -> str:
    """An answer as VQA compares it: lower case, no articles and punctuation, numbers as digits, apostrophes put back.

    Source: the evaluation of VQA (Antol et al. 2015) as TextVQA's uses it, with its peculiarities.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        # Beside a space it goes; between letters it becomes one.
        cleaned = cleaned.replace(mark, "" if f"{mark} " in text or f" {mark}" in text else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", cleaned).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


BENCHMARKS = {
    "pope": Benchmark(load_pope, score_pope),
    "gqa": Benchmark(load_gqa, score_gqa),
    "mme": Benchmark(load_mme, score_mme),
    "seed": Benchmark(load_seed, score_seed),
    "textvqa": Benchmark(load_textvqa, score_textvqa),
}
PICTURES = ("mjhq", "geneval")


def evaluate(
    name: str,
    data: str | os.PathLike[str],
    assistant: Assistant,
    out: str | os.PathLike[str],
    *,
    model: str = "",
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
) -> Scores:
    """Ask all questions of a benchmark that have no answer in `out` yet, and score them.

    Args:
        name: of `BENCHMARKS`.
        data: the benchmark's folder, or its file of questions.
        out: folder of answers.jsonl and scores.json, of this run alone.
        model: what stands for the model in OUT/run.json: see `fingerprint`.
        images: folder of the images, where it is not inside `data` under the benchmark's own name.

    Raises:
        OSError, ValueError: files that are missing or not as the benchmark has them, or `out` of another run.
    """
    benchmark = BENCHMARKS[name]
    questions = benchmark.load(Path(data), None if images is None else Path(images))
    _check_questions(questions)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    asked = hashlib.sha256(repr([(q.id, q.image.name, q.text, q.gold) for q in questions]).encode()).hexdigest()
    _check_run(out, {"benchmark": name, "questions": asked, **_of_model(assistant, model)})
    answers = ask(assistant, questions, out / "answers.jsonl", batch_size, benchmark.max_new_tokens)
    scores = benchmark.score(questions, [answers[q.id] for q in questions])
    write_atomic(out / "scores.json", (json.dumps({"questions": len(questions), **scores}, indent=2) + "\n").encode())
    return scores


def ask(
    assistant: Assistant, questions: Sequence[Question], path: Path, batch_size: int, max_new_tokens: int
) -> dict[str, str]:
    """All answers by id; those not in the file yet are asked for, greedily, and added to it batch by batch.

    The file holds a line {"id", "question", "answer"} for each. What a killed process left of a line is taken away.

    Raises:
        ValueError: a line of another question, one twice, or another process at work on the file.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: expected no other process to write it, found one") from None
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        file.truncate(whole)
        known = {q.id for q in questions}
        answers: dict[str, str] = {}
        for number, line in enumerate(content[:whole].splitlines(), start=1):
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
        for batch in _batches(left, batch_size, "questions"):
            texts = assistant.answer(
                [q.text for q in batch], assistant.read(q.image for q in batch), max_new_tokens=max_new_tokens
            )
            rows = [{"id": q.id, "question": q.text, "answer": t} for q, t in zip(batch, texts, strict=True)]
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
            answers |= {row["id"]: row["answer"] for row in rows}
    return answers


# ---- pictures ----


def mjhq(
    data: str | os.PathLike[str],
    assistant: Assistant,
    out: str | os.PathLike[str],
    *,
    model: str = "",
    images: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    features: str = "inception",
    **drawing: Any,
) -> Scores:
    """The Fréchet distance of pictures drawn from the captions of MJHQ-30K to that set's own.

    DATA/meta_data.json is {id: {"category", "prompt"}}, mjhq30k_imgs/CATEGORY/ID.jpg the pictures, which are resized to
    the size of those drawn: figures of models of another size are not comparable. Caption n is drawn with seed + n.

    Args:
        features: see `semhitok.evaluation.frechet.feature_network`; "inception" makes it the FID.
        drawing: of `Assistant.draw`. Other arguments, errors: see `evaluate`.
    """
    data, out = Path(data), Path(out)
    folder = _images(data, None if images is None else Path(images), "mjhq30k_imgs")
    (path,) = _annotations(data, "meta_data.json")
    jobs, references = [], []
    for n, (id_, row) in enumerate(_json(path, dict).items()):
        category, caption = (str(_of(row, key, f"{path}: {id_}")) for key in ("category", "prompt"))
        for name, value in (("id", id_), ("category", category)):
            if not re.fullmatch(r"[\w\- ]+", value):
                raise ValueError(f"{path}: {name}: expected letters and digits, got {value!r:.80}")
        jobs.append(Job(out / "images" / category / f"{id_}.png", caption, seed + n))
        references.append(folder / category / f"{id_}.jpg")
    _check_files(references)
    label, network = feature_network(features, assistant.model.device)  # told before the long work
    drawn = _draw("mjhq", jobs, assistant, out, model, batch_size, seed, drawing)
    sets = {"reference": references, "drawn": drawn}
    statistics = {name: _statistics(paths, assistant.image_size, network, name) for name, paths in sets.items()}
    distance = frechet_distance(statistics["reference"], statistics["drawn"])
    scores = {"fid" if label == "rfid" else label: distance, "pictures": float(len(jobs))}
    write_atomic(out / "scores.json", (json.dumps(scores, indent=2) + "\n").encode())
    return scores


def geneval(
    data: str | os.PathLike[str],
    assistant: Assistant,
    out: str | os.PathLike[str],
    *,
    model: str = "",
    batch_size: int = 8,
    seed: int = 0,
    **drawing: Any,
) -> Scores:
    """Four pictures of each prompt of GenEval, in the folders that its evaluator reads.

    DATA, or evaluation_metadata.jsonl in it, has lines {"tag", "include", "prompt", ...}. Line n becomes
    OUT/images/0000n/metadata.jsonl and samples/0000k.png of the seeds seed + 4 n + k. Arguments, errors: see `mjhq`.
    """
    out = Path(out)
    (path,) = _annotations(Path(data), "evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
    jobs, rows = [], []
    for n, (row, where) in enumerate(_lines(path)):
        caption, folder = str(_of(row, "prompt", where)), out / "images" / f"{n:05}"
        jobs += [Job(folder / "samples" / f"{k:05}.png", caption, seed + SAMPLES * n + k) for k in range(SAMPLES)]
        rows.append((folder, row))
    drawn = _draw("geneval", jobs, assistant, out, model, batch_size, seed, drawing)
    for folder, row in rows:
        write_atomic(folder / "metadata.jsonl", (json.dumps(row) + "\n").encode())
    return {"prompts": float(len(rows)), "pictures": float(len(drawn))}


def fingerprint(folder: str | os.PathLike[str]) -> str:
    """SHA-256 of a saved model's config and weights."""
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]:
        with open(path, "rb") as file:
            digest.update(path.name.encode() + b"\n")
            while block := file.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _draw(
    name: str,
    jobs: Sequence[Job],
    assistant: Assistant,
    out: Path,
    model: str,
    batch_size: int,
    seed: int,
    drawing: Mapping[str, Any],
) -> list[Path]:
    """Draw what is not there yet; all files, in order."""
    if not jobs:
        raise ValueError(f"{name}: expected at least one prompt, got none")
    out.mkdir(parents=True, exist_ok=True)
    prompts = hashlib.sha256(repr([job.caption for job in jobs]).encode()).hexdigest()
    _check_run(out, {"benchmark": name, "prompts": prompts, **_of_model(assistant, model), "seed": seed, **drawing})
    for folder in sorted({job.path.parent for job in jobs}):
        folder.mkdir(parents=True, exist_ok=True)
    left = [job for job in jobs if not job.path.exists()]
    for batch in _batches(left, batch_size, "pictures"):
        for _ in paint(assistant, batch, batch_size, **drawing):
            pass
    return [job.path for job in jobs]


def _statistics(paths: Sequence[Path], size: int, network: Callable[[Tensor], Tensor], label: str) -> FeatureStatistics:
    statistics = FeatureStatistics()
    bar = progress(paths, label)
    images = (to_uint8(resize_crop(read_image(path), size))[None] for path in bar)
    with exact():
        for rows in rows_in_order(images, lambda group: {"features": network(group)}):
            statistics.update(rows["features"])
    return statistics


# ---- files ----


def _annotations(data: Path, *names: str, several: bool = False) -> list[Path]:
    """The benchmark's own files: `data` itself, or those below it that the first fitting pattern finds."""
    if data.is_file():
        return [data]
    for name in names:
        found = sorted(data.glob(name))
        if found:
            return found if several else found[:1]
    raise FileNotFoundError(f"{data}: expected {names[0]} there, found none")


def _images(data: Path, given: Path | None, *names: str) -> Path:
    """The folder of the images: the one given, or the first of these names beside the annotations."""
    if given is not None:
        if not given.is_dir():
            raise FileNotFoundError(f"--images: no folder {given}")
        return given
    base = data.parent if data.is_file() else data
    for name in names:
        if (base / name).is_dir():
            return base / name
    raise FileNotFoundError(f"{base}: expected the images in {names[0]} there, or --images, found none")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, got other bytes") from None


def _json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(content, kind):
        raise ValueError(
            f"{path}: expected a JSON {'object' if kind is dict else 'list'}, got {type(content).__name__}"
        )
    return content


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    """JSON objects of a file's lines, and what to call each in a message."""
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected JSON, got {error}") from None
            yield row, where


def _of(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, dict) or key not in row:
        got = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: expected an object with {key!r}, got {got!s:.80}")
    return row[key]


def _check_questions(questions: Sequence[Question]) -> None:
    if not questions:
        raise ValueError("data: expected at least one question, got none")
    counts = collections.Counter(q.id for q in questions)
    if len(counts) != len(questions):
        raise ValueError(f"data: expected every question once, got {counts.most_common(1)[0][0]!r} more often")
    _check_files(q.image for q in questions)


def _check_files(paths: Iterable[Path]) -> None:
    missing = [str(path) for path in dict.fromkeys(paths) if not path.is_file()]
    if missing:
        more = f", and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise FileNotFoundError(f"images: {len(missing)} missing: {', '.join(missing[:_NAMED])}{more}")


def _of_model(assistant: Assistant, model: str) -> dict[str, Any]:
    return {"model": model, "codebooks": assistant.tokenizer.codebook_hash}


def _check_run(out: Path, settings: Mapping[str, Any]) -> None:
    """OUT/run.json, written once; a folder keeps its run."""
    path = out / "run.json"
    if not path.exists():
        write_atomic(path, (json.dumps(settings, indent=2) + "\n").encode())
        return
    found = _json(path, dict)
    for name in dict.fromkeys([*settings, *found]):
        if settings.get(name) != found.get(name):
            raise ValueError(
                f"--out: {out} is of a run with another {name}: expected {found.get(name)!s:.20}, "
                f"got {settings.get(name)!s:.20}"
            )


# ---- sums ----


def _batches(items: Sequence[Any], size: int, label: str) -> Iterator[Sequence[Any]]:
    with progress(items, label) as bar:
        for start in range(0, len(items), size):
            yield items[start : start + size]
            bar.update(len(items[start : start + size]))


def _pairs(questions: Sequence[Question], answers: Sequence[str]) -> list[tuple[Question, str]]:
    if len(questions) != len(answers) or not answers:
        raise ValueError(f"answers: expected {len(questions)}, one for each question, got {len(answers)}")
    return list(zip(questions, answers, strict=True))


def _grouped(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[tuple[Question, str]]]:
    groups: dict[str, list[tuple[Question, str]]] = {}
    for pair in _pairs(questions, answers):
        groups.setdefault(pair[0].group, []).append(pair)
    return groups


def _accuracies(groups: Sequence[str], right: Sequence[bool]) -> Scores:
    """Percentage right, of all and of each group."""
    scores = {"accuracy": 100 * _mean(right)}
    for group in dict.fromkeys(groups):
        if group:
            of_group = [r for g, r in zip(groups, right, strict=True) if g == group]
            scores[f"{group} accuracy"] = 100 * _mean(of_group)
    return scores


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(part: int, whole: int) -> float:
    """A percentage; 0 of nothing."""
    return 100 * part / whole if whole else 0.0
