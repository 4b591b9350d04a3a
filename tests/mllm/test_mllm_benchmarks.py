"""Public benchmarks: files in their own formats, scores worked out by hand, runs that are killed and go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmark_files import picture, write_pope
from PIL import Image

pytest.importorskip("transformers")

from mllm_small import assert_refused, save, small_assistant

from semhitok.cli import eval_mllm
from semhitok.data.images import read_image, to_uint8
from semhitok.data.skipped import Skipped
from semhitok.evaluation.frechet import FeatureStatistics, feature_network, frechet_distance
from semhitok.mllm import Sampling, benchmarks
from semhitok.mllm.benchmarks import gqa, mme, pope, seed, textvqa
from semhitok.mllm.benchmarks.questions import SHORT


@pytest.fixture(scope="module")
def assistant():
    return small_assistant()


def load(benchmark, data, images=None):
    skipped = Skipped()
    questions = benchmark.load(data, images, skipped)
    assert len(skipped) == 0
    return questions


def assert_left_out(capsys, benchmark, data, images, ids, problems):
    """The questions with these ids are loaded; the others are named with these problems, in order."""
    capsys.readouterr()
    skipped = Skipped()
    assert [q.id for q in benchmark.load(data, images, skipped)] == ids
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(skipped) == len(problems)
    assert all(line.startswith("semhitok: skipped: ") and p in line for line, p in zip(lines, problems, strict=True))


# ---- the benchmarks, by hand ----


def test_pope(tmp_path, capsys):
    write_pope(tmp_path)
    questions = load(pope, tmp_path)
    assert [q.category for q in questions] == ["adversarial"] * 2 + ["popular"] * 2 + ["random"] * 4
    assert questions[4].text == f"Is there a dog?{SHORT}" and questions[4].id == "random/1"
    assert all(q.image.is_file() for q in questions)
    said = ["No.", "Yes", "yes", "There is no dog", "Yes, it is", "No", "yes", "It is not. Yes"]
    scores = pope.score(questions, said)
    # random: yes is said of a yes and of a no
    expected = {"accuracy": 50, "precision": 50, "recall": 50, "f1": 50, "yes": 50}
    assert {name: scores[f"random {name}"] for name in expected} == expected
    expected = {"accuracy": 100, "precision": 100, "recall": 100, "f1": 100, "yes": 50}
    assert {name: scores[f"popular {name}"] for name in expected} == expected
    expected = {"accuracy": 50, "precision": 0, "recall": 0, "f1": 0, "yes": 50}
    assert {name: scores[f"adversarial {name}"] for name in expected} == expected
    assert scores["accuracy"] == pytest.approx(200 / 3) and scores["f1"] == 50
    assert [pope.answer_of(t) for t in ("Nothing", "maybe", "Now, no", "yes. no", "")] == [
        "yes", "yes", "no", "yes", "yes",
    ]  # fmt: skip
    (path,) = tmp_path.glob("*random.json")
    assert len(load(pope, path, tmp_path / "val2014")) == 4
    good = {"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "no"}
    rows = [{**good, "label": "oui"}, {"question_id": 1}, {**good, "image": 7}, {**good, "question_id": []}, [], good]
    lines = [*(json.dumps(row).encode() for row in rows), b"\xff{}", b"[" * 100_000]
    path.write_bytes(b"\n".join(lines))
    assert_left_out(
        capsys, pope, path, tmp_path / "val2014", ["random/1"],
        [
            "random.json: line 1: label: expected yes or no, got 'oui'",
            "line 2: expected an object with 'label', got",
            "line 3: image: expected str, got 7",
            "line 4: question_id: expected int or str, got []",
            "line 5: expected an object with 'label', got list",
            "line 7: expected JSON, got",
            "line 8: expected JSON, got values nested too deep",
        ],
    )  # fmt: skip


def test_gqa(tmp_path, capsys):
    content = {
        "201": {"imageId": "n1", "question": "Is it red?", "answer": "no", "types": {"structural": "verify"}},
        "202": {"imageId": "n2", "question": "What is it?", "answer": "red car", "types": {"structural": "query"}},
        "203": {"imageId": "n2", "question": "Who?", "answer": "man", "types": {"structural": "query"}},
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(content))
    (tmp_path / "images").mkdir()
    questions = load(gqa, tmp_path)
    assert [q.image.name for q in questions] == ["n1.jpg", "n2.jpg", "n2.jpg"]
    scores = gqa.score(questions, ["No.", " red car", "a man"])
    assert scores == {"accuracy": pytest.approx(200 / 3), "verify accuracy": 100, "query accuracy": 50}
    content |= {"204": content["203"] | {"types": []}, "205": content["203"] | {"question": None}, "206": "Who?"}
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(content))
    problems = ["json: 205: question: expected str, got None", "json: 206: expected an object with 'imageId', got str"]
    assert_left_out(capsys, gqa, tmp_path, None, ["201", "202", "203", "204"], problems)
    # JSON's own way would be that the last of equal keys counts; and a byte that is not UTF-8 is one of a question
    row = b'{"imageId": "n1", "question": "caf\xe9?", "answer": "\\ud800"}'
    (tmp_path / "testdev_balanced_questions.json").write_bytes(b'{"1": %b, "2": %b, "1": {}}' % (row, row))
    assert_left_out(capsys, gqa, tmp_path, None, ["1", "2"], ["questions.json: 1: expected once, got it again"])
    first, _ = gqa.load(tmp_path, None, Skipped())
    assert first.text == f"caf\ufffd?{SHORT}" and first.gold == "\ufffd"


def test_mme(tmp_path, capsys):
    for subtask, texts in (("existence", ""), ("landmark", "questions_answers_YN"), ("code_reasoning", "")):
        for name in ("a", "b"):
            text = "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            path = tmp_path / subtask / texts / f"{name}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            picture(tmp_path / subtask / ("images" if texts else "") / f"{name}.{'png' if name == 'b' else 'jpg'}")
    questions = load(mme, tmp_path)
    assert [q.id for q in questions[:2]] == ["existence/a/0", "existence/a/1"] and len(questions) == 12
    assert all(q.image.is_file() for q in questions) and questions[0].text == "Is it? Please answer yes or no." + SHORT
    existence = ["Yes", "no", "yes", "yes"]  # 3 of 4; one image of two wholly
    landmark = ["Yes, it is", "No.", "Perhaps", "No"]  # 3 of 4; one of two
    code = ["no", "yes", "", "the answer is yes"]  # none
    scores = mme.score(questions, existence + landmark + code)
    assert scores == {
        "existence accuracy": 75, "existence accuracy+": 50, "landmark accuracy": 75, "landmark accuracy+": 50,
        "code_reasoning accuracy": 0, "code_reasoning accuracy+": 0,
        "perception, sum of 2": 250, "cognition, sum of 1": 0,
    }  # fmt: skip
    ids = [q.id for q in questions if not q.id.startswith("existence/a")]
    (tmp_path / "existence" / "a.txt").write_text("Is it?\tYes\n")
    assert_left_out(capsys, mme, tmp_path, None, ids, ["a.txt: expected two questions, got 1"])
    (tmp_path / "existence" / "a.txt").write_text("Is it?\tYes\nIs it? No\n")
    problem = "a.txt: expected a question, a tab, and Yes or No, got 'Is it? No'"
    assert_left_out(capsys, mme, tmp_path, None, ids, [problem])
    (tmp_path / "existence" / "a.txt").write_bytes(b"Is it?\tYes\n\xff\tNo\n")
    assert_left_out(capsys, mme, tmp_path, None, ids, ["a.txt: expected UTF-8 text, got other bytes"])
    (tmp_path / "existence" / "a.txt").rename(tmp_path / "existence" / "a.TXT")
    (tmp_path / "existence" / "a.TXT").write_text("\ufeffIs it?\tYes\nIs it not?\tNo\n")
    picture(tmp_path / "existence" / "a.bmp")
    (tmp_path / "Existence").mkdir()
    (tmp_path / "landmark" / "images").rename(tmp_path / "landmark" / "pictures")
    capsys.readouterr()
    skipped = Skipped()
    questions = mme.load(tmp_path, None, skipped)
    assert questions[0].text == "Is it?" + SHORT and questions[0].image.name == "a.bmp" and len(questions) == 12
    err = capsys.readouterr().err
    assert "Existence: passed over, as it is no subtask" in err and len(skipped) == 1
    assert "a.jpg: expected one image of a name, used is a.bmp" in err
    with pytest.raises(ValueError, match="expected folders of subtasks"):
        load(mme, tmp_path / "existence")


def test_seed(tmp_path, capsys):
    row = {"data_type": "image", "question": "What?", "choice_a": "A cat", "choice_b": "A dog", "choice_c": "Car"}
    row |= {"choice_d": "B", "answer": "B", "question_type_id": 1}
    rows = [row | {"question_id": str(n), "data_id": f"{n}_x"} for n in range(4)]
    rows[2] |= {"question_type_id": 5}
    rows[3] |= {"data_type": "video"}
    content = {"questions": rows, "question_type": {"Scene Understanding": 1, "Instances Counting": 5}}
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    (tmp_path / "SEED-Bench-image").mkdir()
    questions = load(seed, tmp_path)
    assert [q.image.name for q in questions] == ["0_x", "1_x", "2_x"]  # as they are: without suffix
    assert questions[0].text == (
        "What?\nA. A cat\nB. A dog\nC. Car\nD. B\nAnswer with the option's letter from the given choices directly."
    )
    scores = seed.score(questions, ["B.", "C", "A dog"])
    assert scores == {
        "accuracy": pytest.approx(200 / 3), "Scene Understanding accuracy": 50, "Instances Counting accuracy": 100,
    }  # fmt: skip
    rows[0] |= {"answer": "E"}
    rows[1] |= {"choice_c": None}
    content["questions"] = [*rows, None, {"question": "What?"}]
    (tmp_path / "SEED-Bench.json").write_text(json.dumps(content))
    problems = [
        "questions, number 1: answer: expected one of A, B, C, D, got 'E'",
        "questions, number 2: choice_c: expected str or int or float, got None",
        "SEED-Bench.json: questions, number 5: expected an object with 'question_id', got NoneType",
        "SEED-Bench.json: questions, number 6: expected an object with 'question_id', got ['question']",
    ]
    assert_left_out(capsys, seed, tmp_path, None, ["2"], problems)
    choices = questions[0].gold[1] | {"D": "Dog"}
    said = {
        "A": "A",
        "(C) Car": "C",
        "a dog.": "B",
        "Bad": "",
        "B: dog": "B",
        "It is A": "",
        "": "",
        "D because": "D",
        "(C).": "C",
    }
    assert {text: seed.answer_of(text, choices) for text in said} == said


def test_textvqa(tmp_path, capsys):
    answers = ["nokia"] * 2 + ["Nokia."] + ["a nokia"] + ["noka"] * 2 + ["none"] * 4
    row = {"question_id": 34602, "image_id": "003a", "question": "what is the brand?", "answers": answers}
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [row, row | {"question_id": 34603}]}))
    (tmp_path / "train_images").mkdir()
    questions = load(textvqa, tmp_path)
    assert questions[0].id == "34602" and questions[0].image == tmp_path / "train_images" / "003a.jpg"
    # four agree: 3 of the others by those who said so, 4 by the others, so always 1; of two, 1 or 2 others agree
    assert textvqa.vqa_accuracy("The Nokia", answers) == 1
    assert textvqa.vqa_accuracy("noka", answers) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert textvqa.vqa_accuracy("zero", answers) == 1  # "none" is 0
    assert textvqa.vqa_accuracy("samsung", answers) == 0
    scores = textvqa.score(questions, ["nokia", "noka"])
    assert scores == {"accuracy": pytest.approx(50 * (1 + 0.6))}
    rows = [row | {"answers": ["a"]}, row | {"answers": [1] * 10}, row]
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": rows}))
    problems = [f"{n}: answers: expected ten texts, got {got}" for n, got in enumerate(("['a']", "[1, 1"), start=1)]
    assert_left_out(capsys, textvqa, tmp_path, None, ["34602"], problems)
    (tmp_path / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": {}}))
    with pytest.raises(ValueError, match=r"data: expected list, got \{\}"):
        load(textvqa, tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("it's 5.50", "it 's 5.50"),
        ("1,000", "1000"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("re-do - it!", "redo it"),
        ("twas  oclock\n", "'twas o'clock"),
        ("a.b. 3.", "ab 3"),
        ("", ""),
    ],
)
def test_normalised_answers(text, expected):
    assert textvqa.normalise(text) == expected


# ---- running them ----


def write_gqa(folder, count=7):
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        str(n): {"imageId": f"n{n}", "question": "what colour is it ?", "answer": "red", "types": {}}
        for n in range(count)
    }
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(content))
    for n in range(count):
        picture(folder / "images" / f"n{n}.jpg", (30 * n, 255 - 30 * n, 99))
    return folder


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_answers_every_question_once(assistant, tmp_path):
    data, out = write_gqa(tmp_path / "gqa"), tmp_path / "out"
    scores = benchmarks.evaluate("gqa", data, assistant, out, batch_size=3)
    rows = rows_of(out / "answers.jsonl")
    assert [row["id"] for row in rows] == [str(n) for n in range(7)]
    questions = load(gqa, data)
    expected = assistant.answer([q.text for q in questions], assistant.read(q.image for q in questions))
    full = [assistant.answer([q.text], assistant.read([q.image]), max_new_tokens=16)[0] for q in questions]
    assert [row["answer"] for row in rows] == full and all(f in e for f, e in zip(full, expected, strict=True))
    assert json.loads((out / "scores.json").read_text()) == {"questions": 7, **scores}
    # again: nothing is asked
    before = (out / "answers.jsonl").read_bytes()
    assert benchmarks.evaluate("gqa", data, assistant, out) == scores
    assert (out / "answers.jsonl").read_bytes() == before


def test_questions_about_unreadable_images_are_left_out(assistant, tmp_path, capsys):
    data, out = write_gqa(tmp_path / "gqa"), tmp_path / "out"
    for n in (2, 6):
        (data / "images" / f"n{n}.jpg").write_text("hello")
    scores = benchmarks.evaluate("gqa", data, assistant, out, batch_size=2)
    assert scores["skipped"] == 2 and json.loads((out / "scores.json").read_text())["questions"] == 7
    assert [row["id"] for row in rows_of(out / "answers.jsonl")] == list("01345")
    err = capsys.readouterr().err
    assert "skipped: question 2: " in err and "n6.jpg" in err
    # one that is missing, a row that is none, and a question that comes twice
    (data / "images" / "n3.jpg").unlink()
    path = data / "testdev_balanced_questions.json"
    content = json.loads(path.read_text()) | {"7": {"imageId": "n1", "question": 1, "answer": "red"}}
    path.write_text(json.dumps(content))
    scores = benchmarks.evaluate("gqa", data, assistant, tmp_path / "more", batch_size=2)
    assert scores["skipped"] == 4 and json.loads((tmp_path / "more" / "scores.json").read_text())["questions"] == 8
    err = capsys.readouterr().err
    assert "skipped: question 3: " in err and "No such file" in err and "7: question: expected str, got 1" in err
    twice = benchmarks.Questions(lambda *arguments: 2 * gqa.load(*arguments), gqa.score)
    run = benchmarks.Run("gqa", data, assistant, tmp_path / "twice")
    assert twice.run(run)["skipped"] == 4 + 7
    assert "question 0: expected once, got it again as number 8" in capsys.readouterr().err
    for path in (data / "images").iterdir():
        path.write_text("hello")
    with pytest.raises(ValueError, match="none of 7 questions could be asked about an image that can be read"):
        benchmarks.evaluate("gqa", data, assistant, tmp_path / "none")


def test_questions_that_cannot_be_asked_are_left_out(assistant, tmp_path, capsys):
    write_pope(tmp_path)
    (path,) = tmp_path.glob("*random.json")
    first = json.loads(path.read_text().splitlines()[0])
    texts = ["is it ? " * 200, "<image> is it ?", "\ud800 is it ?", "is it ?"]
    rows = [first | {"question_id": n, "text": text} for n, text in enumerate(texts)]
    rows += [first | {"question_id": 4, "image": "x" * 300 + ".jpg"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = benchmarks.evaluate("pope", path, assistant, tmp_path / "out", images=tmp_path / "val2014", batch_size=4)
    assert scores["skipped"] == 3
    assert [row["id"] for row in rows_of(tmp_path / "out" / "answers.jsonl")] == ["random/2", "random/3"]
    err = capsys.readouterr().err
    for problem in ("0: prompt: expected fewer than", "1: images: expected 2, one for each", "4: "):
        assert f"question random/{problem}" in err
    prompts = [{"prompt": text} for text in texts]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    scores = benchmarks.evaluate("geneval", tmp_path, assistant, tmp_path / "drawn")
    assert scores == {"prompts": 2, "pictures": 8, "skipped": 2}
    assert sorted(path.name for path in (tmp_path / "drawn" / "images").iterdir()) == ["00002", "00003"]


def test_a_stopped_run_goes_on(assistant, tmp_path, monkeypatch):
    data, out = write_gqa(tmp_path / "gqa"), tmp_path / "out"
    whole = tmp_path / "whole"
    benchmarks.evaluate("gqa", data, assistant, whole, batch_size=2)
    asked, answer = [], assistant.answer

    def stop(questions, images, **options):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.extend(questions)
        return answer(questions, images, **options)

    monkeypatch.setattr(assistant, "answer", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmarks.evaluate("gqa", data, assistant, out, batch_size=2)
    path = out / "answers.jsonl"
    assert len(rows_of(path)) == 4 and not (out / "scores.json").exists()
    # and a line that a crash left half
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    monkeypatch.setattr(assistant, "answer", answer)
    benchmarks.evaluate("gqa", data, assistant, out, batch_size=2)
    assert rows_of(path) == rows_of(whole / "answers.jsonl")


def test_answers_of_others_are_not_mixed_in(assistant, tmp_path):
    data, out = write_gqa(tmp_path / "gqa", 2), tmp_path / "out"
    benchmarks.evaluate("gqa", data, assistant, out, model="a")
    with pytest.raises(ValueError, match="of a run with another model: expected a, got b"):
        benchmarks.evaluate("gqa", data, assistant, out, model="b")
    path = out / "answers.jsonl"
    lines = path.read_text().splitlines()
    for content, words in (
        ([*lines, lines[0]], "line 3: question '0' is answered twice"),
        ([lines[0].replace('"0"', '"9"')], "line 1: question '9' is not of this benchmark"),
        (["{}"], "line 1: expected an answer, got b'{}'"),
    ):
        path.write_text("\n".join(content) + "\n")
        with pytest.raises(ValueError, match=words):
            benchmarks.evaluate("gqa", data, assistant, out, model="a")
    write_gqa(data, 3)
    with pytest.raises(ValueError, match="of a run with another questions"):
        benchmarks.evaluate("gqa", data, assistant, out, model="a")
    for path in (data / "images").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"images: all missing: .*n0\.jpg, .*n1\.jpg, .*n2\.jpg"):
        benchmarks.evaluate("gqa", data, assistant, out, model="a")


# It answers three questions, then waits to be killed.
KILLED = """
import itertools, sys, time
from semhitok.mllm.assistant import Assistant
encode, calls = Assistant.encode, itertools.count()
def stopping(self, images):
    if next(calls) == 3:
        time.sleep(600)
    return encode(self, images)
