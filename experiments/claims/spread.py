"""Accuracies over several seeds: their mean and spread, and when two of them differ."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from claims.claim import Values

# Three seeds can agree by luck: no standard deviation is taken to be below that of an accuracy on
# 5,000 to 10,000 images.
_LEAST_STD_POINTS = 0.5


def spread(percents: Sequence[float]) -> Values:
    """Mean and sample standard deviation, which is 0 of a single value."""
    std = float(np.std(percents, ddof=1)) if len(percents) > 1 else 0.0
    return {"mean_percent": float(np.mean(percents)), "std_percent": std, "n": len(percents)}


def spread_of_shares(shares: Sequence[float]) -> Values:
    """:func:`spread` of shares 0..1, in percent."""
    return spread([100 * share for share in shares])


def spread_at(mean_percent: float) -> Values:
    """A :func:`spread` of that mean that nobody measured, for ``refuted_by``."""
    return {"mean_percent": mean_percent, "std_percent": 0.5, "n": 3}


def noise(a: Values, b: Values) -> float:
    """Half of the 95 % interval of the difference of two :func:`spread`: less is nothing.

    By Student's t. Of single values the standard deviation is taken to be known.
    """
    variance = sum(max(x["std_percent"], _LEAST_STD_POINTS) ** 2 / x["n"] for x in (a, b))
    freedom = a["n"] + b["n"] - 2
    return float(stats.t.ppf(0.975, freedom or math.inf)) * math.sqrt(variance)


def difference(a: Values, b: Values) -> tuple[float, bool]:
    """``a - b`` in points, and whether it is more than :func:`noise`."""
    points = a["mean_percent"] - b["mean_percent"]
    return points, abs(points) > noise(a, b)


def gain(a: Values, b: Values) -> str:
    """``-1.0 ± 4.4``: ``a - b`` in points, and their :func:`noise`."""
    points = round(difference(a, b)[0], 1) + 0.0  # not -0.0
    return f"{points:+.1f} ± {noise(a, b):.1f}"


def percent(a: Values) -> str:
    """``77.4 ± 0.2 %``."""
    return f"{a['mean_percent']:.1f} ± {a['std_percent']:.1f} %"
