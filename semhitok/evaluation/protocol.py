"""The evaluation of a tokenizer, or of any other's reconstructions, under one protocol.

References are the centre crops of `resize_crop` (bicubic, antialiased) at the tokenizer's size, rounded to 8 bits,
halves to even, and stored without loss. A tokenizer sees the stored crops. Reconstructions are rounded and stored the
same way before anything is measured. Networks run in fp32 without TF32, on groups of constant size (see `groups`);
figures of single images are summed in float64 in the order of names.

OUT/protocol.json     all this, with the number of images and the SHA-256 of the references' names and pixels
OUT/reference/        the crops; a folder keeps its references: another set is an error
OUT/reconstructions/  of the latest evaluation in this folder
OUT/evaluation.json   every figure, those of every image, versions
OUT/index.html        the table and some images

Started by `accelerate launch` or `torchrun`, the processes share the work and get the figures of one process.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semhitok import distributed
from semhitok._files import write_atomic
from semhitok.data.images import resize_crop, save_png
from semhitok.evaluation import page
from semhitok.evaluation.frechet import FeatureStatistics, Network, feature_network, frechet_distance
from semhitok.evaluation.groups import GROUP, exact, rows_in_order
from semhitok.evaluation.metrics import gmsd, psnr, sliced_wasserstein, ssim
from semhitok.evaluation.probes import folds_of, probe, read_labels
from semhitok.evaluation.sets import check_same_names, named_images, progress, read_uint8, store, to_uint8
from semhitok.models.lpips import perceptual_loss
from semhitok.tokenizer import SemHiTok
from semhitok.usage import CodeUsage

_SLICED = 256  # images whose patches the sliced Wasserstein distance compares
_SMALLEST = 16  # pixels a side: what SSIM and the sliced Wasserstein distance need
_IMAGE_FIGURES = ("psnr", "ssim", "gmsd", "lpips", "flat_ids_kept", "semantic_ids_kept", "semantic_cosine")

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
        labels: see `read_labels`; probes of features need them.
        features: see `feature_network`; one more Fréchet distance, besides rFID.
        name: of the tokenizer, for the report.

    Returns:
        What evaluation.json holds, the same on every process: "subject", "figures" {name: value}, "absent" {name: why},
        "warnings", "images" [{"name", ...}], "protocol", "versions".

    Raises:
        ValueError: unreadable images (all are tried before), two of one name, other references or files in `out`, or
            wrong labels.
        OSError: a file or the weights of `features` cannot be had, or `out` cannot be written.
    """
    config = tokenizer.config
    subject = {"tokenizer": name, "codebook_sha256": tokenizer.codebook_hash, "bits_per_pixel": config.bits_per_pixel}
    return _evaluate(
        subject, named_images(sources), Path(out), config.image_size, tokenizer, None, labels=labels, features=features
    )


