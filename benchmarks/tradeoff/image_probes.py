"""What the codes of whole photographs say of their labels, and measures of their reconstructions by SqueezeNet.

A linear probe is logistic regression on standardised features with .01 |W|^2. k-NN takes the vote of the 5 training
images of largest cosine; the nearer ones decide ties.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tradeoff.arms import BATCH, Network
from benchmarks.tradeoff.measures import Data, fidelity, linear_probe, logistic
from semhitok.evaluation.frechet import FeatureStatistics, frechet_distance
from semhitok.models.squeezenet import SqueezeNetDistance

DECAY = 1e-2
NEIGHBOURS = 5
SETS = ("probe", "test")


def measure(net: Network, data: Data, squeezenet: SqueezeNetDistance) -> dict[str, float]:
    """Figures of a trained arm on photographs, under the keys of COLUMNS, without those its design does not have."""
    assert data.labels is not None
    arm, codes, labels = net.arm, net.codes, data.labels
    found = {name: net.encode(data.images[name], data.features[name]) for name in SETS}
    figures, decoded = fidelity(net, data.images, found)
    figures |= perceptual(decoded, data.images["test"], squeezenet)
    means = {name: mean_vectors(net, *pair) for name, pair in found.items()}
    for name in means["test"]:
        figures |= probes(name, *(means[part][name] for part in SETS), labels)
    ids = {name: codes.ids(*pair) for name, pair in found.items()}
    figures |= id_probes("ids", ids, labels, codes.vocabulary)
    if arm.kind == "semantic":
        figures |= {f"{kind}_semantic_ids": figures[f"{kind}_ids"] for kind in ("linear", "knn")}
    elif arm.kind not in ("flat", "shared"):
        figures |= id_probes("semantic_ids", {name: i for name, (i, _) in found.items()}, labels, arm.K)
    return figures


@torch.no_grad()
def mean_vectors(net: Network, i: Tensor, p: Tensor) -> dict[str, Tensor]:
    """Means over the patches of each image, [N, D]: of all code vectors, semantic ones, and the semantic decoder's
    output; by the names that end the keys of the figures."""
    arm, rows = net.arm, []
    for some_i, some_p in zip(i.split(BATCH), p.split(BATCH), strict=True):
        q_sem, q_pix = net.codes.vectors(some_i, some_p)
        parts = {"all": torch.cat([q_sem] * (arm.kind != "flat") + [q_pix] * (arm.kind != "semantic"), dim=-1)}
        if arm.kind != "flat":
            parts |= {"semantic": q_sem, "decoded": net.semantic_decoder(q_sem)}
        rows.append({name: x.float().mean((1, 2)) for name, x in parts.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def mean_features(features: Tensor) -> Tensor:
    """Features [N, 8, 8, C] -> their means over patches [N, C], fp32."""
    return torch.cat([x.float().mean((1, 2)) for x in features.split(BATCH)])


@torch.no_grad()
def perceptual(decoded: Tensor, uint8: Tensor, squeezenet: SqueezeNetDistance) -> dict[str, float]:
    """The SqueezeNet distance, and the Fréchet distance on its last features, averaged over positions.

    Those features have length 1 at each position, so the distance is small. It is not comparable with rFID.
    """
    total, statistics = 0.0, (FeatureStatistics(), FeatureStatistics())
    for images, targets in zip(decoded.split(BATCH), uint8.split(BATCH), strict=True):
        both = images, targets.float() / 255
        total += squeezenet(*both).sum().item()
        for x, of in zip(both, statistics, strict=True):
            of.update(squeezenet.features(x)[-1].mean((2, 3)))
    return {"squeezenet": total / len(uint8), "squeezenet_frechet": frechet_distance(*statistics)}


# ---- probes ----


def probes(name: str, x: Tensor, test_x: Tensor, labels: dict[str, Tensor]) -> dict[str, float]:
    """Accuracies linear_NAME and knn_NAME from features [N, D]."""
    y, test_y = labels["probe"], labels["test"]
    shift, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    unit = [F.normalize((some - shift) / scale, dim=1) for some in (x, test_x)]
    nearest = vote(((part @ unit[0].T) for part in unit[1].split(BATCH)), y)
    return {
        f"linear_{name}": linear_probe(x, y, test_x, test_y, DECAY),
        f"knn_{name}": (nearest == test_y).float().mean().item(),
    }


def id_probes(name: str, ids: dict[str, Tensor], labels: dict[str, Tensor], vocabulary: int) -> dict[str, float]:
    """Accuracies linear_NAME and knn_NAME from the square roots of the histograms of ids [N, 8, 8].

    The histograms are never written out: each token of an id that occurs n times in its image weighs n^-1/2, so that
    together they weigh n^1/2. For k-NN they are not standardised: all have the same length as they are.
    """
    y, test_y = labels["probe"], labels["test"]
    bags = {part: weighted(ids[part]) for part in SETS}
    layer = Histograms(*bags["probe"], vocabulary, int(y.max()) + 1)
    linear = logistic(layer, bags["probe"], y, bags["test"], test_y, DECAY, history=10)

    def similarities(tokens: Tensor, weights: Tensor) -> Tensor:
        dense = torch.zeros(len(tokens), vocabulary).scatter_add_(1, tokens, weights)
        return sums(*bags["probe"], dense.T.contiguous()).T / tokens.shape[1]

    some = (pair for pair in zip(*(t.split(BATCH) for t in bags["test"]), strict=True))
    nearest = vote((similarities(*pair) for pair in some), y)
    return {f"linear_{name}": linear, f"knn_{name}": (nearest == test_y).float().mean().item()}


def weighted(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [N, ...] -> tokens [N, T] and n^-1/2 [N, T] of the n times that a token's id occurs in its image."""
    tokens = ids.flatten(1)
    counts = torch.cat([(t[:, :, None] == t[:, None]).sum(2) for t in tokens.split(BATCH)])
    return tokens, counts.float().rsqrt()


def sums(tokens: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The weighted sum of the rows of `table` that an image's tokens name, [N, columns]."""
    return F.embedding_bag(tokens, table, mode="sum", per_sample_weights=weights)


class Histograms(nn.Module):
    """A linear layer on standardised square roots of histograms, given as `weighted` returns them."""

    def __init__(self, tokens: Tensor, weights: Tensor, vocabulary: int, classes: int) -> None:
        super().__init__()
        n, flat = len(tokens), tokens.flatten()
        first = torch.zeros(vocabulary, dtype=torch.float64).index_add_(0, flat, weights.flatten().double())
        second = torch.bincount(flat, minlength=vocabulary).double()
        self.shift = (first / n).float()
        variance = (second - first.square() / n).clamp_min(0) / max(n - 1, 1)
        self.scale = variance.sqrt().float().clamp_min(1e-6)
        self.weight = nn.Parameter(torch.zeros(vocabulary, classes))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.seen = first > 0  # others would have an arbitrary scale

    def forward(self, bags: tuple[Tensor, Tensor]) -> Tensor:
        table = torch.where(self.seen[:, None], self.weight / self.scale[:, None], 0)
        return sums(*bags, table) - self.shift @ table + self.bias


def vote(similarities: Iterable[Tensor], y: Tensor) -> Tensor:
    """The classes of test images from blocks [n, N] of their similarities, -1..1, to the images of classes y [N]."""
    found = []
    for block in similarities:
        near, which = block.topk(min(NEIGHBOURS, len(y)), dim=1)
        votes = torch.zeros(len(block), int(y.max()) + 1).scatter_add_(1, y[which], 1 + near / 100)
        found.append(votes.argmax(1))
    return torch.cat(found)
