"""One process at a time in a folder: a second run is refused, other work waits."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from cifar_jax.errors import ResourceError, UsageError, shown

_NAME = ".lock"
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # on some clusters' file systems
_QUIET_SECONDS = 2.0


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Create ``workdir`` if necessary, and keep other runs out of it.

    The kernel releases the lock when this process ends, however it ends. Folders that were created
    here, and in which nothing was written, are removed again.

    Raises:
        ResourceError: another process holds the lock, or ``workdir`` cannot be written.
        UsageError: its path is not UTF-8, which Orbax requires.
    """
    path = workdir / _NAME
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"--workdir {shown(workdir)} is not a UTF-8 path, which Orbax requires",
            fix="give another --workdir",
        ) from error
    made = [folder for folder in (workdir, *workdir.parents) if not folder.is_dir()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = _open_and_lock(path)
    except OSError as error:
        raise ResourceError(
            f"--workdir {workdir} cannot be written: {error.strerror}",
            fix="give another --workdir",
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder is gone, or not empty
            path.unlink()
            for folder in made:
                folder.rmdir()
        os.close(descriptor)


@contextlib.contextmanager
def alone_in(folder: Path, doing: str) -> Iterator[bool]:
    """Create ``folder`` if necessary, and hold its lock inside; waits for other processes.

    Yields False if there is no lock, as on some file systems.

    Args:
        doing: what the lock is for, shown to processes that wait.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    notice = f"waiting for another process, which is {doing} in {folder} ..."
    timer = threading.Timer(_QUIET_SECONDS, print, [notice], {"flush": True})
    folder.mkdir(parents=True, exist_ok=True)
    # A separate file, as the folder may be a run's too. The kernel releases a dead process's lock.
    with (folder / ".busy.lock").open("a") as lock:
        timer.start()
        try:
            alone = _lock(lock.fileno(), fcntl.LOCK_EX, folder)
        finally:
            timer.cancel()
        yield alone


def _lock(descriptor: int, how: int, folder: Path) -> bool:
    """Lock by ``flock``; False, with a warning, if the file system of ``folder`` has no locks."""
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        print(f"warning: no lock on {folder}, whose file system has none")
        return False
    return True


def _open_and_lock(path: Path) -> int:
    """A descriptor of the lock file, locked by this process."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, path.parent):
                return descriptor
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ResourceError(
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
        os.close(descriptor)  # its holder has just deleted the file


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
