"""Checkpoints, by Orbax: one folder ``<step>`` each, whole or absent, checked when it is read.

Saving is synchronous: a checkpoint counts as saved when it is on the disk. Orbax writes to a
temporary folder and renames it, so that a kill at any instant leaves the older ones in place. It
reads flipped bits without complaint, so a manifest with a digest of every file is written last: a
folder without one is no checkpoint, and one whose files differ from it is not read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.errors import CifarJaxError, ExitCode

_MANIFEST = "manifest.json"

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
    """The steps that have a checkpoint, ascending."""
    manifests = folder.glob(f"*/{_MANIFEST}")
    return sorted(int(path.parent.name) for path in manifests if path.parent.name.isdecimal())


def save(folder: Path, step: int, state: Any, metadata: dict[str, Any], *, best_step: int) -> Path:
    """Save ``state`` as ``folder/<step>``, then delete all but the newest and the best.

    Args:
        metadata: JSON values that belong to the state.
        best_step: the step that is kept whatever its age.

    Raises:
        CifarJaxError: environment; the disk is full, say. Older checkpoints are as they were.
    """
    path = folder / str(step)
    if step in saved_steps(folder):
        return path  # saved already: a damaged one would have been set aside when it was read
    try:
        shutil.rmtree(path, ignore_errors=True)  # a save that a kill cut short
        with _checkpointer() as checkpointer:
            checkpointer.save(
                path.absolute(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(jax.device_get(state)),
                    metadata=ocp.args.JsonSave(metadata),
                ),
            )
        temporary = path / f".{_MANIFEST}.tmp"
        with temporary.open("w") as file:
            json.dump(_file_digests(path), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path / _MANIFEST)
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
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        digests = _file_digests(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its {_MANIFEST} cannot be read: {error}") from error
    if digests != manifest:
        changed = sorted(name for name, _ in digests.items() ^ manifest.items())
        raise _damaged(path, f"{changed[0]} is not the file that was saved")
    state_args = ocp.args.StandardRestore(like)  # type: ignore[call-arg]
    try:
        with _checkpointer() as checkpointer:
            restored = checkpointer.restore(
                path.absolute(),
                args=ocp.args.Composite(state=state_args, metadata=ocp.args.JsonRestore()),
            )
    except (ValueError, KeyError, OSError) as error:  # another structure, say
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise _damaged(path, reason) from error
    if like is not None:
        _check_same_shapes(path, restored.state, like)
    return Checkpoint(path, restored.state, dict(restored.metadata))


def _checkpointer() -> ocp.Checkpointer:
    """Orbax, for this process alone: of several that hold the same state, one saves it."""
    process = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=process,
        active_processes={process},
        barrier_sync_key_prefix=f"process{process}",
    )
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options)
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _check_same_shapes(path: Path, state: Any, like: Any) -> None:
    """Orbax checks the tree; with NumPy leaves it takes any shape."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(state), strict=True)
    for (leaf_path, expected), found in leaves:
        if (expected.shape, expected.dtype) != (found.shape, found.dtype):
            raise _damaged(
                path,
                f"{jax.tree_util.keystr(leaf_path)} is {found.dtype}{list(found.shape)} there, "
                f"{expected.dtype}{list(expected.shape)} in this network",
            )


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


def _file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint, by its path within; without the manifest itself."""
    files = (file for file in path.rglob("*") if file.is_file() and _MANIFEST not in file.name)
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _damaged(path: Path, reason: str) -> CifarJaxError:
    return CifarJaxError(
        ExitCode.CHECKPOINT,
        f"the checkpoint {path} cannot be used: {reason}",
        fix="use an older step, or a copy",
    )
