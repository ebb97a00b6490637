"""The history of a run: a row per epoch, the sums behind it, and what follows from the rows."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any, TypedDict

from cifar_jax.options import is_of_type


class EpochRow(TypedDict):
    """A line of ``metrics.jsonl``. Losses are mean cross-entropies in nats, accuracies 0..1.

    ``learning_rate`` is that of the epoch's last step; ``seconds`` include the validation, while
    ``images_per_second`` counts only training.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float


@dataclasses.dataclass
class RunningSums:
    """Sums over the images seen so far, divided only when they are read."""

    loss: float = 0.0
    correct: float = 0.0
    count: float = 0.0

    def add(self, sums: dict[str, float]) -> None:
        self.loss += sums["loss"]
        self.correct += sums["correct"]
        self.count += sums["count"]

    @property
    def mean_loss(self) -> float:
        return self.loss / self.count

    @property
    def accuracy(self) -> float:
        return self.correct / self.count


def read_history(path: Path) -> list[EpochRow]:
    """The rows of ``metrics.jsonl`` at ``path``; none if there is no such file.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not a row; the message says which.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    return [_parse_row(line, f"line {number}") for number, line in enumerate(lines, start=1)]


def _parse_row(line: str, where: str) -> EpochRow:
    try:
        row: Any = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    for name, hint in typing.get_type_hints(EpochRow).items():
        if not isinstance(row, dict) or not is_of_type(row.get(name), hint):
            raise ValueError(f"{where}: {name} is missing, or of a wrong type")
        if not 0 <= row[name] < math.inf:
            raise ValueError(f"{where}: {name} is {row[name]}, not 0 or more")
    return typing.cast(EpochRow, row)


def best_row(history: list[EpochRow]) -> EpochRow:
    """The epoch with the highest validation accuracy; of equals, the earliest."""
    return max(history, key=lambda row: row["val_accuracy"])


def epochs_without_progress(history: list[EpochRow]) -> int:
    """The number of epochs since the lowest validation loss (of equals, the earliest)."""
    losses = [row["val_loss"] for row in history]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


_COLUMNS = (
    ("epoch", 5),
    ("step", 7),
    ("train loss", 10),
    ("acc %", 6),
    ("val loss", 8),
    ("acc %", 6),
    ("learn. rate", 11),
    ("images/s", 8),
    ("time", 7),
)
TABLE_HEADER = "  ".join(name.rjust(width) for name, width in _COLUMNS)


def table_row(row: EpochRow) -> str:
    """``row`` as a line under ``TABLE_HEADER``."""
    cells = (
        f"{row['epoch']}",
        f"{row['step']}",
        f"{row['train_loss']:.4f}",
        f"{100 * row['train_accuracy']:.2f}",
        f"{row['val_loss']:.4f}",
        f"{100 * row['val_accuracy']:.2f}",
        f"{row['learning_rate']:.2e}",
        f"{row['images_per_second']:,.0f}",
        f"{row['seconds']:.1f} s",
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
