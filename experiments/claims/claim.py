"""What a claim of the tutorial is, and what measuring it gives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

from claims.study import Study

HOLDS: Literal["holds"] = "holds"
CAVEAT: Literal["holds with a caveat"] = "holds with a caveat"
FAILS: Literal["does not hold here"] = "does not hold here"

# What JSON can hold, and NaN of a run that diverged; names carry units: "ms", "percent", "pixels".
Values = dict[str, Any]


def to_json(value: Any) -> Any:
    """``value`` of ``Values``, in which null stands for NaN and infinities: JSON has none."""
    return _replaced(value, lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)


def from_json(value: Any) -> Any:
    """``Values`` again, with NaN for null, as judges calculate with them."""
    return _replaced(value, lambda x: math.nan if x is None else x)


def _replaced(value: Any, replace: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _replaced(inner, replace) for name, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, replace) for inner in value]
    return replace(value)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A judgement of ``Values``.

    Attributes:
        finding: what was found, and why that is the verdict, in a few sentences for a reader who
            sees nothing else.
        evidence: the numbers behind it, in Markdown.
    """

    verdict: Literal["holds", "holds with a caveat", "does not hold here"]
    finding: str
    evidence: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an experiment found.

    Attributes:
        values: the numbers that the verdict rests on, and no others.
        n: how many repetitions each rests on: seeds, rounds, steps, resamplings of one sample; 1
            where it is arithmetic.
        figure: the name of a picture in ``study.figures``, if there is one.
    """

    values: Values
    n: int
    figure: str | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim of the tutorial.

    Attributes:
        question: its number there, 1 to 60.
        says: the claim, in our own words.
        measure: the experiment. Its docstring says how the claim is tested, what would refute it,
            and what it costs.
        judge: the verdict from the numbers alone, pure: other numbers, another verdict.
        refuted_by: numbers that refute the claim, or qualify it where nothing can refute it, or
            bear it out where the measured ones refute it: the tests give them to ``judge``, and
            see another verdict.
    """

    question: int
    says: str
    measure: Callable[[Study], Measured]
    judge: Callable[[Values], Verdict]
    refuted_by: Values
