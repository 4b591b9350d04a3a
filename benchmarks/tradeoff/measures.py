"""Measures of a trained design: fidelity, use of the ids, and probes of what they say of the content."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tradeoff import shapes
from benchmarks.tradeoff.arms import BATCH, GRID, PATCH, Network, stages
from semhitok.demo.scenes import cell_of_patches
from semhitok.evaluation.metrics import psnr, ssim

PATCHES_OF = 4_000  # images that the mean patch of an id is learnt from, at most
PAIRS = len(shapes.SHAPES) * len(shapes.COLOURS)


@dataclass
class Data:
    """By set ("train", "probe", "test").

    images: uint8 [N, 3, 64, 64].
    features: the teacher's, [N, 8, 8, C] in bf16 or fp16.
    labels: [N, 9, 4] of pictures, class numbers [N] of photographs, or None.
    """

    images: dict[str, Tensor]
    features: dict[str, Tensor]
    labels: dict[str, Tensor] | None


def measure(net: Network, data: Data, seed: int, probe_steps: int) -> dict[str, float]:
    """Figures of a trained arm, under the keys of COLUMNS, without those that do not apply to its design."""
    codes = net.codes
    found = {name: net.encode(data.images[name], data.features[name]) for name in ("probe", "test")}
    figures, _ = fidelity(net, data.images, found)
    if data.labels is not None:
        # Zeros for a half that the design lacks tell a probe nothing, and all probes have as many inputs.
        vectors = {name: torch.cat(codes.vectors(*pair), dim=-1) for name, pair in found.items()}
        figures |= understanding(vectors, data.labels, seed, probe_steps)
        figures["by_id"] = probe_ids({n: codes.ids(*pair) for n, pair in found.items()}, data.labels, codes.vocabulary)
    return figures


def fidelity(
    net: Network, images: dict[str, Tensor], found: dict[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, float], Tensor]:
    """Figures of reconstruction and of the use of ids, and the reconstructed test images [N, 3, 64, 64] in 0..1.

    images: uint8, by set ("probe", "test"); found: what `Network.encode` returned for them.
    """
    arm, codes = net.arm, net.codes
    ids = {name: codes.ids(*pair) for name, pair in found.items()}
    few = {"probe": slice(PATCHES_OF), "test": slice(None)}
    images = {name: images[name][some].float() / 255 for name, some in few.items()}
    q_sem, q_pix = codes.vectors(*found["test"])
    decoded = net.decode(q_sem, q_pix)
    figures = {"psnr": psnr(decoded, images["test"]).mean().item(), "ssim": ssim(decoded, images["test"]).mean().item()}
    alone = codes.without_pixels(*found["test"])
    if alone is not None:
        figures["semantic_psnr"] = psnr(net.decode(q_sem, alone), images["test"]).mean().item()
    patches = {name: F.pixel_unshuffle(x, PATCH).permute(0, 2, 3, 1).flatten(0, 2) for name, x in images.items()}
    figures["variance_id"] = explained(patches, {name: ids[name][some] for name, some in few.items()})
    if arm.kind != "flat":
        figures["variance_semantic"] = explained(patches, {n: found[n][0][some] for n, some in few.items()})
    counts = torch.bincount(torch.cat([ids["probe"].flatten(), ids["test"].flatten()]), minlength=codes.vocabulary)
    share = counts.double() / counts.sum()
    figures["used"] = (counts > 0).double().mean().item()
    figures["bits"] = -torch.xlogy(share, share).sum().item() / math.log(2)
    figures["perplexity"] = 2 ** figures["bits"]
    needed = net.modules_of(set().union(*stages(arm)))
    figures["parameters"] = sum(p.numel() for module in needed for p in module.parameters()) / 1e6
    figures["codebook"] = 0 if codes.semantic is None else codes.semantic.codebook.numel()
    figures["codebook"] += 0 if codes.pixel is None else codes.pixel.pix_codebook.numel()
    return figures, decoded


def explained(patches: dict[str, Tensor], ids: dict[str, Tensor]) -> float:
    """Share of the variance of the test patches [n, 192] that the mean probe patch of the same id explains."""
    x, x_ids, test, test_ids = patches["probe"], ids["probe"].flatten(), patches["test"], ids["test"].flatten()
    size = int(max(x_ids.max(), test_ids.max())) + 1
    counts = torch.bincount(x_ids, minlength=size)
    means = torch.zeros(size, x.shape[1]).index_add_(0, x_ids, x) / counts.clamp_min(1).unsqueeze(1)
    means = torch.where(counts.unsqueeze(1) > 0, means, x.mean(0))
    return 1 - ((test - means[test_ids]).square().sum() / (test - test.mean(0)).square().sum()).item()


# ---- probes ----


def understanding(vectors: dict[str, Tensor], labels: dict[str, Tensor], seed: int, steps: int) -> dict[str, float]:
    """shape, colour and pair_ap from vectors [N, 8, 8, D] of the sets "probe" and "test"."""
    vectors = {name: vectors[name] for name in ("probe", "test")}
    cells = F.one_hot(cell_of_patches(GRID).flatten(), 9).float()
    cells = (cells / cells.sum(0)).T  # [9, 64]: the mean of each cell
    center = vectors["probe"].float().flatten(0, 2)
    shift, scale = center.mean(0), center.std(0).clamp_min(1e-6)
    tokens = {name: ((x.float() - shift) / scale).flatten(1, 2) for name, x in vectors.items()}
    held = {name: labels[name][..., 0] >= 0 for name in tokens}
    x = {name: (cells @ t)[held[name]] for name, t in tokens.items()}
    figures = {}
    for n, name in enumerate(("shape", "colour")):
        y = {part: labels[part][held[part]][:, n] for part in x}
        figures[name] = linear_probe(x["probe"], y["probe"], x["test"], y["test"])
    return figures | {"pair_ap": pair_probe(tokens, {name: pairs(labels[name]) for name in tokens}, seed, steps)}


def linear_probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Accuracy of logistic regression from x [n, D] to classes y [n]."""
    shift, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    x, test_x = (x - shift) / scale, (test_x - shift) / scale
    layer = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=150, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 1e-4 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return (layer(test_x).argmax(1) == test_y).float().mean().item()


