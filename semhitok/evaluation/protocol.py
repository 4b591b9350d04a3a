"""The evaluation of a tokenizer, or of any other tokenizer's reconstructions, under one protocol.

References are the centre crops of `resize_crop` (bicubic, antialiased) at the tokenizer's size, rounded to 8 bits,
halves to even, and stored without loss. A tokenizer sees the stored crops. Reconstructions are rounded and stored the
same way before anything is measured. Networks run in fp32 without TF32, on batches of constant size (see
`fixed_batches`); values of single images are summed in float64 in the order of names. `folder` lists the files.

Started by `accelerate launch` or `torchrun`, the processes share the work and get the figures of one process.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semhitok import distributed
from semhitok._messages import progress
from semhitok.data.images import read_uint8
from semhitok.data.passed_over import PassedOver
from semhitok.evaluation.fixed_batches import BATCH
from semhitok.evaluation.folder import EvaluationFolder
from semhitok.evaluation.measure import PairMetrics, measure, tokenizer_rows
from semhitok.evaluation.metrics import SMALLEST, sliced_wasserstein
from semhitok.evaluation.named_images import check_same_names, named_images
from semhitok.evaluation.page import html
from semhitok.evaluation.probes import check_labels, folds_of, probe, probe_ids, probed, read_labels
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

_SLICED = 256  # images whose patches the sliced Wasserstein distance compares

Report = dict[str, Any]


def evaluate_tokenizer(
    tokenizer: SemHiTok,
    sources: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    features: str | None = None,
    name: str = "",
) -> Report:
    """Evaluate a tokenizer on images, on its device.

    Args:
        tokenizer: with its teacher, in eval mode.
        sources: image files and folders.
        out: a new or empty folder, or that of an earlier evaluation on the same images.
        labels: see `read_labels`; the features are probed for them.
        features: see `feature_network`; a Fréchet distance besides rFID.
        name: of the tokenizer, for the report.

    Returns:
        The content of evaluation.json, the same on every process: "subject", "figures" {name: value}, "absent" {name:
        why}, "warnings", "images" [{"name", ...}], "protocol", "versions".

    Raises:
        ValueError: unreadable images (all are checked first), two of the same name, other references or files in
            `out`, or wrong labels.
        OSError: a file or the weights of `features` are not available, or `out` cannot be written.
    """
    if tokenizer.teacher is None:
        raise ValueError("tokenizer: expected one with its teacher, got one without it")
    config, quantizer = tokenizer.config, tokenizer.quantizer
    device = next(tokenizer.parameters()).device
    passed_over = PassedOver()
    images = named_images(sources, passed_over)
    evaluation = _Evaluation(images, config.image_size, Path(out), features, device, passed_over, labels)
    folder = evaluation.folder
    folder.clear_reconstructions()

    def compute(names: list[str]) -> dict[str, Tensor]:
        x = folder.references(names).to(device)
        y, rows = tokenizer_rows(tokenizer, x, pool=labels is not None)
        folder.add_reconstructions(names, y)
        return rows | evaluation.metrics.rows(x, y)

    subject = {"tokenizer": name, "codebook_sha256": tokenizer.codebook_hash, "bits_per_pixel": config.bits_per_pixel}
    usage = CodeUsage(quantizer.num_codes, quantizer.num_sub_codes, offsets=quantizer.offsets)
    return evaluation.run(subject, compute, usage)


def evaluate_reconstructions(
    folder: str | os.PathLike[str],
    sources: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    features: str | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Evaluate a folder of any tokenizer's reconstructions as `evaluate_tokenizer` does.

    Args:
        folder: one square image for each of `sources`, of the same name (suffixes don't count). All have one size, to
            which the originals are cropped.
        sources, out, features: as in `evaluate_tokenizer`.
        device: of the networks.

    Raises:
        ValueError: as `evaluate_tokenizer`; also reconstructions that are missing, too many, or not of one square size.
        OSError: as `evaluate_tokenizer`.
    """
    passed_over = PassedOver()
    images, reconstructions = named_images(sources, passed_over), named_images([folder], passed_over)
    check_same_names(images, reconstructions, f"{folder}: reconstructions")
    size = read_uint8(next(iter(reconstructions.values()))).shape[-1]
    evaluation = _Evaluation(images, size, Path(out), features, torch.device(device), passed_over)
    evaluation.folder.copy_reconstructions({name: reconstructions[name] for name in evaluation.names}, size)

    def compute(names: list[str]) -> dict[str, Tensor]:
        x, y = evaluation.folder.references(names), evaluation.folder.reconstructions(names)
        return evaluation.metrics.rows(x.to(device), y.to(device))

    return evaluation.run({"reconstructions": str(folder)}, compute)


