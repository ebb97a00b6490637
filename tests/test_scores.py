"""Scores of logits against labels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cifar_jax.scoring.inference import log_softmax, softmax
from cifar_jax.scoring.scores import calibration_error, score, wilson_interval

LOGITS = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
LABELS = np.array([0, 1, 1, 1], np.int32)


def test_accuracy_loss_and_confusion_count_every_image() -> None:
    scores = score(LOGITS, LABELS)
    assert (scores.n, scores.correct, scores.accuracy) == (4, 2, 0.5)
    assert scores.loss == pytest.approx(-np.log([0.7, 0.8, 0.3, 0.2]).mean())
    assert scores.confusion.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert scores.precision == [0.5, 1.0, 0.0]
    assert scores.recall == [1.0, 1 / 3, None]  # there is no image of the third class
    assert scores.shares.tolist() == [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]]
    assert [scores.taken_for(k) for k in range(3)] == [None, (0, 1), None]


def test_mistakes_come_with_the_most_confident_first() -> None:
    scores = score(LOGITS, LABELS)
    assert scores.mistakes(LABELS, most=10).tolist() == [3, 2]  # at 0.6 and at 0.5
    assert scores.mistakes(LABELS, most=1).tolist() == [3]
    assert scores.confidence == pytest.approx([0.7, 0.8, 0.5, 0.6])


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_calibration_error_weighs_each_bin_by_its_images() -> None:
    confidence = np.array([0.9, 0.9, 0.9, 0.9, 0.4, 0.95, 1.0])
    right = np.array([True, True, True, False, False, False, True])
    error, bins = calibration_error(confidence, right)
    assert error == pytest.approx((4 * abs(0.75 - 0.9) + 0.4 + 2 * abs(0.5 - 0.975)) / 7)
    assert [count for count, _, _ in bins] == [1, 4, 2], "1 is in the last bin"


def test_log_softmax_stays_finite() -> None:
    logits = np.array([[1000.0, 0.0, -1000.0]], np.float32)
    assert log_softmax(logits).tolist() == [[0.0, -1000.0, -2000.0]]
    assert softmax(logits).tolist() == [[1.0, 0.0, 0.0]]
    assert math.isfinite(score(logits, np.array([2], np.int32)).loss)
