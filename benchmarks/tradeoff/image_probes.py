"""What the codes of whole photographs say of their labels, and measures of their reconstructions by SqueezeNet.

The probes are those of `semhitok eval --labels`, fitted to the training photographs, with a stronger penalty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.tradeoff.arms import BATCH, Network
from benchmarks.tradeoff.measures import Data, fidelity
from semhitok.evaluation.frechet import FeatureStatistics, frechet_distance
from semhitok.evaluation.probes import classify, histograms
from semhitok.models.squeezenet import SqueezeNetDistance

PENALTY = 1e-2  # |W|^2 has this weight beside the mean cross entropy
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
        figures |= probes(name, *(means[part][name].numpy() for part in SETS), labels)
    ids = {name: codes.ids(*pair) for name, pair in found.items()}
    figures |= id_probes("ids", ids, labels)
    if arm.kind == "semantic":
        figures |= {f"{kind}_semantic_ids": figures[f"{kind}_ids"] for kind in ("linear", "knn")}
    elif arm.kind not in ("flat", "shared"):
        figures |= id_probes("semantic_ids", {name: i for name, (i, _) in found.items()}, labels)
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


def probes(name: str, x: Any, test_x: Any, labels: dict[str, Tensor]) -> dict[str, float]:
    """Accuracies linear_NAME and knn_NAME from features [N, D] as `classify` takes them."""
    y = labels["probe"].numpy()
    found = classify(x, y, test_x, C=1 / (2 * PENALTY * len(y)))
    return {f"{kind}_{name}": float((classes == labels["test"].numpy()).mean()) for kind, classes in found.items()}


def id_probes(name: str, ids: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, float]:
    """`probes` of the histograms of ids [N, 8, 8]."""
    both = histograms(torch.cat([ids[part].flatten(1) for part in SETS])).astype("float32")
    return probes(name, both[: len(ids["probe"])], both[len(ids["probe"]) :], labels)
