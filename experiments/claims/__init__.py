"""Sixty claims of the tutorial, each an experiment with a number and a verdict."""

from claims import (
    accuracy,
    arithmetic,
    features,
    geometry,
    pytorch_remarks,
    systems,
    training,
)

CLAIMS = [
    *arithmetic.CLAIMS,
    *geometry.CLAIMS,
    *systems.CLAIMS,
    *pytorch_remarks.CLAIMS,
    *accuracy.CLAIMS,
    *training.CLAIMS,
    *features.CLAIMS,
]
