"""What an evaluation measures: rows of values for batches of images, and the figures that follow from all rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok import distributed
from semhitok.data.images import to_uint8
from semhitok.evaluation.fixed_batches import exact, rows_in_order
from semhitok.evaluation.frechet import FeatureStatistics, Network, feature_network, frechet_distance
from semhitok.evaluation.metrics import METRICS
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

_POOLED, _ORIGINAL, _RECONSTRUCTION = "pooled ", " original", " reconstruction"  # parts of rows' names


class PairMetrics:
    """The metrics of image pairs, with their networks.

    Args:
        features: see `feature_network`; a Fréchet distance besides rFID.
        device: of the networks.

    Attributes:
        functions: {metric: its function}.
        distances: {name of a Fréchet distance: its network}.
        absent: {metric: why it is left out}.

    Raises:
        ImportError, OSError, ValueError: the network that `features` names is not available.
    """

    def __init__(self, features: str | None, device: torch.device | str) -> None:
        self.functions = {name: metric.function for name, metric in METRICS.items() if metric.function is not None}
        self.distances: dict[str, Network] = {}
        self.absent: dict[str, str] = {}
        # The first process fetches weights before the others look for them.
        for turn in range(min(2, distributed.world_size())):
            if (distributed.rank() > 0) == turn:
                self._load(features, device)
            distributed.gather_objects(None)
        found = distributed.gather_objects((sorted(self.distances), sorted(self.absent)))
        if found != found[:1] * len(found):
            raise OSError(f"networks: expected the same on every process, got {found}")

    def _load(self, features: str | None, device: torch.device | str) -> None:
        named = dict([feature_network(features, device)]) if features is not None else {}
        self.distances = named
        if "rfid" not in named:
            try:
                self.distances = dict([feature_network("inception", device)]) | named
            except (ImportError, OSError, ValueError) as error:
                self.absent["rfid"] = str(error)
        for name, metric in METRICS.items():
            if metric.load is not None:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
                        self.functions[name] = metric.load(device)
                except (ImportError, OSError, RuntimeError) as error:
                    self.absent[name] = str(error)

    def rows(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Values and features of each pair of uint8 images [B, 3, S, S]: rows [B, ...] by name."""
        x, y = images.float() / 255, reconstructions.float() / 255
        rows = {name: function(y, x) for name, function in self.functions.items()}
        for label, network in self.distances.items():
            rows[label + _ORIGINAL], rows[label + _RECONSTRUCTION] = network(images), network(reconstructions)
        return rows


def tokenizer_rows(tokenizer: SemHiTok, images: Tensor, pool: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstruct uint8 images [B, 3, S, S], and measure the tokenizer on the way.

    Returns:
        Reconstructions, uint8 too, and rows by name: codes [B, h, w]; the shares [B] of flat and semantic ids that come
        back when the reconstruction is encoded; semantic_cosine [B], of the semantic decoder's features and the
        teacher's standardised ones, with several teachers the mean of each one's cosine, weighted with the shares; with
        `pool`, the semantic ids [B, h * w] and the means over the grid of the teachers' features, z_sem,
        q_sem ++ q_pix, q_sem and the semantic decoder's features, [B, C] each.
    """
    x = images.float() / 255
    teacher = tokenizer.semantic_features(x)
    z_sem = tokenizer.semantic_head(teacher)
    codes = tokenizer.quantizer(z_sem, tokenizer.encoder(x)).codes
    q = tokenizer.features(codes)
    reconstructions = to_uint8(tokenizer.decode(codes))
    codes_again = tokenizer.encode(reconstructions.float() / 255)
    semantic, semantic_again = (tokenizer.quantizer.split(ids)[0] for ids in (codes, codes_again))
    predicted = tokenizer.semantic_decoder(q.semantic)
    pairs = tokenizer.semantic_head.pairs(predicted, tokenizer.semantic_head.standardize(teacher))
    cosines = [F.cosine_similarity(p, t, dim=-1).double().mean((1, 2)) for p, t in pairs]
    rows = {
        "codes": codes,
        "flat_ids_kept": (codes_again == codes).double().mean((1, 2)),
        "semantic_ids_kept": (semantic_again == semantic).double().mean((1, 2)),
        "semantic_cosine": tokenizer.semantic_head.average(cosines),
    }
    if pool:
        both = torch.cat([q.semantic, q.pixel], dim=-1)
        vectors = {"teacher": teacher, "z_sem": z_sem, "q_sem ++ q_pix": both, "q_sem": q.semantic}
        vectors["semantic decoder"] = predicted
        rows |= {_POOLED + name: vector.float().mean((1, 2)) for name, vector in vectors.items()}
        rows[_POOLED + "semantic ids"] = semantic.flatten(1)
    return reconstructions, rows


class Measured(NamedTuple):
    """Figures of a set of images."""

    figures: dict[str, float]  # of the set, {name: value}
    images: dict[str, list[float]]  # of each image, {name: [value]}, in order
    pooled: dict[str, Tensor]  # features to be probed, {name: [N, C]}, or ids, int64 [N, T]


def measure(
    batches: Iterable[Tensor], compute: Callable[[Tensor], dict[str, Tensor]], *, usage: CodeUsage | None = None
) -> Measured:
    """All figures that follow from the rows of `compute`, for batches of any sizes, over all processes.

    Args:
        batches, compute: as for `rows_in_order`; `compute` gives the rows of `PairMetrics` and `tokenizer_rows`.
        usage: counts "codes".

    Returns:
        The figures on the first process; empty ones on the others.

    Raises:
        ValueError: a row that is not in `METRICS`.
    """
    images: dict[str, list[float]] = {}
    pooled: dict[str, list[Tensor]] = {}
    statistics: dict[str, FeatureStatistics] = {}
    with exact():
        for rows in rows_in_order(batches, compute):
            if distributed.rank() > 0:
                continue
            for name, row in rows.items():
                if name == "codes":
                    if usage is not None:
                        usage.update(row)
                elif name in METRICS:
                    images.setdefault(name, []).extend(row.tolist())
                elif name.startswith(_POOLED):
                    pooled.setdefault(name.removeprefix(_POOLED), []).append(row.cpu())
                elif name.endswith((_ORIGINAL, _RECONSTRUCTION)):
                    statistics.setdefault(name, FeatureStatistics()).update(row)
                else:
                    raise ValueError(f"rows: expected names of METRICS, got {name!r}")
    figures = {name: math.fsum(values) / len(values) for name, values in images.items()}
    for name in statistics:
        if name.endswith(_ORIGINAL):
            label = name.removesuffix(_ORIGINAL)
            figures[label] = frechet_distance(statistics[name], statistics[label + _RECONSTRUCTION])
    if usage is not None and distributed.rank() == 0:
        figures |= usage.figures()
    return Measured(figures, images, {name: torch.cat(rows) for name, rows in pooled.items()})
