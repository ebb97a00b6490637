"""Scores of logits against labels: accuracy with its interval, per class, calibration."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from cifar_jax.scoring.inference import log_softmax

_CALIBRATION_BINS = 15


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a network on labelled images.

    Attributes:
        n, correct: the number of images, and of those whose most probable class is the true one.
        accuracy_interval: the 95 % interval, :func:`wilson_interval`.
        loss: mean cross-entropy, nats.
        confusion: images of each true class (rows) by predicted class (columns), ``[K, K]``.
        calibration_error: how far confidence is from accuracy, 0..1, see :func:`calibration_error`.
        calibration: for each bin of confidence, ``(count, mean confidence, accuracy)``.
        predicted, confidence: each image's most probable class, and its probability, ``[N]``.
    """

    n: int
    correct: int
    accuracy_interval: tuple[float, float]
    loss: float
    confusion: NDArray[np.int64]
    calibration_error: float
    calibration: list[tuple[int, float, float]]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def precision(self) -> list[float | None]:
        """For each class, the fraction of its predictions that are right; None without any."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def recall(self) -> list[float | None]:
        """For each class, the fraction of its images that are recognised; None without any."""
        return _shares(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def shares(self) -> NDArray[np.float64]:
        """``confusion`` as fractions of each true class, ``[K, K]``; 0 if it has no images."""
        return self.confusion / np.maximum(self.confusion.sum(axis=1, keepdims=True), 1)

    def taken_for(self, k: int) -> tuple[int, int] | None:
        """The class that images of class ``k`` are most often mistaken for, and how many are.

        Of equals, the first; None without mistakes.
        """
        others = self.confusion[k].copy()
        others[k] = 0
        return (int(others.argmax()), int(others.max())) if others.any() else None

    def mistakes(self, labels: NDArray[np.int32], most: int) -> NDArray[np.int64]:
        """Indices of wrong predictions, the most confident first."""
        wrong = np.flatnonzero(self.predicted != labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:most]


def score(logits: NDArray[np.floating], labels: NDArray[np.int32]) -> Scores:
    """The scores of logits ``[N, K]`` against ``labels`` ``[N]``; N is at least 1."""
    n, num_classes = logits.shape
    log_probabilities = log_softmax(logits)
    predicted = logits.argmax(axis=-1)
    confidence = np.exp(log_probabilities[np.arange(n), predicted])
    confusion = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    right = predicted == labels
    error, bins = calibration_error(confidence, right)
    correct = int(right.sum())
    return Scores(
        n=n,
        correct=correct,
        accuracy_interval=wilson_interval(correct, n),
        loss=float(-log_probabilities[np.arange(n), labels].mean()),
        confusion=confusion,
        calibration_error=error,
        calibration=bins,
        predicted=predicted,
        confidence=confidence,
    )


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion ``correct / n``.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
    1927. With p = correct / n and z = 1.96: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n).
    """
    z = 1.959963984540054
    p = correct / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_]
) -> tuple[float, list[tuple[int, float, float]]]:
    """The expected calibration error, and its bins ``(count, mean confidence, accuracy)``.

    Sum over 15 equal bins of confidence of count/N · |accuracy - mean confidence|; empty bins are
    left out. Source: Guo et al., "On calibration of modern neural networks", 2017, equation 3.
    """
    which = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    bins = []
    for index in np.unique(which):
        inside = which == index
        bins.append(
            (int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean()))
        )
    error = sum(count * abs(accuracy - mean) for count, mean, accuracy in bins) / len(right)
    return error, bins


def _shares(parts: NDArray[np.int64], wholes: NDArray[np.int64]) -> list[float | None]:
    return [
        part / whole if whole else None
        for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)
    ]
