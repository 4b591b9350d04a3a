"""One-object pictures: splits that keep apart, captions that say what is drawn, and a judge that reads it."""

from __future__ import annotations

import pytest
import torch

from semhitok.demo import reader as attributes
from semhitok.demo import scenes


@pytest.fixture(scope="module")
def some() -> scenes.Pictures:
    return scenes.pictures(3, 0, 300)


def test_a_picture_follows_from_seed_split_and_index(some: scenes.Pictures) -> None:
    again = scenes.pictures(3, 17, 5)
    assert again.images.dtype == torch.uint8 and again.images.shape == (5, 3, 48, 48)
    assert again.labels.dtype == torch.int64
    assert torch.equal(again.images, some.images[17:22]) and torch.equal(again.labels, some.labels[17:22])
    assert again.captions == some.captions[17:22]
    assert not torch.equal(again.images, scenes.pictures(4, 17, 5).images)
    assert scenes.pictures(3, 0, 1, size=64).images.shape == (1, 3, 64, 64)


def test_splits_are_apart_and_cover_everything() -> None:
    rows = {split: set(map(tuple, scenes.combinations(split).tolist())) for split in scenes.SPLITS}
    assert len(rows["all"]) == 6 * 8 * 3 * 9 * 5
    assert rows["train"] | rows["random"] | rows["comp"] == rows["all"]
    assert sum(len(rows[split]) for split in ("train", "random", "comp")) == len(rows["all"])
    assert len(rows["random"]) == pytest.approx((len(rows["all"]) - len(rows["comp"])) / 8, rel=0.1)


def test_comp_holds_out_48_triples_and_no_pair() -> None:
    chosen = torch.tensor([0, 1, 4])
    triples = {
        split: set(map(tuple, scenes.combinations(split)[:, chosen].tolist())) for split in ("train", "random", "comp")
    }
    assert len(triples["comp"]) == 48 and not triples["comp"] & (triples["train"] | triples["random"])
    assert len(triples["train"] | triples["comp"]) == 240
    for a in range(5):
        for b in range(a):
            pairs = scenes.combinations("train")[:, [a, b]].unique(dim=0)
            assert len(pairs) == scenes.COUNTS[a] * scenes.COUNTS[b]


def test_pictures_are_of_their_split() -> None:
    for split in scenes.SPLITS:
        allowed = set(map(tuple, scenes.combinations(split).tolist()))
        drawn = list(map(tuple, scenes.pictures(0, 0, 60, split).labels.tolist()))
        assert set(drawn) <= allowed and len(set(drawn)) > 40


def test_captions_are_read_back(some: scenes.Pictures) -> None:
    assert scenes.caption([3, 0, 0, 0, 3]) == "a small red ring at top left on a navy background"
    for text, labels in zip(some.captions, some.labels, strict=True):
        assert torch.equal(scenes.parse(text), labels)
    words = [word for values in scenes.ATTRIBUTES.values() for word in values]
    assert len(set(words)) == len(words)


def test_what_is_not_said_or_said_twice_is_unknown() -> None:
    assert scenes.parse("Top left, a RED, small ring.").tolist() == [3, 0, 0, 0, -1]
    assert scenes.parse("a red blue small medium ring bar").tolist() == [-1, -1, -1, -1, -1]
    assert scenes.parse("a ring at left top").tolist() == [3, -1, -1, -1, -1]
    assert scenes.parse("redder rings").tolist() == [-1] * 5


def test_questions_have_answers() -> None:
    labels = [3, 0, 0, 4, 1]
    answers = [scenes.answer(name, labels) for name in scenes.QUESTIONS]
    assert answers == ["ring", "red", "small", "middle centre", "grey"]