def evaluate_reconstructions(
    folder: str | os.PathLike[str],
    sources: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    features: str | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    """Evaluate a folder of reconstructions, of whatever tokenizer, as `evaluate_tokenizer` does.

    Args:
        folder: one square image for each of `sources`, of the same name (suffixes don't count), all of one size, which
            is the size the originals are cropped to.
        sources, out, features: as in `evaluate_tokenizer`.
        device: of the networks.

    Raises:
        ValueError: also reconstructions that are missing, too many, or not of one square size.
        OSError: as `evaluate_tokenizer` does.
    """
    images, reconstructions = named_images(sources), named_images([folder])
    check_same_names(images, reconstructions, f"{folder}: reconstructions")
    size = read_uint8(next(iter(reconstructions.values()))).shape[-1]
    subject = {"reconstructions": str(folder)}
    return _evaluate(subject, images, Path(out), size, None, reconstructions, features=features, device=device)


class Networks:
    """What the figures of image pairs need, and which of it cannot be had.

    Attributes:
        distances: {what a Fréchet distance is called: its network}.
        perceptual: LPIPS, or None.
        absent: {figure: why it is missing}.
    """

    def __init__(self, features: str | None, device: torch.device | str) -> None:
        self.distances: dict[str, Network] = {}
        self.perceptual: nn.Module | None = None
        self.absent: dict[str, str] = {}
        # One process at a time fetches weights; the others find them.
        for turn in range(min(2, distributed.world_size())):
            if (distributed.rank() > 0) == turn:
                if features is not None:
                    label, network = feature_network(features, device)
                    self.distances[label] = network
                if "rfid" not in self.distances:
                    try:
                        self.distances = {"rfid": feature_network("inception", device)[1]} | self.distances
                    except (ImportError, OSError, ValueError) as error:
                        self.absent["rfid"] = str(error)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # lpips asks torchvision in an old way
                        self.perceptual = perceptual_loss().to(device)
                except (ImportError, OSError, RuntimeError) as error:
                    self.absent["lpips"] = str(error)
            distributed.gather_objects(None)
        found = distributed.gather_objects((sorted(self.distances), self.perceptual is None))
        if found != found[:1] * len(found):
            raise OSError(f"networks: expected the same on every process, got {found}")


def pair_rows(images: Tensor, reconstructions: Tensor, networks: Networks) -> dict[str, Tensor]:
    """Figures and features of each pair of uint8 images [GROUP, 3, S, S]: rows [GROUP, ...] by name."""
    x, y = images.float() / 255, reconstructions.float() / 255
    rows = {"psnr": psnr(y, x), "ssim": ssim(y, x), "gmsd": gmsd(y, x)}
    if networks.perceptual is not None:
        rows["lpips"] = networks.perceptual(y * 2 - 1, x * 2 - 1).flatten().double()
    for label, network in networks.distances.items():
        rows[f"{label} original"], rows[f"{label} reconstruction"] = network(images), network(reconstructions)
    return rows


def tokenizer_rows(tokenizer: SemHiTok, images: Tensor, pool: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Reconstructions of uint8 images [B, 3, S, S], uint8 too, and what was seen on the way.

    Returns:
        Reconstructions, and rows by name: codes [B, h, w]; shares [B] of ids kept when the reconstruction is encoded;
        semantic_cosine [B], of the semantic decoder's features to the teacher's standardised ones; with `pool` the
        means over the grid of the teacher's features, z_sem, q_sem ++ q_pix and q_sem, [B, C] each.
    """
    x = images.float() / 255
    teacher = tokenizer.semantic_features(x)
    z_sem = tokenizer.semantic_head(teacher)
    codes = tokenizer.quantizer(z_sem, tokenizer.encoder(x)).codes
    q = tokenizer.features(codes)
    reconstructions = to_uint8(tokenizer.decode(codes))
    again = tokenizer.encode(reconstructions.float() / 255)
    semantic, semantic_again = (tokenizer.quantizer.split(ids)[0] for ids in (codes, again))
    predicted = tokenizer.semantic_decoder(q.semantic).float()
    target = tokenizer.semantic_head.standardize(teacher)
    rows = {
        "codes": codes,
        "flat_ids_kept": (again == codes).double().mean((1, 2)),
        "semantic_ids_kept": (semantic_again == semantic).double().mean((1, 2)),
        "semantic_cosine": F.cosine_similarity(predicted, target, dim=-1).double().mean((1, 2)),
    }
    if pool:
        vectors = {
            "teacher": teacher,
            "z_sem": z_sem,
            "q_sem ++ q_pix": torch.cat([q.semantic, q.pixel], dim=-1),
            "q_sem": q.semantic,
        }
        rows |= {f"features {name}": vector.float().mean((1, 2)) for name, vector in vectors.items()}
    return reconstructions, rows


def measure(
    batches: Iterable[Tensor], compute: Callable[[Tensor], dict[str, Tensor]], *, usage: CodeUsage | None = None
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, Tensor]]:
    """All figures of the rows that `compute` makes, from batches of any sizes, over all processes.

    Args:
        batches, compute: as for `rows_in_order`; `compute` gives what `pair_rows` and `tokenizer_rows` give.
        usage: counts "codes".

    Returns:
        Figures of the set {name: value}; of every image {name: [value]}, in order; and pooled features {name: [N, C]}.
        Only the first process has them; the others get empty ones.
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
                elif name in _IMAGE_FIGURES:
                    images.setdefault(name, []).extend(row.tolist())
                elif name.startswith("features "):
                    pooled.setdefault(name.removeprefix("features "), []).append(row.cpu())
                else:
                    statistics.setdefault(name, FeatureStatistics()).update(row)
    figures = {name: math.fsum(values) / len(values) for name, values in images.items()}
    for name in statistics:
        if name.endswith(" original"):
            label = name.removesuffix(" original")
            figures[label] = frechet_distance(statistics[name], statistics[f"{label} reconstruction"])
    if usage is not None and distributed.rank() == 0:
        figures |= {f"{view}_{key}": value for view, row in usage.summary().items() for key, value in row.items()}
    return figures, images, {name: torch.cat(rows) for name, rows in pooled.items()}


def _evaluate(
    subject: dict[str, Any],
    images: dict[str, Path],
    out: Path,
    size: int,
    tokenizer: SemHiTok | None,
    reconstructions: dict[str, Path] | None,
    *,
    labels: str | os.PathLike[str] | None = None,
    features: str | None = None,
    device: torch.device | str = "cpu",
) -> Report:
    # What can be wrong is found before the long work.
    if size < _SMALLEST:
        raise ValueError(f"size: expected images of at least {_SMALLEST} x {_SMALLEST} pixels, got {size}")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, got {len(images)}")
    if tokenizer is not None and tokenizer.teacher is None:
        raise ValueError("tokenizer: expected one with its teacher, got one without it")
    truth = read_labels(labels, images) if labels is not None else None
    device = next(tokenizer.parameters()).device if tokenizer is not None else torch.device(device)
    old = _earlier(out)
    networks = Networks(features, device)

    protocol = _protocol(len(images), size, truth)
    protocol["reference_sha256"] = _make_references(images, out, size, old, protocol)
    folders = out / "reference", out / "reconstructions"
    if distributed.rank() == 0:
        for name in ("evaluation.json", "index.html"):
            (out / name).unlink(missing_ok=True)
    if reconstructions is None:
        _replace(None, folders[1])
    else:
        _staged(lambda folder: store(reconstructions, folder, lambda image: _sized(image, size), "copy"), folders[1])

    names = list(images)
    usage = None
    if tokenizer is not None:
        quantizer = tokenizer.quantizer
        usage = CodeUsage(quantizer.num_codes, quantizer.num_sub_codes, offsets=quantizer.offsets)

    def compute(numbers: Tensor) -> dict[str, Tensor]:
        group = [names[n] for n in numbers.tolist()]
        x = torch.stack([read_uint8(folders[0] / f"{name}.png") for name in group]).to(device)
        rows: dict[str, Tensor] = {}
        if tokenizer is not None:
            y, rows = tokenizer_rows(tokenizer, x, truth is not None)
            for name, image in dict(zip(group, y, strict=True)).items():
                path = folders[1] / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(image.float() / 255, path)
        else:
            y = torch.stack([read_uint8(folders[1] / f"{name}.png") for name in group]).to(device)
        return rows | pair_rows(x, y, networks)

    turns = torch.arange(len(images)).split(GROUP * distributed.world_size())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figures, of_images, pooled = measure(progress(turns, "measure"), compute, usage=usage)
    distributed.gather_objects(None)  # all reconstructions are there
    report: Report = {}
    if distributed.rank() == 0:
        figures["sliced_wasserstein"] = _sliced_wasserstein(names, folders)
        for name, rows in pooled.items():
            assert truth is not None
            figures |= {f"{kind}[{name}]": share for kind, share in probe(rows, truth).items()}
        if "bits_per_pixel" in subject:
            figures["bits_per_pixel"] = subject["bits_per_pixel"]
        report = {
            "subject": subject,
            "figures": figures,
            "absent": networks.absent,
            "warnings": [str(w.message) for w in caught if w.category is UserWarning],
            "images": [
                {"name": name} | {key: values[n] for key, values in of_images.items()} for n, name in enumerate(names)
            ],
            "protocol": protocol,
            "versions": _versions(device),
        }
        # No browser or strict parser reads Python's Infinity.
        text = json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"
        write_atomic(out / "index.html", page.html(report).encode())
        write_atomic(out / "evaluation.json", text.encode())
    return distributed.gather_objects(report)[0]


def _protocol(count: int, size: int, labels: Sequence[str] | None) -> dict[str, Any]:
    protocol: dict[str, Any] = {
        "images": count,
        "size": size,
        "crop": "shorter side resized to size, then the centre",
        "filter": "bicubic, antialiased",
        "rounding": "8 bits, halves to even, references and reconstructions",
        "order": "by name",
        "precision": "networks fp32 without TF32, sums float64",
        "group": GROUP,
        "sliced_wasserstein_images": min(count, _SLICED),
    }
    if labels is not None:
        majority = max(labels.count(label) for label in set(labels)) / count
        protocol["probes"] = {
            "split": f"stratified {folds_of(labels)}-fold, shuffled by seed 0",
            "classes": len(set(labels)),
            "largest_class": majority,
        }
    return protocol


def _earlier(out: Path) -> dict[str, Any]:
    """protocol.json of an earlier evaluation in this folder, {} for none.

    Raises:
        ValueError: a folder with other files.
        NotADirectoryError: a file.
    """
    path = out / "protocol.json"
    found: dict[str, Any] = {}
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out: expected a folder, got the file {out}")
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("expected an object")
        except ValueError as error:
            raise ValueError(f"{path}: not of an evaluation: {error}") from error
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: expected a new folder or that of an evaluation, got {out} with other files")
    distributed.gather_objects(None)  # before the first process writes
    return found


def _make_references(
    images: dict[str, Path], out: Path, size: int, old: dict[str, Any], protocol: dict[str, Any]
) -> str:
    """Store the references, and protocol.json with their hash, which is returned."""
    path = out / "protocol.json"
    if distributed.rank() == 0 and not old:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, b"{}\n")  # this folder is an evaluation's from now on

    def make(folder: Path) -> str:
        digest = store(images, folder, lambda image: resize_crop(image, size), "reference")
        new = {**protocol, "reference_sha256": digest}
        for key in ("images", "size", "filter", "rounding", "reference_sha256"):
            if old and old.get(key) != new[key]:
                raise ValueError(
                    f"{out}: holds an evaluation on other references: {key} was {old.get(key)}, now {new[key]}; "
                    "choose another folder"
                )
        return digest

    digest = _staged(make, out / "reference")
    if distributed.rank() == 0:
        text = json.dumps({**protocol, "reference_sha256": digest}, indent=2) + "\n"
        write_atomic(path, text.encode())
    return digest


def _staged(make: Callable[[Path], str], folder: Path) -> str:
    """`make` a folder's content beside it, then put it in its place: no file of an earlier one stays."""
    staging = folder.parent / f".{folder.name}"
    _replace(None, staging)
    try:
        result = make(staging)
    except BaseException:
        if distributed.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    _replace(staging, folder)
    return result


def _replace(source: Path | None, folder: Path) -> None:
    """Put `source`, or an empty folder, in the place of `folder`, for all processes."""
    distributed.gather_objects(None)
    if distributed.rank() == 0:
        if folder.exists():
            shutil.rmtree(folder)
        if source is None:
            folder.mkdir(parents=True)
        else:
            source.rename(folder)
    distributed.gather_objects(None)


def _sized(image: Tensor, size: int) -> Tensor:
    if image.shape != (3, size, size):
        found = " x ".join(map(str, image.shape[1:]))
        raise ValueError(f"expected {size} x {size} pixels (the width of the first), got {found}")
    return image


def _sliced_wasserstein(names: list[str], folders: tuple[Path, Path]) -> float:
    """Of images spread evenly over the set."""
    count = min(len(names), _SLICED)
    chosen = [names[n * len(names) // count] for n in range(count)]
    original, reconstruction = (
        torch.stack([read_uint8(folder / f"{name}.png") for name in chosen]).float() / 255 for folder in folders
    )
    return sliced_wasserstein(reconstruction, original, torch.Generator().manual_seed(0))[1]


def _versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "device": device.type}
    for package in ("semhitok", "torch", "torchvision", "timm", "lpips", "torch-fidelity", "scikit-learn"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    """Infinite numbers as text, which JSON can hold."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
