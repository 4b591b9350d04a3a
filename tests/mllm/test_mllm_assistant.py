"""The unified model in use: chat with memory, pictures of caption and seed alone, other tokenizers refused."""

import io

import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from mllm_runs import small_tokenizer
from mllm_small import CAPTIONS, assert_refused, save, small_assistant

from semhitok.mllm import Sampling, UnifiedMLLM, generate, join, pack, prompts
from semhitok.mllm.assistant import Assistant, Chat, Job, draw_files, file_stem, grid
from semhitok.mllm.generate import GREEDY, Draw, Grammar


@pytest.fixture(scope="module")
def assistant():
    return small_assistant()


@pytest.fixture(scope="module")
def saved(assistant, tmp_path_factory):
    return save(assistant, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    draw = torch.Generator().manual_seed(0)
    for n in range(3):
        pixels = torch.randint(256, (20, 24, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{n}.png")
    return sorted(folder.iterdir())


# ---- reading and answering ----


@pytest.mark.parametrize("resolution_id", [False, True])
def test_images_are_what_training_makes_of_them(photos, resolution_id):
    from semhitok.data.images import read_image, resize_crop, to_uint8

    assistant = small_assistant(resolution_id=resolution_id)
    images = torch.stack([to_uint8(resize_crop(read_image(path), 16)) for path in photos]).float() / 255
    codes, vocabulary = assistant.image_tokenizer.encode(images), assistant.model.vocabulary
    found = assistant.read(photos)
    for image, code in zip(found, codes, strict=True):
        assert len(image) == 6 + resolution_id
        assert torch.equal(vocabulary.images(image)[0], code.flatten())
    assert assistant.read([]) == []


def test_answers_are_what_the_model_writes_after_the_prompt(assistant, photos):
    images = assistant.read(photos)
    questions = ["what colour is it ?", "where is it ?", ""]
    vocabulary, text_tokenizer = assistant.model.vocabulary, assistant.text_tokenizer
    expected = []
    for image, question in zip(images, questions, strict=True):
        asked = prompts.understanding(text_tokenizer, vocabulary, image, question)
        (row,) = generate(
            assistant.model, [asked], max_new_tokens=9, images=False, sampling=GREEDY, num_text_ids=len(text_tokenizer),
            eos_id=text_tokenizer.eos_token_id,
        )  # fmt: skip
        expected.append(text_tokenizer.decode(row, skip_special_tokens=True).strip())
    assert assistant.answer(questions, images, max_new_tokens=9) == expected
    assert len(set(expected)) > 1 and all(expected)
    alone = [assistant.answer([q], [i], max_new_tokens=9)[0] for q, i in zip(questions, images, strict=True)]
    assert alone == expected
    hot = {"max_new_tokens": 9, "sampling": Sampling(temperature=2.0)}
    assert assistant.answer(questions, images, **hot) == assistant.answer(questions, images, **hot)
    assert assistant.answer(questions, images, **hot) != assistant.answer(questions, images, seed=5, **hot)
    with pytest.raises(ValueError, match="images: expected 2, one for each question, got 3"):
        assistant.answer(questions[:2], images)


@pytest.mark.parametrize(("head", "resolution_id"), [("flat", False), ("hierarchical", True)])
@pytest.mark.parametrize("question", ["", "what colour is it ?"])
def test_likelihoods_are_sums_of_the_losses_of_training(photos, head, resolution_id, question):
    assistant = small_assistant(head=head, resolution_id=resolution_id)
    images = assistant.read(photos)
    answers = ["it is red .", "blue", "a small green cross at top left", "an unknown word", "blue"]
    expected = torch.empty(len(images), len(answers))
    for row, image in enumerate(images):
        for column, answer in enumerate(answers):
            own = assistant.text_tokenizer, assistant.model.vocabulary
            packed = pack([join(*prompts.understanding_parts(*own, image, question, answer))], 40)
            with torch.no_grad():
                losses = assistant.model(**packed._asdict(), reduce=False).loss
            expected[row, column] = -losses.sum()
    for batch_size in (1, 3, 50):
        found = assistant.log_likelihood(answers, images, question=question, batch_size=batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.std(0).min() > 1e-3  # images matter
    torch.testing.assert_close(found[:, 1], found[:, 4])


def test_likelihoods_of_nothing_are_refused(assistant, photos):
    images = assistant.read(photos[:1])
    for answers, some in (([], images), (["blue"], [])):
        with pytest.raises(ValueError, match="expected one or more of both"):
            assistant.log_likelihood(answers, some)
    with pytest.raises(ValueError, match="expected an answer with content"):
        assistant.log_likelihood(["blue", " "], images)
    longest = assistant.model.config.text_config.max_position_embeddings - 6
    assert assistant.log_likelihood(["blue " * (longest - 1)], images).isfinite().all()
    with pytest.raises(ValueError, match="expected at most 64 ids with the question, got 65"):
        assistant.log_likelihood(["blue " * longest], images)


def test_answers_end_where_positions_end(assistant, photos):
    (image,) = assistant.read(photos[:1])
    vocabulary = assistant.model.vocabulary
    room = 64 - len(prompts.understanding(assistant.text_tokenizer, vocabulary, image, "it " * 40))
    text = assistant.answer(["it " * 40], [image], max_new_tokens=500, sampling=Sampling(temperature=2.0))[0]
    assert 0 < len(text.split()) <= room
    with pytest.raises(ValueError, match="prompt: expected fewer than 64 ids, the model's positions, got"):
        assistant.answer(["it " * 60], [image])


def test_a_chat_remembers(assistant, photos, monkeypatch):
    images = assistant.read(photos[:2])
    chat, seen = Chat(assistant, images), []
    monkeypatch.setattr(assistant, "reply", lambda messages, images, **_: seen.append(messages) or f"red {len(seen)}")
    assert [chat.ask("where is it ?"), chat.ask("it is red .")] == ["red 1", "red 2"]
    assert seen[1] == [
        {"role": "user", "content": "<image>\n<image>\nwhere is it ?"},
        {"role": "assistant", "content": "red 1"},
        {"role": "user", "content": "it is red ."},
    ]
    assert seen[0] == seen[1][:1] and len(chat.messages) == 4
    with pytest.raises(ValueError, match="question: expected text without <image>"):
        chat.ask("<image>")


def test_empty_answers_are_forgotten(assistant, photos, monkeypatch):
    chat, seen = Chat(assistant, assistant.read(photos[:1])), []
    monkeypatch.setattr(assistant, "reply", lambda messages, images, **_: seen.append(messages) or "")
    assert chat.ask("it") == chat.ask("is") == ""
    assert seen[1] == [{"role": "user", "content": "<image>\nis"}]


def test_answers_come_piece_by_piece(assistant, photos):
    images = assistant.read(photos[:1])
    messages, pieces = [{"role": "user", "content": "<image>\nwhere is it ?"}], []
    options = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5)}
    answers = ((seed, assistant.reply(messages, images, seed=seed, **options)) for seed in range(99))
    seed, whole = next((seed, text) for seed, text in answers if len(text.split()) > 3)
    told = assistant.reply(messages, images, seed=seed, callback=pieces.append, **options)
    assert told == whole == "".join(pieces).strip() and len(pieces) > 2
    with pytest.raises(ValueError, match="streamer: expected one prompt without guidance, got 2 rows"):
        generate(assistant.model, [[1], [2]], max_new_tokens=2, streamer=object())


# ---- drawing ----


@pytest.mark.parametrize("head", ["flat", "hierarchical"])
def test_a_picture_depends_on_its_caption_and_seed_alone(head):
    assistant = small_assistant(head=head)
    options = {"sampling": Sampling(guidance=2.0, top_k=9, top_p=0.95)}
    jobs = [(caption, seed) for caption in CAPTIONS for seed in (3, 4)]
    together = assistant.draw(*zip(*jobs, strict=True), **options)
    assert together.shape == (6, 3, 16, 16)
    for batch in (jobs[::-1], jobs[1:4], jobs[2:3], jobs * 2):
        pictures = assistant.draw(*zip(*batch, strict=True), **options)
        for picture, job in zip(pictures, batch, strict=True):
            torch.testing.assert_close(picture, together[jobs.index(job)], rtol=0, atol=1e-5)
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[2])
    with pytest.raises(ValueError, match="seeds: expected 1, one for each caption, got 2"):
        assistant.draw(["blue"], [1, 2])


@pytest.mark.parametrize("hierarchical", [False, True])
def test_rows_draw_with_their_own_generators_from_the_right_distribution(assistant, hierarchical):
    grammar = Grammar(assistant.model.config)
    vocabulary, count = assistant.model.vocabulary, 4000
    ids = torch.full((count, 2), vocabulary.begin_of_image)
    scores = torch.full((1, vocabulary.size), -torch.inf)
    scores[0, vocabulary.text_size : vocabulary.begin_of_image] = torch.randn(
        15, generator=torch.Generator().manual_seed(0)
    )
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    draw = Draw(grammar, Sampling(top_k=0 if hierarchical else 8, hierarchical=hierarchical), generator=generators)
    drawn = draw(ids, scores.expand(count, -1)).isfinite().int().argmax(1)
    kept = scores if hierarchical else scores.where(scores >= scores.topk(8).values[0, -1], torch.tensor(-torch.inf))
    share = torch.bincount(drawn, minlength=vocabulary.size) / count
    assert (share - kept.softmax(1)[0]).abs().max() < 0.03
    with pytest.raises(ValueError, match="generator: expected one or 2, one for each row, got 3"):
        Draw(grammar, generator=generators[:3])(ids[:2], scores.expand(2, -1))


def test_painted_files_say_how_they_came(assistant, tmp_path):
    jobs = [Job(tmp_path / f"{n}.png", caption, n + 7) for n, caption in enumerate(CAPTIONS)]
    done = list(draw_files(assistant, jobs, 2, sampling=Sampling(guidance=3.0, top_k=4)))
    assert [job for job, _ in done] == jobs
    for job, picture in done:
        with Image.open(job.path) as image:
            settings = {"guidance": "3.0", "temperature": "1.0", "top_k": "4", "top_p": "1.0"}
            assert image.text == {"caption": job.caption, "seed": str(job.seed), **settings}
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
        assert (pixels / 255 - picture).abs().max() <= 0.501 / 255


def test_grids_and_names():
    pictures = [torch.full((3, 4, 4), n / 10) for n in range(3)]
    sheet = grid(pictures, gap=1)
    assert sheet.shape == (3, 9, 9)
    assert torch.equal(sheet[:, 5:, :4], pictures[2]) and (sheet[:, 5:, 5:] == 1).all() and (sheet[:, 4] == 1).all()
    assert grid(pictures[:1]).shape == (3, 4, 4) and grid(pictures[:2], gap=0).shape == (3, 4, 8)
    assert file_stem("../a red: circle", 4) == "004-a_red_circle"
    assert file_stem("日本", 12) == "012-picture" and len(file_stem("x" * 500, 0)) < 80


# ---- other tokenizers, and the commands ----


def test_other_tokenizers_are_refused(assistant, saved, run, tmp_path, photos):
    text_tokenizer, other = assistant.text_tokenizer, small_tokenizer(1)
    hashes = assistant.image_tokenizer.codebook_hash[:12], other.codebook_hash[:12]
    with pytest.raises(ValueError, match=f"image_tokenizer: expected .* codebooks {hashes[0]}, got {hashes[1]}"):
        Assistant(assistant.model, text_tokenizer, other)
    other.save_pretrained(tmp_path / "other")
    model = saved[0]
    result = run("chat", model, "--tokenizer", tmp_path / "other", photos[0], "--question", "it")
    assert_refused(result, "chat", "the one that the model was trained with", *hashes)
    result = run("generate", model, "--tokenizer", tmp_path / "other", "it", "--out", tmp_path / "out")
    assert_refused(result, *hashes)
    assert not (tmp_path / "out").exists()
    unknown = UnifiedMLLM(type(assistant.model.config)(**{**assistant.model.config.to_dict(), "codebook_hash": None}))
    with pytest.raises(ValueError, match="unknown ones, got"):
        Assistant(unknown, text_tokenizer, assistant.image_tokenizer)


def test_chat_command(assistant, saved, run, photos, monkeypatch):
    model, tokenizer = saved
    images = assistant.read(photos[:2])
    chat = Chat(assistant, images)
    expected = [chat.ask(q, max_new_tokens=6) for q in ("where is it ?", "what colour is it ?")]
    common = ("chat", model, "--tokenizer", tokenizer, *photos[:2], "--max-new-tokens", 6, "--device", "cpu")
    code, out, err = run(*common, "--question", "where is it ?")
    assert (code, err) == (0, []) and out.strip() == expected[0]
    monkeypatch.setattr("sys.stdin", io.StringIO("where is it ?\n\n<image>\nwhat colour is it ?\n"))
    code, out, err = run(*common)
    assert code == 0 and [line.strip() for line in out.splitlines()] == expected
    assert len(err) == 1 and "expected text without <image>" in err[0]


def test_chat_command_samples(saved, run, photos):
    model, tokenizer = saved
    common = ("chat", model, photos[0], "--tokenizer", tokenizer, "--question", "it", "--temperature", "3")
    outs = [run(*common, "--seed", seed, "--top-p", "0.99")[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    assert_refused(run(*common[:-1], "-1"), "temperature: expected at least 0, got -1.0")


def test_generate_command(assistant, saved, run, tmp_path):
    model, tokenizer = saved
    (tmp_path / "captions.txt").write_text("blue\n\n  it is red . \n")
    common = ("generate", model, "--tokenizer", tokenizer, "--device", "cpu", "--guidance", "3", "--seed", "5")
    code, out, err = run(
        *common, "a red circle", "--prompts", tmp_path / "captions.txt", "--count", 3, "--out", tmp_path / "a",
        "--batch-size", "4",
    )  # fmt: skip
    assert (code, err) == (0, []) and "9 pictures of 3 captions" in out
    stems = ["000-a_red_circle", "001-blue", "002-it_is_red"]
    names = [f"{stem}-{end}.png" for stem in stems for end in ("5", "6", "7", "grid")]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(names)
    with Image.open(tmp_path / "a" / "001-blue-6.png") as image:
        assert image.text["caption"] == "blue" and image.text["seed"] == "6" and image.text["guidance"] == "3.0"
        drawn = image.tobytes()
    # the same seed, alone
    code, _, _ = run(*common[:-1], "6", "--prompts", tmp_path / "captions.txt", "--count", 1, "--out", tmp_path / "b")
    with Image.open(tmp_path / "b" / "000-blue-6.png") as image:
        assert image.tobytes() == drawn
    with Image.open(tmp_path / "a" / "001-blue-grid.png") as sheet:
        assert sheet.crop((18, 0, 34, 16)).tobytes() == drawn


def test_generate_command_refuses(saved, run, tmp_path):
    model, tokenizer = saved
    out = ("--out", tmp_path / "out")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    empty, binary, nothing = (tmp_path / name for name in ("empty.txt", "bytes.txt", "none"))
    common = ("generate", model, "--tokenizer", tokenizer)
    assert_refused(run(*common, "--prompts", empty, *out), "CAPTION: expected at least one")
    assert_refused(run(*common, "--prompts", binary, *out), "bytes.txt: expected UTF-8 text")
    assert_refused(run(*common, "--prompts", nothing, *out), "No such file")
    assert_refused(run("generate", nothing, "it", "--tokenizer", tokenizer, *out), "expected a folder of a saved model")
    assert_refused(run(*common, *out), "CAPTION: expected at least one")


def test_generate_command_names_settings_that_are_no_numbers(saved, run, tmp_path):
    model, tokenizer = saved
    common = ("generate", model, "it", "--tokenizer", tokenizer, "--out", tmp_path / "out")
    for name in ("guidance", "temperature"):
        for value in ("nan", "inf"):
            assert_refused(run(*common, f"--{name}", value), f"{name}: expected a finite number, got {value}")
        assert_refused(run(*common, f"--{name}=-2"), f"{name}: expected at least 0, got -2.0")
    assert_refused(run(*common, "--top-p", "0"), "top_p: expected more than 0 and at most 1, got 0.0")
    assert not (tmp_path / "out").exists()


def test_captions_and_questions_beyond_the_positions_are_named(assistant, saved, run, tmp_path, photos):
    model, tokenizer = saved
    long = "blue " * 80
    common = ("generate", model, "--tokenizer", tokenizer, "--count", 1, "--device", "cpu", "--out", tmp_path / "out")
    code, out, err = run(*common, "it", long, "blue")
    assert code == 3 and "2 pictures of 2 captions, 1 skipped" in out
    (line,) = (x for x in err if "skipped" in x)
    assert (
        "caption: expected at most 59 ids, as a picture takes 5 of 64 positions, got 8" in line and "blue blue" in line
    )
    names = ["000-it-0.png", "000-it-grid.png", "002-blue-0.png", "002-blue-grid.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with pytest.raises(ValueError, match="caption: expected at most 59 ids"):
        assistant.draw(["it", long], [0, 1])
    asked = run("chat", model, "--tokenizer", tokenizer, photos[0], "--question", long)
    assert_refused(asked, "prompt: expected fewer than 64 ids, the model's positions, got")
