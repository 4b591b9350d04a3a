"""How well features of images predict labels: a linear probe and nearest neighbours, by cross-validation."""

from __future__ import annotations

import csv
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from semhitok._files import parse_json
from semhitok._optional import require

_FOLDS = 5
_NEIGHBOURS = 5


def read_labels(source: str | os.PathLike[str], names: Iterable[str]) -> list[str]:
    """The label of each image.

    Args:
        source: "folders" (the first folder of an image's name), or a file: .json, an object {name: label}, or .csv,
            rows of name and label without a heading. Names may have a suffix; labels of other images are ignored.
        names: of the images, as `named_images` gives them.

    Raises:
        ValueError: no valid file of labels, or an image without a label or with two.
        OSError: the file cannot be read.
    """
    names = list(names)
    if str(source) == "folders":
        found = {name: name.partition("/")[0] for name in names if "/" in name}
    else:
        path = Path(source)
        if path.suffix not in (".csv", ".json"):
            raise ValueError(f"labels: expected folders, or a .csv or .json file, got {path}")
        known = set(names)
        found = {}
        for name, label in _rows(path):
            name = name if name in known else name.rpartition(".")[0]
            if name not in known:
                continue
            if found.setdefault(name, label) != label:
                raise ValueError(f"{path}: expected one label for {name}, got {found[name]} and {label}")
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"labels: expected one for every image, {len(missing)} have none, such as {missing[0]}")
    return [found[name] for name in names]


def probed(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """The numbers of the images whose label another one has, too; and the labels of one image, left out of probes."""
    counts = Counter(labels)
    return [n for n, label in enumerate(labels) if counts[label] > 1], [x for x, count in counts.items() if count == 1]


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless there are at least 2 labels, each of at least 2 images."""
    counts = Counter(labels)
    label, fewest = min(counts.items(), key=lambda item: item[1], default=("", 0))
    if len(counts) < 2 or fewest < 2:
        found = f"{len(counts)}, of {label!r} {fewest}"
        raise ValueError(f"labels: expected at least 2, each of at least 2 images, got {found}")


def probe(features: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """Accuracy of a linear probe and of nearest neighbours on images they were not fitted to.

    Stratified cross-validation, shuffled by a fixed seed, with 5 folds, or as many as the rarest label has images.
    Features are standardised with the mean and deviation of each fold's training part. The linear probe is multinomial
    logistic regression, L2 with C = 1; the neighbours are the 5 of largest cosine.

    Args:
        features: float [N, D], one row for each image.
        labels: N of them.

    Returns:
        {"linear", "knn"}: shares of all N images, in [0, 1].

    Raises:
        ValueError: not N rows, or labels that `check_labels` refuses.
    """
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"features: expected [{len(labels)}, D], as many as labels, got {list(features.shape)}")
    return _cross_validate(features.double().cpu().numpy(), labels)


def probe_ids(ids: Tensor, labels: Sequence[str]) -> dict[str, float]:
    """`probe` of the `histograms` of ids, which are scaled without being centred, so that they stay sparse.

    Args:
        ids: int64 [N, T], those of N images.
        labels: N of them.

    Returns, raises: as `probe`.
    """
    if ids.ndim != 2 or len(ids) != len(labels):
        raise ValueError(f"ids: expected [{len(labels)}, T], as many as labels, got {list(ids.shape)}")
    return _cross_validate(histograms(ids), labels)


def histograms(ids: Tensor) -> Any:
    """Square roots of how often each id occurs in an image: ids int64 [N, T] -> a sparse matrix [N, ids that occur].

    Its memory does not grow with the number of codes.
    """
    numpy, sparse = require("numpy"), require("scipy.sparse", "eval")
    found, columns = ids.cpu().unique(return_inverse=True)
    rows = numpy.arange(len(ids)).repeat(ids.shape[1])
    counts = (numpy.ones(ids.numel()), (rows, columns.flatten().numpy()))
    return sparse.csr_matrix(counts, shape=(len(ids), len(found))).sqrt()


def classify(x: Any, y: Any, test_x: Any, C: float = 1.0) -> dict[str, Any]:
    """The classes of test_x by both probes that are fitted to rows x of classes y.

    Args:
        x, test_x: features [n, D] and [N, D], NumPy arrays, or sparse matrices, which are scaled but not centred.
        y: classes [n].
        C: of the linear probe, which minimises the sum of the cross entropy + |W|^2 / (2 C).

    Returns:
        {"linear", "knn"}: classes [N].
    """
    sparse = require("scipy.sparse", "eval")
    linear_model, neighbors, preprocessing = (
        require(f"sklearn.{name}", "eval") for name in ("linear_model", "neighbors", "preprocessing")
    )
    scale = preprocessing.StandardScaler(with_mean=not sparse.issparse(x)).fit(x)
    x, test_x = scale.transform(x), scale.transform(test_x)
    classifiers = {
        "linear": linear_model.LogisticRegression(C=C, max_iter=1000),
        "knn": neighbors.KNeighborsClassifier(min(_NEIGHBOURS, len(y)), metric="cosine"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fit that stops before it converges
        return {name: classifier.fit(x, y).predict(test_x) for name, classifier in classifiers.items()}


def _cross_validate(x: Any, labels: Sequence[str]) -> dict[str, float]:
    """What `probe` returns, for features [N, D] as `classify` takes them."""
    check_labels(labels)
    numpy, selection = require("numpy"), require("sklearn.model_selection", "eval")
    y = numpy.array(labels)
    folds = selection.StratifiedKFold(folds_of(labels), shuffle=True, random_state=0)
    right = {"linear": 0, "knn": 0}
    for train, test in folds.split(x, y):
        for name, classes in classify(x[train], y[train], x[test]).items():
            right[name] += int((classes == y[test]).sum())
    return {name: count / len(y) for name, count in right.items()}


def folds_of(labels: Sequence[str]) -> int:
    """Folds of the cross-validation."""
    return min(_FOLDS, *Counter(labels).values())


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            data = parse_json(text)
            if not isinstance(data, dict) or not all(isinstance(label, (str, int)) for label in data.values()):
                raise ValueError("expected an object of names and labels")
            return [(name, str(label)) for name, label in data.items()]
        rows = [row for row in csv.reader(text.splitlines()) if row]
        for row in rows:
            if len(row) != 2:
                raise ValueError(f"expected rows of name and label, got {row}")
        return [(name.strip(), label.strip()) for name, label in rows]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a file of labels: {error}") from error
