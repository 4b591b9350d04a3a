"""Ranks of captions among those of other photographs, and a linear pairing of captions with features of photographs.

The pairing is canonical correlation analysis of the words of captions (TF-IDF) and a feature vector of their
photograph, with a penalty on both sides. Directions count as much as they correlate, as in Gong et al. (2014), "A
multi-view embedding space for modeling internet images, tags, and their semantics".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from semhitok._optional import require

PENALTIES = (0.3, 1.0, 3.0, 10.0)  # shares of the mean variance that are added to all variances
FOLD = 5  # one photograph in so many chooses the penalty
RECALLS = (1, 5, 10)


def recalls(scores: Tensor) -> dict[str, float]:
    """Share of photographs whose own caption is among the best 1, 5 and 10, and the median rank.

    Args:
        scores: [N, N], of photograph (row) and caption (column); photograph n's own caption is n.

    Returns:
        "R@1", "R@5", "R@10", "median rank". Where scores are equal, R@k is what order by chance gives on average, and
        the rank is the middle one.

    Raises:
        ValueError: another shape, or a score that is not a number.
    """
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or not len(scores):
        raise ValueError(f"scores: expected [N, N], got {list(scores.shape)}")
    if bool(scores.isnan().any()):
        raise ValueError("scores: expected numbers, got NaN")
    own = scores.diagonal()[:, None]
    better, equal = ((scores > own).sum(1).double(), (scores == own).sum(1).double())
    found = {f"R@{k}": float(((k - better) / equal).clamp(0, 1).mean()) for k in RECALLS}
    return found | {"median rank": float((better + (equal + 1) / 2).quantile(0.5))}


class Words:
    """TF-IDF vectors of texts over the most frequent words of training captions.

    Args:
        captions: of the training photographs.
        count: words, at most.
    """

    def __init__(self, captions: Sequence[Sequence[str]], count: int) -> None:
        texts = require("sklearn.feature_extraction.text", "eval")
        self.vectorizer = texts.TfidfVectorizer(sublinear_tf=True, max_features=count, token_pattern=r"(?u)\b\w+\b")
        self.vectorizer.fit([text for several in captions for text in several])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> float64 [N, words], rows of length 1, or 0 for texts without a known word."""
        return torch.from_numpy(self.vectorizer.transform(texts).toarray())


class Pairing:
    """The pairing, fitted to photographs.

    Args:
        features: [N, D].
        texts: [M, V] of their captions.
        photograph: int64 [M], the row in `features` of each caption.
        penalty: see `PENALTIES`.
    """

    def __init__(self, features: Tensor, texts: Tensor, photograph: Tensor, penalty: float) -> None:
        self.mean, self.scale = features.mean(0), features.std(0, correction=0)
        self.scale = torch.where(self.scale > 0, self.scale, 1)
        self.text_mean = texts.mean(0)
        x, y = self._images(features)[photograph], texts - self.text_mean
        of_images, of_texts = (_penalised(z.T @ z / len(z), penalty) for z in (x, y))
        both = x.T @ y / len(x)
        root = torch.linalg.cholesky(of_images)
        from_texts = torch.cholesky_solve(both.T, torch.linalg.cholesky(of_texts))  # [V, D]
        # The squared correlations are the eigenvalues of root^-1 both of_texts^-1 both^T root^-T.
        inner = torch.linalg.solve_triangular(root, both @ from_texts, upper=False)
        inner = torch.linalg.solve_triangular(root, inner.T, upper=False)
        squares, directions = torch.linalg.eigh((inner + inner.T) / 2)
        projection = torch.linalg.solve_triangular(root.T, directions, upper=True)
        self.of_images = projection * squares.clamp_min(0).sqrt()
        self.of_texts = from_texts @ projection  # comes with the correlation as its factor

    def scores(self, features: Tensor, texts: Tensor) -> Tensor:
        """Features [N, D] and texts [M, V] -> cosines [N, M] of their projections, 0 where one of them is 0."""
        projected = self._images(features) @ self.of_images, (texts - self.text_mean) @ self.of_texts
        images, captions = (F.normalize(z, dim=1) for z in projected)
        return images @ captions.T

    def _images(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def pair(
    features: tuple[Tensor, Tensor], captions: tuple[Sequence[Sequence[str]], Sequence[str]], words: Words
) -> dict[str, float]:
    """`recalls` of the pairing on test photographs, with the penalty that pairs a fifth of the training ones best.

    Args:
        features: [N, D] of training and [T, D] of test photographs.
        captions: of each training photograph several, of each test photograph one.
        words: fitted to the training captions.

    Returns:
        See `recalls`; and the "penalty".
    """
    train, test = (x.double() for x in features)
    photograph = torch.tensor([n for n, several in enumerate(captions[0]) for _ in several])
    texts = words([text for several in captions[0] for text in several])
    chosen = PENALTIES[0]
    if len(train) >= 2 * FOLD:
        held = torch.arange(len(train)) % FOLD == 0
        of_rest = ~held[photograph]
        first = words([several[0] for several, is_held in zip(captions[0], held.tolist(), strict=True) if is_held])
        place = (~held).cumsum(0) - 1

        def quality(penalty: float) -> float:
            fitted = Pairing(train[~held], texts[of_rest], place[photograph[of_rest]], penalty)
            return sum(recalls(fitted.scores(train[held], first))[f"R@{k}"] for k in RECALLS)

        chosen = max(PENALTIES, key=quality)
    pairing = Pairing(train, texts, photograph, chosen)
    return recalls(pairing.scores(test, words(captions[1]))) | {"penalty": chosen}


def _penalised(covariance: Tensor, penalty: float) -> Tensor:
    """With `penalty` times the mean variance added to all, and a little where that is 0."""
    added = (penalty * covariance.diagonal().mean()).clamp_min(1e-9)
    return covariance + added * torch.eye(len(covariance), dtype=covariance.dtype)
