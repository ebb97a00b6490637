"""Checkpoints, by Orbax: one folder ``<step>`` each, whole or absent, checked when it is read.

Saving is synchronous: a checkpoint counts as saved when it is on the disk. Orbax writes to a
temporary folder and renames it, so that a kill at any instant leaves the older ones in place; it
keeps no digest of the numbers, so the metadata holds one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.errors import CifarJaxError, ExitCode

# The newest two, so that one is left if the newest turns out damaged; and the best.
_NEWEST_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step.

    Attributes:
        state: the ``TrainState`` with NumPy leaves; as nested dicts where no ``like`` was given.
        metadata: what was given to :func:`save`.
    """

    path: Path
    state: Any
    metadata: dict[str, Any]


def tree_sha256(tree: Any) -> str:
    """SHA-256 over the bytes of all leaves, in the order of their paths.

    Paths such as ``Conv_0/kernel``; bytes little-endian, C order, in the leaf's own type.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    sha256 = hashlib.sha256()
    for path in sorted(leaves):
        sha256.update(np.ascontiguousarray(leaves[path]).tobytes())
    return sha256.hexdigest()


def saved_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint folder, ascending."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdecimal() and any(entry.iterdir())
    )


def save(folder: Path, step: int, state: Any, metadata: dict[str, Any], *, best_step: int) -> Path:
    """Save ``state`` as ``folder/<step>``, then delete all but the newest and the best.

    Args:
        metadata: JSON values that belong to the state.
        best_step: the step that is kept whatever its age.

    Raises:
        CifarJaxError: environment; the disk is full, say. Older checkpoints are as they were.
    """
    path = folder / str(step)
    if path.exists():
        return path  # saved already: a damaged one would have been set aside when it was read
    state = jax.device_get(state)
    metadata = {**metadata, "state_sha256": tree_sha256(state)}
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(
                path.absolute(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
                ),
            )
    except (OSError, ValueError) as error:
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"cannot save step {step} to {path}: {error}",
            fix="make room there; go on with --resume from the checkpoint before",
        ) from error
    for old in saved_steps(folder)[:-_NEWEST_KEPT]:
        if old != best_step:
            shutil.rmtree(folder / str(old))
    return path


def restore(path: Path, like: Any = None) -> Checkpoint:
    """Read the checkpoint at ``path``.

    Args:
        like: a state of the same structure and shapes; None gives nested dicts.

    Raises:
        CifarJaxError: checkpoint; damaged, or of another network than ``like``.
    """
    state_args = ocp.args.StandardRestore(like)  # type: ignore[call-arg]
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                path.absolute(),
                args=ocp.args.Composite(state=state_args, metadata=ocp.args.JsonRestore()),
            )
    except Exception as error:  # Orbax and TensorStore raise bare Exceptions for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _damaged(path, reason) from error
    metadata = dict(restored.metadata)
    if metadata.pop("state_sha256", None) != tree_sha256(restored.state):
        raise _damaged(path, "its numbers are not those that were saved")
    return Checkpoint(path, restored.state, metadata)


def restore_newest(folder: Path, like: Any) -> tuple[Checkpoint | None, list[CifarJaxError]]:
    """The newest checkpoint that can be read, and the errors of newer ones that cannot.

    Those are renamed to ``<step>.damaged``, out of the way of a run that comes by there again.

    Returns:
        (None, []) where there is no checkpoint at all.

    Raises:
        CifarJaxError: checkpoint; there are some, and none can be read.
    """
    rejected: dict[Path, CifarJaxError] = {}
    for step in reversed(saved_steps(folder)):
        path = folder / str(step)
        try:
            newest = restore(path, like)
        except CifarJaxError as error:
            rejected[path] = error
            continue
        for damaged in rejected:
            aside = damaged.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        return newest, list(rejected.values())
    if rejected:
        raise CifarJaxError(
            ExitCode.CHECKPOINT,
            f"none of the {len(rejected)} checkpoint(s) in {folder} can be read; "
            + "; ".join(str(error) for error in rejected.values()),
            fix="restore the folder from a copy, or start a new run in another --workdir",
        )
    return None, []


def _damaged(path: Path, reason: str) -> CifarJaxError:
    return CifarJaxError(
        ExitCode.CHECKPOINT,
        f"the checkpoint {path} cannot be used: {reason}",
        fix="use an older step, or a copy",
    )
