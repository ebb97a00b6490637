"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import CifarJaxError, ExitCode

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` as ``path``: a reader, a kill, a power cut meets the old file or the new one.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the name may reach the disk before the text does
    os.replace(temporary, path)


def try_to_write(folder: Path) -> None:
    """Make ``folder`` if need be, and a file in it, which is gone again.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def lacks_room(error: OSError) -> bool:
    """Whether ``error`` is of a full disk, a quota or the like."""
    return error.errno in _NO_ROOM


def fix_of(error: OSError, another: str) -> str:
    """What to do where something cannot be written: make room if it lacks, or give ``another``."""
    return f"make room there, or give {another}" if lacks_room(error) else f"give {another}"


def check_is_new(destination: Path, option: str) -> None:
    """Raise ``CifarJaxError`` (usage) if there is a ``destination``, which ``option`` names."""
    if os.path.lexists(destination):
        raise CifarJaxError(
            ExitCode.USAGE,
            f"{option} {destination} exists, and is not overwritten",
            fix="give a new name, or move it away",
        )


@contextlib.contextmanager
def writing(what: str, another: str) -> Iterator[None]:
    """Tell an ``OSError`` inside as ``CifarJaxError`` (environment): ``what`` cannot be written.

    Args:
        another: what to give in its place, as :func:`fix_of` has it.
    """
    try:
        yield
    except OSError as error:
        raise CifarJaxError(
            ExitCode.ENVIRONMENT, f"cannot write {what}: {error}", fix=fix_of(error, another)
        ) from error


@contextlib.contextmanager
def new_path(destination: Path, option: str) -> Iterator[Path]:
    """A path to write a file or folder to, which becomes ``destination`` when all went well.

    Args:
        option: what a person calls ``destination``.

    Raises:
        CifarJaxError: environment; it cannot be written.
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