def test_objects_have_the_size_place_and_colours_they_are_said_to_have() -> None:
    found = scenes.pictures(1, 0, 400, "all")
    extents = {n: [] for n in range(3)}
    for image, labels in zip(found.images.float() / 255, found.labels, strict=True):
        shape, _, size, position, ground = labels.tolist()
        near = (image - torch.tensor(scenes.BACKGROUND_RGB[ground]).view(3, 1, 1)).norm(dim=0)
        edge = torch.cat([near[0], near[-1]]).median()
        assert edge < 0.2  # the border of the picture is of its background
        if scenes.ATTRIBUTES["shape"][shape] not in ("ring", "bar"):
            continue
        object_ = near > 0.25
        columns, rows = object_.any(0).nonzero().flatten(), object_.any(1).nonzero().flatten()
        if not len(columns):
            continue
        extents[size].append(int(columns[-1] - columns[0]) + 1)
        middle = ((rows[0] + rows[-1]) / 2 / 48, (columns[0] + columns[-1]) / 2 / 48)
        for place, where in zip(divmod(position, 3), middle, strict=True):
            assert abs(float(where) - scenes.PLACES[place]) < 0.06
    medians = [sorted(values)[len(values) // 2] for values in extents.values()]
    assert medians[0] >= 13 and medians[1] - medians[0] >= 3 and medians[2] - medians[1] >= 3


def test_shapes_are_far_from_each_other() -> None:
    np = pytest.importorskip("numpy")
    y, x = np.mgrid[-12:12.25:0.25, -12:12.25:0.25]
    covers = {name: scenes.distance(np, name, x, y, 8.0) < 0 for name in scenes.ATTRIBUTES["shape"]}
    for name, cover in covers.items():
        assert max(np.ptp(x[cover]), np.ptp(y[cover])) >= 0.8 * 16
        for other in covers.values():
            if other is not cover:
                assert (cover & other).sum() / (cover | other).sum() < 0.6, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 1), "seed: expected at least 0, got -1"),
        ((0, 0, 0), "count: expected at least 1, got 0"),
        ((0, 0, 1, "test"), "split: expected one of train, random, comp, all, got 'test'"),
        ((0, 0, 1, "train", 8), "size: expected at least 32, got 8"),
    ],
)
def test_bad_arguments(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scenes.pictures(*arguments)


# ---- scores ----


def test_scores_by_hand() -> None:
    labels = torch.tensor([[0, 1, 2, 3, 4], [5, 7, 0, 8, 0]])
    said = torch.tensor([[0, 1, 2, 3, 4], [5, -1, 1, 8, 0]])
    assert attributes.score(said, labels) == {
        "shape": 1.0, "colour": 0.5, "size": 0.5, "position": 1.0, "background": 1.0, "mean": 0.8, "all": 0.5,
    }  # fmt: skip
    assert attributes.chance()["all"] == pytest.approx(1 / 6480)
    assert attributes.chance()["mean"] == pytest.approx((1 / 6 + 1 / 8 + 1 / 3 + 1 / 9 + 1 / 5) / 5)
    with pytest.raises(ValueError, match="said: expected"):
        attributes.score(said[:1], labels)


def test_models_that_look_and_models_that_do_not(some: scenes.Pictures) -> None:
    """A model that sees position and colour in the codes, and one that says the same whatever it sees."""
    colour, position = some.labels[:, 1], some.labels[:, 3]
    codes = torch.full((300, 3, 3), 99)
    codes.flatten(1)[torch.arange(300), position] = colour  # the colour's number where the object is

    def describe(codes: torch.Tensor) -> list[str]:
        where = (codes.flatten(1) != 99).int().argmax(1)
        seen = codes.flatten(1).gather(1, where[:, None]).flatten()
        return [
            f"a {scenes.ATTRIBUTES['colour'][c]} thing at {scenes.ATTRIBUTES['position'][p]}"
            for c, p in zip(seen.tolist(), where.tolist(), strict=True)
        ]

    found = attributes.evaluate_captions(describe, codes, some.labels)
    assert found["right image"]["colour"] == found["right image"]["position"] == 1
    assert found["right image"]["shape"] == found["right image"]["all"] == 0
    assert found["wrong image"]["colour"] < 0.25 and found["wrong image"]["position"] < 0.25
    assert found["shuffled ids"]["colour"] == 1 and found["shuffled ids"]["position"] < 0.25
    blind = attributes.evaluate_captions(lambda codes: [some.captions[0]] * len(codes), codes, some.labels)
    assert blind["right image"] == blind["wrong image"] == blind["shuffled ids"]

    def answer(codes: torch.Tensor, questions: list[str]) -> list[str]:
        text = describe(codes)
        if questions[0] == scenes.QUESTIONS["position"]:
            return [t.partition(" at ")[2].title() + " ." for t in text]
        return [t.split()[1] if questions[0] == scenes.QUESTIONS["colour"] else t for t in text]

    asked = attributes.evaluate_questions(answer, codes, some.labels)
    assert asked["right image"]["colour"] == asked["right image"]["position"] == 1
    assert asked["right image"]["shape"] == 0  # a whole caption is no answer
    assert asked["shuffled ids"]["position"] < 0.25


def test_shuffled_ids_are_the_same_ids() -> None:
    codes = torch.arange(2 * 36).view(2, 6, 6)
    mixed = attributes.shuffled(codes)
    assert torch.equal(mixed.flatten(1).sort(1).values, codes.flatten(1))
    assert not torch.equal(mixed, codes) and not torch.equal(mixed[1] - 36, mixed[0])
    assert torch.equal(mixed, attributes.shuffled(codes))


@pytest.mark.slow
def test_the_reader_reads_pictures_it_has_not_seen() -> None:
    reader = attributes.train_reader()
    for split in ("random", "comp"):
        images, labels, _ = scenes.pictures(7, 0, 500, split)
        found = attributes.score(reader.read(images), labels)
        assert min(found.values()) >= 0.98 and found["mean"] >= 0.995, found
        assert torch.equal(reader.read(images.float() / 255), reader.read(images))
        assert attributes.score(reader.read(attributes.other(images)), labels)["mean"] < 0.3
    with pytest.raises(ValueError, match=r"images: expected \[N, 3, 48, 48\], got \[2, 3, 64, 64\]"):
        reader.read(torch.zeros(2, 3, 64, 64))