def pairs(labels: Tensor) -> Tensor:
    """Labels [N, 9, 4] -> the (shape, colour) pairs in each picture: float32 [N, 48], 1 or 0."""
    pair = torch.where(labels[..., 0] >= 0, labels[..., 0] * len(shapes.COLOURS) + labels[..., 1], PAIRS)
    return F.one_hot(pair, PAIRS + 1).amax(1)[:, :PAIRS].float()


def pair_probe(tokens: dict[str, Tensor], targets: dict[str, Tensor], seed: int, steps: int) -> float:
    """Mean average precision over pairs of a probe that attends to tokens [N, 64, D] with one query a pair."""
    torch.manual_seed(seed)
    hidden = nn.Sequential(nn.Linear(tokens["probe"].shape[-1], 128), nn.GELU())
    heads = nn.Linear(128, 2 * PAIRS)  # where to look, and what is seen there
    bias = nn.Parameter(torch.full((PAIRS,), -3.0))
    optimizer = torch.optim.AdamW([*hidden.parameters(), *heads.parameters(), bias], weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)

    def logits(x: Tensor) -> Tensor:
        look, seen = heads(hidden(x)).chunk(2, dim=-1)
        return (look.softmax(1) * seen).sum(1) + bias

    for _ in range(steps):
        pick = torch.randint(len(tokens["probe"]), (128,))
        loss = F.binary_cross_entropy_with_logits(logits(tokens["probe"][pick]), targets["probe"][pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        scores = torch.cat([logits(x) for x in tokens["test"].split(BATCH)])
    return average_precision(scores, targets["test"])


def average_precision(scores: Tensor, targets: Tensor) -> float:
    """Mean over the classes that occur of the average precision; scores, targets [N, C]."""
    hits = targets.gather(0, scores.argsort(0, descending=True)).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    present = hits.sum(0) > 0
    return ((precision * hits).sum(0) / hits.sum(0).clamp_min(1))[present].mean().item()


def probe_ids(ids: dict[str, Tensor], labels: dict[str, Tensor], vocabulary: int, steps: int = 150) -> float:
    """Accuracy of the shape from the ids [N, 8, 8] in an object's cell: a row of logits is learned for each id."""
    cell = cell_of_patches(GRID).flatten()
    rows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, all_ids in ids.items():
        held = labels[name][..., 0] >= 0
        image, place = held.nonzero(as_tuple=True)
        member = cell[None] == place[:, None]  # [objects, 64]
        objects, patch = member.nonzero(as_tuple=True)
        offsets = member.sum(1).cumsum(0) - member.sum(1)
        rows[name] = all_ids.flatten(1)[image[objects], patch], offsets, labels[name][held][:, 0]
    table = nn.EmbeddingBag(vocabulary, len(shapes.SHAPES), mode="mean")
    nn.init.zeros_(table.weight)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.1)
    tokens, offsets, y = rows["probe"]
    for _ in range(steps):
        loss = F.cross_entropy(table(tokens, offsets), y) + 1e-4 * table.weight.square().sum() / len(shapes.SHAPES)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tokens, offsets, y = rows["test"]
    with torch.no_grad():
        return (table(tokens, offsets).argmax(1) == y).float().mean().item()
