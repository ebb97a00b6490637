"""One process at a time in a folder: of runs the second is refused, of others it waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import CifarJaxError, ExitCode, shown

_NAME = ".lock"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of some clusters' file systems
_QUIET_SECONDS = 2.0


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Make ``workdir`` if need be, and keep other runs out of it.

    The kernel lifts the lock when this process ends, however it ends. A folder that was made here,
    and in which nothing was written, is taken away again.

    Raises:
        CifarJaxError: environment; another process holds it, or it cannot be written. Usage; its
            name is none that a checkpoint can have.
    """
    path = workdir / _NAME
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError as error:
        raise CifarJaxError(
            ExitCode.USAGE,
            f"--workdir {shown(workdir)} is in a folder, or has a name, that is not UTF-8, and "
            "Orbax saves to none such",
            fix="give another --workdir",
        ) from error
    was_there = workdir.is_dir()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = _open_and_lock(path)
    except OSError as error:
        raise CifarJaxError(
            ExitCode.ENVIRONMENT,
            f"--workdir {workdir} cannot be written: {error.strerror}",
            fix="give another --workdir",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # where the folder is gone, or not empty
            path.unlink()
            if not was_there:
                workdir.rmdir()
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[bool]:
    """Make ``folder`` if need be, wait until no other process is in here, and have others wait.

    Yields whether that is so: some file systems have no locks.

    Args:
        doing: what this is for, to say to those who wait.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    notice = f"waiting for another process, which is {doing} in {folder} ..."
    timer = threading.Timer(_QUIET_SECONDS, print, [notice], {"flush": True})
    folder.mkdir(parents=True, exist_ok=True)
    # A name of its own, as the folder may be a run's too. The kernel lifts a dead process's lock.
    with (folder / ".busy.lock").open("a") as lock:
        timer.start()
        try:
            alone = _lock(lock.fileno(), fcntl.LOCK_EX, folder)
        finally:
            timer.cancel()
        yield alone


def _lock(descriptor: int, how: int, folder: Path) -> bool:
    """Lock as ``flock`` does; False, and a warning, if the file system of ``folder`` has none."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        print(f"warning: no lock on {folder}, whose file system has none")
        return False
    return True


def _open_and_lock(path: Path) -> int:
    """A descriptor of the lock file, which no other process has locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path.parent):
                return descriptor
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise CifarJaxError(
                ExitCode.ENVIRONMENT,
                f"--workdir {path.parent} is locked by {holder or 'another run'}",
                fix="wait for that run to end or stop it, or give another --workdir",
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        if _is_file_of(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)  # the one who held it has just taken it away


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
