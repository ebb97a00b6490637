"""Checkpoints, by Orbax: one folder ``<step>`` each, whole or absent, verified when it is read.

Saving is synchronous: a checkpoint counts as saved once it is on the disk. It is written to a
hidden folder, which is renamed when complete, so that a kill at any instant leaves the older ones
in place. Orbax reads flipped bits without complaint, so a manifest with a digest of every file is
written last: a folder without a manifest is not a checkpoint, and one whose files differ from it is
not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cifar_jax.checkpoints.workdir import MANIFEST, saved_steps
from cifar_jax.errors import CheckpointError, CifarJaxError, ResourceError, first_line


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    # asyncio names the file of a task that failed in the message.
    where = record.getMessage() if record.name == "asyncio" else record.pathname
    return f"{os.sep}orbax{os.sep}" not in where


# For an error that Orbax raises, its threads also log tracebacks, some of them later; drop those.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_not_of_orbax)

_UNFINISHED = ".unfinished-"  # being written or deleted
_DAMAGED = ".damaged"

# The newest two, so that one is left if the newest proves damaged; and the best.
_NEWEST_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved at one step.

    Attributes:
        state: the ``TrainState`` with NumPy leaves.
        metadata: as given to :func:`save`.
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


def save(folder: Path, step: int, state: Any, metadata: dict[str, Any], *, best_step: int) -> Path:
    """Save ``state`` as ``folder/<step>``, then delete all but the newest two and the best.

    Args:
        metadata: JSON values that belong to the state.
        best_step: the step that is kept whatever its age.

    Raises:
        ResourceError: for example, the disk is full. Older checkpoints are untouched.
    """
    path, unfinished = folder / str(step), folder / f"{_UNFINISHED}{step}"
    older = saved_steps(folder)
    if step in older:
        return path  # saved already: a damaged one would have been set aside when it was read
    state = jax.device_get(state)
    try:
        remove_unfinished(folder)
        with _checkpointer() as checkpointer:
            checkpointer.save(
                unfinished.absolute(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(metadata)
                ),
            )
        (unfinished / MANIFEST).write_text(json.dumps(_file_digests(unfinished), indent=1))
        _flush(unfinished, *unfinished.rglob("*"))
        if path.exists():
            _set_aside(path)  # a folder without a manifest: not ours, or damaged
        unfinished.rename(path)
        _flush(folder)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError):
            remove_unfinished(folder)
        raise _not_saved(folder, step, state, error) from error
    for old in older[: 1 - _NEWEST_KEPT]:
        if old != best_step:
            # Renamed first: a half-deleted folder must not look like a checkpoint. What cannot be
            # deleted, such as open files on some network disks, waits for the next save.
            with contextlib.suppress(OSError):
                shutil.rmtree((folder / str(old)).rename(folder / f"{_UNFINISHED}{old}"))
    return path


def remove_unfinished(folder: Path) -> list[Path]:
    """Delete the remains of interrupted saves and deletions; returns their paths."""
    left = sorted(folder.glob(f"{_UNFINISHED}*"))
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return [path for path in left if not path.exists()]


def strangers(folder: Path) -> list[Path]:
    """Everything in ``folder`` that neither is nor was a checkpoint."""
    own = {str(step) for step in saved_steps(folder)}
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if path.name not in own and path.suffix != _DAMAGED]


def _flush(*paths: Path) -> None:
    """Make files, or the names in a folder, survive a loss of power."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _set_aside(path: Path) -> None:
    aside = path.with_suffix(_DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _not_saved(folder: Path, step: int, state: Any, error: Exception) -> CifarJaxError:
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
    room = f"it takes some {megabytes:,.1f} MB"
    with contextlib.suppress(OSError):
        room += f", and {shutil.disk_usage(folder).free / 2**20:,.1f} MB are free"
    code = re.search(r"os_error_code='(\d+)'", str(error))  # at the end of a line of paths
    reason = os.strerror(int(code[1])) if code else first_line(error)
    older = saved_steps(folder)
    last = f"the last that is saved is step {older[-1]}" if older else "none is saved yet"
    return ResourceError(
        f"cannot save step {step} to {folder}: {reason} ({room}; {last})",
        fix="free up space there, and continue with --resume",
    )


def restore(path: Path, like: Any) -> Checkpoint:
    """The checkpoint at ``path``.

    Args:
        like: a state of the same structure, shapes and types; its leaves are arrays or
            ``ShapeDtypeStruct``.

    Raises:
        CheckpointError: it is damaged, or of another network than ``like``.
    """
    _check_files(path)
    _check_arrays(path, like)
    state_args = ocp.args.StandardRestore(like)  # type: ignore[call-arg]
    restored = _read(path, state=state_args, metadata=ocp.args.JsonRestore())
    return Checkpoint(path, jax.device_get(restored.state), dict(restored.metadata))


def restore_metadata(path: Path) -> dict[str, Any]:
    """Only the ``metadata`` that was given to :func:`save`.

    Raises:
        CheckpointError: it is damaged.
    """
    _check_files(path)
    return dict(_read(path, metadata=ocp.args.JsonRestore()).metadata)


def _read(path: Path, **items: Any) -> Any:
    with _checkpointer() as checkpointer:
        try:
            return checkpointer.restore(path.absolute(), args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax, TensorStore and their formats raise all kinds
            raise _damaged(path, first_line(error)) from error


def _check_files(path: Path) -> None:
    """Raise ``CheckpointError`` unless the files are those that were saved."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        digests = _file_digests(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, f"its {MANIFEST} cannot be read: {first_line(error)}") from error
    if not isinstance(manifest, dict):
        raise _damaged(path, f"its {MANIFEST} does not list files")
    for name in sorted(digests.keys() | manifest.keys()):
        if digests.get(name) != manifest.get(name):
            raise _damaged(path, f"{name} is not the file that was saved")


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone: all processes hold the same state, and one of them saves it."""
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


def _check_arrays(path: Path, like: Any) -> None:
    """Raise ``CheckpointError`` unless the stored arrays are those of ``like``.

    Called before any is read: Orbax checks only the tree, and reads arrays of whatever size.
    """
    try:
        saved = ocp.StandardCheckpointHandler().metadata(path.absolute() / "state").tree
        found, expected = _describe_arrays(saved), _describe_arrays(like)
        # A chunk is decoded as a whole.
        chunks = {leaf.name: leaf.storage.chunk_shape for leaf in jax.tree.leaves(saved)}
        sizes = {leaf.name: math.prod(leaf.shape) for leaf in jax.tree.leaves(saved)}
    except Exception as error:  # as in _read
        raise _damaged(path, first_line(error)) from error
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise _damaged(
                path,
                f"{name} is {found.get(name, 'missing')} there, "
                f"{expected.get(name, 'missing')} in this network",
            )
    for name, chunk in chunks.items():
        if math.prod(chunk) > max(1, sizes[name]):
            raise _damaged(path, f"{name} is stored in chunks of {list(chunk)}, larger than it is")


def _describe_arrays(tree: Any) -> dict[str, str]:
    """From the path of each leaf, such as ``params/Dense_0/bias``, to ``float32[4]`` and so on."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_newest(folder: Path, like: Any) -> tuple[Checkpoint | None, list[CifarJaxError]]:
    """The newest checkpoint that can be read, and the errors of newer ones that cannot.

    The latter are renamed to ``<step>.damaged``, so that a run that reaches the step again can save
    it.

    Returns:
        (None, []) if there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none can be read.
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
            _set_aside(damaged)
        return newest, list(rejected.values())
    if rejected:
        raise CheckpointError(
            f"none of the {len(rejected)} checkpoint(s) in {folder} can be read; "
            + "; ".join(error.what for error in rejected.values()),
            fix="restore the folder from a copy, or start a new run in another --workdir",
        )
    return None, []


def _file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but the manifest, by relative path."""
    digests = {}
    for file in path.rglob("*"):
        if file.is_file() and file != path / MANIFEST:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            digests[file.relative_to(path).as_posix()] = digest
    return digests


def _damaged(path: Path, reason: str) -> CifarJaxError:
    return CheckpointError(
        f"the checkpoint {path} cannot be used: {reason}",
        fix="use another step, or a copy",
    )
