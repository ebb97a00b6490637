"""The folder of a run: its config, and where its checkpoints are. Quick: no NumPy, no JAX."""

from __future__ import annotations

import json
import os
from pathlib import Path

from cifar_jax.config import TrainConfig, to_json
from cifar_jax.errors import CheckpointError, UsageError
from cifar_jax.steps.metrics import best_row, read_history
from cifar_jax.system.files import write_atomically

MANIFEST = "manifest.json"  # written last: a step's folder without one is not a checkpoint


def write_config(config: TrainConfig, workdir: Path) -> None:
    """Write ``config`` to ``workdir``, which is made if there is none."""
    workdir.mkdir(parents=True, exist_ok=True)
    write_atomically(workdir / "config.json", json.dumps(to_json(config), indent=2) + "\n")


def checkpoints_of(workdir: Path) -> Path:
    """The folder of a run's checkpoints, with a folder ``<step>`` for each."""
    return workdir / "checkpoints"


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    manifests = checkpoints.glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in manifests if path.parent.name.isdecimal())


def is_converted(workdir: Path) -> bool:
    """Whether ``workdir`` has a converted network, at step 0: runs save only after steps."""
    return 0 in saved_steps(checkpoints_of(workdir))


def is_step(path: Path) -> bool:
    """Whether ``path`` is the folder of one step, not a workdir."""
    return (path / MANIFEST).is_file()


def workdir_of(path: Path) -> Path:
    """The workdir of a run: ``path`` itself, or the workdir that contains one step's folder.

    Raises:
        UsageError: the step's folder is not in a workdir, as a copy may not be.
    """
    if not is_step(path):
        return path
    for step in (Path(os.path.abspath(path)), path.resolve()):  # the workdir may hold links
        if step.parent.name == checkpoints_of(step).name:
            return step.parents[1]
    raise UsageError(
        f"{path} is not in the checkpoints/ of a run, so there is no workdir to write to",
        fix="say where to write with --output",
    )


def step_folder(path: Path) -> Path:
    """The step's folder that ``path`` means: that of one step, or of the best step in a workdir.

    The best step has the highest validation accuracy. If that is not known, or no longer saved, it
    is the newest step.

    Raises:
        CheckpointError: there is none at ``path``, or the history cannot be read.
    """
    if is_step(path):
        return path
    steps = saved_steps(checkpoints_of(path))
    if not steps:
        what = "is neither a run's workdir nor a checkpoint" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}",
            fix="give a --workdir of cifar_jax.train that has a saved step, or one "
            "checkpoints/<step> in it",
        )
    metrics = path / "metrics.jsonl"
    try:
        history = read_history(metrics)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {metrics}, which records the best step: {error}",
            fix=f"say which step: {checkpoints_of(path)}/<step>",
        ) from error
    best = best_row(history)["step"] if history else None
    return checkpoints_of(path) / str(best if best in steps else steps[-1])
