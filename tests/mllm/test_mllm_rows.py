"""Rows of packed samples: what is in them, how often, in which order, and the same after any stop."""

import copy
import itertools
import json
import tarfile
from collections import Counter
from io import BytesIO

import pytest
import torch
from mllm_runs import small_tokenizer, write_jsonl

transformers = pytest.importorskip("transformers")

from mllm_small import write_pictures  # noqa: E402

from semhitok.corpus.ids_file import save_codes  # noqa: E402
from semhitok.data.images import save_png  # noqa: E402
from semhitok.data.skipped import Skipped  # noqa: E402
from semhitok.mllm import UnifiedMLLMConfig, join, prompts  # noqa: E402
from semhitok.mllm.config import TASKS, RowsConfig, SourceConfig  # noqa: E402
from semhitok.mllm.rows import TrainingRows, WrongCodebook  # noqa: E402
from semhitok.mllm.sources import Records, open_source  # noqa: E402

TOKENIZER = small_tokenizer()
HASH = TOKENIZER.codebook_hash
CAPTIONS = [f"picture number {n}" for n in range(12)]
WORDS = prompts.word_tokenizer([*CAPTIONS, "what is it ?", "a long text without end ."])
MODEL = UnifiedMLLMConfig(
    transformers.AutoConfig.for_model("qwen2", vocab_size=64, hidden_size=8, num_attention_heads=1), 5, 3, 6, 4, 2, 16,
    codebook_hash=HASH,
)  # fmt: skip
VOCABULARY = MODEL.vocabulary


def codes(count, seed=0):
    return torch.randint(15, (count, 2, 2), generator=torch.Generator().manual_seed(seed))


def captioned(count=12, seed=0):
    return [{"caption": c, "codes": [x]} for c, x in zip(CAPTIONS, codes(count, seed), strict=False)]


def rows_of(*sources, model=MODEL, seed=0, rank=0, world_size=1, skipped=None, **settings):
    config = RowsConfig(**{"length": 24, "look_ahead": 4, "caption_drop": 0.0, "shuffle_buffer": 4, **settings})
    return TrainingRows(sources, config, model, WORDS, seed, rank=rank, world_size=world_size, skipped=skipped)


