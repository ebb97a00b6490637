"""Atomic writes, and readable errors when writing fails."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import ResourceError, UsageError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, so that at any moment either the old or the new file is there.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # otherwise the rename may reach the disk before the text
    os.replace(temporary, path)


def try_to_write(folder: Path) -> None:
    """Create ``folder`` if necessary, and a file in it, which is deleted again.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lacks_room(error: OSError) -> bool:
    """Whether ``error`` means a full disk, an exceeded quota or the like."""
    return error.errno in _NO_ROOM


def fix_of(error: OSError, another: str) -> str:
    """The fix for a failed write: free space if that is what lacks, or give ``another``."""
    return f"free up space there, or give {another}" if lacks_room(error) else f"give {another}"


def check_is_new(destination: Path, option: str) -> None:
    """Raise ``UsageError`` if ``destination``, given by ``option``, exists."""
    if os.path.lexists(destination):
        raise UsageError(
            f"{option} {destination} exists, and is not overwritten",
            fix="give a new name, or move it away",
        )


@contextlib.contextmanager
def writing(what: str, another: str) -> Iterator[None]:
    """Turn an ``OSError`` inside into a ``ResourceError``: cannot write ``what``.

    Args:
        another: what to give instead, as in :func:`fix_of`.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write {what}: {error}", fix=fix_of(error, another)) from error


@contextlib.contextmanager
def new_path(destination: Path, option: str) -> Iterator[Path]:
    """A temporary path for a file or folder, renamed to ``destination`` on success.

    Args:
        option: the option that gives ``destination``, for errors.

    Raises:
        ResourceError: ``destination`` cannot be written.
    """
    folder = None
    try:
        with writing(f"{option} {destination}", "another place"):
            destination.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
            path = folder / destination.name
            yield path
            path.rename(destination)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
