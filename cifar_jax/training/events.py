"""A run's history as TensorBoard event files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from cifar_jax.steps.metrics import EpochRow

_TAGS = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/val": "val_accuracy",
    "learning_rate": "learning_rate",
    "images_per_second": "images_per_second",
}


@contextlib.contextmanager
def event_log(folder: Path, history: list[EpochRow]) -> Iterator[Callable[[EpochRow], None]]:
    """Yield a function that adds an epoch's row to the events in ``folder``, by optimizer step.

    The folder is rewritten from ``history``, so that a resumed run has no epoch twice.
    """
    from tensorboardX import SummaryWriter  # an extra

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:

        def add(row: EpochRow) -> None:
            for tag, name in _TAGS.items():
                writer.add_scalar(tag, row[name], row["step"])  # type: ignore[literal-required]
            writer.flush()

        for row in history:
            add(row)
        yield add
