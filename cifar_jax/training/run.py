"""The state of a training run: its fixed parts, and its progress."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import jax
import optax

from cifar_jax import __version__
from cifar_jax.checkpoints.workdir import checkpoints_of, saved_steps
from cifar_jax.config import TrainConfig
from cifar_jax.data.dataset import Dataset
from cifar_jax.errors import NumericsError
from cifar_jax.steps.metrics import EpochRow, RunningSums
from cifar_jax.steps.parallel import Advance, Evaluate
from cifar_jax.steps.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that stay fixed."""

    config: TrainConfig
    workdir: Path
    dataset: Dataset
    devices: Sequence[jax.Device]
    schedule: optax.Schedule
    advance: Advance
    evaluate: Evaluate

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset.train) // self.config.batch_size

    @property
    def checkpoints(self) -> Path:
        return checkpoints_of(self.workdir)


@dataclasses.dataclass
class Progress:
    """The progress of a run: the content of a checkpoint, and all that resuming needs.

    Attributes:
        state: the training state after ``state.step`` steps.
        history: a row for each finished epoch.
        sums: training sums of the current epoch.
        seconds: time spent on the current epoch.
    """

    state: TrainState
    history: list[EpochRow] = dataclasses.field(default_factory=list)
    sums: RunningSums = dataclasses.field(default_factory=RunningSums)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return int(self.state.step)


def diverged(run: Run, what: str) -> NumericsError:
    """The error that something is not finite, with the last step that is saved."""
    saved = saved_steps(run.checkpoints)
    return NumericsError(
        f"{what}; " + (f"step {saved[-1]} is saved" if saved else "nothing is saved yet"),
        fix="start again with a lower --learning-rate, or with --clip-norm 1",
    )


def versions() -> dict[str, str]:
    packages = (
        *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
        *("tensorflow-cpu", "tensorflow"),  # one or the other is installed
    )
    found = {"cifar_jax": __version__, "python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