Assistant.encode = stopping
from semhitok.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_command_goes_on(assistant, tmp_path, run):
    data, out = write_gqa(tmp_path / "gqa", 12), tmp_path / "out"
    model, tokenizer = save(assistant, tmp_path)
    arguments = ["eval-mllm", "gqa", data, model, "--tokenizer", tokenizer, "--out", out, "--device", "cpu"]
    path = out / "answers.jsonl"
    environment = os.environ | {"PYTHONPATH": str(Path(benchmarks.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *map(str, arguments), "--batch-size", "1"], env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or path.read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        # two at once would answer twice
        result = run(*arguments)
        assert_refused(result, "expected no other process to write it, found one")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    had = rows_of(path)[:3]
    code, printed, err = run(*arguments, "--batch-size", "4")
    assert (code, err) == (0, []) and "accuracy" in printed
    rows = rows_of(path)
    assert rows[:3] == had and [row["id"] for row in rows] == [str(n) for n in range(12)]
    assert json.loads((out / "run.json").read_text())["model"] == benchmarks.fingerprint(model)


def test_command_refuses(assistant, tmp_path, run):
    model, tokenizer = save(assistant, tmp_path)
    common = (model, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    (tmp_path / "data").mkdir()
    result = run("eval-mllm", "gqa", tmp_path / "data", *common)
    assert_refused(result, "expected the images in images there, or --images, found none")
    (tmp_path / "data" / "images").mkdir()
    result = run("eval-mllm", "gqa", tmp_path / "data", *common)
    assert_refused(result, "expected testdev_balanced_questions.json there, found none")
    (tmp_path / "data" / "testdev_balanced_questions.json").write_text("[")
    assert_refused(run("eval-mllm", "gqa", tmp_path / "data", *common), "questions.json: expected JSON, got")
    result = run("eval-mllm", "gaq", tmp_path / "data", *common)
    assert_refused(result, "BENCHMARK: expected one of pope, gqa, mme, seed, textvqa, mjhq, geneval, got 'gaq'")


def test_the_command_describes_every_benchmark():
    assert all(f" {name}" in eval_mllm.__doc__.partition("\n")[0] for name in benchmarks.BENCHMARKS)


# ---- pictures ----


def test_geneval_layout_and_resume(assistant, tmp_path, monkeypatch):
    rows = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a red circle"},
        {"tag": "colors", "include": [{"class": "bench", "count": 1, "color": "blue"}], "prompt": "blue"},
    ]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, drawn, draw = tmp_path / "out", [], assistant.draw

    def stop(captions, seeds, **options):
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.extend(zip(captions, seeds, strict=True))
        return draw(captions, seeds, **options)

    monkeypatch.setattr(assistant, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        benchmarks.evaluate("geneval", tmp_path, assistant, out, batch_size=3, seed=10)
    monkeypatch.setattr(assistant, "draw", lambda c, s, **o: drawn.extend(zip(c, s, strict=True)) or draw(c, s, **o))
    assert benchmarks.evaluate("geneval", tmp_path, assistant, out, batch_size=3, seed=10) == {
        "prompts": 2,
        "pictures": 8,
    }
    # seeds count on, and none is drawn twice
    assert drawn == [("a red circle", 10 + n) for n in range(4)] + [("blue", 14 + n) for n in range(4)]
    files = sorted(str(path.relative_to(out / "images")) for path in out.rglob("images/**/*") if path.is_file())
    samples = [f"{n:05}/samples/{k:05}.png" for n in range(2) for k in range(4)]
    assert files == sorted([*samples, "00000/metadata.jsonl", "00001/metadata.jsonl"])
    assert [json.loads((out / "images" / f"{n:05}" / "metadata.jsonl").read_text()) for n in range(2)] == rows
    with pytest.raises(ValueError, match="of a run with another seed: expected 10, got 11"):
        benchmarks.evaluate("geneval", tmp_path, assistant, out, seed=11)
    with open(tmp_path / "evaluation_metadata.jsonl", "a") as file:
        file.write('{"tag": "colors"}\nhello\n')
    assert benchmarks.evaluate("geneval", tmp_path, assistant, tmp_path / "more", batch_size=8) == {
        "prompts": 2, "pictures": 8, "skipped": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"of a run with another guidance: expected 2\.0, got 3\.0"):
        benchmarks.evaluate("geneval", tmp_path, assistant, out, seed=10, sampling=Sampling(guidance=3.0))


@pytest.mark.filterwarnings("ignore:.*images for features of dimension")
def test_mjhq_is_the_distance_of_what_was_drawn(assistant, tmp_path, run, capsys):
    captions = {"ab1": ("animals", "a red circle"), "cd2": ("people", "blue"), "ef3": ("people", "it is red .")}
    content = {id_: {"category": category, "prompt": caption} for id_, (category, caption) in captions.items()}
    (tmp_path / "meta_data.json").write_text(json.dumps(content))
    for n, (id_, (category, _)) in enumerate(captions.items()):
        path = tmp_path / "mjhq30k_imgs" / category / f"{id_}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * n, 20, 200)).save(path)
    model, tokenizer = save(assistant, tmp_path)
    features, out = "random:test_vit", tmp_path / "out"
    code, _, err = run(
        "eval-mllm", "mjhq", tmp_path, model, "--tokenizer", tokenizer, "--out", out, "--features", features,
        "--seed", "2", "--guidance", "1.5", "--device", "cpu", "--batch-size", "2",
    )  # fmt: skip
    assert code == 0, err
    drawn = [out / "images" / category / f"{id_}.png" for id_, (category, _) in captions.items()]
    for n, (path, (_, caption)) in enumerate(zip(drawn, captions.values(), strict=True)):
        expected = assistant.draw([caption], [2 + n], sampling=Sampling(guidance=1.5))[0]
        assert (read_image(path) - expected).abs().max() <= 0.501 / 255
    _, network = feature_network(features)
    statistics = []
    for paths in (sorted((tmp_path / "mjhq30k_imgs").rglob("*.jpg")), drawn):
        statistics.append(FeatureStatistics())
        for path in paths:
            statistics[-1].update(network(to_uint8(read_image(path))[None]).detach())
    scores = json.loads((out / "scores.json").read_text())
    assert scores["pictures"] == 3
    assert scores[f"frechet[{features}]"] == pytest.approx(frechet_distance(*statistics), rel=1e-3)
    (tmp_path / "mjhq30k_imgs" / "people" / "cd2.jpg").write_text("hello")
    code, _, err = run(
        "eval-mllm", "mjhq", tmp_path, model, "--tokenizer", tokenizer, "--out", out, "--features", features,
        "--seed", "2", "--guidance", "1.5", "--device", "cpu",
    )  # fmt: skip
    assert code == 3 and "cd2.jpg" in "".join(err)
    assert json.loads((out / "scores.json").read_text())["skipped"] == 1
    content["../x"] = content["ab1"]
    content["gh4"] = {"category": "people", "prompt": None}
    (tmp_path / "meta_data.json").write_text(json.dumps(content))
    scores = benchmarks.evaluate("mjhq", tmp_path, assistant, tmp_path / "other", features=features)
    assert (scores["pictures"], scores["skipped"]) == (3, 3)
    err = capsys.readouterr().err
    assert "../x: id: expected at most 60 letters and digits, got '../x'" in err
    assert "gh4: prompt: expected str, got None" in err
    shutil.rmtree(tmp_path / "mjhq30k_imgs" / "people")
    (tmp_path / "mjhq30k_imgs" / "animals" / "ab1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="images: all missing"):
        benchmarks.evaluate("mjhq", tmp_path, assistant, tmp_path / "none", features=features)
