"""Generated pictures: the same for the same numbers, and what the labels and captions say is what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tradeoff import shapes
from semhitok.config import SemHiTokConfig, TeacherConfig, ViTConfig
from semhitok.demo import scenes
from semhitok.demo.teacher import (
    NAME,
    ContrastiveConfig,
    Lesson,
    TextEncoder,
    logit_sizes,
    region_loss,
    sigmoid_loss,
    train_teacher,
)  # fmt: skip
from semhitok.models.teacher import Teacher
from semhitok.tokenizer import SemHiTok


@pytest.fixture(scope="module")
def some() -> shapes.Pictures:
    return shapes.pictures(3, 0, 300)


def test_a_picture_follows_from_seed_and_index(some: shapes.Pictures) -> None:
    again = shapes.picture(3, 17)
    assert again.image.dtype == torch.uint8 and again.image.shape == (3, 64, 64)
    assert torch.equal(again.image, some.images[17])
    assert torch.equal(again.labels, some.labels[17]) and again.caption == some.captions[17]
    assert torch.equal(again.background, some.background[17])
    assert not torch.equal(again.image, shapes.picture(4, 17).image)
    assert len({x.numpy().tobytes() for x in some.images}) == 300


def read(text: str) -> tuple[Tensor, Tensor]:
    """Labels and background from the words of a caption alone."""
    labels = torch.full((9, 4), -1)
    *objects, background = text.split(", ")
    for phrase in objects:
        _, size, texture, colour, shape, _, _, row, column = phrase.split()
        cell = shapes.ROWS.index(row) * 3 + shapes.COLUMNS.index(column)
        values = zip(shapes.ATTRIBUTES.values(), (shape, colour, texture, size), strict=True)
        labels[cell] = torch.tensor([words.index(w) for words, w in values])
    _, _, pattern, ground, _, _, light, _ = background.split()
    values = zip(shapes.SURROUNDINGS.values(), (pattern, ground, light), strict=True)
    return labels, torch.tensor([words.index(w) for words, w in values])


def test_captions_say_what_the_labels_say(some: shapes.Pictures) -> None:
    for labels, background, text in zip(some.labels, some.background, some.captions, strict=True):
        said, ground = read(text)
        assert torch.equal(said, labels) and torch.equal(ground, background)
    counts = (some.labels[:, :, 0] >= 0).sum(1)
    assert counts.unique().tolist() == [1, 2, 3]
    for n, words in enumerate(shapes.ATTRIBUTES.values()):
        assert some.labels[..., n].unique().tolist() == [-1, *range(len(words))]
    for n, words in enumerate(shapes.SURROUNDINGS.values()):
        assert some.background[:, n].unique().tolist() == [*range(len(words))]


def test_colours_are_where_the_labels_say() -> None:
    """In the cell of a plain object under normal light lie pixels of its colour, and of no other as near."""
    palette = torch.tensor(shapes.COLOUR_RGB) * 0.85
    right = total = 0
    for index in range(400):
        p = shapes.picture(5, index)
        if p.background[2] != 1:
            continue
        for cell in (p.labels[:, 2] == 0).nonzero().flatten().tolist():
            top, left = (round(n * 64 / 3) for n in divmod(cell, 3))
            pixels = p.image[:, top : top + 21, left : left + 21].flatten(1).T / 255
            near = ((pixels[:, None] - palette).norm(dim=-1) < 0.2).sum(0)
            right += int(near.argmax() == p.labels[cell, 1])
            total += 1
    # Navy grounds and the like hold some colours too.
    assert total > 50 and right / total > 0.8


def test_shapes_cover_what_they_should() -> None:
    np = pytest.importorskip("numpy")
    y, x = np.mgrid[-12:13, -12:13].astype(float)
    covers = {name: shapes.distance(np, name, x, y, 10.0) < 0 for name in shapes.SHAPES}
    for name, cover in covers.items():
        assert cover[12, 12] == (name != "ring"), name
        assert not cover[0].any() and not cover[:, 0].any(), name
        assert (cover == cover[:, ::-1]).all(), name
        assert all((cover != other).mean() > 0.04 for n, other in covers.items() if n != name), name


def test_cells_of_patches() -> None:
    place = [0, 0, 0, 1, 1, 2, 2, 2]
    assert scenes.cell_of_patches(8).tolist() == [[3 * a + b for b in place] for a in place]


@pytest.mark.parametrize(("arguments", "name"), [((-1, 0), "seed"), ((0, -1), "index")])
def test_negative_numbers_are_refused(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 0, got -1"):
        shapes.picture(*arguments)


# ---- the teacher ----


def test_phrases_keep_words_apart(some: shapes.Pictures) -> None:
    words = shapes.lesson(some).words
    objects = (some.labels[:, :, 0] >= 0).sum(1)
    # an object has six words, the background three
    assert torch.equal(words.sum((1, 2)), 6.0 * objects + 3)
    assert words.shape == (300, 4, 6 + 8 + 4 + 3 + 3 + 3 + 5 + 6 + 3) and words.amax() == 1
    # The order of the phrases says nothing; which words share one does.
    torch.manual_seed(0)
    text = TextEncoder(words.shape[-1], 16)
    two = words[objects == 2]
    swapped = two[:, [1, 0, 2, 3]]
    torch.testing.assert_close(text(two), text(swapped))
    mixed = two.clone()
    mixed[:, 0, :6], mixed[:, 1, :6] = two[:, 1, :6], two[:, 0, :6]  # exchange the shapes
    differ = (two[:, 0, :6] != two[:, 1, :6]).any(1)
    assert differ.any() and (text(two) - text(mixed)).norm(dim=1)[differ].min() > 1e-3


def test_losses_against_loops() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(5, 8, generator=g)) for _ in range(2))
    scale, bias = torch.tensor(0.7), torch.tensor(-1.5)
    pairs = [
        F.softplus(-(1 if i == j else -1) * (a[i] @ b[j] * scale.exp() + bias)) for i in range(5) for j in range(5)
    ]
    torch.testing.assert_close(sigmoid_loss(a, b, scale, bias), torch.stack(pairs).sum() / 5)
    lesson = shapes.lesson(shapes.pictures(0, 0, 3))
    labels, background = lesson.labels[1:], lesson.background[1:]
    sizes = logit_sizes(lesson)
    logits = torch.randn(2, 9, sum(sizes), generator=g)
    expected = torch.zeros(())
    for n, part in enumerate(logits.split(sizes, -1)):
        if n >= 4:
            empty = (labels[..., 0] < 0).nonzero().tolist()
            each = [part[image, cell].log_softmax(0)[background[image, n - 4]] for image, cell in empty]
            expected = expected - torch.stack(each).mean()
            continue
        top = bottom = torch.zeros(())
        for image in range(2):
            for cell in range(9):
                label = int(labels[image, cell, n]) + 1
                weight = 1.0 if label else 0.1
                top = top - weight * part[image, cell].log_softmax(0)[label]
                bottom = bottom + weight
        expected = expected + (3, 2, 0.1, 0.1)[n] * top / bottom
    torch.testing.assert_close(region_loss(logits, lesson, torch.tensor([1, 2])), expected)


def test_the_library_loads_the_trained_teacher(tmp_path: Path) -> None:
    config = ContrastiveConfig("shapes", pictures=24, steps=2, batch_size=8)

    def lesson() -> Lesson:
        return shapes.lesson(shapes.pictures(0, 0, 24))

    made = train_teacher(config, tmp_path, lesson)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns
    assert train_teacher(config, tmp_path, lesson) == made and path.stat().st_mtime_ns == written
    assert (
        train_teacher(ContrastiveConfig("shapes", steps=1, batch_size=8), tmp_path, lesson) != made
    )  # other settings, another file
    teacher = Teacher(made, 8)
    images = shapes.pictures(0, 0, 3).images.float() / 255
    features = teacher(images)
    assert features.shape == (3, 8, 8, 128) and features.dtype == torch.float32
    torch.testing.assert_close(features[:1], teacher(images[:1]))  # statistics are frozen
    from safetensors.torch import load_file

    stored, state = load_file(path), teacher.vit.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(state[k], v) for k, v in stored.items())
    # A tokenizer of it keeps the weights: nothing else has them.
    small = ViTConfig(32, 1, 2)
    model = SemHiTok(SemHiTokConfig(64, 8, 8, 2, 4, 4, made, small, small, small)).eval()
    model.save_pretrained(tmp_path / "model")
    path.unlink()
    again = SemHiTok.from_pretrained(tmp_path / "model")
    assert torch.equal(again.encode(images), model.encode(images))


def test_the_teacher_without_a_file() -> None:
    with pytest.raises((ValueError, OSError), match=f"'{NAME}'"):
        Teacher(TeacherConfig(NAME, image_size=64), 8)
    with pytest.raises(ValueError, match="patch_size: expected 8, got 4"):
        Teacher(TeacherConfig(NAME, pretrained=False, image_size=64, options={"patch_size": 4}), 16)
