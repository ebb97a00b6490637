"""Read a run from the text files of its workdir. Quick: no NumPy, no JAX."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from typing import Any

from cifar_jax.checkpoints.workdir import is_converted
from cifar_jax.config import TrainConfig, from_json
from cifar_jax.errors import CheckpointError, CifarJaxError
from cifar_jax.steps.metrics import EpochRow, best_row, read_history

_REPORT_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("data", "versions"), dict),
    **dict.fromkeys(("model", "device_kind"), str),
    **dict.fromkeys(("n_params", "n_train", "n_val", "n_test", "test_correct"), int),
    **dict.fromkeys(("epochs", "steps", "best_step", "devices", "seed"), int),
    **dict.fromkeys(("val_accuracy", "test_accuracy", "test_loss"), (int, float)),
    **dict.fromkeys(("train_seconds", "images_per_second"), (int, float)),
}


@dataclasses.dataclass(frozen=True)
class StoredRun:
    """A run, finished or not.

    Attributes:
        history: a row for each epoch done.
        report: ``report.json``, which a run writes at its end; None before.
    """

    workdir: Path
    config: TrainConfig
    history: list[EpochRow]
    report: dict[str, Any] | None

    @property
    def name(self) -> str:
        """The name of the folder."""
        return os.path.basename(os.path.abspath(self.workdir))

    @property
    def is_converted(self) -> bool:
        """Whether it is a converted network, without training."""
        return is_converted(self.workdir)

    @property
    def best(self) -> EpochRow | None:
        """The row of the epoch whose network is scored."""
        if self.report is None:
            return best_row(self.history) if self.history else None
        return next((r for r in self.history if r["step"] == self.report["best_step"]), None)


def read_run(workdir: Path) -> StoredRun:
    """Read ``config.json``, ``metrics.jsonl`` and ``report.json``; the last two may be missing.

    Raises:
        CheckpointError: ``workdir`` contains no run, or one of the files is damaged.
    """
    if not (workdir / "config.json").is_file():
        what = "holds no run" if workdir.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{workdir} {what}",
            fix="give a --workdir of cifar_jax.train, with config.json in it",
        )
    return StoredRun(
        workdir,
        _config(workdir / "config.json"),
        _history(workdir / "metrics.jsonl"),
        _report(workdir / "report.json"),
    )


def _config(path: Path) -> TrainConfig:
    try:
        return from_json(json.loads(path.read_text()), where="it")
    except (OSError, RecursionError, ValueError, CifarJaxError) as error:
        reason = error.what if isinstance(error, CifarJaxError) else str(error)
        raise _damaged(path, reason, "restore it, or use the version that wrote it") from error


def _history(path: Path) -> list[EpochRow]:
    try:
        return read_history(path)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error


def _report(path: Path) -> dict[str, Any] | None:
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, RecursionError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    _check(path, report, _REPORT_TYPES)
    _check(path, report["data"], {"name": str, "digest": str})
    for name, value in report.items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise _unreadable(path, f"{name} is {value}, not 0 or more")
    if not report["test_correct"] <= report["n_test"] > 0:
        raise _unreadable(path, "test_correct is more than n_test, or that is 0")
    return typing.cast("dict[str, Any]", report)


def _check(path: Path, values: Any, types: dict[str, Any]) -> None:
    """Raise ``CifarJaxError`` unless ``values`` has all keys of ``types``, with such values."""
    for name, kind in types.items():
        if not isinstance(values, dict) or not isinstance(values.get(name), kind):
            raise _unreadable(path, f"{name} is missing, or of a wrong type")


def _unreadable(path: Path, reason: str) -> CifarJaxError:
    workdir = path.parent
    return _damaged(
        path,
        reason,
        f"restore it, or delete {workdir / 'report.json'} and let python -m cifar_jax.train "
        f"--resume --workdir {workdir} write both metrics.jsonl and report.json again",
    )


def _damaged(path: Path, reason: str, fix: str) -> CifarJaxError:
    return CheckpointError(f"{path} cannot be used: {reason}", fix=fix)
