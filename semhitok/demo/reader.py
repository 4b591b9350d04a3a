"""Which of the five attributes of `semhitok.demo.scenes` texts and pictures get right.

Texts are read by their words, pictures by a small CNN trained on real ones (`train_reader`). Report its own accuracy on
real pictures and on reconstructions beside its figures for generated pictures, which it limits. A model that looks at
its image gets worse with the ids of another image (`other`) or with the same ids in random order (`shuffled`). `chance`
is what guessing scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok.demo import scenes

Scores = dict[str, float]
Describe = Callable[[Tensor], Sequence[str]]  # flat ids [N, h, w] -> N captions
Answer = Callable[[Tensor, list[str]], Sequence[str]]  # flat ids [N, h, w] and a question each -> N answers


def score(said: Tensor, labels: Tensor) -> Scores:
    """Accuracy of each attribute by name, their mean ("mean"), and the share of rows that are all right ("all").

    Args:
        said: predicted labels, int64 [N, 5]; -1 for none.
        labels: int64 [N, 5].

    Raises:
        ValueError: wrong shapes, or no rows.
    """
    if said.shape != labels.shape or labels.ndim != 2 or labels.shape[1] != len(scenes.ATTRIBUTES) or not len(labels):
        raise ValueError(f"said: expected [N, {len(scenes.ATTRIBUTES)}] like labels, got {list(said.shape)}")
    right = said.cpu() == labels.cpu()
    each = dict(zip(scenes.ATTRIBUTES, right.double().mean(0).tolist(), strict=True))
    return each | {"mean": right.double().mean().item(), "all": right.all(1).double().mean().item()}


def chance() -> Scores:
    """The expected `score` of guessing each attribute independently and uniformly."""
    each = {name: 1 / len(words) for name, words in scenes.ATTRIBUTES.items()}
    product = torch.tensor(list(each.values()), dtype=torch.float64).prod().item()
    return each | {"mean": sum(each.values()) / len(each), "all": product}


def other(rows: Tensor) -> Tensor:
    """Rows [N, ...] shifted by one, so that each is another's; N is at least 2."""
    return rows.roll(1, 0)


def shuffled(codes: Tensor, seed: int = 0) -> Tensor:
    """Ids [N, h, w], each image's in another random order: the same codes without their layout."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(codes.flatten(1).shape, generator=generator).argsort(1).to(codes.device)
    return codes.flatten(1).gather(1, order).view_as(codes)


def evaluate_captions(describe: Describe, codes: Tensor, labels: Tensor) -> dict[str, Scores]:
    """`score` of captions for the right images, for other images and for shuffled ids, and chance.

    `describe` is the model; codes are flat ids [N, h, w], labels int64 [N, 5].
    """

    def of(codes: Tensor) -> Scores:
        return score(torch.stack([scenes.parse(text) for text in describe(codes)]), labels)

    return _three(of, codes)


def evaluate_questions(answer: Answer, codes: Tensor, labels: Tensor) -> dict[str, Scores]:
    """Like `evaluate_captions`, for each of `scenes.QUESTIONS` about each image.

    An answer is right if it is the attribute's word and nothing else, apart from case, spaces and a full stop.
    """

    def of(codes: Tensor) -> Scores:
        said = torch.full_like(labels, -1, device="cpu")
        for column, (name, question) in enumerate(scenes.QUESTIONS.items()):
            words = scenes.ATTRIBUTES[name]
            for row, text in enumerate(answer(codes, [question] * len(codes))):
                text = " ".join(text.lower().split()).removesuffix(".").rstrip()
                said[row, column] = words.index(text) if text in words else -1
        return score(said, labels)

    return _three(of, codes)


def _three(of: Callable[[Tensor], Scores], codes: Tensor) -> dict[str, Scores]:
    scores = {"right image": of(codes), "wrong image": of(other(codes)), "shuffled ids": of(shuffled(codes))}
    return scores | {"chance": chance()}


class Reader(nn.Module):
    """A small CNN that reads the attributes of pictures of one size."""

    def __init__(self, size: int = 48, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out, stride in ((width, 2), (width, 1), (2 * width, 2), (2 * width, 1), (2 * width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.size = size
        self.features = nn.Sequential(*layers)
        # Features at each place for the position; their means for the other attributes, wherever the object is.
        places = channels * ((size + 7) // 8) ** 2
        self.head = nn.Sequential(
            nn.Linear(places + channels, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, sum(scenes.COUNTS))
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """float [B, 3, S, S] in [0, 1] -> logits [B, n] of each attribute."""
        features = self.features(images * 4 - 2)
        return self.head(torch.cat([features.flatten(1), features.mean((2, 3))], 1)).split(scenes.COUNTS, 1)

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 256) -> Tensor:
        """Labels [N, 5] int64 of images [N, 3, S, S], uint8, or float in [0, 1].

        Raises:
            ValueError: the images have another size.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.size, self.size):
            raise ValueError(f"images: expected [N, 3, {self.size}, {self.size}], got {list(images.shape)}")
        self.eval()
        parameter = next(self.parameters())
        rows = []
        for batch in images.split(batch_size):
            batch = batch.to(parameter.device).to(parameter.dtype)
            logits = self(batch / 255 if images.dtype == torch.uint8 else batch)
            rows.append(torch.stack([part.argmax(1) for part in logits], 1).cpu())
        return torch.cat(rows)


def train_reader(size: int = 48, *, steps: int = 320, batch_size: int = 64, seed: int = 1_000_003) -> Reader:
    """Train a `Reader` on pictures of all combinations, half of them blurred like reconstructions.

    `seed` is that of its pictures and weights; do not test it on the same set. Takes under a minute on one core.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = Reader(size)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.15)
    reader.train()
    for step in range(steps):
        images, labels, _ = scenes.pictures(seed, step * batch_size, batch_size, "all", size)
        x = images.float() / 255
        blurred = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
        x = torch.where(blurred, F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1), x)
        losses = [F.cross_entropy(part, labels[:, n]) for n, part in enumerate(reader(x))]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    return reader.eval()