def members(micro, packed=None):
    """(ids, labels, task) of every sample in the rows, padding left out."""
    packed = packed or micro.packed
    found = []
    for n, (ids, labels, positions) in enumerate(zip(*packed, strict=True)):
        starts = [*positions.eq(0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            if not micro.padding[n, start]:
                assert not micro.padding[n, start:end].any()
                task = TASKS[int(micro.tasks[n, start])]
                assert micro.tasks[n, start:end].eq(TASKS.index(task)).all()
                found.append((tuple(ids[start:end].tolist()), tuple(labels[start:end].tolist()), task))
    return found


def take(data, count, batch_size=4, micro_batch=2, position=None):
    batches = data.batches(batch_size, micro_batch, 0, position)
    try:
        return [m for _ in range(count) for m in next(batches)], batches.position()
    finally:
        batches.close()


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        pairs = zip((*x.packed, x.tasks, x.images, x.places), (*y.packed, y.tasks, y.images, y.places), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


def write_tar(path, folder, numbers, texts):
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            for suffix, content in (("png", (folder / f"{n}.png").read_bytes()), *texts(n)):
                info = tarfile.TarInfo(f"{n:04}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))


# ---- what is in a row ----


def test_rows_hold_every_record_once_an_epoch_as_it_is_formatted():
    data = rows_of(Records(captioned(), "generation", codebook_hash=HASH), look_ahead=1)
    found = [m for micro in take(data, 30)[0] for m in members(micro)]
    expected = set()
    for record in captioned():
        image = VOCABULARY.image(record["codes"][0], HASH)
        sample = join(*prompts.generation_parts(WORDS, VOCABULARY, record["caption"], image))
        # no label before the first id
        expected.add((tuple(sample.input_ids.tolist()), (-100, *sample.labels[1:].tolist()), "generation"))
    counts = Counter(found)
    assert set(counts) == expected
    assert max(counts.values()) - min(counts.values()) <= 4  # the streams are not at the same place


def test_looking_ahead_leaves_less_padding():
    texts = [{"text": "text " * (1 + n * 7 % 19)} for n in range(50)]

    def padding(look_ahead):
        data = rows_of(Records(texts, "text"), look_ahead=look_ahead)
        return torch.cat([m.padding for m in take(data, 40)[0]]).float().mean()

    assert padding(16) < 0.5 * padding(1)


def test_mixture_and_dropped_captions_come_out_as_asked():
    texts = Records([{"text": "a long text"}], "text", weight=1)
    asked = Records(captioned(), "understanding", weight=3, question="what is it ?", codebook_hash=HASH)
    drawn = Records(captioned(), "generation", weight=4, codebook_hash=HASH)
    data = rows_of(texts, asked, drawn, caption_drop=0.25)
    found = [m for micro in take(data, 500)[0] for m in members(micro)]
    shares = {task: sum(m[2] == task for m in found) / len(found) for task in TASKS}
    assert len(found) > 3000
    assert shares == pytest.approx({"text": 1 / 8, "understanding": 3 / 8, "generation": 1 / 2}, abs=0.03)
    begin = VOCABULARY.begin_of_image
    dropped = [m[0][0] == begin for m in found if m[2] == "generation"]
    assert sum(dropped) / len(dropped) == pytest.approx(0.25, abs=0.04)
    assert all(len(m[0]) > 12 for m in found if m[2] == "understanding")  # captions are dropped nowhere else


def test_long_texts_are_cut_and_other_long_samples_passed_over(capfd):
    long = {"text": " ".join(["a long text without end ."] * 9)}
    data = rows_of(Records([long], "text"), look_ahead=2)
    whole = join(*prompts.text_parts(WORDS, VOCABULARY, long["text"])).input_ids
    found = [m[0] for micro in take(data, 6, 1, 1)[0] for m in members(micro)]
    assert [len(ids) for ids in found[:3]] == [24, 24, len(whole) - 48]
    assert torch.equal(torch.tensor(sum(found[:3], ())), whole)
    talk = {"messages": [{"role": "user", "content": long["text"]}, {"role": "assistant", "content": "a"}]}
    data = rows_of(Records([talk, *captioned()], "understanding", codebook_hash=HASH))
    batches = data.batches(2, 2)
    for _ in range(10):
        next(batches)
    assert len(batches.skipped) == 1
    assert "skipped: record 1: data.length: expected at least 56 for this sample, got 24" in capfd.readouterr().err


def test_the_first_of_several_captions_counts(tmp_path):
    one = {**captioned()[0], "codes": [captioned()[0]["codes"][0].tolist()], "codebook_hash": HASH}
    path = write_jsonl(tmp_path / "a.jsonl", [{**one, "caption": [one["caption"], "another one"]}])
    source = open_source(SourceConfig(str(path), "generation"), RowsConfig())
    same(take(rows_of(source), 2)[0], take(rows_of(Records([one], "generation")), 2)[0])
    assert list(source.texts(Skipped())) == [one["caption"]]


def test_samples_that_are_ready_are_taken_as_they_are():
    ready = join(([3, 4], False), ([5], True))
    data = rows_of(Records([ready], "text"), caption_drop=1.0)
    assert members(take(data, 1)[0][0])[0] == ((3, 4, 5), (-100, -100, 5), "text")


# ---- where they come from ----


@pytest.mark.parametrize("resolution_id", [False, True])
def test_pictures_in_files_give_the_rows_that_their_ids_give(tmp_path, resolution_id):
    ids = write_pictures(tmp_path / "pictures")
    model = UnifiedMLLMConfig(**{**MODEL.to_dict(), "resolution_id": resolution_id})
    talk = [{"role": "user", "content": "<image> what is it ? <image>"}, {"role": "assistant", "content": "a <image>"}]
    by_file = [{"caption": c, "images": [f"pictures/{n}.png"]} for n, c in enumerate(CAPTIONS)]
    by_file += [{"messages": talk, "images": [f"pictures/{n}.png" for n in (5, 6, 7)]}]
    by_ids = [{"caption": c, "codes": [ids[n].flatten().tolist()]} for n, c in enumerate(CAPTIONS)]
    by_ids += [{"messages": talk, "codes": ids[5:8].tolist()}]
    write_jsonl(tmp_path / "files.jsonl", by_file)
    write_jsonl(tmp_path / "ids.jsonl", [{**r, "codebook_hash": HASH} for r in by_ids])
    made = []
    for name in ("files", "ids"):
        source = open_source(SourceConfig(f"{tmp_path}/{name}.jsonl", "generation"), RowsConfig())
        made.append(take(rows_of(source, model=model, length=40), 20)[0])
    pictures = 0
    for files, stored in zip(*made, strict=True):
        pictures += len(files.images)
        assert len(stored.images) == 0
        encoded = TOKENIZER.encode(files.images.float() / 255).flatten(1) + VOCABULARY.text_size
        for left, right in zip(files.with_ids(encoded), stored.packed, strict=True):
            assert torch.equal(left, right)
    assert pictures > 100


def test_shards_give_images_with_captions_and_conversations(tmp_path):
    ids = write_pictures(tmp_path / "pictures")
    talk = [{"role": "user", "content": "<image> what is it ?"}, {"role": "assistant", "content": "a text"}]

    def texts(n):
        if n % 3 == 0:
            return [("json", json.dumps({"messages": talk}).encode())]
        caption = CAPTIONS[n]
        return [("txt", caption.encode())] if n % 3 == 1 else [("json", json.dumps({"caption": caption}).encode())]

    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", tmp_path / "pictures", range(shard * 6, shard * 6 + 6), texts)
    source = open_source(
        SourceConfig(f"{tmp_path}/{{0..1}}.tar", "understanding", question="what is it ?"), RowsConfig()
    )
    expected = set()
    for n in range(12):
        image = VOCABULARY.image(ids[n], HASH)
        answer = "a text" if n % 3 == 0 else CAPTIONS[n]
        parts = prompts.understanding_parts(WORDS, VOCABULARY, image, "what is it ?", answer)
        expected.add(tuple(join(*parts).input_ids.tolist()))
    for streams in (1, 2, 4):  # fewer, as many as and more than shards
        found = Counter()
        for micro in take(rows_of(source), 48 // streams, streams, 1)[0]:
            encoded = TOKENIZER.encode(micro.images.float() / 255).flatten(1) + VOCABULARY.text_size
            found.update(m[0] for m in members(micro, micro.with_ids(encoded)))
        assert set(found) == expected
        assert max(found.values()) - min(found.values()) <= 6


def test_a_folder_of_shards_stands_for_them(tmp_path, capfd):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", tmp_path / "pictures", range(3), lambda n: [("txt", b"a text")])
    (tmp_path / "data" / "notes.md").touch()
    source = open_source(SourceConfig(f"{tmp_path}/data", "generation"), RowsConfig())
    assert source.urls == [f"{tmp_path}/data/0.tar"] and list(source.texts(Skipped())) == ["a text"] * 3
    assert "passed over 1 file: 1 of another kind (notes.md)" in capfd.readouterr().err


def test_ids_files_have_their_captions_beside_them(tmp_path):
    names = [f"{n}.png" for n in range(12)]
    save_codes(tmp_path / "ids.safetensors", codes(12), names, TOKENIZER.vocabulary)
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps(dict(zip(names, CAPTIONS, strict=True))))
    config = SourceConfig(f"{tmp_path}/ids.safetensors", "generation", captions=str(captions))
    source = open_source(config, RowsConfig())
    found = take(rows_of(source), 5)[0]
    same(found, take(rows_of(Records(captioned(), "generation", codebook_hash=HASH)), 5)[0])
    captions.write_text(json.dumps(dict(zip(names[:-1], CAPTIONS, strict=False))))
    records = [record for record, _ in itertools.islice(open_source(config, RowsConfig()).stream(0, 1, 0, None), 12)]
    assert [str(r) for r in records if isinstance(r, ValueError)] == ["11.png: expected a caption, got none"]
    captions.write_text(json.dumps({"another.png": "a text"}))
    with pytest.raises(ValueError, match=r"expected captions of images of .*, got none"):
        open_source(config, RowsConfig())


@pytest.mark.parametrize("streams", [1, 2, 4])  # fewer, as many as and more than shards
def test_a_corpus_of_ids_gives_its_captions(tmp_path, streams, capfd):
    pytest.importorskip("pyarrow")
    from semhitok.corpus import EncodedCorpus, EncodingConfig, encode_corpus

    write_pictures(tmp_path / "pictures")
    for n in range(11):  # the last has none
        (tmp_path / "pictures" / f"{n}.txt").write_text(CAPTIONS[n])
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    config = EncodingConfig(batch_size=4, images_per_shard=6)
    encode_corpus(str(tmp_path / "tokenizer"), [str(tmp_path / "pictures")], tmp_path / "corpus", config)

    def data():
        return rows_of(open_source(SourceConfig(f"{tmp_path}/corpus", "generation"), RowsConfig(shuffle_buffer=4)))

    whole, _ = take(data(), 48 // streams, streams, 1)
    found = Counter(m[0] for micro in whole for m in members(micro))
    expected = set()
    rows = [row for row in EncodedCorpus(tmp_path / "corpus") if row.caption]
    assert sorted(row.caption for row in rows) == sorted(CAPTIONS[:11])
    for ids, caption, _ in rows:
        parts = prompts.generation_parts(WORDS, VOCABULARY, caption, VOCABULARY.image(ids, HASH))
        expected.add(tuple(join(*parts).input_ids.tolist()))
    assert set(found) == expected and max(found.values()) - min(found.values()) <= 6
    assert "11.png: expected a caption, got none" in capfd.readouterr().err
    parts, position = [], None
    for count in (1, 4, 48 // streams - 5):
        more, position = take(data(), count, streams, 1, position)
        position = json.loads(json.dumps(position))
        parts += more
    same(whole, parts)


def test_ids_of_another_codebook_are_refused(tmp_path):
    other = small_tokenizer(1)
    assert other.codebook_hash != HASH
    records = [{**r, "codes": [r["codes"][0].tolist()]} for r in captioned()]
    write_jsonl(tmp_path / "other.jsonl", [{**r, "codebook_hash": other.codebook_hash} for r in records])
    write_jsonl(tmp_path / "unnamed.jsonl", records)
    save_codes(tmp_path / "ids.safetensors", codes(12), CAPTIONS, other.vocabulary)
    (tmp_path / "captions.json").write_text(json.dumps({c: c for c in CAPTIONS}))
    for name in ("other.jsonl", "unnamed.jsonl", "ids.safetensors"):
        config = SourceConfig(f"{tmp_path}/{name}", "generation", captions=f"{tmp_path}/captions.json")
        with pytest.raises(WrongCodebook, match=r"codebook_hash: expected ids of codebook"):
            take(rows_of(open_source(config, RowsConfig())), 1)


def test_bad_records_are_named_and_passed_over(tmp_path, capfd, monkeypatch):
    good = [{**r, "codes": [r["codes"][0].tolist()], "codebook_hash": HASH} for r in captioned()]
    bad = [
        {"caption": "a", "images": ["missing.png"]},
        {"caption": "a", "codes": [[1, 2, 3]], "codebook_hash": HASH},
        {"caption": "a", "codes": [[1, 2, 3, 15]], "codebook_hash": HASH},
        {"caption": 7, "codes": [[1, 2, 3, 4]], "codebook_hash": HASH},
        {"caption": "a"},
        {"messages": [{"role": "user"}]},
        {"picture": 1},
        {"caption": "a", "images": "missing.png"},
        {"caption": "a", "codes": [[1, 2, 3, 4]], "codebook_hash": 5},
        {"caption": "a", "codes": [["one", None]], "codebook_hash": HASH},
        {"caption": "a", "codes": [[[1, 2], [3]]], "codebook_hash": HASH},
    ]
    path = write_jsonl(tmp_path / "mixed.jsonl", [*good, *bad])
    path.write_text(path.read_text() + "[1]\n{broken\n\n")
    source = open_source(SourceConfig(str(path), "generation"), RowsConfig())
    assert len(source.records) == 12 + 13
    batches = rows_of(source).batches(1, 1)
    found = {m[0] for _ in range(40) for micro in next(batches) for m in members(micro)}
    assert len(found) == 12 and len(batches.skipped) == 13
    err = capfd.readouterr().err
    assert err.count("skipped: ") == 13
    for words in (
        "missing.png", "expected 4 ids an image, got 3", "expected ids in [0, 15), got 15", "caption: expected text",
        "expected one beside a caption, got 0", "expected objects with role and content", "expected messages, caption",
        "mixed.jsonl: record 24: expected an object, got list", "record 25: not JSON",
        "record 20: images: expected a list of paths, got 'missing.png'", "codebook_hash: expected text, got 5",
        "mixed.jsonl: record 13: ",
        "codes: expected ids of an image, got ['one', None]", "codes: expected ids of an image, got [[1, 2], [3]]",
    ):  # fmt: skip
        assert words in err
    hopeless = write_jsonl(tmp_path / "bad.jsonl", bad)
    monkeypatch.setattr("semhitok.mllm.rows.BAD_IN_A_ROW", 1000)
    with pytest.raises(ValueError, match="1000 records in a row cannot be used; the last: "):
        take(rows_of(open_source(SourceConfig(str(hopeless), "generation"), RowsConfig())), 1)


def test_a_record_does_not_say_where_its_images_are(tmp_path):
    for folder in ("", "sub"):
        (tmp_path / folder).mkdir(exist_ok=True)
        save_png(torch.full((3, 8, 8), 1.0 if folder else 0.0), tmp_path / folder / "0.png")
    for other in ("sub", str(tmp_path / "sub"), None, 7):
        path = write_jsonl(tmp_path / "a.jsonl", [{"caption": "a", "images": ["0.png"], "folder": other}])
        source = open_source(SourceConfig(str(path), "generation"), RowsConfig())
        (micro,) = take(rows_of(source), 1, 1, 1)[0]
        assert len(micro.images) and micro.images.max() == 0


def test_a_template_that_refuses_a_conversation_costs_that_record_alone(capfd):
    words = copy.deepcopy(WORDS)
    words.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with a question') }}{% endif %}"
    words.chat_template += prompts.PLAIN
    answer = {"role": "assistant", "content": "a dog"}
    good = {"messages": [{"role": "user", "content": "what is it ?"}, answer]}
    bad = {"messages": [{"role": "system", "content": "a"}, *good["messages"]]}
    data = rows_of(Records([bad, good], "text"))
    data.text_tokenizer = words
    take(data, 6, 1, 1)
    assert "record 1: chat_template: begin with a question" in capfd.readouterr().err and len(data.skipped) == 1


def test_more_rows_than_samples_in_shards(tmp_path):
    write_pictures(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for n in range(3):
            for suffix, content in (("png", (tmp_path / f"{n}.png").read_bytes()), ("txt", b"a dog")):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(content)
                tar.addfile(info, BytesIO(content))
    source = open_source(SourceConfig(f"{tmp_path}/a.tar", "generation"), RowsConfig())
    data = rows_of(source, length=12)
    whole, _ = take(data, 4, 8, 8)
    assert all(len(micro.images) == 8 for micro in whole)
    first, place = take(data, 2, 8, 8)
    same([*first, *take(data, 2, 8, 8, place)[0]], whole)


def test_bad_records_do_not_end_the_making_of_a_text_tokenizer(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    lines = [
        b'\xef\xbb\xbf{"text": "first"}', b"[1]", b"{", b"[" * 100_000, b'{"text": "nice \\ud83d"}', b'{"messages": 7}',
        b'{"messages": ["x", {"content": "said"}], "n": ' + b"9" * 5000 + b"}", b'{"text": "caf\xe9"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(lines))
    skipped = Skipped()
    source = open_source(SourceConfig(str(path), "text"), RowsConfig())
    found = list(source.texts(skipped))
    assert found == ["first", "nice \ufffd", "said", "caf\ufffd"]
    err = capfd.readouterr().err
    for words in ("record 2: expected an object", "record 3: not JSON", "nested too deeply"):
        assert words in err
    next(rows_of(source, skipped=skipped).batches(1, 1))
    assert len(skipped) >= 3 and capfd.readouterr().err.count("record 3: ") == 0  # named when the tokenizer was made
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("v1.0_a.png", b"x"), ("v1.0_b.png", b"x"), ("v1.0_a.txt", b"one"),
            ("v1.0_b.json", b'{"caption": ["two"]}'),
            ("c.png", b"x"), ("c.json", b"{"), ("d.txt", b"lost"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    source = open_source(SourceConfig(f"{tmp_path}/a.tar", "generation"), RowsConfig())
    skipped = Skipped()
    assert list(source.texts(skipped)) == ["one", "two"]
    err = capfd.readouterr().err
    assert "c: expected a caption or messages in a .txt or .json: json: not JSON" in err
    assert "d: no image among txt" in err and len(skipped) == 2
    path.write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"a.jsonl: expected UTF-8 text, got UTF-16"):
        open_source(SourceConfig(str(path), "text"), RowsConfig())


def test_a_bad_caption_beside_an_ids_file_costs_its_image_only(tmp_path):
    save_codes(tmp_path / "ids.safetensors", torch.zeros(2, 2, 2, dtype=torch.int64), ["a", "b"], TOKENIZER.vocabulary)
    (tmp_path / "captions.json").write_text('{"a": ["one", "two"], "b": 7}')
    config = SourceConfig(f"{tmp_path}/ids.safetensors", "generation", captions=f"{tmp_path}/captions.json")
    source = open_source(config, RowsConfig())
    records = [record for record, _ in itertools.islice(source.stream(0, 1, 0, None), 2)]
    assert {record["caption"] for record in records if isinstance(record, dict)} == {"one"}
    assert [str(record) for record in records if isinstance(record, ValueError)] == ["b: expected a caption, got 7"]


def test_sources_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected .jsonl, .safetensors, webdataset shards or"):
        open_source(SourceConfig("a.csv", "text"), RowsConfig())
    with pytest.raises(FileNotFoundError):
        open_source(SourceConfig(f"{tmp_path}/none.jsonl", "text"), RowsConfig())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl: expected at least one record, got none"):
        open_source(SourceConfig(f"{tmp_path}/empty.jsonl", "text"), RowsConfig())
    with pytest.raises(ValueError, match="task: expected one of understanding, generation, text, got 'draw'"):
        SourceConfig("a.jsonl", "draw")
    with pytest.raises(ValueError, match="sources: expected at least one, got none"):
        rows_of()


# ---- the order ----


def sources(folder):
    """Of every kind."""
    if not (folder / "0.tar").exists():
        write_pictures(folder / "pictures")
        for shard in range(3):
            write_tar(folder / f"{shard}.tar", folder / "pictures", range(shard, 12, 3), lambda n: [("txt", b"a text")])
        write_jsonl(folder / "texts.jsonl", [{"text": "a long text without end . " * n} for n in range(1, 11)])
    return [
        open_source(SourceConfig(f"{folder}/{{0..2}}.tar", "generation"), RowsConfig(shuffle_buffer=3)),
        open_source(SourceConfig(f"{folder}/texts.jsonl", "text"), RowsConfig()),
        Records(captioned(), "understanding", codebook_hash=HASH),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [2, 4])  # shards enough for all streams, and not
def test_rows_go_on_from_a_position_as_if_never_stopped(tmp_path, workers, batch_size):
    def data():
        return rows_of(*sources(tmp_path), workers=workers, caption_drop=0.3)

    whole, _ = take(data(), 14, batch_size, 1)
    parts, position = [], None
    for count in (1, 2, 3, 8):
        found, position = take(data(), count, batch_size, 1, position)
        position = json.loads(json.dumps(position))
        parts += found
    same(whole, parts)
    other, _ = take(rows_of(*sources(tmp_path), seed=1), 14, batch_size, 1)
    assert any(not torch.equal(a.packed.input_ids, b.packed.input_ids) for a, b in zip(whole, other, strict=True))


def test_rows_do_not_depend_on_processes_workers_and_micro_batches(tmp_path):
    def rows(data, batch_size=4, micro_batch=1):
        micro, _ = take(data, 5, batch_size, micro_batch)
        return [m.packed.input_ids for m in micro]

    whole = torch.cat(rows(rows_of(*sources(tmp_path))))
    assert torch.equal(torch.cat(rows(rows_of(*sources(tmp_path)), 4, 4)), whole)
    assert torch.equal(torch.cat(rows(rows_of(*sources(tmp_path), workers=2))), whole)
    shares = [rows(rows_of(*sources(tmp_path), rank=r, world_size=2), 4, 2) for r in range(2)]
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*shares, strict=True)]), whole)


def test_an_old_position_gives_the_rows_it_always_gave():
    """Positions in run folders stay readable, and the same seed keeps its order."""
    ready = [join((list(range(n, n + 1 + n % 5)), True)) for n in range(1, 21)]
    sources = Records(ready, "text"), Records(ready[:7], "generation", weight=2.0)
    data = rows_of(*sources, seed=3, length=8)
    first, position = take(data, 7, 2, 2)
    assert first[0].packed.input_ids.tolist() == [[7, 8, 9, 8, 9, 10, 11, 5], [1, 2, 2, 3, 4, 6, 7, 0]]
    places = [{"draw": 16, "sources": [6, 10], "taken": []}, {"draw": 19, "sources": [4, 15], "taken": []}]
    expected = {"streams": 2, "processes": 1, "rank": 0, "skipped": [], "rows": places}
    assert position == expected and list(position) == list(expected)
    position["skipped"] = 3  # as it once was
    assert [rows.packed.input_ids.tolist() for rows in take(data, 2, 2, 2, position)[0]] == [
        [[3, 4, 5, 6, 3, 4, 5, 6], [15, 1, 2, 6, 7, 0, 0, 0]],
        [[1, 2, 5, 7, 8, 9, 0, 0], [13, 14, 15, 16, 7, 8, 9, 0]],
    ]


def test_positions_and_sizes_that_do_not_fit_are_refused():
    data = rows_of(Records(captioned(), "generation", codebook_hash=HASH))
    _, position = take(data, 1)
    with pytest.raises(ValueError, match="position: streams: expected 8, got 4"):
        data.batches(8, 1, 1, position)
    with pytest.raises(ValueError, match="batch_size: expected a multiple of processes x micro_batch = 1 x 3, got 4"):
        data.batches(4, 3)
    with pytest.raises(ValueError, match=r"data.workers: expected a divisor of the 4 rows of a process, got 3"):
        rows_of(Records(captioned(), "generation"), workers=3).batches(4, 1)
    twice = rows_of(*[Records(captioned(), "generation", codebook_hash=HASH)] * 2)
    with pytest.raises(ValueError, match="position: expected one of 2 sources, got 1"):
        twice.batches(4, 1, 1, position)