class _Evaluation:
    """What both evaluations share. Building it finds errors before the long work, and stores the references."""

    def __init__(
        self,
        images: dict[str, Path],
        size: int,
        out: Path,
        features: str | None,
        device: torch.device,
        passed_over: PassedOver,
        labels: str | os.PathLike[str] | None = None,
    ) -> None:
        if size < SMALLEST:
            raise ValueError(f"size: expected images of at least {SMALLEST} x {SMALLEST} pixels, got {size}")
        if len(images) < 2:
            raise ValueError(f"images: expected at least 2, got {len(images)}")
        self.device, self.passed_over = device, passed_over
        label_of = {} if labels is None else dict(zip(images, read_labels(labels, images), strict=True))
        _check_probed(list(label_of.values()))
        self.folder = EvaluationFolder(out)
        self.metrics = PairMetrics(features, device)
        self.protocol, self.skipped = self.folder.store_references(
            images, size, lambda names: _protocol(len(names), size, [label_of[name] for name in names if label_of])
        )
        self.names = [name for name in images if name not in self.skipped]
        self.labels = [label_of[name] for name in self.names] if label_of else None
        self.probed, self.left_out = probed(self.labels or [])

    def run(
        self, subject: dict[str, Any], compute: Callable[[list[str]], dict[str, Tensor]], usage: CodeUsage | None = None
    ) -> Report:
        """Measure, and write the report. `compute` gives the rows of the images of `BATCH` names."""
        numbers = torch.arange(len(self.names)).split(BATCH * distributed.world_size())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = progress(numbers, "measure")
            measured = measure(batches, lambda x: compute([self.names[n] for n in x.tolist()]), usage=usage)
        distributed.gather_objects(None)  # all reconstructions are stored
        report: Report = {}
        if distributed.rank() == 0:
            figures = measured.figures | {"sliced_wasserstein": self._sliced_wasserstein()}
            for name, rows in measured.pooled.items():
                assert self.labels is not None
                labels = [self.labels[n] for n in self.probed]
                found = (probe if rows.is_floating_point() else probe_ids)(rows[self.probed], labels)
                figures |= {f"{kind}[{name}]": share for kind, share in found.items()}
            if "bits_per_pixel" in subject:
                figures["bits_per_pixel"] = subject["bits_per_pixel"]
            keys, columns = ["name", *measured.images], [self.names, *measured.images.values()]
            images = [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]
            messages = [self.passed_over.summary()] if self.passed_over.counts else []
            messages += [f"skipped: {reason}" for reason in self.skipped.values()]
            messages += [f"labels: {label!r} has one image and is left out of the probes" for label in self.left_out]
            messages += [str(w.message) for w in caught if w.category is UserWarning]
            report = {
                "subject": subject, "figures": figures, "absent": self.metrics.absent, "warnings": messages,
                "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped.items()],
                "unreadable": self.passed_over.unreadable,
                "images": images, "protocol": self.protocol, "versions": _versions(self.device),
            }  # fmt: skip
            self.folder.write_report(report, html(report))
        return distributed.gather_objects(report)[0]

    def _sliced_wasserstein(self) -> float:
        """Of images spread evenly over the set."""
        count = min(len(self.names), _SLICED)
        chosen = [self.names[n * len(self.names) // count] for n in range(count)]
        originals, reconstructions = self.folder.references(chosen), self.folder.reconstructions(chosen)
        generator = torch.Generator().manual_seed(0)
        return sliced_wasserstein(reconstructions.float() / 255, originals.float() / 255, generator)[1]


def _protocol(count: int, size: int, labels: Sequence[str]) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "images": count,
        "size": size,
        "crop": "shorter side resized to size, then the centre",
        "filter": "bicubic, antialiased",
        "rounding": "8 bits, halves to even, references and reconstructions",
        "order": "by name",
        "precision": "networks fp32 without TF32, sums float64",
        "group": BATCH,
        "sliced_wasserstein_images": min(count, _SLICED),
    }
    if labels:
        labels = _check_probed(labels)
        counts = Counter(labels)
        split = f"stratified {folds_of(labels)}-fold, shuffled by seed 0"
        protocol["probes"] = {
            "split": split,
            "classes": len(counts),
            "largest_class": max(counts.values()) / len(labels),
        }
    return protocol


def _check_probed(labels: Sequence[str]) -> list[str]:
    """The labels that are probed; ValueError if there are some, but too few of these."""
    chosen, _ = probed(labels)
    found = [labels[n] for n in chosen]
    if labels:
        check_labels(found)
    return found


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "device": device.type}
    for package in ("semhitok", "torch", "torchvision", "timm", "lpips", "ndf", "torch-fidelity", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
